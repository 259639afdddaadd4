//! A server of a few images, in this process.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use bedplate::disk::Sealed;
use bedplate::image::{DecodedCache, Opening, View};
use bedplate::peer::Allowed;
use bedplate::replica::{Mode, Options, Replica};
use bedplate::serve::replica::{Limits, Server};
use bedplate::serve::{Exports, ServeError, Stopper};
use tempfile::TempDir;

pub struct TestServer {
    pub dir: TempDir,
    pub exports: Arc<Exports>,
    stopper: Stopper,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl TestServer {
    pub fn start() -> Self {
        Self::with_limits(Limits::default())
    }

    pub fn with_limits(limits: Limits) -> Self {
        let dir = TempDir::new().unwrap();
        let exports = Arc::new(Exports::new());
        let path = dir.path().join("replica.sock");
        let server = Server::bind(&path, exports.clone(), Allowed::default(), limits).unwrap();
        let stopper = server.stopper();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { dir, exports, stopper, thread }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("replica.sock")
    }

    /// Serves the image in `path`, with a cache of its own.
    pub fn add(&self, name: &str, path: &Path) -> Arc<View> {
        self.add_on(name, path, None, DecodedCache::new(64 << 20))
    }

    pub fn add_on(
        &self,
        name: &str,
        path: &Path,
        base: Option<&View>,
        cache: Arc<DecodedCache>,
    ) -> Arc<View> {
        let opening = Opening { base, cache: Some(cache), ..Opening::default() };
        let view = Arc::new(View::open_as(Sealed::open_path(path).unwrap(), opening).unwrap());
        self.exports.add(name, view.clone(), "").unwrap();
        view
    }

    pub fn attach(&self, name: &str, mode: Mode) -> Replica {
        Replica::attach(self.socket(), name, Options { mode, ..Options::default() }).unwrap()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}
