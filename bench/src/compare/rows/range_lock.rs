//! The range lock of a file alone: what a request costs that nothing is in the way of, and whether threads that work on ranges far
//! from each other hold each other up.
//!
//! The critical section is empty: nothing hides the lock. Ranges are of 4 KiB, one after the other through a MiB.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::ops::Range;
use std::pin::pin;
use std::sync::Barrier;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use fs_core::internals::{Mode, RangeGuard, RangeLock};
use parking_lot::Mutex;

use crate::compare::lab::Lab;
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::failure::{Failure, Result};
use crate::sys::{Clock, Pinned, cores};

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[
    Row {
        metric: "range_lock_uncontended_ns",
        unit: "ns",
        peer_name: Some("a mutex around a BTreeMap"),
        figure: Figure::Ours,
        goal: Some(Goal::AtMost(25.0)),
        on_device: false,
        about: "acquire + release of a range of a file, exclusive, with nothing in the way, as a future that is ready at once",
        prepare: |_| Ok(Box::new(Uncontended::default())),
    },
    Row {
        metric: "range_lock_disjoint_2_threads",
        unit: "pairs/s",
        peer_name: Some("one thread"),
        figure: Figure::Ratio,
        goal: Some(Goal::AtLeast(1.8)),
        on_device: false,
        about: "acquire + release of ranges of one file, two threads 1 MiB apart, empty critical section, against one thread",
        prepare: |_| match cores().len() {
            0 | 1 => Err(Failure::Skipped("two threads need two cores".to_owned())),
            _ => Ok(Box::new(Disjoint::default())),
        },
    },
];

/// Bytes between the ranges of the two threads, and in which one goes round.
const MIB: u64 = 1 << 20;
/// Bytes of a range.
const LEN: u64 = 4096;
/// Pairs between two looks at the clock.
const BATCH: u64 = 1 << 15;

/// Range number `i` of those in the MiB from `base` on.
fn range(base: u64, i: u64) -> Range<u64> {
    let start = base + i * LEN % MIB;
    start..start + LEN
}

/// Takes a range that nobody else wants.
#[inline(always)]
fn take(lock: &RangeLock, range: Range<u64>) -> Option<RangeGuard> {
    match pin!(lock.lock(range, Mode::Exclusive)).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(guard) => Some(guard),
        Poll::Pending => None,
    }
}

/// Runs `pair` for about `seconds`, with numbers from 0 up. Returns pairs in a second.
fn rate(clock: Clock, seconds: Duration, mut pair: impl FnMut(u64)) -> f64 {
    (0..BATCH).for_each(&mut pair);
    let started = clock.start();
    let mut done = 0;
    loop {
        (done..done + BATCH).for_each(&mut pair);
        done += BATCH;
        let elapsed = started.elapsed();
        if elapsed >= seconds {
            return done as f64 / elapsed.as_secs_f64();
        }
    }
}

/// Takes and releases ranges, number `i` of which is `range(i)`.
fn rate_of(lock: &RangeLock, (clock, seconds): (Clock, Duration), range: impl Fn(u64) -> Range<u64>) -> f64 {
    rate(clock, seconds, |i| {
        let guard = take(lock, black_box(range(i)));
        assert!(guard.is_some(), "nobody else has this range");
    })
}

#[derive(Default)]
struct Uncontended {
    ours: RangeLock,
    peer: Mutex<Intervals>,
    /// The same from an offset to the end of the file, as appends and truncates lock.
    to_the_end_ns: f64,
}

/// Held ranges by their starts: what one would write without a second thought.
type Intervals = BTreeMap<u64, u64>;

/// Enters `range` if it overlaps none that is held.
fn enter(held: &mut Intervals, range: &Range<u64>) -> bool {
    let free = held.range(..range.end).next_back().is_none_or(|(_, &end)| end <= range.start);
    if free {
        held.insert(range.start, range.end);
    }
    free
}

impl Contest for Uncontended {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let _pinned = Pinned::to_last_core();
        self.to_the_end_ns = 1e9 / rate_of(&self.ours, (lab.clock, lab.seconds / 5), |i| i * LEN..u64::MAX);
        Ok(1e9 / rate_of(&self.ours, (lab.clock, lab.seconds), |i| range(0, i)))
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        let _pinned = Pinned::to_last_core();
        let rate = rate(lab.clock, lab.seconds, |i| {
            let range = black_box(range(0, i));
            assert!(enter(&mut self.peer.lock(), &range), "nobody else has this range");
            self.peer.lock().remove(&range.start);
        });
        Ok(Some(1e9 / rate))
    }

    fn remarks(&self) -> Vec<String> {
        vec![format!("to the end of the file, as appends and truncates lock: {:.0} ns", self.to_the_end_ns)]
    }
}

#[derive(Default)]
struct Disjoint(RangeLock);

impl Contest for Disjoint {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let lock = &self.0;
        let timing = (lab.clock, lab.seconds);
        let together = Barrier::new(2);
        let work = |core: usize, base: u64| {
            let _pinned = Pinned::to_core(core);
            together.wait();
            rate_of(lock, timing, |i| range(base, i))
        };
        let cores = cores();
        let [.., first, second] = cores[..] else {
            return Err(Failure::new("this row needs two cores"));
        };
        thread::scope(|scope| {
            let other = scope.spawn(|| work(first, MIB));
            let mine = work(second, 0);
            Ok(mine + other.join().map_err(|_| Failure::new("the other thread panicked"))?)
        })
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        let _pinned = Pinned::to_last_core();
        Ok(Some(rate_of(&self.0, (lab.clock, lab.seconds), |i| range(0, i))))
    }
}
