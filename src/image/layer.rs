//! One file of a view: its own bytes, and what it leaves to the file beneath it.
//!
//! Why: an overlay and its backing files are separate files, shared by many views; each resolves
//! what it has, and says where it has nothing.
//! How: a layer is a file with its map and its tables. Data is in that file, or in an external data
//! file if the image has one; [`super::View`] asks its layers from the top down. A file that is still
//! arriving makes its readers wait for what is not here.
//! Never: opens another file: what lies beneath, or beside, was given.
//! Start at [`Layer::run_at`].

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::ahead::Forward;
use super::decoded::Key;
use super::decoder::Room;
use super::raw::HoleMap;
use super::source::{LayerFile, Source};
use super::{Decoded, DecodedCache, Format, ImageError, Info, ReadError, blocks, qcow2};
use crate::disk::{Arriving, Sealed};
use crate::map::format::{Header, Kind};
use crate::map::{FileMap, GuestSlice, MappedData, SharedTable};
use crate::units::{FileOffset, GuestOffset};

/// How the bytes of a run of one layer are had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::image) enum LayerKind {
    /// In the layer's data file from this position on, contiguous.
    Data(FileOffset),
    /// Zeroes.
    Zero,
    /// In one compressed cluster.
    Encoded,
    /// Not here: what the layer beneath has.
    Beneath,
}

/// A guest range of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::image) struct LayerRun {
    pub(in crate::image) kind: LayerKind,
    /// At least 1.
    pub(in crate::image) len_bytes: u64,
}

#[derive(Debug)]
enum Tables {
    Raw(HoleMap),
    Qcow2(Box<qcow2::ClusterMap>),
    Blocks(Box<blocks::BlockMap>),
}

impl Tables {
    fn raw(file: &LayerFile, len_bytes: u64) -> Result<Self, ImageError> {
        let holes = match file.arriving() {
            // What is a hole now may become data.
            Some(_) => HoleMap::all_data(len_bytes),
            None => HoleMap::of_file(file.file(), len_bytes),
        };
        holes.map(Self::Raw).map_err(|source| {
            let path = file.path().to_owned();
            ImageError::Map { path, what: "the map of holes", len_bytes, source }
        })
    }

    /// What they are, for readers in other processes.
    fn shared(&self) -> &SharedTable {
        match self {
            Self::Raw(holes) => holes.table(),
            Self::Qcow2(clusters) => clusters.table(),
            Self::Blocks(blocks) => blocks.table(),
        }
    }

    /// A table for the places of decoded blocks, of images that have such.
    fn decoded(&self, info: &Info) -> Option<Arc<SharedTable>> {
        let block_bytes = info.cluster_size_bytes.filter(|_| !matches!(self, Self::Raw(_)))?;
        let header = Header {
            kind: Kind::Decoded,
            unit_bits: block_bytes.checked_ilog2()?,
            units: info.virtual_size_bytes.div_ceil(block_bytes),
            size_bytes: info.virtual_size_bytes,
            ..Header::EMPTY
        };
        SharedTable::new("bedplate-decoded-index", &header).ok().map(Arc::new)
    }

    /// A VMDK, VHD or VHDX image's; a fixed VHD is a raw disk with something after it.
    fn of_blocks(file: &LayerFile, info: &mut Info, len_bytes: u64) -> Result<Self, ImageError> {
        let path = file.path();
        let Some(image) = blocks::Image::open(file, path, info.format, len_bytes)? else {
            return Self::raw(file, len_bytes);
        };
        image.describe(info);
        match image.layout() {
            None => Self::raw(file, info.virtual_size_bytes),
            Some(layout) => {
                Ok(Self::Blocks(Box::new(blocks::BlockMap::new(layout.clone(), path)?)))
            }
        }
    }
}

/// A file and what it says.
#[derive(Debug)]
pub(super) struct Layer {
    file: LayerFile,
    /// The external data file, if there is one.
    data: Option<Sealed>,
    /// The file with the data, mapped: [`data`](Self::data_file).
    data_map: MappedData,
    info: Info,
    tables: Tables,
    /// Where decoded blocks are, for readers in other processes.
    decoded: Option<Arc<SharedTable>>,
    cache: Arc<DecodedCache>,
    id: u64,
    /// Where a reader who goes forward will want the next cluster.
    pub(super) forward: Forward,
}

impl Layer {
    /// Opens `file`, of which `info` is known; `terms` say what else was given.
    pub(super) fn open(
        file: LayerFile,
        mut info: Info,
        data: Option<Sealed>,
        terms: &qcow2::Terms<'_>,
        cache: Arc<DecodedCache>,
    ) -> Result<Self, ImageError> {
        let path = file.path();
        // The length at which the file was sealed counts, should it differ by now.
        let len_bytes = file.len_bytes().min(info.file_size_bytes);
        let tables = match info.format {
            Format::Raw | Format::Vmdk | Format::Vhd | Format::Vhdx => {
                Tables::of_blocks(&file, &mut info, len_bytes)?
            }
            Format::Qcow2 => {
                let image = qcow2::Image::open(&file, path, len_bytes, terms)?;
                image.describe(&mut info);
                Tables::Qcow2(Box::new(qcow2::ClusterMap::new(image, path)?))
            }
        };
        let (mapped, path, len_bytes) = match &data {
            Some(data) => (data.file(), data.path(), data.len_bytes()),
            None => (file.file(), path, len_bytes),
        };
        let data_map = MappedData::new(mapped, len_bytes).map_err(|source| ImageError::Map {
            path: path.to_owned(),
            what: "the file",
            len_bytes,
            source,
        })?;
        let id = cache.register_view();
        let decoded = tables.decoded(&info);
        let forward = Forward::default();
        Ok(Self { file, data, data_map, info, tables, decoded, cache, id, forward })
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.info.virtual_size_bytes
    }

    pub(super) fn info(&self) -> &Info {
        &self.info
    }

    /// The file itself.
    pub(super) fn file(&self) -> &LayerFile {
        &self.file
    }

    /// While the file that data is in, or the one that says where, is not complete.
    #[inline]
    pub(super) fn arriving(&self) -> Option<&Arriving> {
        self.file.arriving()
    }

    /// While the file that data is in is not complete.
    pub(super) fn arriving_data(&self) -> Option<&Arriving> {
        if self.data.is_some() { None } else { self.arriving() }
    }

    /// The file that [`LayerKind::Data`] is in.
    pub(super) fn data_file(&self) -> &File {
        self.data.as_ref().map_or_else(|| self.file.file(), Sealed::file)
    }

    /// Where that file was opened, for messages.
    pub(super) fn data_path(&self) -> &Path {
        self.data.as_ref().map_or_else(|| self.file.path(), Sealed::path)
    }

    pub(super) fn map(&self) -> &FileMap {
        self.data_map.map()
    }

    /// What a reader in another process needs of this layer beside its data file.
    pub(super) fn tables(&self) -> (&SharedTable, Option<&SharedTable>) {
        (self.tables.shared(), self.decoded.as_deref())
    }

    /// Where its decoded blocks are.
    pub(super) fn cache(&self) -> &Arc<DecodedCache> {
        &self.cache
    }

    pub(super) fn cluster_map(&self) -> Option<&qcow2::ClusterMap> {
        match &self.tables {
            Tables::Raw(_) | Tables::Blocks(_) => None,
            Tables::Qcow2(clusters) => Some(clusters),
        }
    }

    /// Reads bytes of the data file: from the map what was in memory when it was read last, with
    /// pread what was not, so that the disk is read ahead, and an unreadable page is an error.
    pub(super) fn read_data(&self, buf: &mut [u8], at: FileOffset) -> Result<(), ReadError> {
        let len = buf.len();
        let failed = |source| ReadError::io(self.data_path(), at.0, len, source);
        if let Some(arriving) = self.arriving_data() {
            arriving.wait(at.0, len as u64).map_err(failed)?;
        }
        self.data_map.read(self.data_file(), buf, at).map_err(failed)
    }

    /// The same, into the memory of a guest.
    pub(super) fn read_to_guest(
        &self,
        to: &[GuestSlice<'_>],
        at: FileOffset,
    ) -> Result<(), ReadError> {
        let len: usize = to.iter().map(GuestSlice::len).sum();
        let failed = |source| ReadError::io(self.data_path(), at.0, len, source);
        if let Some(arriving) = self.arriving_data() {
            arriving.wait(at.0, len as u64).map_err(failed)?;
        }
        self.data_map.read_to_guest(self.data_file(), to, at).map_err(failed)
    }

    /// Whether a range of the data file was in memory when it was read last.
    pub(super) fn is_resident(&self, at: FileOffset, len: usize) -> bool {
        self.data_map.is_resident(at, len)
    }

    /// The run that begins at `at` and ends at guest byte `end` at the latest; `at < end <=` the
    /// layer's size.
    pub(super) fn run_at(&self, at: GuestOffset, end: u64) -> Result<LayerRun, ReadError> {
        self.run_from(&self.file, at, end)
    }

    /// As [`run_at`](Self::run_at), with tables that are read from `file`, should they not be known.
    pub(super) fn run_from(
        &self,
        file: &dyn Source,
        at: GuestOffset,
        end: u64,
    ) -> Result<LayerRun, ReadError> {
        match &self.tables {
            Tables::Raw(holes) => {
                let (hole, end) = holes.run_at(at.0, end);
                let kind = if hole { LayerKind::Zero } else { LayerKind::Data(FileOffset(at.0)) };
                Ok(LayerRun { kind, len_bytes: end - at.0 })
            }
            Tables::Qcow2(clusters) => clusters.run_at(file, at, end),
            Tables::Blocks(blocks) => blocks.run_at(file, at, end),
        }
    }

    /// As [`ClusterMap::known_data`](super::qcow2::ClusterMap::known_data); of other formats nothing.
    #[inline]
    pub(super) fn known_data(&self, at: GuestOffset, len: usize) -> Option<FileOffset> {
        match &self.tables {
            Tables::Qcow2(clusters) => clusters.known_data(at, len),
            Tables::Raw(_) | Tables::Blocks(_) => None,
        }
    }

    /// The cluster, grain or block around `at`: its number and its first byte; of a raw disk none.
    fn cluster_of(&self, at: GuestOffset) -> Option<(u64, GuestOffset)> {
        match &self.tables {
            Tables::Raw(_) => None,
            Tables::Qcow2(clusters) => Some(clusters.cluster_of(at)),
            Tables::Blocks(blocks) => Some(blocks.block_of(at)),
        }
    }

    /// The first byte of the cluster around `at`, and the one after its last; of a raw disk none.
    pub(super) fn cluster_around(&self, at: GuestOffset) -> Option<(u64, u64)> {
        let (_, start) = self.cluster_of(at)?;
        let size = self.info.cluster_size_bytes?;
        Some((start.0, (start.0 + size).min(self.size_bytes())))
    }

    /// Where the compressed cluster around `at` is in the file, and how many bytes of it are enough.
    pub(super) fn encoded_range(&self, at: GuestOffset) -> Option<(u64, u64)> {
        match &self.tables {
            Tables::Raw(_) => None,
            Tables::Qcow2(clusters) => clusters.encoded_range(at),
            Tables::Blocks(blocks) => blocks.encoded_range(at),
        }
    }

    /// Fills `buf` from the decoded cluster around `at`, if all of it is in there and that is at hand
    /// without a lock. The cache is told of some such reads only: enough to know what is read.
    #[inline]
    pub(super) fn copy_decoded(&self, buf: &mut [u8], at: GuestOffset) -> bool {
        let (Some(table), Some(slab)) = (self.decoded.as_deref(), self.cache.slab()) else {
            return false;
        };
        let Some((cluster, start)) = self.cluster_of(at) else { return false };
        let (skip, size) = (at.0 - start.0, self.info.cluster_size_bytes.unwrap_or(0));
        skip.saturating_add(buf.len() as u64) <= size
            && !DecodedCache::wants_to_be_told()
            && slab.copy_published(table, cluster, skip, buf)
    }

    /// The decoded cluster around `at` and where it begins, if it is in the cache.
    pub(super) fn cached(&self, at: GuestOffset) -> Option<Decoded> {
        let (cluster, start) = self.cluster_of(at)?;
        let bytes = self.cache.get(Key { view: self.id, cluster })?;
        Some(Decoded { bytes, start })
    }

    /// The decoded cluster around `at` and where it begins.
    pub(super) fn decoded(&self, at: GuestOffset) -> Result<Decoded, ReadError> {
        let (cluster, start) = self.cluster_of(at).ok_or(ReadError::NotEncoded { at })?;
        let key = Key { view: self.id, cluster };
        let bytes = self.cache.get_or_decode(key, || self.decode(cluster, at))?;
        Ok(Decoded { bytes, start })
    }

    /// Decodes the cluster around `at`, which is not in the cache, unless another thread is at it.
    pub(super) fn decode_unless_others_do(&self, at: GuestOffset) -> Result<(), ReadError> {
        let (cluster, _) = self.cluster_of(at).ok_or(ReadError::NotEncoded { at })?;
        let key = Key { view: self.id, cluster };
        self.cache.decode_if_nobody_does(key, || self.decode(cluster, at))
    }

    fn decode(&self, cluster: u64, at: GuestOffset) -> Result<Bytes, ReadError> {
        let index = self.decoded.as_ref().map(|table| (table, cluster));
        let (file, room) = (&self.file, Room { slab: self.cache.slab(), index });
        match &self.tables {
            Tables::Raw(_) => Err(ReadError::NotEncoded { at }),
            Tables::Qcow2(clusters) => clusters.decode(file, at, room),
            Tables::Blocks(blocks) => blocks.decode(file, at, room),
        }
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        if !matches!(self.tables, Tables::Raw(_)) {
            self.cache.forget_view(self.id);
        }
    }
}
