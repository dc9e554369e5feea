//! Channels: how a thread works with a mounted filesystem.
//!
//! A thread opens a [`Channel`], submits operations and polls it; see the crate documentation for the model. The parts, in the
//! order in which an operation meets them: [`operation`] (what can be asked), [`engine`] (drives operations), [`io`] (how they
//! reach the device), [`fast_read`] (the short way of a direct read) and [`short_read`] (to wait for one), [`holds`] (what a read keeps from reuse),
//! [`future`] and the blocking calls in [`calls`] and [`space_calls`].

mod calls;
mod space_calls;
mod engine;
mod fast_read;
mod future;
pub(crate) mod holds;
pub(crate) mod io;
pub(crate) mod operation;
mod short_read;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bdev_adapter::{DmaBuf, QueuePair, Segments};

pub use calls::List;
pub use future::OpFuture;
pub use space_calls::Extents;

use self::engine::Engine;
use self::fast_read::{Accepted, FastReads};
use self::io::Io;
use self::operation::{Completion, Operation};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::File;
use crate::sync::{self, Mutex, SPINS_BEFORE_SLEEP};

/// Longest sleep between two looks; also how long a channel may be left alone before others drive it.
const NAP: Duration = Duration::from_millis(1);

/// What of a channel outlives the handle: other threads may have to drive it.
pub(crate) struct ChannelCore {
    engine: Mutex<Engine>,
    pub(crate) io: Io,
    /// When it was last polled by its own thread, in the mount's ticks.
    polled_at: AtomicU64,
    /// The handle was dropped.
    retired: AtomicBool,
}

impl ChannelCore {
    pub(crate) fn new(core: &Arc<Core>, queue_pair: Box<dyn QueuePair>) -> ChannelCore {
        let io = Io::new(core.device.dma(), core.holds.add());
        let reads = FastReads::new(Arc::clone(core), core.holds.add());
        let engine = Mutex::new(Engine::new(queue_pair, io.clone(), reads));
        ChannelCore { engine, io, polled_at: AtomicU64::new(0), retired: AtomicBool::new(false) }
    }

    /// Drives the channel on behalf of somebody else, unless its own thread has done so after tick `since`. True when it has
    /// operations in flight.
    pub(crate) fn drive_abandoned(&self, since: u64) -> bool {
        let Some(mut engine) = self.engine.try_lock() else { return true };
        let busy = engine.active() + engine.outstanding() > 0;
        if busy && self.polled_at.load(Ordering::Relaxed) <= since {
            engine.poll();
        }
        busy
    }

    /// Drives the channel on the way to an unmount.
    pub(crate) fn drive_to_end(&self) -> Driven {
        let mut engine = self.engine.lock();
        let advanced = engine.poll();
        match engine.active() + engine.outstanding() {
            0 => Driven::Idle,
            _ if advanced => Driven::Advanced,
            _ => Driven::Waits,
        }
    }

    /// Drives the channel until it has no unfinished operation, then takes its queue pair away. They must not depend on other
    /// channels.
    pub(crate) fn shut_down(&self) {
        loop {
            let mut engine = self.engine.lock();
            engine.poll();
            if engine.active() == 0 && engine.outstanding() == 0 {
                engine.queue_pair = None;
                return;
            }
            engine.wait_device(NAP);
        }
    }
}

/// How a channel is after it was driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Driven {
    /// Nothing is in flight.
    Idle,
    /// Something advanced.
    Advanced,
    /// Something waits for the device or for another channel.
    Waits,
}

/// Wakes the thread of a blocking call.
struct BlockWaker {
    woken: AtomicBool,
    thread: std::thread::Thread,
}

impl Wake for BlockWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Release pairs with the acquire in `block_on`.
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// The way of one thread into a mounted filesystem. Not `Send`: open one per thread ([`Filesystem::channel`]).
///
/// Operations are submitted with [`submit`](Self::submit) and answered by [`poll`](Self::poll); blocking calls and `_async` calls
/// are built on the same. Operations belong to the channel: they complete even when the future that stands for
/// one is dropped, and when the channel itself is dropped, as long as somebody drives it (the mount's helper thread does).
///
/// [`Filesystem::channel`]: crate::Filesystem::channel
pub struct Channel {
    pub(crate) shared: Arc<ChannelCore>,
    pub(crate) core: Arc<Core>,
    block_waker: Arc<BlockWaker>,
    waker: Waker,
    in_flight: Cell<usize>,
    /// Reads that no poll has handed to the engine yet: they are accepted without a lock.
    accepted: RefCell<Accepted>,
    /// For short reads through a copy.
    bounce: Cell<Option<DmaBuf>>,
    not_send: PhantomData<*const ()>,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("in_flight", &self.in_flight.get()).finish_non_exhaustive()
    }
}

impl Channel {
    pub(crate) fn new(core: &Arc<Core>) -> Result<Channel> {
        let shared = core.add_channel()?;
        let block_waker =
            Arc::new(BlockWaker { woken: AtomicBool::new(false), thread: std::thread::current() });
        Ok(Channel {
            shared,
            core: Arc::clone(core),
            waker: Waker::from(Arc::clone(&block_waker)),
            block_waker,
            in_flight: Cell::new(0),
            accepted: RefCell::default(),
            bounce: Cell::new(None),
            not_send: PhantomData,
        })
    }

    /// A buffer of `len` bytes in memory that the device reaches directly; its content is unspecified.
    ///
    /// # Errors
    /// [`Error::Device`] when the device memory is used up.
    pub fn buffer(&self, len: usize) -> Result<DmaBuf> {
        self.shared.io.buffer(len)
    }

    /// Accepts an operation; its answer comes from [`poll`](Self::poll) with `tag`. Never blocks. A read starts with the next
    /// poll (or blocking call, or future) of this channel.
    pub fn submit(&self, operation: Operation, tag: u64) {
        if let Operation::Read { file, offset, buf } = operation {
            return self.submit_read(&file, offset, buf, tag);
        }
        self.in_flight.set(self.in_flight.get() + 1);
        let mut engine = self.shared.engine.lock();
        if engine.queue_pair.is_none() || self.core.check_mounted().is_err() {
            drop(engine);
            self.refuse(tag, crate::dispatch::into_bufs(operation));
        } else {
            engine.submit(&self.core, operation, tag);
        }
    }

    /// As [`submit`](Self::submit) of [`Operation::Read`], and cheaper: reads of one file in a row share one reference to it.
    #[inline]
    pub fn submit_read(&self, file: &File, offset: u64, buf: DmaBuf, tag: u64) {
        self.in_flight.set(self.in_flight.get() + 1);
        if self.core.check_mounted().is_err() {
            return self.refuse(tag, buf.into());
        }
        self.accepted.borrow_mut().push(file, offset, buf, tag);
    }

    #[cold]
    fn refuse(&self, tag: u64, bufs: Segments) {
        self.shared.io.answer(Completion { tag, result: Err(Error::Unmounted), bufs });
    }

    /// Hands the accepted reads over to the engine; it is to be polled next.
    #[inline]
    fn hand_over(&self, engine: &mut Engine) {
        let mut accepted = self.accepted.borrow_mut();
        if accepted.is_empty() {
            return;
        }
        match engine.queue_pair {
            Some(_) => engine.reads.accept(&mut accepted),
            None => accepted.drain().for_each(|(tag, bufs)| self.refuse(tag, bufs)),
        }
    }

    /// Advances every operation of this channel and appends the answers that are there. Returns how many. Never blocks.
    pub fn poll(&self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        self.stamp();
        let mut engine = self.shared.engine.lock();
        self.hand_over(&mut engine);
        engine.poll();
        let done = &mut engine.reads.done;
        if completions.is_empty() && completions.capacity() >= done.len() {
            std::mem::swap(completions, done);
        } else {
            completions.append(done);
        }
        drop(engine);
        self.shared.io.take_results(completions);
        let count = completions.len() - before;
        self.in_flight.set(self.in_flight.get() - count);
        count
    }

    /// Operations submitted and not yet answered by [`poll`](Self::poll).
    pub fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    /// Sleeps until an operation of this channel may have advanced, at most `timeout`.
    pub fn wait(&self, timeout: Duration) {
        self.nap(timeout);
    }

    /// Drives the channel until `future` is ready.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        let mut cx = Context::from_waker(&self.waker);
        loop {
            if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
                return value;
            }
            let mut idle = 0;
            // Once in any case: what the future has started is for the channel to begin.
            loop {
                let advanced = self.drive();
                if self.block_waker.woken.swap(false, Ordering::Acquire) {
                    break;
                }
                if advanced {
                    idle = 0;
                } else if idle < SPINS_BEFORE_SLEEP {
                    idle += 1;
                    sync::spin();
                } else {
                    self.nap(NAP);
                    self.core.drive_abandoned();
                }
            }
        }
    }

    pub(crate) fn drive(&self) -> bool {
        self.stamp();
        let mut engine = self.shared.engine.lock();
        self.hand_over(&mut engine);
        engine.poll()
    }

    fn stamp(&self) {
        self.shared.polled_at.store(self.core.tick(), Ordering::Relaxed);
    }

    /// Sleeps in the device when it owes an answer, else until somebody wakes this thread.
    fn nap(&self, timeout: Duration) {
        // What a poll would advance is no reason to sleep.
        if !self.accepted.borrow().is_empty() {
            return;
        }
        let mut engine = self.shared.engine.lock();
        if self.shared.io.signalled() {
            return;
        }
        if engine.outstanding() > 0 {
            engine.wait_device(timeout);
            return;
        }
        drop(engine);
        self.shared.io.set_sleeper(Some(std::thread::current()));
        if !self.shared.io.signalled() && !self.block_waker.woken.load(Ordering::Acquire) {
            sync::pause(timeout);
        }
        self.shared.io.set_sleeper(None);
    }

    /// Starts `operation` as one that the channel owns and returns a future for its answer.
    pub(crate) fn start<T>(&self, operation: Operation, convert: fn(future::Answer) -> T) -> OpFuture<'_, T> {
        let answer = Arc::new(Mutex::new(None));
        let mut engine = self.shared.engine.lock();
        if engine.queue_pair.is_some() && self.core.check_mounted().is_ok() {
            let (core, io) = (Arc::clone(&self.core), self.shared.io.clone());
            let cell = Arc::clone(&answer);
            engine.spawn(async move {
                let value = crate::dispatch::run(&core, &io, operation).await;
                *cell.lock() = Some(value);
            });
        } else {
            *answer.lock() = Some((Err(Error::Unmounted), crate::dispatch::into_bufs(operation)));
        }
        drop(engine);
        OpFuture { channel: self, answer, convert }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Operations in flight go on: the mount keeps the engine and its helper, or any waiting thread, drives it.
        self.hand_over(&mut self.shared.engine.lock());
        self.core.retire_channel(&self.shared);
    }
}

impl ChannelCore {
    /// True when nothing is left to drive.
    pub(crate) fn is_idle(&self) -> bool {
        let engine = self.engine.lock();
        engine.active() == 0 && engine.outstanding() == 0
    }

    /// Its handle is gone: others drive it at once.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
        self.polled_at.store(0, Ordering::Relaxed);
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }
}
