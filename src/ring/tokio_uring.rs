//! The sink on the crate `tokio-uring`: its runtime on a thread of its own.
//!
//! Why: asked for by name. It is about half as fast as [`super::UringSink`], and the crate has no
//! maintainer, so it is built only with the feature `tokio-uring` and used only on demand.
//! How: writes go to the thread by one channel and come back by another; there each is a task.
//! Never: ends the runtime while a write is in flight: the kernel may still read its buffer.
//! Start at [`TokioUringSink::new`].

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use ::tokio_uring::buf::IoBuf;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::{Buf, Done, Sink, WriteOp};

/// Writes in flight at most, as in the other ring.
const DEPTH: usize = 8;

type Ended = (WriteOp, io::Result<()>);

/// O_DIRECT writes on a tokio-uring runtime.
#[derive(Debug)]
pub struct TokioUringSink {
    ops: Option<UnboundedSender<WriteOp>>,
    ended: mpsc::Receiver<Ended>,
    thread: Option<JoinHandle<()>>,
    count: usize,
}

impl TokioUringSink {
    /// A runtime on a new thread.
    ///
    /// # Errors
    /// io_uring is refused, or no thread can be started.
    pub fn new() -> io::Result<Self> {
        let (ops, queue) = unbounded_channel();
        let (report, ended) = mpsc::channel();
        let (started, ready) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("disk-uring".into()).spawn(move || {
            match tokio_uring::Runtime::new(&tokio_uring::builder()) {
                Ok(runtime) => {
                    let _ = started.send(Ok(()));
                    runtime.block_on(serve(queue, report));
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
        ready.recv().unwrap_or_else(|_| Err(io::Error::other("the runtime did not start")))?;
        Ok(Self { ops: Some(ops), ended, thread: Some(thread), count: 0 })
    }
}

/// Runs each write as a task; returns when the sink is gone and every task has ended.
async fn serve(mut queue: UnboundedReceiver<WriteOp>, report: mpsc::Sender<Ended>) {
    let mut tasks = std::collections::VecDeque::new();
    while let Some(op) = queue.recv().await {
        tasks.retain(|task: &tokio::task::JoinHandle<()>| !task.is_finished());
        let report = report.clone();
        tasks.push_back(tokio_uring::spawn(async move {
            let _ = report.send(write(op).await);
        }));
    }
    for task in tasks {
        let _ = task.await;
    }
}

async fn write(mut op: WriteOp) -> Ended {
    // A descriptor of its own: the crate closes what it is given.
    let file: File = match op.file.try_clone() {
        Ok(file) => file,
        Err(error) => return (op, Err(error)),
    };
    let file = tokio_uring::fs::File::from_std(file);
    let result = loop {
        let part = Part { buf: Arc::clone(&op.buf), range: op.range.clone() };
        let (written, _part) = file.write_at(part, op.at.0).submit().await;
        match written {
            Ok(0) => break Err(io::Error::from(io::ErrorKind::WriteZero)),
            Ok(count) if op.advance(count) => break Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => break Err(e),
        }
    };
    let _ = file.close().await;
    (op, result)
}

/// The bytes of a write that are still to be written.
struct Part {
    buf: Arc<Buf>,
    range: std::ops::Range<usize>,
}

// SAFETY: the pointer is into a memory mapping that the Arc keeps alive and that does not move
// with `Part`; the range was checked against it, all of it is initialised, and nobody writes to it.
unsafe impl IoBuf for Part {
    fn stable_ptr(&self) -> *const u8 {
        self.buf.padded()[self.range.clone()].as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.range.len()
    }

    fn bytes_total(&self) -> usize {
        self.range.len()
    }
}

impl Sink for TokioUringSink {
    fn push(&mut self, op: WriteOp) -> Result<(), WriteOp> {
        let Some(ops) = &self.ops else { return Err(op) };
        if self.count >= DEPTH {
            return Err(op);
        }
        ops.send(op).map_err(|back| back.0)?;
        self.count += 1;
        Ok(())
    }

    fn reap(&mut self, min: usize, done: &mut Done<'_>) -> io::Result<()> {
        // A caller whose push came back would otherwise push and reap for ever.
        if self.count == 0 && self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
            return Err(io::Error::other("the thread of the ring has ended"));
        }
        let target = min.min(self.count);
        let mut reaped = 0;
        loop {
            let next = if reaped < target {
                let gone = |_| io::Error::other("the thread of the ring has ended");
                self.ended.recv().map_err(gone)?
            } else {
                let Ok(next) = self.ended.try_recv() else { return Ok(()) };
                next
            };
            reaped += 1;
            self.count -= 1;
            done(next.0, next.1);
        }
    }

    fn in_flight(&self) -> usize {
        self.count
    }

    fn direct(&self) -> bool {
        true
    }
}

impl Drop for TokioUringSink {
    fn drop(&mut self) {
        self.ops = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
