//! What an attach has handed out, checked and mapped.
//!
//! Why: the other side may be wrong, of another version, or not the engine at all.
//! How: every table is opened with its own checks, every number is held against the descriptors that
//! came; what passes is fixed from then on, and shared by all threads that read.
//! Never: keeps a descriptor that it does not use.
//! Start at [`Attached::of_message`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use bedplate_map::format::Kind;
use bedplate_map::{FileMap, MappedData, ReadTable};
use zerocopy::FromBytes;

use crate::Mode;
use crate::layer::{Arena, Found, Layer};
use crate::wire::{self, LayerPart, MAX_IDENTITY_BYTES, MAX_LAYERS};

/// Longest arena that is mapped.
const MAX_ARENA_BYTES: u64 = 64 << 30;

/// An image as it was handed out.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) generation: u64,
    pub(crate) size_bytes: u64,
    pub(crate) is_protected: bool,
    /// The engine can be asked to prepare a range.
    pub(crate) prepares: bool,
    pub(crate) identity: String,
    layers: Vec<Layer>,
    arena: Option<Arena>,
}

/// Why it can't be used.
#[derive(Debug)]
pub(crate) struct Wrong {
    pub(crate) what: &'static str,
    pub(crate) source: Option<io::Error>,
}

fn wrong(what: &'static str) -> Wrong {
    Wrong { what, source: None }
}

/// Descriptors of a message, each to be used once.
struct Handed(Vec<Option<OwnedFd>>);

impl Handed {
    fn take(&mut self, number: u32) -> Result<OwnedFd, Wrong> {
        let place = usize::try_from(number).ok().and_then(|number| self.0.get_mut(number));
        place.and_then(Option::take).ok_or(wrong("a descriptor is missing, or named twice"))
    }

    fn take_table(&mut self, number: u32, kinds: &[Kind]) -> Result<ReadTable, Wrong> {
        let fd = self.take(number)?;
        let table = ReadTable::open(fd.as_fd())
            .map_err(|source| Wrong { what: "a table can't be used", source: Some(source) })?;
        match kinds.contains(&table.header().kind) {
            true => Ok(table),
            false => Err(wrong("a table is of another kind than its place")),
        }
    }

    fn take_optional(&mut self, number: u32, kind: Kind) -> Result<Option<ReadTable>, Wrong> {
        (number != wire::NONE).then(|| self.take_table(number, &[kind])).transpose()
    }
}

impl Attached {
    /// Takes in the body of an answer to an attach, and its descriptors.
    pub(crate) fn of_message(
        body: &[u8],
        descriptors: Vec<OwnedFd>,
        mode: Mode,
    ) -> Result<Self, Wrong> {
        let (head, mut rest) =
            wire::Attached::read_from_prefix(body).map_err(|_| wrong("it is too short"))?;
        let count = usize::try_from(head.layers).unwrap_or(usize::MAX);
        if count == 0 || count > MAX_LAYERS {
            return Err(wrong("it has no layer, or too many"));
        }
        let mut handed = Handed(descriptors.into_iter().map(Some).collect());
        let mut layers = Vec::with_capacity(count);
        for _ in 0..count {
            let (part, after) =
                LayerPart::read_from_prefix(rest).map_err(|_| wrong("it is too short"))?;
            layers.push(layer(&part, &mut handed, mode)?);
            rest = after;
        }
        let arena = match head.arena {
            wire::NONE => None,
            number => Some(arena(handed.take(number)?, head.arena_bytes, mode)?),
        };
        let identity = usize::try_from(head.identity_bytes).ok().filter(|&n| n == rest.len());
        if identity.is_none_or(|bytes| bytes > MAX_IDENTITY_BYTES) {
            return Err(wrong("its identity has another length than it says"));
        }
        let identity = std::str::from_utf8(rest).map_err(|_| wrong("its identity is no text"))?;
        if layers.first().is_none_or(|top| top.size_bytes() != head.size_bytes) {
            return Err(wrong("the disk's size is not that of its first layer"));
        }
        Ok(Self {
            generation: head.generation,
            size_bytes: head.size_bytes,
            is_protected: head.flags & wire::PROTECTED != 0,
            prepares: head.flags & wire::PREPARES != 0,
            identity: identity.to_owned(),
            layers,
            arena,
        })
    }

    /// What begins at `at`, which layer has it, and where it ends: at `end` at the latest.
    /// `at < end <=` the disk's size. Never [`Found::Beneath`].
    #[inline]
    pub(crate) fn run_at(&self, at: u64, end: u64) -> (Found, Option<&Layer>, u64) {
        let mut end = end;
        for layer in &self.layers {
            let layer_end = end.min(layer.size_bytes());
            // One that is shorter than what stands on it: zeroes follow.
            if at >= layer_end {
                break;
            }
            let (found, until) = layer.run_at(at, layer_end);
            if found != Found::Beneath {
                return (found, Some(layer), until);
            }
            end = until;
        }
        (Found::Zero, None, end)
    }

    /// Copies what is decoded; false if it has to be asked for.
    pub(crate) fn read_decoded(&self, layer: &Layer, buf: &mut [u8], at: u64) -> bool {
        self.arena.as_ref().is_some_and(|arena| layer.read_decoded(arena, buf, at))
    }
}

fn layer(part: &LayerPart, handed: &mut Handed, mode: Mode) -> Result<Layer, Wrong> {
    let file = File::from(handed.take(part.file)?);
    let mapped =
        match mode {
            Mode::Pread => None,
            Mode::Mapped => Some(MappedData::new(&file, part.file_bytes).map_err(|source| {
                Wrong { what: "its file can't be mapped", source: Some(source) }
            })?),
        };
    let map = handed.take_table(part.map, &[Kind::Words, Kind::Bits])?;
    let decoded = handed.take_optional(part.decoded, Kind::Decoded)?;
    let presence = handed.take_optional(part.presence, Kind::Presence)?;
    Ok(Layer { file, mapped, map, decoded, presence })
}

fn arena(fd: OwnedFd, len_bytes: u64, mode: Mode) -> Result<Arena, Wrong> {
    let file = File::from(fd);
    let held = file.metadata().map_or(0, |meta| meta.len());
    if len_bytes == 0 || len_bytes > held.min(MAX_ARENA_BYTES) {
        return Err(wrong("the memory for decoded blocks is not as long as it says"));
    }
    let map = match mode {
        Mode::Pread => None,
        Mode::Mapped => Some(FileMap::of_arena(&file, len_bytes).map_err(|source| {
            let what = "the memory for decoded blocks can't be mapped";
            Wrong { what, source: Some(source) }
        })?),
    };
    Ok(Arena { file, map, len_bytes })
}
