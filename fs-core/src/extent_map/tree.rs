//! Copy-on-write changes of one segment's B+tree.
//!
//! There is one change: [`Splice::apply`] puts a list of entries in the place of a range. It copies the nodes on the way
//! to both ends of the range, drops what lies between, and makes as many new nodes as the entries need:
//!
//! 1. down to the leaves at both ends ([`Splice::node`], [`Splice::inner`]);
//! 2. a leaf keeps what lies outside the range, the entries at its borders cut ([`Splice::leaf`]);
//! 3. on the way up, nodes that became sparse are joined with a neighbour ([`Splice::mend`]);
//! 4. the root grows or shrinks ([`Splice::root`]).
//!
//! Most changes concern a few entries of one leaf, which just keeps its place: [`Splice::within_a_leaf`] takes those.
//!
//! It does not merge entries: whoever builds the list does, see [`super::draft`].

use smallvec::SmallVec;

use super::mapping::Cell;
use super::mem::{Node, NodeRef, Nodes, Reach};
use super::node::{
    Cells, Child, Children, INNER_CHILDREN, Inner, LEAF_CELLS, Leaf, MAX_GROUPS, Piece, SEGMENT_BLOCKS,
    inner_groups, leaf_groups,
};
use super::view::{MapStats, Segment};

/// A node with no more groups than this is joined with a neighbour. Joining two of which one is sparse gives either one
/// node, or two that are not sparse.
const SPARSE_GROUPS: usize = MAX_GROUPS / 4;

/// Replaces the entries of `[from, to)` of one segment by `cells`.
pub(super) struct Splice<'a, 'w> {
    pub(super) nodes: &'a mut Nodes,
    pub(super) reach: Reach<'w>,
    pub(super) stats: &'a mut MapStats,
    pub(super) from: i32,
    pub(super) to: i32,
    /// In order; the first starts at `from`, the last ends at `to`.
    pub(super) cells: &'a [Cell],
}

impl Splice<'_, '_> {
    /// The segment after the change.
    pub(super) fn apply(mut self, segment: Segment) -> Segment {
        debug_assert!(0 <= self.from && self.from < self.to && self.to <= SEGMENT_BLOCKS);
        debug_assert!(self.cells.first().is_some_and(|first| first.start == self.from));
        let mut level = Children::new();
        match segment {
            Segment::Tree(root) => match self.within_a_leaf(root) {
                Some(root) => return Segment::Tree(root),
                None => self.node(Child { key: 0, node: root }, SEGMENT_BLOCKS, true, &mut level),
            },
            Segment::Uniform(value) => {
                let whole = Piece { start: 0, end: SEGMENT_BLOCKS, value, sum: 0 };
                let mut cells = Cells::new();
                self.cut(std::iter::once(whole), true, &mut cells);
                self.emit_leaves(&cells, &mut level);
            }
        }
        self.root(level)
    }

    /// The common case, made short: the range lies within one leaf, which neither overflows nor becomes sparse. Then nothing but
    /// one reference changes in each node above. `None` if it is not so; nothing has happened then.
    fn within_a_leaf(&mut self, root: NodeRef) -> Option<NodeRef> {
        let mut path: SmallVec<[(NodeRef, Inner<'_>); 8]> = SmallVec::new();
        let (mut node, mut end) = (root, SEGMENT_BLOCKS);
        let leaf = loop {
            // All of it will be copied.
            node.prefetch_all();
            match node.open(self.reach) {
                Node::Leaf(leaf) => break leaf,
                Node::Inner(inner) => {
                    path.push((node, inner));
                    (node, end) = inner.find(self.from, end);
                }
            }
        };
        if self.to > end {
            return None;
        }
        let (first, last) = (leaf.index_of(self.from), leaf.index_of(self.to - 1));
        let mut cells: SmallVec<[Cell; 8]> = SmallVec::new();
        let left = leaf.cell(first);
        if left.start < self.from {
            cells.push(left);
        }
        cells.extend_from_slice(self.cells);
        let right = leaf.piece(last, end);
        if right.end > self.to {
            cells.push(right.clipped(self.to, SEGMENT_BLOCKS).cell());
        }
        let replaced = first..last + 1;
        let count = leaf.len() - replaced.len() + cells.len();
        let sparse = count <= SPARSE_GROUPS * LEAF_CELLS / MAX_GROUPS;
        if count > LEAF_CELLS || (sparse && !path.is_empty()) || (count == 1 && cells[0].value.is_uniform()) {
            return None;
        }

        let pinned =
            |cells: &mut dyn Iterator<Item = Cell>| cells.filter(|c| c.value.is_pinned()).count() as u64;
        self.stats.entries = self.stats.entries + cells.len() as u64 - replaced.len() as u64;
        self.stats.pinned += pinned(&mut cells.iter().copied());
        self.stats.pinned -= pinned(&mut replaced.clone().map(|index| leaf.cell(index)));
        let mut new = self.nodes.leaf(leaf.with(replaced, &cells));
        self.stats.node_bytes += new.bytes() as u64;
        self.retire(node);
        for (above, inner) in path.into_iter().rev() {
            new = self.nodes.inner(inner.with(self.from, node, new));
            self.stats.node_bytes += new.bytes() as u64;
            self.retire(above);
            node = above;
        }
        Some(new)
    }

    /// Step 1: rewrites `child`, which ends at `end`, into `out`. `insert` says whether the new entries go there (the leaf
    /// at `from`), or have gone elsewhere.
    fn node(&mut self, child: Child, end: i32, insert: bool, out: &mut Children) {
        match child.node.open(self.reach) {
            Node::Leaf(leaf) => self.leaf(child.node, leaf, end, insert, out),
            Node::Inner(inner) => self.inner(child.node, inner, end, insert, out),
        }
    }

    fn inner(&mut self, node: NodeRef, inner: Inner<'_>, end: i32, insert: bool, out: &mut Children) {
        let old: Children = inner.children().collect();
        let end_of = |index: usize| old.get(index + 1).map_or(end, |next| next.key);
        let holder_of = |key: i32| old.partition_point(|child| child.key <= key).saturating_sub(1);
        let (first, last) = (holder_of(self.from), holder_of(self.to - 1));

        let mut list: Children = old[..first].into();
        self.node(old[first], end_of(first), insert, &mut list);
        for middle in old.iter().take(last).skip(first + 1) {
            self.drop_tree(middle.node);
        }
        if last > first {
            self.node(old[last], end_of(last), false, &mut list);
        }
        let rewritten = first..list.len();
        list.extend_from_slice(&old[last + 1..]);
        self.mend(&mut list, rewritten);
        self.retire(node);
        self.emit_inners(&list, out);
    }

    /// Step 2.
    fn leaf(&mut self, node: NodeRef, leaf: Leaf<'_>, end: i32, insert: bool, out: &mut Children) {
        let mut cells = Cells::new();
        self.cut(pieces(leaf, end), insert, &mut cells);
        self.uncount(leaf);
        self.retire(node);
        self.emit_leaves(&cells, out);
    }

    /// Copies `old` without `[from, to)`, and the new entries in its place.
    fn cut(&self, old: impl Iterator<Item = Piece>, insert: bool, cells: &mut Cells) {
        let mut pending = insert;
        for piece in old {
            if piece.start < self.from {
                cells.push(piece.cell());
            }
            if piece.end > self.from && pending {
                cells.extend_from_slice(self.cells);
                pending = false;
            }
            if piece.end > self.to {
                cells.push(piece.clipped(self.to, SEGMENT_BLOCKS).cell());
            }
        }
    }

    /// Step 3: joins sparse nodes in `touched` of `list` with their neighbours.
    fn mend(&mut self, list: &mut Children, touched: std::ops::Range<usize>) {
        let (mut index, mut end) = (touched.start, touched.end);
        while index < end && list.len() > 1 {
            if list[index].node.groups() > SPARSE_GROUPS {
                index += 1;
                continue;
            }
            let groups = |at: usize| list.get(at).map_or(usize::MAX, |child| child.node.groups());
            let left = if index > 0 && groups(index - 1) <= groups(index + 1) { index - 1 } else { index };
            let mut joined = Children::new();
            self.join(list[left].node, list[left + 1].node, &mut joined);
            let count = joined.len();
            list.drain(left..left + 2);
            list.insert_many(left, joined);
            end = (end.max(left + 2) + count).saturating_sub(2);
            index = left;
        }
    }

    /// The entries or children of two neighbours in as few nodes as hold them.
    fn join(&mut self, left: NodeRef, right: NodeRef, out: &mut Children) {
        match (left.open(self.reach), right.open(self.reach)) {
            (Node::Leaf(a), Node::Leaf(b)) => {
                self.uncount(a);
                self.uncount(b);
                let cells: Cells = a.cells().chain(b.cells()).collect();
                self.emit_leaves(&cells, out);
            }
            (Node::Inner(a), Node::Inner(b)) => {
                let children: Children = a.children().chain(b.children()).collect();
                self.emit_inners(&children, out);
            }
            _ => unreachable!("neighbours of different height"),
        }
        self.retire(left);
        self.retire(right);
    }

    /// Step 4: the root over `level`, the nodes of one level that hold the whole segment.
    fn root(&mut self, mut level: Children) -> Segment {
        while level.len() > 1 {
            let mut above = Children::new();
            self.emit_inners(&level, &mut above);
            level = above;
        }
        let mut root = level[0].node;
        loop {
            match root.open(self.reach) {
                Node::Inner(inner) => {
                    let mut children = inner.children();
                    let (Some(only), None) = (children.next(), children.next()) else {
                        return Segment::Tree(root);
                    };
                    self.retire(root);
                    root = only.node;
                }
                Node::Leaf(leaf) => {
                    let mut cells = leaf.cells();
                    return match (cells.next(), cells.next()) {
                        (Some(only), None) if only.value.is_uniform() => {
                            self.uncount(leaf);
                            self.retire(root);
                            Segment::Uniform(only.value)
                        }
                        _ => Segment::Tree(root),
                    };
                }
            }
        }
    }

    /// Leaves of `cells`, evenly filled; none for none.
    fn emit_leaves(&mut self, cells: &[Cell], out: &mut Children) {
        for part in even_parts(cells, LEAF_CELLS) {
            let node = self.nodes.leaf(leaf_groups(part.len(), |index| part[index]));
            self.stats.entries += part.len() as u64;
            self.stats.pinned += part.iter().filter(|cell| cell.value.is_pinned()).count() as u64;
            self.stats.node_bytes += node.bytes() as u64;
            out.push(Child { key: part[0].start, node });
        }
    }

    /// Inner nodes of `children`, evenly filled; none for none.
    fn emit_inners(&mut self, children: &[Child], out: &mut Children) {
        for part in even_parts(children, INNER_CHILDREN) {
            let node = self.nodes.inner(inner_groups(part));
            self.stats.node_bytes += node.bytes() as u64;
            out.push(Child { key: part[0].key, node });
        }
    }

    /// Retires `root` and all below.
    pub(super) fn drop_tree(&mut self, root: NodeRef) {
        match root.open(self.reach) {
            Node::Leaf(leaf) => self.uncount(leaf),
            Node::Inner(inner) => inner.children().for_each(|child| self.drop_tree(child.node)),
        }
        self.retire(root);
    }

    fn retire(&mut self, node: NodeRef) {
        self.stats.node_bytes -= node.bytes() as u64;
        self.nodes.retire(node);
    }

    fn uncount(&mut self, leaf: Leaf<'_>) {
        let (mut entries, mut pinned) = (0, 0);
        for cell in leaf.cells() {
            entries += 1;
            pinned += u64::from(cell.value.is_pinned());
        }
        self.stats.entries -= entries;
        self.stats.pinned -= pinned;
    }
}

/// The entries of `leaf` with their ends; `end` is the end of the leaf.
pub(super) fn pieces(leaf: Leaf<'_>, end: i32) -> impl Iterator<Item = Piece> {
    let mut cells = leaf.cells().peekable();
    std::iter::from_fn(move || {
        let Cell { start, sum, value } = cells.next()?;
        Some(Piece { start, end: cells.peek().map_or(end, |next| next.start), value, sum })
    })
}

/// Calls `visit` with every entry of the tree at `root` that overlaps `[from, to)`, whole, in order, until it says stop.
/// `end` is the end of the tree. Returns whether it went through.
pub(super) fn walk(
    root: NodeRef,
    (from, to): (i32, i32),
    end: i32,
    reach: Reach<'_>,
    visit: &mut dyn FnMut(Piece) -> bool,
) -> bool {
    match root.open(reach) {
        Node::Leaf(leaf) => pieces(leaf, end).filter(|piece| piece.end > from && piece.start < to).all(visit),
        Node::Inner(inner) => {
            let mut children = inner.children().peekable();
            while let Some(child) = children.next() {
                let child_end = children.peek().map_or(end, |next| next.key);
                if child_end <= from {
                    continue;
                }
                if child.key >= to {
                    break;
                }
                if !walk(child.node, (from, to), child_end, reach, visit) {
                    return false;
                }
            }
            true
        }
    }
}

/// `all` in parts of no more than `max`, as few and as equal as can be.
fn even_parts<T>(all: &[T], max: usize) -> impl Iterator<Item = &[T]> {
    let mut rest = all;
    let mut parts = all.len().div_ceil(max);
    std::iter::from_fn(move || {
        if parts == 0 {
            return None;
        }
        let (part, behind) = rest.split_at(rest.len().div_ceil(parts));
        (rest, parts) = (behind, parts - 1);
        Some(part)
    })
}
