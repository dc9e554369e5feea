//! Format, mount and unmount.
//!
//! Format writes one superblock generation with empty trees. Mount reads the four slots, takes the newest valid generation, and
//! is ready: its cost does not depend on the size of the device or the number of files, except for work that a crash left
//! behind ([`truncate::finish_orphans`]). A read-only mount writes nothing at all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use bdev_adapter::blocking::BlockingIo;
use bdev_adapter::{Claim, Device};
use hashbrown::{HashMap, HashSet};
use zerocopy::IntoBytes;

use crate::alloc::Allocator;
use crate::channel::Channel;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::records::{TreeKind, inodes};
use crate::stats::Stats;
use crate::superblock::{self, LABEL_MAX, OnDisk, SLOTS, SlotError, slot_byte, slots_of, uuid_text};
use crate::sync::Mutex;
use crate::tree::{NodeCache, NodePtr, Tree, TreeId};
use crate::txn::Meta;
use crate::types::{BLOCK_SIZE, BlockAddr, Generation, InodeId};
use crate::{commit, truncate, writeback};

/// How often the helper thread looks after channels while operations are in flight.
const HELPER_BUSY: Duration = Duration::from_millis(1);
/// The same while nothing is in flight.
const HELPER_IDLE: Duration = Duration::from_millis(20);

/// How to format.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FormatOptions {
    /// A name for people, up to 64 bytes.
    pub label: String,
    /// Erase a Gaur filesystem that is there.
    pub force: bool,
}

/// How to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Write nothing to the device.
    pub read_only: bool,
    /// Run a thread that drives channels whose threads have left them alone and commits from time to time. Without it the
    /// embedder must poll every channel that has operations in flight.
    pub helper_thread: bool,
    /// Memory for metadata nodes, in bytes. What does not fit is read from the device when it is needed.
    pub node_cache_bytes: usize,
    /// Memory for checksums of extents longer than a block, in bytes.
    pub checksum_cache_bytes: usize,
    /// Memory for the extent maps of open files, in bytes; looked at with every commit.
    pub extent_map_bytes: usize,
    /// Memory for pages of files that are read or written through the cache, in bytes; see [`Filesystem::set_cache_bytes`].
    pub page_cache_bytes: usize,
    /// The helper thread writes a file back when pages of it have been dirty for so long; `None`: only syncs, memory and direct I/O
    /// do.
    pub writeback_age: Option<Duration>,
    /// Verify the checksums of file data on reads.
    pub verify_data: bool,
    /// The helper thread commits when something has not been durable for so long; `None`: only syncs commit, and operations that find
    /// too little space or too much modified metadata.
    pub commit_interval: Option<Duration>,
}

impl Default for MountOptions {
    fn default() -> MountOptions {
        MountOptions {
            read_only: false,
            helper_thread: true,
            node_cache_bytes: 256 << 20,
            checksum_cache_bytes: 64 << 20,
            extent_map_bytes: 512 << 20,
            page_cache_bytes: 256 << 20,
            writeback_age: Some(Duration::from_secs(1)),
            verify_data: true,
            commit_interval: Some(Duration::from_secs(5)),
        }
    }
}

/// What a filesystem is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// Identity.
    pub uuid: [u8; 16],
    /// Name for people.
    pub label: String,
    /// The last durable generation.
    pub generation: u64,
    /// Version of the on-disk format.
    pub format_version: u32,
    /// Bytes in a block.
    pub block_size: u32,
    /// Bytes of the device that the filesystem manages.
    pub capacity_bytes: u64,
    /// When it was made.
    pub created: SystemTime,
    /// The longest write that is whole or absent after a crash, in bytes.
    pub atomic_write_max: u64,
    /// The largest [`WriteBatch`](crate::WriteBatch), in bytes.
    pub write_batch_bytes_max: u64,
}

impl Info {
    /// The UUID as text.
    pub fn uuid_text(&self) -> String {
        uuid_text(&self.uuid)
    }
}

fn open_queue(device: &Arc<dyn Device>) -> Result<BlockingIo> {
    Ok(BlockingIo::new(device)?)
}

fn read_slot(io: &mut BlockingIo, slot: usize, blocks: u64) -> Result<Result<OnDisk, SlotError>> {
    let mut bytes = [0; BLOCK_SIZE];
    match io.read(slot_byte(slot, blocks), &mut bytes) {
        Ok(()) => Ok(OnDisk::parse(&bytes, slot)),
        // A slot that cannot be read is a damaged one: another may do.
        Err(error) => Ok(Err(SlotError::Damaged(error.to_string()))),
    }
}

/// Makes an empty filesystem on `device`; everything on it is lost.
///
/// # Errors
/// [`Error::AlreadyFormatted`] without `force`, [`Error::DeviceTooSmall`], [`Error::BadOption`], [`Error::Io`], and
/// [`Error::Device`] when the device is in use.
pub fn format(device: &Arc<dyn Device>, options: &FormatOptions) -> Result<()> {
    let _claim = Claim::take(device)?;
    if options.label.len() > LABEL_MAX {
        return Err(Error::BadOption { what: format!("the label is longer than {LABEL_MAX} bytes") });
    }
    let blocks = superblock::total_blocks(device.name(), device.geometry())?;
    let mut io = open_queue(device)?;
    let mut newest = 0;
    for slot in 0..SLOTS {
        if let Ok(old) = read_slot(&mut io, slot, blocks)? {
            if !options.force {
                let uuid = uuid_text(&old.uuid);
                return Err(Error::AlreadyFormatted { device: device.name().to_owned(), uuid });
            }
            newest = newest.max(old.generation.get());
        }
    }
    let mut uuid = [0; 16];
    getrandom(&mut uuid)?;
    let mut sb = OnDisk::new(uuid, &options.label, blocks, inodes::now_ns());
    // Later than anything that was there, so that no old slot wins should this be interrupted half way.
    let generation = Generation(newest + 1);
    sb.generation = generation.0.into();
    let reserved: u64 = superblock::reserved_runs(blocks).iter().map(|run| run.len).sum();
    sb.free_blocks = (blocks - reserved).into();
    // The slots of the other parity go first: a crash leaves the old filesystem or the new one.
    for slot in slots_of(generation) {
        let what = "writing a superblock";
        let bytes = sb.sealed(slot);
        io.write_fua(slot_byte(slot, blocks), bytes.as_bytes()).map_err(|e| Error::io(what, e))?;
    }
    for slot in slots_of(Generation(generation.0 + 1)) {
        let what = "clearing an old superblock";
        io.write_fua(slot_byte(slot, blocks), &[0; BLOCK_SIZE]).map_err(|e| Error::io(what, e))?;
    }
    Ok(())
}

fn getrandom(bytes: &mut [u8]) -> Result<()> {
    use std::io::Read;
    let what = |e: std::io::Error| Error::BadOption { what: format!("no random numbers for a UUID: {e}") };
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(bytes)).map_err(what)
}

/// The newest valid superblock.
fn find_superblock(device: &Arc<dyn Device>, blocks: u64) -> Result<OnDisk> {
    let mut io = open_queue(device)?;
    let mut found: Vec<OnDisk> = Vec::new();
    let mut damaged = Vec::new();
    for slot in 0..SLOTS {
        match read_slot(&mut io, slot, blocks)? {
            Ok(sb) => found.push(sb),
            Err(SlotError::Foreign) => {}
            Err(SlotError::Damaged(why)) => damaged.push(format!("slot {slot}: {why}")),
        }
    }
    let device = device.name().to_owned();
    for why in &damaged {
        log::warn!("{device}: damaged superblock, {why}");
    }
    match found.into_iter().max_by_key(|sb| sb.generation.get()) {
        Some(sb) => Ok(sb),
        None if damaged.is_empty() => {
            let why = "none of the four superblock slots is one of ours".to_owned();
            Err(Error::NotAFilesystem { device, why })
        }
        None => Err(Error::NoSuperblock { device, why: damaged.join("; ") }),
    }
}

/// The metadata of a durable state, ready for its next generation.
fn open_meta(sb: &OnDisk, options: &MountOptions) -> Result<Meta> {
    let total_blocks = sb.total_blocks.get();
    let mut trees = TreeKind::ALL.map(|kind| Tree::new(kind.id()));
    for kind in TreeKind::ALL {
        let root = &sb.roots[kind.index()];
        if root.height.get() == 0 {
            continue;
        }
        let level = u8::try_from(root.height.get() - 1).map_err(|_| {
            Error::corrupt(format!("the {} tree is {} levels high", kind.name(), root.height))
        })?;
        let ptr = NodePtr {
            addr: BlockAddr(root.addr.get()),
            generation: Generation(root.generation.get()),
            checksum: root.checksum.get(),
            tree: kind.id(),
            level,
        };
        trees[kind.index()] = Tree::open(ptr).map_err(|e| Error::corrupt(e.to_string()))?;
    }
    let unused = trees[TreeKind::Space.index()].is_empty();
    let free = if unused { total_blocks } else { sb.free_blocks.get() };
    let mut alloc = Allocator::new(total_blocks, free).map_err(|e| Error::corrupt(e.to_string()))?;
    if unused {
        superblock::mark_reserved(&mut alloc, total_blocks).map_err(|e| Error::corrupt(e.to_string()))?;
    }
    Ok(Meta {
        cache: NodeCache::new(sb.uuid, options.node_cache_bytes),
        trees,
        alloc,
        generation: Generation(sb.generation.get() + 1),
        changed: false,
        next_inode: InodeId(sb.next_inode.get()),
        files: sb.files.get(),
        total_blocks,
        open: HashMap::new(),
        dirty: Vec::new(),
        reap: Vec::new(),
        preallocated: sb.preallocated_blocks.get(),
        preallocating: 0,
        features: sb.incompatible.get(),
        unpublished: HashSet::new(),
        reserved: Default::default(),
        oldest_epoch: u64::MAX,
        freed_in: HashSet::new(),
        space_needs: Default::default(),
        space_stored: Default::default(),
    })
}

impl TreeKind {
    /// The id that nodes of the tree carry.
    pub(crate) fn id(self) -> TreeId {
        TreeId(self as u8 + 1)
    }
}

/// The thread that looks after a mount.
struct Helper {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Helper {
    fn start(core: &Arc<Core>) -> Result<Helper> {
        let stop = Arc::new(AtomicBool::new(false));
        let (flag, core) = (Arc::clone(&stop), Arc::clone(core));
        let thread = std::thread::Builder::new()
            .name("gaur-helper".into())
            .spawn(move || help(&core, &flag))
            .map_err(|e| Error::BadOption { what: format!("cannot start the helper thread: {e}") })?;
        Ok(Helper { stop, thread })
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.thread().unpark();
        if self.thread.join().is_err() {
            log::error!("the helper thread panicked");
        }
    }
}

/// The helper's life: drive channels that were left alone; give back the space of deleted files whose last handle was
/// dropped; write back what has been dirty for long; commit what has been waiting for long.
fn help(core: &Arc<Core>, stop: &AtomicBool) {
    let mut channel = None;
    let mut dirty_since: Option<Instant> = None;
    while !stop.load(Ordering::Acquire) {
        let busy = core.drive_abandoned();
        std::thread::park_timeout(if busy { HELPER_BUSY } else { HELPER_IDLE });
        if core.check_writable().is_err() {
            continue;
        }
        let (changed, reap) = {
            let meta = core.meta.lock();
            (meta.changed, !meta.reap.is_empty())
        };
        if !changed {
            dirty_since = None;
        } else if dirty_since.is_none() {
            dirty_since = Some(Instant::now());
        }
        let waited = dirty_since.map_or(Duration::ZERO, |since| since.elapsed());
        let due = changed && core.options.commit_interval.is_some_and(|interval| waited >= interval);
        let written_due = writeback::is_due(core);
        if !reap && !due && !written_due {
            continue;
        }
        if channel.is_none() {
            channel = Channel::new(core).ok();
        }
        let Some(channel) = &channel else { continue };
        let io = &channel.shared.io;
        let mut result = channel.block_on(truncate::reap(core, io));
        if written_due {
            result = result.and(channel.block_on(writeback::due(core, io)));
        }
        if due {
            dirty_since = None;
            result = result.and(channel.block_on(commit::sync(core, io)));
        }
        if let Err(error) = result {
            log::warn!("{}: background work: {error}", core.device.name());
        }
    }
}

/// A mounted filesystem. Cheap to clone; `Send` and `Sync`.
#[derive(Clone)]
pub struct Filesystem {
    mounted: Arc<Mounted>,
}

/// Unmounts on drop.
struct Mounted {
    core: Arc<Core>,
    helper: Mutex<Option<Helper>>,
}

impl std::fmt::Debug for Filesystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filesystem").field("device", &self.mounted.core.device.name()).finish_non_exhaustive()
    }
}

impl Filesystem {
    /// Mounts the filesystem on `device`.
    ///
    /// # Errors
    /// [`Error::NotAFilesystem`], [`Error::NoSuperblock`], [`Error::UnsupportedFormat`], [`Error::Device`] when the device is
    /// mounted already, [`Error::ReadOnly`] when a device opened read-only is to be mounted for writing.
    pub fn mount(device: Arc<dyn Device>, options: &MountOptions) -> Result<Filesystem> {
        if device.read_only() && !options.read_only {
            let why = format!("'{}' was opened read-only; mount it read-only", device.name());
            return Err(Error::ReadOnly { why });
        }
        let claim = Claim::take(&device)?;
        let blocks = superblock::total_blocks(device.name(), device.geometry())?;
        let sb = find_superblock(&device, blocks)?;
        sb.check_usable(device.name(), blocks, !options.read_only)?;
        let meta = open_meta(&sb, options)?;
        let core = Arc::new(Core::new(claim, device, options.clone(), sb, meta));
        let mounted = Mounted { core, helper: Mutex::new(None) };
        let core = &mounted.core;
        if !options.read_only {
            let channel = Channel::new(core)?;
            channel.block_on(truncate::finish_orphans(core, &channel.shared.io))?;
        }
        if options.helper_thread {
            *mounted.helper.lock() = Some(Helper::start(core)?);
        }
        Ok(Filesystem { mounted: Arc::new(mounted) })
    }

    /// Opens a channel for the calling thread.
    ///
    /// # Errors
    /// [`Error::Device`] when the device has no more queue pairs, [`Error::Unmounted`].
    pub fn channel(&self) -> Result<Channel> {
        self.mounted.core.check_mounted()?;
        Channel::new(&self.mounted.core)
    }

    /// Makes everything durable and unmounts. Other clones, channels and files answer [`Error::Unmounted`] from then on.
    /// Dropping the last clone does the same, and logs errors.
    ///
    /// # Errors
    /// What kept the last commit from becoming durable. The filesystem is unmounted in any case.
    pub fn unmount(self) -> Result<()> {
        self.mounted.unmount(true)
    }

    /// Unmounts without a commit, like a crash of the process.
    #[doc(hidden)]
    pub fn abandon(self) {
        let result = self.mounted.unmount(false);
        debug_assert!(result.is_ok());
    }

    /// What the filesystem is.
    pub fn info(&self) -> Info {
        let core = &self.mounted.core;
        let sb = core.superblock_template();
        Info {
            uuid: sb.uuid,
            label: sb.label(),
            generation: core.gate.durable().0,
            format_version: sb.format_version.get(),
            block_size: sb.block_size.get(),
            capacity_bytes: BlockAddr(core.total_blocks).byte(),
            created: SystemTime::UNIX_EPOCH + Duration::from_nanos(sb.created_ns.get()),
            atomic_write_max: crate::ATOMIC_WRITE_MAX as u64,
            write_batch_bytes_max: crate::WRITE_BATCH_BYTES_MAX as u64,
        }
    }

    /// Memory that the page cache may take, in bytes.
    pub fn cache_bytes(&self) -> usize {
        self.mounted.core.pages.limit_bytes()
    }

    /// Changes [`cache_bytes`](Self::cache_bytes). What is too much leaves at once, but for pages that are not on the device yet.
    pub fn set_cache_bytes(&self, bytes: usize) {
        self.mounted.core.pages.set_limit_bytes(bytes);
    }

    /// Of `n` direct writes one goes through the page cache, as if its range could not be freed of pages; 0: none.
    #[doc(hidden)]
    pub fn force_fallback(&self, n: u64) {
        self.mounted.core.fallback_one_in.store(n, Ordering::Relaxed);
    }

    /// Counters since the mount, and sizes now.
    pub fn stats(&self) -> Stats {
        self.mounted.core.stats()
    }
}

impl Mounted {
    fn unmount(&self, commit: bool) -> Result<()> {
        let core = &self.core;
        if !core.close() {
            return Ok(());
        }
        if let Some(helper) = self.helper.lock().take() {
            helper.stop();
        }
        let result = if commit { finish(core) } else { Ok(()) };
        core.shut_down();
        result
    }
}

/// Lets what was accepted complete, and commits it. What is answered with success is in the last commit: blocking calls of
/// other threads, which nobody waits for here, change nothing any more once the core is sealed.
fn finish(core: &Arc<Core>) -> Result<()> {
    core.drain();
    if core.is_read_only() {
        return Ok(());
    }
    let channel = Channel::new(core)?;
    core.stop_dirtying();
    let io = &channel.shared.io;
    let written = channel.block_on(writeback::all(core, io));
    let reaped = channel.block_on(truncate::reap(core, io));
    core.seal();
    written.and(reaped).and(channel.block_on(commit::sync_last(core, &channel.shared.io)))
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.unmount(true) {
            log::error!("unmounting '{}': {error}", self.core.device.name());
        }
    }
}
