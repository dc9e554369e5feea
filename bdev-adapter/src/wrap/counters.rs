//! Counts operations and bytes by kind, and flushes by what they are for.
//!
//! Every queue pair counts in cells of its own, with plain loads and stores: nothing shared is written per I/O, but for
//! flushes, which are rare and look at what all queue pairs wrote. A reader sums the cells up
//! ([`CountingDevice::counts`]); sums taken while I/O runs may be a few operations apart between kinds.

use std::fmt;
use std::ops::Sub;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::{ClaimFlag, Completion, Device, DmaSource, Error, Geometry, Kind, QueuePair, Request};

/// Requests of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpCount {
    /// Requests submitted.
    pub ops: u64,
    /// Their length in bytes.
    pub bytes: u64,
}

/// What went through a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counts {
    /// Reads.
    pub reads: OpCount,
    /// Writes, those with FUA included.
    pub writes: OpCount,
    /// Writes and write-zeroes with FUA; they are counted among those as well.
    pub fua: OpCount,
    /// Flushes.
    pub flushes: u64,
    /// Those of the flushes that had nothing to make durable: since the flush before, nothing was submitted that changes
    /// the device, FUA writes aside.
    pub idle_flushes: u64,
    /// Write-zeroes, those with FUA included.
    pub zeroes: OpCount,
    /// Unmaps.
    pub unmaps: OpCount,
    /// Requests that were answered with an error.
    pub errors: u64,
}

/// The order of [`Cells`].
#[derive(Clone, Copy)]
enum Cell {
    ReadOps,
    ReadBytes,
    WriteOps,
    WriteBytes,
    FuaOps,
    FuaBytes,
    Flushes,
    IdleFlushes,
    ZeroOps,
    ZeroBytes,
    UnmapOps,
    UnmapBytes,
    Errors,
}

const CELLS: usize = Cell::Errors as usize + 1;

/// The counters of one queue pair, on cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Cells([AtomicU64; CELLS]);

impl Cells {
    /// Only the owner of the queue pair calls it, so load and store are as good as an atomic addition. Relaxed:
    /// counters order nothing.
    #[inline]
    fn add(&self, cell: Cell, amount: u64) {
        let cell = &self.0[cell as usize];
        cell.store(cell.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    fn sum_into(&self, totals: &mut [u64; CELLS]) {
        for (total, cell) in totals.iter_mut().zip(&self.0) {
            *total = total.wrapping_add(cell.load(Ordering::Relaxed));
        }
    }
}

impl Counts {
    fn from_cells(cells: &[u64; CELLS]) -> Counts {
        let get = |cell: Cell| cells[cell as usize];
        let pair = |ops, bytes| OpCount { ops: get(ops), bytes: get(bytes) };
        Counts {
            reads: pair(Cell::ReadOps, Cell::ReadBytes),
            writes: pair(Cell::WriteOps, Cell::WriteBytes),
            fua: pair(Cell::FuaOps, Cell::FuaBytes),
            flushes: get(Cell::Flushes),
            idle_flushes: get(Cell::IdleFlushes),
            zeroes: pair(Cell::ZeroOps, Cell::ZeroBytes),
            unmaps: pair(Cell::UnmapOps, Cell::UnmapBytes),
            errors: get(Cell::Errors),
        }
    }
}

impl Sub for OpCount {
    type Output = OpCount;

    fn sub(self, before: OpCount) -> OpCount {
        OpCount { ops: self.ops.wrapping_sub(before.ops), bytes: self.bytes.wrapping_sub(before.bytes) }
    }
}

/// What happened since `before`.
impl Sub for Counts {
    type Output = Counts;

    fn sub(self, before: Counts) -> Counts {
        Counts {
            reads: self.reads - before.reads,
            writes: self.writes - before.writes,
            fua: self.fua - before.fua,
            flushes: self.flushes.wrapping_sub(before.flushes),
            idle_flushes: self.idle_flushes.wrapping_sub(before.idle_flushes),
            zeroes: self.zeroes - before.zeroes,
            unmaps: self.unmaps - before.unmaps,
            errors: self.errors.wrapping_sub(before.errors),
        }
    }
}

/// A device that counts what goes through it. All functions may be called from any thread.
pub struct CountingDevice {
    name: String,
    inner: Arc<dyn Device>,
    ledger: Mutex<Ledger>,
}

#[derive(Default)]
struct Ledger {
    live: Vec<Arc<Cells>>,
    /// The sum of the queue pairs that are closed.
    closed: [u64; CELLS],
    /// Changes, FUA writes aside, that had been submitted at the last flush.
    flushed: u64,
}

impl Ledger {
    fn totals(&self) -> [u64; CELLS] {
        let mut totals = self.closed;
        for cells in &self.live {
            cells.sum_into(&mut totals);
        }
        totals
    }
}

impl fmt::Debug for CountingDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CountingDevice").field("name", &self.name).finish_non_exhaustive()
    }
}

impl CountingDevice {
    /// Counts what goes through the returned device to `inner`.
    pub fn wrap(inner: Arc<dyn Device>) -> Arc<CountingDevice> {
        CountingDevice::wrap_named(inner.name().to_owned(), inner)
    }

    pub(crate) fn wrap_named(name: String, inner: Arc<dyn Device>) -> Arc<CountingDevice> {
        Arc::new(CountingDevice { name, inner, ledger: Mutex::default() })
    }

    /// Everything so far, of open and closed queue pairs.
    pub fn counts(&self) -> Counts {
        Counts::from_cells(&self.ledger.lock().totals())
    }

    /// A flush is submitted: whether there is nothing that it could make durable.
    fn flush_is_idle(&self) -> bool {
        let ledger = &mut *self.ledger.lock();
        let totals = ledger.totals();
        let get = |cell: Cell| totals[cell as usize];
        let changes = get(Cell::WriteOps).wrapping_add(get(Cell::ZeroOps)).wrapping_add(get(Cell::UnmapOps));
        let changes = changes.wrapping_sub(get(Cell::FuaOps));
        std::mem::replace(&mut ledger.flushed, changes) == changes
    }
}

impl Device for CountingDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> &Geometry {
        self.inner.geometry()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error> {
        let inner = Arc::clone(&self.inner).queue_pair()?;
        let cells = Arc::new(Cells::default());
        self.ledger.lock().live.push(Arc::clone(&cells));
        Ok(Box::new(CountingQueuePair { inner, cells, device: self }))
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

struct CountingQueuePair {
    inner: Box<dyn QueuePair>,
    cells: Arc<Cells>,
    device: Arc<CountingDevice>,
}

impl CountingQueuePair {
    fn count(&self, ops: Cell, bytes: Cell, request: &Request) {
        self.cells.add(ops, 1);
        self.cells.add(bytes, request.len);
        if request.hints.fua && matches!(request.kind, Kind::Write | Kind::WriteZeroes) {
            self.cells.add(Cell::FuaOps, 1);
            self.cells.add(Cell::FuaBytes, request.len);
        }
    }
}

impl QueuePair for CountingQueuePair {
    fn submit(&mut self, request: Request) {
        match request.kind {
            Kind::Read => self.count(Cell::ReadOps, Cell::ReadBytes, &request),
            Kind::Write => self.count(Cell::WriteOps, Cell::WriteBytes, &request),
            Kind::Flush { .. } => {
                self.cells.add(Cell::Flushes, 1);
                self.cells.add(Cell::IdleFlushes, u64::from(self.device.flush_is_idle()));
            }
            Kind::WriteZeroes => self.count(Cell::ZeroOps, Cell::ZeroBytes, &request),
            Kind::Unmap => self.count(Cell::UnmapOps, Cell::UnmapBytes, &request),
        }
        self.inner.submit(request);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        let count = self.inner.poll(completions);
        let errors = completions[before..].iter().filter(|completion| completion.result.is_err()).count();
        if errors > 0 {
            self.cells.add(Cell::Errors, errors as u64);
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

impl Drop for CountingQueuePair {
    fn drop(&mut self) {
        let mut ledger = self.device.ledger.lock();
        self.cells.sum_into(&mut ledger.closed);
        ledger.live.retain(|cells| !Arc::ptr_eq(cells, &self.cells));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocking::BlockingIo;
    use crate::mem::MemDevice;

    #[test]
    fn counts_by_kind_over_open_and_closed_queue_pairs() {
        let counting = CountingDevice::wrap(MemDevice::new(1 << 20, 4096).unwrap());
        let device: Arc<dyn Device> = counting.clone();
        let mut first = BlockingIo::new(&device).unwrap();
        first.write(0, &[1; 8192]).unwrap();
        first.write_fua(0, &[1; 4096]).unwrap();
        let before = counting.counts();
        drop(first);
        assert_eq!(counting.counts(), before);
        let mut second = BlockingIo::new(&device).unwrap();
        second.read(0, &mut [0; 4096]).unwrap();
        second.flush().unwrap();
        second.write_zeroes(0, 65536).unwrap();
        second.unmap(4096, 4096).unwrap();
        second.read(1 << 20, &mut [0; 4096]).unwrap_err();
        let count = |ops, bytes| OpCount { ops, bytes };
        assert_eq!(before.writes, count(2, 12288));
        assert_eq!(before.fua, count(1, 4096));
        let after = counting.counts() - before;
        let expected = Counts {
            reads: count(2, 8192),
            flushes: 1,
            idle_flushes: 0,
            zeroes: count(1, 65536),
            unmaps: count(1, 4096),
            errors: 1,
            ..Counts::default()
        };
        assert_eq!(after, expected);
    }

    #[test]
    fn flushes_with_nothing_to_do_are_told_apart() {
        let counting = CountingDevice::wrap(MemDevice::new(1 << 20, 4096).unwrap());
        let device: Arc<dyn Device> = counting.clone();
        let (mut io, mut other) = (BlockingIo::new(&device).unwrap(), BlockingIo::new(&device).unwrap());
        let idle = |io: &mut BlockingIo| {
            let before = counting.counts();
            io.flush().unwrap();
            let new = counting.counts() - before;
            assert_eq!(new.flushes, 1);
            new.idle_flushes == 1
        };
        assert!(idle(&mut io));
        other.write(0, &[1; 4096]).unwrap();
        assert!(!idle(&mut io), "what another queue pair wrote");
        assert!(idle(&mut other));
        io.read(0, &mut [0; 4096]).unwrap();
        io.write_fua(0, &[1; 4096]).unwrap();
        assert!(idle(&mut io), "FUA needs no flush");
        drop(other);
        io.unmap(0, 4096).unwrap();
        assert!(!idle(&mut io));
    }
}
