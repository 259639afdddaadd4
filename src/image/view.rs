//! An image as a guest sees it: a flat range of read-only bytes.
//!
//! Why: servers answer requests for guest ranges and must not care about formats.
//! How: a view is a stack of layers, an image on top of its backing files. [`View::run_at`]
//! resolves a position into a run; the server sends it from a map, as zeroes, or from a decoded
//! cluster. [`View::read_at`] does all of it into a buffer. Layers are shared by the views that
//! stand on them, with their maps and decoded clusters.
//! Never: changes a byte, takes a lock to resolve, or dies of a page that cannot be read.
//! Start at [`View::open`].

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::layer::{Layer, LayerKind, LayerRun};
use super::qcow2::BackingFormat;
use super::source::LayerFile;
use super::{Decoded, DecodedCache, Format, ImageError, Info, ReadError, info, qcow2};
use super::{ahead, crew};
use crate::disk::{Arriving, Sealed};
use crate::map::{FileMap, GuestSlice, KernelSlice, SharedTable};
use crate::units::{FileOffset, GuestOffset};

/// Files that a view may be made of: an image and its backing files.
pub const MAX_LAYERS: usize = 16;
/// Clusters that [`View::prepare`] decodes at a time: 2 MiB of the usual size.
const MAX_PREPARED: usize = 32;
/// Clusters that [`View::will_read`] has decoded at a time: 16 MiB of the usual size.
const MAX_HINTED: usize = 256;
/// Runs that they look at.
const MAX_PREPARED_RUNS: usize = 1024;

/// A place in one of the files of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Which layer's data file: 0 is the image itself, 1 its backing file, and so on.
    pub layer: u8,
    /// Position in that file.
    pub at: FileOffset,
}

impl Stored {
    /// The place `count` bytes further.
    #[must_use]
    pub fn advance(self, count: u64) -> Self {
        Self { at: self.at.advance(count), ..self }
    }
}

/// How the bytes of a run are had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// In a file from this place on, contiguous: see [`View::mapped`].
    Data(Stored),
    /// Zeroes; reading the file for them would be waste.
    Zero,
    /// In one compressed cluster: see [`View::decoded`].
    Encoded,
}

/// A guest range of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How its bytes are had.
    pub kind: RunKind,
    /// Its length in bytes, at least 1.
    pub len_bytes: u64,
}

/// How a sealed file is opened, and what it is given beside itself.
#[derive(Debug, Default)]
pub struct Opening<'a> {
    /// What its owner says it is; `None` takes the content's word.
    pub declared: Option<Format>,
    /// The disk as it was at this internal snapshot, by ID or name; `None`: as it is now.
    pub snapshot: Option<&'a str>,
    /// The view of its backing file. The name that the image has for it is never looked at.
    pub base: Option<&'a View>,
    /// The external data file.
    pub data: Option<Sealed>,
    /// Where decoded clusters are kept; `None`: in the cache that the process shares.
    pub cache: Option<Arc<DecodedCache>>,
}

/// What one layer is to a reader in another process.
#[derive(Clone, Copy, Debug)]
pub struct Handout<'a> {
    /// The file that its data is in.
    pub data: &'a File,
    /// How much of it counts, in bytes.
    pub len_bytes: u64,
    /// What its units are.
    pub map: &'a SharedTable,
    /// Which units of the file are here, if not all are.
    pub presence: Option<&'a SharedTable>,
    /// Where its decoded blocks are, in the slab of [`View::cache`].
    pub decoded: Option<&'a SharedTable>,
}

/// A flat range of read-only bytes, for any number of threads.
#[derive(Debug)]
pub struct View {
    /// The image, its backing file, that one's backing file; at least one.
    layers: Vec<Arc<Layer>>,
    /// Kept open, so that whoever opens the base by itself shares its layers.
    _base: Option<Arc<View>>,
}

impl View {
    /// Opens a sealed file as `declared`, or as what its content says. Reads the header only;
    /// table entries are checked when first touched. Decoded clusters go to the cache that the
    /// process shares.
    ///
    /// # Errors
    /// [`ImageError`]: not an image that can be served, or the host failed to read or map it.
    pub fn open(sealed: Sealed, declared: Option<Format>) -> Result<Self, ImageError> {
        Self::open_as(sealed, Opening { declared, ..Opening::default() })
    }

    /// As [`open`](Self::open), with a cache of the caller's choice.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with_cache(
        sealed: Sealed,
        declared: Option<Format>,
        cache: Arc<DecodedCache>,
    ) -> Result<Self, ImageError> {
        Self::open_as(sealed, Opening { declared, cache: Some(cache), ..Opening::default() })
    }

    /// As [`open`](Self::open), in any way; `file` may be one that is still arriving. Opening waits
    /// for its header then, and reading for what is read; its tables are not checked as a whole.
    ///
    /// # Errors
    /// As [`open`](Self::open); also if what was given is not what the image needs:
    /// [`ImageError::NoSnapshot`], [`ImageError::NotNeeded`], [`ImageError::BaseFormat`],
    /// [`ImageError::TooManyLayers`].
    pub fn open_as(file: impl Into<LayerFile>, opening: Opening<'_>) -> Result<Self, ImageError> {
        let Opening { declared, snapshot, base, data, cache } = opening;
        let file = file.into();
        let path = file.path().to_owned();
        let info = info::identify(&file, &path, declared)?;
        let terms = qcow2::Terms {
            snapshot,
            backing: base.is_some(),
            data_len_bytes: data.as_ref().map(Sealed::len_bytes),
        };
        let gave_data = data.is_some();
        let cache = cache.unwrap_or_else(DecodedCache::process_wide);
        let layer = Layer::open(file, info, data, &terms, cache)?;
        check_given(&layer, &path, &terms, gave_data, base)?;
        let mut layers = vec![Arc::new(layer)];
        layers.extend(base.iter().flat_map(|base| base.layers.iter().cloned()));
        if layers.len() > MAX_LAYERS {
            return Err(ImageError::TooManyLayers { path, most: MAX_LAYERS });
        }
        Ok(Self { layers, _base: None })
    }

    /// The same view, which keeps `base` open as long as it lives.
    #[must_use]
    pub fn keeping(self, base: Option<Arc<View>>) -> Self {
        Self { _base: base, ..self }
    }

    pub(super) fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    fn top(&self) -> &Layer {
        self.layers.first().expect("a view has at least one layer")
    }

    /// Length of the disk in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.top().size_bytes()
    }

    /// The format of the stored file.
    #[must_use]
    pub fn format(&self) -> Format {
        self.info().format
    }

    /// What the header says; see [`super::inspect`] for a full check.
    #[must_use]
    pub fn info(&self) -> &Info {
        self.top().info()
    }

    /// Where the file was opened, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.top().file().path()
    }

    /// The stored file, read-only: the image's own, not one that it stands on.
    #[must_use]
    pub fn file(&self) -> &File {
        self.top().file().file()
    }

    /// The data files of all layers, whole and mapped, from the image itself down.
    pub fn maps(&self) -> impl ExactSizeIterator<Item = &FileMap> {
        self.layers.iter().map(|layer| layer.map())
    }

    /// The data file of a layer, mapped.
    #[must_use]
    pub fn map(&self, layer: u8) -> Option<&FileMap> {
        self.layers.get(usize::from(layer)).map(|layer| layer.map())
    }

    /// The data file of a layer.
    #[must_use]
    pub fn data_file(&self, layer: u8) -> Option<&File> {
        self.layers.get(usize::from(layer)).map(|layer| layer.data_file())
    }

    /// What readers in other processes need to read by themselves, for each layer from the top down.
    pub fn handouts(&self) -> impl ExactSizeIterator<Item = Handout<'_>> {
        let cache = self.top().cache();
        self.layers.iter().map(move |layer| {
            let (map, decoded) = layer.tables();
            let decoded = decoded.filter(|_| Arc::ptr_eq(cache, layer.cache()));
            let presence = layer.arriving_data().map(Arriving::table);
            let (data, len_bytes) = (layer.data_file(), layer.map().len_bytes());
            Handout { data, len_bytes, map, presence, decoded }
        })
    }

    /// Where the decoded clusters of this view are kept.
    #[must_use]
    pub fn cache(&self) -> &DecodedCache {
        self.top().cache()
    }

    /// Copies what is stored at a place into the memory of a guest: `to` is filled in order.
    ///
    /// # Errors
    /// [`ReadError::Io`]: it cannot be read, or the guest's memory not be written (EFAULT).
    pub fn read_to_guest(&self, stored: Stored, to: &[GuestSlice<'_>]) -> Result<(), ReadError> {
        let Some(layer) = self.layers.get(usize::from(stored.layer)) else {
            let len_bytes = to.iter().map(|slice| slice.len() as u64).sum();
            let at = GuestOffset(stored.at.0);
            return Err(ReadError::PastEnd { at, len_bytes, size_bytes: 0 });
        };
        layer.read_to_guest(to, stored.at)
    }

    /// Whether a stored range was in memory when it was read last.
    #[must_use]
    pub fn is_resident(&self, stored: Stored, len: usize) -> bool {
        let layer = self.layers.get(usize::from(stored.layer));
        layer.is_none_or(|layer| layer.is_resident(stored.at, len))
    }

    /// QCOW2 only: what every guest cluster is, in shared memory that a reader may map.
    #[must_use]
    pub fn cluster_map(&self) -> Option<&qcow2::ClusterMap> {
        self.top().cluster_map()
    }

    /// `len` bytes of a stored file as an address for the kernel; `None` if they are not all in
    /// the file.
    #[must_use]
    pub fn mapped(&self, stored: Stored, len: usize) -> Option<KernelSlice<'_>> {
        self.map(stored.layer)?.slice(stored.at, len)
    }

    /// The run of one kind that begins at `at`, at most `limit_bytes` long. Neighbouring clusters
    /// that are contiguous in the file, or zero, are merged, though not always as far as possible;
    /// an encoded run never crosses its cluster.
    ///
    /// No lock and no allocation; no system call either once the L2 table of `at` has been read.
    ///
    /// # Errors
    /// [`ReadError::PastEnd`] for a position outside the disk or a limit of 0;
    /// [`ReadError::Malformed`] if the table entry for `at` is damaged; [`ReadError::Io`].
    pub fn run_at(&self, at: GuestOffset, limit_bytes: u64) -> Result<Run, ReadError> {
        self.layer_run_at(at, limit_bytes).map(|(run, _)| run)
    }

    /// A run and the layer that has it.
    #[inline]
    fn layer_run_at(
        &self,
        at: GuestOffset,
        limit_bytes: u64,
    ) -> Result<(Run, Option<&Arc<Layer>>), ReadError> {
        self.layer_run_by(at, limit_bytes, Layer::run_at)
    }

    /// As [`layer_run_at`](Self::layer_run_at), where `run_at` says what a layer has.
    #[inline]
    pub(super) fn layer_run_by(
        &self,
        at: GuestOffset,
        limit_bytes: u64,
        run_at: impl Fn(&Layer, GuestOffset, u64) -> Result<LayerRun, ReadError>,
    ) -> Result<(Run, Option<&Arc<Layer>>), ReadError> {
        let size_bytes = self.size_bytes();
        if at.0 >= size_bytes || limit_bytes == 0 {
            return Err(ReadError::PastEnd { at, len_bytes: limit_bytes, size_bytes });
        }
        let mut end = at.0.saturating_add(limit_bytes).min(size_bytes);
        for (number, layer) in (0..).zip(&self.layers) {
            // A backing file may be shorter: zeroes follow.
            let layer_end = end.min(layer.size_bytes());
            if at.0 >= layer_end {
                break;
            }
            let run = run_at(layer, at, layer_end)?;
            let kind = match run.kind {
                LayerKind::Data(at) => RunKind::Data(Stored { layer: number, at }),
                LayerKind::Zero => RunKind::Zero,
                LayerKind::Encoded => RunKind::Encoded,
                LayerKind::Beneath => {
                    end = at.0 + run.len_bytes;
                    continue;
                }
            };
            return Ok((Run { kind, len_bytes: run.len_bytes }, Some(layer)));
        }
        Ok((Run { kind: RunKind::Zero, len_bytes: end - at.0 }, None))
    }

    /// The decoded cluster around `at`, from the cache if it is there. A reader who goes forward
    /// cluster by cluster finds the next ones decoded.
    ///
    /// # Errors
    /// [`ReadError::NotEncoded`] if `at` is not in a compressed cluster, [`ReadError::Decode`] if
    /// its stream is damaged, and those of [`run_at`](Self::run_at).
    pub fn decoded(&self, at: GuestOffset) -> Result<Decoded, ReadError> {
        let (run, layer) = self.layer_run_at(at, 1)?;
        match (run.kind, layer) {
            (RunKind::Encoded, Some(layer)) => match layer.cached(at) {
                Some(decoded) => Ok(decoded),
                None => ahead::decode(layer, at),
            },
            _another_kind => Err(ReadError::NotEncoded { at }),
        }
    }

    /// Decodes what is compressed in `[at, at + len)` and not in the cache, on all cores, as far as
    /// 32 clusters; returns how far that is. Errors are met again by who reads.
    pub fn prepare(&self, at: GuestOffset, len_bytes: u64) -> GuestOffset {
        if self.bring(at, len_bytes).is_err() {
            return at.advance(len_bytes);
        }
        let (jobs, until) = self.not_decoded(at, len_bytes, MAX_PREPARED);
        let decode = |(layer, at): (&Arc<Layer>, GuestOffset)| layer.decoded(at).map(|_| ());
        let taken = match &jobs[..] {
            [(layer, at), _, ..] => ahead::after(layer, *at, until.0),
            _one_or_none => 0,
        };
        let _met_again_by_the_reader = crew::together(jobs, taken, decode);
        until
    }

    /// Begins to decode what is compressed in `[at, at + len)` and not in the cache, as far as 256
    /// clusters, and does not wait for it. Only a hint: one at a time is followed, and it holds up
    /// nobody who reads.
    pub fn will_read(&self, at: GuestOffset, len_bytes: u64) {
        let Some(top) = self.layers.first() else { return };
        if self.is_arriving() {
            self.ask(at, len_bytes);
            return;
        }
        if top.forward.begin_hint() {
            let (jobs, _) = self.not_decoded(at, len_bytes, MAX_HINTED);
            let jobs = jobs.into_iter().map(|(layer, at)| (Arc::clone(layer), at)).collect();
            ahead::decode_hinted(Arc::clone(top), jobs);
        }
    }

    /// The compressed clusters in a range that are not in the cache, at most `max`, and how far that
    /// is.
    fn not_decoded(
        &self,
        mut at: GuestOffset,
        len_bytes: u64,
        max: usize,
    ) -> (Vec<(&Arc<Layer>, GuestOffset)>, GuestOffset) {
        let end = at.0.saturating_add(len_bytes).min(self.size_bytes());
        let mut jobs = Vec::new();
        for _ in 0..MAX_PREPARED_RUNS {
            if at.0 >= end || jobs.len() == max {
                break;
            }
            let Ok((run, layer)) = self.layer_run_at(at, end - at.0) else { break };
            if let (RunKind::Encoded, Some(layer)) = (run.kind, layer)
                && layer.cached(at).is_none()
            {
                jobs.push((layer, at));
            }
            at = at.advance(run.len_bytes);
        }
        (jobs, at)
    }

    /// Fills `buf` with the disk's bytes from `at` on. A page that cannot be read is an error and
    /// never a signal.
    ///
    /// # Errors
    /// [`ReadError::PastEnd`] if the range is not all inside the disk (nothing is read then), and
    /// those of [`run_at`](Self::run_at) and [`decoded`](Self::decoded).
    pub fn read_at(&self, buf: &mut [u8], at: GuestOffset) -> Result<(), ReadError> {
        let (len_bytes, size_bytes) = (buf.len() as u64, self.size_bytes());
        if at.checked_add(len_bytes).is_none_or(|end| end.0 > size_bytes) {
            return Err(ReadError::PastEnd { at, len_bytes, size_bytes });
        }
        // What most reads want. The fewer instructions are between two copies, the more of the second
        // one's waiting for memory is in the time of the first.
        if let Some(top) = self.layers.first().filter(|_| len_bytes > 0 && !self.is_arriving()) {
            if let Some(stored_at) = top.known_data(at, buf.len()) {
                return top.read_data(buf, stored_at);
            }
            if top.copy_decoded(buf, at) {
                return Ok(());
            }
        }
        self.bring(at, len_bytes)?;
        let (mut rest, mut at, mut jobs) = (buf, at, Vec::new());
        while !rest.is_empty() {
            let (run, layer) = self.layer_run_at(at, rest.len() as u64)?;
            let len = usize::try_from(run.len_bytes).unwrap_or(rest.len()).min(rest.len());
            let (part, after) = rest.split_at_mut(len);
            match (run.kind, layer) {
                (RunKind::Data(stored), Some(layer)) => layer.read_data(part, stored.at)?,
                (RunKind::Encoded, Some(layer)) => match layer.cached(at) {
                    Some(decoded) => copy_decoded(&decoded, part, at)?,
                    None => jobs.push(Job { layer, at, part }),
                },
                (RunKind::Zero, _) | (_, None) => part.fill(0),
            }
            (rest, at) = (after, at.advance(run.len_bytes));
        }
        let is_lone = jobs.len() == 1;
        let taken = match &jobs[..] {
            [first, _, ..] => ahead::after(first.layer, first.at, at.0),
            _one_or_none => 0,
        };
        crew::together(jobs, taken, |Job { layer, at, part }| {
            let decoded = if is_lone { ahead::decode(layer, at) } else { layer.decoded(at) };
            copy_decoded(&decoded?, part, at)
        })
    }
}

/// A part of a buffer that a cluster has to be decoded for.
struct Job<'a> {
    layer: &'a Arc<Layer>,
    at: GuestOffset,
    part: &'a mut [u8],
}

/// Fills `part` with what `decoded` has from `at` on.
fn copy_decoded(decoded: &Decoded, part: &mut [u8], at: GuestOffset) -> Result<(), ReadError> {
    let skip = at.0.checked_sub(decoded.start.0).and_then(|n| usize::try_from(n).ok());
    let from = skip.and_then(|skip| decoded.bytes.get(skip..)?.get(..part.len()));
    part.copy_from_slice(from.ok_or(ReadError::NotEncoded { at })?);
    Ok(())
}

/// What was given must be what the image needs: a base that is not used is a mistake of whoever
/// gave it, and nothing that should pass unseen.
fn check_given(
    layer: &Layer,
    path: &Path,
    terms: &qcow2::Terms<'_>,
    gave_data: bool,
    base: Option<&View>,
) -> Result<(), ImageError> {
    let not_needed = |what| Err(ImageError::NotNeeded { path: path.to_owned(), what });
    let header = layer.cluster_map().map(qcow2::ClusterMap::header);
    if terms.snapshot.is_some() && header.is_none() {
        return not_needed("a snapshot");
    }
    if gave_data && header.is_none_or(|header| !header.external_data) {
        return not_needed("an external data file");
    }
    let Some(base) = base else { return Ok(()) };
    match header.filter(|header| header.backing).map(|header| header.backing_format) {
        None => not_needed("a base"),
        Some(None) => Ok(()),
        Some(Some(said)) => {
            let fits = match said {
                BackingFormat::Raw => base.format() == Format::Raw,
                BackingFormat::Qcow2 => base.format() == Format::Qcow2,
                BackingFormat::Other => false,
            };
            let (path, base) = (path.to_owned(), base.format());
            if fits { Ok(()) } else { Err(ImageError::BaseFormat { path, said, base }) }
        }
    }
}
