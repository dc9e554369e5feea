//! Range locks: byte ranges of one file, shared or exclusive.
//!
//! Invariants: two held ranges that overlap are both shared; a waiter is granted as soon as it conflicts with nothing
//! that is held or that asked before it (so nobody starves); dropping a waiting future leaves nothing behind.
//!
//! Lock order: range locks come before the metadata lock; several ranges are taken in (inode, offset) order.
//!
//! This form is a short list under a mutex: right for many threads, not yet fast for them. The list-based lock-free
//! form (Kogan, Dice, Issa, EuroSys 2020) takes its place behind the same interface.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

/// How a range is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// With other shared holders.
    #[allow(dead_code, reason = "buffered reads hold ranges shared; direct reads take no lock")]
    Shared,
    /// Alone.
    Exclusive,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    range: Range<u64>,
    mode: Mode,
}

impl Entry {
    fn conflicts(&self, range: &Range<u64>, mode: Mode) -> bool {
        let overlap = self.range.start < range.end && range.start < self.range.end;
        overlap && (self.mode == Mode::Exclusive || mode == Mode::Exclusive)
    }
}

#[derive(Debug, Default)]
struct State {
    next_id: u64,
    held: Vec<Entry>,
    waiting: VecDeque<(Entry, Option<Waker>)>,
}

impl State {
    /// Grants every waiter that has become free to go; returns whom to wake.
    fn grant(&mut self) -> Vec<Waker> {
        let mut wake = Vec::new();
        let mut i = 0;
        while i < self.waiting.len() {
            let (entry, _) = &self.waiting[i];
            let blocked = self.held.iter().any(|h| h.conflicts(&entry.range, entry.mode))
                || self.waiting.iter().take(i).any(|(w, _)| w.conflicts(&entry.range, entry.mode));
            if blocked {
                i += 1;
            } else if let Some((entry, waker)) = self.waiting.remove(i) {
                self.held.push(entry);
                wake.extend(waker);
            }
        }
        wake
    }

    /// Forgets request `id`, held or waiting.
    fn forget(&mut self, id: u64) -> Vec<Waker> {
        if let Some(i) = self.held.iter().position(|e| e.id == id) {
            self.held.swap_remove(i);
        } else {
            self.waiting.retain(|(e, _)| e.id != id);
        }
        self.grant()
    }
}

/// The range lock of one file.
#[derive(Debug, Default)]
pub struct RangeLock(Arc<Mutex<State>>);

impl RangeLock {
    /// Waits for `range` (end exclusive) in `mode`.
    pub fn lock(&self, range: Range<u64>, mode: Mode) -> Acquire {
        Acquire { state: Arc::clone(&self.0), range, mode, id: None }
    }
}

/// Waits for a range; a future.
pub struct Acquire {
    state: Arc<Mutex<State>>,
    range: Range<u64>,
    mode: Mode,
    /// Set while this request is in the lists.
    id: Option<u64>,
}

impl Future for Acquire {
    type Output = RangeGuard;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RangeGuard> {
        let arc = Arc::clone(&self.state);
        let mut state = arc.lock();
        match self.id {
            None => {
                let id = state.next_id;
                state.next_id += 1;
                let (range, mode) = (self.range.clone(), self.mode);
                let free = !state.held.iter().any(|h| h.conflicts(&range, mode))
                    && !state.waiting.iter().any(|(w, _)| w.conflicts(&range, mode));
                let entry = Entry { id, range, mode };
                if free {
                    state.held.push(entry);
                    return Poll::Ready(RangeGuard { state: Arc::clone(&arc), id });
                }
                state.waiting.push_back((entry, Some(cx.waker().clone())));
                self.id = Some(id);
                Poll::Pending
            }
            Some(id) => {
                if let Some((_, waker)) = state.waiting.iter_mut().find(|(e, _)| e.id == id) {
                    *waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                self.id = None;
                Poll::Ready(RangeGuard { state: Arc::clone(&arc), id })
            }
        }
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let wake = self.state.lock().forget(id);
            wake.into_iter().for_each(Waker::wake);
        }
    }
}

/// A held range; released on drop.
#[derive(Debug)]
pub struct RangeGuard {
    state: Arc<Mutex<State>>,
    id: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let wake = self.state.lock().forget(self.id);
        wake.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_now(acquire: &mut Pin<Box<Acquire>>) -> Option<RangeGuard> {
        match acquire.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    #[test]
    fn overlapping_writers_wait_disjoint_do_not() {
        let lock = RangeLock::default();
        let a = try_now(&mut Box::pin(lock.lock(0..10, Mode::Exclusive))).expect("free");
        let _b = try_now(&mut Box::pin(lock.lock(10..20, Mode::Exclusive))).expect("disjoint");
        let mut c = Box::pin(lock.lock(5..15, Mode::Shared));
        assert!(try_now(&mut c).is_none());
        drop(a);
        assert!(try_now(&mut c).is_none(), "still conflicts with 10..20");
    }

    #[test]
    fn a_writer_is_not_starved_by_readers() {
        let lock = RangeLock::default();
        let reader = try_now(&mut Box::pin(lock.lock(0..10, Mode::Shared))).expect("free");
        let mut writer = Box::pin(lock.lock(0..10, Mode::Exclusive));
        assert!(try_now(&mut writer).is_none());
        let mut late = Box::pin(lock.lock(0..10, Mode::Shared));
        assert!(try_now(&mut late).is_none(), "a reader that came after the writer overtook it");
        drop(reader);
        let guard = try_now(&mut writer).expect("first in the queue");
        assert!(try_now(&mut late).is_none());
        drop(guard);
        assert!(try_now(&mut late).is_some());
    }

    #[test]
    fn a_cancelled_waiter_leaves_nothing_behind() {
        let lock = RangeLock::default();
        let held = try_now(&mut Box::pin(lock.lock(0..10, Mode::Exclusive))).expect("free");
        let mut waiting = Box::pin(lock.lock(0..10, Mode::Exclusive));
        assert!(try_now(&mut waiting).is_none());
        drop(waiting);
        // Granted but never polled again, then dropped.
        let mut granted = Box::pin(lock.lock(0..10, Mode::Exclusive));
        assert!(try_now(&mut granted).is_none());
        drop(held);
        drop(granted);
        assert!(try_now(&mut Box::pin(lock.lock(0..10, Mode::Exclusive))).is_some());
        let state = lock.0.lock();
        assert!(state.held.is_empty() && state.waiting.is_empty());
    }
}
