//! Blocks that are not what they should be: nothing panics, nothing loops, every finding names tree and place.

use rand::Rng;
use rand::rngs::SmallRng;

use super::{ALL_KEYS, FSID, Keys, Model, Store, block, rng, seed, value};
use crate::tree::edit::{Entry, Fit};
use crate::tree::node::{Node, NodePtr, node_checksum};
use crate::tree::{MAX_HEIGHT, NodeAlloc, NodeFault, Stop, Tree, TreeId, Walk};
use crate::types::{BLOCK_SIZE, BlockAddr, Generation};

/// A written tree of three levels or so.
fn written(keys: Keys, rng: &mut SmallRng) -> (Store, Model) {
    let mut store = Store::new(1 << 24);
    let mut model = Model::new();
    for _ in 0..4000 {
        let key = keys.make(rng);
        let value = value(rng, key.len());
        store.insert(&key, &value).unwrap();
        model.insert(key, value);
    }
    store.seal(&model);
    store.finish_write();
    (store, model)
}

/// The block with its right pointer.
fn pointer(bytes: &[u8], to: NodePtr) -> NodePtr {
    NodePtr { checksum: node_checksum(bytes), ..to }
}

fn fault(bytes: &[u8], to: NodePtr) -> Option<NodeFault> {
    Node::validate(&pointer(bytes, to), &FSID, bytes).err().map(|error| {
        assert_eq!((error.tree, error.addr, error.level), (to.tree, to.addr, to.level));
        assert!(error.to_string().starts_with("tree 3: node of level"), "{error}");
        error.fault
    })
}

#[test]
fn every_part_of_a_nodes_identity_is_checked() {
    let (mut store, _) = written(Keys::Extents, &mut rng(seed()));
    let node = store.walk().unwrap().remove(0);
    let (bytes, ptr) = (block(&node), node.ptr());
    assert_eq!(fault(&bytes, ptr), None);
    assert!(matches!(Node::validate(&ptr, &FSID, &bytes).unwrap_err().fault, NodeFault::Checksum { .. }));
    assert!(matches!(fault(&bytes[1..], ptr), Some(NodeFault::Length(4095))));
    let with = |at: usize| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        fault(&bytes, ptr)
    };
    assert!(matches!(with(0), Some(NodeFault::Magic(_))));
    assert_eq!(with(4), Some(NodeFault::Format(0)));
    assert_eq!(with(6), Some(NodeFault::Tree(TreeId(2))));
    assert_eq!(with(7), Some(NodeFault::Level(ptr.level ^ 1)));
    assert_eq!(with(8), Some(NodeFault::Filesystem));
    assert_eq!(with(24), Some(NodeFault::Address(BlockAddr(ptr.addr.0 ^ 1))));
    assert!(matches!(with(32), Some(NodeFault::Generation { .. })));
    assert_eq!(with(44), Some(NodeFault::Sizes));
    assert_eq!(with(63), Some(NodeFault::Reserved));
    // A stale, a misdirected and a foreign pointer to a node that is whole.
    for wrong in [
        NodePtr { generation: Generation(ptr.generation.0 + 1), ..ptr },
        NodePtr { addr: ptr.addr.plus(1), ..ptr },
        NodePtr { level: ptr.level + 1, ..ptr },
    ] {
        assert!(fault(&bytes, wrong).is_some());
    }
}

#[test]
fn slots_and_children_are_checked() {
    let (mut store, _) = written(Keys::Extents, &mut rng(seed()));
    let nodes = store.walk().unwrap();
    let leaf = nodes.iter().find(|node| node.is_leaf()).unwrap();
    let inner = nodes.iter().find(|node| !node.is_leaf()).unwrap();
    let change = |node: &Node, edit: &dyn Fn(&mut [u8])| {
        let mut bytes = block(node);
        edit(&mut bytes);
        fault(&bytes, node.ptr())
    };
    assert_eq!(change(leaf, &|b| b[40..42].fill(0)), Some(NodeFault::Sizes), "no items");
    assert_eq!(change(leaf, &|b| b[40..42].fill(0xff)), Some(NodeFault::Sizes), "too many");
    assert_eq!(change(leaf, &|b| b[46..48].fill(0xff)), Some(NodeFault::Sizes), "prefix");
    assert_eq!(change(leaf, &|b| b[64] ^= 1), Some(NodeFault::Item(0)), "head");
    assert_eq!(change(leaf, &|b| b[68..72].fill(0xff)), Some(NodeFault::Item(0)), "place");
    assert_eq!(change(leaf, &|b| b.copy_within(64..72, 72)), Some(NodeFault::Order(1)), "same key twice");
    let mut swapped = block(leaf);
    let (a, b) = swapped[64..80].split_at_mut(8);
    a.swap_with_slice(b);
    assert_eq!(fault(&swapped, leaf.ptr()), Some(NodeFault::Order(1)));
    let place = inner.slot(1);
    let at = place.at() + place.key_len();
    assert_eq!(change(inner, &|b| b[at..at + 8].fill(0)), Some(NodeFault::Child(1)), "null");
    let own = inner.addr().0.to_le_bytes();
    assert_eq!(change(inner, &|b| b[at..at + 8].copy_from_slice(&own)), Some(NodeFault::Child(1)), "itself");
    assert_eq!(change(inner, &|b| b[at + 8..at + 16].fill(0x7f)), Some(NodeFault::Child(1)), "future");
}

#[test]
fn overlapping_items_are_found() {
    // Two keys "a", "b" whose values are the same bytes: in bounds, in order, and still wrong.
    let mut store = Store::new(0);
    store.insert(b"a", b"0123456789").unwrap();
    store.insert(b"b", b"0123456789").unwrap();
    store.seal(&Model::new());
    let node = store.walk().unwrap().remove(0);
    let mut bytes = block(&node);
    let slot = |i: usize| u32::from_le_bytes(bytes[68 + 8 * i..72 + 8 * i].try_into().unwrap());
    let (first, second) = (slot(0), slot(1));
    let longer = first.max(second);
    let (low, high) = if first & 0xfff < second & 0xfff { (0, 1) } else { (1, 0) };
    // The lower item reaches one byte into the higher one.
    let reach = slot(low) + (1 << 21);
    bytes[68 + 8 * low..72 + 8 * low].copy_from_slice(&reach.to_le_bytes());
    assert!(longer > 0 && high != low);
    assert!(
        matches!(fault(&bytes, node.ptr()), Some(NodeFault::Overlap(_))),
        "{:?}",
        fault(&bytes, node.ptr())
    );
}

/// Uses everything that a page offers.
fn exercise(node: &Node, rng: &mut SmallRng, keys: Keys) {
    for i in 0..node.len() {
        let key = node.key(i).to_buf();
        drop((node.value(i).to_vec(), node.find(&key)));
        if !node.is_leaf() {
            let _ = (node.child(i), node.child_for(&key), node.child_below(&key));
        }
    }
    let mut page = node.clone();
    for _ in 0..20 {
        let key = keys.make(rng);
        if page.is_leaf() {
            let value = value(rng, key.len());
            let (pos, replaces) = page.find(&key).map_or_else(|pos| (pos, false), |pos| (pos, true));
            let entry = Entry { pos, replaces, key: &key, value: &value };
            match page.fit(&entry) {
                Fit::Split => drop(page.split(&mut Node::new(&FSID, &node.ptr()), &entry)),
                fit => page.place(&entry, fit),
            }
        }
        if page.len() > 1 {
            page.remove_at(rng.random_range(0..page.len()));
        }
    }
}

#[test]
fn flipped_bits_with_a_right_checksum() {
    let mut rng = rng(seed());
    let mut passed = 0;
    for keys in ALL_KEYS {
        let (mut store, _) = written(keys, &mut rng);
        let nodes = store.walk().unwrap();
        for _ in 0..2000 {
            let node = &nodes[rng.random_range(0..nodes.len())];
            let mut bytes = block(node);
            let end = if rng.random() { BLOCK_SIZE } else { 64 + 8 * node.len() };
            for _ in 0..rng.random_range(1..6) {
                bytes[rng.random_range(40..end)] ^= 1 << rng.random_range(0..8);
            }
            let ptr = pointer(&bytes, node.ptr());
            if let Ok(node) = Node::validate(&ptr, &FSID, &bytes) {
                exercise(&node, &mut rng, keys);
                passed += 1;
            }
        }
    }
    assert!(passed > 100, "only {passed} pages came through");
}

#[test]
fn garbage_with_a_right_header() {
    let mut rng = rng(seed());
    let (mut store, _) = written(Keys::Tiny, &mut rng);
    let node = store.walk().unwrap().remove(0);
    for _ in 0..5000 {
        let mut bytes = block(&node);
        rng.fill(&mut bytes[40..50]);
        if rng.random() {
            let count = rng.random_range(0..6u16);
            bytes[40..42].copy_from_slice(&count.to_le_bytes());
        }
        rng.fill(&mut bytes[64..]);
        assert!(fault(&bytes, node.ptr()).is_some());
        rng.fill(&mut bytes[..]);
        assert!(fault(&bytes, node.ptr()).is_some());
    }
}

/// An allocator that forgives: in a forged tree a block may be freed twice.
struct Forgiving(u64);

impl NodeAlloc for Forgiving {
    fn ensure(&mut self, _: usize) -> Result<(), Stop> {
        Ok(())
    }

    fn allocate_node(&mut self) -> BlockAddr {
        self.0 += 1;
        BlockAddr(self.0)
    }

    fn free_node(&mut self, _: BlockAddr, _: Generation) {}
}

/// Writes a node back with other bytes, and its ancestors with the checksums that follow. `edit` gets all nodes of one level.
fn forge(store: &mut Store, rng: &mut SmallRng) -> NodePtr {
    let root = store.tree.root();
    forge_below(store, root, rng)
}

fn forge_below(store: &mut Store, ptr: NodePtr, rng: &mut SmallRng) -> NodePtr {
    let mut node = (*Node::validate(&ptr, &FSID, &store.disk[&ptr.addr]).unwrap()).clone();
    if !node.is_leaf() {
        for i in 0..node.len() {
            let child = forge_below(store, node.child(i), rng);
            node.set_child(i, &child);
        }
        if node.level() > 1 || rng.random_ratio(1, 2) {
            // Children in another order, and some several times: all keys are beyond their bounds.
            for _ in 0..rng.random_range(1..4) {
                let (i, j) = (rng.random_range(0..node.len()), rng.random_range(0..node.len()));
                let (a, b) = (node.child(i), node.child(j));
                node.set_child(i, &b);
                if rng.random() {
                    node.set_child(j, &a);
                }
            }
        }
    }
    store.disk.insert(ptr.addr, block(&node));
    pointer(node.bytes(), ptr)
}

#[test]
fn a_forged_tree_ends_every_operation() {
    let seed = seed();
    let mut found = 0;
    for round in 0..20 {
        let mut rng = rng(seed.wrapping_add(round));
        let keys = ALL_KEYS[round as usize % ALL_KEYS.len()];
        let (mut store, model) = written(keys, &mut rng);
        let root = forge(&mut store, &mut rng);
        let mut store = store.reopen(root);
        let mut alloc = Forgiving(1_000_000);
        let allowed = |stop: Stop| match stop {
            Stop::Corrupt(_) => {}
            stop => panic!("{stop}"),
        };
        for _ in 0..3000 {
            let key = match rng.random() {
                true => keys.make(&mut rng),
                false => model.keys().nth(rng.random_range(0..model.len())).unwrap().clone(),
            };
            let value = value(&mut rng, key.len());
            let dice = rng.random_range(0..6);
            let result = store.run(|tree, ctx| {
                let ctx = &mut super::Ctx { cache: ctx.cache, alloc: &mut alloc, generation: ctx.generation };
                match dice {
                    0 => tree.insert(ctx, &key, &value).map(drop),
                    1 | 2 => tree.remove(ctx, &key).map(drop),
                    3 => tree.floor(ctx.cache, &key, |_, _| ()).map(drop),
                    4 => tree.ceil(ctx.cache, &key, |_, _| ()).map(drop),
                    _ => tree.leaf_before(ctx.cache, &key).map(drop),
                }
            });
            result.unwrap_or_else(allowed);
        }
        store.items().map_or_else(allowed, drop);
        store.items_back().map_or_else(allowed, drop);
        found += walk_over(&mut store);
        let mut out = Vec::new();
        let generation = store.generation;
        let mut ctx = super::Ctx { cache: &mut store.cache, alloc: &mut alloc, generation };
        store.tree.seal(&mut ctx, &mut out);
        for (_, node) in out {
            let ptr = pointer(node.bytes(), node.ptr());
            Node::validate(&ptr, &FSID, node.bytes()).expect("whatever we write is a valid node");
        }
    }
    assert!(found > 20, "children that were exchanged are found");
}

/// A leaf hangs where its keys do not belong. To split it would put a separator out of order into the parent.
#[test]
fn a_leaf_beyond_its_bounds_is_not_split() {
    let mut store = Store::new(1 << 24);
    let key = |i: u32| i.to_be_bytes();
    for i in 1000..3000 {
        store.insert(&key(i), &[1; 40]).unwrap();
    }
    store.seal(&Model::new());
    store.finish_write();
    let root = store.tree.root();
    let mut node = (*store.read(&root).unwrap()).clone();
    assert_eq!(node.level(), 1);
    let (first, last) = (node.child(0), node.child(node.len() - 1));
    node.set_child(0, &last);
    node.set_child(node.len() - 1, &first);
    store.disk.insert(root.addr, block(&node));
    let mut store = store.reopen(pointer(node.bytes(), root));
    store.alloc.live = store.disk.keys().map(|addr| (*addr, root.generation)).collect();
    store.alloc.next = 1_000_000;
    let stop = (0..1000).find_map(|i| store.insert(&key(i), &[2; 40]).err()).expect("the leaf becomes full");
    assert!(matches!(stop, Stop::Corrupt(error) if error.fault == NodeFault::Bounds), "{stop}");
    assert!(walk_over(&mut store) > 0);
}

/// Walks a damaged tree to its end; returns the number of findings.
fn walk_over(store: &mut Store) -> usize {
    let (mut walk, mut found) = (Walk::new(), 0);
    for _ in 0..1_000_000 {
        match store.run(|tree, ctx| walk.step(tree, ctx.cache)) {
            Ok(Some(_)) => {}
            Ok(None) => return found,
            Err(_) => {
                found += 1;
                walk.skip();
            }
        }
    }
    panic!("a walk without an end");
}

#[test]
fn one_unreadable_node_costs_what_is_below_it() {
    let (mut store, model) = written(Keys::Random, &mut rng(seed()));
    let nodes = store.walk().unwrap();
    let leaf = nodes.iter().filter(|node| node.is_leaf()).nth(5).unwrap();
    store.disk.get_mut(&leaf.addr()).unwrap()[2000] ^= 1;
    let mut store = store.reopen(store.tree.root());
    assert_eq!(walk_over(&mut store), 1);
    let mut readable = 0;
    for (key, value) in &model {
        match store.get(key) {
            Ok(found) => {
                assert_eq!(found.as_ref(), Some(value));
                readable += 1;
            }
            Err(Stop::Corrupt(error)) => assert_eq!(error.addr, leaf.addr()),
            Err(stop) => panic!("{stop}"),
        }
    }
    assert_eq!(readable, model.len() - leaf.len());
}

#[test]
fn a_root_of_the_future_is_not_modified() {
    let (store, _) = written(Keys::Random, &mut rng(seed()));
    let mut store = store.reopen(store.tree.root());
    store.generation = store.tree.root().generation;
    assert!(store.get(b"k").is_ok());
    let stop = store.insert(b"k", b"v").unwrap_err();
    assert!(
        matches!(stop, Stop::Corrupt(error) if matches!(error.fault, NodeFault::Generation { .. })),
        "{stop}"
    );
}

#[test]
fn a_root_too_high_is_refused() {
    let root = NodePtr { addr: BlockAddr(9), level: MAX_HEIGHT as u8, ..NodePtr::null(TreeId(1)) };
    assert_eq!(Tree::open(root).unwrap_err().fault, NodeFault::Height);
}
