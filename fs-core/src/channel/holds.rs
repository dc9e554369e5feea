//! Block holds: what keeps the blocks that a read in flight refers to from being reused.
//!
//! A read publishes the open generation *before* it takes its file view, and withdraws it when its device I/O is over.
//! A block that the view refers to was referenced when the view was taken, so it can only be freed in that
//! generation or a later one; blocks freed in generation `g` are reused when `g` is durable **and** every published
//! generation is greater than `g` ([`Registry::oldest`]).
//!
//! Each channel has two sets, of its fast reads and of its tasks. A set publishes one number, the oldest generation of its
//! reads, in a cache line of its own: nothing shared is written on the read path. Absent here: turning a hold that grows old into an exact hold on its blocks (one stuck
//! read delays reuse of everything freed after it, it does not endanger it).

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicU64, Mutex, Ordering, fence};
use crate::types::Generation;

const NONE: u64 = u64::MAX;

type Published = Arc<CachePadded<AtomicU64>>;

/// All published holds of a mount.
#[derive(Default)]
pub(crate) struct Registry(Mutex<Vec<Published>>);

impl Registry {
    /// A new set of holds, published in this registry until it is dropped.
    pub(crate) fn add(&self) -> HoldSet {
        let published = Arc::new(CachePadded::new(AtomicU64::new(NONE)));
        let mut all = self.0.lock();
        // A set that is gone has left its line behind with us as the only owner.
        all.retain(|p| Arc::strong_count(p) > 1);
        all.push(Arc::clone(&published));
        HoldSet { published, counts: VecDeque::new() }
    }

    /// The oldest generation that any read still holds, if any.
    pub(crate) fn oldest(&self) -> Option<Generation> {
        // Pairs with the fence in `HoldSet::acquire`: either we see the hold, or its reader takes a view in which
        // everything that was freed before this call is already gone.
        fence(Ordering::SeqCst);
        let all = self.0.lock();
        let oldest = all.iter().map(|p| p.load(Ordering::Acquire)).min().unwrap_or(NONE);
        (oldest != NONE).then_some(Generation(oldest))
    }
}

/// A set of holds of one channel. Used by one thread at a time.
pub(crate) struct HoldSet {
    published: Published,
    /// Reads in flight by generation, oldest first.
    counts: VecDeque<(u64, u32)>,
}

impl HoldSet {
    /// Publishes `reads` holds on `open`, the open generation; must be called before the file views are taken. Returns the
    /// generation that is held.
    #[inline]
    pub(crate) fn acquire(&mut self, open: Generation, reads: u32) -> Generation {
        match self.counts.back_mut() {
            // An older or equal hold is published already, and covers this read too.
            Some((generation, count)) if *generation >= open.0 => {
                *count += reads;
                Generation(*generation)
            }
            Some(_) => {
                self.counts.push_back((open.0, reads));
                open
            }
            None => {
                self.counts.push_back((open.0, reads));
                // Release, as in `release`: whoever sees this hold, a newer one, takes those before it for over.
                self.published.store(open.0, Ordering::Release);
                // Pairs with the fence in `Registry::oldest`.
                fence(Ordering::SeqCst);
                open
            }
        }
    }

    /// Whether something is held.
    pub(crate) fn holds_any(&self) -> bool {
        self.counts.iter().any(|(_, reads)| *reads > 0)
    }

    /// Withdraws `reads` holds on `generation`.
    #[inline]
    pub(crate) fn release(&mut self, generation: Generation, reads: u32) {
        if let Some(entry) = self.counts.iter_mut().find(|e| e.0 == generation.0) {
            debug_assert!(entry.1 >= reads, "a hold was withdrawn twice");
            entry.1 = entry.1.saturating_sub(reads);
        }
        if self.counts.front().is_some_and(|e| e.1 == 0) {
            while self.counts.front().is_some_and(|e| e.1 == 0) {
                self.counts.pop_front();
            }
            let oldest = self.counts.front().map_or(NONE, |e| e.0);
            // Release: the reads under the withdrawn holds are over before anyone sees them withdrawn.
            self.published.store(oldest, Ordering::Release);
        }
    }
}

impl Drop for HoldSet {
    fn drop(&mut self) {
        self.published.store(NONE, Ordering::Release);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use std::sync::Arc;

    use loom::cell::UnsafeCell;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    use super::*;

    /// A block of a file, and the view that refers to it until it is freed.
    struct Block {
        registry: Registry,
        open: AtomicU64,
        in_view: AtomicBool,
        content: UnsafeCell<u32>,
    }

    // SAFETY: that nobody writes to the block while it is read is what is tested; loom notices if somebody does.
    unsafe impl Sync for Block {}

    /// Reads that begin, one under the hold of the other, while the block is freed, its generation becomes durable, and it is used
    /// again as soon as no hold is in the way.
    #[test]
    fn no_block_is_used_again_while_it_is_read() {
        loom::model(|| {
            let block = Arc::new(Block {
                registry: Registry::default(),
                open: AtomicU64::new(5),
                in_view: AtomicBool::new(true),
                content: UnsafeCell::new(0),
            });
            let mut set = block.registry.add();
            let reader = {
                let block = Arc::clone(&block);
                thread::spawn(move || {
                    for _ in 0..2 {
                        let open = Generation(block.open.load(Ordering::Acquire));
                        let hold = set.acquire(open, 1);
                        if block.in_view.load(Ordering::Acquire) {
                            // SAFETY: as for `Sync`.
                            block.content.with(|content| unsafe { assert_eq!(*content, 0) });
                        }
                        set.release(hold, 1);
                    }
                })
            };
            // Freed in generation 5, which is durable then.
            block.in_view.store(false, Ordering::Release);
            block.open.store(6, Ordering::Release);
            if block.registry.oldest().is_none_or(|oldest| oldest > Generation(5)) {
                // SAFETY: as for `Sync`.
                block.content.with_mut(|content| unsafe { *content = 1 });
            }
            reader.join().expect("no panic");
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_hold_is_the_one_that_counts() {
        let registry = Registry::default();
        let (mut a, mut b) = (registry.add(), registry.add());
        assert_eq!(registry.oldest(), None);
        let g5 = a.acquire(Generation(5), 1);
        let g6 = b.acquire(Generation(6), 1);
        let g7 = a.acquire(Generation(7), 1);
        assert_eq!(registry.oldest(), Some(Generation(5)));
        a.release(g5, 1);
        assert_eq!(registry.oldest(), Some(Generation(6)));
        b.release(g6, 1);
        assert_eq!(registry.oldest(), Some(Generation(7)));
        a.release(g7, 1);
        assert_eq!(registry.oldest(), None);
    }

    #[test]
    fn holds_end_out_of_order() {
        let registry = Registry::default();
        let mut set = registry.add();
        let g1 = set.acquire(Generation(1), 1);
        let g2 = set.acquire(Generation(2), 1);
        let again = set.acquire(Generation(2), 1);
        set.release(g2, 1);
        assert_eq!(registry.oldest(), Some(Generation(1)));
        set.release(g1, 1);
        assert_eq!(registry.oldest(), Some(Generation(2)));
        set.release(again, 1);
        assert_eq!(registry.oldest(), None);
    }

    #[test]
    fn a_dropped_channel_holds_nothing() {
        let registry = Registry::default();
        let mut set = registry.add();
        set.acquire(Generation(1), 1);
        drop(set);
        assert_eq!(registry.oldest(), None);
    }
}
