//! The I/Os that a queue pair has at SPDK: a fixed table, and a ring of those that are done.
//!
//! SPDK gets the address of a slot with each I/O, and of the segments inside it, so slots never move. A queue pair, and
//! SPDK's completion callback while the queue pair polls, are the only ones to touch them, on one OS thread at a time;
//! they meet only in cells, so neither needs exclusive references to what the other uses.
//!
//! A slot is free, or taken (by one [`Work`]); SPDK knows it from the moment an I/O was started successfully until the
//! callback has put it on the ring.

use std::cell::{Cell, UnsafeCell};
use std::ffi::c_void;
use std::ptr::NonNull;

use spdk_sys::bdev::{gaur_bdev_io_error, gaur_io_error, io_error_kind, iovec, spdk_bdev_free_io, spdk_bdev_io};

use crate::{IoErrorKind, Kind, Request};

/// Segments of one I/O at SPDK; requests with more are carried out in pieces.
pub(super) const MAX_SEGMENTS: usize = 16;

/// What a slot is taken for.
#[derive(Debug, Default)]
pub(super) enum Work {
    #[default]
    None,
    /// A whole request.
    Whole(Request),
    /// A piece of the request in split number `split`.
    Piece { split: u32, kind: Kind, offset: u64, len: u64, segments: u32 },
}

/// Cache-line aligned, the part that every I/O touches first.
#[repr(C, align(64))]
pub(super) struct Slot {
    ring: NonNull<Ring>,
    index: u32,
    failure: Cell<Option<IoErrorKind>>,
    work: UnsafeCell<Work>,
    segments: UnsafeCell<[iovec; MAX_SEGMENTS]>,
}

/// Slots that are done, in order. Each is on it at most once, so it never overflows.
struct Ring {
    len: Cell<usize>,
    entries: Box<[Cell<u32>]>,
}

impl Ring {
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
            failure: Cell::new(None),
            work: UnsafeCell::new(Work::None),
            segments: UnsafeCell::new([empty; MAX_SEGMENTS]),
        };
        let slots: Box<[Slot]> = (0..count).map(slot).collect();
        // Taken from the end: the same few slots are used over and over while the queue is short.
        Slots { slots: NonNull::from(Box::leak(slots)), ring, free: (0..count).rev().collect() }
    }

    /// Takes a free slot for `work`; gives the work back when there is none.
    #[inline]
    pub(super) fn take(&mut self, work: Work) -> Result<u32, Work> {
        let Some(index) = self.free.pop() else { return Err(work) };
        *self.work(index) = work;
        Ok(index)
    }

    /// Frees a slot that SPDK does not know; what it was taken for.
    #[inline]
    pub(super) fn free(&mut self, index: u32) -> Work {
        let work = std::mem::take(self.work(index));
        self.free.push(index);
        work
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
        self.slot(index).failure.set(Some(why));
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
        (index, self.slot(index).failure.take().map_or(Ok(()), Err))
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
        slot.failure.set(Some(unsafe { failure(io) }));
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
