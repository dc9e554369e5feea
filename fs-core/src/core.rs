//! The core of a mount: what all channels share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bdev_adapter::{Claim, Device};
use parking_lot::Mutex;

use crate::channel::ChannelCore;
use crate::channel::holds::Registry;
use crate::channel::operation::StatFs;
use crate::checksum_cache::ChecksumCache;
use crate::commit::Gate;
use crate::error::{Error, Result};
use crate::file::FileInner;
use crate::mount::MountOptions;
use crate::stats::{Counters, Stats};
use crate::superblock::OnDisk;
use crate::txn::{Limits, Meta};
use crate::types::{BLOCK_SIZE, BlockAddr, Generation, InodeId, Run};

/// Ticks without a poll after which a channel counts as left alone. A tick is about a millisecond.
const ABANDONED_TICKS: u64 = 2;

/// See the module documentation.
pub(crate) struct Core {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) options: MountOptions,
    pub(crate) total_blocks: u64,
    /// The device epoch since which every write of this mount has completed.
    pub(crate) epoch: u64,
    pub(crate) meta: Mutex<Meta>,
    pub(crate) gate: Gate,
    pub(crate) holds: Registry,
    pub(crate) checksums: ChecksumCache,
    pub(crate) stats: Counters,
    /// A copy of `meta.generation` that readers look at without the lock.
    open_generation: AtomicU64,
    superblock: OnDisk,
    channels: Mutex<Vec<Arc<ChannelCore>>>,
    ticks: AtomicU64,
    /// Why nothing can be written any more.
    failed: Mutex<Option<Error>>,
    has_failed: AtomicBool,
    unmounted: AtomicBool,
    claim: Mutex<Option<Claim>>,
}

impl Core {
    pub(crate) fn new(claim: Claim, device: Arc<dyn Device>, options: MountOptions, superblock: OnDisk, meta: Meta) -> Core {
        let durable = Generation(superblock.generation.get());
        Core {
            total_blocks: meta.total_blocks,
            epoch: device.epoch(),
            gate: Gate::new(durable),
            holds: Registry::default(),
            checksums: ChecksumCache::new(options.checksum_cache_bytes),
            stats: Counters::default(),
            open_generation: AtomicU64::new(meta.generation.0),
            superblock,
            channels: Mutex::new(Vec::new()),
            ticks: AtomicU64::new(ABANDONED_TICKS),
            failed: Mutex::new(None),
            has_failed: AtomicBool::new(false),
            unmounted: AtomicBool::new(false),
            claim: Mutex::new(Some(claim)),
            meta: Mutex::new(meta),
            options,
            device,
        }
    }

    // ---- addresses

    /// The byte address on the device of a logical block. (One region on one device: they are the same.)
    #[inline]
    pub(crate) fn locate(&self, addr: BlockAddr) -> u64 {
        addr.byte()
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits::new(self.total_blocks)
    }

    // ---- state

    /// The generation in which changes are made now.
    #[inline]
    pub(crate) fn open_generation(&self) -> Generation {
        Generation(self.open_generation.load(Ordering::Acquire))
    }

    /// Called under the metadata lock.
    pub(crate) fn set_open_generation(&self, generation: Generation) {
        self.open_generation.store(generation.0, Ordering::Release);
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// Notes why nothing can be written any more: what is durable stays readable, and nothing is added to it.
    pub(crate) fn fail(&self, error: Error) {
        let mut failed = self.failed.lock();
        if failed.is_none() {
            log::error!("{}: turned read-only: {error}", self.device.name());
            *failed = Some(error);
            self.has_failed.store(true, Ordering::Release);
        }
    }

    /// The error that turned the mount read-only.
    pub(crate) fn check_failed(&self) -> Result<()> {
        if !self.has_failed.load(Ordering::Acquire) {
            return Ok(());
        }
        match &*self.failed.lock() {
            Some(error) => Err(Error::ReadOnly { why: format!("the filesystem turned read-only after: {error}") }),
            None => Ok(()),
        }
    }

    pub(crate) fn check_mounted(&self) -> Result<()> {
        if self.unmounted.load(Ordering::Acquire) { Err(Error::Unmounted) } else { Ok(()) }
    }

    pub(crate) fn check_writable(&self) -> Result<()> {
        self.check_mounted()?;
        self.check_failed()?;
        if self.is_read_only() {
            return Err(Error::ReadOnly { why: format!("'{}' is mounted read-only", self.device.name()) });
        }
        Ok(())
    }

    // ---- space

    /// Gives back runs that were allocated and that nothing refers to.
    pub(crate) fn give_back(&self, runs: &[Run]) {
        let mut meta = self.meta.lock();
        for run in runs {
            meta.unpublished.remove(run);
            if let Err(error) = meta.alloc.free_now(*run) {
                self.fail(Error::corrupt(format!("giving blocks back: {error}")));
            }
        }
    }

    /// Makes blocks reusable that durable generations freed and no reader holds.
    pub(crate) fn release_freed(&self) -> Result<()> {
        let mut meta = self.meta.lock();
        let mut up_to = self.gate.durable();
        if let Some(oldest) = self.holds.oldest() {
            up_to = up_to.min(Generation(oldest.0.saturating_sub(1)));
        }
        meta.alloc.release(up_to, &[]).map_err(|e| Error::corrupt(e.to_string()))
    }

    /// Space, exactly.
    pub(crate) fn statfs(&self) -> Result<StatFs> {
        self.check_mounted()?;
        let meta = self.meta.lock();
        let counts = meta.alloc.counts();
        let free = meta.user_free();
        let bytes = |blocks: u64| blocks * BLOCK_SIZE as u64;
        Ok(StatFs {
            total_bytes: bytes(counts.total),
            used_bytes: bytes(counts.total - counts.free),
            free_bytes: bytes(free),
            reserved_bytes: bytes(counts.free - free),
            files: meta.files,
        })
    }

    /// Counters and sizes.
    pub(crate) fn stats(&self) -> Stats {
        let meta = self.meta.lock();
        let cache = meta.cache.stats();
        Stats {
            node_cache_hits: cache.hits,
            node_cache_misses: cache.misses,
            node_cache_bytes: cache.bytes as u64,
            dirty_nodes: cache.dirty as u64,
            extent_map_bytes: meta.open.values().map(|file| file.map.memory_bytes()).sum(),
            checksum_cache_bytes: self.checksums.memory_bytes(),
            ..self.stats.snapshot()
        }
    }

    /// A superblock with everything that does not change from commit to commit.
    pub(crate) fn superblock_template(&self) -> OnDisk {
        self.superblock.clone()
    }

    // ---- files

    /// A handle is gone.
    pub(crate) fn release_handle(&self, file: &Arc<FileInner>) {
        // AcqRel: whoever drops the last handle sees what was done through the others.
        if file.handles.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let mut meta = self.meta.lock();
        // It may have been opened again before we had the lock.
        if file.handles.load(Ordering::Acquire) > 0 {
            return;
        }
        if file.unlinked.load(Ordering::Relaxed) {
            if !meta.reap.contains(&file.id) {
                meta.reap.push(file.id);
            }
        } else {
            meta.forget_if_unused(file);
        }
    }

    /// A deleted file leaves memory: nobody can reach it any more, and its inode is not to be stored.
    pub(crate) fn forget_file(&self, id: InodeId) {
        let mut meta = self.meta.lock();
        if let Some(file) = meta.open.remove(&id) {
            file.dirty.store(false, Ordering::Relaxed);
            meta.dirty.retain(|other| other.id != id);
        }
    }

    // ---- channels

    /// Opens a queue pair for another channel.
    pub(crate) fn add_channel(self: &Arc<Core>) -> Result<Arc<ChannelCore>> {
        self.check_mounted()?;
        let queue_pair = Arc::clone(&self.device).queue_pair()?;
        let channel = Arc::new(ChannelCore::new(self, queue_pair));
        self.channels.lock().push(Arc::clone(&channel));
        Ok(channel)
    }

    /// The handle of a channel is gone; what it has in flight is driven by others.
    pub(crate) fn retire_channel(&self, channel: &Arc<ChannelCore>) {
        channel.retire();
        if channel.is_idle() {
            self.channels.lock().retain(|other| !Arc::ptr_eq(other, channel));
            channel.shut_down();
        }
    }

    /// A count that advances about every millisecond while anybody waits.
    #[inline]
    pub(crate) fn tick(&self) -> u64 {
        self.ticks.load(Ordering::Relaxed)
    }

    /// Drives the channels that their threads have left alone. Called by whoever has waited for a while, and by the helper.
    /// True when some channel has operations in flight.
    pub(crate) fn drive_abandoned(&self) -> bool {
        let now = self.ticks.fetch_add(1, Ordering::Relaxed) + 1;
        let channels = self.channels.lock().clone();
        let mut busy = false;
        for channel in channels {
            if channel.is_retired() && channel.is_idle() {
                self.retire_channel(&channel);
                continue;
            }
            busy |= channel.drive_abandoned(now - ABANDONED_TICKS);
        }
        busy
    }

    /// Lets every operation in flight complete, takes the queue pairs away and gives the device back.
    pub(crate) fn shut_down(&self) {
        self.unmounted.store(true, Ordering::Release);
        let channels = std::mem::take(&mut *self.channels.lock());
        for channel in channels {
            channel.shut_down();
        }
        self.meta.lock().open.clear();
        self.claim.lock().take();
    }
}
