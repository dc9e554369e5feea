//! One list: the requests of a stripe, newest first, held and waiting alike.
//!
//! # How it works
//!
//! 1. A request enters at the head, by one compare-and-swap ([`Stripe::enter`]): that is its place in the order of arrival.
//! 2. It then walks towards the older ones ([`Stripe::blocker`]). If it meets none that conflicts and is not released, it is granted.
//!    Else it leaves its waker with that one, and walks again when it was woken ([`Stripe::settle`]).
//! 3. Release sets a mark in the node's own link ([`RELEASED`]), wakes whom it finds waiting, and unlinks what is released at the
//!    head ([`Stripe::release`]). What is released further down is unlinked by the next that walks past, as in Harris, "A pragmatic
//!    implementation of non-blocking linked lists" (DISC 2001): a marked link never changes, so of two neighbours that are
//!    unlinked at once none comes back.
//!
//! # The short way
//!
//! A request that finds the list empty is granted by the compare-and-swap of step 1 alone, and if nobody has come by until its
//! release, one more takes it out: no epoch, no mark, the node at once in the pool again. For that the head says whether its
//! node may have been *seen*:
//!
//! - Nobody looks into the node at the head before it has put a node of its own in front of it, or has found [`SEEN`] set.
//! - Whenever a node gets (back) to the head by the removal of what was in front of it, the head gets [`SEEN`].
//!
//! So an owner that replaces its node, at the head and without [`SEEN`], knows that nobody but itself has ever looked into it. (That
//! an address may have been recycled and entered again in between makes no difference: what was not looked into has no past.)
//!
//! # Waiting
//!
//! Mark and wish to be woken are bits of one word, the link of the node that is waited for. A waiter sets [`WAITED`] under the mutex of
//! the stripe's [`Waiters`] and adds its waker before it lets go of that; if the node is [`RELEASED`] already it does not wait. A
//! releaser that finds [`WAITED`] takes the wakers out under the same mutex. So one of the two sees the other.

use std::ptr::NonNull;
use std::task::Waker;

use super::node::{Link, Node, NodeRef, Pin, RELEASED, Request, SEEN, WAITED, pin};
use super::wait::{Ticket, Waiters};
use crate::sync::{AtomicPtr, Ordering};

/// A list of requests.
#[repr(align(64))]
#[derive(Default)]
pub(super) struct Stripe {
    /// The newest request, with [`SEEN`] in the low bits.
    head: AtomicPtr<Node>,
    waiters: Waiters,
}

impl Stripe {
    /// The stripe that `node`, which the caller owns, is in.
    pub(super) fn of<'s>(node: NodeRef) -> &'s Stripe {
        // SAFETY: a `RangeLock` that is dropped leaks its stripes if a request is left in one of them, and frees them only when
        // nobody is pinned who was then (`RangeLock::drop`).
        unsafe { node.request().stripe.as_ref() }
    }

    /// Puts a request for `start..end` into the list. Returns whether it was empty, so that the request is granted.
    #[inline(always)]
    pub(super) fn enter(&self, mut request: Request) -> (NodeRef, bool) {
        request.stripe = NonNull::from(self);
        let node = NodeRef::take(request);
        node.set_next(None);
        let granted = self.replace_head(Link::NULL, Link::to(Some(node))).is_ok();
        if !granted {
            self.enter_before_others(node);
        }
        (node, granted)
    }

    #[cold]
    fn enter_before_others(&self, node: NodeRef) {
        let mut head = self.head();
        loop {
            node.set_next(head.node());
            match self.replace_head(head, Link::to(Some(node))) {
                Ok(()) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Whether `node`, the caller's, is granted. If not, `waker` is left with the request in its way; without a waker nothing is.
    pub(super) fn settle(&self, node: NodeRef, waker: Option<&Waker>) -> Result<(), Option<Ticket>> {
        // From before the walk, until the waker is in its place.
        let pin = pin();
        while let Some(blocker) = self.blocker(node, &pin) {
            let Some(waker) = waker else { return Err(None) };
            let ticket = self.waiters.wait(blocker, waker.clone());
            if ticket.is_some() {
                return Err(ticket);
            }
        }
        Ok(())
    }

    /// The newest request that is older than `node`, conflicts with it and is not released. Unlinks what is released up to there.
    fn blocker(&self, node: NodeRef, pin: &Pin) -> Option<NodeRef> {
        let request = node.request();
        'again: loop {
            let mut before = node;
            let mut link = before.next();
            while let Some(at) = link.node() {
                let next = at.next();
                if !next.has(RELEASED) {
                    if request.conflicts(&at.request()) {
                        return Some(at);
                    }
                    (before, link) = (at, next);
                    continue;
                }
                let shorter = link.leading_to(next.node());
                match before.replace_next(link, shorter) {
                    Ok(()) => {
                        at.retire(pin);
                        link = shorter;
                    }
                    // Released under our feet: its link leads out of the list now.
                    Err(now) if now.has(RELEASED) => continue 'again,
                    Err(now) => link = now,
                }
            }
            return None;
        }
    }

    /// Ends the request of `node`, granted or waiting, which the caller gives up.
    #[inline(always)]
    pub(super) fn release(&self, node: NodeRef) {
        let next = node.next();
        // Nobody can have marked or changed the link of a node that nobody has seen; so if the node was seen after this load, the
        // head is not what is expected here.
        if next.node().is_none() && self.replace_head(Link::to(Some(node)), Link::NULL).is_ok() {
            node.recycle();
        } else {
            self.release_among_others(node, next);
        }
    }

    #[cold]
    fn release_among_others(&self, node: NodeRef, next: Link) {
        // While it is there, a node that was seen is not recycled, so no other has its `id`; and the stripe is not freed.
        let pin = pin();
        let unseen = next.node().is_some() && self.replace_head(Link::to(Some(node)), behind(next)).is_ok();
        let wakers = match !unseen && node.mark(RELEASED).has(WAITED) {
            true => self.waiters.take(node),
            false => Vec::new(),
        };
        self.tidy(&pin);
        drop(pin);
        if unseen {
            node.recycle();
        }
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Unlinks released requests at the head. (Of two releases at once each may just miss the other's on a weakly ordered processor; what
    /// is left then goes with the next that comes by.)
    pub(super) fn tidy(&self, pin: &Pin) {
        loop {
            let head = self.head();
            // A node that was not seen is not released.
            let Some(node) = head.node().filter(|_| head.has(SEEN)) else { return };
            let next = node.next();
            if !next.has(RELEASED) {
                return;
            }
            if self.replace_head(head, behind(next)).is_ok() {
                node.retire(pin);
            }
        }
    }

    /// Leaves `waker` in the place of the one of `ticket`. False if the request was woken already.
    pub(super) fn wait_on(&self, ticket: Ticket, waker: &Waker) -> bool {
        self.waiters.replace(ticket, waker.clone())
    }

    /// Takes the waker of `ticket` out, if it is still there.
    pub(super) fn wait_no_more(&self, ticket: Ticket) {
        self.waiters.remove(ticket);
    }

    /// Whether there is no request.
    pub(super) fn is_empty(&self) -> bool {
        self.head() == Link::NULL
    }

    #[inline(always)]
    fn head(&self) -> Link {
        // Acquire: pairs with the release in `replace_head`: the node is seen as written.
        Link(self.head.load(Ordering::Acquire))
    }

    #[inline(always)]
    fn replace_head(&self, old: Link, new: Link) -> Result<(), Link> {
        // Release: publishes a node that enters, and what was done under a lock that goes. Acquire: who enters sees what those
        // have done that are out of the list by then.
        let done = self.head.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire);
        done.map(drop).map_err(Link)
    }
}

/// The head that is left when the node whose link is `next` goes: its next one, as seen.
fn behind(next: Link) -> Link {
    match next.node() {
        Some(node) => Link::to(Some(node)).with(SEEN),
        None => Link::NULL,
    }
}

#[cfg(test)]
impl Stripe {
    /// Wakers that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiters.len()
    }
}
