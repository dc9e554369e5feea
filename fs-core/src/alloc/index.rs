//! Regions by class, so that one with much space is found in a few words instead of a scan.
//!
//! Class `c` > 0 holds the regions whose figure (free blocks, or longest run) is in `[2^(c-1), 2^c)`; a region whose figure
//! is 0 is in none. Per class: one bit a region in each loaded group, and a bitmap with summaries over the groups. An
//! update is needed only when a figure changes its class.

use super::bits::BitTree;
use super::group::REGIONS;
use super::{GROUP_SHIFT, REGION_BLOCKS};
use crate::extent_map::prefetch_read;

/// Classes, 0 included.
pub(super) const CLASSES: usize = REGION_BLOCKS.ilog2() as usize + 2;

const GROUP_WORDS: usize = REGIONS / 64;

/// The class of a figure: all figures of a class differ by less than a factor of two.
pub(super) fn class_of(figure: u32) -> usize {
    (u32::BITS - figure.leading_zeros()) as usize
}

/// The lowest class whose every member is at least `figure` (> 0). May be `CLASSES` or more: there is none.
pub(super) fn class_above(figure: u32) -> usize {
    class_of(figure - 1) + 1
}

type Members = [[u64; GROUP_WORDS]; CLASSES];

#[derive(Debug)]
pub(super) struct Index {
    members: Vec<Option<Box<Members>>>,
    /// Per class: the groups that have a member.
    groups: Vec<BitTree>,
    /// Classes that have a member, one bit each.
    present: u32,
}

impl Index {
    pub(super) fn new(groups: usize) -> Index {
        Index {
            members: (0..groups).map(|_| None).collect(),
            groups: (0..CLASSES).map(|_| BitTree::new(groups)).collect(),
            present: 0,
        }
    }

    pub(super) fn insert(&mut self, region: u32, class: usize) {
        if class == 0 {
            return;
        }
        let (group, i) = split(region);
        let members = self.members[group].get_or_insert_with(|| Box::new([[0; GROUP_WORDS]; CLASSES]));
        members[class][i / 64] |= 1 << (i % 64);
        self.groups[class].set(group);
        self.present |= 1 << class;
    }

    pub(super) fn remove(&mut self, region: u32, class: usize) {
        let (group, i) = split(region);
        let Some(members) = self.members[group].as_mut().filter(|_| class > 0) else { return };
        members[class][i / 64] &= !(1 << (i % 64));
        if members[class].iter().all(|&word| word == 0) {
            self.groups[class].clear(group);
            if self.groups[class].is_empty() {
                self.present &= !(1 << class);
            }
        }
    }

    pub(super) fn shift(&mut self, region: u32, from: usize, to: usize) {
        if from != to {
            self.remove(region, from);
            self.insert(region, to);
        }
    }

    /// Asks for the cache line that says whether `region` is in `class`.
    pub(super) fn prefetch(&self, region: u32, class: usize) {
        let (group, i) = split(region);
        if let Some(Some(members)) = self.members.get(group) {
            prefetch_read(&members[class][i / 64]);
        }
    }

    pub(super) fn contains(&self, region: u32, class: usize) -> bool {
        let (group, i) = split(region);
        self.members[group].as_ref().is_some_and(|m| m[class][i / 64] >> (i % 64) & 1 == 1)
    }

    /// The highest class that has a member.
    pub(super) fn highest(&self) -> Option<usize> {
        (self.present != 0).then(|| self.present.ilog2() as usize)
    }

    /// The next member of `class` at or after region `from`, wrapping around.
    pub(super) fn next(&self, class: usize, from: u32) -> Option<u32> {
        if self.present >> class & 1 == 0 {
            return None;
        }
        let (group, i) = split(from);
        let here = || self.in_group(class, group, i);
        let later = || self.groups[class].next(group + 1).and_then(|g| self.in_group(class, g, 0));
        let first = || self.groups[class].next(0).and_then(|g| self.in_group(class, g, 0));
        here().or_else(later).or_else(first)
    }

    /// The first member of `class` in `group` at or after its `i`th region.
    fn in_group(&self, class: usize, group: usize, i: usize) -> Option<u32> {
        let words = &self.members.get(group)?.as_ref()?[class];
        let mut mask = u64::MAX << (i % 64);
        for (w, word) in words.iter().enumerate().skip(i / 64) {
            let hit = word & mask;
            if hit != 0 {
                return Some((group * REGIONS + w * 64) as u32 + hit.trailing_zeros());
            }
            mask = u64::MAX;
        }
        None
    }

    /// Bytes of memory.
    pub(super) fn memory(&self) -> usize {
        self.members.iter().flatten().count() * size_of::<Members>() + self.members.len() * 8
    }
}

fn split(region: u32) -> (usize, usize) {
    ((region >> GROUP_SHIFT) as usize, region as usize % REGIONS)
}
