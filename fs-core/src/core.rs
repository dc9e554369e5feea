//! The core of a mount: what all channels share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use bdev_adapter::{Claim, Device, IoErrorKind};

use crate::channel::holds::Registry;
use crate::channel::operation::StatFs;
use crate::channel::{ChannelCore, Driven};
use crate::checksum_cache::ChecksumCache;
use crate::commit::Gate;
use crate::error::{Error, Result};
use crate::file::{FILE_BLOCKS_MAX, FileInner};
use crate::mount::MountOptions;
use crate::page_cache::PageCache;
use crate::stats::{Counters, Stats};
use crate::superblock::OnDisk;
use crate::sync::{self, Mutex};
use crate::txn::{Limits, Meta};
use crate::types::{BLOCK_SIZE, BlockAddr, FileBlock, Generation, InodeId, Run};

/// Ticks without a poll after which a channel counts as left alone. A tick is about a millisecond.
const ABANDONED_TICKS: u64 = 2;

/// Longest sleep between two looks at the channels of a mount that is being taken down.
const DRAIN_NAP: Duration = Duration::from_micros(50);

/// How far an unmount has come; each phase includes the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Phase {
    /// It has not begun.
    Mounted,
    /// New operations are refused, those in flight go on.
    Closing,
    /// No page gets dirty any more: what is dirty is written back.
    Draining,
    /// No transaction changes anything any more: the last commit has all that was answered with success.
    Sealed,
    /// Nothing reaches the device any more.
    Unmounted,
}

/// See the module documentation.
pub(crate) struct Core {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) options: MountOptions,
    pub(crate) total_blocks: u64,
    pub(crate) meta: Mutex<Meta>,
    pub(crate) gate: Gate,
    pub(crate) holds: Registry,
    pub(crate) checksums: ChecksumCache,
    pub(crate) stats: Counters,
    pub(crate) pages: Arc<PageCache>,
    /// Ordered extents of all files.
    pub(crate) ordered: AtomicU64,
    /// Of so many direct writes one takes the buffered way, for tests; 0: none.
    pub(crate) fallback_one_in: AtomicU64,
    /// A copy of `meta.generation` that readers look at without the lock.
    open_generation: AtomicU64,
    superblock: OnDisk,
    channels: Mutex<Vec<Arc<ChannelCore>>>,
    ticks: AtomicU64,
    /// Why nothing can be written any more.
    failed: Mutex<Option<Error>>,
    has_failed: AtomicBool,
    phase: AtomicU8,
    claim: Mutex<Option<Claim>>,
}

impl Core {
    pub(crate) fn new(
        claim: Claim,
        device: Arc<dyn Device>,
        options: MountOptions,
        superblock: OnDisk,
        meta: Meta,
    ) -> Core {
        let durable = Generation(superblock.generation.get());
        Core {
            total_blocks: meta.total_blocks,
            gate: Gate::new(durable),
            holds: Registry::default(),
            checksums: ChecksumCache::new(options.checksum_cache_bytes),
            stats: Counters::default(),
            pages: Arc::new(PageCache::new(options.page_cache_bytes)),
            ordered: AtomicU64::new(0),
            fallback_one_in: AtomicU64::new(0),
            open_generation: AtomicU64::new(meta.generation.0),
            superblock,
            channels: Mutex::new(Vec::new()),
            ticks: AtomicU64::new(ABANDONED_TICKS),
            failed: Mutex::new(None),
            has_failed: AtomicBool::new(false),
            phase: AtomicU8::new(Phase::Mounted as u8),
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
            Some(error) => {
                Err(Error::ReadOnly { why: format!("the filesystem turned read-only after: {error}") })
            }
            None => Ok(()),
        }
    }

    fn check_before(&self, phase: Phase) -> Result<()> {
        if self.phase.load(Ordering::Acquire) < phase as u8 { Ok(()) } else { Err(Error::Unmounted) }
    }

    /// Whether new operations are accepted.
    pub(crate) fn check_mounted(&self) -> Result<()> {
        self.check_before(Phase::Closing)
    }

    /// Whether operations that were accepted may go on.
    pub(crate) fn check_not_sealed(&self) -> Result<()> {
        self.check_before(Phase::Sealed)
    }

    /// Whether pages may get dirty.
    pub(crate) fn may_dirty(&self) -> bool {
        self.check_before(Phase::Draining).is_ok()
    }

    /// What an operation answers that failed with `error`: once nothing reaches the device, that is the reason.
    pub(crate) fn explain(&self, error: Error) -> Error {
        let gone = matches!(&error, Error::Io { source, .. } if source.kind == IoErrorKind::Gone);
        match self.check_before(Phase::Unmounted) {
            Err(unmounted) if gone || matches!(error, Error::ReadOnly { .. }) => unmounted,
            _ => error,
        }
    }

    pub(crate) fn check_writable(&self) -> Result<()> {
        self.check_not_sealed()?;
        self.check_failed()?;
        if self.is_read_only() {
            return Err(Error::ReadOnly { why: format!("'{}' is mounted read-only", self.device.name()) });
        }
        Ok(())
    }

    // ---- space

    /// Gives back runs that were allocated for `file` and that nothing refers to; to its reservation, if they come from there.
    pub(crate) fn give_back(&self, file: Option<&FileInner>, runs: &[Run], reserved: bool) {
        let mut meta = self.meta.lock();
        if let Some(file) = file {
            if reserved {
                meta.reserve_blocks(file, runs.iter().map(|run| run.len).sum());
            }
            // The size on disk may have waited for this write; a commit has to look.
            meta.changed |= file.dirty.load(Ordering::Relaxed);
        }
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
            page_cache_bytes: self.pages.resident_bytes(),
            dirty_bytes: self.pages.busy_pages() * BLOCK_SIZE as u64,
            ordered_extents: self.ordered.load(Ordering::Relaxed),
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
            if !file.reaped.swap(true, Ordering::Relaxed) {
                meta.reap.push(file.id);
            }
        } else {
            meta.forget_if_unused(file);
        }
    }

    /// Drops a file from memory if it was there for its dirty pages only.
    pub(crate) fn forget_if_unused(&self, file: &Arc<FileInner>) {
        self.meta.lock().forget_if_unused(file);
    }

    /// A deleted file leaves memory: nobody can reach it any more, and its inode is not to be stored.
    pub(crate) fn forget_file(&self, id: InodeId) {
        let mut meta = self.meta.lock();
        if let Some(file) = meta.open.remove(&id) {
            // The next commit finds it among those that changed, and passes it by.
            file.dirty.store(false, Ordering::Relaxed);
        }
    }

    // ---- channels

    /// Opens a queue pair for another channel.
    pub(crate) fn add_channel(self: &Arc<Core>) -> Result<Arc<ChannelCore>> {
        let queue_pair = Arc::clone(&self.device).queue_pair()?;
        let channel = Arc::new(ChannelCore::new(self, queue_pair));
        let mut channels = self.channels.lock();
        // Under the lock: `shut_down` takes the queue pairs of all that it finds, and none comes later.
        self.check_before(Phase::Unmounted)?;
        channels.push(Arc::clone(&channel));
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

    // ---- the end

    /// Refuses new operations. False when somebody else is unmounting already.
    pub(crate) fn close(&self) -> bool {
        let (from, to) = (Phase::Mounted as u8, Phase::Closing as u8);
        self.phase.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Ends all changes of pages: what is dirty once this returns is all that there will be.
    pub(crate) fn stop_dirtying(&self) {
        self.phase.store(Phase::Draining as u8, Ordering::Release);
        // Whoever looked at the phase before has its file's pages locked, or is done.
        let files: Vec<Arc<FileInner>> = self.meta.lock().open.values().cloned().collect();
        files.iter().filter_map(|file| file.pages_if_any()).for_each(|pages| pages.settle());
    }

    /// Ends all changes, but for commits.
    pub(crate) fn seal(&self) {
        // Under the lock: no transaction is half way through.
        let _meta = self.meta.lock();
        self.phase.store(Phase::Sealed as u8, Ordering::Release);
    }

    /// Drives all channels until none has an operation in flight. In turn, since operations of different channels may wait for
    /// each other.
    pub(crate) fn drain(&self) {
        loop {
            let channels = self.channels.lock().clone();
            let driven: Vec<Driven> = channels.iter().map(|channel| channel.drive_to_end()).collect();
            if driven.iter().all(|driven| *driven == Driven::Idle) {
                return;
            }
            if driven.iter().all(|driven| *driven != Driven::Advanced) {
                sync::pause(DRAIN_NAP);
            }
        }
    }

    /// Lets every operation in flight complete, takes the queue pairs away and gives the device back.
    pub(crate) fn shut_down(&self) {
        self.seal();
        self.drain();
        let channels = {
            let mut channels = self.channels.lock();
            self.phase.store(Phase::Unmounted as u8, Ordering::Release);
            std::mem::take(&mut *channels)
        };
        for channel in channels {
            channel.shut_down();
        }
        let mut meta = self.meta.lock();
        let open = std::mem::take(&mut meta.open);
        for file in open.values() {
            file.discard_pages(&mut meta, FileBlock(0), FileBlock(FILE_BLOCKS_MAX));
        }
        meta.dirty.clear();
        drop(meta);
        self.claim.lock().take();
    }
}
