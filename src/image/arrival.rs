//! Reading an image while it is still arriving.
//!
//! Why: a guest boots from an image of which only a little is here; all that a request needs must be
//! asked for at once, and its reader wait once.
//! How: a range is walked as a read would walk it, with files that do not wait: tables, data and
//! compressed clusters that are missing are asked for, and the first of them is what to wait for. A
//! table that has come may lead to more, so the walk is made again.
//! Never: waits on a thread that decodes for others, or costs a complete image more than a glance.
//! Start at [`View::bring`].

use std::sync::Arc;

use super::layer::Layer;
use super::source::{Asking, Impatient};
use super::{ReadError, Run, RunKind, Stored, View};
use crate::disk::{Arriving, GoesOn, Waits};
use crate::units::GuestOffset;

/// Runs that one walk looks at.
const MAX_RUNS: usize = 1 << 16;

/// What is missing of a layer's file.
pub(super) struct Missing<'a> {
    pub(super) layer: &'a Arc<Layer>,
    pub(super) at: u64,
    pub(super) len_bytes: u64,
    /// It says where others are: nobody knows what else is missing.
    pub(super) is_table: bool,
}

impl View {
    /// True while a file of this view is not complete.
    #[inline]
    #[must_use]
    pub fn is_arriving(&self) -> bool {
        self.layers().iter().any(|layer| layer.arriving().is_some())
    }

    /// True if a file of this view will never be complete: reads are errors from then on.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.layers().iter().filter_map(|layer| layer.arriving()).any(Arriving::has_failed)
    }

    /// How often readers had to wait for what was still to come.
    #[must_use]
    pub fn waits(&self) -> Waits {
        let all = self.layers().iter().filter_map(|layer| layer.file().waits());
        all.fold(Waits::default(), |sum, waits| Waits {
            misses: sum.misses + waits.misses,
            waited: sum.waited + waits.waited,
            stalls: sum.stalls + waits.stalls,
            foreseen_bytes: sum.foreseen_bytes + waits.foreseen_bytes,
        })
    }

    /// Asks for all that a read of `[at, at + len)` needs and that is not here; true if nothing is
    /// missing. Does not wait.
    pub fn ask(&self, at: GuestOffset, len_bytes: u64) -> bool {
        self.first_missing(at, len_bytes, Asking::Now).is_none()
    }

    /// Waits until all is here that a read of `[at, at + len)` needs.
    ///
    /// # Errors
    /// [`ReadError::Io`]: it will not come, or nothing has come for a long time. Damaged tables are
    /// no error here; who reads meets them.
    pub fn bring(&self, at: GuestOffset, len_bytes: u64) -> Result<(), ReadError> {
        self.bring_while(at, len_bytes, None)
    }

    /// As [`bring`](Self::bring), while `goes_on` says so; it is asked often.
    ///
    /// # Errors
    /// Also [`ReadError::Io`] (`Interrupted`) once it does not.
    pub fn bring_while(
        &self,
        at: GuestOffset,
        len_bytes: u64,
        goes_on: GoesOn<'_>,
    ) -> Result<(), ReadError> {
        while self.is_arriving() {
            let missing = self.first_missing(at, len_bytes, Asking::Now);
            let Some(Missing { layer, at, len_bytes, .. }) = missing else { break };
            let Some(arriving) = layer.arriving() else { continue };
            arriving.wait_while(at, len_bytes, goes_on).map_err(|source| {
                let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
                ReadError::io(arriving.path(), at, len, source)
            })?;
        }
        Ok(())
    }

    /// Of a run that begins at `at`: whether its beginning is on this node, and how far that holds.
    #[must_use]
    pub fn presence(&self, at: GuestOffset, run: Run) -> (bool, u64) {
        let arriving = |layer: u8| self.layers().get(usize::from(layer))?.arriving_data();
        match run.kind {
            RunKind::Data(Stored { layer, at }) => match arriving(layer) {
                Some(file) => {
                    let (is_here, until) = file.run_at(at.0, at.0 + run.len_bytes);
                    (is_here, until - at.0)
                }
                None => (true, run.len_bytes),
            },
            RunKind::Encoded if self.is_arriving() => {
                (self.first_missing(at, 1, Asking::Now).is_none(), run.len_bytes)
            }
            RunKind::Encoded | RunKind::Zero => (true, run.len_bytes),
        }
    }

    /// Asks for what is missing of a range; gives the first of it.
    pub(super) fn first_missing(
        &self,
        mut at: GuestOffset,
        len_bytes: u64,
        asking: Asking,
    ) -> Option<Missing<'_>> {
        let end = at.0.saturating_add(len_bytes).min(self.size_bytes());
        let mut first = None;
        for _ in 0..MAX_RUNS {
            if at.0 >= end {
                break;
            }
            let table = std::cell::Cell::new(None);
            let found = self.layer_run_by(at, end - at.0, |layer, at, end| {
                let file = Impatient::new(layer.file(), asking);
                let run = layer.run_from(&file, at, end);
                if let (Err(_), Some((at, len_bytes))) = (&run, file.missing())
                    && let Some(layer) = self.shared(layer)
                {
                    table.set(Some(Missing { layer, at, len_bytes, is_table: true }));
                }
                run
            });
            let Ok((run, layer)) = found else {
                // Without the table nobody knows what comes after it; or it is damaged.
                return first.or(table.into_inner());
            };
            let missing = layer.and_then(|layer| self.missing_of(layer, run, at, asking));
            first = first.or(missing);
            at = at.advance(run.len_bytes);
        }
        first
    }

    /// Asks for what is missing of a run's bytes.
    fn missing_of<'a>(
        &self,
        layer: &'a Arc<Layer>,
        run: Run,
        at: GuestOffset,
        asking: Asking,
    ) -> Option<Missing<'a>> {
        let (arriving, (at, len_bytes)) = match run.kind {
            RunKind::Zero => return None,
            RunKind::Data(stored) => (layer.arriving_data()?, (stored.at.0, run.len_bytes)),
            RunKind::Encoded if layer.cached(at).is_some() => return None,
            RunKind::Encoded => (layer.arriving()?, layer.encoded_range(at)?),
        };
        if arriving.is_here(at, len_bytes) {
            return None;
        }
        asking.ask(arriving, at, len_bytes);
        Some(Missing { layer, at, len_bytes, is_table: false })
    }

    fn shared(&self, layer: &Layer) -> Option<&Arc<Layer>> {
        self.layers().iter().find(|shared| std::ptr::eq(&raw const ***shared, layer))
    }
}
