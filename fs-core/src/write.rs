//! A direct write.
//!
//! 1. lock the blocks of the range exclusively;
//! 2. fill the edges of an unaligned write from what is there ([`with_edges`]), so that whole blocks are written;
//! 3. allocate, as one or several runs ([`allocate`]); the blocks are owned by an [`Ordered`] extent from here on;
//! 4. checksum the blocks while they are hot and write them ([`send_all`]);
//! 5. when all of them are on the device: publish the new mapping and size (pinned), put extents and checksums into the trees,
//!    free what was replaced, unpin ([`publish`]) - in one transaction, so that a crash sees all of it or nothing;
//! 6. unlock (the guard).
//!
//! A failure before step 5 gives the blocks back and changes nothing: the old content stays. Writes longer than
//! [`ATOMIC_WRITE_MAX`] are done in pieces of that size, each atomic, all under one lock.

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
    let mut done = 0;
    let mut written: Option<DmaBuf> = None;
    while !buf.is_empty() {
        let rest = buf.split_off(buf.len().min(ATOMIC_WRITE_MAX));
        let start = offset + done as u64;
        done += buf.len();
        let size = offset + done as u64;
        let (result, piece) = write_blocks(core, io, inner, FileBlock::containing(start), buf, size).await;
        let whole = join(written.take(), piece);
        if let Err(error) = result {
            return (Err(error), join(Some(whole), rest));
        }
        written = Some(whole);
        buf = rest;
    }
    (Ok(offset), join(written, buf))
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
    let mut done = 0;
    while done < data.len() {
        let at = offset + done as u64;
        let skip = (at & BLOCK_MASK) as usize;
        let piece = &data[done..data.len().min(done + ATOMIC_WRITE_MAX - skip)];
        let buf = with_edges(core, io, file, at, piece).await?;
        done += piece.len();
        let size = offset + done as u64;
        write_blocks(core, io, file, FileBlock::containing(at), buf, size).await.0?;
    }
    Ok(())
}

/// Step 2: a buffer of whole blocks with `data` at byte `at` and the file's content around it.
async fn with_edges(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, at: u64, data: &[u8]) -> Result<DmaBuf> {
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

/// Steps 3 to 5: writes the whole blocks of `buf` at `at`; the file ends at byte `size` at least afterwards.
pub(crate) async fn write_blocks(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    at: FileBlock,
    buf: DmaBuf,
    size: u64,
) -> (Result<()>, DmaBuf) {
    let blocks = (buf.len() >> BLOCK_SHIFT) as u64;
    let ordered = match allocate(core, io, blocks).await {
        Ok(ordered) => ordered,
        Err(error) => return (Err(error), buf),
    };
    let sums: Vec<u32> = buf.chunks_exact(BLOCK_SIZE).map(checksum32).collect();
    let (result, buf) = send_all(core, io, ordered.runs(), buf).await;
    let result = match result {
        Ok(()) => publish(core, io, file, at, ordered, &sums, size).await,
        // The ordered extent gives its blocks back on drop.
        Err(error) => Err(error),
    };
    (result, buf)
}

/// Step 3.
async fn allocate(core: &Arc<Core>, io: &Io, blocks: u64) -> Result<Ordered> {
    let runs = transact(core, io, |t| {
        t.check_room(Room::Data(blocks))?;
        t.allocate(Stream::Data, blocks)
    })
    .await?;
    Ok(Ordered::new(core, runs))
}

/// Step 4.
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

/// Step 5.
async fn publish(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    at: FileBlock,
    ordered: Ordered,
    sums: &[u32],
    size: u64,
) -> Result<()> {
    let blocks = sums.len() as u64;
    let end = at.plus(blocks);
    transact(core, io, |t| {
        let new = records(at, ordered.runs(), sums, t.generation());
        let old = extents::overlapping(t, file.id, at, end, usize::MAX)?;
        let replace = extents::plan(t, file.id, (at, end), &old, &new)?;
        let mut plans = SmallVec::<[_; 4]>::new();
        let mut done = 0;
        for extent in &new {
            let sums = &sums[done..done + extent.len as usize];
            done += extent.len as usize;
            if extent.checksum.is_none() {
                plans.push(checksums::plan(t, extent.run(), sums)?);
            }
        }
        t.ready(replace.len() + plans.iter().map(checksums::Plan::len).sum::<usize>())?;

        // From here on nothing stops. Readers see the new content, then the tree does, then the pins go.
        let mut done = 0;
        for extent in &new {
            if extent.checksum.is_none() {
                core.checksums.insert(extent.addr, &sums[done..done + extent.len as usize]);
            }
            done += extent.len as usize;
        }
        let grown = (size > file.size()).then_some(size);
        let published = pieces::publish(&file.map, &new, grown);
        replace.apply(t)?;
        for plan in &plans {
            checksums::apply(t, plan)?;
        }
        published.unpin(&file.map, &core.checksums);
        t.published(ordered.runs());
        t.change_inode(file, |inode| {
            inode.size = inode.size.max(size);
            inode.extents = inode.extents.wrapping_add_signed(replace.extents);
            inode.blocks = inode.blocks.wrapping_add_signed(replace.blocks);
        });
        Ok(())
    })
    .await?;
    ordered.finish();
    Ok(())
}

/// The extent records of a write: one for each run; a run of one block carries its checksum.
fn records(at: FileBlock, runs: &[Run], sums: &[u32], birth: Generation) -> SmallVec<[Extent; 4]> {
    let mut done = 0;
    runs.iter()
        .map(|run| {
            let checksum = (run.len == 1).then(|| sums[done as usize]);
            let extent = Extent { at: at.plus(done), len: run.len, addr: run.start, checksum, birth };
            done += run.len;
            extent
        })
        .collect()
}
