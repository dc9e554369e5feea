//! Reading: one key, the nearest key on either side, a leaf at a time.
//!
//! An iteration holds nothing of the tree between its calls but a key, so the tree may change meanwhile: a [`Leaf`] is a
//! snapshot of one leaf and of the bounds between which its keys lie; the upper one is where the next leaf begins, the lower one is
//! what the previous one's keys are below.

use std::sync::Arc;

use super::cache::{FrameId, NodeCache};
use super::node::{KeyBuf, KeyRef, Node};
use super::{Stop, Tree};

/// An item in a leaf that is kept alive.
#[derive(Clone, Debug)]
pub struct ItemRef {
    /// The leaf.
    pub node: Arc<Node>,
    /// The item's position in it.
    pub index: usize,
}

impl ItemRef {
    /// The key.
    pub fn key(&self) -> KeyRef<'_> {
        self.node.key(self.index)
    }

    /// The value.
    pub fn value(&self) -> &[u8] {
        self.node.value(self.index)
    }
}

/// A leaf as it was, a position in it, and the range of keys that it was responsible for.
#[derive(Clone, Debug)]
pub struct Leaf {
    node: Arc<Node>,
    /// The next item that [`Leaf::next`] yields.
    pos: usize,
    low: KeyBuf,
    high: Option<KeyBuf>,
}

impl Leaf {
    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Position of the first item at or above the key that was looked for; the number of items if there is none.
    pub fn pos(&self) -> usize {
        self.pos
    }

    /// Number of items in the leaf.
    #[allow(clippy::len_without_is_empty)] // Leaves are not empty.
    pub fn len(&self) -> usize {
        self.node.len()
    }

    /// Key of item `i`.
    pub fn key(&self, i: usize) -> KeyRef<'_> {
        self.node.key(i)
    }

    /// Value of item `i`.
    pub fn value(&self, i: usize) -> &[u8] {
        self.node.value(i)
    }

    /// All keys of the leaf are at or above this one; empty in the first leaf. Go on backwards with
    /// [`Tree::leaf_before`] of it.
    pub fn low(&self) -> &[u8] {
        &self.low
    }

    /// All keys of the leaf are below this one; `None` in the last leaf. Go on forwards with [`Tree::leaf_from`] it.
    pub fn high(&self) -> Option<&[u8]> {
        self.high.as_deref()
    }

    /// The item at the position, which moves on.
    #[allow(clippy::should_implement_trait)] // It lends from the leaf.
    pub fn next(&mut self) -> Option<(KeyRef<'_>, &[u8])> {
        let i = self.pos;
        if i == self.len() {
            return None;
        }
        self.pos += 1;
        Some((self.node.key(i), self.node.value(i)))
    }

    /// The item before the position, which moves back.
    pub fn prev(&mut self) -> Option<(KeyRef<'_>, &[u8])> {
        self.pos = self.pos.checked_sub(1)?;
        Some((self.node.key(self.pos), self.node.value(self.pos)))
    }
}

/// Which of the leaves around a key.
#[derive(Clone, Copy)]
enum Side {
    /// The one that holds it.
    At,
    /// The last one that can hold keys below it.
    Below,
}

impl Tree {
    /// Looks `key` up and applies `f` to its value.
    pub fn get<R>(
        &self,
        cache: &mut NodeCache,
        key: &[u8],
        f: impl FnOnce(&[u8]) -> R,
    ) -> Result<Option<R>, Stop> {
        let Some(frame) = self.leaf_at(cache, key)? else { return Ok(None) };
        let node = cache.node(frame);
        Ok(node.find(key).ok().map(|i| f(node.value(i))))
    }

    /// Looks `key` up and keeps its leaf alive (which copies the leaf should it be modified meanwhile).
    pub fn get_ref(&self, cache: &mut NodeCache, key: &[u8]) -> Result<Option<ItemRef>, Stop> {
        let Some(frame) = self.leaf_at(cache, key)? else { return Ok(None) };
        let node = cache.arc(frame);
        Ok(node.find(key).ok().map(|index| ItemRef { node: Arc::clone(node), index }))
    }

    /// Applies `f` to the item with the greatest key that is at or below `key`.
    pub fn floor<R>(
        &self,
        cache: &mut NodeCache,
        key: &[u8],
        f: impl FnOnce(KeyRef<'_>, &[u8]) -> R,
    ) -> Result<Option<R>, Stop> {
        let Some(frame) = self.leaf_at(cache, key)? else { return Ok(None) };
        let node = cache.node(frame);
        let found = match node.find(key) {
            Ok(i) => Some(i),
            Err(i) => i.checked_sub(1),
        };
        if let Some(i) = found {
            return Ok(Some(f(node.key(i), node.value(i))));
        }
        Ok(self.last_below(cache, key)?.map(|item| f(item.key(), item.value())))
    }

    /// Applies `f` to the item with the smallest key that is at or above `key`.
    pub fn ceil<R>(
        &self,
        cache: &mut NodeCache,
        key: &[u8],
        f: impl FnOnce(KeyRef<'_>, &[u8]) -> R,
    ) -> Result<Option<R>, Stop> {
        let Some(frame) = self.leaf_at(cache, key)? else { return Ok(None) };
        let node = cache.node(frame);
        let (Ok(i) | Err(i)) = node.find(key);
        if i < node.len() {
            return Ok(Some(f(node.key(i), node.value(i))));
        }
        let mut next = self.leaf_from(cache, key, true)?;
        while let Some(mut leaf) = next {
            if let Some((key, value)) = leaf.next() {
                return Ok(Some(f(key, value)));
            }
            next = match leaf.high() {
                Some(high) => self.leaf_from(cache, high, true)?,
                None => None,
            };
        }
        Ok(None)
    }

    /// The leaf that holds `key` (or would), with the position of the first item at or above it, or above it if not
    /// `inclusive`. `None` if the tree is empty.
    ///
    /// The position may be the leaf's end. A forward iteration takes items with [`Leaf::next`] and then goes on with
    /// `leaf_from(leaf.high(), true)`; each such step advances, also in a damaged tree.
    pub fn leaf_from(
        &self,
        cache: &mut NodeCache,
        key: &[u8],
        inclusive: bool,
    ) -> Result<Option<Leaf>, Stop> {
        let Some(mut leaf) = self.leaf_with_bounds(cache, key, Side::At)? else { return Ok(None) };
        leaf.pos = match leaf.node.find(key) {
            Ok(i) => i + usize::from(!inclusive),
            Err(i) => i,
        };
        Ok(Some(leaf))
    }

    /// The last leaf that can hold keys below `key`, with the position after the last of them, for [`Leaf::prev`]. `None` if the
    /// tree is empty.
    ///
    /// The position may be 0. A backward iteration goes on with `leaf_before(leaf.low())` unless that is empty.
    pub fn leaf_before(&self, cache: &mut NodeCache, key: &[u8]) -> Result<Option<Leaf>, Stop> {
        let Some(mut leaf) = self.leaf_with_bounds(cache, key, Side::Below)? else { return Ok(None) };
        let (Ok(pos) | Err(pos)) = leaf.node.find(key);
        leaf.pos = pos;
        Ok(Some(leaf))
    }

    /// The last leaf, positioned at its end, for iterating backwards from the greatest key. `None` if the tree is empty.
    pub fn last_leaf(&self, cache: &mut NodeCache) -> Result<Option<Leaf>, Stop> {
        // No key is as long as this one, so none is above it.
        self.leaf_before(cache, &[0xff; super::MAX_KEY + 1])
    }

    /// Brings the path of `key` into memory, or says what is missing. An insertion, update or removal of `key` will not
    /// miss then, until the cache is given a chance to evict; see [`super::cache`].
    pub fn touch(&self, cache: &mut NodeCache, key: &[u8]) -> Result<(), Stop> {
        self.leaf_at(cache, key).map(|_| ())
    }

    /// The frame of the leaf that holds `key`.
    fn leaf_at(&self, cache: &mut NodeCache, key: &[u8]) -> Result<Option<FrameId>, Stop> {
        if self.is_empty() {
            return Ok(None);
        }
        let mut ptr = self.root();
        loop {
            let frame = cache.lookup(&ptr)?;
            let node = cache.node(frame);
            if node.is_leaf() {
                return Ok(Some(frame));
            }
            ptr = node.child(node.child_for(key));
        }
    }

    /// The last item below `key`.
    fn last_below(&self, cache: &mut NodeCache, key: &[u8]) -> Result<Option<ItemRef>, Stop> {
        let mut below = KeyBuf::from_slice(key);
        // Leaves are not empty, but those between may hold only keys above. Each round ends lower.
        while let Some(leaf) = self.leaf_before(cache, &below)? {
            if let Some(index) = leaf.pos.checked_sub(1) {
                return Ok(Some(ItemRef { node: leaf.node, index }));
            }
            if leaf.low.is_empty() {
                break;
            }
            below = leaf.low;
        }
        Ok(None)
    }

    fn leaf_with_bounds(&self, cache: &mut NodeCache, key: &[u8], side: Side) -> Result<Option<Leaf>, Stop> {
        if self.is_empty() {
            return Ok(None);
        }
        let (mut low, mut high) = (KeyBuf::new(), None);
        let mut ptr = self.root();
        loop {
            let frame = cache.lookup(&ptr)?;
            let node = cache.node(frame);
            if node.is_leaf() {
                return Ok(Some(Leaf { node: Arc::clone(cache.arc(frame)), pos: 0, low, high }));
            }
            let child = match side {
                Side::At => node.child_for(key),
                Side::Below => node.child_below(key),
            };
            node.narrow(child, &mut low, &mut high);
            ptr = node.child(child);
        }
    }
}
