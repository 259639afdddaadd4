//! The threads that decode clusters ahead of, and beside, those who read them.
//!
//! Why: a cluster takes a hundred times as long to decode as to copy, and clusters do not depend on
//! each other: whoever wants several should have all cores at work.
//! How: one pool for the process, with a thread less than there are cores: who reads decodes too.
//! Jobs are taken one by one from one queue, so that nobody waits for a share of somebody else.
//! Never: outgrows the cores, or is started before anything is compressed.
//! Start at [`together`].

use std::sync::{LazyLock, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Cores of this machine that this process may use, asked for once: the answer is in files.
pub(super) fn cores() -> usize {
    static CORES: LazyLock<usize> =
        LazyLock::new(|| std::thread::available_parallelism().map_or(1, usize::from));
    *CORES
}

static POOL: LazyLock<Option<ThreadPool>> = LazyLock::new(|| {
    let pool = ThreadPoolBuilder::new()
        .num_threads(cores().saturating_sub(1).max(1))
        .thread_name(|n| format!("decode-{n}"))
        .build();
    pool.inspect_err(|error| tracing::warn!(%error, "clusters are decoded on one core")).ok()
});

/// Does all `jobs`, on this thread, which begins with the last, and on those of the pool, which begin
/// with the first: who decodes ahead of this reader comes from there too, and they meet once. Of the pool's
/// threads `taken` are at something else that takes long: they are not waited for.
///
/// # Errors
/// The first error that was met; jobs that were not begun by then are left undone.
pub(super) fn together<J: Send, E: Send>(
    jobs: Vec<J>,
    taken: usize,
    work: impl Fn(J) -> Result<(), E> + Sync,
) -> Result<(), E> {
    // A lone job is this thread's own; the pool is not even started for it.
    if jobs.len() < 2 {
        return jobs.into_iter().try_for_each(work);
    }
    let count = jobs.len() - 1;
    let (queue, failed) = (Mutex::new(jobs.into_iter()), Mutex::new(None));
    let take = |last: bool| {
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        if last { queue.next_back() } else { queue.next() }
    };
    let run = |last: bool| {
        while let Some(job) = take(last) {
            if let Err(error) = work(job) {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                while take(last).is_some() {}
            }
        }
    };
    match &*POOL {
        None => run(true),
        Some(pool) => pool.in_place_scope(|scope| {
            for _ in 0..pool.current_num_threads().saturating_sub(taken).min(count) {
                scope.spawn(|_| run(false));
            }
            run(true);
        }),
    }
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Does `work` some time, on the pool.
pub(super) fn later(work: impl FnOnce() + Send + 'static) {
    if let Some(pool) = &*POOL {
        pool.spawn(work);
    }
}

/// On a thread of the pool, between two steps of something long: what somebody waits for goes first.
pub(super) fn let_others() {
    let _done_one_or_none = rayon::yield_now();
}

/// Does `work` some time, on one thread beside the pool: what nobody waits for must not stand before
/// what somebody does.
pub(super) fn beside(work: impl FnOnce() + Send + 'static) {
    static BESIDE: LazyLock<Option<ThreadPool>> = LazyLock::new(|| {
        let name = |_| "decode-hint".to_owned();
        let pool = ThreadPoolBuilder::new().num_threads(1).thread_name(name).build();
        pool.inspect_err(|error| tracing::warn!(%error, "hints of readers are ignored")).ok()
    });
    if let Some(pool) = &*BESIDE {
        pool.spawn(work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn every_job_is_done_once() {
        for count in [0_u64, 1, 2, 1000] {
            let sum = AtomicU64::new(0);
            let done = together((0..count).collect(), 0, |n| {
                sum.fetch_add(n + 1, Ordering::Relaxed);
                Ok::<_, ()>(())
            });
            assert_eq!((done, sum.into_inner()), (Ok(()), count * (count + 1) / 2));
        }
    }

    #[test]
    fn a_lone_job_is_done_on_this_thread() {
        let done_on = Mutex::new(None);
        let done = together(vec![()], 0, |()| {
            *done_on.lock().unwrap() = Some(std::thread::current().id());
            Err::<(), _>("its own error")
        });
        assert_eq!(done, Err("its own error"));
        assert_eq!(done_on.into_inner().unwrap(), Some(std::thread::current().id()));
    }

    #[test]
    fn an_error_ends_it_and_is_the_result() {
        let done = AtomicU64::new(0);
        let result = together((0..10_000).collect(), 0, |n| {
            done.fetch_add(1, Ordering::Relaxed);
            if n == 5 { Err("five") } else { Ok(()) }
        });
        assert_eq!(result, Err("five"));
        assert!(done.into_inner() < 10_000);
    }

    #[test]
    fn jobs_may_borrow() {
        let mut bytes = vec![0_u8; 1000];
        let jobs: Vec<&mut [u8]> = bytes.chunks_mut(7).collect();
        together(jobs, 0, |part| {
            part.fill(1);
            Ok::<_, ()>(())
        })
        .unwrap();
        assert!(bytes.iter().all(|&byte| byte == 1));
    }

    #[test]
    fn who_is_at_something_long_does_what_others_wait_for() {
        let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        // On every thread of the pool.
        for _ in 0..cores() {
            let done = std::sync::Arc::clone(&done);
            later(move || {
                while !done.load(Ordering::Relaxed) {
                    let_others();
                }
            });
        }
        for _ in 0..20 {
            let sum = AtomicU64::new(0);
            let work = |n| {
                sum.fetch_add(n, Ordering::Relaxed);
                Ok::<_, ()>(())
            };
            together((0..50).collect(), 0, work).unwrap();
            assert_eq!(sum.into_inner(), 49 * 50 / 2);
        }
        done.store(true, Ordering::Relaxed);
    }
}
