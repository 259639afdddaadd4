//! A guest boots to its login from an image of which most is still to come.

use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::control_support::Daemon;
use crate::guest_support::{EXT4, INIT_HEAD, Kernel, Qemu, VIRTIO_DISK, copy_busybox};
use crate::nbd_support::run;
use crate::nginx_support::{Nginx, have_nginx};
use crate::origin::stream;

/// Of the disk; at the rate below half of it takes more than a minute and a half.
const DISK: &str = "4G";
const RATE: u64 = 20_000_000;

/// From the initramfs to the disk.
const INIT: &str = r"
mount -t ext4 -o ro,noload /dev/vda /mnt || echo NO DISK
mount --move /dev /mnt/dev
exec switch_root /mnt /sbin/init
";

/// A root file system: busybox, a service that reads 24 MiB from all over the disk, and a login.
fn make_disk(path: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    for name in ["bin", "sbin", "etc/init.d", "proc", "sys", "dev", "tmp", "usr/lib"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    copy_busybox(&root.join("bin/busybox"));
    for name in ["bin/sh", "bin/login", "bin/mount", "bin/cat", "sbin/init", "sbin/getty"] {
        symlink("/bin/busybox", root.join(name)).unwrap();
    }
    let inittab = "::sysinit:/etc/init.d/rcS\nttyS0::respawn:/sbin/getty -L ttyS0 115200 vt100\n";
    let rcs = "#!/bin/sh\nmount -t proc proc /proc\n/bin/busybox cat /usr/lib/* > /dev/null\n";
    let files = [
        ("etc/inittab", inittab),
        ("etc/init.d/rcS", rcs),
        ("etc/passwd", "root::0:0::/:/bin/sh\n"),
        ("etc/hostname", "guest\n"),
    ];
    for (name, text) in files {
        std::fs::write(root.join(name), text).unwrap();
    }
    run("chmod", &["755", root.join("etc/init.d/rcS").to_str().unwrap()]);
    for number in 0..24_u8 {
        std::fs::write(root.join(format!("usr/lib/{number}")), vec![number; 1 << 20]).unwrap();
    }
    let (root, path) = (root.to_str().unwrap(), path.to_str().unwrap());
    run("mkfs.ext4", &["-q", "-F", "-d", root, path, DISK]);
}

#[test]
fn a_guest_is_at_its_login_while_less_than_half_of_its_image_is_here() {
    if !have_nginx() {
        return;
    }
    let Some(kernel) = Kernel::find() else { return };
    let nginx = Nginx::start_with(make_disk);
    let daemon = Daemon::start();
    let image = json!({"name": "img", "url": nginx.url}).to_string();
    assert_eq!(daemon.curl("POST", "/v1/images", Some(&image)).0, 201);
    let set_rate = |rate: u64| {
        let change = json!({"rate_limit_bytes_per_s": rate}).to_string();
        assert_eq!(daemon.curl("PATCH", "/v1/images/img", Some(&change)).0, 200);
    };
    set_rate(RATE);
    let held = stream(&daemon);
    let uri = held["nbd"]["uri"].as_str().unwrap();

    let dir = tempfile::tempdir().unwrap();
    let modules = [&VIRTIO_DISK[..], &EXT4[..]].concat();
    let initramfs = kernel.initramfs(dir.path(), &modules, &format!("{INIT_HEAD}{INIT}"));
    let drive = format!("file={uri},format=raw,if=virtio,readonly=on");
    let qemu = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-cpu", "max", "-m", "256", "-smp", "2", "-nodefaults"])
        .args(["-machine", "q35", "-display", "none", "-no-reboot", "-drive", &drive])
        .args(["-serial", "stdio", "-append", "console=ttyS0 panic=-1 quiet"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut qemu = Qemu(qemu.unwrap());
    let (mut said, mut screen) = (Vec::new(), qemu.0.stdout.take().unwrap());
    while !String::from_utf8_lossy(&said).contains("login:") {
        let mut some = [0; 4096];
        let count = screen.read(&mut some).unwrap();
        assert!(count > 0, "the guest has ended: {}", String::from_utf8_lossy(&said));
        said.extend_from_slice(&some[..count]);
    }
    let copy = daemon.get("/v1/images/img")["copies"][0].clone();
    let number = |key: &str| copy[key].as_u64().unwrap();
    let (done, total) = (number("bytes_done"), number("bytes_total"));
    assert!(done * 2 < total, "{copy}");
    println!("at its login after {}% of the image", done * 100 / total);
    assert_eq!(copy["state"], "in-progress");
    drop(qemu);

    set_rate(0);
    let image = daemon.wait_for("img", "ready");
    let sum = run("sha256sum", &[nginx.file().to_str().unwrap()]);
    assert_eq!(image["digests"]["sha256"].as_str(), sum.split(' ').next());
}
