//! A small part of a source, read whole, for somebody who waits for it.
//!
//! Why: tables, a cluster, the first bytes that tell what a source is: nothing goes on before they are here,
//! and a connection that gives a byte now and then would hold all of it up.
//! How: what comes far more slowly than others get it, or next to nothing where that is not known, is left
//! and the rest asked for on another connection, each time with twice the patience; what has come stays.
//! Never: leaves a source for good that is slow on each connection, or takes another version's bytes.
//! Start at [`Parts::read`].

use std::ops::Range;

use super::error::FetchError;
use super::http::{Answer, Client};
use super::pace::{Best, Level, Pace};
use super::policy::Policy;
use super::progress::Progress;
use super::remote::MAX_PART_BYTES;
use super::version::Agreed;

/// Where parts come from.
pub(super) struct Parts<'a> {
    pub(super) client: &'a Client,
    pub(super) agreed: &'a Agreed,
    /// Length of the source.
    pub(super) total: u64,
    pub(super) policy: &'a Policy,
    /// What the fastest connections get.
    pub(super) best: &'a Best,
    /// How long a part may take.
    pub(super) level: &'a Level,
    /// Is told how much has come.
    pub(super) came: &'a (dyn Fn(u64) + Sync),
    /// Is told when a connection is left.
    pub(super) left: &'a (dyn Fn() + Sync),
}

impl Parts<'_> {
    /// Reads `range`, whose beginning `first` is if there is an answer already.
    pub(super) async fn read(
        &self,
        range: &Range<u64>,
        mut first: Option<Answer>,
    ) -> Result<Vec<u8>, FetchError> {
        let len = range.end - range.start;
        // It may be a length that only the server has told.
        let mut bytes = Vec::with_capacity(usize::try_from(len.min(MAX_PART_BYTES)).unwrap_or(0));
        while (bytes.len() as u64) < len {
            let mut pace = Pace::new();
            let read = self.rest_of(range, first.take(), &mut bytes, &mut pace).await;
            self.best.note_end(&pace);
            match read {
                Ok(true) => self.level.brought(&pace),
                Ok(false) => {
                    self.level.left(&pace);
                    self.client.begin_anew();
                    (self.left)();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }

    /// Reads what `bytes` do not have of `range`; false if nothing came of it for as long as one is patient,
    /// or too little: it has not come to the end then.
    async fn rest_of(
        &self,
        range: &Range<u64>,
        first: Option<Answer>,
        bytes: &mut Vec<u8>,
        pace: &mut Pace,
    ) -> Result<bool, FetchError> {
        let (client, most) = (self.client, self.policy.stall_timeout);
        let patience = self.level.patience(most);
        let mut at = range.start + bytes.len() as u64;
        let asked = async {
            match first {
                Some(answer) => Ok(answer),
                None => self.answer(at..range.end).await,
            }
        };
        let mut answer = match tokio::time::timeout(patience, asked).await {
            Ok(answer) => answer?,
            // Who waits as long as the transfer does has no more to hope for elsewhere.
            Err(_elapsed) if patience < most => return Ok(false),
            Err(_elapsed) => {
                let (url, seconds) = (client.shown(), patience.as_secs());
                return Err(FetchError::Stalled { url, at, seconds });
            }
        };
        pace.answered();
        while at < range.end {
            let patience = self.level.patience(most);
            let may_leave = patience < most;
            pace.wait();
            let chunk = match answer.chunk(at, client, patience).await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => {
                    return Err(FetchError::Short { url: client.shown(), at, total: range.end });
                }
                Err(FetchError::Stalled { .. }) if may_leave => return Ok(false),
                Err(error) => return Err(error),
            };
            let len = chunk.len() as u64;
            if len > range.end - at {
                return Err(FetchError::TooMuch { url: client.shown(), total: range.end });
            }
            (self.came)(len);
            pace.came(len);
            bytes.extend_from_slice(&chunk);
            at += len;
            if may_leave && self.best.is_too_slow(pace, range.end - at, patience) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The answer to a request for `range`, of the right version.
    async fn answer(&self, range: Range<u64>) -> Result<Answer, FetchError> {
        let answer = self.client.get(range, Some(&self.agreed.remote), self.policy).await?;
        let total = Some(self.total);
        match self.agreed.judge(&answer.remote, answer.ranged, answer.total, total) {
            Ok(_same) => Ok(answer),
            Err(misfit) => Err(misfit.at(self.client.shown())),
        }
    }
}

/// The whole object, if it has at most `most` bytes. Where its parts can be told to be of one version, it is
/// read as a part is.
pub(super) async fn whole(
    client: &Client,
    most: u64,
    policy: &Policy,
    progress: &Progress,
    (best, level): (&Best, &Level),
) -> Result<Option<Vec<u8>>, FetchError> {
    let answer = client.get(0..u64::MAX, None, policy).await?;
    let proves_parts = answer.ranged && answer.remote.etag.is_some();
    match answer.total {
        Some(total) if total > most => Ok(None),
        Some(total) if proves_parts => {
            let (remote, left) = (answer.remote.clone(), || progress.add_overtaken());
            let agreed = &Agreed { remote, can_resume: true, has_digest: false };
            let (came, left) = (&|_| {}, &left);
            let parts = Parts { client, agreed, total, policy, best, level, came, left };
            parts.read(&(0..total), Some(answer)).await.map(Some)
        }
        Some(_) | None => answer.all(client, most, policy).await,
    }
}
