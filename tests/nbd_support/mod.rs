//! What the NBD tests share: a server in this process, images, a client that speaks raw bytes,
//! and real tools.
//!
//! Why: the same server is driven by well-behaved tools and by hostile bytes.
//! How: [`TestServer`] runs the library's server on a thread; [`Wire`] builds each message by hand
//! with its own constants, so that a wrong constant of the server is not repeated here.
//! Never: sleeps, or passes when a tool is missing unless it says so.
//! Start at [`TestServer::start`].
#![allow(dead_code, reason = "each test file uses its own part of this")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread::JoinHandle;

use bedplate::disk::Sealed;
use bedplate::image::View;
use bedplate::serve::nbd::{Limits, Server};
use bedplate::serve::{Exports, ServeError, Stopper};

// Error numbers and option errors as the protocol has them.
pub const EPERM: u32 = 1;
pub const EINVAL: u32 = 22;
pub const EOVERFLOW: u32 = 75;
pub const ERR_INVALID: u32 = 0x8000_0003;

pub const KIB: usize = 1024;
pub const MIB: usize = 1024 * KIB;

/// A server on a socket in a directory of its own, stopped when dropped.
pub struct TestServer {
    pub dir: tempfile::TempDir,
    pub exports: Arc<Exports>,
    pub stopper: Stopper,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl TestServer {
    pub fn start() -> Self {
        Self::with_limits(Limits::default())
    }

    pub fn with_limits(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let exports = Arc::new(Exports::new());
        let server = Server::bind(&dir.path().join("s"), Arc::clone(&exports), limits).unwrap();
        let stopper = server.stopper();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { dir, exports, stopper, thread }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// Writes `bytes` to a file, sparse where they are zero, and exports it.
    pub fn add_raw(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(format!("{name}.raw"));
        write_sparse(&path, bytes);
        self.add_file(name, &path);
        path
    }

    pub fn add_file(&self, name: &str, path: &Path) {
        let view = View::open(Sealed::open_path(path).unwrap(), None).unwrap();
        self.exports.add(name, Arc::new(view), "a test image").unwrap();
    }

    pub fn connect(&self) -> Wire {
        Wire::connect(&self.socket())
    }

    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    /// Stops the server and returns what `run` returned.
    pub fn stop(&mut self) -> Result<(), ServeError> {
        self.stopper.stop();
        self.thread.take().unwrap().join().expect("the server does not panic")
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop().unwrap();
        }
    }
}

/// Writes 64 KiB blocks that are not all zero, and leaves holes for the others.
pub fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (index, block) in bytes.chunks(64 * KIB).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, (index * 64 * KIB) as u64).unwrap();
        }
    }
}

/// `len` bytes that differ everywhere, with holes: of each 4 blocks of 64 KiB one is zero, and
/// the second and third MiB are.
pub fn patterned(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0; len];
    for (index, block) in bytes.chunks_mut(64 * KIB).enumerate() {
        if index % 4 == 3 || (16..48).contains(&index) {
            continue;
        }
        for word in block.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
        }
    }
    bytes
}

/// True if all `tools` can be run; else says why the test proves nothing, or fails if the
/// environment demands them.
pub fn have(tools: &[&str]) -> bool {
    for tool in tools {
        if !command(tool).arg("--version").output().is_ok_and(|output| output.status.success()) {
            assert!(std::env::var_os("REQUIRE_TOOLS").is_none(), "{tool} is required");
            println!("SKIPPED: {tool} is not installed");
            return false;
        }
    }
    true
}

/// Runs a tool, and gives its standard output if it succeeds.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{out}\n{err}", output.status);
    out
}

pub fn output(program: &str, args: &[&str]) -> Output {
    command(program).args(args).output().unwrap()
}

/// A tool, found where the system has it first: nbdsh needs the system's Python, whose libnbd
/// bindings another Python on the path does not have.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:/bin:{path}"));
    command
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A client that says exactly what a test wants.
pub struct Wire(pub UnixStream);

/// A reply to an option: type and data.
pub type OptionReply = (u32, Vec<u8>);

/// One chunk of a structured reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub flags: u16,
    pub kind: u16,
    pub cookie: u64,
    pub payload: Vec<u8>,
}

impl Wire {
    /// Connects and reads the greeting; says nothing.
    pub fn connect(path: &Path) -> Self {
        let mut wire = Self(UnixStream::connect(path).unwrap());
        assert_eq!(wire.take(18), b"NBDMAGICIHAVEOPT\0\x03");
        wire
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn take_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    pub fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    pub fn take_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Waits for the server to close; what it sent before is returned.
    pub fn closed(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset is an end too: the server closed with bytes of ours unread.
        let _end_or_reset = self.0.read_to_end(&mut rest);
        rest
    }

    pub fn client_flags(&mut self) {
        self.send(&3u32.to_be_bytes());
    }

    pub fn option(&mut self, number: u32, data: &[u8]) {
        self.option_of_length(number, u32::try_from(data.len()).unwrap(), data);
    }

    pub fn option_of_length(&mut self, number: u32, len: u32, data: &[u8]) {
        self.send(b"IHAVEOPT");
        self.send(&number.to_be_bytes());
        self.send(&len.to_be_bytes());
        self.send(data);
    }

    pub fn option_reply(&mut self, number: u32) -> OptionReply {
        assert_eq!(self.take_u64(), 0x0003_e889_0455_65a9);
        assert_eq!(self.take_u32(), number);
        let kind = self.take_u32();
        let len = self.take_u32() as usize;
        (kind, self.take(len))
    }

    /// All replies to an option up to the last one.
    pub fn option_replies(&mut self, number: u32) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply(number);
            let last = reply.0 == 1 || reply.0 >> 31 == 1;
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    /// Data of GO and INFO.
    pub fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
        let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(&u16::try_from(infos.len()).unwrap().to_be_bytes());
        infos.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
        data
    }

    /// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
    pub fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
        for query in queries {
            data.extend_from_slice(&u32::try_from(query.len()).unwrap().to_be_bytes());
            data.extend_from_slice(query.as_bytes());
        }
        data
    }

    /// Enters the transmission phase, simple or structured with base:allocation; returns the
    /// size and the transmission flags.
    pub fn go(&mut self, name: &str, structured: bool) -> (u64, u16) {
        self.client_flags();
        if structured {
            self.option(8, b"");
            assert_eq!(self.option_reply(8), (1, vec![]));
            self.option(10, &Self::meta_data(name, &["base:allocation"]));
            assert_eq!(self.option_replies(10).len(), 2);
        }
        self.begin(name)
    }

    /// GO, after flags and other options.
    pub fn begin(&mut self, name: &str) -> (u64, u16) {
        self.option(7, &Self::go_data(name, &[]));
        let replies = self.option_replies(7);
        assert_eq!(replies.last().unwrap(), &(1, vec![]), "{replies:?}");
        let (kind, data) = &replies[0];
        assert_eq!((*kind, data.len(), &data[..2]), (3, 12, &[0, 0][..]));
        let size = u64::from_be_bytes(data[2..10].try_into().unwrap());
        (size, u16::from_be_bytes(data[10..12].try_into().unwrap()))
    }

    fn head(magic: u32, flags: u16, command: u16, cookie: u64, at: u64, len: &[u8]) -> Vec<u8> {
        let (magic, flags, command) =
            (magic.to_be_bytes(), flags.to_be_bytes(), command.to_be_bytes());
        [&magic[..], &flags, &command, &cookie.to_be_bytes(), &at.to_be_bytes(), len].concat()
    }

    pub fn request_bytes(flags: u16, command: u16, cookie: u64, at: u64, len: u32) -> Vec<u8> {
        Self::head(0x2560_9513, flags, command, cookie, at, &len.to_be_bytes())
    }

    pub fn request(&mut self, flags: u16, command: u16, cookie: u64, at: u64, len: u32) {
        self.send(&Self::request_bytes(flags, command, cookie, at, len));
    }

    /// Enters the transmission phase with extended headers; returns size and transmission flags.
    pub fn go_extended(&mut self, name: &str, contexts: &[&str]) -> (u64, u16) {
        self.client_flags();
        self.option(11, b"");
        assert_eq!(self.option_reply(11), (1, vec![]));
        if !contexts.is_empty() {
            self.option(10, &Self::meta_data(name, contexts));
            assert_eq!(self.option_replies(10).len(), contexts.len() + 1);
        }
        self.begin(name)
    }

    /// A request with an extended header; with flag 1 << 5 `len` is that of a payload.
    pub fn extended_bytes(flags: u16, command: u16, cookie: u64, at: u64, len: u64) -> Vec<u8> {
        Self::head(0x21e4_1c71, flags, command, cookie, at, &len.to_be_bytes())
    }

    /// Sends such a request, and takes all chunks of its reply.
    pub fn extended(&mut self, flags: u16, command: u16, at: u64, len: u64) -> Vec<Chunk> {
        self.send(&Self::extended_bytes(flags, command, 11, at, len));
        self.extended_chunks(at)
    }

    /// The chunks of the reply to a request at `at`, when only one is in flight.
    pub fn extended_chunks(&mut self, at: u64) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        loop {
            assert_eq!(self.take_u32(), 0x6e8a_278c);
            let (flags, kind, cookie) = (self.take_u16(), self.take_u16(), self.take_u64());
            assert_eq!(self.take_u64(), at, "the offset of the request");
            let len = usize::try_from(self.take_u64()).unwrap();
            chunks.push(Chunk { flags, kind, cookie, payload: self.take(len) });
            if flags & 1 == 1 {
                return chunks;
            }
        }
    }

    /// Reads a range with extended headers, and puts the chunks together.
    pub fn read_extended(&mut self, flags: u16, at: u64, len: u32) -> Vec<u8> {
        let chunks = self.extended(flags, 0, at, len.into());
        together(&chunks, at, len)
    }

    /// Head of a simple reply: error and cookie.
    pub fn simple(&mut self) -> (u32, u64) {
        assert_eq!(self.take_u32(), 0x6744_6698);
        (self.take_u32(), self.take_u64())
    }

    pub fn chunk(&mut self) -> Chunk {
        assert_eq!(self.take_u32(), 0x668e_33ef);
        let (flags, kind, cookie) = (self.take_u16(), self.take_u16(), self.take_u64());
        let len = self.take_u32() as usize;
        Chunk { flags, kind, cookie, payload: self.take(len) }
    }

    /// The chunks of one reply, when only one request is in flight.
    pub fn chunks(&mut self) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        loop {
            let chunk = self.chunk();
            let done = chunk.flags & 1 == 1;
            chunks.push(chunk);
            if done {
                return chunks;
            }
        }
    }

    /// Reads a range with simple replies.
    pub fn read_simple(&mut self, at: u64, len: u32) -> Vec<u8> {
        self.request(0, 0, 7, at, len);
        assert_eq!(self.simple(), (0, 7));
        self.take(len as usize)
    }

    /// Reads a range with structured replies, and puts the chunks together.
    pub fn read_structured(&mut self, flags: u16, at: u64, len: u32) -> Vec<u8> {
        self.request(flags, 0, 9, at, len);
        let chunks = self.chunks();
        assert!(chunks.iter().all(|chunk| chunk.cookie == 9));
        together(&chunks, at, len)
    }

    /// The error number of a simple reply or of an error chunk that ends a reply.
    pub fn error(&mut self, structured: bool) -> u32 {
        if !structured {
            return self.simple().0;
        }
        let chunk = self.chunks().pop().unwrap();
        assert_eq!(chunk.kind, 0x8001, "{chunk:?}");
        chunk.error().0
    }
}

/// The bytes of a READ of `len` at `at`, from all its chunks.
fn together(chunks: &[Chunk], at: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![None; len as usize];
    chunks.iter().for_each(|chunk| chunk.fill(at, &mut bytes));
    bytes.into_iter().map(|byte| byte.expect("every byte is covered")).collect()
}

impl Chunk {
    fn fill(&self, at: u64, bytes: &mut [Option<u8>]) {
        let word =
            |from: usize| u64::from_be_bytes(self.payload[from..from + 8].try_into().unwrap());
        match self.kind {
            1 => {
                let start = usize::try_from(word(0) - at).unwrap();
                for (index, byte) in self.payload[8..].iter().enumerate() {
                    assert_eq!(bytes[start + index].replace(*byte), None, "chunks overlap");
                }
            }
            2 => {
                assert_eq!(self.payload.len(), 12);
                let start = usize::try_from(word(0) - at).unwrap();
                let len = u32::from_be_bytes(self.payload[8..].try_into().unwrap()) as usize;
                assert_ne!(len, 0);
                for byte in &mut bytes[start..start + len] {
                    assert_eq!(byte.replace(0), None, "chunks overlap");
                }
            }
            0 => assert!(self.payload.is_empty()),
            kind => panic!("unexpected chunk of type {kind:#x}: {self:?}"),
        }
    }

    /// Error number and text.
    pub fn error(&self) -> (u32, String) {
        let number = u32::from_be_bytes(self.payload[..4].try_into().unwrap());
        let len = u16::from_be_bytes(self.payload[4..6].try_into().unwrap()) as usize;
        assert_eq!(self.payload.len(), 6 + len);
        (number, text(&self.payload[6..]))
    }

    /// Extents of `base:allocation`: length and flags.
    pub fn extents(&self) -> Vec<(u32, u32)> {
        self.extents_of(1)
    }

    /// Extents of the context with this number: length and flags.
    pub fn extents_of(&self, context: u32) -> Vec<(u32, u32)> {
        assert_eq!((self.kind, &self.payload[..4]), (5, &context.to_be_bytes()[..]));
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        self.payload[4..].chunks(8).map(|e| (word(&e[..4]), word(&e[4..]))).collect()
    }

    /// Extents of a status with extended headers: context, and length and flags of each.
    pub fn extended_extents(&self) -> (u32, Vec<(u64, u64)>) {
        assert_eq!(self.kind, 6, "{self:?}");
        let word = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
        let head = word(&self.payload[..8]);
        let extents: Vec<_> =
            self.payload[8..].chunks(16).map(|e| (word(&e[..8]), word(&e[8..]))).collect();
        assert_eq!(u64::from(u32::try_from(extents.len()).unwrap()), head & 0xffff_ffff);
        (u32::try_from(head >> 32).unwrap(), extents)
    }
}
