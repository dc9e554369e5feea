//! A naive map -- one state for each block -- beside the real one, with writers, loaders and a metadata tree that take their
//! steps in random order.
//!
//! Two things are compared after each step: every block equals the model; and every block is either unknown or as it was
//! last written, whatever loaders brought and eviction took. The second is rule 1.

use std::collections::HashMap;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::*;

/// Blocks that the model watches.
const WINDOW: u64 = 96;

/// The state of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Unknown,
    Hole,
    Data(u64),
    Preallocated(u64),
    Inline,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    block: Block,
    pinned: bool,
}

/// A write between publication and unpin; its range is locked.
struct Write {
    extents: Vec<NewExtent>,
    inserted: bool,
}

/// A loader between ticket and load.
struct Loader {
    range: BlockRange,
    ticket: LoadTicket,
    events: usize,
    read: Option<Vec<NewExtent>>,
}

/// A punch between its publication and its invalidation.
struct Punch {
    range: BlockRange,
    in_tree: bool,
}

struct World {
    rng: SmallRng,
    /// First block of the window; near a segment's border in some runs.
    base: u64,
    map: ExtentMap,
    model: Vec<Slot>,
    tree: Vec<Block>,
    /// The newest content.
    truth: Vec<Block>,
    /// Checksums that were published, by address.
    sums: HashMap<u64, u32>,
    moved: HashMap<u64, u32>,
    /// Ranges of events, in order.
    events: Vec<BlockRange>,
    writes: Vec<Write>,
    loaders: Vec<Loader>,
    punches: Vec<Punch>,
    next_addr: u64,
    /// Where the last write ended: many go on from there.
    last_end: u64,
    size: u64,
}

fn block_of(mapping: Mapping) -> Block {
    match mapping {
        Mapping::Unknown => Block::Unknown,
        Mapping::Hole => Block::Hole,
        Mapping::Data { addr, .. } => Block::Data(addr.0),
        Mapping::Preallocated { addr } => Block::Preallocated(addr.0),
        Mapping::Inline => Block::Inline,
    }
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = SmallRng::seed_from_u64(seed);
        let base = *[0, (1 << 30) - WINDOW / 2, 3 << 30].choose(&mut rng).unwrap();
        let fresh = rng.random_bool(0.3);
        let block = if fresh { Block::Hole } else { Block::Unknown };
        let size = if fresh { 0 } else { (base + WINDOW) << 12 };
        World {
            base,
            map: if fresh { ExtentMap::new_empty() } else { ExtentMap::new_unloaded(size) },
            model: vec![Slot { block, pinned: false }; WINDOW as usize],
            tree: vec![Block::Hole; WINDOW as usize],
            truth: vec![Block::Hole; WINDOW as usize],
            sums: HashMap::new(),
            moved: HashMap::new(),
            events: Vec::new(),
            writes: Vec::new(),
            loaders: Vec::new(),
            punches: Vec::new(),
            next_addr: 1000,
            last_end: base,
            size,
            rng,
        }
    }

    fn indices(&self, range: BlockRange) -> std::ops::Range<usize> {
        let index = |block: u64| block.clamp(self.base, self.base + WINDOW) - self.base;
        index(range.start().0) as usize..index(range.end().0) as usize
    }

    fn range(&mut self, longest: u64) -> BlockRange {
        let start = self.rng.random_range(0..WINDOW);
        let len = self.rng.random_range(1..=longest.min(WINDOW - start));
        BlockRange::new(FileBlock(self.base + start), len)
    }

    fn locked(&self, range: BlockRange) -> bool {
        self.writes.iter().any(|write| write.extents.iter().any(|e| e.range.overlaps(range)))
            || self.punches.iter().any(|punch| punch.range.overlaps(range))
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..22 => self.begin_write(),
            22..34 => self.insert_into_tree(),
            34..46 => self.unpin(),
            46..54 => self.begin_load(),
            54..62 => self.read_tree(),
            62..72 => self.load(),
            72..76 => self.begin_punch(),
            76..84 => self.go_on_punching(),
            84..88 => self.invalidate(),
            88..92 => self.evict(),
            92..94 => self.truncate(),
            94..97 => self.overwrite_pinned(),
            _ => {
                self.size = self.rng.random_range(0..(self.base + WINDOW) << 12);
                self.map.set_size(self.size);
            }
        }
    }

    fn new_extent(&mut self, range: BlockRange) -> NewExtent {
        if self.rng.random_bool(0.4) {
            self.next_addr += 5;
        }
        let addr = BlockAddr(self.next_addr);
        let len = range.len().0;
        self.next_addr += len;
        let checksum = (len == 1 && self.rng.random_bool(0.7)).then(|| self.rng.random());
        if let Some(checksum) = checksum {
            self.sums.insert(addr.0, checksum);
        }
        let mapping = match self.rng.random_range(0..20) {
            0 => Mapping::Hole,
            1..3 => Mapping::Preallocated { addr },
            3 if len == 1 => Mapping::Inline,
            _ => Mapping::Data { addr, checksum },
        };
        NewExtent { range, mapping }
    }

    fn put(blocks: &mut [Block], from: u64, extent: &NewExtent) {
        for (i, block) in blocks.iter_mut().enumerate() {
            let file_block = FileBlock(from + i as u64);
            if extent.range.contains(file_block) {
                let n = file_block.0 - extent.range.start().0;
                *block = match block_of(extent.mapping) {
                    Block::Data(addr) => Block::Data(addr + n),
                    Block::Preallocated(addr) => Block::Preallocated(addr + n),
                    other => other,
                };
            }
        }
    }

    fn begin_write(&mut self) {
        let mut extents = Vec::new();
        for _ in 0..self.rng.random_range(1..4) {
            let mut range = self.range(6);
            if self.rng.random_bool(0.4) && self.last_end < self.base + WINDOW {
                range = BlockRange::new(FileBlock(self.last_end), 1);
            }
            self.last_end = range.end().0;
            if !self.locked(range) && !extents.iter().any(|e: &NewExtent| e.range.overlaps(range)) {
                let extent = self.new_extent(range);
                extents.push(extent);
            }
        }
        if !extents.is_empty() {
            self.publish(&extents);
            self.writes.push(Write { extents, inserted: false });
        }
    }

    fn publish(&mut self, extents: &[NewExtent]) {
        let size = self.rng.random_bool(0.3).then(|| self.rng.random_range(0..(self.base + WINDOW) << 12));
        self.size = self.size.max(size.unwrap_or(0));
        self.map.publish(PublishWrite { extents, size });
        for extent in extents {
            World::put(&mut self.truth, self.base, extent);
            for index in self.indices(extent.range) {
                self.model[index] = Slot { block: self.truth[index], pinned: true };
            }
            self.events.push(extent.range);
        }
    }

    /// The range lock would not allow it before the older write is unpinned; the map must stand it: the older write's insertion
    /// and unpin may come late, but must leave the newer mapping pinned.
    fn overwrite_pinned(&mut self) {
        let Some(write) = self.writes.choose(&mut self.rng) else { return };
        let Some(extent) = write.extents.choose(&mut self.rng) else { return };
        let range = BlockRange::new(extent.range.start(), 1);
        if !self.punches.iter().any(|punch| punch.range.overlaps(range)) {
            // Addresses tell old from new; inline data and holes have none, so there are none here.
            self.next_addr += 5;
            let newer = NewExtent { range, mapping: at(self.next_addr) };
            self.next_addr += 1;
            self.publish(&[newer]);
            self.writes.push(Write { extents: vec![newer], inserted: false });
        }
    }

    fn insert_into_tree(&mut self) {
        // In order of publication: so does the tree, by the locks above the map.
        if let Some(write) = self.writes.iter_mut().find(|write| !write.inserted) {
            write.inserted = true;
            write.extents.iter().for_each(|extent| World::put(&mut self.tree, self.base, extent));
        }
    }

    fn unpin(&mut self) {
        let Some(index) = self.writes.iter().position(|write| write.inserted) else { return };
        let write = self.writes.remove(index);
        let moved = &mut self.moved;
        self.map.unpin(&write.extents, &mut |addr, sum| {
            moved.insert(addr.0, sum);
        });
        for extent in &write.extents {
            let mut published = vec![Block::Unknown; WINDOW as usize];
            World::put(&mut published, self.base, extent);
            for index in self.indices(extent.range) {
                self.model[index].pinned &= self.model[index].block != published[index];
            }
            self.events.push(extent.range);
        }
    }

    fn begin_load(&mut self) {
        let range = self.range(WINDOW);
        self.loaders.push(Loader {
            range,
            ticket: self.map.load_ticket(),
            events: self.events.len(),
            read: None,
        });
    }

    fn read_tree(&mut self) {
        let Some(index) = self.loaders.iter().position(|loader| loader.read.is_none()) else { return };
        let mut extents: Vec<NewExtent> = Vec::new();
        for index in self.indices(self.loaders[index].range) {
            let file_block = FileBlock(self.base + index as u64);
            let mapping = match self.tree[index] {
                Block::Unknown => unreachable!(),
                Block::Hole => continue,
                Block::Data(addr) => {
                    Mapping::Data { addr: BlockAddr(addr), checksum: self.sums.get(&addr).copied() }
                }
                Block::Preallocated(addr) => Mapping::Preallocated { addr: BlockAddr(addr) },
                Block::Inline => Mapping::Inline,
            };
            extents.push(NewExtent::new(file_block, 1, mapping));
        }
        self.loaders[index].read = Some(extents);
    }

    fn load(&mut self) {
        let ready: Vec<usize> =
            (0..self.loaders.len()).filter(|index| self.loaders[*index].read.is_some()).collect();
        let Some(index) = ready.choose(&mut self.rng) else { return };
        let loader = self.loaders.swap_remove(*index);
        let extents = loader.read.unwrap();
        let moved = &mut self.moved;
        let sink = &mut |addr: BlockAddr, sum| {
            moved.insert(addr.0, sum);
        };
        let outcome = self.map.load(loader.range, loader.ticket, &extents, sink).unwrap();

        let mut loaded = vec![Block::Hole; WINDOW as usize];
        extents.iter().for_each(|extent| World::put(&mut loaded, self.base, extent));
        let mut want = LoadOutcome::default();
        for index in self.indices(loader.range) {
            let block = FileBlock(self.base + index as u64);
            let slot = &mut self.model[index];
            if slot.block != Block::Unknown || slot.pinned {
                want.kept += 1;
            } else if self.events[loader.events..].iter().any(|changed| changed.contains(block)) {
                want.refused += 1;
            } else {
                want.filled += 1;
                slot.block = loaded[index];
            }
        }
        assert_eq!(outcome, want);
    }

    fn begin_punch(&mut self) {
        let range = self.range(20);
        if !self.locked(range) {
            self.map.set_hole(range);
            self.set_hole(range);
            self.punches.push(Punch { range, in_tree: false });
        }
    }

    fn set_hole(&mut self, range: BlockRange) {
        for index in self.indices(range) {
            self.model[index] = Slot { block: Block::Hole, pinned: false };
            self.truth[index] = Block::Hole;
        }
        self.events.push(range);
    }

    fn go_on_punching(&mut self) {
        let Some(punch) = self.punches.first_mut() else { return };
        let range = punch.range;
        if !std::mem::replace(&mut punch.in_tree, true) {
            for index in self.indices(range) {
                self.tree[index] = Block::Hole;
            }
        } else {
            self.punches.remove(0);
            self.invalidate_range(range);
        }
    }

    fn invalidate(&mut self) {
        let range = if self.rng.random_bool(0.1) { BlockRange::ALL } else { self.range(20) };
        self.invalidate_range(range);
    }

    fn invalidate_range(&mut self, range: BlockRange) {
        self.map.invalidate(range);
        for index in self.indices(range) {
            if !self.model[index].pinned {
                self.model[index].block = Block::Unknown;
            }
        }
        self.events.push(range);
    }

    /// What goes is the map's choice; nothing pinned may, and nothing else may change.
    fn evict(&mut self) {
        self.map.evict(self.rng.random_range(0..600));
        let now = self.blocks();
        for (slot, now) in self.model.iter_mut().zip(now) {
            if now.block == Block::Unknown && !slot.pinned {
                slot.block = Block::Unknown;
            }
        }
    }

    fn truncate(&mut self) {
        let to = self.base + self.rng.random_range(0..WINDOW);
        let range = BlockRange::from(FileBlock(to));
        if self.locked(range) {
            return;
        }
        let size = (to << 12).saturating_sub(self.rng.random_range(0..4096));
        if size < self.size {
            self.set_hole(range);
            for index in self.indices(range) {
                self.tree[index] = Block::Hole;
            }
        }
        self.map.truncate(size);
        self.map.invalidate(range);
        for index in self.indices(range) {
            self.model[index].block = Block::Unknown;
        }
        self.events.push(range);
        self.size = size;
    }

    fn blocks(&self) -> Vec<Slot> {
        let guard = pin();
        let view = self.map.view(&guard);
        let slot = |i| {
            let block = FileBlock(self.base + i);
            let entry = view.lookup(block).at(block).expect("an entry that covers its query");
            Slot { block: block_of(entry.mapping()), pinned: entry.is_pinned() }
        };
        (0..WINDOW).map(slot).collect()
    }

    fn compare(&self) {
        self.map.check().unwrap();
        let now = self.blocks();
        assert_eq!(now, self.model);
        assert_eq!(self.map.view(&pin()).size(), self.size);
        for (index, slot) in now.iter().enumerate() {
            let in_transit =
                self.punches.iter().any(|p| p.range.contains(FileBlock(self.base + index as u64)));
            assert!(
                slot.block == Block::Unknown || slot.block == self.truth[index] || in_transit,
                "block {index} is {slot:?}, written was {:?}",
                self.truth[index]
            );
        }
        self.compare_checksums();
    }

    /// A checksum that came with a mapping is in the entry, or was moved.
    fn compare_checksums(&self) {
        let guard = pin();
        for entry in self.map.view(&guard).iter(BlockRange::new(FileBlock(self.base), WINDOW)) {
            for i in 0..entry.len().0 {
                let Some(addr) = entry.data_addr(entry.start().plus(i)) else { continue };
                let Some(sum) = self.sums.get(&addr.0) else { continue };
                let found = match entry.mapping() {
                    Mapping::Data { checksum: Some(checksum), .. } => Some(checksum),
                    _ => self.moved.get(&addr.0).copied(),
                };
                assert_eq!(found, Some(*sum), "checksum of {addr:?}");
            }
        }
    }
}

fn lockstep(seed: u64) {
    let mut world = World::new(seed);
    world.compare();
    for _ in 0..600 {
        world.step();
        world.compare();
    }
}

#[test]
fn the_map_equals_the_model() {
    for_seeds(60, lockstep);
}

#[test]
fn broken_rules_are_noticed() {
    for rule in [
        Mutation::PublishWithoutPin,
        Mutation::LoadOverwrites,
        Mutation::LoadIgnoresChanges,
        Mutation::UnpinUnrecorded,
        Mutation::UnpinIgnoresIdentity,
        Mutation::EvictTakesPinned,
        Mutation::InvalidateDropsPinned,
        Mutation::MergePinned,
        Mutation::MergeIgnoresAddress,
        Mutation::MergeLosesChecksums,
        Mutation::SplitKeepsAddress,
    ] {
        assert!(notices(rule, 20, lockstep), "{rule:?}");
    }
}
