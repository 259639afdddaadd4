//! The task that owns the world and performs what the core asks for.
//!
//! Why: one owner needs no locks, and gives one order to commands, reports and what watchers see.
//! How: messages in, [`World::command`] or [`World::step`], then the records are made durable,
//! then the actions are performed in their order. What blocks runs on blocking threads; what lasts
//! runs in workers, and their reports come back as events.
//! Never: decides; never holds up a command for a transfer.
//! Start at [`Driver::run`].

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use super::backend::{
    Backend, BackendError, CopyId, CopyTask, Link, Report, Reporter, WorkerHandle,
};
use super::command::{Command, Outcome};
use super::disks::OpenedDisk;
use super::driver::{Answer, Exporter, Message, Subscription, Told};
use super::error::ManagerError;
use super::keep::{Known, Revisions};
use super::parts::list_images;
use super::records::{AttachmentRecord, ClassRecord, DiskRecord, VolumeRecord, unix_now_s};
use super::settings::{Settings, SettingsRecord};
use super::world::{Action, Event, Records, World};
use crate::catalog::{Catalog, CatalogError, Kind, Stored, list_as};

/// Changes that a slow watcher may be behind before it is told and dropped.
const CHANGES: usize = 1024;
/// How often the disks are looked at without being asked.
const DISKS_EVERY: Duration = Duration::from_secs(5);
/// Most events of one pass, so that a command gets its turn.
const BATCH: usize = 4096;
/// The key of the one record of settings.
pub(super) const SETTINGS: &str = "node";

pub(super) struct Driver {
    pub(super) world: World,
    pub(super) revisions: Revisions,
    pub(super) catalog: Arc<dyn Catalog>,
    backend: Arc<dyn Backend>,
    pub(super) exporter: Arc<dyn Exporter>,
    started: Instant,
    reports_tx: mpsc::UnboundedSender<Report>,
    workers: HashMap<CopyId, (u64, watch::Sender<bool>, AbortHandle)>,
    /// Blocking work, and workers' ends; each gives an event, if any.
    tasks: JoinSet<Option<Event>>,
    pub(super) changes: broadcast::Sender<Arc<Told>>,
    pub(super) last_id: u64,
    /// The last changes, for who asks what has happened.
    pub(super) past: VecDeque<Arc<Told>>,
}

impl Driver {
    pub(super) fn new(
        catalog: Arc<dyn Catalog>,
        backend: Arc<dyn Backend>,
        exporter: Arc<dyn Exporter>,
        reports_tx: mpsc::UnboundedSender<Report>,
    ) -> Self {
        Self {
            world: World::default(),
            revisions: HashMap::new(),
            catalog,
            backend,
            exporter,
            started: Instant::now(),
            reports_tx,
            workers: HashMap::new(),
            tasks: JoinSet::new(),
            changes: broadcast::channel(CHANGES).0,
            last_id: 0,
            past: VecDeque::new(),
        }
    }

    pub(super) async fn restore(&mut self, settings: Settings) -> Result<(), CatalogError> {
        let (catalog, backend) = (self.catalog.clone(), self.backend.clone());
        let read = move || -> Result<_, CatalogError> {
            let mut revisions = HashMap::new();
            let records = Records {
                images: known(Kind::Image, list_images(&*catalog)?, &mut revisions, |r| {
                    r.name.to_string()
                }),
                attachments: list(
                    &*catalog,
                    Kind::Attachment,
                    &mut revisions,
                    |r: &AttachmentRecord| r.id.to_string(),
                )?,
                volumes: list(&*catalog, Kind::Volume, &mut revisions, |r: &VolumeRecord| {
                    r.name.to_string()
                })?,
                classes: list(&*catalog, Kind::Class, &mut revisions, |r: &ClassRecord| {
                    r.name.to_string()
                })?,
                disks: list(&*catalog, Kind::Disk, &mut revisions, |r: &DiskRecord| {
                    r.uuid.to_string()
                })?,
                settings: settings.with(
                    list(&*catalog, Kind::Setting, &mut revisions, |_: &SettingsRecord| {
                        SETTINGS.to_owned()
                    })?
                    .pop()
                    .unwrap_or_default(),
                ),
            };
            Ok((records, revisions, backend.disks(), backend.scan()))
        };
        let (records, revisions, disks, found) = blocking(read).await?;
        self.revisions = revisions;
        let (world, actions) = World::restore(records, disks, found, unix_now_s());
        self.world = world;
        self.backend.set_settings(self.world.settings().node());
        self.save_first(&actions).await?;
        let due = self.world.step(self.now(), [Event::Tick]);
        self.save_first(&due).await?;
        self.perform(due);
        Ok(())
    }

    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) async fn run(
        mut self,
        mut commands: mpsc::Receiver<Message>,
        mut reports: mpsc::UnboundedReceiver<Report>,
    ) {
        let mut disks_at = Instant::now() + DISKS_EVERY;
        loop {
            let wake =
                self.world.next_wake().map_or(disks_at, |at| disks_at.min(self.started + at));
            let event = tokio::select! {
                message = commands.recv() => match message {
                    Some(Message::Stop(done)) => {
                        self.stop().await;
                        let _caller_gone = done.send(());
                        return;
                    }
                    Some(message) => {
                        self.answer(message).await;
                        continue;
                    }
                    None => return self.stop().await,
                },
                Some(report) = reports.recv() => Some(Event::Worker(report)),
                Some(done) = self.tasks.join_next() => of_task(done),
                () = tokio::time::sleep_until(wake) => {
                    if Instant::now() >= disks_at {
                        disks_at = Instant::now() + DISKS_EVERY;
                        self.look_at_disks().await;
                    }
                    Some(Event::Tick)
                }
            };
            let mut events: Vec<Event> = event.into_iter().collect();
            // What has happened meanwhile, too: a pass looks at all images.
            while events.len() < BATCH
                && let Ok(report) = reports.try_recv()
            {
                events.push(Event::Worker(report));
            }
            while events.len() < BATCH
                && let Some(done) = self.tasks.try_join_next()
            {
                events.extend(of_task(done));
            }
            if !events.is_empty() {
                self.happen(events).await;
            }
        }
    }

    /// The records of events are stored if they can be; if not, the files on disk still tell.
    async fn happen(&mut self, events: Vec<Event>) {
        for event in &events {
            if let Event::Worker(Report { copy, generation, event: None }) = event
                && self.workers.get(copy).is_some_and(|(number, ..)| number == generation)
            {
                self.workers.remove(copy);
            }
        }
        self.see_sessions();
        let actions = self.world.step(self.now(), events);
        if let Err(error) = self.save_first(&actions).await {
            tracing::error!(error = %crate::fetch::one_line(&error), "a record is not stored; the next change tries");
        }
        self.perform(actions);
    }

    /// What is exported may be cleaned up only if nobody is connected, at this moment.
    fn see_sessions(&mut self) {
        let names = || self.world.exported();
        let lost = names().filter(|name| self.exporter.is_lost(name)).cloned().collect();
        let sessions = names().map(|name| (name, self.exporter.sessions(name)));
        let sessions = sessions.filter(|(_, sessions)| *sessions > 0);
        let sessions = sessions.map(|(name, sessions)| (name.clone(), sessions)).collect();
        self.world.see_sessions(sessions);
        self.world.see_lost(lost);
    }

    async fn look_at_disks(&mut self) {
        let backend = self.backend.clone();
        // Only what the world has seen go: it has closed what was open there.
        let gone = self.world.gone_disks();
        let look = move || {
            gone.iter().for_each(|disk| backend.reopen(disk));
            backend.disks()
        };
        let disks = blocking(look).await;
        self.happen(vec![Event::Disks(disks)]).await;
    }

    async fn answer(&mut self, message: Message) {
        match message {
            Message::Command(command, reply) => {
                let answer = self.command(*command).await;
                let _caller_gone = reply.send(answer);
            }
            Message::AddDisk(path, reply) => {
                let answer = self.add_disk(path).await;
                let _caller_gone = reply.send(answer);
            }
            Message::Read(look) => look(&self.world),
            Message::Subscribe(reply) => {
                let subscription = Subscription {
                    last_id: self.last_id,
                    images: self.world.images(),
                    attachments: self.world.attachments(),
                    volumes: self.world.volumes(),
                    past: self.past.iter().cloned().collect(),
                    changes: self.changes.subscribe(),
                };
                let _caller_gone = reply.send(subscription);
            }
            Message::Stop(_) => {}
        }
    }

    /// A disk is opened first: whether it is one, and which, only it can tell.
    async fn add_disk(&mut self, path: PathBuf) -> Result<Answer, ManagerError> {
        let (backend, root) = (self.backend.clone(), path.clone());
        let opened = blocking(move || {
            let (uuid, found) = backend.add_disk(&root)?;
            Ok::<_, BackendError>((uuid, found, backend.disks()))
        });
        let refused = |error: BackendError| ManagerError::DiskRefused { message: error.message };
        let (uuid, found, disks) = opened.await.map_err(refused)?;
        let was_known = self.world.disk_view_of(&uuid).is_some();
        let opened =
            OpenedDisk { uuid: uuid.clone(), path, disks, found, opened_unix_s: unix_now_s() };
        let answer = self.command(Command::AddDisk(Box::new(opened))).await;
        if answer.is_err() && !was_known {
            self.backend.forget_disk(&uuid);
        }
        answer
    }

    /// A command whose records can't be stored leaves no trace.
    async fn command(&mut self, mut command: Command) -> Result<Answer, ManagerError> {
        let wants_room = matches!(
            command,
            Command::Create(_)
                | Command::Fetch(..)
                | Command::Attach(_)
                | Command::CreateVolume(_)
                | Command::AttachVolume(_)
        );
        if wants_room {
            self.look_at_disks().await;
        }
        if let Command::Delete { name, sessions } = &mut command {
            *sessions = self.exporter.sessions(name);
        }
        self.see_sessions();
        let before = self.world.clone();
        let (outcome, actions) = self.world.command(self.now(), command)?;
        if let Err(error) = self.save_first(&actions).await {
            self.world = before;
            return Err(error.into());
        }
        let answer = match outcome {
            Outcome::Image(name, is_new) => {
                self.world.image(&name).map(|image| Answer::Image(Box::new(image), is_new))
            }
            Outcome::Attachment(id, is_new) => {
                self.world.attachment(&id).map(|a| Answer::Attachment(Box::new(a), is_new))
            }
            Outcome::Volume(name, is_new) => {
                self.world.volume(&name).map(|v| Answer::Volume(Box::new(v), is_new))
            }
            Outcome::Disk(disk, is_new) => {
                self.world.disk_view_of(&disk).map(|disk| Answer::Disk(Box::new(disk), is_new))
            }
            Outcome::Class(_, applied) => Some(Answer::Class(applied)),
            Outcome::Done => None,
        };
        self.perform(actions);
        Ok(answer.unwrap_or(Answer::Done))
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::SaveImage(_)
                | Action::SaveAttachment(_)
                | Action::ForgetImage(_)
                | Action::ForgetAttachment(_)
                | Action::SaveVolume(_)
                | Action::ForgetVolume(_)
                | Action::SaveClass(_)
                | Action::ForgetClass(_)
                | Action::SaveSettings(_)
                | Action::SaveDisk(_) => {}
                Action::ForgetDisk(disk) => self.backend.forget_disk(&disk),
                Action::ApplySettings(settings) => self.backend.set_settings(settings),
                Action::Start(task, generation) => {
                    tracing::info!(worker = %task.worker, disk = %task.id.disk, "worker starts");
                    self.start_worker(*task, generation, |backend, task, reporter| {
                        backend.start(task, reporter)
                    });
                }
                Action::Scrub(task, generation) => {
                    tracing::info!(worker = %task.worker, disk = %task.id.disk, "scrub starts");
                    self.start_worker(*task, generation, |backend, task, reporter| {
                        backend.scrub(task, reporter)
                    });
                }
                Action::ForgetView(copy) => self.backend.forget_view(&copy),
                Action::DismissReaders => {
                    self.backend.dismiss_readers("the node has failed (a drill)")
                }
                Action::Kill(copy) => {
                    if let Some((.., worker)) = self.workers.get(&copy) {
                        worker.abort();
                    }
                }
                Action::Cancel(copy) => {
                    if let Some((_, cancel, _)) = self.workers.get(&copy) {
                        cancel.send_replace(true);
                    }
                }
                Action::Steer(copy, steering) => self.backend.steer(&copy, steering),
                Action::Remove(copy) => {
                    let backend = self.backend.clone();
                    self.tasks.spawn_blocking(move || {
                        let result = backend.remove(&copy).map_err(|e| e.message);
                        Some(Event::Removed(copy, result))
                    });
                }
                Action::Publish(chain) => {
                    self.open(chain, |exporter, chain| exporter.publish(chain));
                }
                Action::Stream(chain, prefetch) => {
                    self.open(chain, |exporter, chain| exporter.stream(chain, prefetch));
                }
                Action::Withdraw(name) => self.exporter.withdraw(&name),
                Action::Announce(change) => self.announce(change),
            }
        }
    }

    fn open(
        &mut self,
        chain: Vec<Link>,
        open: impl FnOnce(&dyn Exporter, &[Link]) -> Result<(), BackendError> + Send + 'static,
    ) {
        let exporter = self.exporter.clone();
        self.tasks.spawn_blocking(move || {
            let result = open(&*exporter, &chain).map_err(|e| (e.class, e.message));
            chain.into_iter().next().map(|top| Event::Published(top.copy, result))
        });
    }

    fn start_worker(
        &mut self,
        task: CopyTask,
        generation: u64,
        start: impl FnOnce(&dyn Backend, CopyTask, Reporter) -> WorkerHandle,
    ) {
        let copy = task.id.clone();
        let reporter = Reporter::new(copy.clone(), generation, self.reports_tx.clone());
        let (cancel, join) = start(&*self.backend, task, reporter.clone()).into_parts();
        self.workers.insert(copy, (generation, cancel, join.abort_handle()));
        self.tasks.spawn(async move {
            if let Err(error) = join.await
                && !error.is_cancelled()
            {
                tracing::error!(%error, "a worker died");
            }
            // In the same channel as its reports, so that it comes after them.
            reporter.ended();
            None
        });
    }

    /// Cancels the workers and waits until they, and all blocking work, have ended.
    async fn stop(&mut self) {
        for (_, cancel, _) in self.workers.values() {
            cancel.send_replace(true);
        }
        while self.tasks.join_next().await.is_some() {}
    }
}

/// The event that a task has ended with, if any.
fn of_task(done: Result<Option<Event>, tokio::task::JoinError>) -> Option<Event> {
    done.unwrap_or_else(|error| {
        tracing::error!(%error, "a task of the manager died");
        None
    })
}

/// All records of a kind; what is known of them goes to the others.
fn list<T: serde::de::DeserializeOwned>(
    catalog: &dyn Catalog,
    kind: Kind,
    revisions: &mut Revisions,
    key: impl Fn(&T) -> String,
) -> Result<Vec<T>, CatalogError> {
    Ok(known(kind, list_as(catalog, kind)?, revisions, key))
}

fn known<T>(
    kind: Kind,
    all: Vec<(T, Stored)>,
    revisions: &mut Revisions,
    key: impl Fn(&T) -> String,
) -> Vec<T> {
    let of = |(record, stored): &(T, Stored)| ((kind, key(record)), Known::of(stored));
    revisions.extend(all.iter().map(of));
    all.into_iter().map(|(record, _)| record).collect()
}

/// Runs what blocks on a thread that may. A panic there goes on here.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
