//! What the extents of an open file cost in memory, through the whole stack.
//!
//! A file is written in random single blocks until it has a tenth of its extents, then all of them; what the process has
//! resident grows by the extents that came between. That takes in whatever follows from them: the file's extent map with the
//! half-empty nodes that random splits leave and the slack of the memory allocator, the bitmaps of the space they lie in,
//! buffers of commits. The node cache is bounded, and full at both points. Checksums of single blocks are in the map;
//! what the cache of the other checksums holds is told apart and not counted.
//!
//! The device is in memory and keeps no zeroes ([`Blanks`]), which is all that is written; its own memory is left out. The blocks
//! are written window by window, in random order inside each, with a commit after each, so that the nodes of the extent tree that
//! change together fit into the small node cache; for the extent map this is the same as random order over the whole file. Modified
//! nodes cannot be evicted: were they as many as the cache holds, the memory allocator would keep room for both from the second
//! window on, which has nothing to do with the number of extents.

use std::cell::RefCell;

use bdev_adapter::DmaBuf;
use fs_core::{File, MountOptions, Stats};
use indicatif::ProgressBar;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use crate::compare::blanks::Blanks;
use crate::compare::lab::{Lab, Mounted};
use crate::compare::pump::{Until, pump};
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::failure::{Doing, Failure, Result};
use crate::lane::{FileLane, Lane};
use crate::session::dma_buffers;
use crate::sys::{Clock, resident_bytes_below};
use crate::units;

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[Row {
    metric: "bytes_per_extent",
    unit: "bytes",
    peer_name: None,
    figure: Figure::Ours,
    goal: Some(Goal::AtMost(24.0)),
    on_device: false,
    about: "resident memory (smaps) that 9e6 more extents of an open file cost, 1e6 to 1e7, node cache full; one sample",
    prepare: |_| Ok(Box::new(Memory::new(10_000_000))),
}];

const BLOCK: u64 = 4096;
const DEPTH: usize = 32;
/// Windows that the file is written in; a tenth of them is the first point.
const WINDOWS: u64 = 100;
/// The most nodes of the extent tree are some 60 bytes an extent: full at a tenth.
const NODE_CACHE_BYTES: usize = 24 << 20;

struct Memory {
    extents: u64,
    remarks: RefCell<Vec<String>>,
}

/// What is in memory at some point.
struct Level {
    resident: u64,
    extents: u64,
    stats: Stats,
}

impl Memory {
    fn new(extents: u64) -> Memory {
        Memory { extents, remarks: RefCell::default() }
    }

    /// Room for the blocks, the trees, and what commits hold back.
    fn device_bytes(&self) -> u64 {
        (self.extents * BLOCK * 3 / 2).max(256 << 20)
    }

    fn level(&self, mounted: &Mounted, file: &File) -> Result<Level> {
        let resident = resident_bytes_below(self.device_bytes() / 2)
            .ok_or_else(|| Failure::Skipped("there is no /proc/self/smaps".to_owned()))?;
        let extents = mounted.channel.stat_file(file).doing("look at the file")?.extents;
        let level = Level { resident, extents, stats: mounted.fs.stats() };
        self.remarks.borrow_mut().push(format!(
            "at {} extents: resident {}; of it extent map {}, node cache {}, checksums of longer extents {}",
            units::count(level.extents),
            units::bytes(level.resident),
            units::bytes(level.stats.extent_map_bytes),
            units::bytes(level.stats.node_cache_bytes),
            units::bytes(level.stats.checksum_cache_bytes),
        ));
        Ok(level)
    }

    /// Writes blocks `from..to` in random order, and commits.
    fn write(
        &self,
        lab: &Lab,
        mounted: &Mounted,
        file: &File,
        buffers: &mut Vec<DmaBuf>,
        (from, to): (u64, u64),
        bar: &ProgressBar,
    ) -> Result<()> {
        let mut order: Vec<u64> = (from..to).collect();
        order.shuffle(&mut SmallRng::seed_from_u64(lab.seed ^ from));
        let mut lane = FileLane::new(&mounted.channel, file.clone());
        let mut next = order.iter();
        while next.len() > 0 {
            let round = (next.len() as u64).min(1 << 16);
            pump(Clock::Wall, &mut lane, buffers, Until::Operations(round), |lane, buf| {
                // As many are taken as the round has.
                let block = next.next().copied().unwrap_or(from);
                lane.write(block * BLOCK, buf, 0);
            })?;
            bar.inc(round);
        }
        mounted.channel.sync().doing("sync the filesystem")
    }
}

impl Contest for Memory {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let device = Blanks::open(self.device_bytes())?;
        let options = MountOptions {
            node_cache_bytes: NODE_CACHE_BYTES,
            extent_map_bytes: 4 << 30,
            ..MountOptions::default()
        };
        let mounted = lab.fresh_on(&device, options)?;
        let file = mounted.create("extents")?;
        let mut buffers = dma_buffers(&device, DEPTH, BLOCK as usize)?;
        let bar = lab.bars.steps("write extents", self.extents);
        let window = self.extents / WINDOWS;
        let mut small = None;
        for at in 0..WINDOWS {
            let range = (at * window, (at + 1) * window);
            self.write(lab, &mounted, &file, &mut buffers, range, &bar)?;
            if at + 1 == WINDOWS / 10 {
                small = Some(self.level(&mounted, &file)?);
            }
        }
        bar.finish_and_clear();
        let large = self.level(&mounted, &file)?;
        let small = small.ok_or_else(|| Failure::new("nothing was written (a bug)"))?;
        let grown = |of: fn(&Level) -> u64| of(&large).saturating_sub(of(&small)) as f64;
        let extents = grown(|level| level.extents);
        if extents < (self.extents / 2) as f64 {
            return Err(Failure::new(format!(
                "only {} extents came into being",
                units::count(extents as u64)
            )));
        }
        let apart = grown(|level| level.stats.checksum_cache_bytes);
        let map = grown(|level| level.stats.extent_map_bytes) / extents;
        self.remarks.get_mut().push(format!("the map's own count says {map:.1} bytes an extent"));
        drop(file);
        mounted.unmount()?;
        Ok((grown(|level| level.resident) - apart) / extents)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::lab::tests::lab;

    #[test]
    fn the_row_builds_its_extents_and_tells_what_is_in_memory() {
        let mut row = Memory::new(200_000);
        let bytes = row.ours(&lab()).unwrap();
        // Other tests of this process run at the same time, so the figure may be anything.
        assert!(bytes.is_finite());
        let remarks = row.remarks();
        assert_eq!(remarks.len(), 3);
        assert!(remarks[0].starts_with("at 19,") || remarks[0].starts_with("at 20,"), "{remarks:?}");
    }
}
