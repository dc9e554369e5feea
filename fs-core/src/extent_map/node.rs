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

use std::hint::select_unpredictable;

use smallvec::SmallVec;

use super::cpu::{above, above_four, last_not_above};
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
    /// The keys of the children, and that of the child behind them.
    keys: [i32; INNER_GROUP + 1],
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

impl Directory {
    /// A directory without keys.
    pub(super) const EMPTY: Directory = Directory { keys: [NO_KEY; MAX_GROUPS] };

    /// Notes the first key of group `group`.
    #[inline(always)]
    pub(super) fn set(&mut self, group: usize, key: i32) {
        if let Some(slot) = self.keys.get_mut(group) {
            *slot = key;
        }
    }

    /// The group that holds `key`.
    #[inline(always)]
    pub(super) fn group_of(&self, key: i32) -> usize {
        last_not_above(above(&self.keys, key) | 1 << MAX_GROUPS)
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
        let slot = last_not_above(above_four(&at.starts, key) | 1 << LEAF_GROUP);
        // The last entry of a group ends where the next group begins. Which it is no branch predictor can know.
        let inside = at.starts[(slot + 1) % LEAF_GROUP];
        let next = select_unpredictable(slot + 1 < LEAF_GROUP, inside, self.directory.after(group));
        Piece { start: at.starts[slot], end: next.min(end), value: at.values[slot], sum: at.sums[slot] }
    }

    /// How many entries it has.
    pub(super) fn len(self) -> usize {
        let full = self.groups.len() - 1;
        full * LEAF_GROUP + self.groups[full].starts.iter().filter(|start| **start != NO_KEY).count()
    }

    /// Entry `index`, below [`Leaf::len`].
    #[inline(always)]
    pub(super) fn cell(self, index: usize) -> Cell {
        let (group, slot) = (&self.groups[index / LEAF_GROUP], index % LEAF_GROUP);
        Cell { start: group.starts[slot], sum: group.sums[slot], value: group.values[slot] }
    }

    /// Entry `index` with its end; `end` is the end of the leaf.
    pub(super) fn piece(self, index: usize, end: i32) -> Piece {
        let next =
            self.groups.get((index + 1) / LEAF_GROUP).map_or(NO_KEY, |g| g.starts[(index + 1) % LEAF_GROUP]);
        let Cell { start, sum, value } = self.cell(index);
        Piece { start, end: next.min(end), value, sum }
    }

    /// Index of the entry that covers `key`.
    pub(super) fn index_of(self, key: i32) -> usize {
        let group = self.directory.group_of(key);
        group * LEAF_GROUP + last_not_above(above_four(&self.groups[group].starts, key) | 1 << LEAF_GROUP)
    }

    /// The groups of this leaf with `cells` in the place of the entries in `replaced`.
    pub(super) fn with(
        self,
        replaced: std::ops::Range<usize>,
        cells: &[Cell],
    ) -> impl ExactSizeIterator<Item = LeafGroup> {
        let behind = replaced.start + cells.len();
        let count = self.len() - replaced.len() + cells.len();
        let cell = move |index| match index {
            _ if index < replaced.start => self.cell(index),
            _ if index < behind => cells[index - replaced.start],
            _ => self.cell(index - behind + replaced.end),
        };
        // Whole groups stay as they are in front, and if nothing moves, behind.
        let still_from = if cells.len() == replaced.len() { behind } else { count };
        (0..count.div_ceil(LEAF_GROUP)).map(move |index| {
            let first = index * LEAF_GROUP;
            match first + LEAF_GROUP <= replaced.start || first >= still_from {
                true => self.groups[index],
                false => leaf_group(first, count, &cell),
            }
        })
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
        let [first @ .., e, _] = &at.keys;
        let above = above_four(first, key) | u32::from(*e > key) << 4;
        let slot = last_not_above(above | 1 << INNER_GROUP);
        let next = at.keys[slot + 1];
        (at.children[slot], next.min(end))
    }

    /// The groups of this node with `new` in the place of the child `old` that covers `key`, which keeps its key.
    pub(super) fn with(
        self,
        key: i32,
        old: NodeRef,
        new: NodeRef,
    ) -> impl ExactSizeIterator<Item = InnerGroup> {
        let changed = self.directory.group_of(key);
        self.groups.iter().enumerate().map(move |(index, group)| {
            let mut group = *group;
            if index == changed {
                // Also in the slots that repeat it.
                group.children.iter_mut().filter(|child| **child == old).for_each(|child| *child = new);
            }
            group
        })
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

/// A group, as far as a node's memory must know it.
pub(super) trait Group {
    /// Marks the nodes that are made of these.
    const IS_INNER: bool;

    /// First key.
    fn first_key(&self) -> i32;
}

impl Group for LeafGroup {
    const IS_INNER: bool = false;

    fn first_key(&self) -> i32 {
        self.starts[0]
    }
}

impl Group for InnerGroup {
    const IS_INNER: bool = true;

    fn first_key(&self) -> i32 {
        self.keys[0]
    }
}

/// The groups of a leaf of `count` cells (1 to [`LEAF_CELLS`]), of which `cell` gives each.
#[inline(always)]
pub(super) fn leaf_groups(
    count: usize,
    cell: impl Fn(usize) -> Cell,
) -> impl ExactSizeIterator<Item = LeafGroup> {
    (0..count.div_ceil(LEAF_GROUP)).map(move |index| leaf_group(index * LEAF_GROUP, count, &cell))
}

/// The group that begins with cell `first` of `count`.
#[inline(always)]
fn leaf_group(first: usize, count: usize, cell: &impl Fn(usize) -> Cell) -> LeafGroup {
    let mut group = LeafGroup {
        starts: [NO_KEY; LEAF_GROUP],
        values: [Value::UNKNOWN; LEAF_GROUP],
        sums: [0; LEAF_GROUP],
    };
    for slot in 0..LEAF_GROUP.min(count - first) {
        let cell = cell(first + slot);
        group.starts[slot] = cell.start;
        group.values[slot] = cell.value;
        group.sums[slot] = cell.sum;
    }
    group
}

/// The groups of an inner node of `children` (1 to [`INNER_CHILDREN`] of them).
pub(super) fn inner_groups(children: &[Child]) -> impl ExactSizeIterator<Item = InnerGroup> {
    children.chunks(INNER_GROUP).enumerate().map(|(index, some)| {
        let last = some[some.len() - 1].node;
        let mut group = InnerGroup { keys: [NO_KEY; INNER_GROUP + 1], children: [last; INNER_GROUP] };
        group.keys[INNER_GROUP] = children.get((index + 1) * INNER_GROUP).map_or(NO_KEY, |next| next.key);
        for (slot, child) in some.iter().enumerate() {
            group.keys[slot] = child.key;
            group.children[slot] = child.node;
        }
        group
    })
}
