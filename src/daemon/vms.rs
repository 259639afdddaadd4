//! The sockets of VMs: one for each attachment that is one.
//!
//! Why: a VMM connects to a path and gets one disk there, so each needs a path of its own, which must
//! be the same after a restart of the daemon: it connects again, and its guest has only waited.
//! How: a socket is named after the attachment, whose record outlives the daemon. It is there as long
//! as the attachment; while the image can't be read, who connects is closed at once.
//! Never: waits for a VM on the manager's task.
//! Start at [`Vms::serve`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::control::Sockets;
use crate::manager::AttachmentId;
use crate::names::ImageName;
use crate::serve::{Exports, Stopper, vhost_user};

/// The servers of all VMs.
pub(super) struct Vms {
    sockets: Sockets,
    gid: Option<u32>,
    limits: vhost_user::Limits,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    by_id: BTreeMap<AttachmentId, Vm>,
    /// Told to stop, and not seen to have ended.
    leaving: Vec<JoinHandle<()>>,
    /// No further ones.
    is_closed: bool,
}

struct Vm {
    stopper: Stopper,
    thread: JoinHandle<()>,
}

impl Vms {
    /// Sockets go where `sockets` says, and belong to group `gid`.
    pub(super) fn new(sockets: Sockets, gid: Option<u32>, limits: vhost_user::Limits) -> Self {
        Self { sockets, gid, limits, running: Mutex::default() }
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        // Each change is one insert, remove or push.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the socket of an attachment, unless it is there.
    pub(super) fn serve(&self, id: &AttachmentId, image: &ImageName, exports: &Arc<Exports>) {
        let mut running = self.running();
        running.leaving.retain(|thread| !thread.is_finished());
        if running.is_closed || running.by_id.contains_key(id) {
            return;
        }
        match self.start(id, image, exports) {
            Ok(vm) => {
                running.by_id.insert(id.clone(), vm);
            }
            Err(error) => {
                let error = crate::fetch::one_line(&*error);
                tracing::error!(attachment = %id, %image, %error, "no socket for a VM");
            }
        }
    }

    fn start(
        &self,
        id: &AttachmentId,
        image: &ImageName,
        exports: &Arc<Exports>,
    ) -> Result<Vm, Box<dyn std::error::Error>> {
        let path = self.sockets.vm(id);
        std::fs::create_dir_all(&self.sockets.vms)?;
        let exports = Arc::clone(exports);
        let server = vhost_user::Server::bind(&path, exports, image.as_str(), self.limits)?;
        if let Some(gid) = self.gid {
            std::os::unix::fs::lchown(&path, None, Some(gid))?;
        }
        let stopper = server.stopper();
        let run = move || {
            if let Err(error) = server.run() {
                let error = crate::fetch::one_line(&error);
                tracing::error!(%error, "the server of a VM has ended");
            }
        };
        let thread = std::thread::Builder::new().name(format!("vm-{id}")).spawn(run)?;
        Ok(Vm { stopper, thread })
    }

    /// Takes the socket of an attachment away, and hangs up its VM.
    pub(super) fn leave(&self, id: &AttachmentId) {
        let mut running = self.running();
        if let Some(Vm { stopper, thread }) = running.by_id.remove(id) {
            stopper.stop();
            running.leaving.push(thread);
        }
    }

    /// Ends all of them, and waits until they have ended. There will be no further ones.
    pub(super) fn end(&self) {
        let mut running = self.running();
        running.is_closed = true;
        let all = std::mem::take(&mut running.by_id);
        let mut threads = std::mem::take(&mut running.leaving);
        drop(running);
        all.values().for_each(|vm| vm.stopper.stop());
        threads.extend(all.into_values().map(|vm| vm.thread));
        for thread in threads {
            let _panic_was_said = thread.join();
        }
    }
}
