//! The catalog in one redb file.
//!
//! Why: durable and transactional without a server to install.
//! How: one table a kind, key to value (see `change`); a counter table gives revisions, so that a deleted
//! and re-created record never gets an old one again; a log for watchers. Each write is one transaction,
//! flushed before it returns.
//! Never: leaves the file readable for others: sources may hold credentials.
//! Start at [`Embedded::open`].

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use tokio::sync::watch;

use super::change::{self, Made};
use super::log::{self, LOG};
use super::{
    Catalog, CatalogError, Change, KEPT_CHANGES, Kind, Listing, Revision, Stored, Write,
    check_expected, check_key, check_write,
};

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
    head: watch::Sender<Revision>,
    kept: u64,
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
        let (path_owned, head) = (path.to_owned(), watch::Sender::new(Revision(0)));
        let this = Self { db, path: path_owned, head, kept: KEPT_CHANGES };
        let newest = this.create_tables()?;
        this.head.send_replace(Revision(newest));
        if let Some(dir) = path.parent() {
            let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
            File::open(dir).and_then(|d| d.sync_all()).map_err(io("flush the directory of"))?;
        }
        Ok(this)
    }

    /// With so many changes kept for watchers instead of [`KEPT_CHANGES`], from the next change on.
    #[must_use]
    pub fn keeping(mut self, changes: u64) -> Self {
        self.kept = changes;
        self
    }

    /// Makes what is missing; the last revision.
    fn create_tables(&self) -> Result<u64, CatalogError> {
        let create = || -> Result<u64, redb::Error> {
            let tx = self.db.begin_write()?;
            for kind in Kind::ALL {
                tx.open_table(table_of(kind))?;
            }
            tx.open_table(LOG)?;
            let newest = newest(&tx.open_table(COUNTER)?)?;
            tx.commit()?;
            Ok(newest)
        };
        create().map_err(|e| self.failed("create the tables", e))
    }

    fn failed(&self, op: &'static str, source: redb::Error) -> CatalogError {
        CatalogError::Store { op, path: self.path.clone(), source: Box::new(source) }
    }

    fn decode(&self, kind: Kind, key: &str, value: &[u8]) -> Result<Stored, CatalogError> {
        change::decode(value).ok_or_else(|| CatalogError::Damaged {
            path: self.path.clone(),
            kind: kind.as_str(),
            key: key.to_owned(),
            len_bytes: value.len(),
        })
    }

    /// One change within a transaction. True if it is one: not if nothing is different after it.
    fn change(
        &self,
        tx: &WriteTransaction,
        write: &Write,
    ) -> Result<(Revision, bool), CatalogError> {
        let failed = |e| self.failed("write", e);
        let (kind, key) = (write.kind, write.key.as_str());
        let mut table = tx.open_table(table_of(kind)).map_err(|e| failed(e.into()))?;
        let found = match table.get(key).map_err(|e| failed(e.into()))? {
            Some(value) => Some(self.decode(kind, key, value.value())?),
            None => None,
        };
        check_expected(kind, key, found.as_ref().map(|found| found.revision), write.expect)?;
        let mut counter = tx.open_table(COUNTER).map_err(|e| failed(e.into()))?;
        let last = newest(&counter).map_err(|e| failed(e.into()))?;
        let revision = Revision(last + 1);
        let deleted = match change::apply(found, write)? {
            Made::Same => return Ok((Revision(last), false)),
            Made::Record(stored) => {
                let value = change::encode(&Stored { revision, ..stored });
                table.insert(key, value.as_slice()).map_err(|e| failed(e.into()))?;
                false
            }
            Made::Gone => {
                table.remove(key).map_err(|e| failed(e.into()))?;
                true
            }
        };
        counter.insert(NEXT_REVISION, revision.0).map_err(|e| failed(e.into()))?;
        let mut log = tx.open_table(LOG).map_err(|e| failed(e.into()))?;
        let change = Change { revision, kind, key: key.to_owned(), deleted };
        log::append(&mut log, &change, self.kept).map_err(|e| failed(e.into()))?;
        Ok((revision, true))
    }

    fn read_changes(&self, since: Revision, most: usize) -> Result<Changes, redb::Error> {
        let tx = self.db.begin_read()?;
        let newest = newest(&tx.open_table(COUNTER)?)?;
        let table = tx.open_table(LOG)?;
        let oldest = log::oldest(&table, newest)?;
        if since.0 < oldest || since.0 > newest {
            return Ok(Changes::Expired { oldest, newest });
        }
        let mut changes = Vec::new();
        for row in table.range(since.0 + 1..)? {
            if changes.len() >= most {
                break;
            }
            let (revision, row) = row?;
            changes.extend(log::decode(revision.value(), row.value()));
        }
        Ok(Changes::Kept(changes))
    }
}

/// What the log has.
enum Changes {
    Kept(Vec<Change>),
    Expired { oldest: u64, newest: u64 },
}

/// The last revision that was given.
fn newest(counter: &impl ReadableTable<&'static str, u64>) -> Result<u64, redb::StorageError> {
    Ok(counter.get(NEXT_REVISION)?.map_or(0, |last| last.value()))
}

impl Catalog for Embedded {
    fn get(&self, kind: Kind, key: &str) -> Result<Option<Stored>, CatalogError> {
        check_key(kind, key)?;
        let failed = |e| self.failed("read", e);
        let tx = self.db.begin_read().map_err(|e| failed(e.into()))?;
        let table = tx.open_table(table_of(kind)).map_err(|e| failed(e.into()))?;
        match table.get(key).map_err(|e| failed(e.into()))? {
            Some(value) => self.decode(kind, key, value.value()).map(Some),
            None => Ok(None),
        }
    }

    fn list(&self, kind: Kind) -> Result<Listing, CatalogError> {
        let failed = |e| self.failed("read", e);
        let tx = self.db.begin_read().map_err(|e| failed(e.into()))?;
        let table = tx.open_table(table_of(kind)).map_err(|e| failed(e.into()))?;
        let mut records = Vec::new();
        for row in table.iter().map_err(|e| failed(e.into()))? {
            let (key, value) = row.map_err(|e| failed(e.into()))?;
            records.push((key.value().to_owned(), self.decode(kind, key.value(), value.value())?));
        }
        let counter = tx.open_table(COUNTER).map_err(|e| failed(e.into()))?;
        let revision = Revision(newest(&counter).map_err(|e| failed(e.into()))?);
        Ok(Listing { revision, records })
    }

    fn write(&self, changes: &[Write]) -> Result<Vec<Revision>, CatalogError> {
        changes.iter().try_for_each(check_write)?;
        let failed = |e| self.failed("write", e);
        let tx = self.db.begin_write().map_err(|e| failed(e.into()))?;
        // On an error the transaction is dropped, which undoes it.
        let made = changes.iter().map(|write| self.change(&tx, write));
        let made = made.collect::<Result<Vec<_>, CatalogError>>()?;
        if let Some((newest, _)) = made.iter().rfind(|(_, is_change)| *is_change) {
            tx.commit().map_err(|e| failed(e.into()))?;
            // Writers end in the order of their revisions, but may come here in another.
            self.head.send_if_modified(|head| {
                let is_newer = newest > head;
                *head = (*newest).max(*head);
                is_newer
            });
        }
        Ok(made.into_iter().map(|(revision, _)| revision).collect())
    }

    fn changes(&self, since: Revision, most: usize) -> Result<Vec<Change>, CatalogError> {
        match self.read_changes(since, most).map_err(|e| self.failed("read", e))? {
            Changes::Kept(changes) => Ok(changes),
            Changes::Expired { oldest, newest } => {
                Err(CatalogError::Expired { since: since.0, oldest, newest })
            }
        }
    }

    fn head(&self) -> watch::Receiver<Revision> {
        self.head.subscribe()
    }
}
