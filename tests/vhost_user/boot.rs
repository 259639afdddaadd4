//! A real guest: a Debian kernel under QEMU's TCG, which reads its disk to the end.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use sha2::{Digest, Sha256};

use crate::control_support::BEDPLATE;
use crate::nbd_support::{have, patterned, run};

/// In the order in which they are needed; what a kernel has built in is not there.
const MODULES: [&str; 6] = [
    "virtio.ko",
    "virtio_ring.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci.ko",
    "virtio_blk.ko",
];

const INIT: &str = r"#!/bin/busybox sh
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
echo GUEST ro $(cat /sys/block/vda/ro) sectors $(cat /sys/block/vda/size)
echo GUEST serial $(cat /sys/block/vda/serial)
echo x | dd of=/dev/vda bs=1 count=1 conv=notrunc 2> /dev/null && echo GUEST has written
dd if=/dev/vda of=/dev/null bs=1M count=4 2> /dev/null
echo GUEST half
sha256sum < /dev/vda | sed 's/^/GUEST sha256 /'
sync
poweroff -f
";

/// A kernel and its modules: this machine's, else Debian's from its mirror, kept for the next run.
fn kernel() -> Option<(PathBuf, PathBuf)> {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest-kernel");
    find_kernel(Path::new("/")).or_else(|| find_kernel(&kept)).or_else(|| {
        download(&kept);
        find_kernel(&kept)
    })
}

fn find_kernel(root: &Path) -> Option<(PathBuf, PathBuf)> {
    let boot = std::fs::read_dir(root.join("boot")).ok()?;
    boot.filter_map(Result::ok).find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let modules = root.join("lib/modules").join(name.strip_prefix("vmlinuz-")?);
        modules.is_dir().then(|| (entry.path(), modules))
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

fn make_initramfs(dir: &Path, modules: &Path) -> PathBuf {
    let root = dir.join("root");
    for name in ["bin", "proc", "sys", "dev"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    let busybox = run("sh", &["-c", "command -v busybox"]);
    std::fs::copy(busybox.trim(), root.join("bin/busybox")).unwrap();
    let all = run("find", &[modules.to_str().unwrap(), "-name", "virtio*.ko*"]);
    let mut list = String::new();
    for module in MODULES {
        let found = all.lines().find(|path| {
            let name = Path::new(path).file_name().unwrap().to_str().unwrap();
            name == module || name == format!("{module}.xz")
        });
        let Some(found) = found else { continue };
        let to = root.join(module);
        if Path::new(found).extension().is_some_and(|extension| extension == "xz") {
            let command = format!("xz -dc '{found}' > '{}'", to.display());
            run("sh", &["-c", &command]);
        } else {
            std::fs::copy(found, &to).unwrap();
        }
        writeln!(list, "{module}").unwrap();
    }
    std::fs::write(root.join("modules"), list).unwrap();
    std::fs::write(root.join("init"), INIT).unwrap();
    let archive = dir.join("initramfs");
    let command = format!(
        "cd '{}' && chmod 755 init && find . | busybox cpio -o -H newc > '{}'",
        root.display(),
        archive.display()
    );
    run("sh", &["-c", &command]);
    archive
}

/// `bedplate export --vhost-user`, killed when dropped.
struct Export(Child, #[expect(dead_code, reason = "kept open")] BufReader<ChildStdout>);

impl Export {
    fn start(image: &Path, socket: &Path) -> Self {
        let mut child = Command::new(BEDPLATE)
            .arg("export")
            .arg(image)
            .arg("--vhost-user")
            .arg(socket)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = String::new();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        said.read_line(&mut first).unwrap();
        assert!(first.contains("virtual"), "{first}");
        // Who cannot say how it is used ends.
        Self(child, said)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

#[test]
fn a_debian_guest_reads_its_disk_to_the_end_although_its_server_is_killed_meanwhile() {
    if !have(&["qemu-system-x86_64", "qemu-img", "dpkg"]) {
        return;
    }
    // It knows no --version.
    if !Command::new("busybox").arg("true").status().is_ok_and(|status| status.success()) {
        assert!(std::env::var_os("REQUIRE_TOOLS").is_none(), "busybox is required");
        println!("SKIPPED: busybox is not installed");
        return;
    }
    let Some((kernel, modules)) = kernel() else {
        assert!(std::env::var_os("REQUIRE_TOOLS").is_none(), "a kernel is required");
        println!("SKIPPED: no kernel in /boot, and none to be had from the mirror");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let expected = patterned(48 * 1024 * 1024);
    let (raw, image) = (dir.path().join("d.raw"), dir.path().join("guest.qcow2"));
    crate::nbd_support::write_sparse(&raw, &expected);
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", from, to]);
    let (initramfs, socket) = (make_initramfs(dir.path(), &modules), dir.path().join("s"));
    let mut export = Export::start(&image, &socket);
    let chardev = format!("socket,id=c,path={},reconnect=1", socket.display());
    let qemu = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-cpu", "max", "-m", "256", "-smp", "2", "-nodefaults"])
        .args(["-machine", "q35,memory-backend=mem", "-display", "none", "-no-reboot"])
        .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
        .args(["-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=c,num-queues=2"])
        .args(["-serial", "stdio", "-append", "console=ttyS0 panic=-1 quiet"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn();
    let mut qemu = Qemu(qemu.unwrap());
    let mut said = Vec::new();
    for line in BufReader::new(qemu.0.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let Some(at) = line.find("GUEST ") else { continue };
        let word = line.trim_end()[at + 6..].to_owned();
        if word == "half" {
            // The kernel has the beginning already; all the rest comes from the next server.
            drop(export);
            export = Export::start(&image, &socket);
        }
        said.push(word);
    }
    drop(export);
    let mut digest = String::new();
    for byte in Sha256::digest(&expected) {
        write!(digest, "{byte:02x}").unwrap();
    }
    let wanted = [
        format!("ro 1 sectors {}", expected.len() / 512),
        "serial guest".to_owned(),
        "half".to_owned(),
        format!("sha256 {digest}  -"),
    ];
    assert_eq!(said, wanted);
}
