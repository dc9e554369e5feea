//! What goes wrong when: the plan of a fault wrapper, its grammar, and its decisions.
//!
//! In a URI a fault is `EFFECT[_CONDITION]=VALUE`:
//!
//! | effect | what happens |
//! |---|---|
//! | `read_error` | a read fails with EIO; its buffer is not filled |
//! | `write_error` | a write or write-zeroes fails with EIO; nothing reaches the device |
//! | `flush_error` | a flush fails with EIO |
//! | `io_error` | a request of any kind fails with EIO |
//! | `bit_rot` | one block of a read is rotten from now on: every read succeeds with the same one to three bits of it flipped, until it is written again |
//! | `stale_read` | a read succeeds with what its blocks held before their last change, where that went through the wrapper |
//! | `lost_write` | a write or write-zeroes succeeds, but nothing reaches the device |
//! | `torn_write` | only the first blocks (none to all but one) of a write reach the device, then the device is gone |
//! | `torn_write_silent` | the same, but the write succeeds and the device stays |
//! | `misdirected_write` | a write succeeds, but its data lands somewhere else on the device, on blocks that it was not for |
//! | `lying_flush` | a flush or FUA write succeeds, but makes nothing durable: a `record:` inside does not see the flush, a power cut loses what it was to cover |
//! | `slow` | the answer takes this long from submission, at least: `slow_nth=3:2s` |
//! | `never` | no answer ([`FaultDevice::release_hung`](super::FaultDevice::release_hung)); a request with a deadline times out then |
//! | `gone` | the device is gone, from this request on |
//! | `gone_for` | the same, but it comes back after this long, in a new epoch: `gone_for_nth=100:50ms` |
//! | `power_cut` | the device is gone, and when it comes back, some of the blocks that were not flushed hold what they held before |
//!
//! | condition | hits |
//! |---|---|
//! | none: `read_error=1e-4` | with this probability |
//! | `_nth`: `write_error_nth=3` | the third request of the effect's kinds, once |
//! | `_after`: `gone_after=100` | every one after the first hundred |
//! | `_range`: `read_error_range=1MiB-2MiB` | those that touch these bytes (no flush does) |
//!
//! `seed=7` makes the random decisions; the same seed and the same order of requests give the same faults. Several
//! faults are checked in their order, and the first that hits counts. Only `_nth` and `_range` may be given several times for
//! one effect, with different values.
//!
//! `volatile=on` lets the wrapper follow what is not flushed from the start, so that
//! [`FaultDevice::power_cut`](super::FaultDevice::power_cut) can take it back; `lying_flush` and `power_cut` imply it. Old content
//! is read from the device before each change then, and 64 MiB of it are kept at most: beyond it the oldest changes count as
//! durable. The same holds for `stale_read`.

use std::ops::Range;
use std::time::Duration;

use crate::uri::{parse_duration, parse_range};
use crate::wrap::random::{mix, unit};
use crate::{IoErrorKind, Kind, Request};

/// What goes wrong when. See the [module documentation](self) for the grammar; tests may also build it directly.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FaultPlan {
    /// Seed of the random decisions; 0 if none is given.
    pub seed: u64,
    /// Checked in order, the first that hits counts.
    pub faults: Vec<Fault>,
    /// Follow what is not flushed even if no fault needs it: see the [module documentation](self).
    pub volatile: bool,
    /// The keys that were set, with their values.
    given: Vec<(String, String)>,
}

/// One way in which requests fail.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// Which requests are counted and hit.
    pub on: Target,
    /// Which of them are hit.
    pub when: When,
    /// What happens to them.
    pub effect: Effect,
}

/// Kinds of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Reads.
    Reads,
    /// Writes and write-zeroes.
    Writes,
    /// Flushes.
    Flushes,
    /// What promises durability: flushes, and writes and write-zeroes with FUA.
    Barriers,
    /// Every request, unmap included.
    All,
}

/// Which of the requests are hit. Requests are counted over all queue pairs, in the order of their submission.
#[derive(Debug, Clone, PartialEq)]
pub enum When {
    /// Each with this probability, 0 to 1.
    Probability(f64),
    /// The one with this number, counted from 1.
    Nth(u64),
    /// All after so many.
    After(u64),
    /// Those that touch these byte addresses.
    Range(Range<u64>),
}

/// What happens to a request that is hit. An effect on a kind of request for which it has no meaning does nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Effect {
    /// It fails with this error and does nothing.
    Error(IoErrorKind),
    /// One block of a read is rotten until it is changed.
    Rot,
    /// A read returns what its blocks held before their last change.
    Stale,
    /// It succeeds and does nothing (meant for writes: a read's buffer would stay as it was).
    Lost,
    /// Of a write or write-zeroes only the first blocks are done, and the device is gone; any other kind just finds
    /// the device gone.
    Torn,
    /// Of a write or write-zeroes only the first blocks are done, and it succeeds.
    TornSilently,
    /// A write or write-zeroes is done at another place (aligned as it was, up to 4096 bytes) that does not touch the right
    /// one, and succeeds. Where there is no such place it is lost.
    Misdirected,
    /// A flush succeeds and does nothing; a write succeeds and is done, but without FUA.
    Lie,
    /// It is done, and answered no earlier than this long after its submission.
    Slow(Duration),
    /// It is not done and not answered until [`release_hung`](super::FaultDevice::release_hung) or its deadline.
    Never,
    /// The device is gone: this and all later requests fail with [`IoErrorKind::Gone`].
    Gone,
    /// The same for this long; then the device is back, in a new epoch.
    GoneFor(Duration),
    /// The device is gone, and a random part of the blocks that were changed and not flushed go back to what they were.
    PowerCut,
}

/// How many requests of each kind were seen, the present one included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// Reads.
    pub reads: u64,
    /// Writes and write-zeroes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Flushes, and writes and write-zeroes with FUA.
    pub barriers: u64,
    /// All requests.
    pub all: u64,
}

impl Fault {
    /// A fault.
    pub fn new(on: Target, when: When, effect: Effect) -> Fault {
        Fault { on, when, effect }
    }
}

impl Target {
    pub(super) fn includes(self, request: &Request) -> bool {
        let write = matches!(request.kind, Kind::Write | Kind::WriteZeroes);
        let flush = matches!(request.kind, Kind::Flush { .. });
        match self {
            Target::Reads => request.kind == Kind::Read,
            Target::Writes => write,
            Target::Flushes => flush,
            Target::Barriers => flush || write && request.hints.fua,
            Target::All => true,
        }
    }

    fn ordinal(self, seen: &Seen) -> u64 {
        match self {
            Target::Reads => seen.reads,
            Target::Writes => seen.writes,
            Target::Flushes => seen.flushes,
            Target::Barriers => seen.barriers,
            Target::All => seen.all,
        }
    }
}

impl Seen {
    pub(super) fn count(&mut self, request: &Request) {
        let one = |target: Target| u64::from(target.includes(request));
        self.reads += one(Target::Reads);
        self.writes += one(Target::Writes);
        self.flushes += one(Target::Flushes);
        self.barriers += one(Target::Barriers);
        self.all += 1;
    }
}

impl FaultPlan {
    /// A plan with these faults.
    pub fn new(seed: u64, faults: Vec<Fault>) -> FaultPlan {
        FaultPlan { seed, faults, volatile: false, given: Vec::new() }
    }

    /// The plan of these keys and values of the URI grammar.
    pub(crate) fn parse(arguments: &[(&str, &str)]) -> Result<FaultPlan, String> {
        let mut plan = FaultPlan::default();
        for (key, value) in arguments {
            plan.set(key, value)?;
        }
        Ok(plan)
    }

    /// Sets a key of the URI grammar.
    ///
    /// # Errors
    /// What is wrong and what would be right.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let many = key.ends_with("_nth") || key.ends_with("_range");
        if self.given.iter().any(|(other, old)| other == key && !(many && old != value)) {
            return Err(format!("fault has '{key}' twice"));
        }
        match key {
            "seed" => {
                self.seed = value.parse().map_err(|_| format!("'{value}' is not a seed; write seed=7"))?
            }
            "volatile" => self.volatile = parse_switch(key, value)?,
            _ => self.faults.push(parse_fault(key, value)?),
        }
        self.given.push((key.to_owned(), value.to_owned()));
        Ok(())
    }

    /// Whether what blocks held before must be kept.
    pub(super) fn needs_history(&self) -> bool {
        let needs = |fault: &Fault| matches!(fault.effect, Effect::Stale | Effect::Lie | Effect::PowerCut);
        self.volatile || self.faults.iter().any(needs)
    }

    /// The fault that hits `request`, the `seen`-th, if any.
    pub(super) fn decide(&self, request: &Request, seen: &Seen) -> Option<&Fault> {
        let hit = self.faults.iter().enumerate().find(|(number, fault)| {
            fault.on.includes(request)
                && match &fault.when {
                    When::Probability(p) => self.draw(*number as u64, seen.all) < *p,
                    When::Nth(nth) => fault.on.ordinal(seen) == *nth,
                    When::After(count) => fault.on.ordinal(seen) > *count,
                    When::Range(range) => touches(request, range),
                }
        });
        hit.map(|(_, fault)| fault)
    }

    /// How many blocks of a torn write of `blocks` reach the device: 0 to `blocks - 1`.
    pub(super) fn torn_blocks(&self, blocks: u64, seen: &Seen) -> u64 {
        self.pick(blocks, seen)
    }

    /// The block that begins to rot in a read of `request` that `fault` hits, and the seed of the bits.
    pub(super) fn rotten_block(
        &self,
        fault: &Fault,
        request: &Request,
        block_size: u64,
        seen: &Seen,
    ) -> (u64, u64) {
        let (mut start, mut end) = (request.offset, request.offset + request.len);
        if let When::Range(range) = &fault.when {
            (start, end) = (start.max(range.start), end.min(range.end));
        }
        let (first, last) = (start / block_size, end.saturating_sub(1) / block_size);
        let block = first + self.pick(last.saturating_sub(first) + 1, seen);
        (block, mix(mix(self.seed ^ mix(seen.all)) ^ block))
    }

    /// Where a misdirected write lands, on a device of `capacity` bytes; none if there is no place for it.
    pub(super) fn misdirected(
        &self,
        request: &Request,
        capacity: u64,
        block_size: u64,
        seen: &Seen,
    ) -> Option<u64> {
        let natural = 1 << (request.offset | request.len).trailing_zeros().min(12);
        let step = block_size.max(natural);
        // Places that end before the request begins, and places that begin after its end.
        let before = if request.offset < request.len { 0 } else { (request.offset - request.len) / step + 1 };
        let end = (request.offset + request.len).next_multiple_of(step);
        let after = capacity.checked_sub(end + request.len).map_or(0, |room| room / step + 1);
        if before + after == 0 {
            return None;
        }
        let place = self.pick(before + after, seen);
        Some(if place < before { place * step } else { end + (place - before) * step })
    }

    /// One of `count` (more than none).
    fn pick(&self, count: u64, seen: &Seen) -> u64 {
        // `draw < 1`, so the product is below `count`, but for rounding.
        ((self.draw(u64::MAX, seen.all) * count as f64) as u64).min(count.saturating_sub(1))
    }

    /// A number in [0, 1) that depends on the seed, the fault and the request only.
    fn draw(&self, fault: u64, request: u64) -> f64 {
        unit(mix(mix(mix(self.seed) ^ fault) ^ request))
    }
}

const EFFECTS: &str = "read_error, write_error, flush_error, io_error, bit_rot, stale_read, lost_write, torn_write, \
    torn_write_silent, misdirected_write, lying_flush, slow, never, gone, gone_for, power_cut";

/// Parses `write_error_nth=3` and its like.
fn parse_fault(key: &str, value: &str) -> Result<Fault, String> {
    let (on, effect, condition) = parse_key(key).ok_or_else(|| {
        format!(
            "fault has no '{key}'; write seed, volatile, or one of {EFFECTS}, alone or with _nth, _after or _range, \
             as in read_error=1e-4"
        )
    })?;
    let timed: fn(Duration) -> Effect = match effect {
        Effect::Slow(_) => Effect::Slow,
        Effect::GoneFor(_) => Effect::GoneFor,
        _ => return Ok(Fault { on, when: condition(key, value)?, effect }),
    };
    let (value, time) =
        value.rsplit_once(':').ok_or_else(|| format!("'{value}' has no time; write {key}={value}:50ms"))?;
    let time = parse_duration(time).map_err(|why| format!("{why}, as in {key}={value}:50ms"))?;
    Ok(Fault { on, when: condition(key, value)?, effect: timed(time) })
}

fn parse_switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key}='{value}' is unknown; write {key}=on or off")),
    }
}

type Condition = fn(&str, &str) -> Result<When, String>;

/// Splits `write_error_nth` into effect and condition.
fn parse_key(key: &str) -> Option<(Target, Effect, Condition)> {
    let conditions: [(&str, Condition); 4] =
        [("_nth", nth), ("_after", after), ("_range", range), ("", probability)];
    let (effect, condition) =
        conditions.iter().find_map(|(suffix, condition)| Some((key.strip_suffix(suffix)?, *condition)))?;
    let error = Effect::Error(IoErrorKind::Os(libc::EIO));
    let (on, effect) = match effect {
        "read_error" => (Target::Reads, error),
        "write_error" => (Target::Writes, error),
        "flush_error" => (Target::Flushes, error),
        "io_error" => (Target::All, error),
        "bit_rot" => (Target::Reads, Effect::Rot),
        "stale_read" => (Target::Reads, Effect::Stale),
        "lost_write" => (Target::Writes, Effect::Lost),
        "torn_write" => (Target::Writes, Effect::Torn),
        "torn_write_silent" => (Target::Writes, Effect::TornSilently),
        "misdirected_write" => (Target::Writes, Effect::Misdirected),
        "lying_flush" => (Target::Barriers, Effect::Lie),
        "slow" => (Target::All, Effect::Slow(Duration::ZERO)),
        "never" => (Target::All, Effect::Never),
        "gone" => (Target::All, Effect::Gone),
        "gone_for" => (Target::All, Effect::GoneFor(Duration::ZERO)),
        "power_cut" => (Target::All, Effect::PowerCut),
        _ => return None,
    };
    Some((on, effect, condition))
}

fn nth(key: &str, value: &str) -> Result<When, String> {
    match value.parse() {
        Ok(nth @ 1..) => Ok(When::Nth(nth)),
        _ => Err(format!("'{value}' is not a number counted from 1; write {key}=3")),
    }
}

fn after(key: &str, value: &str) -> Result<When, String> {
    value.parse().map(When::After).map_err(|_| format!("'{value}' is not a number; write {key}=100"))
}

fn range(_key: &str, value: &str) -> Result<When, String> {
    parse_range(value).map(When::Range)
}

fn probability(key: &str, value: &str) -> Result<When, String> {
    match value.parse() {
        Ok(p) if (0.0..=1.0).contains(&p) => Ok(When::Probability(p)),
        _ => Err(format!("'{value}' is not a probability from 0 to 1; write {key}=1e-4")),
    }
}

fn touches(request: &Request, range: &Range<u64>) -> bool {
    let end = request.offset.saturating_add(request.len);
    !matches!(request.kind, Kind::Flush { .. }) && request.offset < range.end && range.start < end
}
