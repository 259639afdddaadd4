//! The reading of an export: requests ahead, replies as they come.
//!
//! Why: an export over a network is read at its rate only if many requests are under way; what is a hole
//! costs none.
//! How: one task. As long as there is room it asks: for holes ahead, and for the parts of blocks that are
//! data; then it takes in one reply, or one chunk of one, straight into the block's buffer. A block goes
//! to the [`Outlet`] when all of it is here.
//! Never: hands over a byte that the server has not sent or told to be zero; waits for a buffer while it
//! holds others.
//! Start at [`Session::copy`].

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite};

use super::fault::{NbdFault, said};
use super::handshake::{self, Export};
use super::link::Link;
use super::plan::{Plan, Step};
use super::replies::{Asked, Read};
use super::wire::{
    CHUNK_DATA, CHUNK_DONE, CHUNK_ERROR_BIT, CHUNK_HOLE, CHUNK_MAGIC, CHUNK_NONE, CHUNK_STATUS,
    CMD_BLOCK_STATUS, CMD_DISC, CMD_READ, SIMPLE_MAGIC, STATE_ZERO, be16, be32, be64, request,
};
use crate::fetch::{FetchError, Stopped};
use crate::ring::Buf;

/// Blocks of a MiB that are being read at a time.
const MAX_BLOCKS: usize = 8;
/// Requests under way.
const MAX_ASKED: usize = 64;
/// Extents of one answer. Nobody tells more of a GiB than one for each of its sectors.
const MAX_EXTENTS: u32 = 2 << 20;
/// Bytes of an error's description.
const MAX_ERROR_BYTES: u32 = 2 * 4096;

/// Takes what an export has.
pub trait Outlet: Send {
    /// An empty buffer, once there is one.
    ///
    /// # Errors
    /// There is no memory.
    fn buffer(&mut self) -> impl Future<Output = Result<Buf, FetchError>> + Send;

    /// Takes the bytes from `at` on.
    ///
    /// # Errors
    /// [`Stopped`] if nothing more is of use.
    fn data(&mut self, at: u64, buf: Buf) -> Result<(), Stopped>;

    /// Takes a range of zeroes.
    ///
    /// # Errors
    /// As [`Outlet::data`].
    fn zeroes(&mut self, range: Range<u64>) -> Result<(), Stopped>;

    /// So many bytes have come over the network: waits as long as a limit says.
    fn arrived(&mut self, bytes: usize) -> impl Future<Output = ()> + Send;
}

/// Why an export was not read to its end.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The server, or the way to it.
    #[error(transparent)]
    Fault(#[from] NbdFault),
    /// Of this side.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The outlet takes no more; it knows why.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// A block that is being read.
#[derive(Debug)]
struct Block {
    start: u64,
    len: usize,
    buf: Buf,
    /// Reads of it under way.
    open: usize,
}

/// A session with a server.
#[derive(Debug)]
pub struct Session<S> {
    link: Link<S>,
    export: Export,
    asked: HashMap<u64, Asked>,
    blocks: HashMap<u64, Block>,
    next_cookie: u64,
}

impl<S: AsyncRead + AsyncWrite + Send> Session<S> {
    /// Negotiates the export `name`. No wait for a byte is longer than `patience`.
    ///
    /// # Errors
    /// [`NbdFault`].
    pub async fn open(stream: S, name: &str, patience: Duration) -> Result<Self, NbdFault> {
        let mut link = Link::new(stream, patience);
        let export = handshake::open(&mut link, name).await?;
        Ok(Self { link, export, asked: HashMap::new(), blocks: HashMap::new(), next_cookie: 1 })
    }

    /// What was negotiated.
    #[must_use]
    pub fn export(&self) -> Export {
        self.export
    }

    /// Reads the ranges `wanted` into `outlet`: ascending, each at a unit's begin, within the export.
    ///
    /// # Errors
    /// [`Ended`]; what was handed over is right.
    pub async fn copy(
        mut self,
        wanted: Vec<Range<u64>>,
        outlet: &mut impl Outlet,
    ) -> Result<(), Ended> {
        let mut plan = Plan::new(self.export, wanted);
        loop {
            let is_done = self.ask(&mut plan, outlet).await?;
            if self.asked.is_empty() {
                if is_done {
                    break;
                }
                continue;
            }
            self.take_reply(&mut plan, outlet).await?;
        }
        // Whether it hears it or not: all is here.
        let _gone = self.link.send(&request(CMD_DISC, 0, 0, 0)).await;
        Ok(())
    }

    fn cookie(&mut self) -> u64 {
        self.next_cookie = self.next_cookie.wrapping_add(1);
        self.next_cookie
    }

    /// Asks for as much as there is room for; true if there is nothing more to ask for.
    async fn ask(&mut self, plan: &mut Plan, outlet: &mut impl Outlet) -> Result<bool, Ended> {
        let mut requests = Vec::new();
        let mut held = None;
        let is_done = loop {
            if let Some(range) = plan.question() {
                let (cookie, len) = (self.cookie(), length(&range));
                requests.extend_from_slice(&request(CMD_BLOCK_STATUS, cookie, range.start, len));
                self.asked.insert(cookie, Asked::Status { told: range.start, end: range.end });
            }
            if self.asked.len() >= MAX_ASKED || self.blocks.len() >= MAX_BLOCKS {
                break false;
            }
            // A buffer first: a step that was taken has to be done.
            let buf = match held.take() {
                Some(buf) => buf,
                None if self.blocks.is_empty() => {
                    // Nothing of it is under way that would be held up.
                    self.link.send(&std::mem::take(&mut requests)).await?;
                    outlet.buffer().await?
                }
                None => match outlet.buffer().now_or_never() {
                    Some(buf) => buf?,
                    None => break false,
                },
            };
            match plan.next() {
                Step::Done => break true,
                Step::Unknown => break false,
                Step::Zeroes(range) => {
                    held = Some(buf);
                    self.link.at = range.end;
                    outlet.zeroes(range)?;
                }
                Step::Block { range, parts } => {
                    self.begin(range, parts, buf, &mut requests, outlet)?;
                }
            }
        };
        self.link.send(&requests).await?;
        Ok(is_done)
    }

    /// Begins a block: its holes are filled, and its data is asked for.
    fn begin(
        &mut self,
        range: Range<u64>,
        parts: Vec<Range<u64>>,
        mut buf: Buf,
        requests: &mut Vec<u8>,
        outlet: &mut impl Outlet,
    ) -> Result<(), Ended> {
        self.link.at = range.end;
        let len = offset_in(&range, range.end);
        let room = buf.spare(len);
        let mut at = 0;
        for part in &parts {
            room[at..offset_in(&range, part.start)].fill(0);
            at = offset_in(&range, part.end);
        }
        room[at..].fill(0);
        if parts.is_empty() {
            buf.set_len(len);
            return Ok(outlet.data(range.start, buf)?);
        }
        let block = range.start;
        for part in &parts {
            let cookie = self.cookie();
            requests.extend_from_slice(&request(CMD_READ, cookie, part.start, length(part)));
            self.asked.insert(cookie, Asked::Read(Read::new(part.clone(), block)));
        }
        self.blocks.insert(block, Block { start: block, len, buf, open: parts.len() });
        Ok(())
    }

    /// Takes in one reply, or one chunk of one.
    async fn take_reply(&mut self, plan: &mut Plan, outlet: &mut impl Outlet) -> Result<(), Ended> {
        match be32(&self.link.array().await?) {
            SIMPLE_MAGIC => self.take_simple(plan, outlet).await,
            CHUNK_MAGIC if self.export.structured => self.take_chunk(plan, outlet).await,
            found => {
                let found = u64::from(found);
                Err(NbdFault::Protocol { what: "no magic of a reply", found }.into())
            }
        }
    }

    fn asked(&mut self, cookie: u64) -> Result<Asked, NbdFault> {
        let what = "a reply to nothing that was asked";
        self.asked.remove(&cookie).ok_or(NbdFault::Protocol { what, found: cookie })
    }

    async fn take_simple(
        &mut self,
        plan: &mut Plan,
        outlet: &mut impl Outlet,
    ) -> Result<(), Ended> {
        let errno = be32(&self.link.array().await?);
        let cookie = be64(&self.link.array().await?);
        let asked = self.asked(cookie)?;
        if errno != 0 {
            return Ok(failed(&asked, plan, errno, String::new())?);
        }
        match asked {
            Asked::Read(mut read) if !self.export.structured => {
                let all = read.range.clone();
                read.take(all.start, all.end - all.start)?;
                self.fill(&read, all, outlet).await?;
                self.end(read, outlet)
            }
            Asked::Read(_) | Asked::Status { .. } => {
                let what = "a simple reply where a structured one was agreed on";
                Err(NbdFault::Protocol { what, found: cookie }.into())
            }
        }
    }

    async fn take_chunk(&mut self, plan: &mut Plan, outlet: &mut impl Outlet) -> Result<(), Ended> {
        let (flags, kind) = (be16(&self.link.array().await?), be16(&self.link.array().await?));
        let cookie = be64(&self.link.array().await?);
        let len = be32(&self.link.array().await?);
        let is_done = flags & CHUNK_DONE != 0;
        let mut asked = self.asked(cookie)?;
        let wrong = |what| NbdFault::Protocol { what, found: u64::from(len) };
        match (kind, &mut asked) {
            (CHUNK_NONE, _) if len != 0 || !is_done => {
                return Err(wrong("an empty chunk that is none, or not the last").into());
            }
            (CHUNK_NONE, _) => {}
            (CHUNK_DATA, Asked::Read(read)) => {
                let bytes = len.checked_sub(8).ok_or_else(|| wrong("length of a chunk of data"))?;
                let at = be64(&self.link.array().await?);
                let range = read.take(at, u64::from(bytes))?;
                self.fill(read, range, outlet).await?;
            }
            (CHUNK_HOLE, Asked::Read(read)) => {
                if len != 12 {
                    return Err(wrong("length of a chunk of a hole").into());
                }
                let at = be64(&self.link.array().await?);
                let range = read.take(at, u64::from(be32(&self.link.array().await?)))?;
                if let Some(block) = self.blocks.get_mut(&read.block) {
                    block.part(&range).fill(0);
                }
            }
            (CHUNK_STATUS, Asked::Status { told, end }) if *told < *end => {
                *told = self.take_extents(plan, *told, *end, len).await?;
                outlet.arrived(usize::try_from(len).unwrap_or(0)).await;
            }
            (kind, _) if kind & CHUNK_ERROR_BIT != 0 => {
                let (errno, text) = self.take_error(len).await?;
                return Ok(failed(&asked, plan, errno, text)?);
            }
            (kind, _) => {
                let what = "a chunk that the request does not have";
                return Err(NbdFault::Protocol { what, found: u64::from(kind) }.into());
            }
        }
        if !is_done {
            self.asked.insert(cookie, asked);
            return Ok(());
        }
        match asked {
            Asked::Read(read) => self.end(read, outlet),
            Asked::Status { .. } => {
                plan.told();
                Ok(())
            }
        }
    }

    /// Reads the bytes of `range` to where they belong.
    async fn fill(
        &mut self,
        read: &Read,
        range: Range<u64>,
        outlet: &mut impl Outlet,
    ) -> Result<(), Ended> {
        if let Some(block) = self.blocks.get_mut(&read.block) {
            let part = block.part(&range);
            let count = part.len();
            self.link.read(part).await?;
            outlet.arrived(count).await;
        }
        Ok(())
    }

    /// All chunks of a read have come. The last read of a block hands it over.
    fn end(&mut self, read: Read, outlet: &mut impl Outlet) -> Result<(), Ended> {
        if !read.is_complete() {
            let what = "a reply that ends before all bytes have come";
            return Err(NbdFault::Protocol { what, found: read.range.start }.into());
        }
        let Some(block) = self.blocks.get_mut(&read.block) else { return Ok(()) };
        block.open -= 1;
        if block.open > 0 {
            return Ok(());
        }
        if let Some(Block { start, len, mut buf, .. }) = self.blocks.remove(&read.block) {
            buf.set_len(len);
            outlet.data(start, buf)?;
        }
        Ok(())
    }

    /// The extents of one chunk; up to where they tell.
    async fn take_extents(
        &mut self,
        plan: &mut Plan,
        told: u64,
        end: u64,
        len: u32,
    ) -> Result<u64, NbdFault> {
        let wrong = |what, found: u32| NbdFault::Protocol { what, found: u64::from(found) };
        let id = be32(&self.link.array().await?);
        let count = len.saturating_sub(4) / 8;
        if len != 4 + count * 8 || count == 0 || count > MAX_EXTENTS {
            return Err(wrong("length of a chunk of extents", len));
        }
        if Some(id) != self.export.holes {
            return Err(wrong("extents of a context that was not asked for", id));
        }
        let mut at = told;
        for _ in 0..count {
            let bytes: [u8; 8] = self.link.array().await?;
            let [a, b, c, d, flags @ ..] = bytes;
            let (len, flags) = (be32(&[a, b, c, d]), be32(&flags));
            if len == 0 {
                return Err(wrong("an extent of no bytes", flags));
            }
            // The last one may tell more than was asked.
            let next = at.saturating_add(u64::from(len)).min(end);
            plan.tell(at..next, flags & STATE_ZERO != 0);
            at = next;
        }
        Ok(at)
    }

    /// The number and the text of an error.
    async fn take_error(&mut self, len: u32) -> Result<(u32, String), NbdFault> {
        if !(6..=MAX_ERROR_BYTES).contains(&len) {
            let found = u64::from(len);
            return Err(NbdFault::Protocol { what: "length of a chunk of an error", found });
        }
        let errno = be32(&self.link.array().await?);
        let text_len = usize::from(be16(&self.link.array().await?));
        let rest = self.link.bytes(usize::try_from(len - 6).unwrap_or(0)).await?;
        Ok((errno, said(rest.get(..text_len).unwrap_or_default())))
    }
}

impl Block {
    /// The place of `range`, which a read of this block has judged.
    fn part(&mut self, range: &Range<u64>) -> &mut [u8] {
        let all = self.start..self.start + self.len as u64;
        let (from, to) = (offset_in(&all, range.start), offset_in(&all, range.end));
        &mut self.buf.spare(self.len)[from..to]
    }
}

/// A request has failed: of a read that is the end; holes need not be known.
fn failed(asked: &Asked, plan: &mut Plan, errno: u32, text: String) -> Result<(), NbdFault> {
    match asked {
        Asked::Read(read) => {
            let (at, len) = (read.range.start, length(&read.range));
            Err(NbdFault::CannotRead { at, len, errno, text })
        }
        Asked::Status { .. } => {
            plan.all_is_data();
            Ok(())
        }
    }
}

/// How far `at` is inside `range`, which is at most a block.
fn offset_in(range: &Range<u64>, at: u64) -> usize {
    usize::try_from(at.clamp(range.start, range.end) - range.start).unwrap_or(0)
}

fn length(range: &Range<u64>) -> u32 {
    u32::try_from(range.end - range.start).unwrap_or(u32::MAX)
}
