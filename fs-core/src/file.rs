//! Open files.
//!
//! [`FileInner`] is the one object in memory for a file that is open or has changes that no commit has stored yet; [`File`] is a
//! user's handle on it. While a `FileInner` exists it is the truth about its inode: the record in the tree is written from it at
//! commit.
//!
//! Lock order: range lock, then the metadata lock, then the inode mutex.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};

use parking_lot::Mutex;

use crate::channel::operation::Stat;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::extent_map::ExtentMap;
use crate::range_lock::RangeLock;
use crate::records::inodes::Inode;
use crate::types::{BLOCK_SHIFT, InodeId};

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
            dirty: AtomicBool::new(false),
        }
    }

    pub(crate) fn stat(&self) -> Stat {
        self.inode.lock().stat(self.id)
    }

    pub(crate) fn size(&self) -> u64 {
        self.map.view(&crate::extent_map::pin()).size()
    }
}

/// A handle on an open file. Clones share it; the file is closed when the last of them is dropped. `Send` and `Sync`:
/// any thread may use it with a channel of its own.
#[derive(Clone)]
pub struct File(Arc<Handle>);

/// What the clones of a handle share; the file is closed when it goes.
struct Handle {
    inner: Arc<FileInner>,
    core: Arc<Core>,
    read_only: bool,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.release_handle(&self.inner);
    }
}

impl File {
    /// A new handle; the caller has counted it under the metadata lock.
    pub(crate) fn new(core: &Arc<Core>, inner: Arc<FileInner>, read_only: bool) -> File {
        File(Arc::new(Handle { inner, core: Arc::clone(core), read_only }))
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
        if self.0.read_only {
            let name = String::from_utf8_lossy(&self.name()).into_owned();
            return Err(Error::ReadOnly { why: format!("'{name}' was opened read-only") });
        }
        self.0.core.check_writable()
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
