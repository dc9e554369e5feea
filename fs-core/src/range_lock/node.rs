//! The memory of the lists: nodes, who may look at them, and their reclamation. With [`super::list`] all `unsafe` of the module.
//!
//! How it holds together:
//!
//! 1. Whoever takes a node from the pool ([`NodeRef::take`]) owns it alone, writes the request into it, and enters it into a list
//!    by one compare-and-swap of the list's head. From then on the request is only read.
//! 2. Nobody looks into a node that it found behind a head before it has made sure that the owner cannot take it back in
//!    secret: [`super::list`] says how. Until then the owner may recycle it at once ([`NodeRef::recycle`]).
//! 3. A node that others may have seen is [retired](NodeRef::retire), by whoever unlinked it: it is recycled when every
//!    [`Pin`] that existed then is gone. All who look at nodes of others hold a `Pin` from before they found them.
//!
//! The safe functions of [`NodeRef`] rely on this contract, which does not leave `range_lock`.
//!
//! Nodes go round: each thread keeps [`SPARE_NODES`] of them for its next requests. Reclamation is by epochs after Fraser,
//! "Practical lock-freedom" (2004), by crossbeam-epoch.

use std::ptr::{NonNull, null_mut};

use super::Mode;
use super::list::Stripe;
use crate::sync::{AtomicPtr, Ordering, UnsafeCell};

pub(super) use self::reclaim::{Pin, pin};

/// What a node asks for. Never changes while the node is in a list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) mode: Mode,
    /// Whose list it is in.
    pub(super) stripe: NonNull<Stripe>,
    /// The node of the same lock call in the stripe before this one.
    pub(super) before: Option<NodeRef>,
}

impl Request {
    pub(super) fn conflicts(&self, other: &Request) -> bool {
        let overlap = self.start < other.end && other.start < self.end;
        overlap && (self.mode == Mode::Exclusive || other.mode == Mode::Exclusive)
    }
}

/// A request in a list.
#[repr(align(64))]
pub(super) struct Node {
    /// The next older node, with [`RELEASED`] and [`WAITED`] about *this* node in the low bits.
    next: AtomicPtr<Node>,
    request: UnsafeCell<Option<Request>>,
}

/// The request is over: `next` never changes again, and whoever comes by unlinks the node.
pub(super) const RELEASED: usize = 1;
/// Somebody waits for the release, and is to be woken.
pub(super) const WAITED: usize = 2;
/// A head, not a `next`: its node may have been seen by others than its owner.
pub(super) const SEEN: usize = 4;
const TAGS: usize = RELEASED | WAITED | SEEN;
const _: () = assert!(TAGS < align_of::<Node>());

/// What an atomic holds: a node or none, and tags.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Link(pub(super) *mut Node);

impl Link {
    pub(super) const NULL: Link = Link(null_mut());

    #[inline(always)]
    pub(super) fn to(node: Option<NodeRef>) -> Link {
        node.map_or(Link::NULL, |node| Link(node.0.as_ptr()))
    }

    #[inline(always)]
    pub(super) fn node(self) -> Option<NodeRef> {
        NonNull::new(self.0.map_addr(|addr| addr & !TAGS)).map(NodeRef)
    }

    #[inline(always)]
    pub(super) fn has(self, tag: usize) -> bool {
        self.0.addr() & tag != 0
    }

    #[inline(always)]
    pub(super) fn with(self, tags: usize) -> Link {
        Link(self.0.map_addr(|addr| addr | tags))
    }

    /// The same tags, another node.
    pub(super) fn leading_to(self, node: Option<NodeRef>) -> Link {
        Link::to(node).with(self.0.addr() & TAGS)
    }
}

/// A node, under the contract of the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct NodeRef(NonNull<Node>);

// SAFETY: what others may do with a node goes through its atomic; its request is written by its only owner before it is published,
// and read-only after (point 1). Which thread recycles or frees it does not matter.
unsafe impl Send for NodeRef {}
// SAFETY: as above.
unsafe impl Sync for NodeRef {}

impl NodeRef {
    /// A node with `request`, in no list, of which only the caller knows.
    #[inline]
    pub(super) fn take(request: Request) -> NodeRef {
        let node = pool::take();
        node.node().request.with_mut(|place| {
            // SAFETY: nobody else knows a node from the pool: it is new, or was recycled when nobody could reach it (points 2, 3).
            unsafe { place.write(Some(request)) }
        });
        node
    }

    #[inline(always)]
    fn node<'p>(self) -> &'p Node {
        // SAFETY: nodes are freed only from the pool, or when their thread or the lock ends; who uses a `NodeRef` owns the node,
        // or holds a pin from before it was retired (point 3).
        unsafe { self.0.as_ref() }
    }

    #[inline(always)]
    pub(super) fn next(self) -> Link {
        // Acquire: pairs with the release in `replace_next`. Who sees RELEASED sees what was done under the lock; who sees a
        // shorter list sees it from all that were unlinked, as the unlinker saw them RELEASED.
        Link(self.node().next.load(Ordering::Acquire))
    }

    /// Sets the next older node. Only before the node is entered.
    #[inline(always)]
    pub(super) fn set_next(self, next: Option<NodeRef>) {
        // Relaxed: published by the compare-and-swap of the head.
        self.node().next.store(Link::to(next).0, Ordering::Relaxed);
    }

    /// Changes `next` from `old` to `new`, or says what it is instead.
    #[inline(always)]
    pub(super) fn replace_next(self, old: Link, new: Link) -> Result<(), Link> {
        let done = self.node().next.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire);
        done.map(drop).map_err(Link)
    }

    /// Sets `tag` unless the node is RELEASED. Returns what was there.
    pub(super) fn mark(self, tag: usize) -> Link {
        let mut old = self.next();
        while !old.has(RELEASED | tag) {
            match self.replace_next(old, old.with(tag)) {
                Ok(()) => break,
                Err(now) => old = now,
            }
        }
        old
    }

    #[inline(always)]
    pub(super) fn request(self) -> Request {
        let request = self.node().request.with(|place| {
            // SAFETY: written before the node was published, and not again before it is recycled, which is after the caller's use
            // of it (points 2, 3).
            unsafe { *place }
        });
        request.expect("a node is taken with a request")
    }

    /// A number that no other node has meanwhile.
    pub(super) fn id(self) -> usize {
        self.0.addr().get()
    }

    /// Gives back a node that is in no list and that nobody else has ever looked into.
    #[inline]
    pub(super) fn recycle(self) {
        pool::give(self);
    }

    /// Gives back a node that the caller has just unlinked and that others may be looking at.
    pub(super) fn retire(self, pin: &Pin) {
        pin.retire(self);
    }
}

/// Nodes that a thread keeps: 4 KiB.
const SPARE_NODES: usize = 64;

/// Spare nodes of the calling thread.
mod pool {
    use std::cell::RefCell;
    #[cfg(not(loom))]
    use std::thread_local;

    #[cfg(loom)]
    use loom::thread_local;

    use super::{AtomicPtr, Node, NodeRef, NonNull, SPARE_NODES, UnsafeCell, null_mut};

    /// The spare nodes; freed with their thread.
    struct Spare(RefCell<Vec<NodeRef>>);

    thread_local! {
        #[allow(clippy::missing_const_for_thread_local, reason = "loom's has no such form")]
        static SPARE: Spare = Spare(RefCell::new(Vec::new()));
    }

    impl Drop for Spare {
        fn drop(&mut self) {
            self.0.get_mut().drain(..).for_each(free);
        }
    }

    fn fresh() -> Node {
        Node { next: AtomicPtr::new(null_mut()), request: UnsafeCell::new(None) }
    }

    #[inline]
    pub(super) fn take() -> NodeRef {
        let spare = SPARE.try_with(|spare| spare.0.borrow_mut().pop());
        match spare {
            Ok(Some(node)) => {
                #[cfg(shuttle)]
                // SAFETY: as in `NodeRef::take`. Shuttle's atomics belong to one run of a test; the pool outlives it.
                unsafe {
                    node.0.write(fresh())
                };
                node
            }
            _ => allocate(),
        }
    }

    #[cfg(test)]
    std::thread_local! {
        pub(super) static ALLOCATED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
    }

    #[cold]
    fn allocate() -> NodeRef {
        #[cfg(test)]
        ALLOCATED.set(ALLOCATED.get() + 1);
        NodeRef(NonNull::from(Box::leak(Box::new(fresh()))))
    }

    #[inline]
    pub(super) fn give(node: NodeRef) {
        let kept = SPARE.try_with(|spare| {
            let mut spare = spare.0.borrow_mut();
            let room = spare.len() < SPARE_NODES;
            if room {
                spare.push(node);
            }
            room
        });
        if !matches!(kept, Ok(true)) {
            free(node);
        }
    }

    #[cold]
    pub(super) fn free(node: NodeRef) {
        // SAFETY: it came out of a box in `allocate`, and nobody can reach it: it was recycled, and is not in the pool (any more).
        drop(unsafe { Box::from_raw(node.0.as_ptr()) });
    }
}

/// Nodes that the calling thread has allocated.
#[cfg(all(test, not(any(loom, shuttle))))]
pub(super) fn allocated() -> u64 {
    pool::ALLOCATED.get()
}

/// Epochs.
#[cfg(not(any(loom, shuttle)))]
mod reclaim {
    use super::NodeRef;

    /// As long as it lives, nothing that was reachable since is recycled.
    pub(in crate::range_lock) struct Pin(crossbeam_epoch::Guard);

    pub(in crate::range_lock) fn pin() -> Pin {
        Pin(crossbeam_epoch::pin())
    }

    impl Pin {
        pub(super) fn retire(&self, node: NodeRef) {
            // SAFETY: the closure borrows nothing and may run on any thread. The node was unlinked by the caller, so only pins
            // older than this call can reach it, and the collector waits for those.
            unsafe { self.0.defer_unchecked(move || node.recycle()) };
        }

        /// Drops `what` when nobody uses it any more who could reach it until now.
        pub(in crate::range_lock) fn drop_later(&self, what: impl Send + 'static) {
            self.0.defer(move || drop(what));
        }
    }
}

/// Epochs for model checkers, which run all threads of a case on one thread of the system: as soon as nobody is pinned, retired
/// nodes are free. Under loom they are never used again in the same run, as it would not know why that is no race.
#[cfg(any(loom, shuttle))]
mod reclaim {
    use std::cell::{Cell, RefCell};

    use super::{NodeRef, pool};

    std::thread_local! {
        static PINS: Cell<usize> = const { Cell::new(0) };
        static LIMBO: RefCell<Vec<NodeRef>> = const { RefCell::new(Vec::new()) };
        /// What goes with a lock; other locks may be in use by those who are pinned.
        static LATER: RefCell<Vec<Box<dyn std::any::Any>>> = const { RefCell::new(Vec::new()) };
    }

    pub(in crate::range_lock) struct Pin(());

    pub(in crate::range_lock) fn pin() -> Pin {
        PINS.set(PINS.get() + 1);
        Pin(())
    }

    impl Drop for Pin {
        fn drop(&mut self) {
            PINS.set(PINS.get() - 1);
            if PINS.get() == 0 && cfg!(shuttle) {
                LIMBO.take().into_iter().for_each(NodeRef::recycle);
                drop(LATER.take());
            }
        }
    }

    impl Pin {
        pub(super) fn retire(&self, node: NodeRef) {
            LIMBO.with_borrow_mut(|limbo| {
                assert!(!limbo.contains(&node), "a node was unlinked twice");
                limbo.push(node);
            });
        }

        pub(in crate::range_lock) fn drop_later(&self, what: impl Send + 'static) {
            if cfg!(shuttle) {
                return LATER.with_borrow_mut(|later| later.push(Box::new(what)));
            }
            // Under loom there is one lock, and nobody else is left.
            drop(what);
            LIMBO.take().into_iter().for_each(pool::free);
        }
    }
}
