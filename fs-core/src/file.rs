//! Open files.
//!
//! [`FileInner`] is the one object in memory for a file that is open or has changes that no commit has stored yet; [`File`] is a
//! user's handle on it. While a `FileInner` exists it is the truth about its inode: the record in the tree is written from it at
//! commit.
//!
//! Lock order: range lock, then the metadata lock, then the inode mutex, or that of the file's pages.
//!
//! A file has three sizes. The view's (in `map`) is what readers see. `finished` is where the furthest write ends that the trees have.
//! The inode's is what the last commit stored; it is made from the others by [`FileInner::disk_size`] when a commit stores the
//! inode, and covers no write that is not finished (rule 3 of the design; [`crate::ordered`] says how).

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::channel::operation::{OpenFlags, Stat};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::extent_map::ExtentMap;
use crate::mutation::{Mutation, broken};
use crate::ordered::{NO_BOUND, OrderedList};
use crate::page_cache::{FilePages, PageCache, Priority, ReadAhead};
use crate::range_lock::RangeLock;
use crate::records::inodes::Inode;
use crate::reserve::FileReserved;
use crate::sync::Mutex;
use crate::txn::Meta;
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock, InodeId};

/// Largest file in blocks.
pub(crate) const FILE_BLOCKS_MAX: u64 = 1 << 40;
/// Largest file in bytes (4 PiB).
pub const FILE_SIZE_MAX: u64 = FILE_BLOCKS_MAX << BLOCK_SHIFT;

/// A file in memory.
pub(crate) struct FileInner {
    pub(crate) id: InodeId,
    /// Where its content lies, and its size: what readers see.
    pub(crate) map: ExtentMap,
    /// Writers and truncates hold the range that they change.
    pub(crate) lock: RangeLock,
    /// The inode as the next commit will store it. Changed only under the metadata lock.
    pub(crate) inode: Mutex<Inode>,
    pub(crate) name: Mutex<Vec<u8>>,
    /// Handles. Grows only under the metadata lock.
    pub(crate) handles: AtomicU32,
    /// It has no name any more. Changed only under the metadata lock.
    pub(crate) unlinked: AtomicBool,
    /// Ordered extents: what has blocks and is not in the trees yet.
    pub(crate) ordered: OrderedList,
    /// What its dirty pages have reserved.
    pub(crate) reserved: FileReserved,
    /// Its pages in memory, from the first buffered access on.
    pages: OnceLock<Arc<FilePages>>,
    priority: AtomicU8,
    /// Where the furthest finished write ends, or what a truncate set. Changed only under the metadata lock.
    finished: AtomicU64,
    /// An entry among the orphans says that what lies beyond the size is to be cut off: of the commits (content beyond
    /// the size on disk), and of a long truncate. Changed only under the metadata lock.
    pub(crate) cut_by_commit: AtomicBool,
    pub(crate) cut_by_truncate: AtomicBool,
    /// A long truncate has failed half way: content behind the end is still in the tree. The next mount finishes it.
    pub(crate) cut_failed: AtomicBool,
    /// It is in the list of files that can go. Changed only under the metadata lock.
    pub(crate) reaped: AtomicBool,
    /// It is in the list of files whose inode the next commit stores. Changed only under the metadata lock.
    pub(crate) dirty: AtomicBool,
}

impl FileInner {
    pub(crate) fn new(id: InodeId, name: &[u8], inode: Inode, fresh: bool) -> FileInner {
        let map = if fresh { ExtentMap::new_empty() } else { ExtentMap::new_unloaded(inode.size) };
        FileInner {
            id,
            map,
            lock: RangeLock::default(),
            inode: Mutex::new(inode),
            name: Mutex::new(name.to_vec()),
            handles: AtomicU32::new(0),
            unlinked: AtomicBool::new(false),
            ordered: OrderedList::default(),
            reserved: FileReserved::default(),
            pages: OnceLock::new(),
            priority: AtomicU8::new(Priority::Normal as u8),
            finished: AtomicU64::new(inode.size),
            cut_by_commit: AtomicBool::new(false),
            cut_by_truncate: AtomicBool::new(false),
            cut_failed: AtomicBool::new(false),
            reaped: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
        }
    }

    pub(crate) fn stat(&self) -> Stat {
        let delayed = self.pages_if_any().map_or(0, |pages| pages.counts().dirty + pages.counts().writeback);
        let stat = self.inode.lock().stat(self.id);
        Stat { size: self.size(), delayed_bytes: delayed << BLOCK_SHIFT, ..stat }
    }

    // ---- pages

    /// Its pages, which are made if there are none.
    pub(crate) fn pages(&self, core: &Core) -> &Arc<FilePages> {
        self.pages_in(&core.pages)
    }

    pub(crate) fn pages_in(&self, cache: &Arc<PageCache>) -> &Arc<FilePages> {
        self.pages.get_or_init(|| FilePages::new(cache, self.id))
    }

    /// Its pages, if it has ever had any.
    #[inline]
    pub(crate) fn pages_if_any(&self) -> Option<&Arc<FilePages>> {
        self.pages.get()
    }

    /// Whether anything in the cache is newer than the device: then a direct read has to look there.
    #[inline]
    pub(crate) fn has_cached_writes(&self) -> bool {
        self.pages_if_any().is_some_and(|pages| pages.is_busy())
    }

    /// Drops the pages of `[from, to)`, dirty ones too, and gives their reservation back. The caller holds the range exclusively, and has
    /// waited for the ordered extents in it.
    pub(crate) fn discard_pages(self: &Arc<FileInner>, meta: &mut Meta, from: FileBlock, to: FileBlock) {
        if let Some(pages) = self.pages_if_any() {
            let undone = pages.discard(self, &(from.0..to.0));
            meta.unreserve_pages(self, undone);
        }
    }

    pub(crate) fn set_priority(&self, priority: Priority) {
        self.priority.store(priority as u8, Ordering::Relaxed);
    }

    pub(crate) fn priority(&self) -> Priority {
        Priority::from_u8(self.priority.load(Ordering::Relaxed))
    }

    // ---- sizes

    /// The trees have everything that a write has put before byte `end`. Under the metadata lock.
    pub(crate) fn finished_up_to(&self, end: u64) {
        self.finished.fetch_max(end, Ordering::Relaxed);
    }

    /// A truncate has set the size. Under the metadata lock, with the range locked.
    pub(crate) fn set_finished(&self, size: u64) {
        self.finished.store(size, Ordering::Relaxed);
    }

    /// The size that a commit may store at this moment, and whether there is finished content beyond it. Under the metadata lock.
    pub(crate) fn disk_size(&self) -> (u64, bool) {
        let finished = self.finished.load(Ordering::Relaxed);
        let ordered = || if broken(Mutation::SizeCoversUnfinished) { NO_BOUND } else { self.ordered.bound() };
        // Before the pages and behind them: a flight gets its bound from the pages, and gives it back if it fails, without the metadata
        // lock; it is always at one of the two.
        let before = ordered();
        let by_pages = self.pages_if_any().map_or(NO_BOUND, |pages| pages.bound());
        let size = finished.min(before).min(by_pages).min(ordered());
        (size, size < finished)
    }

    pub(crate) fn size(&self) -> u64 {
        self.map.view(&crate::extent_map::pin()).size()
    }
}

/// See [`File::accounting`].
#[doc(hidden)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Accounting {
    /// Bytes of dirty pages.
    pub delalloc_bytes: u64,
    /// Bytes of pages on their way to the device.
    pub writeback_bytes: u64,
    /// Bytes for which the file's pool has a reservation.
    pub pool_bytes: u64,
    /// Ordered extents.
    pub outstanding_extents: u64,
    /// Extents for which metadata is reserved.
    pub reserved_extents: u64,
    /// Bytes of content that are reserved and not allocated.
    pub reserved_bytes: u64,
    /// Bytes of checksums for which metadata is reserved.
    pub checksum_bytes: u64,
}

/// A handle on an open file. Clones share it; the file is closed when the last of them is dropped. `Send` and `Sync`:
/// any thread may use it with a channel of its own.
#[derive(Clone)]
pub struct File(Arc<Handle>);

/// What the clones of a handle share; the file is closed when it goes.
struct Handle {
    inner: Arc<FileInner>,
    core: Arc<Core>,
    flags: OpenFlags,
    readahead: Mutex<ReadAhead>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.release_handle(&self.inner);
    }
}

impl File {
    /// A new handle; the caller has counted it under the metadata lock.
    pub(crate) fn new(core: &Arc<Core>, inner: Arc<FileInner>, flags: OpenFlags) -> File {
        File(Arc::new(Handle { inner, core: Arc::clone(core), flags, readahead: Mutex::default() }))
    }

    pub(crate) fn inner(&self) -> &Arc<FileInner> {
        &self.0.inner
    }

    /// Whether the two are clones of one handle.
    #[inline]
    pub(crate) fn is_clone_of(&self, other: &File) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.0.flags.contains(OpenFlags::READ_ONLY) {
            let name = String::from_utf8_lossy(&self.name()).into_owned();
            return Err(Error::ReadOnly { why: format!("'{name}' was opened read-only") });
        }
        if self.inner().cut_failed.load(Ordering::Relaxed) {
            let name = String::from_utf8_lossy(&self.name()).into_owned();
            let why = format!("a truncate of '{name}' has failed half way; the next mount finishes it");
            return Err(Error::ReadOnly { why });
        }
        self.0.core.check_writable()
    }

    /// Whether reads and writes through this handle go through the page cache.
    pub fn is_buffered(&self) -> bool {
        self.0.flags.contains(OpenFlags::BUFFERED)
    }

    pub(crate) fn readahead(&self) -> &Mutex<ReadAhead> {
        &self.0.readahead
    }

    /// How the file's pages are treated when the page cache is full; for all handles on the file, until it is closed.
    pub fn priority(&self) -> Priority {
        self.inner().priority()
    }

    /// Changes [`priority`](Self::priority). It holds for pages that come into the cache from now on.
    pub fn set_priority(&self, priority: Priority) {
        self.inner().set_priority(priority);
    }

    /// Acknowledges that a write-back of the file has failed: every sync of it answers that error until this is called. The data itself
    /// is still in the page cache, and written back again, to another place, with each sync and from time to time. Returns
    /// the error.
    pub fn clear_error(&self) -> Option<Error> {
        self.inner().pages_if_any().and_then(|pages| pages.set_error(None))
    }

    /// Sums over the file that are all zero when nothing of it is on its way: for tests.
    #[doc(hidden)]
    pub fn accounting(&self) -> Accounting {
        let inner = self.inner();
        let counts = inner.pages_if_any().map(|pages| pages.counts()).unwrap_or_default();
        let reserved_blocks = inner.reserved.blocks.load(Ordering::Relaxed);
        let shares = inner.reserved.shares.load(Ordering::Relaxed);
        Accounting {
            delalloc_bytes: counts.dirty * BLOCK_SIZE as u64,
            writeback_bytes: counts.writeback * BLOCK_SIZE as u64,
            pool_bytes: counts.pool * BLOCK_SIZE as u64,
            outstanding_extents: inner.ordered.count(),
            reserved_extents: shares,
            reserved_bytes: reserved_blocks * BLOCK_SIZE as u64,
            checksum_bytes: shares * size_of::<u32>() as u64,
        }
    }

    /// Identity of the file; never reused.
    pub fn id(&self) -> InodeId {
        self.inner().id
    }

    /// Size in bytes, as readers see it now.
    pub fn size(&self) -> u64 {
        self.inner().size()
    }

    /// The name by which the file was opened, or that it was renamed to since.
    pub fn name(&self) -> Vec<u8> {
        self.inner().name.lock().clone()
    }
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("File")
            .field("id", &self.inner().id)
            .field("name", &String::from_utf8_lossy(&self.name()))
            .finish_non_exhaustive()
    }
}
