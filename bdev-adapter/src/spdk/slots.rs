//! The I/Os that a queue pair has at SPDK: a fixed table, and a ring of those that are done.
//!
//! SPDK gets the address of a slot with each I/O, and of the segments inside it, so slots never move. A queue pair, and
//! SPDK's completion callback while the queue pair polls, are the only ones to touch them, on one OS thread at a time
//! (or another thread that keeps the owner out meanwhile); they meet only in cells, so neither needs exclusive
//! references to what the other uses.
//!
//! A slot is free, or taken for a whole request or a piece of one; SPDK knows it from the moment an I/O was started
//! successfully until the callback has put it on the ring.
//!
//! Requests are taken apart field by field into a slot, and completions are put together where the caller wants them:
//! moving them whole, through the stack, costs more than everything else here.

use std::cell::{Cell, UnsafeCell};
use std::ffi::c_void;
use std::mem::{MaybeUninit, offset_of};
use std::ptr::NonNull;
use std::time::Instant;

use spdk_sys::bdev::iovec;

use super::split::Piece;
use crate::{Completion, DmaBuf, IoError, IoErrorKind, Kind, Request, Segments};

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
    pub(super) fn name(self) -> &'static str {
        let kind = match self {
            Op::Read => Kind::Read,
            Op::Write => Kind::Write,
            Op::Flush => Kind::Flush { epoch: 0 },
            Op::WriteZeroes => Kind::WriteZeroes,
            Op::Unmap => Kind::Unmap,
        };
        kind.name()
    }
}

/// What a slot is taken for. With the pointer before it in the slot, what most requests need is one cache line.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Work {
    pub(super) bufs: Segments,
    /// Byte address at the device.
    pub(super) offset: u64,
    /// For a whole request only.
    tag: u64,
    pub(super) op: Op,
    pub(super) fua: bool,
    /// How often it was started again after its connection was lost.
    pub(super) retries: u8,
    /// A read or write of one buffer without a deadline: nothing below is meaningful.
    plain: bool,
    owner: Owner,
    len: u64,
    /// Of a flush: the epoch that it names.
    pub(super) epoch: u64,
    deadline: Option<Instant>,
}

impl Work {
    #[inline]
    pub(super) fn owner(&self) -> Owner {
        if self.plain { Owner::Request } else { self.owner }
    }

    /// Length in bytes at the device.
    #[inline]
    pub(super) fn len(&self) -> u64 {
        if self.plain { self.bufs.len() } else { self.len }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        if self.plain { None } else { self.deadline }
    }
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
    work: UnsafeCell<Work>,
    failed: Cell<bool>,
    /// The device was asked to give it up.
    pub(super) aborting: Cell<bool>,
    /// When it was started, by the driver's own clock; 0 while SPDK does not know it. For drivers with timeouts.
    pub(super) started: Cell<u32>,
    /// Meaningful while `failed`.
    failure: Cell<IoErrorKind>,
    /// Where SPDK is in the segments, for drivers that it asks for one after the other.
    pub(super) cursor: Cell<Cursor>,
    segments: UnsafeCell<[iovec; MAX_SEGMENTS]>,
}

const _: () =
    assert!(offset_of!(Slot, work) + offset_of!(Work, plain) < 64, "plain requests need one cache line");

/// A place in the segments of a slot: `skip` bytes into segment `next` of `count`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cursor {
    pub(super) count: u32,
    pub(super) next: u32,
    pub(super) skip: u32,
}

/// Names a slot of a table: its address, made by the table alone, which is asked for what is in it.
#[derive(Clone, Copy)]
pub(super) struct SlotId(NonNull<Slot>);

// SAFETY: an address; only the table, while it is alive, follows it.
unsafe impl Send for SlotId {}

/// Slots that are done, in order. Each is on it at most once, so it never overflows.
struct Ring {
    len: Cell<usize>,
    /// Some of them have failed.
    failures: Cell<bool>,
    entries: Box<[Cell<SlotId>]>,
}

impl Ring {
    #[inline]
    fn push(&self, slot: SlotId) {
        let len = self.len.get();
        self.entries[len].set(slot);
        self.len.set(len + 1);
    }
}

/// The table. Owns the slots by raw pointer: SPDK holds their addresses.
pub(super) struct Slots {
    slots: NonNull<[Slot]>,
    ring: NonNull<Ring>,
    free: Vec<SlotId>,
}

// SAFETY: slots and ring belong to the table alone. SPDK, which knows their addresses, uses them only inside calls that the
// table's owner makes, or that are made while the owner is kept out.
unsafe impl Send for Slots {}

impl Slots {
    pub(super) fn new(count: u32) -> Slots {
        let nowhere = SlotId(NonNull::dangling());
        let entries = (0..count).map(|_| Cell::new(nowhere)).collect();
        let ring = Ring { len: Cell::new(0), failures: Cell::new(false), entries };
        let ring = NonNull::from(Box::leak(Box::new(ring)));
        let empty = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let slot = |_| Slot {
            ring,
            work: UnsafeCell::new(Work {
                bufs: Segments::None,
                offset: 0,
                tag: 0,
                op: Op::Flush,
                fua: false,
                retries: 0,
                plain: false,
                owner: Owner::Request,
                len: 0,
                epoch: 0,
                deadline: None,
            }),
            failed: Cell::new(false),
            aborting: Cell::new(false),
            started: Cell::new(0),
            failure: Cell::new(IoErrorKind::NoMemory),
            cursor: Cell::new(Cursor::default()),
            segments: UnsafeCell::new([empty; MAX_SEGMENTS]),
        };
        let slots: NonNull<[Slot]> = NonNull::from(Box::leak((0..count).map(slot).collect::<Box<[Slot]>>()));
        // Taken from the end: the same few slots are used over and over while the queue is short.
        // SAFETY: `i` is less than the length.
        let id = |i: u32| SlotId(unsafe { slots.cast::<Slot>().add(i as usize) });
        Slots { slots, ring, free: (0..count).rev().map(id).collect() }
    }

    /// Takes a free slot, of which there are some, for a read or write of the buffer `buf` without a deadline or FUA.
    #[inline(always)]
    pub(super) fn take_for_plain(&mut self, op: Op, offset: u64, buf: DmaBuf, tag: u64) -> SlotId {
        let Some(id) = self.free.pop() else { unreachable!("no slot is free") };
        let work = self.work(id);
        (work.op, work.fua, work.retries, work.plain) = (op, false, 0, true);
        (work.offset, work.tag) = (offset, tag);
        debug_assert!(matches!(work.bufs, Segments::None));
        // SAFETY: a free slot has `Segments::None`, of which nothing is to be dropped.
        unsafe { std::ptr::write(&mut work.bufs, Segments::One(buf)) };
        id
    }

    /// Takes a free slot, of which there are some, for a whole request.
    #[inline]
    pub(super) fn take_for_request(&mut self, request: Request) -> SlotId {
        let Some(id) = self.free.pop() else { unreachable!("no slot is free") };
        let work = self.work(id);
        work.op = request.kind.into();
        work.plain = false;
        work.owner = Owner::Request;
        work.offset = request.offset;
        work.len = request.len;
        work.tag = request.tag;
        work.fua = request.hints.fua;
        work.retries = 0;
        if let Kind::Flush { epoch } = request.kind {
            work.epoch = epoch;
        }
        work.deadline = request.hints.deadline;
        debug_assert!(matches!(work.bufs, Segments::None));
        // SAFETY: a free slot has `Segments::None`, of which nothing is to be dropped.
        unsafe { std::ptr::write(&mut work.bufs, request.bufs) };
        id
    }

    /// Takes a free slot for a piece of a split.
    pub(super) fn take_for_piece(&mut self, piece: &Piece) -> Option<SlotId> {
        let id = self.free.pop()?;
        let work = self.work(id);
        (work.op, work.owner) = (piece.op, Owner::Split { split: piece.split, segments: piece.segments });
        (work.offset, work.len, work.deadline) = (piece.offset, piece.len, None);
        (work.fua, work.retries, work.plain) = (piece.fua, 0, false);
        Some(id)
    }

    /// Frees the slot of a request that SPDK does not know (any more), and writes its answer to `answer`.
    #[inline]
    pub(super) fn answer(
        &mut self,
        id: SlotId,
        result: Result<(), IoErrorKind>,
        epoch: u64,
        answer: &mut MaybeUninit<Completion>,
    ) {
        let work = self.work(id);
        let place = answer.as_mut_ptr();
        // SAFETY: every field of `answer` is written. The buffers are moved, without a stop on the stack; what is left in
        // their place has nothing to be dropped.
        unsafe {
            (&raw mut (*place).result).write(match result {
                Ok(()) => Ok(()),
                Err(kind) => Err(io_error(work, kind)),
            });
            (&raw mut (*place).bufs).write(std::ptr::read(&work.bufs));
            std::ptr::write(&mut work.bufs, Segments::None);
            (&raw mut (*place).tag).write(work.tag);
            (&raw mut (*place).epoch).write(epoch);
        }
        self.free.push(id);
    }

    /// Frees the slot of a piece.
    pub(super) fn free_piece(&mut self, id: SlotId) {
        self.free.push(id);
    }

    #[inline]
    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// What a slot is taken for.
    #[inline]
    pub(super) fn work(&mut self, id: SlotId) -> &mut Work {
        let slot = self.slot(id);
        // SAFETY: only the queue pair looks into `work`, and it does so through `&mut self`; the callback leaves it alone.
        unsafe { &mut *slot.work.get() }
    }

    /// Where the segments of a slot are written before SPDK gets their address.
    #[inline]
    pub(super) fn segments(&self, id: SlotId) -> *mut iovec {
        self.slot(id).segments.get().cast()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// A slot, and what it is taken for.
    pub(super) fn with<T>(&mut self, id: SlotId, f: impl FnOnce(&Slot, &mut Work) -> T) -> T {
        let slot = self.slot(id);
        // SAFETY: as in `work`; nobody reaches the work through the shared reference.
        f(slot, unsafe { &mut *slot.work.get() })
    }

    pub(super) fn view(&self) -> SlotsView {
        SlotsView(self.slots)
    }

    /// Puts a slot that SPDK refused on the ring, with the reason.
    pub(super) fn refuse(&mut self, id: SlotId, why: IoErrorKind) {
        self.slot(id).fail(why);
        self.ring().push(id);
    }

    /// Slots on the ring.
    #[inline]
    pub(super) fn done(&self) -> usize {
        self.ring().len.get()
    }

    /// The `i`th slot on the ring.
    #[inline]
    pub(super) fn done_at(&self, i: usize) -> SlotId {
        self.ring().entries[i].get()
    }

    /// Whether slots on the ring have failed.
    #[inline]
    pub(super) fn has_failures(&self) -> bool {
        self.ring().failures.get()
    }

    /// How the I/O of a slot on the ring ended.
    pub(super) fn outcome(&self, id: SlotId) -> Result<(), IoErrorKind> {
        let slot = self.slot(id);
        // The next I/O begins with a clean slate.
        if slot.failed.take() { Err(slot.failure.get()) } else { Ok(()) }
    }

    /// Empties the ring, after its slots were freed.
    #[inline]
    pub(super) fn clear_done(&mut self) {
        self.ring().len.set(0);
        self.ring().failures.set(false);
    }

    #[inline]
    pub(super) fn slot(&self, id: SlotId) -> &Slot {
        // SAFETY: a table makes all ids of its slots, and a queue pair has one table. The slots live as long as it does, and
        // everything in them that changes is in a cell.
        unsafe { id.0.as_ref() }
    }

    #[inline]
    fn ring(&self) -> &Ring {
        // SAFETY: as for `slot`.
        unsafe { self.ring.as_ref() }
    }
}

impl Slot {
    #[cold]
    pub(super) fn fail(&self, why: IoErrorKind) {
        // SAFETY: as in `done`.
        unsafe { self.ring.as_ref() }.failures.set(true);
        self.failed.set(true);
        self.failure.set(why);
    }

    /// What SPDK gets as the callback's argument.
    #[inline]
    pub(super) fn argument(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    /// The slot of a callback's argument.
    ///
    /// # Safety
    /// `argument` came from [`argument`](Self::argument) of a slot whose table is alive, and is only used on this thread
    /// as long as that is so.
    #[inline]
    pub(super) unsafe fn of<'a>(argument: *mut c_void) -> &'a Slot {
        // SAFETY: as the caller promises; what changes in a slot is in cells.
        unsafe { &*argument.cast::<Slot>() }
    }

    /// Puts the slot on the ring: SPDK is done with it. Called from completion callbacks, inside a poll of the queue pair
    /// (or, in theory, inside the call that starts it).
    #[inline]
    pub(super) fn done(&self) {
        // SAFETY: the ring lives as long as the table that the slot is in.
        unsafe { self.ring.as_ref() }.push(SlotId(NonNull::from(self)));
    }

    /// The segment at the cursor, from there on.
    ///
    /// # Safety
    /// The segments up to the cursor's count were written for the I/O that SPDK knows.
    pub(super) unsafe fn next_segment(&self) -> Option<(*mut u8, usize)> {
        let mut cursor = self.cursor.get();
        if cursor.next >= cursor.count {
            return None;
        }
        // SAFETY: `next < count`, which is at most the length of the array; it is not written to while SPDK knows it.
        let segment = unsafe { &(*self.segments.get())[cursor.next as usize] };
        let skip = cursor.skip as usize;
        cursor.next += 1;
        cursor.skip = 0;
        self.cursor.set(cursor);
        Some((segment.iov_base.cast::<u8>().wrapping_add(skip), segment.iov_len - skip))
    }

    /// Moves the cursor to `offset` bytes after the beginning.
    ///
    /// # Safety
    /// As for [`next_segment`](Self::next_segment).
    pub(super) unsafe fn seek(&self, offset: u32) {
        let mut cursor = Cursor { next: 0, skip: offset, ..self.cursor.get() };
        while cursor.next < cursor.count {
            // SAFETY: as in `next_segment`.
            let len = unsafe { (&(*self.segments.get()))[cursor.next as usize].iov_len };
            if (cursor.skip as usize) < len {
                break;
            }
            cursor.skip -= len as u32;
            cursor.next += 1;
        }
        self.cursor.set(cursor);
    }
}

#[cold]
fn io_error(work: &Work, kind: IoErrorKind) -> Box<IoError> {
    Box::new(IoError { op: work.op.name(), offset: work.offset, len: work.len(), kind })
}

/// The slots of a table, for another thread that looks at them while it keeps the queue pair's owner out.
#[derive(Clone, Copy)]
pub(super) struct SlotsView(NonNull<[Slot]>);

// SAFETY: whoever uses it must keep the owner out (see `iter`).
unsafe impl Send for SlotsView {}

impl SlotsView {
    /// How many there are.
    pub(super) fn len(self) -> usize {
        self.0.len()
    }

    /// # Safety
    /// The table is alive, and its owner does not touch it, over the life of the iterator.
    pub(super) unsafe fn iter<'a>(self) -> std::slice::Iter<'a, Slot> {
        // SAFETY: as the caller promises.
        unsafe { self.0.as_ref() }.iter()
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
