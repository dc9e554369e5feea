//! Mount time must follow the log, not the number of files or the size of the device.
//!
//! Both sides are sparse memory devices, whatever `--device` is: 8 TiB are not at hand otherwise, and a device that costs
//! nothing shows the filesystem's own cost. A sample is the mean of a few mounts, each up to the first answer to a stat.

use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::Device;
use fs_core::{OpenFlags, Operation, Output};

use crate::compare::lab::Lab;
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::failure::{Doing, Failure, Result};
use crate::flight::Flight;
use crate::session::{Access, format_device, mount_device, open_device};
use crate::sys::Clock;

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[
    Row {
        metric: "mount_100k_vs_100_files",
        unit: "ms",
        peer_name: Some("100 files"),
        figure: Figure::Ratio,
        goal: Some(Goal::AtMost(2.0)),
        on_device: true,
        about: "mount and first stat with 100,000 files of 4 KiB, against the same with 100 (memory devices of 4 GiB)",
        prepare: |lab| Ok(Box::new(Mounts::prepare(lab, ("mem:4GiB", 100_000), ("mem:4GiB", 100))?)),
    },
    Row {
        metric: "mount_8tib_vs_8gib",
        unit: "ms",
        peer_name: Some("8 GiB"),
        figure: Figure::Ratio,
        goal: Some(Goal::AtMost(2.0)),
        on_device: true,
        about: "mount and first stat of a sparse memory device of 8 TiB, against one of 8 GiB (1,000 files each)",
        prepare: |lab| Ok(Box::new(Mounts::prepare(lab, ("mem:8TiB", 1000), ("mem:8GiB", 1000))?)),
    },
];

/// Mounts of one sample.
const MOUNTS: u32 = 4;

struct Mounts {
    ours: Populated,
    peer: Populated,
}

/// A device with files on it.
struct Populated {
    device: Arc<dyn Device>,
    files: u32,
}

impl Mounts {
    fn prepare(lab: &Lab, ours: (&str, u32), peer: (&str, u32)) -> Result<Mounts> {
        Ok(Mounts { ours: Populated::new(lab, ours)?, peer: Populated::new(lab, peer)? })
    }
}

impl Contest for Mounts {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        self.ours.mount_ms(lab.clock)
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        self.peer.mount_ms(lab.clock).map(Some)
    }
}

fn name(number: u32) -> Vec<u8> {
    format!("file-{number:08}").into_bytes()
}

impl Populated {
    fn new(lab: &Lab, (uri, files): (&str, u32)) -> Result<Populated> {
        let device = open_device(uri, Access::Create)?;
        format_device(&device, "mount", true)?;
        let fs = mount_device(&device, false)?;
        let channel = fs.channel().doing("open a channel")?;
        let bar = lab.bars.steps("create files", u64::from(files));
        // Open, write, close: each file is one chain, many chains at once.
        let mut flight = Flight::new(&channel, 64);
        let mut next = 0;
        loop {
            while next < files && flight.has_room() {
                let flags = OpenFlags::CREATE | OpenFlags::EXCLUSIVE;
                flight.submit(Operation::Open { name: name(next), flags }, None);
                next += 1;
            }
            let Some((file, completion)) = flight.next() else { break };
            match (completion.result.doing("create a file")?, file) {
                (Output::Opened(file), _) => {
                    let mut buf = channel.buffer(4096).doing("allocate an I/O buffer")?;
                    buf.fill(next as u8);
                    flight.submit(Operation::Write { file: file.clone(), offset: 0, buf }, Some(file));
                }
                (_, Some(file)) => flight.submit(Operation::Close { file }, None),
                (_, None) => bar.inc(1),
            }
        }
        bar.finish_and_clear();
        channel.sync().doing("sync the filesystem")?;
        drop(flight);
        drop(channel);
        fs.unmount().doing("unmount the filesystem")?;
        Ok(Populated { device, files })
    }

    /// The mean time of a mount up to the first answer.
    fn mount_ms(&self, clock: Clock) -> Result<f64> {
        let mut total = Duration::ZERO;
        for _ in 0..MOUNTS {
            let started = clock.start();
            let fs = mount_device(&self.device, false)?;
            let channel = fs.channel().doing("open a channel")?;
            let stat = channel.stat(name(self.files / 2)).doing("look at a file")?;
            total += started.elapsed();
            if stat.size != 4096 {
                return Err(Failure::new(format!("a file of 4096 bytes has {} after a mount", stat.size)));
            }
            drop(channel);
            fs.unmount().doing("unmount the filesystem")?;
        }
        Ok(total.as_secs_f64() * 1e3 / f64::from(MOUNTS))
    }
}
