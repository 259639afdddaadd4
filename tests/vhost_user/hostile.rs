//! Guests and frontends that say what cannot be.
//!
//! After each of them the disk must be there for the next frontend, with the right bytes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::client::{
    ALL, Desc, INDIRECT, KIB, MEMORY, MIB, NEXT, PROTOCOL, QUEUE_SIZE, TestServer, USER, VERSION_1,
    Vm, WRITE, until,
};
use crate::nbd_support::patterned;

const HEAD: u64 = MIB;
const STATUS: u64 = MIB + 64;
const DATA: u64 = MIB + 4 * KIB;

fn started() -> (TestServer, tempfile::TempDir, Vm) {
    let (server, dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    let vm = Vm::start(&server.socket(), ALL, 1);
    (server, dir, vm)
}

fn still_serves(vm: &mut Vm) {
    vm.memory.set_len(MEMORY).unwrap();
    assert!(vm.read(0, 8, 4096) == patterned(1024 * 1024)[4096..8192]);
}

/// The frontend may be gone; another one has the disk.
fn another_is_served(server: &TestServer) {
    server.until_free();
    still_serves(&mut Vm::start(&server.socket(), ALL, 1));
    server.until_free();
}

#[test]
fn a_request_that_is_none_is_given_back_and_the_queue_goes_on() {
    let (_server, _dir, mut vm) = started();
    vm.head(HEAD, 0, 0);
    let far = 1 << 60;
    let table = DATA;
    let indirect = |len: u32| vec![(table, len, INDIRECT)];
    for (name, parts) in [
        ("no room for a status", vec![(HEAD, 16, 0)]),
        ("an empty buffer", vec![(HEAD, 0, 0)]),
        ("a buffer to read after one to write", vec![(STATUS, 1, WRITE), (HEAD, 16, 0)]),
        ("an address that wraps", vec![(u64::MAX - 5, 16, 0), (STATUS, 1, WRITE)]),
        ("a table of no length", indirect(0)),
        ("a table of half a descriptor", indirect(24)),
        ("a table that is too long", indirect(16 * 4096)),
        ("a table that is nowhere", vec![(far, 16, INDIRECT)]),
        ("a table with a next", vec![(table, 16, INDIRECT), (STATUS, 1, WRITE)]),
    ] {
        vm.chain(0, 0, &parts);
        vm.make(0, 0);
        vm.kick(0);
        assert_eq!(vm.answer(0), (0, 0), "{name}");
        still_serves(&mut vm);
    }
    // Loops, in the queue's own table and in an indirect one; and a table inside a table.
    let step = |next, flags| Desc { at: HEAD, len: 1, flags, next };
    vm.describe(0, 0, step(1, NEXT));
    vm.describe(0, 1, step(0, NEXT));
    vm.make(0, 0);
    vm.describe(0, 2, Desc { at: table, len: 32, flags: INDIRECT, next: 0 });
    vm.poke(table, &step(1, NEXT).bytes());
    vm.poke(table + 16, &step(0, NEXT).bytes());
    vm.make(0, 2);
    vm.describe(0, 3, step(QUEUE_SIZE, NEXT));
    vm.make(0, 3);
    vm.kick(0);
    for head in [0, 2, 3] {
        assert_eq!(vm.answer(0), (head, 0));
    }
    vm.poke(table, &Desc { at: table, len: 16, flags: INDIRECT, next: 0 }.bytes());
    vm.make(0, 2);
    vm.kick(0);
    assert_eq!(vm.answer(0), (2, 0));
    still_serves(&mut vm);
}

#[test]
fn a_request_that_cannot_be_is_an_error_to_its_guest() {
    let (_server, _dir, mut vm) = started();
    let sectors = 2048;
    let far = 1 << 60;
    let ok = (DATA, 4096, WRITE);
    let status = (STATUS, 1, WRITE);
    for (name, sector, parts) in [
        ("past the end", sectors, vec![(HEAD, 16, 0), ok, status]),
        ("over the end", sectors - 7, vec![(HEAD, 16, 0), ok, status]),
        ("a sector that wraps", u64::MAX - 3, vec![(HEAD, 16, 0), ok, status]),
        ("bytes that wrap", u64::MAX / 512 - 1, vec![(HEAD, 16, 0), ok, status]),
        ("half a sector", 0, vec![(HEAD, 16, 0), (DATA, 700, WRITE), status]),
        ("half a head", 0, vec![(HEAD, 15, 0), ok, status]),
        ("a head that is nowhere", 0, vec![(far, 16, 0), ok, status]),
        ("data that is nowhere", 0, vec![(HEAD, 16, 0), (far, 4096, WRITE), status]),
        ("data over the end", 0, vec![(HEAD, 16, 0), (MEMORY - 512, 4096, WRITE), status]),
        ("4 GiB at once", 0, vec![(HEAD, 16, 0), (DATA, u32::MAX - 511, WRITE), status]),
    ] {
        vm.head(HEAD, 0, sector);
        assert_eq!(vm.ask(0, &parts, STATUS), (1, 1), "{name}");
        still_serves(&mut vm);
    }
    // 120 buffers of 4 MiB at the same place: within what a read may have, past the disk's end.
    vm.head(HEAD, 0, 0);
    let mut parts = vec![(HEAD, 16, 0)];
    parts.extend((0..120).map(|_| (DATA, 4 << 20, WRITE)));
    parts.push(status);
    assert_eq!(vm.ask(0, &parts, STATUS), (1, 1));
    still_serves(&mut vm);
}

#[test]
fn a_queue_whose_indices_cannot_be_stands_and_says_so_and_can_be_set_up_again() {
    let (_server, _dir, mut vm) = started();
    type Break = fn(&mut Vm);
    let breaks: [(&str, Break); 3] = [
        ("more requests than entries", |vm| {
            let index = vm.queues[0].made.wrapping_add(QUEUE_SIZE + 1);
            vm.poke(vm.queues[0].available() + 2, &index.to_le_bytes());
        }),
        ("a head outside the table", |vm| vm.make(0, QUEUE_SIZE)),
        ("a status that is nowhere", |vm| {
            vm.head(HEAD, 0, 0);
            vm.chain(0, 0, &[(HEAD, 16, 0), (1 << 60, 1, WRITE)]);
            vm.make(0, 0);
        }),
    ];
    for (name, make) in breaks {
        make(&mut vm);
        vm.kick(0);
        until(name, || vm.queues[0].err.read().is_ok());
        // The guest resets its device: everything from the beginning.
        let base = vm.queues[0].base;
        vm.poke(base, &vec![0; 32 * 1024]);
        (vm.queues[0].made, vm.queues[0].seen) = (0, 0);
        vm.frontend.get_vring_base(0).unwrap();
        vm.give(0);
        still_serves(&mut vm);
    }
}

#[test]
fn memory_that_is_cut_short_under_a_queue_is_no_signal() {
    let (server, _dir, mut vm) = started();
    // A buffer, first; the queue is still there.
    vm.head(HEAD, 0, 0);
    vm.memory.set_len(8 * MIB).unwrap();
    let parts = [(HEAD, 16, 0), (16 * MIB, 4096, WRITE), (STATUS, 1, WRITE)];
    assert_eq!(vm.ask(0, &parts, STATUS), (1, 1));
    // A buffer of zeroes, and one that is gone after its first page.
    vm.head(HEAD, 0, 3 * 64 * 2);
    assert_eq!(vm.ask(0, &parts, STATUS), (1, 1));
    let half = [(HEAD, 16, 0), (8 * MIB - 512, 4096, WRITE), (STATUS, 1, WRITE)];
    assert_eq!(vm.ask(0, &half, STATUS), (1, 1));
    // Then the queue itself.
    vm.make(0, 0);
    vm.memory.set_len(0).unwrap();
    vm.kick(0);
    until("the queue to stand", || vm.queues[0].err.read().is_ok());
    drop(vm);
    another_is_served(&server);
}

#[test]
fn memory_that_cannot_be_is_refused_and_the_next_frontend_served() {
    let (server, _dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    let page = 4096;
    for (name, regions) in [
        ("overlap in the guest", vec![(0, MIB, USER, 0), (page, MIB, USER + MIB, MIB)]),
        ("overlap in the VMM", vec![(0, MIB, USER, 0), (MIB, MIB, USER + page, MIB)]),
        ("more than its file", vec![(0, MEMORY + page, USER, 0)]),
        ("an end past the last address", vec![(u64::MAX - page + 1, MIB, USER, 0)]),
        ("not at a page of its file", vec![(0, MIB, USER, 100)]),
    ] {
        let vm = Vm::connect(&server.socket(), ALL);
        assert!(vm.try_share(&regions).is_err(), "{name}");
        drop(vm);
        another_is_served(&server);
    }
    for (name, file) in [
        ("a pipe", File::from(std::os::fd::OwnedFd::from(std::io::pipe().unwrap().0))),
        ("a file of a disk", File::open(std::env::current_exe().unwrap()).unwrap()),
        ("a device", File::options().read(true).write(true).open("/dev/zero").unwrap()),
    ] {
        let vm = Vm::connect_with(&server.socket(), ALL, file);
        assert!(vm.try_share(&[(0, MIB, USER, 0)]).is_err(), "{name}");
        drop(vm);
        another_is_served(&server);
    }
}

#[test]
fn a_region_that_cannot_be_added_or_taken_away_is_refused_and_the_next_frontend_served() {
    let (server, _dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    let far = 1 << 40;
    for (name, is_added, (guest, len, user, offset)) in [
        ("overlap in the guest", true, (MEMORY - 4096, MIB, USER + far, 0)),
        ("overlap in the VMM", true, (far, MIB, USER + 4096, 0)),
        ("more than its file", true, (far, MEMORY + 4096, USER + far, 0)),
        ("not at a page of its file", true, (far, MIB, USER + far, 100)),
        ("a part of one", false, (0, MIB, USER, 0)),
        ("none", false, (far, MIB, USER + far, 0)),
    ] {
        let mut vm = Vm::start(&server.socket(), ALL, 1);
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: user,
            mmap_offset: offset,
            mmap_handle: vm.memory.as_raw_fd(),
        };
        let refused = match is_added {
            true => vm.frontend.add_mem_region(&region).map(|_base| ()),
            false => vm.frontend.remove_mem_region(&region),
        };
        assert!(refused.is_err(), "{name}");
        drop(vm);
        another_is_served(&server);
    }
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    assert_eq!(vm.frontend.get_max_mem_slots().unwrap(), 64);
    vm.read(0, 0, 4096);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: MEMORY,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: vm.memory.as_raw_fd(),
    };
    vm.frontend.remove_mem_region(&region).unwrap();
    until("the queue to stand", || vm.queues[0].err.read().is_ok());
    vm.frontend.add_mem_region(&region).unwrap();
    vm.read(0, 0, 4096);
    for n in 0..63 {
        let at = (n + 1) * far;
        let more = VhostUserMemoryRegionInfo {
            guest_phys_addr: at,
            memory_size: 5000,
            userspace_addr: USER + at,
            ..region
        };
        vm.frontend.add_mem_region(&more).unwrap();
    }
    vm.read(0, 0, 4096);
    let more = VhostUserMemoryRegionInfo {
        guest_phys_addr: far / 2,
        memory_size: 5000,
        userspace_addr: USER + far / 2,
        ..region
    };
    assert!(vm.frontend.add_mem_region(&more).is_err(), "one too many");
}

/// A message with a header of its own making.
fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = code.to_le_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn messages_that_cannot_be_end_the_session_and_the_next_frontend_is_served() {
    let (server, _dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    let kick = File::from(std::os::fd::OwnedFd::from(std::io::pipe().unwrap().1));
    let all: Vec<(&str, Vec<u8>, Option<&File>)> = vec![
        ("no message", b"GET / HTTP/1.1\r\n\r\n".to_vec(), None),
        ("half a header", vec![1, 0, 0], None),
        ("a huge one", [&message(5, 1, &[])[..8], &u32::MAX.to_le_bytes()].concat(), None),
        ("an unknown one", message(77, 1, &[]), None),
        ("features that nobody offered", message(2, 1, &words(&[u64::MAX])), None),
        ("a queue that is not there", message(8, 1, &words(&[5_000 | 128 << 32])), None),
        ("a queue of 3 entries", message(8, 1, &words(&[3 << 32])), None),
        ("a queue of 65536 entries", message(8, 1, &words(&[65_536 << 32])), None),
        ("memory without files", message(5, 1, &words(&[1, 0, 4096, 0, 0])), None),
        ("a kick without a file", message(12, 1, &words(&[0])), None),
        ("a kick that is never to come", message(12, 1, &words(&[0x100])), None),
        ("a kick that is a pipe", message(12, 1, &words(&[0])), Some(&kick)),
        ("a call that is a pipe", message(13, 1, &words(&[1])), Some(&kick)),
        ("configuration past its end", message(24, 1, &words(&[u64::MAX, 0])), None),
        ("a write of the configuration", message(25, 1, &words(&[8 << 32, 0])), None),
        ("memory in flight", message(31, 1, &words(&[4096, 0, 1 | 128 << 16])), None),
        ("a log", message(6, 1, &words(&[4096, 0])), Some(&kick)),
        ("a region of memory", message(37, 1, &words(&[0, 0, 4096, 0, 0])), Some(&kick)),
    ];
    for (name, bytes, file) in all {
        let mut stream = UnixStream::connect(server.socket()).unwrap();
        match file {
            Some(file) => {
                use std::os::fd::AsRawFd;
                stream.send_with_fds(&[&bytes[..]], &[file.as_raw_fd()]).unwrap();
            }
            None => stream.write_all(&bytes).unwrap(),
        }
        if name == "half a header" {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut rest = Vec::new();
        // A reset is an end too.
        let _end_or_reset = stream.read_to_end(&mut rest);
        drop(stream);
        server.until_free();
        assert!(rest.is_empty(), "{name}: {rest:?}");
    }
    another_is_served(&server);
}

#[test]
fn queues_at_places_that_cannot_be_stand_and_nothing_else_does() {
    let (server, _dir, mut vm) = started();
    vm.add_queue();
    for user in [16, USER + MEMORY, USER + MEMORY - 16, u64::MAX - 15] {
        let config = vhost::VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: user,
            used_ring_addr: USER + vm.queues[1].used(),
            avail_ring_addr: USER + vm.queues[1].available(),
            log_addr: None,
        };
        vm.frontend.set_vring_addr(1, &config).unwrap();
        until("the queue to stand", || vm.queues[1].err.read().is_ok());
        still_serves(&mut vm);
    }
    drop(vm);
    another_is_served(&server);
}

#[test]
fn a_call_that_is_full_holds_up_no_end_of_its_session() {
    use vmm_sys_util::eventfd::EventFd;
    let (server, _dir, mut vm) = started();
    // Blocking, and full: telling of an answer would wait for ever.
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    vm.frontend.set_vring_call(0, &full).unwrap();
    vm.read(0, 0, 512);
    vm.frontend.set_vring_enable(0, false).unwrap();
    vm.frontend.set_vring_enable(0, true).unwrap();
    still_serves(&mut vm);
    // The same at the end of the session.
    full.read().unwrap();
    full.write(u64::MAX - 1).unwrap();
    vm.read(0, 0, 512);
    drop(vm);
    another_is_served(&server);
}

#[test]
fn seeded_noise_in_a_queue_ends_no_server() {
    let (server, _dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..60 {
        let features = if round % 2 == 0 { ALL } else { VERSION_1 | PROTOCOL };
        let mut vm = Vm::start(&server.socket(), features, 1);
        for _ in 0..20 {
            for index in 0..QUEUE_SIZE {
                let near = random() % MEMORY;
                let at = if random() % 16 == 0 { random() } else { near };
                let len = if random() % 8 == 0 { random() } else { random() % 5000 };
                let desc = Desc {
                    at,
                    len: u32::try_from(len & 0xffff_ffff).unwrap(),
                    flags: u16::try_from(random() % 8).unwrap(),
                    next: u16::try_from(random() % 130).unwrap(),
                };
                vm.describe(0, index, desc);
            }
            for _ in 0..4 {
                let head = u16::try_from(random() % u64::from(QUEUE_SIZE)).unwrap();
                vm.make(0, head);
            }
            vm.kick(0);
            // Either all is answered, or the queue stands, or it has overwritten its own indices.
            let used = vm.queues[0].used() + 2;
            let start = std::time::Instant::now();
            while vm.peek_u16(used) != vm.queues[0].made
                && vm.queues[0].err.read().is_err()
                && start.elapsed() < std::time::Duration::from_millis(20)
            {
                std::thread::yield_now();
            }
        }
        drop(vm);
        server.until_free();
    }
    another_is_served(&server);
}
