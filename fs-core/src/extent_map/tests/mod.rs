//! Tests of the extent map: scenarios, a model in lockstep, threads, and proof that a broken rule is noticed.

mod model;
mod scenarios;
mod structure;
mod threads;

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::mutation::with_broken;
use crate::types::{BLOCK_SIZE, BlockAddr};

/// Data of `len` blocks from `block` at `addr`.
fn data(block: u64, len: u64, addr: u64) -> NewExtent {
    NewExtent::new(FileBlock(block), len, Mapping::Data { addr: BlockAddr(addr), checksum: None })
}

/// One block of data with its checksum.
fn summed(block: u64, addr: u64, checksum: u32) -> NewExtent {
    NewExtent::new(FileBlock(block), 1, Mapping::Data { addr: BlockAddr(addr), checksum: Some(checksum) })
}

fn preallocated(block: u64, len: u64, addr: u64) -> NewExtent {
    NewExtent::new(FileBlock(block), len, Mapping::Preallocated { addr: BlockAddr(addr) })
}

fn blocks(start: u64, end: u64) -> BlockRange {
    BlockRange::between(FileBlock(start), BlockEnd(end))
}

fn no_sink(_: BlockAddr, _: u32) {}

fn publish(map: &ExtentMap, extents: &[NewExtent]) {
    map.publish(PublishWrite { extents, size: None });
}

/// Publishes and, as if the tree had taken them at once, unpins.
fn settle(map: &ExtentMap, extents: &[NewExtent]) {
    publish(map, extents);
    map.unpin(extents, &mut no_sink);
}

fn lookup(map: &ExtentMap, block: u64) -> Entry {
    map.view(&pin()).lookup(FileBlock(block))
}

/// The entries of `[start, end)` as (start, end, mapping), checked.
fn entries(map: &ExtentMap, start: u64, end: u64) -> Vec<(u64, u64, Mapping)> {
    map.check().unwrap();
    let guard = pin();
    map.view(&guard).iter(blocks(start, end)).map(|e| (e.start().0, e.end().0, e.mapping())).collect()
}

fn at(addr: u64) -> Mapping {
    Mapping::Data { addr: BlockAddr(addr), checksum: None }
}

/// The seeds to run: that of `GAUR_SEED` alone, or `count` from a fixed start.
fn seeds(count: u64) -> std::ops::Range<u64> {
    match std::env::var("GAUR_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 1..1 + count,
    }
}

/// Runs `test` for each seed; says which one failed.
fn for_seeds(count: u64, test: impl Fn(u64)) {
    for seed in seeds(count) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| test(seed))) {
            eprintln!("failed with GAUR_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// Whether `test` fails for at least one of `count` seeds when `rule` is broken.
fn notices(rule: Mutation, count: u64, test: impl Fn(u64)) -> bool {
    (1..=count).any(|seed| catch_unwind(AssertUnwindSafe(|| with_broken(rule, || test(seed)))).is_err())
}
