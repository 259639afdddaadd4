//! Which sink works here: tried on the data directory, not guessed from a version.
//!
//! Why: io_uring is refused by seccomp, sysctl or an old kernel, O_DIRECT by some file systems;
//! both occur in one cluster.
//! How: one page is written through the ring to an unnamed file in the directory and read back.
//! Never: fails the start: the answer to any trouble is the thread sink and a reason to show.
//! Start at [`probe`].

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::thread::try_uncached;
use super::{BufPool, PAGE_BYTES, Sink, ThreadSink, UringSink, WriteOp};
use crate::units::FileOffset;

/// What the user wants of the sinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// io_uring where it works, threads elsewhere.
    #[default]
    Auto,
    /// io_uring, or an error that says why not.
    Uring,
    /// `pwrite` on threads.
    Threads,
    /// Writes on threads that leave nothing in the page cache, or an error that says why not.
    Uncached,
    /// The crate tokio-uring, or an error that says why not.
    TokioUring,
}

impl std::str::FromStr for Choice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "uring" => Ok(Self::Uring),
            "threads" => Ok(Self::Threads),
            "uncached" => Ok(Self::Uncached),
            "tokio-uring" if cfg!(feature = "tokio-uring") => Ok(Self::TokioUring),
            "tokio-uring" => Err("sink \"tokio-uring\" is not in this program: build it with \
                                  --features tokio-uring, or give auto, uring, threads or uncached"
                .to_owned()),
            _ => Err(format!("sink {text:?} is not known; give auto, uring, threads or uncached")),
        }
    }
}

/// A kind of sink that works on one directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SinkKind {
    /// [`UringSink`], O_DIRECT.
    Uring,
    /// [`ThreadSink`], buffered.
    Threads,
    /// [`ThreadSink::uncached`].
    Uncached,
    /// The crate tokio-uring, O_DIRECT; only with the feature of that name.
    TokioUring,
}

impl fmt::Display for SinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uring => "uring",
            Self::Threads => "threads",
            Self::Uncached => "uncached",
            Self::TokioUring => "tokio-uring",
        })
    }
}

/// The sinks chosen for a directory, and why not the better one.
#[derive(Clone, Debug)]
pub struct Probe {
    /// What to use.
    pub kind: SinkKind,
    /// What to use where no digest is made: then the processor has time for the faster writes.
    pub idle: SinkKind,
    /// Why io_uring is not used; `None` when it is, or when another was asked for.
    pub reason: Option<String>,
}

impl Probe {
    fn only(kind: SinkKind, reason: Option<String>) -> Self {
        Self { kind, idle: kind, reason }
    }

    /// The same for a transfer that has digests to make (`busy`), or has not.
    #[must_use]
    pub fn when(&self, busy: bool) -> Self {
        Self::only(if busy { self.kind } else { self.idle }, self.reason.clone())
    }

    /// A new sink of the chosen kind. One that worked at the probe may be refused later (memlock);
    /// then it is threads.
    #[must_use]
    pub fn open(&self) -> Box<dyn Sink> {
        ring(self.kind).unwrap_or_else(|error| {
            tracing::warn!(%error, "no ring for this transfer: writing on threads");
            Box::new(ThreadSink::new())
        })
    }
}

/// A new sink of this kind.
fn ring(kind: SinkKind) -> io::Result<Box<dyn Sink>> {
    match kind {
        SinkKind::Uring => Ok(Box::new(UringSink::new()?)),
        SinkKind::Threads => Ok(Box::new(ThreadSink::new())),
        SinkKind::Uncached => Ok(Box::new(ThreadSink::uncached())),
        #[cfg(feature = "tokio-uring")]
        SinkKind::TokioUring => Ok(Box::new(super::TokioUringSink::new()?)),
        #[cfg(not(feature = "tokio-uring"))]
        SinkKind::TokioUring => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Chooses the sink for files in `dir`.
///
/// # Errors
/// What was named does not work here; the message says what to change.
pub fn probe(dir: &Path, choice: Choice) -> Result<Probe, String> {
    let refused = |what: &str, reason| format!("{}: {what}: {reason}", dir.display());
    match choice {
        Choice::Threads => Ok(Probe::only(SinkKind::Threads, None)),
        Choice::Uncached => uncached(dir)
            .map(|()| Probe::only(SinkKind::Uncached, None))
            .map_err(|reason| refused("uncached writes do not work here", reason)),
        Choice::TokioUring => smoke(dir, SinkKind::TokioUring)
            .map(|()| Probe::only(SinkKind::TokioUring, None))
            .map_err(|reason| refused("tokio-uring does not work", reason)),
        Choice::Uring => smoke(dir, SinkKind::Uring)
            .map(|()| Probe::only(SinkKind::Uring, None))
            .map_err(|reason| refused("io_uring does not work here", reason)),
        Choice::Auto => {
            let found = match smoke(dir, SinkKind::Uring) {
                Ok(()) => Probe::only(SinkKind::Uring, None),
                Err(reason) => Probe::only(SinkKind::Threads, Some(reason)),
            };
            let idle = uncached(dir).map_or(found.idle, |()| SinkKind::Uncached);
            Ok(Probe { idle, ..found })
        }
    }
}

/// Tries an uncached write to an unnamed file in `dir`.
fn uncached(dir: &Path) -> Result<(), String> {
    let fd = unnamed(dir, OFlags::empty()).map_err(|e| e.to_string())?;
    try_uncached(&File::from(fd)).map_err(|e| format!("Linux 6.14 or later has them ({e})"))
}

fn unnamed(dir: &Path, extra: OFlags) -> rustix::io::Result<std::os::fd::OwnedFd> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC | extra;
    rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)
}

/// Turns the errno of a refused ring into its usual cause and what to do.
fn ring_refused(error: &io::Error) -> String {
    let cause = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "the kernel forbids io_uring (a container's seccomp profile, or sysctl \
             kernel.io_uring_disabled); allow io_uring_setup, io_uring_enter, io_uring_register"
        }
        Some(libc::ENOSYS) => "this kernel has no io_uring; Linux 5.6 or later has it",
        Some(libc::ENOMEM) => "the locked-memory limit is too low for a ring; raise ulimit -l",
        Some(_) | None => "setting up a ring failed",
    };
    format!("{cause} ({error})")
}

/// Writes one page through a ring to an unnamed file in `dir`, reads it back.
fn smoke(dir: &Path, kind: SinkKind) -> Result<(), String> {
    let mut sink = ring(kind).map_err(|e| ring_refused(&e))?;
    let fd = unnamed(dir, OFlags::DIRECT)
        .map_err(|e| format!("the file system of {} refuses O_DIRECT ({e})", dir.display()))?;
    let mut file = File::from(fd);
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, PAGE_BYTES as u64)
        .map_err(|e| format!("the file system of {} refuses fallocate ({e})", dir.display()))?;
    let failed = |e: io::Error| format!("a test write with O_DIRECT failed ({e})");
    write_page(&mut *sink, &file).map_err(failed)?;
    // Read back without O_DIRECT: the buffer here is not aligned, and a cached read sees the write.
    rustix::fs::fcntl_setfl(file.as_fd(), OFlags::empty()).map_err(|e| failed(e.into()))?;
    let mut back = vec![0u8; PAGE_BYTES];
    file.rewind().and_then(|()| file.read_exact(&mut back)).map_err(failed)?;
    if back.iter().any(|&b| b != 0xB5) {
        return Err("a test write with O_DIRECT read back other bytes".to_owned());
    }
    Ok(())
}

fn write_page(sink: &mut dyn Sink, file: &File) -> io::Result<()> {
    let permit_free = BufPool::new(1);
    let mut buf = permit_free.try_take()?;
    buf.fill(&[0xB5; PAGE_BYTES], PAGE_BYTES);
    let op = WriteOp {
        file: Arc::new(file.try_clone()?),
        buf: Arc::new(buf),
        range: 0..PAGE_BYTES,
        at: FileOffset(0),
        tag: 0,
    };
    sink.push(op).map_err(|_| io::Error::other("an empty ring is full"))?;
    let mut result = Ok(());
    sink.reap(1, &mut |_, ended| result = ended)?;
    result
}
