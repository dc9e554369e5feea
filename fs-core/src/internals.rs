//! Parts of the inside, for measurements of single structures. Behind the feature `internals`; no promise about any of it.
//!
//! Nothing here is a form of its own: these are the structures that the filesystem uses.

pub use crate::alloc::{
    Allocator, Counts, GROUP_REGIONS, GroupId, MAX_BLOCKS, Need, REGION_BLOCKS, RegionId, SpaceError, Stop,
    Stream, group_of, region_of,
};
pub use crate::checksum_cache::ChecksumCache;
pub use crate::extent_map::{
    BadExtents, BlockEnd, BlockRange, ChecksumSink, Entry, EpochGuard, ExtentMap, FileVersion, LOOKUP_LANES,
    LoadOutcome, LoadTicket, MAX_FILE_BLOCKS, MapStats, Mapping, NewExtent, PublishWrite, View, pin,
};
pub use crate::range_lock::{Acquire, Mode, RangeGuard, RangeLock};
pub use crate::types::{BlockCount, FileBlock, Generation, Run};
