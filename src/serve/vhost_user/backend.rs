//! What a frontend says, and what becomes of it.
//!
//! Why: a VMM that is broken or hostile says anything, in any order.
//! How: the `vhost` crate takes messages apart; here each is checked, kept, and put into effect: a
//! queue runs while everything that it needs is there, and is ended before anything of it changes.
//! Never: keeps a descriptor that is no eventfd, or that is not used; serves a queue of memory that
//! was taken away.
//! Start at [`Backend::new`].

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::device::{Device, FEATURES, PROTOCOL_FEATURES};
use super::limits::{Limits, MAX_QUEUE_SIZE};
use super::ring::Place;
use super::worker::{Job, Worker};
use crate::map::{GuestMemory, GuestMemoryError, GuestRegion};
use crate::serve::Attachment;

type MemoryRegionBases = Vec<vhost::VhostUserMemoryRegionBase>;

/// One frontend's device.
#[derive(Debug)]
pub(super) struct Backend {
    attachment: Arc<Attachment>,
    device: Device,
    poll: Duration,
    features: u64,
    memory: Option<Arc<GuestMemory>>,
    queues: Vec<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    size: u16,
    /// Addresses of descriptors, requests and answers in the frontend.
    addresses: Option<(u64, u64, u64)>,
    /// Where the frontend, or the thread before, says that it goes on.
    base: u16,
    kick: Option<Arc<File>>,
    call: Option<Arc<File>>,
    err: Option<Arc<File>>,
    is_enabled: bool,
    worker: Option<Worker>,
}

/// What a frontend says of a region, with the file behind it.
fn guest_region(region: &VhostUserMemoryRegion, file: File) -> GuestRegion {
    GuestRegion {
        guest_at: region.guest_phys_addr,
        user_at: region.user_addr,
        len_bytes: region.memory_size,
        file,
        file_at: region.mmap_offset,
    }
}

/// A message is refused; why goes to the log.
fn refuse<T>(what: &'static str) -> Result<T> {
    tracing::info!(what, "a frontend's message is refused");
    Err(Error::InvalidParam)
}

impl Backend {
    /// The device of a frontend that has said nothing yet.
    pub(super) fn new(attachment: Attachment, limits: &Limits) -> Self {
        let queues = limits.queues.clamp(1, u16::from(u8::MAX));
        let device = Device::of(attachment.export(), queues);
        let queues = (0..queues).map(|_| Queue::default()).collect();
        let attachment = Arc::new(attachment);
        Self { attachment, device, poll: limits.poll, features: 0, memory: None, queues }
    }

    /// Ends a queue's thread, changes the queue, and goes on if it can.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Queue)) -> Result<()> {
        let Ok(number) = u8::try_from(index) else { return refuse("no such queue") };
        let Some(queue) = self.queues.get_mut(usize::from(number)) else {
            return refuse("no such queue");
        };
        queue.end();
        change(queue);
        self.go_on(number)
    }

    /// Ends all queues, changes what they share, and goes on with those that can.
    fn change_all(&mut self, change: impl FnOnce(&mut Self)) -> Result<()> {
        self.queues.iter_mut().for_each(Queue::end);
        change(self);
        (0..=u8::MAX).take(self.queues.len()).try_for_each(|number| self.go_on(number))
    }

    /// Goes on with this memory, or with what there is if it is refused.
    fn use_memory(
        &mut self,
        memory: std::result::Result<GuestMemory, GuestMemoryError>,
    ) -> Result<()> {
        match memory {
            Ok(memory) => self.change_all(|this| this.memory = Some(Arc::new(memory))),
            Err(error) => {
                let export = self.attachment.export().name();
                let error = &error as &dyn std::error::Error;
                tracing::warn!(export, error, "a VM's memory is refused");
                Err(Error::InvalidParam)
            }
        }
    }

    fn go_on(&mut self, number: u8) -> Result<()> {
        let Some(queue) = self.queues.get_mut(usize::from(number)) else { return Ok(()) };
        // Without that feature nobody enables queues.
        let is_enabled = queue.is_enabled || self.features & PROTOCOL_FEATURES == 0;
        let (Some(memory), Some((descriptors, available, used)), Some(kick)) =
            (&self.memory, queue.addresses, &queue.kick)
        else {
            return Ok(());
        };
        if !is_enabled || queue.size == 0 {
            return Ok(());
        }
        let job = Job {
            attachment: Arc::clone(&self.attachment),
            device: self.device,
            memory: Arc::clone(memory),
            place: Place { size: queue.size, descriptors, available, used },
            features: self.features,
            kick: Arc::clone(kick),
            call: queue.call.clone(),
            err: queue.err.clone(),
            poll: self.poll,
        };
        match Worker::start(number, job) {
            Ok(worker) => queue.worker = Some(worker),
            Err(error) => {
                tracing::error!(%error, "no thread for a VM's queue");
                return Err(Error::BackendInternalError);
            }
        }
        Ok(())
    }
}

impl Queue {
    fn end(&mut self) {
        if let Some(worker) = self.worker.take()
            && let Some(next) = worker.stop()
        {
            self.base = next;
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.queues.iter_mut().for_each(Queue::end);
    }
}

/// An eventfd and nothing else: reading or writing anything else could wait for ever.
fn eventfd(file: Option<File>) -> Result<Option<Arc<File>>> {
    let Some(file) = file else { return Ok(None) };
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    match std::fs::read_link(path) {
        Ok(link) if link.as_os_str() == "anon_inode:[eventfd]" => Ok(Some(Arc::new(file))),
        Ok(_) | Err(_) => refuse("a descriptor that is no eventfd"),
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.change_all(|this| {
            let queues = this.queues.len();
            this.queues = (0..queues).map(|_| Queue::default()).collect();
            this.features = 0;
        })
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return refuse("features that were not offered");
        }
        self.change_all(|this| this.features = features)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<MemoryRegionBases>> {
        let regions = regions.iter().zip(files).map(|(region, file)| guest_region(region, file));
        // The files are closed here: a map needs none.
        self.use_memory(GuestMemory::new(regions.collect()))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok();
        match size.filter(|size| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE) {
            Some(size) => self.change(index, |queue| queue.size = size),
            None => refuse("a queue has 1 to 1024 entries, a power of two"),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.change(index, |queue| queue.addresses = Some((descriptor, available, used)))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // Kept to be told again; where a queue goes on its own index of answers says.
        let base = u16::try_from(base & 0xffff).unwrap_or(0);
        self.change(index, |queue| queue.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // A queue whose base is asked for has ended, until it gets a kick descriptor again.
        self.change(index, |queue| queue.kick = None)?;
        let number = usize::try_from(index).unwrap_or(usize::MAX);
        let base = self.queues.get(number).map_or(0, |queue| queue.base);
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        match eventfd(fd)? {
            Some(fd) => self.change(index.into(), |queue| queue.kick = Some(fd)),
            None => refuse("a queue without a kick descriptor, to be polled for ever"),
        }
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = eventfd(fd)?;
        self.change(index.into(), |queue| queue.call = fd)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = eventfd(fd)?;
        self.change(index.into(), |queue| queue.err = fd)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let features = VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ;
        Ok(features
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered == 0 { Ok(()) } else { refuse("features that were not offered") }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change(index, |queue| queue.is_enabled = enable)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let (offset, size) = (usize::try_from(offset), usize::try_from(size));
        // The crate has checked that both together are 256 at most.
        Ok(self.device.config(offset.unwrap_or(usize::MAX), size.unwrap_or(0)))
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        refuse("the configuration of a disk that cannot be written")
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        refuse("no such feature")
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        refuse("no such feature")
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        refuse("no such feature")
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        refuse("no such feature")
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(GuestMemory::MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<vhost::VhostUserMemoryRegionBase>> {
        let region = guest_region(region, file);
        let memory = match &self.memory {
            Some(memory) => memory.with(&region),
            None => GuestMemory::new(vec![region]),
        };
        self.use_memory(memory)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (guest_at, user_at) = (region.guest_phys_addr, region.user_addr);
        let without =
            |memory: &Arc<GuestMemory>| memory.without(guest_at, user_at, region.memory_size);
        match self.memory.as_ref().and_then(without) {
            Some(memory) => self.use_memory(Ok(memory)),
            None => refuse("a region of memory that is not there is taken away"),
        }
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        refuse("no such feature")
    }

    fn check_device_state(&mut self) -> Result<()> {
        refuse("no such feature")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        refuse("no such feature")
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        refuse("no such feature")
    }
}
