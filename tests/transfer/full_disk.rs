//! Promise: a disk that fills up in the middle costs nothing that was durable, and one that is too
//! small is refused before the first byte.
//!
//! A small ext4 on a loop device; needs root to mount it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::fault_server::{Cut, FaultServer, Reply};
use crate::loop_disk::LoopDisk;
use crate::{content, engine, sha256};
use bedplate::fetch::{Class, Expect, Progress, Source, SourceUrl};
use bedplate::import::{ImportError, Layout, PullRequest, Pulled, pull};
use bedplate::ring::{Choice, probe};

const LEN: usize = 24 << 20;

/// An ext4 of 64 MiB.
struct SmallDisk(LoopDisk);

impl SmallDisk {
    fn new() -> Option<Self> {
        LoopDisk::new(&["mkfs.ext4", "-q"], 64 << 20).map(Self)
    }

    fn pull(
        &self,
        server: &FaultServer,
        sink: Choice,
        bytes: &[u8],
    ) -> Result<Pulled, ImportError> {
        let request = PullRequest {
            source: Source::new(SourceUrl::parse(&format!("{}/x", server.url)).unwrap())
                .expecting(Expect::parse(Some(&sha256(bytes)), None).unwrap()),
            layout: Layout::AsIs,
            output: self.0.mount.join("out.img"),
        };
        let engine = engine(&self.0.mount, sink);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(pull(&engine, &request, &Arc::new(Progress::default())))
    }
}

/// Bytes of the blocks that the files below `dir` have.
fn allocated_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = dir.read_dir() else { return 0 };
    let metadata = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.ok()?.path();
        Some((path.symlink_metadata().ok()?, path))
    };
    let bytes_of = |(metadata, path): (std::fs::Metadata, PathBuf)| match metadata.is_dir() {
        true => allocated_bytes(&path),
        false => metadata.blocks() * 512,
    };
    entries.filter_map(metadata).map(bytes_of).sum()
}

/// Takes all the room that is left on the disk.
fn fill_up(mount: &Path) {
    use std::io::Write;
    let mut filler = std::fs::File::create(mount.join("filler")).unwrap();
    for piece in [1 << 20, 4096] {
        while filler.write_all(&vec![1; piece]).and_then(|()| filler.sync_data()).is_ok() {}
    }
}

#[test]
fn a_disk_that_fills_up_keeps_what_is_durable_and_resumes() {
    for sink in [Choice::Auto, Choice::Threads, Choice::Uncached] {
        let Some(disk) = SmallDisk::new() else { return };
        if let Err(reason) = probe(&disk.0.mount, sink) {
            println!("SKIPPED: {reason}");
            continue;
        }
        let bytes = content(LEN, 20);
        let (served, mount) = (bytes.clone(), disk.0.mount.clone());
        let filled = Mutex::new(false);
        let server = FaultServer::start(move |request| {
            let reply = Reply::ranged(request, &served, "\"a\"");
            if request.index == 0 {
                return reply.cut(Cut::Close(8 << 20));
            }
            // The rest is asked for: by now the disk is full.
            let mut filled = filled.lock().unwrap();
            if !std::mem::replace(&mut *filled, true) {
                // What has arrived has its blocks before it is written; a quarter of it is zeroes.
                while allocated_bytes(&mount) < 6 << 20 {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                fill_up(&mount);
            }
            reply
        });
        let error = disk.pull(&server, sink, &bytes).unwrap_err();
        assert_eq!(error.class(), Class::Retry, "{}", error.report());
        assert!(error.report().contains("disk full at byte 0x"), "{}", error.report());
        assert!(!disk.0.mount.join("out.img").exists());
        std::fs::remove_file(disk.0.mount.join("filler")).unwrap();
        let asked = server.requests().len();
        disk.pull(&server, sink, &bytes).unwrap();
        assert!(std::fs::read(disk.0.mount.join("out.img")).unwrap() == bytes);
        let resumed = server.requests()[asked].range.clone().unwrap();
        assert!(resumed.start >= 7 << 20, "went on at byte {}", resumed.start);
    }
}

#[test]
fn an_image_that_cannot_fit_is_refused_before_its_first_byte() {
    let Some(disk) = SmallDisk::new() else { return };
    let server = FaultServer::start(|_| {
        let mut reply = Reply::whole(b"").cut(Cut::Stall(0));
        reply.headers = vec![format!("Content-Length: {}", 100 << 20), "ETag: \"x\"".into()];
        reply
    });
    let error = disk.pull(&server, Choice::Auto, b"").unwrap_err();
    assert!(error.report().contains("100.0 MiB needed"), "{}", error.report());
    let names: Vec<_> = disk.0.mount.read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["lost+found"], "no litter");
}
