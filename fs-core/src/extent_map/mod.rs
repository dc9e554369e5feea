//! The extent map: which device block, if any, stands behind each block of a file.
//!
//! A map is a cache over the metadata tree, with one difference: what a write has just put into it is *ahead* of the tree.
//! It is a total function: every block of `[0, MAX_FILE_BLOCKS)` is covered by exactly one entry, and "not loaded yet" is a
//! state of its own ([`Mapping::Unknown`]), so a neighbour can never pass for an answer.
//!
//! # How it works
//!
//! 1. Readers take a [`View`] under an [`EpochGuard`]: one whole state of the file -- size, version, mappings -- as one
//!    pointer. They take no lock and write nothing shared ([`view`]).
//! 2. Writers of one file are serialised by a mutex inside the map. A change copies the nodes on its path ([`draft`] decides
//!    and merges, [`tree`] copies) and is published by one pointer swap: several extents and the size together are one change.
//! 3. What the swap replaced is freed when the last reader that could see it has left ([`mem`]).
//! 4. Loaders bring what they read in the metadata tree, with a ticket from before they read it ([`history`]).
//!
//! Files are cut into segments of 2^30 blocks (4 TiB), each with a tree of its own, so that keys are 32 bits wide; nodes are
//! laid out in cache lines ([`node`]). An entry takes 16 bytes, and some 18 to 19 with all overhead.
//!
//! # Invariants
//!
//! Rule 1 of the design: *a new mapping stays pinned until the tree holds it, and a loader never brings back the past.*
//!
//! - What [`ExtentMap::publish`] puts in is pinned until [`ExtentMap::unpin`] names it again. Eviction, invalidation and
//!   loaders leave pinned entries alone, and they merge with nothing. Only a newer change replaces them.
//! - [`ExtentMap::unpin`] frees an entry only if it still maps to what was published: not if a newer write took its place.
//! - A loader fills only what is `Unknown`, clipped around whatever is there, and not where anything changed since its
//!   ticket. "Changed" includes the unpin: between publication and unpin the tree still holds the old mapping.
//! - Changes that pin nothing ([`ExtentMap::set_hole`], [`ExtentMap::truncate`]) are followed by
//!   [`ExtentMap::invalidate`] once the tree has changed; invalidation counts as a change for loaders.
//!
//! Rule 5: *a retry finds its block through the map, so the map keeps what is still valid.*
//!
//! - Every operation splits entries at the borders of its range and keeps the rest; truncation starts at the block-rounded
//!   size.
//! - Of two loaders of the same extent the second changes nothing: both then look up the same entry.
//! - An answer covers its query: an entry that does not is never returned.
//!
//! Structure ([`ExtentMap::check`]): full coverage, strictly ascending keys, no two unpinned neighbours in a segment that
//! continue each other, counters equal to what is there.
//!
//! # What it does not do
//!
//! It does not read the metadata tree, hold blocks against reuse, order writers of overlapping ranges (that is the range lock),
//! or keep checksums of extents longer than a block (that is the checksum cache). It knows nothing of access recency: eviction
//! goes round the file by a clock hand, as marking what a reader has used would be a shared write on the read path.
//!
//! Algorithms: path copying as in Rodeh, "B-trees, shadowing, and clones" (ACM TOS 2008); epochs after Fraser, "Practical
//! lock-freedom" (2004), by crossbeam-epoch; the two-line node after the cache-line B+trees of Rao and Ross (SIGMOD 2000).

mod arena;
mod check;
mod cpu;
mod draft;
mod history;
mod mapping;
mod mem;
mod node;
mod tree;
mod view;

#[cfg(test)]
mod tests;

use std::fmt;

use smallvec::SmallVec;

pub(crate) use self::cpu::prefetch_read;
pub use self::draft::ChecksumSink;
use self::draft::{Draft, PieceInFile, Rewritten, Verdict, all_nodes};
pub use self::history::LoadTicket;
use self::history::{History, Since};
pub use self::mapping::{BlockEnd, BlockRange, Entry, MAX_FILE_BLOCKS, Mapping, NewExtent};
use self::mapping::{State, Value};
pub use self::mem::{EpochGuard, pin};
use self::mem::{Nodes, Published};
pub use self::view::{FileVersion, LOOKUP_LANES, MapStats, View};
use self::view::{Segment, Segments, ViewData};
use crate::mutation::{Mutation, broken};
use crate::sync::Mutex;
use crate::types::FileBlock;

/// The extent map of one file.
pub struct ExtentMap {
    published: Published<ViewData>,
    writer: Mutex<Writer>,
}

/// What the writers of a map share, under its mutex.
#[derive(Debug, Default)]
struct Writer {
    nodes: Nodes,
    history: History,
    /// Where eviction goes on.
    clock_hand: FileBlock,
}

/// A change to publish: any number of extents and the size, in one swap.
#[derive(Clone, Copy, Debug, Default)]
pub struct PublishWrite<'a> {
    /// What is mapped anew. Pinned until [`ExtentMap::unpin`]. Not empty, not [`Mapping::Unknown`], addresses below 2^48,
    /// checksums only on single blocks; where they overlap, the later one holds.
    pub extents: &'a [NewExtent],
    /// The file ends at this byte at least; a publication never makes it smaller.
    pub size: Option<u64>,
}

/// What became of a loader's extents, in blocks of the loaded range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LoadOutcome {
    /// Were unknown and are filled.
    pub filled: u64,
    /// Were known already: left alone.
    pub kept: u64,
    /// Are still unknown, as they changed since the ticket: take a new ticket and read the tree again if they matter.
    pub refused: u64,
}

/// A loader's extents are no mapping: empty, out of order, overlapping, `Unknown`, or with an impossible address or checksum.
/// Nothing was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadExtents;

impl fmt::Display for BadExtents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the extents to load do not describe a range of a file")
    }
}

impl std::error::Error for BadExtents {}

/// Retired nodes that may wait for company before the collector gets them: each hand-over costs some 100 ns.
const LIMBO_NODES: usize = 63;

impl ExtentMap {
    /// The map of a new file: all hole, size 0.
    pub fn new_empty() -> ExtentMap {
        ExtentMap::uniform(Value::HOLE, 0)
    }

    /// The map of an existing file of `size` bytes: nothing loaded.
    pub fn new_unloaded(size: u64) -> ExtentMap {
        ExtentMap::uniform(Value::UNKNOWN, size)
    }

    fn uniform(value: Value, size: u64) -> ExtentMap {
        let listed = SmallVec::from_buf([Segment::Uniform(value)]);
        let segments = Segments { listed, beyond: value };
        let view = ViewData { size, version: FileVersion(0), segments, stats: MapStats::default() };
        ExtentMap { published: Published::new(view), writer: Mutex::default() }
    }

    /// The present state of the file. Takes no lock.
    #[inline]
    pub fn view<'g>(&'g self, guard: &'g EpochGuard) -> View<'g> {
        let (data, reach) = self.published.load(guard);
        View { data, reach, guard }
    }

    /// Whether nothing in the file has changed since `view` was taken. What only moves knowledge (load, unpin, evict) is no
    /// change. Takes no lock.
    #[inline]
    pub fn is_current(&self, view: &View<'_>) -> bool {
        self.published.is(view.data, view.guard) || self.view(view.guard).version() == view.version()
    }

    /// Whether `range` still maps to the same places as in `view`, and as much of it lies inside the file: what a reader of
    /// `range` has to know, where [`ExtentMap::is_current`] would also refuse it for a write elsewhere in the file. Takes no
    /// lock. (The caller holds the blocks against reuse, so the same place is the same content.)
    pub fn is_current_in(&self, view: &View<'_>, range: BlockRange) -> bool {
        if self.is_current(view) {
            return true;
        }
        let now = self.view(view.guard);
        let mut next = range.start();
        while range.contains(next) {
            let (then, now) = (view.lookup(next), now.lookup(next));
            let end = then.end().min(now.end());
            let same = match (then.at(next), now.at(next)) {
                (Some(then), Some(now)) => then.value.same_place(now.value),
                _ => false,
            };
            if !same {
                return false;
            }
            next = end.next_start();
        }
        let inside = |view: &View<'_>| view.size().min(FileBlock(range.end().0).byte());
        inside(&now) == inside(view)
    }

    /// Lets the file end at byte `size` at least. Writers of different ranges may do so at once.
    pub(crate) fn grow(&self, size: u64) -> FileVersion {
        self.change(|draft, _| draft.view.size = draft.view.size.max(size))
    }

    /// Publishes a write: its extents, pinned, and the size, in one swap. A reader sees all of it or nothing.
    ///
    /// # Panics
    /// If an extent is not as [`PublishWrite`] demands: a bug of the caller.
    pub fn publish(&self, write: PublishWrite<'_>) -> FileVersion {
        assert!(
            write.extents.iter().all(NewExtent::is_sound),
            "an extent that cannot be: {:?}",
            write.extents
        );
        if broken(Mutation::PublishPiecemeal) && write.extents.len() > 1 {
            for extent in write.extents {
                self.publish(PublishWrite { extents: std::slice::from_ref(extent), size: None });
            }
            return self.publish(PublishWrite { extents: &[], size: write.size });
        }
        if broken(Mutation::SizeAfterMappings) && write.size.is_some() && !write.extents.is_empty() {
            self.publish(PublishWrite { size: None, ..write });
            return self.publish(PublishWrite { extents: &[], ..write });
        }
        self.change(|draft, history| {
            for extent in write.extents {
                let (value, sum) = Value::pack(extent.mapping);
                let value = if broken(Mutation::PublishWithoutPin) { value } else { value.pinned() };
                draft.replace(extent.range, (value, sum), &mut |_, _| {});
                history.record(extent.range);
            }
            draft.view.size = draft.view.size.max(write.size.unwrap_or(0));
        })
    }

    /// Makes `range` a hole that is not pinned. Once the metadata tree has changed, [`ExtentMap::invalidate`] must follow.
    /// (To have a hole pinned, publish one.)
    pub fn set_hole(&self, range: BlockRange) -> FileVersion {
        self.change(|draft, history| {
            draft.replace(range, (Value::HOLE, 0), &mut |_, _| {});
            history.record(range);
        })
    }

    /// Changes the size to `size` bytes; if it shrinks, all behind the block-rounded size becomes a hole that is not pinned,
    /// in the same swap. Once the metadata tree has changed, [`ExtentMap::invalidate`] must follow.
    pub fn truncate(&self, size: u64) -> FileVersion {
        self.change(|draft, history| {
            if size < draft.view.size {
                let rest = match broken(Mutation::TruncateDropsCutBlock) {
                    false => FileBlock::at_or_after(size),
                    true => FileBlock::containing(size),
                };
                let rest = BlockRange::from(rest);
                draft.replace(rest, (Value::HOLE, 0), &mut |_, _| {});
                history.record(rest);
            }
            draft.view.size = size;
        })
    }

    /// Changes the size to `size` bytes and no mapping.
    pub fn set_size(&self, size: u64) -> FileVersion {
        self.change(|draft, _| draft.view.size = size)
    }

    /// The metadata tree now holds `published`, extents of an earlier publication: what still maps to them is unpinned and
    /// merges with neighbours that continue it. Parts that a newer change took over are left alone.
    ///
    /// Checksums of one-block entries that merge go to `sink` (see [`draft`]). Call it *after* the tree insertion: it is the
    /// moment from which loaders are believed again.
    pub fn unpin(&self, published: &[NewExtent], sink: &mut ChecksumSink<'_>) {
        self.adjust(|draft, history| {
            let mut any = false;
            for extent in published {
                any |= draft.rewrite(extent.range, sink, &mut |at, out| unpin_piece(extent, at, out));
                if !broken(Mutation::UnpinUnrecorded) {
                    history.record(extent.range);
                }
            }
            any
        });
    }

    /// Notes the present for a loader: call it before reading the metadata tree.
    pub fn load_ticket(&self) -> LoadTicket {
        self.writer.lock().history.ticket()
    }

    /// Brings in what a loader has read in the metadata tree since it took `ticket`: `extents`, sorted and disjoint, are all that
    /// the tree has in `range`; what lies between them is hole. `range` may be wider than what the loader was asked for;
    /// extents are clipped to it.
    ///
    /// Fills only what is unknown and did not change since the ticket. The caller looks up again: the answer may be that of
    /// another loader, or still `Unknown` if [`LoadOutcome::refused`] is not 0. Merged checksums go to `sink`.
    pub fn load(
        &self,
        range: BlockRange,
        ticket: LoadTicket,
        extents: &[NewExtent],
        sink: &mut ChecksumSink<'_>,
    ) -> Result<LoadOutcome, BadExtents> {
        let in_order = extents.windows(2).all(|pair| pair[0].range.end().0 <= pair[1].range.start().0);
        if !in_order || !extents.iter().all(NewExtent::is_sound) {
            return Err(BadExtents);
        }
        let mut outcome = LoadOutcome::default();
        self.adjust(|draft, history| {
            let changed = match history.since(ticket, range) {
                Since::Changed(changed) => changed,
                Since::Forgotten => SmallVec::from_slice(&[range]),
            };
            // Behind the segments of these the range is the same all over.
            draft.list(
                extents
                    .last()
                    .map_or(BlockRange::new(FileBlock(0), 0), |last| last.range.intersection(range)),
            );
            for changed in &changed {
                let to_the_end = changed.end().0 == MAX_FILE_BLOCKS;
                draft.list(if to_the_end { BlockRange::new(changed.start(), 1) } else { *changed });
            }
            let loaded = Loaded { extents, changed: &changed };
            draft.rewrite(range, sink, &mut |at, out| loaded.fill(at, out, &mut outcome))
        });
        Ok(outcome)
    }

    /// Drops what is cached of `range` and not pinned, splitting at its borders. To be called after the metadata tree changed
    /// in a way that pinned nothing; results of loaders on their way are refused there.
    pub fn invalidate(&self, range: BlockRange) -> FileVersion {
        self.change(|draft, history| {
            draft.rewrite(range, &mut |_, _| {}, &mut |at, out| {
                forget(at, out, broken(Mutation::InvalidateDropsPinned))
            });
            history.record(range);
        })
    }

    /// Drops entries that are not pinned until some `target_bytes` are freed, going round the file from where the last call
    /// stopped. Returns by how many bytes the map shrank. Keeps writers of the file waiting for some 30 ns an entry: better little
    /// by little.
    pub fn evict(&self, target_bytes: u64) -> u64 {
        let writer = &mut *self.writer.lock();
        let (before, after) = self.evict_locked(writer, target_bytes);
        before.saturating_sub(after)
    }

    /// Resident bytes: nodes, view, history and the map itself; without what readers keep from being freed.
    pub fn memory_bytes(&self) -> u64 {
        let guard = pin();
        let history = self.writer.lock().history.bytes();
        self.view(&guard).stats().node_bytes
            + (history + size_of::<ExtentMap>() + size_of::<ViewData>()) as u64
    }

    /// Entries held in nodes.
    pub fn entries(&self) -> u64 {
        self.view(&pin()).stats().entries
    }

    /// A change of the file: makes a draft, and publishes it under the next version.
    fn change(&self, edit: impl FnOnce(&mut Draft<'_>, &mut History)) -> FileVersion {
        let mut version = FileVersion(0);
        self.edit(|draft, history| {
            edit(draft, history);
            draft.view.version.0 += 1;
            version = draft.view.version;
            true
        });
        version
    }

    /// A change of what is known of the file: the version stays. `edit` says whether there is anything to publish.
    fn adjust(&self, edit: impl FnOnce(&mut Draft<'_>, &mut History) -> bool) {
        self.edit(edit);
    }

    fn edit(&self, edit: impl FnOnce(&mut Draft<'_>, &mut History) -> bool) {
        let writer = &mut *self.writer.lock();
        let guard = pin();
        let mut draft = Draft::new(self.published.load(&guard).0, &mut writer.nodes);
        if edit(&mut draft, &mut writer.history) {
            self.publish_draft(draft);
        }
    }

    fn publish_draft(&self, draft: Draft<'_>) {
        let (view, nodes) = draft.finish();
        // A small map must not have more nodes waiting than living.
        let keep = (view.stats.entries as usize / 64).min(LIMBO_NODES);
        self.published.replace(view, nodes, keep);
    }

    fn evict_locked(&self, writer: &mut Writer, target_bytes: u64) -> (u64, u64) {
        let guard = pin();
        let current = self.published.load(&guard).0;
        let before = current.stats.node_bytes;
        let mut draft = Draft::new(current, &mut writer.nodes);
        let mut any = false;
        for _ in 0..2 {
            let goal = before.saturating_sub(target_bytes);
            let missing = draft.view.stats.node_bytes.saturating_sub(goal);
            if missing == 0 {
                break;
            }
            let turn = next_turn(&draft, writer.clock_hand, missing);
            any |= draft.rewrite(turn, &mut |_, _| {}, &mut |at, out| {
                // A hole to the end of a segment stays: it costs no more than the `Unknown` that would replace it.
                if at.piece.value == Value::HOLE && at.piece.end == node::SEGMENT_BLOCKS {
                    return Verdict::Keep;
                }
                forget(at, out, broken(Mutation::EvictTakesPinned))
            });
            let at_end = turn.end().0 == MAX_FILE_BLOCKS;
            writer.clock_hand = if at_end { FileBlock(0) } else { turn.end().next_start() };
        }
        let after = draft.view.stats.node_bytes;
        if any {
            self.publish_draft(draft);
        }
        (before, after)
    }
}

impl Drop for ExtentMap {
    fn drop(&mut self) {
        self.published.destroy(&mut self.writer.get_mut().nodes, all_nodes);
    }
}

impl fmt::Debug for ExtentMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.view(&pin()), f)
    }
}

/// The range from `hand` on in which dropping all that may go frees some `bytes`; to the end of the file if there is less.
fn next_turn(draft: &Draft<'_>, hand: FileBlock, bytes: u64) -> BlockRange {
    let mut freed = 0;
    let mut end = BlockRange::ALL.end();
    draft.walk_from(hand, &mut |at| {
        let value = at.piece.value;
        if !value.is_pinned() && value.state() != State::Unknown {
            freed += size_of::<mapping::Cell>() as u64;
        }
        end = at.range().end();
        freed < bytes
    });
    let end = if freed < bytes { BlockRange::ALL.end() } else { end };
    BlockRange::between(hand, end)
}

/// Drops what is cached in a piece, unless it is pinned.
fn forget(at: PieceInFile, out: &mut Rewritten<'_, '_>, also_pinned: bool) -> Verdict {
    let value = at.piece.value;
    if value == Value::UNKNOWN || (value.is_pinned() && !also_pinned) {
        return Verdict::Keep;
    }
    out.push(node::Piece { value: Value::UNKNOWN, sum: 0, ..at.piece });
    Verdict::Changed
}

/// Unpins a piece if it still maps to its part of `extent`.
fn unpin_piece(extent: &NewExtent, at: PieceInFile, out: &mut Rewritten<'_, '_>) -> Verdict {
    let value = at.piece.value;
    let published = Value::pack(extent.mapping).0.advanced(at.range().start().0 - extent.range.start().0);
    let same = value.same_place(published) || broken(Mutation::UnpinIgnoresIdentity);
    if !value.is_pinned() || !same {
        return Verdict::Keep;
    }
    out.push(node::Piece { value: value.unpinned(), ..at.piece });
    Verdict::Changed
}

/// What a loader brings.
struct Loaded<'a> {
    extents: &'a [NewExtent],
    /// Where it is not believed.
    changed: &'a [BlockRange],
}

impl Loaded<'_> {
    fn fill(&self, at: PieceInFile, out: &mut Rewritten<'_, '_>, outcome: &mut LoadOutcome) -> Verdict {
        let range = at.range();
        if at.piece.value != Value::UNKNOWN && !broken(Mutation::LoadOverwrites) {
            outcome.kept += range.len().0;
            return Verdict::Keep;
        }
        let first = self.changed.partition_point(|changed| changed.end().0 <= range.start().0);
        let mut changed = self.changed[first..].iter().map(|changed| changed.intersection(range)).peekable();
        if changed.peek() == Some(&range) {
            outcome.refused += range.len().0;
            return Verdict::Keep;
        }
        let mut next = range.start();
        for stale in changed.take_while(|changed| !changed.is_empty()) {
            self.fill_clean(&at, BlockRange::between(next, BlockEnd(stale.start().0)), out, outcome);
            out.push_range(&at, stale, (Value::UNKNOWN, 0));
            outcome.refused += stale.len().0;
            next = stale.end().next_start();
        }
        self.fill_clean(&at, BlockRange::between(next, range.end()), out, outcome);
        Verdict::Changed
    }

    /// Fills `range`, part of the piece `at`, from the extents; holes between them.
    fn fill_clean(
        &self,
        at: &PieceInFile,
        range: BlockRange,
        out: &mut Rewritten<'_, '_>,
        outcome: &mut LoadOutcome,
    ) {
        outcome.filled += range.len().0;
        let first = self.extents.partition_point(|extent| extent.range.end().0 <= range.start().0);
        let mut next = range.start();
        for extent in &self.extents[first..] {
            let part = extent.range.intersection(range);
            if part.is_empty() {
                break;
            }
            if next < part.start() {
                out.push_range(at, BlockRange::between(next, BlockEnd(part.start().0)), (Value::HOLE, 0));
            }
            let (value, sum) = Value::pack(extent.mapping);
            out.push_range(at, part, (value.advanced(part.start().0 - extent.range.start().0), sum));
            next = part.end().next_start();
        }
        if range.contains(next) {
            out.push_range(at, BlockRange::between(next, range.end()), (Value::HOLE, 0));
        }
    }
}
