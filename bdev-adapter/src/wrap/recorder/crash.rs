//! Crash states: what the medium may hold after power was lost at some point of a recording.
//!
//! The model, for a crash at point P:
//! - *Durable* is a change that completed with FUA before P, or that completed before a flush of its epoch was submitted
//!   which completed before P.
//! - *Volatile* is every other change submitted before P: of each, any set of blocks may have reached the medium. A
//!   change that failed stays volatile for good.
//! - If one change completed before another was submitted, the later one wins where they overlap. Changes in flight
//!   together may land in either order: each is given a random moment between its submission and its completion.
//! - A durable unmap reads as zeroes. (The contract allows anything; zeroes are what devices mostly do.)
//!
//! [`CrashLog::state`] builds one state; [`CrashLog::crash_states`] walks the points and yields several for each. The
//! same log, point and [`Survive`] always give the same state, so a failure is replayed from these two values.

use hashbrown::{HashMap, HashSet};

use super::{Change, Event, Record};
use crate::image::Image;
use crate::wrap::random::mix;

/// A recording.
#[derive(Debug, Clone)]
pub struct CrashLog {
    base: Image,
    events: Vec<Event>,
    records: Vec<Record>,
}

/// Which volatile changes reached the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survive {
    /// None of them.
    Nothing,
    /// All of them, whole.
    Everything,
    /// A subset that depends on this seed; some of them torn at any block.
    Random(u64),
}

/// At which points states are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Points {
    /// At every one.
    All,
    /// After every completed flush and FUA write, and at the end.
    Durable,
    /// At about one in so many, chosen by the seed, and where [`Durable`](Self::Durable) is.
    Sampled(usize),
}

/// Which states are built.
#[derive(Debug, Clone)]
pub struct CrashOptions {
    /// At which points.
    pub points: Points,
    /// Random subsets a point; states with nothing and with everything are built in any case.
    pub subsets: usize,
}

impl Default for CrashOptions {
    fn default() -> CrashOptions {
        CrashOptions { points: Points::Sampled(4), subsets: 2 }
    }
}

/// What the medium may hold after a crash.
#[derive(Debug, Clone)]
pub struct CrashState {
    /// Events before the crash.
    pub point: usize,
    /// Which volatile changes survived.
    pub survive: Survive,
    /// How many volatile changes there were.
    pub volatile: usize,
    /// Of how many of them some blocks survived and others did not.
    pub torn: usize,
    /// The content of the medium.
    pub image: Image,
}

impl CrashLog {
    pub(super) fn new(base: Image, events: Vec<Event>, records: Vec<Record>) -> CrashLog {
        CrashLog { base, events, records }
    }

    /// What happened, in order; the last point is the length.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The changes and flushes, in the order of their submission.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// One state after a crash at `point` (beyond the end counts as the end).
    pub fn state(&self, point: usize, survive: Survive) -> CrashState {
        let mut medium = Medium::new(self);
        medium.advance_to(point.min(self.events.len()));
        medium.state(survive)
    }

    /// The indices of the records that are volatile at `point`.
    pub fn volatile_at(&self, point: usize) -> Vec<usize> {
        let mut medium = Medium::new(self);
        medium.advance_to(point.min(self.events.len()));
        medium.volatile
    }

    /// The state after a crash at `point` in which exactly the volatile records of `subset` reached the medium, whole.
    pub fn image_at(&self, point: usize, subset: &[usize]) -> Image {
        let mut medium = Medium::new(self);
        medium.advance_to(point.min(self.events.len()));
        let mut image = medium.durable.clone();
        for index in subset.iter().filter(|index| medium.volatile.contains(index)) {
            medium.apply_volatile(&mut image, *index, |_| true);
        }
        image
    }

    /// States at many points, in the order of the points.
    pub fn crash_states(&self, seed: u64, options: CrashOptions) -> CrashStates<'_> {
        CrashStates { medium: Medium::new(self), seed, options, next: 0, started: false }
    }
}

/// See [`CrashLog::crash_states`].
pub struct CrashStates<'a> {
    medium: Medium<'a>,
    seed: u64,
    options: CrashOptions,
    /// The next state at the present point.
    next: usize,
    started: bool,
}

impl Iterator for CrashStates<'_> {
    type Item = CrashState;

    fn next(&mut self) -> Option<CrashState> {
        // With nothing volatile there is one state only.
        let states = if self.medium.volatile.is_empty() { 1 } else { 2 + self.options.subsets };
        if !self.started {
            self.started = true;
        } else if self.next >= states {
            self.next = 0;
            self.advance()?;
        }
        let survive = match self.next {
            0 => Survive::Nothing,
            1 => Survive::Everything,
            number => Survive::Random(mix(mix(self.seed ^ mix(self.medium.point as u64)) ^ number as u64)),
        };
        self.next += 1;
        Some(self.medium.state(survive))
    }
}

impl CrashStates<'_> {
    /// Goes to the next point that is wanted.
    fn advance(&mut self) -> Option<()> {
        let end = self.medium.log.events.len();
        while self.medium.point < end {
            self.medium.advance_to(self.medium.point + 1);
            if self.medium.point == end || self.is_wanted(self.medium.point) {
                return Some(());
            }
        }
        None
    }

    fn is_wanted(&self, point: usize) -> bool {
        let durable = || match self.medium.log.events[point - 1] {
            Event::Completed(index) => {
                let record = &self.medium.log.records[index];
                record.fua || matches!(record.change, Change::Flush { .. })
            }
            _ => false,
        };
        match self.options.points {
            Points::All => true,
            Points::Durable => durable(),
            Points::Sampled(one_in) => {
                durable() || mix(self.seed ^ point as u64).is_multiple_of(one_in.max(1) as u64)
            }
        }
    }
}

/// The medium while the log is played.
struct Medium<'a> {
    log: &'a CrashLog,
    point: usize,
    /// What is certainly there.
    durable: Image,
    /// Submission point of the last durable change of a block, by block number.
    durable_since: HashMap<u64, usize>,
    /// Indices of the volatile records, in the order of their submission.
    volatile: Vec<usize>,
}

impl<'a> Medium<'a> {
    fn new(log: &'a CrashLog) -> Medium<'a> {
        let durable = log.base.clone();
        Medium { log, point: 0, durable, durable_since: HashMap::new(), volatile: Vec::new() }
    }

    fn advance_to(&mut self, point: usize) {
        while self.point < point {
            let event = self.log.events[self.point];
            self.point += 1;
            match event {
                Event::Submitted(index) => {
                    if !matches!(self.log.records[index].change, Change::Flush { .. }) {
                        self.volatile.push(index);
                    }
                }
                Event::Completed(index) => self.completed(index),
                Event::Failed(_) => {}
            }
        }
    }

    fn completed(&mut self, index: usize) {
        let log = self.log;
        let record = &log.records[index];
        if let Change::Flush { epoch } = record.change {
            let mut covered: Vec<_> = self
                .volatile
                .iter()
                .copied()
                .filter_map(|index| Some((log.records[index].completed?, index)))
                .filter(|((at, in_epoch), _)| *at < record.submitted && *in_epoch == epoch)
                .collect();
            covered.sort_unstable();
            for (_, index) in &covered {
                self.make_durable(*index);
            }
            let covered: HashSet<_> = covered.into_iter().map(|(_, index)| index).collect();
            self.volatile.retain(|index| !covered.contains(index));
        } else if record.fua {
            self.make_durable(index);
            self.volatile.retain(|other| *other != index);
        }
    }

    /// Applies a change to what is certainly there; the caller removes it from `volatile`.
    fn make_durable(&mut self, index: usize) {
        let mut image = std::mem::replace(&mut self.durable, Image::new(0, 0));
        self.apply_volatile(&mut image, index, |_| true);
        self.durable = image;
        let record = &self.log.records[index];
        for block in self.blocks(record) {
            let since = self.durable_since.entry(block).or_insert(0);
            *since = record.submitted.max(*since);
        }
    }

    /// Applies the blocks of a record for which `survives` (by number within the record), except where a durable change
    /// that came after its completion stands already.
    fn apply_volatile(&self, image: &mut Image, index: usize, survives: impl Fn(u64) -> bool) {
        let record = &self.log.records[index];
        let block_size = u64::from(self.log.base.block_size());
        let completed = record.completed.map_or(usize::MAX, |(at, _)| at);
        for (number, block) in self.blocks(record).enumerate() {
            let superseded = self.durable_since.get(&block).is_some_and(|since| completed < *since);
            if superseded || !survives(number as u64) {
                continue;
            }
            let start = number * block_size as usize;
            let applied = match &record.change {
                Change::Write(data) => {
                    image.write(block * block_size, &data[start..start + block_size as usize])
                }
                Change::Zeroes | Change::Unmap => image.zero(block * block_size, block_size),
                Change::Flush { .. } => Ok(()),
            };
            debug_assert_eq!(applied, Ok(()), "only requests within the device are recorded");
        }
    }

    fn blocks(&self, record: &Record) -> std::ops::Range<u64> {
        let block_size = u64::from(self.log.base.block_size());
        record.offset / block_size..(record.offset + record.len) / block_size
    }

    fn state(&self, survive: Survive) -> CrashState {
        let mut image = self.durable.clone();
        let torn = match survive {
            Survive::Nothing => 0,
            Survive::Everything => {
                for index in self.in_order(|record| record.completed.map_or(usize::MAX, |(at, _)| at)) {
                    self.apply_volatile(&mut image, index, |_| true);
                }
                0
            }
            Survive::Random(seed) => self.survive_randomly(&mut image, seed),
        };
        CrashState { point: self.point, survive, volatile: self.volatile.len(), torn, image }
    }

    /// Returns how many changes were torn.
    fn survive_randomly(&self, image: &mut Image, seed: u64) -> usize {
        // How much survives differs from state to state: almost nothing to almost everything.
        let share = 1 + mix(seed) % 9;
        let moment = |record: &Record| {
            let completed = record.completed.map_or(self.point, |(at, _)| at).min(self.point);
            let span = (completed - record.submitted).max(1) as u64;
            record.submitted + (mix(seed ^ mix(record.submitted as u64)) % span) as usize
        };
        let mut torn_changes = 0;
        for index in self.in_order(moment) {
            let fate = mix(seed ^ mix(index as u64 ^ 1 << 40));
            if fate % 10 >= share {
                continue;
            }
            let torn = (fate / 10).is_multiple_of(3);
            let lands = |block: u64| !torn || mix(fate ^ block) & 1 == 0;
            let blocks = self.blocks(&self.log.records[index]);
            let landed = (0..blocks.end - blocks.start).filter(|block| lands(*block)).count() as u64;
            torn_changes += usize::from(landed > 0 && landed < blocks.end - blocks.start);
            self.apply_volatile(image, index, lands);
        }
        torn_changes
    }

    /// The volatile records ordered by `key`.
    fn in_order(&self, key: impl Fn(&Record) -> usize) -> Vec<usize> {
        let mut order = self.volatile.clone();
        order.sort_by_key(|index| (key(&self.log.records[*index]), *index));
        order
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
