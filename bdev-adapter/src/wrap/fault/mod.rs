//! A device on which things go wrong as a [`FaultPlan`] says. See [`plan`] for what can go wrong and how it is named.
//!
//! - Requests that break the contract are answered by the contract, and are neither counted nor hit.
//! - Once the device is gone, every answer is [`IoErrorKind::Gone`], also to requests that had reached the device
//!   before: as after a power cut, nobody knows what became of them. [`FaultDevice::restore`] brings it back.
//! - [`FaultDevice::reset`] plays a controller reset: the epoch rises, and flushes of earlier epochs fail. Nothing that
//!   was written is lost by it; lost states are the business of the [recorder](crate::wrap::recorder).
//!
//! Decisions depend on the seed and on the order in which requests are submitted: with several threads that order, and
//! so the faults, may differ from run to run.

pub mod plan;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

pub use plan::{Effect, Fault, FaultPlan, Seen, Target, When};

use crate::{
    ClaimFlag, Completion, Device, DmaBuf, DmaSource, Error, Geometry, IoErrorKind, Kind, QueuePair, Request,
    Segments,
};

/// A device with faults. All functions may be called from any thread.
pub struct FaultDevice {
    name: String,
    inner: Arc<dyn Device>,
    state: Mutex<State>,
    gone: AtomicBool,
    /// Resets that were played.
    resets: AtomicU64,
}

struct State {
    plan: FaultPlan,
    seen: Seen,
    hits: u64,
}

/// What is to be done with a request.
enum Verdict {
    Pass,
    Answer(Result<(), IoErrorKind>),
    /// So many blocks reach the device.
    Torn(u64),
}

impl fmt::Debug for FaultDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultDevice").field("name", &self.name).finish_non_exhaustive()
    }
}

impl FaultDevice {
    /// Puts `plan` around `inner`.
    pub fn wrap(inner: Arc<dyn Device>, plan: FaultPlan) -> Arc<FaultDevice> {
        let name = format!("fault:/{}", inner.name());
        FaultDevice::wrap_named(&name, inner, plan)
    }

    pub(crate) fn wrap_named(name: &str, inner: Arc<dyn Device>, plan: FaultPlan) -> Arc<FaultDevice> {
        log::info!("{name}: faults with seed={}", plan.seed);
        Arc::new(FaultDevice {
            name: name.to_owned(),
            inner,
            state: Mutex::new(State { plan, seen: Seen::default(), hits: 0 }),
            gone: AtomicBool::new(false),
            resets: AtomicU64::new(0),
        })
    }

    /// Replaces the plan; counting starts again. A device that is gone stays gone.
    pub fn set_plan(&self, plan: FaultPlan) {
        *self.state.lock() = State { plan, seen: Seen::default(), hits: 0 };
    }

    /// The requests counted since the plan was set.
    pub fn seen(&self) -> Seen {
        self.state.lock().seen
    }

    /// How many requests a fault has hit since the plan was set.
    pub fn hits(&self) -> u64 {
        self.state.lock().hits
    }

    /// Makes the device disappear now.
    pub fn remove(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Brings a device back that was gone, in a new epoch.
    pub fn restore(&self) {
        self.reset();
        self.gone.store(false, Ordering::Release);
    }

    /// True when the device has disappeared.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Plays a controller reset: a new epoch begins.
    pub fn reset(&self) {
        self.resets.fetch_add(1, Ordering::AcqRel);
    }

    fn resets(&self) -> u64 {
        self.resets.load(Ordering::Acquire)
    }

    fn judge(&self, request: &Request) -> Verdict {
        let state = &mut *self.state.lock();
        state.seen.all += 1;
        match request.kind {
            Kind::Read => state.seen.reads += 1,
            Kind::Write | Kind::WriteZeroes => state.seen.writes += 1,
            Kind::Flush { .. } => state.seen.flushes += 1,
            Kind::Unmap => {}
        }
        let Some(effect) = state.plan.decide(request, &state.seen) else { return Verdict::Pass };
        state.hits += 1;
        match effect {
            Effect::Error(kind) => Verdict::Answer(Err(kind)),
            Effect::Lost => Verdict::Answer(Ok(())),
            Effect::Torn if Target::Writes.includes(request.kind) => {
                let blocks = request.len / u64::from(self.inner.geometry().block_size);
                Verdict::Torn(state.plan.torn_blocks(blocks, &state.seen))
            }
            Effect::Torn | Effect::Gone => {
                self.remove();
                Verdict::Answer(Err(IoErrorKind::Gone))
            }
        }
    }
}

impl Device for FaultDevice {
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
        Ok(Box::new(FaultQueuePair {
            device: self,
            inner,
            pending: Vec::new(),
            free: Vec::new(),
            ready: Vec::new(),
            inner_completions: Vec::new(),
        }))
    }

    fn dma(&self) -> Arc<dyn DmaSource> {
        self.inner.dma()
    }

    fn epoch(&self) -> u64 {
        self.inner.epoch() + self.resets()
    }

    fn claim_flag(&self) -> &ClaimFlag {
        self.inner.claim_flag()
    }
}

/// What is remembered of a request while the inner device has it (under the tag of its place in the table).
struct Pending {
    tag: u64,
    kind: Kind,
    offset: u64,
    len: u64,
    /// The part of a torn write that never reached the device.
    torn_off: Option<TornOff>,
}

struct FaultQueuePair {
    device: Arc<FaultDevice>,
    inner: Box<dyn QueuePair>,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// Answered without the inner device.
    ready: Vec<Completion>,
    inner_completions: Vec<Completion>,
}

impl FaultQueuePair {
    fn answer(&mut self, request: Request, result: Result<(), IoErrorKind>) {
        self.ready.push(request.complete(result, self.device.epoch()));
    }

    fn forward(&mut self, mut request: Request, torn_off: Option<TornOff>, len: u64) {
        let (tag, kind, offset) = (request.tag, request.kind, request.offset);
        let pending = Pending { tag, kind, offset, len, torn_off };
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.pending.push(None);
                self.pending.len() - 1
            }
        };
        self.pending[slot] = Some(pending);
        request.tag = slot as u64;
        if let Kind::Flush { epoch } = request.kind {
            // The inner device does not know of the resets that were played.
            request.kind = Kind::Flush { epoch: epoch.wrapping_sub(self.device.resets()) };
        }
        self.inner.submit(request);
    }

    fn tear(&mut self, mut request: Request, blocks: u64) {
        self.device.remove();
        let len = request.len;
        let keep = blocks * u64::from(self.device.geometry().block_size);
        if keep == 0 {
            return self.answer(request, Err(IoErrorKind::Gone));
        }
        let torn_off = TornOff::cut(&mut request.bufs, keep);
        request.len = keep;
        self.forward(request, Some(torn_off), len);
    }

    fn translate(&mut self, mut completion: Completion) -> Option<Completion> {
        let slot = completion.tag as usize;
        let pending = self.pending.get_mut(slot)?.take()?;
        self.free.push(slot);
        completion.tag = pending.tag;
        let resets = self.device.resets();
        completion.epoch += resets;
        if let Err(error) = &mut completion.result {
            error.len = pending.len;
            if let IoErrorKind::EpochLost { expected, now } = &mut error.kind {
                *expected = expected.wrapping_add(resets);
                *now = now.wrapping_add(resets);
            }
        }
        if let Some(torn_off) = pending.torn_off {
            torn_off.rejoin(&mut completion.bufs);
        }
        let now = self.device.epoch();
        let failure = match pending.kind {
            _ if self.device.is_gone() => Some(IoErrorKind::Gone),
            Kind::Flush { epoch } if epoch != now => Some(IoErrorKind::EpochLost { expected: epoch, now }),
            _ => None,
        };
        let Some(failure) = failure else { return Some(completion) };
        let request = Request {
            kind: pending.kind,
            offset: pending.offset,
            len: pending.len,
            bufs: completion.bufs,
            hints: Default::default(),
            tag: pending.tag,
        };
        Some(request.complete(Err(failure), completion.epoch))
    }
}

impl QueuePair for FaultQueuePair {
    fn submit(&mut self, request: Request) {
        if let Err(kind) = request.check(self.device.geometry(), self.device.read_only()) {
            return self.answer(request, Err(kind));
        }
        if self.device.is_gone() {
            return self.answer(request, Err(IoErrorKind::Gone));
        }
        match self.device.judge(&request) {
            Verdict::Pass => {
                let len = request.len;
                self.forward(request, None, len);
            }
            Verdict::Answer(result) => self.answer(request, result),
            Verdict::Torn(blocks) => self.tear(request, blocks),
        }
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        completions.append(&mut self.ready);
        let mut arrived = std::mem::take(&mut self.inner_completions);
        self.inner.poll(&mut arrived);
        completions.extend(arrived.drain(..).filter_map(|completion| self.translate(completion)));
        self.inner_completions = arrived;
        completions.len() - before
    }

    fn outstanding(&self) -> usize {
        self.ready.len() + self.inner.outstanding()
    }

    fn wait(&mut self, timeout: Duration) {
        if self.ready.is_empty() {
            self.inner.wait(timeout);
        }
    }
}

/// The end of a scatter list that was cut off, possibly inside a buffer.
struct TornOff {
    /// The other half of the last buffer that was kept.
    half: Option<DmaBuf>,
    whole: Vec<DmaBuf>,
}

impl TornOff {
    /// Cuts `bufs` to its first `keep` bytes (at least one, fewer than it has).
    fn cut(bufs: &mut Segments, keep: u64) -> TornOff {
        let mut left = keep as usize;
        let mut kept = 0;
        let mut half = None;
        for buf in bufs.as_mut_slice() {
            if left == 0 {
                break;
            }
            if left < buf.len() {
                half = Some(buf.split_off(left));
            }
            left -= buf.len();
            kept += 1;
        }
        let whole = match bufs {
            Segments::Many(list) => list.split_off(kept),
            _ => Vec::new(),
        };
        TornOff { half, whole }
    }

    /// Puts the end back.
    fn rejoin(self, bufs: &mut Segments) {
        let refused = match (bufs.as_mut_slice().last_mut(), self.half) {
            (Some(last), Some(half)) => last.unsplit(half).err(),
            (_, half) => half,
        };
        debug_assert!(refused.is_none(), "the halves of one buffer fit together");
        if let Segments::Many(list) = bufs {
            list.extend(self.whole);
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
