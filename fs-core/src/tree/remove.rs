//! Taking items out; merges, and the way down to a lower root.
//!
//! A node that is emptied leaves its parent. One that is less than [`LEAN`] full merges with a neighbour if both together are
//! at most [`MERGED`] full, so that the result does not split again soon. There is no borrowing: it would copy one more
//! node for little gain. Neighbours take part only if they are in memory: a removal never misses once it has begun.
//! It allocates nothing but the copies of its path, as a merge goes into the node that the path has copied anyway.

use super::cache::FrameId;
use super::node::{CAPACITY, KeyBuf, Node, NodePtr};
use super::path::{Path, check_bounds, leaf_of};
use super::{Ctx, Stop, Tree};

/// A node with fewer bytes in use looks for a neighbour to merge with.
const LEAN: usize = CAPACITY / 3;
/// The most bytes in use that a merge may result in.
const MERGED: usize = CAPACITY * 4 / 5;

impl Tree {
    /// Removes `key`. Returns whether it was there; if not, nothing was copied.
    pub fn remove(&mut self, ctx: &mut Ctx<'_>, key: &[u8]) -> Result<bool, Stop> {
        if self.is_empty() {
            return Ok(false);
        }
        let path = self.path_to(ctx.cache, key)?;
        let Ok(pos) = ctx.cache.node(leaf_of(&path)).find(key) else { return Ok(false) };
        self.prepare(ctx, &path, 0)?;
        ctx.cache.node_mut(leaf_of(&path)).remove_at(pos);
        self.settle(ctx, &path);
        Ok(true)
    }

    /// After a removal from the end of `path`: mends the nodes of the path that became empty or lean, from below.
    fn settle(&mut self, ctx: &mut Ctx<'_>, path: &Path) {
        for depth in (0..path.len()).rev() {
            let frame = path[depth].frame;
            let node = ctx.cache.node(frame);
            let (empty, lean) = (node.len() == 0, node.used() < LEAN);
            match depth.checked_sub(1).map(|above| path[above]) {
                None if empty => {
                    self.root = NodePtr::null(self.id());
                    free(ctx, frame);
                }
                None => self.collapse(ctx),
                Some(parent) if empty => {
                    ctx.cache.node_mut(parent.frame).remove_at(parent.child);
                    free(ctx, frame);
                }
                Some(parent) if lean => {
                    let merged = merge_with_right(ctx, parent.frame, parent.child, frame)
                        || merge_with_left(ctx, parent.frame, parent.child, frame);
                    if !merged {
                        return;
                    }
                }
                Some(_) => return,
            }
        }
    }

    /// While the root has one child, that child is the root.
    fn collapse(&mut self, ctx: &mut Ctx<'_>) {
        while let Some(frame) = ctx.cache.peek(&self.root) {
            let root = ctx.cache.node(frame);
            if root.is_leaf() || root.len() > 1 {
                return;
            }
            self.root = root.child(0);
            free(ctx, frame);
        }
    }
}

/// A node is no longer part of the tree.
fn free(ctx: &mut Ctx<'_>, frame: FrameId) {
    let node = ctx.cache.node(frame);
    let (addr, birth) = (node.addr(), node.generation());
    ctx.cache.remove(frame);
    ctx.alloc.free_node(addr, birth);
}

/// Takes the items of the right neighbour in, if that is in memory and they fit.
fn merge_with_right(ctx: &mut Ctx<'_>, parent: FrameId, child: usize, frame: FrameId) -> bool {
    let above = ctx.cache.node(parent);
    if child + 1 >= above.len() {
        return false;
    }
    let Some(other) = ctx.cache.peek(&above.child(child + 1)).filter(|other| *other != frame) else {
        return false;
    };
    let separator = above.key(child + 1).to_buf();
    if !merge(ctx, frame, other, frame, &separator) {
        return false;
    }
    ctx.cache.node_mut(parent).remove_at(child + 1);
    free(ctx, other);
    true
}

/// Takes the items of the left neighbour in, if that is in memory and they fit.
fn merge_with_left(ctx: &mut Ctx<'_>, parent: FrameId, child: usize, frame: FrameId) -> bool {
    let above = ctx.cache.node(parent);
    if child == 0 {
        return false;
    }
    let Some(other) = ctx.cache.peek(&above.child(child - 1)).filter(|other| *other != frame) else {
        return false;
    };
    let (separator, ptr) = (above.key(child).to_buf(), above.child(child));
    if !merge(ctx, other, frame, frame, &separator) {
        return false;
    }
    let above = ctx.cache.node_mut(parent);
    above.set_child(child - 1, &ptr);
    above.remove_at(child);
    free(ctx, other);
    true
}

/// Merges two neighbours into `target`, one of them, if the result is not too full.
fn merge(ctx: &mut Ctx<'_>, left: FrameId, right: FrameId, target: FrameId, separator: &KeyBuf) -> bool {
    let (left, right) = (ctx.cache.node(left), ctx.cache.node(right));
    if left.used() + right.used() > MERGED {
        return false;
    }
    // In a damaged tree a neighbour may have keys beyond its bounds; joined they would be out of order.
    if check_bounds(left, &[], Some(separator)).is_err() || check_bounds(right, separator, None).is_err() {
        return false;
    }
    // The prefix of both may be shorter.
    if left.merged_size(right, separator) > MERGED {
        return false;
    }
    let mut merged = Node::new(ctx.cache.fsid(), &ctx.cache.node(target).ptr());
    merged.fill_merged(left, right, separator);
    *ctx.cache.node_mut(target) = merged;
    true
}
