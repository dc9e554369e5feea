//! The pages of one file, by units, and what of them is dirty or in write-back.
//!
//! Everything is under one mutex per file, held for look-ups and swaps of pointers, never for a copy of more than the edges of a
//! write. Bits of a unit say which of its pages are dirty and which are in write-back; a page may be both, when it was
//! written again while an older version of it is on its way.
//!
//! For the size on disk (rule 3 of the design, see [`crate::ordered`]) a dirty unit knows how far the file reached before it was
//! written to (`bound`: the size on disk must not go beyond while the unit is not on the device), and where its data
//! ends (`end`).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::{Evicted, Page, PageCache, Tag};
use crate::error::Error;
use crate::file::FileInner;
use crate::range_lock::RangeLock;
use crate::sync::Mutex;
use crate::types::{BLOCK_SHIFT, InodeId};

/// Blocks in a unit.
pub(crate) const UNIT_BLOCKS: u64 = 16;

/// A bound that holds nothing back.
const NO_BOUND: u64 = u64::MAX;

struct Unit {
    pages: [Option<Page>; UNIT_BLOCKS as usize],
    dirty: u16,
    writeback: u16,
    /// Pages that were read or written by a user, as opposed to read ahead.
    seen: u16,
    /// The page that was used last: using it again and again is one use.
    last: u8,
    bound: u64,
    end: u64,
    tag: Arc<Tag>,
}

impl Unit {
    fn is_busy(&self) -> bool {
        self.dirty | self.writeback != 0
    }

    fn resident(&self) -> u64 {
        self.pages.iter().flatten().count() as u64
    }

    fn note_use(&mut self, slot: usize) {
        if self.seen >> slot & 1 == 1 && usize::from(self.last) != slot {
            self.tag.used();
        }
        self.seen |= 1 << slot;
        self.last = slot as u8;
    }
}

fn place(block: u64) -> (u64, usize) {
    (block / UNIT_BLOCKS, (block % UNIT_BLOCKS) as usize)
}

/// The bits of `unit` for the blocks of `range`.
fn mask(unit: u64, range: &Range<u64>) -> u16 {
    let first = unit * UNIT_BLOCKS;
    let from = range.start.saturating_sub(first).min(UNIT_BLOCKS);
    let to = range.end.saturating_sub(first).min(UNIT_BLOCKS);
    ((1u32 << to) - 1) as u16 & !((1u32 << from) - 1) as u16
}

/// The units that the blocks of `range` lie in.
fn units_of(range: &Range<u64>) -> Range<u64> {
    let start = range.start / UNIT_BLOCKS;
    start..range.end.div_ceil(UNIT_BLOCKS).max(start)
}

#[derive(Default)]
struct State {
    units: BTreeMap<u64, Unit>,
    /// Units with dirty pages.
    dirty: BTreeSet<u64>,
    /// The bounds of dirty units that have one.
    bounds: BTreeSet<(u64, u64)>,
    dirty_pages: u64,
    writeback_pages: u64,
    /// Pages for which the file has a reservation: one for each dirty page.
    pool: u64,
    /// Where the file is in the list of dirty files.
    since: Option<Instant>,
    /// Why a write-back failed, until the user acknowledges it.
    error: Option<Error>,
}

/// See the module documentation.
pub(crate) struct FilePages {
    cache: Arc<PageCache>,
    myself: Weak<FilePages>,
    id: InodeId,
    state: Mutex<State>,
    /// Pages that are dirty or in write-back. Written under the lock; readers of the file look at it without.
    busy: AtomicU64,
    /// Flights of write-back that have failed.
    failures: AtomicU64,
    /// Whose turn it is to write the file back: one at a time, so that its blocks are allocated in the order of the file.
    pub(crate) turn: RangeLock,
}

/// A page that a write makes or changes.
pub(crate) enum NewPage<'a> {
    /// All of block `at`.
    Whole { at: u64, page: Page },
    /// Bytes of block `at`, from `skip` on, over what the cache has there, else over `base`.
    Part { at: u64, skip: usize, bytes: &'a [u8], base: Option<Page> },
}

impl NewPage<'_> {
    fn at(&self) -> u64 {
        match self {
            NewPage::Whole { at, .. } | NewPage::Part { at, .. } => *at,
        }
    }
}

/// Why pages could not be written. Nothing was changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// This page is not in memory and has no base.
    Missing(u64),
    /// Nothing gets dirty any more.
    Closed,
}

/// What one flight of write-back took.
pub(crate) struct Batch {
    /// Blocks and their content, in order.
    pub(crate) pages: Vec<(u64, Page)>,
    /// Where the data ends, in bytes.
    pub(crate) end: u64,
    /// The least of the units' bounds.
    pub(crate) bound: u64,
    units: Vec<UnitInFlight>,
}

struct UnitInFlight {
    unit: u64,
    mask: u16,
    bound: u64,
    end: u64,
}

/// Sums over a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PageCounts {
    pub(crate) dirty: u64,
    pub(crate) writeback: u64,
    pub(crate) pool: u64,
}

impl FilePages {
    pub(crate) fn new(cache: &Arc<PageCache>, id: InodeId) -> Arc<FilePages> {
        Arc::new_cyclic(|myself| FilePages {
            cache: Arc::clone(cache),
            myself: Weak::clone(myself),
            id,
            state: Mutex::default(),
            busy: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            turn: RangeLock::default(),
        })
    }

    // ---- questions

    /// Whether the file has pages that are newer than the device.
    #[inline]
    pub(crate) fn is_busy(&self) -> bool {
        // Acquire pairs with the release in `recount`: who sees no such pages sees the view that was published before the last of
        // them became clean.
        self.busy.load(Ordering::Acquire) > 0
    }

    /// Whether any block of `range` is dirty or in write-back.
    pub(crate) fn busy_in(&self, range: &Range<u64>) -> bool {
        let state = self.state.lock();
        let mut units = state.units.range(units_of(range));
        units.any(|(unit, u)| (u.dirty | u.writeback) & mask(*unit, range) != 0)
    }

    /// The bound of the size on disk that dirty pages set.
    pub(crate) fn bound(&self) -> u64 {
        self.state.lock().bounds.first().map_or(NO_BOUND, |(bound, _)| *bound)
    }

    pub(crate) fn counts(&self) -> PageCounts {
        let state = self.state.lock();
        PageCounts { dirty: state.dirty_pages, writeback: state.writeback_pages, pool: state.pool }
    }

    pub(crate) fn error(&self) -> Option<Error> {
        self.state.lock().error.clone()
    }

    pub(crate) fn set_error(&self, error: Option<Error>) -> Option<Error> {
        std::mem::replace(&mut self.state.lock().error, error)
    }

    /// Notes why a write-back failed, if nothing is noted yet.
    pub(crate) fn note_error(&self, error: &Error) {
        self.state.lock().error.get_or_insert_with(|| error.clone());
        self.cache.failed.lock().insert(self.id, Weak::clone(&self.myself));
    }

    /// A flight has failed: its pages are dirty again.
    pub(crate) fn note_failure(&self) {
        // Release: pairs with the acquire in `failures`.
        self.failures.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Acquire)
    }

    // ---- reading

    /// The pages of `range` that are here.
    pub(crate) fn look_up(&self, range: Range<u64>, found: &mut Vec<Option<Page>>) {
        let mut state = self.state.lock();
        for number in units_of(&range) {
            let first = number * UNIT_BLOCKS;
            let slots = range.start.max(first) - first..range.end.min(first + UNIT_BLOCKS) - first;
            match state.units.get_mut(&number) {
                None => found.extend(slots.map(|_| None)),
                Some(unit) => {
                    for slot in slots {
                        let slot = slot as usize;
                        if unit.pages[slot].is_some() {
                            unit.note_use(slot);
                        }
                        found.push(unit.pages[slot].clone());
                    }
                }
            }
        }
    }

    /// The first run of blocks of `range` that are not here.
    pub(crate) fn first_missing(&self, range: Range<u64>) -> Option<Range<u64>> {
        let state = self.state.lock();
        let here = |block: u64| {
            let (unit, slot) = place(block);
            state.units.get(&unit).is_some_and(|unit| unit.pages[slot].is_some())
        };
        let start = range.clone().find(|block| !here(*block))?;
        let end = (start..range.end).find(|block| here(*block)).unwrap_or(range.end);
        Some(start..end)
    }

    /// Puts clean pages in, from block `at` on, as far as there are none. The caller holds the range, and has held it since it found
    /// them missing.
    pub(crate) fn insert(&self, file: &FileInner, at: u64, pages: &[Page], used: bool) {
        let mut added = 0;
        let mut state = self.state.lock();
        for (block, page) in (at..).zip(pages) {
            let (number, slot) = place(block);
            let unit = self.unit(&mut state, number);
            if unit.pages[slot].is_none() {
                unit.pages[slot] = Some(page.clone());
                added += 1;
            }
            if used {
                unit.note_use(slot);
            }
        }
        self.cache.resident.fetch_add(added, Ordering::Relaxed);
        for number in units_of(&(at..at + pages.len() as u64)) {
            if let Some(unit) = state.units.get(&number) {
                self.cache.list(&unit.tag, file.priority());
            }
        }
        drop(state);
        self.cache.shrink();
    }

    fn unit<'a>(&self, state: &'a mut State, number: u64) -> &'a mut Unit {
        state.units.entry(number).or_insert_with(|| Unit {
            pages: Default::default(),
            dirty: 0,
            writeback: 0,
            seen: 0,
            last: u8::MAX,
            bound: NO_BOUND,
            end: 0,
            tag: Tag::new(&self.myself, self.id, number),
        })
    }

    // ---- writing

    /// Blocks of `range` that are not dirty: how much a write of it has to reserve. Stays as it is or shrinks while the caller holds
    /// the range exclusively.
    pub(crate) fn not_dirty(&self, range: &Range<u64>) -> u64 {
        let state = self.state.lock();
        let units = state.units.range(units_of(range));
        let dirty: u64 = units.map(|(unit, u)| u64::from((u.dirty & mask(*unit, range)).count_ones())).sum();
        range.end - range.start - dirty
    }

    /// Puts the pages of a write in and marks them dirty, all at once. `end`: where the write ends, in bytes; `size`: how far the file
    /// reached before it. `open` says whether anything may still get dirty. Returns how many were not dirty before: so much
    /// of the writer's reservation belongs to the file now.
    ///
    /// The caller holds the range exclusively, and has reserved what [`not_dirty`](Self::not_dirty) said.
    pub(crate) fn write(
        &self,
        file: &Arc<FileInner>,
        new: &mut [NewPage<'_>],
        end: u64,
        size: u64,
        open: impl FnOnce() -> bool,
    ) -> Result<u64, Unfit> {
        let mut state = self.state.lock();
        for page in &*new {
            if let NewPage::Part { at, base: None, .. } = page {
                let (unit, slot) = place(*at);
                if state.units.get(&unit).is_none_or(|unit| unit.pages[slot].is_none()) {
                    return Err(Unfit::Missing(*at));
                }
            }
        }
        if !open() {
            return Err(Unfit::Closed);
        }
        let (mut added, mut dirtied) = (0, 0);
        for page in new {
            let at = page.at();
            let (number, slot) = place(at);
            let unit = self.unit(&mut state, number);
            added += u64::from(unit.pages[slot].is_none());
            match page {
                NewPage::Whole { page, .. } => unit.pages[slot] = Some(page.clone()),
                NewPage::Part { skip, bytes, base, .. } => {
                    let page =
                        unit.pages[slot].get_or_insert_with(|| base.clone().unwrap_or_else(Page::zeroed));
                    page.make_mut()[*skip..*skip + bytes.len()].copy_from_slice(bytes);
                }
            }
            unit.note_use(slot);
            dirtied += u64::from(unit.dirty >> slot & 1 == 0);
            unit.dirty |= 1 << slot;
            let page_end = (at + 1) << BLOCK_SHIFT;
            unit.end = unit.end.max(end.min(page_end));
            let bound = if end.min(page_end) > size { size.max(at << BLOCK_SHIFT) } else { NO_BOUND };
            if bound < unit.bound {
                let old = std::mem::replace(&mut unit.bound, bound);
                state.bounds.remove(&(old, number));
                state.bounds.insert((bound, number));
            }
            state.dirty.insert(number);
        }
        state.dirty_pages += dirtied;
        state.pool += dirtied;
        self.cache.resident.fetch_add(added, Ordering::Relaxed);
        self.recount(&mut state, file);
        Ok(dirtied)
    }

    /// Brings the counters that others look at up to date, and the place of the file in the list of dirty files.
    fn recount(&self, state: &mut State, file: &Arc<FileInner>) {
        let busy = state.dirty_pages + state.writeback_pages;
        // Release: see `is_busy`.
        let before = self.busy.swap(busy, Ordering::AcqRel);
        self.cache.busy.fetch_add(busy.wrapping_sub(before), Ordering::Relaxed);
        if (before == 0) != (busy == 0) {
            self.date(state, file, (busy > 0).then(Instant::now));
        }
    }

    /// Changes since when the file is listed as dirty.
    fn date(&self, state: &mut State, file: &Arc<FileInner>, since: Option<Instant>) {
        let mut files = self.cache.dirty_files.lock();
        if let Some(old) = state.since.take() {
            files.remove(&(old, self.id));
        }
        if let Some(since) = since {
            files.insert((since, self.id), Arc::clone(file));
            state.since = Some(since);
        }
    }

    // ---- write-back

    /// A write-back of the whole file begins: what gets dirty from now on is young.
    pub(crate) fn rejuvenate(&self, file: &Arc<FileInner>) {
        let mut state = self.state.lock();
        if state.since.is_some() {
            self.date(&mut state, file, Some(Instant::now()));
        }
    }

    /// The next units from `from` on, before `to`, that follow each other and are dirty; at most `max`.
    pub(crate) fn next_dirty(&self, from: u64, to: u64, max: u64) -> Option<Range<u64>> {
        let state = self.state.lock();
        let mut units = state.dirty.range(from..to.max(from));
        let first = *units.next()?;
        let more = units.zip(first + 1..).take_while(|(unit, next)| *unit == next);
        Some(first..first + 1 + more.take(max as usize - 1).count() as u64)
    }

    /// The first dirty block in these units, the block behind the last, and the least of their bounds.
    pub(crate) fn dirty_span(&self, units: &Range<u64>) -> Option<(Range<u64>, u64)> {
        let state = self.state.lock();
        let mut dirty = state.units.range(units.clone()).filter(|(_, unit)| unit.dirty != 0);
        let bound = dirty.clone().map(|(_, unit)| unit.bound).min()?;
        let (number, first) = dirty.next()?;
        let start = number * UNIT_BLOCKS + u64::from(first.dirty.trailing_zeros());
        let (number, last) = dirty.next_back().unwrap_or((number, first));
        let end = (number + 1) * UNIT_BLOCKS - u64::from(last.dirty.leading_zeros());
        Some((start..end, bound))
    }

    /// Takes the dirty pages of `units` for write-back: they are clean but for that, and their reservation is the caller's. The caller
    /// has registered an ordered extent over them, so none of them is in write-back.
    pub(crate) fn begin_writeback(&self, units: Range<u64>) -> Batch {
        let mut batch = Batch { pages: Vec::new(), end: 0, bound: NO_BOUND, units: Vec::new() };
        let mut state = self.state.lock();
        let State { units: all, dirty, bounds, .. } = &mut *state;
        for (number, unit) in all.range_mut(units).filter(|(_, unit)| unit.dirty != 0) {
            let taken = std::mem::take(&mut unit.dirty);
            debug_assert_eq!(unit.writeback & taken, 0, "a page is written back twice at once");
            unit.writeback |= taken;
            for (slot, page) in unit.pages.iter().enumerate().filter(|(slot, _)| taken >> slot & 1 == 1) {
                let page = page.clone().expect("a dirty page is in memory");
                batch.pages.push((number * UNIT_BLOCKS + slot as u64, page));
            }
            dirty.remove(number);
            bounds.remove(&(unit.bound, *number));
            let (bound, end) = (std::mem::replace(&mut unit.bound, NO_BOUND), std::mem::take(&mut unit.end));
            batch.bound = batch.bound.min(bound);
            batch.end = batch.end.max(end);
            batch.units.push(UnitInFlight { unit: *number, mask: taken, bound, end });
        }
        let count = batch.pages.len() as u64;
        state.dirty_pages -= count;
        state.writeback_pages += count;
        state.pool -= count;
        batch
    }

    /// The pages of `batch` are on the device and visible there: those that were not written again are clean.
    pub(crate) fn end_writeback(&self, file: &Arc<FileInner>, batch: &Batch) {
        let mut state = self.state.lock();
        for flown in &batch.units {
            if let Some(unit) = state.units.get_mut(&flown.unit) {
                unit.writeback &= !flown.mask;
                if !unit.is_busy() {
                    self.cache.list(&unit.tag, file.priority());
                }
            }
        }
        state.writeback_pages -= batch.pages.len() as u64;
        self.recount(&mut state, file);
        drop(state);
        self.cache.shrink();
    }

    /// The pages of `batch` did not get to the device: they are dirty again, but for those that were written again meanwhile. Returns
    /// how many became dirty: their reservation belongs to the file again.
    pub(crate) fn fail_writeback(&self, file: &Arc<FileInner>, batch: &Batch) -> u64 {
        let mut state = self.state.lock();
        let mut again = 0;
        for flown in &batch.units {
            let State { units, dirty, bounds, .. } = &mut *state;
            let Some(unit) = units.get_mut(&flown.unit) else { continue };
            unit.writeback &= !flown.mask;
            again += u64::from((flown.mask & !unit.dirty).count_ones());
            unit.dirty |= flown.mask;
            unit.end = unit.end.max(flown.end);
            dirty.insert(flown.unit);
            if flown.bound < unit.bound {
                bounds.remove(&(unit.bound, flown.unit));
                bounds.insert((flown.bound, flown.unit));
                unit.bound = flown.bound;
            }
        }
        state.writeback_pages -= batch.pages.len() as u64;
        state.dirty_pages += again;
        state.pool += again;
        self.recount(&mut state, file);
        again
    }

    // ---- dropping

    /// Drops the clean pages of `range`. False if pages are left, which are dirty or in write-back. The caller holds the range
    /// exclusively.
    pub(crate) fn drop_clean(&self, range: &Range<u64>) -> bool {
        let mut state = self.state.lock();
        let (mut dropped, mut left) = (0, false);
        let mut empty = Vec::new();
        for (number, unit) in state.units.range_mut(units_of(range)) {
            let mask = mask(*number, range);
            left |= (unit.dirty | unit.writeback) & mask != 0;
            dropped += drop_pages(unit, mask & !(unit.dirty | unit.writeback));
            if unit.resident() == 0 {
                empty.push(*number);
            }
        }
        self.remove(&mut state, &empty, dropped);
        !left
    }

    /// Drops all pages of `range`, dirty ones too. Returns how many were dirty: their reservation is the caller's. None of them is in
    /// write-back, and the caller holds the range exclusively.
    pub(crate) fn discard(&self, file: &Arc<FileInner>, range: &Range<u64>) -> u64 {
        let mut state = self.state.lock();
        let (mut dropped, mut undone) = (0, 0);
        let mut empty = Vec::new();
        let State { units, dirty, bounds, .. } = &mut *state;
        for (number, unit) in units.range_mut(units_of(range)) {
            let mask = mask(*number, range);
            debug_assert_eq!(unit.writeback & mask, 0, "a page in write-back is discarded");
            undone += u64::from((unit.dirty & mask).count_ones());
            unit.dirty &= !mask;
            dropped += drop_pages(unit, mask);
            if unit.dirty == 0 {
                dirty.remove(number);
                bounds.remove(&(unit.bound, *number));
                (unit.bound, unit.end) = (NO_BOUND, 0);
            } else {
                // What is left of the unit lies before `range`, or behind it.
                let kept = (16 - unit.dirty.leading_zeros()) as u64;
                unit.end = unit.end.min((number * UNIT_BLOCKS + kept) << BLOCK_SHIFT);
            }
            if unit.resident() == 0 {
                empty.push(*number);
            } else if !unit.is_busy() {
                self.cache.list(&unit.tag, file.priority());
            }
        }
        state.dirty_pages -= undone;
        state.pool -= undone;
        self.remove(&mut state, &empty, dropped);
        self.recount(&mut state, file);
        undone
    }

    fn remove(&self, state: &mut State, empty: &[u64], dropped: u64) {
        for number in empty {
            if let Some(unit) = state.units.remove(number) {
                self.cache.forget(&unit.tag);
            }
        }
        self.cache.resident.fetch_sub(dropped, Ordering::Relaxed);
    }

    /// Drops a unit to make room, if it is clean.
    pub(super) fn evict(&self, tag: &Arc<Tag>) -> Evicted {
        let mut state = self.state.lock();
        match state.units.get(&tag.unit) {
            Some(unit) if !Arc::ptr_eq(&unit.tag, tag) => return Evicted::Stale,
            None => return Evicted::Stale,
            Some(unit) if unit.is_busy() => return Evicted::Busy,
            Some(unit) => self.cache.resident.fetch_sub(unit.resident(), Ordering::Relaxed),
        };
        state.units.remove(&tag.unit);
        Evicted::Gone
    }

    /// Waits until whoever is changing pages is done.
    pub(crate) fn settle(&self) {
        drop(self.state.lock());
    }
}

/// Takes the pages of `mask` out of a unit; returns how many there were.
fn drop_pages(unit: &mut Unit, mask: u16) -> u64 {
    let mut dropped = 0;
    for (slot, page) in unit.pages.iter_mut().enumerate().filter(|(slot, _)| mask >> slot & 1 == 1) {
        dropped += u64::from(page.take().is_some());
        unit.seen &= !(1 << slot);
    }
    dropped
}

impl Drop for FilePages {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        debug_assert!(
            state.pool + state.dirty_pages + state.writeback_pages == 0 || std::thread::panicking(),
            "a file leaves memory with {} dirty pages, {} in write-back and {} reserved",
            state.dirty_pages,
            state.writeback_pages,
            state.pool
        );
        let resident: u64 = state.units.values().map(Unit::resident).sum();
        self.cache.resident.fetch_sub(resident, Ordering::Relaxed);
        for unit in state.units.values() {
            self.cache.forget(&unit.tag);
        }
    }
}
