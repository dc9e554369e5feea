//! The measuring loop: a fixed number of operations in flight, each completion followed by the next submission.
//!
//! It is the same for a file and for the raw device ([`Lane`]), allocates nothing and reads the clock once in many
//! operations.

use std::time::Duration;

use bdev_adapter::DmaBuf;

use crate::failure::{Failure, Result};
use crate::lane::Lane;
use crate::sys::Clock;

/// Completions between two looks at the clock: it costs some 25 ns (CPU clock: 200), spread over these.
const LOOK_EVERY: u64 = 128;
/// Fruitless polls between two looks at the clock.
const LOOK_EVERY_SPINS: u32 = 4096;

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Until {
    /// After this time. What is in flight then is waited for, but does not count.
    Time(Duration),
    /// After this many operations; the time is that of all of them.
    Operations(u64),
}

/// What was done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pumped {
    /// Operations that count.
    pub(crate) operations: u64,
    /// In this time.
    pub(crate) time: Duration,
}

impl Pumped {
    /// Operations per second.
    pub(crate) fn per_second(self) -> f64 {
        self.operations as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// Keeps as many operations in flight as there are `buffers`; `start` submits the next one with the buffer it is given.
/// All buffers are back at the end.
pub(crate) fn pump<L: Lane>(
    clock: Clock,
    lane: &mut L,
    buffers: &mut Vec<DmaBuf>,
    until: Until,
    mut start: impl FnMut(&mut L, DmaBuf),
) -> Result<Pumped> {
    let (limit, duration) = match until {
        Until::Time(duration) => (u64::MAX, duration),
        Until::Operations(operations) => (operations, Duration::MAX),
    };
    let depth = buffers.len();
    let (mut asked, mut answered, mut next_look, mut spins) = (0u64, 0u64, LOOK_EVERY, 0u32);
    let started = clock.start();
    while asked < limit
        && let Some(buf) = buffers.pop()
    {
        start(lane, buf);
        asked += 1;
    }
    let time = loop {
        if answered == limit {
            break started.elapsed();
        }
        if lane.poll() == 0 {
            spins += 1;
            if spins.is_multiple_of(LOOK_EVERY_SPINS) && started.elapsed() >= duration {
                break started.elapsed();
            }
            continue;
        }
        while let Some(done) = lane.take() {
            if let Some(error) = done.error {
                return Err(*error);
            }
            answered += 1;
            let Some(buf) = done.buf else { return Err(lost()) };
            if asked < limit {
                start(lane, buf);
                asked += 1;
            } else {
                buffers.push(buf);
            }
        }
        if answered >= next_look {
            next_look = answered + LOOK_EVERY;
            let elapsed = started.elapsed();
            if elapsed >= duration {
                break elapsed;
            }
        }
    };
    while buffers.len() < depth {
        lane.poll();
        while let Some(done) = lane.take() {
            if let Some(error) = done.error {
                return Err(*error);
            }
            buffers.push(done.buf.ok_or_else(lost)?);
        }
    }
    Ok(Pumped { operations: answered, time })
}

/// Makes durable what was written, and waits for it.
pub(crate) fn sync(lane: &mut impl Lane) -> Result<()> {
    lane.sync(0);
    while lane.poll() == 0 {}
    match lane.take().and_then(|done| done.error) {
        Some(error) => Err(*error),
        None => Ok(()),
    }
}

#[cold]
fn lost() -> Failure {
    Failure::new("an operation came back without its buffer (a bug)")
}
