//! The counts of 512 regions, and those of the regions that are loaded.
//!
//! Counts stay in memory once the group is loaded, also of regions that are evicted.

use super::region::{Region, Span};
use super::{GROUP_REGIONS, Stream};
use crate::extent_map::prefetch_read;

/// Regions of a full group.
pub(super) const REGIONS: usize = GROUP_REGIONS as usize;

/// Bytes of memory of a full group without its regions' bitmaps.
pub(super) const GROUP_BYTES: usize = size_of::<Group>() + REGIONS * size_of::<Slot>();

const _: () = assert!(size_of::<Slot>() <= 16);

/// What the indices order regions by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    /// Blocks that may be handed out.
    pub(super) avail: u16,
    /// No run of available blocks is longer than this. Exact after a search that failed; frees raise it as far as the
    /// run that they complete, allocations leave it (but it is never more than `avail`).
    pub(super) longest: u16,
}

/// What is known about a region, loaded or not: 16 bytes, so that all about one is in one cache line.
#[derive(Default)]
struct Slot {
    /// The bitmaps, if the region is loaded.
    bits: Option<Box<Region>>,
    /// Blocks clear in `persist`: what is stored.
    free: u16,
    avail: u16,
    longest: u16,
    /// [`OWNER`], [`DIRTY`], [`TOUCHED`], [`POPPED`].
    flags: u8,
}

/// In a slot's flags: index of the stream that fills the region, plus one; 0: none.
const OWNER: u8 = 0x0f;
/// It differs from what was encoded last, and is in the dirty queue.
const DIRTY: u8 = 0x10;
/// Touched since the eviction clock came by.
const TOUCHED: u8 = 0x20;
/// Taken out of the dirty queue since the last commit ended: perhaps not stored yet.
const POPPED: u8 = 0x40;

const _: () = assert!(Stream::COUNT < OWNER as usize);

pub(super) struct Group {
    slots: Vec<Slot>,
    /// Differs from what was encoded last; it is in the dirty queue.
    pub(super) dirty: bool,
}

impl Group {
    /// A group with these stored free counts, nothing loaded.
    pub(super) fn new(free: &[u16]) -> Group {
        let slot = |&free: &u16| Slot { free, avail: free, longest: free, ..Slot::default() };
        Group { slots: free.iter().map(slot).collect(), dirty: false }
    }

    /// Regions that exist.
    pub(super) fn count(&self) -> usize {
        self.slots.len()
    }

    /// Free blocks of a region as stored by the next commit.
    pub(super) fn free(&self, i: usize) -> u32 {
        self.slots[i].free.into()
    }

    pub(super) fn avail(&self, i: usize) -> u32 {
        self.slots[i].avail.into()
    }

    pub(super) fn longest(&self, i: usize) -> u32 {
        self.standing(i).longest.into()
    }

    pub(super) fn standing(&self, i: usize) -> Standing {
        let Slot { avail, longest, .. } = self.slots[i];
        Standing { avail, longest: longest.min(avail) }
    }

    /// Index of the stream that fills the region.
    pub(super) fn owner(&self, i: usize) -> Option<u8> {
        (self.slots[i].flags & OWNER).checked_sub(1)
    }

    /// Gives a loaded region to a stream, or back.
    pub(super) fn set_owner(&mut self, i: usize, owner: Option<u8>) {
        debug_assert!(self.slots[i].bits.is_some(), "an owned region is loaded");
        let flags = &mut self.slots[i].flags;
        *flags = *flags & !OWNER | owner.map_or(0, |stream| stream + 1);
    }

    pub(super) fn is_dirty(&self, i: usize) -> bool {
        self.slots[i].flags & DIRTY != 0
    }

    /// Sets the dirty flag; returns what it was.
    pub(super) fn set_dirty(&mut self, i: usize, dirty: bool) -> bool {
        debug_assert!(self.slots[i].bits.is_some(), "a dirty region is loaded");
        let was = self.is_dirty(i);
        let flags = &mut self.slots[i].flags;
        *flags = if dirty { *flags | DIRTY } else { *flags & !DIRTY };
        was
    }

    pub(super) fn is_popped(&self, i: usize) -> bool {
        self.slots[i].flags & POPPED != 0
    }

    pub(super) fn set_popped(&mut self, i: usize, popped: bool) {
        let flags = &mut self.slots[i].flags;
        *flags = if popped { *flags | POPPED } else { *flags & !POPPED };
    }

    /// Clears the touched flag; returns what it was.
    pub(super) fn untouch(&mut self, i: usize) -> bool {
        let was = self.slots[i].flags & TOUCHED != 0;
        self.slots[i].flags &= !TOUCHED;
        was
    }

    pub(super) fn region(&self, i: usize) -> Option<&Region> {
        self.slots[i].bits.as_deref()
    }

    /// Asks for the cache line of what is known about a region.
    pub(super) fn prefetch(&self, i: usize) {
        prefetch_read(&self.slots[i]);
    }

    pub(super) fn attach(&mut self, i: usize, region: Region) {
        self.touch(i).bits = Some(Box::new(region));
    }

    /// Drops the bitmaps of a region for which [`Group::is_idle`]. The counts stay.
    pub(super) fn detach(&mut self, i: usize) {
        self.slots[i].bits = None;
    }

    /// The region can be loaded again from its stored value with nothing lost: it is stored, no stream fills it, and no
    /// block of it is frozen.
    pub(super) fn is_idle(&self, i: usize) -> bool {
        let slot = &self.slots[i];
        slot.bits.is_some() && slot.flags & (OWNER | DIRTY | POPPED) == 0 && slot.free == slot.avail
    }

    // ---- state changes: bitmap and counts together. The region is loaded (a bug otherwise).

    pub(super) fn take(&mut self, i: usize, span: Span) {
        let slot = self.touch(i);
        slot.bits().take(span);
        slot.free -= span.len as u16;
        slot.avail -= span.len as u16;
    }

    pub(super) fn clear_persist(&mut self, i: usize, span: Span) {
        let slot = self.touch(i);
        slot.bits().clear_persist(span);
        slot.free += span.len as u16;
    }

    pub(super) fn set_persist(&mut self, i: usize, span: Span) {
        let slot = self.touch(i);
        slot.bits().set_persist(span);
        slot.free -= span.len as u16;
    }

    pub(super) fn make_available(&mut self, i: usize, span: Span) {
        let before = self.standing(i).longest;
        let slot = self.touch(i);
        let run = slot.bits().make_available(span);
        slot.avail += span.len as u16;
        slot.longest = before.max(run as u16);
    }

    /// Notes what a search found out about the longest run.
    pub(super) fn set_longest(&mut self, i: usize, longest: u32) {
        self.slots[i].longest = longest as u16;
    }

    fn touch(&mut self, i: usize) -> &mut Slot {
        self.slots[i].flags |= TOUCHED;
        &mut self.slots[i]
    }
}

impl Slot {
    fn bits(&mut self) -> &mut Region {
        self.bits.as_deref_mut().expect("bits of a region change only while it is loaded")
    }
}
