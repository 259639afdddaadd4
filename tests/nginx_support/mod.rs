//! A real nginx that serves one file, can lose it, change it and slow down; ended with the test.

#![allow(dead_code, reason = "each test file uses a part")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// True if there is an nginx; else says why the test proves nothing.
pub fn have_nginx() -> bool {
    let found = Command::new("nginx").arg("-v").stderr(Stdio::null()).status();
    let found = found.is_ok_and(|status| status.success());
    assert!(found || std::env::var_os("REQUIRE_TOOLS").is_none(), "nginx is required");
    if !found {
        println!("SKIPPED: nginx is not installed");
    }
    found
}

pub struct Nginx {
    pub url: String,
    dir: tempfile::TempDir,
    child: Child,
    port: u16,
}

impl Nginx {
    /// Serves `bytes`.
    pub fn start(bytes: &[u8]) -> Self {
        Self::start_with(|path| std::fs::write(path, bytes).unwrap())
    }

    /// Serves the file that `make` makes.
    pub fn start_with(make: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let root = dir.path().join("files");
        std::fs::create_dir(&root).unwrap();
        make(&root.join("a.img"));
        configure(dir.path(), port, "");
        let config = dir.path().join("nginx.conf");
        let mut command = Command::new("nginx");
        command.arg("-c").arg(config).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        // An answer, and not only a connection: before it has workers it loses a signal to reload.
        while !answers(port) {
            std::thread::yield_now();
        }
        Self { url: format!("http://127.0.0.1:{port}/a.img"), dir, child, port }
    }

    pub fn file(&self) -> std::path::PathBuf {
        self.dir.path().join("files/a.img")
    }

    /// The file is gone: 404.
    pub fn hide(&self) {
        std::fs::rename(self.file(), self.file().with_extension("hidden")).unwrap();
    }

    pub fn show(&self) {
        std::fs::rename(self.file().with_extension("hidden"), self.file()).unwrap();
    }

    /// Another file, of another time.
    pub fn replace(&self, bytes: &[u8]) {
        std::fs::write(self.file(), bytes).unwrap();
        let file = std::fs::File::open(self.file()).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    }

    /// A KiB a second.
    pub fn crawl(&self) {
        self.reload("limit_rate 1k;", "slow");
    }

    /// As fast as it can.
    pub fn run(&self) {
        self.reload("", "fast");
    }

    /// So many MiB a second for each connection.
    pub fn pace(&self, mib: u32) {
        self.reload(&format!("limit_rate {mib}m;"), "paced");
    }

    fn reload(&self, more: &str, word: &str) {
        configure(self.dir.path(), self.port, &format!("{more} add_header X-Is {word};"));
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", "HUP", &pid]).status().unwrap().success());
        // Old workers go on for a moment.
        loop {
            let url = format!("http://127.0.0.1:{}/", self.port);
            let output = Command::new("curl").args(["-sI", &url]).output().unwrap();
            if String::from_utf8_lossy(&output.stdout).contains(&format!("X-Is: {word}")) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Bytes of all bodies that were sent so far.
    pub fn sent_bytes(&self) -> u64 {
        let log = std::fs::read_to_string(self.dir.path().join("access.log")).unwrap();
        log.lines().map(|line| line.split(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// First bytes of the ranges that were asked for, by requests that have ended.
    pub fn starts(&self) -> Vec<u64> {
        let log = std::fs::read_to_string(self.dir.path().join("access.log")).unwrap();
        let ranges = log.lines().filter_map(|line| line.split_once(" bytes=")?.1.split_once('-'));
        ranges.map(|(start, _)| start.parse().unwrap()).collect()
    }
}

fn answers(port: u16) -> bool {
    let asked = TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| {
        stream.write_all(b"HEAD / HTTP/1.0\r\n\r\n")?;
        stream.read_exact(&mut [0])
    });
    asked.is_ok()
}

fn configure(dir: &Path, port: u16, more: &str) {
    let conf = format!(
        "daemon off; pid {dir}/pid; error_log {dir}/error.log;\n\
         user root;\n\
         events {{ worker_connections 64; }}\n\
         http {{ log_format sent '$body_bytes_sent $http_range'; access_log {dir}/access.log sent;\n\
         client_body_temp_path {dir}/t; proxy_temp_path {dir}/t; fastcgi_temp_path {dir}/t;\n\
         uwsgi_temp_path {dir}/t; scgi_temp_path {dir}/t;\n\
         server {{ listen 127.0.0.1:{port}; root {dir}/files; {more}\n\
         location = / {{ return 204; }} }} }}\n",
        dir = dir.display()
    );
    std::fs::write(dir.join("nginx.conf"), conf).unwrap();
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let pid = self.child.id().to_string();
        let _ended = Command::new("kill").args(["-s", "TERM", &pid]).status();
        let _ended = self.child.wait();
    }
}
