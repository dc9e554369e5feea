//! The adapter alone, without the filesystem, against SPDK itself: its own measuring programs, and direct calls of its
//! functions.

mod added;
mod malloc;
mod peers;
mod tcp;

use std::time::Duration;

use bdev_adapter::DmaBuf;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::compare::lab::Lab;
use crate::compare::pump::{Until, pump};
use crate::compare::row::{Figure, Goal, Row};
use crate::failure::{Failure, Result};
use crate::lane::{Lane, RawLane};
use crate::sys::Clock;

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[
    Row {
        metric: "tcp_randread4k_qd32_vs_spdk_perf",
        unit: "IOPS",
        peer_name: Some("SPDK's perf"),
        figure: Figure::Ratio,
        goal: Some(Goal::AtLeast(0.95)),
        on_device: false,
        about: "random 4 KiB reads over NVMe/TCP, 32 in flight: one core, the same target on loopback on another core",
        prepare: |lab| Ok(Box::new(tcp::Reads::prepare(lab)?)),
    },
    Row {
        metric: "malloc_randread4k_qd128_vs_bdevperf",
        unit: "IOPS",
        peer_name: Some("bdevperf -x"),
        figure: Figure::Ratio,
        goal: Some(Goal::AtLeast(0.95)),
        on_device: true,
        about: "random 4 KiB reads of the whole SPDK malloc bdev, 128 in flight, on one core",
        prepare: |lab| Ok(Box::new(malloc::Reads::prepare(lab)?)),
    },
    Row {
        metric: "adapter_added_ns_per_io",
        unit: "ns",
        peer_name: Some("SPDK alone"),
        figure: Figure::Difference,
        goal: Some(Goal::AtMost(15.0)),
        on_device: false,
        about: "CPU time that a queue pair adds to SPDK's own functions: reads of a null bdev (no bytes move), 32 in flight",
        prepare: added::prepare,
    },
];

const BLOCK: usize = 4096;

/// Refuses in a build without SPDK.
fn needs_spdk() -> Result<()> {
    match cfg!(feature = "spdk") {
        true => Ok(()),
        false => Err(Failure::Skipped("this build has no SPDK; build with --features spdk".to_owned())),
    }
}

/// How long a sample takes on both sides: SPDK's programs take whole seconds.
fn sample_time(lab: &Lab) -> Duration {
    Duration::from_secs(lab.seconds.as_secs_f64().ceil().max(1.0) as u64)
}

/// Reads random blocks among the first `blocks` for the time of a sample, as many at once as there are buffers. Per second,
/// of the time that passes: the peers know no other.
fn random_reads(lab: &Lab, lane: &mut RawLane, buffers: &mut Vec<DmaBuf>, blocks: u64) -> Result<f64> {
    let mut random = SmallRng::seed_from_u64(lab.seed);
    let until = Until::Time(sample_time(lab));
    let pumped = pump(Clock::Wall, lane, buffers, until, |lane, buf| {
        lane.read(random.random_range(0..blocks) * BLOCK as u64, buf, 0);
    })?;
    Ok(pumped.per_second())
}
