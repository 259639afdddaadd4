//! The readers: bedplate, its Rust peers, and the two ways to read a raw file.
//!
//! Why: each has another interface, and some are asynchronous; the workloads must not care.
//! How: one trait. An asynchronous reader is polled here, on files read with pread, so that no
//! runtime takes part; each peer is set up in the way that is its fastest for one thread.
//! Never: caches anything for a reader that does not by itself.
//! Start at [`Kind::open`].

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;

use bedplate::disk::Sealed;
use bedplate::image::{DecodedCache, View};
use bedplate::peer::Allowed;
use bedplate::replica::{Mode, Options, Replica};
use bedplate::serve::replica::{Limits, Server};
use bedplate::serve::{Exports, Stopper};
use bedplate::units::GuestOffset;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use memmap2::Mmap;
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::utils::qcow2_setup_dev_sync;

use crate::Result;

/// What bedplate may keep decoded: all of the image that `tools/bench` makes.
const CACHE_BYTES: u64 = 512 << 20;
/// What it may always keep, on a small machine.
const CACHE_BYTES_BY_DEFAULT: u64 = 64 << 20;
/// A future that is not ready after this many polls waits for something that never comes.
const MOST_POLLS: u32 = 1 << 20;

/// Which reader.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `bedplate::image::View`, with a cache for the whole disk.
    Bedplate,
    /// `bedplate::replica::Replica`, attached to an engine in this process that keeps as much.
    Replica(Mode),
    /// `imago`, its synchronous flavour.
    Imago,
    /// `qcow2-rs`, its engine on pread.
    Qcow2Rs,
    /// A copy out of a map of a raw file: nothing is faster, and a bad page is a SIGBUS.
    Mmap,
    /// pread on a raw file.
    Pread,
}

/// A flat disk of bytes.
pub trait Reader {
    /// Length of the disk.
    fn size_bytes(&self) -> u64;
    /// Fills `buf` from byte `at` on.
    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<()>;
}

impl Kind {
    /// Opens the image with nothing read ahead.
    pub fn open(self, path: &Path) -> Result<Box<dyn Reader>> {
        Ok(match self {
            Self::Bedplate => {
                // A process has one, however many images it opens.
                static CACHE: LazyLock<Arc<DecodedCache>> =
                    LazyLock::new(|| DecodedCache::new(CACHE_BYTES));
                let cache = Arc::clone(&CACHE);
                Box::new(View::open_with_cache(Sealed::open_path(path)?, None, cache)?)
            }
            Self::Replica(mode) => Box::new(Attached::open(path, mode)?),
            Self::Imago => {
                let builder = imago::qcow2::Qcow2::<imago::file::File>::builder_path(path);
                Box::new(FormatAccess::new(builder.open(PermissiveImplicitOpenGate::default())?))
            }
            Self::Qcow2Rs => {
                let params = Qcow2DevParams::new(9, None, None, true, false);
                let dev = qcow2_setup_dev_sync(path, &params).map_err(of_qcow2_rs)?;
                finish(dev.qcow2_prep_io())?.map_err(of_qcow2_rs)?;
                Box::new(dev)
            }
            Self::Mmap => {
                let file = File::open(path)?;
                // SAFETY: the file is this benchmark's own, and nobody changes it meanwhile.
                Box::new(unsafe { Mmap::map(&file) }?)
            }
            Self::Pread => Box::new(File::open(path)?),
        })
    }

    /// Opens the image with nothing read of it, in a process that is in use: the memory that
    /// bedplate may keep decoded (here as much as it does by default) is full of another image.
    /// Others keep nothing, or what they keep is small.
    pub fn open_in_use(self, path: &Path) -> Result<Box<dyn Reader>> {
        let Self::Bedplate = self else { return self.open(path) };
        let cache = DecodedCache::new(CACHE_BYTES_BY_DEFAULT);
        let open = || -> Result<View> {
            Ok(View::open_with_cache(Sealed::open_path(path)?, None, cache.clone())?)
        };
        let other = open()?;
        let mut buf = vec![0; 1 << 20];
        let mut at = 0;
        while at < View::size_bytes(&other) {
            let len = usize::try_from(View::size_bytes(&other) - at)?.min(buf.len());
            View::read_at(&other, buf.get_mut(..len).unwrap_or_default(), GuestOffset(at))?;
            at += len as u64;
        }
        Ok(Box::new(InUse { view: open()?, _other: other }))
    }
}

/// A replica, and the engine that it is attached to.
struct Attached {
    replica: Replica,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Attached {
    fn open(path: &Path, mode: Mode) -> Result<Self> {
        let exports = Arc::new(Exports::new());
        let cache = DecodedCache::new(CACHE_BYTES);
        let view = View::open_with_cache(Sealed::open_path(path)?, None, cache)?;
        exports.add("image", Arc::new(view), "")?;
        let name = format!("read-peers-{}.sock", std::process::id());
        let socket = std::env::temp_dir().join(name);
        let server = Server::bind(&socket, exports, Allowed::default(), Limits::default())?;
        let stopper = server.stopper();
        let thread = std::thread::spawn(move || drop(server.run()));
        let replica = Replica::attach(&socket, "image", Options { mode, ..Options::default() })?;
        Ok(Self { replica, stopper, thread: Some(thread) })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.stopper.stop();
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

impl Reader for Attached {
    fn size_bytes(&self) -> u64 {
        self.replica.size_bytes()
    }

    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        Ok(self.replica.read_at(buf, at)?)
    }
}

/// A view, and the one whose clusters were in the cache before.
struct InUse {
    view: View,
    _other: View,
}

impl Reader for InUse {
    fn size_bytes(&self) -> u64 {
        self.view.size_bytes()
    }

    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        Ok(self.view.read_at(buf, GuestOffset(at))?)
    }
}

impl Reader for View {
    fn size_bytes(&self) -> u64 {
        View::size_bytes(self)
    }

    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        Ok(View::read_at(self, buf, GuestOffset(at))?)
    }
}

impl Reader for FormatAccess<imago::file::File> {
    fn size_bytes(&self) -> u64 {
        self.size()
    }

    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        Ok(self.read(buf, at)?)
    }
}

impl Reader for Qcow2Dev<Qcow2IoSync> {
    fn size_bytes(&self) -> u64 {
        self.info.virtual_size()
    }

    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        let len = finish(Qcow2Dev::read_at(self, buf, at))?.map_err(of_qcow2_rs)?;
        if len == buf.len() { Ok(()) } else { Err(format!("short read at {at:#x}").into()) }
    }
}

impl Reader for Mmap {
    fn size_bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        let from = usize::try_from(at)?;
        buf.copy_from_slice(self.get(from..from + buf.len()).ok_or("past the end")?);
        Ok(())
    }
}

impl Reader for File {
    fn size_bytes(&self) -> u64 {
        self.metadata().map_or(0, |meta| meta.len())
    }

    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        Ok(self.read_exact_at(buf, at)?)
    }
}

/// Polls a future to its end: with an engine on pread nothing outside can wake it.
fn finish<T>(future: impl Future<Output = T>) -> Result<T> {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..MOST_POLLS {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return Ok(value);
        }
    }
    Err("it waits for ever".into())
}

fn of_qcow2_rs(error: qcow2_rs::error::Qcow2Error) -> crate::Error {
    format!("{error:?}").into()
}
