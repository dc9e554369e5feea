//! Records everything that changes a device, so that every state a crash could leave can be built afterwards.
//!
//! [`Recorder`] stands around a device while a test runs. Each write, write-zeroes, unmap and flush is logged when it is
//! submitted and when its answer is seen, with a copy of the data. [`CrashLog`] is what was recorded; its
//! [`crash_states`](CrashLog::crash_states) are images to mount and check (see [`crash`]).
//!
//! A *point* is a number of events; point 0 is before the first. A test that wants to compare with what was
//! acknowledged notes [`Recorder::point`] when it sees the acknowledgement: every state at this point or later must
//! have it.
//!
//! The geometry says that there is a volatile cache and native FUA, whatever the device inside says, so that the
//! layers above flush. All data is kept in memory: record minutes, not hours.

pub mod crash;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

pub use crash::{CrashLog, CrashOptions, CrashState, CrashStates, Points, Survive};

use crate::image::Image;
use crate::mem::MemDevice;
use crate::{ClaimFlag, Completion, Device, DmaSource, Error, Geometry, Kind, QueuePair, Request};

/// A change of the device, or a flush.
#[derive(Debug, Clone)]
pub struct Record {
    /// What it does.
    pub change: Change,
    /// Byte address; 0 for a flush.
    pub offset: u64,
    /// Length in bytes; 0 for a flush.
    pub len: u64,
    /// Durable with its completion.
    pub fua: bool,
    /// The point before its submission.
    pub submitted: usize,
    /// The point before its answer, with the device epoch, if it succeeded.
    pub completed: Option<(usize, u64)>,
    /// It was answered with an error: any part of it may have happened.
    pub failed: bool,
}

/// What a [`Record`] does.
#[derive(Debug, Clone)]
pub enum Change {
    /// Writes these bytes.
    Write(Arc<[u8]>),
    /// Zeroes the range.
    Zeroes,
    /// Unmaps the range.
    Unmap,
    /// Makes earlier writes of this epoch durable.
    Flush {
        /// The epoch that the flush named.
        epoch: u64,
    },
}

/// Something happened to the record with this index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It was submitted.
    Submitted(usize),
    /// It was answered with success.
    Completed(usize),
    /// It was answered with an error.
    Failed(usize),
}

/// A device that records its changes. All functions may be called from any thread.
pub struct Recorder {
    inner: Arc<dyn Device>,
    geometry: Geometry,
    base: Image,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    events: Vec<Event>,
    records: Vec<Record>,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder")
            .field("inner", &self.inner)
            .field("point", &self.point())
            .finish_non_exhaustive()
    }
}

impl Recorder {
    /// Records what happens to a memory device from now on, on top of its present content.
    pub fn over(inner: Arc<MemDevice>) -> Arc<Recorder> {
        let base = inner.snapshot();
        Recorder::with_base(inner, base)
    }

    /// Records what happens to `inner` from now on; its present content is `base`.
    pub fn with_base(inner: Arc<dyn Device>, base: Image) -> Arc<Recorder> {
        let geometry = Geometry { volatile_cache: true, native_fua: true, ..inner.geometry().clone() };
        Arc::new(Recorder { inner, geometry, base, log: Mutex::default() })
    }

    /// How many events were recorded so far.
    pub fn point(&self) -> usize {
        self.log.lock().events.len()
    }

    /// What was recorded so far.
    pub fn log(&self) -> CrashLog {
        let log = self.log.lock();
        CrashLog::new(self.base.clone(), log.events.clone(), log.records.clone())
    }

    fn submitted(&self, request: &Request) -> Option<usize> {
        let change = match request.kind {
            Kind::Read => return None,
            Kind::Write => Change::Write(gather(request)),
            Kind::WriteZeroes => Change::Zeroes,
            Kind::Unmap => Change::Unmap,
            Kind::Flush { epoch } => Change::Flush { epoch },
        };
        let log = &mut *self.log.lock();
        let index = log.records.len();
        let flush = matches!(change, Change::Flush { .. });
        let (offset, len) = if flush { (0, 0) } else { (request.offset, request.len) };
        let submitted = log.events.len();
        let fua = request.hints.fua;
        log.records.push(Record { change, offset, len, fua, submitted, completed: None, failed: false });
        log.events.push(Event::Submitted(index));
        Some(index)
    }

    fn answered(&self, index: usize, completion: &Completion) {
        let log = &mut *self.log.lock();
        let Some(record) = log.records.get_mut(index) else { return };
        if completion.result.is_ok() {
            record.completed = Some((log.events.len(), completion.epoch));
            log.events.push(Event::Completed(index));
        } else {
            record.failed = true;
            log.events.push(Event::Failed(index));
        }
    }
}

fn gather(request: &Request) -> Arc<[u8]> {
    match request.bufs.as_slice() {
        [one] => Arc::from(&one[..]),
        many => many.iter().flat_map(|buf| buf.iter().copied()).collect(),
    }
}

impl Device for Recorder {
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
        Ok(Box::new(RecordingQueuePair { device: self, inner, pending: Vec::new(), free: Vec::new() }))
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

/// A request that the inner device has, under the tag of its place in the table.
#[derive(Clone, Copy)]
struct Pending {
    tag: u64,
    record: Option<usize>,
}

struct RecordingQueuePair {
    device: Arc<Recorder>,
    inner: Box<dyn QueuePair>,
    pending: Vec<Pending>,
    free: Vec<usize>,
}

impl QueuePair for RecordingQueuePair {
    fn submit(&mut self, mut request: Request) {
        // What breaks the contract changes nothing: the inner device answers it.
        let valid = request.check(&self.device.geometry, self.device.read_only()).is_ok();
        let record = if valid { self.device.submitted(&request) } else { None };
        let pending = Pending { tag: request.tag, record };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.pending[slot] = pending;
                slot
            }
            None => {
                self.pending.push(pending);
                self.pending.len() - 1
            }
        };
        request.tag = slot as u64;
        self.inner.submit(request);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        let count = self.inner.poll(completions);
        for completion in &mut completions[before..] {
            let slot = completion.tag as usize;
            let Some(pending) = self.pending.get(slot).copied() else { continue };
            self.free.push(slot);
            completion.tag = pending.tag;
            if let Some(record) = pending.record {
                self.device.answered(record, completion);
            }
        }
        count
    }

    fn outstanding(&self) -> usize {
        self.inner.outstanding()
    }

    fn wait(&mut self, timeout: Duration) {
        self.inner.wait(timeout);
    }
}
