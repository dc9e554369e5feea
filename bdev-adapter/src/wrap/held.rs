//! Answers that are kept until their time has come.
//!
//! No thread and no timer: whoever polls takes what is due, in the order in which it became due.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use crate::QueuePair;

/// What is kept, the earliest first; of those with the same time, the one that was kept first.
#[derive(Debug)]
pub(super) struct Held<T> {
    heap: BinaryHeap<Reverse<Entry<T>>>,
    pushed: u64,
}

#[derive(Debug)]
struct Entry<T> {
    key: (Instant, u64),
    what: T,
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Entry<T>) -> bool {
        self.key == other.key
    }
}

impl<T> Eq for Entry<T> {}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Entry<T>) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Entry<T> {
    fn cmp(&self, other: &Entry<T>) -> std::cmp::Ordering {
        self.key.cmp(&other.key)
    }
}

impl<T> Default for Held<T> {
    fn default() -> Held<T> {
        Held { heap: BinaryHeap::new(), pushed: 0 }
    }
}

impl<T> Held<T> {
    /// Keeps `what` until `due`.
    pub(super) fn push(&mut self, due: Instant, what: T) {
        self.pushed += 1;
        self.heap.push(Reverse(Entry { key: (due, self.pushed), what }));
    }

    /// The next one whose time has come.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<T> {
        if self.next_due()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse(entry)| entry.what)
    }

    /// When the next one is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse(entry)| entry.key.0)
    }

    /// All of them with their times, in no order.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = (Instant, T)> + use<T> {
        std::mem::take(&mut self.heap).into_iter().map(|Reverse(entry)| (entry.key.0, entry.what))
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.heap.len()
    }
}

/// Waits until `inner` may have an answer, at most `timeout` and not beyond `due`.
pub(super) fn wait_until(inner: &mut dyn QueuePair, due: Option<Instant>, timeout: Duration) {
    let Some(due) = due else { return inner.wait(timeout) };
    let left = due.saturating_duration_since(Instant::now()).min(timeout);
    if left.is_zero() {
        return;
    }
    if inner.outstanding() > 0 {
        inner.wait(left);
    } else {
        // A queue pair with nothing in flight may return at once from `wait`.
        std::thread::sleep(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_the_order_of_their_times() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut held = Held::default();
        for (ms, what) in [(30, 'd'), (10, 'a'), (20, 'b'), (20, 'c')] {
            held.push(at(ms), what);
        }
        assert_eq!((held.next_due(), held.len()), (Some(at(10)), 4));
        assert_eq!(held.pop_due(at(9)), None);
        let due: Vec<_> = std::iter::from_fn(|| held.pop_due(at(20))).collect();
        assert_eq!(due, ['a', 'b', 'c']);
        assert_eq!(held.take_all().collect::<Vec<_>>(), [(at(30), 'd')]);
    }
}
