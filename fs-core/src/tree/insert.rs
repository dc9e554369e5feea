//! Putting items in: insertion, replacement, update in place; splits up to a new root.

use super::cache::FrameId;
use super::edit::{Entry, Fit};
use super::node::{Child, KeyBuf, MAX_ITEM, MAX_KEY, MAX_VALUE, Node, NodePtr};
use super::path::{Path, leaf_of};
use super::{Ctx, MAX_HEIGHT, NodeFault, Stop, Tree};
use zerocopy::IntoBytes;

impl Tree {
    /// Sets the value of `key`. Returns whether it had one before.
    ///
    /// Panics if key or value are longer than [`MAX_KEY`], [`MAX_VALUE`] or together [`MAX_ITEM`], or the key is empty: the
    /// callers' formats exclude it.
    pub fn insert(&mut self, ctx: &mut Ctx<'_>, key: &[u8], value: &[u8]) -> Result<bool, Stop> {
        assert!(!key.is_empty() && key.len() <= MAX_KEY, "key of {} bytes", key.len());
        assert!(value.len() <= MAX_VALUE, "value of {} bytes", value.len());
        assert!(key.len() + value.len() <= MAX_ITEM, "item of {} bytes", key.len() + value.len());
        if self.is_empty() {
            return self.insert_first(ctx, key, value).map(|()| false);
        }
        let path = self.path_to(ctx.cache, key)?;
        let leaf = ctx.cache.node(leaf_of(&path));
        let (pos, replaces) = match leaf.find(key) {
            Ok(pos) => (pos, true),
            Err(pos) => (pos, false),
        };
        if replaces && value.len() <= leaf.value(pos).len() {
            self.prepare(ctx, &path, 0)?;
            ctx.cache.node_mut(leaf_of(&path)).shrink_value(pos, value);
            return Ok(true);
        }
        let entry = Entry { pos, replaces, key, value };
        let fit = leaf.fit(&entry);
        if fit == Fit::Split {
            self.check_path(ctx.cache, &path)?;
            self.check_can_grow()?;
            self.prepare(ctx, &path, path.len() + 1)?;
            self.split_upwards(ctx, &path, &entry);
        } else {
            self.prepare(ctx, &path, 0)?;
            ctx.cache.node_mut(leaf_of(&path)).place(&entry, fit);
        }
        Ok(replaces)
    }

    /// Lets `f` modify the value of `key` in place, at its length. `None` if there is no such key; then nothing was copied.
    pub fn update<R>(
        &mut self,
        ctx: &mut Ctx<'_>,
        key: &[u8],
        f: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<Option<R>, Stop> {
        if self.is_empty() {
            return Ok(None);
        }
        let path = self.path_to(ctx.cache, key)?;
        let Ok(pos) = ctx.cache.node(leaf_of(&path)).find(key) else { return Ok(None) };
        self.prepare(ctx, &path, 0)?;
        Ok(Some(f(ctx.cache.node_mut(leaf_of(&path)).value_mut(pos))))
    }

    /// The first item of a tree.
    fn insert_first(&mut self, ctx: &mut Ctx<'_>, key: &[u8], value: &[u8]) -> Result<(), Stop> {
        ctx.alloc.ensure(1)?;
        let (frame, root) = self.new_node(ctx, 0, |node, _| {
            let entry = Entry { pos: 0, replaces: false, key, value };
            let fit = node.fit(&entry);
            node.place(&entry, fit);
        });
        debug_assert_eq!(ctx.cache.node(frame).len(), 1);
        self.root = root;
        Ok(())
    }

    /// Splits the leaf at the end of `path` around `entry`, and above it as many nodes as it takes. Everything was ensured.
    fn split_upwards(&mut self, ctx: &mut Ctx<'_>, path: &Path, entry: &Entry<'_>) {
        let (mut separator, mut right) = self.split(ctx, leaf_of(path), entry);
        for step in path.iter().rev().skip(1) {
            let child = Child::from(&right);
            let value = child.as_bytes();
            let entry = Entry { pos: step.child + 1, replaces: false, key: &separator, value };
            match ctx.cache.node(step.frame).fit(&entry) {
                Fit::Split => (separator, right) = self.split(ctx, step.frame, &entry),
                fit => return ctx.cache.node_mut(step.frame).place(&entry, fit),
            }
        }
        self.grow(ctx, &separator, &right);
    }

    /// Splits one dirty node; returns the lower bound of the new right neighbour, and where it is.
    fn split(&mut self, ctx: &mut Ctx<'_>, frame: FrameId, entry: &Entry<'_>) -> (KeyBuf, NodePtr) {
        let level = ctx.cache.node(frame).level();
        let mut separator = KeyBuf::new();
        let (_, right) = self.new_node(ctx, level, |right, cache| {
            separator = cache.node_mut(frame).split(right, entry);
        });
        (separator, right)
    }

    /// Puts a new root above the old one and its new right neighbour.
    fn grow(&mut self, ctx: &mut Ctx<'_>, separator: &[u8], right: &NodePtr) {
        let left = self.root;
        let (_, root) = self.new_node(ctx, left.level + 1, |node, _| {
            node.push_first_child(&left);
            let child = Child::from(right);
            let entry = Entry { pos: 1, replaces: false, key: separator, value: child.as_bytes() };
            let fit = node.fit(&entry);
            node.place(&entry, fit);
        });
        self.root = root;
    }

    /// A new node of this tree, of an ensured block, filled by `fill`.
    fn new_node(
        &self,
        ctx: &mut Ctx<'_>,
        level: u8,
        fill: impl FnOnce(&mut Node, &mut super::NodeCache),
    ) -> (FrameId, NodePtr) {
        let addr = ctx.alloc.allocate_node();
        let ptr = NodePtr { addr, generation: ctx.generation, checksum: 0, tree: self.id(), level };
        let mut node = Node::new(ctx.cache.fsid(), &ptr);
        fill(&mut node, ctx.cache);
        (ctx.cache.add_dirty(node), ptr)
    }

    /// A tree of the greatest height may still have room, but no tree that was made by insertions is that high.
    fn check_can_grow(&self) -> Result<(), Stop> {
        match self.height() < MAX_HEIGHT {
            true => Ok(()),
            false => Err(Stop::Corrupt(self.root.error(NodeFault::Height))),
        }
    }
}
