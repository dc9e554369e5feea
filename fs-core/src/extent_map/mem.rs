//! The memory of the map: nodes, the published view, and their reclamation. All `unsafe` of the module is here (but for the
//! processor instructions in [`super::cpu`] and the allocator of nodes in [`super::arena`]).
//!
//! How it holds together:
//!
//! 1. A node is allocated, filled once, and never written again. It becomes reachable when a view that leads to it is
//!    published ([`Published::replace`], a release store that pairs with the acquire load of [`Published::load`]).
//! 2. A node belongs to exactly one tree of one map. The one writer of the map (whoever holds the map's mutex, and with it
//!    the [`Nodes`]) retires a node once, when it publishes a view that no longer leads to it.
//! 3. A retired node is freed when every epoch guard that existed at some moment after that publication is gone. Who
//!    reached it through a guard's [`Reach`] therefore reads valid memory as long as the guard lives.
//! 4. The map frees its remaining nodes when it is dropped, which needs exclusive access: views borrow the map.
//!
//! [`NodeRef::open`] is a safe function under the module's contract that a `NodeRef` is only ever taken from a view or node
//! that was itself reached under the same [`Reach`], or made by the writer that holds it and not published yet.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use crossbeam_epoch::{Atomic, Guard, Owned};

use super::arena;
use super::cpu::prefetch;
use super::node::{Directory, Group, Inner, InnerGroup, LINE, Leaf, LeafGroup, MAX_GROUPS};
use crate::mutation::{Mutation, broken};

/// Keeps what a reader has reached alive. Costs some 6 ns; never hold one across an I/O: reclamation waits for it.
#[derive(Debug)]
pub struct EpochGuard(Guard);

/// Enters an epoch on the calling thread. Guards nest cheaply.
pub fn pin() -> EpochGuard {
    EpochGuard(crossbeam_epoch::pin())
}

/// Proof that nodes reached now stay valid for `'g`: an epoch guard, or the map's writer lock, outlives it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach<'g>(PhantomData<&'g ()>);

/// Low bits of a reference: groups - 1, and whether the node is an inner one.
const GROUPS_MASK: usize = MAX_GROUPS - 1;
const INNER: usize = MAX_GROUPS;
const TAG_MASK: usize = GROUPS_MASK | INNER;
const _: () = assert!(TAG_MASK < LINE);

/// A node: address of its directory, with kind and size in the low bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct NodeRef(NonNull<u8>);

// SAFETY: a node is plain data that no thread writes after it was published (point 1 above), and which thread frees it does
// not matter to the global allocator.
unsafe impl Send for NodeRef {}
// SAFETY: as above: shared access only ever reads.
unsafe impl Sync for NodeRef {}

/// An opened node.
#[derive(Clone, Copy)]
pub(super) enum Node<'g> {
    Leaf(Leaf<'g>),
    Inner(Inner<'g>),
}

impl NodeRef {
    #[inline(always)]
    fn tag(self) -> usize {
        self.0.addr().get() & TAG_MASK
    }

    #[inline(always)]
    fn base(self) -> *mut u8 {
        self.0.as_ptr().map_addr(|addr| addr & !TAG_MASK)
    }

    /// Groups of the node.
    #[inline(always)]
    pub(super) fn groups(self) -> usize {
        (self.tag() & GROUPS_MASK) + 1
    }

    #[inline(always)]
    pub(super) fn is_inner(self) -> bool {
        self.tag() & INNER != 0
    }

    /// Bytes it occupies.
    pub(super) fn bytes(self) -> usize {
        arena::lines(self.groups()) * LINE
    }

    /// The node's first line, which is the same in both kinds.
    #[inline(always)]
    pub(super) fn directory<'g>(self, _reach: Reach<'g>) -> &'g Directory {
        // SAFETY: `new` wrote a directory at `base`; as in `open`, it stays as it is during 'g.
        unsafe { &*self.base().cast::<Directory>() }
    }

    /// The node's content.
    #[inline(always)]
    pub(super) fn open<'g>(self, _reach: Reach<'g>) -> Node<'g> {
        let base = self.base();
        let groups = self.groups();
        // SAFETY: `new` allocated a directory and `groups` groups of the kind in the tag at `base`, wrote all of them, and
        // nobody writes them again; the module's contract makes `_reach` proof that they are not freed during 'g.
        unsafe {
            let directory = &*base.cast::<Directory>();
            let first = base.add(LINE);
            match self.is_inner() {
                true => {
                    let groups = std::slice::from_raw_parts(first.cast::<InnerGroup>(), groups);
                    Node::Inner(Inner { directory, groups })
                }
                false => {
                    let groups = std::slice::from_raw_parts(first.cast::<LeafGroup>(), groups);
                    Node::Leaf(Leaf { directory, groups })
                }
            }
        }
    }

    /// Asks for line `line` of the node (0: the directory, `g + 1`: group `g`). No more than a hint.
    #[inline(always)]
    pub(super) fn prefetch(self, line: usize) {
        prefetch(self.base().wrapping_add(line * LINE));
    }

    /// Asks for all lines of the node.
    #[inline(always)]
    pub(super) fn prefetch_all(self) {
        (0..=self.groups()).for_each(|line| self.prefetch(line));
    }

    /// Brings all lines of the node at once, for who looks at the directory next and waits anyway: then the group is there with it. By
    /// loads, whose results nobody waits for: a prefetch whose translation is not at hand may be dropped.
    #[inline(always)]
    pub(super) fn touch_all(self, _reach: Reach<'_>) {
        let first = self.base().wrapping_add(LINE);
        for line in 0..self.groups() {
            // SAFETY: `new` wrote so many groups behind the directory, of a line each; as in `open`, they are there.
            unsafe { first.add(line * LINE).read_volatile() };
        }
    }

    /// A node of `groups`.
    #[inline(always)]
    fn new<G: Group>(groups: impl ExactSizeIterator<Item = G>) -> NodeRef {
        const { assert!(size_of::<G>() == LINE && align_of::<G>() == LINE) };
        let count = groups.len();
        assert!((1..=MAX_GROUPS).contains(&count), "a node has 1 to {MAX_GROUPS} groups, not {count}");
        let base = take_memory(count);
        let mut directory = Directory::EMPTY;
        let mut written = 0;
        // SAFETY: `base` is memory of 1 + count lines, aligned to a line, that nobody else knows; line 0 takes the directory and
        // line 1 + i group i, with i < count enforced by `take`, whatever the iterator claims about its length.
        unsafe {
            for group in groups.take(count) {
                let place = base.add((written + 1) * LINE).cast::<G>();
                place.write(group);
                directory.set(written, place.as_ref().first_key());
                written += 1;
            }
            base.cast::<Directory>().write(directory);
        }
        assert_eq!(written, count, "an iterator shorter than it said");
        let kind = if G::IS_INNER { INNER } else { 0 };
        NodeRef(base.map_addr(|addr| addr | (count - 1) | kind))
    }

    /// Gives the memory back.
    ///
    /// # Safety
    /// Nobody can reach the node any more, and it is freed once.
    unsafe fn free(self) {
        // SAFETY: `new` got `base` as memory for so many groups; the caller vouches for the rest.
        unsafe { give_memory(NonNull::new_unchecked(self.base()), self.groups()) }
    }
}

/// Freed nodes that a thread keeps for its next allocations, by groups. A random overwrite frees nodes of the very sizes
/// that the next one needs, and the arena has a lock.
struct Spare([Vec<NonNull<u8>>; MAX_GROUPS]);

/// Nodes of a size that a thread keeps: 320 KiB in the worst case, some 40 in practice.
const SPARE_NODES: usize = 32;

thread_local! {
    static SPARE: RefCell<Spare> = const { RefCell::new(Spare([const { Vec::new() }; MAX_GROUPS])) };
}

impl Drop for Spare {
    fn drop(&mut self) {
        for (index, spare) in self.0.iter_mut().enumerate() {
            for base in spare.drain(..) {
                // SAFETY: `give_memory` put it here under the size it was taken with, and whoever takes one removes it.
                unsafe { arena::give(base, index + 1) }
            }
        }
    }
}

/// Memory for a directory and `groups` groups, uninitialised, aligned to a line.
#[inline(always)]
fn take_memory(groups: usize) -> NonNull<u8> {
    let spare = SPARE.try_with(|spare| spare.borrow_mut().0[groups - 1].pop());
    if let Ok(Some(base)) = spare { base } else { arena::take(groups) }
}

/// Takes back what [`take_memory`] gave.
///
/// # Safety
/// `base` came from `take_memory(groups)`, is given back once, and nobody uses it any more.
unsafe fn give_memory(base: NonNull<u8>, groups: usize) {
    let kept = SPARE.try_with(|spare| {
        let spare = &mut spare.borrow_mut().0[groups - 1];
        let room = spare.len() < SPARE_NODES;
        if room {
            spare.push(base);
        }
        room
    });
    if kept != Ok(true) {
        // SAFETY: from the arena, by way of `take_memory` (perhaps long ago); the caller vouches for the rest.
        unsafe { arena::give(base, groups) }
    }
}

/// Nodes that are freed together.
const LOT: usize = 64;

/// Makes and retires the nodes of one map. Lives under the map's mutex: holding it is being the map's only writer.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    /// No longer reachable from the published view; waiting to be handed to the epoch collector in one go.
    limbo: Vec<NodeRef>,
    /// Retired by an edit that is not published yet.
    leaving: Vec<NodeRef>,
    /// Nodes that exist: reachable, in limbo, or waiting for readers.
    #[cfg(test)]
    pub(super) alive: std::sync::Arc<std::sync::atomic::AtomicIsize>,
}

impl Nodes {
    /// Starts an edit of whoever holds the writer lock for 'w. Only its holder retires nodes, and those are not freed before
    /// the edit is published, so all nodes of the current view stay valid for it. What an edit that panicked wanted to retire
    /// is still in use, so it is forgotten.
    pub(super) fn begin<'w>(&mut self) -> Reach<'w> {
        self.leaving.clear();
        Reach(PhantomData)
    }

    pub(super) fn leaf(&mut self, groups: impl ExactSizeIterator<Item = LeafGroup>) -> NodeRef {
        self.count(NodeRef::new(groups))
    }

    pub(super) fn inner(&mut self, groups: impl ExactSizeIterator<Item = InnerGroup>) -> NodeRef {
        self.count(NodeRef::new(groups))
    }

    fn count(&mut self, node: NodeRef) -> NodeRef {
        #[cfg(test)]
        self.alive.fetch_add(1, Ordering::Relaxed);
        node
    }

    /// The edit under way no longer needs `node`, which was part of the published view or made by the edit itself.
    pub(super) fn retire(&mut self, node: NodeRef) {
        self.leaving.push(node);
    }

    /// The edit was published: what it retired is unreachable for new readers. Hands nodes to the collector once more than
    /// `keep` wait.
    fn published(&mut self, guard: &Guard, keep: usize) {
        self.limbo.append(&mut self.leaving);
        if self.limbo.len() <= keep || broken(Mutation::NeverFree) {
            return;
        }
        // In small lots: whoever the collector makes run them is in the middle of something else.
        while !self.limbo.is_empty() {
            let rest = self.limbo.len().saturating_sub(LOT);
            let lot = self.limbo.split_off(rest);
            #[cfg(test)]
            let alive = self.alive.clone();
            let free = move || {
                #[cfg(test)]
                alive.fetch_sub(lot.len() as isize, Ordering::Relaxed);
                for node in lot {
                    // SAFETY: each node in limbo was retired once (point 2), by an edit whose view has been published before
                    // this closure was deferred, so only guards older than that can reach it, and the collector waits for
                    // those.
                    unsafe { node.free() }
                }
            };
            if broken(Mutation::FreeAtOnce) {
                free();
                continue;
            }
            // SAFETY: the closure owns a list of addresses, borrows nothing, and may run on any thread (`NodeRef` is Send).
            unsafe { guard.defer_unchecked(free) };
        }
        self.limbo.shrink_to(LOT);
        guard.flush();
    }

    /// Frees `reachable`, all nodes of a map that is being dropped, and what is in limbo.
    ///
    /// # Safety
    /// No reader can hold a view of the map, and `reachable` are all nodes of its tree.
    unsafe fn free_all(&mut self, reachable: Vec<NodeRef>) {
        for node in reachable.into_iter().chain(self.limbo.drain(..)).chain(self.leaving.drain(..)) {
            #[cfg(test)]
            self.alive.fetch_sub(1, Ordering::Relaxed);
            // SAFETY: the caller vouches for reachable nodes; those in limbo are reachable through older views only, and with
            // exclusive access to the map no such view is left, as a view borrows the map.
            unsafe { node.free() }
        }
    }
}

/// The place where a map's current view is found.
#[derive(Debug)]
pub(super) struct Published<T>(Atomic<T>);

impl<T: Send + Sync + 'static> Published<T> {
    pub(super) fn new(value: T) -> Published<T> {
        Published(Atomic::new(value))
    }

    /// The current value, for as long as `guard` lives.
    #[inline(always)]
    pub(super) fn load<'g>(&'g self, guard: &'g EpochGuard) -> (&'g T, Reach<'g>) {
        let shared = self.0.load(Ordering::Acquire, &guard.0);
        // SAFETY: never null from `new` to drop; `replace` defers the destruction of old values past the end of `guard`. The
        // acquire load pairs with the release in `replace`, so the value and the nodes behind it are seen as written.
        (unsafe { shared.deref() }, Reach(PhantomData))
    }

    /// Whether `value` is the current value.
    #[inline(always)]
    pub(super) fn is(&self, value: &T, guard: &EpochGuard) -> bool {
        std::ptr::eq(self.0.load(Ordering::Acquire, &guard.0).as_raw(), value)
    }

    /// Publishes `value` in place of the current one, which is destroyed when its readers are gone, together with the nodes
    /// retired on the way to `value`; up to `keep` nodes may wait for a later call. The caller is the only writer, as it
    /// holds the map's `nodes`.
    pub(super) fn replace(&self, value: T, nodes: &mut Nodes, keep: usize) {
        let guard = crossbeam_epoch::pin();
        // Release: pairs with `load`. AcqRel only because a swap must read the old pointer, which this writer or one before
        // it under the same mutex has stored.
        let old = self.0.swap(Owned::new(value), Ordering::AcqRel, &guard);
        // SAFETY: `old` came out of the swap, so it is unlinked, no other call gets it, and new readers find the new value.
        unsafe { guard.defer_destroy(old) };
        nodes.published(&guard, keep);
    }

    /// Ends the map: destroys the value and all of its nodes, which `all_nodes` collects.
    pub(super) fn destroy(
        &mut self,
        nodes: &mut Nodes,
        all_nodes: impl FnOnce(&T, Reach<'_>) -> Vec<NodeRef>,
    ) {
        let old = std::mem::replace(&mut self.0, Atomic::null());
        // SAFETY: exclusive access: no view of the map is left (they borrow the map), so this thread owns the value (if it
        // was not taken by an earlier call) and every node.
        unsafe {
            let Some(value) = old.try_into_owned() else { return };
            let reachable = all_nodes(&value, Reach(PhantomData));
            nodes.free_all(reachable);
        }
    }
}

/// Turns the epochs, so that what has no reader left is freed soon.
#[cfg(test)]
pub(super) fn collect_garbage() {
    for _ in 0..1024 {
        crossbeam_epoch::pin().flush();
    }
}
