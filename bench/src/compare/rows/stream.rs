//! Streams of 1 MiB accesses, against the raw device.
//!
//! Writes: each sample makes a fresh filesystem and writes a new file, then syncs; the raw side writes the same bytes to
//! the same device after that was unmounted, then flushes. Both syncs are inside the time. Reads: the raw side reads live
//! beside the mounted filesystem.

use std::time::Duration;

use bdev_adapter::DmaBuf;
use fs_core::File;

use crate::compare::lab::{Lab, Mounted, mib_per_s};
use crate::compare::pump::{Until, pump, sync};
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::failure::{Doing, Result};
use crate::lane::{FileLane, Lane, RawLane};
use crate::session::dma_buffers;
use crate::sys::{Clock, Pinned};

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[
    Row {
        metric: "seqwrite1m_vs_raw",
        unit: "MiB/s",
        peer_name: Some("raw device"),
        figure: Figure::Ratio,
        goal: Some(Goal::AtLeast(0.60)),
        on_device: true,
        about: "sequential 1 MiB direct writes, 8 in flight, checksums on, final sync inside (raw: final flush)",
        prepare: |lab| Ok(Box::new(Writes::prepare(lab)?)),
    },
    Row {
        metric: "seqread1m_vs_raw",
        unit: "MiB/s",
        peer_name: Some("raw device"),
        figure: Figure::Ratio,
        goal: Some(Goal::AtLeast(0.60)),
        on_device: true,
        about: "sequential 1 MiB direct reads, 8 in flight, checksums verified",
        prepare: |lab| Ok(Box::new(Reads::prepare(lab)?)),
    },
];

const PIECE: usize = 1 << 20;
const DEPTH: usize = 8;
const FILE_BYTES: u64 = 512 << 20;

struct Writes {
    span: u64,
    buffers: Vec<DmaBuf>,
}

impl Writes {
    fn prepare(lab: &Lab) -> Result<Writes> {
        lab.touch(FILE_BYTES)?;
        let mut buffers = dma_buffers(lab.device(), DEPTH, PIECE)?;
        for (number, buf) in buffers.iter_mut().enumerate() {
            crate::transfer::edit::pattern(lab.seed + number as u64, 0, buf);
        }
        Ok(Writes { span: lab.span(FILE_BYTES)?, buffers })
    }

    /// Writes the span once and makes it durable.
    fn pass(&mut self, clock: Clock, lane: &mut impl Lane) -> Result<Duration> {
        let _pinned = Pinned::to_last_core();
        let started = clock.start();
        let mut at = 0;
        pump(clock, lane, &mut self.buffers, Until::Operations(self.span / PIECE as u64), |lane, buf| {
            lane.write(at, buf, 0);
            at += PIECE as u64;
        })?;
        sync(lane)?;
        Ok(started.elapsed())
    }
}

impl Contest for Writes {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let (mut bytes, mut time) = (0, Duration::ZERO);
        while time < lab.seconds {
            let mounted = lab.fresh()?;
            let file = mounted.create("stream")?;
            time += self.pass(lab.clock, &mut FileLane::new(&mounted.channel, file))?;
            bytes += self.span;
            mounted.unmount()?;
        }
        Ok(mib_per_s(bytes, time))
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        let (mut bytes, mut time) = (0, Duration::ZERO);
        let mut lane = RawLane::new(lab.device(), 0)?;
        while time < lab.seconds {
            time += self.pass(lab.clock, &mut lane)?;
            bytes += self.span;
        }
        Ok(Some(mib_per_s(bytes, time)))
    }
}

struct Reads {
    mounted: Mounted,
    file: File,
    raw: RawLane,
    span: u64,
    buffers: Vec<DmaBuf>,
}

impl Reads {
    fn prepare(lab: &Lab) -> Result<Reads> {
        lab.touch(FILE_BYTES)?;
        let span = lab.span(FILE_BYTES)?;
        let mounted = lab.fresh()?;
        let file = mounted.create_filled(lab, "stream", span)?;
        let (raw, buffers) = (RawLane::new(lab.device(), 0)?, dma_buffers(lab.device(), DEPTH, PIECE)?);
        Ok(Reads { mounted, file, raw, span, buffers })
    }
}

/// Offsets that go through `span` again and again.
fn around(span: u64) -> impl FnMut() -> u64 {
    let mut at = 0;
    move || {
        let offset = at;
        at = if at + PIECE as u64 == span { 0 } else { at + PIECE as u64 };
        offset
    }
}

impl Contest for Reads {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let _pinned = Pinned::to_last_core();
        let mut next = around(self.span);
        let mut lane = FileLane::new(&self.mounted.channel, self.file.clone());
        let until = Until::Time(lab.seconds);
        let pumped =
            pump(lab.clock, &mut lane, &mut self.buffers, until, |lane, buf| lane.read(next(), buf, 0))?;
        Ok(mib_per_s(pumped.operations * PIECE as u64, pumped.time))
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        let _pinned = Pinned::to_last_core();
        let mut next = around(self.span);
        let until = Until::Time(lab.seconds);
        let pumped =
            pump(lab.clock, &mut self.raw, &mut self.buffers, until, |lane, buf| lane.read(next(), buf, 0))?;
        Ok(Some(mib_per_s(pumped.operations * PIECE as u64, pumped.time)))
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let Reads { mounted, file, .. } = *self;
        mounted.channel.close(file).doing("close the file")?;
        mounted.unmount()
    }
}
