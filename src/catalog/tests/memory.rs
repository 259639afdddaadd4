//! A catalog in memory: what the suite is held against too, and the model of the embedded one.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::*;

#[derive(Default)]
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

    fn change(
        &self,
        kind: Kind,
        key: &str,
        json: Option<&[u8]>,
        expect: Expect,
    ) -> Result<Revision, CatalogError> {
        let mut state = self.state.lock().unwrap();
        let at = (kind, key.to_owned());
        let found = state.records.get(&at).map(|stored| stored.revision);
        check_expected(kind, key, found, expect)?;
        if json.is_none() && found.is_none() {
            return Ok(Revision(state.last));
        }
        state.last += 1;
        let revision = Revision(state.last);
        match json {
            Some(json) => state.records.insert(at, Stored { revision, json: json.to_vec() }),
            None => state.records.remove(&at),
        };
        let deleted = json.is_none();
        state.log.push_back(Change { revision, kind, key: key.to_owned(), deleted });
        if state.log.len() as u64 > self.kept {
            state.log.pop_front();
        }
        self.head.send_replace(revision);
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

    fn put(
        &self,
        kind: Kind,
        key: &str,
        json: &[u8],
        expect: Expect,
    ) -> Result<Revision, CatalogError> {
        check_record(kind, key, json)?;
        self.change(kind, key, Some(json), expect)
    }

    fn delete(&self, kind: Kind, key: &str, expect: Expect) -> Result<(), CatalogError> {
        check_key(kind, key)?;
        self.change(kind, key, None, expect).map(|_| ())
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
