//! A catalog in memory: what the suite is held against too, and the model of the embedded one.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::*;

#[derive(Clone, Default)]
struct State {
    last: u64,
    records: BTreeMap<(Kind, String), Stored>,
    log: VecDeque<Change>,
}

/// Keeps records as long as it or a clone of it lives.
#[derive(Clone)]
pub(super) struct Memory {
    state: Arc<Mutex<State>>,
    head: watch::Sender<Revision>,
    kept: u64,
}

impl Memory {
    pub(super) fn keeping(kept: u64) -> Self {
        Self { state: Arc::default(), head: watch::Sender::new(Revision(0)), kept }
    }

    fn change(&self, state: &mut State, write: &Write) -> Result<Revision, CatalogError> {
        let Write { kind, key, expect, .. } = write.clone();
        let at = (kind, key.clone());
        let found = state.records.get(&at).cloned();
        check_expected(kind, &key, found.as_ref().map(|stored| stored.revision), expect)?;
        let revision = Revision(state.last + 1);
        let deleted = match change::apply(found, write)? {
            change::Made::Same => return Ok(Revision(state.last)),
            change::Made::Record(stored) => {
                state.records.insert(at, Stored { revision, ..stored });
                false
            }
            change::Made::Gone => state.records.remove(&at).is_some(),
        };
        state.last = revision.0;
        state.log.push_back(Change { revision, kind, key, deleted });
        if state.log.len() as u64 > self.kept {
            state.log.pop_front();
        }
        Ok(revision)
    }
}

impl Catalog for Memory {
    fn get(&self, kind: Kind, key: &str) -> Result<Option<Stored>, CatalogError> {
        check_key(kind, key)?;
        Ok(self.state.lock().unwrap().records.get(&(kind, key.to_owned())).cloned())
    }

    fn list(&self, kind: Kind) -> Result<Listing, CatalogError> {
        let state = self.state.lock().unwrap();
        let of_kind = state.records.iter().filter(|((of, _), _)| *of == kind);
        let records = of_kind.map(|((_, key), stored)| (key.clone(), stored.clone())).collect();
        Ok(Listing { revision: Revision(state.last), records })
    }

    fn write(&self, changes: &[Write]) -> Result<Vec<Revision>, CatalogError> {
        changes.iter().try_for_each(check_write)?;
        let mut state = self.state.lock().unwrap();
        let mut after = state.clone();
        let made = changes.iter().map(|write| self.change(&mut after, write));
        let made = made.collect::<Result<Vec<_>, CatalogError>>()?;
        if after.last > state.last {
            self.head.send_replace(Revision(after.last));
        }
        *state = after;
        Ok(made)
    }

    fn changes(&self, since: Revision, most: usize) -> Result<Vec<Change>, CatalogError> {
        let state = self.state.lock().unwrap();
        let oldest = state.log.front().map_or(state.last, |first| first.revision.0 - 1);
        if since.0 < oldest || since.0 > state.last {
            return Err(CatalogError::Expired { since: since.0, oldest, newest: state.last });
        }
        let later = state.log.iter().filter(|change| change.revision > since);
        Ok(later.take(most).cloned().collect())
    }

    fn head(&self) -> watch::Receiver<Revision> {
        self.head.subscribe()
    }
}
