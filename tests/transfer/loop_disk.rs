//! A small file system of its own, on a loop device; needs root to mount it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system, unmounted on drop.
pub struct LoopDisk {
    _temp: tempfile::TempDir,
    pub mount: PathBuf,
}

impl LoopDisk {
    /// Of `len` bytes, made by `mkfs`. `None`, with the reason said, where that is not permitted.
    pub fn new(mkfs: &[&str], len: u64) -> Option<Self> {
        let temp = tempfile::tempdir().unwrap();
        let (image, mount) = (temp.path().join("fs.img"), temp.path().join("mnt"));
        std::fs::File::create(&image).unwrap().set_len(len).unwrap();
        std::fs::create_dir(&mount).unwrap();
        let run = |program: &str, args: &[&Path]| {
            let status = Command::new(program).args(args).output();
            status.is_ok_and(|output| output.status.success())
        };
        let options: Vec<&Path> = mkfs[1..].iter().map(Path::new).chain([&*image]).collect();
        let made = run(mkfs[0], &options);
        if !made || !run("mount", &[Path::new("-o"), Path::new("loop"), &image, &mount]) {
            let root = rustix::process::geteuid().is_root();
            // A kernel without it could not have mounted it (a module would be loaded by now).
            let kind = mkfs[0].trim_start_matches("mkfs.");
            let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
            if made && !known.split_whitespace().any(|word| word == kind) {
                println!("SKIPPED: this kernel has no {kind}");
                return None;
            }
            assert!(
                !root || std::env::var_os("REQUIRE_TOOLS").is_none(),
                "{} and loop mounts must work for root",
                mkfs[0]
            );
            println!("SKIPPED: no {} loop mount here (root and loop devices are needed)", mkfs[0]);
            return None;
        }
        Some(Self { _temp: temp, mount })
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.mount).status();
    }
}
