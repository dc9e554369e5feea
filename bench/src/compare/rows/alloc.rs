//! The space allocator alone, on a map of 1 TiB that is 95 % full and old.
//!
//! It ages as the filesystem ages it: blocks of files are overwritten at random, each overwrite allocates one block and frees
//! another, and every so often all of it is committed: frees applied, records of all changed regions encoded (and thrown away:
//! there is no tree here), freed blocks released. All free space has been used and freed ten times then, and lies all over the map,
//! in pieces of one block mostly.
//!
//! A pair is what an overwrite asks of the allocator: one block allocated, one given up. The frees are applied by the commits;
//! what these add to a pair is told beside the figure.
//!
//! CPU time counts, whatever `--clock` says: nothing here waits.

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::time::Duration;

use fs_core::BlockAddr;
use fs_core::internals::{Allocator, Generation, Need, Run, Stop, Stream, group_of};
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::compare::lab::Lab;
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::failure::{Doing, Failure, Result};
use crate::sys::{Clock, Pinned, ticks};
use crate::units;

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[
    Row {
        metric: "alloc_free_ns_95_full",
        unit: "ns",
        peer_name: None,
        figure: Figure::Ours,
        goal: Some(Goal::AtMost(50.0)),
        on_device: false,
        about: "allocate one block and free another, on a map of 1 TiB that random overwrites and commits have aged, 95 % full",
        prepare: |lab| Ok(Box::new(Mean(Aged::take(lab)?))),
    },
    Row {
        metric: "alloc_free_p9999_over_median",
        unit: "x",
        peer_name: None,
        figure: Figure::Ours,
        goal: Some(Goal::AtMost(20.0)),
        on_device: false,
        about: "the same pair on the same map: the time that one in 10,000 exceeds, by the median",
        prepare: |lab| Ok(Box::new(Tail { aged: Aged::take(lab)?, seen: Cell::default() })),
    },
];

const BLOCK: u64 = 4096;
/// Blocks of the map: 1 TiB.
const BLOCKS: u64 = (1 << 40) / BLOCK;
const PERCENT: u64 = 95;
/// Pairs between two commits: 4 GiB of overwrites, a third of what is free.
const COMMIT_EVERY: u64 = 1 << 20;
/// How often all of what is free is used and freed until the map is old.
const AGE: u64 = 10;
/// The owner of a block that is being overwritten.
const TAKEN: u32 = u32::MAX;
/// Pairs whose victims are picked together in advance, so that the picking is not part of a measurement. It leaves caches that hold
/// nothing of the allocator's, which the first pairs of a round pay for: they are to be few.
const ROUND: u64 = 1 << 17;

thread_local! {
    /// The map of the row before, for the next one: it takes a minute to age.
    static KEPT: RefCell<Option<Aged>> = const { RefCell::new(None) };
}

/// An old map, and who owns its blocks.
struct Aged {
    space: Allocator,
    /// The device block of each block of the files.
    used: Vec<u32>,
    random: SmallRng,
    open: u64,
    commit_every: u64,
    since_commit: u64,
    /// CPU time of commits, and the pairs that they committed.
    commits: (Duration, u64),
    /// Indices into `used` of the victims of a round.
    victims: Vec<u32>,
    /// Where they lie, and where they go.
    old: Vec<u32>,
    new: Vec<u32>,
    scratch: Vec<u8>,
}

impl Aged {
    /// The map that the row before left, or a new one.
    fn take(lab: &Lab) -> Result<Aged> {
        match KEPT.take() {
            Some(aged) => Ok(aged),
            None => Aged::new(lab, BLOCKS, COMMIT_EVERY),
        }
    }

    fn keep(self) {
        KEPT.set(Some(self));
    }

    /// A map of `blocks` blocks, filled and overwritten until it is old, with a commit after every `commit_every` overwrites.
    fn new(lab: &Lab, blocks: u64, commit_every: u64) -> Result<Aged> {
        let space = Allocator::new(blocks, blocks).doing("make a space map")?;
        let wanted = (blocks / 100 * PERCENT) as usize;
        let mut aged = Aged {
            space,
            used: Vec::with_capacity(wanted),
            random: SmallRng::seed_from_u64(lab.seed),
            open: 1,
            commit_every,
            since_commit: 0,
            commits: (Duration::ZERO, 0),
            victims: Vec::with_capacity(ROUND as usize),
            old: Vec::with_capacity(ROUND as usize),
            new: Vec::with_capacity(ROUND as usize),
            scratch: Vec::new(),
        };
        let bar = lab.bars.steps("fill the map", wanted as u64);
        while aged.used.len() < wanted {
            let run = aged.allocate(((wanted - aged.used.len()) as u64).min(8192))?;
            aged.used.extend((run.start.0..run.start.0 + run.len).map(|block| block as u32));
            bar.set_position(aged.used.len() as u64);
        }
        aged.commit()?;
        bar.finish_and_clear();
        let overwrites = AGE * (blocks - wanted as u64);
        let bar = lab.bars.steps("age the map", overwrites);
        let mut done = 0;
        while done < overwrites {
            done += aged.round(|aged, at| aged.pair(at))?;
            bar.set_position(done);
        }
        bar.finish_and_clear();
        aged.commits = (Duration::ZERO, 0);
        Ok(aged)
    }

    /// Overwrites [`ROUND`] random blocks, or somewhat less, by `pair`, and commits when it is time. Returns how many.
    #[inline(always)]
    fn round(&mut self, mut pair: impl FnMut(&mut Aged, usize) -> Result<()>) -> Result<u64> {
        self.begin_round();
        for at in 0..self.victims.len() {
            pair(self, at)?;
        }
        self.end_round()
    }

    /// Picks victims. Their owners are looked up here, which is a cache miss each that is not the allocator's.
    fn begin_round(&mut self) {
        let len = self.used.len() as u32;
        self.victims.clear();
        self.old.clear();
        self.new.clear();
        let random = &mut self.random;
        self.victims.extend((0..ROUND.min(self.commit_every)).map(|_| random.random_range(0..len)));
        let used = &mut self.used;
        // Who is picked twice is overwritten once.
        self.victims.retain(|&victim| {
            used[victim as usize] != TAKEN && {
                self.old.push(std::mem::replace(&mut used[victim as usize], TAKEN));
                true
            }
        });
    }

    /// What an overwrite of the victim `at` asks of the allocator.
    #[inline(always)]
    fn pair(&mut self, at: usize) -> Result<()> {
        let run = match self.space.allocate(Stream::Data, 1, 1, None) {
            Ok(run) => run,
            // While the map is young: part of it was never asked for.
            Err(Stop::Load(_)) => self.allocate(1)?,
            Err(stop) => return Err(refused(stop)),
        };
        self.new.push(run.start.0 as u32);
        let old = Run::new(BlockAddr(u64::from(self.old[at])), 1);
        self.space.free(old, Generation(self.open)).doing("free a block")
    }

    /// The victims have their new places; commits if it is time.
    fn end_round(&mut self) -> Result<u64> {
        for (&victim, &new) in self.victims.iter().zip(&self.new) {
            self.used[victim as usize] = new;
        }
        let pairs = self.new.len() as u64;
        self.since_commit += pairs;
        if self.since_commit >= self.commit_every {
            let watch = Clock::Cpu.start();
            self.commit()?;
            self.commits.0 += watch.elapsed();
            self.commits.1 += std::mem::take(&mut self.since_commit);
        }
        Ok(pairs)
    }

    /// A run of up to `want` blocks; loads what is asked for ("nothing is stored").
    #[cold]
    fn allocate(&mut self, want: u64) -> Result<Run> {
        loop {
            match self.space.allocate(Stream::Data, want, 1, None) {
                Ok(run) => return Ok(run),
                Err(Stop::Load(need)) => self.load(need)?,
                Err(stop) => return Err(refused(stop)),
            }
        }
    }

    fn load(&mut self, need: Need) -> Result<()> {
        let result = match need {
            Need::Group(group) => self.space.load_group(group, None),
            Need::Region(region) => {
                self.space.load_group(group_of(region), None).doing("load a group")?;
                self.space.load_region(region, None)
            }
        };
        result.doing("load a part of the map")
    }

    /// A whole cycle: commit, encode all that changed, release.
    fn commit(&mut self) -> Result<()> {
        let generation = Generation(self.open);
        let rejected = self.space.begin_commit(generation, &[]).doing("begin a commit")?;
        if let Some(error) = rejected.first() {
            return Err(Failure::new(format!("a free was rejected (a bug): {error}")));
        }
        while let Some(region) = self.space.pop_dirty_region() {
            self.scratch.clear();
            self.space.encode_region(region, &mut self.scratch).doing("encode a region")?;
        }
        while let Some(group) = self.space.pop_dirty_group() {
            self.scratch.clear();
            self.space.encode_group(group, &mut self.scratch).doing("encode a group")?;
        }
        black_box(&self.scratch);
        self.space.end_commit().doing("end a commit")?;
        self.space.release(generation, &[]).doing("release a generation")?;
        self.open += 1;
        Ok(())
    }

    fn remark(&self) -> String {
        let counts = self.space.counts();
        let full = 100.0 * (counts.total - counts.free) as f64 / counts.total as f64;
        let (time, pairs) = self.commits;
        let commit = match pairs {
            0 => "no commit fell into the samples".to_owned(),
            _ => format!(
                "the commits, each after {} pairs, add {} ns a pair",
                units::count(self.commit_every),
                units::figure(time.as_nanos() as f64 / pairs as f64)
            ),
        };
        format!("{full:.1} % of {} in use; {commit}", units::bytes(counts.total * BLOCK))
    }
}

#[cold]
fn refused(stop: Stop) -> Failure {
    Failure::new(format!("no block although 5 % are free (a bug): {stop}"))
}

/// The mean of a pair.
struct Mean(Aged);

impl Contest for Mean {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let _pinned = Pinned::to_last_core();
        let aged = &mut self.0;
        let (mut time, mut pairs) = (Duration::ZERO, 0u64);
        while time < lab.seconds {
            aged.begin_round();
            let watch = Clock::Cpu.start();
            for at in 0..aged.victims.len() {
                aged.pair(at)?;
            }
            time += watch.elapsed();
            pairs += aged.end_round()?;
        }
        Ok(time.as_nanos() as f64 / pairs as f64)
    }

    fn peer(&mut self, _: &Lab) -> Result<Option<f64>> {
        Ok(None)
    }

    fn remarks(&self) -> Vec<String> {
        vec![self.0.remark()]
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.0.keep();
        Ok(())
    }
}

/// How the slowest pairs compare with most.
struct Tail {
    aged: Aged,
    /// Median and the largest, of the last sample, in ticks.
    seen: Cell<(u64, u64)>,
}

impl Contest for Tail {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let _pinned = Pinned::to_last_core();
        let aged = &mut self.aged;
        let nothing = cost_of_looking();
        // What is above the bounds counts as the upper one: seconds.
        let mut times: Histogram<u64> =
            Histogram::new_with_bounds(1, 1 << 34, 3).doing("make a histogram")?;
        let watch = Clock::Cpu.start();
        while watch.elapsed() < lab.seconds {
            aged.round(|aged, at| {
                let before = ticks();
                aged.pair(at)?;
                times.saturating_record((ticks() - before).saturating_sub(nothing).max(1));
                Ok(())
            })?;
        }
        let median = times.value_at_quantile(0.5);
        self.seen.set((median, times.max()));
        Ok(times.value_at_quantile(0.9999) as f64 / median as f64)
    }

    fn peer(&mut self, _: &Lab) -> Result<Option<f64>> {
        Ok(None)
    }

    fn remarks(&self) -> Vec<String> {
        let (median, max) = self.seen.get();
        let seen =
            format!("median {median} ticks of the CPU's counter, the slowest pair {}", units::count(max));
        vec![self.aged.remark(), seen]
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.aged.keep();
        Ok(())
    }
}

/// Ticks between two looks at the counter with nothing between them.
fn cost_of_looking() -> u64 {
    let look = || {
        let before = ticks();
        ticks() - before
    };
    (0..1000).map(|_| look()).min().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::lab::tests::lab;

    #[test]
    fn an_aged_map_is_full_and_its_free_blocks_lie_all_over() {
        let lab = lab();
        let blocks = 64 * 8192;
        let mut aged = Aged::new(&lab, blocks, 4096).unwrap();
        assert!(aged.open > 10, "{} commits", aged.open);
        let counts = aged.space.counts();
        assert_eq!(counts.total - counts.free, blocks / 100 * PERCENT);
        // No two owners of one block, and each is in use.
        let mut seen = vec![false; blocks as usize];
        for &block in &aged.used {
            assert!(!std::mem::replace(&mut seen[block as usize], true), "block {block} has two owners");
        }
        // Free blocks are in all quarters of the map.
        for quarter in seen.chunks(seen.len() / 4) {
            assert!(quarter.iter().filter(|used| !**used).count() > 100);
        }
        aged.commit().unwrap();
        let mut mean = Mean(aged);
        assert!(mean.ours(&lab).unwrap() > 0.0);
        let mut tail = Tail { aged: mean.0, seen: Cell::default() };
        assert!(tail.ours(&lab).unwrap() >= 1.0);
        assert!(tail.remarks()[0].contains("in use"));
    }
}
