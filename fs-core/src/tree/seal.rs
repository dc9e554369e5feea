//! The commit's part: checksums from the bottom up, and the list of blocks to write.

use std::sync::Arc;

use super::cache::{FrameId, State};
use super::node::{Node, NodePtr, node_checksum};
use super::{Ctx, Tree};
use crate::types::BlockAddr;

impl Tree {
    /// Finishes the nodes of the current generation: appends them to `out`, children before parents, and returns the final root
    /// pointer. A tree that was not modified in this generation has nothing to write.
    ///
    /// The caller begins the next generation before it modifies the tree again (asserted then), writes the blocks, and calls
    /// [`NodeCache::written`](super::NodeCache::written) when they are on the device.
    pub fn seal(&mut self, ctx: &mut Ctx<'_>, out: &mut Vec<(BlockAddr, Arc<Node>)>) -> NodePtr {
        if self.is_empty() || self.root.generation != ctx.generation {
            return self.root;
        }
        let root = ctx.cache.find(self.root.addr).expect("a dirty root is in memory");
        // Sealed already, and not modified since (that would have been refused).
        if ctx.cache.state(root) == State::Dirty {
            self.root.checksum = seal_node(ctx, root, out);
        }
        self.root
    }
}

/// Seals the nodes of the current generation from `frame` down; returns the checksum. No deeper than the tree is high.
fn seal_node(ctx: &mut Ctx<'_>, frame: FrameId, out: &mut Vec<(BlockAddr, Arc<Node>)>) -> u64 {
    let node = ctx.cache.node(frame);
    if !node.is_leaf() {
        for i in 0..ctx.cache.node(frame).len() {
            // Nodes that came from the device are older, and so are their children (validated), so a pointer of this
            // generation is one that this generation made.
            let mut ptr = ctx.cache.node(frame).child(i);
            if ptr.generation == ctx.generation {
                let child = ctx.cache.find(ptr.addr).expect("a dirty child is in memory");
                ptr.checksum = seal_node(ctx, child, out);
                ctx.cache.node_mut(frame).set_child(i, &ptr);
            }
        }
    }
    ctx.cache.mark_sealed(frame, ctx.generation);
    let node = ctx.cache.arc(frame);
    out.push((node.addr(), Arc::clone(node)));
    node_checksum(node.bytes())
}
