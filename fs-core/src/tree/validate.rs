//! What must be true of a block before it is believed to be a node.
//!
//! Bytes come from a device: they may be stale, torn, foreign, misdirected, or garbage made by someone who can compute
//! a checksum. Whatever passes [`Node::validate`] can be searched and edited without a panic.
//!
//! Not here: whether the keys are within the bounds that the parent sets, as one page cannot tell (`walk` does).

use std::sync::Arc;

use zerocopy::FromBytes;

use super::node::{
    CHILD_LEN, FsId, HEADER_LEN, MAX_ITEM, MAX_KEY, MAX_VALUE, NODE_FORMAT, NODE_MAGIC, Node, NodePtr,
    SLOT_LEN, TreeId, head_of, node_checksum,
};
use crate::types::{BLOCK_SIZE, BlockAddr, Generation};

/// A block that is not the node that its parent points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tree {}: node of level {level} at block {addr}: {fault}", tree.0)]
pub struct NodeError {
    /// The tree that points to it.
    pub tree: TreeId,
    /// The level it should have.
    pub level: u8,
    /// Where it was looked for.
    pub addr: BlockAddr,
    /// What is wrong.
    pub fault: NodeFault,
}

/// What is wrong with a block that should be a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NodeFault {
    /// Fewer or more bytes than a block.
    #[error("{0} bytes instead of a block")]
    Length(usize),
    /// The parent's checksum is another.
    #[error("checksum {found:#018x}, the pointer says {expected:#018x}")]
    Checksum {
        /// Of the pointer.
        expected: u64,
        /// Of the block.
        found: u64,
    },
    /// Not a node at all.
    #[error("no node: magic {0:#010x}")]
    Magic(u32),
    /// A layout that this version does not know.
    #[error("unknown node format {0}")]
    Format(u16),
    /// A node of another filesystem.
    #[error("belongs to another filesystem")]
    Filesystem,
    /// A node of another place: a misdirected read or write.
    #[error("says that it is the node at block {0}")]
    Address(BlockAddr),
    /// A node of another tree.
    #[error("belongs to tree {}", .0.0)]
    Tree(TreeId),
    /// A node of another level.
    #[error("says that it is of level {0}")]
    Level(u8),
    /// Another version of the node: a lost write, or a pointer of the future.
    #[error("generation {found}, expected {expected}")]
    Generation {
        /// Of the pointer, or the newest allowed.
        expected: Generation,
        /// Of the node.
        found: Generation,
    },
    /// Reserved bytes are not zero.
    #[error("reserved bytes are in use")]
    Reserved,
    /// Count, heap, dead bytes and prefix contradict each other.
    #[error("the header's sizes contradict each other")]
    Sizes,
    /// An item lies outside of the heap, or is too long, or its head is not that of its key.
    #[error("item {0} is malformed")]
    Item(u16),
    /// An item overlaps another.
    #[error("item {0} overlaps another item")]
    Overlap(u16),
    /// An item's key is not above the one before it.
    #[error("item {0} is out of order")]
    Order(u16),
    /// An inner node's item is no possible pointer.
    #[error("item {0} points to no possible node")]
    Child(u16),
    /// Keys lie outside of what the parent says (found by `walk`).
    #[error("keys beyond the bounds set by the parent")]
    Bounds,
    /// More levels than any tree has.
    #[error("more than {} levels", super::MAX_HEIGHT)]
    Height,
}

impl NodePtr {
    /// `fault` of the node that this points to.
    pub(super) fn error(&self, fault: NodeFault) -> NodeError {
        NodeError { tree: self.tree, level: self.level, addr: self.addr, fault }
    }
}

impl Node {
    /// The node that `ptr` points to, if `bytes` are it: checksum, identity and every fact about its structure.
    pub fn validate(ptr: &NodePtr, fsid: &FsId, bytes: &[u8]) -> Result<Arc<Node>, NodeError> {
        let node = Node::read_from_bytes(bytes).map_err(|_| ptr.error(NodeFault::Length(bytes.len())))?;
        let found = node_checksum(bytes);
        if found != ptr.checksum {
            return Err(ptr.error(NodeFault::Checksum { expected: ptr.checksum, found }));
        }
        node.check_identity(ptr, fsid)
            .and_then(|()| node.check_structure())
            .map_err(|fault| ptr.error(fault))?;
        Ok(Arc::new(node))
    }

    /// The cheap part, repeated at each step of a descent: a garbage pointer may lead to a node that is in memory for
    /// another reason. As levels are checked, no descent is longer than the root's level says.
    pub(super) fn check_place(&self, ptr: &NodePtr) -> Result<(), NodeFault> {
        if self.addr() != ptr.addr {
            return Err(NodeFault::Address(self.addr()));
        }
        if self.tree() != ptr.tree {
            return Err(NodeFault::Tree(self.tree()));
        }
        if self.level() != ptr.level {
            return Err(NodeFault::Level(self.level()));
        }
        if self.generation() != ptr.generation {
            return Err(NodeFault::Generation { expected: ptr.generation, found: self.generation() });
        }
        Ok(())
    }

    fn check_identity(&self, ptr: &NodePtr, fsid: &FsId) -> Result<(), NodeFault> {
        let header = &self.header;
        if header.magic.get() != NODE_MAGIC {
            return Err(NodeFault::Magic(header.magic.get()));
        }
        if header.format.get() != NODE_FORMAT {
            return Err(NodeFault::Format(header.format.get()));
        }
        if header.fsid != *fsid {
            return Err(NodeFault::Filesystem);
        }
        if header.reserved != [0; _] {
            return Err(NodeFault::Reserved);
        }
        self.check_place(ptr)
    }

    fn check_structure(&self) -> Result<(), NodeFault> {
        let header = &self.header;
        let (count, heap) = (header.count.get() as usize, header.heap.get() as usize);
        let prefix_len = header.prefix_len.get() as usize;
        if count == 0
            || prefix_len > MAX_KEY
            || heap > BLOCK_SIZE - prefix_len
            || HEADER_LEN + count * SLOT_LEN > heap
        {
            return Err(NodeFault::Sizes);
        }
        let mut used = HeapMap::new();
        let mut live = 0;
        for i in 0..count {
            self.check_item(i)?;
            let slot = self.slot(i);
            if !used.claim(slot.at(), slot.len()) {
                return Err(NodeFault::Overlap(i as u16));
            }
            live += slot.len();
        }
        if heap + live + header.dead.get() as usize != BLOCK_SIZE - prefix_len {
            return Err(NodeFault::Sizes);
        }
        Ok(())
    }

    /// Item `i`, those before it being right: bounds, lengths, head, order, and the pointer in an inner node.
    fn check_item(&self, i: usize) -> Result<(), NodeFault> {
        let slot = self.slot(i);
        let prefix_len = self.prefix_len();
        let heap = self.header.heap.get() as usize..BLOCK_SIZE - prefix_len;
        let place_is_right = match slot.len() {
            0 => slot.at() == 0,
            len => slot.at() >= heap.start && slot.at() + len <= heap.end,
        };
        let key_len = prefix_len + slot.key_len();
        let lengths_are_right = match self.is_leaf() {
            true => {
                (1..=MAX_KEY).contains(&key_len)
                    && slot.value_len() <= MAX_VALUE
                    && key_len + slot.value_len() <= MAX_ITEM
            }
            false if i == 0 => slot.key_len() == 0 && slot.value_len() == CHILD_LEN,
            false => (1..=MAX_KEY).contains(&key_len) && slot.value_len() == CHILD_LEN,
        };
        if !place_is_right || !lengths_are_right || slot.head() != head_of(self.suffix(slot)) {
            return Err(NodeFault::Item(i as u16));
        }
        if i > self.first_keyed() && self.suffix(self.slot(i - 1)) >= self.suffix(slot) {
            return Err(NodeFault::Order(i as u16));
        }
        if !self.is_leaf() {
            let child = self.child(i);
            if child.is_null() || child.addr == self.addr() || child.generation > self.generation() {
                return Err(NodeFault::Child(i as u16));
            }
        }
        Ok(())
    }
}

/// Which bytes of a page are taken, a bit each.
struct HeapMap([u64; BLOCK_SIZE / 64]);

impl HeapMap {
    fn new() -> HeapMap {
        HeapMap([0; _])
    }

    /// Takes a range; false if a byte of it was taken already.
    fn claim(&mut self, at: usize, len: usize) -> bool {
        let (mut bit, end) = (at, at + len);
        while bit < end {
            let word = bit / 64;
            let upto = end.min((word + 1) * 64);
            let mask = (u64::MAX >> (64 - (upto - bit))) << (bit % 64);
            if self.0[word] & mask != 0 {
                return false;
            }
            self.0[word] |= mask;
            bit = upto;
        }
        true
    }
}
