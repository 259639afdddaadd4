//! The disk as libblkio's driver has it: another implementation of the frontend and of the driver.
//!
//! Why: `client` has our reading of the specification; QEMU's block layer reads through this one.
//! How: the `blkio` crate's `virtio-blk-vhost-user`, whose memory comes region by region
//! (`ADD_MEM_REG`), some of it while its queues run.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

use crate::client::TestServer;
use crate::nbd_support::{have, patterned, run};

const MIB: usize = 1 << 20;

/// A disk that is started, and memory for its bytes.
struct Disk {
    blkio: Blkio,
    queues: Vec<Blkioq>,
    region: MemoryRegion,
    /// The file of the region, to look at the memory without a pointer.
    memory: File,
}

fn connect(server: &TestServer) -> Blkio {
    let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio.set_str("path", server.socket().to_str().unwrap()).unwrap();
    blkio.set_bool("read-only", true).unwrap();
    blkio.connect().unwrap();
    blkio
}

fn allocate(blkio: &mut Blkio, len: usize) -> (MemoryRegion, File) {
    let region = blkio.alloc_mem_region(len).unwrap();
    let path = format!("/proc/self/fd/{}", region.fd);
    (region, File::options().read(true).write(true).open(path).unwrap())
}

/// A request's place on the disk, its length, and where in the memory it is to go.
type Part = (usize, usize, usize);

impl Disk {
    fn start(server: &TestServer, queues: i32, polled: i32) -> Self {
        let mut blkio = connect(server);
        blkio.set_i32("num-queues", queues).unwrap();
        blkio.set_i32("num-poll-queues", polled).unwrap();
        let started = blkio.start().unwrap();
        let queues = started.queues.into_iter().chain(started.poll_queues).collect();
        let (region, memory) = allocate(&mut blkio, 8 * MIB);
        blkio.map_mem_region(&region).unwrap();
        Self { blkio, queues, region, memory }
    }

    /// Asks a queue for these parts, all at once, and compares each with the image.
    fn compare(&mut self, queue: usize, parts: &[Part], expected: &[u8]) {
        for (index, &(at, len, to)) in parts.iter().enumerate() {
            assert!(to + len <= self.region.len);
            self.memory.write_all_at(&vec![0xee; len], to as u64).unwrap();
            let buf = (self.region.addr + to) as *mut u8;
            self.queues[queue].read(at as u64, buf, len, index, ReqFlags::empty());
        }
        let mut done = self.finish(queue, parts.len());
        done.sort_unstable();
        assert_eq!(done, (0..parts.len()).map(|index| (index, 0)).collect::<Vec<_>>());
        for &(at, len, to) in parts {
            let mut got = vec![0; len];
            self.memory.read_exact_at(&mut got, to as u64).unwrap();
            assert!(got == expected[at..at + len], "queue {queue}: {len} bytes at {at} in {to}");
        }
    }

    /// What became of `count` requests: which, and 0 or an error number below it.
    fn finish(&mut self, queue: usize, count: usize) -> Vec<(usize, i32)> {
        let mut done: Vec<MaybeUninit<Completion>> =
            (0..count).map(|_| MaybeUninit::uninit()).collect();
        let filled = self.queues[queue].do_io(&mut done, count, None, None).unwrap();
        assert_eq!(filled, count);
        // SAFETY: `do_io` has filled in as many of them as it says.
        let done = done.into_iter().map(|done| unsafe { done.assume_init() });
        done.map(|done| (done.user_data, done.ret)).collect()
    }
}

#[test]
fn its_properties_are_the_disk_s() {
    let (server, _dir) = TestServer::of_bytes(&patterned(9 * MIB + 512));
    let mut blkio = connect(&server);
    assert_eq!(blkio.get_u64("capacity").unwrap(), 9 * MIB as u64 + 512);
    let number = |name| blkio.get_i32(name).unwrap();
    assert_eq!(
        [number("max-queues"), number("max-segments"), number("request-alignment")],
        [16, 126, 512]
    );
    assert_eq!(blkio.get_u64("max-discard-len").unwrap(), 0);
    assert_eq!(blkio.get_u64("max-write-zeroes-len").unwrap(), 0);
    assert_eq!(blkio.get_u64("max-mem-regions").unwrap(), 64);
    blkio.set_i32("num-queues", 17).unwrap();
    assert!(blkio.start().is_err(), "no more queues than there are");
    drop(blkio);
    server.until_free();
    let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio.set_str("path", server.socket().to_str().unwrap()).unwrap();
    blkio.connect().unwrap();
    let error = blkio.start().map(|_| ()).unwrap_err();
    assert_eq!(error.errno(), blkio::Errno::ROFS, "who does not say read-only may not start");
}

/// Reads of each size, alignment on the disk and alignment in memory.
fn read_all(server: &TestServer, expected: &[u8]) {
    let mut disk = Disk::start(server, 2, 1);
    let sizes = [512, 1024, 4096, 4608, 65_536, 66_048, 2 * MIB + 512];
    for queue in 0..3 {
        for (n, len) in sizes.into_iter().enumerate() {
            for at in [0, 512, 65_536 - 512, 3 * MIB, expected.len() - len] {
                for to in [0, 1, 511, 4096 - n] {
                    disk.compare(queue, &[(at, len, to)], expected);
                }
            }
        }
        let all = |at: usize| (at, MIB.min(expected.len() - at), at % (8 * MIB));
        for parts in (0..expected.len()).step_by(MIB).map(all).collect::<Vec<_>>().chunks(8) {
            disk.compare(queue, parts, expected);
        }
    }
}

#[test]
fn every_byte_is_read_in_each_size_and_alignment() {
    let expected = patterned(9 * MIB + 512);
    let (server, dir) = TestServer::of_bytes(&expected);
    read_all(&server, &expected);
    if !have(&["qemu-img"]) {
        return;
    }
    let (raw, image) = (dir.path().join("d.raw"), dir.path().join("d.qcow2"));
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", from, to]);
    read_all(&TestServer::of(&image), &expected);
}

#[test]
fn queues_that_are_full_at_the_same_time_are_all_answered() {
    let expected = patterned(8 * MIB);
    let (server, _dir) = TestServer::of_bytes(&expected);
    let mut disk = Disk::start(&server, 12, 4);
    for round in 0..4 {
        // More than a queue of 256 entries takes at once.
        for queue in 0..16 {
            for n in 0..200 {
                let (at, to) = ((n * 37 + queue + round) % 2000 * 4096, (queue * 200 + n) % 2048);
                let buf = (disk.region.addr + to * 4096) as *mut u8;
                disk.queues[queue].read(at as u64, buf, 512, n, ReqFlags::empty());
            }
            // Told of, and not waited for.
            disk.queues[queue].do_io(&mut [], 0, None, None).unwrap();
        }
        for queue in 0..16 {
            let mut done = disk.finish(queue, 200);
            done.sort_unstable();
            assert_eq!(done, (0..200).map(|n| (n, 0)).collect::<Vec<_>>(), "queue {queue}");
        }
        // Only now: places of different queues are the same.
        for queue in 0..16 {
            disk.compare(queue, &[(queue * 512, 4096, queue * 4096)], &expected);
        }
    }
}

#[test]
fn nothing_is_written_or_discarded_and_a_flush_is_done() {
    let expected = patterned(MIB);
    let (server, dir) = TestServer::of_bytes(&expected);
    let mut disk = Disk::start(&server, 1, 0);
    let (buf, none) = (disk.region.addr as *const u8, ReqFlags::empty());
    let queue = &mut disk.queues[0];
    queue.write(0, buf, 512, 0, none);
    queue.discard(0, 512, 1, none);
    queue.write_zeroes(0, 512, 2, none);
    queue.flush(3, none);
    // Behind the end of the disk, which the driver leaves to the device.
    queue.read(MIB as u64, buf.cast_mut(), 512, 4, none);
    let mut done = disk.finish(0, 5);
    done.sort_unstable();
    let errno = |errno: blkio::Errno| -errno.raw_os_error();
    let refused = errno(blkio::Errno::NOTSUP);
    let wanted = [errno(blkio::Errno::BADF), refused, refused, 0, errno(blkio::Errno::IO)];
    assert_eq!(done, wanted.into_iter().enumerate().collect::<Vec<_>>());
    assert_eq!(std::fs::read(dir.path().join("d.raw")).unwrap(), expected);
    disk.compare(0, &[(0, MIB, 0)], &expected);
}

#[test]
fn memory_comes_and_goes_while_the_queues_run() {
    let expected = patterned(MIB);
    let (server, _dir) = TestServer::of_bytes(&expected);
    let mut disk = Disk::start(&server, 2, 0);
    for round in 0..10 {
        disk.compare(0, &[(0, 4096, round * 4096)], &expected);
        let (region, memory) = allocate(&mut disk.blkio, MIB);
        disk.blkio.map_mem_region(&region).unwrap();
        let (old, kept) = (disk.region, std::mem::replace(&mut disk.memory, memory));
        disk.region = region;
        disk.compare(1, &[(512, 65_536, 3)], &expected);
        disk.blkio.unmap_mem_region(&old);
        disk.compare(0, &[(512, 65_536, 65_536)], &expected);
        // What is taken away is no target any more.
        disk.queues[1].read(0, old.addr as *mut u8, 512, 9, ReqFlags::empty());
        let [(9, error)] = disk.finish(1, 1)[..] else { panic!("one answer") };
        assert_eq!(error, -blkio::Errno::IO.raw_os_error());
        drop(kept);
        disk.blkio.free_mem_region(&old);
    }
}
