//! The extent tree: (inode, file block) -> where that range of the file lies.
//!
//! What no record covers is a hole. A record is of one of three [kinds](Kind):
//!
//! - *data*. A record of one block carries the checksum of its block; checksums of longer extents are in the
//!   [checksum tree](super::checksums). A piece that is cut from a longer extent keeps its checksums there;
//! - *preallocated*: blocks that are the file's and were never written. They read as zeroes. Their first write goes to them;
//! - *inline*: the content of block 0, in the record itself. It takes no block.
//!
//! [`Replacement`] is the one way in which records change, so it keeps what hangs on them: the counts of an inode, the
//! filesystem's count of preallocated blocks, and the feature flags of kinds that older code cannot read.

use smallvec::SmallVec;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{TreeKind, key_u64, value_of};
use crate::superblock;
use crate::txn::{Limits, Stop, Txn};
use crate::types::{BlockAddr, FileBlock, Generation, InodeId, Run};

/// An extent record as it lies in the tree. 24 bytes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct OnDisk {
    /// Bits 0-47: first device block. Bits 48-55: kind. Bits 56-63: flags.
    place: U64,
    birth: U64,
    len: U32,
    checksum: U32,
}

const _: () = assert!(size_of::<OnDisk>() == 24);

const ADDR_BITS: u32 = 48;
/// Bytes of a record before its inline content.
const HEADER: usize = size_of::<OnDisk>();

/// Most bytes of inline content. A leaf takes values of up to 1104 bytes, the record's header included; of 1 KiB three stand in
/// a node of 4 KiB, so that a small file costs a third of a block and no write of its own.
pub(crate) const INLINE_MAX: usize = 1024;

const _: () = assert!(HEADER + INLINE_MAX <= crate::tree::MAX_VALUE);

/// What stands behind an extent. (3: compressed is reserved.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Written blocks.
    Data = 0,
    /// Blocks that were never written.
    Preallocated = 1,
    /// The record itself has the content. Only of file block 0.
    Inline = 2,
}

impl Kind {
    fn parse(kind: u8) -> Option<Kind> {
        [Kind::Data, Kind::Preallocated, Kind::Inline].into_iter().find(|known| *known as u8 == kind)
    }

    /// The feature flag of a filesystem that has records of this kind.
    fn feature(self) -> u64 {
        match self {
            Kind::Data => 0,
            Kind::Preallocated => superblock::FEATURE_PREALLOCATED,
            Kind::Inline => superblock::FEATURE_INLINE,
        }
    }
}

/// Inline content: 1 to [`INLINE_MAX`] bytes, from the first byte of the file on. What follows in block 0 is zero.
pub(crate) type Content = Vec<u8>;

/// Flag: `checksum` is the checksum of the extent's only block.
const FLAG_CHECKSUM: u8 = 1;

/// A range of a file and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// First block in the file.
    pub(crate) at: FileBlock,
    /// Length in blocks (> 0).
    pub(crate) len: u64,
    pub(crate) kind: Kind,
    /// First block on the device; 0 if the content is inline.
    pub(crate) addr: BlockAddr,
    /// The checksum of a data extent of one block; `None`: in the checksum tree.
    pub(crate) checksum: Option<u32>,
    /// The generation in which it was written.
    pub(crate) birth: Generation,
}

impl Extent {
    pub(crate) fn end(&self) -> FileBlock {
        self.at.plus(self.len)
    }

    /// A range that is promised to `run`.
    pub(crate) fn preallocated(at: FileBlock, run: Run, birth: Generation) -> Extent {
        let kind = Kind::Preallocated;
        Extent { at, len: run.len, kind, addr: run.start, checksum: None, birth }
    }

    /// Block 0 with its content in the record.
    pub(crate) fn inline(birth: Generation) -> Extent {
        let (at, addr, kind) = (FileBlock(0), BlockAddr(0), Kind::Inline);
        Extent { at, len: 1, kind, addr, checksum: None, birth }
    }

    /// The device blocks that it takes, if it takes any.
    pub(crate) fn run(&self) -> Option<Run> {
        (self.kind != Kind::Inline).then(|| Run::new(self.addr, self.len))
    }

    /// How many device blocks it takes.
    pub(crate) fn blocks(&self) -> u64 {
        self.run().map_or(0, |run| run.len)
    }

    /// How many of them were never written.
    fn unwritten(&self) -> u64 {
        if self.kind == Kind::Preallocated { self.len } else { 0 }
    }

    /// The part of the extent inside `[start, end)`, which must overlap it.
    pub(crate) fn clip(&self, start: FileBlock, end: FileBlock) -> Extent {
        let from = self.at.max(start);
        let to = self.end().min(end);
        Extent { at: from, len: to.0 - from.0, addr: self.addr.plus(from.0 - self.at.0), ..*self }
    }

    fn to_disk(self) -> OnDisk {
        let flags = if self.checksum.is_some() { FLAG_CHECKSUM } else { 0 };
        let place =
            self.addr.0 | u64::from(self.kind as u8) << ADDR_BITS | u64::from(flags) << (ADDR_BITS + 8);
        OnDisk {
            place: place.into(),
            birth: self.birth.0.into(),
            len: (self.len as u32).into(),
            checksum: self.checksum.unwrap_or(0).into(),
        }
    }

    fn parse(limits: Limits, at: FileBlock, value: &[u8]) -> Result<Extent, Stop> {
        let (header, content) = value.split_at_checked(HEADER).unwrap_or((value, &[]));
        let disk: OnDisk = value_of(TreeKind::Extents, header)?;
        let place = disk.place.get();
        let kind = (place >> ADDR_BITS) as u8;
        let flags = (place >> (ADDR_BITS + 8)) as u8;
        let addr = BlockAddr(place & ((1 << ADDR_BITS) - 1));
        let len = u64::from(disk.len.get());
        let bad = |what: &str| Err(Stop::corrupt(format!("extent at file block {at}: {what}")));
        let Some(kind) = Kind::parse(kind).filter(|_| flags & !FLAG_CHECKSUM == 0) else {
            return bad(&format!("unknown kind {kind} or flags {flags:#x}"));
        };
        let birth = Generation(disk.birth.get());
        if kind == Kind::Inline {
            let alone = at.0 == 0 && len == 1 && addr.0 == 0 && flags == 0;
            if !alone || content.is_empty() || content.len() > INLINE_MAX {
                return bad(&format!("{} bytes of inline content that cannot be there", content.len()));
            }
            return Ok(Extent::inline(birth));
        }
        if !content.is_empty() {
            return bad(&format!("{} bytes too many", content.len()));
        }
        if kind != Kind::Data && flags != 0 {
            return bad("a checksum of blocks that were never written");
        }
        if len == 0 || !limits.contains(Run::new(addr, len)) {
            return bad(&format!("blocks {addr}+{len} are not on the device"));
        }
        if flags & FLAG_CHECKSUM != 0 && len != 1 {
            return bad("a checksum in a record of several blocks");
        }
        if at.0.checked_add(len).is_none_or(|end| end > crate::file::FILE_BLOCKS_MAX) {
            return bad("it ends beyond the largest file");
        }
        let checksum = (flags & FLAG_CHECKSUM != 0).then(|| disk.checksum.get());
        Ok(Extent { at, len, kind, addr, checksum, birth })
    }
}

fn key(id: InodeId, at: FileBlock) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&id.0.to_be_bytes());
    key[8..].copy_from_slice(&at.0.to_be_bytes());
    key
}

fn parse_key(key: &[u8]) -> Result<(InodeId, FileBlock), Stop> {
    Ok((InodeId(key_u64(TreeKind::Extents, key, 0)?), FileBlock(key_u64(TreeKind::Extents, key, 8)?)))
}

/// A record of the tree: its file and its extent.
pub(crate) fn parse(limits: Limits, key: &[u8], value: &[u8]) -> Result<(InodeId, Extent), Stop> {
    let (id, at) = parse_key(key)?;
    Ok((id, Extent::parse(limits, at, value)?))
}

/// The inline content of `id`, if it has some.
pub(crate) fn content(t: &mut Txn<'_>, id: InodeId) -> Result<Option<Content>, Stop> {
    let Some(value) = t.get(TreeKind::Extents, &key(id, FileBlock(0)))? else { return Ok(None) };
    let extent = Extent::parse(t.limits(), FileBlock(0), &value)?;
    Ok((extent.kind == Kind::Inline).then(|| value[HEADER..].to_vec()))
}

/// The extents of `id` that overlap `[start, end)`, whole, in order; at most `max`.
pub(crate) fn overlapping(
    t: &mut Txn<'_>,
    id: InodeId,
    start: FileBlock,
    end: FileBlock,
    max: usize,
) -> Result<SmallVec<[Extent; 4]>, Stop> {
    let limits = t.limits();
    let mut found = SmallVec::new();
    let mut from = start;
    if let Some((k, value)) = t.floor(TreeKind::Extents, &key(id, start))? {
        let (owner, at) = parse_key(&k)?;
        if owner == id {
            let extent = Extent::parse(limits, at, &value)?;
            if extent.end() > start {
                found.push(extent);
                from = extent.end();
            }
        }
    }
    if from >= end || found.len() >= max {
        return Ok(found);
    }
    scan_all(t, id, from, |owner, extent| {
        let wanted = owner == id && extent.at < end;
        if wanted {
            found.push(extent);
        }
        wanted && found.len() < max
    })?;
    Ok(found)
}

/// The last extents of `id` that reach beyond `from`, at most about `max` of them, in order.
pub(crate) fn last_beyond(
    t: &mut Txn<'_>,
    id: InodeId,
    from: FileBlock,
    max: usize,
) -> Result<SmallVec<[Extent; 4]>, Stop> {
    let limits = t.limits();
    let mut found: SmallVec<[Extent; 4]> = SmallVec::new();
    let mut below = key(id, FileBlock(u64::MAX));
    while found.len() < max {
        let Some((k, value)) = t.floor(TreeKind::Extents, &below)? else { break };
        let (owner, at) = parse_key(&k)?;
        if owner != id {
            break;
        }
        let extent = Extent::parse(limits, at, &value)?;
        if extent.end() <= from {
            break;
        }
        found.push(extent);
        if at.0 == 0 {
            break;
        }
        below = key(id, FileBlock(at.0 - 1));
    }
    found.reverse();
    Ok(found)
}

/// What changing a range of a file will do to its records: old ones are cut or removed, new ones come.
pub(crate) struct Replacement {
    id: InodeId,
    /// Records to store (new extents and what is left of cut ones).
    put: SmallVec<[Extent; 4]>,
    /// What the record in `put` of inline content has.
    content: Content,
    /// Keys to remove.
    remove: SmallVec<[FileBlock; 4]>,
    /// Device blocks that are not referred to any more.
    freed: SmallVec<[Run; 4]>,
    /// Where something was and nothing comes; disjoint, in order.
    pub(crate) holes: SmallVec<[Span; 2]>,
    /// Change of the number of records.
    pub(crate) extents: i64,
    /// Change of the number of blocks.
    pub(crate) blocks: i64,
    /// Change of the number of preallocated blocks.
    unwritten: i64,
}

/// A range of a file: its first block and the block behind it.
pub(crate) type Span = (FileBlock, FileBlock);

/// Looks up what lies in `spans` (disjoint, in order) of file `id`, and [plans](plan) to replace it by `new`.
pub(crate) fn replace(
    t: &mut Txn<'_>,
    id: InodeId,
    spans: &[Span],
    new: &[Extent],
) -> Result<Replacement, Stop> {
    let mut old = SmallVec::<[Extent; 4]>::new();
    for (start, end) in spans {
        let found = overlapping(t, id, *start, *end, usize::MAX)?;
        // One record may reach over several spans.
        let known = old.last().map_or(FileBlock(0), Extent::end);
        old.extend(found.into_iter().filter(|extent| extent.at >= known));
    }
    plan(t, id, spans, &old, new)
}

/// Plans to replace `spans` of file `id` (disjoint, in order), which `old` overlaps, by `new` (inside the spans, in order), and
/// makes sure that it can be done without stopping.
pub(crate) fn plan(
    t: &mut Txn<'_>,
    id: InodeId,
    spans: &[Span],
    old: &[Extent],
    new: &[Extent],
) -> Result<Replacement, Stop> {
    let mut plan = Replacement {
        id,
        put: SmallVec::from_slice(new),
        content: Content::new(),
        remove: SmallVec::new(),
        freed: SmallVec::new(),
        holes: SmallVec::new(),
        extents: 0,
        blocks: 0,
        unwritten: 0,
    };
    for extent in old {
        plan.extents -= 1;
        let first = spans.partition_point(|(_, end)| *end <= extent.at);
        let mut kept_from = extent.at;
        for (start, end) in spans[first..].iter().take_while(|(start, _)| *start < extent.end()) {
            let gone = extent.clip(*start, *end);
            plan.drop_from_file(&gone, new);
            if kept_from < gone.at {
                plan.put.push(extent.clip(kept_from, gone.at));
            }
            kept_from = gone.end();
        }
        if kept_from < extent.end() {
            plan.put.push(extent.clip(kept_from, extent.end()));
        }
        let starts_gone = spans.get(first).is_some_and(|(start, _)| *start <= extent.at);
        if starts_gone && new.binary_search_by_key(&extent.at, |n| n.at).is_err() {
            plan.remove.push(extent.at);
        }
    }
    plan.extents += plan.put.len() as i64;
    plan.blocks += new.iter().map(|n| n.blocks() as i64).sum::<i64>();
    plan.unwritten += new.iter().map(|n| n.unwritten() as i64).sum::<i64>();
    // The paths of the old records and of the first block of each span are in memory, since they were looked up.
    for at in plan.put.iter().map(|e| e.at) {
        let looked_up = old.binary_search_by_key(&at, |e| e.at).is_ok()
            || spans.binary_search_by_key(&at, |(start, _)| *start).is_ok();
        if !looked_up {
            t.touch(TreeKind::Extents, &key(id, at))?;
        }
    }
    Ok(plan)
}

impl Replacement {
    /// Says what the inline record among the new ones has for content.
    pub(crate) fn with_content(mut self, content: Content) -> Replacement {
        self.content = content;
        self
    }

    /// Counts `gone`, which `new` takes the place of as far as it reaches. Blocks that stay where they are, under the first write
    /// of what was preallocated, are not freed.
    fn drop_from_file(&mut self, gone: &Extent, new: &[Extent]) {
        self.blocks -= gone.blocks() as i64;
        self.unwritten -= gone.unwritten() as i64;
        let mut at = gone.at;
        let first = new.partition_point(|n| n.end() <= gone.at);
        for n in new[first..].iter().take_while(|n| n.at < gone.end()) {
            let both = n.clip(gone.at, gone.end());
            if at < both.at {
                self.drop_to_hole(&gone.clip(at, both.at));
            }
            let there = gone.clip(both.at, both.end());
            if both.run() != there.run() {
                self.freed.extend(there.run());
            }
            at = both.end();
        }
        if at < gone.end() {
            self.drop_to_hole(&gone.clip(at, gone.end()));
        }
    }

    fn drop_to_hole(&mut self, gone: &Extent) {
        self.freed.extend(gone.run());
        match self.holes.last_mut() {
            Some((_, end)) if *end == gone.at => *end = gone.end(),
            _ => self.holes.push((gone.at, gone.end())),
        }
    }

    /// Number of tree values that it changes.
    pub(crate) fn len(&self) -> usize {
        self.put.len() + self.remove.len()
    }

    /// Does what was planned, and frees the blocks.
    pub(crate) fn apply(&self, t: &mut Txn<'_>) -> Result<(), Stop> {
        for at in &self.remove {
            t.remove(TreeKind::Extents, &key(self.id, *at))?;
        }
        let mut value = SmallVec::<[u8; HEADER]>::new();
        for extent in &self.put {
            value.clear();
            value.extend_from_slice(extent.to_disk().as_bytes());
            if extent.kind == Kind::Inline {
                debug_assert!((1..=INLINE_MAX).contains(&self.content.len()));
                value.extend_from_slice(&self.content);
            }
            t.put(TreeKind::Extents, &key(self.id, extent.at), &value)?;
            t.meta.features |= extent.kind.feature();
        }
        for run in &self.freed {
            t.free(*run)?;
        }
        // A count that cannot be is one of a damaged superblock: `check` reports it.
        t.meta.preallocated = t.meta.preallocated.saturating_add_signed(self.unwritten);
        Ok(())
    }
}

/// Calls `visit` with every extent of any file from (`id`, `at`) on, in order, until it returns false. Used by `check`.
pub(crate) fn scan_all(
    t: &mut Txn<'_>,
    id: InodeId,
    at: FileBlock,
    mut visit: impl FnMut(InodeId, Extent) -> bool,
) -> Result<(), Stop> {
    let mut bad = None;
    let limits = t.limits();
    t.scan(TreeKind::Extents, &key(id, at), |k, value| match parse(limits, k, value) {
        Ok((id, extent)) => visit(id, extent),
        Err(stop) => {
            bad = Some(stop);
            false
        }
    })?;
    bad.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: u64 = 1 << 20;

    fn value(kind: u8, flags: u8, addr: u64, len: u32, checksum: u32, content: &[u8]) -> Vec<u8> {
        let place = addr | u64::from(kind) << ADDR_BITS | u64::from(flags) << (ADDR_BITS + 8);
        let disk =
            OnDisk { place: place.into(), birth: 7.into(), len: len.into(), checksum: checksum.into() };
        [disk.as_bytes(), content].concat()
    }

    fn read(at: u64, value: &[u8]) -> Result<Extent, Stop> {
        Extent::parse(Limits::new(LIMITS), FileBlock(at), value)
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        let birth = Generation(7);
        let run = Run::new(BlockAddr(100), 9);
        let extents = [
            Extent {
                checksum: Some(5),
                len: 1,
                kind: Kind::Data,
                ..Extent::preallocated(FileBlock(3), run, birth)
            },
            Extent { kind: Kind::Data, ..Extent::preallocated(FileBlock(3), run, birth) },
            Extent::preallocated(FileBlock(3), run, birth),
        ];
        for extent in extents {
            assert_eq!(read(3, extent.to_disk().as_bytes()).expect("a record"), extent);
        }
        let inline = Extent::inline(birth);
        let bytes = [inline.to_disk().as_bytes(), &[1; INLINE_MAX]].concat();
        assert_eq!(read(0, &bytes).expect("a record"), inline);
        assert_eq!((inline.run(), inline.blocks()), (None, 0));
    }

    #[test]
    fn records_that_cannot_be_are_errors() {
        let none: &[u8] = &[];
        let bad = [
            ("kind 3", 0, value(3, 0, 5, 1, 0, none)),
            ("kind 255", 0, value(255, 0, 5, 1, 0, none)),
            ("flag 2", 0, value(0, 2, 5, 1, 0, none)),
            ("no length", 0, value(0, 0, 5, 0, 0, none)),
            ("beyond the device", 0, value(1, 0, LIMITS, 1, 0, none)),
            ("over its end", 0, value(1, 0, LIMITS - 1, 2, 0, none)),
            ("a checksum of two blocks", 0, value(0, 1, 5, 2, 9, none)),
            ("a checksum of a preallocated block", 0, value(1, 1, 5, 1, 9, none)),
            ("data with content", 0, value(0, 0, 5, 1, 0, b"x")),
            ("preallocated with content", 0, value(1, 0, 5, 1, 0, b"x")),
            ("inline without content", 0, value(2, 0, 0, 1, 0, none)),
            ("too much inline content", 0, value(2, 0, 0, 1, 0, &[1; INLINE_MAX + 1])),
            ("inline with an address", 0, value(2, 0, 5, 1, 0, b"x")),
            ("inline over two blocks", 0, value(2, 0, 0, 2, 0, b"x")),
            ("inline with a checksum", 0, value(2, 1, 0, 1, 9, b"x")),
            ("inline elsewhere", 1, value(2, 0, 0, 1, 0, b"x")),
            ("beyond the largest file", crate::file::FILE_BLOCKS_MAX, value(0, 0, 5, 1, 0, none)),
            ("far beyond it", u64::MAX, value(0, 0, 5, 2, 0, none)),
            ("short", 0, value(0, 0, 5, 1, 0, none)[..23].to_vec()),
            ("empty", 0, Vec::new()),
        ];
        for (what, at, value) in bad {
            let stop = read(at, &value).expect_err(what);
            assert!(matches!(stop, Stop::Fail(crate::Error::Corrupt { .. })), "{what}: {stop:?}");
        }
        assert!(read(0, &value(2, 0, 0, 1, 0, b"x")).is_ok());
    }
}
