//! What a spool gives back, whatever became of its file.

use proptest::prelude::*;

use super::*;
use crate::disk::{FileNames, Filling, Space};

const LEN: u64 = 3 * MIB + 4321;

fn byte_at(at: u64) -> u8 {
    at.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()[7]
}

fn bytes(from: u64, to: u64) -> Vec<u8> {
    (from..to).map(byte_at).collect()
}

fn version(total: u64) -> Version {
    Version { total_bytes: Some(total), tag: "etag".into() }
}

fn filling(temp: &tempfile::TempDir) -> Filling {
    let dir = Dir::open(temp.path()).unwrap();
    let space = Space::of(&dir).unwrap();
    Filling::open(dir, FileNames::file("x"), space).unwrap()
}

/// Keeps the bytes up to `len` of a source of `total`.
fn spooled(temp: &tempfile::TempDir, len: u64, total: u64) -> Filling {
    let filling = filling(temp);
    let mut end = filling.spool(version(total)).unwrap();
    let all = bytes(0, len);
    all.chunks(100_000).for_each(|chunk| end.append(chunk).unwrap());
    end.finish().unwrap();
    filling
}

/// All that can be read back before the first MiB that is not right.
fn back(spool: &Spool) -> Vec<u8> {
    let mut all = Vec::new();
    while (all.len() as u64) < spool.len_bytes() {
        let Some(more) = spool.read(all.len() as u64) else { break };
        all.extend(more);
    }
    all
}

fn file(temp: &tempfile::TempDir) -> File {
    Dir::open(temp.path()).unwrap().open_file("x.bedplate-spool", OFlags::RDWR).unwrap()
}

#[test]
fn what_was_kept_comes_back_and_can_be_gone_on_with() {
    let temp = tempfile::tempdir().unwrap();
    let filling = spooled(&temp, MIB + 5, LEN);
    let mut at = MIB + 5;
    for end in [2 * MIB, 2 * MIB + 1, LEN] {
        let spool = filling.spooled().unwrap().unwrap();
        assert_eq!((spool.len_bytes(), spool.version()), (at, &version(LEN)));
        assert!(back(&spool) == bytes(0, at));
        let room = filling.room_for_spool(&spool).unwrap().unwrap();
        let mut more = filling.spool_on(spool, room).unwrap();
        more.append(&bytes(at, end)).unwrap();
        more.finish().unwrap();
        at = end;
    }
    assert!(back(&filling.spooled().unwrap().unwrap()) == bytes(0, LEN));
    let peeked = Filling::peek(&Dir::open(temp.path()).unwrap(), &FileNames::file("x"));
    assert_eq!(peeked.unwrap(), Some((LEN, None)), "it counts as here");
    filling.drop_spool().unwrap();
    assert!(filling.spooled().unwrap().is_none() && filling.is_worthless());
}

#[test]
fn a_damaged_or_cut_spool_gives_the_good_part_before() {
    for at in [0, 1, MIB, 2 * MIB + 77, LEN - 1] {
        let temp = tempfile::tempdir().unwrap();
        let filling = spooled(&temp, LEN, LEN);
        let good = at / MIB * MIB;
        let wrong = [!byte_at(at)];
        file(&temp).write_all_at(&wrong, data_at(LEN) + at).unwrap();
        let mut spool = filling.spooled().unwrap().unwrap();
        assert!(back(&spool) == bytes(0, good), "byte {at} is wrong");
        spool.cut(good);
        // It is gone on with from there, and is right again.
        let room = filling.room_for_spool(&spool).unwrap().unwrap();
        let mut end = filling.spool_on(spool, room).unwrap();
        end.append(&bytes(good, LEN)).unwrap();
        end.finish().unwrap();
        assert!(back(&filling.spooled().unwrap().unwrap()) == bytes(0, LEN));
        file(&temp).set_len(data_at(LEN) + at).unwrap();
        assert!(back(&filling.spooled().unwrap().unwrap()) == bytes(0, good), "cut at {at}");
    }
}

#[test]
fn a_torn_page_leaves_what_was_recorded_before_and_a_damaged_header_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let filling = spooled(&temp, MIB, LEN);
    let spool = filling.spooled().unwrap().unwrap();
    let room = filling.room_for_spool(&spool).unwrap().unwrap();
    let mut end = filling.spool_on(spool, room).unwrap();
    end.append(&bytes(MIB, LEN)).unwrap();
    end.finish().unwrap();
    // The second commit went to place 0.
    file(&temp).write_all_at(&[0xEE; 512], 2 * PAGE_BYTES as u64 + 16).unwrap();
    assert!(back(&filling.spooled().unwrap().unwrap()) == bytes(0, MIB));
    file(&temp).write_all_at(b"X", 40).unwrap();
    assert!(filling.spooled().unwrap().is_none());
}

#[test]
fn a_record_of_many_pages_ends_at_the_first_that_is_not_full() {
    let temp = tempfile::tempdir().unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(temp.path().join("record"))
        .unwrap();
    let (total, len) = (5 * PAGE_SPAN, 3 * PAGE_SPAN + 7);
    let mut record = Record { len_bytes: len, ..Record::default() };
    record.digests = (0..len.div_ceil(MIB)).collect();
    record.store(&file, 0).unwrap();
    let loaded = Record::load(&file, total).unwrap();
    assert_eq!((loaded.len_bytes, &loaded.digests), (len, &record.digests));
    // Cut within the second page: what the later ones say does not count, and is written over.
    let mut shorter = loaded;
    shorter.len_bytes = PAGE_SPAN + MIB;
    shorter.digests.truncate(DIGESTS_PER_PAGE + 1);
    shorter.store(&file, PAGE_SPAN).unwrap();
    let mut again = Record::load(&file, total).unwrap();
    assert_eq!((again.len_bytes, again.digests.len()), (PAGE_SPAN + MIB, DIGESTS_PER_PAGE + 1));
    again.len_bytes = len;
    again.digests = (7..7 + len.div_ceil(MIB)).collect();
    again.store(&file, PAGE_SPAN).unwrap();
    let last = Record::load(&file, total).unwrap();
    assert_eq!((last.len_bytes, last.digests.last()), (len, again.digests.last()));
    assert!(Record::load(&file, PAGE_SPAN - 1).unwrap().digests.is_empty(), "more than there is");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Whatever is written into the file, no wrong byte is given.
    #[test]
    fn noise_in_the_file_never_becomes_a_byte(
        noise in proptest::collection::vec((0u64..data_at(LEN) + LEN, any::<u8>(), 1usize..9000), 1..6),
        cut in proptest::option::of(0u64..data_at(LEN) + LEN),
    ) {
        let temp = tempfile::tempdir().unwrap();
        let filling = spooled(&temp, LEN, LEN);
        for (at, byte, count) in noise {
            file(&temp).write_all_at(&vec![byte; count], at).unwrap();
        }
        if let Some(cut) = cut {
            file(&temp).set_len(cut).unwrap();
        }
        if let Some(spool) = filling.spooled().unwrap() {
            let good = back(&spool);
            prop_assert!(good == bytes(0, good.len() as u64));
        }
    }
}
