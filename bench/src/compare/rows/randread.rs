//! Random direct reads of a file in very many extents, against the raw device.
//!
//! The raw side reads live from the same device, through a queue pair of its own, in the same loop with the same
//! buffers, depth and offsets. Its offsets span as many bytes as the file has.

use std::cell::Cell;

use bdev_adapter::DmaBuf;
use fs_core::File;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::compare::lab::{Lab, Mounted};
use crate::compare::pump::{Until, pump};
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::compare::rows::scattered::{MILLION, Scattered};
use crate::failure::{Doing, Failure, Result};
use crate::lane::{FileLane, Lane, RawLane};
use crate::session::dma_buffers;
use crate::sys::{Clock, Pinned};
use crate::units;

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[Row {
    metric: "randread4k_qd32_vs_raw",
    unit: "IOPS",
    peer_name: Some("raw device"),
    figure: Figure::Ratio,
    goal: Some(Goal::AtLeast(0.50)),
    on_device: true,
    about: "random 4 KiB direct reads, 32 in flight, of a 1 GiB file of at least 100,000 extents, checksums verified",
    prepare: |lab| Ok(Box::new(RandomReads::prepare(lab, 32)?)),
}];

/// Those of them that need a [large device](Lab::large).
pub(crate) const LARGE_ROWS: &[Row] = &[
    deep(
        "randread4k_qd128_vs_raw_verified",
        0.75,
        "random 4 KiB direct reads, 128 in flight, of a file of 1e6 extents, checksums verified",
        |lab| Ok(Box::new(DeepReads(Scattered::prepare(lab, MILLION, 128, true)?))),
    ),
    deep("randread4k_qd128_vs_raw_unverified", 0.88, "the same, checksums not verified", |lab| {
        Ok(Box::new(DeepReads(Scattered::prepare(lab, MILLION, 128, false)?)))
    }),
];

const fn deep(
    metric: &'static str,
    goal: f64,
    about: &'static str,
    prepare: fn(&Lab) -> Result<Box<dyn Contest>>,
) -> Row {
    Row {
        metric,
        unit: "IOPS",
        peer_name: Some("raw device"),
        figure: Figure::Ratio,
        goal: Some(Goal::AtLeast(goal)),
        on_device: false,
        about,
        prepare,
    }
}

struct DeepReads(Scattered);

impl Contest for DeepReads {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        Ok(self.0.ours(lab, lab.clock)?.per_second())
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        Ok(Some(self.0.raw(lab, lab.clock)?.per_second()))
    }

    fn remarks(&self) -> Vec<String> {
        vec![self.0.remark()]
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.0.finish()
    }
}

const BLOCK: usize = 4096;
const FILE_BYTES: u64 = 1 << 30;
const BLOCKS: u64 = FILE_BYTES / BLOCK as u64;
const EXTENTS: u64 = 100_000;
/// Overwrites between two looks at the number of extents.
const ROUND: u64 = 8192;

struct RandomReads {
    mounted: Mounted,
    file: File,
    raw: RawLane,
    buffers: Vec<DmaBuf>,
    extents: u64,
    seed: Cell<u64>,
}

impl RandomReads {
    fn prepare(lab: &Lab, depth: usize) -> Result<RandomReads> {
        // The file, its overwritten blocks that wait for a commit, and metadata.
        let (capacity, need) = (lab.device().geometry().capacity, 2 * FILE_BYTES);
        if capacity < need {
            let (capacity, need) = (units::bytes(capacity), units::bytes(need));
            return Err(Failure::new(format!("the device has {capacity}; this row needs {need}")));
        }
        lab.touch(FILE_BYTES)?;
        let mounted = lab.fresh()?;
        let file = mounted.create_filled(lab, "randread", FILE_BYTES)?;
        let mut buffers = dma_buffers(lab.device(), depth, BLOCK)?;
        let extents = scatter(lab, &mounted, &file, &mut buffers)?;
        let raw = RawLane::new(lab.device(), 0)?;
        Ok(RandomReads { mounted, file, raw, buffers, extents, seed: Cell::new(lab.seed) })
    }

    /// Both sides of a sample use the same offsets; the next sample uses others.
    fn offsets(seed: u64) -> impl FnMut() -> u64 {
        let mut rng = SmallRng::seed_from_u64(seed);
        move || rng.random_range(0..BLOCKS) * BLOCK as u64
    }
}

/// Overwrites random blocks until the file is in [`EXTENTS`] pieces, and makes that durable. Returns how many it has.
fn scatter(lab: &Lab, mounted: &Mounted, file: &File, buffers: &mut Vec<DmaBuf>) -> Result<u64> {
    let mut next = RandomReads::offsets(!lab.seed);
    let bar = lab.bars.steps("scatter the file", EXTENTS);
    let mut lane = FileLane::new(&mounted.channel, file.clone());
    let mut written = 0;
    loop {
        let extents = extents(mounted, file)?;
        bar.set_position(extents);
        if extents >= EXTENTS {
            bar.finish_and_clear();
            return Ok(extents);
        }
        if written >= 4 * BLOCKS {
            let (extents, written) = (units::count(extents), units::count(written));
            return Err(Failure::new(format!(
                "the file has only {extents} extents after {written} random overwrites"
            )));
        }
        pump(Clock::Wall, &mut lane, buffers, Until::Operations(ROUND), |lane, buf| {
            lane.write(next(), buf, 0)
        })?;
        written += ROUND;
        mounted.channel.sync().doing("sync the filesystem")?;
    }
}

fn extents(mounted: &Mounted, file: &File) -> Result<u64> {
    Ok(mounted.channel.stat_file(file).doing("ask for the extents of the file")?.extents)
}

impl Contest for RandomReads {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let _pinned = Pinned::to_last_core();
        let mut next = RandomReads::offsets(self.seed.get());
        let mut lane = FileLane::new(&self.mounted.channel, self.file.clone());
        let until = Until::Time(lab.seconds);
        let pumped =
            pump(lab.clock, &mut lane, &mut self.buffers, until, |lane, buf| lane.read(next(), buf, 0))?;
        Ok(pumped.per_second())
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        let _pinned = Pinned::to_last_core();
        let mut next = RandomReads::offsets(self.seed.replace(self.seed.get() + 1));
        let until = Until::Time(lab.seconds);
        let pumped =
            pump(lab.clock, &mut self.raw, &mut self.buffers, until, |lane, buf| lane.read(next(), buf, 0))?;
        Ok(Some(pumped.per_second()))
    }

    fn remarks(&self) -> Vec<String> {
        vec![format!("the file has {} extents", units::count(self.extents))]
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let RandomReads { mounted, file, .. } = *self;
        drop(file);
        mounted.unmount()
    }
}
