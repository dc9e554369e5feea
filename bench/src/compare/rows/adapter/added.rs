//! What the adapter adds to SPDK's block device layer: the same reads through a queue pair, and by SPDK's own functions
//! ([`DirectReads`](bdev_adapter::spdk::direct::DirectReads)), in the same loop on the same bdev.
//!
//! The bdev is a null bdev, which answers at once and moves no bytes: above memory or a drive, the few nanoseconds would be
//! lost in the noise. CPU time counts, whatever `--clock` says: nothing here waits.

use crate::compare::lab::Lab;
use crate::compare::row::Contest;
use crate::failure::Result;

#[cfg(not(feature = "spdk"))]
pub(super) fn prepare(_: &Lab) -> Result<Box<dyn Contest>> {
    super::needs_spdk().map(|()| unreachable!("this build has no SPDK"))
}

#[cfg(feature = "spdk")]
pub(super) fn prepare(_: &Lab) -> Result<Box<dyn Contest>> {
    Ok(Box::new(with_spdk::Reads::prepare()?))
}

#[cfg(feature = "spdk")]
mod with_spdk {
    use std::time::Duration;

    use bdev_adapter::spdk::direct::DirectReads;
    use bdev_adapter::{Completion, DmaBuf, Error, QueuePair, Request, spdk};
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::super::BLOCK;
    use crate::compare::lab::Lab;
    use crate::compare::row::Contest;
    use crate::failure::{Doing, Failure, Result};
    use crate::session::dma_buffers;
    use crate::sys::{Clock, Pinned};

    const DEPTH: usize = 32;
    const BLOCKS: u64 = (2 << 30) / BLOCK as u64;
    /// Reads between two looks at the clock; filling and emptying the queue is lost in so many.
    const BATCH: u64 = 1 << 18;
    const NAME: &str = "BenchNull";

    pub(super) struct Reads {
        queue: Box<dyn QueuePair>,
        buffers: Vec<DmaBuf>,
        completions: Vec<Completion>,
        direct: DirectReads,
    }

    impl Reads {
        pub(super) fn prepare() -> Result<Reads> {
            let null = format!(r#"{{"name":"{NAME}","num_blocks":{BLOCKS},"block_size":{BLOCK}}}"#);
            match spdk::rpc("bdev_null_create", &null, Duration::from_secs(30)) {
                Err(Error::Unavailable { why, .. }) => return Err(Failure::Skipped(why)),
                result => result.doing("make a null bdev")?,
            }
            let direct = DirectReads::open(NAME, DEPTH).doing("open the null bdev")?;
            let device = direct.device();
            let buffers = dma_buffers(&device, DEPTH, BLOCK)?;
            let queue = device.queue_pair().doing("open a queue pair")?;
            Ok(Reads { queue, buffers, completions: Vec::with_capacity(DEPTH), direct })
        }

        /// The loop of [`DirectReads::run`], over the queue pair.
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
                    completion.result.doing("read")?;
                    queue.submit(request(completion.bufs));
                }
            }
            while queue.outstanding() > 0 {
                queue.poll(&mut self.completions);
            }
            self.buffers.extend(self.completions.drain(..).filter_map(|completion| completion.bufs.into_one()));
            Ok(())
        }
    }

    impl Contest for Reads {
        fn ours(&mut self, lab: &Lab) -> Result<f64> {
            ns_per_read(lab, |random| self.read(BATCH, || random.random_range(0..BLOCKS)))
        }

        fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
            ns_per_read(lab, |random| {
                self.direct.run(BATCH, || random.random_range(0..BLOCKS));
                Ok(())
            })
            .map(Some)
        }
    }

    fn ns_per_read(lab: &Lab, mut batch: impl FnMut(&mut SmallRng) -> Result<()>) -> Result<f64> {
        let _pinned = Pinned::to_last_core();
        let mut random = SmallRng::seed_from_u64(lab.seed);
        let watch = Clock::Cpu.start();
        let mut reads = 0;
        while watch.elapsed() < lab.seconds {
            batch(&mut random)?;
            reads += BATCH;
        }
        Ok(watch.elapsed().as_nanos() as f64 / reads as f64)
    }
}
