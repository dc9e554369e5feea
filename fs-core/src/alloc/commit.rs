//! Freeing, and the commit's part of the freed-space rule (see the module's documentation for both).

use smallvec::SmallVec;

use super::runs::RunList;
use super::space::{Allocator, pieces, split_mut};
use super::{GROUP_SHIFT, GroupId, Need, RegionId, SpaceError};
use super::{format, group::REGIONS, region::Region};
use crate::types::{BlockAddr, Generation, Run};

/// Runs whose words are read ahead together.
const WARM: usize = 32;

/// Runs freed in a generation.
#[derive(Debug)]
pub(super) struct Freed {
    pub(super) generation: Generation,
    pub(super) runs: RunList,
}

/// A commit between `begin_commit` and `end_commit`.
#[derive(Debug)]
pub(super) struct Commit {
    pub(super) generation: Generation,
    /// In use in memory, encoded as free; `persist` has them clear until the commit ends.
    pub(super) unpublished: Vec<Run>,
}

/// Numbers of regions or groups that differ from what was encoded last. What is pushed while a pass is taken out waits for
/// the next pass; a pass comes out ascending, as the tree likes it. The dirty flag of each member keeps out duplicates.
#[derive(Debug, Default)]
pub(super) struct DirtyQueue {
    /// The rest of the pass, descending.
    pass: Vec<u32>,
    next: Vec<u32>,
}

impl DirtyQueue {
    pub(super) fn push(&mut self, number: u32) {
        self.next.push(number);
    }

    fn pop(&mut self) -> Option<u32> {
        if self.pass.is_empty() {
            std::mem::swap(&mut self.pass, &mut self.next);
            self.pass.sort_unstable_by(|a, b| b.cmp(a));
        }
        self.pass.pop()
    }

    pub(super) fn len(&self) -> usize {
        self.pass.len() + self.next.len()
    }
}

impl Allocator {
    // ---- freeing

    /// Gives back blocks that nothing durable ever referred to, and nobody reads: a write that failed, a node dropped
    /// before any commit wrote it. They are available at once. A run that a log record may name is not of this kind.
    ///
    /// # Errors
    /// Out of range, a region not loaded, or a block that is not allocated; nothing is changed then.
    pub fn free_now(&mut self, run: Run) -> Result<(), SpaceError> {
        self.check_allocated(run)?;
        for (region, span) in pieces(run) {
            self.change(region, |group, i| {
                group.clear_persist(i, span);
                group.make_available(i, span);
            });
            self.mark_dirty(region);
        }
        self.free_persist += run.len;
        Ok(())
    }

    /// Queues blocks that the commit of `open` (the generation that is open) stops referring to. Their regions need not be
    /// loaded. Whether they are allocated shows at [`Allocator::begin_commit`].
    ///
    /// # Errors
    /// Out of range, or a generation whose commit was begun.
    pub fn free(&mut self, run: Run, open: Generation) -> Result<(), SpaceError> {
        self.check_range(run)?;
        if open <= self.last_commit {
            return Err(SpaceError::WrongGeneration { given: open, last: self.last_commit });
        }
        let list = match self.pending.iter_mut().find(|freed| freed.generation == open) {
            Some(freed) => freed,
            None => {
                self.pending.push(Freed { generation: open, runs: RunList::default() });
                self.pending.last_mut().expect("just pushed")
            }
        };
        list.runs.push(run, &mut self.spare);
        self.pending_blocks += run.len;
        Ok(())
    }

    // ---- the commit

    /// What has to be loaded before [`Allocator::begin_commit`], at most about `max` at a time: groups and regions named by
    /// queued frees of generations up to `generation`. Load them and call again, until the answer is empty. Costs a pass
    /// over the queued frees, so `max` should not be small (1024, say).
    pub fn needs_for_commit(&self, generation: Generation, max: usize) -> Vec<Need> {
        let mut needs = Vec::new();
        for run in self.queued(generation) {
            for (region, _) in pieces(run) {
                if let Some(need) = self.need(region)
                    && needs.last() != Some(&need)
                {
                    needs.push(need);
                }
            }
            if needs.len() >= max {
                break;
            }
        }
        needs.sort_unstable();
        needs.dedup();
        needs
    }

    /// Begins the commit of `generation`: applies the frees queued for it to `persist` and freezes their blocks until
    /// [`Allocator::release`]. `unpublished` are runs handed out to which the trees of this generation do not refer
    /// (writes still on their way); they are encoded as free, and are in use again for the next generation from
    /// [`Allocator::end_commit`] on.
    ///
    /// Returns the frees that were rejected because a block of them is not allocated: some tree is damaged. Their blocks
    /// (and those of frees queued right before and after that continue them) stay as they are, so that at worst they are
    /// lost, and never handed out twice.
    ///
    /// # Errors
    /// Something named by [`Allocator::needs_for_commit`] is not loaded, an unpublished run is not allocated or named twice, the
    /// generation is not later than the last one, or a commit is running; nothing is changed then.
    pub fn begin_commit(
        &mut self,
        generation: Generation,
        unpublished: &[Run],
    ) -> Result<Vec<SpaceError>, SpaceError> {
        if self.commit.is_some() {
            return Err(SpaceError::CommitOrder("begin_commit during a commit"));
        }
        if generation <= self.last_commit {
            return Err(SpaceError::WrongGeneration { given: generation, last: self.last_commit });
        }
        if let Some(&need) = self.needs_for_commit(generation, 1).first() {
            return Err(SpaceError::NotLoaded(need));
        }
        let mut unpublished = unpublished.to_vec();
        unpublished.sort_unstable();
        for (n, &run) in unpublished.iter().enumerate() {
            self.check_allocated(run)?;
            if n > 0 && unpublished[n - 1].end() > run.start {
                return Err(SpaceError::NotAllocated(run));
            }
        }

        self.last_commit = generation;
        // Unpublished runs first: a free of one of them comes from a damaged tree, and is rejected below.
        for &run in &unpublished {
            self.exclude(run);
        }
        self.commit = Some(Commit { generation, unpublished });
        self.frozen_runs.push_back(Freed { generation, runs: RunList::default() });
        let mut rejected = Vec::new();
        let mut at = 0;
        while at < self.pending.len() {
            if self.pending[at].generation > generation {
                at += 1;
                continue;
            }
            let freed = self.pending.remove(at);
            for chunk in freed.runs.into_chunks() {
                for runs in chunk.chunks(WARM) {
                    self.warm(runs);
                    for &run in runs {
                        self.pending_blocks -= run.len;
                        if let Err(error) = self.freeze(run) {
                            log::error!("generation {generation}: {error}; the blocks stay allocated");
                            rejected.push(error);
                        }
                    }
                }
                self.spare.put(chunk);
            }
        }
        Ok(rejected)
    }

    /// Frees blocks that the running commit itself replaces (nodes of the space tree): as [`Allocator::free`] followed by
    /// its application.
    ///
    /// # Errors
    /// No commit of this generation is running, out of range, a region not loaded (load it and call again), or a block
    /// that is not allocated; nothing is changed then.
    pub fn free_in_commit(&mut self, run: Run, generation: Generation) -> Result<(), SpaceError> {
        match &self.commit {
            None => Err(SpaceError::CommitOrder("free_in_commit outside of a commit")),
            Some(commit) if commit.generation != generation => {
                Err(SpaceError::WrongGeneration { given: generation, last: self.last_commit })
            }
            Some(_) => self.freeze(run),
        }
    }

    /// The next region whose value has to be stored again, and its flag is cleared; `None`: the regions are done for now.
    /// It stays loaded until the commit ends.
    pub fn pop_dirty_region(&mut self) -> Option<RegionId> {
        let region = self.dirty_regions.pop()?;
        let (group, i) = split_mut(&mut self.groups, region).expect("a dirty region stays loaded");
        group.set_dirty(i, false);
        if !group.is_popped(i) {
            group.set_popped(i, true);
            self.popped.push(region);
        }
        Some(RegionId(region))
    }

    /// The next group whose value has to be stored again, and its flag is cleared.
    pub fn pop_dirty_group(&mut self) -> Option<GroupId> {
        let number = self.dirty_groups.pop()?;
        let (group, _) = split_mut(&mut self.groups, number << GROUP_SHIFT).expect("groups stay loaded");
        group.dirty = false;
        Some(GroupId(number))
    }

    /// Regions and groups that wait to be stored.
    pub fn dirty(&self) -> usize {
        self.dirty_regions.len() + self.dirty_groups.len()
    }

    /// Appends the value of a loaded region, at most [`super::REGION_VALUE_MAX`] bytes.
    ///
    /// # Errors
    /// It does not exist or is not loaded.
    pub fn encode_region(&self, region: RegionId, out: &mut Vec<u8>) -> Result<(), SpaceError> {
        let (loaded, used) = self.bitmap(region)?;
        format::encode_region(&loaded.persist(), used, out);
        Ok(())
    }

    /// Appends the value of a loaded region in its largest form, [`super::REGION_VALUE_MAX`] bytes: what is stored over it later
    /// is not longer.
    ///
    /// # Errors
    /// It does not exist or is not loaded.
    pub fn encode_region_largest(&self, region: RegionId, out: &mut Vec<u8>) -> Result<(), SpaceError> {
        let (loaded, used) = self.bitmap(region)?;
        format::encode_region_largest(&loaded.persist(), used, out);
        Ok(())
    }

    /// Appends the value of a loaded group, at most [`super::GROUP_VALUE_MAX`] bytes.
    ///
    /// # Errors
    /// It does not exist or is not loaded.
    pub fn encode_group(&self, group: GroupId, out: &mut Vec<u8>) -> Result<(), SpaceError> {
        let slot = self.groups.get(group.0 as usize).ok_or(SpaceError::NoSuch(Need::Group(group)))?;
        let counts = slot.as_ref().ok_or(SpaceError::NotLoaded(Need::Group(group)))?;
        let free: SmallVec<[u16; REGIONS]> = (0..counts.count()).map(|i| counts.free(i) as u16).collect();
        format::encode_group(&free, out);
        Ok(())
    }

    /// Ends the commit's use of the allocator: all values are encoded, all addresses given. Unpublished runs count as in
    /// use again, for the next commit.
    ///
    /// # Errors
    /// No commit is running, or dirty regions or groups are left; nothing is changed then.
    pub fn end_commit(&mut self) -> Result<(), SpaceError> {
        if self.dirty() > 0 {
            return Err(SpaceError::CommitOrder("end_commit with dirty regions or groups left"));
        }
        let commit = self.commit.take().ok_or(SpaceError::CommitOrder("end_commit outside of a commit"))?;
        for region in self.popped.drain(..) {
            if let Some((group, i)) = split_mut(&mut self.groups, region) {
                group.set_popped(i, false);
            }
        }
        for run in commit.unpublished {
            for (region, span) in pieces(run) {
                self.change(region, |group, i| group.set_persist(i, span));
                self.mark_dirty(region);
            }
            self.free_persist -= run.len;
            self.frozen -= run.len;
        }
        Ok(())
    }

    // ---- after the commit

    /// Generations up to `up_to` are durable and nobody reads what they freed, except `held` (sorted by start, not
    /// overlapping): all other blocks that they freed become available. Held ones stay frozen until a later call does not
    /// name them.
    ///
    /// # Errors
    /// A generation whose commit is running; nothing is changed then.
    pub fn release(&mut self, up_to: Generation, held: &[Run]) -> Result<(), SpaceError> {
        let running = self.commit.as_ref().is_some_and(|commit| commit.generation <= up_to);
        if running {
            return Err(SpaceError::WrongGeneration { given: up_to, last: self.last_commit });
        }
        debug_assert!(held.windows(2).all(|pair| pair[0].end() <= pair[1].start), "holds are sorted");
        let mut kept = Vec::new();
        while self.frozen_runs.front().is_some_and(|freed| freed.generation <= up_to) {
            let Some(Freed { generation, runs }) = self.frozen_runs.pop_front() else { break };
            let mut rest = RunList::default();
            for chunk in runs.into_chunks() {
                for runs in chunk.chunks(WARM) {
                    self.warm(runs);
                    runs.iter().for_each(|&run| self.thaw(run, held, &mut rest));
                }
                self.spare.put(chunk);
            }
            if !rest.is_empty() {
                kept.push(Freed { generation, runs: rest });
            }
        }
        kept.into_iter().rev().for_each(|freed| self.frozen_runs.push_front(freed));
        Ok(())
    }

    // ---- helpers

    /// A loaded region and its blocks in use.
    fn bitmap(&self, id: RegionId) -> Result<(&Region, u32), SpaceError> {
        if id.0 >= self.regions() {
            return Err(SpaceError::NoSuch(Need::Region(id)));
        }
        let found = self.group(id.0).and_then(|(group, i)| Some((group.region(i)?, group.free(i))));
        let (region, free) = found.ok_or_else(|| self.missing(id.0))?;
        Ok((region, region.blocks() - free))
    }

    /// Reads the words that these runs begin in, and does nothing with them. On a large aged map each is a cache miss.
    /// Reads that nothing waits for overlap; in [`Allocator::freeze`] and [`Allocator::thaw`] each miss would be waited for,
    /// since branches depend on it (which takes twice as long, by measurement).
    fn warm(&self, runs: &[Run]) {
        let word = |run: &Run| {
            let (region, span) = pieces(*run).next()?;
            Some(self.region(region)?.peek(span.start))
        };
        std::hint::black_box(runs.iter().filter_map(word).fold(0, |all, word| all ^ word));
    }

    /// Queued frees of generations up to `generation`.
    fn queued(&self, generation: Generation) -> impl Iterator<Item = Run> {
        self.pending
            .iter()
            .filter(move |freed| freed.generation <= generation)
            .flat_map(|freed| freed.runs.iter())
    }

    /// In range, loaded, all blocks in use.
    fn check_allocated(&self, run: Run) -> Result<(), SpaceError> {
        self.check_range(run)?;
        for (region, span) in pieces(run) {
            let loaded = self.region(region).ok_or_else(|| self.missing(region))?;
            if !loaded.is_used(span) {
                return Err(SpaceError::NotAllocated(run));
            }
        }
        Ok(())
    }

    /// In use -> frozen, in the running commit's generation.
    fn freeze(&mut self, run: Run) -> Result<(), SpaceError> {
        self.check_allocated(run)?;
        self.exclude(run);
        let list = &mut self.frozen_runs.back_mut().expect("begin_commit made the list").runs;
        list.push(run, &mut self.spare);
        Ok(())
    }

    /// In use -> neither in use nor available.
    fn exclude(&mut self, run: Run) {
        for (region, span) in pieces(run) {
            // Neither what is available nor the longest run changes: the indices stay as they are.
            let (group, i) = split_mut(&mut self.groups, region).expect("checked to be loaded");
            group.clear_persist(i, span);
            self.mark_dirty(region);
        }
        self.free_persist += run.len;
        self.frozen += run.len;
    }

    /// Frozen -> available for all of `run` but what is `held`, which goes to `rest`.
    fn thaw(&mut self, run: Run, held: &[Run], rest: &mut RunList) {
        let mut at = run.start.0;
        let end = run.end().0;
        let first = held.partition_point(|hold| hold.end().0 <= at);
        for hold in &held[first..] {
            let (from, to) = (hold.start.0.max(at), hold.end().0.min(end));
            if from >= end {
                break;
            }
            self.thaw_all(at, from);
            rest.push(Run::new(BlockAddr(from), to - from), &mut self.spare);
            at = to;
        }
        self.thaw_all(at, end);
    }

    fn thaw_all(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        for (region, span) in pieces(Run::new(BlockAddr(start), end - start)) {
            self.change(region, |group, i| group.make_available(i, span));
        }
        self.frozen -= end - start;
    }
}

const _: () = assert!(REGIONS == 1 << GROUP_SHIFT);
