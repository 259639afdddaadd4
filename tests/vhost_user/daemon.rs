//! The daemon's side: a VM is an attachment with a socket of its own, which outlives the daemon.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::client::{ALL, KIB, MEMORY, MIB, USER, Vm, WRITE, until};
use crate::control_support::{Daemon, raw_image, stdout};

fn start() -> (Daemon, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.raw");
    raw_image(&path, 4 << 20);
    let bytes = std::fs::read(&path).unwrap();
    let daemon = Daemon::start_in(dir, "");
    let url = format!("file://{}", daemon.dir.path().join("d.raw").display());
    let body = json!({ "name": "debian", "url": url }).to_string();
    let (status, said) = daemon.curl("POST", "/v1/images", Some(&body));
    assert_eq!(status, 201, "{said}");
    (daemon, bytes)
}

fn attach(daemon: &Daemon, label: &str) -> Value {
    let output = daemon.cli(&["--json", "attach", "debian", "--vm", "--reader", label]);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_str(&stdout(&output)).unwrap()
}

fn socket(held: &Value) -> PathBuf {
    Path::new(held["vm"]["socket"].as_str().unwrap()).to_owned()
}

#[test]
fn a_vm_is_attached_reads_and_is_detached() {
    let (daemon, bytes) = start();
    let held = attach(&daemon, "vm-7");
    assert_eq!(attach(&daemon, "vm-7")["id"], held["id"], "the same label is the same VM");
    let other = attach(&daemon, "vm-8");
    assert_ne!(socket(&other), socket(&held));
    let printed = stdout(&daemon.cli(&["attach", "debian", "--vm", "--reader", "vm-7"]));
    assert_eq!(Path::new(printed.trim()), socket(&held));
    let plain = stdout(&daemon.cli(&["attach", "debian", "--reader", "tool"]));
    assert!(plain.starts_with("nbd+unix:"), "{plain}");

    let (mut one, mut two) =
        (Vm::start(&socket(&held), ALL, 2), Vm::start(&socket(&other), ALL, 1));
    assert!(one.read(1, 8, 4096) == bytes[4096..8192]);
    assert!(two.read(0, 16, 4096) == bytes[8192..12_288]);
    assert_eq!(daemon.cli(&["delete", "debian"]).status.code(), Some(3), "it is in use");

    let id = held["id"].as_str().unwrap();
    assert!(daemon.cli(&["detach", id]).status.success());
    until("the socket to go", || !socket(&held).exists());
    until("the hang-up", || vhost::VhostBackend::get_features(&one.frontend).is_err());
    assert!(two.read(0, 24, 512) == bytes[12_288..12_800], "the other one goes on");
    assert!(socket(&other).exists());
}

#[test]
fn what_a_vm_asks_for_first_is_in_its_image_s_trace() {
    let (daemon, _) = start();
    let held = attach(&daemon, "vm-7");
    let mut vm = Vm::start(&socket(&held), ALL, 2);
    vm.read(0, 0, 512);
    assert_eq!(daemon.curl("POST", "/v1/images/debian/trace", None).0, 201);
    let unit: u32 = 64 << 10;
    for (queue, sector, len) in [(0, 2 * 2048, 512), (1, 128, 2 * unit), (0, 2 * 2048 + 1, 512)] {
        vm.read(queue, sector, len);
    }
    let (status, trace) = daemon.curl("DELETE", "/v1/images/debian/trace", None);
    assert_eq!((status, &trace["ranges"]), (200, &json!([[2 * MIB, unit], [unit, 2 * unit]])));
}

#[test]
fn a_vm_goes_on_after_the_daemon_was_killed_and_has_lost_no_request() {
    let (daemon, bytes) = start();
    let held = attach(&daemon, "vm-7");
    let mut vm = Vm::start(&socket(&held), ALL, 1);
    let place = |n: u16| MIB + u64::from(n) * 64 * KIB;
    let mut killed = Some(daemon);
    for round in 0..5_usize {
        vm.read(0, 0, 512);
        for n in 0..30_u16 {
            let at = place(n);
            vm.head(at, 0, u64::from(n) * 128);
            vm.poke(at + 64, &[0xee]);
            vm.chain(0, n * 3, &[(at, 16, 0), (at + 4096, 4096, WRITE), (at + 64, 1, WRITE)]);
            vm.make(0, n * 3);
            if n % 10 == 0 {
                vm.kick(0);
            }
        }
        let (_code, dir) = killed.take().unwrap().end("KILL");
        let again = Daemon::start_in(dir, "");
        // Bound anew at the same path, as soon as the image can be read.
        let front = |memory| Vm::connect_with(&socket(&held), ALL, memory);
        until("the socket", || socket_answers(&socket(&held)));
        let mut next = front(vm.memory.try_clone().unwrap());
        next.share(&[(0, MEMORY, USER, 0)]);
        next.queues = std::mem::take(&mut vm.queues);
        next.give(0);
        for n in 0..30_u16 {
            assert_eq!(next.answer(0), (u32::from(n * 3), 4097), "round {round}");
            let from = usize::from(n) * 65_536;
            assert!(next.peek(place(n) + 4096, 4096) == bytes[from..from + 4096]);
            assert_eq!(next.peek(place(n) + 64, 1), [0]);
        }
        vm = next;
        killed = Some(again);
    }
}

/// Whether who connects is not closed at once.
fn socket_answers(path: &Path) -> bool {
    use std::io::Read;
    let Ok(mut stream) = std::os::unix::net::UnixStream::connect(path) else { return false };
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_millis(50))).unwrap();
    // Nothing comes unasked: the end of the stream is a refusal, a timeout none.
    let refused = matches!(stream.read(&mut [0]), Ok(0));
    drop(stream);
    if !refused {
        // Our own session must be gone before the next.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    !refused
}
