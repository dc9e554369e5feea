//! A change in the making: the next view of a map.
//!
//! A draft is made under the map's writer lock from the current view, takes any number of changes, and is published whole
//! or dropped. It works in three steps for each segment that a change touches:
//!
//! 1. decide what each piece of the range becomes ([`Draft::rewrite`]); unchanged ends of the range drop out here, so that
//!    an entry that merely reaches into the range is not cut;
//! 2. merge what continues each other: inside the range as the pieces are listed ([`Rewritten::push`]), at its borders
//!    with the neighbours outside ([`Draft::join_neighbours`]);
//! 3. put the list in place ([`Splice`]).
//!
//! **Merging and checksums.** An entry of one block can carry its checksum, a longer one cannot. When such an entry merges,
//! its checksum is handed to the change's *sink* before the view is published; the sink puts it into the checksum cache.
//! Only unpinned entries merge, and of those the metadata tree has the checksum too: a sink that drops it costs a read of
//! the tree later, never a verification.

use super::mapping::{BlockRange, Cell, MAX_FILE_BLOCKS, Value};
use super::mem::{NodeRef, Nodes, Reach};
use super::node::{Cells, Piece, SEGMENT_BLOCKS};
use super::tree::{Splice, walk};
use super::view::{Segment, Segments, ViewData, find, segment_of, start_of};
use crate::mutation::{Mutation, broken};
use crate::types::{BlockAddr, FileBlock};

/// Takes the checksum of a block whose entry can no longer carry it.
pub type ChecksumSink<'s> = dyn FnMut(BlockAddr, u32) + 's;

/// What a change does to a piece of its range. Pieces come in order and clipped to the range.
pub(super) type Decide<'d> = dyn FnMut(PieceInFile, &mut Rewritten<'_, '_>) -> Verdict + 'd;

/// Whether a piece stays as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It stays; nothing was pushed for it.
    Keep,
    /// Something was pushed that covers exactly the piece.
    Changed,
}

/// A piece and the file block at which its segment begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct PieceInFile {
    pub(super) base: u64,
    pub(super) piece: Piece,
}

impl PieceInFile {
    pub(super) fn range(&self) -> BlockRange {
        BlockRange::new(FileBlock(self.base + self.piece.start as u64), self.piece.len())
    }
}

/// Entries that take the place of a range, merged as they come.
pub(super) struct Rewritten<'r, 's> {
    cells: Cells,
    end: i32,
    sink: &'r mut ChecksumSink<'s>,
}

impl Rewritten<'_, '_> {
    /// Adds `piece`, which starts where the last one ended.
    pub(super) fn push(&mut self, piece: Piece) {
        if let Some(last) = self.cells.last_mut()
            && last.value.is_continued_by((self.end - last.start) as u64, piece.value)
        {
            give_away(last, self.sink);
            give_away(&mut piece.cell(), self.sink);
        } else {
            self.cells.push(piece.cell());
        }
        self.end = piece.end;
    }

    /// Adds the part of file range `range` that lies in the segment of `of`, mapped to `value`; its address is that of the
    /// range's start.
    pub(super) fn push_range(&mut self, of: &PieceInFile, range: BlockRange, (value, sum): (Value, u32)) {
        let key = |block: u64| (block - of.base) as i32;
        self.push(Piece { start: key(range.start().0), end: key(range.end().0), value, sum });
    }
}

/// Hands the checksum in `cell`, if any, to `sink`.
fn give_away(cell: &mut Cell, sink: &mut ChecksumSink<'_>) {
    if cell.value.is_summed() && !broken(Mutation::MergeLosesChecksums) {
        sink(BlockAddr(cell.value.addr()), cell.sum);
    }
    (cell.value, cell.sum) = (cell.value.unsummed(), 0);
}

/// The next view.
pub(super) struct Draft<'w> {
    nodes: &'w mut Nodes,
    reach: Reach<'w>,
    pub(super) view: ViewData,
}

impl<'w> Draft<'w> {
    /// A draft that equals `current`. The caller holds the writer lock with `nodes` in it for 'w.
    pub(super) fn new(current: &ViewData, nodes: &'w mut Nodes) -> Draft<'w> {
        let reach = nodes.begin();
        Draft { nodes, reach, view: current.clone() }
    }

    /// The view to publish, and the nodes it was made with.
    pub(super) fn finish(mut self) -> (ViewData, &'w mut Nodes) {
        // Segments at the end that equal what lies behind need no listing. One stays, so that a small file's list is never
        // rebuilt.
        let Segments { listed, beyond } = &mut self.view.segments;
        while listed.len() > 1 && matches!(listed.last(), Some(Segment::Uniform(value)) if value == beyond) {
            listed.pop();
        }
        (self.view, self.nodes)
    }

    /// Maps `range` to `value`, whatever was there; merges with its neighbours if they allow it.
    pub(super) fn replace(
        &mut self,
        range: BlockRange,
        (value, sum): (Value, u32),
        sink: &mut ChecksumSink<'_>,
    ) {
        let to_the_end = range.end().0 == MAX_FILE_BLOCKS && value.is_uniform();
        self.list(if to_the_end { BlockRange::new(range.start(), 1) } else { range });
        for (number, from, to) in self.parts(range) {
            let base = start_of(number);
            let offset = (base + from as u64) - range.start().0;
            let mut rewritten = Rewritten { cells: Cells::new(), end: from, sink: &mut *sink };
            rewritten.push(Piece { start: from, end: to, value: value.advanced(offset), sum });
            self.put(number, (from, to), rewritten);
        }
        if to_the_end && !range.is_empty() {
            self.view.segments.beyond = value;
        }
    }

    /// Lets `decide` say what the pieces of `range` become. Returns whether anything changed.
    ///
    /// If `range` reaches to the end of the largest file, the uniform rest behind the listed segments is decided on by the
    /// look of its first segment. Whoever knows of differences in there has to [`Draft::list`] them first.
    pub(super) fn rewrite(
        &mut self,
        range: BlockRange,
        sink: &mut ChecksumSink<'_>,
        decide: &mut Decide<'_>,
    ) -> bool {
        if range.is_empty() {
            return false;
        }
        let to_the_end = range.end().0 == MAX_FILE_BLOCKS;
        self.list(if to_the_end { BlockRange::new(range.start(), 1) } else { range });
        let mut any = false;
        for (number, from, to) in self.parts(range) {
            any |= self.rewrite_segment(number, (from, to), sink, decide);
        }
        let listed = self.view.segments.listed.len();
        if to_the_end && start_of(listed) < MAX_FILE_BLOCKS {
            let rest = Piece { start: 0, end: SEGMENT_BLOCKS, value: self.view.segments.beyond, sum: 0 };
            let mut rewritten = Rewritten { cells: Cells::new(), end: 0, sink };
            let verdict = decide(PieceInFile { base: start_of(listed), piece: rest }, &mut rewritten);
            if let (Verdict::Changed, [only]) = (verdict, &rewritten.cells[..]) {
                self.view.segments.beyond = only.value;
                any = true;
            }
        }
        any
    }

    fn rewrite_segment(
        &mut self,
        number: usize,
        (from, to): (i32, i32),
        sink: &mut ChecksumSink<'_>,
        decide: &mut Decide<'_>,
    ) -> bool {
        let mut rewritten = Rewritten { cells: Cells::new(), end: from, sink };
        let mut changed: Option<(i32, i32)> = None;
        let mut cells_changed = 0;
        let mut visit = |piece: Piece| {
            let piece = piece.clipped(from, to);
            let before = rewritten.cells.len();
            match decide(PieceInFile { base: start_of(number), piece }, &mut rewritten) {
                Verdict::Changed => {
                    changed = Some((changed.map_or(piece.start, |(start, _)| start), piece.end))
                }
                Verdict::Keep => {
                    let Some((_, end)) = &mut changed else { return true };
                    rewritten.push(piece);
                    if rewritten.cells.len() > before {
                        return true;
                    }
                    // Merged into what changed.
                    *end = piece.end;
                }
            }
            cells_changed = rewritten.cells.len();
            true
        };
        match self.view.segments.get(number) {
            Segment::Uniform(value) => {
                visit(Piece { start: 0, end: SEGMENT_BLOCKS, value, sum: 0 });
            }
            Segment::Tree(root) => {
                let first = find(root, from, self.reach);
                match first.end < to {
                    true => walk(root, (from, to), SEGMENT_BLOCKS, self.reach, &mut visit),
                    false => visit(first),
                };
            }
        }
        let Some((start, end)) = changed else { return false };
        rewritten.cells.truncate(cells_changed);
        rewritten.end = end;
        self.put(number, (start, end), rewritten);
        true
    }

    /// Steps 2 and 3 for `[from, to)` of segment `number`.
    fn put(&mut self, number: usize, (from, to): (i32, i32), mut rewritten: Rewritten<'_, '_>) {
        let (from, to) = self.join_neighbours(number, (from, to), &mut rewritten);
        let old = self.view.segments.get(number);
        let uniform = (from, to) == (0, SEGMENT_BLOCKS) && rewritten.cells.len() == 1;
        let (cells, stats) = (&rewritten.cells[..], &mut self.view.stats);
        let mut splice = Splice { nodes: &mut *self.nodes, reach: self.reach, stats, from, to, cells };
        let new = if uniform && cells[0].value.is_uniform() {
            if let Segment::Tree(root) = old {
                splice.drop_tree(root);
            }
            Segment::Uniform(cells[0].value)
        } else {
            splice.apply(old)
        };
        self.view.segments.listed[number] = new;
    }

    /// Takes the neighbours of `[from, to)` into `rewritten` if they continue it. Returns the range with them.
    fn join_neighbours(
        &self,
        number: usize,
        (mut from, mut to): (i32, i32),
        rewritten: &mut Rewritten<'_, '_>,
    ) -> (i32, i32) {
        let Rewritten { cells, sink, .. } = rewritten;
        if from > 0 && cells.first().is_some_and(|first| may_merge(first.value)) {
            let mut left = self.piece_at(number, from - 1).clipped(0, from).cell();
            if left.value.is_continued_by((from - left.start) as u64, cells[0].value) {
                give_away(&mut left, sink);
                give_away(&mut cells[0], sink);
                (cells[0], from) = (left, left.start);
            }
        }
        if to < SEGMENT_BLOCKS
            && let Some(last) = cells.last_mut().filter(|last| may_merge(last.value))
        {
            let right = self.piece_at(number, to).clipped(to, SEGMENT_BLOCKS);
            if last.value.is_continued_by((to - last.start) as u64, right.value) {
                give_away(last, sink);
                give_away(&mut right.cell(), sink);
                to = right.end;
            }
        }
        (from, to)
    }

    fn piece_at(&self, number: usize, key: i32) -> Piece {
        match self.view.segments.get(number) {
            Segment::Uniform(value) => Piece { start: 0, end: SEGMENT_BLOCKS, value, sum: 0 },
            Segment::Tree(root) => find(root, key, self.reach),
        }
    }

    /// Lists the segments of `range`, so that each can differ from what lies behind.
    pub(super) fn list(&mut self, range: BlockRange) {
        let segments = &mut self.view.segments;
        let needed = range.end().0.div_ceil(SEGMENT_BLOCKS as u64) as usize;
        if !range.is_empty() && needed > segments.listed.len() {
            segments.listed.resize(needed, Segment::Uniform(segments.beyond));
        }
    }

    /// The listed segments that `range` touches, and which part of each.
    fn parts(&self, range: BlockRange) -> impl Iterator<Item = (usize, i32, i32)> + use<> {
        (segment_of(range.start())..self.view.segments.listed.len()).map_while(move |number| {
            let key = |block: u64| block.saturating_sub(start_of(number)).min(SEGMENT_BLOCKS as u64) as i32;
            let (from, to) = (key(range.start().0), key(range.end().0));
            (from < to).then_some((number, from, to))
        })
    }

    /// The first entries from `from` on, whole, until `visit` says stop; only inside listed segments. Returns whether it went
    /// through.
    pub(super) fn walk_from(&self, from: FileBlock, visit: &mut dyn FnMut(PieceInFile) -> bool) -> bool {
        for (number, segment) in self.view.segments.listed.iter().enumerate().skip(segment_of(from)) {
            let base = start_of(number);
            let key = from.0.saturating_sub(base) as i32;
            let went_through = match *segment {
                Segment::Uniform(value) => {
                    visit(PieceInFile { base, piece: Piece { start: 0, end: SEGMENT_BLOCKS, value, sum: 0 } })
                }
                Segment::Tree(root) => {
                    let mut visit = |piece| visit(PieceInFile { base, piece });
                    walk(root, (key, SEGMENT_BLOCKS), SEGMENT_BLOCKS, self.reach, &mut visit)
                }
            };
            if !went_through {
                return false;
            }
        }
        true
    }
}

/// Whether an entry of this value may merge at all: saves the look at its neighbours.
fn may_merge(value: Value) -> bool {
    !value.is_pinned() || broken(Mutation::MergePinned)
}

/// The nodes of all segments of `view`.
pub(super) fn all_nodes(view: &ViewData, reach: Reach<'_>) -> Vec<NodeRef> {
    fn collect(node: NodeRef, reach: Reach<'_>, nodes: &mut Vec<NodeRef>) {
        if let super::mem::Node::Inner(inner) = node.open(reach) {
            inner.children().for_each(|child| collect(child.node, reach, nodes));
        }
        nodes.push(node);
    }
    let mut nodes = Vec::new();
    for segment in &view.segments.listed {
        if let Segment::Tree(root) = segment {
            collect(*root, reach, &mut nodes);
        }
    }
    nodes
}
