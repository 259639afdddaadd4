//! Promise: other file systems than ext4 are written as well, and where one can share blocks, a
//! file of the same disk is brought in without copying.
//!
//! Small XFS and btrfs on loop devices; needs root to mount them.

use std::path::Path;
use std::process::Command;

use crate::control_support::{BEDPLATE, clean, stderr};
use crate::daemon::Daemon;
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

#[test]
fn a_copy_for_a_second_disk_of_one_file_system_shares_the_blocks_of_the_first() {
    let bytes = content(LEN, 57);
    let served = bytes.clone();
    each(|name, mount| {
        let served = served.clone();
        let server = FaultServer::start(move |request| Reply::ranged(request, &served, "\"v\""));
        let temp = tempfile::tempdir().unwrap();
        let roots = ["one", "two"].map(|disk| mount.join(disk));
        let daemon = Daemon::start(temp.path(), |command| {
            for root in &roots {
                std::fs::create_dir(root).unwrap();
                command.arg("--disk").arg(root);
            }
        });
        let disks = daemon.ask(&["disks", "--json"]);
        let disks: Vec<serde_json::Value> =
            disks.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let uuid = |n: usize| disks[n]["uuid"].as_str().unwrap();
        let url = format!("{}/x", server.url);
        let bring_in =
            |disk| daemon.ask(&["create", &url, "--name", "x", "--disk", disk, "--wait"]);
        bring_in(uuid(1));
        let (before, asked) = (used_bytes(mount), server.requests().len());
        bring_in(uuid(2));
        assert_eq!(server.requests().len(), asked, "{name}: the source is not asked again");
        let more = used_bytes(mount).saturating_sub(before);
        assert!(more < 4 * MIB, "{name}: {more} more bytes are used");
        let images = roots[1].join("backing-images").read_dir().unwrap();
        let copy = images.map(|entry| entry.unwrap().path().join("backing")).next().unwrap();
        assert!(std::fs::read(copy).unwrap() == bytes, "{name}");
    });
}
