//! What a reader of one export is given.
//!
//! Why: an attach should cost a message, and no work.
//! How: made once for each export: descriptors of its files through mounts that are read-only, the
//! tables' own descriptors, and the bytes of the answer that says which is which.
//! Never: hands out a descriptor of ours whose file could be opened again for writing, but where the
//! kernel has no such mounts for us; then readers are told so, and the files' modes are what is left.
//! Start at [`Handout::of`].

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use zerocopy::IntoBytes;

use crate::image::View;
use crate::map;
use crate::replica::wire::{self, LayerPart, NONE};
use crate::serve::Export;

/// A cache that holds fewer times what one reader has prepared at once may have lost it before it is read.
const LEAST_PREPARED: u64 = 8;

/// Descriptors, and the part of the answer that is about them.
#[derive(Debug)]
pub struct Handout {
    descriptors: Vec<OwnedFd>,
    layers: Vec<LayerPart>,
    arena: u32,
    arena_bytes: u64,
    is_protected: bool,
    /// A descriptor could not be had: readers are refused.
    failed: Option<std::io::ErrorKind>,
}

impl Handout {
    /// For the readers of `view`.
    pub(in crate::serve) fn of(view: &View) -> Self {
        let mut handout = Self {
            descriptors: Vec::new(),
            layers: Vec::new(),
            arena: NONE,
            arena_bytes: 0,
            is_protected: true,
            failed: None,
        };
        for layer in view.handouts() {
            let part = LayerPart {
                file_bytes: layer.len_bytes,
                file: handout.put_file(layer.data),
                map: handout.put(layer.map.fd()),
                decoded: layer.decoded.map_or(NONE, |table| handout.put(table.fd())),
                presence: layer.presence.map_or(NONE, |table| handout.put(table.fd())),
                later: [0; 2],
            };
            handout.layers.push(part);
        }
        let slab = view.cache().slab();
        if let Some(slab) = slab.filter(|_| handout.layers.iter().any(|l| l.decoded != NONE)) {
            handout.arena = handout.put(slab.fd());
            handout.arena_bytes = slab.len_bytes();
        }
        if !handout.is_protected {
            tracing::warn!(
                path = %view.path().display(),
                "no read-only mount for what readers are given (it takes CAP_SYS_ADMIN): \
                 only the files' modes keep them from writing"
            );
        }
        handout
    }

    /// What goes with the answer.
    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.descriptors.iter().map(AsFd::as_fd).collect()
    }

    /// The answer's body; `None` if not all descriptors could be had.
    pub(super) fn body(&self, export: &Export) -> Option<Vec<u8>> {
        if self.failed.is_some() {
            return None;
        }
        let identity = export.identity();
        let head = wire::Attached {
            generation: export.generation(),
            size_bytes: export.view().size_bytes(),
            arena_bytes: self.arena_bytes,
            flags: self.flags(export),
            layers: u32::try_from(self.layers.len()).unwrap_or(0),
            arena: self.arena,
            identity_bytes: u32::try_from(identity.len()).unwrap_or(0),
        };
        let mut body = head.as_bytes().to_vec();
        self.layers.iter().for_each(|layer| body.extend_from_slice(layer.as_bytes()));
        body.extend_from_slice(identity.as_bytes());
        Some(body)
    }

    fn flags(&self, export: &Export) -> u32 {
        // With a cache that keeps next to nothing, each cluster would be decoded twice.
        let prepares =
            export.view().cache().capacity_bytes() >= LEAST_PREPARED * wire::MAX_PREPARE_BYTES;
        let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
        flag(self.is_protected, wire::PROTECTED) | flag(prepares, wire::PREPARES)
    }

    fn put_file(&mut self, file: &File) -> u32 {
        match map::read_only(file) {
            Ok(protected) => self.push(protected.into()),
            Err(_not_for_us) => {
                self.is_protected = false;
                self.put(file.as_fd())
            }
        }
    }

    fn put(&mut self, fd: BorrowedFd<'_>) -> u32 {
        match fd.try_clone_to_owned() {
            Ok(fd) => self.push(fd),
            Err(error) => {
                self.failed = Some(error.kind());
                NONE
            }
        }
    }

    fn push(&mut self, fd: OwnedFd) -> u32 {
        self.descriptors.push(fd);
        u32::try_from(self.descriptors.len() - 1).unwrap_or(NONE)
    }
}
