//! What the filesystem adds to a read: the CPU time of a 4 KiB random direct read of a file, less that of the same read of the
//! raw device. The CPU time of the measuring thread counts, whatever `--clock` says, and there is no other thread.

use crate::compare::lab::Lab;
use crate::compare::pump::Pumped;
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::compare::rows::scattered::{MILLION, Scattered};
use crate::failure::Result;
use crate::sys::Clock;

const fn row(metric: &'static str, goal_ns: f64, about: &'static str, prepare: Prepare) -> Row {
    Row {
        metric,
        unit: "ns",
        peer_name: Some("raw device"),
        figure: Figure::Difference,
        goal: Some(Goal::AtMost(goal_ns)),
        on_device: false,
        about,
        prepare,
    }
}

type Prepare = fn(&Lab) -> Result<Box<dyn Contest>>;

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[
    row(
        "read_added_ns_qd32_verified",
        130.0,
        "CPU time added to a 4 KiB random direct read, 32 in flight, file of 1e6 extents, checksums verified",
        |lab| prepare(lab, MILLION, 32, true),
    ),
    row("read_added_ns_qd32_unverified", 60.0, "the same, checksums not verified", |lab| {
        prepare(lab, MILLION, 32, false)
    }),
    row("read_added_ns_qd1_verified", 600.0, "the same, one in flight, checksums verified", |lab| {
        prepare(lab, MILLION, 1, true)
    }),
    row(
        "read_added_ns_qd1_verified_1e3",
        300.0,
        "the same, one in flight, file of 1e3 extents, checksums verified",
        |lab| prepare(lab, 1 << 10, 1, true),
    ),
];

struct Added(Scattered);

fn prepare(lab: &Lab, blocks: u64, depth: usize, verify_data: bool) -> Result<Box<dyn Contest>> {
    Ok(Box::new(Added(Scattered::prepare(lab, blocks, depth, verify_data)?)))
}

fn ns_per_operation(pumped: Pumped) -> f64 {
    pumped.time.as_nanos() as f64 / pumped.operations.max(1) as f64
}

impl Contest for Added {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        self.0.ours(lab, Clock::Cpu).map(ns_per_operation)
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        self.0.raw(lab, Clock::Cpu).map(ns_per_operation).map(Some)
    }

    fn remarks(&self) -> Vec<String> {
        vec![self.0.remark()]
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.0.finish()
    }
}
