//! Range locks: byte ranges of one file, shared or exclusive.
//!
//! # What is promised
//!
//! - Two held ranges that overlap are both shared.
//! - *First come, first served, within a stripe*: a request waits for those that it conflicts with and that came before it, held or
//!   waiting, and for nothing else. None that comes later and conflicts overtakes it. So neither a stream of readers starves a
//!   writer, nor do narrow requests starve a wide one.
//! - A request over several stripes takes them one after the other, in their order. While it waits in one, others may
//!   overtake it in those that it has not reached; at each it waits only for those that were there when it came, so the number of
//!   requests that it waits for is bounded, whatever comes later.
//! - Nothing blocks the thread. A request that waits is a future: its waker is called once what is in its way is released. Dropping
//!   it at any time, also after it was granted and before anybody looked, leaves nothing behind.
//!
//! # How it works
//!
//! A file is cut into segments of 1 MiB, which are dealt to [`STRIPES`] stripes by a hash, so that threads that work far from each
//! other share no cache line. A stripe is a lock-free list of requests ([`list`]) in the order of their arrival: a request enters
//! at the head and waits until no older one conflicts. If there is no other, taking and releasing is one compare-and-swap
//! each. The order of stripes and the order in each list are total, and requests wait only for what is before them in these, so
//! range locks alone cannot deadlock.
//!
//! The list is that of Kogan, Dice and Issa, "Scalable Range Locks for Scalable Address Spaces and Beyond" (EuroSys 2020): ranges
//! enter by compare-and-swap, leave by a mark in their own link, and are unlinked by whoever passes. There it is sorted by address,
//! writers that lose a race start over, and a counter with a lock beside the list saves those that lose too often. Here
//! the order is that of arrival: nobody ever starts over, and fairness needs nothing else. The price is that a walk goes to the end of
//! the list instead of half of it; stripes keep lists short. A request costs time in proportion to the requests that its stripe
//! holds at the moment.
//!
//! # What it does not do
//!
//! No upgrade from shared to exclusive, no recursion (who locks what it holds waits for itself), no deadlock detection between range
//! locks of several files. Stripes are allocated by the first request, half a KiB for a file, and stay until the file is closed.
//!
//! Lock order: range locks come before the metadata lock; those of several files are taken in the order of inodes, and never two of one
//! file: requests are served in turn, so a third one between the two, which wants both, would wait for the first, and the second for it.

mod list;
mod node;
mod wait;

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, shuttle))]
mod shuttle_tests;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use self::list::Stripe;
use self::node::{NodeRef, Request};
use self::wait::Ticket;

/// How a range is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// With other shared holders.
    Shared,
    /// Alone.
    Exclusive,
}

/// Lists of a file.
const STRIPES: usize = 1 << STRIPE_BITS;
const STRIPE_BITS: u32 = 3;
/// `log2` of the bytes of a segment.
const SEGMENT_SHIFT: u32 = 20;

/// A set of stripes: bit `i` for stripe `i`.
type StripeSet = u8;
const ALL_STRIPES: StripeSet = StripeSet::MAX;
const _: () = assert!(STRIPES == StripeSet::BITS as usize);

#[derive(Default)]
struct Stripes([Stripe; STRIPES]);

/// The stripe of a segment. Neighbours, and segments that are some power of two apart, mostly have different ones.
#[inline(always)]
fn stripe_of(segment: u64) -> u32 {
    // 2^64 divided by the golden ratio: Fibonacci hashing (Knuth, TAOCP 3, 6.4).
    (segment.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - STRIPE_BITS)) as u32
}

/// The stripes of `range`.
#[inline(always)]
fn stripes_of(range: &Range<u64>) -> StripeSet {
    let first = range.start >> SEGMENT_SHIFT;
    let last = range.end.saturating_sub(1).max(range.start) >> SEGMENT_SHIFT;
    if first == last {
        return 1 << stripe_of(first);
    }
    if last - first >= STRIPES as u64 {
        return ALL_STRIPES;
    }
    (first..=last).fold(0, |set, segment| set | 1 << stripe_of(segment))
}

/// The range lock of one file. 16 bytes; its lists come with the first request.
#[derive(Default)]
pub struct RangeLock {
    /// `Arc`, not `Box`: requests point into it while the lock may move.
    stripes: OnceLock<Arc<Stripes>>,
}

impl RangeLock {
    /// Waits for `range` (bytes, end exclusive) in `mode`. The request takes its place when the future is polled for the first time.
    #[inline]
    pub fn lock(&self, range: Range<u64>, mode: Mode) -> Acquire<'_> {
        let to_do = stripes_of(&range);
        Acquire { lock: self, range, mode, to_do, top: None, granted: true, ticket: None }
    }

    /// `range` in `mode`, if nothing is in its way now, held or waiting. Waits for nothing. (While it looks it is a request like
    /// others: of several `try_lock` at the same moment only the first is sure to succeed.)
    #[inline]
    pub fn try_lock(&self, range: Range<u64>, mode: Mode) -> Option<RangeGuard> {
        let mut request = self.lock(range, mode);
        request.advance(None).then(|| request.guard())
    }

    #[inline(always)]
    fn stripe(&self, index: u32) -> &Stripe {
        &self.stripes.get_or_init(Arc::default).0[index as usize]
    }
}

impl fmt::Debug for RangeLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = |stripes: &Arc<Stripes>| stripes.0.iter().filter(|stripe| !stripe.is_empty()).count();
        f.debug_struct("RangeLock")
            .field("stripes_in_use", &self.stripes.get().map_or(0, used))
            .finish_non_exhaustive()
    }
}

impl Drop for RangeLock {
    /// A guard may outlive its lock, though none should: then the stripes that it points to are leaked.
    fn drop(&mut self) {
        let Some(stripes) = self.stripes.take() else { return };
        let pin = node::pin();
        stripes.0.iter().for_each(|stripe| stripe.tidy(&pin));
        if stripes.0.iter().all(Stripe::is_empty) {
            // Who released a moment ago may not have left yet; but it is pinned.
            pin.drop_later(stripes);
        } else {
            std::mem::forget(stripes);
        }
    }
}

/// Waits for a range; a future.
pub struct Acquire<'l> {
    lock: &'l RangeLock,
    range: Range<u64>,
    mode: Mode,
    /// Stripes that it has not entered yet.
    to_do: StripeSet,
    /// Its request in the stripe that it has entered last; that leads to those before.
    top: Option<NodeRef>,
    /// Nothing is in the way of `top`.
    granted: bool,
    /// Where the waker of `top` is.
    ticket: Option<Ticket>,
}

impl Acquire<'_> {
    /// Goes on until the whole range is granted (true), or something is in the way (false) and `waker` was left with it.
    #[inline(always)]
    fn advance(&mut self, waker: Option<&Waker>) -> bool {
        loop {
            if !self.granted && !self.settle(waker) {
                return false;
            }
            if self.to_do == 0 {
                return true;
            }
            let stripe = self.lock.stripe(self.to_do.trailing_zeros());
            self.to_do &= self.to_do - 1;
            let Range { start, end } = self.range;
            // `enter` puts the stripe's address in.
            let request =
                Request { start, end, mode: self.mode, stripe: NonNull::dangling(), before: self.top };
            let (node, granted) = stripe.enter(request);
            (self.top, self.granted) = (Some(node), granted);
        }
    }

    /// Whether nothing is in the way of `top` any more.
    #[cold]
    fn settle(&mut self, waker: Option<&Waker>) -> bool {
        let Some(node) = self.top else { return true };
        let stripe = Stripe::of(node);
        if let (Some(ticket), Some(waker)) = (self.ticket, waker)
            && stripe.wait_on(ticket, waker)
        {
            return false;
        }
        let settled = stripe.settle(node, waker);
        self.granted = settled.is_ok();
        self.ticket = settled.err().flatten();
        self.granted
    }

    fn guard(&mut self) -> RangeGuard {
        RangeGuard { top: self.top.take().expect("a future is not polled again after it was ready") }
    }
}

impl Future for Acquire<'_> {
    type Output = RangeGuard;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RangeGuard> {
        match self.advance(Some(cx.waker())) {
            true => Poll::Ready(self.guard()),
            false => Poll::Pending,
        }
    }
}

impl Drop for Acquire<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(top) = self.top {
            if let Some(ticket) = self.ticket {
                Stripe::of(top).wait_no_more(ticket);
            }
            drop(RangeGuard { top });
        }
    }
}

impl fmt::Debug for Acquire<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acquire")
            .field("range", &self.range)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

/// A held range; released on drop, on any thread.
#[derive(Debug)]
#[must_use = "the range is released as soon as this is dropped"]
pub struct RangeGuard {
    /// The request in the last stripe.
    top: NodeRef,
}

impl Drop for RangeGuard {
    #[inline]
    fn drop(&mut self) {
        let mut next = Some(self.top);
        while let Some(node) = next {
            next = node.request().before;
            Stripe::of(node).release(node);
        }
    }
}
