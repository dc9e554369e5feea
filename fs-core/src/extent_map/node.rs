//! The nodes of a segment's B+tree: layout and search. Safe code; memory is the business of [`super::mem`].
//!
//! A node is a run of cache lines. The first is a *directory* of 16 keys; behind it follow up to 16 *groups* of one line
//! each, and directory key `g` is the first key of group `g`. A search reads two lines a node, however wide the node is:
//! it ranks the key in the directory (16 comparisons without a branch) and then inside the group.
//!
//! - leaf: 4 entries a group (start, value, checksum), up to 64 a node
//! - inner node: 5 children a group, up to 80 a node
//!
//! Nodes are immutable, so none keeps room for growth: a node has just the groups it needs, all full but the last. Keys
//! are block numbers inside the segment, below 2^30, and [`NO_KEY`] fills the rest: it is above every key, so searches
//! need no count. The first key of a node equals its key in the parent; an entry ends where the next begins, also across
//! nodes.

use smallvec::SmallVec;

use super::mapping::{Cell, Value};
use super::mem::NodeRef;

/// `log2` of the blocks in a segment.
pub(super) const SEGMENT_SHIFT: u32 = 30;
/// Blocks of a segment: 4 TiB.
pub(super) const SEGMENT_BLOCKS: i32 = 1 << SEGMENT_SHIFT;
/// Above every key.
pub(super) const NO_KEY: i32 = i32::MAX;

/// Groups in the widest node.
pub(super) const MAX_GROUPS: usize = 16;
const LEAF_GROUP: usize = 4;
const INNER_GROUP: usize = 5;
/// Entries in the widest leaf.
pub(super) const LEAF_CELLS: usize = MAX_GROUPS * LEAF_GROUP;
/// Children of the widest inner node.
pub(super) const INNER_CHILDREN: usize = MAX_GROUPS * INNER_GROUP;

/// A cache line; nodes are made of these.
pub(super) const LINE: usize = 64;

/// First line of a node: the first key of each group.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Directory {
    keys: [i32; MAX_GROUPS],
}

/// Four entries.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct LeafGroup {
    starts: [i32; LEAF_GROUP],
    values: [Value; LEAF_GROUP],
    sums: [u32; LEAF_GROUP],
}

/// Five children. Slots without a key repeat the last child, so that every slot holds a live node.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct InnerGroup {
    keys: [i32; INNER_GROUP],
    children: [NodeRef; INNER_GROUP],
}

const _: () = assert!(size_of::<Directory>() == LINE);
const _: () = assert!(size_of::<LeafGroup>() == LINE);
const _: () = assert!(size_of::<InnerGroup>() == LINE);

/// A child and its first key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Child {
    pub(super) key: i32,
    pub(super) node: NodeRef,
}

/// Entries of a leaf that is being rebuilt.
pub(super) type Cells = SmallVec<[Cell; LEAF_CELLS + 16]>;
/// Children of an inner node that is being rebuilt.
pub(super) type Children = SmallVec<[Child; INNER_CHILDREN + 16]>;

/// An entry with both ends, inside a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: i32,
    pub(super) end: i32,
    pub(super) value: Value,
    pub(super) sum: u32,
}

impl Piece {
    /// The part inside `[from, to)`; they overlap.
    pub(super) fn clipped(self, from: i32, to: i32) -> Piece {
        let start = self.start.max(from);
        let value = self.value.advanced((start - self.start) as u64);
        Piece { start, end: self.end.min(to), value, sum: self.sum }
    }

    pub(super) fn len(self) -> u64 {
        (self.end - self.start) as u64
    }

    pub(super) fn cell(self) -> Cell {
        Cell { start: self.start, sum: self.sum, value: self.value }
    }
}

/// Index of the last key that is not above `key`; the first is known not to be.
#[inline(always)]
fn rank<const N: usize>(keys: &[i32; N], key: i32) -> usize {
    let not_above: i32 = keys.iter().map(|k| i32::from(*k <= key)).sum();
    (not_above - 1).max(0) as usize
}

impl Directory {
    /// The group that holds `key`.
    #[inline(always)]
    pub(super) fn group_of(&self, key: i32) -> usize {
        rank(&self.keys, key)
    }

    /// First key behind group `group`, or [`NO_KEY`].
    #[inline(always)]
    fn after(&self, group: usize) -> i32 {
        self.keys.get(group + 1).copied().unwrap_or(NO_KEY)
    }
}

/// A leaf.
#[derive(Clone, Copy)]
pub(super) struct Leaf<'g> {
    pub(super) directory: &'g Directory,
    pub(super) groups: &'g [LeafGroup],
}

impl<'g> Leaf<'g> {
    /// The entry that covers `key`; `end` is the end of the leaf.
    #[inline(always)]
    pub(super) fn find(self, key: i32, end: i32) -> Piece {
        self.find_in(self.directory.group_of(key), key, end)
    }

    /// As [`Leaf::find`], where the group is known.
    #[inline(always)]
    pub(super) fn find_in(self, group: usize, key: i32, end: i32) -> Piece {
        let at = &self.groups[group];
        let slot = rank(&at.starts, key);
        let next = if slot + 1 < LEAF_GROUP { at.starts[slot + 1] } else { self.directory.after(group) };
        Piece { start: at.starts[slot], end: next.min(end), value: at.values[slot], sum: at.sums[slot] }
    }

    /// The entries in order.
    pub(super) fn cells(self) -> impl Iterator<Item = Cell> + 'g {
        self.groups.iter().flat_map(|group| {
            (0..LEAF_GROUP).filter(|slot| group.starts[*slot] != NO_KEY).map(|slot| Cell {
                start: group.starts[slot],
                sum: group.sums[slot],
                value: group.values[slot],
            })
        })
    }
}

/// An inner node.
#[derive(Clone, Copy)]
pub(super) struct Inner<'g> {
    pub(super) directory: &'g Directory,
    pub(super) groups: &'g [InnerGroup],
}

impl<'g> Inner<'g> {
    /// The child that covers `key` and its end; `end` is the end of this node.
    #[inline(always)]
    pub(super) fn find(self, key: i32, end: i32) -> (NodeRef, i32) {
        self.find_in(self.directory.group_of(key), key, end)
    }

    /// As [`Inner::find`], where the group is known.
    #[inline(always)]
    pub(super) fn find_in(self, group: usize, key: i32, end: i32) -> (NodeRef, i32) {
        let at = &self.groups[group];
        let slot = rank(&at.keys, key);
        let next = if slot + 1 < INNER_GROUP { at.keys[slot + 1] } else { self.directory.after(group) };
        (at.children[slot], next.min(end))
    }

    /// The children in order.
    pub(super) fn children(self) -> impl Iterator<Item = Child> + 'g {
        self.groups.iter().flat_map(|group| {
            (0..INNER_GROUP)
                .filter(|slot| group.keys[*slot] != NO_KEY)
                .map(|slot| Child { key: group.keys[slot], node: group.children[slot] })
        })
    }
}

/// Directory and groups of a leaf of `cells` (1 to [`LEAF_CELLS`] of them).
pub(super) fn leaf_parts(cells: &[Cell]) -> (Directory, impl ExactSizeIterator<Item = LeafGroup>) {
    let groups = cells.chunks(LEAF_GROUP).map(|some| {
        let mut group = LeafGroup {
            starts: [NO_KEY; LEAF_GROUP],
            values: [Value::UNKNOWN; LEAF_GROUP],
            sums: [0; LEAF_GROUP],
        };
        for (slot, cell) in some.iter().enumerate() {
            group.starts[slot] = cell.start;
            group.values[slot] = cell.value;
            group.sums[slot] = cell.sum;
        }
        group
    });
    (directory(cells.iter().step_by(LEAF_GROUP).map(|cell| cell.start)), groups)
}

/// Directory and groups of an inner node of `children` (1 to [`INNER_CHILDREN`] of them).
pub(super) fn inner_parts(children: &[Child]) -> (Directory, impl ExactSizeIterator<Item = InnerGroup>) {
    let groups = children.chunks(INNER_GROUP).map(|some| {
        let last = some[some.len() - 1].node;
        let mut group = InnerGroup { keys: [NO_KEY; INNER_GROUP], children: [last; INNER_GROUP] };
        for (slot, child) in some.iter().enumerate() {
            group.keys[slot] = child.key;
            group.children[slot] = child.node;
        }
        group
    });
    (directory(children.iter().step_by(INNER_GROUP).map(|child| child.key)), groups)
}

fn directory(first_keys: impl Iterator<Item = i32>) -> Directory {
    let mut keys = [NO_KEY; MAX_GROUPS];
    for (slot, key) in keys.iter_mut().zip(first_keys) {
        *slot = key;
    }
    Directory { keys }
}
