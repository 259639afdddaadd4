//! A real guest: a Debian kernel under QEMU's TCG, which reads its disk to the end.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use sha2::{Digest, Sha256};

use crate::control_support::BEDPLATE;
use crate::guest_support::{INIT_HEAD, Kernel, Qemu, VIRTIO_DISK};
use crate::nbd_support::{have, patterned, run};

const INIT: &str = r"
echo GUEST ro $(cat /sys/block/vda/ro) sectors $(cat /sys/block/vda/size)
echo GUEST serial $(cat /sys/block/vda/serial)
echo x | dd of=/dev/vda bs=1 count=1 conv=notrunc 2> /dev/null && echo GUEST has written
dd if=/dev/vda of=/dev/null bs=1M count=4 2> /dev/null
echo GUEST half
sha256sum < /dev/vda | sed 's/^/GUEST sha256 /'
sync
poweroff -f
";

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

#[test]
fn a_debian_guest_reads_its_disk_to_the_end_although_its_server_is_killed_meanwhile() {
    if !have(&["qemu-img"]) {
        return;
    }
    let Some(kernel) = Kernel::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let expected = patterned(48 * 1024 * 1024);
    let (raw, image) = (dir.path().join("d.raw"), dir.path().join("guest.qcow2"));
    crate::nbd_support::write_sparse(&raw, &expected);
    let (from, to) = (raw.to_str().unwrap(), image.to_str().unwrap());
    run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", from, to]);
    let init = format!("{INIT_HEAD}{INIT}");
    let initramfs = kernel.initramfs(dir.path(), &VIRTIO_DISK, &init);
    let socket = dir.path().join("s");
    let mut export = Export::start(&image, &socket);
    let chardev = format!("socket,id=c,path={},reconnect=1", socket.display());
    let qemu = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-cpu", "max", "-m", "256", "-smp", "2", "-nodefaults"])
        .args(["-machine", "q35,memory-backend=mem", "-display", "none", "-no-reboot"])
        .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
        .args(["-chardev", &chardev, "-device", "vhost-user-blk-pci,chardev=c,num-queues=2"])
        .args(["-serial", "stdio", "-append", "console=ttyS0 panic=-1 quiet"])
        .arg("-kernel")
        .arg(kernel.image)
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
