//! Where the next blocks come from.
//!
//! # The search, in order ([`Allocator::allocate`])
//!
//! 1. At the hint, if its blocks are available and no other stream fills that region (`allocate_at`).
//! 2. In the stream's own region: right after the stream's last run, else the first run that is long enough from there on
//!    (`fit_own`). This is the whole path of nearly every call; it touches no index.
//! 3. In another region, which becomes the stream's own (`elsewhere`): one that [`Allocator::ensure_ready`] set aside; for
//!    few blocks the region with the most available ones, so that it lasts; for many the region with the longest run. "Most"
//!    means the highest class of the index, and in it the next region upward, so that an empty device fills in order.
//! 4. If nothing long enough turned up within [`SEARCH_REGIONS`] regions: a run of the longest class that is known
//!    (`longest_known`).
//! 5. Any run of the minimum length: remaining groups are loaded, and other streams' regions are used as far as they were
//!    not promised (`borrow_from_streams`).
//!
//! Each region that is searched in vain gets its exact longest run noted, which moves it down in the index; only a free can
//! move it up again. So the same region is not searched in vain twice, and vain searches are paid for by frees.

use smallvec::SmallVec;

use super::index::{class_above, class_of};
use super::region::Span;
use super::space::{Allocator, pieces, run_of, split_mut};
use super::{GROUP_SHIFT, GroupId, Need, REGION_BLOCKS, SpaceError, Stop, Stream};
use crate::types::{BlockAddr, Run};

/// Regions searched for a run of the wanted length before a shorter one will do.
const SEARCH_REGIONS: u32 = 4;
/// Up to this many blocks a region is chosen by its free count, above by its longest run.
const SMALL_WANT: u32 = 8;
/// A piece of this many blocks (256 KiB) right after the last run, or of half of what is wanted, is better than going
/// elsewhere.
const WORTHWHILE: u32 = 64;
/// Members of a class looked at for one whose figure is just large enough.
const CLASS_PROBES: u32 = 4;
/// When so many available blocks are left in the region that a stream fills, what moving to the next one will touch is asked for.
const LOOK_AHEAD: u64 = 16;
/// A region of at least this class (2048 free blocks) is good enough not to look into another group.
const GOOD_CLASS: usize = 12;

/// A stream's own regions and where it stands in them.
#[derive(Debug, Default)]
pub(super) struct StreamState {
    /// The region it fills.
    pub(super) region: Option<u32>,
    /// Position in it after the last run; may be its end.
    pub(super) cursor: u32,
    /// Loaded regions set aside to be filled next.
    pub(super) ready: SmallVec<[u32; 8]>,
    /// Single blocks that can still be allocated without a stop. Other streams keep away from them.
    pub(super) promise: u64,
    /// The region that it will probably move to. Means nothing but speed.
    ahead: Option<u32>,
    /// The search that is under way across [`Stop::Load`]s; reset by each success.
    search: Search,
}

#[derive(Debug, Default)]
struct Search {
    /// Regions searched in vain.
    spent: u32,
    /// The longest run seen.
    best: Option<(u32, u32)>,
    /// A further group was asked for in the hope of a better region.
    asked: bool,
}

impl StreamState {
    pub(super) fn owned(&self) -> impl Iterator<Item = u32> {
        self.region.into_iter().chain(self.ready.iter().copied())
    }
}

impl Allocator {
    /// Hands out between `min` and `want` blocks (1 <= `min` <= `want`), in one run that does not cross a region.
    ///
    /// `hint` is where the caller would like the run to begin (the end of the file's previous extent); it is an offer that
    /// never causes loading. Less than `want` is returned only if no run of that length turned up within a bounded search.
    /// The blocks count as in use by the next commit, unless that is told that they are unpublished.
    ///
    /// # Errors
    /// [`Stop::Load`]: load it and call again. [`Stop::NoSpace`]: no run of `min` blocks is available now (exact for `min`
    /// a power of two; for others a run between `min` and the next power of two may be missed).
    pub fn allocate(
        &mut self,
        stream: Stream,
        want: u64,
        min: u64,
        hint: Option<BlockAddr>,
    ) -> Result<Run, Stop> {
        assert!(1 <= min && min <= want, "allocation of {want} blocks, at least {min}");
        let s = stream as usize;
        if min > REGION_BLOCKS || min > self.accessible(s) {
            return Err(Stop::NoSpace);
        }
        let (want, min) = (want.min(REGION_BLOCKS) as u32, min as u32);
        if let Some(at) = hint
            && let Some(run) = self.allocate_at(s, at, want, min)
        {
            return Ok(run);
        }
        match self.fit_own(s, want, min) {
            Some((region, span)) => Ok(self.take(s, region, span)),
            None => self.elsewhere(s, want, min),
        }
    }

    /// Makes sure that the next `blocks` single-block allocations of the stream succeed without a stop, whatever other
    /// streams allocate. Replaces the promise of the call before; 0 ends it.
    ///
    /// # Errors
    /// [`Stop::Load`]: load it and call again. [`Stop::NoSpace`]: not that many blocks are available now.
    pub fn ensure_ready(&mut self, stream: Stream, blocks: u64) -> Result<(), Stop> {
        let s = stream as usize;
        self.streams[s].promise = 0;
        if blocks > self.accessible(s) {
            return Err(Stop::NoSpace);
        }
        let mut have = self.owned_available(s);
        while have < blocks {
            let Some(region) = self.freest(s, false)? else {
                have = self.take_over(s).ok_or(Stop::NoSpace)?;
                continue;
            };
            self.own(s, region);
            self.streams[s].ready.push(region);
            have += self.available_in(region);
        }
        self.streams[s].promise = blocks;
        Ok(())
    }

    /// Marks a given run as in use: the superblock slots at format, and the blocks that log replay finds referenced.
    ///
    /// # Errors
    /// Out of range, a region not loaded, or a block that is not free; nothing is changed then.
    pub fn mark_used(&mut self, run: Run) -> Result<(), SpaceError> {
        self.check_range(run)?;
        for (region, span) in pieces(run) {
            let loaded = self.region(region).ok_or_else(|| self.missing(region))?;
            if !loaded.is_available(span) {
                return Err(SpaceError::NotFree(run));
            }
        }
        for (region, span) in pieces(run) {
            self.occupy(region, span);
        }
        Ok(())
    }

    // ---- the steps of the search

    /// Step 1.
    fn allocate_at(&mut self, s: usize, at: BlockAddr, want: u32, min: u32) -> Option<Run> {
        self.check_range(Run::new(at, 1)).ok()?;
        let (region, Span { start, .. }) = pieces(Run::new(at, 1)).next()?;
        let loaded = self.region(region)?;
        if !self.may_use(s, region) {
            return None;
        }
        let len = loaded.available_from(start, want);
        if !worthwhile(len, want, min) {
            return None;
        }
        let own = self.streams[s].region == Some(region);
        let cursor = self.streams[s].cursor;
        let run = self.take(s, region, Span { start, len });
        if !own {
            self.streams[s].cursor = cursor;
        }
        Some(run)
    }

    /// Step 2.
    fn fit_own(&mut self, s: usize, want: u32, min: u32) -> Option<(u32, Span)> {
        let StreamState { region, cursor, .. } = self.streams[s];
        let region = region?;
        let (group, i) = split_mut(&mut self.groups, region)?;
        let loaded = group.region(i).expect("a stream's region stays loaded");
        if want == 1 {
            return loaded.find(cursor, 1).map(|start| (region, Span { start, len: 1 }));
        }
        let len = loaded.available_from(cursor, want);
        if worthwhile(len, want, min) {
            return Some((region, Span { start: cursor, len }));
        }
        if group.longest(i) < want {
            return None;
        }
        match loaded.find(cursor, want) {
            Some(start) => Some((region, Span { start, len: want })),
            None => {
                let longest = loaded.longest().len;
                group.set_longest(i, longest);
                None
            }
        }
    }

    /// Steps 3 to 5.
    #[cold]
    #[inline(never)]
    fn elsewhere(&mut self, s: usize, want: u32, min: u32) -> Result<Run, Stop> {
        if let Some((region, span)) = self.fit_ready(s, want) {
            return Ok(self.move_and_take(s, region, span));
        }
        let found = if want <= SMALL_WANT { self.fit_freest(s, want)? } else { None };
        let found = match found {
            Some(found) => Some(found),
            None => self.fit_longest(s, want)?,
        };
        if let Some((region, span)) = found {
            return Ok(self.move_and_take(s, region, span));
        }
        if let Some((region, span)) = self.longest_known(s, want, min)? {
            return Ok(self.move_and_take(s, region, span));
        }
        if let Some((region, span)) = self.any_run(s, min, want)? {
            return Ok(self.move_and_take(s, region, span));
        }
        if let Some(group) = self.unloaded_group(s) {
            return Err(group);
        }
        match self.borrow_from_streams(s, want, min) {
            Some((region, span)) => {
                self.occupy(region, span);
                self.settle(s, span.len);
                Ok(run_of(region, span))
            }
            None => {
                self.streams[s].search = Search::default();
                Err(Stop::NoSpace)
            }
        }
    }

    /// Step 3 among the regions set aside. Empty ones are given back.
    fn fit_ready(&mut self, s: usize, want: u32) -> Option<(u32, Span)> {
        let mut at = 0;
        while at < self.streams[s].ready.len() {
            let region = self.streams[s].ready[at];
            if self.available_in(region) == 0 {
                self.streams[s].ready.swap_remove(at);
                self.disown(region);
                continue;
            }
            if let Ok(start) = self.search(region, want) {
                return Some((region, Span { start, len: want }));
            }
            at += 1;
        }
        None
    }

    /// Step 3 for few blocks: by free count.
    fn fit_freest(&mut self, s: usize, want: u32) -> Result<Option<(u32, Span)>, Stop> {
        match self.freest(s, true)? {
            Some(region) => Ok(self.try_region(s, region, want)),
            None => Ok(None),
        }
    }

    /// Step 3 for many blocks: by longest run.
    fn fit_longest(&mut self, s: usize, want: u32) -> Result<Option<(u32, Span)>, Stop> {
        while self.streams[s].search.spent < SEARCH_REGIONS {
            let Some(class) = self.by_run.highest() else { break };
            let found = if class >= class_above(want) {
                self.by_run.next(class, self.after(s))
            } else {
                self.probe_class(class_of(want), self.after(s), want)
            };
            let Some(region) = found else { break };
            if let Some(need) = self.need(region) {
                return Err(Stop::Load(need));
            }
            if let Some(found) = self.try_region(s, region, want) {
                return Ok(Some(found));
            }
        }
        self.ask_for_group(s, self.by_run.highest().unwrap_or(0))?;
        Ok(None)
    }

    /// Step 4: a run of the own regions' longest class, unless a region with a run of a higher class is found; then that.
    fn longest_known(&mut self, s: usize, want: u32, min: u32) -> Result<Option<(u32, Span)>, Stop> {
        loop {
            let own = self.longest_owned(s);
            let own_class = own.map_or(0, |(_, bound)| class_of(bound));
            self.seek_longest(s, own_class)?;
            let seen = self.streams[s].search.best.filter(|&(region, len)| {
                // The region may have gone to another stream, or out of memory, while something was loaded.
                class_of(len) > own_class && self.region(region).is_some() && self.may_use(s, region)
            });
            if let Some((region, _)) = seen {
                let span = self.measure(region);
                return Ok((span.len >= min)
                    .then_some((region, Span { start: span.start, len: span.len.min(want) })));
            }
            let Some((region, bound)) = own.filter(|&(_, bound)| bound >= min) else { return Ok(None) };
            let from = if self.streams[s].region == Some(region) { self.streams[s].cursor } else { 0 };
            let loaded = self.region(region).expect("a stream's region stays loaded");
            // The largest power of two within the bound: more than half of the longest run, and found without measuring.
            if let Some(start) = loaded.find(from, min.max(1 << bound.ilog2())) {
                return Ok(Some((region, Span { start, len: loaded.available_from(start, want) })));
            }
            // The bound was too high. It is exact now, so that this region is not measured a second time.
            self.measure(region);
        }
    }

    /// Of the stream's own regions the one with the highest bound (> 0) of its longest run, and the bound.
    fn longest_owned(&self, s: usize) -> Option<(u32, u32)> {
        let bound = |region| self.group(region).map_or(0, |(group, i)| group.longest(i));
        let owned = self.streams[s].owned().map(|region| (region, bound(region)));
        owned.filter(|&(_, bound)| bound > 0).max_by_key(|&(_, bound)| bound)
    }

    /// Measures regions whose longest run may be of a class above `floor`, within the bounds of the search, until one keeps
    /// its class; those with less go down in the index. The best is kept in the search.
    fn seek_longest(&mut self, s: usize, floor: usize) -> Result<(), Stop> {
        while let Some(class) = self.by_run.highest().filter(|&class| class > floor) {
            let Some(region) = self.by_run.next(class, self.after(s)) else { break };
            if self.streams[s].search.spent >= SEARCH_REGIONS {
                break;
            }
            if let Some(need) = self.need(region) {
                return Err(Stop::Load(need));
            }
            let len = self.measure(region).len;
            self.note_vain(s, region, len);
            if class_of(len) == class {
                break;
            }
        }
        Ok(())
    }

    /// Step 5 among the regions of loaded groups: any run of at least `min`, however long it takes.
    fn any_run(&mut self, s: usize, min: u32, want: u32) -> Result<Option<(u32, Span)>, Stop> {
        loop {
            let highest = self.by_run.highest().unwrap_or(0);
            let found = if highest >= class_above(min) {
                self.by_run.next(highest, self.after(s))
            } else {
                self.probe_class(class_of(min), self.after(s), min)
            };
            let Some(region) = found else { return Ok(None) };
            if let Some(need) = self.need(region) {
                return Err(Stop::Load(need));
            }
            let span = self.measure(region);
            if span.len >= min {
                return Ok(Some((region, Span { start: span.start, len: span.len.min(want) })));
            }
        }
    }

    /// Step 5 in the regions of other streams, leaving them what they were promised.
    fn borrow_from_streams(&mut self, s: usize, want: u32, min: u32) -> Option<(u32, Span)> {
        for other in (0..Stream::COUNT).filter(|&other| other != s) {
            let spare =
                self.owned_available(other) - self.streams[other].promise.min(self.owned_available(other));
            let want = want.min(u32::try_from(spare).unwrap_or(u32::MAX));
            if want < min {
                continue;
            }
            let regions: SmallVec<[u32; 8]> = self.streams[other].owned().collect();
            for region in regions {
                if let Ok(start) = self.search(region, want) {
                    return Some((region, Span { start, len: want }));
                }
                let span = self.measure(region);
                if span.len >= min {
                    return Some((region, Span { start: span.start, len: span.len.min(want) }));
                }
            }
        }
        None
    }

    // ---- picking regions

    /// The region to move to for single blocks: the next one of those with the most available blocks. With `optional`, a
    /// further group is asked for once if none is good. `None`: there is none in loaded groups, and none are unloaded.
    fn freest(&mut self, s: usize, optional: bool) -> Result<Option<u32>, Stop> {
        let class = self.by_count.highest().unwrap_or(0);
        if optional {
            self.ask_for_group(s, class)?;
        }
        match self.by_count.next(class, self.after(s)) {
            Some(region) => match self.need(region) {
                Some(need) => Err(Stop::Load(need)),
                None => Ok(Some(region)),
            },
            None if optional => Ok(None),
            None => self.unloaded_group(s).map_or(Ok(None), Err),
        }
    }

    /// Asks for one further group a search, if the best class known is not good.
    fn ask_for_group(&mut self, s: usize, best_class: usize) -> Result<(), Stop> {
        if best_class < GOOD_CLASS
            && !self.streams[s].search.asked
            && let Some(group) = self.unloaded_group(s)
        {
            self.streams[s].search.asked = true;
            return Err(group);
        }
        Ok(())
    }

    fn unloaded_group(&self, s: usize) -> Option<Stop> {
        let near = (self.after(s) >> GROUP_SHIFT) as usize;
        let group = self.unloaded.next_wrapping(near)?;
        Some(Stop::Load(Need::Group(GroupId(group as u32))))
    }

    /// Among the first few members of a class, one whose longest run may have `want` blocks.
    fn probe_class(&self, class: usize, from: u32, want: u32) -> Option<u32> {
        let first = self.by_run.next(class, from)?;
        let mut region = first;
        for _ in 0..CLASS_PROBES {
            let (group, i) = self.group(region)?;
            if group.longest(i) >= want {
                return Some(region);
            }
            region = self.by_run.next(class, region + 1)?;
            if region == first {
                break;
            }
        }
        None
    }

    /// Searches a loaded region for `want` blocks; a vain search is counted, and its result kept.
    fn try_region(&mut self, s: usize, region: u32, want: u32) -> Option<(u32, Span)> {
        match self.search(region, want) {
            Ok(start) => Some((region, Span { start, len: want })),
            Err(longest) => {
                self.note_vain(s, region, longest);
                None
            }
        }
    }

    fn note_vain(&mut self, s: usize, region: u32, longest: u32) {
        let search = &mut self.streams[s].search;
        search.spent += 1;
        if search.best.is_none_or(|(_, len)| longest > len) {
            search.best = Some((region, longest));
        }
    }

    /// First position of `want` blocks in a loaded region; else the length of its longest run, which is noted.
    fn search(&mut self, region: u32, want: u32) -> Result<u32, u32> {
        let (group, i) = self.group(region).expect("only regions of loaded groups are searched");
        let found =
            if group.longest(i) >= want { group.region(i).and_then(|r| r.find(0, want)) } else { None };
        found.ok_or_else(|| self.measure(region).len)
    }

    /// The longest run of a loaded region; its length is noted.
    fn measure(&mut self, region: u32) -> Span {
        let span = self.region(region).expect("only loaded regions are measured").longest();
        self.change(region, |group, i| group.set_longest(i, span.len));
        span
    }

    /// Where the search for the stream's next region begins.
    fn after(&self, s: usize) -> u32 {
        match self.streams[s].region {
            Some(region) if region + 1 < self.regions() => region + 1,
            _ => 0,
        }
    }

    // ---- ownership

    /// No other stream fills this region.
    fn may_use(&self, s: usize, region: u32) -> bool {
        let owner = self.group(region).and_then(|(group, i)| group.owner(i));
        owner.is_none_or(|owner| usize::from(owner) == s)
    }

    fn own(&mut self, s: usize, region: u32) {
        self.leave_indices(region);
        let (group, i) = split_mut(&mut self.groups, region).expect("only loaded regions are owned");
        group.set_owner(i, Some(s as u8));
    }

    fn disown(&mut self, region: u32) {
        let (group, i) = split_mut(&mut self.groups, region).expect("an owned region is loaded");
        group.set_owner(i, None);
        self.enter_indices(region);
    }

    /// Makes `region` (unowned or set aside by this stream) the one that the stream fills. The one before goes back,
    /// unless its blocks are part of the stream's promise.
    fn move_to(&mut self, s: usize, region: u32) {
        if self.streams[s].region == Some(region) {
            return;
        }
        match self.streams[s].ready.iter().position(|&ready| ready == region) {
            Some(at) => {
                self.streams[s].ready.remove(at);
            }
            None => self.own(s, region),
        }
        if let Some(old) = self.streams[s].region.replace(region) {
            if self.streams[s].promise > 0 && self.available_in(old) > 0 {
                self.streams[s].ready.push(old);
            } else {
                self.disown(old);
            }
        }
        // The indices are in the caches now, and what they say will mostly be true then.
        let next = self.streams[s].ready.first().copied();
        let freest = || self.by_count.next(self.by_count.highest()?, self.after(s));
        self.streams[s].ahead = next.or_else(freest);
        if let Some((group, i)) = self.streams[s].ahead.and_then(|next| self.group(next)) {
            group.prefetch(i);
        }
    }

    /// Takes a region that another stream owns but was not promised; returns what this stream has then.
    fn take_over(&mut self, s: usize) -> Option<u64> {
        for other in (0..Stream::COUNT).filter(|&other| other != s) {
            let have = self.owned_available(other);
            let spare = |region: &u32| {
                let avail = self.available_in(*region);
                avail > 0 && have - avail >= self.streams[other].promise
            };
            let Some(region) = self.streams[other].owned().find(spare) else { continue };
            let state = &mut self.streams[other];
            if state.region == Some(region) {
                state.region = None;
            }
            state.ready.retain(|ready| *ready != region);
            let (group, i) = split_mut(&mut self.groups, region).expect("an owned region is loaded");
            group.set_owner(i, Some(s as u8));
            self.streams[s].ready.push(region);
            return Some(self.owned_available(s));
        }
        None
    }

    // ---- taking

    fn move_and_take(&mut self, s: usize, region: u32, span: Span) -> Run {
        self.move_to(s, region);
        self.take(s, region, span)
    }

    fn take(&mut self, s: usize, region: u32, span: Span) -> Run {
        self.occupy(region, span);
        self.settle(s, span.len);
        self.streams[s].cursor = span.start + span.len;
        if self.available_in(region) == LOOK_AHEAD {
            self.look_ahead(s);
        }
        run_of(region, span)
    }

    /// Asks for the cache lines that moving to the next region will touch. Found only when they are needed, they are a chain of
    /// cache misses, which one allocation in a few hundred would wait for.
    #[cold]
    #[inline(never)]
    fn look_ahead(&self, s: usize) {
        if let Some(next) = self.streams[s].ahead
            && let Some((group, i)) = self.group(next)
        {
            self.by_count.prefetch(next, class_of(group.avail(i)));
            self.by_run.prefetch(next, class_of(group.longest(i)));
            if let Some(region) = group.region(i) {
                region.prefetch();
            }
        }
    }

    /// Available -> in use.
    fn occupy(&mut self, region: u32, span: Span) {
        self.change(region, |group, i| group.take(i, span));
        self.free_persist -= u64::from(span.len);
        self.mark_dirty(region);
    }

    /// What a success of the stream ends: its search, and as much of its promise.
    fn settle(&mut self, s: usize, len: u32) {
        let state = &mut self.streams[s];
        state.promise = state.promise.saturating_sub(len.into());
        state.search = Search::default();
    }

    // ---- figures

    /// Blocks that the stream may take: what is available, less what was promised to others.
    fn accessible(&self, s: usize) -> u64 {
        let others: u64 =
            self.streams.iter().map(|state| state.promise).sum::<u64>() - self.streams[s].promise;
        self.available().saturating_sub(others)
    }

    pub(super) fn owned_available(&self, s: usize) -> u64 {
        self.streams[s].owned().map(|region| self.available_in(region)).sum()
    }

    fn available_in(&self, region: u32) -> u64 {
        self.group(region).map_or(0, |(group, i)| group.avail(i).into())
    }
}

/// Whether a piece at the preferred place is taken although it is shorter than wanted.
fn worthwhile(len: u32, want: u32, min: u32) -> bool {
    len >= min && len >= (want / 2).clamp(1, WORTHWHILE)
}
