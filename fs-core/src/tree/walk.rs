//! All nodes of a tree, parents before children: for the checker.
//!
//! A walk keeps only a key and a level between its steps, so that a step that misses is repeated after the read, and the tree
//! may be modified in between (nodes that are moved meanwhile may then be seen twice or not at all).
//!
//! Each visited node is checked against the bounds that its parents set, which no other operation does in full. A node that
//! cannot be read or is wrong stops the step; [`Walk::skip`] goes on behind it, so that one damaged node costs the
//! nodes below it and no others.

use std::sync::Arc;

use super::cache::NodeCache;
use super::node::{KeyBuf, Node, NodePtr};
use super::path::check_bounds;
use super::{Stop, Tree};

/// Where a walk is.
#[derive(Clone, Debug)]
pub struct Walk {
    /// What the next step visits; `None` at the end.
    next: Option<Target>,
    /// Where the node ends that the last step visited, or failed to.
    end: Option<KeyBuf>,
}

#[derive(Clone, Debug)]
struct Target {
    /// Lower bound of the node.
    key: KeyBuf,
    /// Its level; `None` for the highest node that begins at `key`.
    level: Option<u8>,
}

impl Default for Walk {
    fn default() -> Walk {
        Walk::new()
    }
}

impl Walk {
    /// The beginning of a walk.
    pub fn new() -> Walk {
        Walk { next: Some(Target { key: KeyBuf::new(), level: None }), end: None }
    }

    /// Visits the next node, or returns `None` after the last one. After [`Stop::Miss`] call it again when the node was
    /// admitted; if it cannot be, or after [`Stop::Corrupt`], go on with [`Walk::skip`].
    pub fn step(&mut self, tree: &Tree, cache: &mut NodeCache) -> Result<Option<(NodePtr, Arc<Node>)>, Stop> {
        let Some(target) = self.next.clone().filter(|_| !tree.is_empty()) else { return Ok(None) };
        let (mut low, mut high) = (KeyBuf::new(), None::<KeyBuf>);
        let mut ptr = tree.root();
        loop {
            self.end.clone_from(&high);
            let frame = cache.lookup(&ptr)?;
            let node = Arc::clone(cache.arc(frame));
            let wanted = target.level.map_or(low == target.key, |level| ptr.level <= level);
            if wanted || node.is_leaf() {
                check_bounds(&node, &low, high.as_deref()).map_err(|fault| ptr.error(fault))?;
                self.next = match node.level() {
                    0 => high.map(|key| Target { key, level: None }),
                    level => Some(Target { key: low, level: Some(level - 1) }),
                };
                return Ok(Some((ptr, node)));
            }
            let child = node.child_for(&target.key);
            node.narrow(child, &mut low, &mut high);
            ptr = node.child(child);
        }
    }

    /// Goes on behind the node that the last step visited or stopped at, and all below it.
    pub fn skip(&mut self) {
        self.next = self.end.take().map(|key| Target { key, level: None });
    }
}
