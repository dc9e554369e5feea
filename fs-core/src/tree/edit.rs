//! Changes inside one page, and between two: insertion, removal, compaction, split, merge.
//!
//! Nothing here can fail: whether an item fits is asked first ([`Node::fit`]), and a split of a valid node with one item of
//! at most [`MAX_ITEM`] bytes always succeeds ([`choose_cut`] has the proof).
//!
//! Not here: copy-on-write and the tree around the page; the callers have made the page theirs before.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

use super::node::{
    CAPACITY, CHILD_LEN, Child, HEADER_LEN, KeyBuf, KeyRef, MAX_ITEM, Node, NodePtr, SLOT_LEN, Slot, common,
    head_of,
};
use crate::types::{BLOCK_SIZE, BlockAddr, Generation};

/// How an item gets into a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// There is room between slots and heap.
    Direct,
    /// There is room once the page is rewritten: without its dead bytes, or with a prefix that the new key shares.
    Rebuild,
    /// The page must be split.
    Split,
}

/// An item that is to enter a page at `pos`: as a new one, or with `replaces` for the item there, which has the same key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    pub(super) pos: usize,
    pub(super) replaces: bool,
    pub(super) key: &'a [u8],
    pub(super) value: &'a [u8],
}

#[derive(Clone, Copy)]
pub(super) struct Item<'a> {
    key: KeyRef<'a>,
    value: &'a [u8],
}

impl Item<'_> {
    /// Bytes of the item in a page without a prefix.
    fn size(&self) -> usize {
        SLOT_LEN + self.key.len() + self.value.len()
    }
}

impl Node {
    /// Bytes that slots, live items and prefix take.
    pub(super) fn used(&self) -> usize {
        CAPACITY - self.gap() - self.header.dead.get() as usize
    }

    /// How `entry` gets in.
    pub(super) fn fit(&self, entry: &Entry<'_>) -> Fit {
        let keys = self.len().saturating_sub(self.first_keyed()) + usize::from(!entry.replaces);
        // A first key becomes the prefix, to be cut to what the next ones share: so heads tell them apart from the start.
        if keys > 1 && entry.key.starts_with(self.prefix()) {
            let slot = if entry.replaces { 0 } else { SLOT_LEN };
            let need = slot + entry.key.len() - self.prefix_len() + entry.value.len();
            if need <= self.gap() {
                return Fit::Direct;
            }
        }
        let old = if entry.replaces { self.item(entry.pos).size() } else { 0 };
        let size = self.size_without_prefix() - old + SLOT_LEN + entry.key.len() + entry.value.len();
        let prefix_len = self.prefix_with(entry);
        if size - prefix_len * keys + prefix_len <= CAPACITY { Fit::Rebuild } else { Fit::Split }
    }

    /// Puts `entry` in, as [`Node::fit`] said it can.
    pub(super) fn place(&mut self, entry: &Entry<'_>, fit: Fit) {
        match fit {
            Fit::Direct => self.place_direct(entry),
            Fit::Rebuild => {
                let old = self.clone();
                let prefix = KeyBuf::from_slice(&entry.key[..old.prefix_with(entry)]);
                self.fill(&prefix, old.items_with(entry));
            }
            Fit::Split => unreachable!("the caller splits"),
        }
        if !entry.replaces {
            self.header.next = U16::new(entry.pos as u16 + 1);
        }
    }

    /// Overwrites the value of item `i` with one that is not longer.
    pub(super) fn shrink_value(&mut self, i: usize, value: &[u8]) {
        let slot = self.slot(i);
        assert!(value.len() <= slot.value_len(), "a longer value is placed, not shrunk");
        let at = slot.at() + slot.key_len();
        self.as_mut_bytes()[at..at + value.len()].copy_from_slice(value);
        self.bury(slot.value_len() - value.len());
        self.slots[i] = Slot::new(slot.head(), slot.at(), slot.key_len(), value.len());
    }

    /// The value of item `i`, to be overwritten.
    pub(super) fn value_mut(&mut self, i: usize) -> &mut [u8] {
        let slot = self.slot(i);
        let at = slot.at() + slot.key_len();
        &mut self.as_mut_bytes()[at..at + slot.value_len()]
    }

    /// Points child `i` of an inner node elsewhere.
    pub(super) fn set_child(&mut self, i: usize, ptr: &NodePtr) {
        debug_assert_eq!(ptr.level + 1, self.level());
        self.value_mut(i).copy_from_slice(Child::from(ptr).as_bytes());
    }

    /// Gives the page a new address and generation: the copy of copy-on-write.
    pub(super) fn set_identity(&mut self, addr: BlockAddr, generation: Generation) {
        self.header.addr.set(addr.0);
        self.header.generation.set(generation.0);
    }

    /// Takes item `i` out. In an inner node the item after a removed first one loses its separator: it now begins where
    /// the node begins.
    pub(super) fn remove_at(&mut self, i: usize) {
        if i == 0 && !self.is_leaf() && self.len() > 1 {
            let next = self.slot(1);
            self.bury(next.key_len());
            self.slots[1] = Slot::new(0, next.at() + next.key_len(), 0, next.value_len());
        }
        let slot = self.slot(i);
        let count = self.len();
        self.slots.copy_within(i + 1..count, i);
        self.header.count.set(count as u16 - 1);
        if slot.len() > 0 && slot.at() == self.heap() {
            self.header.heap.set((self.heap() + slot.len()) as u16);
        } else {
            self.bury(slot.len());
        }
    }

    /// The first item of a new inner node that has one child.
    pub(super) fn push_first_child(&mut self, ptr: &NodePtr) {
        debug_assert!(!self.is_leaf() && self.len() == 0);
        self.push(KeyRef { prefix: &[], suffix: &[] }, Child::from(ptr).as_bytes());
    }

    /// Splits the page around `entry`, which does not fit: the upper part moves to `right`, an empty node of the same
    /// level. Returns the separator: the lower bound of `right`.
    pub(super) fn split(&mut self, right: &mut Node, entry: &Entry<'_>) -> KeyBuf {
        let old = self.clone();
        let items: Vec<Item<'_>> = old.items_with(entry).collect();
        // The end of a page alone says nothing: what descends towards a full page lands there each time.
        let ascending = !entry.replaces && entry.pos > 0 && entry.pos == old.next();
        let first_keyed = old.first_keyed();
        let cut = choose_cut(&items, first_keyed, ascending.then_some(entry.pos));
        let (lower, upper) = items.split_at(cut);
        self.fill(&shared_prefix(&lower[first_keyed..]), lower.iter().copied());
        right.fill(&shared_prefix(&upper[first_keyed..]), upper.iter().copied());
        if ascending && entry.pos < cut {
            self.header.next = U16::new(entry.pos as u16 + 1);
        } else if ascending {
            right.header.next = U16::new((entry.pos - cut) as u16 + 1);
        }
        let above = upper[0].key.to_buf();
        if old.is_leaf() {
            let below = lower[cut - 1].key.to_buf();
            KeyBuf::from_slice(&above[..=common(&below, &above)])
        } else {
            above
        }
    }

    /// Bytes that this node and its right neighbour would take in one page. `separator` is the right one's lower bound.
    pub(super) fn merged_size(&self, right: &Node, separator: &[u8]) -> usize {
        let separator = if self.is_leaf() { &[] } else { separator };
        let keys = self.len() + right.len() - self.first_keyed();
        let prefix = self.merged_prefix(right, separator).len();
        self.size_without_prefix() + right.size_without_prefix() + separator.len() - prefix * keys + prefix
    }

    /// Fills this empty page with the items of `left` and then `right`, neighbours whose [`Node::merged_size`] fits.
    pub(super) fn fill_merged(&mut self, left: &Node, right: &Node, separator: &[u8]) {
        let separator = if left.is_leaf() { &[] } else { separator };
        let prefix = left.merged_prefix(right, separator);
        let right_items = right.items().enumerate().map(|(i, item)| match i {
            0 if !separator.is_empty() => Item { key: separator.into(), ..item },
            _ => item,
        });
        self.fill(&prefix, left.items().chain(right_items));
    }

    /// What all keys share after a merge.
    fn merged_prefix(&self, right: &Node, separator: &[u8]) -> KeyBuf {
        let key_or = |node: &Node, i: usize, or: &[u8]| {
            if i >= node.first_keyed() && i < node.len() {
                node.key(i).to_buf()
            } else {
                KeyBuf::from_slice(or)
            }
        };
        let first = key_or(self, self.first_keyed(), separator);
        let last = key_or(right, right.len() - 1, separator);
        KeyBuf::from_slice(&first[..common(&first, &last)])
    }

    /// Bytes between slots and heap.
    fn gap(&self) -> usize {
        self.heap() - HEADER_LEN - self.len() * SLOT_LEN
    }

    fn heap(&self) -> usize {
        self.header.heap.get() as usize
    }

    fn next(&self) -> usize {
        self.header.next.get() as usize
    }

    /// Counts `n` more bytes of the heap as dead.
    fn bury(&mut self, n: usize) {
        self.header.dead.set(self.header.dead.get() + n as u16);
    }

    fn item(&self, i: usize) -> Item<'_> {
        let key = if i < self.first_keyed() { KeyRef { prefix: &[], suffix: &[] } } else { self.key(i) };
        Item { key, value: self.value(i) }
    }

    fn items(&self) -> impl Iterator<Item = Item<'_>> {
        (0..self.len()).map(|i| self.item(i))
    }

    /// The items as they are with `entry` among them.
    fn items_with<'a>(&'a self, entry: &Entry<'a>) -> impl Iterator<Item = Item<'a>> + 'a {
        let new = Item { key: entry.key.into(), value: entry.value };
        let rest = entry.pos + usize::from(entry.replaces);
        let before = (0..entry.pos).map(|i| self.item(i));
        before.chain([new]).chain((rest..self.len()).map(|i| self.item(i)))
    }

    /// Bytes that slots and items would take without a prefix.
    fn size_without_prefix(&self) -> usize {
        self.used() - self.prefix_len()
            + self.prefix_len() * (self.len() - self.first_keyed().min(self.len()))
    }

    /// Length of what all keys share once `entry` is among them.
    fn prefix_with(&self, entry: &Entry<'_>) -> usize {
        let first_keyed = self.first_keyed();
        let mut len = entry.key.len();
        for i in [first_keyed, self.len().wrapping_sub(1)] {
            if i >= first_keyed && i < self.len() {
                len = len.min(common(entry.key, &self.key(i).to_buf()));
            }
        }
        len
    }

    fn place_direct(&mut self, entry: &Entry<'_>) {
        let suffix = &entry.key[self.prefix_len()..];
        let len = suffix.len() + entry.value.len();
        let at = self.heap() - len;
        let bytes = self.as_mut_bytes();
        bytes[at..at + suffix.len()].copy_from_slice(suffix);
        bytes[at + suffix.len()..at + len].copy_from_slice(entry.value);
        let count = self.len();
        if entry.replaces {
            self.bury(self.slot(entry.pos).len());
        } else {
            self.slots.copy_within(entry.pos..count, entry.pos + 1);
            self.header.count.set(count as u16 + 1);
        }
        self.header.heap.set(at as u16);
        self.slots[entry.pos] = Slot::new(head_of(suffix), at, suffix.len(), entry.value.len());
    }

    /// Replaces the content of the page. All keys of `items` begin with `prefix`; the first of an inner node's is ignored.
    fn fill<'a>(&mut self, prefix: &[u8], items: impl Iterator<Item = Item<'a>>) {
        let heap = BLOCK_SIZE - prefix.len();
        self.as_mut_bytes()[heap..].copy_from_slice(prefix);
        self.header.heap.set(heap as u16);
        self.header.prefix_len.set(prefix.len() as u16);
        self.header.count.set(0);
        self.header.dead.set(0);
        self.header.next.set(0);
        let first_keyed = self.first_keyed();
        for (i, item) in items.enumerate() {
            let suffix = if i < first_keyed { b""[..].into() } else { item.key.skip(prefix.len()) };
            self.push(suffix, item.value);
        }
    }

    /// Appends an item whose key, without the prefix, is `suffix`.
    fn push(&mut self, suffix: KeyRef<'_>, value: &[u8]) {
        let key_len = suffix.len();
        let count = self.len();
        let at = self.heap() - key_len - value.len();
        assert!(at >= HEADER_LEN + (count + 1) * SLOT_LEN, "an item that was found to fit fits");
        let (front, back) = (suffix.prefix, suffix.suffix);
        let bytes = &mut self.as_mut_bytes()[at..];
        bytes[..front.len()].copy_from_slice(front);
        bytes[front.len()..key_len].copy_from_slice(back);
        bytes[key_len..key_len + value.len()].copy_from_slice(value);
        let head = head_of(&self.as_bytes()[at..at + key_len]);
        self.slots[count] = Slot::new(head, at, key_len, value.len());
        self.header.heap.set(at as u16);
        self.header.count.set(count as u16 + 1);
    }
}

/// What all keys of a sorted run share.
fn shared_prefix(items: &[Item<'_>]) -> KeyBuf {
    match items {
        [] => KeyBuf::new(),
        [only] => only.key.to_buf(),
        [first, .., last] => {
            let (first, last) = (first.key.to_buf(), last.key.to_buf());
            KeyBuf::from_slice(&first[..common(&first, &last)])
        }
    }
}

/// Whether a page can hold these items.
fn fits(items: &[Item<'_>], first_keyed: usize) -> bool {
    let keyed = &items[first_keyed..];
    let size: usize = items.iter().map(Item::size).sum();
    let unused = if first_keyed == 1 { items[0].key.len() } else { 0 };
    let prefix = shared_prefix(keyed).len();
    size - unused + prefix - prefix * keyed.len() <= CAPACITY
}

/// Where to cut items that are too many for one page: `1..items.len()`, such that both parts fit.
///
/// `ascending` is the position of a new item that continues an ascending run: everything up to it stays in the left page, so
/// that such runs leave full pages behind. Otherwise the parts are of equal size.
///
/// A cut always exists. Let P be the page's prefix, C the capacity, and no item larger than M = C/3. If the new key
/// begins with P, then with P in both parts the halves are at most P + (C - P + M)/2 + M/2 = C/2 + P/2 + M <= C, as P < C/3.
/// If it does not, it is the first or the last key, and the old items fit in a page of their own, as they did.
fn choose_cut(items: &[Item<'_>], first_keyed: usize, ascending: Option<usize>) -> usize {
    let both_fit = |cut: usize| {
        cut > 0 && cut < items.len() && fits(&items[..cut], first_keyed) && fits(&items[cut..], first_keyed)
    };
    if let Some(pos) = ascending
        && let Some(cut) = [pos + 1, pos].into_iter().find(|cut| both_fit(*cut))
    {
        return cut;
    }
    let total: usize = items.iter().map(Item::size).sum();
    let mut left = 0;
    let mut balanced = 0;
    while balanced < items.len() && left + items[balanced].size() / 2 < total / 2 {
        left += items[balanced].size();
        balanced += 1;
    }
    // The nearest cut to the balanced one that fits; prefixes rarely make it another than the first.
    (0..items.len())
        .flat_map(|distance| [balanced.wrapping_sub(distance), balanced + distance])
        .find(|cut| both_fit(*cut))
        .expect("a page with one more item of at most MAX_ITEM bytes can be split")
}

const _: () = {
    // The premises of choose_cut: an item of a leaf, and a separator with its child, are at most a third of a page.
    assert!(SLOT_LEN + MAX_ITEM <= CAPACITY / 3);
    assert!(SLOT_LEN + super::node::MAX_KEY + CHILD_LEN <= CAPACITY / 3);
    assert!(super::node::MAX_KEY < CAPACITY / 3);
};
