//! A reference model that steps beside the allocator: plain arrays of block states, the values that a tree would hold,
//! and the snapshots to which a crash goes back. A small space tree is part of it, so that commits run the real fixpoint:
//! its nodes are copied on write and live in the space that they describe.
//!
//! `GAUR_SEED` replays a run, `GAUR_STEPS` sets its length.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::super::bits::spans;
use super::super::format::{decode_group, decode_region, encode_group, encode_region};
use super::super::region::WORDS;
use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Used,
    Queued,
    Frozen(u64),
}

/// What is on the device, as of one generation.
#[derive(Clone, Default)]
struct Image {
    generation: u64,
    values: BTreeMap<Need, Vec<u8>>,
    nodes: BTreeMap<u32, u64>,
    files: Vec<Run>,
    free: u64,
}

impl Image {
    fn references(&self) -> BTreeSet<u64> {
        let nodes = self.nodes.values().copied();
        self.files.iter().flat_map(|run| run.start.0..run.end().0).chain(nodes).collect()
    }
}

struct Model {
    rng: SmallRng,
    space: Allocator,
    total: u64,
    /// Regions in which something happens; all others are in use entirely.
    active: BTreeMap<u32, Vec<State>>,
    /// The trees in memory.
    now: Image,
    /// Encoded generations, the durable one first.
    images: VecDeque<Image>,
    /// Blocks that the durable image refers to.
    durable: BTreeSet<u64>,
    /// Handed out, in no tree yet.
    in_flight: Vec<Run>,
    held: Vec<Run>,
    /// Nodes copied in the running commit.
    copied: BTreeSet<u32>,
    max_passes: usize,
}

impl Model {
    fn new(seed: u64, total: u64, active: &[u32], fill: f64) -> Model {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut image = Image { generation: 1, ..Image::default() };
        let mut states = BTreeMap::new();
        let mut counts: BTreeMap<u32, Vec<u16>> = BTreeMap::new();
        for region in 0..total.div_ceil(REGION_BLOCKS) as u32 {
            let base = u64::from(region) * REGION_BLOCKS;
            let blocks = (total - base).min(REGION_BLOCKS);
            let mut free = 0;
            if active.contains(&region) {
                let mut state = vec![State::Free; blocks as usize];
                let mut at = 0;
                while at < blocks {
                    let longest = [2, 20, 500][rng.random_range(0..3)];
                    let len = rng.random_range(1..=longest).min(blocks - at);
                    if rng.random_bool(fill) {
                        state[at as usize..(at + len) as usize].fill(State::Used);
                        image.files.push(run(base + at, len));
                    }
                    at += len;
                }
                free = state.iter().filter(|&&state| state == State::Free).count() as u64;
                if free < blocks || rng.random_bool(0.5) {
                    image.values.insert(Need::Region(RegionId(region)), encoded(&state));
                }
                states.insert(region, state);
            }
            image.free += free;
            counts.entry(region >> GROUP_SHIFT).or_default().push(free as u16);
        }
        for (group, free) in counts {
            let mut value = Vec::new();
            encode_group(&free, &mut value);
            image.values.insert(Need::Group(GroupId(group)), value);
        }
        let space = Allocator::new(total, image.free).unwrap();
        Model {
            rng,
            space,
            total,
            active: states,
            durable: image.references(),
            now: image.clone(),
            images: VecDeque::from([image]),
            in_flight: Vec::new(),
            held: Vec::new(),
            copied: BTreeSet::new(),
            max_passes: 0,
        }
    }

    // ---- states

    fn set(&mut self, run: Run, from: State, to: State) {
        for block in run.start.0..run.end().0 {
            let (region, at) = ((block / REGION_BLOCKS) as u32, (block % REGION_BLOCKS) as usize);
            let state = &mut self.active.get_mut(&region).expect("only active regions change")[at];
            assert_eq!(*state, from, "block {block} of {run:?} should become {to:?}");
            *state = to;
        }
    }

    fn count(&self, wanted: impl Fn(State) -> bool) -> u64 {
        self.active.values().flatten().filter(|&&state| wanted(state)).count() as u64
    }

    fn longest_free(&self) -> u64 {
        let mut longest = 0;
        for states in self.active.values() {
            let mut len = 0;
            for state in states {
                len = if *state == State::Free { len + 1 } else { 0 };
                longest = longest.max(len);
            }
        }
        longest
    }

    fn load(&mut self, need: Need) {
        let value = self.now.values.get(&need).cloned();
        match need {
            Need::Group(group) => self.space.load_group(group, value.as_deref()).unwrap(),
            Need::Region(region) => {
                let full = || encoded(&vec![State::Used; self.blocks(region.0) as usize]);
                let inactive = !self.active.contains_key(&region.0);
                let value = value.or_else(|| inactive.then(full));
                self.space.load_region(region, value.as_deref()).unwrap();
            }
        }
    }

    fn blocks(&self, region: u32) -> u64 {
        (self.total - u64::from(region) * REGION_BLOCKS).min(REGION_BLOCKS)
    }

    // ---- operations

    fn allocate(&mut self, stream: Stream, want: u64, min: u64, hint: Option<BlockAddr>) -> Option<Run> {
        loop {
            match self.space.allocate(stream, want, min, hint) {
                Ok(got) => {
                    self.handed_out(got, want, min);
                    return Some(got);
                }
                Err(Stop::Load(need)) => {
                    assert!(!self.space.is_loaded(need), "{need:?} is asked for twice");
                    self.load(need);
                }
                Err(Stop::NoSpace) => {
                    let longest = self.longest_free();
                    assert!(longest < min.next_power_of_two(), "no {min} blocks, but a run of {longest}");
                    return None;
                }
            }
        }
    }

    fn handed_out(&mut self, got: Run, want: u64, min: u64) {
        assert!(min <= got.len && got.len <= want, "{got:?} for {min}..={want}");
        assert_eq!(
            got.start.0 / REGION_BLOCKS,
            (got.end().0 - 1) / REGION_BLOCKS,
            "{got:?} crosses a region"
        );
        let blocks = got.start.0..got.end().0;
        let named = self.durable.range(blocks.clone()).next();
        assert_eq!(named, None, "handed out, but the durable generation refers to it");
        let held = self.held.iter().find(|h| h.start.0 < blocks.end && blocks.start < h.end().0);
        assert_eq!(held, None, "handed out, but held");
        self.set(got, State::Free, State::Used);
    }

    fn allocate_something(&mut self) {
        let most = [1, 8, 40, 300, 9000][self.rng.random_range(0..5)];
        let want = self.rng.random_range(1..=most);
        let min = if self.rng.random_bool(0.7) { 1 } else { self.rng.random_range(1..=want) };
        let hint = self.rng.random_bool(0.3).then(|| match self.now.files.choose(&mut self.rng) {
            Some(file) if self.rng.random_bool(0.9) => file.end(),
            _ => BlockAddr(self.rng.random_range(0..self.total + 5)),
        });
        if self.rng.random_bool(0.2) {
            if let Some(got) = self.allocate(Stream::Metadata, 1, 1, hint) {
                self.now.files.push(got);
            }
        } else if let Some(got) = self.allocate(Stream::Data, want, min, hint) {
            self.in_flight.push(got);
        }
    }

    fn settle_in_flight(&mut self) {
        if self.in_flight.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.in_flight.len());
        let got = self.in_flight.swap_remove(at);
        if self.rng.random_bool(0.8) {
            self.now.files.push(got);
        } else {
            self.space.free_now(got).unwrap();
            self.set(got, State::Used, State::Free);
            assert!(self.space.free_now(got).is_err(), "freed twice");
        }
    }

    /// Frees a part of a file, or all of it.
    fn free_something(&mut self) {
        if self.now.files.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.now.files.len());
        let file = self.now.files.swap_remove(at);
        let from = if self.rng.random_bool(0.5) { 0 } else { self.rng.random_range(0..file.len) };
        let len = if self.rng.random_bool(0.5) {
            file.len - from
        } else {
            self.rng.random_range(1..=file.len - from)
        };
        let part = run(file.start.0 + from, len);
        if from > 0 {
            self.now.files.push(run(file.start.0, from));
        }
        if part.end() < file.end() {
            self.now.files.push(run(part.end().0, file.end().0 - part.end().0));
        }
        self.space.free(part, Generation(self.now.generation + 1)).unwrap();
        self.set(part, State::Used, State::Queued);
    }

    fn hold_something(&mut self) {
        if self.rng.random_bool(0.5)
            && let Some(file) = self.now.files.choose(&mut self.rng)
        {
            let from = self.rng.random_range(0..file.len);
            let hold = run(file.start.0 + from, self.rng.random_range(1..=file.len - from));
            if self.held.iter().all(|h| h.end() <= hold.start || hold.end() <= h.start) {
                self.held.push(hold);
                self.held.sort();
            }
        } else if !self.held.is_empty() {
            self.held.remove(self.rng.random_range(0..self.held.len()));
        }
    }

    /// Promises are kept without a stop, whatever the other stream does.
    fn promise(&mut self) {
        let blocks = self.rng.random_range(1..200);
        let ready = loop {
            match self.space.ensure_ready(Stream::Metadata, blocks) {
                Err(Stop::Load(need)) => self.load(need),
                done => break done,
            }
        };
        if ready.is_err() {
            assert!(self.count(|state| state == State::Free) < blocks);
            return;
        }
        for _ in 0..blocks {
            if self.rng.random_bool(0.1) {
                let want = self.rng.random_range(1..100);
                match self.space.allocate(Stream::Data, want, 1, None) {
                    Ok(got) => {
                        self.handed_out(got, want, 1);
                        self.in_flight.push(got);
                    }
                    Err(Stop::Load(need)) => self.load(need),
                    Err(Stop::NoSpace) => {}
                }
            }
            let got = self.space.allocate(Stream::Metadata, 1, 1, None).expect("promised");
            self.handed_out(got, 1, 1);
            self.now.files.push(got);
        }
    }

    // ---- the commit

    fn commit(&mut self) {
        let generation = self.now.generation + 1;
        let open = Generation(generation);
        loop {
            let needs = self.space.needs_for_commit(open, self.rng.random_range(1..50));
            if needs.is_empty() {
                break;
            }
            for need in needs {
                if let Need::Region(region) = need
                    && !self.space.is_loaded(Need::Group(group_of(region)))
                {
                    continue;
                }
                self.load(need);
            }
        }
        // A path per leaf at most, and a few for growth.
        let most = 2 * self.now.nodes.len() as u64 + 16;
        loop {
            match self.space.ensure_ready(Stream::Metadata, most) {
                Err(Stop::Load(need)) => self.load(need),
                Err(Stop::NoSpace) => return self.make_room(),
                Ok(()) => break,
            }
        }
        let unpublished = self.in_flight.clone();
        assert_eq!(self.space.begin_commit(open, &unpublished), Ok(Vec::new()));
        let states = self.active.values_mut().flatten().filter(|state| **state == State::Queued);
        states.for_each(|state| *state = State::Frozen(generation));

        self.copied.clear();
        let mut passes = 0;
        while self.space.dirty() > 0 {
            passes += 1;
            assert!(passes < 20, "the fixpoint does not end");
            let mut value = Vec::new();
            while let Some(region) = self.space.pop_dirty_region() {
                self.touch(region.0 / 3, generation);
                value.clear();
                self.space.encode_region(region, &mut value).unwrap();
                self.now.values.insert(Need::Region(region), value.clone());
            }
            while let Some(group) = self.space.pop_dirty_group() {
                self.touch((1 << 20) + group.0 / 3, generation);
                value.clear();
                self.space.encode_group(group, &mut value).unwrap();
                self.now.values.insert(Need::Group(group), value.clone());
            }
        }
        self.max_passes = self.max_passes.max(passes);
        self.now.free = self.space.persisted_free();
        self.now.generation = generation;
        let image = self.now.clone();
        self.space.end_commit().unwrap();
        self.space.ensure_ready(Stream::Metadata, 0).unwrap();
        self.verify(&image);
        self.images.push_back(image);
    }

    /// Changes a leaf: its path is copied if this commit has not done so.
    fn touch(&mut self, leaf: u32, generation: u64) {
        for node in [leaf, (1 << 30) + leaf / 8, u32::MAX] {
            if !self.copied.insert(node) {
                continue;
            }
            let got = self.space.allocate(Stream::Metadata, 1, 1, None).expect("promised to the commit");
            self.handed_out(got, 1, 1);
            let Some(old) = self.now.nodes.insert(node, got.start.0) else { continue };
            let old = run(old, 1);
            loop {
                match self.space.free_in_commit(old, Generation(generation)) {
                    Err(SpaceError::NotLoaded(need)) => self.load(need),
                    done => break done.unwrap(),
                }
            }
            self.set(old, State::Used, State::Frozen(generation));
        }
    }

    /// What was encoded is what is referenced.
    fn verify(&self, image: &Image) {
        let references = image.references();
        let mut free = 0;
        for (&region, states) in &self.active {
            let blocks = states.len() as u32;
            let value = image.values.get(&Need::Region(RegionId(region)));
            let persist = value.map_or([0; WORDS], |value| decode_region(value, blocks).unwrap().0);
            let base = u64::from(region) * REGION_BLOCKS;
            let mut used = 0;
            for at in 0..blocks {
                let stored = persist[(at / 64) as usize] >> (at % 64) & 1 == 1;
                let referenced = references.contains(&(base + u64::from(at)));
                assert_eq!(
                    stored,
                    referenced,
                    "generation {}: block {}",
                    image.generation,
                    base + u64::from(at)
                );
                used += u32::from(stored);
            }
            let group = image.values.get(&Need::Group(group_of(RegionId(region)))).unwrap();
            let i = u64::from(region) % GROUP_REGIONS;
            let at = 4 + 2 * i as usize;
            assert_eq!(u32::from(u16::from_le_bytes([group[at], group[at + 1]])), blocks - used);
            decode_group(group, (group.len() - 4) / 2, |_| 8192).unwrap();
            free += u64::from(blocks - used);
        }
        assert_eq!(image.free, free, "superblock");
    }

    /// Too full to commit: what is in flight fails.
    fn make_room(&mut self) {
        let _ = self.space.ensure_ready(Stream::Metadata, 0);
        for got in std::mem::take(&mut self.in_flight) {
            self.space.free_now(got).unwrap();
            self.set(got, State::Used, State::Free);
        }
        self.durable_and_release();
    }

    /// The oldest encoded generation becomes durable; perhaps its blocks are released.
    fn durable_and_release(&mut self) {
        if self.images.len() > 1 {
            self.images.pop_front();
            self.durable = self.images[0].references();
        }
        if self.rng.random_bool(0.7) {
            let up_to = self.images[0].generation;
            if up_to < 2 {
                return;
            }
            let held = self.held.clone();
            self.space.release(Generation(up_to), &held).unwrap();
            for (&region, states) in &mut self.active {
                for (at, state) in states.iter_mut().enumerate() {
                    let block = u64::from(region) * REGION_BLOCKS + at as u64;
                    let is_held = || held.iter().any(|h| (h.start.0..h.end().0).contains(&block));
                    if matches!(*state, State::Frozen(generation) if generation <= up_to) && !is_held() {
                        *state = State::Free;
                    }
                }
            }
        }
    }

    fn crash(&mut self) {
        self.now = self.images[0].clone();
        self.images.truncate(1);
        self.in_flight.clear();
        self.held.clear();
        let references = self.now.references();
        for (&region, states) in &mut self.active {
            for (at, state) in states.iter_mut().enumerate() {
                let used = references.contains(&(u64::from(region) * REGION_BLOCKS + at as u64));
                *state = if used { State::Used } else { State::Free };
            }
        }
        self.space = Allocator::new(self.total, self.now.free).unwrap();
    }

    // ---- the run

    fn step(&mut self) {
        match self.rng.random_range(0..1000) {
            0..400 => self.allocate_something(),
            400..600 => self.settle_in_flight(),
            600..850 => self.free_something(),
            850..900 => self.hold_something(),
            900..905 => self.promise(),
            905..940 => self.space.evict_clean(self.rng.random_range(0..6)),
            940..965 => self.commit(),
            965..995 => self.durable_and_release(),
            995..998 => self.crash(),
            _ => self.space.check().unwrap(),
        }
    }

    fn compare(&self) {
        let used = |state| state == State::Used;
        let inactive = (0..self.total.div_ceil(REGION_BLOCKS) as u32)
            .filter(|region| !self.active.contains_key(region))
            .map(|region| self.blocks(region))
            .sum::<u64>();
        let counts = Counts {
            total: self.total,
            free: self.total - inactive - self.count(used),
            available_now: self.count(|state| state == State::Free),
            pending: self.count(|state| matches!(state, State::Queued | State::Frozen(_))),
        };
        assert_eq!(self.space.counts(), counts);
    }
}

fn encoded(states: &[State]) -> Vec<u8> {
    let mut persist = [0; WORDS];
    for (at, _) in states.iter().enumerate().filter(|(_, state)| **state == State::Used) {
        spans(at as u32, 1).for_each(|(w, mask)| persist[w] |= mask);
    }
    let mut value = Vec::new();
    let used = states.iter().filter(|&&state| state == State::Used).count();
    encode_region(&persist, used as u32, &mut value);
    value
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn lockstep(total: u64, active: &[u32], fill: f64) {
    let clock = || std::time::UNIX_EPOCH.elapsed().map_or(1, |now| now.as_nanos() as u64);
    let seed = number("GAUR_SEED").unwrap_or_else(clock);
    let steps = number("GAUR_STEPS").unwrap_or(6000);
    println!("GAUR_SEED={seed}");
    let mut model = Model::new(seed, total, active, fill);
    for step in 0..steps {
        model.step();
        if step % 64 == 0 {
            model.compare();
        }
    }
    model.space.check().unwrap();
    println!("{} commits, {} passes at most", model.now.generation, model.max_passes);
}

#[test]
fn lockstep_one_short_region() {
    lockstep(3000, &[0], 0.3);
}

#[test]
fn lockstep_three_regions_nearly_full() {
    lockstep(2 * REGION_BLOCKS + 777, &[0, 1, 2], 0.9);
}

#[test]
fn lockstep_scattered_over_groups() {
    let total = (2 * 512 + 2) * REGION_BLOCKS + 99;
    lockstep(total, &[3, 4, 200, 511, 512, 700, 1023, 1025, 1026], 0.6);
}
