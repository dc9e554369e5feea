//! What a reader sees: one whole state of a file.

use std::fmt;

use smallvec::SmallVec;

use super::mapping::{BlockEnd, BlockRange, Entry, MAX_FILE_BLOCKS, Value};
use super::mem::{EpochGuard, Node, NodeRef, Reach};
use super::node::{Piece, SEGMENT_BLOCKS, SEGMENT_SHIFT};
use crate::types::FileBlock;

/// Number of a change to the content of a file: grows with each publication, hole, truncation and change of size, not with
/// what only moves knowledge in and out (load, unpin, evict).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct FileVersion(pub u64);

/// Lookups that [`View::lookup_batch`] and [`View::lookup_across`] keep in flight together.
pub const LOOKUP_LANES: usize = 32;

/// One segment of the file: 2^30 blocks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Segment {
    /// One state all over: a hole, or not loaded.
    Uniform(Value),
    /// A B+tree of entries.
    Tree(NodeRef),
}

/// The segments of a file. Segments behind the listed ones are uniform.
#[derive(Clone, Debug)]
pub(super) struct Segments {
    pub(super) listed: SmallVec<[Segment; 1]>,
    pub(super) beyond: Value,
}

impl Segments {
    #[inline(always)]
    pub(super) fn get(&self, number: usize) -> Segment {
        self.listed.get(number).copied().unwrap_or(Segment::Uniform(self.beyond))
    }
}

/// Counters of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MapStats {
    /// Entries held in nodes.
    pub entries: u64,
    /// Those among them that are pinned.
    pub pinned: u64,
    /// Bytes of the nodes.
    pub node_bytes: u64,
}

/// The published state of a map.
#[derive(Clone, Debug)]
pub(super) struct ViewData {
    pub(super) size: u64,
    pub(super) version: FileVersion,
    pub(super) segments: Segments,
    pub(super) stats: MapStats,
}

/// One whole state of a file: size, version and mappings that belong together. Lives as long as the epoch guard and the
/// map; sees nothing of later changes.
#[derive(Clone, Copy)]
pub struct View<'g> {
    pub(super) data: &'g ViewData,
    pub(super) reach: Reach<'g>,
    pub(super) guard: &'g EpochGuard,
}

impl<'g> View<'g> {
    /// Size of the file in bytes.
    #[inline]
    pub fn size(&self) -> u64 {
        self.data.size
    }

    /// Version of the file.
    #[inline]
    pub fn version(&self) -> FileVersion {
        self.data.version
    }

    /// Counters.
    pub fn stats(&self) -> MapStats {
        self.data.stats
    }

    /// The entry that covers `block`, whole (cut only at multiples of 2^30 blocks). Behind [`MAX_FILE_BLOCKS`] all is hole.
    #[inline]
    pub fn lookup(&self, block: FileBlock) -> Entry {
        if block.0 >= MAX_FILE_BLOCKS {
            return beyond_the_largest_file();
        }
        match self.data.segments.get(segment_of(block)) {
            Segment::Uniform(value) => self.uniform(block, value),
            Segment::Tree(root) => in_file(block, find(root, key_of(block), self.reach)),
        }
    }

    /// Looks up `blocks[i]` into `entries[i]`, up to the shorter of the two, with [`LOOKUP_LANES`] descents under way at a time
    /// so that their cache misses overlap.
    pub fn lookup_batch(&self, blocks: &[FileBlock], entries: &mut [Entry]) {
        look_up_all(blocks, |block| (*self, *block), self.reach, entries);
    }

    /// As [`View::lookup_batch`] over several files: looks up each block in its view.
    pub fn lookup_across(queries: &[(View<'g>, FileBlock)], entries: &mut [Entry]) {
        let Some((View { reach, .. }, _)) = queries.first() else { return };
        look_up_all(queries, |query| *query, *reach, entries);
    }

    /// The entries of `range` in order, clipped to it. Neighbours that continue each other across a segment's end (2^30
    /// blocks) are given as two.
    pub fn iter(&self, range: BlockRange) -> impl Iterator<Item = Entry> + use<'g> {
        let view = *self;
        let mut next = range.start();
        std::iter::from_fn(move || {
            if !range.contains(next) {
                return None;
            }
            let entry = view.lookup(next);
            next = entry.end().next_start();
            entry.clipped(range)
        })
    }

    /// Whether some block of `range` has to be loaded from the metadata tree.
    pub fn has_unknown(&self, range: BlockRange) -> bool {
        self.iter(range).any(|entry| entry.is_unknown())
    }

    /// The entry of a uniform segment, which reaches to the end of the segment, or of the file behind the last one listed.
    fn uniform(&self, block: FileBlock, value: Value) -> Entry {
        let number = segment_of(block);
        let listed = self.data.segments.listed.len();
        match number < listed {
            true => Entry { start: start_of(number), end: start_of(number + 1), value, sum: 0 },
            false => Entry { start: start_of(listed), end: MAX_FILE_BLOCKS, value, sum: 0 },
        }
    }
}

impl fmt::Debug for View<'_> {
    /// Size, version, and the first entries.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 256;
        let entries: Vec<Entry> = self.iter(BlockRange::ALL).take(SHOWN).collect();
        f.debug_struct("View")
            .field("size", &self.data.size)
            .field("version", &self.data.version.0)
            .field("stats", &self.data.stats)
            .field("entries", &entries)
            .finish()
    }
}

/// Looks up what `split` makes of `queries[i]` into `entries[i]`.
#[inline(always)]
fn look_up_all<'g, Q>(
    queries: &[Q],
    split: impl Fn(&Q) -> (View<'g>, FileBlock),
    reach: Reach<'g>,
    entries: &mut [Entry],
) {
    for (queries, entries) in queries.chunks(LOOKUP_LANES).zip(entries.chunks_mut(LOOKUP_LANES)) {
        let mut lanes: SmallVec<[Lane; LOOKUP_LANES]> = SmallVec::new();
        // All at once: pushing one by one asks for the vector's kind and room each time.
        lanes.extend(queries.iter().zip(entries.iter_mut()).enumerate().filter_map(
            |(index, (query, entry))| {
                let (view, block) = split(query);
                match view.data.segments.listed.get(segment_of(block)) {
                    Some(Segment::Tree(root)) => {
                        root.prefetch(0);
                        Some(Lane { node: *root, block, end: SEGMENT_BLOCKS, group: 0, index })
                    }
                    _ => {
                        *entry = view.lookup(block);
                        None
                    }
                }
            },
        ));
        descend(&mut lanes, entries, reach);
    }
}

/// A descent under way.
#[derive(Clone, Copy)]
struct Lane {
    node: NodeRef,
    block: FileBlock,
    end: i32,
    group: u32,
    /// Which entry it is for.
    index: usize,
}

/// Up to [`LOOKUP_LANES`] descents in step: one level of all of them, then the next level of all. Writes what is found into
/// `entries`.
#[inline(always)]
fn descend(lanes: &mut [Lane], entries: &mut [Entry], reach: Reach<'_>) {
    loop {
        // The directories are on their way since the last step: find the groups and ask for those.
        for lane in lanes.iter_mut() {
            let group = lane.node.directory(reach).group_of(key_of(lane.block));
            lane.node.prefetch(group + 1);
            lane.group = group as u32;
        }
        let mut descended = false;
        for lane in lanes.iter_mut() {
            if let Node::Inner(inner) = lane.node.open(reach) {
                (lane.node, lane.end) = inner.find_in(lane.group as usize, key_of(lane.block), lane.end);
                lane.node.prefetch(0);
                descended = true;
            }
        }
        if !descended {
            break;
        }
    }
    for lane in lanes.iter() {
        if let (Node::Leaf(leaf), Some(entry)) = (lane.node.open(reach), entries.get_mut(lane.index)) {
            let piece = leaf.find_in(lane.group as usize, key_of(lane.block), lane.end);
            *entry = in_file(lane.block, piece);
        }
    }
}

/// The entry of the tree at `root` that covers `key`.
#[inline(always)]
pub(super) fn find(root: NodeRef, key: i32, reach: Reach<'_>) -> Piece {
    let (mut node, mut end) = (root, SEGMENT_BLOCKS);
    loop {
        match node.open(reach) {
            Node::Inner(inner) => {
                (node, end) = inner.find(key, end);
                node.touch_all(reach);
            }
            Node::Leaf(leaf) => return leaf.find(key, end),
        }
    }
}

#[inline(always)]
pub(super) fn segment_of(block: FileBlock) -> usize {
    (block.0 >> SEGMENT_SHIFT) as usize
}

#[inline(always)]
pub(super) fn key_of(block: FileBlock) -> i32 {
    (block.0 & (SEGMENT_BLOCKS as u64 - 1)) as i32
}

/// First block of segment `number`.
pub(super) fn start_of(number: usize) -> u64 {
    (number as u64) << SEGMENT_SHIFT
}

/// `piece`, found in the segment of `block`, as an entry of the file.
#[inline(always)]
fn in_file(block: FileBlock, piece: Piece) -> Entry {
    let base = block.0 & !(SEGMENT_BLOCKS as u64 - 1);
    Entry {
        start: base + piece.start as u64,
        end: base + piece.end as u64,
        value: piece.value,
        sum: piece.sum,
    }
}

fn beyond_the_largest_file() -> Entry {
    Entry { start: MAX_FILE_BLOCKS, end: BlockEnd(u64::MAX).0, value: Value::HOLE, sum: 0 }
}
