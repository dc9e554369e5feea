//! Ordered extents: device blocks between their allocation and the entry of their content in the metadata tree.
//!
//! # Life
//!
//! [`Slot::register`] makes the range of the file known, before or with the allocation -> [`Ordered`] owns the blocks -> in the
//! transaction that puts them into the trees, after that, [`Slot::inserted`], and the pins go -> [`Ordered::finish`]. Or anything
//! fails: the drop of the `Ordered` gives its blocks back (nothing refers to them, so they may be used again at once; those that were
//! promised to the file before, preallocated, stay with it: its record names them all the time). The
//! range is free when the last holder of its slot is gone, in any order of completions. So an ordered extent ends exactly
//! once, with success or failure, and never before the trees have it.
//!
//! # Who waits
//!
//! Ordered extents of a file are disjoint: a direct write holds its range exclusively for the life of its ordered extent; a
//! write-back registers its own only where there is none ([`Slot::try_register`]), and keeps no range lock. So whoever wants
//! a range to be stable - a direct write, a truncate, a write-back - looks for ordered extents once it has the range, and if there
//! is one lets go of everything, waits ([`OrderedList::wait`]) and starts over. A completion needs no range lock, so it
//! comes. A buffered write need not wait: it makes new versions of pages, and a flight has the old ones. Nor need a buffered read:
//! while there is an ordered extent of write-back its pages are in the cache, and that of a direct write comes with the lock.
//!
//! A sync waits for those that were there when it came, in files with dirty pages and where they hold back the size of what is finished.
//!
//! # The size on disk (rule 3 of the design)
//!
//! What a commit stores as the size of a file never covers a write that is not finished. Writes finish in any order, so for each
//! that extends the file there is a *bound*: how far the file reached before it (or where it begins, if that is further). Dirty
//! units have bounds, and the slots that follow them, without a gap between. The size on disk is
//! where the furthest finished write ends, but not beyond any bound ([`FileInner::disk_size`]). A write amid the file has no
//! bound: a later write never holds back the size of an earlier one. When a commit finds finished content beyond that
//! size, it lists the file as an orphan with a truncate left to do: a crash cuts that content off.
//!
//! [`FileInner::disk_size`]: crate::file::FileInner::disk_size

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use smallvec::SmallVec;

use crate::core::Core;
use crate::file::FileInner;
use crate::mutation::{Mutation, broken};
use crate::sync::Mutex;
use crate::types::{FileBlock, Run};

/// Runs as an allocation yields them.
pub(crate) type Runs = SmallVec<[Run; 4]>;

/// A bound that holds nothing back.
pub(crate) const NO_BOUND: u64 = u64::MAX;

/// The ordered extents of a file, by where they begin.
#[derive(Default)]
pub(crate) struct OrderedList(Mutex<State>);

#[derive(Default)]
struct State {
    active: BTreeMap<u64, Active>,
    next: u64,
    waiting: Vec<Waker>,
}

struct Active {
    end: u64,
    number: u64,
    bound: u64,
}

impl State {
    /// Those that overlap `range`. They are disjoint, so it is those that begin in it and perhaps one before.
    fn overlapping<'a>(&'a self, range: &Range<u64>) -> impl Iterator<Item = &'a Active> {
        let before = self.active.range(..range.start).next_back().map(|(_, active)| active);
        let start = range.start;
        let before = before.into_iter().filter(move |active| active.end > start);
        before.chain(self.active.range(range.start..range.end.max(range.start)).map(|(_, active)| active))
    }
}

impl OrderedList {
    /// Whether there is one that overlaps `range`, in blocks.
    pub(crate) fn overlaps(&self, range: &Range<u64>) -> bool {
        self.0.lock().overlapping(range).next().is_some()
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.0.lock().active.len() as u64
    }

    /// The least bound of the size on disk.
    pub(crate) fn bound(&self) -> u64 {
        self.0.lock().active.values().map(|active| active.bound).min().unwrap_or(NO_BOUND)
    }

    /// Waits for those that overlap `range` at this moment; later ones do not count, so it ends.
    pub(crate) async fn wait(&self, range: Range<u64>) {
        let mut before = None;
        poll_fn(|cx| {
            let mut state = self.0.lock();
            let before = *before.get_or_insert(state.next);
            if state.overlapping(&range).all(|active| active.number >= before) {
                return Poll::Ready(());
            }
            if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }

    fn remove(&self, start: u64) {
        let waiting = {
            let mut state = self.0.lock();
            let removed = state.active.remove(&start);
            debug_assert!(removed.is_some(), "an ordered extent ended twice");
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// The place of an ordered extent among those of its file; free again when the last holder is gone.
pub(crate) struct Slot {
    core: Arc<Core>,
    file: Arc<FileInner>,
    start: u64,
}

impl Slot {
    /// Registers `range` (in blocks, not empty), unless there is one that overlaps it.
    pub(crate) fn try_register(
        core: &Arc<Core>,
        file: &Arc<FileInner>,
        range: &Range<u64>,
        bound: u64,
    ) -> Option<Arc<Slot>> {
        let mut state = file.ordered.0.lock();
        if state.overlapping(range).next().is_some() {
            return None;
        }
        let number = state.next;
        state.next += 1;
        state.active.insert(range.start, Active { end: range.end, number, bound });
        core.ordered.fetch_add(1, Ordering::Relaxed);
        drop(state);
        Some(Arc::new(Slot { core: Arc::clone(core), file: Arc::clone(file), start: range.start }))
    }

    /// The same for a writer that holds the range exclusively and has waited for others. The bound is that of a write which ends
    /// with the range.
    ///
    /// Under the metadata lock, so that nothing is finished, and no commit stores a size, between the look at the size and the bound: a
    /// sync that comes later waits for this write, or does not see it.
    pub(crate) fn register(core: &Arc<Core>, file: &Arc<FileInner>, at: FileBlock, blocks: u64) -> Arc<Slot> {
        let (size, end) = (file.size(), at.plus(blocks));
        let bound = if end.byte() > size { size.max(at.byte()) } else { NO_BOUND };
        Slot::try_register(core, file, &(at.0..end.0), bound)
            .expect("who holds a range exclusively has waited for the ordered extents in it")
    }

    pub(crate) fn file(&self) -> &Arc<FileInner> {
        &self.file
    }

    /// Changes the bound: lower when what is written is known, none once the trees have it (under the metadata lock).
    pub(crate) fn set_bound(&self, bound: u64) {
        if let Some(active) = self.file.ordered.0.lock().active.get_mut(&self.start) {
            active.bound = bound;
        }
    }

    /// The trees have its content now. Under the metadata lock.
    pub(crate) fn inserted(&self) {
        self.set_bound(NO_BOUND);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.core.ordered.fetch_sub(1, Ordering::Relaxed);
        self.file.ordered.remove(self.start);
    }
}

/// See the module documentation.
pub(crate) struct Ordered {
    core: Arc<Core>,
    /// None for blocks that get no content.
    slot: Option<Arc<Slot>>,
    runs: Runs,
    /// Those of `runs`, in the same order, that were the file's before.
    promised: Runs,
    /// The device epoch before anything was written to them.
    epoch: u64,
    /// The blocks come from a reservation, which has them again if this fails.
    reserved: bool,
}

impl Ordered {
    /// Takes over freshly allocated `runs`.
    pub(crate) fn new(core: &Arc<Core>, slot: Option<&Arc<Slot>>, runs: Runs) -> Ordered {
        Ordered {
            core: Arc::clone(core),
            slot: slot.cloned(),
            runs,
            promised: Runs::new(),
            epoch: core.device.epoch(),
            reserved: false,
        }
    }

    /// Of its runs, `promised` (in the same order) were preallocated for the file.
    pub(crate) fn with_promised(mut self, promised: Runs) -> Ordered {
        self.promised = promised;
        self
    }

    /// Its blocks, but for promised ones, come from a reservation.
    pub(crate) fn with_reserved(mut self) -> Ordered {
        self.reserved = true;
        self
    }

    /// How many of its blocks were promised.
    pub(crate) fn promised(&self) -> u64 {
        self.promised.iter().map(|run| run.len).sum()
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    pub(crate) fn slot(&self) -> Option<&Slot> {
        self.slot.as_deref()
    }

    /// The trees refer to the blocks now.
    pub(crate) fn finish(mut self) {
        self.runs.clear();
    }
}

impl Drop for Ordered {
    fn drop(&mut self) {
        let mut promised = self.promised.iter().peekable();
        self.runs.retain(|run| promised.next_if(|promised| *promised == run).is_none());
        if !self.runs.is_empty() && !broken(Mutation::ErrorKeepsBlocks) {
            let file = self.slot.as_ref().map(|slot| &*slot.file);
            self.core.give_back(file, &self.runs, self.reserved);
        }
    }
}
