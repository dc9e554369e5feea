//! The allocator's own consistency, from the bits up. For tests and check tools: it costs a pass over everything loaded.

use super::RegionId;
use super::group::Group;
use super::index::{CLASSES, class_of};
use super::space::{Allocator, pieces};

impl Allocator {
    /// Compares bitmaps, counts, indices, lists and ownership; the first contradiction is described.
    ///
    /// # Errors
    /// What is wrong. It is a bug: no stored value can cause it.
    pub fn check(&self) -> Result<(), String> {
        let (mut free, mut avail, mut dirty_regions, mut dirty_groups) = (0, 0, 0, 0);
        for (number, group) in self.groups.iter().enumerate() {
            if self.unloaded.get(number) == group.is_some() {
                return Err(format!("group {number}: the set of unloaded groups is wrong"));
            }
            let Some(group) = group else { continue };
            dirty_groups += usize::from(group.dirty);
            for i in 0..group.count() {
                let region = (number * super::group::REGIONS + i) as u32;
                self.check_region(group, i, region)
                    .map_err(|what| format!("{:?}: {what}", RegionId(region)))?;
                free += u64::from(group.free(i));
                avail += u64::from(group.avail(i));
                dirty_regions += usize::from(group.is_dirty(i));
            }
        }
        if self.unloaded.is_empty() && free != self.free_persist {
            return Err(format!("{free} free blocks by groups, {} in all", self.free_persist));
        }
        let listed = self.check_lists()?;
        if listed != self.frozen {
            return Err(format!("{listed} frozen blocks in lists, {} counted", self.frozen));
        }
        if free - avail != self.frozen {
            return Err(format!("{} frozen blocks by groups, {} counted", free - avail, self.frozen));
        }
        if dirty_regions + dirty_groups != self.dirty() {
            return Err(format!("{dirty_regions} + {dirty_groups} dirty flags, {} queued", self.dirty()));
        }
        self.check_streams()
    }

    fn check_region(&self, group: &Group, i: usize, region: u32) -> Result<(), String> {
        let standing = group.standing(i);
        let owned = group.owner(i).is_some();
        if let Some(loaded) = group.region(i) {
            let (used, avail) = loaded.audit()?;
            if avail != group.avail(i) || loaded.blocks() - used != group.free(i) {
                return Err(format!("{used} used and {avail} available blocks, the group differs"));
            }
            let longest = loaded.longest().len;
            if longest > group.longest(i) {
                return Err(format!("a run of {longest} blocks, bound {}", group.longest(i)));
            }
        } else if owned || group.is_dirty(i) || group.free(i) != group.avail(i) {
            return Err("frozen, dirty or owned, but not loaded".to_owned());
        }
        for (index, figure) in [(&self.by_count, standing.avail), (&self.by_run, standing.longest)] {
            for class in 1..CLASSES {
                let expected = !owned && class == class_of(figure.into());
                if index.contains(region, class) != expected {
                    return Err(format!("class {class} of an index is wrong for figure {figure}"));
                }
            }
        }
        Ok(())
    }

    /// Blocks in the frozen lists and among the unpublished; each must be frozen in the bitmaps.
    fn check_lists(&self) -> Result<u64, String> {
        let mut blocks = 0;
        let unpublished = self.commit.iter().flat_map(|commit| &commit.unpublished).copied();
        for run in self.frozen_runs.iter().flat_map(|freed| freed.runs.iter()).chain(unpublished) {
            blocks += run.len;
            for (region, span) in pieces(run) {
                if !self.region(region).is_some_and(|r| r.is_frozen(span)) {
                    return Err(format!("{run:?} is listed as frozen and is not"));
                }
            }
        }
        let queued: u64 = self.pending.iter().flat_map(|freed| freed.runs.iter()).map(|run| run.len).sum();
        if queued != self.pending_blocks {
            return Err(format!("{queued} blocks queued, {} counted", self.pending_blocks));
        }
        if !self.frozen_runs.iter().map(|freed| freed.generation).is_sorted() {
            return Err("frozen generations are out of order".to_owned());
        }
        Ok(blocks)
    }

    fn check_streams(&self) -> Result<(), String> {
        let mut owned = 0;
        for (s, stream) in self.streams.iter().enumerate() {
            for region in stream.owned() {
                owned += 1;
                if self.owner(region) != Some(s as u8) {
                    return Err(format!("stream {s} does not own {:?}", RegionId(region)));
                }
            }
            if self.owned_available(s) < stream.promise {
                return Err(format!("stream {s} was promised {} blocks and lacks them", stream.promise));
            }
        }
        let popped = self
            .loaded
            .iter()
            .filter(|&&region| self.group(region).is_some_and(|(group, i)| group.is_popped(i)));
        if popped.count() != self.popped.len() {
            return Err("popped flags and list differ".to_owned());
        }
        let flagged = self.loaded.iter().filter(|&&region| self.owner(region).is_some()).count();
        if flagged != owned {
            return Err(format!("{flagged} regions have an owner, streams own {owned}"));
        }
        Ok(())
    }

    fn owner(&self, region: u32) -> Option<u8> {
        self.group(region).and_then(|(group, i)| group.owner(i))
    }
}
