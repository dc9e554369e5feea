//! The adapter alone, without the filesystem, against SPDK itself: its own measuring programs, and direct calls of its
//! functions.

mod added;
mod malloc;
mod peers;
mod tcp;

use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::{Completion, Device, DmaBuf, QueuePair, Request};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::compare::lab::Lab;
use crate::compare::row::{Figure, Goal, Row};
use crate::failure::{Doing, Failure, Result};
use crate::session::dma_buffers;
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
/// Reads between two looks at the clock; filling and emptying the queue is lost in so many.
const BATCH: u64 = 1 << 16;

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

/// Reads through a queue pair in the tightest loop there is; SPDK's programs do no more between two reads.
struct Reader {
    queue: Box<dyn QueuePair>,
    buffers: Vec<DmaBuf>,
    completions: Vec<Completion>,
}

impl Reader {
    /// A queue pair of its own, and `depth` buffers of a block.
    fn open(device: &Arc<dyn Device>, depth: usize) -> Result<Reader> {
        let buffers = dma_buffers(device, depth, BLOCK)?;
        let queue = Arc::clone(device).queue_pair().doing("open a queue pair of the device")?;
        Ok(Reader { queue, buffers, completions: Vec::with_capacity(depth) })
    }

    /// Reads `reads` blocks or a few more, whose numbers `next_block` tells; then waits for what is in flight.
    fn read(&mut self, reads: u64, mut next_block: impl FnMut() -> u64) -> Result<()> {
        let mut request = |buf| Request::read(next_block() * BLOCK as u64, buf, 0);
        let queue = &mut *self.queue;
        for buf in self.buffers.drain(..) {
            queue.submit(request(buf.into()));
        }
        let mut left = reads;
        while left > 0 {
            left = left.saturating_sub(queue.poll(&mut self.completions) as u64);
            for completion in self.completions.drain(..) {
                if completion.result.is_err() {
                    return failed(completion);
                }
                queue.submit(request(completion.bufs));
            }
        }
        while queue.outstanding() > 0 {
            queue.poll(&mut self.completions);
        }
        self.buffers.extend(self.completions.drain(..).filter_map(|completion| completion.bufs.into_one()));
        Ok(())
    }

    /// Reads random blocks among the first `blocks` for the time of a sample. Per second of the time that passes: the peers
    /// know no other.
    fn per_second(&mut self, lab: &Lab, blocks: u64) -> Result<f64> {
        let mut random = SmallRng::seed_from_u64(lab.seed);
        let (watch, mut reads) = (Clock::Wall.start(), 0);
        while watch.elapsed() < sample_time(lab) {
            self.read(BATCH, || random.random_range(0..blocks))?;
            reads += BATCH;
        }
        Ok(reads as f64 / watch.elapsed().as_secs_f64())
    }
}

#[cold]
fn failed(completion: Completion) -> Result<()> {
    completion.result.doing("measure")
}
