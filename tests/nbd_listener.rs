//! A server makes its socket with care, takes one over when it is given one, and cleans up.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod nbd_support;

use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::sync::Arc;

use bedplate::serve::Exports;
use bedplate::serve::nbd::{Limits, Server};
use nbd_support::{KIB, Wire};

fn bind(path: &std::path::Path) -> Result<Server, bedplate::serve::ServeError> {
    Server::bind(path, Arc::new(Exports::new()), Limits::default())
}

#[test]
fn a_socket_of_a_dead_server_is_replaced_and_of_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a dead server leaves its socket");
    let server = bind(&path).unwrap();
    let meta = std::fs::symlink_metadata(&path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777 & !0o660, 0, "nobody else may connect");
    let error = bind(&path).unwrap_err().to_string();
    assert!(error.contains("another server is listening"), "{error}");
    drop(server);
    assert!(!path.exists());
}

#[test]
fn what_is_not_a_dead_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let error = bind(&file).unwrap_err().to_string();
    assert!(error.contains("is not a socket"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let long = dir.path().join("x".repeat(120));
    let error = bind(&long).unwrap_err().to_string();
    assert!(error.contains("at most 107 bytes"), "{error}");
    // A successor's socket at the same path is not ours to remove.
    let path = dir.path().join("s");
    let server = bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _successor = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
}

#[test]
fn a_socket_that_was_passed_by_a_service_manager_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![0x33; 64 * KIB]).unwrap();
    let mut child = Command::new("sh")
        .args(["-c", "exec 3<&0; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\""])
        .args([env!("CARGO_BIN_EXE_bedplate"), "export", "--name", "passed"])
        .arg(&image)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut wire = Wire::connect(&path);
    wire.go("passed", false);
    assert_eq!(wire.read_simple(100, 10), [0x33; 10]);
    drop(wire);
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-s", "TERM", &pid]).status().unwrap().success());
    assert!(child.wait().unwrap().success());
    assert!(path.exists(), "an inherited socket belongs to who made it");
}
