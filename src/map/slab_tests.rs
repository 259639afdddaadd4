use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::*;
use crate::format::{Header, Kind, place};

#[test]
fn slots_do_not_overlap_and_come_back() {
    let slab = Slab::new(64 << 20).unwrap();
    let mut bufs: Vec<SlabBuf> = (0..70).map(|_| slab.take(65_536).unwrap()).collect();
    for (n, buf) in (0..).zip(&mut bufs) {
        buf.bytes_mut().fill(n);
    }
    for (n, buf) in (0..).zip(&bufs) {
        assert!(buf.as_ref().len() == 65_536 && buf.as_ref().iter().all(|&byte| byte == n));
    }
    assert_eq!(slab.held_bytes(), 3 * CHUNK_BYTES as u64);
    drop(bufs);
    let other: Vec<SlabBuf> = (0..96).map(|_| slab.take(32_768).unwrap()).collect();
    assert!(other.iter().all(|buf| buf.as_ref().len() == 32_768));
    assert_eq!(slab.held_bytes(), 3 * CHUNK_BYTES as u64, "cut anew into other slots");
}

#[test]
fn every_size_has_its_slots_and_a_buffer_may_be_cut() {
    let slab = Slab::new(64 << 20).unwrap();
    for len in [1, 512, 4096, 4097, 1 << 20, CHUNK_BYTES] {
        let mut buf = slab.take(len).unwrap();
        buf.bytes_mut().fill(9);
        buf.truncate(len - 1);
        assert_eq!(buf.as_ref().len(), len - 1);
    }
    assert!(slab.take(CHUNK_BYTES + 1).is_err());
}

/// For those who look at huge pages, or forbid them to the whole process.
static HUGE: Mutex<()> = Mutex::new(());

/// Huge pages for this process, or none from now on.
fn allow_huge(yes: bool) {
    let disable = libc::c_ulong::from(!yes);
    // SAFETY: takes numbers; what is mapped stays as it is.
    let done = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, disable, 0, 0, 0) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

#[test]
fn all_memory_of_a_chunk_is_there_before_it_is_touched_with_huge_pages_and_without() {
    let _alone = HUGE.lock().unwrap();
    for huge in [true, false] {
        allow_huge(huge);
        let slab = Slab::new(2 * CHUNK_BYTES as u64).unwrap();
        let slots = [slab.take(CHUNK_BYTES).unwrap(), slab.take(4096).unwrap()];
        allow_huge(true);
        let stored_bytes = 512 * rustix::fs::fstat(slab.fd()).unwrap().st_blocks;
        assert_eq!(stored_bytes, 2 * CHUNK_BYTES as i64, "huge pages: {huge}");
        assert!(slots.iter().all(|slot| slot.as_ref().iter().all(|&byte| byte == 0)));
    }
}

#[test]
fn a_chunk_in_the_middle_is_used_again_and_a_full_arena_is_an_error() {
    let slab = Slab::new(64 << 20).unwrap();
    let mut bufs: Vec<_> = (0..5).map(|_| slab.take(CHUNK_BYTES).unwrap()).collect();
    bufs.drain(1..4);
    bufs.extend((0..3).map(|_| slab.take(CHUNK_BYTES).unwrap()));
    assert_eq!(slab.held_bytes(), 5 * CHUNK_BYTES as u64);
    bufs.extend((5..32).map(|_| slab.take(CHUNK_BYTES).unwrap()));
    assert!(slab.take(1).is_err());
    bufs.pop();
    assert!(slab.take(1).is_ok());
}

#[test]
fn a_published_slot_is_found_by_its_word_until_it_is_dropped() {
    let slab = Slab::new(8 << 20).unwrap();
    let header = Header { kind: Kind::Decoded, unit_bits: 16, units: 4, ..Header::EMPTY };
    let table = Arc::new(SharedTable::new("test", &header).unwrap());
    let first = slab.take(65_536).unwrap();
    let mut buf = slab.take(65_536).unwrap();
    buf.bytes_mut().fill(7);
    buf.publish(&table, 3);
    let word = table.get(3).unwrap();
    let mut found = [0; 65_536];
    let arena = File::from(slab.fd().try_clone_to_owned().unwrap());
    arena.read_exact_at(&mut found, place(word).unwrap()).unwrap();
    assert!(found.iter().all(|&byte| byte == 7));
    assert!(arena.write_at(&[1], 0).is_err(), "nobody else writes");

    let mut again = slab.take(65_536).unwrap();
    again.publish(&table, 3);
    drop(buf);
    assert_ne!(table.get(3), Some(word), "the later one's");
    assert_ne!(table.get(3), Some(0));
    drop(again);
    assert_eq!(table.get(3), Some(0));
    let mut last = slab.take(65_536).unwrap();
    last.publish(&table, 3);
    assert_ne!(table.get(3), Some(word), "no word comes twice");
    drop(first);
}

/// A slab that can give memory back; None where the system has none for us.
fn giving(max_bytes: u64) -> Option<Slab> {
    let slab = Slab::new(max_bytes).unwrap();
    if !slab.can_give_back() {
        assert!(!rustix::process::geteuid().is_root(), "root can have one");
        eprintln!("skipped: needs root");
        return None;
    }
    Some(slab)
}

fn bytes_of(slab: &Slab, slot: Slot) -> Vec<u8> {
    let mut bytes = vec![1; slot_bytes(slot.size)];
    let arena = File::from(slab.fd().try_clone_to_owned().unwrap());
    arena.read_exact_at(&mut bytes, slot.at() as u64).unwrap();
    bytes
}

#[test]
fn memory_of_free_slots_goes_back_and_what_is_held_stays() {
    let Some(slab) = giving(64 << 20) else { return };
    let mut bufs: Vec<_> = (0..96).map(|_| Some(slab.take(65_536).unwrap())).collect();
    for (n, buf) in (1..).zip(&mut bufs) {
        buf.as_mut().unwrap().bytes_mut().fill(n);
    }
    assert_eq!(slab.memory_bytes(), 6 << 20);
    let slot = bufs[1].as_ref().unwrap().slot;
    // Scattered, and one chunk as a whole.
    for (n, buf) in bufs.iter_mut().enumerate() {
        if n % 3 == 1 || (32..64).contains(&n) {
            *buf = None;
        }
    }
    let kept = bufs.iter().flatten().count() as u64 * 65_536;
    assert_eq!(slab.give_back(1 << 20), (6 << 20) - kept - (1 << 20));
    assert_eq!(slab.memory_bytes(), kept + (1 << 20));
    slab.give_back(0);
    assert_eq!((slab.memory_bytes(), slab.held_bytes()), (kept, kept));
    assert!(bytes_of(&slab, slot).iter().all(|&byte| byte == 0), "nothing is left of it");
    // That read made pages of zeroes.
    let stray_bytes = slab.memory_bytes() - kept;
    assert!(stray_bytes <= 65_536, "{stray_bytes}");

    let asked_bytes = slab.asked_bytes();
    let again: Vec<_> = (0..64 - 32 + 11 + 11).map(|_| slab.take(65_536).unwrap()).collect();
    assert!(slab.asked_bytes() > asked_bytes);
    assert!(again.iter().all(|buf| buf.as_ref().len() == 65_536));
    assert_eq!(slab.memory_bytes(), slab.held_bytes(), "all is there before it is touched");
    assert_eq!(slab.held_bytes(), 6 << 20);
    for (n, buf) in (1..).zip(&bufs) {
        assert!(buf.iter().all(|buf| buf.as_ref().iter().all(|&byte| byte == n)));
    }
}

#[test]
fn a_sealed_arena_keeps_what_it_has() {
    let slab = Slab::keeping(8 << 20).unwrap();
    drop(slab.take(65_536).unwrap());
    assert!(!slab.can_give_back());
    assert_eq!((slab.give_back(0), slab.memory_bytes()), (0, CHUNK_BYTES as u64));
    let arena = File::from(slab.fd().try_clone_to_owned().unwrap());
    assert!(arena.write_at(&[1], 0).is_err(), "nobody else writes");
    assert!(arena.set_len(0).is_err());
}

#[test]
fn slots_stay_their_owners_while_others_are_given_back() {
    let Some(slab) = giving(64 << 20) else { return };
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let takers: Vec<_> = (1..=4_u8)
            .map(|n| {
                let slab = slab.clone();
                scope.spawn(move || {
                    let mut held = std::collections::VecDeque::new();
                    for round in 0..500_usize {
                        let mut buf = slab.take([4096, 65_536, 1 << 18][round % 3]).unwrap();
                        buf.bytes_mut().fill(n);
                        held.push_back(buf);
                        if held.len() > round % 50 {
                            let buf = held.pop_front().unwrap();
                            assert!(buf.as_ref().iter().all(|&byte| byte == n));
                        }
                    }
                    assert!(held.iter().all(|buf| buf.as_ref().iter().all(|&b| b == n)));
                })
            })
            .collect();
        let (done, slab) = (&done, &slab);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                slab.give_back(0);
            }
        });
        let ended: Vec<_> = takers.into_iter().map(|taker| taker.join()).collect();
        done.store(true, Ordering::Relaxed);
        ended.into_iter().for_each(|ended| ended.unwrap());
    });
    slab.give_back(0);
    assert_eq!((slab.held_bytes(), slab.free_bytes(), slab.memory_bytes()), (0, 0, 0));
}

#[test]
fn root_cannot_change_what_readers_are_given() {
    let Some(slab) = giving(8 << 20) else { return };
    let mut buf = slab.take(4096).unwrap();
    buf.bytes_mut().fill(5);
    let fd = slab.fd();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let open = |options: &mut std::fs::OpenOptions| options.open(&path).map(drop);
    for options in [File::options().write(true), File::options().read(true).append(true)] {
        let error = open(options).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
    }
    open(File::options().read(true)).unwrap();
    let file = File::from(fd.try_clone_to_owned().unwrap());
    assert!(file.write_at(&[1], 0).is_err());
    assert!(file.set_len(0).is_err() && file.set_len(1 << 30).is_err());
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    assert!(rustix::fs::fallocate(&file, punch, 0, 4096).is_err());
    assert!(rustix::fs::fchmod(&file, rustix::fs::Mode::RWXU).is_err());
    // The mount is in no namespace: it can be neither cloned nor changed, and shows nowhere.
    let clone = rustix::mount::OpenTreeFlags::OPEN_TREE_CLONE;
    assert!(rustix::mount::open_tree(rustix::fs::CWD, &path, clone).is_err());
    assert!(crate::read_only(&file).is_err());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("bedplate"));
    let stat = rustix::fs::fstat(file.as_fd()).unwrap();
    let device = format!(" {}:{} ", libc::major(stat.st_dev), libc::minor(stat.st_dev));
    assert!(!mounts.contains(&device), "{mounts}");
    assert!(buf.as_ref().iter().all(|&byte| byte == 5));
}

#[test]
fn many_threads_take_and_give_back() {
    let slab = Slab::new(64 << 20).unwrap();
    std::thread::scope(|scope| {
        for n in 0..8_u8 {
            let slab = slab.clone();
            scope.spawn(move || {
                for round in 0..200 {
                    let mut held: Vec<_> =
                        (0..round % 7).map(|_| slab.take(131_072).unwrap()).collect();
                    held.iter_mut().for_each(|buf| buf.bytes_mut().fill(n));
                    assert!(held.iter().all(|buf| buf.as_ref().iter().all(|&b| b == n)));
                }
            });
        }
    });
    assert!(slab.held_bytes() <= 4 * CHUNK_BYTES as u64, "{}", slab.held_bytes());
}

/// Bytes of huge pages in which `slab` is mapped here.
fn huge_bytes(slab: &Slab) -> u64 {
    let base = slab.shared.arena.base.as_ptr() as usize;
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.starts_with(&format!("{base:x}-")));
    let huge = lines.find_map(|line| line.strip_prefix("ShmemPmdMapped:")).unwrap();
    huge.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn pages_are_as_huge_as_in_a_memfd_and_become_so_again() {
    let _alone = HUGE.lock().unwrap();
    let Some(slab) = giving(8 << 20) else { return };
    let fill = |slab: &Slab| -> Vec<SlabBuf> {
        let mut bufs: Vec<_> = (0..32).map(|_| slab.take(65_536).unwrap()).collect();
        bufs.iter_mut().for_each(|buf| buf.bytes_mut().fill(1));
        bufs
    };
    let keeping = Slab::keeping(8 << 20).unwrap();
    let _kept = fill(&keeping);
    let want = huge_bytes(&keeping);
    let mut bufs = fill(&slab);
    assert_eq!(huge_bytes(&slab), want);
    bufs.truncate(20);
    slab.give_back(0);
    assert_eq!((huge_bytes(&slab), slab.memory_bytes()), (0, 20 * 65_536));
    bufs.extend((0..12).map(|_| slab.take(65_536).unwrap()));
    assert!(bufs[..20].iter().all(|buf| buf.as_ref().iter().all(|&byte| byte == 1)));
    assert_eq!(huge_bytes(&slab), want);
}
