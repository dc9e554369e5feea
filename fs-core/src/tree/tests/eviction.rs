//! What the cache keeps and what it drops.

use rand::Rng;
use rand::seq::SliceRandom;

use super::{FSID, Model, Store, rng, seed};
use crate::tree::cache::{MIN_NODES, NODE_MEMORY};
use crate::tree::{Ctx, NodeCache, NodeFault, NodePtr, Stop, Tree};
use crate::types::Generation;

fn key(i: u32) -> [u8; 8] {
    u64::from(i).to_be_bytes()
}

/// A sealed and written tree of `n` items of about 100 bytes, in ascending order.
fn written(n: u32, cache_bytes: usize) -> (Store, Model) {
    let mut store = Store::new(cache_bytes);
    let mut model = Model::new();
    for i in 0..n {
        store.insert(&key(i), &[i as u8; 90]).unwrap();
        model.insert(key(i).to_vec(), vec![i as u8; 90]);
    }
    store.seal(&model);
    store.finish_write();
    store.shrink();
    (store, model)
}

#[test]
fn dirty_nodes_stay_whatever_the_capacity() {
    let (mut store, model) = written(20_000, 0);
    assert!(store.cache.stats().nodes <= MIN_NODES, "{:?}", store.cache.stats());
    assert!(store.cache.stats().evictions > 100);
    for i in 0..20_000 {
        store.run(|tree, ctx| tree.update(ctx, &key(i), |value| value[0] ^= 1)).unwrap().unwrap();
    }
    let stats = store.cache.stats();
    assert!(stats.dirty > 10 * MIN_NODES && stats.bytes > stats.capacity, "{stats:?}");
    store.cache.trim();
    assert_eq!(store.cache.stats().dirty, stats.dirty);
    // Sealed, but the device does not have them.
    store.seal(&model);
    store.cache.trim();
    let stats = store.cache.stats();
    assert!(stats.writing > 10 * MIN_NODES && stats.dirty == 0, "{stats:?}");
    store.finish_write();
    store.shrink();
    assert!(store.cache.stats().nodes <= MIN_NODES);
}

/// A mount that wrote random blocks into a large file kept every node that it had ever made: what is made is never asked for, so
/// only the end of a commit evicts, and that looked at some thousand nodes however many it had written.
#[test]
fn who_only_writes_stays_within_the_capacity() {
    let capacity = 100 * NODE_MEMORY;
    let mut store = Store::new(capacity);
    let mut model = Model::new();
    for round in 0..6 {
        for i in 0..60_000 {
            let key = key(round * 60_000 + i);
            store.insert(&key, &[i as u8; 90]).unwrap();
            model.insert(key.to_vec(), vec![i as u8; 90]);
        }
        assert!(store.cache.stats().dirty > 1500, "{:?}", store.cache.stats());
        store.seal(&model);
        store.finish_write();
        let stats = store.cache.stats();
        assert!(stats.nodes <= 100 + MIN_NODES, "round {round}: {stats:?}");
    }
}

#[test]
fn what_is_held_stays() {
    let (mut store, _) = written(20_000, 0);
    let item = store.run(|tree, ctx| tree.get_ref(ctx.cache, &key(5))).unwrap().unwrap();
    let ptr = item.node.ptr();
    for i in 0..20_000 {
        store.get(&key(i)).unwrap().unwrap();
    }
    assert!(store.cache.cached(&ptr).is_some());
    drop(item);
    for i in 1000..20_000 {
        store.get(&key(i)).unwrap().unwrap();
    }
    assert!(store.cache.cached(&ptr).is_none());
}

#[test]
fn what_is_used_stays_longer() {
    let (mut store, _) = written(20_000, 64 * NODE_MEMORY);
    let hot = 7;
    let mut rng = rng(seed());
    let mut missed = 0;
    for _ in 0..20_000 {
        store.get(&key(rng.random_range(0..20_000))).unwrap().unwrap();
        let before = store.misses;
        store.get(&key(hot)).unwrap().unwrap();
        missed += store.misses - before;
    }
    assert!(store.misses > 10_000, "{}", store.misses);
    assert!(missed < 10, "the path of a key in use was read {missed} times");
    assert!(store.cache.stats().nodes <= 64);
}

#[test]
fn counters_add_up() {
    let (mut store, _) = written(5000, 0);
    let before = store.cache.stats();
    let (misses, height) = (store.misses as u64, store.tree.height() as u64);
    for i in 0..5000 {
        store.get(&key(i)).unwrap().unwrap();
    }
    let after = store.cache.stats();
    assert_eq!(after.misses - before.misses, store.misses as u64 - misses);
    assert!(after.hits - before.hits >= 5000 * height);
    assert_eq!(after.bytes, after.nodes * NODE_MEMORY);
    assert_eq!((after.dirty, after.writing), (0, 0));
}

#[test]
fn admitting_twice_is_harmless_and_a_wrong_block_is_refused() {
    let (store, _) = written(5000, 0);
    let mut cache = NodeCache::new(FSID, 0);
    let root = store.tree.root();
    assert_eq!(store.tree.get(&mut cache, &key(1), |_| ()), Err(Stop::Miss(root)));
    let other = &store.disk.iter().find(|(addr, _)| **addr != root.addr).unwrap().1[..];
    assert!(matches!(cache.admit(&root, other).unwrap_err().fault, NodeFault::Checksum { .. }));
    cache.admit(&root, &store.disk[&root.addr]).unwrap();
    cache.admit(&root, b"not looked at").unwrap();
    assert_eq!(cache.stats().nodes, 1);
    let newer = NodePtr { generation: Generation(8), ..root };
    assert!(matches!(cache.admit(&newer, other).unwrap_err().fault, NodeFault::Generation { .. }));
}

/// Many operations at once, each a key at a time, share the smallest cache: all of them get done.
#[test]
fn concurrent_operations_progress() {
    let (mut store, _) = written(50_000, 0);
    let mut rng = rng(seed());
    let mut waiting: Vec<u32> = (0..500).map(|_| rng.random_range(0..50_000)).collect();
    let mut rounds = 0;
    while !waiting.is_empty() {
        waiting.shuffle(&mut rng);
        let mut missing = Vec::new();
        waiting.retain(|i| {
            let mut get = |tree: &mut Tree, ctx: &mut Ctx<'_>| tree.get(ctx.cache, &key(*i), |_| ());
            match store.once(&mut get) {
                Err(Stop::Miss(ptr)) => {
                    missing.push(ptr);
                    true
                }
                result => {
                    assert_eq!(result, Ok(Some(())));
                    false
                }
            }
        });
        // All reads were under way together; each operation is retried when a read is done, as a caller would.
        for ptr in missing {
            let held = store.read(&ptr).unwrap();
            waiting.retain(|i| {
                let mut get = |tree: &mut Tree, ctx: &mut Ctx<'_>| tree.get(ctx.cache, &key(*i), |_| ());
                store.once(&mut get).is_err()
            });
            drop(held);
        }
        rounds += 1;
        assert!(rounds < 100, "{} operations starve", waiting.len());
    }
}
