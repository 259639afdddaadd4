//! What it takes to boot a guest: a kernel, its modules, and an initramfs with busybox.

#![allow(dead_code, reason = "each test file uses a part")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// Modules of a virtio disk, in the order in which they are needed; what a kernel has built in is not
/// there.
pub const VIRTIO_DISK: [&str; 6] = [
    "virtio.ko",
    "virtio_ring.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci.ko",
    "virtio_blk.ko",
];

/// Those of an ext4 file system.
pub const EXT4: [&str; 6] =
    ["crc16.ko", "libcrc32c.ko", "crc32c_generic.ko", "mbcache.ko", "jbd2.ko", "ext4.ko"];

/// A shell script's beginning: busybox, the usual mounts, and the modules.
pub const INIT_HEAD: &str = r"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec > /dev/console 2>&1
for pass in 1 2 3; do
    for module in $(cat /modules); do insmod /$module 2> /dev/null; done
done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
";

/// A QEMU that is ended with the test.
pub struct Qemu(pub Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

/// A kernel.
pub struct Kernel {
    pub image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// This machine's, else Debian's from its mirror, kept for the next run. `None`, having said why,
    /// if there is none, or no QEMU or busybox; where they are demanded, the test fails.
    pub fn find() -> Option<Self> {
        let is_demanded = std::env::var_os("REQUIRE_TOOLS").is_some();
        // Busybox knows no --version.
        for (tool, arg) in [("qemu-system-x86_64", "--version"), ("busybox", "true")] {
            if !Command::new(tool).arg(arg).output().is_ok_and(|output| output.status.success()) {
                assert!(!is_demanded, "{tool} is required");
                println!("SKIPPED: {tool} is not installed");
                return None;
            }
        }
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-kernel");
        let found = find_kernel(Path::new("/")).or_else(|| find_kernel(&kept)).or_else(|| {
            download(&kept);
            find_kernel(&kept)
        });
        if found.is_none() {
            assert!(!is_demanded, "a kernel is required");
            println!("SKIPPED: no kernel in /boot, and none to be had from the mirror");
        }
        found
    }

    /// An initramfs in `dir` that runs `init`, a script, with these modules in it.
    pub fn initramfs(&self, dir: &Path, modules: &[&str], init: &str) -> PathBuf {
        let root = dir.join("initramfs-root");
        for name in ["bin", "proc", "sys", "dev", "mnt"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        copy_busybox(&root.join("bin/busybox"));
        let all = output("find", &[self.modules.to_str().unwrap(), "-name", "*.ko*"]);
        let mut list = String::new();
        for &module in modules {
            let found = all.lines().find(|path| {
                let name = Path::new(path).file_name().unwrap().to_str().unwrap();
                name == module || name == format!("{module}.xz")
            });
            let Some(found) = found else { continue };
            let to = root.join(module);
            if Path::new(found).extension().is_some_and(|extension| extension == "xz") {
                output("sh", &["-c", &format!("xz -dc '{found}' > '{}'", to.display())]);
            } else {
                std::fs::copy(found, &to).unwrap();
            }
            writeln!(list, "{module}").unwrap();
        }
        std::fs::write(root.join("modules"), list).unwrap();
        std::fs::write(root.join("init"), init).unwrap();
        let archive = dir.join("initramfs");
        let command = format!(
            "cd '{}' && chmod 755 init && find . | busybox cpio -o -H newc > '{}'",
            root.display(),
            archive.display()
        );
        output("sh", &["-c", &command]);
        archive
    }
}

/// The static busybox.
pub fn copy_busybox(to: &Path) {
    std::fs::copy(output("sh", &["-c", "command -v busybox"]).trim(), to).unwrap();
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn find_kernel(root: &Path) -> Option<Kernel> {
    let boot = std::fs::read_dir(root.join("boot")).ok()?;
    boot.filter_map(Result::ok).find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let modules = root.join("lib/modules").join(name.strip_prefix("vmlinuz-")?);
        modules.is_dir().then(|| Kernel { image: entry.path(), modules })
    })
}

fn download(to: &Path) {
    let _was_there = std::fs::remove_dir_all(to);
    std::fs::create_dir_all(to).unwrap();
    let depends = Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]).output();
    let Ok(depends) = depends else { return };
    let text = String::from_utf8_lossy(&depends.stdout).into_owned();
    let name = text.split_whitespace().find(|word| word.starts_with("linux-image-6"));
    let Some(name) = name else { return };
    let got = Command::new("apt-get")
        .args(["-q", "-o", "Acquire::Retries=3", "-o", "Acquire::http::Timeout=60"])
        .args(["download", name])
        .current_dir(to)
        .output();
    let Ok(_) = got else { return };
    for entry in std::fs::read_dir(to).unwrap().filter_map(Result::ok) {
        if entry.path().extension().is_some_and(|extension| extension == "deb") {
            let _said = Command::new("dpkg").arg("-x").arg(entry.path()).arg(to).status();
        }
    }
}
