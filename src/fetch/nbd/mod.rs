//! An NBD export as a source: a volume of another system, a running VM's disk, a file that a tool serves.
//!
//! Why: what has no URL of a file may have an export, and a whole disk over a network is mostly holes.
//! How: one connection with many requests under way ([`NbdSession`]); holes are told by the server
//! (`base:allocation`) and neither asked for nor sent. The blocks go the way of every transfer: buffers of
//! the pool, digests, disk.
//! Never: goes on with bytes of an earlier connection unless a digest will prove the whole: an export is
//! live and has no version. Never speaks TLS.
//! Start at [`Run::nbd`].

mod fault;
mod handshake;
mod link;
mod place;
mod plan;
mod replies;
mod session;
mod wire;

use std::ops::Range;
use std::sync::Arc;

pub use fault::NbdFault;
pub use handshake::Export as NbdExport;
pub(in crate::fetch) use place::Place;
pub use session::{Ended as NbdEnded, Outlet as NbdOutlet, Session as NbdSession};

use super::crew::rest;
use super::error::{Class, FetchError};
use super::limit::RateLimit;
use super::pipeline::{Feed, Stopped};
use super::progress::{Phase, Progress};
use super::threads::in_place;
use super::transfer::{Fetched, Run};
use super::version::{Remote, Resume};
use crate::ring::{Buf, BufShare};

impl Run<'_> {
    /// From an export. With a digest that will prove the whole, a connection that breaks costs what was
    /// under way; without one, only one that breaks before a byte has come is tried again here.
    pub(super) async fn nbd(&mut self, place: &Place, fresh: bool) -> Result<Fetched, FetchError> {
        let (mut failures, mut fresh) = (0, fresh);
        loop {
            let before = self.progress.received();
            let error = match self.nbd_once(place, &mut fresh).await {
                Err(error @ FetchError::Nbd { .. }) if error.class() == Class::Retry => error,
                other => return other,
            };
            let moved = self.progress.received() > before;
            if moved && !self.expect.is_some() {
                let (url, at) = (self.url.to_string(), self.filling.present_bytes());
                return Err(FetchError::CannotResume { url, at, source: Box::new(error) });
            }
            failures = if moved { 1 } else { failures + 1 };
            if failures >= self.engine.policy.max_attempts {
                return Err(FetchError::GaveUp { attempts: failures, source: Box::new(error) });
            }
            tracing::warn!(error = %error.report(), "trying the export again");
            self.progress.failed_once(error.report());
            rest(&error, failures, &self.engine.policy, self.progress).await?;
        }
    }

    /// `fresh`: what is here is not to be gone on with, until it was begun anew.
    async fn nbd_once(&mut self, place: &Place, fresh: &mut bool) -> Result<Fetched, FetchError> {
        let (policy, progress) = (&self.engine.policy, Arc::clone(self.progress));
        let failed = |source| FetchError::Nbd { url: self.url.to_string(), source };
        progress.set_phase(Phase::Connecting);
        let opening = async {
            let stream = place.connect(policy, self.url).await?;
            let opened = NbdSession::open(stream, &place.export, policy.stall_timeout).await;
            opened.map_err(failed)
        };
        let session = tokio::select! {
            session = opening => session?,
            () = progress.stopped() => return Err(FetchError::Cancelled),
        };
        let (total, remote) = (session.export().size, Remote::default());
        let known = self.known_version().filter(|_| !*fresh && self.filling.present_bytes() > 0);
        let may = known.map_or(Resume::No, |k| k.may_resume(&remote, self.expect.is_some()));
        if may != Resume::No && self.filling.total_bytes() == Some(total) {
            self.unproven = true;
            in_place(|| self.filling.resume())?;
        } else {
            self.begin(&remote, Some(total))?;
            *fresh = false;
        }
        progress.set_total(Some(total));
        progress.set_connections(1);
        progress.set_phase(Phase::Fetching);
        let missing = self.filling.missing();
        let feed = self.start_pipeline(&missing, self.source.wanted())?;
        let (share, limit) = (self.share.clone(), Arc::clone(&self.engine.limit));
        let mut outlet = ToDisk { feed, share, limit, progress: Arc::clone(&progress) };
        let copied = tokio::select! {
            copied = session.copy(missing, &mut outlet) => copied,
            () = progress.stopped() => Err(FetchError::Cancelled.into()),
        };
        // The stages end when nobody can feed them any more.
        drop(outlet);
        progress.set_connections(0);
        match copied {
            Ok(()) => self.complete(None, total).await,
            Err(NbdEnded::Stopped(Stopped)) => Err(self.writer_error().await),
            Err(NbdEnded::Fetch(error)) => self.abandon(error).await,
            Err(NbdEnded::Fault(source)) => {
                let url = self.url.to_string();
                self.abandon(FetchError::Nbd { url, source }).await
            }
        }
    }
}

/// The way of an export's bytes to disk and digests.
struct ToDisk {
    feed: Feed,
    share: BufShare,
    limit: Arc<RateLimit>,
    progress: Arc<Progress>,
}

impl NbdOutlet for ToDisk {
    async fn buffer(&mut self) -> Result<Buf, FetchError> {
        self.share.take().await.map_err(|source| FetchError::Memory { source })
    }

    fn data(&mut self, at: u64, buf: Buf) -> Result<(), Stopped> {
        self.feed.send(at, buf)
    }

    fn zeroes(&mut self, range: Range<u64>) -> Result<(), Stopped> {
        self.feed.send_zeroes(range.start, range.end - range.start)
    }

    async fn arrived(&mut self, bytes: usize) {
        self.progress.add_received(bytes as u64);
        self.progress.limit().spend(bytes).await;
        self.limit.spend(bytes).await;
    }
}
