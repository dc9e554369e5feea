//! The way from the root to a leaf, and making it modifiable: copy-on-write.
//!
//! The module has the rule that nothing is left half done: [`Tree::prepare`] is the last thing of an operation that can fail.

use smallvec::SmallVec;

use super::cache::{FrameId, NodeCache, State};
use super::node::{KeyBuf, Node, NodePtr};
use super::{Ctx, NodeFault, Stop, Tree};

/// One node of a path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) frame: FrameId,
    /// The child that the path goes on with; in the leaf, nothing.
    pub(super) child: usize,
}

/// The nodes from the root to a leaf. Never empty; valid as long as nothing is evicted.
pub(super) type Path = SmallVec<[Step; 8]>;

/// The frame at the end of a path.
pub(super) fn leaf_of(path: &Path) -> FrameId {
    path[path.len() - 1].frame
}

impl Tree {
    /// The path to the leaf that holds `key`. The tree must not be empty.
    pub(super) fn path_to(&self, cache: &mut NodeCache, key: &[u8]) -> Result<Path, Stop> {
        let mut path = Path::new();
        let mut ptr = self.root();
        loop {
            let frame = cache.lookup(&ptr)?;
            let node = cache.node(frame);
            if node.is_leaf() {
                path.push(Step { frame, child: 0 });
                return Ok(path);
            }
            let child = node.child_for(key);
            ptr = node.child(child);
            path.push(Step { frame, child });
        }
    }

    /// Whether the nodes of `path` keep to the bounds that their parents set. A split checks it first: in a damaged tree the
    /// new separator could be out of order in the parent.
    pub(super) fn check_path(&self, cache: &NodeCache, path: &Path) -> Result<(), Stop> {
        let (mut low, mut high) = (KeyBuf::new(), None::<KeyBuf>);
        for step in path {
            let node = cache.node(step.frame);
            check_bounds(node, &low, high.as_deref()).map_err(|fault| node.ptr().error(fault))?;
            if !node.is_leaf() {
                node.narrow(step.child, &mut low, &mut high);
            }
        }
        Ok(())
    }

    /// Makes all nodes of `path` modifiable, and sure that `more` nodes can be allocated afterwards. Either fails having
    /// changed nothing, or succeeds.
    pub(super) fn prepare(&mut self, ctx: &mut Ctx<'_>, path: &Path, more: usize) -> Result<(), Stop> {
        let is_dirty = |step: &&Step| ctx.cache.state(step.frame) == State::Dirty;
        // Dirty nodes have dirty ancestors: the path begins with them.
        let dirty = path.iter().take_while(is_dirty).count();
        if dirty == path.len() && more == 0 {
            return Ok(());
        }
        for step in &path[dirty..] {
            check_copyable(ctx, step.frame)?;
        }
        ctx.alloc.ensure(path.len() - dirty + more)?;
        for depth in dirty..path.len() {
            self.copy_on_write(ctx, path, depth);
        }
        Ok(())
    }

    /// Moves the node at `depth`, whose ancestors are dirty already, to a new address.
    fn copy_on_write(&mut self, ctx: &mut Ctx<'_>, path: &Path, depth: usize) {
        let frame = path[depth].frame;
        let old = ctx.cache.node(frame);
        let (old_addr, birth) = (old.addr(), old.generation());
        let ptr = NodePtr {
            addr: ctx.alloc.allocate_node(),
            generation: ctx.generation,
            checksum: 0,
            tree: self.id(),
            level: old.level(),
        };
        ctx.cache.make_dirty(frame, ptr.addr, ptr.generation);
        match depth.checked_sub(1) {
            None => self.root = ptr,
            Some(above) => ctx.cache.node_mut(path[above].frame).set_child(path[above].child, &ptr),
        }
        ctx.alloc.free_node(old_addr, birth);
    }
}

/// Whether all keys of `node` lie in `low..high`. Separators are strictly above `low`, as they bound children on both sides.
pub(super) fn check_bounds(node: &Node, low: &[u8], high: Option<&[u8]>) -> Result<(), NodeFault> {
    let first = node.first_keyed();
    if first >= node.len() {
        return Ok(());
    }
    let (first, last) = (node.key(first).to_buf(), node.key(node.len() - 1).to_buf());
    let above_low = if node.is_leaf() { &first[..] >= low } else { &first[..] > low };
    let below_high = high.is_none_or(|high| &last[..] < high);
    if above_low && below_high { Ok(()) } else { Err(NodeFault::Bounds) }
}

/// A node that is not dirty must be older than the current generation: else it would be taken for a dirty one later.
fn check_copyable(ctx: &Ctx<'_>, frame: FrameId) -> Result<(), Stop> {
    let node = ctx.cache.node(frame);
    if node.generation() < ctx.generation {
        return Ok(());
    }
    assert_ne!(
        ctx.cache.state(frame),
        State::Writing,
        "tree {} was modified between its seal and the next generation",
        node.tree().0
    );
    let ptr =
        NodePtr { tree: node.tree(), level: node.level(), addr: node.addr(), ..NodePtr::null(node.tree()) };
    let fault = NodeFault::Generation { expected: ctx.generation, found: node.generation() };
    Err(Stop::Corrupt(ptr.error(fault)))
}
