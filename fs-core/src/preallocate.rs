//! Preallocation and zeroing: blocks that a file has before it writes to them.
//!
//! 1. lock the blocks of the range;
//! 2. find what lacks preallocated blocks ([`lacking`]): holes; when zeroing also whole blocks with content, which get new blocks,
//!    since those they have may be what a crash goes back to;
//! 3. allocate for all of it ([`Promise`]s of up to [`RUNS`] runs each). For want of space nothing has changed so far, and everything is
//!    given back;
//! 4. publish one promise after the other, each in a transaction; with the first of them what zeroing changes at its edges, with the
//!    last the size. A crash in between leaves a beginning of the range preallocated, or zero, which does no harm.
//!
//! **What is promised:** the first write of each block succeeds without free space. It goes to these very blocks
//! ([`store::place`](crate::store::place)), so it needs no data block; and what splitting the records asks of the metadata is
//! kept back from the allocation on ([`promise_share`](crate::txn::promise_share)).
//!
//! Memory: some 32 bytes for each hole and each run of the range, until the call ends.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::alloc::Stream;
use crate::channel::io::Io;
use crate::channel::operation::Growth;
use crate::coherence;
use crate::core::Core;
use crate::error::Result;
use crate::file::{File, FileInner};
use crate::publish::{Change, Promise, publish};
use crate::punch::{self, Edges, Zeroed};
use crate::records::extents::{self, Kind, Span};
use crate::txn::{Room, transact};
use crate::types::{FileBlock, Run};
use crate::write::At;
use crate::writeback;

/// Runs that are allocated and published in one transaction.
const RUNS: usize = 256;
/// Blocks (2 GiB) of a promise.
const BLOCKS: u64 = 1 << 19;
/// Records of a file looked at in one transaction, and replaced in one.
const RECORDS: usize = 256;

/// What becomes of the content of a range that gets blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Stays,
    /// It is dropped: the range reads as zeroes.
    Zeroed,
}

/// Gives a range blocks where it has none, and where its content is dropped.
pub(crate) async fn preallocate(
    core: &Arc<Core>,
    io: &Io,
    file: &File,
    (offset, len): (u64, u64),
    content: Content,
    growth: Growth,
) -> Result<()> {
    file.check_writable()?;
    if len == 0 {
        return Ok(());
    }
    writeback::with_room(core, io, || once(core, io, file.inner(), (offset, len), content, growth)).await
}

async fn once(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    (offset, len): (u64, u64),
    content: Content,
    growth: Growth,
) -> Result<()> {
    let (_guard, _) = coherence::lock_direct(core, io, file, At::Offset(offset), len).await?;
    let end = offset + len;
    let zeroed = (content == Content::Zeroed).then(|| Zeroed::new(offset, end, file.size()));
    let range = (FileBlock::containing(offset), FileBlock::at_or_after(end));
    let anew = zeroed.as_ref().map_or((range.1, range.1), |zeroed| zeroed.whole);
    let gaps = lacking(core, io, file, range, anew).await?;
    let promises = allocate(core, io, &gaps).await?;
    let edges = match &zeroed {
        Some(zeroed) => punch::edges(core, io, file, zeroed, Room::Data).await?,
        None => Edges::default(),
    };
    publish_all(core, io, file, promises, edges, growth.size(end)).await
}

impl Growth {
    /// The byte at which a file must end at least, after a range that ends at `end`.
    fn size(self, end: u64) -> u64 {
        match self {
            Growth::Grow => end,
            Growth::Keep => 0,
        }
    }
}

/// A range that is to be preallocated.
struct Gap {
    at: FileBlock,
    len: u64,
    /// Records that it replaces.
    records: usize,
}

/// Step 2: what of `[from, to)` is a hole, and what of `anew` has content. What it finds is stable, since the range is locked.
async fn lacking(
    core: &Arc<Core>,
    io: &Io,
    file: &FileInner,
    (mut from, to): Span,
    anew: Span,
) -> Result<Vec<Gap>> {
    let mut gaps: Vec<Gap> = Vec::new();
    while from < to {
        let found = transact(core, io, |t| extents::overlapping(t, file.id, from, to, RECORDS)).await?;
        let mut gap = |start: FileBlock, end: FileBlock, records: usize| match gaps.last_mut() {
            _ if start >= end => {}
            Some(last) if last.at.plus(last.len) == start && last.records + records <= RECORDS => {
                last.len += end.0 - start.0;
                last.records += records;
            }
            _ => gaps.push(Gap { at: start, len: end.0 - start.0, records }),
        };
        for extent in &found {
            gap(from, extent.at, 0);
            if extent.kind != Kind::Preallocated {
                gap(extent.at.max(anew.0), extent.end().min(anew.1), 1);
            }
            from = from.max(extent.end());
        }
        if found.len() < RECORDS {
            gap(from, to, 0);
            break;
        }
    }
    Ok(gaps)
}

/// Step 3.
async fn allocate(core: &Arc<Core>, io: &Io, gaps: &[Gap]) -> Result<Vec<Promise>> {
    let total = gaps.iter().map(|gap| gap.len).sum();
    let mut promises = Vec::new();
    // Where to go on: which gap, and how much of it is done.
    let (mut next, mut done) = (0, 0);
    while let Some(first) = gaps.get(next) {
        let mut these: SmallVec<[(FileBlock, u64); 4]> = SmallVec::new();
        let (mut blocks, mut records) = (0, 0);
        for gap in &gaps[next..] {
            let skip = if std::ptr::eq(gap, first) { done } else { 0 };
            records += gap.records;
            if blocks >= BLOCKS || these.len() >= RUNS || (records > RECORDS && !these.is_empty()) {
                break;
            }
            let len = (gap.len - skip).min(BLOCKS - blocks);
            these.push((gap.at.plus(skip), len));
            blocks += len;
        }
        let whole = promises.is_empty().then_some(total);
        let parts = transact(core, io, |t| {
            t.check_room(Room::Preallocated(whole.unwrap_or(blocks)))?;
            let runs = t.allocate_up_to(Stream::Data, blocks, RUNS)?;
            let mut parts: Vec<(FileBlock, Run)> = Vec::with_capacity(runs.len());
            let mut before = (usize::MAX, 0);
            for (index, run) in t.cut(runs, these.iter().map(|(_, len)| *len)) {
                let skip = if before.0 == index { before.1 } else { 0 };
                parts.push((these[index].0.plus(skip), run));
                before = (index, skip + run.len);
            }
            t.meta.preallocating += parts.iter().map(|(_, run)| run.len).sum::<u64>();
            Ok(parts)
        })
        .await?;
        let Some((at, run)) = parts.last().copied() else { break };
        let reached = at.plus(run.len);
        next += gaps[next..].partition_point(|gap| gap.at.plus(gap.len) <= reached);
        done = gaps.get(next).map_or(0, |gap| reached.0.saturating_sub(gap.at.0));
        promises.push(Promise::new(core, parts));
    }
    Ok(promises)
}

/// Step 4.
async fn publish_all(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    promises: Vec<Promise>,
    edges: Edges,
    size: u64,
) -> Result<()> {
    let idle = promises.is_empty() && edges.stored.is_empty() && edges.inline.is_none();
    if idle && size <= file.size() {
        return Ok(());
    }
    let mut promises = promises.into_iter().peekable();
    let mut change = edges.change(file);
    loop {
        change.promise = promises.next();
        let last = promises.peek().is_none();
        change.size = if last { size } else { 0 };
        publish(core, io, SmallVec::from_buf([change])).await?;
        if last {
            return Ok(());
        }
        change = Change::none(file);
    }
}
