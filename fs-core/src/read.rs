//! The general way of a read: any range, any number of extents.
//!
//! 1. take the file view under a block hold and list where the range lies ([`snapshot`]); what is not in memory is
//!    loaded first ([`crate::load`]). If the cache has newer pages of the range the read goes there ([`crate::buffered`]);
//! 2. read each piece into its part of the buffer, holes as zeroes ([`fill`]);
//! 3. verify checksums while the bytes are hot ([`verify`]); a block that fails is read once more before it is an error;
//! 4. give the hold back (it is a guard).
//!
//! A read of a range without dirty pages takes no lock and waits for no writer: the hold keeps the blocks of its view, so the whole range is seen in
//! one state. When there are other copies of a block, step 3 is where they are tried.

use std::sync::Arc;

use bdev_adapter::{DmaBuf, Request, Segments};

use crate::buffered;
use crate::channel::io::{Io, IoHandle};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::extent_map::{BlockEnd, BlockRange, View};
use crate::file::FileInner;
use crate::inline::{self, Inlined};
use crate::load;
use crate::mutation::{Mutation, Point, broken, reached};
use crate::pieces::{self, Missing, Piece, Pieces};
use crate::range_lock::Mode;
use crate::superblock::checksum32;
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock, Generation};

/// Bytes that a read through a copy moves at a time.
const COPY_CHUNK: usize = 1 << 20;

/// A block hold of a read that is a task; given back on drop.
struct Hold<'a> {
    io: &'a Io,
    generation: Generation,
}

impl<'a> Hold<'a> {
    fn take(core: &Core, io: &'a Io) -> Hold<'a> {
        let generation = io.holds.lock().acquire(core.open_generation(), 1);
        if broken(Mutation::ReadWithoutHold) {
            io.holds.lock().release(generation, 1);
        }
        Hold { io, generation }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if !broken(Mutation::ReadWithoutHold) {
            self.io.holds.lock().release(self.generation, 1);
        }
    }
}

/// Where a range of a file lies, in one state, and the hold that keeps it there.
struct Snapshot<'a> {
    pieces: Pieces,
    size: u64,
    _hold: Hold<'a>,
}

/// Who takes a snapshot.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// A direct read, which holds no lock: pages of the range may be newer than what the view knows.
    Direct,
    /// Somebody who holds the range, and knows what the cache has of it.
    Holder,
}

/// Step 1. None: the cache has newer pages of the range.
async fn snapshot<'a>(
    core: &Arc<Core>,
    io: &'a Io,
    file: &Arc<FileInner>,
    offset: u64,
    len: u64,
    by: By,
) -> Result<Option<Snapshot<'a>>> {
    loop {
        let hold = Hold::take(core, io);
        let missing = {
            let guard = crate::extent_map::pin();
            let view = file.map.view(&guard);
            let size = view.size();
            let end = offset.saturating_add(len).min(size);
            if end <= offset {
                return Ok(Some(Snapshot { pieces: Pieces::default(), size, _hold: hold }));
            }
            let (from, to) = (FileBlock::containing(offset), FileBlock::at_or_after(end));
            let collected = pieces::collect(&view, from, to, None);
            if by == By::Direct {
                reached(Point::ViewTaken);
                match newer(file, &view, from, to) {
                    Newer::Nothing => {}
                    Newer::Pages => return Ok(None),
                    Newer::View => continue,
                }
            }
            match collected {
                Ok(pieces) => return Ok(Some(Snapshot { pieces, size, _hold: hold })),
                Err(missing) => missing,
            }
        };
        let missing = match missing {
            Missing::Block(block) => block,
            Missing::Content => match inline::snapshot(core, io, file, offset, len, by).await? {
                Inlined::Here(pieces, size) => return Ok(Some(Snapshot { pieces, size, _hold: hold })),
                Inlined::Missing(block) => block,
                Inlined::Newer => return Ok(None),
            },
        };
        drop(hold);
        load::extents(core, io, file, missing).await?;
    }
}

/// What is newer than a view.
enum Newer {
    Nothing,
    /// Pages in the cache.
    Pages,
    /// Another view: write-back may have published pages and cleaned them after this one was taken.
    View,
}

/// Looks for pages of `[from, to)` that are newer than `view`. First for pages, then at the view: a page is published before it is
/// clean, so pages that are not seen here are in the view, or the view is not the current one.
fn newer(file: &FileInner, view: &View<'_>, from: FileBlock, to: FileBlock) -> Newer {
    let Some(pages) = file.pages_if_any() else { return Newer::Nothing };
    if broken(Mutation::ReadPastPages) {
        return Newer::Nothing;
    }
    if pages.is_busy() && pages.busy_in(&(from.0..to.0)) {
        return Newer::Pages;
    }
    match broken(Mutation::ViewBeforePages)
        || file.map.is_current_in(view, BlockRange::between(from, BlockEnd(to.0)))
    {
        true => Newer::Nothing,
        false => Newer::View,
    }
}

/// Reads whole blocks from byte `offset` on into `bufs`, each of whole blocks too, without a copy; returns how many bytes there were.
/// None: the cache has newer pages. The buffers come back in any case.
pub(crate) async fn read_blocks_direct(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    offset: u64,
    mut bufs: Segments,
) -> (Result<Option<usize>>, Segments) {
    let len = bufs.len();
    let snapshot = match snapshot(core, io, file, offset, len, By::Direct).await {
        Ok(Some(snapshot)) => snapshot,
        Ok(None) => return (Ok(None), bufs),
        Err(error) => return (Err(error), bufs),
    };
    let there = (snapshot.size.saturating_sub(offset)).min(len) as usize;
    if (there as u64) < len && broken(Mutation::ShortReadKeepsHold) {
        std::mem::forget(Hold::take(core, io));
    }
    let rest = bufs.split_off(there.div_ceil(BLOCK_SIZE) << BLOCK_SHIFT);
    let at = FileBlock::containing(offset);
    let (result, mut bufs) = fill(core, io, file, &snapshot.pieces, at, bufs).await;
    bufs.append(rest);
    (result.map(|()| Some(there)), bufs)
}

/// Reads from byte `offset` into a slice, through a copy.
pub(crate) async fn read_slice(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    offset: u64,
    out: &mut [u8],
) -> Result<usize> {
    let Some(snapshot) = snapshot(core, io, file, offset, out.len() as u64, By::Direct).await? else {
        return buffered::read(core, io, file, None, offset, out).await;
    };
    let there = (snapshot.size.saturating_sub(offset)).min(out.len() as u64) as usize;
    if there < out.len() && broken(Mutation::ShortReadKeepsHold) {
        std::mem::forget(Hold::take(core, io));
    }
    let mut done = 0;
    let mut bounce: Option<DmaBuf> = None;
    while done < there {
        let at = offset + done as u64;
        let skip = (at & (BLOCK_SIZE as u64 - 1)) as usize;
        let want = (COPY_CHUNK - skip).min(there - done);
        let span = (skip + want).div_ceil(BLOCK_SIZE) << BLOCK_SHIFT;
        let buf = match bounce.take() {
            Some(buf) if buf.len() == span => buf,
            _ => io.buffer(span)?,
        };
        let at = FileBlock::containing(at);
        let (result, buf) = fill(core, io, file, &snapshot.pieces, at, buf.into()).await;
        result?;
        let buf = one(buf);
        out[done..done + want].copy_from_slice(&buf[skip..skip + want]);
        done += want;
        bounce = Some(buf);
    }
    Ok(there)
}

/// Reads the whole blocks from `at` on into `buf`, for somebody who holds the range (and knows what the cache has of it): what lies beyond the end of the
/// file reads as zeroes.
pub(crate) async fn read_blocks(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    at: FileBlock,
    buf: DmaBuf,
) -> (Result<()>, DmaBuf) {
    match snapshot(core, io, file, at.byte(), buf.len() as u64, By::Holder).await {
        Ok(snapshot) => {
            let none = Pieces::default();
            let pieces = snapshot.as_ref().map_or(&none, |snapshot| &snapshot.pieces);
            let (result, buf) = fill(core, io, file, pieces, at, buf.into()).await;
            (result, one(buf))
        }
        Err(error) => (Err(error), buf),
    }
}

/// The buffer of a read that has one.
fn one(bufs: Segments) -> DmaBuf {
    // `send_all` makes at least one part, and every part gives its buffers back (the device contract), which join again.
    bufs.into_one().expect("a read keeps its buffer")
}

/// A part of what is being filled.
enum Part {
    Zero(Segments),
    Read(Piece, IoHandle),
}

/// Steps 2 and 3: fills `bufs` with the blocks from `at` on. What no piece covers reads as zeroes.
async fn fill(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    pieces: &Pieces,
    at: FileBlock,
    bufs: Segments,
) -> (Result<()>, Segments) {
    let mut whole = Segments::None;
    let mut outcome = Ok(());
    for part in send_all(core, io, &pieces.data, at, bufs) {
        let (result, bufs) = match part {
            Part::Zero(bufs) => (Ok(()), bufs),
            Part::Read(piece, handle) => finish(core, io, file, &piece, handle).await,
        };
        outcome = outcome.and(result);
        whole.append(bufs);
    }
    if let (Some(content), 0) = (&pieces.inline, at.0) {
        let there = content.len().min(whole.len() as usize);
        whole.copy_from(&content[..there]);
    }
    (outcome, whole)
}

/// Step 2: cuts the buffers into parts and sends a device request for each piece.
fn send_all(core: &Core, io: &Io, pieces: &[Piece], at: FileBlock, mut bufs: Segments) -> Vec<Part> {
    let end = at.plus(bufs.len() >> BLOCK_SHIFT);
    let mut parts = Vec::new();
    let mut cursor = at;
    let first = pieces.partition_point(|p| p.end() <= at);
    for piece in pieces[first..].iter().take_while(|p| p.at < end) {
        let piece = piece.clip(at, end);
        if piece.at > cursor {
            parts.push(Part::Zero(zeroed(take_front(&mut bufs, piece.at.0 - cursor.0))));
        }
        let mine = take_front(&mut bufs, piece.len);
        core.stats.read_data(mine.len());
        parts.push(Part::Read(piece, io.send(Request::read(core.locate(piece.addr), mine, 0))));
        cursor = piece.end();
    }
    if !bufs.is_empty() || parts.is_empty() {
        parts.push(Part::Zero(zeroed(bufs)));
    }
    parts
}

fn take_front(bufs: &mut Segments, blocks: u64) -> Segments {
    let rest = bufs.split_off((blocks as usize) << BLOCK_SHIFT);
    std::mem::replace(bufs, rest)
}

fn zeroed(mut bufs: Segments) -> Segments {
    bufs.as_mut_slice().iter_mut().for_each(|buf| buf.fill(0));
    bufs
}

/// Step 3: waits for one piece and verifies it; a piece that fails is read once more.
async fn finish(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    piece: &Piece,
    handle: IoHandle,
) -> (Result<()>, Segments) {
    let sums = expected(core, io, file, piece).await;
    let (result, bufs) = handle.await;
    let sums = match sums {
        Ok(sums) => sums,
        Err(error) => return (Err(error), bufs),
    };
    if result.is_ok() && verify(file, piece, &sums, &bufs).is_ok() {
        return (Ok(()), bufs);
    }
    core.stats.repeated_read();
    let _guard = match broken(Mutation::RetryLocks) {
        false => None,
        true => Some(file.lock.lock(piece.at.byte()..piece.end().byte(), Mode::Shared).await),
    };
    let (result, bufs) = io.call(Request::read(core.locate(piece.addr), bufs, 0)).await;
    let outcome = result
        .map_err(|e| Error::io(format!("reading {:?} at byte {}", file.id, piece.at.byte()), e))
        .and_then(|()| verify(file, piece, &sums, &bufs));
    (outcome, bufs)
}

/// The checksums that the blocks of `piece` must have; `None` for a block that has none stored.
async fn expected(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    piece: &Piece,
) -> Result<Vec<Option<u32>>> {
    if !core.options.verify_data {
        return Ok(vec![None; piece.len as usize]);
    }
    if let Some(sum) = piece.checksum {
        return Ok(vec![Some(sum)]);
    }
    let mut sums = vec![0; piece.len as usize];
    if core.checksums.lookup_into(piece.addr, &mut sums) {
        return Ok(sums.into_iter().map(Some).collect());
    }
    load::checksums(core, io, file, piece).await
}

/// Compares the blocks of `piece` in `bufs` with their checksums.
fn verify(file: &FileInner, piece: &Piece, sums: &[Option<u32>], bufs: &Segments) -> Result<()> {
    for (i, (block, stored)) in bufs.chunks(BLOCK_SIZE).zip(sums).enumerate() {
        let Some(stored) = *stored else { continue };
        let found = checksum32(block);
        if found != stored {
            let (offset, addr) = (piece.at.plus(i as u64).byte(), piece.addr.plus(i as u64));
            return Err(Error::DataChecksum { inode: file.id, offset, addr, stored, found });
        }
    }
    Ok(())
}
