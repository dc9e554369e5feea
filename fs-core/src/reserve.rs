//! Reservations: space that a buffered write has been promised and that its write-back has not taken yet.
//!
//! A page is accepted only with room for it: one block for its content, and a share of the metadata that it may need. So want of
//! space is the answer to a write, never to a later write-back. What is reserved is free for nobody else
//! ([`Meta::user_free`]), and `statfs` counts it as reserved.
//!
//! # The metadata share
//!
//! In the worst case each page becomes an extent of its own amid a longer one: two records more than before (itself, and the half
//! behind it), of 48 bytes each with key and slot; and every second page begins a checksum chunk of its own (280 bytes; a single
//! block has its checksum in its record). That is 96 + 140 bytes a page. Leaves that were split are half full, 2000 bytes,
//! and the levels above add a fortieth: 0.12 nodes a page. [`PAGES_PER_NODE`] is 8: 0.125. (The copies of nodes that a
//! transaction makes on its way are given back by the next commit; they come from what is kept back for commits.)
//!
//! # Life
//!
//! [`Reservation::take`] before a write is accepted -> [`Reservation::move_to_pool`] when its pages are dirty: the file's pool holds one
//! for each dirty page -> [`Reservation::from_pool`] when write-back takes pages -> the block share is used up by the
//! allocation ([`Txn::allocate_reserved`]), and comes back should the [ordered extent](crate::ordered) fail -> the rest is
//! settled in the transaction that publishes ([`Meta::settle_shares`]), or goes back to the pool or to all. A reservation that is dropped in
//! any other way is a bug: it asserts, and in a release build is logged and given back.
//!
//! [`Txn::allocate_reserved`]: crate::txn::Txn::allocate_reserved

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::channel::io::Io;
use crate::core::Core;
use crate::error::Result;
use crate::file::FileInner;
use crate::txn::{Meta, Room, transact};

/// Dirty pages that may need a tree node.
pub(crate) const PAGES_PER_NODE: u64 = 8;

/// What is reserved in a mount. Under the metadata lock.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reserved {
    /// Blocks for content that are not allocated yet.
    pub(crate) blocks: u64,
    /// Pages that have a metadata share.
    pub(crate) shares: u64,
}

impl Reserved {
    /// Blocks that nobody else may take.
    pub(crate) fn total(self) -> u64 {
        self.blocks + self.shares.div_ceil(PAGES_PER_NODE)
    }
}

/// The same for one file; changed under the metadata lock, read by whoever wants to know.
#[derive(Debug, Default)]
pub(crate) struct FileReserved {
    pub(crate) blocks: AtomicU64,
    pub(crate) shares: AtomicU64,
}

impl Meta {
    fn reserve_pages(&mut self, file: &FileInner, pages: u64) {
        self.reserve_blocks(file, pages);
        self.reserved.shares += pages;
        file.reserved.shares.fetch_add(pages, Ordering::Relaxed);
    }

    /// Blocks that were allocated from a reservation came back.
    pub(crate) fn reserve_blocks(&mut self, file: &FileInner, blocks: u64) {
        self.reserved.blocks += blocks;
        file.reserved.blocks.fetch_add(blocks, Ordering::Relaxed);
    }

    /// Blocks of a reservation were allocated.
    pub(crate) fn use_reserved(&mut self, file: &FileInner, blocks: u64) {
        assert!(self.reserved.blocks >= blocks, "more was used than was reserved");
        self.reserved.blocks -= blocks;
        file.reserved.blocks.fetch_sub(blocks, Ordering::Relaxed);
    }

    /// The trees have the content of `pages` reserved pages.
    pub(crate) fn settle_shares(&mut self, file: &FileInner, pages: u64) {
        assert!(self.reserved.shares >= pages, "more was settled than was reserved");
        self.reserved.shares -= pages;
        file.reserved.shares.fetch_sub(pages, Ordering::Relaxed);
    }

    /// Gives the reservation of `pages` pages back that never got anywhere.
    pub(crate) fn unreserve_pages(&mut self, file: &FileInner, pages: u64) {
        self.use_reserved(file, pages);
        self.settle_shares(file, pages);
    }
}

/// Space for so many pages of a file; see the module documentation.
#[must_use = "a reservation must be settled or given back"]
pub(crate) struct Reservation {
    core: Arc<Core>,
    file: Arc<FileInner>,
    pages: u64,
}

impl Reservation {
    /// Reserves space for `pages` pages.
    ///
    /// # Errors
    /// [`Error::NoSpace`](crate::Error::NoSpace); nothing is reserved then.
    pub(crate) async fn take(
        core: &Arc<Core>,
        io: &Io,
        file: &Arc<FileInner>,
        pages: u64,
    ) -> Result<Reservation> {
        if pages > 0 {
            transact(core, io, |t| {
                t.check_room(Room::Delayed(pages))?;
                t.meta.reserve_pages(file, pages);
                Ok(())
            })
            .await?;
        }
        Ok(Reservation { core: Arc::clone(core), file: Arc::clone(file), pages })
    }

    /// `used` pages of it belong to the file's pool now; the rest is given back.
    pub(crate) fn into_pool(mut self, used: u64) {
        assert!(used <= self.pages, "a write dirtied more pages than it reserved");
        self.pages -= used;
        self.give_back();
    }

    /// A part of it belongs to the file's pool now.
    pub(crate) fn move_to_pool(&mut self, used: u64) {
        assert!(used <= self.pages, "a write dirtied more pages than it reserved");
        self.pages -= used;
    }

    /// Takes over `pages` pages that have just left the file's pool.
    pub(crate) fn from_pool(core: &Arc<Core>, file: &Arc<FileInner>, pages: u64) -> Reservation {
        Reservation { core: Arc::clone(core), file: Arc::clone(file), pages }
    }

    /// Gives all of it back.
    pub(crate) fn give_back(mut self) {
        let pages = std::mem::take(&mut self.pages);
        if pages > 0 {
            self.core.meta.lock().unreserve_pages(&self.file, pages);
        }
    }

    /// Its blocks were allocated, and its shares [settled](Meta::settle_shares) in the transaction that published them.
    pub(crate) fn settled(mut self) {
        self.pages = 0;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let left = std::mem::take(&mut self.pages);
        if left > 0 {
            debug_assert!(std::thread::panicking(), "a reservation of {left} pages was dropped");
            log::error!("a reservation of {left} pages was dropped");
            self.core.meta.lock().unreserve_pages(&self.file, left);
        }
    }
}
