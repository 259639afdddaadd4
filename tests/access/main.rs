//! Promise: an image is reached with what it takes, credentials go to its origin and nowhere else,
//! and nobody is led to an address where images are not.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![expect(clippy::cast_possible_truncation, reason = "test files are small")]

mod backup;
#[path = "../control_support/mod.rs"]
mod control_support;
mod credentials;
#[path = "../transfer/fault_server.rs"]
#[expect(dead_code, reason = "these tests use a part of it")]
mod fault_server;
mod places;
mod proxy;
mod s3;
mod tls;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use control_support::{BEDPLATE, clean, stderr, stdout};

/// The secret that every test looks for where it must not be.
pub const SECRET: &str = "hunter2-of-the-test";

/// Bytes of an image: `len` of them, none zero.
pub fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 7 % 251) as u8 + 1).collect()
}

/// The program, without the caller's proxies and cloud credentials.
pub fn program() -> Command {
    let mut command = Command::new(BEDPLATE);
    clean(&mut command);
    for (name, _) in std::env::vars() {
        if name.to_ascii_lowercase().ends_with("_proxy") || name.starts_with("AWS_") {
            command.env_remove(name);
        }
    }
    command
}

/// A directory for what is pulled and for files with secrets.
pub struct Place(tempfile::TempDir);

impl Place {
    /// A new one.
    pub fn empty() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    /// A file with this text; its path.
    pub fn file(&self, name: &str, text: &str) -> String {
        let path = self.dir().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// What is pulled.
    pub fn output(&self) -> PathBuf {
        self.dir().join("out.img")
    }

    /// `bedplate pull` with everything that it can say; the secret must not be in it.
    pub fn pull(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        let mut command = program();
        command.args(["pull", "-vv", "-o"]).arg(self.output()).args(args);
        let output = command.envs(env.iter().copied()).output().unwrap();
        for text in [stdout(&output), stderr(&output)] {
            assert!(!text.contains(SECRET) && !text.contains("X-Amz-Signature="), "{text}");
        }
        output
    }

    /// As [`Place::pull`]; it must bring in these bytes.
    pub fn pulled(&self, args: &[&str], env: &[(&str, &str)], bytes: &[u8]) {
        let output = self.pull(args, env);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        assert!(std::fs::read(self.output()).unwrap() == bytes, "other bytes");
        std::fs::remove_file(self.output()).unwrap();
    }

    /// As [`Place::pull`]; it must be refused, with these words.
    pub fn refused(&self, args: &[&str], env: &[(&str, &str)], words: &[&str]) {
        let output = self.pull(args, env);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{word}: {said}");
        }
    }
}

/// True if these tools are here. Without them a test says that it is skipped, or fails if
/// `REQUIRE_TOOLS` is set.
pub fn have(tools: &[(&str, &str)]) -> bool {
    for (tool, version) in tools {
        if Command::new(tool).arg(version).output().is_err() {
            println!("SKIPPED: {tool} is not installed");
            assert!(std::env::var_os("REQUIRE_TOOLS").is_none(), "{tool} is required");
            return false;
        }
    }
    true
}
