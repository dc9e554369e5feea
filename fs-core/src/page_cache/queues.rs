//! Which unit leaves memory next: S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023), by units.
//!
//! A new unit enters a small queue. When it comes to its front it goes to the main queue if its pages were used again
//! meanwhile, else it leaves, and its name is kept for a while (a ghost): should it come back soon, it goes to the main queue
//! directly. The main queue gives used units another round. So a scan passes through the small queue, and what is used often
//! stays. Units of files of low priority have a queue of their own that goes first; those of high priority start in the main
//! queue.
//!
//! Invariants: a unit that has a dirty page or one in write-back is not evicted ([`FilePages::evict`] refuses; it leaves the
//! queues then and comes back when it is clean). Ghosts are bounded by the units that are listed. Entries of units that
//! are gone are skipped, and swept out when they are more than half.
//!
//! [`FilePages::evict`]: super::FilePages::evict

use std::collections::VecDeque;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use hashbrown::HashSet;

use super::{FilePages, Priority};
use crate::types::InodeId;

/// Uses that are counted.
const USES_MAX: u8 = 3;
/// Uses from which on a unit goes from the small to the main queue.
const USES_TO_STAY: u8 = 1;
/// The small queue's share of all units: one in so many.
const SMALL_ONE_IN: usize = 10;
/// Entries of units that are gone are swept out from here on.
const SWEEP_FROM: usize = 64;

/// What a unit and the queues share. Relaxed all over: the fields are hints, and whether a unit may go is decided under the lock of
/// its file's pages.
pub(crate) struct Tag {
    file: Weak<FilePages>,
    pub(super) unit: u64,
    name: u64,
    uses: AtomicU8,
    listed: AtomicBool,
    gone: AtomicBool,
}

impl Tag {
    pub(super) fn new(file: &Weak<FilePages>, id: InodeId, unit: u64) -> Arc<Tag> {
        let name = BuildHasherDefault::<DefaultHasher>::default().hash_one((id.0, unit));
        Arc::new(Tag {
            file: Weak::clone(file),
            unit,
            name,
            uses: AtomicU8::new(0),
            listed: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        })
    }

    /// A page of the unit was used again.
    pub(super) fn used(&self) {
        let uses = self.uses.load(Ordering::Relaxed);
        if uses < USES_MAX {
            self.uses.store(uses + 1, Ordering::Relaxed);
        }
    }

    fn uses(&self) -> u8 {
        self.uses.load(Ordering::Relaxed)
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    pub(super) fn is_listed(&self) -> bool {
        self.listed.load(Ordering::Relaxed)
    }
}

/// What became of a unit that was to go.
pub(super) enum Evicted {
    /// It is gone.
    Gone,
    /// It may not go now; whoever cleans it lists it again.
    Busy,
    /// It was gone already.
    Stale,
}

/// See the module documentation.
#[derive(Default)]
pub(super) struct Queues {
    small: VecDeque<Arc<Tag>>,
    main: VecDeque<Arc<Tag>>,
    low: VecDeque<Arc<Tag>>,
    ghosts: VecDeque<u64>,
    ghost_names: HashSet<u64>,
    /// Entries of units that are gone.
    stale: usize,
}

impl Queues {
    fn len(&self) -> usize {
        self.small.len() + self.main.len() + self.low.len()
    }

    /// Lists a unit that has come into memory or has become clean.
    pub(super) fn list(&mut self, tag: &Arc<Tag>, priority: Priority) {
        if tag.listed.swap(true, Ordering::Relaxed) {
            return;
        }
        let known = self.ghost_names.remove(&tag.name) || tag.uses() >= USES_TO_STAY;
        let queue = match priority {
            Priority::Low => &mut self.low,
            Priority::High => &mut self.main,
            Priority::Normal if known => &mut self.main,
            Priority::Normal => &mut self.small,
        };
        queue.push_back(Arc::clone(tag));
    }

    /// Notes that a unit is gone without having been evicted.
    pub(super) fn forget(&mut self, tag: &Tag) {
        if tag.gone.swap(true, Ordering::Relaxed) || !tag.is_listed() {
            return;
        }
        self.stale += 1;
        if self.stale > SWEEP_FROM.max(self.len() / 2) {
            for queue in [&mut self.small, &mut self.main, &mut self.low] {
                queue.retain(|tag| !tag.is_gone());
            }
            self.stale = 0;
        }
    }

    /// Takes the next candidate out of its queue.
    pub(super) fn next(&mut self) -> Option<(Arc<Tag>, Weak<FilePages>)> {
        // Each turn takes an entry away, moves one to the main queue, or uses up one of its at most `USES_MAX` rounds there.
        loop {
            let from_small = self.small.len() > self.len() / SMALL_ONE_IN || self.main.is_empty();
            let tag = if let Some(tag) = self.low.pop_front() {
                tag
            } else if from_small && let Some(tag) = self.small.pop_front() {
                if !tag.is_gone() && tag.uses() >= USES_TO_STAY {
                    tag.uses.store(0, Ordering::Relaxed);
                    self.main.push_back(tag);
                    continue;
                }
                tag
            } else {
                let tag = self.main.pop_front()?;
                let uses = tag.uses();
                if !tag.is_gone() && uses > 0 {
                    tag.uses.store(uses - 1, Ordering::Relaxed);
                    self.main.push_back(tag);
                    continue;
                }
                tag
            };
            if tag.is_gone() {
                self.stale = self.stale.saturating_sub(1);
                continue;
            }
            tag.listed.store(false, Ordering::Relaxed);
            let file = Weak::clone(&tag.file);
            return Some((tag, file));
        }
    }

    /// Remembers the name of a unit that was evicted.
    pub(super) fn remember(&mut self, tag: &Tag) {
        tag.gone.store(true, Ordering::Relaxed);
        if self.ghost_names.insert(tag.name) {
            self.ghosts.push_back(tag.name);
        }
        let most = self.len().max(SWEEP_FROM);
        while self.ghosts.len() > most {
            if let Some(name) = self.ghosts.pop_front() {
                self.ghost_names.remove(&name);
            }
        }
    }

    /// Units listed, and names kept.
    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.len(), self.ghosts.len())
    }
}
