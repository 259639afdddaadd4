//! The first answer of a run: which version the source has now, and whether what is here belongs to it.
//!
//! Why: all that follows is held against this answer; and what is durable is worth as much as the proof that
//! it is of the same version.
//! How: what is missing is asked for, on condition of the version that is here. An answer of that version
//! lets it stay, one of another begins anew; a server that sends all of it is asked again before that.
//! Never: keeps a byte that neither a strong validator nor a digest speaks for.
//! Start at [`Run::open`].

use std::sync::Arc;

use super::crew;
use super::decode::Codec;
use super::error::{Class, FetchError};
use super::fleet::First;
use super::http::{Answer, Client};
use super::progress::Phase;
use super::spool::Kept;
use super::threads::in_place;
use super::transfer::Run;
use super::version::{Agreed, Remote, Resume, no_ranges};

/// How often a server that sends all of it instead of a part is asked again before what is here is given up.
const WHOLE_ANSWERS: u32 = 2;

/// What the first answer of a run has told.
pub(super) enum Opened {
    /// All of the file is here; the source's ETag.
    Here(Option<String>),
    /// The bytes of the file.
    Stream(First, Agreed),
    /// A compressed stream, from its beginning.
    Packed(Answer, Codec),
    /// A compressed stream, the rest of what an earlier run has kept.
    Kept(Agreed),
}

impl Run<'_> {
    /// Gets the first answer and settles the version. The one of `clients` that gave it is the first of them then.
    pub(super) async fn open(
        &mut self,
        clients: &mut [Arc<Client>],
        known: Option<&Remote>,
        kept: Option<&Kept>,
    ) -> Result<Opened, FetchError> {
        let mut failures = 0;
        loop {
            self.progress.set_phase(Phase::Connecting);
            let mut failed = None;
            for index in 0..clients.len() {
                let client = Arc::clone(&clients[index]);
                let asked = match kept {
                    Some(kept) => self.ask_kept(&client, kept).await.map(Opened::Kept),
                    None => self.ask_first(&client, known, failures < WHOLE_ANSWERS).await,
                };
                match asked {
                    Ok(opened) => {
                        clients.swap(0, index);
                        return Ok(opened);
                    }
                    Err(error @ (FetchError::Cancelled | FetchError::Disk(_))) => {
                        return Err(error);
                    }
                    // The source's own word counts, not a mirror's.
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            let Some(error) = failed else { return Err(FetchError::Cancelled) };
            if let FetchError::WholeAnswer { url } = &error
                && failures >= WHOLE_ANSWERS
            {
                return Err(no_ranges(url.clone()));
            }
            failures += 1;
            match error.class() {
                Class::Refuse | Class::Cancelled => return Err(error),
                Class::Retry if error.ends_run() => return Err(error),
                Class::Retry if failures >= self.engine.policy.max_attempts => {
                    let source = Box::new(error);
                    return Err(FetchError::GaveUp { attempts: failures, source });
                }
                Class::Retry => {}
            }
            self.progress.failed_once(error.report());
            crew::rest(&error, failures, &self.engine.policy, self.progress).await?;
        }
    }

    async fn ask_first(
        &mut self,
        client: &Client,
        known: Option<&Remote>,
        may_ask_again: bool,
    ) -> Result<Opened, FetchError> {
        let missing = self.filling.missing().into_iter().next();
        let range = match (known, &missing) {
            (None, _) => 0..u64::MAX,
            (Some(_), Some(range)) if Some(range.end) == self.filling.total_bytes() => {
                range.start..u64::MAX
            }
            (Some(_), Some(range)) => range.clone(),
            // Everything is here; one byte is asked for to learn the version it belongs to.
            (Some(_), None) => 0..1,
        };
        // A mirror has an ETag of its own: the condition would only be refused there.
        let bound = known.filter(|_| !self.mirrors);
        let asked = client.get(range.clone(), bound, &self.engine.policy);
        let answer = tokio::select! {
            answer = asked => answer?,
            () = self.progress.stopped() => return Err(FetchError::Cancelled),
        };
        let mut answer = answer;
        if self.source.unpack && answer.start == 0 {
            let stall = self.engine.policy.stall_timeout;
            let head = answer.peek(Codec::SNIFF_BYTES, client, stall).await?;
            if let Some(codec) = Codec::sniff(&head) {
                return Ok(Opened::Packed(answer, codec));
            }
        }
        let is_same = known.is_some_and(|known| {
            known.may_resume(&answer.remote, false) == Resume::Same
                && answer.total == self.filling.total_bytes()
        });
        if is_same && !answer.ranged && may_ask_again {
            return Err(FetchError::WholeAnswer { url: client.shown() });
        }
        let (resumed, agreed) = self.agree(client, &answer, known)?;
        if resumed && missing.is_none() {
            return Ok(Opened::Here(agreed.remote.etag));
        }
        // A server that ignored the range sends everything.
        let asked_end = if answer.ranged { range.end } else { u64::MAX };
        Ok(Opened::Stream(First { answer, asked_end }, agreed))
    }

    /// Begins with the first answer, or goes on with what is here if it is of the same version.
    /// True if what is here stays.
    fn agree(
        &mut self,
        client: &Client,
        answer: &Answer,
        known: Option<&Remote>,
    ) -> Result<(bool, Agreed), FetchError> {
        let has_digest = self.expect.is_some();
        let resume = known.map_or(Resume::No, |known| {
            let same = known.may_resume(&answer.remote, has_digest);
            let same_total = answer.total.is_some() && answer.total == self.filling.total_bytes();
            // Of mirrors, each has a version of its own; the digest tells in the end.
            let by_digest = same == Resume::No && self.mirrors && has_digest;
            let same = if by_digest { Resume::Unproven } else { same };
            if same_total && answer.ranged { same } else { Resume::No }
        });
        match resume {
            Resume::Same | Resume::Unproven => {
                // A part of it may have come from a mirror.
                self.unproven = resume == Resume::Unproven || self.mirrors && has_digest;
                in_place(|| self.filling.resume())?;
            }
            // What is here is of another version: ask again, from the beginning.
            Resume::No if answer.start > 0 || known.is_some() && answer.ranged => {
                let what = "it is not the version of which a part is here".to_owned();
                return Err(FetchError::Changed { url: client.shown(), what });
            }
            Resume::No => self.begin(&answer.remote, answer.total)?,
        }
        self.progress.set_total(self.filling.total_bytes());
        let provable = answer.remote.may_resume(&answer.remote, has_digest) != Resume::No;
        // A source that has not told its length cannot be continued: its end would not be known.
        let can_resume = answer.ranged && provable && answer.total.is_some();
        let agreed = Agreed { remote: answer.remote.clone(), can_resume, has_digest };
        Ok((resume != Resume::No, agreed))
    }
}
