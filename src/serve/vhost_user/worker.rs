//! The thread of one queue.
//!
//! Why: a request is answered fastest by whoever looks for it, and a slow disk must hold up one queue
//! and nobody else's.
//! How: all requests that wait are taken, served in order and answered one by one; the guest is told
//! once for all of them. Before the thread sleeps it looks for the next request for a while, if
//! requests have come that fast lately. Whatever a frontend changes, the thread is ended first and
//! begun again after: it shares nothing that changes.
//! Never: answers out of order, spins for a guest that is idle, or outlives its session.
//! Start at [`Worker::start`].

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::{Errno, ReadWriteFlags};

use super::chain::Chain;
use super::device::Device;
use super::limits::MAX_BATCH;
use super::request::{Disk, Request, Unserved};
use super::ring::{Place, Ring, RingFault};
use crate::map::GuestMemory;
use crate::serve::{Attachment, CounterValues, Export, Via};

/// Enough for a read of a compressed cluster; only touched pages cost memory.
const STACK_BYTES: usize = 512 << 10;
/// How long a thread may take to end before what it may be blocked in is undone.
const PATIENCE: Duration = Duration::from_millis(50);
/// The shortest time that is worth looking.
const SHORTEST_LOOK: Duration = Duration::from_micros(2);
/// Looks between two looks at the clock.
const LOOKS: u32 = 32;

/// Everything that a queue's thread needs.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) attachment: Arc<Attachment>,
    pub(super) device: Device,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) place: Place,
    pub(super) features: u64,
    /// Readable when the guest has a request.
    pub(super) kick: Arc<File>,
    /// To be written to when there are answers; without one the guest looks by itself.
    pub(super) call: Option<Arc<File>>,
    /// To be written to when the queue cannot go on.
    pub(super) err: Option<Arc<File>>,
    /// How long it looks for requests at most.
    pub(super) poll: Duration,
}

/// A running thread.
#[derive(Debug)]
pub(super) struct Worker {
    stop: Arc<Stop>,
    thread: JoinHandle<()>,
    call: Option<Arc<File>>,
    /// Where the next one is to go on; comes when the thread ends.
    ended: Receiver<Option<u16>>,
}

#[derive(Debug)]
struct Stop {
    asked: AtomicBool,
    /// Readable once it is asked.
    wake: OwnedFd,
}

impl Worker {
    /// Begins to serve a queue.
    ///
    /// # Errors
    /// The process is out of descriptors or threads.
    pub(super) fn start(index: u8, job: Job) -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stop = Arc::new(Stop { asked: AtomicBool::new(false), wake });
        let (ends, ended) = mpsc::channel();
        let (of_thread, call) = (Arc::clone(&stop), job.call.clone());
        let run = move || {
            let next = serve(&job, &of_thread, index);
            let _nobody_waits = ends.send(next);
        };
        let builder = std::thread::Builder::new().name(format!("vm-queue-{index}"));
        let thread = builder.stack_size(STACK_BYTES).spawn(run)?;
        Ok(Self { stop, thread, call, ended })
    }

    /// Ends it after the request that it is at, or in the middle of a long one, which it then does
    /// not answer. Returns where to go on, if it ever got that far.
    pub(super) fn stop(self) -> Option<u16> {
        self.stop.asked.store(true, Ordering::Relaxed);
        if let Err(errno) = rustix::io::write(&self.stop.wake, &1u64.to_ne_bytes()) {
            tracing::error!(%errno, "cannot wake up the thread of a queue");
        }
        let next = loop {
            match self.ended.recv_timeout(PATIENCE) {
                Ok(next) => break next,
                Err(RecvTimeoutError::Disconnected) => break None,
                // A frontend can fill its own eventfd, so that telling the guest blocks.
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(call) = &self.call {
                        empty(call);
                    }
                }
            }
        };
        if self.thread.join().is_err() {
            tracing::error!("the thread of a VM's queue panicked");
        }
        next
    }
}

/// Takes what is in an eventfd, and never waits.
fn empty(file: &File) {
    let mut count = [0; 8];
    let parts = &mut [IoSliceMut::new(&mut count)];
    // The offset of files that have none.
    let _nothing_in_it = rustix::io::preadv2(file, parts, u64::MAX, ReadWriteFlags::NOWAIT);
}

/// Serves until it is to stop; returns where to go on.
fn serve(job: &Job, stop: &Stop, index: u8) -> Option<u16> {
    let export = job.attachment.export();
    let fail = |fault: RingFault| {
        tracing::warn!(export = export.name(), queue = index, error = %fault, "a VM's queue stands");
        if let Some(err) = &job.err {
            let _nobody_to_tell = rustix::io::write(&**err, &1u64.to_ne_bytes());
        }
    };
    let mut ring = match Ring::new(&job.memory, job.place, job.features) {
        Ok(ring) => ring,
        Err(fault) => {
            fail(fault);
            return None;
        }
    };
    let disk = Disk { export, device: &job.device, memory: &job.memory, stop: &stop.asked };
    let mut queue = Queue { job, stop, batch: Batch::new(disk), patience: Duration::ZERO };
    if let Err(fault) = queue.run(&mut ring) {
        fail(fault);
    }
    Some(ring.answered())
}

/// Serves the requests that wait in a queue, at most `most`, on this thread, and tells nobody:
/// for whoever has a queue and no frontend. Returns where to go on, modulo 2^16.
///
/// # Errors
/// [`RingFault`]: the queue cannot be, or cannot go on.
pub fn drain(
    export: &Export,
    memory: &GuestMemory,
    place: Place,
    features: u64,
    most: usize,
) -> Result<u16, RingFault> {
    let (stop, device) = (AtomicBool::new(false), Device::of(export, 1));
    let mut ring = Ring::new(memory, place, features)?;
    let mut batch = Batch::new(Disk { export, device: &device, memory, stop: &stop });
    let mut done = 0;
    while done < most {
        let waiting = ring.waiting()?;
        if waiting == 0 {
            break;
        }
        done += batch.take(&mut ring, usize::from(waiting))?;
        batch.serve(&mut ring, |_| Ok(()))?;
    }
    Ok(ring.answered())
}

/// Requests that are taken together; the chains are used again.
struct Batch<'a> {
    disk: Disk<'a>,
    chains: Vec<Chain>,
    requests: Vec<Request>,
}

impl<'a> Batch<'a> {
    fn new(disk: Disk<'a>) -> Self {
        Self { disk, chains: Vec::new(), requests: Vec::new() }
    }

    /// Takes requests of which so many wait; returns how many it took.
    fn take(&mut self, ring: &mut Ring<'_>, waiting: usize) -> Result<usize, RingFault> {
        let Self { disk, chains, requests } = self;
        let count = waiting.min(MAX_BATCH);
        chains.resize_with(count.max(chains.len()), Chain::default);
        requests.clear();
        for chain in chains.iter_mut().take(count) {
            let request = match ring.take(chain)? {
                Ok(()) => disk.parse(chain),
                Err(bad) => {
                    tracing::debug!(?bad, "a VM's request is none");
                    Request::Mute
                }
            };
            requests.push(request);
        }
        Ok(count)
    }

    /// Serves what was taken, and calls `tell` after what a disk was waited for; false if it is to
    /// stop.
    fn serve(
        &mut self,
        ring: &mut Ring<'_>,
        tell: impl Fn(&mut Ring<'_>) -> Result<(), RingFault>,
    ) -> Result<bool, RingFault> {
        let begun = Instant::now();
        let mut sum = CounterValues::default();
        let mut result = Ok(true);
        let mut hinted = false;
        if let Some(recorder) = self.disk.export.tracing().recorder() {
            for request in &self.requests {
                if let Request::Read { at, len_bytes } = *request {
                    recorder.note(at, len_bytes);
                }
            }
        }
        for (number, (chain, request)) in self.chains.iter().zip(&self.requests).enumerate() {
            let is_cold = !self.disk.is_resident(*request);
            if is_cold && !hinted {
                // So that a disk sees all of them at once.
                self.requests.iter().skip(number).for_each(|request| self.disk.hint(*request));
                hinted = true;
            }
            let served = match self.disk.serve(chain, *request) {
                Ok(served) => served,
                Err(Unserved::Stopped) => {
                    result = Ok(false);
                    break;
                }
                Err(Unserved::NoStatus) => {
                    result = Err(RingFault::Memory);
                    break;
                }
            };
            sum.requests += 1;
            sum.bytes += served.image_bytes;
            sum.errors += u64::from(served.failed);
            result = ring.answer(chain.head, served.written_bytes).map(|()| true);
            if result.is_ok() && is_cold {
                result = tell(ring).map(|()| true);
            }
            if result.is_err() {
                break;
            }
        }
        self.disk.export.counters().add_batch(sum);
        self.disk.export.latency().record(Via::Vm, begun.elapsed(), sum.requests);
        result
    }
}

struct Queue<'a> {
    job: &'a Job,
    stop: &'a Stop,
    batch: Batch<'a>,
    /// How long it looks before it sleeps, now.
    patience: Duration,
}

impl Queue<'_> {
    fn is_to_stop(&self) -> bool {
        self.stop.asked.load(Ordering::Relaxed)
    }

    fn run(&mut self, ring: &mut Ring<'_>) -> Result<(), RingFault> {
        ring.ask_for_silence()?;
        while !self.is_to_stop() {
            let waiting = ring.waiting()?;
            if waiting > 0 {
                self.batch.take(ring, usize::from(waiting))?;
                let job = self.job;
                let served = self.batch.serve(ring, |ring| tell(job, ring));
                // Also if it was left in the middle: nobody else tells of what was answered.
                tell(job, ring)?;
                if !served? {
                    return Ok(());
                }
                continue;
            }
            if self.look(ring)? || ring.ask_to_be_told()? {
                continue;
            }
            self.sleep();
            ring.ask_for_silence()?;
        }
        Ok(())
    }

    /// Looks for a request as long as that has been worth it lately.
    fn look(&self, ring: &Ring<'_>) -> Result<bool, RingFault> {
        if self.patience.is_zero() {
            return Ok(false);
        }
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if ring.waiting()? > 0 {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if self.is_to_stop() || start.elapsed() >= self.patience {
                return Ok(false);
            }
        }
    }

    /// Waits for a request or a stop. Short sleeps are worth looking instead, long ones are not.
    fn sleep(&mut self) {
        let start = Instant::now();
        let mut both = [
            PollFd::new(&*self.job.kick, PollFlags::IN),
            PollFd::new(&self.stop.wake, PollFlags::IN),
        ];
        match rustix::event::poll(&mut both, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                tracing::error!(%errno, "cannot wait for a VM's requests");
                std::thread::sleep(PATIENCE);
            }
        }
        empty(&self.job.kick);
        let most = self.job.poll;
        self.patience = if start.elapsed() <= most {
            (self.patience * 2).max(SHORTEST_LOOK).min(most)
        } else {
            let half = self.patience / 2;
            if half < SHORTEST_LOOK { Duration::ZERO } else { half }
        };
    }
}

/// Tells the guest of answers, if it wants to know.
fn tell(job: &Job, ring: &mut Ring<'_>) -> Result<(), RingFault> {
    if ring.wants_to_be_told()?
        && let Some(call) = &job.call
    {
        // A full eventfd tells as well.
        let _told_already = rustix::io::write(&**call, &1u64.to_ne_bytes());
    }
    Ok(())
}
