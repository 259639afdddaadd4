//! What a process that is killed leaves of its catalog: everything that it acknowledged, nothing by halves.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use bedplate::catalog::{Catalog, Change, Embedded, Expect, Kind, Revision};

/// Set for the process that is to be killed: the catalog's path, and the number of its first change.
const CHILD: &str = "BEDPLATE_TEST_CATALOG_WRITER";
/// The test below, which that process runs too.
const NAME: &str = "a_writer_that_is_killed_leaves_what_it_acknowledged_and_nothing_by_halves";
const KEYS: u64 = 7;

/// What change number `n` does: a kind, a key, and a record; no record: it is removed.
fn change(n: u64) -> (Kind, String, Option<Vec<u8>>) {
    let kind = Kind::ALL[usize::try_from(n % 5).unwrap()];
    // From one byte to more than a page of the store, none of a round length.
    let len = usize::try_from(n * 7919 % 9973 + 1).unwrap();
    let record = vec![u8::try_from(n % 251).unwrap(); len];
    (kind, format!("k{}", n / 5 % KEYS), (n % 11 != 10).then_some(record))
}

fn apply(catalog: &Embedded, n: u64) {
    let (kind, key, record) = change(n);
    match record {
        Some(record) => drop(catalog.put(kind, &key, &record, Expect::Any).unwrap()),
        None => catalog.delete(kind, &key, Expect::Any).unwrap(),
    }
}

/// What the process does that is to be killed.
fn write_for_ever(text: &str) -> ! {
    let (path, first) = text.rsplit_once(' ').unwrap();
    let catalog = Embedded::open(Path::new(path)).unwrap();
    // The test harness holds back what is printed; the pipe does not.
    let mut out = std::io::stderr().lock();
    let mut n = first.parse::<u64>().unwrap();
    loop {
        apply(&catalog, n);
        writeln!(out, "done {n}").unwrap();
        n += 1;
    }
}

/// The records after the first `changes` changes.
fn model(changes: u64) -> BTreeMap<(Kind, String), Vec<u8>> {
    let mut records = BTreeMap::new();
    for n in 0..changes {
        let (kind, key, record) = change(n);
        match record {
            Some(record) => drop(records.insert((kind, key), record)),
            None => drop(records.remove(&(kind, key))),
        }
    }
    records
}

fn stored(catalog: &Embedded) -> BTreeMap<(Kind, String), Vec<u8>> {
    let of_kind = |kind| {
        let records = catalog.list(kind).unwrap().records;
        records.into_iter().map(move |(key, stored)| ((kind, key), stored.json))
    };
    Kind::ALL.into_iter().flat_map(of_kind).collect()
}

#[test]
fn a_writer_that_is_killed_leaves_what_it_acknowledged_and_nothing_by_halves() {
    if let Ok(text) = std::env::var(CHILD) {
        write_for_ever(&text);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.redb");
    let mut next = 0;
    let mut last = Revision(0);
    for round in 0..20u64 {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env(CHILD, format!("{} {next}", path.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = child.unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut acknowledged = next;
        // At another place of its work each time.
        for _ in 0..1 + round * 5 % 23 {
            let line = lines.next().unwrap().unwrap();
            assert_eq!(line, format!("done {acknowledged}"));
            acknowledged += 1;
        }
        // Somewhere between two lines, too.
        for _ in 0..round * 20_000 {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines.map_while(Result::ok).filter(|line| line.starts_with("done")) {
            // The last line may have been cut.
            acknowledged += u64::from(line == format!("done {acknowledged}"));
        }

        let catalog = Embedded::open(&path).unwrap();
        let found = stored(&catalog);
        // What was under way is there or is not.
        let done = [acknowledged, acknowledged + 1].into_iter().find(|n| model(*n) == found);
        let done = done.unwrap_or_else(|| {
            panic!("round {round}: neither as after {acknowledged} changes nor one more")
        });
        let changes: Vec<Change> = catalog.changes(last, usize::MAX).unwrap();
        let revisions: Vec<u64> = changes.iter().map(|change| change.revision.0).collect();
        let head = *catalog.head().borrow();
        assert_eq!(revisions, (last.0 + 1..=head.0).collect::<Vec<_>>());
        // Removing what is not there is no change.
        let made = (next..done).map(change).zip(next..);
        let made: Vec<_> = made
            .filter(|((kind, key, record), n)| {
                record.is_some() || model(*n).contains_key(&(*kind, key.clone()))
            })
            .map(|((kind, key, record), _)| (kind, key, record.is_none()))
            .collect();
        let told: Vec<_> = changes.into_iter().map(|c| (c.kind, c.key, c.deleted)).collect();
        assert_eq!(told, made);
        (next, last) = (done, head);
    }
    assert!(next > 100, "{next} changes");
}
