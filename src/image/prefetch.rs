//! What a trace says will be read of an image that is still arriving, asked for ahead.
//!
//! Why: on the first node readers waited for each block of their boot; the next node need not find
//! out anew what they will want.
//! How: a thread walks the trace in its order through the view, as a read would: tables first, as they
//! say where the rest is; then data and compressed clusters. It asks for a little at a time, behind
//! all that readers wait for.
//! Never: keeps a view or a file open for itself, waits as a reader does, or asks for what is here.
//! Start at [`View::prefetch`].

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::arrival::Missing;
use super::source::{Asking, LayerFile};
use super::{Trace, View};
use crate::disk::Arriving;
use crate::units::GuestOffset;

/// Bytes of a disk that are looked at in one step.
const STEP_BYTES: u64 = 1 << 20;
/// Tables that are asked for before any data is.
const MAX_FIRST_TABLES: usize = 64;
/// How long one wait takes at most: then it is looked whether anybody still reads.
const PATIENCE: Duration = Duration::from_secs(1);

impl View {
    /// Begins to ask for what `trace` has of a disk that is still arriving; ends by itself when all of
    /// it was asked for, the disk is complete or lost, or nobody else has the view any more.
    ///
    /// # Errors
    /// The process is out of threads.
    pub fn prefetch(self: &Arc<Self>, trace: Arc<Trace>) -> io::Result<()> {
        let size_bytes = self.size_bytes();
        let outside = trace.bytes(u64::MAX) - trace.bytes(size_bytes);
        let (path, recorded) = (self.path().display(), trace.size_bytes().unwrap_or(size_bytes));
        if outside > 0 || recorded != size_bytes {
            tracing::warn!(
                file = %path, size_bytes, recorded_size_bytes = recorded, bytes_left_out = outside,
                "the trace was recorded on a disk of another size; what fits is used"
            );
        }
        tracing::info!(file = %path, ranges = trace.len(), bytes = trace.bytes(size_bytes), "a trace is followed");
        let view = Arc::downgrade(self);
        let follow = move || match (Walk { view: &view }).follow(&trace, size_bytes) {
            Ok(()) => tracing::info!("all of a trace was asked for"),
            Err(Over) => tracing::debug!("nobody needs the rest of a trace"),
        };
        std::thread::Builder::new().name("prefetch".into()).spawn(follow).map(drop)
    }

    /// The file that is arriving, while it may still become complete.
    fn arriving_file(&self) -> Option<&Arc<Arriving>> {
        self.layers().iter().find_map(|layer| match layer.file() {
            LayerFile::Arriving(file) if !file.is_whole() && !file.has_failed() => Some(file),
            LayerFile::Arriving(_) | LayerFile::Sealed(_) => None,
        })
    }
}

/// There is nothing to be asked for any more.
struct Over;

struct Walk<'a> {
    /// Not held: who reads no more lets it go.
    view: &'a Weak<View>,
}

impl Walk<'_> {
    fn view(&self) -> Result<(Arc<View>, Arc<Arriving>), Over> {
        let view = self.view.upgrade().ok_or(Over)?;
        let file = view.arriving_file().cloned().ok_or(Over)?;
        Ok((view, file))
    }

    fn follow(&self, trace: &Trace, size_bytes: u64) -> Result<(), Over> {
        self.ask_for_tables(trace, size_bytes)?;
        for (at, len_bytes) in trace.ranges(size_bytes) {
            let end = at.advance(len_bytes);
            let mut at = at;
            while at < end {
                let step = (end.0 - at.0).min(STEP_BYTES);
                self.foresee(at, step)?;
                at = at.advance(step);
            }
        }
        Ok(())
    }

    /// Asks for the tables of all ranges, so that they come together.
    fn ask_for_tables(&self, trace: &Trace, size_bytes: u64) -> Result<(), Over> {
        let (view, _) = self.view()?;
        let mut found = 0;
        for (at, _) in trace.ranges(size_bytes) {
            found += usize::from(view.ask_for_table(at));
            if found >= MAX_FIRST_TABLES {
                break;
            }
        }
        Ok(())
    }

    /// Asks for what is missing of a range, once there is room for it.
    fn foresee(&self, at: GuestOffset, len_bytes: u64) -> Result<(), Over> {
        loop {
            let (view, file) = self.view()?;
            if !file.foreseen().has_room(PATIENCE) {
                continue;
            }
            match view.first_missing(at, len_bytes, Asking::Later) {
                Some(Missing { at, len_bytes, is_table: true, .. }) => {
                    drop(view);
                    let _or_asked_again = file.came_within(at, len_bytes, PATIENCE);
                }
                Some(_) | None => return Ok(()),
            }
        }
    }
}

impl View {
    /// Asks for the table that says what is at `at`, if it is missing; true if it is.
    fn ask_for_table(&self, at: GuestOffset) -> bool {
        let known = self.layer_run_by(at, 1, |layer, at, end| {
            let file = super::source::Impatient::new(layer.file(), Asking::Later);
            layer.run_from(&file, at, end)
        });
        // A table that is here and damaged is met by who reads.
        known.is_err()
    }
}
