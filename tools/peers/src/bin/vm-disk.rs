//! Reads the disk that a vhost-user-blk server serves, as a guest's driver does, and says what it took.
//!
//! Why: a guest under emulation measures the emulator; what a server costs is seen by a driver that is
//! a program.
//! How: `vm-disk SOCKET BLOCK DEPTH irq|poll SECONDS`: one queue in a memfd, with event indices; all
//! answers that are there are taken together, their buffers asked for again, and one kick given if the
//! server wants it, as Linux does. `irq` sleeps until the server calls, `poll` looks at the ring. One
//! object on stdout: ops, bytes, wall and CPU time of the timed part, the 99th percentile, and an xxh3
//! over the whole disk, read before.
//! Never: writes, or hashes in the timed part.
//! Start at [`run`].

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use xxhash_rust::xxh3::Xxh3;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

const SIZE: u16 = 256;
const MAX_DEPTH: u16 = 64;
const MAX_BLOCK: usize = 256 << 10;
/// The rings are in the first 64 KiB, then a page for the head and status of each slot, then data.
const AVAILABLE: usize = 16 * SIZE as usize;
const USED: usize = 16 << 10;
const SLOTS: usize = 64 << 10;
const DATA: usize = 1 << 20;
const MEMORY: usize = DATA + MAX_DEPTH as usize * MAX_BLOCK;
const STATUS: usize = 64;
const SECTOR: u64 = 512;
/// VERSION_1, RING_EVENT_IDX, and VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 30;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [socket, block, depth, mode, seconds] = words.as_slice() else {
        eprintln!("usage: vm-disk SOCKET BLOCK DEPTH irq|poll SECONDS");
        return ExitCode::from(2);
    };
    match run(Path::new(socket), block, depth, mode == "poll", seconds) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vm-disk: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(socket: &Path, block: &str, depth: &str, polls: bool, seconds: &str) -> Result<String> {
    let (block, depth): (usize, u16) = (block.parse()?, depth.parse()?);
    let limit = Duration::try_from_secs_f64(seconds.parse()?)?;
    if block == 0 || block > MAX_BLOCK || block % 512 != 0 || !(1..=MAX_DEPTH).contains(&depth) {
        return Err(format!("BLOCK is at most {MAX_BLOCK}, DEPTH at most {MAX_DEPTH}").into());
    }
    // A server takes one frontend at a time, and may not have seen yet that the last one has gone.
    let begun = Instant::now();
    let mut disk = loop {
        match Disk::connect(socket, polls) {
            Ok(disk) => break disk,
            Err(error) if begun.elapsed() > Duration::from_secs(5) => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let xxh3 = disk.hash_all()?;
    let cpu_before = cpu_ns()?;
    let start = Instant::now();
    let (ops, mut times) = disk.load(block, depth, limit)?;
    let wall_ns = start.elapsed().as_nanos();
    let cpu_ns = cpu_ns()? - cpu_before;
    times.sort_unstable();
    let p99 = times.get(times.len() * 99 / 100).copied().unwrap_or_default();
    let bytes = ops * block as u64;
    Ok(format!(
        "{{\"ops\":{ops},\"bytes\":{bytes},\"wall_ns\":{wall_ns},\"cpu_ns\":{cpu_ns},\
         \"p99_ns\":{p99},\"xxh3\":\"{xxh3:016x}\"}}"
    ))
}

/// Of all threads of the process so far.
fn cpu_ns() -> Result<u64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let spent = usage.user_time().num_nanoseconds() + usage.system_time().num_nanoseconds();
    Ok(u64::try_from(spent)?)
}

struct Disk {
    memory: MmapRaw,
    kick: EventFd,
    call: EventFd,
    sectors: u64,
    polls: bool,
    made: u16,
    /// The index at the last kick that was looked at.
    kicked: u16,
    seen: u16,
    /// Closed last: the server ends with it.
    _frontend: Frontend,
    _file: File,
}

impl Disk {
    fn connect(socket: &Path, polls: bool) -> Result<Self> {
        let file = File::from(memfd_create(c"vm-disk", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(MEMORY as u64)?;
        let memory = MmapRaw::map_raw(&file)?;
        let (kick, call) = (EventFd::new(0)?, EventFd::new(0)?);
        let mut front = Frontend::connect(socket, 1)?;
        front.set_owner()?;
        let offered = front.get_features()?;
        if offered & FEATURES != FEATURES {
            return Err(format!("the server offers {offered:#x} only").into());
        }
        let protocol = front.get_protocol_features()?;
        front.set_protocol_features(protocol)?;
        // What is offered besides is for drivers of real guests (RO: a server may insist on it).
        front.set_features(FEATURES | offered & 1 << 5)?;
        let config = front.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60])?.1;
        let sectors = config.get(..8).and_then(|bytes| bytes.try_into().ok());
        let sectors = u64::from_le_bytes(sectors.ok_or("no configuration")?);
        let user = memory.as_ptr() as u64;
        front.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: user,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        }])?;
        front.set_vring_num(0, SIZE)?;
        front.set_vring_addr(0, &VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: user,
            used_ring_addr: user + USED as u64,
            avail_ring_addr: user + AVAILABLE as u64,
            log_addr: None,
        })?;
        front.set_vring_base(0, 0)?;
        front.set_vring_call(0, &call)?;
        front.set_vring_kick(0, &kick)?;
        front.set_vring_enable(0, true)?;
        let (made, kicked, seen) = (0, 0, 0);
        let (_frontend, _file) = (front, file);
        Ok(Self { memory, kick, call, sectors, polls, made, kicked, seen, _frontend, _file })
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= MEMORY, "a place outside the memory");
        // SAFETY: inside the map; the server reads it only after an index has told it to, and what
        // it would read of a torn value are only this benchmark's own bytes.
        unsafe {
            let to = self.memory.as_mut_ptr().add(at);
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= MEMORY, "a place outside the memory");
        // SAFETY: as in `write`; what is read was written before its index was.
        unsafe {
            let from = self.memory.as_ptr().add(at);
            bytes.as_mut_ptr().copy_from_nonoverlapping(from, bytes.len());
        }
    }

    fn index(&self, at: usize) -> &AtomicU16 {
        assert!(at % 2 == 0 && at + 2 <= MEMORY, "a place outside the memory");
        // SAFETY: inside the map, aligned, and accessed as an atomic by this process only; the
        // server's accesses are of the same width.
        unsafe { AtomicU16::from_ptr(self.memory.as_mut_ptr().add(at).cast()) }
    }

    /// Asks for `len` bytes at `at` into the buffer of `slot`.
    fn ask(&mut self, slot: u16, at: u64, len: usize) -> Result<()> {
        let (head, data) = (place(slot), DATA + usize::from(slot) * MAX_BLOCK);
        let mut header = [0; 16];
        header[8..].copy_from_slice(&(at / SECTOR).to_le_bytes());
        self.write(head, &header);
        let parts = [(head, 16, 1_u16), (data, len, 3), (head + STATUS, 1, 2)];
        for (index, (at, len, flags)) in (slot * 3..).zip(parts) {
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&(at as u64).to_le_bytes());
            descriptor[8..12].copy_from_slice(&u32::try_from(len)?.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&(index + 1).to_le_bytes());
            self.write(usize::from(index) * 16, &descriptor);
        }
        let entry = AVAILABLE + 4 + 2 * usize::from(self.made % SIZE);
        self.write(entry, &(slot * 3).to_le_bytes());
        self.made = self.made.wrapping_add(1);
        Ok(())
    }

    /// Shows what was asked for, and kicks if that is wanted.
    fn show(&mut self) -> Result<()> {
        self.index(AVAILABLE + 2).store(self.made, Ordering::Release);
        fence(Ordering::SeqCst);
        let wish = self.index(USED + 4 + 8 * usize::from(SIZE)).load(Ordering::Relaxed);
        let before = std::mem::replace(&mut self.kicked, self.made);
        let since_wish = self.made.wrapping_sub(wish).wrapping_sub(1);
        if since_wish < self.made.wrapping_sub(before) {
            self.kick.write(1)?;
        }
        Ok(())
    }

    /// Waits until there is an answer; how many there are.
    fn wait(&mut self) -> Result<u16> {
        let used_event = AVAILABLE + 4 + 2 * usize::from(SIZE);
        loop {
            let answers = self.answers();
            if answers > 0 {
                return Ok(answers);
            }
            if self.polls {
                std::hint::spin_loop();
                continue;
            }
            self.index(used_event).store(self.seen, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.answers() == 0 {
                // A server may have made it one that does not block.
                let mut call = [PollFd::new(of(&self.call), PollFlags::POLLIN)];
                poll(&mut call, PollTimeout::NONE)?;
                self.call.read()?;
            }
        }
    }

    fn answers(&self) -> u16 {
        self.index(USED + 2).load(Ordering::Acquire).wrapping_sub(self.seen)
    }

    /// The slot of the next answer, which must be there.
    fn take(&mut self) -> Result<u16> {
        let mut head = [0; 4];
        self.read(USED + 4 + 8 * usize::from(self.seen % SIZE), &mut head);
        self.seen = self.seen.wrapping_add(1);
        if self.polls {
            // Never a call.
            let far = self.seen.wrapping_sub(1).wrapping_add(0x8000);
            self.index(AVAILABLE + 4 + 2 * usize::from(SIZE)).store(far, Ordering::Relaxed);
        }
        let slot = u16::try_from(u32::from_le_bytes(head))? / 3;
        let mut status = [0xff];
        self.read(place(slot) + STATUS, &mut status);
        if status == [0] { Ok(slot) } else { Err(format!("status {}", status[0]).into()) }
    }

    fn hash_all(&mut self) -> Result<u64> {
        let (mut hash, mut at, end) = (Xxh3::new(), 0, self.sectors * SECTOR);
        let mut bytes = vec![0; MAX_BLOCK];
        while at < end {
            let len = usize::try_from(end - at)?.min(MAX_BLOCK);
            self.ask(0, at, len)?;
            self.show()?;
            self.wait()?;
            let slot = self.take()?;
            let part = bytes.get_mut(..len).unwrap_or_default();
            self.read(DATA + usize::from(slot) * MAX_BLOCK, part);
            hash.update(part);
            at += len as u64;
        }
        Ok(hash.digest())
    }

    /// Random reads, `depth` at a time; how many, and how long each took in nanoseconds.
    fn load(&mut self, block: usize, depth: u16, limit: Duration) -> Result<(u64, Vec<u32>)> {
        let mut random = 0_u64;
        let blocks = self.sectors * SECTOR / block as u64;
        let mut next = || {
            random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = random;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (((mixed >> 32) * blocks) >> 32) * block as u64
        };
        let mut since = vec![Instant::now(); usize::from(depth)];
        let mut times = Vec::new();
        for slot in 0..depth {
            self.ask(slot, next(), block)?;
        }
        self.show()?;
        let start = Instant::now();
        let mut left = depth;
        while left > 0 {
            let answers = self.wait()?;
            let now = Instant::now();
            let is_over = now.duration_since(start) >= limit;
            for _ in 0..answers {
                let slot = self.take()?;
                let begun = since.get_mut(usize::from(slot)).ok_or("an answer to nothing")?;
                times.push(u32::try_from(now.duration_since(*begun).as_nanos())?);
                if is_over {
                    left -= 1;
                    continue;
                }
                *begun = now;
                self.ask(slot, next(), block)?;
            }
            self.show()?;
        }
        Ok((times.len() as u64, times))
    }
}

fn of(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn place(slot: u16) -> usize {
    SLOTS + usize::from(slot) * 4096
}
