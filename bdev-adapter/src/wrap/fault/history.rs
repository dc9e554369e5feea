//! What blocks held before they were changed: for stale reads, and for what a power cut takes back.
//!
//! A *change* is a write, write-zeroes or unmap that went to the device inside; the queue pair reads the old content right
//! before it sends one. Two things are kept of it:
//!
//! - the content before the last change of each block ([`History::previous`]), for the blocks changed last;
//! - for each block, one version for every change that is not durable yet ([`History::lose`]). A flush makes those durable
//!   that were answered before it was submitted, a FUA write itself and what came before it in its blocks.
//!
//! Memory is bounded ([`KEPT_BYTES`] for each of the two): beyond it the oldest blocks are forgotten, that is, they have no
//! previous content, and count as durable, as if the cache had been full and written them back.

use std::collections::VecDeque;
use std::sync::Arc;

use hashbrown::HashMap;

use crate::wrap::random::mix;
use crate::wrap::recorder::Survive;

/// Old content that is kept at most, in bytes, for each of the two purposes. A single change of more is not followed.
pub(super) const KEPT_BYTES: u64 = 64 << 20;

/// The content of one block.
pub(super) type Block = Arc<[u8]>;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct History {
    block_size: u64,
    /// Blocks that may be kept for each purpose.
    limit: usize,
    /// Counts changes, answers and flushes.
    clock: u64,
    previous: HashMap<u64, Block>,
    /// The blocks of `previous` in the order in which they came.
    previous_order: VecDeque<u64>,
    unflushed: HashMap<u64, Vec<Version>>,
    /// The blocks of `unflushed` in the order in which they came; some may be gone.
    unflushed_order: VecDeque<u64>,
    versions: usize,
}

/// What a block held before a change that is not durable yet.
#[derive(Debug)]
struct Version {
    change: Change,
    before: Block,
    progress: Progress,
}

/// Names a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change(u64);

/// A moment of [`History`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment(u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    InFlight,
    /// Answered with success at this time.
    Done(u64),
    /// Any part of it may have happened.
    Failed,
}

impl History {
    pub(super) fn new(block_size: u32) -> History {
        let block_size = u64::from(block_size);
        History {
            block_size,
            limit: (KEPT_BYTES / block_size) as usize,
            clock: 0,
            previous: HashMap::new(),
            previous_order: VecDeque::new(),
            unflushed: HashMap::new(),
            unflushed_order: VecDeque::new(),
            versions: 0,
        }
    }

    /// A change at byte `offset` is on its way, where `before` is now.
    pub(super) fn changed(&mut self, offset: u64, before: &[u8]) -> Change {
        self.clock += 1;
        let change = Change(self.clock);
        let first = offset / self.block_size;
        for (block, before) in (first..).zip(before.chunks_exact(self.block_size as usize)) {
            let before: Block = before.into();
            if self.previous.insert(block, Arc::clone(&before)).is_none() {
                self.previous_order.push_back(block);
            }
            let versions = self.unflushed.entry(block).or_default();
            if versions.is_empty() {
                self.unflushed_order.push_back(block);
            }
            versions.push(Version { change, before, progress: Progress::InFlight });
            self.versions += 1;
        }
        self.shrink();
        change
    }

    /// The change was answered.
    pub(super) fn answered(&mut self, change: Change, offset: u64, len: u64, success: bool, durable: bool) {
        self.clock += 1;
        let progress = if success { Progress::Done(self.clock) } else { Progress::Failed };
        for block in offset / self.block_size..(offset + len) / self.block_size {
            let Some(versions) = self.unflushed.get_mut(&block) else { continue };
            let Some(at) = versions.iter().position(|version| version.change == change) else { continue };
            versions[at].progress = progress;
            if success && durable {
                self.versions -= versions.drain(..=at).count();
                if versions.is_empty() {
                    self.unflushed.remove(&block);
                }
            }
        }
    }

    /// A flush is submitted.
    pub(super) fn flush_begins(&mut self) -> Moment {
        self.clock += 1;
        Moment(self.clock)
    }

    /// The flush that began at `begun` succeeded.
    pub(super) fn flushed(&mut self, begun: Moment) {
        let covered = |version: &Version| matches!(version.progress, Progress::Done(at) if at < begun.0);
        let mut gone = 0;
        self.unflushed.retain(|_, versions| {
            // What is still on its way, and all that came after it, stays.
            let settled = versions.iter().take_while(|v| v.progress != Progress::InFlight).count();
            let durable = versions[..settled].iter().rposition(covered).map_or(0, |last| last + 1);
            gone += versions.drain(..durable).count();
            !versions.is_empty()
        });
        self.versions -= gone;
        let unflushed = &self.unflushed;
        self.unflushed_order.retain(|block| unflushed.contains_key(block));
    }

    /// What the block held before its last change, if that is known.
    pub(super) fn previous(&self, block: u64) -> Option<&Block> {
        self.previous.get(&block)
    }

    /// Power is lost: the blocks that go back to what they durably were. What is left is durable.
    pub(super) fn lose(&mut self, survive: Survive) -> Vec<(u64, Block)> {
        self.versions = 0;
        self.unflushed_order.clear();
        self.previous.clear();
        self.previous_order.clear();
        let lost = |block: u64| match survive {
            Survive::Nothing => true,
            Survive::Everything => false,
            Survive::Random(seed) => mix(seed ^ mix(block)) & 1 == 0,
        };
        let mut blocks: Vec<_> = self
            .unflushed
            .drain()
            .filter(|(block, _)| lost(*block))
            .filter_map(|(block, versions)| Some((block, versions.into_iter().next()?.before)))
            .collect();
        blocks.sort_unstable_by_key(|(block, _)| *block);
        blocks
    }

    fn shrink(&mut self) {
        while self.previous.len() > self.limit {
            let Some(oldest) = self.previous_order.pop_front() else { break };
            self.previous.remove(&oldest);
        }
        while self.versions > self.limit {
            let Some(oldest) = self.unflushed_order.pop_front() else { break };
            self.versions -= self.unflushed.remove(&oldest).map_or(0, |versions| versions.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 512;

    fn lost(history: &mut History) -> Vec<(u64, u8)> {
        history.lose(Survive::Nothing).into_iter().map(|(block, content)| (block, content[0])).collect()
    }

    fn write(history: &mut History, block: u64, before: u8) -> Change {
        let change = history.changed(block * BLOCK as u64, &[before; BLOCK]);
        history.answered(change, block * BLOCK as u64, BLOCK as u64, true, false);
        change
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it_began() {
        let mut history = History::new(BLOCK as u32);
        write(&mut history, 0, 1);
        write(&mut history, 1, 10);
        let flying = history.changed(2 * BLOCK as u64, &[20; BLOCK]);
        let flush = history.flush_begins();
        write(&mut history, 1, 11);
        history.answered(flying, 2 * BLOCK as u64, BLOCK as u64, true, false);
        history.flushed(flush);
        assert_eq!(history.previous(0).unwrap()[0], 1);
        assert_eq!(lost(&mut history), [(1, 11), (2, 20)]);
        assert_eq!(lost(&mut history), []);
    }

    #[test]
    fn fua_and_failures() {
        let mut history = History::new(BLOCK as u32);
        write(&mut history, 0, 1);
        let fua = history.changed(0, &[2; BLOCK]);
        history.answered(fua, 0, BLOCK as u64, true, true);
        let failed = history.changed(BLOCK as u64, &[5; BLOCK]);
        history.answered(failed, BLOCK as u64, BLOCK as u64, false, false);
        let flush = history.flush_begins();
        history.flushed(flush);
        assert_eq!(lost(&mut history), [(1, 5)], "what failed is covered by no flush");
    }

    #[test]
    fn memory_is_bounded() {
        let mut history = History::new(BLOCK as u32);
        history.limit = 3;
        for block in 0..10 {
            write(&mut history, block, block as u8);
        }
        assert!(history.previous(6).is_none() && history.previous(7).is_some());
        assert_eq!(history.versions, 3);
        assert_eq!(lost(&mut history), [(7, 7), (8, 8), (9, 9)]);
    }
}
