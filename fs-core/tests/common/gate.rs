//! A device with a gate: while it is closed for a kind of request, answers to such requests are kept. The request itself is done at
//! once, so what a kept read returns is what was there before. Interleavings are made with it that are the same every time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bdev_adapter::{ClaimFlag, Completion, Device, DmaSource, Error, Geometry, Kind, QueuePair, Request};

/// Tags of requests that are kept; a list, as there are few.
#[derive(Default)]
struct TagSet(Vec<u64>);

impl TagSet {
    fn insert(&mut self, tag: u64) {
        self.0.push(tag);
    }

    fn remove(&mut self, tag: u64) -> bool {
        let found = self.0.iter().position(|other| *other == tag);
        found.map(|at| self.0.swap_remove(at)).is_some()
    }
}

/// What is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Keep {
    Nothing,
    Reads,
    Writes,
    /// What is kept stays so; the rest goes on.
    NothingMore,
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct GateDevice {
    inner: Arc<dyn Device>,
    keep: AtomicU64,
}

impl GateDevice {
    pub(crate) fn wrap(inner: Arc<dyn Device>) -> Arc<GateDevice> {
        Arc::new(GateDevice { inner, keep: AtomicU64::new(0) })
    }

    /// Keeps the answers of requests that are sent from now on; `Nothing` lets all go.
    pub(crate) fn keep(&self, what: Keep) {
        self.keep.store(what as u64, Ordering::SeqCst);
    }
}

impl Device for GateDevice {
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
        let inner = Arc::clone(&self.inner).queue_pair()?;
        let (tags, kept) = (TagSet::default(), Vec::new());
        Ok(Box::new(GateQueuePair { inner, device: self, tags, kept, arrived: Vec::new() }))
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

struct GateQueuePair {
    inner: Box<dyn QueuePair>,
    device: Arc<GateDevice>,
    tags: TagSet,
    kept: Vec<Completion>,
    arrived: Vec<Completion>,
}

impl QueuePair for GateQueuePair {
    fn submit(&mut self, request: Request) {
        let keep = self.device.keep.load(Ordering::SeqCst);
        let is_read = matches!(request.kind, Kind::Read);
        let is_write = matches!(request.kind, Kind::Write);
        if (keep == Keep::Reads as u64 && is_read) || (keep == Keep::Writes as u64 && is_write) {
            self.tags.insert(request.tag);
        }
        self.inner.submit(request);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        self.inner.poll(&mut self.arrived);
        for completion in self.arrived.drain(..) {
            if self.tags.remove(completion.tag) {
                self.kept.push(completion)
            } else {
                completions.push(completion)
            }
        }
        if self.device.keep.load(Ordering::SeqCst) == Keep::Nothing as u64 {
            completions.append(&mut self.kept);
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
