//! The counts of 512 regions, and those of the regions that are loaded.
//!
//! Counts stay in memory once the group is loaded, also of regions that are evicted.

use super::GROUP_REGIONS;
use super::region::{Region, Span};

/// Regions of a full group.
pub(super) const REGIONS: usize = GROUP_REGIONS as usize;

/// What the indices order regions by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    /// Blocks that may be handed out.
    pub(super) avail: u16,
    /// No run of available blocks is longer than this. Exact after a search that failed; frees raise it as far as the
    /// run that they complete, allocations leave it (but it is never more than `avail`).
    pub(super) longest: u16,
}

pub(super) struct Group {
    /// Regions that exist.
    pub(super) count: usize,
    /// Blocks clear in `persist`: what is stored.
    free: [u16; REGIONS],
    avail: [u16; REGIONS],
    longest: [u16; REGIONS],
    regions: [Option<Box<Region>>; REGIONS],
    /// Differs from what was encoded last; it is in the dirty queue.
    pub(super) dirty: bool,
}

impl Group {
    /// A group with these stored free counts (`count` of them are meant), nothing loaded.
    pub(super) fn new(count: usize, free: [u16; REGIONS]) -> Box<Group> {
        let regions = [const { None }; REGIONS];
        Box::new(Group { count, free, avail: free, longest: free, regions, dirty: false })
    }

    /// Free blocks of each region as stored by the next commit.
    pub(super) fn free_counts(&self) -> &[u16] {
        &self.free[..self.count]
    }

    pub(super) fn free(&self, i: usize) -> u32 {
        u32::from(self.free[i])
    }

    pub(super) fn avail(&self, i: usize) -> u32 {
        u32::from(self.avail[i])
    }

    pub(super) fn longest(&self, i: usize) -> u32 {
        u32::from(self.longest[i].min(self.avail[i]))
    }

    pub(super) fn standing(&self, i: usize) -> Standing {
        Standing { avail: self.avail[i], longest: self.longest[i].min(self.avail[i]) }
    }

    pub(super) fn region(&self, i: usize) -> Option<&Region> {
        self.regions[i].as_deref()
    }

    pub(super) fn region_mut(&mut self, i: usize) -> Option<&mut Region> {
        self.regions[i].as_deref_mut()
    }

    pub(super) fn attach(&mut self, i: usize, region: Region) {
        self.regions[i] = Some(Box::new(region));
    }

    /// Drops the bitmaps of a region for which [`Group::is_idle`]. The counts stay.
    pub(super) fn detach(&mut self, i: usize) {
        self.regions[i] = None;
    }

    /// The region can be loaded again from its stored value with nothing lost: it is not dirty, no stream fills it, and
    /// no block of it is frozen.
    pub(super) fn is_idle(&self, i: usize) -> bool {
        self.region(i).is_some_and(|r| !r.dirty && r.owner.is_none()) && self.free[i] == self.avail[i]
    }

    // ---- state changes: bitmap and counts together. The region is loaded (a bug otherwise).

    pub(super) fn take(&mut self, i: usize, span: Span) {
        self.loaded(i).take(span);
        self.free[i] -= span.len as u16;
        self.avail[i] -= span.len as u16;
    }

    pub(super) fn clear_persist(&mut self, i: usize, span: Span) {
        self.loaded(i).clear_persist(span);
        self.free[i] += span.len as u16;
    }

    pub(super) fn set_persist(&mut self, i: usize, span: Span) {
        self.loaded(i).set_persist(span);
        self.free[i] -= span.len as u16;
    }

    pub(super) fn make_available(&mut self, i: usize, span: Span) {
        let before = self.longest(i) as u16;
        let run = self.loaded(i).make_available(span);
        self.avail[i] += span.len as u16;
        self.longest[i] = before.max(run as u16);
    }

    /// Notes what a search found out about the longest run.
    pub(super) fn set_longest(&mut self, i: usize, longest: u32) {
        self.longest[i] = longest as u16;
    }

    fn loaded(&mut self, i: usize) -> &mut Region {
        let region = self.regions[i].as_deref_mut().expect("bits of a region change only while it is loaded");
        region.touched = true;
        region
    }
}
