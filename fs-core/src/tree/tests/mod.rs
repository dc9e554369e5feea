//! A tree on a simulated device, with an allocator that gives exactly what was ensured.

mod damage;
mod eviction;
mod model;
mod page;
mod shape;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::node::{FsId, NodePtr, TreeId};
use super::{Ctx, Node, NodeAlloc, NodeCache, Stop, Tree, Walk};
use crate::types::{BLOCK_SIZE, BlockAddr, Generation};

pub(super) const FSID: FsId = *b"gaur test fsid 1";

/// A map that a tree should equal.
pub(super) type Model = BTreeMap<Vec<u8>, Vec<u8>>;

/// Items in the order in which they were met.
pub(super) type Items = Vec<(Vec<u8>, Vec<u8>)>;

/// The seed of a randomised test: `GAUR_SEED`, or a new one. Printed, so that a failure can be replayed.
pub(super) fn seed() -> u64 {
    let seed = match std::env::var("GAUR_SEED") {
        Ok(text) => text.parse().expect("GAUR_SEED is a number"),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("GAUR_SEED={seed}");
    seed
}

pub(super) fn rng(seed: u64) -> SmallRng {
    SmallRng::seed_from_u64(seed)
}

/// Gives what was ensured and not a block more; knows which blocks are in use; keeps freed ones from reuse as long as a
/// sealed root that is remembered needs them.
#[derive(Default)]
pub(super) struct TestAlloc {
    next: u64,
    ensured: usize,
    free: Vec<BlockAddr>,
    /// Blocks of the current trees, with their birth.
    pub(super) live: HashMap<BlockAddr, Generation>,
    /// Freed in the current generation, but older.
    pending: Vec<(BlockAddr, Generation, Generation)>,
    generation: Generation,
    /// Refuse the next `ensure`.
    pub(super) full: bool,
    /// The most that was asked for, and all that was taken.
    pub(super) allocated: usize,
    pub(super) freed: usize,
}

impl NodeAlloc for TestAlloc {
    fn ensure(&mut self, nodes: usize) -> Result<(), Stop> {
        assert!(nodes > 0, "nothing to ensure");
        if self.full {
            return Err(Stop::NoSpace);
        }
        self.ensured = nodes;
        Ok(())
    }

    fn allocate_node(&mut self) -> BlockAddr {
        assert!(self.ensured > 0, "more nodes taken than ensured");
        self.ensured -= 1;
        self.allocated += 1;
        let addr = self.free.pop().unwrap_or_else(|| {
            self.next += 1;
            BlockAddr(self.next)
        });
        assert_eq!(self.live.insert(addr, self.generation), None, "{addr} is in use");
        addr
    }

    fn free_node(&mut self, addr: BlockAddr, birth: Generation) {
        self.freed += 1;
        assert_eq!(self.live.remove(&addr), Some(birth), "freed {addr} of {birth}");
        match birth == self.generation {
            true => self.free.push(addr),
            false => self.pending.push((addr, birth, self.generation)),
        }
    }
}

/// A sealed root and what the tree held.
#[derive(Clone)]
pub(super) struct Snapshot {
    pub(super) generation: Generation,
    pub(super) root: NodePtr,
    pub(super) model: Model,
}

/// One tree with all that is around it.
pub(super) struct Store {
    pub(super) disk: HashMap<BlockAddr, Vec<u8>>,
    pub(super) cache: NodeCache,
    pub(super) alloc: TestAlloc,
    pub(super) generation: Generation,
    pub(super) tree: Tree,
    pub(super) snapshots: Vec<Snapshot>,
    /// Sealed, on its way to the disk.
    in_flight: Vec<(BlockAddr, Arc<Node>)>,
    pub(super) misses: usize,
}

impl Store {
    /// An empty tree; the smallest cache if `cache_bytes` is 0.
    pub(super) fn new(cache_bytes: usize) -> Store {
        Store {
            disk: HashMap::new(),
            cache: NodeCache::new(FSID, cache_bytes),
            alloc: TestAlloc { generation: Generation(1), ..TestAlloc::default() },
            generation: Generation(1),
            tree: Tree::new(TreeId(3)),
            snapshots: Vec::new(),
            in_flight: Vec::new(),
            misses: 0,
        }
    }

    /// Runs an operation to its end: reads what it misses, calls it again.
    pub(super) fn run<R>(
        &mut self,
        mut op: impl FnMut(&mut Tree, &mut Ctx<'_>) -> Result<R, Stop>,
    ) -> Result<R, Stop> {
        for _ in 0..200 {
            match self.once(&mut op) {
                Err(Stop::Miss(ptr)) => drop(self.read(&ptr)?),
                result => return result,
            }
        }
        panic!("an operation that never gets what it needs");
    }

    /// Runs an operation once.
    pub(super) fn once<R>(
        &mut self,
        op: &mut impl FnMut(&mut Tree, &mut Ctx<'_>) -> Result<R, Stop>,
    ) -> Result<R, Stop> {
        let mut ctx = Ctx { cache: &mut self.cache, alloc: &mut self.alloc, generation: self.generation };
        op(&mut self.tree, &mut ctx)
    }

    pub(super) fn read(&mut self, ptr: &NodePtr) -> Result<Arc<Node>, Stop> {
        self.misses += 1;
        let bytes = self.disk.get(&ptr.addr).unwrap_or_else(|| panic!("{ptr:?} was never written"));
        Ok(self.cache.admit(ptr, bytes)?)
    }

    pub(super) fn insert(&mut self, key: &[u8], value: &[u8]) -> Result<bool, Stop> {
        self.run(|tree, ctx| tree.insert(ctx, key, value))
    }

    pub(super) fn remove(&mut self, key: &[u8]) -> Result<bool, Stop> {
        self.run(|tree, ctx| tree.remove(ctx, key))
    }

    pub(super) fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>, Stop> {
        self.run(|tree, ctx| tree.get(ctx.cache, key, |value| value.to_vec()))
    }

    /// Seals the tree and begins the next generation. The write is under way afterwards.
    pub(super) fn seal(&mut self, model: &Model) {
        self.finish_write();
        let mut out = Vec::new();
        let mut ctx = Ctx { cache: &mut self.cache, alloc: &mut self.alloc, generation: self.generation };
        let root = self.tree.seal(&mut ctx, &mut out);
        assert_eq!(self.cache.stats().dirty, 0, "the only tree is sealed");
        self.in_flight = out;
        self.snapshots.push(Snapshot { generation: self.generation, root, model: model.clone() });
        self.generation = Generation(self.generation.0 + 1);
        self.alloc.generation = self.generation;
    }

    /// The write under way arrives.
    pub(super) fn finish_write(&mut self) {
        for (addr, node) in self.in_flight.drain(..) {
            self.disk.insert(addr, node.bytes().to_vec());
        }
        self.cache.written(Generation(self.generation.0 - 1));
        assert_eq!(self.cache.stats().writing, 0);
    }

    /// Brings the cache down to its capacity; one call does only so much.
    pub(super) fn shrink(&mut self) {
        for _ in 0..100 {
            self.cache.trim();
        }
    }

    /// Forgets all snapshots but the last `keep`, and reuses what only they needed.
    pub(super) fn forget(&mut self, keep: usize) {
        let gone = self.snapshots.len().saturating_sub(keep);
        self.snapshots.drain(..gone);
        let snapshots = &self.snapshots;
        let free = &mut self.alloc.free;
        self.alloc.pending.retain(|(addr, birth, freed)| {
            let needed = snapshots.iter().any(|s| (*birth..*freed).contains(&s.generation));
            if !needed {
                free.push(*addr);
            }
            needed
        });
    }

    /// What the disk holds below a sealed root, read through a cache of its own.
    pub(super) fn reopen(&self, root: NodePtr) -> Store {
        let mut store = Store::new(0);
        store.disk = self.disk.clone();
        store.generation = Generation(root.generation.0 + 1);
        store.tree = Tree::open(root).unwrap();
        store
    }

    /// All items, in order, by leaves from the first one.
    pub(super) fn items(&mut self) -> Result<Items, Stop> {
        let mut items = Vec::new();
        let mut from = Some(Vec::new());
        while let Some(key) = from.take() {
            let leaf = self.run(|tree, ctx| tree.leaf_from(ctx.cache, &key, true))?;
            let Some(mut leaf) = leaf else { break };
            while let Some((key, value)) = leaf.next() {
                items.push((key.to_buf().to_vec(), value.to_vec()));
            }
            from = leaf.high().map(<[u8]>::to_vec);
        }
        Ok(items)
    }

    /// All items, in reverse, by leaves from the last one.
    pub(super) fn items_back(&mut self) -> Result<Items, Stop> {
        let mut items = Vec::new();
        let mut next = self.run(|tree, ctx| tree.last_leaf(ctx.cache))?;
        while let Some(mut leaf) = next.take() {
            while let Some((key, value)) = leaf.prev() {
                items.push((key.to_buf().to_vec(), value.to_vec()));
            }
            if !leaf.low().is_empty() {
                next = self.run(|tree, ctx| tree.leaf_before(ctx.cache, leaf.low()))?;
            }
        }
        Ok(items)
    }

    /// Walks the tree; returns the addresses of its nodes. Each is validated as if it came from a device.
    pub(super) fn walk(&mut self) -> Result<Vec<Arc<Node>>, Stop> {
        let mut nodes = Vec::new();
        let mut walk = Walk::new();
        while let Some((ptr, node)) = self.run(|tree, ctx| walk.step(tree, ctx.cache))? {
            let sealed = NodePtr { checksum: super::node::node_checksum(node.bytes()), ..ptr };
            Node::validate(&sealed, &FSID, node.bytes()).expect("every node in memory would be valid");
            nodes.push(node);
        }
        Ok(nodes)
    }

    /// The tree equals the model, and its nodes are exactly the blocks in use.
    pub(super) fn check(&mut self, model: &Model) {
        let items: Vec<_> = model.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        assert!(self.items().unwrap() == items, "forward iteration");
        let mut back = self.items_back().unwrap();
        back.reverse();
        assert!(back == items, "backward iteration");
        let nodes: Vec<BlockAddr> = self.walk().unwrap().iter().map(|node| node.addr()).collect();
        let set: HashSet<BlockAddr> = nodes.iter().copied().collect();
        assert_eq!(set.len(), nodes.len(), "no node is visited twice");
        if !self.alloc.live.is_empty() {
            let live: HashSet<BlockAddr> = self.alloc.live.keys().copied().collect();
            assert!(set == live, "blocks in use are the tree's nodes");
        }
    }

    /// A crash now: every remembered root still gives what it held.
    pub(super) fn check_snapshots(&mut self) {
        self.finish_write();
        for snapshot in &self.snapshots {
            self.reopen(snapshot.root).check(&snapshot.model);
        }
    }
}

/// Kinds of keys that trees see, and some that hurt.
#[derive(Clone, Copy, Debug)]
pub(super) enum Keys {
    /// Inode and block, big-endian.
    Extents,
    /// Names of up to 255 bytes that begin alike.
    Names,
    /// 24 random bytes.
    Random,
    /// Up to three bytes out of few, so that keys are prefixes of each other.
    Tiny,
    /// The longest keys, equal but for their end, with some that are equal in nothing.
    Long,
}

pub(super) const ALL_KEYS: [Keys; 5] = [Keys::Extents, Keys::Names, Keys::Random, Keys::Tiny, Keys::Long];

impl Keys {
    pub(super) fn make(self, rng: &mut SmallRng) -> Vec<u8> {
        match self {
            Keys::Extents => {
                let mut key = rng.random_range(0..6u64).to_be_bytes().to_vec();
                key.extend(rng.random_range(0..500u64).to_be_bytes());
                key
            }
            Keys::Names => {
                let stem =
                    ["a", "file-", "some/long/directory/path/that/repeats/", "z"][rng.random_range(0..4)];
                let mut key = stem.as_bytes().to_vec();
                let len = rng.random_range(1..8) * rng.random_range(0..20);
                key.extend((0..len).map(|i| b"abcdef"[if i < 3 { rng.random_range(0..6) } else { i % 6 }]));
                key.truncate(255);
                key
            }
            Keys::Random => {
                let id = rng.random_range(0..3000u64);
                let mut key = Vec::new();
                for i in 1..=3u64 {
                    key.extend(
                        (id + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(i as u32 * 17).to_le_bytes(),
                    );
                }
                key
            }
            Keys::Tiny => {
                (0..rng.random_range(1..=3)).map(|_| [0, 1, 0x7f, 0xff][rng.random_range(0..4)]).collect()
            }
            Keys::Long => {
                if rng.random_ratio(1, 20) {
                    return vec![rng.random(); rng.random_range(1..=super::MAX_KEY)];
                }
                let mut key = vec![b'k'; rng.random_range(290..=super::MAX_KEY)];
                let end = key.len() - 2;
                key[end..].copy_from_slice(&rng.random_range(0..2000u16).to_be_bytes());
                key
            }
        }
    }
}

/// Values of all lengths that fit beside a key of `key_len` bytes; mostly short ones.
pub(super) fn value(rng: &mut SmallRng, key_len: usize) -> Vec<u8> {
    let max = super::MAX_VALUE.min(super::MAX_ITEM - key_len);
    let len = match rng.random_range(0..20) {
        0 => 0,
        1 => max,
        2 => rng.random_range(0..=max),
        3..6 => 16,
        _ => rng.random_range(0..48),
    };
    vec![rng.random(); len]
}

/// A block with room for mischief.
pub(super) fn block(node: &Node) -> Vec<u8> {
    assert_eq!(node.bytes().len(), BLOCK_SIZE);
    node.bytes().to_vec()
}
