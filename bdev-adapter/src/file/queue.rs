//! The queue pair of a file: its own ring, its own open file description, nothing shared per I/O.
//!
//! The way of a request:
//! 1. [`submit`](FileQueuePair::submit) checks it and puts it into the software queue;
//! 2. [`fill`](FileQueuePair::fill) cuts parts for the ops at the head of the queue while there are free ones, and
//!    pushes them to the ring; an op whose deadline has passed is answered instead;
//! 3. [`enter`](FileQueuePair::enter) hands all of them to the kernel in one system call;
//! 4. [`reap`](FileQueuePair::reap) takes completions: a short transfer or a part that the kernel wants again goes to
//!    `retry` ([`part_done`](FileQueuePair::part_done));
//! 5. when an op has no part left it goes on to its next step or is answered ([`settle`](FileQueuePair::settle)).
//!
//! Invariants:
//! - an op is in the slab until it is answered; its buffers stay there, untouched, while a part is in the kernel;
//! - a part is free, or in exactly one of: `retry`, `unsubmitted`, the kernel (counted by `in_kernel`);
//! - the ring has room for all parts, so a push never fails.
//!
//! **Epochs.** Linux forgets dirty pages when writing them back failed, and says so once per open file description:
//! after a failed `fdatasync` (or a FUA write that failed with EIO) earlier writes may be lost, and a second
//! `fdatasync` would succeed. So such a failure begins a new epoch of the device: flushes of the old one fail.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::FileDevice;
use super::ops::{Op, Parts, Progress, Step};
use super::ring::Ring;
use crate::{Completion, Error, IoErrorKind, Kind, QueuePair, Request};

/// Times that a part is submitted again because the kernel asked for it (EAGAIN, EINTR) without progress.
const MAX_ATTEMPTS: u32 = 10_000;
/// Sleep when the kernel has no memory for requests and none is in flight that could free some.
const STARVED_SLEEP: Duration = Duration::from_millis(1);

pub(super) struct FileQueuePair {
    device: Arc<FileDevice>,
    ring: Ring,
    ops: Vec<Option<Op>>,
    free_ops: Vec<usize>,
    /// Ops that parts are to be cut for, the oldest first.
    queue: VecDeque<usize>,
    /// Earliest deadline in `queue`, or earlier.
    deadline: Option<Instant>,
    parts: Parts,
    /// Parts to push again.
    retry: Vec<usize>,
    /// Parts pushed to the ring that the kernel has not taken yet, in their order.
    unsubmitted: VecDeque<usize>,
    in_kernel: usize,
    /// Answers to be fetched by the next poll.
    ready: Vec<Completion>,
    /// The ring refused to work: nothing more is submitted.
    broken: Option<i32>,
    reaped: Vec<(u64, i32)>,
}

impl FileQueuePair {
    pub(super) fn new(device: Arc<FileDevice>) -> Result<FileQueuePair, Error> {
        let depth = device.geometry.queue_depth;
        let ring = Ring::new(&device.name, depth)?;
        let file: File = device.reopen()?;
        ring.register_file(file.as_raw_fd()).map_err(|source| Error::Os {
            what: "cannot register with io_uring",
            device: device.name.clone(),
            source,
        })?;
        Ok(FileQueuePair {
            device,
            ring,
            ops: Vec::new(),
            free_ops: Vec::new(),
            queue: VecDeque::new(),
            deadline: None,
            parts: Parts::new(depth as usize),
            retry: Vec::new(),
            unsubmitted: VecDeque::new(),
            in_kernel: 0,
            ready: Vec::new(),
            broken: None,
            reaped: Vec::with_capacity(depth as usize),
        })
    }

    #[cfg(test)]
    pub(super) fn registered_arenas(&self) -> usize {
        self.ring.registered()
    }

    fn accept(&mut self, request: Request) {
        if let Some(deadline) = request.hints.deadline {
            self.deadline = Some(self.deadline.map_or(deadline, |earliest| earliest.min(deadline)));
        }
        let step = match request.kind {
            Kind::Read | Kind::Write => Step::Transfer,
            Kind::Flush { .. } => Step::Sync,
            Kind::WriteZeroes => self.device.zero_step(),
            Kind::Unmap => Step::Allocate(super::PUNCH),
        };
        let op = Op::new(request, step);
        let number = match self.free_ops.pop() {
            Some(number) => {
                self.ops[number] = Some(op);
                number
            }
            None => {
                self.ops.push(Some(op));
                self.ops.len() - 1
            }
        };
        self.queue.push_back(number);
    }

    /// Pushes parts to the ring as far as there are free ones.
    fn fill(&mut self) {
        self.expire();
        if self.retry.is_empty() && self.queue.is_empty() {
            return;
        }
        self.ring.forget_retired(&self.device.pool);
        while let Some(part) = self.retry.pop() {
            self.push(part);
        }
        while let Some(number) = self.queue.front().copied() {
            let Some(op) = self.ops[number].as_mut() else {
                debug_assert!(false, "an answered op in the queue");
                self.queue.pop_front();
                continue;
            };
            if let Some(error) = self.broken {
                op.error.get_or_insert(IoErrorKind::Os(error));
            }
            if !op.started
                && let Err(kind) = self.device.may_start(&op.request)
            {
                op.error = Some(kind);
            }
            if op.error.is_some() || op.is_cut() {
                op.queued = false;
                self.queue.pop_front();
                self.settle(number);
                continue;
            }
            let Some(part) = self.parts.cut(number, op) else { return };
            if let Some((token, start, len)) = self.parts.single(part) {
                let FileDevice { name, pool, .. } = &*self.device;
                self.parts.get_mut(part).fixed = self.ring.fixed_slot(name, pool, token, start, len);
            }
            if op.is_cut() {
                op.queued = false;
                self.queue.pop_front();
            }
            self.push(part);
        }
    }

    fn push(&mut self, part: usize) {
        let number = self.parts.get_mut(part).op;
        let pushed = match &self.ops[number] {
            Some(op) if self.broken.is_none() => {
                let entry = self.parts.entry(part, &op.request);
                // SAFETY: the entry names the iovecs of this part, which are not changed before its completion, and
                // buffers of `op`, which stays in the slab, with nobody else able to reach them, until all its parts
                // are free again; `drop` waits for the kernel before it lets go of either.
                unsafe { self.ring.push(&entry) }
            }
            _ => false,
        };
        if pushed {
            self.unsubmitted.push_back(part);
        } else {
            self.part_failed(part, self.broken.unwrap_or(libc::EBUSY));
        }
    }

    /// Hands what was pushed to the kernel.
    fn enter(&mut self) {
        while !self.unsubmitted.is_empty() {
            match self.ring.submit() {
                // Short of memory: it goes on when something completed.
                Ok(0) => return,
                Ok(taken) => {
                    let taken = taken.min(self.unsubmitted.len());
                    self.unsubmitted.drain(..taken);
                    self.in_kernel += taken;
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => return,
                    code => return self.break_down(code.unwrap_or(libc::EIO)),
                },
            }
        }
    }

    /// The ring does not work any more: answers all that the kernel has not taken. It never will: nothing is submitted
    /// again.
    #[cold]
    fn break_down(&mut self, error: i32) {
        log::error!("{}: io_uring fails: {}", self.device.name, std::io::Error::from_raw_os_error(error));
        self.broken = Some(error);
        while let Some(part) = self.unsubmitted.pop_front() {
            self.part_failed(part, error);
        }
        self.fill();
    }

    /// Takes the completions of the kernel.
    fn reap(&mut self) {
        let mut reaped = std::mem::take(&mut self.reaped);
        self.ring.reap(&mut reaped);
        for (part, result) in reaped.drain(..) {
            self.in_kernel -= 1;
            self.part_done(part as usize, result);
        }
        self.reaped = reaped;
    }

    fn part_done(&mut self, part: usize, result: i32) {
        let entry = self.parts.get_mut(part);
        match -result {
            // ECANCELED: the thread that submitted it may have ended before the kernel had started.
            libc::EAGAIN | libc::EINTR | libc::ECANCELED if entry.attempts < MAX_ATTEMPTS => {
                entry.attempts += 1;
                self.retry.push(part);
            }
            error @ 1.. => self.part_failed(part, error),
            _ if !matches!(entry.step, Step::Transfer | Step::WriteZeroes) => self.part_succeeded(part),
            // The file ends here: somebody truncated it, or the device shrank.
            0 => self.part_failed(part, libc::EIO),
            done => match self.parts.advance(part, u64::from(done.unsigned_abs())) {
                Progress::Done => self.part_succeeded(part),
                Progress::Short => self.retry.push(part),
            },
        }
    }

    fn part_succeeded(&mut self, part: usize) {
        let number = self.parts.get_mut(part).op;
        self.parts.release(part);
        if let Some(op) = self.ops[number].as_mut() {
            op.parts -= 1;
        }
        self.settle(number);
    }

    fn part_failed(&mut self, part: usize, error: i32) {
        let number = self.parts.get_mut(part).op;
        self.parts.release(part);
        if let Some(op) = self.ops[number].as_mut() {
            op.parts -= 1;
            match self.device.other_way(op, error) {
                Some(Ok(step)) => {
                    op.start_step(step);
                    op.queued = true;
                    self.queue.push_front(number);
                    return;
                }
                // Done by other means, or not needed.
                Some(Err(())) => {}
                None => {
                    self.device.note_failure(op, error);
                    op.error.get_or_insert(IoErrorKind::Os(error));
                }
            }
        }
        self.settle(number);
    }

    /// Answers an op that has no part left, or takes it to its next step.
    fn settle(&mut self, number: usize) {
        let Some(op) = self.ops[number].as_mut() else { return };
        if op.parts > 0 || op.queued {
            return;
        }
        let zeroed = op.request.kind == Kind::WriteZeroes && op.error.is_none();
        if zeroed && op.request.hints.fua && op.step != Step::Sync {
            op.start_step(Step::Sync);
            op.queued = true;
            self.queue.push_front(number);
            return;
        }
        let Some(op) = self.ops[number].take() else { return };
        self.free_ops.push(number);
        let mut result = op.error.map_or(Ok(()), Err);
        let now = self.device.epoch_now();
        if let Kind::Flush { epoch } = op.request.kind
            && result.is_ok()
            && epoch != now
        {
            result = Err(IoErrorKind::EpochLost { expected: epoch, now });
        }
        self.ready.push(op.request.complete(result, now));
    }

    /// Answers queued ops whose deadline has passed.
    fn expire(&mut self) {
        let Some(deadline) = self.deadline else { return };
        let now = Instant::now();
        if now < deadline {
            return;
        }
        self.deadline = None;
        let mut expired = Vec::new();
        let (ops, earliest) = (&mut self.ops, &mut self.deadline);
        self.queue.retain(|number| {
            let Some(op) = ops[*number].as_mut().filter(|op| !op.started) else { return true };
            match op.request.hints.deadline {
                Some(deadline) if deadline <= now => {
                    op.queued = false;
                    op.error = Some(IoErrorKind::TimedOut);
                    expired.push(*number);
                    false
                }
                Some(deadline) => {
                    *earliest = Some(earliest.map_or(deadline, |earliest| earliest.min(deadline)));
                    true
                }
                None => true,
            }
        });
        for number in expired {
            self.settle(number);
        }
    }
}

impl QueuePair for FileQueuePair {
    fn submit(&mut self, request: Request) {
        match request.check(&self.device.geometry, self.device.read_only) {
            Ok(()) => self.accept(request),
            Err(kind) => self.ready.push(request.complete(Err(kind), self.device.epoch_now())),
        }
    }

    fn kick(&mut self) {
        self.fill();
        self.enter();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        self.kick();
        if self.in_kernel > 0 {
            if self.ring.completions_empty() && self.ring.wants_enter() {
                self.ring.post_completions();
            }
            self.reap();
            // Freed parts take what waits, so that the device is not idle until the next poll.
            self.kick();
        }
        completions.append(&mut self.ready);
        completions.len() - before
    }

    fn outstanding(&self) -> usize {
        self.ops.len() - self.free_ops.len() + self.ready.len()
    }

    fn wait(&mut self, timeout: Duration) {
        self.kick();
        if !self.ready.is_empty() || self.outstanding() == 0 {
            return;
        }
        let mut timeout = timeout;
        if let Some(deadline) = self.deadline {
            timeout = timeout.min(deadline.saturating_duration_since(Instant::now()));
        }
        if self.in_kernel == 0 {
            return std::thread::sleep(timeout.min(STARVED_SLEEP));
        }
        if let Err(error) = self.ring.wait(Some(timeout)) {
            log::debug!("{}: waiting failed: {error}", self.device.name);
        }
    }
}

impl Drop for FileQueuePair {
    /// Waits for the kernel: it may be writing into the buffers.
    fn drop(&mut self) {
        while self.in_kernel > 0 {
            if let Err(error) = self.ring.wait(None)
                && !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM))
                && self.ring.completions_empty()
            {
                // Rather lose the memory than let the device write into memory of somebody else.
                log::error!(
                    "{}: cannot wait for I/O in flight ({error}); its buffers are lost",
                    self.device.name
                );
                std::mem::forget(std::mem::take(&mut self.ops));
                return;
            }
            self.ring.reap(&mut self.reaped);
            self.in_kernel -= self.reaped.drain(..).count();
        }
        self.ring.let_go();
    }
}
