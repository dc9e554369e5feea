//! How full trees are, how they grow and shrink, and what copy-on-write copies.

use rand::Rng;
use rand::seq::SliceRandom;

use super::{ALL_KEYS, Model, Store, rng, seed, value};
use crate::tree::node::CAPACITY;
use crate::types::Generation;

fn key(file: u64, block: u64) -> Vec<u8> {
    [file.to_be_bytes(), block.to_be_bytes()].concat()
}

/// How full the leaves are on average, in percent.
fn fill(store: &mut Store) -> usize {
    let nodes = store.walk().unwrap();
    let leaves: Vec<_> = nodes.iter().filter(|node| node.is_leaf()).collect();
    leaves.iter().map(|leaf| leaf.used()).sum::<usize>() * 100 / (leaves.len() * CAPACITY)
}

#[test]
fn ascending_keys_fill_their_leaves() {
    let mut store = Store::new(1 << 26);
    for i in 0..20_000 {
        store.insert(&key(1, i), &[1; 32]).unwrap();
    }
    assert!(fill(&mut store) >= 97, "{} %", fill(&mut store));
}

#[test]
fn ascending_runs_side_by_side_fill_their_leaves() {
    let mut store = Store::new(1 << 26);
    for i in 0..1000 {
        for file in 0..20 {
            store.insert(&key(file, i), &[1; 32]).unwrap();
        }
    }
    assert!(fill(&mut store) >= 80, "{} %", fill(&mut store));
}

/// First writes of preallocated blocks from the end of a file down, behind one that filled its leaf: each key lands at the end of
/// that full leaf. When the end of a page alone counted as ascending, each got a leaf of its own.
#[test]
fn descending_keys_behind_a_full_leaf_share_theirs() {
    for full in 60..120 {
        let mut store = Store::new(1 << 26);
        for i in (0..full).chain((full..256).rev()) {
            store.insert(&key(1, i), &[1; 32]).unwrap();
        }
        assert!(fill(&mut store) >= 40, "{} % after {full} ascending keys", fill(&mut store));
    }
}

#[test]
fn random_keys_fill_two_thirds() {
    let mut store = Store::new(1 << 26);
    let mut rng = rng(seed());
    for _ in 0..20_000 {
        store.insert(&key(rng.random(), rng.random()), &[1; 32]).unwrap();
    }
    assert!(fill(&mut store) >= 63, "{} %", fill(&mut store));
}

#[test]
fn leaves_merge_and_the_root_comes_down() {
    let mut store = Store::new(1 << 26);
    let mut keys: Vec<Vec<u8>> = (0..30_000).map(|i| key(i % 7, i)).collect();
    for key in &keys {
        store.insert(key, &[1; 64]).unwrap();
    }
    let (height, full) = (store.tree.height(), store.alloc.live.len());
    assert!(height >= 3);
    keys.shuffle(&mut rng(seed()));
    let mut rest = keys.split_off(keys.len() * 9 / 10);
    for key in &keys {
        assert!(store.remove(key).unwrap());
    }
    assert!(
        store.alloc.live.len() <= full / 3,
        "{} of {full} nodes for a tenth of the items",
        store.alloc.live.len()
    );
    let last = rest.split_off(rest.len() - 5);
    for key in &rest {
        assert!(store.remove(key).unwrap());
    }
    assert_eq!((store.tree.height(), store.alloc.live.len()), (1, 1));
    store.check(&last.iter().map(|key| (key.clone(), vec![1; 64])).collect());
}

#[test]
fn one_change_copies_one_path() {
    let mut store = Store::new(1 << 26);
    let mut model = Model::new();
    for i in 0..20_000 {
        store.insert(&key(1, i), &[1; 64]).unwrap();
        model.insert(key(1, i), vec![1; 64]);
    }
    store.seal(&model);
    let height = store.tree.height();
    let before = (store.alloc.allocated, store.alloc.freed);
    store.run(|tree, ctx| tree.update(ctx, &key(1, 777), |value| value.fill(2))).unwrap().unwrap();
    let after = (before.0 + height, before.1 + height);
    assert_eq!((store.alloc.allocated, store.alloc.freed), after);
    // The path is this generation's: nothing more is copied for it.
    store.run(|tree, ctx| tree.update(ctx, &key(1, 777), |value| value.fill(3))).unwrap().unwrap();
    assert!(store.remove(&key(1, 777)).unwrap());
    assert_eq!((store.alloc.allocated, store.alloc.freed), after);
    // What changes nothing copies nothing.
    assert!(!store.remove(&key(2, 0)).unwrap());
    assert_eq!(store.run(|tree, ctx| tree.update(ctx, &key(2, 0), |_| ())), Ok(None));
    assert_eq!((store.alloc.allocated, store.alloc.freed), after);
    model.remove(&key(1, 777));
    store.seal(&model);
    assert_eq!(store.tree.root().generation, Generation(2));
    store.check_snapshots();
}

#[test]
fn a_tree_that_was_not_modified_has_nothing_to_write() {
    let mut store = Store::new(1 << 26);
    let model = Model::from([(b"k".to_vec(), b"v".to_vec())]);
    store.insert(b"k", b"v").unwrap();
    store.seal(&model);
    let root = store.tree.root();
    store.seal(&model);
    assert_eq!(store.tree.root(), root);
    assert_eq!(store.disk.len(), 1);
    store.check_snapshots();
}

#[test]
#[should_panic(expected = "modified between its seal and the next generation")]
fn a_sealed_tree_refuses_changes_of_its_generation() {
    let mut store = Store::new(1 << 26);
    store.insert(b"k", b"v").unwrap();
    store.seal(&Model::new());
    store.generation = Generation(store.generation.0 - 1);
    let _ = store.insert(b"k", b"w");
}

/// The allocator of the tests gives exactly what was ensured; here also no operation asks for more than its bound.
#[test]
fn bounds_hold_under_the_worst_splits() {
    let mut rng = rng(seed());
    for keys in ALL_KEYS {
        let mut store = Store::new(1 << 26);
        for i in 0..3000 {
            let key = keys.make(&mut rng);
            let value = value(&mut rng, key.len());
            let (before, bound) = (store.alloc.allocated, store.tree.insert_bound());
            store.insert(&key, &value).unwrap();
            assert!(store.alloc.allocated - before <= bound);
            let (before, bound) = (store.alloc.allocated, store.tree.remove_bound());
            if i % 3 == 0 {
                store.remove(&keys.make(&mut rng)).unwrap();
                assert!(store.alloc.allocated - before <= bound);
            }
            if i % 50 == 0 {
                store.seal(&Model::new());
                store.forget(0);
            }
        }
    }
}
