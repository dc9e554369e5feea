//! A device that takes its time: answers are held back until a time after their submission that a [`LatencyPlan`] says,
//! fixed or from a distribution. See [`plan`] for what can be said and how.
//!
//! - The device inside works as fast as it can; its own time counts. An answer comes at the later of the two.
//! - No thread and no busy waiting of its own: whoever polls takes what is due, in the order in which it became due.
//!   [`wait`](QueuePair::wait) sleeps until the next one is. Times are as exact as the polling is.
//! - Without `channels` any number of requests take their time side by side. With `channels=N` the device works on N at
//!   once, over all queue pairs, in the order of their submission; the others wait, and their time begins when a channel is free.
//! - Requests that break the contract are answered without delay. Dropping a queue pair waits for the device inside only.
//! - A deadline is a matter of the device inside: what is held back has reached it, and runs to its end.
//! - The random decisions depend on the seed, on the order in which queue pairs were opened, and on the order of requests
//!   within each.

pub mod plan;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use plan::{LatencyPlan, Time};

use crate::wrap::held::{Held, wait_until};
use crate::wrap::in_flight::InFlight;
use crate::{ClaimFlag, Completion, Device, DmaSource, Error, Geometry, QueuePair, Request};

/// A device with latency. All functions may be called from any thread.
pub struct LatencyDevice {
    name: String,
    inner: Arc<dyn Device>,
    plan: LatencyPlan,
    /// When each of the channels that were ever used is free.
    channels: Mutex<BinaryHeap<Reverse<Instant>>>,
    queue_pairs: AtomicU64,
}

impl fmt::Debug for LatencyDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LatencyDevice").field("name", &self.name).finish_non_exhaustive()
    }
}

impl LatencyDevice {
    /// Lets the requests to `inner` take the time that `plan` says.
    pub fn wrap(inner: Arc<dyn Device>, plan: LatencyPlan) -> Arc<LatencyDevice> {
        let name = format!("latency:/{}", inner.name());
        LatencyDevice::wrap_named(&name, inner, plan)
    }

    pub(crate) fn wrap_named(name: &str, inner: Arc<dyn Device>, plan: LatencyPlan) -> Arc<LatencyDevice> {
        let (channels, queue_pairs) = (Mutex::default(), AtomicU64::new(0));
        Arc::new(LatencyDevice { name: name.to_owned(), inner, plan, channels, queue_pairs })
    }

    /// When a request that takes `time` and is submitted `now` is answered.
    fn due(&self, now: Instant, time: Duration) -> Instant {
        let Some(count) = self.plan.channels else { return now + time };
        let mut channels = self.channels.lock();
        let free = if channels.len() < count as usize { None } else { channels.pop() };
        let begins = free.map_or(now, |Reverse(free)| free.max(now));
        channels.push(Reverse(begins + time));
        begins + time
    }
}

impl Device for LatencyDevice {
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
        let number = self.queue_pairs.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(LatencyQueuePair {
            device: self,
            inner,
            number,
            submitted: 0,
            in_flight: InFlight::default(),
            held: Held::default(),
            arrived: Vec::new(),
        }))
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

/// A request that the device inside has.
struct Pending {
    tag: u64,
    due: Option<Instant>,
}

struct LatencyQueuePair {
    device: Arc<LatencyDevice>,
    inner: Box<dyn QueuePair>,
    number: u64,
    submitted: u64,
    in_flight: InFlight<Pending>,
    held: Held<Completion>,
    arrived: Vec<Completion>,
}

impl QueuePair for LatencyQueuePair {
    fn submit(&mut self, mut request: Request) {
        let mut due = None;
        if request.check(self.device.geometry(), self.device.read_only()).is_ok() {
            self.submitted += 1;
            let time = self.device.plan.time(&request, self.number, self.submitted);
            due = (!time.is_zero()).then(|| self.device.due(Instant::now(), time));
        }
        request.tag = self.in_flight.insert(Pending { tag: request.tag, due });
        self.inner.submit(request);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        self.inner.poll(&mut self.arrived);
        for mut completion in self.arrived.drain(..) {
            let Some(Pending { tag, due }) = self.in_flight.remove(completion.tag) else { continue };
            completion.tag = tag;
            match due {
                Some(due) => self.held.push(due, completion),
                None => completions.push(completion),
            }
        }
        if self.held.len() > 0 {
            let now = Instant::now();
            completions.extend(std::iter::from_fn(|| self.held.pop_due(now)));
        }
        completions.len() - before
    }

    fn outstanding(&self) -> usize {
        self.in_flight.len() + self.held.len()
    }

    fn wait(&mut self, timeout: Duration) {
        wait_until(&mut *self.inner, self.held.next_due(), timeout);
    }
}

#[cfg(test)]
mod tests;
