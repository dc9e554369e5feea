//! Gaur's filesystem core: a copy-on-write filesystem that lives inside the process of its user.
//!
//! # Use
//!
//! Open a device (`bdev_adapter::open`), [`format()`] it once, [`Filesystem::mount`] it, and open a [`Channel`] on each thread
//! that works with files. Every call exists in three forms: blocking ([`Channel::read`]), as a future
//! ([`Channel::read_async`]), and as a value that is submitted and answered later ([`Channel::submit`], [`Channel::poll`]); the
//! first two are built on the third. Operations run on the thread that polls; nothing is handed to other threads.
//!
//! # Durability
//!
//! What has completed is durable after a sync that began later returned. Until then, after a crash, each write of up to
//! [`ATOMIC_WRITE_MAX`] bytes and each change of names is there or not, in no promised order between syncs.
//!
//! # Reading the code
//!
//! The modules stand in the order in which a write meets them.

mod channel;
mod dispatch;
mod namespace;
mod file;
mod range_lock;
mod write;
mod read;
mod truncate;
mod ordered;
#[cfg_attr(not(feature = "internals"), allow(dead_code))]
mod alloc;
mod pieces;
#[cfg_attr(not(feature = "internals"), allow(dead_code))]
mod extent_map;
#[cfg_attr(not(feature = "internals"), allow(dead_code))]
mod checksum_cache;
mod load;
mod records;
mod txn;
#[cfg_attr(not(feature = "internals"), allow(dead_code))]
mod tree;
mod commit;
mod superblock;
mod core;
mod mount;
mod check;
mod stats;
mod error;
mod types;

pub use crate::channel::operation::{Completion, DirEntry, OpenFlags, Operation, Output, Stat, StatFs};
pub use crate::channel::{Channel, List, OpFuture};
pub use crate::check::{CheckProgress, CheckReport};
pub use crate::error::{Error, Result};
pub use crate::file::{FILE_SIZE_MAX, File};
pub use crate::mount::{Filesystem, FormatOptions, Info, MountOptions, format};
pub use crate::records::NAME_MAX;
pub use crate::stats::Stats;
pub use crate::types::{BLOCK_SIZE, BlockAddr, InodeId};
pub use crate::write::ATOMIC_WRITE_MAX;
