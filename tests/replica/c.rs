//! The functions for C: the library is built, linked with a C program and with one in Go, and read
//! through.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::Digest;

use crate::nbd_support::{have, patterned, write_sparse};
use crate::server::TestServer;

const PROGRAM: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include "bedplate_replica.h"

int main(int argc, char **argv) {
  char message[512] = "";
  bedplate_replica *replica = NULL;
  if (argc != 4) return 2;
  if (bedplate_replica_attach(argv[1], "no-such", 0, 0, &replica, message, sizeof message) != -2) return 3;
  if (message[0] == 0) return 4;
  unsigned flags = atoi(argv[3]) ? BEDPLATE_REPLICA_MAPPED : 0;
  int error = bedplate_replica_attach(argv[1], argv[2], flags, 0, &replica, message, sizeof message);
  if (error) { fprintf(stderr, "%d %s\n", error, message); return 5; }
  uint64_t size = bedplate_replica_size(replica), at = 0;
  static unsigned char buf[100000];
  for (int round = 0; round < 2; round++) {
    for (at = 0; at < size;) {
      size_t len = size - at < sizeof buf ? size - at : sizeof buf;
      if (bedplate_replica_read_at(replica, buf, len, at)) return 6;
      if (round && fwrite(buf, 1, len, stdout) != len) return 7;
      at += len;
    }
  }
  struct bedplate_extent extent;
  int zeroes = 0;
  for (at = 0; at < size; at += extent.len_bytes) {
    if (bedplate_replica_extent_at(replica, at, UINT64_MAX, &extent)) return 8;
    zeroes += extent.kind == BEDPLATE_ZERO;
  }
  if (zeroes == 0 || at != size) return 9;
  if (bedplate_replica_read_at(replica, buf, 2, size - 1) != -22) return 10;
  if (bedplate_replica_read_at(NULL, buf, 2, 0) != -22) return 11;
  if (bedplate_replica_identity(replica, message, sizeof message) || message[0] != 'd') return 12;
  bedplate_replica_free(replica);
  bedplate_replica_free(NULL);
  return 0;
}
"#;

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stderr}", output.status);
    output.stdout
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Builds the library; where it is.
fn library() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("c-library");
    run(Command::new(env!("CARGO"))
        .current_dir(root())
        .args(["rustc", "--quiet", "--locked", "-p", "bedplate-replica", "--features", "capi"])
        .args(["--crate-type", "staticlib", "--target-dir"])
        .arg(&target));
    target.join("debug")
}

#[test]
fn a_c_program_reads_the_same_bytes() {
    if !have(&["cc"]) {
        return;
    }
    let (root, library) = (root(), library());
    let server = TestServer::start();
    let dir = server.dir.path();
    let (source, program) = (dir.join("read.c"), dir.join("read"));
    std::fs::write(&source, PROGRAM).unwrap();
    run(Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror", "-std=c11", "-o"])
        .args([&program, &source])
        .arg(library.join("libbedplate_replica.a"))
        .arg("-I")
        .arg(root.join("src/replica"))
        .args(["-lpthread", "-ldl", "-lm"]));
    let bytes = patterned(8 * 1024 * 1024 + 333);
    let path = dir.join("disk.raw");
    write_sparse(&path, &bytes);
    server.add("disk", &path);
    for mapped in ["0", "1"] {
        let found = run(Command::new(&program).arg(server.socket()).args(["disk", mapped]));
        assert!(found == bytes, "mapped: {mapped}");
    }
}

#[test]
fn a_go_program_reads_the_same_bytes_on_many_goroutines() {
    // It has no --version.
    if !Command::new("go").arg("version").output().is_ok_and(|output| output.status.success()) {
        assert!(std::env::var_os("REQUIRE_TOOLS").is_none(), "go is required");
        println!("SKIPPED: go is not installed");
        return;
    }
    let server = TestServer::start();
    let dir = server.dir.path();
    let program = dir.join("reader");
    run(Command::new("go")
        .current_dir(root().join("tools/go-reader"))
        .env("CGO_LDFLAGS", format!("-L{}", library().display()))
        .env("GOFLAGS", "-buildvcs=false")
        .env("GOCACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-cache"))
        .args(["build", "-o"])
        .arg(&program)
        .arg("."));
    let bytes = patterned(12 * 1024 * 1024 + 333);
    let path = dir.join("disk.raw");
    write_sparse(&path, &bytes);
    server.add("disk", &path);
    let mut digest = String::new();
    for byte in sha2::Sha256::digest(&bytes) {
        write!(digest, "{byte:02x}").unwrap();
    }
    for mode in [&["-readers", "8"][..], &["-mapped", "-readers", "8"]] {
        let said = run(Command::new(&program).args(mode).arg(server.socket()).arg("disk"));
        let said = String::from_utf8(said).unwrap();
        let begins = format!("size {}\nsha256 {digest}\ndata ", bytes.len());
        assert!(said.starts_with(&begins), "{mode:?}: {said}");
    }
    let refused = Command::new(&program).arg(server.socket()).arg("no-such").output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    assert!(said.contains("no-such") && said.contains("no such file or directory"), "{said}");
}
