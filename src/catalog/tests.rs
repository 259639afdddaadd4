//! The suite that every catalog passes ([`conformance`]), run on the embedded one.

use super::*;

/// What any implementation of [`Catalog`] does. `reopen` gives the same catalog after a crash.
fn conformance<C: Catalog>(mut catalog: C, reopen: impl Fn(C) -> C) {
    for kind in Kind::ALL {
        assert_eq!(catalog.get(kind, "a").unwrap(), None);
        let first = catalog.put(kind, "a", b"1", Expect::Absent).unwrap();
        assert_conflict(catalog.put(kind, "a", b"2", Expect::Absent));
        let second = catalog.put(kind, "a", b"2", Expect::At(first)).unwrap();
        assert!(second > first);
        assert_conflict(catalog.put(kind, "a", b"3", Expect::At(first)));
        assert_conflict(catalog.delete(kind, "a", Expect::At(first)));

        catalog = reopen(catalog);
        let stored = catalog.get(kind, "a").unwrap().unwrap();
        assert_eq!(stored, Stored { revision: second, json: b"2".to_vec() });

        catalog.put(kind, "c", b"c", Expect::Any).unwrap();
        catalog.put(kind, "b", b"b", Expect::Any).unwrap();
        let keys: Vec<_> = catalog.list(kind).unwrap().into_iter().map(|(k, _)| k).collect();
        assert_eq!(keys, ["a", "b", "c"]);

        catalog.delete(kind, "a", Expect::At(second)).unwrap();
        catalog.delete(kind, "a", Expect::Any).unwrap();
        assert_conflict(catalog.put(kind, "a", b"x", Expect::At(second)));
        catalog = reopen(catalog);
        let again = catalog.put(kind, "a", b"4", Expect::Absent).unwrap();
        assert!(again > second, "a revision is never used twice");
    }
}

fn assert_conflict<T: std::fmt::Debug>(result: Result<T, CatalogError>) {
    assert!(matches!(result, Err(CatalogError::Conflict { .. })), "{result:?}");
}

#[test]
fn the_embedded_catalog_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.redb");
    conformance(Embedded::open(&path).unwrap(), |old| {
        drop(old);
        Embedded::open(&path).unwrap()
    });
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
        assert_eq!(after, Stored { revision, json: vec![b'0' + n] });
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
