//! Promise: other file systems than ext4 are written as well, and where one can share blocks, a
//! file of the same disk is brought in without copying.
//!
//! Small XFS and btrfs on loop devices; needs root to mount them.

use std::path::Path;
use std::process::Command;

use crate::control_support::{BEDPLATE, clean, stderr};
use crate::fault_server::{FaultServer, Reply};
use crate::loop_disk::LoopDisk;
use crate::{content, sha256};

const MIB: u64 = 1 << 20;
const LEN: usize = 40 << 20;

fn each(test: impl Fn(&str, &Path)) {
    for mkfs in [&["mkfs.xfs", "-q", "-m", "reflink=1"][..], &["mkfs.btrfs", "-q"]] {
        if let Some(disk) = LoopDisk::new(mkfs, 512 * MIB) {
            test(mkfs[0], &disk.mount);
        }
    }
}

fn pull(source: &str, output: &Path, more: &[&str]) {
    let mut command = Command::new(BEDPLATE);
    let command = clean(&mut command).args(["-q", "pull", source, "-o"]).arg(output).args(more);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

/// Bytes that are taken on the disk, with all that was written there.
fn used_bytes(mount: &Path) -> u64 {
    let root = std::fs::File::open(mount).unwrap();
    rustix::fs::syncfs(&root).unwrap();
    let stat = rustix::fs::fstatvfs(&root).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

#[test]
fn a_file_of_the_same_disk_shares_its_blocks() {
    each(|name, mount| {
        let (bytes, from) = (content(LEN, 55), mount.join("from.img"));
        std::fs::write(&from, &bytes).unwrap();
        let before = used_bytes(mount);
        let output = mount.join("out.img");
        pull(from.to_str().unwrap(), &output, &["--sha256", &sha256(&bytes)]);
        assert!(std::fs::read(&output).unwrap() == bytes, "{name}");
        let more = used_bytes(mount).saturating_sub(before);
        assert!(more < 4 * MIB, "{name}: {more} more bytes are used");
    });
}

#[test]
fn each_file_system_gets_the_right_bytes_and_its_holes() {
    let bytes = content(LEN, 56);
    let (served, digest) = (bytes.clone(), sha256(&bytes));
    let server = FaultServer::start(move |request| Reply::ranged(request, &served, "\"v\""));
    let url = format!("{}/x", server.url);
    each(|name, mount| {
        for (file, more) in [("a", &["--sha256", &digest][..]), ("b", &["--no-digest"])] {
            let (output, before) = (mount.join(file), used_bytes(mount));
            pull(&url, &output, more);
            assert!(std::fs::read(&output).unwrap() == bytes, "{name}, {file}");
            // A quarter of it is zeroes.
            let more = used_bytes(mount).saturating_sub(before);
            assert!(more < LEN as u64 * 4 / 5, "{name}, {file}: {more} bytes are used");
        }
    });
}
