//! Expands a QCOW2 source.
//!
//! Why: one pass over what is in use costs less than a download and a conversion.
//! How: batch after batch of L2 tables: a [`Plan`] of what is stored, a fetch of just that, and
//! [`Clusters`] that make the guest's bytes of it.
//! Never: goes on with another version of the source, or with a layout that is not the copy's.
//! Start at [`expand`].

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use tokio::sync::watch;

use crate::disk::{DigestSet, DiskError, Filling, Version};
use crate::fetch::decode::{Codec, Decoder, Limits};
use crate::fetch::threads::{blocking, in_place};
use crate::fetch::{
    Engine, FetchError, Fetched, MAX_PART_BYTES, Pipeline, Progress, Source, SourceFile, transfer,
};
use crate::image::qcow2::{Bitmaps, Given, Header, Image};
use crate::image::{Format, ImageError, detect};
use crate::ring::{BLOCK_BYTES, BufShare, is_zero};

use super::clusters::Clusters;
use super::early::Early;
use super::error::ImportError;
use super::plan::Plan;
use super::tables;

/// Entries of one batch: 24 bytes each, and 64 GiB of guest data at the usual cluster size.
const BATCH_ENTRIES: usize = 1 << 20;
/// Entries at most if the source has to come in one go, so that a digest can prove it.
const WHOLE_ENTRIES: usize = 8 << 20;
/// Before the tag of the source's version: such bytes are not the source's own.
const TAG_PREFIX: &str = "raw:";

/// Brings what `source` names into `filling` as a raw disk. A raw source is brought in as it is, one
/// of another format than QCOW2 is refused. The digests are those of the raw disk; those that `source` expects are of
/// its own bytes, and proved on the way.
///
/// # Errors
/// [`ImportError`]. What is durable stays for the next try, but after a digest that differs.
pub(super) async fn expand(
    engine: &Engine,
    source: &Source,
    digests: DigestSet,
    filling: &mut Filling,
    progress: &Arc<Progress>,
) -> Result<Fetched, ImportError> {
    let (file, head) = match SourceFile::open(engine, source, progress).await {
        Ok(opened) => opened,
        Err(error) => return Err(error.into()),
    };
    match detect(&head) {
        Format::Qcow2 => {}
        Format::Raw => {
            // Before all of it is fetched, if its beginning is enough to tell.
            may_be_raw(source, packed_format(source, &head))?;
            let fetched = transfer(engine, source, filling, progress).await?;
            return not_packed(filling, source).map(|()| fetched);
        }
        format @ (Format::Vmdk | Format::Vhd | Format::Vhdx) => {
            return Err(ImportError::NotExpanded { url: source.url.to_string(), format });
        }
    }
    let name = source.url.file_path().unwrap_or_else(|| source.url.to_string().into());
    let image = open_image(&file, head, Given::default(), &name).await?;
    let virtual_bytes = image.header().size_bytes;
    let limit = engine.policy.max_bytes;
    if virtual_bytes > limit {
        let url = source.url.to_string();
        return Err(FetchError::TooLarge { url, total: virtual_bytes, limit }.into());
    }
    let tag = format!("{TAG_PREFIX}{}", file.tag());
    let version = Version { total_bytes: Some(virtual_bytes), tag };
    progress.set_total(Some(virtual_bytes));
    // Half of the buffers for what arrives, half for what is made of it.
    let half = (engine.buffers / 2).max(4);
    let work = Work {
        engine,
        file: &file,
        image: &image,
        name,
        digests,
        arriving: engine.pool.share(half, half),
        made: engine.pool.share(half, half),
        progress,
    };
    if filling.version().as_ref() == Some(&version) {
        in_place(|| filling.begin_sparse(&version, true))?;
        match work.run(filling).await {
            Err(error @ ImportError::Unsteady { .. }) => {
                tracing::warn!(error = %error.report(), "starting over");
                progress.failed_once(error.report());
            }
            ended => return ended,
        }
    }
    in_place(|| filling.begin_sparse(&version, false))?;
    work.run(filling).await
}

/// An image inside a compressed stream cannot be expanded, and is no raw disk.
fn not_packed(filling: &Filling, source: &Source) -> Result<(), ImportError> {
    let mut head = [0; 64];
    let read = filling.file().read_at(&mut head, 0);
    read.map_err(|e| DiskError::io("read", &filling.path(), e))?;
    may_be_raw(source, detect(&head))
}

/// What a compressed source has, by its first bytes; raw if they do not tell.
fn packed_format(source: &Source, head: &[u8]) -> Format {
    let codec = if source.unpack { Codec::sniff(head) } else { None };
    let limits = Limits { max_output_bytes: u64::MAX };
    let decoder = codec.map(|codec| Decoder::new(codec, limits));
    let Some(Ok(mut decoder)) = decoder else { return Format::Raw };
    let mut first = [0; 64];
    // What is wrong with it is told by who decodes all of it.
    match decoder.decode(head, &mut first) {
        Ok(step) => detect(&first[..step.written]),
        Err(_damaged) => Format::Raw,
    }
}

/// Refuses what is an image inside a compressed stream.
fn may_be_raw(source: &Source, found: Format) -> Result<(), ImportError> {
    match found {
        Format::Raw => Ok(()),
        Format::Qcow2 => Err(ImportError::PackedQcow2 { url: source.url.to_string() }),
        format @ (Format::Vmdk | Format::Vhd | Format::Vhdx) => {
            Err(ImportError::NotExpanded { url: source.url.to_string(), format })
        }
    }
}

/// Fetches and judges header, bitmaps and L1 table.
pub(super) async fn open_image(
    file: &SourceFile<'_>,
    mut head: Vec<u8>,
    given: Given,
    name: &std::path::Path,
) -> Result<Image, ImportError> {
    let total = file.len_bytes();
    let wanted = (Header::wanted_len(&head) as u64).min(total);
    if wanted > head.len() as u64 {
        head = file.read(0..wanted).await?;
    }
    head.truncate(usize::try_from(wanted.max(512)).unwrap_or(usize::MAX));
    let refused = |fault| ImageError::fault(name, fault);
    let mut header = Header::parse(&head, total, given).map_err(refused)?;
    let mut bitmaps = Bitmaps::of(&header, total);
    while let Some(range) = bitmaps.wanted() {
        bitmaps.take(&file.read(range).await?).map_err(refused)?;
    }
    header.notes.extend(bitmaps.notes());
    let range = header.l1_needed();
    let mut l1 = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + MAX_PART_BYTES);
        l1.extend(file.read(at..end).await?);
        at = end;
    }
    Ok(Image::from_l1(header, total, &l1).map_err(refused)?)
}

/// The clusters that are not wholly here: each is made at once.
pub(super) fn whole_clusters(header: &Header, missing: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let size = header.cluster_bits.size_bytes();
    let mut whole: Vec<Range<u64>> = Vec::new();
    for range in missing {
        let end = range.end.next_multiple_of(size).min(header.size_bytes);
        let start = range.start / size * size;
        match whole.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            Some(_) | None => whole.push(start..end),
        }
    }
    whole
}

/// True if nothing but zeroes is here in `range`.
fn is_hole(filling: &Filling, range: &Range<u64>) -> Result<bool, FetchError> {
    let failed = |e| {
        let source = Box::new(DiskError::io("read back", &filling.path(), e));
        FetchError::ReadBack { source }
    };
    let (mut at, mut room) = (range.start, vec![0; BLOCK_BYTES]);
    while at < range.end {
        at = match rustix::fs::seek(&**filling.file(), SeekFrom::Data(at)) {
            Ok(data) => data.max(at),
            Err(Errno::NXIO) => return Ok(true),
            // A file system that cannot tell has data everywhere.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(e) => return Err(failed(e.into())),
        };
        if at >= range.end {
            break;
        }
        let len = usize::try_from(range.end - at).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
        filling.file().read_exact_at(&mut room[..len], at).map_err(failed)?;
        if !is_zero(&room[..len]) {
            return Ok(false);
        }
        at += len as u64;
    }
    Ok(true)
}

struct Work<'a> {
    engine: &'a Engine,
    file: &'a SourceFile<'a>,
    image: &'a Image,
    name: PathBuf,
    digests: DigestSet,
    arriving: BufShare,
    made: BufShare,
    progress: &'a Arc<Progress>,
}

impl Work<'_> {
    async fn run(&self, filling: &mut Filling) -> Result<Fetched, ImportError> {
        let missing = whole_clusters(self.image.header(), filling.missing());
        self.progress.begin_at(filling.present_bytes());
        // Clusters come in an order of their own: direct writes would be many small allocations.
        let (digests, probe) = (self.digests, self.engine.probe.when(false));
        // Clusters come nearly in order; a few that are early wait, the rest is read back.
        let held = self.made.most() / 2;
        let pipeline = Pipeline::start(filling, &missing, held, &probe, digests, self.progress)?;
        let result = self.batches(filling, &missing, &pipeline).await;
        let total = filling.total_bytes().unwrap_or(0);
        match result {
            Ok(()) => {
                self.progress.verifying();
                let digests = blocking(move || pipeline.finish(total)).await?;
                Ok(Fetched { digests, etag: self.file.etag() })
            }
            Err(error) => {
                // A writer that has stopped tells why; else the first error is the reason.
                let ended = blocking(move || pipeline.abandon()).await;
                match (error, ended) {
                    (ImportError::Stopped, Err(why)) => Err(why.into()),
                    (ImportError::Stopped, Ok(())) => Err(FetchError::Cancelled.into()),
                    (error, _) => Err(error),
                }
            }
        }
    }

    async fn batches(
        &self,
        filling: &Filling,
        missing: &[Range<u64>],
        pipeline: &Pipeline,
    ) -> Result<(), ImportError> {
        let proves = self.file.source().expect.is_some();
        let most = if proves { WHOLE_ENTRIES } else { BATCH_ENTRIES };
        let tables: Vec<_> = self.image.tables().collect();
        let mut next = 0;
        while next < tables.len() {
            // The digest proves what comes now, and so what is here as far as it is the same.
            let plan = Plan::new(self.image, missing, tables[next].first_cluster);
            let mut plan = plan.checking_kept(proves);
            next = tables::read_batch(
                self.file, self.image, &tables, next, most, &mut plan, &self.name,
            )
            .await?;
            if proves && next < tables.len() {
                return Err(ImportError::TooManyClusters { most: WHOLE_ENTRIES });
            }
            plan.close();
            filling.promise(plan.data_bytes())?;
            self.batch(filling, plan, pipeline, proves).await?;
        }
        Ok(())
    }

    async fn batch(
        &self,
        filling: &Filling,
        plan: Plan,
        pipeline: &Pipeline,
        proves: bool,
    ) -> Result<(), ImportError> {
        for range in plan.kept_zeroes() {
            if !in_place(|| is_hole(filling, &range))? {
                let url = self.name.display().to_string();
                return Err(ImportError::Unsteady { url, at: range.start });
            }
        }
        let feed = pipeline.feed();
        for zero in plan.zeroes() {
            let len = zero.end - zero.start;
            feed.send_zeroes(zero.start, len).map_err(|_stopped| ImportError::Stopped)?;
        }
        let ranges = match proves {
            true => std::iter::once(0..self.file.len_bytes()).collect(),
            false => plan.ranges(),
        };
        let clusters = Arc::new(Clusters::start(plan, feed, &self.made, filling, &self.name)?);
        let taker: Arc<dyn crate::fetch::Taker> = Arc::clone(&clusters) as _;
        let wanted = proves.then(|| self.file.source().expect.wanted());
        let over = watch::Sender::new(false);
        let fetched = async {
            let fetched = self.file.fetch(ranges, taker, wanted, &self.arriving, filling).await;
            over.send_replace(true);
            fetched
        };
        let (fetched, ()) = match filling.arriving() {
            Some(arriving) => {
                let early = Early::new(self.file, arriving, clusters.shared());
                tokio::join!(fetched, early.serve(over.subscribe()))
            }
            None => (fetched.await, ()),
        };
        let clusters = Arc::into_inner(clusters).expect("the fetch has let go of its taker");
        // Decoders that failed stopped the fetch: their error is the reason.
        let decoded = blocking(move || clusters.finish()).await;
        let found = match (fetched, decoded) {
            (Err(error), _) => return Err(error.into()),
            (Ok(_), Err(error)) => return Err(error),
            (Ok(None), Ok(())) => return Err(ImportError::Stopped),
            (Ok(Some(found)), Ok(())) => found,
        };
        if let Some((kind, expected, found)) = self.file.source().expect.mismatch(&found) {
            let url = self.file.source().url.to_string();
            return Err(FetchError::Digest { url, kind, expected, found }.into());
        }
        Ok(())
    }
}
