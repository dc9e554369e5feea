//! The block-device contract: what every backend promises and what every caller may rely on.
//!
//! - Addresses are byte offsets, multiples of [`Geometry::block_size`]; so is every segment of a scatter list, and
//!   every buffer is aligned to [`Geometry::buffer_align`].
//! - A [`QueuePair`] is used by one thread at a time (`&mut`), and may move between threads. Any number of queue
//!   pairs of one device work in parallel and share nothing that is written per I/O.
//! - A submitted request is answered exactly once, by a [`Completion`] that carries the tag and the buffers back,
//!   whatever happens. Requests that break the contract (misaligned, out of range, ...) are answered with an error
//!   in the same way; nothing reached the device then.
//! - Requests complete in any order; two requests in flight at once have no order between them. There are no barriers
//!   but completion: a caller that wants an order waits.
//! - **Depth.** `submit` never refuses: what exceeds the device's depth waits in the queue pair, in order. Backends
//!   split requests that exceed what the device takes at once.
//! - **Durability.** A completed write is durable when a later flush (submitted on any queue pair after the
//!   completion was seen) succeeded, or when it carried [`Hints::fua`].
//! - **Epochs.** [`Device::epoch`] counts resets that may have lost a volatile cache. A flush names the epoch in which
//!   the writes it is to cover completed, and fails with [`IoErrorKind::EpochLost`] when the device is in another.
//! - Dropping a queue pair waits for what is in flight (the device may still be writing into the buffers), then
//!   drops the buffers.
//! - A device is opened once: a second open of the same device is [`Error::Busy`].

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::{DmaBuf, DmaSource, Segments};

/// Largest single request in bytes that a queue pair accepts (backends split as the device needs).
pub const MAX_REQUEST: u64 = 1 << 30;

/// What a device is like. Fixed while it is open.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Geometry {
    /// Logical block (sector) size in bytes; a power of two from 512 to 4096.
    pub block_size: u32,
    /// Capacity in bytes, a multiple of `block_size`.
    pub capacity: u64,
    /// Alignment in bytes that buffers need; a power of two. Buffers of [`Device::dma`] satisfy it.
    pub buffer_align: u32,
    /// Largest transfer in bytes that reaches the device in one piece; larger requests work, but are split.
    pub max_transfer: u32,
    /// Requests that the device itself keeps in flight per queue pair.
    pub queue_depth: u32,
    /// The device may hold completed writes in a volatile cache: flush matters.
    pub volatile_cache: bool,
    /// FUA is native; otherwise the backend emulates it with a flush after the write.
    pub native_fua: bool,
    /// Unmap (deallocate, discard) does something.
    pub unmap: bool,
    /// Bytes that the device writes atomically under power failure (at least `block_size`).
    pub atomic_write: u32,
}

impl Geometry {
    /// A geometry of `capacity` bytes in blocks of `block_size` with conservative defaults; adjust the fields.
    pub fn new(block_size: u32, capacity: u64) -> Geometry {
        Geometry {
            block_size,
            capacity,
            buffer_align: 4096,
            max_transfer: 1 << 20,
            queue_depth: 128,
            volatile_cache: true,
            native_fua: false,
            unmap: false,
            atomic_write: block_size,
        }
    }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Read into the buffers.
    Read,
    /// Write from the buffers.
    Write,
    /// Make every write that completed before, in this epoch, durable.
    Flush {
        /// The device epoch in which those writes completed.
        epoch: u64,
    },
    /// Make the range read as zeroes.
    WriteZeroes,
    /// Tell the device that the content of the range is not needed any more (it may read as anything).
    Unmap,
}

/// How urgent a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Priority {
    /// Background work.
    Low,
    /// Everything else.
    #[default]
    Normal,
    /// Somebody waits.
    High,
}

/// How long the data is expected to live (NVMe streams, write-life-time hints).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Lifetime {
    /// Nothing is known.
    #[default]
    Unknown,
    /// Overwritten soon (logs).
    Short,
    /// In between.
    Medium,
    /// Rarely overwritten.
    Long,
}

/// Wishes that go with a request. A backend honours `fua` always and the rest where it can; new hints may be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Hints {
    /// The write is durable when it completes (force unit access).
    pub fua: bool,
    /// Urgency.
    pub priority: Priority,
    /// Expected life of the data.
    pub lifetime: Lifetime,
    /// When the caller would rather have an error than wait longer. A request that is still queued in the adapter
    /// then is answered with [`IoErrorKind::TimedOut`]; one that reached the device runs to its end.
    pub deadline: Option<Instant>,
}

impl Hints {
    /// A write that is durable when it completes.
    pub fn fua() -> Hints {
        Hints { fua: true, ..Hints::default() }
    }
}

/// One I/O request. `tag` is returned in the completion and means nothing to the backend.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub kind: Kind,
    /// Byte address; ignored by flush.
    pub offset: u64,
    /// Length in bytes; for reads and writes it equals the sum of the buffers.
    pub len: u64,
    /// The buffers of reads and writes.
    pub bufs: Segments,
    /// Wishes.
    pub hints: Hints,
    /// The caller's own name for the request.
    pub tag: u64,
}

impl Request {
    /// A read of `bufs` from byte address `offset`.
    pub fn read(offset: u64, bufs: impl Into<Segments>, tag: u64) -> Request {
        let bufs = bufs.into();
        Request { kind: Kind::Read, offset, len: bufs.len(), bufs, hints: Hints::default(), tag }
    }

    /// A write of `bufs` to byte address `offset`.
    pub fn write(offset: u64, bufs: impl Into<Segments>, tag: u64) -> Request {
        let bufs = bufs.into();
        Request { kind: Kind::Write, offset, len: bufs.len(), bufs, hints: Hints::default(), tag }
    }

    /// A flush of what completed in `epoch`.
    pub fn flush(epoch: u64, tag: u64) -> Request {
        Request {
            kind: Kind::Flush { epoch },
            offset: 0,
            len: 0,
            bufs: Segments::None,
            hints: Hints::default(),
            tag,
        }
    }

    /// Zeroes `len` bytes at `offset`.
    pub fn write_zeroes(offset: u64, len: u64, tag: u64) -> Request {
        Request { kind: Kind::WriteZeroes, offset, len, bufs: Segments::None, hints: Hints::default(), tag }
    }

    /// Unmaps `len` bytes at `offset`.
    pub fn unmap(offset: u64, len: u64, tag: u64) -> Request {
        Request { kind: Kind::Unmap, offset, len, bufs: Segments::None, hints: Hints::default(), tag }
    }

    /// The same request with `hints`.
    pub fn with_hints(mut self, hints: Hints) -> Request {
        self.hints = hints;
        self
    }

    /// Answers the request: its completion, with its tag and its buffers.
    pub fn complete(self, result: Result<(), IoErrorKind>, epoch: u64) -> Completion {
        let result = result.map_err(|kind| {
            Box::new(IoError { op: self.kind.name(), offset: self.offset, len: self.len, kind })
        });
        Completion { tag: self.tag, result, bufs: self.bufs, epoch }
    }

    /// Checks the request against the contract; every backend calls it before the device sees anything.
    ///
    /// # Errors
    /// The kind of violation: misaligned, out of range, too long, wrong buffers, read-only.
    #[inline]
    pub fn check(&self, geometry: &Geometry, read_only: bool) -> Result<(), IoErrorKind> {
        if let Kind::Flush { .. } = self.kind {
            return Ok(());
        }
        if read_only && self.kind != Kind::Read {
            return Err(IoErrorKind::ReadOnly);
        }
        let mask = u64::from(geometry.block_size) - 1;
        if (self.offset | self.len) & mask != 0 {
            return Err(IoErrorKind::Misaligned);
        }
        if self.len == 0 || self.len > MAX_REQUEST {
            return Err(IoErrorKind::BadLength);
        }
        if self.offset.checked_add(self.len).is_none_or(|end| end > geometry.capacity) {
            return Err(IoErrorKind::OutOfRange);
        }
        if matches!(self.kind, Kind::Read | Kind::Write) {
            let align = geometry.buffer_align as usize - 1;
            let misaligned =
                |buf: &DmaBuf| buf.len() as u64 & mask != 0 || buf.as_ptr() as usize & align != 0;
            let (misaligned, sum) = match &self.bufs {
                // By far the most common: worth its own line.
                Segments::One(buf) => (misaligned(buf), buf.len() as u64),
                bufs => (bufs.as_slice().iter().any(misaligned), bufs.len()),
            };
            if misaligned {
                return Err(IoErrorKind::Misaligned);
            }
            if sum != self.len {
                return Err(IoErrorKind::BadLength);
            }
        }
        Ok(())
    }
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IoErrorKind {
    /// Address, length or buffer is not a multiple of what the geometry asks.
    #[error("address, length or buffer is not aligned as the device needs")]
    Misaligned,
    /// The range ends beyond the device.
    #[error("range lies beyond the end of the device")]
    OutOfRange,
    /// Zero, longer than [`MAX_REQUEST`], or not the length of the buffers.
    #[error("length is zero, too large, or differs from that of the buffers")]
    BadLength,
    /// The device was opened read-only.
    #[error("device is read-only")]
    ReadOnly,
    /// The device cannot do this kind of request.
    #[error("device does not support this request")]
    Unsupported,
    /// The device reports a failed access of the medium, as an OS error number.
    #[error("device error: {}", std::io::Error::from_raw_os_error(*.0))]
    Os(i32),
    /// An NVMe status: status code type and status code.
    #[error("NVMe status sct={sct:#x} sc={sc:#x}")]
    Nvme {
        /// Status code type.
        sct: u8,
        /// Status code.
        sc: u8,
    },
    /// The device is gone (removed, closed).
    #[error("device is gone")]
    Gone,
    /// The device was reset since the writes that the flush was to cover: they may be lost.
    #[error("device was reset since (epoch {expected}, now {now}): unflushed writes may be lost")]
    EpochLost {
        /// The epoch that the flush named.
        expected: u64,
        /// The epoch that the device is in.
        now: u64,
    },
    /// The deadline passed before the request reached the device; or the device did not answer in the time it has for
    /// one request, and was made to give it up (a write may have happened then, whole or in part, or not).
    #[error("timed out")]
    TimedOut,
    /// The device can use its own memory only.
    #[error("buffer is not memory of this device: allocate it from Device::dma()")]
    ForeignBuffer,
    /// The adapter or the device had no memory for the request.
    #[error("out of memory for the request")]
    NoMemory,
}

/// A failed request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{op} of {len} bytes at byte {offset}: {kind}")]
pub struct IoError {
    /// `read`, `write`, `flush`, `write zeroes`, `unmap`.
    pub op: &'static str,
    /// Byte address of the request.
    pub offset: u64,
    /// Length in bytes of the request.
    pub len: u64,
    /// What went wrong.
    pub kind: IoErrorKind,
}

impl Kind {
    /// The name of the request kind, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush { .. } => "flush",
            Kind::WriteZeroes => "write zeroes",
            Kind::Unmap => "unmap",
        }
    }
}

/// The answer to a request. Errors are boxed: they are rare, and completions are moved a lot.
#[derive(Debug)]
pub struct Completion {
    /// The tag of the request.
    pub tag: u64,
    /// How it went.
    pub result: Result<(), Box<IoError>>,
    /// The buffers of the request, in their order.
    pub bufs: Segments,
    /// The device epoch in which it completed.
    pub epoch: u64,
}

/// A submission and completion queue of a device (an NVMe queue pair, an io_uring, an SPDK I/O channel).
pub trait QueuePair: Send {
    /// Accepts a request. It may be held until [`kick`](Self::kick) or [`poll`](Self::poll), so that several share one
    /// doorbell.
    fn submit(&mut self, request: Request);

    /// Rings the doorbell for everything submitted so far.
    fn kick(&mut self);

    /// Rings the doorbell, then appends the completions that are there, without waiting. Returns how many.
    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize;

    /// Requests accepted and not yet answered.
    fn outstanding(&self) -> usize;

    /// Waits until a completion may be there, at most `timeout`. A polled backend may return at once or sleep briefly.
    fn wait(&mut self, timeout: Duration);
}

/// An open device.
pub trait Device: Send + Sync + fmt::Debug {
    /// The URI by which it was opened, for messages.
    fn name(&self) -> &str;

    /// What it is like.
    fn geometry(&self) -> &Geometry;

    /// True when it was opened for reading only.
    fn read_only(&self) -> bool;

    /// Opens another queue pair. May be called from any thread.
    ///
    /// # Errors
    /// When the device or the system has no more of them, or is gone.
    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error>;

    /// Where buffers for this device come from.
    fn dma(&self) -> Arc<dyn DmaSource>;

    /// The current epoch; see the module documentation.
    fn epoch(&self) -> u64;

    /// The flag by which one user at a time (a mounted filesystem) claims the whole device.
    fn claim_flag(&self) -> &ClaimFlag;
}

/// Says whether a device is in use by somebody who needs it alone.
#[derive(Debug, Default)]
pub struct ClaimFlag(AtomicBool);

/// The exclusive use of a device; given back on drop.
#[derive(Debug)]
pub struct Claim(Arc<dyn Device>);

impl Claim {
    /// Claims `device` for one user.
    ///
    /// # Errors
    /// [`Error::Busy`] when somebody else has it.
    pub fn take(device: &Arc<dyn Device>) -> Result<Claim, Error> {
        // Acquire pairs with the release in `drop`: the next user sees all that the last one did.
        if device.claim_flag().0.swap(true, Ordering::Acquire) {
            return Err(Error::Busy { device: device.name().to_owned() });
        }
        Ok(Claim(Arc::clone(device)))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.claim_flag().0.store(false, Ordering::Release);
    }
}

/// Why a device could not be opened or used as a whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The URI does not follow the grammar.
    #[error("bad device URI '{uri}': {why}")]
    BadUri {
        /// The URI as given.
        uri: String,
        /// What is wrong and what would be right.
        why: String,
    },
    /// The backend is not part of this build.
    #[error("'{uri}' needs SPDK, which this program was built without; build it with --features spdk")]
    NotBuilt {
        /// The URI as given.
        uri: String,
    },
    /// Somebody else has the device open or mounted.
    #[error("device '{device}' is in use by somebody else")]
    Busy {
        /// The device.
        device: String,
    },
    /// What the URI names is no usable device.
    #[error("'{device}' is not a usable device: {why}")]
    NotADevice {
        /// The device.
        device: String,
        /// Why not, and what would help.
        why: String,
    },
    /// There is no such file or device.
    #[error("'{device}' does not exist: {why}")]
    NotFound {
        /// The device.
        device: String,
        /// What would help.
        why: String,
    },
    /// The user may not open it in this way.
    #[error("no permission to open '{device}': {why}")]
    NotPermitted {
        /// The device.
        device: String,
        /// What would help.
        why: String,
    },
    /// The system lacks what the backend needs (for example io_uring).
    #[error("this system cannot drive '{device}': {why}")]
    Unavailable {
        /// The device.
        device: String,
        /// What is missing, and what would help.
        why: String,
    },
    /// The system refused.
    #[error("{what} '{device}': {source}")]
    Os {
        /// What was attempted ("cannot open", ...).
        what: &'static str,
        /// The device.
        device: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A request to the device, needed to open or to manage it, failed.
    #[error("{what} '{device}': {source}")]
    Io {
        /// What was attempted ("cannot read", ...).
        what: &'static str,
        /// The device.
        device: String,
        /// The device's answer.
        source: Box<IoError>,
    },
    /// The device is larger than what was asked of it can take.
    #[error("'{device}' has {bytes} bytes, more than the limit of {limit}: {why}")]
    TooLarge {
        /// The device.
        device: String,
        /// Its capacity.
        bytes: u64,
        /// The limit in bytes.
        limit: u64,
        /// What the limit is for, and how to change it.
        why: String,
    },
    /// SPDK refused.
    #[error("SPDK: {what}: {why}")]
    Spdk {
        /// What was attempted.
        what: String,
        /// What SPDK said, and what would mend it.
        why: String,
    },
    /// No memory for buffers.
    #[error("no memory for a DMA buffer of {len} bytes: {why}")]
    NoMemory {
        /// The size asked for.
        len: usize,
        /// What would help.
        why: String,
    },
}
