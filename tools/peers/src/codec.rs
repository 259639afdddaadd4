//! The codec alone: every compressed cluster of an image decoded, and nothing else.
//!
//! Why: a first read of a compressed image cannot be faster than its decoder.
//! How: the file is in memory and the clusters are listed before the timed part; each thread has
//! one decoder and takes a few clusters at a time. It decodes them all to one buffer, or each to a
//! place of its own in new memory: who keeps what is decoded has the kernel's work for that memory, too.
//! Never: looks a cluster up, or copies it.
//! Start at [`run`].

use std::path::Path;
use std::slice::ChunksMut;
use std::sync::{Mutex, PoisonError};

use bedplate::disk::Sealed;
use bedplate::image::qcow2::{Cluster, Codec, Image, Terms};
use memmap2::{Advice, MmapMut};
use xxhash_rust::xxh3::Xxh3;

use crate::Result;
use crate::workload::{Clocks, Outcome};

/// Clusters that a thread takes at once.
const BATCH: usize = 8;

struct Packed {
    image: Image,
    file: Vec<u8>,
    clusters: Vec<Cluster>,
    cluster_bytes: usize,
}

/// Clusters that no thread has yet, and where they are to be kept.
struct Todo<'a> {
    clusters: std::slice::Chunks<'a, Cluster>,
    memory: Option<ChunksMut<'a, u8>>,
}

/// Decodes the image once on this many threads; with `keep` all of it is in memory at the end.
pub fn run(path: &Path, threads: usize, keep: bool) -> Result<Outcome> {
    let packed = Packed::of(path)?;
    let mut memory = if keep { Some(packed.memory()?) } else { None };
    let batch_bytes = BATCH * packed.cluster_bytes;
    let todo = Mutex::new(Todo {
        clusters: packed.clusters.chunks(BATCH),
        memory: memory.as_mut().map(|memory| memory.chunks_mut(batch_bytes)),
    });
    let clocks = Clocks::start()?;
    let failed = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| packed.work(&todo))).collect();
        let died = |_| Err("a thread panicked".into());
        let ends = workers.into_iter().map(|worker| worker.join().unwrap_or_else(died));
        ends.filter_map(Result::err).last()
    });
    let bytes = (packed.clusters.len() * packed.cluster_bytes) as u64;
    let outcome = clocks.stop(bytes >> 20, bytes, 0)?;
    match failed {
        Some(error) => Err(error),
        None => Ok(Outcome { xxh3: packed.hash()?, ..outcome }),
    }
}

impl Packed {
    fn of(path: &Path) -> Result<Self> {
        let sealed = Sealed::open_path(path)?;
        let image = Image::open(sealed.file(), path, sealed.len_bytes(), &Terms::default())?;
        let file = std::fs::read(path)?;
        let mut clusters = Vec::new();
        for table in image.tables() {
            let stored = table.stored.clone().ok_or("codec wants an image without holes")?;
            let range = usize::try_from(stored.start)?..usize::try_from(stored.end)?;
            let bytes = file.get(range).ok_or("an L2 table is not in the file")?;
            image.decode_table(&table, bytes, &mut |_, one| clusters.push(one))?;
        }
        if clusters.iter().any(|one| !matches!(one, Cluster::Compressed(_))) {
            return Err("codec wants an image of compressed clusters only".into());
        }
        let cluster_bytes = usize::try_from(image.header().cluster_bits.size_bytes())?;
        if image.header().size_bytes != (clusters.len() * cluster_bytes) as u64 {
            return Err("codec wants an image of whole clusters".into());
        }
        Ok(Self { image, file, clusters, cluster_bytes })
    }

    /// Memory for all of it, none of which is there yet: huge pages, as bedplate has them.
    fn memory(&self) -> Result<MmapMut> {
        let memory = MmapMut::map_anon(self.clusters.len() * self.cluster_bytes)?;
        memory.advise(Advice::HugePage)?;
        Ok(memory)
    }

    fn work(&self, todo: &Mutex<Todo<'_>>) -> Result<()> {
        let (mut codec, mut out) = (Codec::new(), vec![0; self.cluster_bytes]);
        let take = || {
            let mut todo = todo.lock().unwrap_or_else(PoisonError::into_inner);
            let Todo { clusters, memory } = &mut *todo;
            clusters.next().map(|batch| (batch, memory.as_mut().and_then(ChunksMut::next)))
        };
        while let Some((batch, memory)) = take() {
            let mut places = memory.map(|memory| memory.chunks_mut(self.cluster_bytes));
            for cluster in batch {
                let place = places.as_mut().and_then(ChunksMut::next).unwrap_or(&mut out);
                self.decode(&mut codec, cluster, place)?;
                std::hint::black_box(&place);
            }
        }
        Ok(())
    }

    fn decode(&self, codec: &mut Codec, cluster: &Cluster, out: &mut [u8]) -> Result<()> {
        let Cluster::Compressed(packed) = cluster else { return Err("not compressed".into()) };
        let start = usize::try_from(packed.at.0)?;
        let end = self.file.len().min(start + usize::try_from(packed.len_bytes)?);
        let stored = self.file.get(start..end).ok_or("a cluster is not in the file")?;
        let decoded = codec.decode(self.image.header().compression, stored, out);
        decoded.map_err(|fault| fault.text().into())
    }

    fn hash(&self) -> Result<u64> {
        let (mut codec, mut out) = (Codec::new(), vec![0; self.cluster_bytes]);
        let mut hash = Xxh3::new();
        for cluster in &self.clusters {
            self.decode(&mut codec, cluster, &mut out)?;
            hash.update(&out);
        }
        Ok(hash.digest())
    }
}
