//! A queue pair of a bdev: an SPDK thread and an I/O channel, driven by whoever calls.
//!
//! The path of a request:
//! 1. [`submit`](QueuePair::submit) checks it and puts it into a slot ([`Slots`]), on the `ready` list. What has no slot
//!    yet, or must be carried out in steps, waits in `waiting`, in order.
//! 2. [`kick`](QueuePair::kick) enters the SPDK thread once and starts everything that has a slot
//!    ([`start_ready`](SpdkQueuePair::start_ready)), then gives slots to what waits
//!    ([`start_waiting`](SpdkQueuePair::start_waiting)).
//! 3. [`poll`](QueuePair::poll) kicks, polls the SPDK thread, whose completions put slots on the ring
//!    ([`on_done`]), and answers them ([`answer_done`](SpdkQueuePair::answer_done)).
//!
//! Requests of more than [`MAX_PIECE`] bytes or [`MAX_SEGMENTS`] segments, and writes with FUA (the bdev interface has
//! none: a flush follows), are **split**: the request stays in a table, and pieces of it take slots
//! ([`split`](super::split)).
//!
//! When SPDK has no memory for an I/O, its slot stays `ready`, and the next kick tries again. When the bdev is removed,
//! what did not start is answered with [`IoErrorKind::Gone`], and so is what fails from then on.
//!
//! Invariants:
//! - Only this queue pair enters its SPDK thread, on the OS thread that holds `&mut self`, and leaves it before
//!   returning.
//! - No heap allocation per I/O once the queues have grown to what the caller uses.
//! - Buffers are in a slot or a split from the moment SPDK may touch them until its callback was seen.

use std::collections::VecDeque;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use spdk_sys::bdev::{
    gaur_bdev_flush, gaur_bdev_room_for_thread, spdk_bdev_desc, spdk_bdev_get_io_channel,
    spdk_bdev_read_blocks, spdk_bdev_readv_blocks, spdk_bdev_unmap_blocks, spdk_bdev_write_blocks,
    spdk_bdev_write_zeroes_blocks, spdk_bdev_writev_blocks,
};
use spdk_sys::thread::{
    gaur_thread_destroy, gaur_thread_poll, spdk_get_thread, spdk_io_channel, spdk_put_io_channel,
    spdk_set_thread, spdk_thread, spdk_thread_create,
};

use super::device::{DEPTH, EPOCH, MAX_PIECE, SpdkBdev};
use super::memory;
use super::slots::{MAX_SEGMENTS, Op, Owner, Slots, on_done};
use super::split::{Data, Splits};
use crate::{Completion, Device, Error, IoErrorKind, Kind, QueuePair, Request};

/// SPDK handles so many messages (completions among them) in one poll.
const MESSAGE_BATCH: usize = 8;
/// How long a queue pair that is dropped waits for its SPDK thread to come to rest after its I/O is done.
const REST_MS: u32 = 10_000;

pub(super) struct SpdkQueuePair {
    thread: NonNull<spdk_thread>,
    channel: NonNull<spdk_io_channel>,
    desc: NonNull<spdk_bdev_desc>,
    slots: Slots,
    /// Slots that SPDK does not know yet.
    ready: Vec<u32>,
    /// Slots that SPDK knows.
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
    flush_needed: bool,
    /// Last, so that the bdev is closed after the channel was put.
    device: Arc<SpdkBdev>,
}

// SAFETY: an SPDK thread and its channels may be used from any OS thread, by one at a time; `&mut self` (or ownership)
// makes it one. The slots and their ring belong to this value alone.
unsafe impl Send for SpdkQueuePair {}

impl SpdkQueuePair {
    pub(super) fn new(device: Arc<SpdkBdev>) -> Result<SpdkQueuePair, Error> {
        let no_memory = |what: &str| Error::Spdk {
            what: format!("cannot open a queue pair of '{}'", device.name()),
            why: format!("no {what}; {} MiB of huge pages are free, {}", memory::free_mib(), memory::MEND),
        };
        if device.is_gone() {
            let why = "the bdev was removed".to_owned();
            return Err(Error::NotFound { device: device.name().to_owned(), why });
        }
        // SAFETY: the environment is initialised (a device is open), and SPDK's pools with it.
        if !unsafe { gaur_bdev_room_for_thread() } {
            return Err(Error::Spdk {
                what: format!("cannot open another queue pair of '{}'", device.name()),
                why: "SPDK's pool of I/Os is used up by those that exist; open fewer, or set a larger bdev_io_pool_size \
                      with bdev_set_options in the configuration"
                    .to_owned(),
            });
        }
        // SAFETY: as above; the name is copied.
        let thread = unsafe { spdk_thread_create(c"gaur-queue".as_ptr(), ptr::null_mut()) };
        let thread = NonNull::new(thread).ok_or_else(|| no_memory("SPDK thread"))?;
        let channel = {
            let _inside = Inside::enter(thread);
            // SAFETY: the descriptor is open as long as `device` lives; we are inside the thread that is to own the
            // channel.
            unsafe { spdk_bdev_get_io_channel(device.opened().desc.as_ptr()) }
        };
        let Some(channel) = NonNull::new(channel) else {
            // SAFETY: nobody else knows the thread, and it has no channels.
            unsafe { gaur_thread_destroy(thread.as_ptr(), REST_MS) };
            return Err(no_memory("I/O channel"));
        };
        let depth = DEPTH as usize;
        Ok(SpdkQueuePair {
            thread,
            channel,
            desc: device.opened().desc,
            slots: Slots::new(DEPTH),
            ready: Vec::with_capacity(depth),
            in_flight: 0,
            waiting: VecDeque::with_capacity(depth),
            splits: Splits::default(),
            answered: Vec::with_capacity(depth),
            outstanding: 0,
            earliest_deadline: None,
            idle_waits: 0,
            block_shift: device.geometry().block_size.trailing_zeros(),
            flush_needed: device.geometry().volatile_cache,
            device,
        })
    }

    /// What can be said against a request without asking the device; `Some(Ok)` if nothing is left to do.
    #[inline]
    fn judge(&self, request: &Request) -> Option<Result<(), IoErrorKind>> {
        if let Err(why) = request.check(self.device.geometry(), self.device.read_only()) {
            return Some(Err(why));
        }
        match request.kind {
            Kind::Read => None,
            Kind::Write | Kind::WriteZeroes if request.hints.fua => {
                self.judge_durability().and_then(Result::err).map(Err)
            }
            Kind::Write | Kind::WriteZeroes => None,
            Kind::Flush { epoch } if epoch != EPOCH => {
                Some(Err(IoErrorKind::EpochLost { expected: epoch, now: EPOCH }))
            }
            Kind::Flush { .. } => self.judge_durability(),
            // Advice that such a device does not take.
            Kind::Unmap => (!self.device.geometry().unmap).then_some(Ok(())),
        }
    }

    fn judge_durability(&self) -> Option<Result<(), IoErrorKind>> {
        if !self.flush_needed || self.device.read_only() {
            Some(Ok(()))
        } else if self.device.opened().info.can_flush {
            None
        } else {
            Some(Err(IoErrorKind::Unsupported))
        }
    }

    /// Whether one I/O of SPDK's carries out the request.
    #[inline]
    fn is_simple(&self, request: &Request) -> bool {
        match request.kind {
            Kind::Read | Kind::Write
                if request.len > MAX_PIECE || request.bufs.as_slice().len() > MAX_SEGMENTS =>
            {
                false
            }
            Kind::Write | Kind::WriteZeroes => !(request.hints.fua && self.flush_needed),
            _ => true,
        }
    }

    /// Starts what has a slot. False when SPDK has no memory for more.
    #[inline]
    fn start_ready(&mut self) -> bool {
        let mut started = 0;
        while let Some(&index) = self.ready.get(started) {
            if !self.start(index) {
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
            let index = if let Some(piece) = self.splits.next_piece() {
                self.slots.take_for_piece(piece.split, piece.segments, piece.op, piece.offset, piece.len)
            } else if let Some(request) = self.waiting.pop_front() {
                self.take_waiting(request)
            } else {
                return;
            };
            if let Some(index) = index
                && !self.start(index)
            {
                // Nothing else is ready: `start_ready` has started it all.
                self.ready.push(index);
                return;
            }
        }
    }

    /// A slot for a request that has waited, unless it is dealt with in another way: it is late, or becomes a split.
    fn take_waiting(&mut self, request: Request) -> Option<u32> {
        if request.hints.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            self.answer(request, Err(IoErrorKind::TimedOut));
            None
        } else if self.is_simple(&request) {
            self.slots.take_for_request(request).map_err(|request| self.waiting.push_front(request)).ok()
        } else {
            let flush = request.hints.fua && self.flush_needed && request.kind != Kind::Read;
            self.splits.begin(request, flush);
            None
        }
    }

    /// Starts the I/O of slot `index`. Must be inside the SPDK thread. False when SPDK has no memory for it now; an
    /// I/O that SPDK refuses for another reason is done, with an error.
    #[inline]
    fn start(&mut self, index: u32) -> bool {
        let segments = self.slots.segments(index);
        let work = self.slots.work(index);
        let (op, offset, len) = (work.op, work.offset, work.len);
        let data = match work.owner {
            // Buffers of other kinds of requests only come back with the answer.
            _ if !matches!(op, Op::Read | Op::Write) => Data::One(ptr::null_mut()),
            // SAFETY: the slot has room for `MAX_SEGMENTS` (`is_simple` has checked), and SPDK does not know it.
            Owner::Request => unsafe { Data::of_bufs(&work.bufs, segments) },
            // SAFETY: as above; a piece has at most `MAX_SEGMENTS` segments.
            Owner::Split { split, segments: count } => unsafe {
                self.splits.fill(split, offset, len, count, segments)
            },
        };
        let rc = self.call_spdk(op, offset >> self.block_shift, len >> self.block_shift, data, index);
        if rc == 0 {
            self.in_flight += 1;
            return true;
        }
        if rc == -libc::ENOMEM {
            return false;
        }
        self.slots
            .refuse(index, if self.device.is_gone() { IoErrorKind::Gone } else { IoErrorKind::Os(-rc) });
        self.in_flight += 1;
        true
    }

    #[inline]
    fn call_spdk(&self, op: Op, block: u64, blocks: u64, data: Data, index: u32) -> i32 {
        let (desc, channel) = (self.desc.as_ptr(), self.channel.as_ptr());
        let (done, argument) = (Some(on_done as _), self.slots.argument(index));
        // SAFETY: the descriptor is open and the channel belongs to the SPDK thread we are in. The range lies inside the
        // bdev (`Request::check`). Buffers and segments stay where they are until `on_done` was called for the slot:
        // they are owned by its work or its split, and both are kept until then.
        unsafe {
            match (op, data) {
                (Op::Read, Data::One(buf)) => {
                    spdk_bdev_read_blocks(desc, channel, buf, block, blocks, done, argument)
                }
                (Op::Read, Data::Many(segments, count)) => {
                    spdk_bdev_readv_blocks(desc, channel, segments, count, block, blocks, done, argument)
                }
                (Op::Write, Data::One(buf)) => {
                    spdk_bdev_write_blocks(desc, channel, buf, block, blocks, done, argument)
                }
                (Op::Write, Data::Many(segments, count)) => {
                    spdk_bdev_writev_blocks(desc, channel, segments, count, block, blocks, done, argument)
                }
                (Op::Flush, _) => gaur_bdev_flush(self.device.opened().bdev(), channel, done, argument),
                (Op::WriteZeroes, _) => {
                    spdk_bdev_write_zeroes_blocks(desc, channel, block, blocks, done, argument)
                }
                (Op::Unmap, _) => spdk_bdev_unmap_blocks(desc, channel, block, blocks, done, argument),
            }
        }
    }

    /// Answers the requests of all slots on the ring.
    #[inline]
    fn answer_done(&mut self, completions: &mut Vec<Completion>) {
        let done = self.slots.done();
        completions.reserve(done);
        let mut answered = 0;
        for i in 0..done {
            let (index, result) = self.slots.outcome(i);
            let result = match result {
                Ok(()) => Ok(()),
                Err(why) => Err(self.failure(why)),
            };
            let answer = &mut completions.spare_capacity_mut()[answered];
            match self.slots.work(index).owner {
                Owner::Request => {
                    self.slots.answer(index, result, answer);
                    answered += 1;
                }
                Owner::Split { split, .. } => {
                    self.slots.free_piece(index);
                    if let Some((request, result)) = self.splits.piece_done(split, result) {
                        answer.write(request.complete(result, EPOCH));
                        answered += 1;
                    }
                }
            }
        }
        // SAFETY: there is room for `done` more (reserved above), and the first `answered` of them were written.
        unsafe { completions.set_len(completions.len() + answered) };
        self.slots.clear_done();
        self.in_flight -= done;
    }

    #[cold]
    fn failure(&self, why: IoErrorKind) -> IoErrorKind {
        if self.device.is_gone() { IoErrorKind::Gone } else { why }
    }

    /// Answers a request that needs no device, at the next poll.
    fn answer(&mut self, request: Request, result: Result<(), IoErrorKind>) {
        self.answered.push(request.complete(result, EPOCH));
    }

    /// Answers everything that did not start: the bdev is gone.
    #[cold]
    fn answer_gone(&mut self) {
        for index in self.ready.drain(..) {
            self.slots.refuse(index, IoErrorKind::Gone);
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
                self.note_deadline(&request);
                self.waiting.push_back(request);
            }
        }
        let (slots, mut late) = (&mut self.slots, 0);
        let earliest = &mut self.earliest_deadline;
        self.ready.retain(|&index| {
            let deadline = slots.work(index).deadline;
            if deadline.is_some_and(|deadline| deadline <= now) {
                slots.refuse(index, IoErrorKind::TimedOut);
                late += 1;
                return false;
            }
            *earliest = [*earliest, deadline].into_iter().flatten().min();
            true
        });
        self.in_flight += late;
    }

    #[inline]
    fn note_deadline(&mut self, request: &Request) {
        if let Some(deadline) = request.hints.deadline {
            self.earliest_deadline =
                Some(self.earliest_deadline.map_or(deadline, |earliest| earliest.min(deadline)));
        }
    }

    #[inline]
    fn has_unstarted(&self) -> bool {
        !self.ready.is_empty() || !self.waiting.is_empty() || self.splits.has_pieces()
    }

    #[inline]
    fn start_all(&mut self) {
        if self.device.is_gone() {
            return self.answer_gone();
        }
        let _inside = Inside::enter(self.thread);
        if self.start_ready() && (!self.waiting.is_empty() || self.splits.has_pieces()) {
            self.start_waiting();
        }
    }

    /// Polls the SPDK thread until it has handled the messages it has.
    #[inline]
    fn poll_spdk(&mut self) {
        loop {
            let before = self.slots.done();
            // SAFETY: the thread is ours, and nobody else is inside it.
            unsafe { gaur_thread_poll(self.thread.as_ptr()) };
            if self.slots.done() - before < MESSAGE_BATCH || self.slots.done() >= self.in_flight {
                return;
            }
        }
    }
}

impl QueuePair for SpdkQueuePair {
    fn submit(&mut self, request: Request) {
        self.outstanding += 1;
        if let Some(result) = self.judge(&request) {
            return self.answer(request, result);
        }
        self.note_deadline(&request);
        if self.waiting.is_empty() && !self.splits.has_pieces() && self.is_simple(&request) {
            match self.slots.take_for_request(request) {
                Ok(index) => self.ready.push(index),
                Err(request) => self.waiting.push_back(request),
            }
        } else {
            self.waiting.push_back(request);
        }
    }

    fn kick(&mut self) {
        if self.earliest_deadline.is_some() {
            self.answer_late();
        }
        if self.has_unstarted() {
            self.start_all();
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        self.kick();
        self.poll_spdk();
        self.answer_done(completions);
        if self.has_unstarted() {
            // Slots are free again: the device should not wait for the next poll.
            self.start_all();
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

impl Drop for SpdkQueuePair {
    fn drop(&mut self) {
        // What did not start never will; what did may still write into its buffers.
        let mut last_words = Instant::now();
        let mut completions = Vec::with_capacity(self.in_flight);
        while self.in_flight > 0 {
            self.poll_spdk();
            if self.slots.done() > 0 {
                self.answer_done(&mut completions);
                completions.clear();
            } else {
                thread::yield_now();
            }
            if last_words.elapsed() > Duration::from_secs(10) {
                log::warn!("{}: closing waits for {} requests", self.device.name(), self.in_flight);
                last_words = Instant::now();
            }
        }
        {
            let _inside = Inside::enter(self.thread);
            // SAFETY: the channel is ours, in its own thread, and has nothing in flight.
            unsafe { spdk_put_io_channel(self.channel.as_ptr()) };
        }
        // SAFETY: nobody else uses the thread, and its channel was put.
        if !unsafe { gaur_thread_destroy(self.thread.as_ptr(), REST_MS) } {
            log::error!("{}: an SPDK thread did not come to rest and is leaked", self.device.name());
        }
    }
}

/// Being inside an SPDK thread; restores what was before (an embedder may use SPDK itself).
struct Inside {
    before: *mut spdk_thread,
}

impl Inside {
    #[inline]
    fn enter(thread: NonNull<spdk_thread>) -> Inside {
        // SAFETY: these read and write a variable of this OS thread.
        let before = unsafe { spdk_get_thread() };
        // SAFETY: as above; `thread` is alive, and the caller is the only one to use it.
        unsafe { spdk_set_thread(thread.as_ptr()) };
        Inside { before }
    }
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: restores what this OS thread had before.
        unsafe { spdk_set_thread(self.before) };
    }
}
