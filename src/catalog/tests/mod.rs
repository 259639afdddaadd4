//! The suite that every catalog passes (`conformance`), run on the embedded one and on its model; and
//! what only the embedded one does.

mod conformance;
mod memory;

use conformance::{Subject, conforms};
use memory::Memory;
use proptest::prelude::*;

use super::*;

/// A file in a directory of its own.
struct InAFile(tempfile::TempDir);

impl Subject for InAFile {
    type Catalog = Embedded;

    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn open(&self) -> Embedded {
        Embedded::open(&self.0.path().join("c.redb")).unwrap().keeping(Self::KEPT)
    }
}

/// Its memory is what survives.
struct InMemory(Memory);

impl Subject for InMemory {
    type Catalog = Memory;

    fn new() -> Self {
        Self(Memory::keeping(Self::KEPT))
    }

    fn open(&self) -> Memory {
        self.0.clone()
    }
}

conforms!(the_embedded_catalog, InAFile);
conforms!(the_model, InMemory);

/// One call, by numbers, so that what is unlikely is shrunk to what is simple.
#[derive(Clone, Copy, Debug)]
struct Call {
    kind: usize,
    key: u8,
    /// Which of the changes.
    what: u8,
    /// Which of the revisions that were given is expected; none: absent, or anything.
    at: Option<usize>,
    any: bool,
    reopen: bool,
}

fn call() -> impl Strategy<Value = Call> {
    let at = proptest::option::of(0..8usize);
    (0..2usize, 0..3u8, 0..9u8, at, any::<bool>(), proptest::bool::weighted(0.1))
        .prop_map(|(kind, key, what, at, any, reopen)| Call { kind, key, what, at, any, reopen })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_calls_do_to_the_file_what_they_do_to_the_model(
        batches in proptest::collection::vec(proptest::collection::vec(call(), 1..4), 1..30),
    ) {
        let file = InAFile::new();
        let (mut catalog, model) = (file.open(), InMemory::new().open());
        let mut given = vec![Revision(77)];
        for calls in batches {
            let write = |call: &Call| Write {
                kind: [Kind::Image, Kind::Volume][call.kind],
                key: format!("k{}", call.key),
                what: match call.what {
                    0 | 1 => What::Delete,
                    2 => What::Status(vec![call.key; 2]),
                    3 => What::Finalizers(BTreeSet::new()),
                    4 => What::Finalizers([format!("f{}", call.key), "g".to_owned()].into()),
                    5 => What::Finalizers(["g".to_owned()].into()),
                    _ => What::Spec(vec![call.key; 3]),
                },
                expect: match call.at {
                    Some(back) => Expect::At(given[given.len().saturating_sub(1 + back)]),
                    None if call.any => Expect::Any,
                    None => Expect::Absent,
                },
            };
            let writes: Vec<_> = calls.iter().map(write).collect();
            let both: [&dyn Catalog; 2] = [&catalog, &model];
            let did = both.map(|catalog| {
                catalog.write(&writes).map_err(|error| error.to_string())
            });
            prop_assert_eq!(&did[0], &did[1]);
            given.extend(did[0].clone().unwrap_or_default());
            if calls.iter().any(|call| call.reopen) {
                drop(catalog);
                catalog = file.open();
            }
        }
        for kind in Kind::ALL {
            prop_assert_eq!(catalog.list(kind).unwrap(), model.list(kind).unwrap());
        }
        let changes = |catalog: &dyn Catalog| catalog.changes(Revision(0), usize::MAX).unwrap();
        prop_assert_eq!(changes(&catalog), changes(&model));
        prop_assert_eq!(*catalog.head().borrow(), *model.head().borrow());
    }
}

#[test]
fn a_change_survives_a_crash_right_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, crashed) = (dir.path().join("c.redb"), dir.path().join("crashed.redb"));
    let catalog = Embedded::open(&path).unwrap();
    for n in 0..20u8 {
        let revision = catalog.put(Kind::Image, "a", &[b'0' + n], Expect::Any).unwrap();
        // What a killed process leaves is the file as it is now, never closed.
        std::fs::copy(&path, &crashed).unwrap();
        let after = Embedded::open(&crashed).unwrap().get(Kind::Image, "a").unwrap().unwrap();
        assert_eq!(after, Stored::new(revision, vec![b'0' + n]));
    }
}

#[test]
fn a_second_opener_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.redb");
    let _first = Embedded::open(&path).unwrap();
    assert!(matches!(Embedded::open(&path), Err(CatalogError::Locked { .. })));
}

#[test]
fn only_the_owner_can_read_the_file() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.redb");
    drop(Embedded::open(&path).unwrap());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn garbage_instead_of_a_catalog_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.redb");
    std::fs::write(&path, vec![0xa5; 65_536]).unwrap();
    assert!(matches!(Embedded::open(&path), Err(CatalogError::Open { .. })));
}

#[test]
fn an_unreadable_record_is_named_but_not_printed() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Embedded::open(&dir.path().join("c.redb")).unwrap();
    catalog.put(Kind::Image, "a", br#"{"name":"hunter2!"}"#, Expect::Any).unwrap();
    let error = list_as::<crate::manager::ImageRecord>(&catalog, Kind::Image).unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(text.contains("\"a\"") && !text.contains("hunter2"), "{text}");
}

#[test]
fn a_file_without_a_log_is_taken_over_and_who_watched_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.redb");
    let catalog = Embedded::open(&path).unwrap();
    catalog.put(Kind::Image, "a", b"1", Expect::Absent).unwrap();
    let second = catalog.put(Kind::Image, "a", b"2", Expect::Any).unwrap();
    drop(catalog);
    // As it was written before there was one.
    let db = redb::Database::open(&path).unwrap();
    let tx = db.begin_write().unwrap();
    tx.delete_table(log::LOG).unwrap();
    tx.commit().unwrap();
    drop(db);
    let catalog = Embedded::open(&path).unwrap();
    assert_eq!(catalog.list(Kind::Image).unwrap().revision, second);
    assert_eq!(catalog.changes(second, 9).unwrap(), []);
    let behind = catalog.changes(Revision(1), 9);
    assert!(matches!(behind, Err(CatalogError::Expired { oldest: 2, newest: 2, .. })));
    let third = catalog.put(Kind::Image, "b", b"1", Expect::Absent).unwrap();
    assert_eq!(catalog.changes(second, 9).unwrap()[0].revision, third);
}

#[test]
fn a_row_of_the_log_that_is_damaged_or_newer_is_no_change() {
    let change =
        Change { revision: Revision(7), kind: Kind::Volume, key: "a".into(), deleted: true };
    assert_eq!(log::decode(7, &log::encode(&change)), Some(change));
    for row in [&b""[..], b"volume", b"volume\x01\xff", b"\xff\x01a", b"network\x00a"] {
        assert_eq!(log::decode(7, row), None, "{row:?}");
    }
}

#[test]
fn what_was_in_a_record_is_not_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Embedded::open(&dir.path().join("c.redb")).unwrap();
    catalog.put(Kind::Image, "a", b"hunter2", Expect::Absent).unwrap();
    let text = format!("{:?}", catalog.changes(Revision(0), 9).unwrap());
    assert!(text.contains("\"a\"") && !text.contains("hunter2"), "{text}");
}

#[test]
fn a_value_is_read_as_it_was_written_and_damage_is_told() {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let plain = Stored::new(Revision(7), b"{}".to_vec());
    let all = [
        plain.clone(),
        Stored::new(Revision(7), Vec::new()),
        // What begins as a value does that has more.
        Stored::new(Revision(7), vec![1, 2, 3]),
        Stored { status: Some(Vec::new()), ..plain.clone() },
        Stored { status: Some(b"[1]".to_vec()), finalizers: names(&["a", "b.c"]), ..plain.clone() },
        Stored { deleting: true, finalizers: names(&[&"x".repeat(253)]), ..plain.clone() },
    ];
    for stored in all {
        let value = change::encode(&stored);
        assert_eq!(change::decode(&value), Some(stored.clone()));
        // Cut anywhere it is another record, or none, and never a panic.
        for len in 0..value.len() {
            assert_ne!(change::decode(&value[..len]), Some(stored.clone()), "{len}");
        }
    }
    assert_eq!(change::encode(&plain), [&7u64.to_le_bytes()[..], b"{}"].concat(), "as ever");
    for bad in [&b"\x01\x00\x01\x02\xff\xff\x00\x00\x00\x00"[..], b"\x01\x04\x00\x00\x00\x00\x00"] {
        assert_eq!(change::decode(&[&[0; 8], bad].concat()), None, "{bad:?}");
    }
}
