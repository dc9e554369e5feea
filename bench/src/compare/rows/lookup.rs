//! Lookups in the extent map of one file, alone: no reads, no filesystem around it.
//!
//! The map is one that random overwrites have made: a file in one run, each block of it then overwritten once in random order,
//! through the map's own publish and unpin, as a write does. So every extent is one block, neighbours lie far from each other on
//! the device, and the nodes of the tree are as full as random splits leave them. What the peer holds is the same, entered in
//! ascending order, which is the best that can happen to a `BTreeMap`.
//!
//! CPU time counts, whatever `--clock` says: nothing here waits. Random positions are made beforehand, round by round; a dependent
//! position is part of the time on both sides (two multiplications).

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Duration;

use fs_core::BlockAddr;
use fs_core::internals::{
    BlockRange, Entry, ExtentMap, FileBlock, LOOKUP_LANES, Mapping, NewExtent, PublishWrite, View, pin,
};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::compare::lab::Lab;
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::failure::{Failure, Result};
use crate::sys::{Clock, Pinned};
use crate::units;

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[
    Row {
        metric: "lookup_batched_ns_1e3",
        goal: Some(Goal::AtMost(12.0)),
        about: "one lookup of 16 that are looked up together, at random places of a map of 1e3 extents of one block",
        prepare: |lab| Ok(Box::new(Batched::prepare(lab, SMALL)?)),
        ..LOOKUP
    },
    Row {
        metric: "lookup_batched_ns_1e7",
        goal: Some(Goal::AtMost(60.0)),
        about: "the same in a map of 1e7 extents",
        prepare: |lab| Ok(Box::new(Batched::prepare(lab, LARGE)?)),
        ..LOOKUP
    },
    Row {
        metric: "lookup_dependent_ns_1e3",
        peer_name: Some("std BTreeMap"),
        goal: Some(Goal::AtMost(40.0)),
        about: "one lookup whose position follows from the answer before, in a map of 1e3 extents of one block",
        prepare: |lab| Ok(Box::new(Dependent::prepare(lab, SMALL)?)),
        ..LOOKUP
    },
    Row {
        metric: "lookup_dependent_ns_1e7",
        peer_name: Some("std BTreeMap"),
        goal: Some(Goal::AtMost(600.0)),
        about: "the same in a map of 1e7 extents",
        prepare: |lab| Ok(Box::new(Dependent::prepare(lab, LARGE)?)),
        ..LOOKUP
    },
];

const LOOKUP: Row = Row {
    metric: "",
    unit: "ns",
    peer_name: None,
    figure: Figure::Ours,
    goal: None,
    on_device: false,
    about: "",
    prepare: |_| Err(Failure::new("a row without a contest (a bug)")),
};

const SMALL: u32 = 1_000;
const LARGE: u32 = 10_000_000;
/// Extents of one publication while the map is made.
const TOGETHER: usize = 64;
/// Lookups between two looks at the clock.
const ROUND: u32 = 1 << 14;
/// Where the overwrites go on the device; the first run lies at 0.
const NEW: u64 = 1 << 32;

/// A map that random overwrites have made of a file of one run.
fn overwritten(lab: &Lab, blocks: u32) -> Result<ExtentMap> {
    let map = ExtentMap::new_empty();
    let whole =
        NewExtent::new(FileBlock(0), blocks.into(), Mapping::Data { addr: BlockAddr(0), checksum: None });
    let publish = |extents: &[NewExtent], size| {
        map.publish(PublishWrite { extents, size });
        map.unpin(extents, &mut |_, _| {});
    };
    publish(&[whole], Some(u64::from(blocks) * 4096));
    let mut order: Vec<u32> = (0..blocks).collect();
    order.shuffle(&mut SmallRng::seed_from_u64(lab.seed));
    let bar = lab.bars.steps("overwrite the file", blocks.into());
    let mut extents = Vec::with_capacity(TOGETHER);
    for (number, &block) in order.iter().enumerate() {
        let mapping = Mapping::Data { addr: BlockAddr(NEW + number as u64), checksum: Some(block) };
        extents.push(NewExtent::new(FileBlock(block.into()), 1, mapping));
        if extents.len() == TOGETHER || number + 1 == order.len() {
            publish(&extents, None);
            extents.clear();
            bar.set_position(number as u64);
        }
    }
    bar.finish_and_clear();
    // Where chance put neighbours side by side they are one extent.
    let entries = map.entries();
    if entries < u64::from(blocks / 10 * 9) {
        let (entries, blocks) = (units::count(entries), units::count(blocks.into()));
        return Err(Failure::new(format!("{entries} extents after {blocks} overwrites (a bug)")));
    }
    Ok(map)
}

/// CPU nanoseconds of one of the [`ROUND`] lookups of `round`, over the time of a sample; what `between` does is not timed.
fn ns_per_lookup<T>(lab: &Lab, state: &mut T, between: impl Fn(&mut T), round: impl Fn(&mut T)) -> f64 {
    let _pinned = Pinned::to_last_core();
    let (mut time, mut lookups) = (Duration::ZERO, 0u64);
    while time < lab.seconds {
        between(state);
        let watch = Clock::Cpu.start();
        round(state);
        time += watch.elapsed();
        lookups += u64::from(ROUND);
    }
    time.as_nanos() as f64 / lookups as f64
}

fn size(map: &ExtentMap) -> String {
    let (entries, bytes) = (map.entries(), map.memory_bytes());
    let each = bytes as f64 / entries as f64;
    format!("{} extents in {}, {each:.1} bytes each", units::count(entries), units::bytes(bytes))
}

struct Batched {
    map: ExtentMap,
    blocks: u64,
    random: SmallRng,
    /// The positions of a round.
    at: Vec<FileBlock>,
}

impl Batched {
    fn prepare(lab: &Lab, blocks: u32) -> Result<Batched> {
        let random = SmallRng::seed_from_u64(!lab.seed);
        Ok(Batched { map: overwritten(lab, blocks)?, blocks: blocks.into(), random, at: Vec::new() })
    }
}

impl Contest for Batched {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let make = |row: &mut Batched| {
            let Batched { blocks, random, at, .. } = row;
            at.clear();
            at.extend((0..ROUND).map(|_| FileBlock(random.random_range(0..*blocks))));
        };
        Ok(ns_per_lookup(lab, self, make, |row| {
            let guard = pin();
            let view = row.map.view(&guard);
            let mut found = [Entry::EMPTY; LOOKUP_LANES];
            for at in row.at.chunks_exact(LOOKUP_LANES) {
                view.lookup_batch(at, &mut found);
                black_box(&found);
            }
        }))
    }

    fn peer(&mut self, _: &Lab) -> Result<Option<f64>> {
        Ok(None)
    }

    fn remarks(&self) -> Vec<String> {
        vec![size(&self.map)]
    }
}

/// What the peer keeps of an extent: length, device block, checksum.
type PeerExtent = (u32, u64, u32);

struct Dependent {
    map: ExtentMap,
    peer: BTreeMap<u64, PeerExtent>,
    blocks: u64,
    at: u64,
}

impl Dependent {
    fn prepare(lab: &Lab, blocks: u32) -> Result<Dependent> {
        let map = overwritten(lab, blocks)?;
        let peer = same_content(&map, blocks.into());
        Ok(Dependent { map, peer, blocks: blocks.into(), at: lab.seed % u64::from(blocks) })
    }
}

fn same_content(map: &ExtentMap, blocks: u64) -> BTreeMap<u64, PeerExtent> {
    let guard = pin();
    let view: View<'_> = map.view(&guard);
    let entries = view.iter(BlockRange::new(FileBlock(0), blocks));
    entries
        .filter_map(|entry| match entry.mapping() {
            Mapping::Data { addr, checksum } => {
                Some((entry.start().0, (entry.len().0 as u32, addr.0, checksum.unwrap_or(0))))
            }
            _ => None,
        })
        .collect()
}

/// A block that follows from a device address, anywhere in the file.
#[inline(always)]
fn next(addr: u64, blocks: u64) -> u64 {
    let mixed = (addr ^ addr >> 15).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((u128::from(mixed) * u128::from(blocks)) >> 64) as u64
}

impl Contest for Dependent {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        Ok(ns_per_lookup(
            lab,
            self,
            |_| {},
            |row| {
                let guard = pin();
                let view = row.map.view(&guard);
                let mut at = row.at;
                for step in 0..u64::from(ROUND) {
                    let addr = view.lookup(FileBlock(at)).data_addr(FileBlock(at)).unwrap_or(BlockAddr(0));
                    // The step keeps it from going round in a small circle.
                    at = next(addr.0 + step, row.blocks);
                }
                row.at = black_box(at);
            },
        ))
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        Ok(Some(ns_per_lookup(
            lab,
            self,
            |_| {},
            |row| {
                let mut at = row.at;
                for step in 0..u64::from(ROUND) {
                    let found = row.peer.range(..=at).next_back();
                    let addr = match found {
                        Some((&start, &(len, addr, _))) if at - start < u64::from(len) => addr + (at - start),
                        _ => 0,
                    };
                    at = next(addr + step, row.blocks);
                }
                row.at = black_box(at);
            },
        )))
    }

    fn remarks(&self) -> Vec<String> {
        vec![size(&self.map)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::lab::tests::lab;

    #[test]
    fn both_sides_of_a_dependent_lookup_hold_the_same_and_walk_the_same_way() {
        let lab = lab();
        let mut row = Dependent::prepare(&lab, 5_000).unwrap();
        let guard = pin();
        let view = row.map.view(&guard);
        for block in 0..5_000 {
            let ours = view.lookup(FileBlock(block)).data_addr(FileBlock(block)).unwrap().0;
            let (start, (len, addr, _)) = row.peer.range(..=block).next_back().unwrap();
            assert!(block < start + u64::from(*len));
            assert_eq!(ours, addr + (block - start), "block {block}");
            assert!(ours >= NEW, "block {block} was never overwritten");
        }
        drop(guard);
        assert!(row.ours(&lab).unwrap() > 0.0);
        assert!(row.peer(&lab).unwrap().unwrap() > 0.0);
        // The positions go all over the file, and do not settle down.
        let mut seen = std::collections::HashSet::new();
        let mut at = 1;
        for step in 0..10_000 {
            let (start, (_, addr, _)) = row.peer.range(..=at).next_back().unwrap();
            seen.insert(at);
            at = next(addr + (at - start) + step, 5_000);
        }
        assert!(seen.len() > 3_000, "{} different positions", seen.len());
    }

    #[test]
    fn a_batch_is_answered_from_a_map_of_single_blocks() {
        let lab = lab();
        let mut row = Batched::prepare(&lab, 2_000).unwrap();
        assert!(row.map.entries() >= 1_990);
        assert!(row.ours(&lab).unwrap() > 0.0);
        assert!(row.remarks()[0].contains("extents in"));
    }
}
