//! The page cache: contents of files in memory, for buffered I/O. One for a mount, bounded, shared by all its files.
//!
//! # What is where
//!
//! A file that was ever read or written through the cache has [`FilePages`] ([`index`]): its pages by aligned units of 64 KiB, and
//! what of them is dirty (newer than the device, and waiting) or in write-back (on its way). [`PageCache`] is what the files
//! share: the budget, the queues that say which unit leaves next ([`queues`]), and the list of files with dirty pages, oldest
//! first. [`readahead`] decides what a sequential reader will want next.
//!
//! # Invariants
//!
//! - A page is not modified while anybody else holds it ([`page`]).
//! - A clean page equals the file's blocks under the current view. So whoever changes blocks behind the cache (direct writes,
//!   truncates) drops the pages under an exclusive range lock before anybody can read them again ([`crate::coherence`]), and
//!   whoever brings a page in holds the range shared from before it looked the page up until the page is in
//!   ([`crate::buffered`]).
//! - Dirty pages and pages in write-back are never evicted. For each dirty page there is a reservation of space in the file's
//!   pool ([`crate::reserve`]); one in write-back has its reservation in the flight ([`crate::writeback`]).
//! - A file with such pages is in the list of dirty files, and so stays in memory without a handle.
//! - Units are the unit of write-back too: what is dirty in one at a moment goes to the device in one transaction.
//!
//! # Locks
//!
//! The lock of a file's pages lies below the metadata lock; the list of dirty files and the queues lie below that. Eviction takes the
//! queues, lets go, and then takes the pages of one file.
//!
//! # What it does not do
//!
//! No I/O, no range locks, no knowledge of the device. Clean pages of a file go with its last handle.

mod index;
mod page;
mod queues;
mod readahead;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

pub(crate) use self::index::{Batch, FilePages, NewPage, UNIT_BLOCKS, Unfit};
pub(crate) use self::page::Page;
use self::queues::{Evicted, Queues, Tag};
pub(crate) use self::readahead::{Ahead, ReadAhead};
use crate::error::Error;
use crate::file::FileInner;
use crate::sync::Mutex;
use crate::types::{BLOCK_SIZE, InodeId};

/// Least number of pages that may be dirty, however small the cache: writers must get somewhere.
const DIRTY_MIN: u64 = 512;

/// How the pages of a file are treated when memory is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Priority {
    /// They go first.
    Low = 1,
    /// They stay if they are used again soon.
    #[default]
    Normal = 0,
    /// They stay as long as those that are used often.
    High = 2,
}

impl Priority {
    pub(crate) fn from_u8(value: u8) -> Priority {
        match value {
            1 => Priority::Low,
            2 => Priority::High,
            _ => Priority::Normal,
        }
    }
}

/// See the module documentation.
pub(crate) struct PageCache {
    /// Pages that may be resident.
    limit: AtomicU64,
    resident: AtomicU64,
    /// Pages that are dirty or in write-back.
    busy: AtomicU64,
    queues: Mutex<Queues>,
    dirty_files: Mutex<BTreeMap<(Instant, InodeId), Arc<FileInner>>>,
    /// Files of which a write-back has failed.
    failed: Mutex<BTreeMap<InodeId, Weak<FilePages>>>,
}

impl PageCache {
    pub(crate) fn new(bytes: usize) -> PageCache {
        PageCache {
            limit: AtomicU64::new(pages_of(bytes)),
            resident: AtomicU64::new(0),
            busy: AtomicU64::new(0),
            queues: Mutex::default(),
            dirty_files: Mutex::default(),
            failed: Mutex::default(),
        }
    }

    // ---- the budget

    pub(crate) fn limit_bytes(&self) -> usize {
        self.limit.load(Ordering::Relaxed) as usize * BLOCK_SIZE
    }

    /// Changes the budget; what is too much leaves at once, as far as it is clean.
    pub(crate) fn set_limit_bytes(&self, bytes: usize) {
        self.limit.store(pages_of(bytes), Ordering::Relaxed);
        self.shrink();
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        self.resident.load(Ordering::Relaxed) * BLOCK_SIZE as u64
    }

    pub(crate) fn busy_pages(&self) -> u64 {
        self.busy.load(Ordering::Relaxed)
    }

    /// Dirty pages from which on writers help to write back.
    pub(crate) fn dirty_limit(&self) -> u64 {
        (self.limit.load(Ordering::Relaxed) / 2).max(DIRTY_MIN)
    }

    /// Evicts until the budget is kept, or nothing is left that may go. Called without any lock of this module.
    pub(crate) fn shrink(&self) {
        while self.resident.load(Ordering::Relaxed) > self.limit.load(Ordering::Relaxed) {
            // The guard must be gone before the file's pages are locked.
            let next = self.queues.lock().next();
            let Some((tag, file)) = next else { return };
            let evicted = file.upgrade().map_or(Evicted::Stale, |file| file.evict(&tag));
            if let Evicted::Gone = evicted {
                self.queues.lock().remember(&tag);
            }
        }
    }

    // ---- for `index`, under the lock of a file's pages

    fn list(&self, tag: &Arc<Tag>, priority: Priority) {
        if !tag.is_listed() {
            self.queues.lock().list(tag, priority);
        }
    }

    fn forget(&self, tag: &Tag) {
        self.queues.lock().forget(tag);
    }

    // ---- dirty files

    /// The file that has been dirty for the longest, and since when.
    pub(crate) fn oldest_dirty(&self) -> Option<(Instant, Arc<FileInner>)> {
        let files = self.dirty_files.lock();
        files.first_key_value().map(|((since, _), file)| (*since, Arc::clone(file)))
    }

    /// Every file that has pages which are dirty or in write-back.
    pub(crate) fn dirty_files(&self) -> Vec<Arc<FileInner>> {
        self.dirty_files.lock().values().cloned().collect()
    }

    /// The error of a write-back that nobody has acknowledged, of any file.
    pub(crate) fn first_error(&self) -> Option<Error> {
        let failed: Vec<_> = self.failed.lock().iter().map(|(id, file)| (*id, file.upgrade())).collect();
        for (id, file) in failed {
            match file.and_then(|file| file.error()) {
                Some(error) => return Some(error),
                None => self.failed.lock().remove(&id),
            };
        }
        None
    }

    /// The files that have been dirty for `age` or longer, oldest first.
    pub(crate) fn dirty_for(&self, age: Duration) -> Vec<Arc<FileInner>> {
        let now = Instant::now();
        let files = self.dirty_files.lock();
        let old = files.iter().take_while(|((since, _), _)| now.saturating_duration_since(*since) >= age);
        old.map(|(_, file)| Arc::clone(file)).collect()
    }
}

fn pages_of(bytes: usize) -> u64 {
    (bytes / BLOCK_SIZE) as u64
}
