//! The engine of a channel: its queue pair and the operations that it drives to completion.
//!
//! One call of [`Engine::poll`]: run the tasks that are ready, submit what they asked for, ring the doorbell once, take the
//! completions, wake who waited for them, and run those tasks too. It never blocks.
//!
//! The engine sits behind a claim (a mutex) so that a thread which waits for something that this channel owns can drive
//! it when its own thread has left it alone.

use std::future::Future;
use std::sync::{Arc, Weak};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use bdev_adapter::{DmaBuf, IoError, IoErrorKind, QueuePair, Request};

use super::fast_read::FastReads;
use super::io::{Io, Shared, Task};
use super::operation::{Completion, Operation};
use crate::core::Core;
use crate::file::File;

/// Tags with this bit are fast reads, the others are slots of [`Shared`].
pub(super) const FAST_READ: u64 = 1 << 63;

struct TaskSlot {
    task: Option<Task>,
    waker: Waker,
}

struct TaskWaker {
    shared: Weak<Shared>,
    index: u32,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(shared) = self.shared.upgrade() {
            shared.make_ready(self.index);
        }
    }
}

/// See the module documentation.
pub(crate) struct Engine {
    /// Taken away at unmount.
    pub(super) queue_pair: Option<Box<dyn QueuePair>>,
    pub(super) reads: FastReads,
    tasks: Vec<TaskSlot>,
    free: Vec<u32>,
    active: usize,
    io: Io,
    // Scratch, kept for their capacity.
    completions: Vec<bdev_adapter::Completion>,
    outgoing: Vec<Request>,
    ready: Vec<u32>,
    general: Vec<(Operation, u64)>,
}

impl Engine {
    pub(super) fn new(queue_pair: Box<dyn QueuePair>, io: Io, reads: FastReads) -> Engine {
        Engine {
            queue_pair: Some(queue_pair),
            reads,
            tasks: Vec::new(),
            free: Vec::new(),
            active: 0,
            io,
            completions: Vec::new(),
            outgoing: Vec::new(),
            ready: Vec::new(),
            general: Vec::new(),
        }
    }

    /// Takes an operation over; it runs when the engine is polled.
    pub(super) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.adopt(Box::pin(task));
    }

    fn adopt(&mut self, task: Task) {
        let index = match self.free.pop() {
            Some(index) => {
                self.tasks[index as usize].task = Some(task);
                index
            }
            None => {
                let index = self.tasks.len() as u32;
                let waker = Waker::from(Arc::new(TaskWaker { shared: self.io.weak(), index }));
                self.tasks.push(TaskSlot { task: Some(task), waker });
                index
            }
        };
        self.active += 1;
        self.io.make_ready(index);
    }

    /// Takes an operation over whose answer goes to the channel's results under `tag`.
    pub(super) fn submit(&mut self, core: &Arc<Core>, operation: Operation, tag: u64) {
        let (core, io) = (Arc::clone(core), self.io.clone());
        self.spawn(async move {
            let (result, bufs) = crate::dispatch::run(&core, &io, operation).await;
            io.answer(Completion { tag, result, bufs });
        });
    }

    /// Operations that are not finished.
    pub(super) fn active(&self) -> usize {
        self.active + self.reads.active() + self.io.spawned()
    }

    /// Requests at the device.
    pub(super) fn outstanding(&self) -> usize {
        self.queue_pair.as_ref().map_or(0, |qp| qp.outstanding())
    }

    /// Advances everything that can advance. True when something did.
    pub(super) fn poll(&mut self) -> bool {
        let mut progress = self.start_reads();
        progress |= self.run_ready();
        let Some(queue_pair) = &mut self.queue_pair else { return progress };
        let mut completions = std::mem::take(&mut self.completions);
        if queue_pair.poll(&mut completions) > 0 {
            progress = true;
            // Answers of reads stay where they are: moving each would take longer than what is done with it.
            let mut answers = &mut completions[..];
            while let Some((answer, behind)) = answers.split_first_mut() {
                answers = behind;
                if let Some(next) = answers.first() {
                    self.reads.prefetch(next);
                }
                if answer.tag & FAST_READ == 0 {
                    self.io.complete(answer);
                } else {
                    self.finish_read(answer);
                }
            }
            completions.clear();
            self.reads.settle();
            if self.run_ready()
                && let Some(queue_pair) = &mut self.queue_pair
            {
                queue_pair.kick();
            }
        }
        self.completions = completions;
        progress
    }

    /// Starts the reads that were accepted since the last poll.
    #[inline]
    fn start_reads(&mut self) -> bool {
        let Engine { reads, queue_pair: Some(queue_pair), general, .. } = self else { return false };
        let progress = reads.start(&mut **queue_pair, general);
        if !self.general.is_empty() {
            let core = Arc::clone(self.reads.core());
            for (operation, tag) in std::mem::take(&mut self.general) {
                self.submit(&core, operation, tag);
            }
        }
        progress
    }

    /// See [`FastReads::start_waited`].
    pub(super) fn start_waited(&mut self, file: &File, offset: u64, buf: DmaBuf) -> Result<(), DmaBuf> {
        match &mut self.queue_pair {
            Some(queue_pair) => self.reads.start_waited(&mut **queue_pair, file, offset, buf),
            None => Err(buf),
        }
    }

    #[inline]
    fn finish_read(&mut self, answer: &mut bdev_adapter::Completion) {
        if let Some(task) = self.reads.finish(answer, &self.io) {
            self.spawn(task);
        }
    }

    /// Runs ready tasks until none is left, and hands their requests to the queue pair.
    fn run_ready(&mut self) -> bool {
        let mut progress = false;
        while self.io.take_signal() {
            for task in self.io.take_spawned() {
                self.adopt(task);
            }
            let mut ready = std::mem::take(&mut self.ready);
            self.io.take_ready(&mut ready);
            for index in ready.drain(..) {
                self.run(index);
                progress = true;
            }
            self.ready = ready;
            progress |= self.send_outbox();
        }
        progress
    }

    fn send_outbox(&mut self) -> bool {
        self.io.drain_outbox(&mut self.outgoing);
        let some = !self.outgoing.is_empty();
        for request in self.outgoing.drain(..) {
            match &mut self.queue_pair {
                Some(queue_pair) => queue_pair.submit(request),
                None => self.io.complete(&mut refused(request)),
            }
        }
        some
    }

    fn run(&mut self, index: u32) {
        let slot = &mut self.tasks[index as usize];
        // A wake-up may come after the task has finished.
        let Some(task) = &mut slot.task else { return };
        if task.as_mut().poll(&mut Context::from_waker(&slot.waker)).is_ready() {
            slot.task = None;
            self.free.push(index);
            self.active -= 1;
        }
    }

    /// Waits for the device, at most `timeout`.
    pub(super) fn wait_device(&mut self, timeout: Duration) {
        if let Some(queue_pair) = &mut self.queue_pair {
            queue_pair.wait(timeout);
        }
    }
}

/// The answer to a request that came after the queue pair was given back: a blocking call of another thread may still be
/// on its way when the filesystem is unmounted.
fn refused(request: Request) -> bdev_adapter::Completion {
    let error = IoError {
        op: request.kind.name(),
        offset: request.offset,
        len: request.len,
        kind: IoErrorKind::Gone,
    };
    bdev_adapter::Completion { tag: request.tag, result: Err(Box::new(error)), bufs: request.bufs, epoch: 0 }
}
