//! Random reads by two threads, against the raw device's own scaling.
//!
//! Each thread reads its half of one file, on a core and a channel of its own. A sample is what two threads read in a second,
//! divided by what one of them reads alone; the peer is the same quotient of two threads with a queue pair each on the raw
//! device. So what the cores share (memory, caches, the clock) is on both sides.

use std::sync::{Arc, Barrier};
use std::time::Duration;

use bdev_adapter::Device;
use fs_core::{File, Filesystem};

use crate::compare::lab::Lab;
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::compare::rows::scattered::{BLOCK, MILLION, Scattered, read_randomly};
use crate::failure::{Doing, Failure, Result};
use crate::lane::{FileLane, RawLane};
use crate::session::dma_buffers;
use crate::sys::{Clock, Pinned, cores};

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[Row {
    metric: "read_scaling_2_threads_vs_raw",
    unit: "x",
    peer_name: Some("raw device"),
    figure: Figure::Ratio,
    goal: Some(Goal::AtLeast(0.95)),
    on_device: false,
    about: "4 KiB random direct reads, two threads with 32 in flight each in halves of one file of 1e6 extents, over one thread",
    prepare: |lab| Ok(Box::new(Scaling::prepare(lab)?)),
}];

const DEPTH: usize = 32;

struct Scaling {
    scattered: Scattered,
    cores: [usize; 2],
    seed: u64,
}

/// What the threads read.
#[derive(Clone, Copy)]
enum From {
    File,
    Raw,
}

impl Scaling {
    fn prepare(lab: &Lab) -> Result<Scaling> {
        let &[.., first, second] = &cores()[..] else {
            return Err(Failure::Skipped("there is only one core".to_owned()));
        };
        let scattered = Scattered::prepare(lab, MILLION, DEPTH, true)?;
        Ok(Scaling { scattered, cores: [second, first], seed: lab.seed })
    }

    /// Operations per second of two threads together, over those of one.
    fn scaling(&self, lab: &Lab, from: From) -> Result<f64> {
        let alone = self.per_second(lab, from, 1)?;
        Ok(self.per_second(lab, from, 2)? / alone)
    }

    fn per_second(&self, lab: &Lab, from: From, threads: usize) -> Result<f64> {
        let Scattered { mounted, file, device, .. } = &self.scattered;
        let barrier = Barrier::new(threads);
        let reader = Reader {
            fs: &mounted.fs,
            file,
            device,
            barrier: &barrier,
            half: self.scattered.blocks() / 2,
            clock: lab.clock,
            time: lab.seconds,
            from,
        };
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..threads)
                .map(|number| {
                    let (reader, core, seed) = (&reader, self.cores[number], self.seed + number as u64);
                    scope.spawn(move || reader.run(number as u64, core, seed))
                })
                .collect();
            let rates = running.into_iter().map(|thread| {
                thread.join().map_err(|_| Failure::new("a reading thread panicked")).and_then(|rate| rate)
            });
            rates.sum()
        })
    }
}

/// What the threads share.
struct Reader<'a> {
    fs: &'a Filesystem,
    file: &'a File,
    device: &'a Arc<dyn Device>,
    barrier: &'a Barrier,
    half: u64,
    clock: Clock,
    time: Duration,
    from: From,
}

impl Reader<'_> {
    /// One thread: reads its half from `core`; operations per second.
    fn run(&self, number: u64, core: usize, seed: u64) -> Result<f64> {
        let _pinned = Pinned::to_core(core);
        let range = number * self.half..(number + 1) * self.half;
        let prepare = || {
            let buffers = dma_buffers(self.device, DEPTH, BLOCK)?;
            let channel = self.fs.channel().doing("open a channel")?;
            Ok((buffers, channel, RawLane::new(self.device, 0)?))
        };
        // Who cannot read must not leave the other waiting.
        let prepared: Result<_> = prepare();
        self.barrier.wait();
        let (mut buffers, channel, mut raw) = prepared?;
        let (clock, time) = (self.clock, self.time);
        let pumped = match self.from {
            From::Raw => read_randomly(clock, time, &mut raw, &mut buffers, range, seed),
            From::File => {
                let mut lane = FileLane::new(&channel, self.file.clone());
                read_randomly(clock, time, &mut lane, &mut buffers, range, seed)
            }
        };
        Ok(pumped?.per_second())
    }
}

impl Contest for Scaling {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        self.scaling(lab, From::File)
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        let scaling = self.scaling(lab, From::Raw);
        self.seed += 2;
        scaling.map(Some)
    }

    fn remarks(&self) -> Vec<String> {
        vec![self.scattered.remark()]
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.scattered.finish()
    }
}
