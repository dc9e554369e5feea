//! The space allocator: which blocks are in use, which may be handed out, and where the next ones should lie.
//!
//! # What it is for
//!
//! The address space `[0, total)` of 4 KiB blocks is cut in *regions* of 8192 blocks (32 MiB, the last may be shorter),
//! and 512 regions make a *group* (16 GiB). A region's bitmap and a group's free counts are values that the caller keeps
//! in a copy-on-write tree; a key without a value means "all free". In memory a region is two bitmaps:
//!
//! - `persist`: what the next commit writes; set = something refers to the block;
//! - `avail`: set = the block may be handed out now.
//!
//! | persist | avail | the block is |
//! |---|---|---|
//! | 1 | 0 | in use (perhaps already named by [`Allocator::free`], waiting for its commit) |
//! | 0 | 0 | frozen: freed by a commit that is not durable yet, or still read by someone |
//! | 0 | 1 | free |
//! | 1 | 1 | impossible |
//!
//! # The freed-space rule
//!
//! A freed block is not handed out before the commit that frees it is durable and no reader can still hold it. Without
//! the rule: generation 7 is durable and its tree says that block 100 holds the first 4 KiB of file A. A is overwritten,
//! the new data goes to block 200, block 100 is freed and at once handed to file B, whose data is written there. Now the
//! power fails. Generation 8 never reached its superblock, so mount goes back to generation 7, reads A from block 100, and
//! finds B's bytes (or a checksum error, and A is lost). Therefore:
//!
//! 1. [`Allocator::free`] only queues the run under the generation that is open; both bitmaps stay as they are.
//! 2. [`Allocator::begin_commit`] clears the queued runs in `persist`, so that the commit's own region records no longer
//!    count them as used, and moves them to the frozen list of that generation.
//! 3. [`Allocator::release`], called when the superblock of that generation is durable and its readers are gone, sets
//!    them in `avail`.
//!
//! Runs that no durable state and no log record ever named ([`Allocator::free_now`]) skip the way through the commit.
//!
//! # A commit, step by step (the caller holds its metadata lock throughout)
//!
//! 1. [`Allocator::needs_for_commit`] and load what it names, until it names nothing; then
//!    [`Allocator::ensure_ready`] for the metadata stream, so that no allocation of the commit can stop.
//! 2. [`Allocator::begin_commit`]. From here on, nodes of the space tree that are replaced go to
//!    [`Allocator::free_in_commit`].
//! 3. [`Allocator::pop_dirty_region`] and [`Allocator::pop_dirty_group`], encode, store in the tree, until both return
//!    `None`. Storing copies tree nodes, which allocates and frees, which makes regions dirty again: this is a fixpoint.
//!    **It ends** because a node is copied at most once in a commit (later changes of it happen in place, in memory), so
//!    only finitely many stores can allocate, and a store that neither allocates nor frees dirties nothing. For this the
//!    caller must change nodes already copied in this commit in place, and must not merge nodes during the loop; splits
//!    are bounded since a value never exceeds [`REGION_VALUE_MAX`], and no value is ever removed. Regions dirtied while
//!    a pass runs wait for the next pass, so that a pass encodes each region at most once; two passes are typical. (Or the
//!    caller runs the loop before step 2, storing [`Allocator::encode_region_largest`], and repeats the stores after it:
//!    then nothing grows, no node is copied, and the second time is a single pass.)
//! 4. [`Allocator::persisted_free`] goes into the superblock; [`Allocator::end_commit`]; `ensure_ready` with 0 gives up
//!    what is left of the promise. Operations of the next generation may now run while the nodes are written.
//! 5. When the superblock is durable and the generation unread: [`Allocator::release`].
//!
//! # Invariants
//!
//! - No block is handed out that the last durable generation refers to, that an encoded generation not yet released
//!   refers to, or that the caller named as held.
//! - What a commit encodes is exactly what is referenced: a data run that was handed out but that no tree names yet (its
//!   ordered extent is not finished) is passed to `begin_commit` as unpublished and is encoded as free. So a crash leaks
//!   nothing.
//! - A region with dirty, frozen or unpublished bits, or owned by a stream, stays loaded.
//! - Each region is owned by at most one stream; regions that are owned are in no index.
//! - Free counts, indices and summary words agree with the bitmaps at every return ([`Allocator::check`]).
//!
//! # What it deliberately does not do
//!
//! No I/O: what is not in memory is named in [`Stop::Load`]; the caller loads it from its *current* tree (the one in
//! memory, not the durable one) and repeats the call. No locking, no knowledge of readers, files, trees or devices, no
//! reservations of space for delayed allocation (the promise of `ensure_ready` is about not stopping), no merging of the
//! free lists of several generations, no discard. A run never crosses a region.
//!
//! # Where things are
//!
//! `bits` (words and hierarchical bitmaps) -> `region` (two bitmaps with summaries) -> `group` (counts) -> `index`
//! (regions by class of free count and of longest run) -> `format` (stored values) -> `space` (the structure, loading,
//! eviction; freed runs are `runs`) -> `place` (allocation) -> `commit` (freeing, commit, release) -> `check`.
//!
//! Sources: the two-level bitmap with summary words is that of TigerBeetle's `free_set.zig`; the deferred frees follow
//! btrfs (pinned extents) and fxfs `allocator.rs`; per-stream regions follow F2FS's active logs.

mod bits;
mod check;
mod commit;
mod format;
mod group;
mod index;
mod place;
mod region;
mod runs;
mod space;
#[cfg(test)]
mod tests;

use thiserror::Error;

use crate::types::{BlockAddr, Generation, Run};

pub use format::{GROUP_VALUE_MAX, REGION_VALUE_MAX};
pub use space::{Allocator, Counts, UsedRuns};

/// Blocks in a region (the last region of the address space may have fewer).
pub const REGION_BLOCKS: u64 = 1 << REGION_SHIFT;
/// `log2(REGION_BLOCKS)`.
pub const REGION_SHIFT: u32 = 13;
/// Regions in a group (the last group may have fewer).
pub const GROUP_REGIONS: u64 = 1 << GROUP_SHIFT;
/// `log2(GROUP_REGIONS)`.
pub const GROUP_SHIFT: u32 = 9;
/// The largest address space, in blocks (4 PiB).
pub const MAX_BLOCKS: u64 = 1 << 40;

const _: () = assert!((MAX_BLOCKS >> REGION_SHIFT) <= u32::MAX as u64);

/// Number of a region: block address / [`REGION_BLOCKS`]. The key of its value in the space tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u32);

/// Number of a group: region number / [`GROUP_REGIONS`]. The key of its value in the space tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

/// The region that contains a block. Addresses past [`MAX_BLOCKS`] give a region that no allocator has.
pub fn region_of(addr: BlockAddr) -> RegionId {
    RegionId(u32::try_from(addr.0 >> REGION_SHIFT).unwrap_or(u32::MAX))
}

/// The group that contains a region.
pub fn group_of(region: RegionId) -> GroupId {
    GroupId(region.0 >> GROUP_SHIFT)
}

/// Who allocates. Each stream fills regions of its own, so that what is written together lies together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Stream {
    /// File contents.
    Data = 0,
    /// Tree nodes.
    Metadata = 1,
}

impl Stream {
    /// Number of streams.
    pub const COUNT: usize = 2;
}

/// A value of the space tree that has to be in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Need {
    /// A group's free counts: [`Allocator::load_group`].
    Group(GroupId),
    /// A region's bitmap: [`Allocator::load_region`].
    Region(RegionId),
}

/// Why an allocation did not happen. Nothing was changed that the caller could see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Stop {
    /// Load this, then call again. Evict nothing in between.
    #[error("{0:?} has to be loaded")]
    Load(Need),
    /// No run of the minimum length is available now. A commit and release may help while [`Counts::pending`] > 0.
    #[error("no space left")]
    NoSpace,
}

/// What can be wrong with a request or with a stored value. Never a panic: damaged trees can cause each of these.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SpaceError {
    /// The address space is empty or larger than [`MAX_BLOCKS`], or the free count exceeds it.
    #[error("address space of {total} blocks with {free} free is impossible")]
    Geometry {
        /// Blocks of the address space.
        total: u64,
        /// Free blocks according to the superblock.
        free: u64,
    },
    /// The run is empty or leaves the address space.
    #[error("{run:?} lies outside of the {total} blocks")]
    OutOfRange {
        /// The run as given.
        run: Run,
        /// Blocks of the address space.
        total: u64,
    },
    /// A region or group with this number does not exist.
    #[error("{0:?} does not exist")]
    NoSuch(Need),
    /// A block of the run is not allocated: freed twice, or never handed out.
    #[error("{0:?} is freed but not allocated")]
    NotAllocated(Run),
    /// A block of the run is in use already.
    #[error("{0:?} is claimed but not free")]
    NotFree(Run),
    /// This has to be loaded first; nothing was changed.
    #[error("{0:?} is not loaded")]
    NotLoaded(Need),
    /// The generation is not open: its commit has begun or is over (or, in a commit, it is another's).
    #[error("{given:?} is not the open generation (last commit: {last:?})")]
    WrongGeneration {
        /// The generation as given.
        given: Generation,
        /// The generation of the last commit that was begun.
        last: Generation,
    },
    /// `begin_commit` without `end_commit` before it, or a call that needs a running commit without one.
    #[error("commit calls out of order: {0}")]
    CommitOrder(&'static str),
    /// A region's stored value is damaged.
    #[error("stored value of {region:?}: {what}")]
    BadRegion {
        /// Whose value it is.
        region: RegionId,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A group's stored value is damaged.
    #[error("stored value of {group:?}: {what}")]
    BadGroup {
        /// Whose value it is.
        group: GroupId,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A region's bitmap and its group's free count disagree.
    #[error("{region:?} has {bitmap} free blocks, its group says {summary}")]
    CountMismatch {
        /// Which region.
        region: RegionId,
        /// Free blocks by the bitmap.
        bitmap: u64,
        /// Free blocks by the group's value.
        summary: u64,
    },
    /// The groups' free counts and the superblock's disagree.
    #[error(
        "groups and superblock disagree about free blocks: {left} blocks unaccounted when loading {group:?}"
    )]
    TotalMismatch {
        /// The group whose load showed it.
        group: GroupId,
        /// Free blocks that the superblock leaves for the groups that were not loaded yet.
        left: u64,
    },
}
