//! Many entries: the tree against a model, batched lookups, memory, reclamation.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::super::mem::collect_garbage;
use super::*;

/// Block -> address, of what is data.
type Model = BTreeMap<u64, u64>;

fn same(map: &ExtentMap, model: &Model, end: u64) {
    map.check().unwrap();
    let guard = pin();
    let view = map.view(&guard);
    let mut found = Model::new();
    for entry in view.iter(blocks(0, end)) {
        for block in entry.start().0..entry.end().0 {
            if let Some(addr) = entry.data_addr(FileBlock(block)) {
                found.insert(block, addr.0);
            }
        }
    }
    assert!(&found == model, "maps differ");
}

fn random_changes(seed: u64) {
    changes_to(seed, ExtentMap::new_empty(), Model::new(), 6000, 3000);
}

/// The same on a tree of three levels, where a range can span inner nodes.
fn random_changes_to_a_high_tree(seed: u64) {
    const BLOCKS: u64 = 40_000;
    let map = ExtentMap::new_unloaded(BLOCKS << 12);
    let extents: Vec<NewExtent> = (0..BLOCKS / 2).map(|i| data(2 * i, 1, 1 << 40 | (3 * i))).collect();
    map.load(BlockRange::ALL, map.load_ticket(), &extents, &mut no_sink).unwrap();
    let model = (0..BLOCKS / 2).map(|i| (2 * i, 1 << 40 | (3 * i))).collect();
    changes_to(seed, map, model, BLOCKS, 400);
}

fn changes_to(seed: u64, map: ExtentMap, mut model: Model, end: u64, steps: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut next_addr = 1_u64;
    for step in 0..steps {
        let block = rng.random_range(0..end);
        let longest = if rng.random_ratio(1, 100) { end } else { 3 };
        let len = rng.random_range(1..=longest).min(end - block);
        match rng.random_range(0..20) {
            0 => {
                map.set_hole(blocks(block, block + len));
                model.retain(|at, _| !(block..block + len).contains(at));
            }
            1 if step % 8 == 0 => {
                map.set_size(end << 12);
                map.truncate(block << 12);
                model.split_off(&block);
            }
            _ => {
                // Now and then an address that continues the last one.
                next_addr += if rng.random_ratio(1, 3) { 0 } else { 7 };
                settle(&map, &[data(block, len, next_addr)]);
                model.extend((0..len).map(|i| (block + i, next_addr + i)));
                next_addr += len;
            }
        }
        if step % (steps / 6) == 0 {
            same(&map, &model, end);
        }
    }
    same(&map, &model, end);
    batches_equal_single_lookups(&map, &mut rng, end);
}

fn batches_equal_single_lookups(map: &ExtentMap, rng: &mut SmallRng, blocks: u64) {
    let guard = pin();
    let view = map.view(&guard);
    let empty = ExtentMap::new_unloaded(0);
    for count in [0, 1, 15, 16, 17, 100] {
        let queries: Vec<FileBlock> = (0..count)
            .map(|_| match rng.random_ratio(1, 10) {
                true => FileBlock(rng.random_range(0..2 * MAX_FILE_BLOCKS)),
                false => FileBlock(rng.random_range(0..blocks)),
            })
            .collect();
        let mut entries = vec![Entry::EMPTY; count];
        view.lookup_batch(&queries, &mut entries);
        let single: Vec<Entry> = queries.iter().map(|block| view.lookup(*block)).collect();
        assert_eq!(entries, single);
        let across: Vec<_> = queries
            .iter()
            .enumerate()
            .map(|(i, block)| (if i % 3 == 0 { empty.view(&guard) } else { view }, *block))
            .collect();
        let single: Vec<Entry> = across.iter().map(|(view, block)| view.lookup(*block)).collect();
        View::lookup_across(&across, &mut entries);
        assert_eq!(entries, single);
    }
}

#[test]
fn random_changes_equal_the_model() {
    for_seeds(20, random_changes);
    for_seeds(10, random_changes_to_a_high_tree);
}

#[test]
fn broken_splits_and_merges_are_noticed() {
    for rule in [Mutation::SplitKeepsAddress, Mutation::MergeIgnoresAddress] {
        assert!(notices(rule, 3, random_changes), "{rule:?}");
    }
}

/// Ten thousand extents loaded at once, then taken away piece by piece.
#[test]
fn bulk_load_and_gradual_drop() {
    let map = ExtentMap::new_unloaded(1 << 40);
    let extents: Vec<NewExtent> = (0..10_000).map(|i| data(2 * i, 1, 1 << 20 | (3 * i))).collect();
    let outcome = map.load(blocks(0, 20_000), map.load_ticket(), &extents, &mut no_sink).unwrap();
    assert_eq!(outcome, LoadOutcome { filled: 20_000, kept: 0, refused: 0 });
    map.check().unwrap();
    assert_eq!(map.entries(), 20_001);
    for start in (0..20_000).step_by(37) {
        map.invalidate(blocks(start, start + 30));
        map.check().unwrap();
    }
    let bytes = map.memory_bytes();
    assert!(map.evict(10_000) >= 10_000);
    assert!(map.memory_bytes() <= bytes - 10_000);
    map.evict(u64::MAX);
    assert_eq!(map.entries(), 0);
    map.check().unwrap();
}

/// Eviction goes round: no part of the file is spared for ever.
#[test]
fn eviction_goes_round() {
    let map = ExtentMap::new_unloaded(1 << 40);
    let extents: Vec<NewExtent> = (0..10_000).map(|i| data(2 * i, 1, 1 << 20 | (3 * i))).collect();
    let mut seen = [false; 10];
    for _ in 0..30 {
        map.load(blocks(0, 20_000), map.load_ticket(), &extents, &mut no_sink).unwrap();
        assert!(map.evict(20_000) > 0);
        for (tenth, seen) in seen.iter_mut().enumerate() {
            *seen |= lookup(&map, 2000 * tenth as u64 + 1000).is_unknown();
        }
        map.check().unwrap();
    }
    assert_eq!(seen, [true; 10]);
}

/// Random overwrites of single blocks: at most 24 bytes an entry.
#[test]
fn an_entry_takes_few_bytes() {
    let map = fragmented(30_000, 1);
    let stats = map.view(&pin()).stats();
    assert!(stats.entries >= 28_000, "{}", stats.entries);
    let bytes = stats.node_bytes as f64 / stats.entries as f64;
    assert!(bytes < 20.0, "{bytes}");
    map.check().unwrap();
}

fn fragmented(count: u64, seed: u64) -> ExtentMap {
    let mut rng = SmallRng::seed_from_u64(seed);
    let map = ExtentMap::new_empty();
    settle(&map, &[data(0, count, 0)]);
    for i in 0..3 * count {
        settle(&map, &[summed(rng.random_range(0..count), count + 2 * i, 1)]);
    }
    map
}

/// A view stays as it was while the map moves on, and its nodes are not reused under it.
#[test]
fn a_view_outlives_what_it_shows() {
    let map = fragmented(3000, 2);
    let guard = pin();
    let view = map.view(&guard);
    let before: Vec<Entry> = view.iter(BlockRange::ALL).collect();
    for i in 0..20_000 {
        settle(&map, &[data(i % 3000, 1, (1 << 30) + 2 * i)]);
    }
    map.truncate(0);
    map.set_hole(BlockRange::ALL);
    view.check().unwrap();
    assert!(before == view.iter(BlockRange::ALL).collect::<Vec<_>>());
}

fn nodes_are_reclaimed(seed: u64) {
    let map = fragmented(2000, seed);
    let alive = map.writer.lock().nodes.alive.clone();
    let guard = pin();
    let reachable = all_nodes(map.view(&guard).data, map.view(&guard).reach).len() as isize;
    drop(guard);
    let within = |limit: isize| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while alive.load(Ordering::Relaxed) > limit && Instant::now() < deadline {
            collect_garbage();
            if broken(Mutation::NeverFree) {
                break;
            }
        }
        assert!(alive.load(Ordering::Relaxed) <= limit, "{} > {limit}", alive.load(Ordering::Relaxed));
    };
    within(reachable + LIMBO_NODES as isize);
    drop(map);
    within(0);
    assert_eq!(alive.load(Ordering::Relaxed), 0);
}

#[test]
fn no_node_leaks() {
    nodes_are_reclaimed(1);
    assert!(notices(Mutation::NeverFree, 1, nodes_are_reclaimed));
}

/// The map of a small file is small.
#[test]
fn a_small_map_is_small() {
    let map = ExtentMap::new_empty();
    assert!(map.memory_bytes() < 300, "{}", map.memory_bytes());
    settle(&map, &[data(0, 10, 100)]);
    assert!(map.memory_bytes() < 430, "{}", map.memory_bytes());
}
