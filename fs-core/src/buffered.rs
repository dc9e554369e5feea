//! Reads and writes: by the handle direct, or through the page cache.
//!
//! A buffered write ([`write`]):
//!
//! 1. lock the blocks that it touches exclusively;
//! 2. bring in the pages at its edges of which it changes only a part ([`edges`]);
//! 3. reserve space for the pages that are not dirty yet ([`Reservation`]): want of space is answered here and never later. If space
//!    might come back with write-back of other pages, that is tried once, without the lock; then the direct way, which can do without
//!    space where blocks were preallocated;
//! 4. put the pages in and mark them dirty, up to 1 MiB in one step ([`FilePages::write`]), then let the file grow ([`accept`]);
//! 5. unlock; if too much of the cache is dirty, help to write back ([`writeback::throttle`]).
//!
//! Rule 2 of the design: the range is held from before step 2 until the size is grown. The write need not look for ordered
//! extents, since no flight of write-back is disturbed by it: the flight has the pages as they were when it took them, this
//! write makes new versions ([`crate::page_cache::Page::make_mut`]) with reservations of their own, and the flight's completion leaves a
//! page that is dirty again alone. Nor does a completion need a range lock, so it never waits for this write. (Direct
//! writes keep the range for as long as their ordered extent lives.)
//!
//! A buffered read ([`read`]): lock the range shared; copy the pages that are here; fill what is missing from the device ([`fill`]), run by
//! run. A view of the file is taken *after* a page was found missing: a page that was dirty and is gone was published before it
//! was clean, so the view has it. The lock is held from the look-up until the pages are in, so no direct write gets between.
//! A direct read of a range with dirty pages goes the same way, and puts nothing into the cache ([`crate::read`]).
//!
//! Rule 4: what either holds - the range, the reservation - are guards of these functions; the part of a reservation that was not used
//! goes back before they return, whichever way.

use std::ops::Range;
use std::sync::Arc;

use bdev_adapter::{DmaBuf, Segments};

use crate::channel::io::Io;
use crate::coherence::{self, lock_range};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::{File, FileInner};
use crate::mutation::{Mutation, Point, broken, reached};
use crate::page_cache::{Ahead, FilePages, NewPage, Page, UNIT_BLOCKS, Unfit};
use crate::range_lock::Mode;
use crate::reserve::Reservation;
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock};
use crate::write::At;
use crate::{read, write, writeback};

/// Blocks that are looked up, filled or put in at once.
const CHUNK_BLOCKS: u64 = 256;

// ---- by the handle

/// Reads into buffers, one behind the other, in one state of the file; returns how many bytes there were. Without a copy if the handle
/// is direct, and offset and lengths are whole blocks. The buffers come back in any case.
pub(crate) async fn read_bufs(
    core: &Arc<Core>,
    io: &Io,
    file: &File,
    offset: u64,
    mut bufs: Segments,
) -> (Result<usize>, Segments) {
    if !file.is_buffered() && write::are_blocks(offset, &bufs) {
        let result;
        (result, bufs) = read::read_blocks_direct(core, io, file.inner(), offset, bufs).await;
        match result {
            Ok(None) => {}
            Ok(Some(there)) => return (Ok(there), bufs),
            Err(error) => return (Err(error), bufs),
        }
    }
    if let Segments::One(buf) = &mut bufs {
        return (read_slice(core, io, file, offset, buf).await, bufs);
    }
    let result = async {
        let mut whole = io.buffer(bufs.len() as usize)?;
        let there = read_slice(core, io, file, offset, &mut whole).await?;
        bufs.copy_from(&whole[..there]);
        Ok(there)
    };
    (result.await, bufs)
}

/// Reads into a slice; returns how many bytes there were.
pub(crate) async fn read_slice(
    core: &Arc<Core>,
    io: &Io,
    file: &File,
    offset: u64,
    out: &mut [u8],
) -> Result<usize> {
    if file.is_buffered() {
        return read(core, io, file.inner(), Some(file), offset, out).await;
    }
    read::read_slice(core, io, file.inner(), offset, out).await
}

/// Writes buffers, one behind the other; returns the byte offset that they went to. Without a copy if the handle is direct, and offset
/// and lengths are whole blocks. The buffers come back in any case.
pub(crate) async fn write_bufs(
    core: &Arc<Core>,
    io: &Io,
    file: &File,
    at: At,
    bufs: Segments,
) -> (Result<u64>, Segments) {
    if file.is_buffered() {
        return (write(core, io, file, at, &write::flat(&bufs)).await, bufs);
    }
    if coherence::fallback_due(core) {
        return (fall_back(core, io, file, at, &write::flat(&bufs)).await, bufs);
    }
    write::write_bufs(core, io, file, at, bufs).await
}

/// Writes a slice; returns the byte offset that it went to.
pub(crate) async fn write_slice(core: &Arc<Core>, io: &Io, file: &File, at: At, data: &[u8]) -> Result<u64> {
    if file.is_buffered() {
        return write(core, io, file, at, data).await;
    }
    if coherence::fallback_due(core) {
        return fall_back(core, io, file, at, data).await;
    }
    write::write_slice(core, io, file, at, data).await
}

/// A direct write that cannot free its range of pages: it lets go of what it holds and goes through the cache. Its data goes to the
/// device before it returns, and an error of that is its answer.
async fn fall_back(core: &Arc<Core>, io: &Io, file: &File, at: At, data: &[u8]) -> Result<u64> {
    file.check_writable()?;
    let (guard, offset) = coherence::lock_direct(core, io, file.inner(), at, data.len() as u64).await?;
    if broken(Mutation::FallbackKeepsLock) {
        std::mem::forget(guard);
    } else {
        drop(guard);
    }
    reached(Point::FellBack);
    if let (true, Some(pages)) = (broken(Mutation::FallbackClearsDirty), file.inner().pages_if_any()) {
        pages.discard(file.inner(), &blocks_of(offset, data.len() as u64));
    }
    let offset = write(core, io, file, at, data).await?;
    writeback::range(core, io, file.inner(), blocks_of(offset, data.len() as u64)).await?;
    Ok(offset)
}

/// The blocks that `len` bytes at `offset` touch.
fn blocks_of(offset: u64, len: u64) -> Range<u64> {
    FileBlock::containing(offset).0..FileBlock::at_or_after(offset + len).0
}

// ---- writing

/// Writes through the cache; returns the byte offset that it went to.
async fn write(core: &Arc<Core>, io: &Io, file: &File, mut at: At, data: &[u8]) -> Result<u64> {
    file.check_writable()?;
    writeback::admit(core, io).await?;
    let inner = file.inner();
    let mut flushed = false;
    let offset = loop {
        let (guard, offset) = lock_range(inner, at, data.len() as u64, false).await?;
        let guard = (!broken(Mutation::UnlockBeforeDirty)).then_some(guard);
        if data.is_empty() {
            break offset;
        }
        let accepted = accept(core, io, inner, offset, data).await;
        if accepted.is_err() && inner.size() > offset {
            // An append that has begun goes on where it began.
            at = At::Offset(offset);
        }
        match accepted {
            Err(Error::NoSpace { .. }) if !flushed && writeback::may_free(core) => {
                // What dirty pages replace, and what was reserved for the worst case, comes back when they are written.
                flushed = true;
                drop(guard);
                // Their errors are noted with their files.
                let _ = writeback::all(core, io).await;
            }
            Err(error @ Error::NoSpace { .. }) => {
                // What was preallocated is there for a write that goes past the cache: it needs no space but for what is not.
                drop(guard);
                return match write::write_slice(core, io, file, at, data).await {
                    Err(Error::NoSpace { .. }) => Err(error),
                    result => result,
                };
            }
            result => {
                result?;
                break offset;
            }
        }
    };
    if broken(Mutation::UnlockBeforeGrowth) {
        reached(Point::Unlocked);
        inner.map.grow(offset + data.len() as u64);
    }
    writeback::throttle(core, io).await;
    Ok(offset)
}

/// Steps 2 to 4, with the range held.
async fn accept(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, offset: u64, data: &[u8]) -> Result<()> {
    let pages = file.pages(core);
    let blocks = blocks_of(offset, data.len() as u64);
    let mut bases = edges(core, io, file, offset, data.len() as u64).await?;
    let mut reservation = Reservation::take(core, io, file, pages.not_dirty(&blocks)).await?;
    reached(Point::Reserved);
    let mut result = Ok(());
    for chunk in chunks(&blocks) {
        let end = (chunk.end << BLOCK_SHIFT).min(offset + data.len() as u64);
        result = put_in(core, io, file, offset, data, &chunk, end, &mut bases, &mut reservation).await;
        if result.is_err() {
            break;
        }
        if !broken(Mutation::UnlockBeforeGrowth) {
            file.map.grow(end);
        }
        file.inode.lock().touch();
        if chunk.end < blocks.end && writeback::is_too_much(core) {
            // A long write must not fill memory: what is done of it goes to the device, under the lock that it holds.
            let units = blocks.start.next_multiple_of(UNIT_BLOCKS)..chunk.end - chunk.end % UNIT_BLOCKS;
            result = writeback::under_lock(core, io, file, units).await;
        }
        if result.is_err() {
            break;
        }
    }
    match result.is_err() && broken(Mutation::ErrorKeepsReservation) {
        false => reservation.give_back(),
        true => reservation.settled(),
    }
    core.pages.shrink();
    result
}

/// Cuts a range of blocks at the borders of units.
fn chunks(blocks: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let Range { mut start, end } = *blocks;
    std::iter::from_fn(move || {
        let next = (start - start % UNIT_BLOCKS + CHUNK_BLOCKS).min(end);
        let chunk = start..next;
        start = next;
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// Step 4 for the blocks of `chunk`, up to byte `end`.
#[allow(clippy::too_many_arguments, reason = "the state of one write")]
async fn put_in(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    offset: u64,
    data: &[u8],
    chunk: &Range<u64>,
    end: u64,
    bases: &mut Vec<(u64, Page)>,
    reservation: &mut Reservation,
) -> Result<()> {
    let pages = file.pages(core);
    loop {
        let mut new = new_pages(offset, data, chunk, end, bases);
        let written = {
            // As for the bound of an ordered extent: see `Slot::register`.
            let _meta = (end > file.size()).then(|| core.meta.lock());
            pages.write(file, &mut new, end, file.size(), || core.may_dirty())
        };
        match written {
            Ok(dirtied) => {
                reservation.move_to_pool(dirtied);
                return Ok(());
            }
            Err(Unfit::Closed) => return Err(Error::Unmounted),
            // It was here, and was evicted since.
            Err(Unfit::Missing(block)) => {
                let page = fill_one(core, io, file, block).await?;
                bases.push((block, page));
            }
        }
    }
}

/// The pages that a write makes of the blocks of `chunk`.
fn new_pages<'a>(
    offset: u64,
    data: &'a [u8],
    chunk: &Range<u64>,
    end: u64,
    bases: &[(u64, Page)],
) -> Vec<NewPage<'a>> {
    let page = |at: u64| {
        let start = (at << BLOCK_SHIFT).max(offset);
        let stop = ((at + 1) << BLOCK_SHIFT).min(end);
        let bytes = &data[(start - offset) as usize..(stop - offset) as usize];
        if bytes.len() == BLOCK_SIZE {
            return NewPage::Whole { at, page: Page::copied(bytes) };
        }
        let base = bases.iter().find(|(block, _)| *block == at).map(|(_, page)| page.clone());
        NewPage::Part { at, skip: (start - (at << BLOCK_SHIFT)) as usize, bytes, base }
    };
    chunk.clone().map(page).collect()
}

/// Step 2: the pages of the blocks that a write changes in part, as far as they are not here.
async fn edges(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    offset: u64,
    len: u64,
) -> Result<Vec<(u64, Page)>> {
    let blocks = blocks_of(offset, len);
    let (head, tail) = (offset % BLOCK_SIZE as u64, (offset + len) % BLOCK_SIZE as u64);
    let mut partial = Vec::new();
    if head != 0 {
        partial.push(blocks.start);
    }
    if tail != 0 && (head == 0 || blocks.end - blocks.start > 1) {
        partial.push(blocks.end - 1);
    }
    let mut bases = Vec::new();
    for block in partial {
        if file.pages(core).first_missing(block..block + 1).is_none() {
            continue;
        }
        // Nothing is there behind the end of the file.
        let page = match block << BLOCK_SHIFT >= file.size() {
            true => Page::zeroed(),
            false => fill_one(core, io, file, block).await?,
        };
        bases.push((block, page));
    }
    Ok(bases)
}

// ---- reading

/// Reads through the cache. `handle`: the buffered handle that reads, for which pages are kept and read ahead; none: a direct
/// read of a range with dirty pages.
pub(crate) async fn read(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    handle: Option<&File>,
    offset: u64,
    out: &mut [u8],
) -> Result<usize> {
    let there = |file: &FileInner, most: u64| file.size().saturating_sub(offset).min(most);
    let most = there(file, out.len() as u64);
    if most == 0 {
        return Ok(0);
    }
    let blocks = blocks_of(offset, most);
    let guard = file.lock.lock(blocks.start << BLOCK_SHIFT..blocks.end << BLOCK_SHIFT, Mode::Shared).await;
    let guard = (!broken(Mutation::FillUnlocked)).then_some(guard);
    let len = there(file, most) as usize;
    let result = copy_out(core, io, file, handle, offset, &mut out[..len]).await;
    if len < out.len() && broken(Mutation::ShortReadKeepsLock) {
        std::mem::forget(guard);
    } else {
        drop(guard);
    }
    result?;
    if let Some(handle) = handle {
        read_ahead(core, io, handle, offset, offset + len as u64).await;
    }
    Ok(len)
}

/// Copies bytes from `offset` on to all of `out`, which lies inside the file, with the range held.
async fn copy_out(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    handle: Option<&File>,
    offset: u64,
    out: &mut [u8],
) -> Result<()> {
    let pages = file.pages(core);
    let end = offset + out.len() as u64;
    let mut at = offset;
    let mut found = Vec::new();
    let mut waited = false;
    while at < end {
        let first = at >> BLOCK_SHIFT;
        let last = FileBlock::at_or_after(end).0.min(first + CHUNK_BLOCKS);
        found.clear();
        pages.look_up(first..last, &mut found);
        // The pages at the front that are here, or that are not.
        let here = found[0].is_some();
        let count = found.iter().take_while(|page| page.is_some() == here).count();
        let stop = ((first + count as u64) << BLOCK_SHIFT).min(end);
        let out = &mut out[(at - offset) as usize..(stop - offset) as usize];
        let skip = (at % BLOCK_SIZE as u64) as usize;
        if here {
            copy_blocks(found[..count].iter().flatten().map(|page| &page[..]), skip, out);
        } else {
            let under_way = handle.and_then(|handle| handle.readahead().lock().bringing(first));
            if let (Some(ahead), false) = (under_way, waited) {
                ahead.wait().await;
                waited = true;
                continue;
            }
            let buf =
                fill(core, io, file, first..first + count as u64, handle.is_some().then_some(true)).await?;
            copy_blocks(buf.chunks_exact(BLOCK_SIZE), skip, out);
        }
        at = stop;
        waited = false;
    }
    Ok(())
}

/// Copies blocks to `out`, without the first `skip` bytes.
fn copy_blocks<'a>(blocks: impl Iterator<Item = &'a [u8]>, mut skip: usize, out: &mut [u8]) {
    let mut done = 0;
    for block in blocks {
        let part = &block[skip..BLOCK_SIZE.min(skip + out.len() - done)];
        out[done..done + part.len()].copy_from_slice(part);
        done += part.len();
        skip = 0;
    }
}

/// Reads blocks that were found missing, with the range held since then, and puts their pages into the cache if `keep` is given
/// (saying whether a user wants them at once).
async fn fill(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    blocks: Range<u64>,
    keep: Option<bool>,
) -> Result<DmaBuf> {
    let buf = io.buffer(((blocks.end - blocks.start) as usize) << BLOCK_SHIFT)?;
    let (result, buf) = read::read_blocks(core, io, file, FileBlock(blocks.start), buf).await;
    result?;
    if let Some(used) = keep {
        let pages: Vec<Page> = buf.chunks_exact(BLOCK_SIZE).map(Page::copied).collect();
        file.pages(core).insert(file, blocks.start, &pages, used);
    }
    Ok(buf)
}

/// The same for one block, as a page. Room is made for it only when it is written.
async fn fill_one(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, block: u64) -> Result<Page> {
    Ok(Page::copied(&fill(core, io, file, block..block + 1, None).await?))
}

/// Reads ahead of a sequential reader, which has just read `[offset, end)`.
async fn read_ahead(core: &Arc<Core>, io: &Io, handle: &File, offset: u64, end: u64) {
    let file = handle.inner();
    let last = FileBlock::at_or_after(file.size()).0;
    let Some((range, round)) = handle.readahead().lock().advance(offset, end, last) else { return };
    let task = bring(Arc::clone(core), io.clone(), handle.clone(), range, round);
    io.spawn(Box::pin(task));
    // A blocking caller polls its channel only while it waits: once now, so that the requests are sent.
    io.yield_now().await;
}

/// A round of read-ahead. It gives way to writers: what is locked is not read ahead.
/// It keeps the file open: the mappings of one that has left memory are of the past.
async fn bring(core: Arc<Core>, io: Io, handle: File, range: Range<u64>, round: Arc<Ahead>) {
    let file = handle.inner();
    let bytes = range.start << BLOCK_SHIFT..range.end << BLOCK_SHIFT;
    if let Some(_guard) = file.lock.try_lock(bytes, Mode::Shared) {
        let pages: &Arc<FilePages> = file.pages(&core);
        let mut from = range.start;
        while let Some(missing) = pages.first_missing(from..range.end) {
            from = missing.end;
            // Whoever wants the pages will get the error.
            if fill(&core, &io, file, missing, Some(false)).await.is_err() {
                break;
            }
        }
    }
    round.done();
}
