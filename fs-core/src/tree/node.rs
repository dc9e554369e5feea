//! The page of a tree: one 4 KiB block with sorted byte-string keys and values.
//!
//! ```text
//! 0         64                              heap                     4096 - prefix    4096
//! | header | slot 0 | slot 1 | ... | free   | items (key suffix, value) | prefix |
//! ```
//!
//! What every node keeps, on the device and in memory ([`Node::validate`] establishes it, the editing functions keep it):
//!
//! - Keys ascend strictly, compared as byte strings. The prefix is shared by all keys and stored once; an item stores the
//!   rest, its suffix. The prefix need not be the longest one possible.
//! - A slot repeats the first four bytes of its suffix as a big-endian number, zero-padded (the head), so that a search
//!   decides almost always within the slots (Graefe and Larson, "B-tree indexes and CPU caches", ICDE 2001).
//! - An inner node's item `i` is the child that holds the keys from separator `i` (inclusive) up to separator `i + 1`.
//!   Item 0 has no separator: it begins where the node begins. Separators are cut to the shortest string that separates
//!   (Bayer and Unterauer, "Prefix B-trees", TODS 1977).
//! - Items and prefix never overlap; bytes of the heap that no item covers are counted as dead.
//!
//! Not here: which node a key belongs to (the parent knows), where nodes live (the cache), and what values mean.

use std::cmp::Ordering;
use std::mem::offset_of;

use crc_fast::CrcAlgorithm;
use smallvec::SmallVec;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::types::{BLOCK_SIZE, BlockAddr, Generation};

/// `GNOD`, the first bytes of every node.
pub const NODE_MAGIC: u32 = u32::from_le_bytes(*b"GNOD");
/// Version of the page layout below.
pub const NODE_FORMAT: u16 = 1;

// Byte map of the header. Each offset follows from the one before; `Header` is checked against the chain.
const MAGIC_AT: usize = 0;
const FORMAT_AT: usize = MAGIC_AT + 4;
const TREE_AT: usize = FORMAT_AT + 2;
const LEVEL_AT: usize = TREE_AT + 1;
const FSID_AT: usize = LEVEL_AT + 1;
const ADDR_AT: usize = FSID_AT + 16;
const GENERATION_AT: usize = ADDR_AT + 8;
const COUNT_AT: usize = GENERATION_AT + 8;
const HEAP_AT: usize = COUNT_AT + 2;
const DEAD_AT: usize = HEAP_AT + 2;
const PREFIX_LEN_AT: usize = DEAD_AT + 2;
const NEXT_AT: usize = PREFIX_LEN_AT + 2;
const RESERVED_AT: usize = NEXT_AT + 2;
const RESERVED_LEN: usize = 14;
/// Bytes of the header; the slots begin here.
pub const HEADER_LEN: usize = RESERVED_AT + RESERVED_LEN;
/// Bytes of a slot.
pub const SLOT_LEN: usize = 8;
/// Bytes for slots, items and prefix.
pub const CAPACITY: usize = BLOCK_SIZE - HEADER_LEN;
/// The slots that fit in a node without items.
const SLOT_MAX: usize = CAPACITY / SLOT_LEN;

/// The longest key.
pub const MAX_KEY: usize = 304;
/// The longest value.
pub const MAX_VALUE: usize = 1104;
/// The most bytes of a key and its value together: three items and their slots always fit in a node, which also makes
/// every split succeed (`edit::choose_cut`).
pub const MAX_ITEM: usize = CAPACITY / 3 - SLOT_LEN;
/// Bytes of a child pointer, the value of an inner item.
pub const CHILD_LEN: usize = 24;

const _: () = {
    assert!(offset_of!(Header, magic) == MAGIC_AT);
    assert!(offset_of!(Header, format) == FORMAT_AT);
    assert!(offset_of!(Header, tree) == TREE_AT);
    assert!(offset_of!(Header, level) == LEVEL_AT);
    assert!(offset_of!(Header, fsid) == FSID_AT);
    assert!(offset_of!(Header, addr) == ADDR_AT);
    assert!(offset_of!(Header, generation) == GENERATION_AT);
    assert!(offset_of!(Header, count) == COUNT_AT);
    assert!(offset_of!(Header, heap) == HEAP_AT);
    assert!(offset_of!(Header, dead) == DEAD_AT);
    assert!(offset_of!(Header, prefix_len) == PREFIX_LEN_AT);
    assert!(offset_of!(Header, next) == NEXT_AT);
    assert!(offset_of!(Header, reserved) == RESERVED_AT);
    assert!(size_of::<Header>() == HEADER_LEN);
    assert!(size_of::<Slot>() == SLOT_LEN);
    assert!(size_of::<Child>() == CHILD_LEN);
    assert!(size_of::<Node>() == BLOCK_SIZE);
    assert!(HEADER_LEN == 64);
    assert!(MAX_KEY < 1 << Slot::KEY_BITS);
    assert!(MAX_VALUE < 1 << Slot::VALUE_BITS);
    assert!(BLOCK_SIZE <= 1 << Slot::AT_BITS);
    assert!(Slot::AT_BITS + Slot::KEY_BITS + Slot::VALUE_BITS == u32::BITS);
    // Separators fan out well even when all are as long as can be.
    assert!(CAPACITY / (SLOT_LEN + MAX_KEY + CHILD_LEN) >= 12);
};

/// Which tree of the filesystem a node belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TreeId(pub u8);

/// The filesystem's UUID.
pub type FsId = [u8; 16];

/// A key of its own, usually without an allocation.
pub type KeyBuf = SmallVec<[u8; 40]>;

/// Where a node is and how to know it: what a parent (or the superblock) says about a child.
///
/// On the device it is [`CHILD_LEN`] bytes; tree and level follow from the place where it is found.
/// While a node is modified in memory its pointers carry the address and the current generation, but no checksum: that
/// is known when the tree is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodePtr {
    /// Address of the block.
    pub addr: BlockAddr,
    /// The generation that wrote it.
    pub generation: Generation,
    /// CRC-64/NVMe of its 4096 bytes.
    pub checksum: u64,
    /// The tree it belongs to.
    pub tree: TreeId,
    /// 0 for a leaf.
    pub level: u8,
}

impl NodePtr {
    /// The root of an empty tree. Address 0 is a superblock, never a node.
    pub fn null(tree: TreeId) -> NodePtr {
        NodePtr { addr: BlockAddr(0), generation: Generation(0), checksum: 0, tree, level: 0 }
    }

    /// Whether this is the root of an empty tree.
    pub fn is_null(&self) -> bool {
        self.addr.0 == 0
    }
}

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: U32,
    pub(super) format: U16,
    pub(super) tree: u8,
    pub(super) level: u8,
    pub(super) fsid: [u8; 16],
    pub(super) addr: U64,
    pub(super) generation: U64,
    /// Items.
    pub(super) count: U16,
    /// First byte of the heap.
    pub(super) heap: U16,
    /// Bytes of the heap that no item covers.
    pub(super) dead: U16,
    pub(super) prefix_len: U16,
    /// A hint, any value is allowed: the slot after the last one inserted. An insertion there is likely to be one of
    /// an ascending run, and a split leaves a full node behind it.
    pub(super) next: U16,
    pub(super) reserved: [u8; RESERVED_LEN],
}

/// An item's place: head, and packed into 32 bits the offset of its suffix in the page (bits 0-11), length of the suffix
/// (bits 12-20) and of the value (bits 21-31), which follows the suffix. An item without bytes has offset 0.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Slot {
    head: U32,
    place: U32,
}

impl Slot {
    const AT_BITS: u32 = 12;
    const KEY_BITS: u32 = 9;
    const VALUE_BITS: u32 = 11;

    pub(super) fn new(head: u32, at: usize, key_len: usize, value_len: usize) -> Slot {
        let at = if key_len + value_len == 0 { 0 } else { at };
        debug_assert!(at < 1 << Slot::AT_BITS);
        debug_assert!(key_len < 1 << Slot::KEY_BITS);
        debug_assert!(value_len < 1 << Slot::VALUE_BITS);
        let place = at | key_len << Slot::AT_BITS | value_len << (Slot::AT_BITS + Slot::KEY_BITS);
        Slot { head: U32::new(head), place: U32::new(place as u32) }
    }

    pub(super) fn head(self) -> u32 {
        self.head.get()
    }

    /// Offset of the suffix.
    pub(super) fn at(self) -> usize {
        self.place.get() as usize & ((1 << Slot::AT_BITS) - 1)
    }

    pub(super) fn key_len(self) -> usize {
        (self.place.get() >> Slot::AT_BITS) as usize & ((1 << Slot::KEY_BITS) - 1)
    }

    pub(super) fn value_len(self) -> usize {
        (self.place.get() >> (Slot::AT_BITS + Slot::KEY_BITS)) as usize
    }

    /// Bytes in the heap.
    pub(super) fn len(self) -> usize {
        self.key_len() + self.value_len()
    }
}

/// A child pointer as it is stored.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Child {
    pub(super) addr: U64,
    pub(super) generation: U64,
    pub(super) checksum: U64,
}

impl From<&NodePtr> for Child {
    fn from(ptr: &NodePtr) -> Child {
        Child {
            addr: U64::new(ptr.addr.0),
            generation: U64::new(ptr.generation.0),
            checksum: U64::new(ptr.checksum),
        }
    }
}

/// One node. Its memory is exactly its block; aligned so that eight slots are one cache line.
#[derive(Clone, FromBytes, IntoBytes, Immutable)]
#[repr(C, align(64))]
pub struct Node {
    pub(super) header: Header,
    pub(super) slots: [Slot; SLOT_MAX],
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("tree", &self.tree())
            .field("level", &self.level())
            .field("addr", &self.addr())
            .field("generation", &self.generation())
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

/// A key inside a node: prefix and suffix, not joined.
#[derive(Clone, Copy, Debug)]
pub struct KeyRef<'a> {
    pub(super) prefix: &'a [u8],
    pub(super) suffix: &'a [u8],
}

impl<'a> KeyRef<'a> {
    /// Bytes of the key.
    #[allow(clippy::len_without_is_empty)] // Keys are not empty.
    pub fn len(&self) -> usize {
        self.prefix.len() + self.suffix.len()
    }

    /// The key, joined.
    pub fn to_buf(self) -> KeyBuf {
        let mut buf = KeyBuf::from_slice(self.prefix);
        buf.extend_from_slice(self.suffix);
        buf
    }

    /// The key as one slice, joined in `buf`.
    pub fn join<'b>(&self, buf: &'b mut KeyBuf) -> &'b [u8] {
        buf.clear();
        buf.extend_from_slice(self.prefix);
        buf.extend_from_slice(self.suffix);
        buf
    }

    /// What is left after the first `n` bytes.
    pub(super) fn skip(&self, n: usize) -> KeyRef<'a> {
        let of_prefix = n.min(self.prefix.len());
        KeyRef { prefix: &self.prefix[of_prefix..], suffix: &self.suffix[n - of_prefix..] }
    }
}

impl<'a> From<&'a [u8]> for KeyRef<'a> {
    fn from(key: &'a [u8]) -> KeyRef<'a> {
        KeyRef { prefix: &[], suffix: key }
    }
}

/// The checksum that a pointer carries: CRC-64/NVMe.
pub fn node_checksum(bytes: &[u8]) -> u64 {
    crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// The head of a suffix.
pub(super) fn head_of(suffix: &[u8]) -> u32 {
    match suffix.first_chunk::<4>() {
        Some(bytes) => u32::from_be_bytes(*bytes),
        None => {
            let mut bytes = [0; 4];
            bytes[..suffix.len()].copy_from_slice(suffix);
            u32::from_be_bytes(bytes)
        }
    }
}

/// Length of the longest common prefix.
pub(super) fn common(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Node {
    /// An empty node. It is not valid on a device before it has an item.
    pub(super) fn new(fsid: &FsId, ptr: &NodePtr) -> Node {
        let mut node = Node::new_zeroed();
        node.header.magic = U32::new(NODE_MAGIC);
        node.header.format = U16::new(NODE_FORMAT);
        node.header.tree = ptr.tree.0;
        node.header.level = ptr.level;
        node.header.fsid = *fsid;
        node.header.addr = U64::new(ptr.addr.0);
        node.header.generation = U64::new(ptr.generation.0);
        node.header.heap = U16::new(BLOCK_SIZE as u16);
        node
    }

    /// The tree it belongs to.
    pub fn tree(&self) -> TreeId {
        TreeId(self.header.tree)
    }

    /// 0 for a leaf; a child is one level lower.
    pub fn level(&self) -> u8 {
        self.header.level
    }

    /// Whether the values are the user's (else they are children).
    pub fn is_leaf(&self) -> bool {
        self.header.level == 0
    }

    /// Its own address.
    pub fn addr(&self) -> BlockAddr {
        BlockAddr(self.header.addr.get())
    }

    /// The generation that writes or wrote it.
    pub fn generation(&self) -> Generation {
        Generation(self.header.generation.get())
    }

    /// Number of items. Never 0 in a tree.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.header.count.get() as usize
    }

    /// The block as it goes to the device, once sealed.
    pub fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }

    /// Key of item `i`; in an inner node the separator, and of item 0 only what happens to be the common prefix.
    pub fn key(&self, i: usize) -> KeyRef<'_> {
        KeyRef { prefix: self.prefix(), suffix: self.suffix(self.slot(i)) }
    }

    /// Value of item `i`.
    pub fn value(&self, i: usize) -> &[u8] {
        let slot = self.slot(i);
        let at = slot.at() + slot.key_len();
        &self.as_bytes()[at..at + slot.value_len()]
    }

    /// Child `i` of an inner node.
    pub fn child(&self, i: usize) -> NodePtr {
        let slot = self.slot(i);
        let bytes = &self.as_bytes()[slot.at() + slot.key_len()..];
        // Validation, and insertion, made the value of an inner item CHILD_LEN bytes long.
        let (child, _) = Child::read_from_prefix(bytes).expect("a child pointer inside the page");
        NodePtr {
            addr: BlockAddr(child.addr.get()),
            generation: Generation(child.generation.get()),
            checksum: child.checksum.get(),
            tree: self.tree(),
            level: self.header.level.wrapping_sub(1),
        }
    }

    /// Position of `key` in a leaf: `Ok` of its item, else `Err` of the first item above it, which may be `len()`.
    pub fn find(&self, key: &[u8]) -> Result<usize, usize> {
        self.search(0, key)
    }

    /// The child of an inner node that holds `key`.
    pub fn child_for(&self, key: &[u8]) -> usize {
        match self.search(1, key) {
            Ok(i) => i,
            Err(i) => i - 1,
        }
    }

    /// The last child of an inner node that can hold keys below `key`.
    pub fn child_below(&self, key: &[u8]) -> usize {
        let (Ok(i) | Err(i)) = self.search(1, key);
        i - 1
    }

    /// A pointer to this node, but for the checksum.
    pub(super) fn ptr(&self) -> NodePtr {
        NodePtr {
            addr: self.addr(),
            generation: self.generation(),
            checksum: 0,
            tree: self.tree(),
            level: self.level(),
        }
    }

    /// Narrows the bounds of this inner node to those of its child `i`.
    pub(super) fn narrow(&self, i: usize, low: &mut KeyBuf, high: &mut Option<KeyBuf>) {
        if i > 0 {
            self.key(i).join(low);
        }
        if i + 1 < self.len() {
            self.key(i + 1).join(high.get_or_insert_default());
        }
    }

    /// First slot that has a key: item 0 of an inner node has none.
    pub(super) fn first_keyed(&self) -> usize {
        usize::from(!self.is_leaf())
    }

    /// The bytes that all keys begin with.
    pub(super) fn prefix(&self) -> &[u8] {
        &self.as_bytes()[BLOCK_SIZE - self.prefix_len()..]
    }

    pub(super) fn prefix_len(&self) -> usize {
        self.header.prefix_len.get() as usize
    }

    pub(super) fn slot(&self, i: usize) -> Slot {
        self.slots()[i]
    }

    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots[..self.len()]
    }

    pub(super) fn suffix(&self, slot: Slot) -> &[u8] {
        &self.as_bytes()[slot.at()..slot.at() + slot.key_len()]
    }

    /// The first item at or after `from` whose key is not below `key`: `Ok` if it is equal.
    fn search(&self, from: usize, key: &[u8]) -> Result<usize, usize> {
        let prefix = self.prefix();
        let Some(suffix) = key.strip_prefix(prefix) else {
            return Err(if key < prefix { from.min(self.len()) } else { self.len() });
        };
        let slots = self.slots();
        let head = head_of(suffix);
        let first = heads_below(slots, head).max(from);
        // With the prefix gone four bytes nearly always tell keys apart: one item is left to look at, or none.
        match slots.get(first) {
            Some(slot) if slot.head() == head => match self.suffix(*slot).cmp(suffix) {
                Ordering::Equal => Ok(first),
                Ordering::Greater => Err(first),
                Ordering::Less => self.search_equal_heads(first + 1, head, suffix),
            },
            _ => Err(first),
        }
    }

    /// [`Node::search`] among the items from `from` whose head is `head`.
    #[cold]
    fn search_equal_heads(&self, from: usize, head: u32, suffix: &[u8]) -> Result<usize, usize> {
        let rest = &self.slots()[from..];
        let run = &rest[..rest.partition_point(|slot| slot.head() == head)];
        match run.binary_search_by(|slot| self.suffix(*slot).cmp(suffix)) {
            Ok(i) => Ok(from + i),
            Err(i) => Err(from + i),
        }
    }
}

/// How many slots have a head below `head`.
///
/// One slot of each cache line is looked at, then one line: the loads depend on nothing but the count, so a page that is
/// not in the processor's cache costs one latency where a binary search costs one a step.
fn heads_below(slots: &[Slot], head: u32) -> usize {
    const LINE: usize = 64 / SLOT_LEN;
    let (lines, _) = slots.as_chunks::<LINE>();
    let below: usize = lines.iter().map(|line| usize::from(line[LINE - 1].head() < head)).sum();
    let start = below * LINE;
    let line = &slots[start..slots.len().min(start + LINE)];
    start + line.iter().map(|slot| usize::from(slot.head() < head)).sum::<usize>()
}
