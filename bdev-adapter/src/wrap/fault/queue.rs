//! The queue pair of a device with faults: what happens to a request from submission to answer.
//!
//! 1. [`submit`](QueuePair::submit) asks the plan. A request is answered at once, kept for good, or goes on, changed as
//!    its fault asks.
//! 2. If the device follows what is not flushed, a change first reads what it will replace ([`FaultQueuePair::go`]).
//! 3. It is sent to the device inside ([`FaultQueuePair::send`]).
//! 4. Its answer becomes that of the request ([`FaultQueuePair::arrived`]), at once or when a slow one is due.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::history::{Change, KEPT_BYTES, Moment};
use super::tamper::Tamper;
use super::torn_off::TornOff;
use super::{FaultDevice, Verdict};
use crate::wrap::held::{Held, wait_until};
use crate::wrap::in_flight::InFlight;
use crate::{Completion, Device, DmaBuf, Error, Hints, IoErrorKind, Kind, QueuePair, Request};

/// How often a queue pair with hung requests looks whether they were released, while it waits.
const LOOK: Duration = Duration::from_millis(5);

pub(super) fn open(device: Arc<FaultDevice>) -> Result<Box<dyn QueuePair>, Error> {
    let inner = Arc::clone(&device.inner).queue_pair()?;
    Ok(Box::new(FaultQueuePair {
        device,
        inner,
        in_flight: InFlight::default(),
        ready: Vec::new(),
        held: Held::default(),
        hung: Vec::new(),
        outages_seen: 0,
        arrived: Vec::new(),
    }))
}

struct FaultQueuePair {
    device: Arc<FaultDevice>,
    inner: Box<dyn QueuePair>,
    in_flight: InFlight<Step>,
    /// Answered without the inner device.
    ready: Vec<Completion>,
    /// Answered by the inner device, but not yet due.
    held: Held<(Pending, Completion)>,
    hung: Vec<Hung>,
    /// Outages that `held` knows of.
    outages_seen: u64,
    arrived: Vec<Completion>,
}

/// What the inner device is doing.
enum Step {
    /// It reads what the request will replace.
    Before(Request, Pending),
    /// It carries the request out.
    Request(Pending),
}

/// What is remembered of a request.
struct Pending {
    tag: u64,
    kind: Kind,
    /// As the caller gave them, whatever the inner device is told.
    offset: u64,
    len: u64,
    /// The answer comes no earlier.
    due: Option<Instant>,
    /// Outages that there had been when it was submitted.
    outages: u64,
    /// It is a torn write: it reaches the device although that is gone.
    torn: bool,
    /// The part of its data that never reached the device.
    torn_off: Option<TornOff>,
    /// What to do to the data of a read.
    tamper: Option<Box<Tamper>>,
    /// What it changes, with the place.
    change: Option<(Change, u64, u64)>,
    /// It makes what it writes durable.
    durable: bool,
    flush_began: Option<Moment>,
}

/// A request that waits to be released.
struct Hung {
    request: Request,
    pending: Pending,
    /// The releases that there had been when it came.
    releases: u64,
}

impl FaultQueuePair {
    fn pending(&self, request: &Request) -> Pending {
        Pending {
            tag: request.tag,
            kind: request.kind,
            offset: request.offset,
            len: request.len,
            due: None,
            outages: self.device.outages(),
            torn: false,
            torn_off: None,
            tamper: None,
            change: None,
            durable: request.hints.fua,
            flush_began: None,
        }
    }

    fn answer(&mut self, request: Request, result: Result<(), IoErrorKind>) {
        self.ready.push(request.complete(result, self.device.epoch()));
    }

    /// Answers a request that was changed for the inner device, but never reached it.
    fn give_back(&mut self, request: Request, pending: Pending, kind: IoErrorKind) {
        let completion = request.complete(Err(kind), self.device.epoch());
        let completion = self.finish(pending, completion);
        self.ready.push(completion);
    }

    /// Sends the request on, after a look at what it is going to replace if somebody wants to know that.
    fn go(&mut self, request: Request, pending: Pending) {
        let changes = matches!(request.kind, Kind::Write | Kind::WriteZeroes | Kind::Unmap);
        if changes && self.device.keeps_history() && request.len <= KEPT_BYTES {
            let Ok(buf) = DmaBuf::new(&self.device.inner.dma(), request.len as usize) else {
                return self.give_back(request, pending, IoErrorKind::NoMemory);
            };
            let offset = request.offset;
            // The look is a part of the request, and as patient.
            let hints = Hints { deadline: request.hints.deadline, ..Hints::default() };
            let tag = self.in_flight.insert(Step::Before(request, pending));
            return self.inner.submit(Request::read(offset, buf, tag).with_hints(hints));
        }
        self.send(request, pending);
    }

    fn send(&mut self, mut request: Request, mut pending: Pending) {
        match request.kind {
            Kind::Read => {}
            Kind::Write | Kind::WriteZeroes | Kind::Unmap => {
                self.device.changes(request.offset, request.len);
            }
            Kind::Flush { epoch } => {
                pending.flush_began = self.device.flush_begins();
                // The inner device does not know of the resets that were played.
                request.kind = Kind::Flush { epoch: epoch.wrapping_sub(self.device.resets()) };
            }
        }
        request.tag = self.in_flight.insert(Step::Request(pending));
        self.inner.submit(request);
    }

    fn tear(&mut self, mut request: Request, blocks: u64, silently: bool) {
        let keep = blocks * u64::from(self.device.geometry.block_size);
        let mut pending = self.pending(&request);
        if !silently {
            self.device.remove();
        }
        if keep == 0 {
            return self.answer(request, if silently { Ok(()) } else { Err(IoErrorKind::Gone) });
        }
        pending.torn = true;
        if request.kind == Kind::Write {
            pending.torn_off = Some(TornOff::cut(&mut request.bufs, keep));
        }
        request.len = keep;
        self.go(request, pending);
    }

    fn lie(&mut self, mut request: Request) {
        if let Kind::Flush { epoch } = request.kind {
            let now = self.device.epoch();
            let honest =
                if epoch == now { Ok(()) } else { Err(IoErrorKind::EpochLost { expected: epoch, now }) };
            return self.answer(request, honest);
        }
        request.hints.fua = false;
        let pending = self.pending(&request);
        self.go(request, pending);
    }

    fn hang(&mut self, request: Request) {
        let pending = self.pending(&request);
        self.hung.push(Hung { request, pending, releases: self.device.releases() });
    }

    /// The inner device has answered; gives the request's own answer, if that is due.
    fn arrived(&mut self, mut completion: Completion) -> Option<Completion> {
        // The inner device does not know of the resets that were played.
        let resets = self.device.resets();
        completion.epoch += resets;
        if let Err(error) = &mut completion.result
            && let IoErrorKind::EpochLost { expected, now } = &mut error.kind
        {
            *expected = expected.wrapping_add(resets);
            *now = now.wrapping_add(resets);
        }
        match self.in_flight.remove(completion.tag)? {
            Step::Before(request, mut pending) => {
                if completion.result.is_ok()
                    && let Some(buf) = completion.bufs.as_slice().first()
                {
                    let change = self.device.remember(request.offset, buf);
                    pending.change = change.map(|change| (change, request.offset, request.len));
                }
                if self.device.is_gone() && !pending.torn {
                    let completion = request.complete(Err(IoErrorKind::Gone), completion.epoch);
                    return Some(self.finish(pending, completion));
                }
                self.send(request, pending);
                None
            }
            Step::Request(pending) => match pending.due {
                Some(due) if due > Instant::now() && !self.device.is_gone() => {
                    self.held.push(due, (pending, completion));
                    None
                }
                _ => Some(self.finish(pending, completion)),
            },
        }
    }

    /// Makes the answer for the inner device's request that of the caller's request.
    fn finish(&mut self, pending: Pending, mut completion: Completion) -> Completion {
        completion.tag = pending.tag;
        if let Some(torn_off) = pending.torn_off {
            torn_off.rejoin(&mut completion.bufs);
        }
        if let Err(error) = &mut completion.result {
            (error.offset, error.len) = (pending.offset, pending.len);
        }
        let now = self.device.epoch();
        let lost = match pending.kind {
            _ if self.device.is_gone() || self.device.outages() != pending.outages => Some(IoErrorKind::Gone),
            Kind::Flush { epoch } if epoch != now => Some(IoErrorKind::EpochLost { expected: epoch, now }),
            _ => None,
        };
        if let Some(kind) = lost {
            let request = Request {
                kind: pending.kind,
                offset: pending.offset,
                len: pending.len,
                bufs: std::mem::take(&mut completion.bufs),
                hints: Default::default(),
                tag: pending.tag,
            };
            completion = request.complete(Err(kind), completion.epoch);
        }
        let success = completion.result.is_ok();
        if success && let Some(tamper) = pending.tamper {
            tamper.apply(&mut completion.bufs, self.device.geometry.block_size as usize);
        }
        if (pending.change.is_some() || pending.flush_began.is_some())
            && let Some(history) = &mut self.device.state.lock().history
        {
            if let Some((change, offset, len)) = pending.change {
                history.answered(change, offset, len, success, pending.durable);
            }
            if let Some(began) = pending.flush_began.filter(|_| success) {
                history.flushed(began);
            }
        }
        completion
    }

    /// Answers what is due, and what an outage has caught.
    fn look_after_held(&mut self, completions: &mut Vec<Completion>) {
        if self.held.len() == 0 {
            return;
        }
        let outages = self.device.outages();
        if outages != self.outages_seen {
            self.outages_seen = outages;
            for (due, (pending, completion)) in self.held.take_all() {
                if pending.outages == outages {
                    self.held.push(due, (pending, completion));
                } else {
                    completions.push(self.finish(pending, completion));
                }
            }
        }
        let now = Instant::now();
        while let Some((pending, completion)) = self.held.pop_due(now) {
            completions.push(self.finish(pending, completion));
        }
    }

    /// Hung requests that were released go on; those whose deadline has come, or whose device is gone, are answered.
    fn look_after_hung(&mut self) {
        if self.hung.is_empty() {
            return;
        }
        let (now, gone, releases) = (Instant::now(), self.device.is_gone(), self.device.releases());
        for hung in std::mem::take(&mut self.hung) {
            let Hung { request, pending, releases: had } = hung;
            if gone || self.device.outages() != pending.outages {
                self.give_back(request, pending, IoErrorKind::Gone);
            } else if request.hints.deadline.is_some_and(|deadline| deadline <= now) {
                self.give_back(request, pending, IoErrorKind::TimedOut);
            } else if had != releases {
                self.go(request, pending);
            } else {
                self.hung.push(Hung { request, pending, releases });
            }
        }
    }
}

impl QueuePair for FaultQueuePair {
    fn submit(&mut self, mut request: Request) {
        if let Err(kind) = request.check(&self.device.geometry, self.device.inner.read_only()) {
            return self.answer(request, Err(kind));
        }
        if self.device.is_gone() {
            return self.answer(request, Err(IoErrorKind::Gone));
        }
        let verdict = self.device.judge(&request);
        let mut pending = self.pending(&request);
        match verdict {
            Verdict::Pass => {}
            Verdict::Answer(result) => return self.answer(request, result),
            Verdict::Torn { blocks, silently } => return self.tear(request, blocks, silently),
            Verdict::Misdirected(offset) => request.offset = offset,
            Verdict::Lie => return self.lie(request),
            Verdict::Tampered(tamper) => pending.tamper = Some(tamper),
            Verdict::Late(time) => pending.due = Instant::now().checked_add(time),
            Verdict::Hung => return self.hang(request),
            Verdict::Gone(time) => {
                self.device.remove_until(time.and_then(|time| Instant::now().checked_add(time)));
                return self.answer(request, Err(IoErrorKind::Gone));
            }
            Verdict::PowerCut(survive) => {
                if let Err(error) = self.device.power_cut(survive) {
                    log::error!("{error}");
                }
                return self.answer(request, Err(IoErrorKind::Gone));
            }
        }
        self.go(request, pending);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        self.look_after_hung();
        completions.append(&mut self.ready);
        let mut arrived = std::mem::take(&mut self.arrived);
        self.inner.poll(&mut arrived);
        completions.extend(arrived.drain(..).filter_map(|completion| self.arrived(completion)));
        self.arrived = arrived;
        self.look_after_held(completions);
        completions.len() - before
    }

    fn outstanding(&self) -> usize {
        self.ready.len() + self.in_flight.len() + self.held.len() + self.hung.len()
    }

    fn wait(&mut self, timeout: Duration) {
        if !self.ready.is_empty() {
            return;
        }
        let mut due = self.held.next_due();
        if !self.hung.is_empty() {
            let look = Instant::now() + LOOK;
            due = Some(due.map_or(look, |due| due.min(look)));
        }
        wait_until(&mut *self.inner, due, timeout);
    }
}
