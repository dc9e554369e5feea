//! Which ranges changed lately: what tells a loader that its result belongs to the past.
//!
//! A loader takes a [`LoadTicket`], reads the metadata tree, and hands in what it found with the ticket. Every event that
//! can make such a result stale has a number: a change of the mapping (publication, hole, truncation), an invalidation,
//! and an *unpin* -- between publication and unpin the tree still holds the old mapping, so a loader that took its ticket
//! in that time may have read the old mapping although no publication happened since.
//!
//! Ranges are kept only while a loader may be on its way: a ticket arms the history for the next [`REACH`] events. A ticket
//! older than that is refused whole, which costs its owner a second read and no correctness. A map that nobody loads
//! into keeps nothing but two counters.

use smallvec::SmallVec;

use super::mapping::{BlockEnd, BlockRange};
use crate::mutation::{Mutation, broken};

/// Events that a ticket outlives for certain.
pub(super) const REACH: u64 = 1024;

/// Proof of the moment before a loader began to read the metadata tree. Opaque; valid for the map that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadTicket(u64);

/// The numbered events of a map.
#[derive(Debug, Default)]
pub(super) struct History {
    /// Number of the last event.
    now: u64,
    /// Events up to this number are forgotten.
    floor: u64,
    /// Events up to this number are kept.
    armed_until: u64,
    recent: Vec<(u64, BlockRange)>,
}

/// What changed inside a loader's range since its ticket.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Since {
    /// The ticket is older than the history: anything may have changed.
    Forgotten,
    /// These ranges, sorted, disjoint.
    Changed(SmallVec<[BlockRange; 4]>),
}

impl History {
    /// Arms the history and notes the present.
    pub(super) fn ticket(&mut self) -> LoadTicket {
        self.armed_until = self.now + REACH;
        LoadTicket(self.now)
    }

    /// Counts an event on `range`.
    pub(super) fn record(&mut self, range: BlockRange) {
        self.now += 1;
        if self.now > self.armed_until {
            self.recent = Vec::new();
            self.floor = self.now;
            return;
        }
        if self.recent.len() as u64 >= 2 * REACH {
            self.floor = self.recent[REACH as usize - 1].0;
            self.recent.drain(..REACH as usize);
        }
        self.recent.push((self.now, range));
    }

    /// What changed inside `range` since `ticket`.
    pub(super) fn since(&self, ticket: LoadTicket, range: BlockRange) -> Since {
        if broken(Mutation::LoadIgnoresChanges) {
            return Since::Changed(SmallVec::new());
        }
        if ticket.0 < self.floor {
            return Since::Forgotten;
        }
        let first = self.recent.partition_point(|(event, _)| *event <= ticket.0);
        let mut changed: SmallVec<[BlockRange; 4]> = self.recent[first..]
            .iter()
            .map(|(_, r)| r.intersection(range))
            .filter(|r| !r.is_empty())
            .collect();
        changed.sort_unstable_by_key(|r| r.start());
        changed.dedup_by(|next, kept| {
            let joined = next.start().0 <= kept.end().0;
            if joined {
                *kept = BlockRange::between(kept.start(), BlockEnd(kept.end().0.max(next.end().0)));
            }
            joined
        });
        Since::Changed(changed)
    }

    pub(super) fn bytes(&self) -> usize {
        self.recent.capacity() * size_of::<(u64, BlockRange)>()
    }
}
