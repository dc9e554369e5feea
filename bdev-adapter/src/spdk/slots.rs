//! The I/Os that a queue pair has at SPDK: a fixed table, and a ring of those that are done.
//!
//! SPDK gets the address of a slot with each I/O, and of the segments inside it, so slots never move. A queue pair, and
//! SPDK's completion callback while the queue pair polls, are the only ones to touch them, on one OS thread at a time;
//! they meet only in cells, so neither needs exclusive references to what the other uses.
//!
//! A slot is free, or taken for a whole request or a piece of one; SPDK knows it from the moment an I/O was started
//! successfully until the callback has put it on the ring.
//!
//! Requests are taken apart field by field into a slot, and completions are put together where the caller wants them:
//! moving them whole, through the stack, costs more than everything else here.

use std::cell::{Cell, UnsafeCell};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::time::Instant;

use spdk_sys::bdev::{
    gaur_bdev_io_error, gaur_io_error, io_error_kind, iovec, spdk_bdev_free_io, spdk_bdev_io,
};

use super::device::EPOCH;
use crate::{Completion, IoError, IoErrorKind, Kind, Request, Segments};

/// Segments of one I/O at SPDK; requests with more are carried out in pieces.
pub(super) const MAX_SEGMENTS: usize = 16;

/// What an I/O does; [`Kind`] without the epoch, which was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Op {
    Read,
    Write,
    Flush,
    WriteZeroes,
    Unmap,
}

impl From<Kind> for Op {
    #[inline]
    fn from(kind: Kind) -> Op {
        match kind {
            Kind::Read => Op::Read,
            Kind::Write => Op::Write,
            Kind::Flush { .. } => Op::Flush,
            Kind::WriteZeroes => Op::WriteZeroes,
            Kind::Unmap => Op::Unmap,
        }
    }
}

impl Op {
    fn name(self) -> &'static str {
        let kind = match self {
            Op::Read => Kind::Read,
            Op::Write => Kind::Write,
            Op::Flush => Kind::Flush { epoch: EPOCH },
            Op::WriteZeroes => Kind::WriteZeroes,
            Op::Unmap => Kind::Unmap,
        };
        kind.name()
    }
}

/// What a slot is taken for.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) op: Op,
    pub(super) owner: Owner,
    /// Byte address and length at the device.
    pub(super) offset: u64,
    pub(super) len: u64,
    /// For a whole request only.
    tag: u64,
    pub(super) deadline: Option<Instant>,
    pub(super) bufs: Segments,
}

/// Whose I/O it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// The request itself, whose buffers are in the slot.
    Request,
    /// Split number `split`, which has the buffers; the piece lies in so many segments.
    Split { split: u32, segments: u32 },
}

/// Cache-line aligned, the part that every I/O touches first.
#[repr(C, align(64))]
pub(super) struct Slot {
    ring: NonNull<Ring>,
    index: u32,
    failed: Cell<bool>,
    work: UnsafeCell<Work>,
    /// Meaningful while `failed`.
    failure: Cell<IoErrorKind>,
    segments: UnsafeCell<[iovec; MAX_SEGMENTS]>,
}

/// Slots that are done, in order. Each is on it at most once, so it never overflows.
struct Ring {
    len: Cell<usize>,
    entries: Box<[Cell<u32>]>,
}

impl Ring {
    #[inline]
    fn push(&self, index: u32) {
        let len = self.len.get();
        self.entries[len].set(index);
        self.len.set(len + 1);
    }
}

/// The table. Owns the slots by raw pointer: SPDK holds their addresses.
pub(super) struct Slots {
    slots: NonNull<[Slot]>,
    ring: NonNull<Ring>,
    free: Vec<u32>,
}

impl Slots {
    pub(super) fn new(count: u32) -> Slots {
        let ring = Ring { len: Cell::new(0), entries: (0..count).map(|_| Cell::new(0)).collect() };
        let ring = NonNull::from(Box::leak(Box::new(ring)));
        let empty = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let slot = |index| Slot {
            ring,
            index,
            failed: Cell::new(false),
            work: UnsafeCell::new(Work {
                op: Op::Flush,
                owner: Owner::Request,
                offset: 0,
                len: 0,
                tag: 0,
                deadline: None,
                bufs: Segments::None,
            }),
            failure: Cell::new(IoErrorKind::NoMemory),
            segments: UnsafeCell::new([empty; MAX_SEGMENTS]),
        };
        let slots: Box<[Slot]> = (0..count).map(slot).collect();
        // Taken from the end: the same few slots are used over and over while the queue is short.
        Slots { slots: NonNull::from(Box::leak(slots)), ring, free: (0..count).rev().collect() }
    }

    /// Takes a free slot for a whole request.
    #[inline]
    pub(super) fn take_for_request(&mut self, request: Request) -> Result<u32, Request> {
        let Some(index) = self.free.pop() else { return Err(request) };
        let work = self.work(index);
        work.op = request.kind.into();
        work.owner = Owner::Request;
        work.offset = request.offset;
        work.len = request.len;
        work.tag = request.tag;
        work.deadline = request.hints.deadline;
        debug_assert!(matches!(work.bufs, Segments::None));
        // SAFETY: a free slot has `Segments::None`, of which nothing is to be dropped.
        unsafe { std::ptr::write(&mut work.bufs, request.bufs) };
        Ok(index)
    }

    /// Takes a free slot for a piece of a split.
    pub(super) fn take_for_piece(
        &mut self,
        split: u32,
        segments: u32,
        op: Op,
        offset: u64,
        len: u64,
    ) -> Option<u32> {
        let index = self.free.pop()?;
        let work = self.work(index);
        (work.op, work.owner) = (op, Owner::Split { split, segments });
        (work.offset, work.len, work.deadline) = (offset, len, None);
        Some(index)
    }

    /// Frees the slot of a request that SPDK does not know (any more), and writes its answer to `answer`.
    #[inline]
    pub(super) fn answer(
        &mut self,
        index: u32,
        result: Result<(), IoErrorKind>,
        answer: &mut std::mem::MaybeUninit<Completion>,
    ) {
        let work = self.work(index);
        let result = match result {
            Ok(()) => Ok(()),
            Err(kind) => Err(io_error(work, kind)),
        };
        let bufs = std::mem::replace(&mut work.bufs, Segments::None);
        answer.write(Completion { tag: work.tag, result, bufs, epoch: EPOCH });
        self.free.push(index);
    }

    /// Frees the slot of a piece.
    pub(super) fn free_piece(&mut self, index: u32) {
        self.free.push(index);
    }

    #[inline]
    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// What slot `index` is taken for.
    #[inline]
    pub(super) fn work(&mut self, index: u32) -> &mut Work {
        let slot = self.slot(index);
        // SAFETY: only the queue pair looks into `work`, and it does so through `&mut self`; the callback leaves it alone.
        unsafe { &mut *slot.work.get() }
    }

    /// Where the segments of slot `index` are written before SPDK gets their address.
    #[inline]
    pub(super) fn segments(&self, index: u32) -> *mut iovec {
        self.slot(index).segments.get().cast()
    }

    /// What SPDK gets as the callback's argument.
    #[inline]
    pub(super) fn argument(&self, index: u32) -> *mut c_void {
        std::ptr::from_ref(self.slot(index)).cast_mut().cast()
    }

    /// Puts a slot that SPDK refused on the ring, with the reason.
    pub(super) fn refuse(&mut self, index: u32, why: IoErrorKind) {
        self.slot(index).fail(why);
        self.ring().push(index);
    }

    /// Slots on the ring.
    #[inline]
    pub(super) fn done(&self) -> usize {
        self.ring().len.get()
    }

    /// The `i`th slot on the ring, with its outcome.
    #[inline]
    pub(super) fn outcome(&self, i: usize) -> (u32, Result<(), IoErrorKind>) {
        let index = self.ring().entries[i].get();
        let slot = self.slot(index);
        (index, if slot.failed.take() { Err(slot.failure.get()) } else { Ok(()) })
    }

    /// Empties the ring, after its slots were freed.
    #[inline]
    pub(super) fn clear_done(&mut self) {
        self.ring().len.set(0);
    }

    #[inline]
    fn slot(&self, index: u32) -> &Slot {
        // SAFETY: the slots live as long as the table, and everything in them that changes is in a cell.
        unsafe { &self.slots.as_ref()[index as usize] }
    }

    #[inline]
    fn ring(&self) -> &Ring {
        // SAFETY: as for `slot`.
        unsafe { self.ring.as_ref() }
    }
}

impl Slot {
    #[cold]
    fn fail(&self, why: IoErrorKind) {
        self.failed.set(true);
        self.failure.set(why);
    }
}

#[cold]
fn io_error(work: &Work, kind: IoErrorKind) -> Box<IoError> {
    Box::new(IoError { op: work.op.name(), offset: work.offset, len: work.len, kind })
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: both came from boxes, and the queue pair has waited until SPDK knows none of the slots.
        unsafe {
            drop(Box::from_raw(self.slots.as_ptr()));
            drop(Box::from_raw(self.ring.as_ptr()));
        }
    }
}

/// SPDK calls this when an I/O is done, from inside a poll of the queue pair's SPDK thread (or, in theory, from inside
/// the call that starts it).
///
/// # Safety
/// `io` is a completed I/O of SPDK's, `argument` came from [`Slots::argument`] of a table that is alive.
pub(super) unsafe extern "C" fn on_done(io: *mut spdk_bdev_io, success: bool, argument: *mut c_void) {
    // SAFETY: see above; the slot is only read, and changed in its cells.
    let (slot, ring) = unsafe {
        let slot = &*argument.cast::<Slot>();
        (slot, slot.ring.as_ref())
    };
    if !success {
        // SAFETY: `io` has completed and is not freed yet.
        slot.fail(unsafe { failure(io) });
    }
    // SAFETY: the I/O is ours and done; it is freed once, here.
    unsafe { spdk_bdev_free_io(io) };
    ring.push(slot.index);
}

/// # Safety
/// `io` has completed and is not freed yet.
#[cold]
unsafe fn failure(io: *mut spdk_bdev_io) -> IoErrorKind {
    let mut error = gaur_io_error { kind: 0, error: 0, sct: 0, sc: 0 };
    // SAFETY: as the caller promises; `error` is a structure of the shim's layout.
    unsafe { gaur_bdev_io_error(io, &mut error) };
    match error.kind {
        io_error_kind::GAUR_IO_NVME => IoErrorKind::Nvme { sct: error.sct, sc: error.sc },
        io_error_kind::GAUR_IO_ERRNO => IoErrorKind::Os(error.error),
        io_error_kind::GAUR_IO_NOMEM => IoErrorKind::NoMemory,
        io_error_kind::GAUR_IO_ABORTED => IoErrorKind::Os(libc::ECANCELED),
        _ => IoErrorKind::Os(libc::EIO),
    }
}
