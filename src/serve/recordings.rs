//! The traces that are being recorded on a node, kept on its disk.
//!
//! Why: who records a boot for an hour must not lose it with the process.
//! How: a small file for each image whose readers are noted. It is written when the recording begins,
//! every few seconds while something new was read, when the export is closed and when the daemon ends.
//! When the image is opened again, by this process or the next one, its recorder goes on from there.
//! Never: keeps a recording of another image under the same name, or after it was ended; a crash costs
//! the last seconds.
//! Start at [`Recordings::start`].

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::{Export, Exports, Recorder};
use crate::disk::{Dir, DiskError};
use crate::image::{MAX_TRACE_BYTES, TraceFile};

/// How often it is looked at what there is to keep; a crash costs so much at most.
pub const KEEP_INTERVAL: Duration = Duration::from_secs(2);
/// Longest file that is read: a trace and what is around it.
const MAX_FILE_BYTES: usize = 2 * MAX_TRACE_BYTES;
const SUFFIX: &str = ".json";

/// Recordings, each in a file.
#[derive(Debug)]
pub struct Recordings {
    dir: Dir,
    /// Of each image, how many units its file has.
    written: Mutex<HashMap<String, u64>>,
}

/// What is in a file.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// Which image it is, beside its name.
    identity: String,
    /// When it ends by itself, in milliseconds since 1970.
    until_ms: Option<u64>,
    trace: TraceFile,
}

impl Kept {
    fn lasts(&self) -> Option<Duration> {
        self.until_ms.map(|until| Duration::from_millis(until.saturating_sub(now_ms())))
    }
}

impl Recordings {
    /// In the directory `path`, which is made if it is missing.
    ///
    /// # Errors
    /// It cannot be made or opened.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        std::fs::create_dir_all(path).map_err(|e| DiskError::io("make directory", path, e))?;
        Ok(Self { dir: Dir::open(path)?, written: Mutex::default() })
    }

    /// Held while files change, so that none is written after its recording has ended.
    fn written(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        // Each change is one insert or one remove.
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to note, anew, what is asked for of an export, for as long as `lasts`; `None`: until it is
    /// ended. Blocks.
    ///
    /// # Errors
    /// The process is out of descriptors or memory. A file that cannot be written is only logged.
    pub fn start(&self, export: &Export, lasts: Option<Duration>) -> io::Result<Arc<Recorder>> {
        let mut written = self.written();
        let recorder = export.tracing().start(export.view().size_bytes(), lasts)?;
        written.remove(export.name());
        self.keep_one(&mut written, export);
        Ok(recorder)
    }

    /// Goes on with the recording of an export that was opened again, if there is one. Blocks.
    pub fn resume(&self, export: &Export) {
        let mut written = self.written();
        let Some(kept) = self.read(export.name()) else { return };
        let size_bytes = export.view().size_bytes();
        if kept.identity != export.identity() || kept.trace.virtual_size_bytes != Some(size_bytes) {
            self.forget_file(&mut written, export.name());
            return;
        }
        match export.tracing().resume(size_bytes, kept.lasts(), &kept.trace) {
            Ok(recorder) => {
                written.insert(export.name().to_owned(), recorder.units());
                tracing::info!(export = export.name(), "a trace is recorded further");
            }
            Err(error) => tracing::warn!(%error, "a recording cannot go on"),
        }
    }

    /// What was noted so far of the image `name`, whether it is open now or not.
    #[must_use]
    pub fn get(&self, name: &str, export: Option<&Export>) -> Option<TraceFile> {
        let _held = self.written();
        let recorder = export.and_then(|export| export.tracing().latest());
        recorder.map(|recorder| recorder.trace()).or_else(|| Some(self.read(name)?.trace))
    }

    /// Ends a recording and forgets it; gives what it has. Blocks.
    #[must_use]
    pub fn stop(&self, name: &str, export: Option<&Export>) -> Option<TraceFile> {
        let mut written = self.written();
        let recorder = export.and_then(|export| export.tracing().end());
        let kept = recorder.map(|recorder| recorder.trace());
        let kept = kept.or_else(|| Some(self.read(name)?.trace));
        self.forget_file(&mut written, name);
        kept
    }

    /// The image is no more. Blocks.
    pub fn forget(&self, name: &str) {
        self.forget_file(&mut self.written(), name);
    }

    /// Writes what is new of one export's recording, if there is one. Blocks.
    pub fn keep(&self, export: &Export) {
        self.keep_one(&mut self.written(), export);
    }

    /// Writes what is new of all. Blocks.
    pub fn keep_all(&self, exports: &Exports) {
        for export in exports.list() {
            self.keep(&export);
        }
    }

    /// Takes the files away of images that are not `known`. Blocks.
    pub fn clean(&self, known: impl Fn(&str) -> bool) {
        let mut written = self.written();
        for file in self.dir.names().unwrap_or_default() {
            let name = file.strip_suffix(SUFFIX).filter(|name| known(name));
            if name.is_none() {
                written.remove(file.trim_end_matches(SUFFIX));
                self.remove(&file);
            }
        }
    }

    fn keep_one(&self, written: &mut HashMap<String, u64>, export: &Export) {
        let Some(recorder) = export.tracing().latest() else { return };
        // Read first: what is noted meanwhile is new the next time.
        let units = recorder.units();
        if written.get(export.name()) == Some(&units) {
            return;
        }
        let until_ms = recorder.left().map(|left| now_ms().saturating_add(millis(left)));
        let kept =
            Kept { identity: export.identity().to_owned(), until_ms, trace: recorder.trace() };
        let bytes = serde_json::to_vec(&kept).expect("text and numbers are JSON");
        match self.dir.replace(&file_of(export.name()), &bytes) {
            Ok(()) => drop(written.insert(export.name().to_owned(), units)),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(export = export.name(), error, "a recording is in memory only");
            }
        }
    }

    /// What is in a file; one that is damaged is none.
    fn read(&self, name: &str) -> Option<Kept> {
        let file = self.dir.try_open_file(&file_of(name), OFlags::RDONLY).ok()??;
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES as u64).read_to_end(&mut bytes).ok()?;
        let kept = serde_json::from_slice::<Kept>(&bytes);
        kept.inspect_err(|error| tracing::warn!(%error, name, "a recording is damaged")).ok()
    }

    fn forget_file(&self, written: &mut HashMap<String, u64>, name: &str) {
        written.remove(name);
        self.remove(&file_of(name));
    }

    fn remove(&self, file: &str) {
        if let Err(error) = self.dir.remove_file(file) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the file of a recording stays");
        }
    }
}

/// An image's name is a DNS label: one component, and no suffix of ours.
fn file_of(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

fn now_ms() -> u64 {
    millis(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
