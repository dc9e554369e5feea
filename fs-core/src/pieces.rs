//! Between the extent map and the rest: the map's entries as pieces that can be read, and extents of the tree as map entries.

use smallvec::SmallVec;

use crate::checksum_cache::ChecksumCache;
use crate::error::{Error, Result};
use crate::extent_map::{
    BlockEnd, BlockRange, Entry, ExtentMap, LoadTicket, Mapping, NewExtent, PublishWrite, View,
};
use crate::mutation::{Mutation, broken};
use crate::records::extents::{Content, Extent, Kind, Span};
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

/// What a range of a file holds. What neither has reads as zeroes.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    /// Disjoint, in order.
    pub(crate) data: Vec<Piece>,
    /// The inline content of block 0, if the range has that.
    pub(crate) inline: Option<Content>,
}

/// Why a range cannot be read yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The mapping of this block is not in memory.
    Block(FileBlock),
    /// Content lies in the tree: view and tree must be looked at together ([`crate::inline::snapshot`]).
    Content,
}

/// The pieces of `[from, to)` in one state of the file; or what is missing. `content` is that of block 0, if it is known.
pub(crate) fn collect(
    view: &View<'_>,
    from: FileBlock,
    to: FileBlock,
    content: Option<&Content>,
) -> Result<Pieces, Missing> {
    let mut pieces = Pieces::default();
    for entry in view.iter(BlockRange::between(from, BlockEnd(to.0))) {
        match entry.mapping() {
            Mapping::Unknown => return Err(Missing::Block(entry.start())),
            Mapping::Data { addr, checksum } => {
                let piece = Piece { at: entry.start(), len: entry.len().0, addr, checksum };
                pieces.data.push(piece.clip(from, to));
            }
            Mapping::Inline => pieces.inline = Some(content.ok_or(Missing::Content)?.clone()),
            Mapping::Hole | Mapping::Preallocated { .. } => {}
        }
    }
    Ok(pieces)
}

/// Whether a block of `[from, to)` may be preallocated, as far as the map knows.
pub(crate) fn may_be_preallocated(map: &ExtentMap, from: FileBlock, to: FileBlock) -> bool {
    let guard = crate::extent_map::pin();
    map.view(&guard)
        .iter(BlockRange::between(from, BlockEnd(to.0)))
        .any(|entry| matches!(entry.mapping(), Mapping::Unknown | Mapping::Preallocated { .. }))
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
        .map(|e| {
            let mapping = match e.kind {
                Kind::Data => Mapping::Data { addr: e.addr, checksum: e.checksum },
                Kind::Preallocated => Mapping::Preallocated { addr: e.addr },
                Kind::Inline => Mapping::Inline,
            };
            NewExtent::new(e.at, e.len, mapping)
        })
        .collect()
}

/// What a write shows to readers: new mappings, pinned until the trees have them.
pub(crate) struct Published(SmallVec<[NewExtent; 4]>);

/// Lets readers see `extents`, `holes` and, if it grows, the new `size` of the file, at once. Checksums that the extents carry
/// themselves take the place of those that the cache may have from an earlier use of their blocks.
pub(crate) fn publish(
    map: &ExtentMap,
    checksums: &ChecksumCache,
    extents: &[Extent],
    holes: &[Span],
    size: Option<u64>,
) -> Published {
    let own = |extent: &&Extent| extent.checksum.is_some() && !broken(Mutation::SumsOutliveTheirBlocks);
    for extent in extents.iter().filter(own) {
        checksums.remove(extent.addr, 1);
    }
    let mut extents = to_map(extents);
    extents.extend(holes.iter().map(|(from, to)| NewExtent::new(*from, to.0 - from.0, Mapping::Hole)));
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
