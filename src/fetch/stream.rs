//! A compressed source as it comes: one stream, over as many connections as it takes.
//!
//! Why: a decoder wants every byte in its order, so there is one connection at a time, and nothing else
//! would come while it is broken, stands or trickles.
//! How: the next one asks for the rest of the same version, on another mirror if there is one. One on which
//! far less comes than before, or next to nothing, is left by the rule of [`Level`] and [`Best`]: a source
//! that is as slow on each is soon waited for.
//! Never: goes on with another version of the source, or leaves one that cannot be continued.
//! Start at [`Run::stream`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;

use super::crew;
use super::error::{Class, FetchError};
use super::http::{Answer, Client};
use super::pace::{Best, LOOK, Level, Pace};
use super::policy::Policy;
use super::progress::Phase;
use super::spool::Spooler;
use super::threads::blocking;
use super::transfer::Run;
use super::unpack::Unpacker;
use super::version::{Agreed, no_ranges};
use super::ways::{Way, Ways};
use crate::units::MIB;

/// A compressed source as it comes.
#[derive(Debug)]
pub(super) struct Stream {
    ways: Ways,
    /// The one that is taken.
    way: Arc<Way>,
    /// Length of the source, if told.
    packed: Option<u64>,
    /// Bytes of the source that have come.
    at: u64,
    pub(super) agreed: Agreed,
    /// The body that is being read.
    answer: Option<Answer>,
    /// Where they are kept too, if they are.
    pub(super) spooler: Option<Spooler>,
    /// True once bytes were taken on the digest's word alone.
    pub(super) unproven: bool,
    /// What its fastest connection got.
    best: Best,
    /// How long a MiB may take that another connection could bring sooner.
    level: Level,
    /// It trickles, and cannot be continued elsewhere.
    has_to_wait: bool,
}

impl Stream {
    /// What `clients` lead to, the first of which has told its version.
    pub(super) fn new(
        clients: Vec<Arc<Client>>,
        agreed: Agreed,
        packed: Option<u64>,
        answer: Option<Answer>,
        spooler: Option<Spooler>,
    ) -> Self {
        let ways = Ways::of(clients, agreed.remote.clone());
        let way = Arc::clone(&ways.first().0);
        let at = spooler.as_ref().map_or(0, Spooler::len_bytes);
        let (best, level) = (Best::default(), Level::default());
        let (unproven, has_to_wait) = (false, false);
        Self { ways, way, packed, at, agreed, answer, spooler, unproven, best, level, has_to_wait }
    }

    /// The next byte is that at `at`.
    pub(super) fn goes_on_at(&mut self, at: u64) {
        if self.at != at {
            self.answer = None;
        }
        self.at = at;
    }

    /// The next request goes whichever way is the best now.
    fn pick_way(&mut self) {
        self.way = Arc::clone(&self.ways.pick().0);
    }

    /// Where the source ends, or has to.
    fn end(&self, most: u64) -> u64 {
        self.packed.unwrap_or(most)
    }

    /// Waits until so little comes that another connection is worth a try; not while nothing at all does,
    /// as then there is another limit, `most`.
    async fn trickles(&self, pace: &Pace, left: u64, most: Duration) {
        loop {
            let patience = self.level.patience(most);
            let is_alive = pace.moved().elapsed() < patience;
            if patience < most && is_alive && self.best.is_too_slow(pace, left, patience) {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Takes note of what has come on a connection.
    fn came(&self, pace: &mut Pace, bytes: u64) {
        let before = pace.bytes();
        pace.came(bytes);
        self.best.note(pace);
        if before < MIB && pace.bytes() >= MIB {
            self.level.brought(pace);
        }
    }

    /// True if nothing more is for the spool alone.
    fn is_enough(&self, to: To<'_>) -> bool {
        match to {
            To::Decoder(_) => false,
            To::Spool(enough) => enough.load(Ordering::SeqCst) || self.spooler.is_none(),
        }
    }
}

/// How far a body was read.
#[derive(Debug)]
enum Fed {
    /// To its end, or nobody takes more.
    Over,
    /// Not yet; the stream has the rest of it.
    Begun,
    /// It is asked for elsewhere.
    Left,
}

/// Where a stream goes, besides its spool.
#[derive(Clone, Copy, Debug)]
pub(super) enum To<'a> {
    Decoder(&'a Unpacker),
    /// Nowhere else, until this is true.
    Spool(&'a AtomicBool),
}

impl Run<'_> {
    /// Brings in the rest of a stream, over as many connections as it takes; for the spool alone, until
    /// that is enough, or there is none any more.
    pub(super) async fn stream(&self, stream: &mut Stream, to: To<'_>) -> Result<(), FetchError> {
        let (mut failures, mut good_at) = (0, stream.at);
        loop {
            if stream.is_enough(to) {
                return Ok(());
            }
            let went = match stream.answer.take() {
                Some(answer) => self.feed(stream, answer, to).await,
                None if stream.packed == Some(stream.at) => return Ok(()),
                None => self.ask_rest(stream).await,
            };
            let error = match went {
                Ok(Fed::Over) => return Ok(()),
                Ok(Fed::Begun) => continue,
                Ok(Fed::Left) => {
                    stream.pick_way();
                    continue;
                }
                Err(error) => error,
            };
            let (has_moved, can_resume) = (stream.at > good_at, stream.agreed.can_resume);
            if has_moved {
                stream.way.worked();
                (failures, good_at) = (0, stream.at);
            }
            if can_resume && stream.ways.failed(&stream.way, &error) {
                self.progress.failed_once(error.report());
                stream.pick_way();
                continue;
            }
            failures += 1;
            let error = self.may_go_on(error, can_resume, failures, stream.at)?;
            self.progress.failed_once(error.report());
            crew::rest(&error, failures, &self.engine.policy, self.progress).await?;
            self.progress.set_phase(Phase::Fetching);
        }
    }

    /// Asks for what the decoder does not have yet.
    async fn ask_rest(&self, stream: &mut Stream) -> Result<Fed, FetchError> {
        let Stream { way, agreed, packed, at, .. } = stream;
        let asked = way.ask(*at..u64::MAX, agreed, *packed, &self.engine.policy);
        let (answer, is_unproven) = tokio::select! {
            answer = asked => answer?,
            () = self.progress.stopped() => return Err(FetchError::Cancelled),
        };
        stream.unproven |= is_unproven;
        stream.answer = Some(answer);
        Ok(Fed::Begun)
    }

    /// The error if it may pass, else what ends the run.
    fn may_go_on(
        &self,
        error: FetchError,
        can_resume: bool,
        failures: u32,
        at: u64,
    ) -> Result<FetchError, FetchError> {
        if error.class() != Class::Retry || error.ends_run() {
            return Err(error);
        }
        let (url, source) = (self.url.to_string(), Box::new(error));
        if !can_resume {
            return Err(FetchError::CannotResume { url, at, source });
        }
        if failures >= self.engine.policy.max_attempts {
            if let FetchError::WholeAnswer { url } = *source {
                return Err(no_ranges(url));
            }
            return Err(FetchError::GaveUp { attempts: failures, source });
        }
        Ok(*source)
    }

    /// Hands the rest of a body over.
    async fn feed(
        &self,
        stream: &mut Stream,
        mut answer: Answer,
        to: To<'_>,
    ) -> Result<Fed, FetchError> {
        let Policy { stall_timeout: stall, max_bytes, .. } = self.engine.policy;
        let (way, end, mut pace) = (Arc::clone(&stream.way), stream.end(max_bytes), Pace::new());
        loop {
            let (at, client) = (stream.at, &way.client);
            if stream.packed == Some(at) && answer.has_length() {
                return Ok(Fed::Over);
            }
            if stream.is_enough(to) {
                stream.answer = Some(answer);
                return Ok(Fed::Begun);
            }
            pace.wait();
            // As of a piece of a file that comes as it is.
            let left = MIB.min(end - at);
            let chunk = tokio::select! {
                biased;
                () = self.progress.stopped() => return Err(FetchError::Cancelled),
                chunk = answer.chunk(at, client, stall) => chunk?,
                () = stream.trickles(&pace, left, stall), if !stream.has_to_wait => {
                    if self.leaves(stream, &pace) {
                        return Ok(Fed::Left);
                    }
                    continue;
                }
            };
            match chunk {
                Some(bytes) if bytes.len() as u64 > end - at => {
                    return Err(FetchError::TooMuch { url: client.shown(), total: end });
                }
                Some(bytes) => {
                    stream.came(&mut pace, bytes.len() as u64);
                    if !self.take(stream, bytes, to).await? {
                        return Ok(Fed::Over);
                    }
                }
                None => match stream.packed.filter(|total| *total != at) {
                    Some(total) => {
                        return Err(FetchError::Short { url: client.shown(), at, total });
                    }
                    None => return Ok(Fed::Over),
                },
            }
        }
    }

    /// True if the rest of what trickles is to be asked for on another connection. If it cannot be, that
    /// is said once.
    fn leaves(&self, stream: &mut Stream, pace: &Pace) -> bool {
        let (url, at) = (self.url, stream.at);
        if !stream.agreed.can_resume {
            stream.has_to_wait = true;
            let said = "it comes far too slowly, and cannot be continued on another connection";
            tracing::warn!(%url, at, "{said}");
            self.progress.say(said);
            return false;
        }
        tracing::info!(%url, at, "it comes far too slowly; the rest is asked for once more");
        stream.level.left(pace);
        stream.best.note_end(pace);
        stream.way.trickled();
        self.progress.add_overtaken();
        true
    }

    /// Hands the next bytes over to the spool, and to the decoder. False if there is no use in more: the
    /// decoder's error is told at the end; without a spool they are lost.
    async fn take(
        &self,
        stream: &mut Stream,
        bytes: Bytes,
        to: To<'_>,
    ) -> Result<bool, FetchError> {
        let len = bytes.len();
        // Kept before it is counted, or anything is waited for: whoever stops this then loses nothing.
        self.keep(stream, &bytes).await?;
        self.progress.add_received(len as u64);
        self.engine.limit.spend(len).await;
        self.progress.limit().spend(len).await;
        let is_taken = match to {
            To::Decoder(unpacker) => self.hand_over(unpacker, bytes).await?,
            To::Spool(_) => stream.spooler.is_some(),
        };
        if is_taken {
            stream.at += len as u64;
        }
        Ok(is_taken)
    }

    /// Hands the next bytes to the spool, if there is one. If it fails, there is none any more.
    async fn keep(&self, stream: &mut Stream, bytes: &Bytes) -> Result<(), FetchError> {
        let Some(spooler) = &stream.spooler else { return Ok(()) };
        // What has come is kept, also when this is to stop: that waits for the spool's thread anyway.
        if !spooler.push(bytes.clone()).await
            && let Some(spooler) = stream.spooler.take()
            && let Err(error) = blocking(move || spooler.end(false)).await
        {
            return self.spool_failed(&error);
        }
        Ok(())
    }

    pub(super) async fn hand_over(
        &self,
        unpacker: &Unpacker,
        bytes: Bytes,
    ) -> Result<bool, FetchError> {
        tokio::select! {
            taken = unpacker.push(bytes) => Ok(taken),
            () = self.progress.stopped() => Err(FetchError::Cancelled),
        }
    }
}
