//! A frontend and a driver in one, and a server to talk to.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bedplate::disk::Sealed;
use bedplate::image::View;
use bedplate::serve::vhost_user::{Limits, Server};
use bedplate::serve::{Exports, ServeError, Stopper};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1024 * KIB;
/// Memory of the guest: queues in the first MiB, data after it.
pub const MEMORY: u64 = 64 * MIB;
/// Where the frontend says that it has it mapped.
pub const USER: u64 = 0x7f00_0000_0000;
pub const QUEUE_SIZE: u16 = 128;
/// Far away, so that only what hangs meets it.
pub const DEADLINE: Duration = Duration::from_secs(60);

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;
pub const PROTOCOL: u64 = 1 << 30;
pub const ALL: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC | PROTOCOL;

/// What a status byte holds before anybody has written it.
pub const UNTOUCHED: u8 = 0xee;

/// A server on a socket in a directory of its own, stopped when dropped.
pub struct TestServer {
    pub dir: tempfile::TempDir,
    pub exports: Arc<Exports>,
    pub stopper: Stopper,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl TestServer {
    /// Serves the image at `path`.
    pub fn of(path: &Path) -> Self {
        Self::of_view(View::open(Sealed::open_path(path).unwrap(), None).unwrap())
    }

    pub fn of_view(view: View) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let exports = Arc::new(Exports::new());
        exports.add_as("disk", Arc::new(view), "", "disk 0011aabb").unwrap();
        let server = bind(&dir.path().join("s"), &exports);
        let stopper = server.stopper();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { dir, exports, stopper, thread }
    }

    /// Serves `bytes` as a raw image with holes.
    pub fn of_bytes(bytes: &[u8]) -> (Self, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.raw");
        crate::nbd_support::write_sparse(&path, bytes);
        (Self::of(&path), dir)
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub fn stop(&mut self) {
        self.stopper.stop();
        let ended = self.thread.take().map(|thread| thread.join().expect("no panic"));
        ended.unwrap().unwrap();
    }

    /// Until no frontend is there any more.
    pub fn until_free(&self) {
        until("the session to end", || self.stopper.connections() == 0);
    }
}

pub fn bind(socket: &Path, exports: &Arc<Exports>) -> Server {
    Server::bind(socket, Arc::clone(exports), "disk", Limits::default()).unwrap()
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop();
        }
    }
}

/// Waits for something that must come.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        if start.elapsed() > DEADLINE {
            panic!("waited for {what}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub at: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.at.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A guest with its VMM.
pub struct Vm {
    pub frontend: Frontend,
    pub memory: File,
    pub features: u64,
    pub queues: Vec<VmQueue>,
}

/// One queue: its memory is at `base`, descriptors first.
pub struct VmQueue {
    pub base: u64,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    /// Requests made so far, and answers seen.
    pub made: u16,
    pub seen: u16,
}

impl VmQueue {
    pub fn available(&self) -> u64 {
        self.base + 16 * u64::from(QUEUE_SIZE)
    }

    pub fn used(&self) -> u64 {
        self.base + 16 * KIB
    }
}

pub fn memfd(len: u64) -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    file
}

impl Vm {
    /// Connects, negotiates `features` and starts `queues` queues.
    pub fn start(socket: &Path, features: u64, queues: u64) -> Self {
        let mut vm = Self::connect(socket, features);
        vm.share(&[(0, MEMORY, USER, 0)]);
        (0..queues).for_each(|_| vm.add_queue());
        vm
    }

    /// Connects and negotiates.
    pub fn connect(socket: &Path, features: u64) -> Self {
        Self::connect_with(socket, features, memfd(MEMORY))
    }

    pub fn connect_with(socket: &Path, features: u64, memory: File) -> Self {
        let frontend = Frontend::connect(socket, 16).unwrap();
        Self { frontend, memory, features, queues: Vec::new() }.negotiated()
    }

    fn negotiated(mut self) -> Self {
        self.frontend.set_owner().unwrap();
        let offered = self.frontend.get_features().unwrap();
        assert_eq!(self.features & !offered, 0, "what is asked for is offered");
        assert_ne!(offered & 1 << 5, 0, "VIRTIO_BLK_F_RO");
        if self.features & PROTOCOL != 0 {
            let offered = self.frontend.get_protocol_features().unwrap();
            self.frontend.set_protocol_features(offered).unwrap();
            assert!(offered.contains(VhostUserProtocolFeatures::CONFIG));
            if offered.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                let flag = vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY;
                self.frontend.set_hdr_flags(flag);
            }
        }
        self.frontend.set_features(self.features).unwrap();
        self
    }

    /// Shares regions of the memory: guest address, length, address in the VMM, place in the file.
    pub fn share(&self, regions: &[(u64, u64, u64, u64)]) {
        self.try_share(regions).unwrap();
    }

    pub fn try_share(&self, regions: &[(u64, u64, u64, u64)]) -> vhost::Result<()> {
        let region =
            |&(guest, len, user, offset): &(u64, u64, u64, u64)| VhostUserMemoryRegionInfo {
                guest_phys_addr: guest,
                memory_size: len,
                userspace_addr: user,
                mmap_offset: offset,
                mmap_handle: self.memory.as_raw_fd(),
            };
        let regions: Vec<_> = regions.iter().map(region).collect();
        self.frontend.set_mem_table(&regions).map(|_bases| ())
    }

    /// Makes a queue in the guest's memory and gives it to the backend.
    pub fn add_queue(&mut self) {
        let base = self.queues.len() as u64 * 32 * KIB;
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let queue = VmQueue { base, kick: event(), call: event(), err: event(), made: 0, seen: 0 };
        self.queues.push(queue);
        self.give(self.queues.len() - 1);
    }

    /// Gives queue `index` to the backend, as it is.
    pub fn give(&mut self, index: usize) {
        let queue = &self.queues[index];
        let front = &mut self.frontend;
        front.set_vring_num(index, QUEUE_SIZE).unwrap();
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: USER + queue.base,
            used_ring_addr: USER + queue.used(),
            avail_ring_addr: USER + queue.available(),
            log_addr: None,
        };
        front.set_vring_addr(index, &config).unwrap();
        front.set_vring_base(index, queue.seen).unwrap();
        front.set_vring_call(index, &queue.call).unwrap();
        front.set_vring_err(index, &queue.err).unwrap();
        front.set_vring_kick(index, &queue.kick).unwrap();
        if self.features & PROTOCOL != 0 {
            front.set_vring_enable(index, true).unwrap();
        }
    }

    pub fn config(&mut self) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.frontend.get_config(0, 60, flags, &[0; 60]).unwrap().1
    }

    pub fn poke(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    pub fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    pub fn peek_u16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.peek(at, 2).try_into().unwrap())
    }

    /// Writes a descriptor of a queue's own table.
    pub fn describe(&self, queue: usize, index: u16, desc: Desc) {
        self.poke(self.queues[queue].base + 16 * u64::from(index), &desc.bytes());
    }

    /// Writes a chain of descriptors from `first` on.
    pub fn chain(&self, queue: usize, first: u16, parts: &[(u64, u32, u16)]) {
        for (index, &(at, len, flags)) in (first..).zip(parts) {
            let is_last = usize::from(index - first) + 1 == parts.len();
            let more = if is_last { 0 } else { NEXT };
            self.describe(queue, index, Desc { at, len, flags: flags | more, next: index + 1 });
        }
    }

    /// The head of a request, at `at`.
    pub fn head(&self, at: u64, kind: u32, sector: u64) {
        let mut head = kind.to_le_bytes().to_vec();
        head.extend_from_slice(&[0; 4]);
        head.extend_from_slice(&sector.to_le_bytes());
        self.poke(at, &head);
    }

    /// Makes the chain at `head` available, without a kick.
    pub fn make(&mut self, queue: usize, head: u16) {
        let made = self.queues[queue].made;
        let available = self.queues[queue].available();
        self.poke(available + 4 + 2 * u64::from(made % QUEUE_SIZE), &head.to_le_bytes());
        // So that every answer is told of.
        let seen = self.queues[queue].seen;
        self.poke(available + 4 + 2 * u64::from(QUEUE_SIZE), &seen.to_le_bytes());
        self.queues[queue].made = made.wrapping_add(1);
        self.poke(available + 2, &self.queues[queue].made.to_le_bytes());
    }

    pub fn kick(&self, queue: usize) {
        self.queues[queue].kick.write(1).unwrap();
    }

    /// The next answer: head and length.
    pub fn answer(&mut self, queue: usize) -> (u32, u32) {
        let (used, seen) = (self.queues[queue].used(), self.queues[queue].seen);
        until("an answer", || self.peek_u16(used + 2) != seen);
        let entry = self.peek(used + 4 + 8 * u64::from(seen % QUEUE_SIZE), 8);
        self.queues[queue].seen = seen.wrapping_add(1);
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        (word(&entry[..4]), word(&entry[4..]))
    }

    /// One request with the chain at descriptor 0, and its status byte at `status`.
    pub fn ask(&mut self, queue: usize, parts: &[(u64, u32, u16)], status: u64) -> (u8, u32) {
        self.poke(status, &[UNTOUCHED]);
        self.chain(queue, 0, parts);
        self.make(queue, 0);
        self.kick(queue);
        let (head, len) = self.answer(queue);
        assert_eq!(head, 0);
        (self.peek(status, 1)[0], len)
    }

    /// A request of `kind` with `len` bytes of data for us to write; status and data.
    pub fn request(&mut self, queue: usize, kind: u32, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let place = MIB + queue as u64 * 8 * MIB;
        let (status, data) = (place + 64, place + 4096);
        self.head(place, kind, sector);
        let parts = [(place, 16, 0), (data, len, WRITE), (status, 1, WRITE)];
        let (said, _) = self.ask(queue, &parts, status);
        (said, self.peek(data, len as usize))
    }

    /// Bytes of the disk, which must be had.
    pub fn read(&mut self, queue: usize, sector: u64, len: u32) -> Vec<u8> {
        let (status, data) = self.request(queue, 0, sector, len);
        assert_eq!(status, 0, "sector {sector}, {len} bytes");
        data
    }
}
