//! A direct write.
//!
//! 1. lock the blocks of the range exclusively;
//! 2. allocate, as one or several runs ([`allocate`]); the blocks are owned by an [`Ordered`] extent from here on;
//! 3. fill the edges of an unaligned write from what is there ([`with_edges`]), so that whole blocks are written;
//! 4. checksum the blocks while they are hot and write them ([`store`]);
//! 5. when all of them are on the device: publish the new mapping and size (pinned), put extents and checksums into the trees,
//!    free what was replaced, unpin ([`publish`]) - in one transaction, so that a crash sees all of it or nothing;
//! 6. unlock (the guard).
//!
//! A failure before step 5 gives the blocks back and changes nothing: the old content stays. A write longer than
//! [`ATOMIC_WRITE_MAX`] goes in pieces ([`cut`]), under one lock: all are allocated, then all are stored, then each is published
//! on its own. So want of space and errors of the device are found before anything has changed, however long the
//! write, and each piece is atomic.

use std::sync::Arc;

use bdev_adapter::{DmaBuf, Request};
use smallvec::SmallVec;

use crate::alloc::Stream;
use crate::channel::io::Io;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::{FILE_SIZE_MAX, File, FileInner};
use crate::ordered::Ordered;
use crate::range_lock::{Mode, RangeGuard};
use crate::records::checksums;
use crate::records::extents::{self, Extent};
use crate::superblock::checksum32;
use crate::txn::{Room, transact};
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock, Generation, Run};
use crate::{pieces, read};

/// Largest write in bytes that is whole or absent after a crash.
pub const ATOMIC_WRITE_MAX: usize = 1 << 20;
const BLOCK_MASK: u64 = BLOCK_SIZE as u64 - 1;

/// Where a write goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum At {
    /// At this byte.
    Offset(u64),
    /// At the end of the file, whatever it is when the lock is held.
    End,
}

/// Step 1: locks the blocks that `len` bytes at `at` touch; returns the byte offset too.
async fn lock(file: &FileInner, at: At, len: u64) -> Result<(RangeGuard, u64)> {
    loop {
        let offset = match at {
            At::Offset(offset) => offset,
            At::End => file.size(),
        };
        let end = offset.checked_add(len).filter(|end| *end <= FILE_SIZE_MAX);
        let Some(end) = end else { return Err(Error::FileTooLarge { offset, len }) };
        let locked_end = match at {
            At::Offset(_) => FileBlock::at_or_after(end).byte(),
            // Appenders exclude each other: the next one begins where this one ends.
            At::End => u64::MAX,
        };
        let guard = file.lock.lock(FileBlock::containing(offset).byte()..locked_end, Mode::Exclusive).await;
        match at {
            At::End if file.size() != offset => {}
            _ => return Ok((guard, offset)),
        }
    }
}

/// Writes a buffer; without a copy when it is whole blocks. Returns the byte offset that it went to.
pub(crate) async fn write_buf(
    core: &Arc<Core>,
    io: &Io,
    file: &File,
    at: At,
    mut buf: DmaBuf,
) -> (Result<u64>, DmaBuf) {
    if let Err(error) = file.check_writable() {
        return (Err(error), buf);
    }
    let inner = file.inner();
    let (_guard, offset) = match lock(inner, at, buf.len() as u64).await {
        Ok(locked) => locked,
        Err(error) => return (Err(error), buf),
    };
    if (offset | buf.len() as u64) & BLOCK_MASK != 0 {
        let result = copy_in(core, io, inner, offset, &buf).await;
        return (result.map(|()| offset), buf);
    }
    let pieces = match allocate_all(core, io, offset, buf.len()).await {
        Ok(pieces) => pieces,
        Err(error) => return (Err(error), buf),
    };
    let mut written: Option<DmaBuf> = None;
    let mut all = Pieces::new();
    for piece in pieces {
        let rest = buf.split_off(piece.len);
        let (result, front) =
            store(core, io, piece.at(), piece.ordered, buf, piece.offset + piece.len as u64).await;
        let whole = join(written.take(), front);
        match result {
            Ok(stored) => all.push(stored),
            Err(error) => return (Err(error), join(Some(whole), rest)),
        }
        written = Some(whole);
        buf = rest;
    }
    let result = publish_all(core, io, inner, all).await;
    (result.map(|()| offset), join(written, buf))
}

/// What a write does at once, whole or not at all; a longer one is cut at block borders.
fn cut(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = len - done;
        if left == 0 {
            return None;
        }
        let at = offset + done as u64;
        let skip = (at & BLOCK_MASK) as usize;
        let piece = if left <= ATOMIC_WRITE_MAX { left } else { ATOMIC_WRITE_MAX - skip };
        done += piece;
        Some((at, piece))
    })
}

/// Blocks that `len` bytes (> 0) at `offset` touch.
fn blocks_of(offset: u64, len: usize) -> u64 {
    FileBlock::at_or_after(offset + len as u64).0 - FileBlock::containing(offset).0
}

/// A piece of a write and the blocks that it will go to.
struct Piece {
    offset: u64,
    len: usize,
    ordered: Ordered,
}

impl Piece {
    fn at(&self) -> FileBlock {
        FileBlock::containing(self.offset)
    }
}

/// Mostly there is one.
type Pieces<T> = SmallVec<[T; 1]>;

/// Step 2 for all pieces of a write.
async fn allocate_all(core: &Arc<Core>, io: &Io, offset: u64, len: usize) -> Result<Pieces<Piece>> {
    let mut pieces = Pieces::new();
    for (offset, len) in cut(offset, len) {
        let blocks = blocks_of(offset, len);
        let ordered = allocate(core, io, blocks, Room::Data(blocks)).await?;
        pieces.push(Piece { offset, len, ordered });
    }
    Ok(pieces)
}

fn join(front: Option<DmaBuf>, back: DmaBuf) -> DmaBuf {
    match front {
        None => back,
        Some(mut front) => {
            let joined = front.unsplit(back);
            debug_assert!(joined.is_ok(), "the parts of a buffer do not follow each other");
            front
        }
    }
}

/// Writes a slice, through a copy. Returns the byte offset that it went to.
pub(crate) async fn write_slice(core: &Arc<Core>, io: &Io, file: &File, at: At, data: &[u8]) -> Result<u64> {
    file.check_writable()?;
    let inner = file.inner();
    let (_guard, offset) = lock(inner, at, data.len() as u64).await?;
    copy_in(core, io, inner, offset, data).await?;
    Ok(offset)
}

/// Writes `data` at `offset` of a file whose range is locked.
async fn copy_in(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, offset: u64, data: &[u8]) -> Result<()> {
    let mut all = Pieces::new();
    for piece in allocate_all(core, io, offset, data.len()).await? {
        let from = (piece.offset - offset) as usize;
        let buf = with_edges(core, io, file, piece.offset, &data[from..from + piece.len]).await?;
        let size = piece.offset + piece.len as u64;
        all.push(store(core, io, piece.at(), piece.ordered, buf, size).await.0?);
    }
    publish_all(core, io, file, all).await
}

/// Step 3: a buffer of whole blocks with `data` at byte `at` and the file's content around it.
async fn with_edges(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    at: u64,
    data: &[u8],
) -> Result<DmaBuf> {
    let skip = (at & BLOCK_MASK) as usize;
    let blocks = (skip + data.len()).div_ceil(BLOCK_SIZE);
    let mut buf = io.buffer(blocks << BLOCK_SHIFT)?;
    let first = FileBlock::containing(at);
    let tail = (skip + data.len()) % BLOCK_SIZE;
    if skip != 0 || (tail != 0 && blocks == 1) {
        buf = read_edge(core, io, file, first, buf, 0).await?;
    }
    if tail != 0 && blocks > 1 {
        buf = read_edge(core, io, file, first, buf, blocks - 1).await?;
    }
    buf[skip..skip + data.len()].copy_from_slice(data);
    Ok(buf)
}

/// Reads block `index` of the range that begins at `first` into its place in `buf`.
async fn read_edge(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    first: FileBlock,
    mut buf: DmaBuf,
    index: usize,
) -> Result<DmaBuf> {
    let mut block = buf.split_off(index << BLOCK_SHIFT);
    let rest = block.split_off(BLOCK_SIZE);
    let (result, block) = read::read_blocks(core, io, file, first.plus(index as u64), block).await;
    result?;
    Ok(join(Some(join(Some(buf), block)), rest))
}

/// Step 2.
pub(crate) async fn allocate(core: &Arc<Core>, io: &Io, blocks: u64, room: Room) -> Result<Ordered> {
    let runs = transact(core, io, |t| {
        t.check_room(room)?;
        t.allocate(Stream::Data, blocks)
    })
    .await?;
    Ok(Ordered::new(core, runs))
}

/// Blocks that are on the device, and that nothing refers to yet.
pub(crate) struct Stored {
    at: FileBlock,
    ordered: Ordered,
    sums: Vec<u32>,
    /// The file ends at this byte at least when they are published.
    size: u64,
}

impl Stored {
    /// The extent records: one for each run; a run of one block carries its checksum.
    pub(crate) fn records(&self, birth: Generation) -> SmallVec<[Extent; 4]> {
        let mut done = 0;
        self.runs()
            .iter()
            .map(|run| {
                let checksum = (run.len == 1).then(|| self.sums[done as usize]);
                let extent =
                    Extent { at: self.at.plus(done), len: run.len, addr: run.start, checksum, birth };
                done += run.len;
                extent
            })
            .collect()
    }

    pub(crate) fn runs(&self) -> &[Run] {
        self.ordered.runs()
    }

    pub(crate) fn ordered(&self) -> &Ordered {
        &self.ordered
    }

    /// The trees refer to the blocks now.
    pub(crate) fn finish(self) {
        self.ordered.finish();
    }
}

/// Step 4: writes the whole blocks of `buf`, which go to file block `at`, to the blocks of `ordered`.
pub(crate) async fn store(
    core: &Arc<Core>,
    io: &Io,
    at: FileBlock,
    ordered: Ordered,
    buf: DmaBuf,
    size: u64,
) -> (Result<Stored>, DmaBuf) {
    let sums = buf.chunks_exact(BLOCK_SIZE).map(checksum32).collect();
    let (result, buf) = send_all(core, io, ordered.runs(), buf).await;
    // On failure the ordered extent gives its blocks back on drop.
    (result.map(|()| Stored { at, ordered, sums, size }), buf)
}

async fn send_all(core: &Arc<Core>, io: &Io, runs: &[Run], mut buf: DmaBuf) -> (Result<()>, DmaBuf) {
    let mut handles = SmallVec::<[_; 4]>::new();
    core.stats.wrote_data(buf.len() as u64);
    for run in runs {
        let rest = buf.split_off((run.len as usize) << BLOCK_SHIFT);
        handles.push(io.send(Request::write(core.locate(run.start), buf, 0)));
        buf = rest;
    }
    let mut outcome = Ok(());
    let mut whole = None;
    for handle in handles {
        let (result, bufs) = handle.await;
        if let (Err(error), true) = (result, outcome.is_ok()) {
            outcome = Err(Error::io("writing file data", error));
        }
        if let Some(piece) = bufs.into_one() {
            whole = Some(join(whole, piece));
        }
    }
    (outcome, join(whole, buf))
}

/// Step 5 for all pieces.
async fn publish_all(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, pieces: Pieces<Stored>) -> Result<()> {
    for stored in pieces {
        publish(core, io, file, stored).await?;
    }
    Ok(())
}

/// Step 5.
async fn publish(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, stored: Stored) -> Result<()> {
    let Stored { at, sums, size, .. } = &stored;
    let end = at.plus(sums.len() as u64);
    transact(core, io, |t| {
        let new = stored.records(t.generation());
        let old = extents::overlapping(t, file.id, *at, end, usize::MAX)?;
        let replace = extents::plan(t, file.id, (*at, end), &old, &new)?;
        let mut chunks = checksums::Plan::default();
        for (extent, sums) in apart(&new, sums) {
            checksums::plan(t, &mut chunks, extent.run(), sums)?;
        }
        t.ready(replace.len() + chunks.len())?;

        // From here on nothing stops. Readers see the new content, then the tree does, then the pins go.
        for (extent, sums) in apart(&new, sums) {
            core.checksums.insert(extent.addr, sums);
        }
        let grown = (*size > file.size()).then_some(*size);
        let published = pieces::publish(&file.map, &new, grown);
        replace.apply(t)?;
        checksums::apply(t, &chunks)?;
        published.unpin(&file.map, &core.checksums);
        t.published(stored.ordered());
        t.change_inode(file, |inode| {
            inode.size = inode.size.max(*size);
            inode.extents = inode.extents.wrapping_add_signed(replace.extents);
            inode.blocks = inode.blocks.wrapping_add_signed(replace.blocks);
        });
        Ok(())
    })
    .await?;
    stored.finish();
    Ok(())
}

/// The extents of a write whose checksums are kept apart from their records, with these.
fn apart<'a>(new: &'a [Extent], sums: &'a [u32]) -> impl Iterator<Item = (&'a Extent, &'a [u32])> {
    let mut done = 0;
    new.iter()
        .map(move |extent| {
            let from = done;
            done += extent.len as usize;
            (extent, &sums[from..done])
        })
        .filter(|(extent, _)| extent.checksum.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_cut_only_when_it_is_too_long_to_be_atomic() {
        let cuts = |offset, len| cut(offset, len).collect::<Vec<_>>();
        assert_eq!(cuts(0, 0), []);
        assert_eq!(cuts(5, ATOMIC_WRITE_MAX), [(5, ATOMIC_WRITE_MAX)]);
        let max = ATOMIC_WRITE_MAX;
        assert_eq!(cuts(100, 2 * max), [(100, max - 100), (max as u64, max), (2 * max as u64, 100)]);
        assert_eq!(blocks_of(100, max), 257);
        assert_eq!(blocks_of(4095, 2), 2);
        assert_eq!(blocks_of(4096, 4096), 1);
    }
}
