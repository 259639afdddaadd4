//! What arrives turns out wrong, or to be of another version: no reader gets a mixture.

use serde_json::json;

use bedplate::replica::{Mode, Options, Replica, ReplicaError};

use crate::control_support::Daemon;
use crate::nbd_support::patterned;
use crate::origin::{MIB, Origin, attach, nbd, socket, state, wait_attachment};

const LEN: usize = 24 << 20;

#[test]
fn a_wrong_digest_is_told_to_who_has_read_already() {
    let bytes = patterned(LEN);
    let origin = Origin::start(bytes.clone());
    let daemon = Daemon::start();
    let held = attach(&daemon, &origin, &json!({"sha256": "ab".repeat(32)}));
    let mut wire = nbd(&daemon);
    assert!(wire.read_structured(0, 10 * MIB, 4096) == bytes[10 << 20..(10 << 20) + 4096]);
    let options = Options { mode: Mode::Mapped, ..Options::default() };
    let replica = Replica::attach(socket(&daemon, "replica.sock"), "img", options).unwrap();
    let mut buf = vec![0; 4096];
    replica.read_at(&mut buf, 10 * MIB).unwrap();
    origin.open(&daemon, "img");
    let told = wait_attachment(&daemon, held["id"].as_str().unwrap(), "failed");
    assert!(told["message"].as_str().unwrap().contains("SHA-256 is"), "{told}");
    // The session is hung up, and what a reader was handed says that nothing is there any more.
    assert_eq!(wire.closed(), Vec::<u8>::new());
    match replica.read_at(&mut buf, 10 * MIB).unwrap_err() {
        ReplicaError::Refused { .. } | ReplicaError::Engine { .. } => {}
        other => panic!("{other}"),
    }
}

#[test]
fn another_version_of_the_source_is_another_file() {
    let (old, mut new) = (patterned(LEN), patterned(LEN));
    new.iter_mut().for_each(|byte| *byte ^= 0x55);
    let origin = Origin::start(old.clone());
    let daemon = Daemon::start();
    attach(&daemon, &origin, &json!({}));
    let mut wire = nbd(&daemon);
    assert!(wire.read_structured(0, 10 * MIB, 4096) == old[10 << 20..(10 << 20) + 4096]);
    {
        let mut source = origin.source.lock().unwrap();
        (source.bytes, source.etag) = (new.clone(), "\"two\"".to_owned());
    }
    origin.open(&daemon, "img");
    daemon.wait_for("img", "ready");
    // The old session has ended; a new one has the new bytes, all of them.
    assert_eq!(wire.closed(), Vec::<u8>::new());
    let mut wire = nbd(&daemon);
    for (at, part) in (0..).step_by(1 << 20).zip(new.chunks(1 << 20)) {
        assert!(wire.read_structured(0, at, 1 << 20) == part, "{at}");
    }
}

#[test]
fn an_image_of_unknown_length_is_waited_for() {
    let bytes = patterned(3 << 20);
    let server = crate::fault_server::FaultServer::start(move |_| {
        crate::fault_server::Reply::whole(&bytes).in_chunks()
    });
    let daemon = Daemon::start();
    let image = json!({"name": "img", "url": format!("{}/disk.img", server.url)});
    daemon.curl("POST", "/v1/images", Some(&image.to_string()));
    crate::origin::stream(&daemon);
    assert_eq!(state(&daemon), "ready", "only then it can be read");
}
