//! Locks, atomics and cells, from one place, so that a model checker can stand in for them.
//!
//! | built with | what is below | explores |
//! |---|---|---|
//! | - | `std` and `parking_lot` | nothing |
//! | `--cfg loom` | loom | all schedules of a small case, within the C11 memory model |
//! | `--cfg shuttle` | shuttle | random schedules of larger cases, sequentially consistent |
//!
//! All mutexes of the crate are this one, but for that of the arena of the extent maps: nothing is called under it. So shuttle may switch
//! threads at each of them, and never while a lock is held that it does not know (those of devices are taken and given back inside of one
//! call). Atomics and cells are those of `range_lock` and, for loom, of `channel::holds`; other structures take theirs from `std`: shuttle
//! does not switch there.
//!
//! A thread that has to wait without a lock to wait for calls [`pause`].

pub(crate) use std::sync::atomic::Ordering;
use std::time::Duration;

#[cfg(loom)]
pub(crate) use loom::cell::UnsafeCell;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU64, fence};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use parking_lot::Mutex;
#[cfg(shuttle)]
pub(crate) use shuttle::sync::atomic::AtomicPtr;
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::atomic::AtomicPtr;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, fence};

/// Polls without progress after which a thread stops to burn its core. Under shuttle each is a switch.
pub(crate) const SPINS_BEFORE_SLEEP: u32 = if cfg!(shuttle) { 8 } else { 4000 };

/// Between two polls of a thread that waits.
#[inline(always)]
pub(crate) fn spin() {
    #[cfg(not(shuttle))]
    std::hint::spin_loop();
    #[cfg(shuttle)]
    shuttle::thread::yield_now();
}

/// Waits until the thread is unparked, or this long.
pub(crate) fn pause(timeout: Duration) {
    #[cfg(not(shuttle))]
    std::thread::park_timeout(timeout);
    #[cfg(shuttle)]
    {
        let _ = timeout;
        shuttle::thread::yield_now();
    }
}

/// `std`'s cell with the interface of loom's, which notes who looks and who writes.
#[cfg(not(loom))]
#[derive(Debug, Default)]
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    pub(crate) const fn new(value: T) -> UnsafeCell<T> {
        UnsafeCell(std::cell::UnsafeCell::new(value))
    }

    /// Runs `look` on the content.
    #[inline(always)]
    pub(crate) fn with<R>(&self, look: impl FnOnce(*const T) -> R) -> R {
        look(self.0.get())
    }

    /// Runs `change` on the content.
    #[inline(always)]
    pub(crate) fn with_mut<R>(&self, change: impl FnOnce(*mut T) -> R) -> R {
        change(self.0.get())
    }
}

/// A model checker's mutex with the interface of `parking_lot`'s.
#[cfg(any(loom, shuttle))]
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(model::Mutex<T>);

#[cfg(loom)]
use loom::sync as model;
#[cfg(shuttle)]
use shuttle::sync as model;

#[cfg(any(loom, shuttle))]
impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Mutex<T> {
        Mutex(model::Mutex::new(value))
    }

    // A poisoned lock is not another failure: the schedule has failed already.

    pub(crate) fn lock(&self) -> model::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn try_lock(&self) -> Option<model::MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
