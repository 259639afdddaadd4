use super::*;
use std::io::{Read, Write};

fn memfd(len: u64) -> File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    file
}

fn region(guest_at: u64, user_at: u64, len_bytes: u64) -> GuestRegion {
    GuestRegion { guest_at, user_at, len_bytes, file: memfd(len_bytes), file_at: 0 }
}

fn two() -> GuestMemory {
    let (a, b) = (region(0, 0x10_0000, 8192), region(8192, 0x50_0000, 4096));
    GuestMemory::new(vec![b, a]).unwrap()
}

#[test]
fn addresses_are_found_in_the_region_that_has_them_and_nowhere_else() {
    let memory = two();
    assert_eq!(memory.at_guest(0, 100).unwrap().len(), 100);
    assert_eq!(memory.at_guest(8191, 100).unwrap().len(), 1, "to the end of the region");
    assert_eq!(memory.at_guest(8192, u64::MAX).unwrap().len(), 4096);
    assert!(memory.at_guest(12_288, 1).is_none() && memory.at_guest(u64::MAX, 1).is_none());
    assert!(memory.at_guest(0, 0).is_none());
    assert_eq!(memory.at_user(0x10_0000, 8192).unwrap().len(), 8192);
    assert!(memory.at_user(0x10_0001, 8192).is_none(), "all or nothing");
    assert!(memory.at_user(0, 1).is_none());
    let mut across = [1; 4];
    memory.at_guest(8190, 2).unwrap().write_from(&[5, 6]).unwrap();
    memory.read(&mut across, 8190).unwrap();
    assert_eq!(across, [5, 6, 0, 0]);
    assert_eq!(memory.read(&mut [0; 10], 12_280), Err(Unreachable));
}

#[test]
fn what_cannot_be_a_region_is_refused_with_its_reason() {
    let reason = |regions| GuestMemory::new(regions).unwrap_err().to_string();
    assert!(reason(vec![]).contains("0 regions"));
    let many = (0..65).map(|n| region(n << 12, n << 12, 4096)).collect();
    assert!(reason(many).contains("65 regions"));
    assert!(reason(vec![region(0, 0, 0)]).contains("at least one byte"));
    let overlapping = |a, b| reason(vec![region(a, 0, 8192), region(4096, b, 4096)]);
    assert!(overlapping(0, 1 << 20).contains("overlaps"), "in the guest");
    assert!(overlapping(1 << 20, 4096).contains("overlaps"), "in the VMM");
    let end = GuestRegion { guest_at: u64::MAX - 100, ..region(0, 0, 4096) };
    assert!(reason(vec![end]).contains("last address"));
    let short = GuestRegion { file: memfd(4095), ..region(0, 0, 4096) };
    assert!(reason(vec![short]).contains("ends before"));
    let far = GuestRegion { file_at: u64::MAX, ..region(0, 0, 4096) };
    assert!(reason(vec![far]).contains("ends before"));
    let odd = GuestRegion { file: memfd(8192), file_at: 4000, ..region(0, 0, 4096) };
    assert!(reason(vec![odd]).contains("pages"));
    let pipe = File::from(std::os::fd::OwnedFd::from(std::io::pipe().unwrap().0));
    let pipe = GuestRegion { file: pipe, ..region(0, 0, 4096) };
    assert!(reason(vec![pipe]).contains("no file"));
    let proc = File::open("/proc/self/exe").unwrap();
    let disk = GuestRegion { file: proc, ..region(0, 0, 4096) };
    assert!(reason(vec![disk]).contains("no shared memory"));
}

#[test]
fn a_region_comes_and_goes_and_the_others_stay() {
    let memory = two();
    let reason = |region| memory.with(&region).unwrap_err().to_string();
    assert!(reason(region(4096, 1 << 30, 4096)).contains("overlaps"), "in the guest");
    assert!(reason(region(1 << 30, 0x10_1000, 4096)).contains("overlaps"), "in the VMM");
    assert!(reason(region(1 << 30, 1 << 30, 0)).contains("at least one byte"));
    let end = GuestRegion { user_at: u64::MAX - 100, ..region(1 << 30, 0, 4096) };
    assert!(reason(end).contains("last address"));
    let large = GuestRegion { len_bytes: MAX_BYTES, ..region(1 << 50, 1 << 50, 4096) };
    assert!(reason(large).contains("64 TiB"));
    let short = GuestRegion { file: memfd(4095), ..region(1 << 30, 1 << 30, 4096) };
    assert!(reason(short).contains("ends before"));
    let more = memory.with(&region(12_288, 0x60_0000, 5000)).unwrap();
    assert_eq!(more.at_guest(12_288, 9000).unwrap().len(), 5000, "not to the end of its page");
    assert!(more.without(0, 0x10_0000, 4096).is_none(), "of another length");
    assert!(more.without(0, 0x50_0000, 8192).is_none(), "of another address");
    let less = more.without(0, 0x10_0000, 8192).unwrap();
    drop((memory, more));
    assert!(less.at_guest(0, 1).is_none());
    for at in [8192, 12_288] {
        less.at_guest(at, 4096).unwrap().fill_with_zeroes().unwrap();
    }
    let less = less.without(8192, 0x50_0000, 4096).unwrap();
    let none = less.without(12_288, 0x60_0000, 5000).unwrap();
    assert!(none.at_guest(12_288, 1).is_none());
    let mut many = none;
    for n in 0..64 {
        many = many.with(&region(n << 12, n << 12, 4096)).unwrap();
    }
    let one_more = many.with(&region(1 << 30, 1 << 30, 4096)).unwrap_err();
    assert!(one_more.to_string().contains("65 regions"));
}

#[test]
fn memory_that_is_cut_short_is_an_error_and_no_signal_in_each_kind_of_access() {
    let (kept, file) = (region(0, 0, 1 << 20), memfd(1 << 20));
    let region = GuestRegion { file: file.try_clone().unwrap(), ..kept };
    let memory = GuestMemory::new(vec![region]).unwrap();
    file.set_len(4096).unwrap();
    let gone = memory.at_guest(8192, 100_000).unwrap();
    assert_eq!(gone.load_u16(0), Err(Unreachable));
    assert_eq!(gone.store_u16(0, 1), Err(Unreachable));
    for len in [1, 3, 16, 100, 5000] {
        assert_eq!(gone.write_from(&vec![1; len]), Err(Unreachable), "{len}");
        assert_eq!(gone.read_into(&mut vec![1; len]), Err(Unreachable), "{len}");
    }
    assert_eq!(gone.fill_with_zeroes(), Err(Unreachable));
    let image = memfd(8192);
    let error = read_file(&image, &[gone], FileOffset(0)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    let half = memory.at_guest(4090, 100).unwrap();
    assert_eq!(half.write_from(&[7; 100]), Err(Unreachable), "a part of it is gone");
    memory.at_guest(0, 4096).unwrap().write_from(&[7; 4096]).unwrap();
}

#[test]
fn a_file_is_read_into_many_slices_in_order() {
    let bytes: Vec<u8> = (0..20_000_u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
    let mut image = tempfile::tempfile().unwrap();
    image.write_all(&bytes).unwrap();
    let file = memfd(1 << 20);
    let region = GuestRegion { file: file.try_clone().unwrap(), ..region(0, 0, 1 << 20) };
    let memory = GuestMemory::new(vec![region]).unwrap();
    let slices: Vec<_> = (0..5_000).map(|n| memory.at_guest(n * 8, 3).unwrap()).collect();
    read_file(&image, &slices, FileOffset(1000)).unwrap();
    let mut got = Vec::new();
    (&file).read_to_end(&mut got).unwrap();
    for (n, part) in bytes[1000..16_000].chunks(3).enumerate() {
        assert_eq!(&got[n * 8..n * 8 + 3], part);
    }
    let past = read_file(&image, &slices[..10], FileOffset(19_990)).unwrap_err();
    assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn the_kernel_s_way_says_the_same_as_the_guarded_one() {
    let (kept, file) = (region(0, 0, 8192), memfd(8192));
    let region = GuestRegion { file: file.try_clone().unwrap(), ..kept };
    let memory = GuestMemory::new(vec![region]).unwrap();
    let (mut buf, slice) = ([0_u8; 4], memory.at_guest(0, 8192).unwrap());
    let (own, other) = (buf.as_mut_ptr(), slice.as_ptr());
    slice.write_from(&[1, 2, 3, 4]).unwrap();
    // SAFETY: both ranges are mapped, one of them is a local array of 4 bytes.
    unsafe { copy_by_kernel(other, own, 4, Direction::In).unwrap() };
    assert_eq!(buf, [1, 2, 3, 4]);
    file.set_len(0).unwrap();
    // SAFETY: as above; that the guest's pages are gone is what is tested.
    let done = unsafe {
        [
            copy_by_kernel(other, buf.as_mut_ptr(), 4, Direction::In),
            copy_by_kernel(buf.as_ptr(), other, 4, Direction::Out),
        ]
    };
    assert_eq!(done, [Err(Unreachable); 2]);
}
