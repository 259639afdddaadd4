//! The catalog in one redb file.
//!
//! Why: durable and transactional without a server to install.
//! How: one table a kind, key to revision (8 bytes, little-endian) and JSON; a counter table gives
//! revisions, so that a deleted and re-created record never gets an old one again. Each change is
//! one transaction, flushed before it returns.
//! Never: leaves the file readable for others: sources may hold credentials.
//! Start at [`Embedded::open`].

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::{Catalog, CatalogError, Expect, Kind, Revision, Stored};

type Records = TableDefinition<'static, &'static str, &'static [u8]>;
const COUNTER: TableDefinition<'static, &'static str, u64> = TableDefinition::new("counter");
const NEXT_REVISION: &str = "next-revision";

fn table_of(kind: Kind) -> Records {
    TableDefinition::new(kind.as_str())
}

/// A catalog in one file.
pub struct Embedded {
    db: Database,
    path: PathBuf,
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Embedded({})", self.path.display())
    }
}

impl Embedded {
    /// Opens or creates the file `path` with mode 0600, and locks it.
    ///
    /// # Errors
    /// [`CatalogError::Locked`] if another process has it; others if it can't be opened, created,
    /// or repaired after a crash.
    pub fn open(path: &Path) -> Result<Self, CatalogError> {
        let io = |op| move |source| CatalogError::File { op, path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(io("open"))?;
        let opened = redb::backends::FileBackend::new(file)
            .and_then(|backend| Database::builder().create_with_backend(backend));
        let db = opened.map_err(|e| {
            if matches!(e, redb::DatabaseError::DatabaseAlreadyOpen) {
                return CatalogError::Locked { path: path.to_owned() };
            }
            CatalogError::Open { path: path.to_owned(), source: Box::new(e.into()) }
        })?;
        let this = Self { db, path: path.to_owned() };
        this.create_tables()?;
        if let Some(dir) = path.parent() {
            let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
            File::open(dir).and_then(|d| d.sync_all()).map_err(io("flush the directory of"))?;
        }
        Ok(this)
    }

    fn create_tables(&self) -> Result<(), CatalogError> {
        let create = || -> Result<(), redb::Error> {
            let tx = self.db.begin_write()?;
            for kind in Kind::ALL {
                tx.open_table(table_of(kind))?;
            }
            tx.open_table(COUNTER)?;
            tx.commit()?;
            Ok(())
        };
        create().map_err(|e| self.failed("create the tables", e))
    }

    fn failed(&self, op: &'static str, source: redb::Error) -> CatalogError {
        CatalogError::Store { op, path: self.path.clone(), source: Box::new(source) }
    }

    fn split(&self, kind: Kind, key: &str, value: &[u8]) -> Result<Stored, CatalogError> {
        match value.split_first_chunk::<8>() {
            Some((revision, json)) => Ok(Stored {
                revision: Revision(u64::from_le_bytes(*revision)),
                json: json.to_vec(),
            }),
            None => Err(CatalogError::Damaged {
                path: self.path.clone(),
                kind: kind.as_str(),
                key: key.to_owned(),
                len_bytes: value.len(),
            }),
        }
    }

    /// One change in one transaction: `Some(json)` stores, `None` removes.
    fn change(
        &self,
        kind: Kind,
        key: &str,
        json: Option<&[u8]>,
        expect: Expect,
    ) -> Result<Revision, CatalogError> {
        let failed = |e| self.failed("write", e);
        let tx = self.db.begin_write().map_err(|e| failed(e.into()))?;
        let revision = {
            let mut table = tx.open_table(table_of(kind)).map_err(|e| failed(e.into()))?;
            let found = match table.get(key).map_err(|e| failed(e.into()))? {
                Some(value) => Some(self.split(kind, key, value.value())?.revision),
                None => None,
            };
            check(kind, key, found, expect)?;
            let mut counter = tx.open_table(COUNTER).map_err(|e| failed(e.into()))?;
            let last = counter.get(NEXT_REVISION).map_err(|e| failed(e.into()))?;
            let revision = last.map_or(0, |v| v.value()) + 1;
            counter.insert(NEXT_REVISION, revision).map_err(|e| failed(e.into()))?;
            if let Some(json) = json {
                let value = [&revision.to_le_bytes()[..], json].concat();
                table.insert(key, value.as_slice()).map_err(|e| failed(e.into()))?;
            } else {
                table.remove(key).map_err(|e| failed(e.into()))?;
            }
            Revision(revision)
        };
        tx.commit().map_err(|e| failed(e.into()))?;
        Ok(revision)
    }
}

fn check(
    kind: Kind,
    key: &str,
    found: Option<Revision>,
    expect: Expect,
) -> Result<(), CatalogError> {
    let ok = match expect {
        Expect::Any => true,
        Expect::Absent => found.is_none(),
        Expect::At(revision) => found == Some(revision),
    };
    if ok {
        return Ok(());
    }
    let expected = match expect {
        Expect::Any => "anything".to_owned(),
        Expect::Absent => "none".to_owned(),
        Expect::At(revision) => format!("revision {}", revision.0),
    };
    let found = found.map(|r| r.0);
    Err(CatalogError::Conflict { kind: kind.as_str(), key: key.to_owned(), found, expected })
}

impl Catalog for Embedded {
    fn get(&self, kind: Kind, key: &str) -> Result<Option<Stored>, CatalogError> {
        let failed = |e| self.failed("read", e);
        let tx = self.db.begin_read().map_err(|e| failed(e.into()))?;
        let table = tx.open_table(table_of(kind)).map_err(|e| failed(e.into()))?;
        match table.get(key).map_err(|e| failed(e.into()))? {
            Some(value) => self.split(kind, key, value.value()).map(Some),
            None => Ok(None),
        }
    }

    fn list(&self, kind: Kind) -> Result<Vec<(String, Stored)>, CatalogError> {
        let failed = |e| self.failed("read", e);
        let tx = self.db.begin_read().map_err(|e| failed(e.into()))?;
        let table = tx.open_table(table_of(kind)).map_err(|e| failed(e.into()))?;
        let mut all = Vec::new();
        for row in table.iter().map_err(|e| failed(e.into()))? {
            let (key, value) = row.map_err(|e| failed(e.into()))?;
            all.push((key.value().to_owned(), self.split(kind, key.value(), value.value())?));
        }
        Ok(all)
    }

    fn put(
        &self,
        kind: Kind,
        key: &str,
        json: &[u8],
        expect: Expect,
    ) -> Result<Revision, CatalogError> {
        self.change(kind, key, Some(json), expect)
    }

    fn delete(&self, kind: Kind, key: &str, expect: Expect) -> Result<(), CatalogError> {
        self.change(kind, key, None, expect).map(|_| ())
    }
}
