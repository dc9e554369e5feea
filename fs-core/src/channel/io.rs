//! How an operation talks to the device: it hands requests to its channel and awaits the answers.
//!
//! Operations are `async` functions that own no device. They push requests into the channel's outbox through an [`Io`];
//! the channel's [`Engine`](super::engine::Engine) submits the outbox when it is polled, and wakes the task whose answer came. A request is sent
//! when it is made, not when it is awaited: to have many in flight, make them all, then await each.
//!
//! Invariant: a request that was made is answered exactly once, into its slot; a slot whose handle was dropped
//! ([`Slot::Orphan`]) swallows the answer, so buffers in flight outlive the operation that made them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use bdev_adapter::{Completion, DmaBuf, DmaSource, IoError, Request, Segments};

use super::holds::HoldSet;
use super::operation;
use crate::error::{Error, Result};
use crate::sync::Mutex;

/// What an engine drives.
pub(crate) type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// One request in flight.
enum Slot {
    Free { next: u32 },
    Waiting(Option<Waker>),
    Done(Result<(), Box<IoError>>, Segments),
    Orphan,
}

const NO_SLOT: u32 = u32::MAX;

struct IoState {
    outbox: Vec<Request>,
    slots: Vec<Slot>,
    free: u32,
}

/// The part of a channel that its operations and wakers share with its engine.
pub(crate) struct Shared {
    io: Mutex<IoState>,
    /// Tasks to run.
    ready: Mutex<Vec<u32>>,
    /// Tasks that operations have started and that the engine takes over when it is polled.
    spawned: Mutex<Vec<Task>>,
    /// Results of finished operations that were submitted with a tag.
    results: Mutex<Vec<operation::Completion>>,
    /// There are some. Set and cleared under the lock of `results`; a look without it only saves taking it.
    has_results: AtomicBool,
    /// Set when `ready` or the outbox got something. Release on set pairs with acquire in `take_signal`.
    signal: AtomicBool,
    /// The thread that waits in a blocking call, to be unparked when a task becomes ready.
    sleeper: Mutex<Option<std::thread::Thread>>,
    /// Block holds of operations that are tasks.
    pub(crate) holds: Mutex<HoldSet>,
    dma: Arc<dyn DmaSource>,
}

/// A handle on a channel's device queue for the operations that the channel drives.
#[derive(Clone)]
pub(crate) struct Io(Arc<Shared>);

impl std::ops::Deref for Io {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Io {
    pub(crate) fn new(dma: Arc<dyn DmaSource>, holds: HoldSet) -> Io {
        Io(Arc::new(Shared {
            io: Mutex::new(IoState { outbox: Vec::new(), slots: Vec::new(), free: NO_SLOT }),
            ready: Mutex::new(Vec::new()),
            spawned: Mutex::new(Vec::new()),
            results: Mutex::new(Vec::new()),
            has_results: AtomicBool::new(false),
            signal: AtomicBool::new(false),
            sleeper: Mutex::new(None),
            holds: Mutex::new(holds),
            dma,
        }))
    }

    /// A buffer of `len` bytes for this device.
    pub(crate) fn buffer(&self, len: usize) -> Result<DmaBuf> {
        Ok(DmaBuf::new(&self.0.dma, len)?)
    }

    /// Sends `request` (its tag is set here); await the handle for the answer.
    pub(crate) fn send(&self, mut request: Request) -> IoHandle {
        let mut io = self.0.io.lock();
        let index = if io.free == NO_SLOT {
            io.slots.push(Slot::Waiting(None));
            (io.slots.len() - 1) as u32
        } else {
            let index = io.free;
            let slot = std::mem::replace(&mut io.slots[index as usize], Slot::Waiting(None));
            if let Slot::Free { next } = slot {
                io.free = next;
            }
            index
        };
        request.tag = u64::from(index);
        io.outbox.push(request);
        drop(io);
        self.0.raise();
        IoHandle { shared: Arc::clone(&self.0), index, taken: false }
    }

    /// Sends `request` and waits for the answer; the buffers come back either way.
    pub(crate) async fn call(&self, request: Request) -> (Result<(), Box<IoError>>, Segments) {
        self.send(request).await
    }

    /// Reads `len` bytes at byte address `offset` into a new buffer.
    pub(crate) async fn read(&self, offset: u64, len: usize, what: &str) -> Result<DmaBuf> {
        let buf = self.buffer(len)?;
        let (result, bufs) = self.call(Request::read(offset, buf, 0)).await;
        result.map_err(|e| Error::io(format!("reading {what}"), e))?;
        bufs.into_one().ok_or_else(|| Error::corrupt("the device lost a buffer"))
    }

    /// Starts `task` as an operation of its own, which nobody waits for; its channel drives it.
    pub(crate) fn spawn(&self, task: Task) {
        self.0.spawned.lock().push(task);
        self.0.raise();
    }

    /// Lets the channel go on with everything else once.
    pub(crate) async fn yield_now(&self) {
        let mut yielded = false;
        std::future::poll_fn(|cx| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    pub(super) fn weak(&self) -> std::sync::Weak<Shared> {
        Arc::downgrade(&self.0)
    }
}

impl Shared {
    /// Keeps the result of an operation until the channel's thread asks for it.
    pub(super) fn answer(&self, completion: operation::Completion) {
        let mut results = self.results.lock();
        results.push(completion);
        // Release: pairs with the acquire in `take_results`.
        self.has_results.store(true, Ordering::Release);
    }

    /// Appends the results that are there.
    #[inline]
    pub(super) fn take_results(&self, into: &mut Vec<operation::Completion>) {
        if self.has_results.load(Ordering::Acquire) {
            let mut results = self.results.lock();
            into.append(&mut results);
            self.has_results.store(false, Ordering::Relaxed);
        }
    }

    fn raise(&self) {
        self.signal.store(true, Ordering::Release);
    }

    /// True when there may be ready tasks or unsent requests; clears the mark.
    pub(super) fn take_signal(&self) -> bool {
        self.signal.load(Ordering::Relaxed) && self.signal.swap(false, Ordering::Acquire)
    }

    pub(super) fn signalled(&self) -> bool {
        self.signal.load(Ordering::Acquire)
    }

    /// Marks task `index` to be run and wakes the thread that waits for the channel.
    pub(super) fn make_ready(&self, index: u32) {
        self.ready.lock().push(index);
        self.raise();
        self.wake_sleeper();
    }

    pub(super) fn wake_sleeper(&self) {
        if let Some(thread) = &*self.sleeper.lock() {
            thread.unpark();
        }
    }

    pub(super) fn set_sleeper(&self, thread: Option<std::thread::Thread>) {
        *self.sleeper.lock() = thread;
    }

    /// Tasks that the engine has not taken over yet.
    pub(super) fn spawned(&self) -> usize {
        self.spawned.lock().len()
    }

    pub(super) fn take_spawned(&self) -> Vec<Task> {
        std::mem::take(&mut *self.spawned.lock())
    }

    pub(super) fn take_ready(&self, into: &mut Vec<u32>) {
        std::mem::swap(&mut *self.ready.lock(), into);
    }

    pub(super) fn drain_outbox(&self, into: &mut Vec<Request>) {
        std::mem::swap(&mut self.io.lock().outbox, into);
    }

    /// Stores the answer of the request in slot `completion.tag` and wakes who waits for it.
    pub(super) fn complete(&self, completion: &mut Completion) {
        let index = completion.tag as u32;
        let mut io = self.io.lock();
        let result = std::mem::replace(&mut completion.result, Ok(()));
        let done = Slot::Done(result, std::mem::take(&mut completion.bufs));
        match std::mem::replace(&mut io.slots[index as usize], done) {
            Slot::Waiting(waker) => {
                drop(io);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Slot::Orphan => {
                let done = io.release(index);
                drop(io);
                drop(done);
            }
            Slot::Free { .. } | Slot::Done(..) => unreachable!("a request was answered twice"),
        }
    }
}

impl IoState {
    fn release(&mut self, index: u32) -> Slot {
        let next = self.free;
        self.free = index;
        std::mem::replace(&mut self.slots[index as usize], Slot::Free { next })
    }
}

/// The answer to a request that was sent; a future.
pub(crate) struct IoHandle {
    shared: Arc<Shared>,
    index: u32,
    taken: bool,
}

impl Future for IoHandle {
    type Output = (Result<(), Box<IoError>>, Segments);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        assert!(!self.taken, "an I/O handle was polled after it was ready");
        let mut io = self.shared.io.lock();
        if let Slot::Waiting(waker) = &mut io.slots[self.index as usize] {
            *waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let slot = io.release(self.index);
        drop(io);
        self.taken = true;
        match slot {
            Slot::Done(result, bufs) => Poll::Ready((result, bufs)),
            Slot::Free { .. } | Slot::Waiting(_) | Slot::Orphan => {
                unreachable!("a live handle owns its slot")
            }
        }
    }
}

impl Drop for IoHandle {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut io = self.shared.io.lock();
        if matches!(io.slots[self.index as usize], Slot::Waiting(_)) {
            io.slots[self.index as usize] = Slot::Orphan;
        } else {
            let done = io.release(self.index);
            drop(io);
            drop(done);
        }
    }
}
