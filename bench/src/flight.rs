//! Many operations in flight on one channel: what was submitted, and what state goes with it.
//!
//! The tag of an operation is the index of its slot here. The owner loops: fill up while there is room, take what is
//! done, submit what follows from it.

use std::time::Duration;

use fs_core::{Channel, Completion, Operation};

/// Fruitless polls before a waiting caller gives up its core.
const SPINS: u32 = 2000;
/// The longest sleep: bounds the delay when something outside the channel (another thread) has news.
const NAP: Duration = Duration::from_micros(500);

/// Operations in flight on a channel, each with a state of type `T`.
pub(crate) struct Flight<'c, T> {
    channel: &'c Channel,
    slots: Vec<Option<T>>,
    free: Vec<usize>,
    done: Vec<Completion>,
    idle: u32,
}

impl<'c, T> Flight<'c, T> {
    /// Room for `depth` operations.
    pub(crate) fn new(channel: &'c Channel, depth: usize) -> Flight<'c, T> {
        let slots = (0..depth).map(|_| None).collect();
        Flight { channel, slots, free: (0..depth).rev().collect(), done: Vec::with_capacity(depth), idle: 0 }
    }

    /// True when another operation may be submitted.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// True when nothing is in flight.
    pub(crate) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Submits `operation`; `state` comes back with its completion. Grows when there is no room: an operation that
    /// follows from another one must never be refused.
    pub(crate) fn submit(&mut self, operation: Operation, state: T) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(state);
        self.channel.submit(operation, slot as u64);
    }

    /// A completion that is there now.
    pub(crate) fn try_next(&mut self) -> Option<(T, Completion)> {
        if self.done.is_empty() {
            self.channel.poll(&mut self.done);
        }
        while let Some(completion) = self.done.pop() {
            let slot = completion.tag as usize;
            // Completions with foreign tags belong to an operation of somebody else on this channel: not ours to keep.
            if let Some(state) = self.slots.get_mut(slot).and_then(Option::take) {
                self.free.push(slot);
                self.idle = 0;
                return Some((state, completion));
            }
        }
        None
    }

    /// The next completion; `None` when nothing is in flight.
    pub(crate) fn next(&mut self) -> Option<(T, Completion)> {
        while !self.is_empty() {
            if let Some(done) = self.try_next() {
                return Some(done);
            }
            self.relax();
        }
        None
    }

    /// To be called when there was nothing to do: spins for a while, then sleeps until something may have completed.
    pub(crate) fn relax(&mut self) {
        self.idle += 1;
        if self.idle < SPINS {
            std::hint::spin_loop();
        } else {
            self.channel.wait(NAP);
        }
    }
}
