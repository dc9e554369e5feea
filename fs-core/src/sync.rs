//! Atomics, cells and mutexes of the lock-free parts, from one place, so that a model checker can stand in for them.
//!
//! | built with | what is below | explores |
//! |---|---|---|
//! | - | `std` and `parking_lot` | nothing |
//! | `--cfg loom` | loom | all schedules of a small case, within the C11 memory model |
//! | `--cfg shuttle` | shuttle | random schedules of larger cases, sequentially consistent |
//!
//! Only what `range_lock` needs is here. Structures that are not checked this way take theirs from `std` as before.

pub(crate) use std::sync::atomic::Ordering;

#[cfg(loom)]
pub(crate) use loom::cell::UnsafeCell;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::AtomicPtr;
#[cfg(not(any(loom, shuttle)))]
pub(crate) use parking_lot::Mutex;
#[cfg(shuttle)]
pub(crate) use shuttle::sync::atomic::AtomicPtr;
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::atomic::AtomicPtr;

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
    pub(crate) fn lock(&self) -> model::MutexGuard<'_, T> {
        self.0.lock().expect("a test that panicked has failed already")
    }
}
