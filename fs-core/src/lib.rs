//! Gaur's filesystem core: a copy-on-write filesystem that lives inside the process of its user.
//!
//! # Use
//!
//! Open a device (`bdev_adapter::open`), [`format()`] it once, [`Filesystem::mount`] it, and open a [`Channel`] on each thread
//! that works with files. Every call exists in three forms: blocking ([`Channel::read`]), as a future
//! ([`Channel::read_async`]), and as a value that is submitted and answered later ([`Channel::submit`], [`Channel::poll`]); the
//! first two are built on the third. Operations run on the thread that polls; nothing is handed to other threads.
//!
//! A handle is direct, or, with [`OpenFlags::BUFFERED`], goes through a page cache that the files of a mount share. Both kinds see the same
//! bytes of a file at every moment.
//!
//! # Durability
//!
//! What has completed is durable after a sync that began later returned. Until then, after a crash, each write of up to
//! [`ATOMIC_WRITE_MAX`] bytes (a buffered one: inside one aligned unit of 64 KiB) and each change of names is there or not, in no
//! promised order between syncs.
//!
//! # Reading the code
//!
//! The modules stand in the order in which a write meets them.

mod channel;
mod dispatch;
mod namespace;
mod file;
#[allow(unreachable_pub, reason = "public for `internals`")]
mod range_lock;
mod buffered;
mod coherence;
mod write;
mod read;
mod truncate;
mod inline;
mod preallocate;
mod punch;
mod batch;
mod layout;
mod reserve;
mod page_cache;
mod writeback;
mod store;
mod ordered;
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "a structure with a whole interface; not all of it has a user yet"
)]
mod alloc;
mod publish;
mod pieces;
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "a structure with a whole interface; not all of it has a user yet"
)]
mod extent_map;
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "a structure with a whole interface; not all of it has a user yet"
)]
mod checksum_cache;
mod load;
mod records;
mod txn;
#[allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    reason = "a structure with a whole interface; not all of it has a user yet"
)]
mod tree;
mod recheck;
mod commit;
mod superblock;
mod core;
mod mount;
mod check;
mod stats;
mod error;
#[allow(unreachable_pub, reason = "some of the types are public, the others have the same form")]
mod types;
mod sync;
mod mutation;
// Tests from outside, which run inside too.
#[cfg(test)]
extern crate self as fs_core;
#[cfg(all(test, not(loom)))]
mod races;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;

pub use crate::batch::{WRITE_BATCH_BLOCKS_MAX, WRITE_BATCH_BYTES_MAX, WriteBatch};
pub use crate::channel::operation::{
    Completion, DirEntry, ExtentState, FileExtent, Growth, OpenFlags, Operation, Output, Stat, StatFs,
};
pub use crate::channel::{Channel, Extents, List, OpFuture};
pub use crate::check::{CheckProgress, CheckReport};
pub use crate::error::{Error, Result};
#[doc(hidden)]
pub use crate::file::Accounting;
pub use crate::file::{FILE_SIZE_MAX, File};
pub use crate::layout::BlockOwner;
pub use crate::mount::{Filesystem, FormatOptions, Info, MountOptions, format};
pub use crate::page_cache::Priority;
pub use crate::records::NAME_MAX;
pub use crate::stats::Stats;
pub use crate::types::{BLOCK_SIZE, BlockAddr, InodeId};
pub use crate::write::ATOMIC_WRITE_MAX;
