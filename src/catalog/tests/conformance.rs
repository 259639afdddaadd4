//! The suite: what every implementation of [`Catalog`] does. Each function is one promise.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::*;

/// An implementation under test.
pub(super) trait Subject {
    type Catalog: Catalog;
    /// Changes that it keeps for watchers.
    const KEPT: u64 = 128;
    /// A new one, empty.
    fn new() -> Self;
    /// The catalog as it is after a crash of whoever had it open before.
    fn open(&self) -> Self::Catalog;
}

pub(super) fn assert_conflict<T: std::fmt::Debug>(result: Result<T, CatalogError>) {
    assert!(matches!(result, Err(CatalogError::Conflict { .. })), "{result:?}");
}

pub(super) fn compare_and_set_tells_a_lost_race<S: Subject>() {
    let subject = S::new();
    let catalog = subject.open();
    for kind in Kind::ALL {
        assert_eq!(catalog.get(kind, "a").unwrap(), None);
        assert_conflict(catalog.put(kind, "a", b"0", Expect::At(Revision(1))));
        let first = catalog.put(kind, "a", b"1", Expect::Absent).unwrap();
        assert_conflict(catalog.put(kind, "a", b"2", Expect::Absent));
        let second = catalog.put(kind, "a", b"2", Expect::At(first)).unwrap();
        assert!(second > first);
        assert_conflict(catalog.put(kind, "a", b"3", Expect::At(first)));
        assert_conflict(catalog.put(kind, "a", b"3", Expect::At(Revision(second.0 + 1))));
        assert_conflict(catalog.delete(kind, "a", Expect::At(first)));
        assert_conflict(catalog.delete(kind, "a", Expect::Absent));
        // Whoever lost has changed nothing.
        let stored = Stored::new(second, b"2".to_vec());
        assert_eq!(catalog.get(kind, "a").unwrap(), Some(stored));
        let third = catalog.put(kind, "a", b"3", Expect::Any).unwrap();
        assert!(third > second);
        let error = catalog.put(kind, "a", b"4", Expect::At(second)).unwrap_err().to_string();
        let parts = [kind.as_str(), "\"a\"", &third.0.to_string(), &second.0.to_string()];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}

pub(super) fn revisions_grow_and_are_never_used_twice<S: Subject>() {
    let subject = S::new();
    let mut catalog = subject.open();
    let mut seen = BTreeSet::new();
    for round in 0..3 {
        for kind in Kind::ALL {
            let revision = catalog.put(kind, "a", b"1", Expect::Absent).unwrap();
            assert!(seen.last().is_none_or(|last| *last < revision), "{revision:?} {seen:?}");
            assert!(seen.insert(revision));
            if round == 1 {
                drop(catalog);
                catalog = subject.open();
            }
            catalog.delete(kind, "a", Expect::At(revision)).unwrap();
            assert_conflict(catalog.put(kind, "a", b"x", Expect::At(revision)));
            assert_conflict(catalog.delete(kind, "a", Expect::At(revision)));
            // Nothing is removed, nothing is changed.
            let head = *catalog.head().borrow();
            catalog.delete(kind, "a", Expect::Any).unwrap();
            catalog.delete(kind, "a", Expect::Absent).unwrap();
            assert_eq!(*catalog.head().borrow(), head);
        }
    }
}

pub(super) fn kinds_are_apart<S: Subject>() {
    let subject = S::new();
    let catalog = subject.open();
    for kind in Kind::ALL {
        catalog.put(kind, "same", kind.as_str().as_bytes(), Expect::Absent).unwrap();
    }
    catalog.delete(Kind::Volume, "same", Expect::Any).unwrap();
    for kind in Kind::ALL {
        let found = catalog.get(kind, "same").unwrap().map(|stored| stored.json);
        let wanted = (kind != Kind::Volume).then(|| kind.as_str().as_bytes().to_vec());
        assert_eq!(found, wanted);
    }
}

pub(super) fn a_list_is_of_one_moment_and_says_which<S: Subject>() {
    let subject = S::new();
    let catalog = Arc::new(subject.open());
    let none = catalog.list(Kind::Image).unwrap();
    assert_eq!(none, Listing { revision: Revision(0), records: Vec::new() });
    // Pairs of records that are only ever changed one after the other: first "b", then "a".
    let writer = std::thread::spawn({
        let catalog = Arc::clone(&catalog);
        move || {
            for n in 0..40u64 {
                for key in ["b", "a"] {
                    catalog.put(Kind::Image, key, &n.to_le_bytes(), Expect::Any).unwrap();
                }
            }
        }
    });
    let mut last = Revision(0);
    loop {
        let done = writer.is_finished();
        let listing = catalog.list(Kind::Image).unwrap();
        assert!(listing.revision >= last);
        last = listing.revision;
        let keys: Vec<_> = listing.records.iter().map(|(key, _)| key.as_str()).collect();
        assert!(keys.is_sorted(), "{keys:?}");
        // The revision is that of the last change in it.
        let newest = listing.records.iter().map(|(_, stored)| stored.revision).max();
        assert_eq!(newest.unwrap_or(Revision(0)), listing.revision);
        if let [(_, a), (_, b)] = &listing.records[..] {
            let number = |stored: &Stored| u64::from_le_bytes(stored.json[..].try_into().unwrap());
            let ahead = number(b) - number(a);
            assert!(ahead <= 1, "a list of two moments: {listing:?}");
        }
        if done {
            break;
        }
    }
    writer.join().unwrap();
    assert_eq!(last, Revision(80));
}

pub(super) fn a_watch_sees_every_change_once_and_in_order<S: Subject>() {
    let subject = S::new();
    let catalog = Arc::new(subject.open());
    let before = catalog.put(Kind::Image, "before", b"1", Expect::Absent).unwrap();
    let start = catalog.list(Kind::Image).unwrap().revision;
    assert_eq!(start, before);
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let catalog = Arc::clone(&catalog);
            std::thread::spawn(move || {
                let mut made = Vec::new();
                for n in 0..20 {
                    let (kind, key) = (Kind::ALL[n % 5], format!("k{writer}"));
                    if n % 7 == 6 {
                        catalog.delete(kind, &key, Expect::Any).unwrap();
                    } else {
                        made.push(catalog.put(kind, &key, b"{}", Expect::Any).unwrap());
                    }
                }
                made
            })
        })
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let shared: Arc<dyn Catalog> = Arc::<S::Catalog>::clone(&catalog);
    let mut watch = Watch::from(Arc::clone(&shared), start);
    let mut seen: Vec<Change> = Vec::new();
    let last = |catalog: &S::Catalog| catalog.list(Kind::Image).unwrap().revision;
    let mut made = BTreeSet::new();
    for writer in writers {
        made.extend(writer.join().unwrap());
    }
    while seen.last().map_or(start, |change| change.revision) < last(&catalog) {
        seen.push(runtime.block_on(watch.next()).unwrap());
        if seen.len() == 11 {
            // It goes on where another one stopped.
            watch = Watch::from(Arc::clone(&shared), watch.since());
        }
    }
    let revisions: Vec<_> = seen.iter().map(|change| change.revision.0).collect();
    let wanted: Vec<_> = (start.0 + 1..=last(&catalog).0).collect();
    assert_eq!(revisions, wanted);
    let put: BTreeSet<_> = seen.iter().filter(|c| !c.deleted).map(|c| c.revision).collect();
    assert_eq!(put, made);
    // What they add up to is what is there.
    let mut there = BTreeSet::from([(Kind::Image, "before".to_owned())]);
    for Change { kind, key, deleted, .. } in seen {
        let changed = match deleted {
            true => there.remove(&(kind, key)),
            false => there.insert((kind, key)),
        };
        assert!(changed || !deleted, "nothing was there to be removed");
    }
    let listed = Kind::ALL.into_iter().flat_map(|kind| {
        let records = catalog.list(kind).unwrap().records;
        records.into_iter().map(move |(key, _)| (kind, key))
    });
    assert_eq!(there, listed.collect());
}

pub(super) fn a_watch_that_waits_is_woken<S: Subject>() {
    let subject = S::new();
    let catalog: Arc<dyn Catalog> = Arc::new(subject.open());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let mut watch = Watch::from(Arc::clone(&catalog), Revision(0));
    for n in 1..20 {
        let waiting = runtime.spawn(async move {
            let change = watch.next().await.unwrap();
            (watch, change)
        });
        if n % 2 == 0 {
            std::thread::yield_now();
        }
        let revision = catalog.put(Kind::Class, "a.b", b"{}", Expect::Any).unwrap();
        let (back, change) = runtime.block_on(waiting).unwrap();
        watch = back;
        assert_eq!((change.revision, change.key.as_str()), (revision, "a.b"));
    }
}

pub(super) fn a_watch_that_is_too_far_behind_is_told<S: Subject>() {
    let subject = S::new();
    let catalog = subject.open();
    let first = catalog.put(Kind::Image, "a", b"1", Expect::Absent).unwrap();
    assert_eq!(catalog.changes(Revision(0), 9).unwrap().len(), 1);
    assert_eq!(catalog.changes(first, 9).unwrap(), []);
    // Of a catalog that was put back to an earlier state it is no revision yet.
    let expired = |since| catalog.changes(since, 1).unwrap_err();
    assert!(matches!(expired(Revision(2)), CatalogError::Expired { newest: 1, .. }));
    assert!(matches!(expired(Revision(u64::MAX)), CatalogError::Expired { newest: 1, .. }));
    for n in 0..S::KEPT + 3 {
        catalog.put(Kind::Setting, "n", &n.to_le_bytes(), Expect::Any).unwrap();
    }
    let newest = catalog.list(Kind::Image).unwrap().revision.0;
    assert_eq!(newest, S::KEPT + 4);
    let CatalogError::Expired { since, oldest, newest: told } = expired(first) else {
        panic!("{:?}", expired(first))
    };
    assert_eq!((since, told), (1, newest));
    assert_eq!(oldest, newest - S::KEPT);
    assert_eq!(catalog.changes(Revision(oldest), 1).unwrap()[0].revision.0, oldest + 1);
    assert!(matches!(expired(Revision(oldest - 1)), CatalogError::Expired { .. }));
    drop(catalog);
    let catalog = subject.open();
    let all = catalog.changes(Revision(oldest), usize::MAX).unwrap();
    assert_eq!(all.len() as u64, S::KEPT);
    assert_eq!(all.last().unwrap().revision.0, newest);
}

pub(super) fn a_crash_loses_nothing_that_was_acknowledged<S: Subject>() {
    let subject = S::new();
    let mut wanted = Vec::new();
    for n in 0..12u8 {
        let catalog = subject.open();
        assert_eq!(catalog.list(Kind::Image).unwrap().records, wanted);
        let key = format!("k{n:02}");
        let revision = catalog.put(Kind::Image, &key, &[n; 9], Expect::Absent).unwrap();
        assert_eq!(*catalog.head().borrow(), revision);
        wanted.push((key, Stored::new(revision, vec![n; 9])));
        if n % 4 == 3 {
            let (key, stored) = wanted.remove(0);
            catalog.delete(Kind::Image, &key, Expect::At(stored.revision)).unwrap();
        }
    }
    let catalog = subject.open();
    assert_eq!(catalog.list(Kind::Image).unwrap().records, wanted);
    // Fifteen changes, and their log, whoever had it open when.
    let changes = catalog.changes(Revision(0), usize::MAX).unwrap();
    assert_eq!(changes.iter().map(|c| c.revision.0).collect::<Vec<_>>(), Vec::from_iter(1..=15));
    assert_eq!(changes.iter().filter(|change| change.deleted).count(), 3);
    assert_eq!(*catalog.head().borrow(), Revision(15));
}

pub(super) fn writers_at_the_same_time_lose_no_update<S: Subject>() {
    let subject = S::new();
    let catalog = Arc::new(subject.open());
    catalog.put(Kind::Setting, "n", &0u64.to_le_bytes(), Expect::Absent).unwrap();
    let add = |catalog: &S::Catalog| loop {
        let stored = catalog.get(Kind::Setting, "n").unwrap().unwrap();
        let number = u64::from_le_bytes(stored.json[..].try_into().unwrap()) + 1;
        let expect = Expect::At(stored.revision);
        match catalog.put(Kind::Setting, "n", &number.to_le_bytes(), expect) {
            Ok(revision) => break revision,
            Err(CatalogError::Conflict { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    };
    let revisions: Vec<Revision> = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| (0..25).map(|_| add(&catalog)).collect::<Vec<_>>()))
            .collect();
        writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect()
    });
    let stored = catalog.get(Kind::Setting, "n").unwrap().unwrap();
    assert_eq!(stored.json, 100u64.to_le_bytes());
    assert_eq!(revisions.iter().collect::<BTreeSet<_>>().len(), 100);
    assert_eq!(revisions.iter().max(), Some(&stored.revision));
}

pub(super) fn records_have_any_size_up_to_the_limit<S: Subject>() {
    let subject = S::new();
    let catalog = subject.open();
    let sizes = [0, 1, 7, 8, 9, 4095, 4096, 4097, 65_535, 1_000_003, MAX_RECORD_LEN];
    let bytes =
        |len: usize| (0..len).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect::<Vec<_>>();
    for len in sizes {
        catalog.put(Kind::Image, &format!("k{len}"), &bytes(len), Expect::Absent).unwrap();
    }
    let large = bytes(MAX_RECORD_LEN + 1);
    let error = catalog.put(Kind::Image, "k7", &large, Expect::Any).unwrap_err();
    assert!(matches!(error, CatalogError::TooLong { len_bytes: 1_048_577, .. }), "{error}");
    drop(catalog);
    let catalog = subject.open();
    for len in sizes {
        let stored = catalog.get(Kind::Image, &format!("k{len}")).unwrap().unwrap();
        assert!(stored.json == bytes(len), "{len}");
    }
}

pub(super) fn a_hostile_key_is_refused_and_changes_nothing<S: Subject>() {
    let subject = S::new();
    let catalog = subject.open();
    let long = "a".repeat(254);
    let huge = "a".repeat(10_000_000);
    let bad = [
        "",
        ".",
        "..",
        "a..b",
        "../a",
        "/a",
        "a/b",
        "a\0b",
        "\0",
        "a\nb",
        "-a",
        "a-",
        ".a",
        "a.",
        "a b",
        " a",
        "ä",
        "\u{202e}a",
        "a\\b",
        "%2e",
        "*",
        &long,
        &huge,
    ];
    for key in bad {
        let results = [
            catalog.put(Kind::Image, key, b"1", Expect::Any).map(|_| ()),
            catalog.delete(Kind::Image, key, Expect::Any),
            catalog.get(Kind::Image, key).map(|_| ()),
        ];
        for result in results {
            let error = result.unwrap_err();
            assert!(matches!(error, CatalogError::BadKey { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.len() < 400 && !text.contains(['\0', '\n', '\u{202e}']), "{text}");
        }
    }
    assert_eq!(catalog.list(Kind::Image).unwrap().revision, Revision(0));
    let good = ["a", "0", "A_b", "a.b-c", &"a".repeat(253)];
    for key in good {
        catalog.put(Kind::Image, key, b"1", Expect::Absent).unwrap();
    }
}

pub(super) fn a_status_and_a_spec_leave_each_other_alone<S: Subject>() {
    let subject = S::new();
    let catalog = subject.open();
    let status = |json: &[u8], expect| {
        let what = What::Status(json.to_vec());
        catalog.write(&[Write { kind: Kind::Image, key: "a".to_owned(), what, expect }])
    };
    // Of nothing there is no status.
    assert_conflict(status(b"1", Expect::Any));
    let first = catalog.put(Kind::Image, "a", b"spec", Expect::Absent).unwrap();
    assert_eq!(catalog.get(Kind::Image, "a").unwrap().unwrap().status, None);
    let second = status(b"status", Expect::At(first)).unwrap()[0];
    assert!(second > first);
    // Who writes the one is told of a change of the other: they have one revision.
    assert_conflict(catalog.put(Kind::Image, "a", b"late", Expect::At(first)));
    assert_conflict(status(b"late", Expect::At(first)));
    let third = catalog.put(Kind::Image, "a", b"other", Expect::At(second)).unwrap();
    let stored = catalog.get(Kind::Image, "a").unwrap().unwrap();
    let wanted =
        Stored { status: Some(b"status".to_vec()), ..Stored::new(third, b"other".to_vec()) };
    assert_eq!(stored, wanted);
    let long = vec![b' '; MAX_RECORD_LEN + 1];
    assert!(matches!(status(&long, Expect::Any), Err(CatalogError::TooLong { .. })));
    status(&long[1..], Expect::Any).unwrap();
    // It goes with its record, and another of the name has none.
    catalog.delete(Kind::Image, "a", Expect::Any).unwrap();
    catalog.put(Kind::Image, "a", b"spec", Expect::Absent).unwrap();
    assert_eq!(catalog.get(Kind::Image, "a").unwrap().unwrap().status, None);
}

pub(super) fn a_record_goes_with_its_last_finalizer<S: Subject>() {
    let subject = S::new();
    let catalog = subject.open();
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let set = |finalizers: &[&str], expect| {
        let what = What::Finalizers(names(finalizers));
        catalog.write(&[Write { kind: Kind::Volume, key: "v".to_owned(), what, expect }])
    };
    let get = || catalog.get(Kind::Volume, "v").unwrap();
    assert_conflict(set(&["a"], Expect::Any));
    set(&[], Expect::Any).unwrap();
    assert_eq!(*catalog.head().borrow(), Revision(0), "nothing is no change");
    catalog.put(Kind::Volume, "v", b"1", Expect::Absent).unwrap();
    let two = set(&["a", "b.c"], Expect::Any).unwrap()[0];
    catalog.delete(Kind::Volume, "v", Expect::At(two)).unwrap();
    let marked = get().unwrap();
    assert!(marked.deleting && marked.revision > two && marked.finalizers == names(&["a", "b.c"]));
    // Deleted again it is as it was; and nothing more can hold it up.
    catalog.delete(Kind::Volume, "v", Expect::Any).unwrap();
    assert_eq!(get(), Some(marked.clone()));
    assert_conflict(catalog.put(Kind::Volume, "v", b"2", Expect::Absent));
    let more = set(&["a", "c"], Expect::Any).unwrap_err();
    assert!(matches!(more, CatalogError::BeingDeleted { .. }), "{more}");
    // Who finishes the work still writes what it found.
    catalog.put(Kind::Volume, "v", b"2", Expect::At(marked.revision)).unwrap();
    let one = set(&["b.c"], Expect::Any).unwrap()[0];
    let changes = catalog.changes(Revision(0), usize::MAX).unwrap();
    assert!(changes.iter().all(|change| !change.deleted), "{changes:?}");
    let gone = set(&[], Expect::At(one)).unwrap()[0];
    assert_eq!(get(), None);
    let told = catalog.changes(one, usize::MAX).unwrap();
    assert_eq!(told.iter().map(|c| (c.revision, c.deleted)).collect::<Vec<_>>(), [(gone, true)]);
    // Without a deletion the last finalizer is only the last finalizer.
    catalog.put(Kind::Volume, "v", b"1", Expect::Absent).unwrap();
    set(&["a"], Expect::Any).unwrap();
    set(&[], Expect::Any).unwrap();
    assert!(!get().unwrap().deleting);
    catalog.delete(Kind::Volume, "v", Expect::Any).unwrap();
    assert_eq!(get(), None);
    // Bounds.
    catalog.put(Kind::Volume, "v", b"1", Expect::Absent).unwrap();
    let many: Vec<String> = (0..=MAX_FINALIZERS).map(|n| format!("f{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert!(matches!(set(&many, Expect::Any), Err(CatalogError::TooManyFinalizers { .. })));
    assert!(matches!(set(&["../x"], Expect::Any), Err(CatalogError::BadKey { .. })));
    set(&many[1..], Expect::Any).unwrap();
}

pub(super) fn several_changes_are_all_made_or_none<S: Subject>() {
    let subject = S::new();
    let catalog = subject.open();
    let write = |kind, key: &str, json: Option<&[u8]>, expect| Write {
        kind,
        key: key.to_owned(),
        what: json.map_or(What::Delete, |json| What::Spec(json.to_vec())),
        expect,
    };
    assert_eq!(catalog.write(&[]).unwrap(), []);
    let made = catalog.write(&[
        write(Kind::Image, "a", Some(b"1"), Expect::Absent),
        write(Kind::Volume, "v", Some(b"2"), Expect::Absent),
        write(Kind::Image, "none", None, Expect::Any),
        // What the one before it has made is there.
        write(Kind::Image, "a", Some(b"3"), Expect::At(Revision(1))),
    ]);
    assert_eq!(made.unwrap(), [1, 2, 2, 3].map(Revision));
    let all = |catalog: &S::Catalog| Kind::ALL.map(|kind| catalog.list(kind).unwrap().records);
    let (before, head) = (all(&catalog), *catalog.head().borrow());
    let good = write(Kind::Image, "b", Some(b"4"), Expect::Absent);
    let gone = write(Kind::Volume, "v", None, Expect::Any);
    let long = vec![b' '; MAX_RECORD_LEN + 1];
    for bad in [
        write(Kind::Image, "a", Some(b"5"), Expect::Absent),
        write(Kind::Image, "a", Some(b"5"), Expect::At(Revision(1))),
        write(Kind::Image, "..", Some(b"5"), Expect::Any),
        write(Kind::Image, "c", Some(&long), Expect::Any),
    ] {
        catalog.write(&[good.clone(), gone.clone(), bad]).unwrap_err();
        assert_eq!((all(&catalog), *catalog.head().borrow()), (before.clone(), head));
    }
    drop(catalog);
    let catalog = subject.open();
    assert_eq!(all(&catalog), before);
    let made = catalog.write(&[good, gone]).unwrap();
    let changes = catalog.changes(head, usize::MAX).unwrap();
    assert_eq!(changes.iter().map(|change| change.revision).collect::<Vec<_>>(), made);
    assert_eq!(changes.iter().map(|change| change.deleted).collect::<Vec<_>>(), [false, true]);
}

/// Runs the suite on one implementation, a test for each promise.
macro_rules! conforms {
    ($name:ident, $subject:ty) => {
        mod $name {
            use super::*;

            conforms!(@each $subject:
                compare_and_set_tells_a_lost_race
                revisions_grow_and_are_never_used_twice
                kinds_are_apart
                a_list_is_of_one_moment_and_says_which
                a_watch_sees_every_change_once_and_in_order
                a_watch_that_waits_is_woken
                a_watch_that_is_too_far_behind_is_told
                a_crash_loses_nothing_that_was_acknowledged
                writers_at_the_same_time_lose_no_update
                records_have_any_size_up_to_the_limit
                a_hostile_key_is_refused_and_changes_nothing
                several_changes_are_all_made_or_none
                a_status_and_a_spec_leave_each_other_alone
                a_record_goes_with_its_last_finalizer
            );
        }
    };
    (@each $subject:ty: $($promise:ident)*) => {$(
        #[test]
        fn $promise() {
            conformance::$promise::<$subject>();
        }
    )*};
}
pub(super) use conforms;
