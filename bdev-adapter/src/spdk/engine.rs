//! A queue pair over SPDK, driven by whoever calls. What differs between the ways to SPDK (a bdev's I/O channel, an NVMe
//! controller's queue pair) is a [`Driver`].
//!
//! The path of a request:
//! 1. [`submit`](QueuePair::submit) checks it and puts it into a slot ([`Slots`]), on the `ready` list. What has no slot
//!    yet, or must be carried out in steps, waits in `waiting`, in order.
//! 2. [`kick`](QueuePair::kick) starts everything that has a slot ([`start_ready`](Engine::start_ready)), then gives slots
//!    to what waits ([`start_waiting`](Engine::start_waiting)).
//! 3. [`poll`](QueuePair::poll) does the same, lets SPDK process completions, whose callbacks put slots on the ring, and
//!    answers them ([`answer_done`](Engine::answer_done)).
//!
//! Requests of more than the driver's [`Limits`] or [`MAX_SEGMENTS`] segments, and writes with FUA where the device has
//! none (a flush follows), are **split**: the request stays in a table, and pieces of it take slots
//! ([`split`](super::split)).
//!
//! When SPDK has no memory for an I/O, its slot stays `ready`, and the next kick tries again. When the device is gone,
//! what did not start is answered with [`IoErrorKind::Gone`], and so is what fails from then on. What was lost with a
//! connection, and may be repeated, goes back to `ready`.
//!
//! Invariants:
//! - SPDK is entered on the thread that holds `&mut self` only, and left before returning; where another thread may have
//!   to take the queue pair over (a reset), [`Driver::enter`] says who has it.
//! - No heap allocation per I/O once the queues have grown to what the caller uses.
//! - Buffers are in a slot or a split from the moment SPDK may touch them until its callback was seen.

use std::collections::VecDeque;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use super::slots::{MAX_SEGMENTS, Op, Owner, Slot, SlotId, Slots, Work};
use super::split::{Data, Limits, Splits};
use crate::{Completion, DmaBuf, Geometry, IoErrorKind, Kind, QueuePair, Request, Segments};

/// What a flush has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// Completed writes are durable.
    Always,
    /// A flush makes them so.
    ByFlush,
    /// The device has a volatile cache and no flush.
    Never,
}

/// One I/O for SPDK.
pub(super) struct Io {
    pub(super) op: Op,
    pub(super) fua: bool,
    /// First block and number of blocks.
    pub(super) block: u64,
    pub(super) blocks: u64,
    pub(super) data: Data,
}

/// What became of the start of an I/O.
pub(super) enum Started {
    /// SPDK knows the slot, and will put it on the ring (or has).
    Yes,
    /// Not now: it is tried again.
    Later,
    /// Never; the reason is its answer.
    Refused(IoErrorKind),
}

/// What is to be done with an I/O that failed.
pub(super) enum Verdict {
    Answer(IoErrorKind),
    /// It did nothing, or may be repeated.
    Again,
}

/// One way to SPDK, with what it needs for one queue pair.
pub(super) trait Driver: Send {
    /// Held while I/Os are started.
    type Starting;

    fn name(&self) -> &str;
    fn geometry(&self) -> &Geometry;
    fn read_only(&self) -> bool;
    fn limits(&self) -> Limits;
    fn durability(&self) -> Durability;
    /// The epoch that the device is in.
    fn epoch(&self) -> u64;
    /// The epoch in which the I/Os on the ring were done.
    fn done_epoch(&self) -> u64;
    /// The device is gone for good.
    fn is_gone(&self) -> bool;

    /// Whether the device can use the memory of the request.
    #[inline]
    fn takes(&self, _request: &Request) -> bool {
        true
    }

    /// Takes the way to SPDK; false while somebody else has it.
    fn enter(&mut self) -> bool;
    /// After `enter`.
    fn leave(&mut self);
    /// Whether I/Os can be started now; between `enter` and `leave`.
    fn may_start(&self) -> bool;
    fn starting(&self) -> Self::Starting;
    /// Starts an I/O. The range lies inside the device, buffers and segments stay where they are until the slot is on
    /// the ring.
    fn start(&self, slot: &Slot, io: Io) -> Started;
    /// Everything is started that could be: rings the doorbell, if that is still to be done.
    fn started(&mut self);
    /// Lets SPDK process completions.
    fn process(&mut self, slots: &Slots, in_flight: usize);
    /// The ring is empty.
    fn drained(&mut self);
    fn verdict(&self, why: IoErrorKind, slot: &Slot, work: &mut Work) -> Verdict;
}

pub(super) struct Engine<D: Driver> {
    /// First, so that SPDK forgets the slots before they are freed.
    driver: D,
    slots: Slots,
    /// Slots that SPDK does not know yet.
    ready: Vec<SlotId>,
    /// Slots that SPDK knows, or that are on the ring.
    in_flight: usize,
    /// Requests without a slot.
    waiting: VecDeque<Request>,
    splits: Splits,
    /// Answers that need no device.
    answered: Vec<Completion>,
    outstanding: usize,
    /// No request that did not start has an earlier deadline.
    earliest_deadline: Option<Instant>,
    /// Calls of `wait` since something was answered.
    idle_waits: u32,
    block_shift: u32,
    /// What the driver says of these, near at hand: every request is checked against them.
    geometry: Geometry,
    read_only: bool,
    limits: Limits,
    durability: Durability,
    /// A write with FUA is followed by a flush.
    fua_by_flush: bool,
}

impl<D: Driver> Engine<D> {
    /// A queue pair of `slots` I/Os at SPDK at once.
    pub(super) fn new(driver: D, slots: Slots) -> Engine<D> {
        let depth = slots.len();
        let durability = driver.durability();
        Engine {
            slots,
            ready: Vec::with_capacity(depth),
            in_flight: 0,
            waiting: VecDeque::with_capacity(depth),
            splits: Splits::default(),
            answered: Vec::with_capacity(depth),
            outstanding: 0,
            earliest_deadline: None,
            idle_waits: 0,
            block_shift: driver.geometry().block_size.trailing_zeros(),
            geometry: driver.geometry().clone(),
            read_only: driver.read_only(),
            limits: driver.limits(),
            durability,
            fua_by_flush: durability != Durability::Always && !driver.geometry().native_fua,
            driver,
        }
    }

    /// Whether a request is the most common kind, a read or write of one buffer that nothing is to be said against, and
    /// that one I/O of SPDK's carries out. As `judge` and `is_simple`, but without their other cases.
    #[inline]
    fn is_plain(&self, request: &Request) -> bool {
        matches!(request.kind, Kind::Read | Kind::Write)
            && matches!(request.bufs, Segments::One(_))
            && !request.hints.fua
            && request.hints.deadline.is_none()
            && request.check(&self.geometry, self.read_only).is_ok()
            && self.driver.takes(request)
            && self.limits.piece(Op::Read, request.offset, request.len) == request.len
    }

    /// What can be said against a request without asking the device; `Some(Ok)` if nothing is left to do.
    fn judge(&self, request: &Request) -> Option<Result<(), IoErrorKind>> {
        if let Err(why) = request.check(&self.geometry, self.read_only) {
            return Some(Err(why));
        }
        if !self.driver.takes(request) {
            return Some(Err(IoErrorKind::ForeignBuffer));
        }
        match request.kind {
            Kind::Read => None,
            Kind::Write | Kind::WriteZeroes if request.hints.fua && self.fua_by_flush => {
                self.judge_durability().and_then(Result::err).map(Err)
            }
            Kind::Write | Kind::WriteZeroes => None,
            Kind::Flush { epoch } => {
                let now = self.driver.epoch();
                if epoch != now {
                    return Some(Err(IoErrorKind::EpochLost { expected: epoch, now }));
                }
                self.judge_durability()
            }
            // Advice that such a device does not take.
            Kind::Unmap => (!self.geometry.unmap).then_some(Ok(())),
        }
    }

    fn judge_durability(&self) -> Option<Result<(), IoErrorKind>> {
        match self.durability {
            Durability::Always => Some(Ok(())),
            _ if self.read_only => Some(Ok(())),
            Durability::ByFlush => None,
            Durability::Never => Some(Err(IoErrorKind::Unsupported)),
        }
    }

    /// Whether one I/O of SPDK's carries out the request.
    fn is_simple(&self, request: &Request) -> bool {
        let op = Op::from(request.kind);
        if self.limits.piece(op, request.offset, request.len) < request.len {
            return false;
        }
        match op {
            Op::Read => request.bufs.as_slice().len() <= MAX_SEGMENTS,
            Op::Write => {
                request.bufs.as_slice().len() <= MAX_SEGMENTS && !(request.hints.fua && self.fua_by_flush)
            }
            Op::WriteZeroes => !(request.hints.fua && self.fua_by_flush),
            Op::Unmap | Op::Flush => true,
        }
    }

    /// Whether a request has to queue behind others, or for a slot.
    #[inline]
    fn must_wait(&self) -> bool {
        !self.waiting.is_empty() || self.splits.has_pieces() || !self.slots.has_free()
    }

    /// Accepts a request that is not plain, or has to wait.
    #[inline(never)]
    fn submit_other(&mut self, request: Request) {
        if let Some(result) = self.judge(&request) {
            return self.answer(request, result);
        }
        self.note_deadline(request.hints.deadline);
        if !self.must_wait() && self.is_simple(&request) {
            self.ready.push(self.slots.take_for_request(request));
        } else {
            self.waiting.push_back(request);
        }
    }

    /// Starts what has a slot. False when SPDK has no memory for more.
    #[inline]
    fn start_ready(&mut self) -> bool {
        let mut started = 0;
        while let Some(&id) = self.ready.get(started) {
            if !self.start(id) {
                self.ready.drain(..started);
                return false;
            }
            started += 1;
        }
        self.ready.clear();
        true
    }

    /// Gives slots to what waits and starts it, until there is no slot or SPDK has no memory.
    #[cold]
    fn start_waiting(&mut self) {
        while self.slots.has_free() {
            let id = if let Some(piece) = self.splits.next_piece(&self.limits) {
                self.slots.take_for_piece(&piece)
            } else if let Some(request) = self.waiting.pop_front() {
                self.take_waiting(request)
            } else {
                return;
            };
            if let Some(id) = id
                && !self.start(id)
            {
                // Nothing else is ready: `start_ready` has started it all.
                self.ready.push(id);
                return;
            }
        }
    }

    /// A slot for a request that has waited, unless it is dealt with in another way: it is late, or becomes a split.
    fn take_waiting(&mut self, request: Request) -> Option<SlotId> {
        if request.hints.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.answer(request, Err(IoErrorKind::TimedOut));
            None
        } else if self.is_simple(&request) {
            Some(self.slots.take_for_request(request))
        } else {
            let flush = request.hints.fua && self.fua_by_flush && request.kind != Kind::Read;
            self.splits.begin(request, flush);
            None
        }
    }

    /// Starts the I/O of a slot. False when that must be tried again later; an I/O that cannot be started for
    /// another reason is done, with an error.
    #[inline]
    fn start(&mut self, id: SlotId) -> bool {
        let work = self.slots.work(id);
        let (offset, len) = (work.offset, work.len());
        // The most common kind first.
        let (op, fua, data) = match (work.op, &work.bufs) {
            (Op::Read, Segments::One(buf)) => (Op::Read, false, Data::One(buf.as_ptr().cast())),
            (Op::Write, Segments::One(buf)) => (Op::Write, work.fua, Data::One(buf.as_ptr().cast())),
            _ => match self.data_of_other(id) {
                Ok(data) => data,
                Err(why) => return self.refuse(id, why),
            },
        };
        let io = Io { op, fua, block: offset >> self.block_shift, blocks: len >> self.block_shift, data };
        match self.driver.start(self.slots.slot(id), io) {
            Started::Yes => {
                self.in_flight += 1;
                true
            }
            Started::Later => false,
            Started::Refused(why) => self.refuse(id, why),
        }
    }

    /// What is to be done with the slot of an I/O that is no read or write of one buffer, and where its data is.
    #[inline(never)]
    fn data_of_other(&mut self, id: SlotId) -> Result<(Op, bool, Data), IoErrorKind> {
        let segments = self.slots.segments(id);
        let work = self.slots.work(id);
        let (op, fua, offset, len) = (work.op, work.fua, work.offset, work.len());
        let data = match work.owner() {
            Owner::Request if op == Op::Flush => {
                let (epoch, now) = (work.epoch, self.driver.epoch());
                if epoch != now {
                    return Err(IoErrorKind::EpochLost { expected: epoch, now });
                }
                Data::One(ptr::null_mut())
            }
            // Buffers of other kinds of requests only come back with the answer.
            _ if !matches!(op, Op::Read | Op::Write) => Data::One(ptr::null_mut()),
            // SAFETY: the slot has room for `MAX_SEGMENTS` (`is_simple` has checked), and SPDK does not know it.
            Owner::Request => unsafe { Data::of_bufs(&work.bufs, segments) },
            // SAFETY: as above; a piece has at most `MAX_SEGMENTS` segments.
            Owner::Split { split, segments: count } => unsafe {
                self.splits.fill(split, offset, len, count, segments)
            },
        };
        Ok((op, fua, data))
    }

    /// The slot is done, with an error. Always true.
    #[cold]
    fn refuse(&mut self, id: SlotId, why: IoErrorKind) -> bool {
        self.slots.refuse(id, why);
        self.in_flight += 1;
        true
    }

    /// Answers the requests of all slots on the ring.
    #[inline]
    fn answer_done(&mut self, completions: &mut Vec<Completion>) {
        let done = self.slots.done();
        completions.reserve(done);
        let epoch = self.driver.done_epoch();
        let failures = self.slots.has_failures();
        let mut answered = 0;
        for i in 0..done {
            let id = self.slots.done_at(i);
            let result = match if failures { self.slots.outcome(id) } else { Ok(()) } {
                Ok(()) => Ok(()),
                Err(why) => match self.judge_failure(id, why) {
                    Verdict::Answer(why) => Err(why),
                    Verdict::Again => continue,
                },
            };
            let answer = &mut completions.spare_capacity_mut()[answered];
            match self.slots.work(id).owner() {
                Owner::Request => {
                    self.slots.answer(id, result, epoch, answer);
                    answered += 1;
                }
                Owner::Split { split, .. } => {
                    self.slots.free_piece(id);
                    if let Some((request, result)) = self.splits.piece_done(split, result) {
                        answer.write(request.complete(result, epoch));
                        answered += 1;
                    }
                }
            }
        }
        // SAFETY: there is room for `done` more (reserved above), and the first `answered` of them were written.
        unsafe { completions.set_len(completions.len() + answered) };
        self.slots.clear_done();
        self.in_flight -= done;
        self.driver.drained();
    }

    #[cold]
    fn judge_failure(&mut self, id: SlotId, why: IoErrorKind) -> Verdict {
        // As a raw pointer's target: the slot and its work are apart.
        let verdict = self.slots.with(id, |slot, work| self.driver.verdict(why, slot, work));
        if let Verdict::Again = verdict {
            if let Some(deadline) = self.slots.work(id).deadline() {
                self.note_deadline(Some(deadline));
            }
            self.ready.push(id);
        }
        verdict
    }

    /// Answers a request that needs no device, at the next poll.
    fn answer(&mut self, request: Request, result: Result<(), IoErrorKind>) {
        self.answered.push(request.complete(result, self.driver.epoch()));
    }

    /// Answers everything that did not start: the bdev is gone.
    #[cold]
    fn answer_gone(&mut self) {
        for id in self.ready.drain(..) {
            self.slots.refuse(id, IoErrorKind::Gone);
            self.in_flight += 1;
        }
        while let Some((request, result)) = self.splits.abandon(IoErrorKind::Gone) {
            self.answer(request, result);
        }
        while let Some(request) = self.waiting.pop_front() {
            self.answer(request, Err(IoErrorKind::Gone));
        }
    }

    /// Answers the requests that did not start and whose deadline has passed.
    #[cold]
    fn answer_late(&mut self) {
        let now = Instant::now();
        if self.earliest_deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.earliest_deadline = None;
        for _ in 0..self.waiting.len() {
            let Some(request) = self.waiting.pop_front() else { break };
            if request.hints.deadline.is_some_and(|deadline| deadline <= now) {
                self.answer(request, Err(IoErrorKind::TimedOut));
            } else {
                self.note_deadline(request.hints.deadline);
                self.waiting.push_back(request);
            }
        }
        let (slots, mut late) = (&mut self.slots, 0);
        let earliest = &mut self.earliest_deadline;
        self.ready.retain(|&id| {
            let deadline = slots.work(id).deadline();
            if deadline.is_some_and(|deadline| deadline <= now) {
                slots.refuse(id, IoErrorKind::TimedOut);
                late += 1;
                return false;
            }
            *earliest = [*earliest, deadline].into_iter().flatten().min();
            true
        });
        self.in_flight += late;
    }

    #[inline]
    fn note_deadline(&mut self, deadline: Option<Instant>) {
        if let Some(deadline) = deadline {
            self.earliest_deadline =
                Some(self.earliest_deadline.map_or(deadline, |earliest| earliest.min(deadline)));
        }
    }

    #[inline]
    fn has_unstarted(&self) -> bool {
        !self.ready.is_empty() || !self.waiting.is_empty() || self.splits.has_pieces()
    }

    /// Starts what can be started. Between `enter` and `leave`.
    #[inline]
    fn start_all(&mut self) {
        if self.driver.is_gone() {
            return self.answer_gone();
        }
        if !self.driver.may_start() {
            return;
        }
        let _starting = self.driver.starting();
        if self.start_ready() && (!self.waiting.is_empty() || self.splits.has_pieces()) {
            self.start_waiting();
        }
    }

    #[inline]
    fn process(&mut self, completions: &mut Vec<Completion>) {
        self.driver.process(&self.slots, self.in_flight);
        self.answer_done(completions);
    }
}

impl<D: Driver> QueuePair for Engine<D> {
    fn submit(&mut self, request: Request) {
        self.outstanding += 1;
        if self.must_wait() || !self.is_plain(&request) {
            return self.submit_other(request);
        }
        let op = if request.kind == Kind::Read { Op::Read } else { Op::Write };
        let Segments::One(buf) = &request.bufs else { return self.submit_other(request) };
        // SAFETY: the request is forgotten, and with it `buf`.
        let buf = unsafe { DmaBuf::read_by_words(buf) };
        self.ready.push(self.slots.take_for_plain(op, request.offset, buf, request.tag));
        std::mem::forget(request);
    }

    fn kick(&mut self) {
        if self.earliest_deadline.is_some() {
            self.answer_late();
        }
        if self.has_unstarted() && self.driver.enter() {
            self.start_all();
            self.driver.started();
            self.driver.leave();
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        if self.earliest_deadline.is_some() {
            self.answer_late();
        }
        if self.driver.enter() {
            if self.has_unstarted() {
                self.start_all();
            }
            self.process(completions);
            if self.has_unstarted() {
                // Slots are free again: the device should not wait for the next poll.
                self.start_all();
                self.driver.started();
            }
            self.driver.leave();
        }
        completions.append(&mut self.answered);
        let answered = completions.len() - before;
        self.outstanding -= answered;
        if answered > 0 {
            self.idle_waits = 0;
        }
        answered
    }

    fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Polling finds completions; so this returns at once while they are frequent, then yields, then naps.
    fn wait(&mut self, timeout: Duration) {
        if !self.answered.is_empty() || timeout.is_zero() {
            return;
        }
        self.idle_waits = self.idle_waits.saturating_add(1);
        match self.idle_waits {
            0..200 => std::hint::spin_loop(),
            200..1000 => thread::yield_now(),
            _ => thread::sleep(timeout.min(Duration::from_micros(20))),
        }
    }
}

impl<D: Driver> Drop for Engine<D> {
    fn drop(&mut self) {
        // What did not start never will; what did may still write into its buffers.
        let mut last_words = Instant::now();
        let mut completions = Vec::with_capacity(self.in_flight);
        while self.in_flight > 0 {
            let before = self.in_flight;
            if self.driver.enter() {
                self.process(&mut completions);
                self.driver.leave();
                completions.clear();
                self.ready.clear();
            }
            if self.in_flight == before {
                thread::yield_now();
            }
            if last_words.elapsed() > Duration::from_secs(10) {
                log::warn!("{}: closing waits for {} requests", self.driver.name(), self.in_flight);
                last_words = Instant::now();
            }
        }
    }
}
