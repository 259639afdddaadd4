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
            "tokio-uring" if cfg!(feature = "tokio-uring") => Ok(Self::TokioUring),
            "tokio-uring" => Err("sink \"tokio-uring\" is not in this program: build it with \
                                  --features tokio-uring, or give auto, uring or threads"
                .to_owned()),
            _ => Err(format!("sink {text:?} is not known; give auto, uring or threads")),
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
    /// The crate tokio-uring, O_DIRECT; only with the feature of that name.
    TokioUring,
}

impl fmt::Display for SinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uring => "uring",
            Self::Threads => "threads",
            Self::TokioUring => "tokio-uring",
        })
    }
}

/// The sink chosen for a directory, and why not the faster one.
#[derive(Clone, Debug)]
pub struct Probe {
    /// What to use.
    pub kind: SinkKind,
    /// Why io_uring is not used; `None` when it is, or when threads were asked for.
    pub reason: Option<String>,
}

impl Probe {
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
        #[cfg(feature = "tokio-uring")]
        SinkKind::TokioUring => Ok(Box::new(super::TokioUringSink::new()?)),
        #[cfg(not(feature = "tokio-uring"))]
        SinkKind::TokioUring => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Chooses the sink for files in `dir`.
///
/// # Errors
/// Only for [`Choice::Uring`] and [`Choice::TokioUring`], when it does not work here; the message says what to change.
pub fn probe(dir: &Path, choice: Choice) -> Result<Probe, String> {
    match choice {
        Choice::Threads => Ok(Probe { kind: SinkKind::Threads, reason: None }),
        Choice::TokioUring => match smoke(dir, SinkKind::TokioUring) {
            Ok(()) => Ok(Probe { kind: SinkKind::TokioUring, reason: None }),
            Err(reason) => Err(format!("{}: tokio-uring does not work: {reason}", dir.display())),
        },
        Choice::Auto | Choice::Uring => match smoke(dir, SinkKind::Uring) {
            Ok(()) => Ok(Probe { kind: SinkKind::Uring, reason: None }),
            Err(reason) if choice == Choice::Uring => {
                Err(format!("{}: io_uring does not work here: {reason}", dir.display()))
            }
            Err(reason) => Ok(Probe { kind: SinkKind::Threads, reason: Some(reason) }),
        },
    }
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
    let open = |flags| rustix::fs::open(dir, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    let fd = open(OFlags::TMPFILE | OFlags::RDWR | OFlags::DIRECT)
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
