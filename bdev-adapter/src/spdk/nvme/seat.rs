//! What the owner of a queue pair and its controller's worker share.
//!
//! Whoever has the seat (a flag, taken by one atomic exchange) may use what is in it, the NVMe queue pair and the slots;
//! SPDK's callbacks run inside calls that it makes. The owner never waits for it in the I/O path; the worker waits for
//! the owner, who keeps it for one poll.

use std::cell::UnsafeCell;
use std::hint;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use spdk_sys::nvme::{spdk_nvme_ns, spdk_nvme_qpair};

use crate::spdk::slots::SlotsView;

/// See the module documentation. On cache lines of its own.
#[repr(align(128))]
pub(super) struct Seat {
    taken: AtomicBool,
    inner: UnsafeCell<Inner>,
}

/// What is reached through the seat.
pub(super) struct Inner {
    /// The queue pair, while it can be used.
    pub(super) qpair: Option<NonNull<spdk_nvme_qpair>>,
    /// The queue pair, while a reset goes on under it (PCIe).
    pub(super) parked: Option<NonNull<spdk_nvme_qpair>>,
    pub(super) ns: *mut spdk_nvme_ns,
    /// The epoch in which it was connected.
    pub(super) epoch: u64,
    /// Counts connections.
    pub(super) connection: u32,
    /// The owner has gone; nothing is in flight.
    pub(super) closed: bool,
    pub(super) nsid: u32,
    pub(super) slots: SlotsView,
}

// SAFETY: `inner` is reached by whoever has taken the flag only. SPDK's objects in it may be used from any thread, by one
// at a time.
unsafe impl Send for Seat {}
// SAFETY: as above.
unsafe impl Sync for Seat {}

impl Seat {
    pub(super) fn new(nsid: u32, slots: SlotsView) -> Seat {
        let ns = std::ptr::null_mut();
        let (qpair, parked) = (None, None);
        let inner = Inner { qpair, parked, ns, epoch: 0, connection: 0, closed: false, nsid, slots };
        Seat { taken: AtomicBool::new(false), inner: UnsafeCell::new(inner) }
    }

    /// Takes the seat, unless it is taken.
    #[inline]
    pub(super) fn try_take(&self) -> bool {
        // Acquire pairs with the release in `leave`.
        !self.taken.swap(true, Ordering::Acquire)
    }

    /// Gives the seat back.
    #[inline]
    pub(super) fn leave(&self) {
        self.taken.store(false, Ordering::Release);
    }

    /// What the seat is for.
    ///
    /// # Safety
    /// The caller has taken the seat, and keeps it as long as the reference.
    #[inline]
    pub(super) unsafe fn inner(&self) -> &Inner {
        // SAFETY: as the caller promises.
        unsafe { &*self.inner.get() }
    }

    /// Takes the seat, waiting for it. The other side keeps it for the time of one call of SPDK's.
    pub(super) fn take(&self) -> Taken<'_> {
        let mut turns = 0u32;
        while !self.try_take() {
            turns += 1;
            if turns < 64 { hint::spin_loop() } else { thread::yield_now() }
        }
        Taken(self)
    }
}

/// The seat, until it is dropped.
pub(super) struct Taken<'a>(&'a Seat);

impl Deref for Taken<'_> {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        // SAFETY: the seat is taken, and the borrow of `self` keeps other references away.
        unsafe { &*self.0.inner.get() }
    }
}

impl DerefMut for Taken<'_> {
    fn deref_mut(&mut self) -> &mut Inner {
        // SAFETY: as above.
        unsafe { &mut *self.0.inner.get() }
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}
