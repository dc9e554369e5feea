//! Wakers of the requests of a stripe that wait, by the request that they wait for.
//!
//! Under a mutex that only those take who wait, and those who release what is waited for; nothing is called under it.

use std::collections::BTreeMap;
use std::task::Waker;

use super::node::{NodeRef, RELEASED, WAITED};
use crate::sync::Mutex;

/// A waker's place: the node that is waited for, and a number that is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(usize, u64);

/// The wakers. See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Waiters(Mutex<Queue>);

#[derive(Debug, Default)]
struct Queue {
    tickets: u64,
    wakers: BTreeMap<Ticket, Waker>,
}

impl Waiters {
    /// Has `waker` woken when `node` is released. `None` if it is released already.
    pub(super) fn wait(&self, node: NodeRef, waker: Waker) -> Option<Ticket> {
        let mut queue = self.0.lock();
        if node.mark(WAITED).has(RELEASED) {
            drop(queue);
            return None;
        }
        queue.tickets += 1;
        let ticket = Ticket(node.id(), queue.tickets);
        queue.wakers.insert(ticket, waker);
        Some(ticket)
    }

    /// Puts `waker` in the place of the one of `ticket`. False if that was taken out to be woken.
    pub(super) fn replace(&self, ticket: Ticket, waker: Waker) -> bool {
        let mut waker = waker;
        let mut queue = self.0.lock();
        let place = queue.wakers.get_mut(&ticket);
        let found = place.is_some();
        if let Some(place) = place {
            std::mem::swap(place, &mut waker);
        }
        // Wakers are foreign code: none is dropped under the mutex.
        drop(queue);
        drop(waker);
        found
    }

    /// Takes the waker of `ticket` out, if it is there.
    pub(super) fn remove(&self, ticket: Ticket) {
        let waker = self.0.lock().wakers.remove(&ticket);
        drop(waker);
    }

    /// Takes out the wakers of all that wait for `node`, in the order in which they came. The node is released, and not yet recycled.
    pub(super) fn take(&self, node: NodeRef) -> Vec<Waker> {
        let mut queue = self.0.lock();
        let mut wakers = Vec::new();
        while let Some((&ticket, _)) =
            queue.wakers.range(Ticket(node.id(), 0)..=Ticket(node.id(), u64::MAX)).next()
        {
            wakers.extend(queue.wakers.remove(&ticket));
        }
        wakers
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.lock().wakers.len()
    }
}
