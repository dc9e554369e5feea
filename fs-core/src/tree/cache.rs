//! The nodes in memory: address -> node, bounded, evicting what was not used lately.
//!
//! A node is *clean* (the device has it), *dirty* (modified in the current generation; the only copy) or *writing* (sealed;
//! the device is about to have it). Invariants:
//!
//! - Only clean nodes are evicted: a dirty or writing node is in memory until [`NodeCache::written`].
//! - Only dirty nodes are modified. A clean or writing one becomes dirty by moving to a new address (copy-on-write); the
//!   page is copied only if someone else holds it, a writer for instance.
//! - Only [`NodeCache::admit`], [`NodeCache::written`] and [`NodeCache::trim`] evict. An operation on a tree does not, so
//!   what one has brought in ([`Tree::touch`](super::Tree::touch)) is there for the next, unless one of the three came between.
//! - What a caller holds (the `Arc` that `admit` returns) is not evicted. A caller that needs many nodes at once holds
//!   them until its operation is done, and so gets there however small the cache.
//!
//! Eviction is second chance (clock): clean nodes stand in a queue; the front one goes, unless it was used since it was
//! queued, then it queues again. A node that became dirty leaves the queue when its turn comes. Each step of the hand is
//! paid for by the use or the queueing that made it necessary, and [`SWEEP_MAX`] bounds what one call does ([`NodeCache::written`]
//! goes on by two steps for each node that it made clean).
//!
//! Not here: reading and writing (the caller does), and locking (everything runs under the caller's metadata lock).

use std::collections::VecDeque;
use std::sync::Arc;

use hashbrown::HashTable;

use super::Stop;
use super::node::{FsId, Node, NodePtr};
use super::validate::NodeError;
use crate::types::{BlockAddr, Generation};

/// Memory of a cached node: the page, and what `Arc`, allocator, frame and index add to it.
pub const NODE_MEMORY: usize = size_of::<Node>() + 160;
/// The smallest cache, in nodes, and the fewest clean nodes that stay when dirty ones fill the cache: enough for the paths of a
/// few operations, so that each gets done in the end.
pub const MIN_NODES: usize = 32;
/// The most queue entries that one call looks at, beside those that it queued itself.
const SWEEP_MAX: usize = 1024;

/// Index of a frame: names a node as long as it stays in memory.
pub(super) type FrameId = u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Clean,
    Dirty,
    Writing,
}

#[derive(Debug)]
struct Frame {
    addr: BlockAddr,
    /// None if the frame is free.
    node: Option<Arc<Node>>,
    state: State,
    /// Used since its turn in the queue.
    used: bool,
    /// Stands in the queue. It stays there when the frame becomes dirty or free.
    queued: bool,
}

/// What the cache has done and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Nodes that were found in memory.
    pub hits: u64,
    /// Nodes that had to be asked for.
    pub misses: u64,
    /// Nodes that were dropped to make room.
    pub evictions: u64,
    /// Nodes in memory.
    pub nodes: usize,
    /// Of these, modified in the current generation.
    pub dirty: usize,
    /// Of these, sealed and not yet known to be written.
    pub writing: usize,
    /// Memory of all nodes, in bytes.
    pub bytes: usize,
    /// What `bytes` should not exceed. Dirty, writing and held nodes may make it do so.
    pub capacity: usize,
}

/// The node cache of one filesystem, shared by its trees.
#[derive(Debug)]
pub struct NodeCache {
    fsid: FsId,
    capacity_nodes: usize,
    index: HashTable<FrameId>,
    frames: Vec<Frame>,
    free: Vec<FrameId>,
    /// Clean frames in the order of their turn, and some that are no longer clean.
    queue: VecDeque<FrameId>,
    /// Addresses of the sealed nodes, by generation.
    sealed: VecDeque<(Generation, Vec<BlockAddr>)>,
    hits: u64,
    misses: u64,
    evictions: u64,
    dirty: usize,
    writing: usize,
}

impl NodeCache {
    /// A cache for nodes of filesystem `fsid` that takes about `capacity` bytes, at least [`MIN_NODES`] nodes.
    pub fn new(fsid: FsId, capacity: usize) -> NodeCache {
        NodeCache {
            fsid,
            capacity_nodes: (capacity / NODE_MEMORY).max(MIN_NODES),
            index: HashTable::new(),
            frames: Vec::new(),
            free: Vec::new(),
            queue: VecDeque::new(),
            sealed: VecDeque::new(),
            hits: 0,
            misses: 0,
            evictions: 0,
            dirty: 0,
            writing: 0,
        }
    }

    /// The filesystem whose nodes these are.
    pub fn fsid(&self) -> &FsId {
        &self.fsid
    }

    /// Takes in the block that [`Stop::Miss`] asked for, after checking that it is that node. If the node is already in
    /// memory (another operation asked for it as well) the bytes are not looked at.
    ///
    /// As long as the result is held, the node is not evicted.
    pub fn admit(&mut self, ptr: &NodePtr, bytes: &[u8]) -> Result<Arc<Node>, NodeError> {
        if let Some(id) = self.find(ptr.addr) {
            let node = self.arc(id);
            node.check_place(ptr).map_err(|fault| ptr.error(fault))?;
            return Ok(Arc::clone(node));
        }
        let node = Node::validate(ptr, &self.fsid, bytes)?;
        self.add(ptr.addr, Arc::clone(&node), State::Clean);
        self.trim();
        Ok(node)
    }

    /// The node at `ptr` if it is in memory, and right.
    pub fn cached(&self, ptr: &NodePtr) -> Option<Arc<Node>> {
        let node = self.arc(self.find(ptr.addr)?);
        node.check_place(ptr).is_ok().then(|| Arc::clone(node))
    }

    /// The sealed nodes up to `generation` are on the device: from now on they may be evicted.
    pub fn written(&mut self, generation: Generation) {
        let mut cleaned = 0;
        while self.sealed.front().is_some_and(|(sealed, _)| *sealed <= generation) {
            let (_, addrs) = self.sealed.pop_front().expect("there is a front");
            for addr in addrs {
                // A node that was modified again has moved on to another address.
                if let Some(id) = self.find(addr)
                    && self.frames[id as usize].state == State::Writing
                {
                    self.set_state(id, State::Clean);
                    cleaned += 1;
                }
            }
        }
        // Each of them may have to go, and has a second chance before: who writes much and reads nothing comes by here only.
        self.sweep(SWEEP_MAX + 2 * cleaned);
    }

    /// Evicts until the cache is within its capacity, as far as it can in one go. For callers that modify a lot and never
    /// read from the device.
    pub fn trim(&mut self) {
        self.sweep(SWEEP_MAX);
    }

    /// Looks at up to `steps` queue entries.
    fn sweep(&mut self, steps: usize) {
        for _ in 0..steps {
            let clean = self.index.len() - self.dirty - self.writing;
            if self.index.len() <= self.capacity_nodes || clean <= MIN_NODES {
                return;
            }
            let Some(id) = self.queue.pop_front() else { return };
            let frame = &mut self.frames[id as usize];
            if frame.state != State::Clean {
                frame.queued = false;
            } else if frame.used || frame.node.as_ref().is_some_and(|node| Arc::strong_count(node) > 1) {
                frame.used = false;
                self.queue.push_back(id);
            } else {
                frame.queued = false;
                self.remove(id);
                self.evictions += 1;
            }
        }
    }

    /// Changes the capacity, in bytes.
    pub fn set_capacity(&mut self, capacity: usize) {
        self.capacity_nodes = (capacity / NODE_MEMORY).max(MIN_NODES);
        self.trim();
    }

    /// Counters.
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.hits,
            misses: self.misses,
            evictions: self.evictions,
            nodes: self.index.len(),
            dirty: self.dirty,
            writing: self.writing,
            bytes: self.index.len() * NODE_MEMORY,
            capacity: self.capacity_nodes * NODE_MEMORY,
        }
    }

    /// The frame of the node that `ptr` points to: the step of every descent.
    pub(super) fn lookup(&mut self, ptr: &NodePtr) -> Result<FrameId, Stop> {
        let Some(id) = self.find(ptr.addr) else {
            self.misses += 1;
            return Err(Stop::Miss(*ptr));
        };
        self.hits += 1;
        let frame = &mut self.frames[id as usize];
        if !frame.used {
            frame.used = true;
        }
        self.node(id).check_place(ptr).map_err(|fault| Stop::Corrupt(ptr.error(fault)))?;
        Ok(id)
    }

    /// The frame of a neighbour that would be nice to have: no miss, no use.
    pub(super) fn peek(&self, ptr: &NodePtr) -> Option<FrameId> {
        self.find(ptr.addr).filter(|id| self.node(*id).check_place(ptr).is_ok())
    }

    pub(super) fn node(&self, id: FrameId) -> &Node {
        self.arc(id)
    }

    pub(super) fn arc(&self, id: FrameId) -> &Arc<Node> {
        self.frames[id as usize].node.as_ref().expect("a frame in use")
    }

    pub(super) fn state(&self, id: FrameId) -> State {
        self.frames[id as usize].state
    }

    /// A dirty node, to be modified.
    pub(super) fn node_mut(&mut self, id: FrameId) -> &mut Node {
        let frame = &mut self.frames[id as usize];
        assert_eq!(frame.state, State::Dirty, "only dirty nodes are modified");
        Arc::make_mut(frame.node.as_mut().expect("a frame in use"))
    }

    /// Copy-on-write: the node of a frame that is not dirty moves to a new address and generation, and is dirty there.
    pub(super) fn make_dirty(&mut self, id: FrameId, addr: BlockAddr, generation: Generation) {
        assert_ne!(self.state(id), State::Dirty, "a dirty node stays where it is");
        self.displace(addr);
        self.unindex(id);
        self.frames[id as usize].addr = addr;
        self.reindex(id);
        self.set_state(id, State::Dirty);
        self.node_mut(id).set_identity(addr, generation);
    }

    /// A new node.
    pub(super) fn add_dirty(&mut self, node: Node) -> FrameId {
        let addr = node.addr();
        self.displace(addr);
        self.add(addr, Arc::new(node), State::Dirty)
    }

    /// Forgets a node that no tree has any more.
    pub(super) fn remove(&mut self, id: FrameId) {
        self.unindex(id);
        self.set_state(id, State::Free);
        self.frames[id as usize].node = None;
        self.free.push(id);
    }

    /// A sealed node awaits its write.
    pub(super) fn mark_sealed(&mut self, id: FrameId, generation: Generation) {
        assert_eq!(self.state(id), State::Dirty, "a node is sealed once");
        self.set_state(id, State::Writing);
        let addr = self.frames[id as usize].addr;
        match self.sealed.back_mut() {
            Some((last, addrs)) if *last == generation => addrs.push(addr),
            _ => self.sealed.push_back((generation, vec![addr])),
        }
    }

    pub(super) fn find(&self, addr: BlockAddr) -> Option<FrameId> {
        self.index.find(hash(addr), |id| self.frames[*id as usize].addr == addr).copied()
    }

    fn add(&mut self, addr: BlockAddr, node: Arc<Node>, state: State) -> FrameId {
        let frame = Frame { addr, node: Some(node), state: State::Free, used: true, queued: false };
        let id = match self.free.pop() {
            Some(id) => {
                // The place that the frame has in the queue stays its place.
                let queued = self.frames[id as usize].queued;
                self.frames[id as usize] = Frame { queued, ..frame };
                id
            }
            None => {
                let id = FrameId::try_from(self.frames.len()).expect("fewer than 2^32 nodes in memory");
                self.frames.push(frame);
                id
            }
        };
        self.reindex(id);
        self.set_state(id, state);
        id
    }

    /// Keeps the counts and the queue in step with the states.
    fn set_state(&mut self, id: FrameId, state: State) {
        let frame = &mut self.frames[id as usize];
        self.dirty -= usize::from(frame.state == State::Dirty);
        self.writing -= usize::from(frame.state == State::Writing);
        frame.state = state;
        self.dirty += usize::from(state == State::Dirty);
        self.writing += usize::from(state == State::Writing);
        if state == State::Clean && !frame.queued {
            frame.queued = true;
            self.queue.push_back(id);
        }
    }

    fn reindex(&mut self, id: FrameId) {
        let frames = &self.frames;
        let addr_of = |id: &FrameId| frames[*id as usize].addr;
        self.index.insert_unique(hash(addr_of(&id)), id, |id| hash(addr_of(id)));
    }

    fn unindex(&mut self, id: FrameId) {
        let addr = self.frames[id as usize].addr;
        // A displaced frame is not there.
        if let Ok(entry) = self.index.find_entry(hash(addr), |other| *other == id) {
            entry.remove();
        }
    }

    /// A new node gets address `addr`. If a clean one is known there it is of a tree that was freed, or of a damaged
    /// filesystem whose trees and allocator disagree: it can no longer be found, and leaves with its turn in the queue.
    fn displace(&mut self, addr: BlockAddr) {
        if let Some(id) = self.find(addr) {
            assert_eq!(self.state(id), State::Clean, "block {addr} was allocated twice");
            self.unindex(id);
        }
    }
}

/// Fibonacci hashing; the fold brings the well-mixed high bits down to where the table takes its bucket from.
fn hash(addr: BlockAddr) -> u64 {
    let mixed = addr.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}
