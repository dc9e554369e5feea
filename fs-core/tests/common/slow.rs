//! A device that answers late and out of order, as real ones do: an answer of the device inside is kept for a few polls,
//! and those that are due come in random order. The memory device alone would answer everything at the next poll.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bdev_adapter::{ClaimFlag, Completion, Device, DmaSource, Error, Geometry, QueuePair, Request};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct SlowDevice {
    inner: Arc<dyn Device>,
    /// Polls that an answer is kept at most.
    polls: u32,
    seed: u64,
    queue_pairs: AtomicU64,
}

impl SlowDevice {
    /// Keeps answers of `inner` for up to `polls` polls.
    pub(crate) fn wrap(inner: Arc<dyn Device>, seed: u64, polls: u32) -> Arc<dyn Device> {
        Arc::new(SlowDevice { inner, polls, seed, queue_pairs: AtomicU64::new(0) })
    }
}

impl Device for SlowDevice {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn geometry(&self) -> &Geometry {
        self.inner.geometry()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error> {
        let number = self.queue_pairs.fetch_add(1, Ordering::Relaxed);
        let rng = SmallRng::seed_from_u64(self.seed.wrapping_add(number));
        let inner = Arc::clone(&self.inner).queue_pair()?;
        Ok(Box::new(SlowQueuePair { inner, rng, polls: self.polls, kept: Vec::new(), arrived: Vec::new() }))
    }

    fn dma(&self) -> Arc<dyn DmaSource> {
        self.inner.dma()
    }

    fn epoch(&self) -> u64 {
        self.inner.epoch()
    }

    fn claim_flag(&self) -> &ClaimFlag {
        self.inner.claim_flag()
    }
}

struct SlowQueuePair {
    inner: Box<dyn QueuePair>,
    rng: SmallRng,
    polls: u32,
    /// Answers and the polls that they still have to wait.
    kept: Vec<(u32, Completion)>,
    arrived: Vec<Completion>,
}

impl QueuePair for SlowQueuePair {
    fn submit(&mut self, request: Request) {
        self.inner.submit(request);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        self.inner.poll(&mut self.arrived);
        for completion in self.arrived.drain(..) {
            self.kept.push((self.rng.random_range(0..=self.polls), completion));
        }
        if self.kept.is_empty() {
            return 0;
        }
        self.kept.shuffle(&mut self.rng);
        let before = completions.len();
        for (wait, completion) in std::mem::take(&mut self.kept) {
            if wait == 0 { completions.push(completion) } else { self.kept.push((wait - 1, completion)) }
        }
        completions.len() - before
    }

    fn outstanding(&self) -> usize {
        self.inner.outstanding() + self.kept.len()
    }

    fn wait(&mut self, timeout: Duration) {
        if self.kept.is_empty() {
            self.inner.wait(timeout);
        }
    }
}
