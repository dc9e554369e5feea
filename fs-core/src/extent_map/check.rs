//! Does a map keep its promises? For tests and for a checker; reads every node.

use super::ExtentMap;
use super::mapping::BlockRange;
use super::mem::{Node, NodeRef, Reach, pin};
use super::node::{INNER_CHILDREN, LEAF_CELLS, Piece, SEGMENT_BLOCKS};
use super::tree::pieces;
use super::view::{MapStats, Segment, View};

impl ExtentMap {
    /// Checks the structure of the present view: full coverage, ascending keys, nothing left to merge, counters. The error
    /// says what is wrong.
    pub(crate) fn check(&self) -> Result<(), String> {
        let guard = pin();
        self.view(&guard).check()
    }
}

impl View<'_> {
    /// As [`ExtentMap::check`], of this view.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut found = MapStats::default();
        let segments = &self.data.segments;
        if segments.listed.is_empty() {
            return Err("no segment listed".into());
        }
        if segments.listed.len() as u64 > BlockRange::ALL.len().0 / SEGMENT_BLOCKS as u64 {
            return Err("more segments than a file can have".into());
        }
        for (number, segment) in segments.listed.iter().enumerate() {
            match *segment {
                Segment::Uniform(value) if !value.is_uniform() => {
                    return Err(format!("segment {number} cannot be uniformly {value:?}"));
                }
                Segment::Uniform(_) => {}
                Segment::Tree(root) => {
                    let mut walk = Walk { reach: self.reach, found: &mut found, last: None, depth: None };
                    walk.node(root, (0, SEGMENT_BLOCKS), 0)
                        .map_err(|why| format!("segment {number}: {why}"))?;
                    if walk.last.is_none_or(|last| last.end != SEGMENT_BLOCKS) {
                        return Err(format!("segment {number} is not covered to its end"));
                    }
                }
            }
        }
        if !segments.beyond.is_uniform() {
            return Err(format!("{:?} behind the listed segments", segments.beyond));
        }
        match found == self.data.stats {
            true => Ok(()),
            false => Err(format!("counted {found:?}, noted {:?}", self.data.stats)),
        }
    }
}

struct Walk<'g, 'f> {
    reach: Reach<'g>,
    found: &'f mut MapStats,
    last: Option<Piece>,
    /// Level of the leaves, once one was seen.
    depth: Option<usize>,
}

impl Walk<'_, '_> {
    fn node(&mut self, node: NodeRef, (start, end): (i32, i32), level: usize) -> Result<(), String> {
        self.found.node_bytes += node.bytes() as u64;
        match node.open(self.reach) {
            Node::Inner(inner) => {
                let children: Vec<_> = inner.children().collect();
                if children.len().div_ceil(5) != node.groups() || children.len() > INNER_CHILDREN {
                    return Err(format!(
                        "an inner node of {} children in {} groups",
                        children.len(),
                        node.groups()
                    ));
                }
                if level == 0 && children.len() < 2 {
                    return Err("an inner root of one child".into());
                }
                if children[0].key != start {
                    return Err(format!(
                        "an inner node from {} in the place of one from {start}",
                        children[0].key
                    ));
                }
                for (index, child) in children.iter().enumerate() {
                    let child_end = children.get(index + 1).map_or(end, |next| next.key);
                    if child.key >= child_end {
                        return Err(format!("keys {} and {child_end} out of order", child.key));
                    }
                    self.node(child.node, (child.key, child_end), level + 1)?;
                }
                Ok(())
            }
            Node::Leaf(leaf) => {
                if *self.depth.get_or_insert(level) != level {
                    return Err("leaves at different levels".into());
                }
                let count = leaf.cells().count();
                if count.div_ceil(4) != node.groups() || count > LEAF_CELLS {
                    return Err(format!("a leaf of {count} entries in {} groups", node.groups()));
                }
                if leaf.cells().next().is_none_or(|cell| cell.start != start) {
                    return Err(format!("a leaf that does not start at {start}"));
                }
                for piece in pieces(leaf, end) {
                    self.piece(piece)?;
                }
                Ok(())
            }
        }
    }

    fn piece(&mut self, piece: Piece) -> Result<(), String> {
        self.found.entries += 1;
        self.found.pinned += u64::from(piece.value.is_pinned());
        if piece.start >= piece.end {
            return Err(format!("an entry of no block: {piece:?}"));
        }
        if piece.value.is_summed() && piece.len() != 1 {
            return Err(format!("a checksum in an entry of {} blocks", piece.len()));
        }
        if let Some(last) = self.last.replace(piece) {
            if last.end != piece.start {
                return Err(format!("{last:?} does not end where {piece:?} starts"));
            }
            if last.value.is_continued_by(last.len(), piece.value) {
                return Err(format!("{last:?} and {piece:?} should be one"));
            }
        }
        Ok(())
    }
}
