//! A device whose FUA is a write and a flush.
//!
//! QEMU's emulated NVMe controller (7.2) takes the FUA bit of a write and does nothing about it, although its write cache is
//! volatile. On such a drive a filesystem that relies on FUA loses what it acknowledged, and rightly so: the drive broke
//! its word. With this around it the rest of the path can be tested all the same.

use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::{
    ClaimFlag, Completion, Device, DmaSource, Error, Geometry, IoError, IoErrorKind, QueuePair, Request,
    Segments,
};

/// The device.
#[derive(Debug)]
pub(super) struct NoFua {
    inner: Arc<dyn Device>,
    geometry: Geometry,
}

impl NoFua {
    /// `inner`, which never sees FUA.
    pub(super) fn wrap(inner: Arc<dyn Device>) -> Arc<dyn Device> {
        let mut geometry = inner.geometry().clone();
        geometry.native_fua = false;
        Arc::new(NoFua { inner, geometry })
    }
}

impl Device for NoFua {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error> {
        let inner = Arc::clone(&self.inner).queue_pair()?;
        Ok(Box::new(NoFuaQueue { inner, slots: Vec::new(), free: Vec::new(), answers: Vec::new() }))
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

/// A request on its way. The inner tag is its place among the slots.
#[derive(Debug)]
struct Slot {
    tag: u64,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Its answer is the answer.
    Plain,
    /// A write that a flush must follow. For the error of that flush: what the request was.
    Write { op: &'static str, offset: u64, len: u64 },
    /// The flush after a write, whose buffers wait here.
    Flush { op: &'static str, offset: u64, len: u64, bufs: Segments },
}

struct NoFuaQueue {
    inner: Box<dyn QueuePair>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    answers: Vec<Completion>,
}

impl NoFuaQueue {
    fn slot(&mut self, slot: Slot) -> u64 {
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
        };
        index as u64
    }

    /// The answer to hand on, or none when a flush must come first.
    fn answered(&mut self, mut completion: Completion) -> Option<Completion> {
        let index = completion.tag as usize;
        let slot = &mut self.slots[index];
        completion.tag = slot.tag;
        match std::mem::replace(&mut slot.stage, Stage::Plain) {
            Stage::Write { op, offset, len } if completion.result.is_ok() => {
                slot.stage = Stage::Flush { op, offset, len, bufs: completion.bufs };
                self.inner.submit(Request::flush(completion.epoch, index as u64));
                return None;
            }
            Stage::Flush { op, offset, len, bufs } => {
                completion.bufs = bufs;
                completion.result = completion.result.map_err(|error| {
                    let kind: IoErrorKind = error.kind;
                    Box::new(IoError { op, offset, len, kind })
                });
            }
            Stage::Plain | Stage::Write { .. } => {}
        }
        self.free.push(index);
        Some(completion)
    }
}

impl QueuePair for NoFuaQueue {
    fn submit(&mut self, mut request: Request) {
        let Request { tag, offset, len, kind, .. } = request;
        let stage =
            if request.hints.fua { Stage::Write { op: kind.name(), offset, len } } else { Stage::Plain };
        request.tag = self.slot(Slot { tag, stage });
        request.hints.fua = false;
        self.inner.submit(request);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        let mut answers = std::mem::take(&mut self.answers);
        self.inner.poll(&mut answers);
        completions.extend(answers.drain(..).filter_map(|completion| self.answered(completion)));
        self.answers = answers;
        self.inner.kick();
        completions.len() - before
    }

    fn outstanding(&self) -> usize {
        // A request has one request of the inner queue pair at a time, until it is answered.
        self.inner.outstanding()
    }

    fn wait(&mut self, timeout: Duration) {
        self.inner.wait(timeout);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test ends there")]
mod tests {
    use super::*;
    use bdev_adapter::wrap::counters::CountingDevice;
    use bdev_adapter::{DmaBuf, Hints, OpenOptions, open};

    #[test]
    fn fua_becomes_a_write_and_a_flush() {
        let counter = CountingDevice::wrap(open("mem:1MiB", &OpenOptions::default()).unwrap());
        let device = NoFua::wrap(counter.clone());
        let mut queue = Arc::clone(&device).queue_pair().unwrap();
        let mut answers = Vec::new();
        for tag in 0..20 {
            let buf = DmaBuf::new(&device.dma(), 4096).unwrap();
            let hints = if tag % 2 == 0 { Hints::fua() } else { Hints::default() };
            queue.submit(Request::write(tag * 4096, buf, tag + 100).with_hints(hints));
        }
        // One that breaks the contract is answered as it is.
        let buf = DmaBuf::new(&device.dma(), 4096).unwrap();
        queue.submit(Request::write(1 << 20, buf, 7).with_hints(Hints::fua()));
        assert_eq!(queue.outstanding(), 21);
        while queue.outstanding() > 0 {
            queue.poll(&mut answers);
        }
        answers.sort_by_key(|answer| answer.tag);
        let tags: Vec<u64> = answers.iter().map(|answer| answer.tag).collect();
        assert_eq!(tags, std::iter::once(7).chain(100..120).collect::<Vec<_>>());
        assert!(answers.iter().all(|answer| answer.bufs.len() == 4096));
        assert!(answers[0].result.is_err() && answers[1..].iter().all(|answer| answer.result.is_ok()));
        let counts = counter.counts();
        assert_eq!((counts.fua_writes, counts.flushes), (0, 10));
    }
}
