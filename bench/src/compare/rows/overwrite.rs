//! Random overwrites of a file on a device that is more and more full: what they write beside the user's bytes, and what they
//! cost in speed.
//!
//! A sample formats the device, fills it with one file (not counted), overwrites random blocks of it until three times the
//! device's capacity is written, and commits. All that the device is asked to write meanwhile counts: data, metadata nodes,
//! both superblocks of each commit, the final commit. A helper thread of a mount with default options would add a commit each
//! five seconds, which is nothing beside those that want of space makes here.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::Device;
use bdev_adapter::wrap::counters::{CountingDevice, Counts};
use fs_core::MountOptions;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::compare::lab::Lab;
use crate::compare::pump::{Until, pump};
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::failure::{Doing, Failure, Result};
use crate::lane::{FileLane, Lane};
use crate::session::dma_buffers;
use crate::sys::Pinned;
use crate::units;

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[
    Row {
        metric: "overwrite_wa_50",
        goal: Some(Goal::AtMost(1.05)),
        about: "device bytes per user byte: random 4 KiB overwrites, 3x the capacity, file of 50 % of the device; one sample",
        prepare: |lab| Ok(Box::new(Amplification::prepare(lab, 50)?)),
        ..AMPLIFICATION
    },
    Row {
        metric: "overwrite_wa_80",
        goal: Some(Goal::AtMost(1.15)),
        about: "the same, file of 80 % of the device; one sample",
        prepare: |lab| Ok(Box::new(Amplification::prepare(lab, 80)?)),
        ..AMPLIFICATION
    },
    Row {
        metric: "overwrite_wa_95",
        goal: Some(Goal::AtMost(1.5)),
        about: "the same, file of 95 % of the device; one sample",
        prepare: |lab| Ok(Box::new(Amplification::prepare(lab, 95)?)),
        ..AMPLIFICATION
    },
    Row {
        metric: "overwrite_throughput_95_vs_50",
        unit: "IOPS",
        peer_name: Some("file of 50 %"),
        figure: Figure::Ratio,
        goal: Some(Goal::AtLeast(0.6)),
        on_device: true,
        about: "the same writes, 32 in flight, final commit inside: file of 95 % of the device against 50 %; at most 2 samples",
        prepare: |lab| Ok(Box::new(Throughput::prepare(lab)?)),
    },
];

const AMPLIFICATION: Row = Row {
    metric: "",
    unit: "x",
    peer_name: None,
    figure: Figure::Ours,
    goal: None,
    on_device: true,
    about: "",
    prepare: |_| Err(Failure::new("a row without a contest (a bug)")),
};

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;
/// How often the capacity is written.
const TIMES: u64 = 3;
/// Writes in flight.
const DEPTH: usize = 32;
/// Overwrites between two looks at the progress bar; emptying the queue is lost in so many.
const ROUND: u64 = 1 << 16;
/// The least device: below it the reserve of the filesystem leaves no room for a file of 95 %.
const SMALLEST: u64 = 64 * MIB;

/// What a sample did.
struct Churn {
    fill: f64,
    writes: u64,
    time: Duration,
    device: Counts,
    commits: u64,
}

impl Churn {
    /// Device bytes per user byte.
    fn amplification(&self) -> f64 {
        (self.device.writes.bytes + self.device.zeroes.bytes) as f64 / (self.writes * BLOCK) as f64
    }

    fn per_second(&self) -> f64 {
        self.writes as f64 / self.time.as_secs_f64().max(1e-9)
    }

    fn remark(&self) -> String {
        let extra = (self.device.writes.bytes + self.device.zeroes.bytes).saturating_sub(self.writes * BLOCK);
        format!(
            "a file of {:.1} % of the device: {} overwrites, {} commits, {} writes a commit, {:.1} other blocks a commit, {}/s",
            100.0 * self.fill,
            units::count(self.writes),
            units::count(self.commits),
            units::count(self.writes / self.commits.max(1)),
            (extra / BLOCK) as f64 / self.commits.max(1) as f64,
            units::figure(self.per_second()),
        )
    }
}

/// The device under test, with a counter around it.
struct Field {
    device: Arc<CountingDevice>,
    capacity: u64,
    seed: u64,
}

impl Field {
    fn prepare(lab: &Lab) -> Result<Field> {
        let capacity = lab.device().geometry().capacity;
        if capacity < SMALLEST {
            let (capacity, need) = (units::bytes(capacity), units::bytes(SMALLEST));
            return Err(Failure::new(format!("the device has {capacity}; this row needs {need}")));
        }
        lab.touch(capacity)?;
        Ok(Field { device: CountingDevice::wrap(Arc::clone(lab.device())), capacity, seed: lab.seed })
    }

    /// A sample with a file of `percent` % of the device.
    fn churn(&mut self, lab: &Lab, percent: u64) -> Result<Churn> {
        let device: Arc<dyn Device> = Arc::clone(&self.device) as _;
        let mounted = lab.fresh_on(&device, MountOptions::default())?;
        let bytes = self.capacity / 100 * percent / MIB * MIB;
        let file = mounted.create_filled(lab, "overwrite", bytes)?;
        let mut buffers = dma_buffers(&device, DEPTH, BLOCK as usize)?;
        let writes = TIMES * self.capacity / BLOCK;
        let mut random = SmallRng::seed_from_u64(self.seed);
        self.seed = self.seed.wrapping_add(1);
        let bar = lab.bars.steps("overwrite", writes);
        let _pinned = Pinned::to_last_core();
        let (before, commits) = (self.device.counts(), mounted.fs.stats().commits);
        let watch = lab.clock.start();
        let mut lane = FileLane::new(&mounted.channel, file.clone());
        let mut done = 0;
        while done < writes {
            let round = ROUND.min(writes - done);
            pump(lab.clock, &mut lane, &mut buffers, Until::Operations(round), |lane, buf| {
                lane.write(random.random_range(0..bytes / BLOCK) * BLOCK, buf, 0)
            })?;
            done += round;
            bar.set_position(done);
        }
        mounted.channel.sync().doing("sync the filesystem")?;
        let time = watch.elapsed();
        bar.finish_and_clear();
        let churn = Churn {
            fill: bytes as f64 / self.capacity as f64,
            writes,
            time,
            device: self.device.counts() - before,
            commits: mounted.fs.stats().commits - commits,
        };
        drop((lane, file));
        mounted.unmount()?;
        Ok(churn)
    }
}

struct Amplification {
    field: Field,
    percent: u64,
    remarks: RefCell<Vec<String>>,
}

impl Amplification {
    fn prepare(lab: &Lab, percent: u64) -> Result<Amplification> {
        Ok(Amplification { field: Field::prepare(lab)?, percent, remarks: RefCell::default() })
    }
}

impl Contest for Amplification {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let churn = self.field.churn(lab, self.percent)?;
        self.remarks.get_mut().push(churn.remark());
        Ok(churn.amplification())
    }

    fn peer(&mut self, _: &Lab) -> Result<Option<f64>> {
        Ok(None)
    }

    fn repeats(&self, _: u32) -> u32 {
        1
    }

    fn warms_up(&self) -> bool {
        false
    }

    fn remarks(&self) -> Vec<String> {
        self.remarks.take()
    }
}

struct Throughput {
    field: Field,
    remarks: RefCell<Vec<String>>,
}

impl Throughput {
    fn prepare(lab: &Lab) -> Result<Throughput> {
        Ok(Throughput { field: Field::prepare(lab)?, remarks: RefCell::default() })
    }

    fn sample(&mut self, lab: &Lab, percent: u64) -> Result<f64> {
        let churn = self.field.churn(lab, percent)?;
        self.remarks.get_mut().push(churn.remark());
        Ok(churn.per_second())
    }
}

impl Contest for Throughput {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        self.sample(lab, 95)
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        self.sample(lab, 50).map(Some)
    }

    fn repeats(&self, asked: u32) -> u32 {
        asked.min(2)
    }

    fn warms_up(&self) -> bool {
        false
    }

    fn remarks(&self) -> Vec<String> {
        self.remarks.take()
    }
}
