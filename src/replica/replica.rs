//! A base image, read in the reader's own process.
//!
//! Why: this is what a replica engine holds for as long as it runs, and what all of its threads read.
//! How: what was handed out is in one shared value that is replaced as a whole when the engine was
//! started anew; reading takes no lock. Questions go over one of a few connections, each used by one
//! thread at a time; the first keeps the lease.
//! Never: gives bytes of another image than the one that was attached to.
//! Start at [`Replica::attach`].

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::ReplicaError;
use crate::attached::Attached;
use crate::connection::{Answer, Connection, Lost};
use crate::extents::Extents;
use crate::layer::Found;
use crate::wire::{EXTENT, MAX_PREPARE_BYTES, MAX_READ_BYTES, PREPARE, READ, Status};

/// Connections that are kept for later questions.
const KEPT_CONNECTIONS: usize = 4;
/// Less than that is asked for as bytes: one cluster of the usual size has no need of all cores.
const MIN_PREPARE_BYTES: u64 = 64 << 10;
/// How long it rests between two tries to reach an engine that does not answer.
const REST: Duration = Duration::from_millis(20);
const REST_MOST: Duration = Duration::from_secs(1);

/// How data is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// With pread, on the file that was handed out.
    #[default]
    Pread,
    /// From a map of it, with no system call for what is in memory. The process gets a handler of
    /// SIGBUS, which turns a page that can't be read into an error; other faults go where they went
    /// before.
    Mapped,
}

/// How a reader attaches.
#[derive(Clone, Debug)]
pub struct Options {
    /// How data is read.
    pub mode: Mode,
    /// How long an answer of the engine may take, and how long an engine that has gone is waited
    /// for. Default: a minute.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { mode: Mode::default(), patience: Duration::from_secs(60) }
    }
}

/// A base image. Shared by any number of threads.
#[derive(Debug)]
pub struct Replica {
    socket: PathBuf,
    image: String,
    options: Options,
    attached: ArcSwap<Attached>,
    idle: Mutex<Vec<(u64, Connection)>>,
}

impl Replica {
    /// Attaches to `image`, on the engine that listens at `socket`.
    ///
    /// # Errors
    /// [`ReplicaError::Engine`], [`ReplicaError::Refused`], [`ReplicaError::Protocol`].
    pub fn attach(
        socket: impl AsRef<Path>,
        image: &str,
        options: Options,
    ) -> Result<Self, ReplicaError> {
        let at = Place { socket: socket.as_ref(), image, options: &options };
        let (connection, attached) = at.attach()?;
        let (socket, image) = (at.socket.to_owned(), image.to_owned());
        let idle = Mutex::new(vec![(attached.generation, connection)]);
        Ok(Self { socket, image, options, attached: ArcSwap::from_pointee(attached), idle })
    }

    /// Length of the disk in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.attached.load().size_bytes
    }

    /// Which image it is: the same text for the same image with the same bytes.
    #[must_use]
    pub fn identity(&self) -> String {
        self.attached.load().identity.clone()
    }

    /// Another number after the engine was started anew, and has been asked something.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.attached.load().generation
    }

    /// True if nobody who has the descriptors can write to the files, root included.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        self.attached.load().is_protected
    }

    /// Fills `buf` with the disk's bytes from `at` on.
    ///
    /// # Errors
    /// [`ReplicaError::PastEnd`] if the range is not all inside the disk (nothing is read then);
    /// [`ReplicaError::Io`] for a page that can't be read; those of asking the engine, where it has
    /// to be asked. `buf` holds anything then.
    pub fn read_at(&self, buf: &mut [u8], at: u64) -> Result<(), ReplicaError> {
        let attached = self.attached.load();
        let (len_bytes, size_bytes) = (buf.len() as u64, attached.size_bytes);
        let end = at.checked_add(len_bytes).filter(|&end| end <= size_bytes);
        let end = end.ok_or(ReplicaError::PastEnd { at, len_bytes, size_bytes })?;
        // As far as the engine was asked to have it ready.
        let mut prepared = if attached.prepares { at } else { end };
        let (mut rest, mut at) = (buf, at);
        while at < end {
            let (found, layer, until) = attached.run_at(at, end);
            let len = usize::try_from(until - at).unwrap_or(rest.len()).min(rest.len());
            let part = &mut rest[..len];
            match (found, layer) {
                (Found::Data(from), Some(layer)) => {
                    layer.read_data(part, from).map_err(|source| {
                        let (image, len_bytes) = (self.image.clone(), part.len());
                        ReplicaError::Io { image, at, len_bytes, source }
                    })?;
                }
                (Found::Encoded, Some(layer)) if attached.read_decoded(layer, part, at) => {}
                (Found::Encoded | Found::Ask, _)
                    if at >= prepared && end - at > MIN_PREPARE_BYTES =>
                {
                    // One question for many clusters, which are then decoded on all cores; they are
                    // copied from where they are, and not out of a message.
                    prepared = self.ask_to_prepare(at, end)?;
                    continue;
                }
                (Found::Encoded | Found::Ask, _) => self.ask_bytes(part, at)?,
                (Found::Zero | Found::Beneath | Found::Data(_), _) => part.fill(0),
            }
            (rest, at) = (rest.split_at_mut(len).1, until);
        }
        Ok(())
    }

    /// What `[at, at + len)` is, run by run; neighbours of one kind are not always merged.
    ///
    /// # Errors
    /// [`ReplicaError::PastEnd`] if the range is not all inside the disk. Others come from the
    /// iterator, where the engine has to be asked.
    pub fn extents(&self, at: u64, len_bytes: u64) -> Result<Extents<'_>, ReplicaError> {
        let attached = self.attached.load_full();
        let size_bytes = attached.size_bytes;
        let end = at.checked_add(len_bytes).filter(|&end| end <= size_bytes);
        let end = end.ok_or(ReplicaError::PastEnd { at, len_bytes, size_bytes })?;
        Ok(Extents::new(self, attached, at, end))
    }

    /// Asks for what can't be read without the engine.
    #[cold]
    fn ask_bytes(&self, buf: &mut [u8], at: u64) -> Result<(), ReplicaError> {
        let most = usize::try_from(MAX_READ_BYTES).unwrap_or(usize::MAX);
        for (part, at) in buf.chunks_mut(most).zip((at..).step_by(most)) {
            let answer = self.ask(READ, at, part.len() as u64, part)?;
            if answer.len != part.len() {
                return Err(self.protocol("it has another number of bytes than were asked for"));
            }
        }
        Ok(())
    }

    /// Has the engine bring and decode what it has to of `[at, end)`; up to where it need not be asked
    /// again, at least `at + 1`.
    #[cold]
    fn ask_to_prepare(&self, at: u64, end: u64) -> Result<u64, ReplicaError> {
        let limit = (end - at).min(MAX_PREPARE_BYTES);
        let answer = match self.ask(PREPARE, at, limit, &mut []) {
            // An older engine was started in the place of the one that has told that it knows this.
            Err(ReplicaError::Refused { status: Status::Malformed, .. }) => return Ok(end),
            answer => answer?,
        };
        match answer.a {
            1.. if answer.a <= limit => Ok(at + answer.a),
            _ => Err(self.protocol("it has prepared nothing, or more than was asked for")),
        }
    }

    /// What the engine says of a range: its kind, and how long it is at least.
    pub(crate) fn ask_extent(&self, at: u64, limit: u64) -> Result<(u64, u64), ReplicaError> {
        let answer = self.ask(EXTENT, at, limit, &mut [])?;
        match answer.a {
            1.. if answer.a <= limit => Ok((answer.b, answer.a)),
            _ => Err(self.protocol("its extent has no length, or one past what was asked for")),
        }
    }

    /// One question. An engine that has gone is waited for, and attached to again; so is an image
    /// that an engine does not have any more, or not yet.
    fn ask(&self, kind: u16, at: u64, limit: u64, body: &mut [u8]) -> Result<Answer, ReplicaError> {
        let deadline = Instant::now() + self.options.patience;
        let mut rest = REST;
        loop {
            let lost = match self.connection() {
                Ok((generation, mut connection)) => match connection.range(kind, at, limit, body) {
                    Ok(answer) => {
                        self.keep(generation, connection);
                        return Ok(answer);
                    }
                    Err(Lost::Refused(status, message)) => {
                        self.keep(generation, connection);
                        let image = self.image.clone();
                        return Err(ReplicaError::Refused { image, status, message });
                    }
                    Err(Lost::Protocol(what)) => return Err(self.protocol(what)),
                    Err(Lost::Gone(source)) => {
                        let socket = self.socket.clone();
                        ReplicaError::Engine { socket, source }
                    }
                },
                Err(lost @ ReplicaError::Engine { .. }) => lost,
                // An engine that has just been started may not have opened its images yet.
                Err(not_yet @ ReplicaError::Refused { status: Status::Unknown, .. }) => not_yet,
                Err(refused) => return Err(refused),
            };
            // What was kept is of the engine that has gone.
            self.idle().clear();
            if Instant::now() + rest >= deadline {
                return Err(lost);
            }
            if rest > REST {
                std::thread::sleep(rest);
            }
            rest = (rest * 2).min(REST_MOST);
        }
    }

    /// A connection that nobody uses: one that was kept, or a new one, by which a new engine is
    /// noticed.
    fn connection(&self) -> Result<(u64, Connection), ReplicaError> {
        if let Some(kept) = self.idle().pop() {
            return Ok(kept);
        }
        let place = Place { socket: &self.socket, image: &self.image, options: &self.options };
        let (connection, attached) = place.attach()?;
        let current = self.attached.load();
        if attached.identity != current.identity || attached.size_bytes != current.size_bytes {
            let (was, now) = (current.identity.clone(), attached.identity);
            return Err(ReplicaError::Changed { image: self.image.clone(), was, now });
        }
        let generation = attached.generation;
        if generation != current.generation {
            self.attached.store(Arc::new(attached));
        }
        Ok((generation, connection))
    }

    fn keep(&self, generation: u64, connection: Connection) {
        let mut idle = self.idle();
        if idle.len() < KEPT_CONNECTIONS {
            idle.push((generation, connection));
        }
    }

    /// A panic elsewhere leaves the list whole: each change is one push or pop.
    fn idle(&self) -> MutexGuard<'_, Vec<(u64, Connection)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn protocol(&self, what: &'static str) -> ReplicaError {
        ReplicaError::Protocol { image: self.image.clone(), what, source: None }
    }
}

/// Where an image is attached to.
struct Place<'a> {
    socket: &'a Path,
    image: &'a str,
    options: &'a Options,
}

impl Place<'_> {
    fn attach(&self) -> Result<(Connection, Attached), ReplicaError> {
        let image = || self.image.to_owned();
        let attach = Connection::attach(self.socket, self.image, self.options.patience);
        let (connection, body, descriptors) = attach.map_err(|lost| match lost {
            Lost::Gone(source) => ReplicaError::Engine { socket: self.socket.to_owned(), source },
            Lost::Refused(status, message) => {
                ReplicaError::Refused { image: image(), status, message }
            }
            Lost::Protocol(what) => ReplicaError::Protocol { image: image(), what, source: None },
        })?;
        let attached = Attached::of_message(&body, descriptors, self.options.mode);
        let attached = attached.map_err(|wrong| ReplicaError::Protocol {
            image: image(),
            what: wrong.what,
            source: wrong.source,
        })?;
        Ok((connection, attached))
    }
}
