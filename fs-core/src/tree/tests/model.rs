//! The tree beside a `BTreeMap`, in lockstep.

use std::ops::Bound;

use rand::Rng;
use rand::rngs::SmallRng;

use super::{ALL_KEYS, Keys, Model, Store, rng, seed, value};
use crate::tree::{Stop, Tree};

/// One random operation on both; every answer is compared.
fn step(store: &mut Store, model: &mut Model, rng: &mut SmallRng, keys: Keys, growing: bool) {
    let key = keys.make(rng);
    let (inserts, removes) = if growing { (45, 15) } else { (15, 45) };
    let dice = rng.random_range(0..100);
    if dice < inserts {
        let value = value(rng, key.len());
        let old = model.insert(key.clone(), value.clone());
        assert_eq!(store.insert(&key, &value), Ok(old.is_some()));
    } else if dice < inserts + removes {
        // Half of them hit.
        let key = match model.range(key.clone()..).next() {
            Some((existing, _)) if rng.random() => existing.clone(),
            _ => key,
        };
        assert_eq!(store.remove(&key), Ok(model.remove(&key).is_some()));
    } else {
        look(store, model, rng, &key, dice);
    }
}

/// The operations that keep the keys as they are.
fn look(store: &mut Store, model: &mut Model, rng: &mut SmallRng, key: &[u8], dice: u32) {
    let owned = |(k, v): (&Vec<u8>, &Vec<u8>)| (k.clone(), v.clone());
    match dice % 6 {
        0 => assert_eq!(store.get(key), Ok(model.get(key).cloned())),
        1 => {
            let found =
                store.run(|tree, ctx| tree.floor(ctx.cache, key, |k, v| (k.to_buf().to_vec(), v.to_vec())));
            assert_eq!(found, Ok(model.range(..=key.to_vec()).next_back().map(owned)));
        }
        2 => {
            let found =
                store.run(|tree, ctx| tree.ceil(ctx.cache, key, |k, v| (k.to_buf().to_vec(), v.to_vec())));
            assert_eq!(found, Ok(model.range(key.to_vec()..).next().map(owned)));
        }
        3 => {
            let fill = rng.random();
            let done = store.run(|tree, ctx| tree.update(ctx, key, |value| value.fill(fill)));
            let expected = model.get_mut(key).map(|value| value.fill(fill));
            assert_eq!(done, Ok(expected));
        }
        4 => {
            let item = store.run(|tree, ctx| tree.get_ref(ctx.cache, key)).unwrap();
            let item = item.map(|item| (item.key().to_buf().to_vec(), item.value().to_vec()));
            assert_eq!(item, model.get_key_value(key).map(owned));
        }
        _ => {
            let inclusive = rng.random();
            let leaf = store.run(|tree, ctx| tree.leaf_from(ctx.cache, key, inclusive)).unwrap();
            let low = if inclusive { Bound::Included(key) } else { Bound::Excluded(key) };
            let expected = model.range::<[u8], _>((low, Bound::Unbounded)).next().map(owned);
            let found = leaf.and_then(|mut leaf| leaf.next().map(|(k, v)| (k.to_buf().to_vec(), v.to_vec())));
            // At the end of a leaf the answer is in the next one.
            assert!(found.is_none() || found == expected);
        }
    }
}

/// Several keys at once: when all are touched, changing all of them misses nothing.
fn batch(store: &mut Store, model: &mut Model, rng: &mut SmallRng, keys: Keys) {
    let batch: Vec<Vec<u8>> = (0..rng.random_range(1..12)).map(|_| keys.make(rng)).collect();
    let mut held = Vec::new();
    loop {
        let mut touch = |tree: &mut Tree, ctx: &mut super::Ctx<'_>| {
            batch.iter().try_for_each(|key| tree.touch(ctx.cache, key))
        };
        match store.once(&mut touch) {
            Ok(()) => break,
            Err(Stop::Miss(ptr)) => held.push(store.read(&ptr).unwrap()),
            Err(stop) => panic!("{stop}"),
        }
        assert!(held.len() < 1000, "touching makes progress");
    }
    for key in &batch {
        if rng.random() {
            let value = value(rng, key.len());
            let known = store.once(&mut |tree, ctx| tree.insert(ctx, key, &value));
            assert_eq!(known, Ok(model.insert(key.clone(), value).is_some()));
        } else {
            let known = store.once(&mut |tree, ctx| tree.remove(ctx, key));
            assert_eq!(known, Ok(model.remove(key).is_some()));
        }
    }
}

/// A refusal of the allocator changes nothing.
fn refused(store: &mut Store, model: &mut Model, rng: &mut SmallRng, keys: Keys) {
    let key = keys.make(rng);
    let value = value(rng, key.len());
    let before = (store.tree, store.alloc.allocated, store.alloc.freed);
    store.alloc.full = true;
    let result = match rng.random() {
        true => store.insert(&key, &value).inspect(|_| drop(model.insert(key, value))),
        false => store.remove(&key).inspect(|_| drop(model.remove(&key))),
    };
    store.alloc.full = false;
    // What needs no block, in nodes that are dirty already, is done all the same.
    if result.is_err() {
        assert_eq!(result, Err(Stop::NoSpace));
        assert_eq!(before, (store.tree, store.alloc.allocated, store.alloc.freed));
    }
}

fn lockstep(keys: Keys, seed: u64, steps: usize) {
    let mut rng = rng(seed);
    let cache = if rng.random() { 0 } else { 1 << 24 };
    let mut store = Store::new(cache);
    let mut model = Model::new();
    let mut growing = true;
    for i in 0..steps {
        if rng.random_ratio(1, 1000) {
            growing = !growing;
        }
        step(&mut store, &mut model, &mut rng, keys, growing);
        match rng.random_range(0..1000) {
            0..5 => store.seal(&model),
            5..10 => store.finish_write(),
            10..12 => store.forget(rng.random_range(1..4)),
            12..30 => batch(&mut store, &mut model, &mut rng, keys),
            30..40 => refused(&mut store, &mut model, &mut rng, keys),
            40..43 => store.check(&model),
            43 => store.check_snapshots(),
            44 => store.cache.trim(),
            _ => {}
        }
        if i % 4096 == 0 {
            store.forget(3);
            // Dropping everything that was not sealed: the last sealed state comes back.
            if rng.random() && !store.snapshots.is_empty() {
                crash(&mut store, &mut model);
            }
        }
    }
    store.check(&model);
    store.seal(&model);
    store.check_snapshots();
    // And down to nothing.
    for key in model.keys() {
        assert_eq!(store.remove(key), Ok(true));
    }
    assert!(store.tree.is_empty());
    assert!(store.alloc.live.is_empty(), "an empty tree has no blocks");
}

/// The process ends; the last sealed state is mounted and used further.
fn crash(store: &mut Store, model: &mut Model) {
    store.finish_write();
    let last = store.snapshots.last().expect("a snapshot").clone();
    let mut next = store.reopen(last.root);
    let nodes = next.walk().unwrap();
    next.alloc.live = nodes.iter().map(|node| (node.addr(), node.generation())).collect();
    next.alloc.next = 1_000_000 * (store.generation.0 + 1);
    next.generation = store.generation;
    next.alloc.generation = store.generation;
    next.snapshots = vec![last.clone()];
    *model = last.model;
    *store = next;
    store.check(model);
}

/// A few thousand steps here; `GAUR_STEPS` for the long form.
fn steps() -> usize {
    std::env::var("GAUR_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(12_000)
}

#[test]
fn steps_beside_a_map() {
    let seed = seed();
    for (i, keys) in ALL_KEYS.into_iter().enumerate() {
        lockstep(keys, seed.wrapping_add(i as u64), steps());
    }
}

#[test]
fn steps_beside_a_map_with_other_seeds() {
    let seed = seed().wrapping_mul(31);
    for (i, keys) in ALL_KEYS.into_iter().rev().enumerate() {
        lockstep(keys, seed.wrapping_add(i as u64), steps());
    }
}
