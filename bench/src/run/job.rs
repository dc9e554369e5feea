//! The loop of one job.
//!
//! The clock is read once for each batch of completions, not per I/O: with tens of operations in flight the latencies
//! are as exact as the batch is short, and the clock does not weigh on the figures.

use std::time::{Duration, Instant};

use bdev_adapter::DmaBuf;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

use super::options::{RunArgs, Verify};
use super::stats::JobStats;
use crate::failure::{Doing, Failure, Result};
use crate::lane::{Done, Lane};
use crate::sys::{ThreadUsage, thread_cpu_ns};
use crate::transfer::edit::pattern;

/// Fruitless polls before a job without --hipri sleeps.
const SPINS: u32 = 1000;
/// How long it sleeps at most.
const NAP: Duration = Duration::from_millis(1);

/// What an I/O in flight is.
#[derive(Debug, Clone, Copy, Default)]
enum Kind {
    #[default]
    Read,
    Write,
    Sync,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    kind: Kind,
    /// When it was submitted, in nanoseconds since the start.
    submitted: u64,
}

/// Runs job `number` on `lane` with one buffer for each I/O in flight.
pub(crate) fn run(
    args: &RunArgs,
    number: usize,
    lane: &mut impl Lane,
    buffers: Vec<DmaBuf>,
) -> Result<JobStats> {
    let mut job = Job::new(args, number, buffers)?;
    job.measure(lane)?;
    if args.end_fsync == 1 && args.rw.writes() {
        job.sync_at_end(lane)?;
    }
    if args.verify == Verify::Pattern {
        job.verify(lane)?;
    }
    Ok(job.stats)
}

struct Job<'a> {
    args: &'a RunArgs,
    rng: SmallRng,
    started: Instant,
    stats: JobStats,
    slots: Vec<Slot>,
    free: Vec<usize>,
    buffers: Vec<DmaBuf>,
    /// Blocks of --bs in the file.
    blocks: u64,
    /// Next block of sequential I/O.
    next: u64,
    /// Bytes that may still be asked for.
    budget: u64,
    writes_since_sync: u64,
    /// Which blocks were written, for --verify.
    written: Vec<bool>,
}

impl<'a> Job<'a> {
    fn new(args: &'a RunArgs, number: usize, mut buffers: Vec<DmaBuf>) -> Result<Job<'a>> {
        let seed = args.randseed ^ (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut rng = SmallRng::seed_from_u64(seed);
        buffers.iter_mut().for_each(|buf| rng.fill_bytes(buf));
        let blocks = args.size / args.bs() as u64;
        let verify = args.verify == Verify::Pattern;
        Ok(Job {
            args,
            rng,
            started: Instant::now(),
            stats: JobStats::new(number)?,
            slots: vec![Slot::default(); args.iodepth],
            free: (0..args.iodepth).collect(),
            buffers,
            blocks,
            next: 0,
            budget: if args.time_based { u64::MAX } else { args.size },
            writes_since_sync: 0,
            written: vec![false; if verify { blocks as usize } else { 0 }],
        })
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    /// Ramp, then the time that counts, then the rest comes home uncounted.
    fn measure(&mut self, lane: &mut impl Lane) -> Result<()> {
        let ramp_end = self.args.ramp_time.as_nanos() as u64;
        let mut counting = ramp_end == 0;
        let end = self
            .args
            .runtime
            .map_or(u64::MAX, |runtime| (runtime.as_nanos() as u64).saturating_add(ramp_end));
        let (mut cpu, mut usage, mut began) = (thread_cpu_ns(), ThreadUsage::now(), 0);
        let mut now = self.now();
        let mut idle = 0;
        loop {
            if now < end {
                self.fill_up(lane, now);
            }
            if self.free.len() == self.slots.len() {
                break;
            }
            if lane.poll() == 0 {
                idle += 1;
                if idle > SPINS && !self.args.hipri {
                    lane.wait(NAP);
                }
                continue;
            }
            idle = 0;
            now = self.now();
            while let Some(done) = lane.take() {
                self.account(done, now, counting)?;
            }
            if !counting && now >= ramp_end {
                counting = true;
                (cpu, usage, began) = (thread_cpu_ns(), ThreadUsage::now(), now);
                self.budget = if self.args.time_based { u64::MAX } else { self.args.size };
            }
            if now >= end && counting {
                // What is still in flight was submitted in time but ends after it: it comes home uncounted.
                counting = false;
                self.stop_clock(now - began, cpu, usage);
            }
        }
        if self.stats.elapsed_ns == 0 {
            let now = self.now();
            self.stop_clock(now - began, cpu, usage);
        }
        Ok(())
    }

    fn stop_clock(&mut self, elapsed_ns: u64, cpu: u64, usage: ThreadUsage) {
        self.stats.elapsed_ns = elapsed_ns.max(1);
        self.stats.cpu_ns = thread_cpu_ns() - cpu;
        self.stats.usage = ThreadUsage::now().since(usage);
    }

    #[inline]
    fn fill_up(&mut self, lane: &mut impl Lane, now: u64) {
        let args = self.args;
        let bs = args.bs() as u64;
        while self.budget >= bs
            && let Some(slot) = self.free.pop()
        {
            if args.fsync > 0 && self.writes_since_sync >= args.fsync {
                self.writes_since_sync = 0;
                self.slots[slot] = Slot { kind: Kind::Sync, submitted: now };
                lane.sync(slot as u64);
                continue;
            }
            let Some(buf) = self.buffers.pop() else { return };
            self.budget -= bs;
            let block = self.next_block();
            let read =
                args.rw.reads() && (!args.rw.writes() || self.rng.random_range(0..100) < args.rwmixread);
            if read {
                self.slots[slot] = Slot { kind: Kind::Read, submitted: now };
                lane.read(block * bs, buf, slot as u64);
            } else {
                self.writes_since_sync += 1;
                let buf = self.dress(block, buf);
                self.slots[slot] = Slot { kind: Kind::Write, submitted: now };
                lane.write(block * bs, buf, slot as u64);
            }
        }
    }

    #[inline]
    fn next_block(&mut self) -> u64 {
        if self.args.rw.random() {
            return self.rng.random_range(0..self.blocks);
        }
        let block = self.next;
        self.next = if block + 1 == self.blocks { 0 } else { block + 1 };
        block
    }

    /// Gives a block to be written its pattern. The pattern depends on the place only: two writes of one block in flight
    /// at once may end in any order.
    fn dress(&mut self, block: u64, mut buf: DmaBuf) -> DmaBuf {
        if self.args.verify == Verify::Pattern {
            pattern(!self.args.randseed, block * self.args.bs() as u64, &mut buf);
            self.written[block as usize] = true;
        }
        buf
    }

    #[inline]
    fn account(&mut self, done: Done, now: u64, counting: bool) -> Result<()> {
        if let Some(error) = done.error {
            return Err(*error);
        }
        let slot = self.slots[done.tag as usize];
        self.free.push(done.tag as usize);
        if counting {
            let bytes = done.buf.as_ref().map_or(0, |buf| buf.len());
            let side = match slot.kind {
                Kind::Read => &mut self.stats.read,
                Kind::Write => &mut self.stats.write,
                Kind::Sync => &mut self.stats.sync,
            };
            side.record(bytes, now - slot.submitted);
        }
        self.buffers.extend(done.buf);
        Ok(())
    }

    fn sync_at_end(&mut self, lane: &mut impl Lane) -> Result<()> {
        let began = self.now();
        lane.sync(0);
        wait_for_one(lane)?;
        let took = self.now() - began;
        self.stats.sync.record(0, took);
        self.stats.elapsed_ns += took;
        Ok(())
    }

    /// Reads every written block back and compares it.
    fn verify(&mut self, lane: &mut impl Lane) -> Result<()> {
        let bs = self.args.bs();
        let mut expected = vec![0; bs];
        let Some(mut buf) = self.buffers.pop() else { return Err(Failure::new("a buffer was lost (a bug)")) };
        for block in (0..self.blocks).filter(|&block| self.written[block as usize]) {
            let offset = block * bs as u64;
            lane.read(offset, buf, 0);
            let Some(read) = wait_for_one(lane).doing(format!("verify byte {offset}"))?.buf else {
                return Err(Failure::new("a buffer was lost (a bug)"));
            };
            buf = read;
            pattern(!self.args.randseed, offset, &mut expected);
            if let Some(at) = expected.iter().zip(&*buf).position(|(a, b)| a != b) {
                let (name, at) = (self.args.file_of(self.stats.number), offset + at as u64);
                return Err(Failure::new(format!(
                    "verify: '{name}' differs from what was written at byte {at}"
                )));
            }
            self.stats.verified += 1;
        }
        Ok(())
    }
}

fn wait_for_one(lane: &mut impl Lane) -> Result<Done> {
    loop {
        if lane.poll() == 0 {
            lane.wait(NAP);
        } else if let Some(done) = lane.take() {
            return match done.error {
                Some(error) => Err(*error),
                None => Ok(done),
            };
        }
    }
}
