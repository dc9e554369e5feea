//! Writes of several ranges of several files at once: all or nothing.
//!
//! 1. sort the writes by file and offset, and join those that share a block or touch ([`spans`]): among writes of the same bytes the later wins;
//! 2. lock each file from its first span to its last, in the order of the inodes. One range a file: who held one span and asked for
//!    the next could wait for somebody who waits for both, since range locks are granted in the order of arrival;
//! 3. prepare each span: inline content, or a buffer of whole blocks, filled from what is there where the writes leave gaps, and
//!    blocks for it;
//! 4. send all to the device, then wait for all;
//! 5. publish all in one transaction, each file in one swap of its view; unlock.
//!
//! Up to step 5 nothing has changed: an error gives everything back. Limits keep the transaction small enough to hold the
//! metadata lock for.

use std::ops::Range;
use std::sync::Arc;

use bdev_adapter::DmaBuf;
use smallvec::SmallVec;

use crate::channel::io::Io;
use crate::coherence::{self, Pages};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::{FILE_SIZE_MAX, File, FileInner};
use crate::publish::{Change, publish};
use crate::range_lock::RangeGuard;
use crate::records::extents::Content;
use crate::store::{self, Sent};
use crate::txn::Room;
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock, InodeId};
use crate::{inline, read, writeback};

/// Most bytes in a [`WriteBatch`].
pub const WRITE_BATCH_BYTES_MAX: usize = 4 << 20;
/// Most blocks that the writes of a [`WriteBatch`] touch, counted for each write.
pub const WRITE_BATCH_BLOCKS_MAX: usize = 2048;

/// Writes that become visible, and durable, together; see [`Channel::write_batch`](crate::Channel::write_batch).
///
/// The bytes are copied into the batch, so it can be tried again when it failed.
#[derive(Debug, Clone, Default)]
pub struct WriteBatch {
    writes: Vec<Write>,
    bytes: u64,
    blocks: u64,
}

#[derive(Debug, Clone)]
struct Write {
    file: File,
    offset: u64,
    data: Vec<u8>,
}

impl Write {
    fn id(&self) -> InodeId {
        self.file.inner().id
    }

    /// The byte behind it; [`lock`] refuses what is beyond the largest file.
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.data.len() as u64)
    }
}

impl WriteBatch {
    /// An empty batch.
    pub fn new() -> WriteBatch {
        WriteBatch::default()
    }

    /// Adds a write of `data` at byte `offset`. Where it overlaps earlier ones of the batch, it wins.
    pub fn write(&mut self, file: &File, offset: u64, data: &[u8]) -> &mut WriteBatch {
        if !data.is_empty() {
            let write = Write { file: file.clone(), offset, data: data.to_vec() };
            self.bytes += data.len() as u64;
            self.blocks += write.end().div_ceil(BLOCK_SIZE as u64) - (offset >> BLOCK_SHIFT);
            self.writes.push(write);
        }
        self
    }

    /// Bytes in it; at most [`WRITE_BATCH_BYTES_MAX`] can be written.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Blocks that its writes touch, counted for each write; at most [`WRITE_BATCH_BLOCKS_MAX`] can be written.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Whether it writes nothing.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Removes all writes.
    pub fn clear(&mut self) {
        *self = WriteBatch::new();
    }
}

/// Writes of one file whose blocks join.
struct Joined<'b> {
    file: &'b Arc<FileInner>,
    /// By offset.
    writes: SmallVec<[(usize, &'b Write); 2]>,
    end: u64,
}

impl Joined<'_> {
    fn first(&self) -> FileBlock {
        FileBlock::containing(self.writes[0].1.offset)
    }

    fn blocks(&self) -> u64 {
        FileBlock::at_or_after(self.end).0 - self.first().0
    }

    /// The writes in the order in which they were added.
    fn in_turn(&self) -> SmallVec<[(u64, &[u8]); 2]> {
        let mut writes = self.writes.clone();
        writes.sort_unstable_by_key(|(turn, _)| *turn);
        writes.iter().map(|(_, write)| (write.offset, write.data.as_slice())).collect()
    }

    /// The runs of blocks that are not written over as a whole: first block and number.
    fn partly(&self) -> SmallVec<[(FileBlock, u64); 2]> {
        let mut partly: SmallVec<[(FileBlock, u64); 2]> = SmallVec::new();
        let mut gap = |from: u64, to: u64| {
            if from >= to {
                return;
            }
            let (mut first, end) = (FileBlock::containing(from), FileBlock::at_or_after(to));
            if let Some((last, len)) = partly.last_mut() {
                first = first.max(last.plus(*len));
                if first == last.plus(*len) {
                    *len += end.0.saturating_sub(first.0);
                    return;
                }
            }
            partly.push((first, end.0 - first.0));
        };
        let mut reached = self.first().byte();
        for (_, write) in &self.writes {
            gap(reached, write.offset);
            reached = reached.max(write.end());
        }
        gap(reached, FileBlock::at_or_after(reached).byte());
        partly
    }
}

/// Step 1.
fn spans(batch: &WriteBatch) -> Vec<Joined<'_>> {
    let mut order: Vec<(usize, &Write)> = batch.writes.iter().enumerate().collect();
    order.sort_unstable_by_key(|(turn, write)| (write.id(), write.offset, *turn));
    let mut spans: Vec<Joined<'_>> = Vec::new();
    for (turn, write) in order {
        match spans.last_mut() {
            Some(last)
                if last.file.id == write.id()
                    && FileBlock::containing(write.offset) <= FileBlock::at_or_after(last.end) =>
            {
                last.end = last.end.max(write.end());
                last.writes.push((turn, write));
            }
            _ => spans.push(Joined {
                file: write.file.inner(),
                writes: SmallVec::from_buf_and_len([(turn, write); 2], 1),
                end: write.end(),
            }),
        }
    }
    spans
}

/// A span on its way.
#[allow(clippy::large_enum_variant, reason = "nearly all spans are of the large kind")]
enum Prepared {
    Inline(Content),
    Sent(Sent),
}

/// See the module documentation.
pub(crate) async fn write(core: &Arc<Core>, io: &Io, batch: &WriteBatch) -> Result<()> {
    writeback::with_room(core, io, || write_once(core, io, batch)).await
}

async fn write_once(core: &Arc<Core>, io: &Io, batch: &WriteBatch) -> Result<()> {
    if batch.bytes > WRITE_BATCH_BYTES_MAX as u64 || batch.blocks > WRITE_BATCH_BLOCKS_MAX as u64 {
        return Err(Error::BatchTooLarge { bytes: batch.bytes, blocks: batch.blocks });
    }
    for write in &batch.writes {
        write.file.check_writable()?;
    }
    let spans = spans(batch);
    let _guards = lock(core, io, &spans).await?;
    let mut ready = Vec::with_capacity(spans.len());
    for span in &spans {
        ready.push(prepare(core, io, span).await?);
    }
    // All of it is on its way before any of it is waited for.
    let sent: Vec<Prepared> = ready.into_iter().zip(&spans).map(|(r, span)| r.send(core, io, span)).collect();
    let mut changes: SmallVec<[Change; 1]> = SmallVec::new();
    // All of them, also after one has failed: their blocks must not be given back while the device writes to them.
    let mut outcome = Ok(());
    for (prepared, span) in sent.into_iter().zip(&spans) {
        if changes.last().is_none_or(|change| change.file.id != span.file.id) {
            changes.push(Change::none(span.file));
        }
        let Some(change) = changes.last_mut() else { continue };
        change.size = change.size.max(span.end);
        match prepared {
            Prepared::Inline(content) => change.inline = Some(content),
            Prepared::Sent(sent) => match sent.finish().await.0 {
                Ok(stored) => change.stored.push(stored),
                Err(error) => outcome = outcome.and(Err(error)),
            },
        }
    }
    outcome?;
    publish(core, io, changes).await
}

/// Step 2. One range a file: requests for ranges are served in turn, so with two of one file, a third that wants both and comes in
/// between would wait for the first, and the second for it.
async fn lock(core: &Arc<Core>, io: &Io, spans: &[Joined<'_>]) -> Result<SmallVec<[RangeGuard; 1]>> {
    let mut wanted = SmallVec::<[(&Arc<FileInner>, Range<u64>); 2]>::new();
    for spans in spans.chunk_by(|a, b| a.file.id == b.file.id) {
        let (offset, end) = (spans[0].writes[0].1.offset, spans.last().map_or(0, |span| span.end));
        if end > FILE_SIZE_MAX {
            return Err(Error::FileTooLarge { offset, len: end - offset });
        }
        wanted.push((spans[0].file, offset..end));
    }
    coherence::lock_all(core, io, &wanted, Pages::WriteBackAndDrop).await
}

/// What a span will be.
enum Ready {
    Inline(Content),
    Blocks(DmaBuf, crate::ordered::Ordered),
}

impl Ready {
    /// Step 4.
    fn send(self, core: &Arc<Core>, io: &Io, span: &Joined<'_>) -> Prepared {
        match self {
            Ready::Inline(content) => Prepared::Inline(content),
            Ready::Blocks(buf, ordered) => Prepared::Sent(store::send(core, io, span.first(), ordered, buf)),
        }
    }
}

/// Step 3.
async fn prepare(core: &Arc<Core>, io: &Io, span: &Joined<'_>) -> Result<Ready> {
    let writes = span.in_turn();
    if let Some(content) = inline::content_after(core, io, span.file, &writes).await? {
        return Ok(Ready::Inline(content));
    }
    let (first, blocks) = (span.first(), span.blocks());
    let ordered = store::place(core, io, span.file, first, blocks, Room::Data).await?;
    let mut buf = io.buffer((blocks as usize) << BLOCK_SHIFT)?;
    for (at, len) in span.partly() {
        let from = ((at.0 - first.0) as usize) << BLOCK_SHIFT;
        let part = io.buffer((len as usize) << BLOCK_SHIFT)?;
        let (result, part) = read::read_blocks(core, io, span.file, at, part).await;
        result?;
        buf[from..from + part.len()].copy_from_slice(&part);
    }
    for (offset, data) in writes {
        let from = (offset - first.byte()) as usize;
        buf[from..from + data.len()].copy_from_slice(data);
    }
    Ok(Ready::Blocks(buf, ordered))
}
