//! A direct write.
//!
//! 1. lock the blocks of the range exclusively, with no page of it in the cache and no ordered extent in it ([`lock_direct`]). What
//!    belongs into the tree is published there, and that is all ([`mod@crate::inline`]);
//! 2. find blocks, as one or several runs ([`store::place`]): those that were preallocated there, else new ones; they are owned by
//!    an [`Ordered`] extent from here on;
//! 3. fill the edges of an unaligned write from what is there ([`with_edges`]), so that whole blocks are written;
//! 4. checksum the blocks while they are hot and write them ([`store::store`]);
//! 5. when all of them are on the device: publish the new mapping and size (pinned), put extents and checksums into the trees,
//!    free what was replaced, unpin ([`publish()`]) - in one transaction, so that a crash sees all of it or nothing;
//! 6. unlock (the guard).
//!
//! A failure before step 5 gives the blocks back and changes nothing: the old content stays. A write longer than
//! [`ATOMIC_WRITE_MAX`] goes in pieces ([`cut`]), under one lock: all are allocated, then all are stored, then each is published
//! on its own. So want of space and errors of the device are found before anything has changed, however long the
//! write, and each piece is atomic.

use std::borrow::Cow;
use std::sync::Arc;

use bdev_adapter::{DmaBuf, Segments};
use smallvec::SmallVec;

use crate::channel::io::Io;
use crate::coherence::lock_direct;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::{File, FileInner};
use crate::mutation::{Mutation, broken};
use crate::ordered::Ordered;
use crate::publish::{Change, publish};
use crate::range_lock::RangeGuard;
use crate::records::extents::{Content, INLINE_MAX};
use crate::store;
use crate::txn::Room;
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock};
use crate::{inline, read, writeback};

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

impl At {
    /// Where nothing would be written, at this moment.
    fn now(self, file: &FileInner) -> u64 {
        match self {
            At::Offset(offset) => offset,
            At::End => file.size(),
        }
    }
}

/// Writes buffers, one behind the other; without a copy when offset and lengths are whole blocks. Returns the byte offset that they went
/// to.
pub(crate) async fn write_bufs(
    core: &Arc<Core>,
    io: &Io,
    file: &File,
    at: At,
    mut bufs: Segments,
) -> (Result<u64>, Segments) {
    if let Err(error) = file.check_writable() {
        return (Err(error), bufs);
    }
    let inner = file.inner();
    if bufs.is_empty() {
        return (Ok(at.now(inner)), bufs);
    }
    let (_guard, offset, place) = match lock_and_place(core, io, inner, at, Data::Bufs(&bufs)).await {
        Ok(locked) => locked,
        Err(error) => return (Err(error), bufs),
    };
    let pieces = match place {
        Place::Blocks(pieces) if are_blocks(offset, &bufs) => pieces,
        place => {
            let result = copy_in(core, io, inner, offset, place, &flat(&bufs)).await;
            return (result.map(|()| offset), bufs);
        }
    };
    let mut written = Segments::None;
    let mut all = Pieces::new();
    for piece in pieces {
        let rest = bufs.split_off(piece.len);
        let (at, end) = (piece.at(), piece.end());
        let (result, front) = store::store(core, io, at, piece.ordered, bufs).await;
        written.append(front);
        bufs = rest;
        match result {
            Ok(stored) => all.push(Change::one(inner, stored, end)),
            Err(error) => {
                written.append(bufs);
                return (Err(error), written);
            }
        }
    }
    written.append(bufs);
    let result = publish_all(core, io, all).await;
    (result.map(|()| offset), written)
}

/// Whether these are whole blocks, each buffer of them.
pub(crate) fn are_blocks(offset: u64, bufs: &Segments) -> bool {
    let whole = |len: u64| len & BLOCK_MASK == 0;
    let lens = || bufs.as_slice().iter().map(|buf| buf.len() as u64);
    whole(offset) && lens().all(|len| len > 0 && whole(len)) && !bufs.is_empty()
}

/// The bytes of `bufs` in one piece; copied if they are several.
pub(crate) fn flat(bufs: &Segments) -> Cow<'_, [u8]> {
    match bufs {
        Segments::One(buf) => Cow::Borrowed(buf),
        bufs => {
            let mut bytes = vec![0; bufs.len() as usize];
            bufs.copy_to(&mut bytes);
            Cow::Owned(bytes)
        }
    }
}

/// Writes a slice, through a copy. Returns the byte offset that it went to.
pub(crate) async fn write_slice(core: &Arc<Core>, io: &Io, file: &File, at: At, data: &[u8]) -> Result<u64> {
    file.check_writable()?;
    let inner = file.inner();
    if data.is_empty() {
        return Ok(at.now(inner));
    }
    let (_guard, offset, place) = lock_and_place(core, io, inner, at, Data::Slice(data)).await?;
    copy_in(core, io, inner, offset, place, data).await?;
    Ok(offset)
}

/// What is written.
#[derive(Clone, Copy)]
enum Data<'a> {
    Slice(&'a [u8]),
    Bufs(&'a Segments),
}

impl<'a> Data<'a> {
    fn len(self) -> usize {
        match self {
            Data::Slice(bytes) => bytes.len(),
            Data::Bufs(bufs) => bufs.len() as usize,
        }
    }

    fn flat(self) -> Cow<'a, [u8]> {
        match self {
            Data::Slice(bytes) => Cow::Borrowed(bytes),
            Data::Bufs(bufs) => flat(bufs),
        }
    }
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

    /// The byte behind it.
    fn end(&self) -> u64 {
        self.offset + self.len as u64
    }
}

/// Mostly there is one.
type Pieces<T> = SmallVec<[T; 1]>;

/// Where a write goes.
#[allow(clippy::large_enum_variant, reason = "nearly all writes are of the large kind")]
enum Place {
    /// Into the tree: what block 0 will hold.
    Inline(Content),
    /// To these blocks.
    Blocks(Pieces<Piece>),
}

/// Steps 1 and 2. Should there be no space while pages wait to be written back, then without the lock they are, once: what they replace,
/// and what was reserved for the worst case, comes back.
async fn lock_and_place(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    at: At,
    data: Data<'_>,
) -> Result<(RangeGuard, u64, Place)> {
    let mut tried = false;
    loop {
        let (guard, offset) = lock_direct(core, io, file, at, data.len() as u64).await?;
        match place(core, io, file, offset, data).await {
            Err(Error::NoSpace { .. })
                if !std::mem::replace(&mut tried, true) && writeback::may_free(core) =>
            {
                drop(guard);
                // Their errors are noted with their files.
                let _ = writeback::all(core, io).await;
            }
            place => {
                let place = place?;
                if broken(Mutation::SizeBeforeData) {
                    file.map.grow(offset + data.len() as u64);
                }
                return Ok((guard, offset, place));
            }
        }
    }
}

/// Step 2.
async fn place(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    offset: u64,
    data: Data<'_>,
) -> Result<Place> {
    if data.len() <= INLINE_MAX
        && let Some(content) = inline::content_after(core, io, file, &[(offset, &data.flat())]).await?
    {
        return Ok(Place::Inline(content));
    }
    allocate_all(core, io, file, offset, data.len()).await.map(Place::Blocks)
}

/// Step 2 for all pieces of a write.
async fn allocate_all(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    offset: u64,
    len: usize,
) -> Result<Pieces<Piece>> {
    let mut pieces = Pieces::new();
    for (offset, len) in cut(offset, len) {
        let blocks = blocks_of(offset, len);
        let at = FileBlock::containing(offset);
        let ordered = store::place(core, io, file, at, blocks, Room::Data).await?;
        pieces.push(Piece { offset, len, ordered });
    }
    Ok(pieces)
}

/// Writes `data` at `offset` of a file whose range is locked, through a copy.
async fn copy_in(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    offset: u64,
    place: Place,
    data: &[u8],
) -> Result<()> {
    let pieces = match place {
        Place::Inline(content) => {
            let end = offset + data.len() as u64;
            return publish(core, io, SmallVec::from_buf([Change::inline(file, content, end)])).await;
        }
        Place::Blocks(pieces) => pieces,
    };
    let mut all = Pieces::new();
    for piece in pieces {
        let from = (piece.offset - offset) as usize;
        let buf = with_edges(core, io, file, piece.offset, &data[from..from + piece.len]).await?;
        let (at, end) = (piece.at(), piece.end());
        let stored = store::store(core, io, at, piece.ordered, buf).await.0?;
        all.push(Change::one(file, stored, end));
    }
    publish_all(core, io, all).await
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
    let edge = &mut buf[index << BLOCK_SHIFT..][..BLOCK_SIZE];
    let (result, block) =
        read::read_blocks(core, io, file, first.plus(index as u64), io.buffer(BLOCK_SIZE)?).await;
    result?;
    edge.copy_from_slice(&block);
    Ok(buf)
}

/// Step 5 for all pieces, each on its own.
async fn publish_all(core: &Arc<Core>, io: &Io, pieces: Pieces<Change>) -> Result<()> {
    for change in pieces {
        publish(core, io, SmallVec::from_buf([change])).await?;
    }
    Ok(())
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
