//! The structure: its state, its figures, and how groups and regions come into memory and leave it.

use std::collections::VecDeque;
use std::fmt;

use smallvec::SmallVec;

use super::bits::BitTree;
use super::commit::{Commit, DirtyQueue, Freed};
use super::format;
use super::group::{GROUP_BYTES, Group, REGIONS, Standing};
use super::index::{Index, class_of};
use super::place::StreamState;
use super::region::{BITS, Region, Span, WORDS};
use super::runs::SpareChunks;
use super::{
    GROUP_SHIFT, GroupId, MAX_BLOCKS, Need, REGION_BLOCKS, REGION_SHIFT, RegionId, SpaceError, Stream,
    group_of,
};
use crate::types::{BlockAddr, Generation, Run};

/// Figures of an allocator, in blocks. `free = available_now + pending`; in use = `total - free`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// The address space.
    pub total: u64,
    /// Everything to which nothing refers once the frees so far are committed: what statfs reports.
    pub free: u64,
    /// May be handed out now.
    pub available_now: u64,
    /// Freed, but not available before a commit is durable and unread.
    pub pending: u64,
}

/// The space allocator. See the module's documentation.
pub struct Allocator {
    pub(super) total: u64,
    pub(super) groups: Vec<Option<Group>>,
    /// Groups whose counts are not in memory.
    pub(super) unloaded: BitTree,
    /// Free blocks that the groups in `unloaded` must have together.
    unloaded_free: u64,
    /// Regions without an owner, by available blocks.
    pub(super) by_count: Index,
    /// Regions without an owner, by the bound of their longest available run.
    pub(super) by_run: Index,
    pub(super) streams: [StreamState; Stream::COUNT],
    /// Blocks clear in `persist`: frozen and unpublished ones included, queued frees not.
    pub(super) free_persist: u64,
    /// Blocks clear in `persist` that may not be handed out.
    pub(super) frozen: u64,
    /// Frees that wait for `begin_commit`, by generation (one or two).
    pub(super) pending: SmallVec<[Freed; 2]>,
    pub(super) pending_blocks: u64,
    /// Frees that wait for `release`, oldest generation first.
    pub(super) frozen_runs: VecDeque<Freed>,
    pub(super) spare: SpareChunks,
    pub(super) dirty_regions: DirtyQueue,
    pub(super) dirty_groups: DirtyQueue,
    /// Regions taken out of the dirty queue since the last commit ended: they stay loaded until it ends.
    pub(super) popped: Vec<u32>,
    /// The commit between `begin_commit` and `end_commit`.
    pub(super) commit: Option<Commit>,
    /// Generation of the last commit that was begun.
    pub(super) last_commit: Generation,
    /// Regions in memory, in no order; the eviction clock's hand points into it.
    pub(super) loaded: Vec<u32>,
    hand: usize,
}

impl Allocator {
    /// An allocator over `total_blocks` blocks of which `free_blocks` are free, as the superblock says
    /// ([`Allocator::persisted_free`] of the last commit; at format all of them). Nothing is loaded.
    ///
    /// # Errors
    /// [`SpaceError::Geometry`].
    pub fn new(total_blocks: u64, free_blocks: u64) -> Result<Allocator, SpaceError> {
        if total_blocks == 0 || total_blocks > MAX_BLOCKS || free_blocks > total_blocks {
            return Err(SpaceError::Geometry { total: total_blocks, free: free_blocks });
        }
        let groups = total_blocks.div_ceil(REGION_BLOCKS << GROUP_SHIFT) as usize;
        let mut unloaded = BitTree::new(groups);
        (0..groups).for_each(|group| unloaded.set(group));
        Ok(Allocator {
            total: total_blocks,
            groups: (0..groups).map(|_| None).collect(),
            unloaded,
            unloaded_free: free_blocks,
            by_count: Index::new(groups),
            by_run: Index::new(groups),
            streams: Default::default(),
            free_persist: free_blocks,
            frozen: 0,
            pending: SmallVec::new(),
            pending_blocks: 0,
            frozen_runs: VecDeque::new(),
            spare: SpareChunks::default(),
            dirty_regions: DirtyQueue::default(),
            dirty_groups: DirtyQueue::default(),
            popped: Vec::new(),
            commit: None,
            last_commit: Generation(0),
            loaded: Vec::new(),
            hand: 0,
        })
    }

    /// The figures of this moment.
    pub fn counts(&self) -> Counts {
        Counts {
            total: self.total,
            free: self.free_persist + self.pending_blocks,
            available_now: self.available(),
            pending: self.frozen + self.pending_blocks,
        }
    }

    /// Free blocks as the values encoded now would say, for the superblock. Read between the end of the encoding loop
    /// and [`Allocator::end_commit`].
    pub fn persisted_free(&self) -> u64 {
        self.free_persist
    }

    /// Number of regions of the address space.
    pub fn regions(&self) -> u32 {
        self.total.div_ceil(REGION_BLOCKS) as u32
    }

    /// Number of groups of the address space.
    pub fn groups(&self) -> u32 {
        self.groups.len() as u32
    }

    /// The blocks of a region, if it exists.
    pub fn region_run(&self, region: RegionId) -> Option<Run> {
        (region.0 < self.regions()).then(|| {
            Run::new(BlockAddr(u64::from(region.0) << REGION_SHIFT), self.region_blocks(region.0).into())
        })
    }

    /// Whether this is in memory.
    pub fn is_loaded(&self, need: Need) -> bool {
        match need {
            Need::Group(group) => self.groups.get(group.0 as usize).is_some_and(Option::is_some),
            Need::Region(region) => self.region(region.0).is_some(),
        }
    }

    /// Regions in memory now (about 2.1 KiB each).
    pub fn loaded_regions(&self) -> usize {
        self.loaded.len()
    }

    /// Bytes of memory, approximately.
    pub fn memory_bytes(&self) -> usize {
        let groups = self.groups.iter().flatten().count();
        let lists = self.pending.iter().chain(&self.frozen_runs).map(|freed| freed.runs.memory());
        let lists = lists.sum::<usize>() + self.spare.memory();
        self.loaded.len() * (size_of::<Region>() + size_of::<u32>())
            + groups * GROUP_BYTES
            + self.by_count.memory()
            + self.by_run.memory()
            + lists
            + size_of::<Allocator>()
    }

    // ---- loading and eviction

    /// Takes in the stored free counts of a group; `None` if nothing is stored. No effect if it is loaded.
    ///
    /// # Errors
    /// The value is damaged, contradicts the superblock, or the group does not exist; nothing is loaded then.
    pub fn load_group(&mut self, group: GroupId, value: Option<&[u8]>) -> Result<(), SpaceError> {
        let at = group.0 as usize;
        if at >= self.groups.len() {
            return Err(SpaceError::NoSuch(Need::Group(group)));
        }
        if self.groups[at].is_some() {
            return Ok(());
        }
        let first = group.0 << GROUP_SHIFT;
        let count = ((self.regions() - first) as usize).min(REGIONS);
        let blocks_of = |i| self.region_blocks(first + i as u32);
        let free = match value {
            Some(value) => format::decode_group(value, count, blocks_of)
                .map_err(|what| SpaceError::BadGroup { group, what })?,
            None => std::array::from_fn(|i| if i < count { blocks_of(i) as u16 } else { 0 }),
        };
        let sum: u64 = free.iter().map(|&free| u64::from(free)).sum();
        let last = self.unloaded.next(0) == Some(at) && self.unloaded.next(at + 1).is_none();
        let left = self.unloaded_free.checked_sub(sum).filter(|&left| !last || left == 0);
        let Some(left) = left else {
            return Err(SpaceError::TotalMismatch { group, left: self.unloaded_free });
        };
        self.unloaded_free = left;
        self.unloaded.clear(at);
        self.groups[at] = Some(Group::new(&free[..count]));
        for region in first..first + count as u32 {
            self.enter_indices(region);
        }
        Ok(())
    }

    /// Takes in the stored bitmap of a region; `None` if nothing is stored. Its group must be loaded. No effect if it is
    /// loaded.
    ///
    /// # Errors
    /// The value is damaged or contradicts the group's count, the region does not exist, or its group is not loaded;
    /// nothing is loaded then.
    pub fn load_region(&mut self, region: RegionId, value: Option<&[u8]>) -> Result<(), SpaceError> {
        if region.0 >= self.regions() {
            return Err(SpaceError::NoSuch(Need::Region(region)));
        }
        let blocks = self.region_blocks(region.0);
        let group = group_of(region);
        let Some(counts) = self.groups[group.0 as usize].as_mut() else {
            return Err(SpaceError::NotLoaded(Need::Group(group)));
        };
        let i = region.0 as usize % REGIONS;
        if counts.region(i).is_some() {
            return Ok(());
        }
        let (persist, used) = match value {
            Some(value) => {
                format::decode_region(value, blocks).map_err(|what| SpaceError::BadRegion { region, what })?
            }
            None => ([0; WORDS], 0),
        };
        let (bitmap, summary) = (blocks - used, counts.free(i));
        if bitmap != summary {
            return Err(SpaceError::CountMismatch { region, bitmap: bitmap.into(), summary: summary.into() });
        }
        counts.attach(i, Region::from_persist(&persist, blocks));
        self.loaded.push(region.0);
        Ok(())
    }

    /// Drops bitmaps of regions until at most `max_loaded_regions` are in memory, as far as there are regions that are
    /// clean (stored by a commit that has ended), not a stream's own, and without frozen blocks; recently used ones last. Counts stay. Does nothing during a
    /// commit. Not to be called between a [`super::Stop::Load`] and the repeated call.
    pub fn evict_clean(&mut self, max_loaded_regions: usize) {
        if self.commit.is_some() {
            return;
        }
        // The work is bounded by what is to be evicted, not by what is loaded; a later call goes on from the hand.
        let excess = self.loaded.len().saturating_sub(max_loaded_regions);
        let mut steps = (excess * 8 + 64).min(self.loaded.len() * 2);
        while steps > 0 && self.loaded.len() > max_loaded_regions {
            steps -= 1;
            if self.hand >= self.loaded.len() {
                self.hand = 0;
            }
            let region = self.loaded[self.hand];
            let (group, i) = split_mut(&mut self.groups, region).expect("a loaded region has its group");
            if group.untouch(i) || !group.is_idle(i) {
                self.hand += 1;
            } else {
                group.detach(i);
                self.loaded.swap_remove(self.hand);
            }
        }
    }

    // ---- questions for check tools

    /// Whether `persist` says that a block is in use.
    ///
    /// # Errors
    /// Out of range, or its region is not loaded.
    pub fn is_used(&self, addr: BlockAddr) -> Result<bool, SpaceError> {
        let run = Run::new(addr, 1);
        self.check_range(run)?;
        let (region, span) = pieces(run).next().expect("a run of one block has a piece");
        let loaded = self.region(region).ok_or_else(|| self.missing(region))?;
        Ok(loaded.is_used(span))
    }

    /// The runs of a region that `persist` says are in use, ascending, not touching.
    ///
    /// # Errors
    /// The region does not exist or is not loaded.
    pub fn used_runs(&self, region: RegionId) -> Result<UsedRuns, SpaceError> {
        if region.0 >= self.regions() {
            return Err(SpaceError::NoSuch(Need::Region(region)));
        }
        let loaded = self.region(region.0).ok_or_else(|| self.missing(region.0))?;
        Ok(UsedRuns { persist: Box::new(loaded.persist()), base: u64::from(region.0) << REGION_SHIFT, at: 0 })
    }

    // ---- shared by the other files

    pub(super) fn available(&self) -> u64 {
        self.free_persist.saturating_sub(self.frozen)
    }

    pub(super) fn region_blocks(&self, region: u32) -> u32 {
        (self.total - (u64::from(region) << REGION_SHIFT)).min(REGION_BLOCKS) as u32
    }

    pub(super) fn region(&self, region: u32) -> Option<&Region> {
        self.groups.get((region >> GROUP_SHIFT) as usize)?.as_ref()?.region(region as usize % REGIONS)
    }

    /// The group of a region and its place in it, if the group is loaded.
    pub(super) fn group(&self, region: u32) -> Option<(&Group, usize)> {
        Some((self.groups.get((region >> GROUP_SHIFT) as usize)?.as_ref()?, region as usize % REGIONS))
    }

    /// What has to be loaded before this region's bits can be used.
    pub(super) fn need(&self, region: u32) -> Option<Need> {
        match self.group(region) {
            None => Some(Need::Group(group_of(RegionId(region)))),
            Some((group, i)) => group.region(i).is_none().then_some(Need::Region(RegionId(region))),
        }
    }

    pub(super) fn missing(&self, region: u32) -> SpaceError {
        SpaceError::NotLoaded(self.need(region).unwrap_or(Need::Region(RegionId(region))))
    }

    pub(super) fn check_range(&self, run: Run) -> Result<(), SpaceError> {
        match run.start.0.checked_add(run.len) {
            Some(end) if run.len > 0 && end <= self.total => Ok(()),
            _ => Err(SpaceError::OutOfRange { run, total: self.total }),
        }
    }

    /// Changes a loaded region through its group, then brings the indices up to date.
    pub(super) fn change(&mut self, region: u32, change: impl FnOnce(&mut Group, usize)) {
        let (group, i) = split_mut(&mut self.groups, region).expect("bits change only in a loaded group");
        let before = group.standing(i);
        change(group, i);
        let after = group.standing(i);
        if group.owner(i).is_none() {
            self.reindex(region, before, after);
        }
    }

    fn reindex(&mut self, region: u32, before: Standing, after: Standing) {
        self.by_count.shift(region, class_of(before.avail.into()), class_of(after.avail.into()));
        self.by_run.shift(region, class_of(before.longest.into()), class_of(after.longest.into()));
    }

    pub(super) fn enter_indices(&mut self, region: u32) {
        let standing = self.standing(region);
        self.by_count.insert(region, class_of(standing.avail.into()));
        self.by_run.insert(region, class_of(standing.longest.into()));
    }

    pub(super) fn leave_indices(&mut self, region: u32) {
        let standing = self.standing(region);
        self.by_count.remove(region, class_of(standing.avail.into()));
        self.by_run.remove(region, class_of(standing.longest.into()));
    }

    fn standing(&self, region: u32) -> Standing {
        let (group, i) = self.group(region).expect("a region with a standing has its group");
        group.standing(i)
    }

    /// Notes that a region and its group differ from what was encoded last.
    pub(super) fn mark_dirty(&mut self, region: u32) {
        let (group, i) = split_mut(&mut self.groups, region).expect("bits change only in a loaded group");
        if !group.set_dirty(i, true) {
            self.dirty_regions.push(region);
        }
        if !group.dirty {
            group.dirty = true;
            self.dirty_groups.push(region >> GROUP_SHIFT);
        }
    }
}

impl fmt::Debug for Allocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Allocator")
            .field("counts", &self.counts())
            .field("loaded_regions", &self.loaded.len())
            .field("last_commit", &self.last_commit)
            .finish_non_exhaustive()
    }
}

/// Iterator of [`Allocator::used_runs`]; it works on a copy of the bitmap.
#[derive(Clone, Debug)]
pub struct UsedRuns {
    persist: Box<[u64; WORDS]>,
    base: u64,
    at: u32,
}

impl Iterator for UsedRuns {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let span = if self.at < BITS { format::next_used(&self.persist, self.at)? } else { return None };
        self.at = span.start + span.len;
        Some(Run::new(BlockAddr(self.base + u64::from(span.start)), span.len.into()))
    }
}

/// The loaded group of a region and its place in it, borrowing nothing else.
pub(super) fn split_mut(groups: &mut [Option<Group>], region: u32) -> Option<(&mut Group, usize)> {
    Some((groups.get_mut((region >> GROUP_SHIFT) as usize)?.as_mut()?, region as usize % REGIONS))
}

/// A run that is in range, cut at the regions' borders: region and place in it.
pub(super) fn pieces(run: Run) -> impl Iterator<Item = (u32, Span)> {
    let end = run.start.0 + run.len;
    let mut at = run.start.0;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (region, start) = ((at >> REGION_SHIFT) as u32, (at % REGION_BLOCKS) as u32);
        let len = (end - at).min(u64::from(BITS - start));
        at += len;
        Some((region, Span { start, len: len as u32 }))
    })
}

/// A piece of a region as a run of the address space.
pub(super) fn run_of(region: u32, span: Span) -> Run {
    Run::new(BlockAddr((u64::from(region) << REGION_SHIFT) + u64::from(span.start)), span.len.into())
}
