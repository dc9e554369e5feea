//! The same loop over two things: a file of a mounted filesystem, and the bare device below it.
//!
//! Comparisons are only fair when both sides run the same code with the same buffers, depth and pattern. A [`Lane`] is
//! that common face; everything is monomorphised, and nothing here allocates or reads a clock per operation.

use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::{Device, DmaBuf, QueuePair, Request};
use fs_core::{Channel, File, Operation, Output};

use crate::failure::{Doing, Failure, Result};

/// An answer.
pub(crate) struct Done {
    /// The tag of the operation.
    pub(crate) tag: u64,
    /// Its buffer (reads and writes).
    pub(crate) buf: Option<DmaBuf>,
    /// What went wrong, if anything did.
    pub(crate) error: Option<Box<Failure>>,
}

/// Somewhere to read from and write to, with many operations in flight.
pub(crate) trait Lane {
    /// Reads into `buf` from `offset`.
    fn read(&mut self, offset: u64, buf: DmaBuf, tag: u64);
    /// Writes `buf` to `offset`.
    fn write(&mut self, offset: u64, buf: DmaBuf, tag: u64);
    /// Makes durable what was answered before.
    fn sync(&mut self, tag: u64);
    /// Hands over what was submitted and collects what is there; returns how many answers are waiting.
    fn poll(&mut self) -> usize;
    /// Takes a collected answer.
    fn take(&mut self) -> Option<Done>;
    /// Sleeps until there may be answers.
    fn wait(&mut self, timeout: Duration);
}

/// A file of a mounted filesystem.
pub(crate) struct FileLane<'c> {
    channel: &'c Channel,
    file: File,
    done: Vec<fs_core::Completion>,
}

impl<'c> FileLane<'c> {
    /// Operations on `file` through `channel`.
    pub(crate) fn new(channel: &'c Channel, file: File) -> FileLane<'c> {
        FileLane { channel, file, done: Vec::with_capacity(1024) }
    }
}

impl Lane for FileLane<'_> {
    #[inline]
    fn read(&mut self, offset: u64, buf: DmaBuf, tag: u64) {
        self.channel.submit_read(&self.file, offset, buf, tag);
    }

    #[inline]
    fn write(&mut self, offset: u64, buf: DmaBuf, tag: u64) {
        self.channel.submit(Operation::Write { file: self.file.clone(), offset, buf }, tag);
    }

    fn sync(&mut self, tag: u64) {
        self.channel.submit(Operation::SyncFile { file: self.file.clone() }, tag);
    }

    #[inline]
    fn poll(&mut self) -> usize {
        self.channel.poll(&mut self.done);
        self.done.len()
    }

    #[inline]
    fn take(&mut self) -> Option<Done> {
        let completion = self.done.pop()?;
        let buf = completion.bufs.into_one();
        let error = match (completion.result, &buf) {
            (Ok(Output::Bytes(len)), Some(buf)) if len < buf.len() => Some(short_read(len, buf.len())),
            (Ok(_), _) => None,
            (Err(error), _) => Some(Box::new(Failure::new(error.to_string()))),
        };
        Some(Done { tag: completion.tag, buf, error })
    }

    fn wait(&mut self, timeout: Duration) {
        self.channel.wait(timeout);
    }
}

/// The loops only read where there are bytes.
#[cold]
fn short_read(got: usize, wanted: usize) -> Box<Failure> {
    Box::new(Failure::new(format!("a read returned {got} bytes instead of {wanted}")))
}

/// A range of the device, without a filesystem.
pub(crate) struct RawLane {
    device: Arc<dyn Device>,
    queue: Box<dyn QueuePair>,
    base: u64,
    done: Vec<bdev_adapter::Completion>,
}

impl RawLane {
    /// Requests to `device`, whose offset 0 is byte `base` of it.
    pub(crate) fn new(device: &Arc<dyn Device>, base: u64) -> Result<RawLane> {
        let queue = Arc::clone(device).queue_pair().doing("open a queue pair of the device")?;
        Ok(RawLane { device: Arc::clone(device), queue, base, done: Vec::with_capacity(1024) })
    }
}

impl Lane for RawLane {
    #[inline]
    fn read(&mut self, offset: u64, buf: DmaBuf, tag: u64) {
        self.queue.submit(Request::read(self.base + offset, buf, tag));
    }

    #[inline]
    fn write(&mut self, offset: u64, buf: DmaBuf, tag: u64) {
        self.queue.submit(Request::write(self.base + offset, buf, tag));
    }

    fn sync(&mut self, tag: u64) {
        self.queue.submit(Request::flush(self.device.epoch(), tag));
    }

    #[inline]
    fn poll(&mut self) -> usize {
        self.queue.poll(&mut self.done);
        self.done.len()
    }

    #[inline]
    fn take(&mut self) -> Option<Done> {
        let completion = self.done.pop()?;
        let error = completion.result.err().map(|error| Box::new(Failure::new(error.to_string())));
        Some(Done { tag: completion.tag, buf: completion.bufs.into_one(), error })
    }

    fn wait(&mut self, timeout: Duration) {
        self.queue.wait(timeout);
    }
}
