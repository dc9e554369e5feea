//! Punching holes, and the edges of ranges that are to read as zeroes.
//!
//! 1. lock the blocks of the range;
//! 2. where it begins or ends inside of a block, prepare that block with zeroes in its part of the range ([`edges`]);
//! 3. drop what lies in the whole blocks, at most [`Meta::drop_step`](crate::txn::Meta::drop_step) records in a transaction. The first step has the edges with it, so a
//!    range of up to so many records is whole or absent after a crash and to readers. Of a longer one a crash leaves a beginning:
//!    that is harmless, and nobody goes on with it.
//!
//! Each step is a publication, holes included: they are pinned until the tree has them, so no loader brings back what was there.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::channel::io::Io;
use crate::coherence;
use crate::core::Core;
use crate::error::Result;
use crate::file::{FILE_SIZE_MAX, File, FileInner};
use crate::publish::{Change, publish};
use crate::records::extents::{self, Content, Span};
use crate::store::{self, Stored};
use crate::txn::{Room, transact};
use crate::types::{BLOCK_SIZE, FileBlock};
use crate::write::At;
use crate::{inline, read, writeback};

/// A range of bytes of a file, as blocks: whole ones, and what it has of those at its edges.
pub(crate) struct Zeroed {
    /// Blocks that lie in it as a whole. What is behind the end of the file counts as in it: it is zero already.
    pub(crate) whole: Span,
    /// Blocks that lie in it in part: the first byte and the one behind the last, inside of the block.
    parts: SmallVec<[(FileBlock, usize, usize); 2]>,
}

impl Zeroed {
    /// The range `[offset, end)` (not empty) of a file of `size` bytes.
    pub(crate) fn new(offset: u64, end: u64, size: u64) -> Zeroed {
        let from = FileBlock::at_or_after(offset);
        let to = if end >= size { FileBlock::at_or_after(end) } else { FileBlock::containing(end) };
        let mut parts = SmallVec::new();
        let mut part = |block: FileBlock| {
            let inside = |byte: u64| byte.clamp(block.byte(), block.plus(1).byte()) - block.byte();
            parts.push((block, inside(offset) as usize, inside(end) as usize));
        };
        if from.byte() != offset {
            part(FileBlock::containing(offset));
        }
        // Unless it is the same block.
        if from <= to && to.byte() < end {
            part(to);
        }
        Zeroed { whole: (from, to.max(from)), parts }
    }
}

/// Edge blocks with zeroes in their parts of a range.
#[derive(Default)]
pub(crate) struct Edges {
    pub(crate) stored: SmallVec<[Stored; 2]>,
    pub(crate) inline: Option<Content>,
}

impl Edges {
    /// The change that publishes them.
    pub(crate) fn change(self, file: &Arc<FileInner>) -> Change {
        Change { stored: self.stored.into_iter().collect(), inline: self.inline, ..Change::none(file) }
    }
}

/// Step 2: writes the edges of `range`, as far as they are not zero already, to blocks that `room` has.
pub(crate) async fn edges(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    range: &Zeroed,
    room: fn(u64) -> Room,
) -> Result<Edges> {
    let mut edges = Edges::default();
    for (block, from, to) in range.parts.iter().copied() {
        if block.0 == 0
            && let Some(mut content) = inline::content(core, io, file).await?
        {
            let to = to.min(content.len());
            if from < to && content[from..to].iter().any(|byte| *byte != 0) {
                content[from..to].fill(0);
                edges.inline = Some(content);
            }
            continue;
        }
        let (result, mut buf) = read::read_blocks(core, io, file, block, io.buffer(BLOCK_SIZE)?).await;
        result?;
        if buf[from..to].iter().all(|byte| *byte == 0) {
            continue;
        }
        buf[from..to].fill(0);
        let ordered = store::place(core, io, file, block, 1, room).await?;
        edges.stored.push(store::store(core, io, block, ordered, buf).await.0?);
    }
    Ok(edges)
}

/// Lets a range read as zeroes, and gives its blocks back.
pub(crate) async fn punch(core: &Arc<Core>, io: &Io, file: &File, offset: u64, len: u64) -> Result<()> {
    file.check_writable()?;
    let end = offset.saturating_add(len).min(FILE_SIZE_MAX);
    if offset >= end {
        return Ok(());
    }
    writeback::with_room(core, io, || punch_once(core, io, file.inner(), offset, end)).await
}

async fn punch_once(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, offset: u64, end: u64) -> Result<()> {
    let (_guard, _) = coherence::lock_direct(core, io, file, At::Offset(offset), end - offset).await?;
    let range = Zeroed::new(offset, end, file.size());
    let (mut from, to) = range.whole;
    let (mut step_end, frees) = step(core, io, file, from, to).await?;
    // What frees nothing is a write of zeroes: many of them would use up what is kept back for deletes.
    let room: fn(u64) -> Room = if frees { |_| Room::Shrink } else { Room::Data };
    let edges = edges(core, io, file, &range, room).await?;
    if !frees && edges.stored.is_empty() && edges.inline.is_none() {
        return Ok(());
    }
    let mut change = edges.change(file);
    loop {
        if from < step_end {
            change.holes.push((from, step_end));
        }
        publish(core, io, SmallVec::from_buf([change])).await?;
        from = step_end;
        if from >= to {
            return Ok(());
        }
        change = Change::none(file);
        step_end = step(core, io, file, from, to).await?.0;
    }
}

/// The end of the next step from `from` towards `to`, and whether there is anything to drop in it. What it looks at is stable, since the
/// range is locked.
async fn step(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    from: FileBlock,
    to: FileBlock,
) -> Result<(FileBlock, bool)> {
    if from >= to {
        return Ok((to, false));
    }
    transact(core, io, |t| {
        let most = t.meta.drop_step();
        let found = extents::overlapping(t, file.id, from, to, most + 1)?;
        Ok((found.get(most).map_or(to, |next| next.at), !found.is_empty()))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_whole_blocks_and_edges() {
        let zeroed = |offset, end, size| {
            let Zeroed { whole, parts } = Zeroed::new(offset, end, size);
            (whole.0.0, whole.1.0, parts.iter().map(|(b, from, to)| (b.0, *from, *to)).collect::<Vec<_>>())
        };
        let size = 1 << 20;
        assert_eq!(zeroed(0, 4096, size), (0, 1, vec![]));
        assert_eq!(zeroed(0, 4095, size), (0, 0, vec![(0, 0, 4095)]));
        assert_eq!(zeroed(1, 4095, size), (1, 1, vec![(0, 1, 4095)]));
        assert_eq!(zeroed(1, 4096, size), (1, 1, vec![(0, 1, 4096)]));
        assert_eq!(zeroed(1, 4097, size), (1, 1, vec![(0, 1, 4096), (1, 0, 1)]));
        assert_eq!(zeroed(4096, 12289, size), (1, 3, vec![(3, 0, 1)]));
        assert_eq!(zeroed(100, 12000, 11000), (1, 3, vec![(0, 100, 4096)]));
        assert_eq!(zeroed(100, 200, 150), (1, 1, vec![(0, 100, 200)]));
        assert_eq!(zeroed(0, 200, 150), (0, 1, vec![]));
    }
}
