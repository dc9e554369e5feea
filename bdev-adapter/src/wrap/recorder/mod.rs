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
//!
//! In a URI it is `record:` or `record:limit=64MiB`: the content that the device has when it is opened is read through the
//! contract, and a capacity beyond the limit ([`LIMIT`] if none is given) is refused.

pub mod crash;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

pub use crash::{CrashLog, CrashOptions, CrashState, CrashStates, Points, Survive};

use crate::blocking::BlockingIo;
use crate::image::{CHUNK, Image};
use crate::mem::MemDevice;
use crate::uri::parse_size;
use crate::wrap::in_flight::InFlight;
use crate::{ClaimFlag, Completion, Device, DmaSource, Error, Geometry, Kind, QueuePair, Request};

/// How long each read of the device's present content may take.
const BASE_LIMIT: Duration = Duration::from_secs(5);

/// The largest capacity in bytes of a device whose content is read for a recording, unless another limit is given.
pub const LIMIT: u64 = 1 << 30;

/// The arguments of `record:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordOptions {
    /// The largest capacity in bytes that is recorded.
    pub limit: u64,
}

impl Default for RecordOptions {
    fn default() -> RecordOptions {
        RecordOptions { limit: LIMIT }
    }
}

impl RecordOptions {
    /// The options of these keys and values of the URI grammar.
    pub(crate) fn parse(arguments: &[(&str, &str)]) -> Result<RecordOptions, String> {
        const RIGHT: &str = "record:limit=64MiB";
        match arguments {
            [] => Ok(RecordOptions::default()),
            [("limit", limit)] => match parse_size(limit) {
                Ok(limit @ 1..) => Ok(RecordOptions { limit }),
                Ok(0) => Err(format!("limit=0 records nothing; write {RIGHT}")),
                Err(why) => Err(format!("{why}, as in {RIGHT}")),
            },
            [("limit", _), ("limit", _), ..] => Err("record has 'limit' twice".to_owned()),
            [("limit", _), (key, _), ..] | [(key, _), ..] => {
                Err(format!("record has no '{key}' (it has: limit); write {RIGHT}"))
            }
        }
    }
}

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
    name: String,
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
            .field("name", &self.name)
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

    /// Records what happens to `inner` from now on, on top of its present content, which is read first.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when its capacity is beyond the limit, [`Error::Io`] when it cannot be read.
    pub fn around(inner: Arc<dyn Device>, options: RecordOptions) -> Result<Arc<Recorder>, Error> {
        Recorder::around_named(inner.name().to_owned(), inner, options)
    }

    pub(crate) fn around_named(
        name: String,
        inner: Arc<dyn Device>,
        options: RecordOptions,
    ) -> Result<Arc<Recorder>, Error> {
        let base = read_image(&inner, options.limit)?;
        Ok(Recorder::named(name, inner, base))
    }

    /// Records what happens to `inner` from now on; its present content is `base`.
    pub fn with_base(inner: Arc<dyn Device>, base: Image) -> Arc<Recorder> {
        Recorder::named(inner.name().to_owned(), inner, base)
    }

    fn named(name: String, inner: Arc<dyn Device>, base: Image) -> Arc<Recorder> {
        let geometry = Geometry { volatile_cache: true, native_fua: true, ..inner.geometry().clone() };
        Arc::new(Recorder { name, inner, geometry, base, log: Mutex::default() })
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

/// The content of a device, as a value.
fn read_image(device: &Arc<dyn Device>, limit: u64) -> Result<Image, Error> {
    const PIECE: u64 = 1 << 20;
    let Geometry { capacity, block_size, .. } = *device.geometry();
    let name = || device.name().to_owned();
    if capacity > limit {
        let why =
            "its content is read and kept when a recording begins; write record:limit=SIZE for another limit";
        return Err(Error::TooLarge { device: name(), bytes: capacity, limit, why: why.to_owned() });
    }
    let mut io = BlockingIo::new(device)?.time_limit(BASE_LIMIT);
    let mut image = Image::new(capacity, block_size);
    let mut piece = vec![0; PIECE.min(capacity) as usize];
    for start in (0..capacity).step_by(PIECE as usize) {
        let piece = &mut piece[..PIECE.min(capacity - start) as usize];
        io.read(start, piece).map_err(|source| Error::Io { what: "cannot read", device: name(), source })?;
        for (chunk, offset) in piece.chunks(CHUNK).zip((start..).step_by(CHUNK)) {
            if chunk.iter().any(|byte| *byte != 0) {
                let written = image.write(offset, chunk);
                debug_assert_eq!(written, Ok(()), "a piece lies inside the device");
            }
        }
    }
    Ok(image)
}

fn gather(request: &Request) -> Arc<[u8]> {
    match request.bufs.as_slice() {
        [one] => Arc::from(&one[..]),
        many => many.iter().flat_map(|buf| buf.iter().copied()).collect(),
    }
}

impl Device for Recorder {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error> {
        let inner = Arc::clone(&self.inner).queue_pair()?;
        Ok(Box::new(RecordingQueuePair { device: self, inner, in_flight: InFlight::default() }))
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

/// A request that the inner device has.
struct Pending {
    tag: u64,
    record: Option<usize>,
}

struct RecordingQueuePair {
    device: Arc<Recorder>,
    inner: Box<dyn QueuePair>,
    in_flight: InFlight<Pending>,
}

impl QueuePair for RecordingQueuePair {
    fn submit(&mut self, mut request: Request) {
        // What breaks the contract changes nothing: the inner device answers it.
        let valid = request.check(&self.device.geometry, self.device.read_only()).is_ok();
        let record = if valid { self.device.submitted(&request) } else { None };
        request.tag = self.in_flight.insert(Pending { tag: request.tag, record });
        self.inner.submit(request);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        let count = self.inner.poll(completions);
        for completion in &mut completions[before..] {
            let Some(pending) = self.in_flight.remove(completion.tag) else { continue };
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
