//! How direct I/O, truncates and other changes of blocks live with the page cache and with ordered extents.
//!
//! Rule 3 of the design: who changes blocks behind the cache looks for pages again once it holds the range, and starts over if it must
//! wait. [`lock_direct`] and [`lock_exclusive`] return with the range held exclusively, no ordered extent in it, and no page of it
//! in memory:
//!
//! 1. lock the range;
//! 2. an ordered extent in it: let go, wait for it, start over;
//! 3. drop the clean pages of the range. Dirty pages, or pages in write-back: let go, write them back, start over. Others may make
//!    new ones meanwhile, so after [`ROUNDS`] rounds they are written back under the lock, which ends it: no completion needs a range
//!    lock, and write-back takes no other;
//! 4. an error of that write-back is the answer; nothing was changed.
//!
//! Nobody can bring a page of the range back while it is held: a fill holds its range shared from the look-up until the page is in.
//!
//! A direct write that cannot get rid of the pages would go the buffered way. As yet there is no such case; tests force it
//! ([`fallback_due`]).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use smallvec::SmallVec;

use crate::channel::io::Io;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::{FILE_BLOCKS_MAX, FILE_SIZE_MAX, FileInner};
use crate::mutation::{Mutation, broken};
use crate::page_cache::UNIT_BLOCKS;
use crate::range_lock::{Mode, RangeGuard};
use crate::types::{BLOCK_SHIFT, FileBlock};
use crate::write::At;
use crate::writeback;

/// Rounds in which the lock is given up while pages are written back.
const ROUNDS: u32 = 3;

/// What becomes of pages that a caller wants out of its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// Dirty ones are written back first.
    WriteBackAndDrop,
    /// Blocks that lie wholly in the range are about to lose their content: their pages, dirty or not, are left for
    /// [`FileInner::discard_pages`], which the caller calls in the transaction that changes the blocks (so that nothing is lost if it
    /// fails). Pages that lie partly in the range are written back and dropped.
    Discard,
}

/// Locks the blocks that `len` bytes at `at` touch, and nothing else; returns the byte offset too. With `wide`, the units that they lie
/// in.
pub(crate) async fn lock_range(file: &FileInner, at: At, len: u64, wide: bool) -> Result<(RangeGuard, u64)> {
    loop {
        let offset = match at {
            At::Offset(offset) => offset,
            At::End => file.size(),
        };
        let end = offset.checked_add(len).filter(|end| *end <= FILE_SIZE_MAX);
        let Some(end) = end else { return Err(Error::FileTooLarge { offset, len }) };
        let end = match at {
            At::Offset(_) => end,
            // Appenders exclude each other: the next one begins where this one ends.
            At::End => u64::MAX,
        };
        let guard = file.lock.lock(rounded(&(offset..end), wide), Mode::Exclusive).await;
        match at {
            At::End if file.size() != offset => {}
            _ => return Ok((guard, offset)),
        }
    }
}

/// A range of bytes, rounded out to blocks, or to units.
fn rounded(range: &Range<u64>, wide: bool) -> Range<u64> {
    let size = if wide { UNIT_BLOCKS << BLOCK_SHIFT } else { 1 << BLOCK_SHIFT };
    let end = if range.end > FILE_SIZE_MAX { u64::MAX } else { range.end.next_multiple_of(size) };
    range.start - range.start % size..end
}

/// The blocks that a range of bytes touches.
fn blocks_of(range: &Range<u64>) -> Range<u64> {
    let end = FileBlock::at_or_after(range.end).0.min(FILE_BLOCKS_MAX);
    FileBlock::containing(range.start).0..end
}

/// Locks the blocks that a direct write of `len` bytes at `at` touches; see the module documentation.
pub(crate) async fn lock_direct(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    at: At,
    len: u64,
) -> Result<(RangeGuard, u64)> {
    let mut round = 0;
    let early = broken(Mutation::PagesBeforeLock);
    loop {
        if let (true, At::Offset(offset)) = (early, at) {
            drop_pages(file, &(offset..offset + len), Pages::WriteBackAndDrop);
        }
        let (guard, offset) = lock_range(file, at, len, round >= ROUNDS).await?;
        let range = offset..offset + len;
        if len == 0 || early {
            return Ok((guard, offset));
        }
        let cleared = clear(core, io, &[(file, range)], Pages::WriteBackAndDrop, guard, &mut round).await?;
        if let Some(guard) = cleared {
            return Ok((guard, offset));
        }
    }
}

/// Locks the bytes of `range`, rounded out to blocks, for a change of what lies there; see the module documentation.
pub(crate) async fn lock_exclusive(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    range: Range<u64>,
    pages: Pages,
) -> Result<SmallVec<[RangeGuard; 1]>> {
    lock_all(core, io, &[(file, range)], pages).await
}

/// The same for ranges of several files, one of each, in the order of inodes: all are held at once, and all are given up when one of
/// them has to wait.
pub(crate) async fn lock_all(
    core: &Arc<Core>,
    io: &Io,
    wanted: &[(&Arc<FileInner>, Range<u64>)],
    pages: Pages,
) -> Result<SmallVec<[RangeGuard; 1]>> {
    let mut round = 0;
    loop {
        let mut guards = SmallVec::new();
        for (file, range) in wanted {
            guards.push(file.lock.lock(rounded(range, round >= ROUNDS), Mode::Exclusive).await);
        }
        if let Some(guards) = clear(core, io, wanted, pages, guards, &mut round).await? {
            return Ok(guards);
        }
    }
}

/// Steps 2 and 3, with the ranges held by `guards`. Gives the guards back when all is clear; else the caller locks again.
async fn clear<G>(
    core: &Arc<Core>,
    io: &Io,
    wanted: &[(&Arc<FileInner>, Range<u64>)],
    pages: Pages,
    guards: G,
    round: &mut u32,
) -> Result<Option<G>> {
    for (file, range) in wanted {
        let blocks = blocks_of(range);
        if file.ordered.overlaps(&blocks) && !broken(Mutation::NoLookForOrdered) {
            drop(guards);
            file.ordered.wait(blocks).await;
            return Ok(None);
        }
    }
    for (file, range) in wanted {
        let Some(busy) = drop_pages(file, range, pages) else { continue };
        if *round < ROUNDS {
            *round += 1;
            drop(guards);
            writeback::range(core, io, file, busy).await?;
            return Ok(None);
        }
        writeback::under_lock(core, io, file, busy).await?;
        let left = drop_pages(file, range, pages);
        debug_assert!(left.is_none(), "pages got dirty under an exclusive lock");
        if left.is_some() {
            return Ok(None);
        }
    }
    Ok(Some(guards))
}

/// Drops the pages that are in the way, as far as they are clean. Returns blocks that are not.
fn drop_pages(file: &FileInner, range: &Range<u64>, pages: Pages) -> Option<Range<u64>> {
    let cached = file.pages_if_any()?;
    let blocks = blocks_of(range);
    if pages == Pages::WriteBackAndDrop {
        return (!cached.drop_clean(&blocks)).then_some(blocks);
    }
    // Only the edges.
    let whole = FileBlock::at_or_after(range.start).0..FileBlock::containing(range.end).0;
    let edges = [blocks.start..whole.start.min(blocks.end), whole.end.max(blocks.start)..blocks.end];
    edges.into_iter().find(|edge| !edge.is_empty() && !cached.drop_clean(edge))
}

/// Whether this direct write is one that a test sends the buffered way.
pub(crate) fn fallback_due(core: &Core) -> bool {
    static TURN: AtomicU64 = AtomicU64::new(0);
    let one_in = core.fallback_one_in.load(Ordering::Relaxed);
    one_in > 0 && TURN.fetch_add(1, Ordering::Relaxed).is_multiple_of(one_in)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_rounded_out() {
        assert_eq!(rounded(&(1..4097), false), 0..8192);
        assert_eq!(rounded(&(4096..8192), false), 4096..8192);
        assert_eq!(rounded(&(4096..8192), true), 0..65536);
        assert_eq!(rounded(&(70_000..u64::MAX), true), 65536..u64::MAX);
        assert_eq!(blocks_of(&(4095..4097)), 0..2);
        assert_eq!(blocks_of(&(0..u64::MAX)), 0..FILE_BLOCKS_MAX);
    }
}
