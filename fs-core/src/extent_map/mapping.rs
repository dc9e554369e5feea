//! What a file block can map to, and how the map packs it.
//!
//! The public types name things in whole blocks; [`Value`] and [`Cell`] are their packed form inside the nodes: 16 bytes
//! an entry (start 4, value 8, checksum 4).
//!
//! Positions, exclusive ends and lengths are three types ([`FileBlock`], [`BlockEnd`], [`BlockCount`]). Inclusive ends
//! do not exist here: the races this module guards against began with one taken for the other.

use std::fmt;

use crate::types::{BLOCK_SIZE, BlockAddr, BlockCount, FileBlock};

/// Blocks a file can have: 2^40 (4 PiB). Every map covers exactly `[0, MAX_FILE_BLOCKS)`.
pub const MAX_FILE_BLOCKS: u64 = 1 << 40;

/// Exclusive end of a range of file blocks: the first block behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct BlockEnd(pub u64);

impl BlockEnd {
    /// The block that follows the range, as a position: where the next range would start.
    pub fn next_start(self) -> FileBlock {
        FileBlock(self.0)
    }
}

/// A range of file blocks, `[start, end)`, inside `[0, MAX_FILE_BLOCKS)`. May be empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRange {
    start: FileBlock,
    end: BlockEnd,
}

impl BlockRange {
    /// All blocks a file can have.
    pub const ALL: BlockRange = BlockRange { start: FileBlock(0), end: BlockEnd(MAX_FILE_BLOCKS) };

    /// `len` blocks from `start`; what lies behind [`MAX_FILE_BLOCKS`] is cut off.
    pub fn new(start: FileBlock, len: u64) -> BlockRange {
        BlockRange::between(start, BlockEnd(start.0.saturating_add(len)))
    }

    /// The blocks from `start` up to `end`; what lies behind [`MAX_FILE_BLOCKS`] is cut off, an inverted range is empty.
    pub fn between(start: FileBlock, end: BlockEnd) -> BlockRange {
        let end = BlockEnd(end.0.min(MAX_FILE_BLOCKS));
        BlockRange { start: FileBlock(start.0.min(end.0)), end }
    }

    /// As [`BlockRange::new`], for figures from outside: `None` unless the range is not empty and fits whole.
    pub fn checked(start: FileBlock, len: u64) -> Option<BlockRange> {
        let end = start.0.checked_add(len).filter(|end| *end <= MAX_FILE_BLOCKS)?;
        (len > 0).then_some(BlockRange { start, end: BlockEnd(end) })
    }

    /// The blocks from `start` to the end of the largest file.
    pub fn from(start: FileBlock) -> BlockRange {
        BlockRange::between(start, BlockEnd(MAX_FILE_BLOCKS))
    }

    /// The blocks that hold bytes `[offset, offset + len)`.
    pub fn of_bytes(offset: u64, len: u64) -> BlockRange {
        let end = offset.saturating_add(len).div_ceil(BLOCK_SIZE as u64);
        BlockRange::between(FileBlock::containing(offset), BlockEnd(end))
    }

    /// First block.
    pub fn start(self) -> FileBlock {
        self.start
    }

    /// Exclusive end.
    pub fn end(self) -> BlockEnd {
        self.end
    }

    /// Length.
    pub fn len(self) -> BlockCount {
        BlockCount(self.end.0 - self.start.0)
    }

    /// Whether it holds no block.
    pub fn is_empty(self) -> bool {
        self.start.0 == self.end.0
    }

    /// Whether `block` lies inside.
    pub fn contains(self, block: FileBlock) -> bool {
        self.start <= block && block.0 < self.end.0
    }

    /// Whether the two share a block.
    pub fn overlaps(self, other: BlockRange) -> bool {
        self.start.0 < other.end.0 && other.start.0 < self.end.0
    }

    /// What the two share; empty if nothing.
    pub fn intersection(self, other: BlockRange) -> BlockRange {
        BlockRange::between(self.start.max(other.start), self.end.min(other.end))
    }
}

impl fmt::Display for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start.0, self.end.0)
    }
}

/// What a run of file blocks maps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mapping {
    /// Not loaded from the metadata tree. Whoever needs it loads it: it is neither data nor a hole.
    Unknown,
    /// No block: reads as zeros.
    Hole,
    /// Written blocks, consecutive on the device.
    Data {
        /// Address of the first.
        addr: BlockAddr,
        /// crc32c of the block, where the run is exactly one block and the checksum is at hand. `None` says nothing about
        /// whether one is stored: the checksum cache, then the metadata tree know.
        checksum: Option<u32>,
    },
    /// Blocks that are allocated and were never written: read as zeros.
    Preallocated {
        /// Address of the first.
        addr: BlockAddr,
    },
    /// The content lies in the metadata tree.
    Inline,
}

/// A mapping to put into the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewExtent {
    /// The file blocks it covers; not empty.
    pub range: BlockRange,
    /// What they map to.
    pub mapping: Mapping,
}

impl NewExtent {
    /// `len` blocks from `file_block` that map to `mapping`.
    pub fn new(file_block: FileBlock, len: u64, mapping: Mapping) -> NewExtent {
        NewExtent { range: BlockRange::new(file_block, len), mapping }
    }

    /// Whether it can be stored: not empty, addresses of 48 bits, a checksum only for a single block.
    pub(super) fn is_sound(&self) -> bool {
        let len = self.range.len().0;
        let fits = |addr: BlockAddr| addr.0.checked_add(len).is_some_and(|end| end <= Value::ADDRESSES);
        len > 0
            && match self.mapping {
                Mapping::Data { addr, checksum } => fits(addr) && (checksum.is_none() || len == 1),
                Mapping::Preallocated { addr } => fits(addr),
                Mapping::Hole | Mapping::Inline => true,
                Mapping::Unknown => false,
            }
    }
}

/// One entry of the map: a maximal run of blocks with one mapping (cut at most at multiples of 2^30 blocks).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) value: Value,
    pub(super) sum: u32,
}

impl Entry {
    /// A hole over everything: a filler for [`View::lookup_batch`](super::View::lookup_batch) buffers.
    pub const EMPTY: Entry = Entry { start: 0, end: MAX_FILE_BLOCKS, value: Value::HOLE, sum: 0 };

    /// The blocks it covers.
    pub fn range(&self) -> BlockRange {
        BlockRange::between(FileBlock(self.start), BlockEnd(self.end))
    }

    /// First block.
    pub fn start(&self) -> FileBlock {
        FileBlock(self.start)
    }

    /// Exclusive end.
    pub fn end(&self) -> BlockEnd {
        BlockEnd(self.end)
    }

    /// Length.
    pub fn len(&self) -> BlockCount {
        BlockCount(self.end - self.start)
    }

    /// Whether it covers no block: never, for an entry of a map.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }

    /// What its first block maps to.
    pub fn mapping(&self) -> Mapping {
        self.value.mapping(self.sum)
    }

    /// Whether it is ahead of the metadata tree.
    pub fn is_pinned(&self) -> bool {
        self.value.is_pinned()
    }

    /// Whether it has to be loaded from the metadata tree.
    pub fn is_unknown(&self) -> bool {
        self.value.state() == State::Unknown
    }

    /// The device block behind `block`, where it is written data and `block` lies inside: the cheap form of
    /// [`Entry::at`] for the read path.
    pub fn data_addr(&self, block: FileBlock) -> Option<BlockAddr> {
        let inside = self.range().contains(block) && self.value.state() == State::Data;
        inside.then(|| BlockAddr(self.value.addr() + (block.0 - self.start)))
    }

    /// The entry from `block` on, its address moved along; `None` if `block` lies outside.
    pub fn at(&self, block: FileBlock) -> Option<Entry> {
        self.clipped(BlockRange::from(block)).filter(|rest| rest.start == block.0)
    }

    /// The part inside `range`, its address moved along; `None` if they share no block.
    pub fn clipped(&self, range: BlockRange) -> Option<Entry> {
        let both = self.range().intersection(range);
        (!both.is_empty()).then(|| Entry {
            start: both.start.0,
            end: both.end.0,
            value: self.value.advanced(both.start.0 - self.start),
            sum: self.sum,
        })
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}{}", self.range(), self.mapping(), if self.is_pinned() { " pinned" } else { "" })
    }
}

/// The state of an entry, as stored. 5 is reserved for compressed data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    Unknown = 0,
    Hole = 1,
    Data = 2,
    Preallocated = 3,
    Inline = 4,
}

/// State, flags and device address of an entry in one word: address in bits 0..48, state in 48..52, flags above.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Value(u64);

impl Value {
    /// Device addresses are below this.
    pub(super) const ADDRESSES: u64 = 1 << 48;
    const STATE_SHIFT: u32 = 48;
    const PINNED: u64 = 1 << 52;
    const SUMMED: u64 = 1 << 53;

    pub(super) const UNKNOWN: Value = Value::of(State::Unknown);
    pub(super) const HOLE: Value = Value::of(State::Hole);

    const fn of(state: State) -> Value {
        Value((state as u64) << Value::STATE_SHIFT)
    }

    /// The packed form of `mapping` (address masked to 48 bits), with its checksum word.
    pub(super) fn pack(mapping: Mapping) -> (Value, u32) {
        let at = |state, addr: BlockAddr| Value(Value::of(state).0 | (addr.0 & (Value::ADDRESSES - 1)));
        match mapping {
            Mapping::Unknown => (Value::UNKNOWN, 0),
            Mapping::Hole => (Value::HOLE, 0),
            Mapping::Data { addr, checksum: None } => (at(State::Data, addr), 0),
            Mapping::Data { addr, checksum: Some(sum) } => {
                (Value(at(State::Data, addr).0 | Value::SUMMED), sum)
            }
            Mapping::Preallocated { addr } => (at(State::Preallocated, addr), 0),
            Mapping::Inline => (Value::of(State::Inline), 0),
        }
    }

    pub(super) fn mapping(self, sum: u32) -> Mapping {
        let addr = BlockAddr(self.addr());
        match self.state() {
            State::Unknown => Mapping::Unknown,
            State::Hole => Mapping::Hole,
            State::Data => Mapping::Data { addr, checksum: self.is_summed().then_some(sum) },
            State::Preallocated => Mapping::Preallocated { addr },
            State::Inline => Mapping::Inline,
        }
    }

    #[inline]
    pub(super) fn state(self) -> State {
        match (self.0 >> Value::STATE_SHIFT) & 15 {
            1 => State::Hole,
            2 => State::Data,
            3 => State::Preallocated,
            4 => State::Inline,
            _ => State::Unknown,
        }
    }

    #[inline]
    pub(super) fn addr(self) -> u64 {
        self.0 & (Value::ADDRESSES - 1)
    }

    #[inline]
    pub(super) fn is_pinned(self) -> bool {
        self.0 & Value::PINNED != 0
    }

    pub(super) fn is_summed(self) -> bool {
        self.0 & Value::SUMMED != 0
    }

    pub(super) fn pinned(self) -> Value {
        Value(self.0 | Value::PINNED)
    }

    pub(super) fn unpinned(self) -> Value {
        Value(self.0 & !Value::PINNED)
    }

    /// Without the word that the checksum is at hand.
    pub(super) fn unsummed(self) -> Value {
        Value(self.0 & !Value::SUMMED)
    }

    /// Whether a whole segment of it needs no node.
    pub(super) fn is_uniform(self) -> bool {
        self == Value::UNKNOWN || self == Value::HOLE
    }

    /// Whether both map their first block to the same place in the same state, pinned or not, checksum at hand or not.
    pub(super) fn same_place(self, other: Value) -> bool {
        self.unpinned().unsummed() == other.unpinned().unsummed()
    }

    fn has_address(self) -> bool {
        matches!(self.state(), State::Data | State::Preallocated)
    }

    /// The value `n` blocks further on. A checksum belongs to a single block, so it does not come along.
    pub(super) fn advanced(self, n: u64) -> Value {
        if n == 0
            || !self.has_address()
            || crate::mutation::broken(crate::mutation::Mutation::SplitKeepsAddress)
        {
            return self;
        }
        Value(
            (self.0 & !(Value::ADDRESSES - 1) & !Value::SUMMED)
                | ((self.addr() + n) & (Value::ADDRESSES - 1)),
        )
    }

    /// Whether `next`, which starts `len` blocks after the start of `self`, continues it: one entry could hold both.
    /// A pinned entry continues nothing and is continued by nothing.
    pub(super) fn is_continued_by(self, len: u64, next: Value) -> bool {
        use crate::mutation::{Mutation, broken};
        if (self.is_pinned() || next.is_pinned()) && !broken(Mutation::MergePinned) {
            return false;
        }
        let follows =
            !self.has_address() || self.addr() + len == next.addr() || broken(Mutation::MergeIgnoresAddress);
        self.state() == next.state() && follows
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{}", self.mapping(0), if self.is_pinned() { " pinned" } else { "" })
    }
}

/// An entry inside a segment: its end is the start of the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) start: i32,
    pub(super) sum: u32,
    pub(super) value: Value,
}
