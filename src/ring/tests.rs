//! Tests of the sinks against real files.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;

fn block(pool: &BufPool, byte: u8, len: usize) -> Arc<Buf> {
    let mut buf = pool.try_take().unwrap();
    buf.fill(&vec![byte; len], len);
    buf.pad();
    Arc::new(buf)
}

fn sinks() -> Vec<Box<dyn Sink>> {
    let mut sinks: Vec<Box<dyn Sink>> =
        vec![Box::new(ThreadSink::new()), Box::new(ThreadSink::uncached())];
    match UringSink::new() {
        Ok(ring) => sinks.push(Box::new(ring)),
        Err(error) => println!("SKIPPED: io_uring sink: {error}"),
    }
    #[cfg(feature = "tokio-uring")]
    match TokioUringSink::new() {
        Ok(ring) => sinks.push(Box::new(ring)),
        Err(error) => println!("SKIPPED: tokio-uring sink: {error}"),
    }
    sinks
}

fn target(direct: bool) -> Arc<File> {
    use rustix::fs::{Mode, OFlags};
    let dir = std::env::temp_dir();
    let extra = if direct { OFlags::DIRECT } else { OFlags::empty() };
    let fd =
        rustix::fs::open(&dir, OFlags::TMPFILE | OFlags::RDWR | extra, Mode::RUSR | Mode::WUSR)
            .unwrap();
    Arc::new(File::from(fd))
}

#[test]
fn every_write_is_reported_once_and_lands_where_it_should() {
    for mut sink in sinks() {
        let (pool, file) = (BufPool::new(4), target(sink.direct()));
        let mut tags = Vec::new();
        for index in 0..40u8 {
            // The pool is smaller than the number of writes: a buffer must come back to be used.
            while pool.in_use() == 4 {
                sink.reap(1, &mut |op, r| tags.push((op.tag, r.is_ok()))).unwrap();
            }
            let mut op = WriteOp {
                file: Arc::clone(&file),
                buf: block(&pool, index + 1, PAGE_BYTES * 2),
                range: PAGE_BYTES..PAGE_BYTES * 2,
                at: FileOffset(u64::from(index) * PAGE_BYTES as u64),
                tag: u64::from(index),
            };
            while let Err(back) = sink.push(op) {
                op = back;
                sink.reap(1, &mut |op, r| tags.push((op.tag, r.is_ok()))).unwrap();
            }
        }
        sink.reap(usize::MAX, &mut |op, r| tags.push((op.tag, r.is_ok()))).unwrap();
        tags.sort_unstable();
        assert_eq!(tags, (0..40).map(|t| (t, true)).collect::<Vec<_>>());
        assert_eq!(pool.in_use(), 0);
        let plain =
            File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*file)));
        let mut bytes = vec![0; PAGE_BYTES * 40];
        plain.unwrap().read_exact_at(&mut bytes, 0).unwrap();
        for (index, page) in bytes.chunks(PAGE_BYTES).enumerate() {
            assert!(page.iter().all(|&b| usize::from(b) == index + 1), "page {index}");
        }
    }
}

#[test]
fn a_full_ring_hands_the_write_back() {
    let Ok(mut sink) = UringSink::new() else {
        println!("SKIPPED: io_uring is refused here");
        return;
    };
    let (pool, file) = (BufPool::new(40), target(true));
    let mut accepted = 0;
    for tag in 0..40 {
        let buf = block(&pool, 1, PAGE_BYTES);
        let at = FileOffset(tag * PAGE_BYTES as u64);
        let op = WriteOp { file: Arc::clone(&file), buf, range: 0..PAGE_BYTES, at, tag };
        match sink.push(op) {
            Ok(()) => accepted += 1,
            Err(back) => assert_eq!(back.tag, tag),
        }
    }
    // Nothing was reaped, so only the depth was taken however fast the disk is.
    assert_eq!(accepted, 32);
    assert_eq!(sink.in_flight(), 32);
}

#[test]
fn dropping_a_busy_ring_gives_every_buffer_back() {
    let Ok(mut sink) = UringSink::new() else {
        println!("SKIPPED: io_uring is refused here");
        return;
    };
    let (pool, file) = (BufPool::new(8), target(true));
    for tag in 0..8 {
        let buf = block(&pool, 7, BLOCK_BYTES);
        let at = FileOffset(tag * BLOCK_BYTES as u64);
        let op = WriteOp { file: Arc::clone(&file), buf, range: 0..BLOCK_BYTES, at, tag };
        sink.push(op).unwrap();
    }
    drop(sink);
    assert_eq!(pool.in_use(), 0);
    assert_eq!(file.metadata().unwrap().len(), 8 * BLOCK_BYTES as u64);
}

#[test]
fn a_failed_write_is_reported_with_its_errno() {
    for mut sink in sinks() {
        let file = Arc::new(File::open("/proc/self/exe").unwrap());
        let pool = BufPool::new(1);
        let buf = block(&pool, 1, PAGE_BYTES);
        let op = WriteOp { file, buf, range: 0..PAGE_BYTES, at: FileOffset(0), tag: 9 };
        sink.push(op).unwrap();
        let mut seen = None;
        sink.reap(1, &mut |op, r| seen = Some((op.tag, r))).unwrap();
        let (tag, result) = seen.unwrap();
        assert_eq!((tag, result.unwrap_err().raw_os_error()), (9, Some(libc::EBADF)));
    }
}

#[test]
fn a_pool_never_gives_more_than_it_has() {
    let pool = BufPool::new(2);
    let (first, _second) = (pool.try_take().unwrap(), pool.try_take().unwrap());
    assert_eq!(pool.try_take().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(first);
    assert!(pool.try_take().is_ok());
}

#[test]
fn the_probe_names_its_choice() {
    let dir = std::env::temp_dir();
    assert_eq!(probe(&dir, Choice::Threads).unwrap().kind, SinkKind::Threads);
    let auto = probe(&dir, Choice::Auto).unwrap();
    assert_eq!(auto.reason.is_none(), auto.kind == SinkKind::Uring);
}

#[cfg(feature = "tokio-uring")]
#[test]
fn tokio_uring_gives_every_buffer_back_and_refuses_what_is_too_much() {
    let Ok(mut sink) = TokioUringSink::new() else {
        println!("SKIPPED: io_uring is refused here");
        return;
    };
    let (pool, file) = (BufPool::new(9), target(true));
    for tag in 0..9 {
        let buf = block(&pool, 7, BLOCK_BYTES);
        let at = FileOffset(tag * BLOCK_BYTES as u64);
        let op = WriteOp { file: Arc::clone(&file), buf, range: 0..BLOCK_BYTES, at, tag };
        assert_eq!(sink.push(op).is_ok(), tag < 8);
    }
    drop(sink);
    assert_eq!(pool.in_use(), 0);
    assert_eq!(file.metadata().unwrap().len(), 8 * BLOCK_BYTES as u64);
}

#[test]
fn tokio_uring_is_chosen_by_name_only_where_it_was_built() {
    let choice = "tokio-uring".parse::<Choice>();
    if cfg!(feature = "tokio-uring") {
        let probed = probe(&std::env::temp_dir(), choice.unwrap());
        assert!(probed.is_err() || probed.unwrap().kind == SinkKind::TokioUring);
    } else {
        assert!(choice.unwrap_err().contains("--features tokio-uring"));
    }
}

proptest! {
    #[test]
    fn data_runs_cover_exactly_the_pages_with_a_set_bit(
        pages in proptest::collection::vec(proptest::option::weighted(0.5, 0..PAGE_BYTES), 0..20),
        cut in 0..PAGE_BYTES,
    ) {
        let mut bytes = vec![0u8; pages.len() * PAGE_BYTES];
        for (index, set) in pages.iter().enumerate() {
            if let Some(at) = set { bytes[index * PAGE_BYTES + at] = 1; }
        }
        bytes.truncate(bytes.len().saturating_sub(cut));
        let mut covered = vec![false; bytes.len().div_ceil(PAGE_BYTES)];
        let mut last_end = None;
        for run in data_runs(&bytes) {
            prop_assert!(run.start % PAGE_BYTES == 0 && !run.is_empty());
            prop_assert!(last_end.is_none_or(|end| end < run.start), "runs are apart and in order");
            last_end = Some(run.end);
            covered[run.start / PAGE_BYTES..run.end.div_ceil(PAGE_BYTES)].fill(true);
        }
        for (index, page) in bytes.chunks(PAGE_BYTES).enumerate() {
            prop_assert_eq!(covered[index], page.iter().any(|&b| b != 0));
            prop_assert_eq!(is_zero(page), !covered[index]);
        }
    }
}
