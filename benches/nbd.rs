//! The NBD server's own costs: parsing an option, and one read over a socket, there and back.
//!
//! Why: a change that costs a microsecond a request must show before it is merged.
//! How: the server runs in this process; the client is a plain blocking socket.
//! Start at `round_trips`. Comparisons with other servers need their tools and a quiet machine.
#![expect(clippy::unwrap_used, reason = "a benchmark may fail")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bedplate::disk::Sealed;
use bedplate::image::View;
use bedplate::serve::Exports;
use bedplate::serve::nbd::{Limits, Server};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const IMAGE_BYTES: usize = 64 << 20;

fn request(cookie: u64, offset: u64, len_bytes: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len_bytes.to_be_bytes());
    bytes
}

fn connect(path: &std::path::Path) -> UnixStream {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.read_exact(&mut [0; 18]).unwrap();
    socket.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk").unwrap();
    socket.read_exact(&mut [0; 10]).unwrap();
    socket
}

/// `depth` reads of `len_bytes` in one write, and all their simple replies.
fn burst(socket: &mut UnixStream, at: &mut u64, depth: u64, len_bytes: u32, reply: &mut [u8]) {
    let mut requests = Vec::with_capacity(28 * 64);
    for cookie in 0..depth {
        *at = (*at + 7 * u64::from(len_bytes)) % (IMAGE_BYTES as u64 - u64::from(len_bytes));
        requests.extend_from_slice(&request(cookie, *at & !4095, len_bytes));
    }
    socket.write_all(&requests).unwrap();
    socket.read_exact(reply).unwrap();
}

fn round_trips(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![0x5a; IMAGE_BYTES]).unwrap();
    let exports = Arc::new(Exports::new());
    let view = View::open(Sealed::open_path(&image).unwrap(), None).unwrap();
    exports.add("disk", Arc::new(view), "").unwrap();
    let path = dir.path().join("s");
    let server = Server::bind(&path, exports, Limits::default()).unwrap();
    let stopper = server.stopper();
    let thread = std::thread::spawn(move || server.run());
    let mut group = criterion.benchmark_group("nbd");
    for (name, depth, len_bytes) in
        [("read_4k_qd1", 1, 4096u32), ("read_4k_qd32", 32, 4096), ("read_256k_qd4", 4, 256 << 10)]
    {
        let mut socket = connect(&path);
        let mut reply = vec![0; (16 + len_bytes as usize) * usize::try_from(depth).unwrap()];
        let mut at = 0;
        group.throughput(Throughput::Bytes(depth * u64::from(len_bytes)));
        group.bench_function(name, |bencher| {
            bencher.iter(|| burst(&mut socket, &mut at, depth, len_bytes, &mut reply));
        });
    }
    group.bench_function("attach_and_first_read", |bencher| {
        let mut reply = vec![0; 16 + 4096];
        bencher.iter(|| burst(&mut connect(&path), &mut 0, 1, 4096, &mut reply));
    });
    group.finish();
    stopper.stop();
    thread.join().unwrap().unwrap();
}

criterion_group!(benches, round_trips);
criterion_main!(benches);
