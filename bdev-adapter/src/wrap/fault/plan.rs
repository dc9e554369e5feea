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
//! | `lost_write` | a write or write-zeroes succeeds, but nothing reaches the device |
//! | `torn_write` | only the first blocks (none to all but one) of a write reach the device, then the device is gone |
//! | `gone` | the device is gone, from this request on |
//!
//! | condition | hits |
//! |---|---|
//! | none: `read_error=1e-4` | with this probability |
//! | `_nth`: `write_error_nth=3` | the third request of the effect's kinds, once |
//! | `_after`: `gone_after=100` | every one after the first hundred |
//! | `_range`: `read_error_range=1MiB-2MiB` | those that touch these bytes (no flush does) |
//!
//! `seed=7` makes the random decisions; the same seed and the same order of requests give the same faults. Several
//! faults are checked in their order, and the first that hits counts.

use std::ops::Range;

use crate::uri::parse_range;
use crate::{IoErrorKind, Kind, Request};

/// What goes wrong when. See the [module documentation](self) for the grammar; tests may also build it directly.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FaultPlan {
    /// Seed of the random decisions; 0 if none is given.
    pub seed: u64,
    /// Checked in order, the first that hits counts.
    pub faults: Vec<Fault>,
    seed_given: bool,
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

/// What happens to a request that is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Effect {
    /// It fails with this error and does nothing.
    Error(IoErrorKind),
    /// It succeeds and does nothing (meant for writes: a read's buffer would stay as it was).
    Lost,
    /// Of a write or write-zeroes only the first blocks are done, and the device is gone; any other kind just finds
    /// the device gone.
    Torn,
    /// The device is gone: this and all later requests fail with [`IoErrorKind::Gone`].
    Gone,
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
    pub(super) fn includes(self, kind: Kind) -> bool {
        match self {
            Target::Reads => kind == Kind::Read,
            Target::Writes => matches!(kind, Kind::Write | Kind::WriteZeroes),
            Target::Flushes => matches!(kind, Kind::Flush { .. }),
            Target::All => true,
        }
    }

    fn ordinal(self, seen: &Seen) -> u64 {
        match self {
            Target::Reads => seen.reads,
            Target::Writes => seen.writes,
            Target::Flushes => seen.flushes,
            Target::All => seen.all,
        }
    }
}

impl FaultPlan {
    /// A plan with these faults.
    pub fn new(seed: u64, faults: Vec<Fault>) -> FaultPlan {
        FaultPlan { seed, faults, seed_given: true }
    }

    /// Sets a key of the URI grammar.
    ///
    /// # Errors
    /// What is wrong and what would be right.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        if key == "seed" {
            if self.seed_given {
                return Err("fault has 'seed' twice".to_owned());
            }
            self.seed = value.parse().map_err(|_| format!("'{value}' is not a seed; write seed=7"))?;
            self.seed_given = true;
            return Ok(());
        }
        let (on, effect, condition) = parse_effect(key).ok_or_else(|| {
            format!(
                "fault has no '{key}'; write seed, or one of read_error, write_error, flush_error, io_error, \
                 lost_write, torn_write, gone, alone or with _nth, _after or _range, as in read_error=1e-4"
            )
        })?;
        self.faults.push(Fault { on, when: condition(key, value)?, effect });
        Ok(())
    }

    /// The effect that hits `request`, the `seen`-th, if any.
    pub(super) fn decide(&self, request: &Request, seen: &Seen) -> Option<Effect> {
        let hit = self.faults.iter().enumerate().find(|(number, fault)| {
            fault.on.includes(request.kind)
                && match &fault.when {
                    When::Probability(p) => self.draw(*number as u64, seen.all) < *p,
                    When::Nth(nth) => fault.on.ordinal(seen) == *nth,
                    When::After(count) => fault.on.ordinal(seen) > *count,
                    When::Range(range) => touches(request, range),
                }
        });
        hit.map(|(_, fault)| fault.effect)
    }

    /// How many blocks of a torn write of `blocks` reach the device: 0 to `blocks - 1`.
    pub(super) fn torn_blocks(&self, blocks: u64, seen: &Seen) -> u64 {
        let draw = self.draw(u64::MAX, seen.all);
        // `draw < 1`, so the product is below `blocks`.
        (draw * blocks as f64) as u64
    }

    /// A number in [0, 1) that depends on the seed, the fault and the request only.
    fn draw(&self, fault: u64, request: u64) -> f64 {
        let bits = mix(mix(mix(self.seed) ^ fault) ^ request);
        (bits >> 11) as f64 / (1u64 << 53) as f64
    }
}

type Condition = fn(&str, &str) -> Result<When, String>;

/// Splits `write_error_nth` into effect and condition.
fn parse_effect(key: &str) -> Option<(Target, Effect, Condition)> {
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
        "lost_write" => (Target::Writes, Effect::Lost),
        "torn_write" => (Target::Writes, Effect::Torn),
        "gone" => (Target::All, Effect::Gone),
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

/// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): every bit of the input moves every bit of the result.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}
