//! Between the extent map and the rest: the map's entries as pieces that can be read, and extents of the tree as map entries.

use smallvec::SmallVec;

use crate::checksum_cache::ChecksumCache;
use crate::error::{Error, Result};
use crate::extent_map::{
    BlockEnd, BlockRange, Entry, ExtentMap, LoadTicket, Mapping, NewExtent, PublishWrite, View,
};
use crate::records::extents::Extent;
use crate::types::{BlockAddr, FileBlock};

/// A range of a file that is data, and where it lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    /// First block in the file.
    pub(crate) at: FileBlock,
    /// Length in blocks.
    pub(crate) len: u64,
    /// First block on the device.
    pub(crate) addr: BlockAddr,
    /// The checksum of a piece of one block, if it is at hand.
    pub(crate) checksum: Option<u32>,
}

impl Piece {
    pub(crate) fn end(&self) -> FileBlock {
        self.at.plus(self.len)
    }

    /// The part inside `[from, to)`, which must overlap the piece.
    pub(crate) fn clip(&self, from: FileBlock, to: FileBlock) -> Piece {
        let at = self.at.max(from);
        let len = self.end().min(to).0 - at.0;
        Piece { at, len, addr: self.addr.plus(at.0 - self.at.0), checksum: self.checksum }
    }
}

/// The pieces of `[from, to)` in one state of the file; or the first block that is not in memory.
pub(crate) fn collect(view: &View<'_>, from: FileBlock, to: FileBlock) -> Result<Vec<Piece>, FileBlock> {
    let mut pieces = Vec::new();
    for entry in view.iter(BlockRange::between(from, BlockEnd(to.0))) {
        match entry.mapping() {
            Mapping::Unknown => return Err(entry.start()),
            Mapping::Data { addr, checksum } => {
                let piece = Piece { at: entry.start(), len: entry.len().0, addr, checksum };
                pieces.push(piece.clip(from, to));
            }
            // Inline content is reserved in the format; no file has it yet.
            Mapping::Hole | Mapping::Preallocated { .. } | Mapping::Inline => {}
        }
    }
    Ok(pieces)
}

/// The device address and checksum of `blocks` blocks at `at`, when `entry` maps all of them to data.
#[inline]
pub(crate) fn single(entry: &Entry, at: FileBlock, blocks: u64) -> Option<(BlockAddr, Option<u32>)> {
    let addr = entry.data_addr(at)?;
    if at.0 + blocks > entry.end().0 {
        return None;
    }
    match entry.mapping() {
        Mapping::Data { checksum, .. } => Some((addr, checksum)),
        _ => None,
    }
}

fn to_map(extents: &[Extent]) -> SmallVec<[NewExtent; 4]> {
    extents
        .iter()
        .map(|e| NewExtent::new(e.at, e.len, Mapping::Data { addr: e.addr, checksum: e.checksum }))
        .collect()
}

/// What a write shows to readers: new mappings, pinned until the trees have them.
pub(crate) struct Published(SmallVec<[NewExtent; 4]>);

/// Lets readers see `extents` and, if it grows, the new `size` of the file, at once.
pub(crate) fn publish(map: &ExtentMap, extents: &[Extent], size: Option<u64>) -> Published {
    let extents = to_map(extents);
    map.publish(PublishWrite { extents: &extents, size });
    Published(extents)
}

impl Published {
    /// The trees have what was published.
    pub(crate) fn unpin(&self, map: &ExtentMap, checksums: &ChecksumCache) {
        map.unpin(&self.0, &mut |addr, sum| checksums.insert(addr, &[sum]));
    }
}

/// Puts what a loader found in `[from, to)` into the map, as far as nothing has changed since `ticket`.
pub(crate) fn load(
    map: &ExtentMap,
    ticket: LoadTicket,
    from: FileBlock,
    to: FileBlock,
    found: &[Extent],
    checksums: &ChecksumCache,
) -> Result<()> {
    let range = BlockRange::between(from, BlockEnd(to.0));
    map.load(range, ticket, &to_map(found), &mut |addr, sum| checksums.fill(addr, &[sum]))
        .map_err(|bad| Error::corrupt(bad.to_string()))?;
    Ok(())
}

/// Forgets what is cached from `from` on: the tree changed there in a way that pinned nothing.
pub(crate) fn forget_from(map: &ExtentMap, from: FileBlock) {
    map.invalidate(BlockRange::from(from));
}
