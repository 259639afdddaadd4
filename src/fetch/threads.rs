//! Work that blocks, beside tasks that must not.
//!
//! Why: a task that waits for the disk holds up every other task of its thread.
//! Never: loses a panic: it goes on in whoever waits.

/// Runs `work` on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Runs work that waits for the disk, and borrows, without holding up the other tasks of this
/// thread.
pub(crate) fn in_place<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    if Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread {
        tokio::task::block_in_place(work)
    } else {
        // Such a runtime has no other thread to hand its tasks to.
        work()
    }
}
