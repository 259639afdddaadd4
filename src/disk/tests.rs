//! Tests of filling, sealing and adopting on a real file system.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::*;
use crate::names::{ImageName, ImageUuid};
use crate::ring::{BLOCK_BYTES, BufPool, Choice, Probe, probe};
use crate::units::{FileOffset, KIB, MIB};

fn id() -> CopyId {
    CopyId { name: ImageName::parse("debian-12").unwrap(), uuid: ImageUuid::parse("ab12").unwrap() }
}

fn version(total: u64) -> Version {
    Version { total_bytes: Some(total), tag: "v1".into() }
}

/// Deterministic content: random-looking, with zero pages.
fn content(len: u64) -> Vec<u8> {
    (0..len)
        .map(
            |i| {
                if i / 4096 % 3 == 1 {
                    0
                } else {
                    i.wrapping_mul(2_654_435_761).to_le_bytes()[1] | 1
                }
            },
        )
        .collect()
}

fn probes(dir: &std::path::Path) -> Vec<Probe> {
    let probed = [Choice::Threads, Choice::Auto, Choice::Uncached].map(|choice| probe(dir, choice));
    let (found, missing): (Vec<_>, Vec<_>) = probed.into_iter().partition(Result::is_ok);
    for reason in missing.into_iter().filter_map(Result::err) {
        println!("SKIPPED: {reason}");
    }
    found.into_iter().flatten().collect()
}

fn send_range(writer: &Writer, pool: &BufPool, bytes: &[u8], start: u64, end: u64) {
    let mut at = start;
    while at < end {
        let len = (end - at).min(BLOCK_BYTES as u64);
        let mut buf = loop {
            if let Ok(buf) = pool.try_take() {
                break buf;
            }
            std::thread::yield_now();
        };
        buf.fill(
            &bytes[usize::try_from(at).unwrap()..][..usize::try_from(len).unwrap()],
            BLOCK_BYTES,
        );
        buf.pad();
        writer.sender().send(Block::Data { at: FileOffset(at), buf: Arc::new(buf) }).unwrap();
        at += len;
    }
}

#[test]
fn what_goes_in_comes_out_sparse_sealed_and_read_only() {
    let temp = tempfile::tempdir().unwrap();
    for (index, probe) in probes(temp.path()).iter().enumerate() {
        let disk = Disk::open(&temp.path().join(format!("d{index}")), true).unwrap();
        let bytes = content(5 * MIB + 12_345);
        let total = bytes.len() as u64;
        let mut filling = disk.filling(&id()).unwrap();
        filling.begin(&version(total)).unwrap();
        let path = disk.data_path(&id());
        for dir in path.ancestors().skip(1).take(2) {
            let mode = dir.metadata().unwrap().mode() & 0o777;
            assert_eq!(mode, 0o700, "{}: nobody else reads images", dir.display());
        }
        let writer = Writer::start(&filling, probe).unwrap();
        send_range(&writer, &BufPool::new(3), &bytes, 0, total);
        writer.finish().unwrap();
        assert_eq!(filling.missing(), vec![]);
        let mut hasher = Hasher::new(DigestSet::of(&[DigestKind::Sha256, DigestKind::Sha512]));
        hash_file(filling.file(), &filling.path(), total, &mut hasher, &mut |_| true).unwrap();
        let record = SealRecord {
            uuid: "ab12".into(),
            virtual_size_bytes: total,
            digests: hasher.finish(),
            expected_sha512: None,
            declared: None,
        };
        let sealed = filling.seal(&record).unwrap();
        let mut back = vec![0; bytes.len()];
        sealed.file().read_exact_at(&mut back, 0).unwrap();
        assert!(back == bytes);
        let meta = sealed.file().metadata().unwrap();
        assert!(meta.blocks() * 512 <= total * 2 / 3 + 16 * KIB, "zero pages take no room");
        assert_eq!(meta.permissions().mode() & 0o777, 0o444);
        assert!(sealed.file().write_at(b"x", 0).is_err(), "a sealed file has no write");
        let found = disk.scan().unwrap();
        let CopyState::Ready(ready) = &found[0].1 else { panic!("{found:?}") };
        assert_eq!((ready.size_bytes, &ready.digests), (total, &record.digests));
        let left = disk.data_path(&id()).parent().unwrap().read_dir().unwrap();
        let mut names: Vec<_> =
            left.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["backing", "backing.cfg", "backing.digests"]);
    }
}

#[test]
fn an_unfinished_file_cannot_be_sealed_and_goes_on_where_it_was() {
    let temp = tempfile::tempdir().unwrap();
    let disk = Disk::open(temp.path(), true).unwrap();
    let bytes = content(4 * MIB);
    let probe = probe(temp.path(), Choice::Auto).unwrap();
    let mut filling = disk.filling(&id()).unwrap();
    filling.begin(&version(4 * MIB)).unwrap();
    let writer = Writer::start(&filling, &probe).unwrap();
    send_range(&writer, &BufPool::new(2), &bytes, MIB, 2 * MIB + 128 * KIB);
    writer.finish().unwrap();
    let refused = filling.seal(&SealRecord::default()).unwrap_err();
    assert!(matches!(refused.error, DiskError::Incomplete { missing, .. }
        if missing == 4 * MIB - MIB - 128 * KIB));
    drop(refused);
    // Bytes that were never recorded as durable, as a crash leaves them: they must not survive.
    let partial = disk.data_path(&id()).with_file_name("backing.tmp");
    std::fs::File::options().write(true).open(&partial).unwrap().write_at(&[9; 4096], 0).unwrap();
    let mut filling = disk.filling(&id()).unwrap();
    assert_eq!(filling.version(), Some(version(4 * MIB)));
    assert_eq!(filling.missing(), vec![0..MIB, 2 * MIB + 128 * KIB..4 * MIB]);
    filling.resume().unwrap();
    let writer = Writer::start(&filling, &probe).unwrap();
    writer.sender().send(Block::Zero { at: FileOffset(0), len_bytes: MIB }).unwrap();
    send_range(&writer, &BufPool::new(2), &bytes, 2 * MIB + 128 * KIB, 4 * MIB);
    writer.finish().unwrap();
    let sealed = filling.seal(&SealRecord::default()).unwrap();
    let mut back = vec![0; bytes.len()];
    sealed.file().read_exact_at(&mut back, 0).unwrap();
    assert!(back[..1 << 20].iter().all(|&b| b == 0), "stale bytes were turned back into a hole");
    assert!(back[1 << 20..] == bytes[1 << 20..]);
}

#[test]
fn another_version_starts_from_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let disk = Disk::open(temp.path(), true).unwrap();
    let probe = probe(temp.path(), Choice::Threads).unwrap();
    let mut filling = disk.filling(&id()).unwrap();
    filling.begin(&version(MIB)).unwrap();
    let writer = Writer::start(&filling, &probe).unwrap();
    send_range(&writer, &BufPool::new(2), &[7; 1 << 20], 0, MIB);
    writer.finish().unwrap();
    let other = Version { total_bytes: Some(2 * MIB), tag: "v2".into() };
    filling.begin(&other).unwrap();
    assert_eq!(filling.missing(), vec![0..2 * MIB]);
    let mut back = vec![1; 1 << 20];
    filling.file().read_exact_at(&mut back, 0).unwrap();
    assert!(back.iter().all(|&b| b == 0));
}

#[test]
fn a_changed_file_is_hashed_before_it_is_believed() {
    let temp = tempfile::tempdir().unwrap();
    let disk = Disk::open(temp.path(), true).unwrap();
    let dir = temp.path().join("backing-images/foreign-1a2b");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("backing"), content(MIB)).unwrap();
    let id = CopyId {
        name: ImageName::parse("foreign").unwrap(),
        uuid: ImageUuid::parse("1a2b").unwrap(),
    };
    assert_eq!(disk.scan().unwrap(), vec![(id.clone(), CopyState::Unchecked)]);
    let want = DigestSet::of(&[DigestKind::Sha256, DigestKind::Sha512]);
    let record = disk.verify(&id, MIB, want, &mut |_| true).unwrap();
    assert_eq!(disk.scan().unwrap(), vec![(id.clone(), CopyState::Ready(record.clone()))]);
    // Touched, same bytes: unchecked, then ready again.
    let data = std::fs::File::options().write(true).open(dir.join("backing")).unwrap();
    data.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(disk.copy_state(&id).unwrap(), Some(CopyState::Unchecked));
    disk.verify(&id, MIB, want, &mut |_| true).unwrap();
    assert_eq!(disk.copy_state(&id).unwrap(), Some(CopyState::Ready(record)));
    // One byte changed: refused, and it stays unchecked.
    data.write_at(b"!", 5).unwrap();
    let refused = disk.verify(&id, MIB, want, &mut |_| true).unwrap_err();
    assert!(matches!(refused, DiskError::DigestMismatch { .. }), "{refused}");
    assert_eq!(disk.copy_state(&id).unwrap(), Some(CopyState::Unchecked));
}

#[test]
fn a_second_owner_of_a_disk_is_refused_with_the_first_ones_number() {
    let temp = tempfile::tempdir().unwrap();
    let _first = Disk::open(temp.path(), true).unwrap();
    let refused = Disk::open(temp.path(), true).unwrap_err();
    let DiskError::Locked { holder, .. } = &refused else { panic!("{refused}") };
    assert_eq!(holder, &std::process::id().to_string());
}

#[test]
fn a_link_in_the_store_leads_nowhere() {
    let temp = tempfile::tempdir().unwrap();
    let disk = Disk::open(temp.path(), true).unwrap();
    std::fs::write(temp.path().join("secret"), "x").unwrap();
    let dir = temp.path().join("backing-images/evil-ab");
    std::fs::create_dir_all(&dir).unwrap();
    std::os::unix::fs::symlink("../../secret", dir.join("backing")).unwrap();
    let evil =
        CopyId { name: ImageName::parse("evil").unwrap(), uuid: ImageUuid::parse("ab").unwrap() };
    assert!(disk.sealed(&evil).is_err());
    std::os::unix::fs::symlink("evil-ab", temp.path().join("backing-images/link-ab")).unwrap();
    let linked =
        CopyId { name: ImageName::parse("link").unwrap(), uuid: ImageUuid::parse("ab").unwrap() };
    assert!(disk.filling(&linked).is_err());
    let top = Dir::open(temp.path()).unwrap();
    for name in ["../etc", "a/b", "..", ".", ""] {
        assert!(top.open_file(name, OFlags::RDONLY).is_err(), "{name:?}");
    }
}

#[test]
fn a_directory_without_a_disk_file_is_no_disk() {
    let temp = tempfile::tempdir().unwrap();
    assert!(matches!(Disk::open(temp.path(), false), Err(DiskError::NotADisk { .. })));
    let uuid = Disk::open(temp.path(), true).unwrap().uuid().clone();
    assert_eq!(Disk::open(temp.path(), false).unwrap().uuid(), &uuid);
    std::fs::write(temp.path().join("longhorn-disk.cfg"), "{\"diskUUID\":\"../..\"}").unwrap();
    assert!(matches!(Disk::open(temp.path(), true), Err(DiskError::DiskFile { .. })));
}

#[test]
fn removing_a_copy_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let disk = Disk::open(temp.path(), true).unwrap();
    let mut filling = disk.filling(&id()).unwrap();
    filling.begin(&version(MIB)).unwrap();
    drop(filling);
    disk.remove(&id()).unwrap();
    assert_eq!(disk.scan().unwrap(), vec![]);
    assert_eq!(temp.path().join("backing-images").read_dir().unwrap().count(), 0);
    disk.remove(&id()).unwrap();
}

#[test]
fn a_disk_that_is_not_at_its_path_any_more_is_gone_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (path, away) = (dir.path().join("disk"), dir.path().join("away"));
    let disk = Disk::open(&path, true).unwrap();
    assert!(disk.usage().unwrap().total > 0);
    std::fs::rename(&path, &away).unwrap();
    assert!(matches!(disk.usage(), Err(DiskError::Gone { .. })));
    std::fs::create_dir(&path).unwrap();
    assert!(matches!(disk.usage(), Err(DiskError::Gone { .. })), "an empty mount point");
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(&away, &path).unwrap();
    assert!(disk.usage().is_ok());
}

#[test]
fn what_comes_in_its_order_goes_on_at_the_first_gap_and_finds_holes_behind_it() {
    let temp = tempfile::tempdir().unwrap();
    let disk = Disk::open(temp.path(), true).unwrap();
    let (total, bytes) = (8 * MIB, content(8 * MIB));
    for gap in [0, 2 * MIB] {
        let mut filling = disk.filling(&id()).unwrap();
        filling.begin(&version(total)).unwrap();
        let probe = probe(temp.path(), Choice::Threads).unwrap();
        let writer = Writer::start(&filling, &probe).unwrap();
        send_range(&writer, &BufPool::new(3), &bytes, 0, gap);
        send_range(&writer, &BufPool::new(3), &bytes, gap + MIB, 5 * MIB);
        writer.finish().unwrap();
        drop(filling);
        let mut filling = disk.filling(&id()).unwrap();
        assert_eq!(filling.missing(), [gap..gap + MIB, 5 * MIB..total]);
        filling.resume_prefix().unwrap();
        assert_eq!(filling.missing(), std::iter::once(gap..total).collect::<Vec<_>>());
        let mut behind = vec![1; usize::try_from(total - gap).unwrap()];
        filling.file().read_exact_at(&mut behind, gap).unwrap();
        assert!(behind.iter().all(|&byte| byte == 0), "from {gap} on");
        drop(filling);
        let filling = disk.filling(&id()).unwrap();
        assert_eq!(filling.missing(), std::iter::once(gap..total).collect::<Vec<_>>());
        filling.discard().unwrap();
    }
}
