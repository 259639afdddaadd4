//! Sessions: one at a time, leases, ends and restarts.

use std::io::Read;
use std::os::unix::net::UnixStream;

use bedplate::serve::{Exports, ServeError};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::client::{ALL, KIB, MIB, TestServer, Vm, WRITE, bind, until};
use crate::nbd_support::patterned;

#[test]
fn a_second_frontend_is_refused_at_once_and_the_first_goes_on() {
    let (server, _dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    for _ in 0..3 {
        let mut second = UnixStream::connect(server.socket()).unwrap();
        let mut nothing = Vec::new();
        // It sees the end and does not hang; the deadline is the test's own.
        let _end_or_reset = second.read_to_end(&mut nothing);
        assert!(nothing.is_empty());
        assert_eq!(vm.read(0, 0, 4096), patterned(1024 * 1024)[..4096]);
    }
    drop(vm);
    server.until_free();
    Vm::start(&server.socket(), ALL, 1).read(0, 0, 512);
}

#[test]
fn an_image_is_in_use_while_a_frontend_is_connected_and_not_after() {
    let (server, _dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    let vm = Vm::start(&server.socket(), ALL, 1);
    let refused = server.exports.remove("disk").unwrap_err();
    assert!(matches!(refused, ServeError::InUse { connections: 1, .. }), "{refused}");
    drop(vm);
    server.until_free();
    server.exports.remove("disk").unwrap();
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0, "there is no such image");
}

#[test]
fn an_export_that_is_closed_hangs_up_its_frontend() {
    let (server, _dir) = TestServer::of_bytes(&patterned(1024 * 1024));
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    vm.read(0, 0, 512);
    server.exports.close("disk").unwrap();
    server.until_free();
    assert!(vm.frontend.get_features().is_err());
}

#[test]
fn a_queue_that_is_stopped_and_given_again_goes_on_where_it_was() {
    let expected = patterned(1024 * 1024);
    let (server, _dir) = TestServer::of_bytes(&expected);
    let mut vm = Vm::start(&server.socket(), ALL, 2);
    for round in 0..10_u16 {
        for queue in 0..2 {
            assert!(vm.read(queue, 16, 4096) == expected[8192..12_288]);
            assert_eq!(vm.frontend.get_vring_base(queue).unwrap(), u32::from(round + 1));
            // What is asked while it stands is answered when it goes on.
            let at = MIB + queue as u64 * 8 * MIB;
            vm.head(at, 0, 0);
            vm.chain(queue, 0, &[(at, 16, 0), (at + 4096, 512, WRITE), (at + 64, 1, WRITE)]);
            vm.frontend.set_vring_enable(queue, false).unwrap();
            vm.give(queue);
        }
    }
}

#[test]
fn memory_that_moves_is_followed() {
    let expected = patterned(1024 * 1024);
    let (server, _dir) = TestServer::of_bytes(&expected);
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    vm.read(0, 0, 4096);
    // Two regions instead of one; a buffer lies across their border.
    let user = crate::client::USER;
    vm.share(&[(0, 32 * MIB, user, 0), (32 * MIB, 32 * MIB, user + 32 * MIB, 32 * MIB)]);
    let (head, status, data) = (MIB, MIB + 64, 32 * MIB - 1536);
    vm.head(head, 0, 8);
    let parts = [(head, 16, 0), (data, 4096, WRITE), (status, 1, WRITE)];
    assert_eq!(vm.ask(0, &parts, status), (0, 4097));
    assert!(vm.peek(data, 4096) == expected[4096..8192]);
}

#[test]
fn requests_that_a_dead_server_left_are_answered_by_the_next_one() {
    let expected = patterned(4 * 1024 * 1024);
    let (mut server, dir) = TestServer::of_bytes(&expected);
    let mut vm = Vm::start(&server.socket(), ALL, 1);
    for sector in 0..5 {
        vm.read(0, sector, 512);
    }
    let place = |n: u16| MIB + u64::from(n) * 64 * KIB;
    for n in 0..20_u16 {
        let at = place(n);
        vm.head(at, 0, u64::from(n) * 8);
        vm.chain(0, n * 3, &[(at, 16, 0), (at + 4096, 4096, WRITE), (at + 64, 1, WRITE)]);
    }
    // The server goes at any moment of these: some are answered, some are not.
    (0..20).for_each(|n| vm.make(0, n * 3));
    vm.kick(0);
    server.stop();
    drop(std::mem::replace(&mut server, TestServer::of(&dir.path().join("d.raw"))));
    let memory = vm.memory.try_clone().unwrap();
    let mut next = Vm::connect_with(&server.socket(), ALL, memory);
    next.share(&[(0, crate::client::MEMORY, crate::client::USER, 0)]);
    next.queues = std::mem::take(&mut vm.queues);
    // As QEMU does, which asks the dead one for its base in vain: from the index of answers.
    next.give(0);
    for n in 0..20_u16 {
        assert_eq!(next.answer(0), (u32::from(n * 3), 4097));
        let from = usize::from(n) * 4096;
        assert!(next.peek(place(n) + 4096, 4096) == expected[from..from + 4096], "{n}");
    }
    assert!(next.read(0, 80, 4096) == expected[40_960..45_056]);
}

#[test]
fn a_socket_is_removed_with_its_server_and_a_dead_ones_is_replaced() {
    let (mut server, dir) = TestServer::of_bytes(&patterned(64 * 1024));
    let socket = server.socket();
    let live = bedplate::serve::vhost_user::Server::bind(
        &socket,
        std::sync::Arc::new(Exports::new()),
        "disk",
        bedplate::serve::vhost_user::Limits::default(),
    );
    assert!(matches!(live, Err(ServeError::Live { .. })));
    server.stop();
    assert!(!socket.exists());
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(socket.exists(), "of a dead server");
    let exports = std::sync::Arc::clone(&server.exports);
    let again = bind(&socket, &exports);
    let stopper = again.stopper();
    let thread = std::thread::spawn(move || again.run());
    let mut vm = Vm::start(&socket, ALL, 1);
    vm.read(0, 0, 512);
    stopper.stop();
    thread.join().unwrap().unwrap();
    until("the hang-up", || vm.frontend.get_features().is_err());
    drop(dir);
}
