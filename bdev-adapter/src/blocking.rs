//! Blocking reads and writes over a queue pair of their own: for mounting, for tools and for tests.
//!
//! One request at a time; every call spins briefly, then waits in the queue pair. Slices are copied through a DMA
//! buffer that is kept for the next call; [`run`](BlockingIo::run) takes whole requests without a copy.
//!
//! Deliberately absent: alignment. Offsets and lengths are multiples of the block size, as the contract asks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{
    Completion, Device, DmaBuf, DmaSource, Error, Hints, IoError, IoErrorKind, Kind, MAX_REQUEST, QueuePair,
    Request,
};

/// Largest piece in bytes that slices are copied through.
const BOUNCE: usize = 1 << 20;
/// Polls before the thread waits in the queue pair.
const SPINS: usize = 100;

/// A queue pair for one request at a time. See the module documentation.
pub struct BlockingIo {
    device: Arc<dyn Device>,
    queue_pair: Box<dyn QueuePair>,
    dma: Arc<dyn DmaSource>,
    completions: Vec<Completion>,
    bounce: Option<DmaBuf>,
    /// The epoch of the first write that no flush has covered yet.
    unflushed: Option<u64>,
    limit: Option<Duration>,
}

impl BlockingIo {
    /// Opens a queue pair of `device`.
    ///
    /// # Errors
    /// As for [`Device::queue_pair`].
    pub fn new(device: &Arc<dyn Device>) -> Result<BlockingIo, Error> {
        Ok(BlockingIo {
            device: Arc::clone(device),
            queue_pair: Arc::clone(device).queue_pair()?,
            dma: device.dma(),
            completions: Vec::new(),
            bounce: None,
            unflushed: None,
            limit: None,
        })
    }

    /// Gives each request that has no deadline one, so long after it was made. (A request that has reached a device runs to
    /// its end all the same; see [`Hints::deadline`].)
    pub fn time_limit(mut self, limit: Duration) -> BlockingIo {
        self.limit = Some(limit);
        self
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Fills `into` from byte address `offset`.
    ///
    /// # Errors
    /// The first failure; `into` is then partly filled.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), Box<IoError>> {
        check_length(Kind::Read, offset, into.len())?;
        for (number, piece) in into.chunks_mut(BOUNCE).enumerate() {
            let at = piece_offset(Kind::Read, offset, number)?;
            let buf = self.bounce(Kind::Read, at, piece.len())?;
            let completion = self.run(Request::read(at, buf, 0));
            let buf = completion.bufs.into_one();
            completion.result?;
            if let Some(buf) = buf {
                piece.copy_from_slice(&buf[..piece.len()]);
                self.bounce = Some(buf);
            }
        }
        Ok(())
    }

    /// Writes `from` to byte address `offset`; durable after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// The first failure; earlier megabytes may have been written.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> Result<(), Box<IoError>> {
        self.write_with(offset, from, Hints::default())
    }

    /// Writes `from` to byte address `offset`; durable when it returns.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn write_fua(&mut self, offset: u64, from: &[u8]) -> Result<(), Box<IoError>> {
        self.write_with(offset, from, Hints::fua())
    }

    /// Makes every write durable that this value completed since its last flush, and what others completed before
    /// in the present epoch.
    ///
    /// # Errors
    /// [`IoErrorKind::EpochLost`] when the device was reset since the first of those writes; they are then forgotten,
    /// and the next flush covers what is written from now on.
    pub fn flush(&mut self) -> Result<(), Box<IoError>> {
        let epoch = self.unflushed.take().unwrap_or_else(|| self.device.epoch());
        let result = self.run(Request::flush(epoch, 0)).result;
        if let Err(error) = &result
            && !matches!(error.kind, IoErrorKind::EpochLost { .. })
        {
            self.unflushed = Some(epoch);
        }
        result
    }

    /// Makes `len` bytes at `offset` read as zero.
    ///
    /// # Errors
    /// The first failure.
    pub fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), Box<IoError>> {
        let mut at = 0;
        while at < len {
            let piece = (len - at).min(MAX_REQUEST);
            self.run(Request::write_zeroes(offset.saturating_add(at), piece, 0)).result?;
            at += piece;
        }
        Ok(())
    }

    /// Tells the device that `len` bytes at `offset` are not needed.
    ///
    /// # Errors
    /// The failure, which may be ignored: unmapping is advice.
    pub fn unmap(&mut self, offset: u64, len: u64) -> Result<(), Box<IoError>> {
        let mut at = 0;
        while at < len {
            let piece = (len - at).min(MAX_REQUEST);
            self.run(Request::unmap(offset.saturating_add(at), piece, 0)).result?;
            at += piece;
        }
        Ok(())
    }

    /// Allocates a buffer of the device.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn buffer(&self, len: usize) -> Result<DmaBuf, Error> {
        DmaBuf::new(&self.dma, len)
    }

    /// Submits a request and waits for its answer.
    pub fn run(&mut self, request: Request) -> Completion {
        let writes = matches!(request.kind, Kind::Write | Kind::WriteZeroes) && !request.hints.fua;
        let mut request = request;
        if let Some(limit) = self.limit {
            request.hints.deadline.get_or_insert_with(|| Instant::now() + limit);
        }
        self.queue_pair.submit(request);
        let mut spins = 0;
        let completion = loop {
            self.queue_pair.poll(&mut self.completions);
            if let Some(completion) = self.completions.pop() {
                break completion;
            }
            spins += 1;
            if spins > SPINS {
                self.queue_pair.wait(Duration::from_millis(100));
            }
        };
        if writes && self.unflushed.is_none() {
            self.unflushed = Some(completion.epoch);
        }
        completion
    }

    fn write_with(&mut self, offset: u64, from: &[u8], hints: Hints) -> Result<(), Box<IoError>> {
        check_length(Kind::Write, offset, from.len())?;
        for (number, piece) in from.chunks(BOUNCE).enumerate() {
            let at = piece_offset(Kind::Write, offset, number)?;
            let mut buf = self.bounce(Kind::Write, at, piece.len())?;
            buf.copy_from_slice(piece);
            let completion = self.run(Request::write(at, buf, 0).with_hints(hints));
            self.bounce = completion.bufs.into_one();
            completion.result?;
        }
        Ok(())
    }

    /// A buffer of exactly `len` bytes: the one of the last call if it has this length.
    fn bounce(&mut self, kind: Kind, offset: u64, len: usize) -> Result<DmaBuf, Box<IoError>> {
        match self.bounce.take() {
            Some(buf) if buf.len() == len => Ok(buf),
            _ => DmaBuf::new(&self.dma, len).map_err(|error| {
                log::warn!("{}: {error}", self.device.name());
                failure(kind, offset, len, IoErrorKind::NoMemory)
            }),
        }
    }
}

fn failure(kind: Kind, offset: u64, len: usize, error: IoErrorKind) -> Box<IoError> {
    Box::new(IoError { op: kind.name(), offset, len: len as u64, kind: error })
}

fn check_length(kind: Kind, offset: u64, len: usize) -> Result<(), Box<IoError>> {
    if len == 0 { Err(failure(kind, offset, 0, IoErrorKind::BadLength)) } else { Ok(()) }
}

fn piece_offset(kind: Kind, offset: u64, number: usize) -> Result<u64, Box<IoError>> {
    let at = (number * BOUNCE) as u64;
    offset.checked_add(at).ok_or_else(|| failure(kind, offset, BOUNCE, IoErrorKind::OutOfRange))
}
