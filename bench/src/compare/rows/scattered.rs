//! A file that lies in a given number of extents, each a block of its own, beside the raw device below it.
//!
//! The blocks of the file were written one at a time and in random order, so neighbours in the file are none on the device.
//! Raw reads go live to the same device, through a queue pair of their own, over as many bytes as the file has.

use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::{Device, DmaBuf};
use fs_core::{File, MountOptions};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::compare::lab::{Lab, Mounted};
use crate::compare::pump::{Pumped, Until, pump};
use crate::failure::{Doing, Failure, Result};
use crate::lane::{FileLane, Lane, RawLane};
use crate::session::dma_buffers;
use crate::sys::{Clock, Pinned};
use crate::units;

pub(super) const BLOCK: usize = 4096;
/// The blocks of a file of "1e6 extents".
pub(super) const MILLION: u64 = 1 << 20;
/// Beside the file: metadata, twice, and what writes need to be sure of their space.
const ROOM_BYTES: u64 = 768 << 20;
/// Writes between two commits.
const ROUND: u64 = 1 << 16;

/// See the module documentation.
pub(super) struct Scattered {
    pub(super) mounted: Mounted,
    pub(super) file: File,
    pub(super) device: Arc<dyn Device>,
    raw: RawLane,
    buffers: Vec<DmaBuf>,
    blocks: u64,
    extents: u64,
    seed: u64,
}

impl Scattered {
    /// A filesystem with nothing but a file of `blocks` blocks, for reads with `depth` in flight.
    pub(super) fn prepare(lab: &Lab, blocks: u64, depth: usize, verify_data: bool) -> Result<Scattered> {
        let device = lab.large(MILLION * BLOCK as u64 + ROOM_BYTES)?;
        let mounted = lab.fresh_on(&device, MountOptions { verify_data, ..MountOptions::default() })?;
        let file = mounted.create("scattered")?;
        write_scattered(lab, &mounted, &file, &device, blocks)?;
        let stat = mounted.channel.stat_file(&file).doing("ask for the extents of the file")?;
        // Some follow each other on the device by chance.
        if stat.extents < blocks - blocks / 100 {
            let (extents, blocks) = (units::count(stat.extents), units::count(blocks));
            return Err(Failure::new(format!("the file has only {extents} extents in {blocks} blocks")));
        }
        let raw = RawLane::new(&device, 0)?;
        let buffers = dma_buffers(&device, depth, BLOCK)?;
        Ok(Scattered { mounted, file, device, raw, buffers, blocks, extents: stat.extents, seed: lab.seed })
    }

    /// Random reads of the file for the time of a sample.
    pub(super) fn ours(&mut self, lab: &Lab, clock: Clock) -> Result<Pumped> {
        let _pinned = Pinned::to_last_core();
        let mut lane = FileLane::new(&self.mounted.channel, self.file.clone());
        read_randomly(clock, lab.seconds, &mut lane, &mut self.buffers, 0..self.blocks, self.seed)
    }

    /// The same reads of the raw device; the next sample has others.
    pub(super) fn raw(&mut self, lab: &Lab, clock: Clock) -> Result<Pumped> {
        let _pinned = Pinned::to_last_core();
        let seed = self.seed;
        self.seed += 1;
        read_randomly(clock, lab.seconds, &mut self.raw, &mut self.buffers, 0..self.blocks, seed)
    }

    pub(super) fn remark(&self) -> String {
        format!("the file has {} extents", units::count(self.extents))
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(super) fn finish(self) -> Result<()> {
        let Scattered { mounted, file, .. } = self;
        mounted.channel.close(file).doing("close the file")?;
        mounted.unmount()
    }
}

/// Reads random blocks of `range` for the time of a sample, as many at a time as there are `buffers`.
pub(super) fn read_randomly(
    clock: Clock,
    time: Duration,
    lane: &mut impl Lane,
    buffers: &mut Vec<DmaBuf>,
    range: std::ops::Range<u64>,
    seed: u64,
) -> Result<Pumped> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut next = || rng.random_range(range.clone()) * BLOCK as u64;
    pump(clock, lane, buffers, Until::Time(time), |lane, buf| lane.read(next(), buf, 0))
}

fn write_scattered(
    lab: &Lab,
    mounted: &Mounted,
    file: &File,
    device: &Arc<dyn Device>,
    blocks: u64,
) -> Result<()> {
    let mut order: Vec<u64> = (0..blocks).collect();
    order.shuffle(&mut SmallRng::seed_from_u64(!lab.seed));
    let mut buffers = dma_buffers(device, 32, BLOCK)?;
    for (number, buf) in buffers.iter_mut().enumerate() {
        crate::transfer::edit::pattern(number as u64, 0, buf);
    }
    let bar = lab.bars.steps("scatter the file", blocks);
    let mut lane = FileLane::new(&mounted.channel, file.clone());
    let mut left = order.into_iter();
    while left.len() > 0 {
        let round = Until::Operations(ROUND.min(left.len() as u64));
        pump(Clock::Wall, &mut lane, &mut buffers, round, |lane, buf| {
            if let Some(block) = left.next() {
                lane.write(block * BLOCK as u64, buf, 0);
            }
        })?;
        mounted.channel.sync().doing("sync the filesystem")?;
        bar.set_position(blocks - left.len() as u64);
    }
    bar.finish_and_clear();
    Ok(())
}
