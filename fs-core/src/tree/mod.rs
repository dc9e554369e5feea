//! Copy-on-write B+trees, for all metadata: names, inodes, extents, checksums, space.
//!
//! Maps byte strings to byte strings, in order of the keys as compared by `memcmp`. Nodes are one block; a tree is named by
//! the pointer to its root, which carries address, generation and checksum as every pointer between nodes does. So a root
//! in a superblock fixes every byte of the tree below it.
//!
//! # How an operation goes
//!
//! 1. It descends from the root through the cache ([`lookup`], [`cache`]). No I/O is done here: if a node is not in
//!    memory the call returns [`Stop::Miss`]; the caller reads that block, hands it to [`NodeCache::admit`], and calls again.
//! 2. A modification finds out how many blocks it may need and asks [`NodeAlloc::ensure`] for them ([`insert`], [`remove`]).
//! 3. Only then it changes something, and nothing can stop it any more: no miss, no lack of space. Every operation is
//!    done or not begun.
//! 4. It copies the nodes of its path that the current generation has not modified yet to new addresses, up to the root;
//!    nodes of the current generation are modified in place ([`path`]).
//! 5. It edits the leaf, and splits or merges upwards ([`edit`]).
//! 6. At a commit [`Tree::seal`] computes checksums bottom-up, puts them into the parents' pointers, and yields the blocks to write
//!    and the root pointer for the superblock ([`seal`]). The caller begins the next generation at once; sealed nodes are no
//!    longer modified, only copied. [`NodeCache::written`] says that they are on the device.
//!
//! # Invariants
//!
//! - A dirty node's ancestors are dirty, and all of them are in memory.
//! - Between [`Tree::seal`] and the next generation a tree is not modified (asserted).
//! - A child is one level below its parent, checked at each step: no descent is longer than the root's level, whatever the
//!   device returned.
//! - A node of a tree is never empty. One that is little filled merges with a neighbour if that is in memory; it may stay
//!   little filled if not.
//!
//! # Not here
//!
//! I/O, locks (everything runs under the caller's metadata lock), transactions over several trees, the rule when freed
//! blocks are used again (the allocator has it), shared nodes with reference counts (a later issue; [`NodeAlloc::free_node`] is
//! the place), and neighbours linked to each other, which copy-on-write forbids: iteration goes by key ([`Tree::leaf_from`]).

pub mod cache;
mod edit;
mod insert;
mod lookup;
pub mod node;
mod path;
mod remove;
mod seal;
mod validate;
mod walk;

#[cfg(test)]
mod tests;

// The surface of the module; not all of it is used by the crate itself.
pub use self::{
    cache::{CacheStats, NodeCache},
    lookup::{ItemRef, Leaf},
    node::{FsId, KeyBuf, KeyRef, MAX_ITEM, MAX_KEY, MAX_VALUE, Node, NodePtr, TreeId},
    validate::{NodeError, NodeFault},
    walk::Walk,
};

use crate::types::{BlockAddr, Generation};

/// The most levels a tree can have. Twelve children a node are the fewest that a split leaves in two, so that no tree that
/// was made by insertions comes near; a tree that a device presents may.
pub const MAX_HEIGHT: usize = 16;

/// Why a call could not do what it was asked to. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// A node is not in memory: read its block, [`NodeCache::admit`] it, call again.
    #[error("the node at block {} is not in memory", .0.addr)]
    Miss(NodePtr),
    /// The allocator cannot give the blocks that the operation may need.
    #[error("no space for metadata")]
    NoSpace,
    /// A node is not what the pointers to it say.
    #[error(transparent)]
    Corrupt(#[from] NodeError),
}

/// Where blocks for nodes come from, and go.
pub trait NodeAlloc {
    /// Makes sure that the next `nodes` calls of [`NodeAlloc::allocate_node`] succeed. What is not taken is free again
    /// with the next call of `ensure`. May return any [`Stop`]; the operation returns it unchanged, having done nothing.
    fn ensure(&mut self, nodes: usize) -> Result<(), Stop>;

    /// A block for a node. Only called for what `ensure` promised, so it cannot fail. Never block 0.
    fn allocate_node(&mut self) -> BlockAddr;

    /// The current generation needs this node no more. It was written, or was going to be, by generation `birth`: an older one
    /// belongs to a durable tree, and its block must not be used before the commit that freed it is durable.
    fn free_node(&mut self, addr: BlockAddr, birth: Generation);
}

/// What a modification works with.
pub struct Ctx<'a> {
    /// The nodes in memory.
    pub cache: &'a mut NodeCache,
    /// Blocks for new and copied nodes.
    pub alloc: &'a mut dyn NodeAlloc,
    /// The generation that the next commit writes. Every node on the device is of an older one.
    pub generation: Generation,
}

/// A tree: the pointer to its root.
///
/// A copy is a snapshot only if it was taken after [`Tree::seal`]: until then nodes are modified in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree {
    root: NodePtr,
}

impl Tree {
    /// An empty tree.
    pub fn new(id: TreeId) -> Tree {
        Tree { root: NodePtr::null(id) }
    }

    /// The tree below a root pointer, of a superblock for instance. Reads nothing. A level that no tree has is an error.
    pub fn open(root: NodePtr) -> Result<Tree, NodeError> {
        match (root.level as usize) < MAX_HEIGHT {
            true => Ok(Tree { root }),
            false => Err(root.error(NodeFault::Height)),
        }
    }

    /// Which tree it is.
    pub fn id(&self) -> TreeId {
        self.root.tree
    }

    /// The root. Its checksum is right after [`Tree::seal`] until the next modification.
    pub fn root(&self) -> NodePtr {
        self.root
    }

    /// Whether it has no items.
    pub fn is_empty(&self) -> bool {
        self.root.is_null()
    }

    /// Levels of nodes; 0 if empty.
    pub fn height(&self) -> usize {
        if self.is_empty() { 0 } else { self.root.level as usize + 1 }
    }

    /// The most nodes that one insertion can ask the allocator for: a copy and a split on each level, and a new root.
    pub fn insert_bound(&self) -> usize {
        2 * self.height() + 1
    }

    /// The most nodes that one removal or update can ask the allocator for: a copy on each level.
    pub fn remove_bound(&self) -> usize {
        self.height()
    }
}
