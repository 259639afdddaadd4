//! What is served under which name, and who reads it now.
//!
//! Why: images come and go while servers run, and a copy in use must not be taken away unseen.
//! How: one lock over the names, taken at attach and never on the way of a byte; each export
//! keeps its open sessions, so that it can count them and hang them up.
//! Never: opens a file, or knows a protocol.
//! Start at [`Exports`].

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::Socket;
use super::replica::Handout;
use super::{Counters, Latency, ServeError, Tracing, Warmth};
use crate::image::View;

/// Longest name or description in bytes (the protocol's limit for strings).
const MAX_TEXT_BYTES: usize = 4096;
/// Of four bytes each, they fit into what the replica protocol has for them.
const MAX_IDENTITY_CHARS: usize = 128;

/// One view under one name.
#[derive(Debug)]
pub struct Export {
    name: String,
    description: String,
    identity: String,
    generation: u64,
    view: Arc<View>,
    handout: OnceLock<Handout>,
    warmth: Warmth,
    counters: Counters,
    latency: Latency,
    tracing: Tracing,
    sessions: Mutex<Sessions>,
}

#[derive(Debug, Default)]
struct Sessions {
    next_id: u64,
    /// The socket of each open session; `None` for a session without one (a fuzzer's).
    open: BTreeMap<u64, Option<Socket>>,
}

impl Export {
    /// Its canonical name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Text for people; may be empty.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Which image it is: the same text for the same bytes, whichever process serves them.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Another number for each time that an image is opened.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What readers in other processes are given, made when the first one comes.
    pub(super) fn handout(&self) -> &Handout {
        self.handout.get_or_init(|| Handout::of(&self.view))
    }

    /// The bytes.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Which parts of the view's files are known to be in memory.
    #[must_use]
    pub fn warmth(&self) -> &Warmth {
        &self.warmth
    }

    /// Its counters.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How long its readers waited.
    #[must_use]
    pub fn latency(&self) -> &Latency {
        &self.latency
    }

    /// Which of its ranges are asked for, if somebody wants to know.
    #[must_use]
    pub fn tracing(&self) -> &Tracing {
        &self.tracing
    }

    /// How many sessions are in the transmission phase now.
    #[must_use]
    pub fn connections(&self) -> usize {
        lock(&self.sessions).open.len()
    }

    fn hang_up(&self) -> usize {
        let sessions = lock(&self.sessions);
        sessions.open.values().flatten().for_each(Socket::hang_up);
        sessions.open.len()
    }
}

/// One session's hold on an export: while it lives, the export is in use.
#[derive(Debug)]
pub struct Attachment {
    export: Arc<Export>,
    id: u64,
}

impl Attachment {
    /// The export that is held.
    #[must_use]
    pub fn export(&self) -> &Export {
        &self.export
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        lock(&self.export.sessions).open.remove(&self.id);
    }
}

/// The exports of a node, shared by all its servers.
#[derive(Debug, Default)]
pub struct Exports {
    names: Mutex<Names>,
}

#[derive(Debug, Default)]
struct Names {
    by_name: BTreeMap<String, Arc<Export>>,
    default: Option<String>,
}

impl Names {
    fn find(&self, name: &str) -> Option<&Arc<Export>> {
        let name = if name.is_empty() { self.default.as_deref()? } else { name };
        self.by_name.get(name)
    }
}

impl Exports {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Serves `view` as `name` from now on. `description` is text for people, and may be empty.
    ///
    /// # Errors
    /// [`ServeError::BadName`] for an empty, too long or unprintable name or description;
    /// [`ServeError::Exists`] if the name is taken.
    pub fn add(
        &self,
        name: &str,
        view: Arc<View>,
        description: &str,
    ) -> Result<Arc<Export>, ServeError> {
        self.add_as(name, view, description, name)
    }

    /// As [`add`](Self::add), with the text by which a reader who comes back knows that it is still
    /// the same image.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_as(
        &self,
        name: &str,
        view: Arc<View>,
        description: &str,
        identity: &str,
    ) -> Result<Arc<Export>, ServeError> {
        check_text(name, name)?;
        check_text(name, identity)?;
        check_text(name, description)?;
        if name.is_empty() {
            let rule = "the empty name means the default export; give a name and make it default";
            return Err(ServeError::BadName { name: String::new(), rule });
        }
        let mut names = lock(&self.names);
        if names.by_name.contains_key(name) {
            return Err(ServeError::Exists { name: name.to_owned() });
        }
        let export = Arc::new(Export {
            name: name.to_owned(),
            description: description.to_owned(),
            identity: identity.chars().take(MAX_IDENTITY_CHARS).collect(),
            generation: RandomState::new().build_hasher().finish(),
            handout: OnceLock::new(),
            warmth: Warmth::new(&view),
            view,
            counters: Counters::default(),
            latency: Latency::default(),
            tracing: Tracing::default(),
            sessions: Mutex::default(),
        });
        names.by_name.insert(name.to_owned(), Arc::clone(&export));
        Ok(export)
    }

    /// Makes `name` the export that a client gets who asks for the empty name; `None` for nobody.
    ///
    /// # Errors
    /// [`ServeError::Unknown`] if there is no such export.
    pub fn set_default(&self, name: Option<&str>) -> Result<(), ServeError> {
        let mut names = lock(&self.names);
        if let Some(name) = name
            && !names.by_name.contains_key(name)
        {
            return Err(ServeError::Unknown { name: name.to_owned() });
        }
        names.default = name.map(str::to_owned);
        Ok(())
    }

    /// Takes an export away that nobody reads.
    ///
    /// # Errors
    /// [`ServeError::InUse`] with the number of sessions, [`ServeError::Unknown`].
    pub fn remove(&self, name: &str) -> Result<(), ServeError> {
        let mut names = lock(&self.names);
        let Some(export) = names.by_name.get(name) else {
            return Err(ServeError::Unknown { name: name.to_owned() });
        };
        // Nobody can attach between the count and the removal: attaching takes the same lock.
        match export.connections() {
            0 => names.forget(name),
            connections => return Err(ServeError::InUse { name: name.to_owned(), connections }),
        };
        Ok(())
    }

    /// Takes an export away and hangs up its sessions. Does not wait for them: the returned
    /// export's [`connections`](Export::connections) tells when the last one has gone.
    ///
    /// # Errors
    /// [`ServeError::Unknown`] if there is no such export.
    pub fn close(&self, name: &str) -> Result<Arc<Export>, ServeError> {
        let forgotten = lock(&self.names).forget(name);
        let export = forgotten.ok_or_else(|| ServeError::Unknown { name: name.to_owned() })?;
        let sessions = export.hang_up();
        tracing::info!(export = name, sessions, "export closed");
        Ok(export)
    }

    /// How many sessions read `name` now; 0 also for a name that is not there.
    #[must_use]
    pub fn in_use(&self, name: &str) -> usize {
        self.get(name).map_or(0, |export| export.connections())
    }

    /// The export of that name; the empty name is the default export.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<Export>> {
        lock(&self.names).find(name).cloned()
    }

    /// The export, if there is just one.
    #[must_use]
    pub fn only(&self) -> Option<Arc<Export>> {
        let names = lock(&self.names);
        let mut all = names.by_name.values();
        all.next().filter(|_| all.next().is_none()).cloned()
    }

    /// All exports, by name.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<Export>> {
        lock(&self.names).by_name.values().cloned().collect()
    }

    /// Begins a session on `name` (empty: the default export), to be hung up through `socket`.
    #[must_use]
    pub fn attach(&self, name: &str, socket: Option<Socket>) -> Option<Attachment> {
        let names = lock(&self.names);
        let export = Arc::clone(names.find(name)?);
        let mut sessions = lock(&export.sessions);
        let id = sessions.next_id;
        sessions.next_id += 1;
        sessions.open.insert(id, socket);
        drop(sessions);
        export.counters.add_connection();
        Some(Attachment { export, id })
    }
}

impl Names {
    fn forget(&mut self, name: &str) -> Option<Arc<Export>> {
        if self.default.as_deref() == Some(name) {
            self.default = None;
        }
        self.by_name.remove(name)
    }
}

fn check_text(name: &str, text: &str) -> Result<(), ServeError> {
    let refuse = |rule| Err(ServeError::BadName { name: name.chars().take(80).collect(), rule });
    if text.len() > MAX_TEXT_BYTES {
        return refuse("a name or description has at most 4096 bytes");
    }
    if text.chars().any(char::is_control) {
        return refuse("a name or description has no control characters");
    }
    Ok(())
}

/// A panic of another session leaves the maps whole: every change is one insert or one remove.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
