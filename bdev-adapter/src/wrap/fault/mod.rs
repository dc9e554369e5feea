//! A device on which things go wrong as a [`FaultPlan`] says. See [`plan`] for what can go wrong and how it is named.
//!
//! - Requests that break the contract are answered by the contract, and are neither counted nor hit.
//! - Once the device is gone, every answer is [`IoErrorKind::Gone`], also to requests that had reached the device
//!   before: as after a power cut, nobody knows what became of them. [`FaultDevice::restore`] brings it back.
//! - [`FaultDevice::reset`] plays a controller reset: the epoch rises, and flushes of earlier epochs fail. Nothing that
//!   was written is lost by it.
//! - [`FaultDevice::power_cut`] loses what was not flushed: the blocks get back what they durably held, all of them or some.
//!   It follows what is not flushed only if the plan asks for that, and takes back whole blocks to one earlier content.
//!   *Every* state that a crash could leave is the business of the [recorder](crate::wrap::recorder). A recorder *inside*
//!   (`fault:lying_flush=1/record:/...`) sees what the medium gets: no flush that was a lie. One *outside* sees what was
//!   acknowledged: its crash states are those of an honest device.
//! - Rot lives in the wrapper: the device inside keeps the right bytes, so [`FaultDevice::heal`] can undo it.
//! - The geometry says that there is a volatile cache, so that the layers above flush.
//!
//! A request that is never answered stays in its queue pair, counts as outstanding, and never reaches the device: a queue
//! pair that is dropped just drops it. If it has a deadline it is answered [`IoErrorKind::TimedOut`] then, as the contract has
//! it for requests that wait in the adapter. If the device goes away it is answered [`IoErrorKind::Gone`].
//!
//! Decisions depend on the seed and on the order in which requests are submitted: with several threads that order, and
//! so the faults, may differ from run to run.

pub mod plan;

mod history;
mod queue;
mod tamper;
mod torn_off;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use plan::{Effect, Fault, FaultPlan, Seen, Target, When};

use crate::blocking::BlockingIo;
use crate::wrap::random::mix;
use crate::wrap::recorder::Survive;
use crate::{ClaimFlag, Device, DmaSource, Error, Geometry, IoError, IoErrorKind, Kind, QueuePair, Request};
use history::{Change, History, Moment};
use tamper::{Rot, Tamper};

/// How long each write may take that takes something back at a power cut.
const TAKE_BACK_LIMIT: Duration = Duration::from_millis(200);

/// A device with faults. All functions may be called from any thread.
pub struct FaultDevice {
    name: String,
    inner: Arc<dyn Device>,
    geometry: Geometry,
    state: Mutex<State>,
    gone: AtomicBool,
    /// When a device that is gone comes back by itself.
    back_at: Mutex<Option<Instant>>,
    /// How often it went away: what was on its way then is lost.
    outages: AtomicU64,
    /// Resets that were played.
    resets: AtomicU64,
    /// How often hung requests were released.
    releases: AtomicU64,
    /// `state.history` is there.
    keeps_history: AtomicBool,
}

struct State {
    plan: FaultPlan,
    seen: Seen,
    hits: u64,
    rot: Rot,
    history: Option<History>,
}

/// What is to be done with a request.
enum Verdict {
    Pass,
    Answer(Result<(), IoErrorKind>),
    /// So many blocks reach the device.
    Torn {
        blocks: u64,
        silently: bool,
    },
    /// It goes to this byte address instead.
    Misdirected(u64),
    Lie,
    Tampered(Box<Tamper>),
    Late(Duration),
    Hung,
    Gone(Option<Duration>),
    PowerCut(Survive),
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
        let geometry = Geometry { volatile_cache: true, ..inner.geometry().clone() };
        let rot = Rot::default();
        let state = State { plan: FaultPlan::default(), seen: Seen::default(), hits: 0, rot, history: None };
        let device = FaultDevice {
            name: name.to_owned(),
            inner,
            geometry,
            state: Mutex::new(state),
            gone: AtomicBool::new(false),
            back_at: Mutex::new(None),
            outages: AtomicU64::new(0),
            resets: AtomicU64::new(0),
            releases: AtomicU64::new(0),
            keeps_history: AtomicBool::new(false),
        };
        device.set_plan(plan);
        Arc::new(device)
    }

    /// Replaces the plan; counting starts again. A device that is gone stays gone, what is rotten stays rotten, and what
    /// is not flushed is followed from the first plan on that asks for it.
    pub fn set_plan(&self, plan: FaultPlan) {
        let state = &mut *self.state.lock();
        if plan.needs_history() && state.history.is_none() {
            state.history = Some(History::new(self.geometry.block_size));
            self.keeps_history.store(true, Ordering::Release);
        }
        (state.plan, state.seen, state.hits) = (plan, Seen::default(), 0);
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
        self.remove_until(None);
    }

    /// Brings a device back that was gone, in a new epoch.
    pub fn restore(&self) {
        *self.back_at.lock() = None;
        self.reset();
        self.gone.store(false, Ordering::Release);
    }

    /// True when the device has disappeared.
    pub fn is_gone(&self) -> bool {
        if !self.gone.load(Ordering::Acquire) {
            return false;
        }
        let back = self.back_at.lock().take_if(|at| *at <= Instant::now()).is_some();
        if back {
            self.restore();
        }
        !back && self.gone.load(Ordering::Acquire)
    }

    /// Plays a controller reset: a new epoch begins.
    pub fn reset(&self) {
        self.resets.fetch_add(1, Ordering::AcqRel);
    }

    /// Cuts the power: the device is gone, and the blocks that were changed and not durably flushed hold what they held
    /// before, as far as their changes do not `survive`. [`restore`](Self::restore) brings the power back. Returns how many
    /// blocks were taken back. What is in flight meanwhile may land or not, and is answered [`IoErrorKind::Gone`].
    ///
    /// Takes nothing back unless the plan has `volatile`, `lying_flush`, `stale_read` or `power_cut`.
    ///
    /// # Errors
    /// [`Error::Io`] when the device inside refuses to be written, and what its `queue_pair` says.
    pub fn power_cut(&self, survive: Survive) -> Result<u64, Error> {
        self.remove();
        let lost = self.state.lock().history.as_mut().map_or_else(Vec::new, |history| history.lose(survive));
        if lost.is_empty() {
            return Ok(0);
        }
        let failed = |source: Box<IoError>| Error::Io {
            what: "cannot take back what was not flushed on",
            device: self.inner.name().to_owned(),
            source,
        };
        // The device inside may be one that never answers.
        let mut io = BlockingIo::new(&self.inner)?.time_limit(TAKE_BACK_LIMIT);
        for (block, content) in &lost {
            io.write(block * u64::from(self.geometry.block_size), content).map_err(failed)?;
        }
        io.flush().map_err(failed)?;
        log::info!("{}: power cut, {} blocks lost", self.name, lost.len());
        Ok(lost.len() as u64)
    }

    /// Lets the requests that were never answered go on to the device, at the next poll of their queue pairs.
    pub fn release_hung(&self) {
        self.releases.fetch_add(1, Ordering::AcqRel);
    }

    /// How many blocks are rotten.
    pub fn rotten_blocks(&self) -> usize {
        self.state.lock().rot.len()
    }

    /// Makes all rotten blocks whole again.
    pub fn heal(&self) {
        self.state.lock().rot.heal_all();
    }

    fn remove_until(&self, back_at: Option<Instant>) {
        let mut at = self.back_at.lock();
        *at = back_at;
        self.outages.fetch_add(1, Ordering::AcqRel);
        self.gone.store(true, Ordering::Release);
    }

    fn resets(&self) -> u64 {
        self.resets.load(Ordering::Acquire)
    }

    fn outages(&self) -> u64 {
        self.outages.load(Ordering::Acquire)
    }

    fn releases(&self) -> u64 {
        self.releases.load(Ordering::Acquire)
    }

    fn blocks(&self, offset: u64, len: u64) -> Range<u64> {
        let block_size = u64::from(self.geometry.block_size);
        offset / block_size..(offset + len) / block_size
    }

    fn judge(&self, request: &Request) -> Verdict {
        let state = &mut *self.state.lock();
        state.seen.count(request);
        let verdict = self.sentence(state, request);
        if !matches!(verdict, Verdict::Pass) {
            state.hits += 1;
        }
        if request.kind != Kind::Read || state.rot.len() == 0 {
            return verdict;
        }
        let mut tamper = match verdict {
            Verdict::Pass => Box::default(),
            Verdict::Tampered(tamper) => tamper,
            other => return other,
        };
        tamper.add_rot(&state.rot, self.blocks(request.offset, request.len));
        if tamper.is_empty() { Verdict::Pass } else { Verdict::Tampered(tamper) }
    }

    fn sentence(&self, state: &mut State, request: &Request) -> Verdict {
        let State { plan, seen, rot, history, .. } = state;
        let Some(fault) = plan.decide(request, seen) else { return Verdict::Pass };
        let block_size = u64::from(self.geometry.block_size);
        let read = Target::Reads.includes(request);
        let write = Target::Writes.includes(request);
        let blocks = request.len / block_size;
        match fault.effect {
            Effect::Error(kind) => Verdict::Answer(Err(kind)),
            Effect::Rot if read => {
                let (block, seed) = plan.rotten_block(fault, request, block_size, seen);
                rot.begin(block, seed);
                Verdict::Tampered(Box::default())
            }
            Effect::Stale if read => {
                let Some(history) = history else { return Verdict::Pass };
                let tamper = Tamper::stale(history, self.blocks(request.offset, request.len));
                if tamper.is_empty() { Verdict::Pass } else { Verdict::Tampered(Box::new(tamper)) }
            }
            Effect::Lost => Verdict::Answer(Ok(())),
            Effect::Torn if write => {
                Verdict::Torn { blocks: plan.torn_blocks(blocks, seen), silently: false }
            }
            Effect::TornSilently if write => {
                Verdict::Torn { blocks: plan.torn_blocks(blocks, seen), silently: true }
            }
            Effect::Misdirected if write => {
                match plan.misdirected(request, self.geometry.capacity, block_size, seen) {
                    Some(offset) => Verdict::Misdirected(offset),
                    None => Verdict::Answer(Ok(())),
                }
            }
            Effect::Lie if Target::Barriers.includes(request) => Verdict::Lie,
            Effect::Slow(time) => Verdict::Late(time),
            Effect::Never => Verdict::Hung,
            Effect::Torn | Effect::Gone => Verdict::Gone(None),
            Effect::GoneFor(time) => Verdict::Gone(Some(time)),
            Effect::PowerCut => Verdict::PowerCut(Survive::Random(mix(plan.seed ^ mix(seen.all)))),
            Effect::Rot | Effect::Stale | Effect::TornSilently | Effect::Misdirected | Effect::Lie => {
                Verdict::Pass
            }
        }
    }

    /// A write, write-zeroes or unmap goes to the device: what was rotten there is not any more.
    fn changes(&self, offset: u64, len: u64) {
        self.state.lock().rot.heal(self.blocks(offset, len));
    }

    fn keeps_history(&self) -> bool {
        self.keeps_history.load(Ordering::Acquire)
    }

    /// Remembers what a change at `offset` is about to replace.
    fn remember(&self, offset: u64, before: &[u8]) -> Option<Change> {
        Some(self.state.lock().history.as_mut()?.changed(offset, before))
    }

    fn flush_begins(&self) -> Option<Moment> {
        if !self.keeps_history() {
            return None;
        }
        Some(self.state.lock().history.as_mut()?.flush_begins())
    }
}

impl Device for FaultDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error> {
        queue::open(self)
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

#[cfg(test)]
mod tests;
