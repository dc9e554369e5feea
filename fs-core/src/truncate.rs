//! Truncate, and the slow end of delete.
//!
//! Growing changes the size only: what is added is a hole. Shrinking first writes a copy of the last block with zeroes behind
//! the new end (so that growing again shows zeroes; inline content is cut where it lies), then, in one transaction, sets the size, lets readers see that block and a
//! hole behind it, and drops extents. When there are too many for one transaction, the file is listed as an orphan with work
//! left, and the rest goes in steps of [`Meta::drop_step`](crate::txn::Meta::drop_step) records; a crash in between leaves the entry, and the next mount goes on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use smallvec::{SmallVec, smallvec};

use crate::channel::io::Io;
use crate::coherence::{self, Pages};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::{FILE_BLOCKS_MAX, FILE_SIZE_MAX, File, FileInner};
use crate::mutation::{Mutation, Point, broken, reached};
use crate::records::extents::{Content, Extent, Kind, Replacement, Span};
use crate::records::orphans::{self, Work};
use crate::records::{extents, inodes};
use crate::store::{self, Stored};
use crate::txn::{Room, Stop, Txn, transact};
use crate::types::{BLOCK_SIZE, FileBlock, Generation, InodeId};
use crate::{inline, pieces, read};

/// Sets the size of a file.
pub(crate) async fn truncate(core: &Arc<Core>, io: &Io, file: &File, size: u64) -> Result<()> {
    file.check_writable()?;
    if size > FILE_SIZE_MAX {
        return Err(Error::FileTooLarge { offset: 0, len: size });
    }
    truncate_inner(core, io, file.inner(), size).await
}

/// The same for a file whose handle has been checked.
pub(crate) async fn truncate_inner(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    size: u64,
) -> Result<()> {
    // From the last block that stays on: whoever appends or writes there waits. That block is on the device, not in the cache.
    let _guard = coherence::lock_exclusive(core, io, file, size..u64::MAX, Pages::Discard).await?;
    let old = file.size();
    if size == old {
        return Ok(());
    }
    let tail = if size < old { zeroed_tail(core, io, file, size).await? } else { Tail::Stays };
    let kept = FileBlock::at_or_after(size);
    let more = transact(core, io, |t| {
        let step = t.meta.drop_step();
        let beyond =
            if size < old { extents::last_beyond(t, file.id, kept, step + 1)? } else { Default::default() };
        let more = beyond.len() > step;
        let dropped = &beyond[beyond.len().saturating_sub(step)..];
        let new_tail = tail.records(t.generation());
        let plans = plan(t, file.id, kept, dropped, &new_tail, tail.content())?;
        if more {
            orphans::touch(t, file.id)?;
        }
        t.ready(plans.iter().map(Replacement::len).sum::<usize>() + 1)?;
        if size < old {
            file.discard_pages(t.meta, kept, FileBlock(FILE_BLOCKS_MAX));
            file.map.truncate(size);
        } else {
            file.map.grow(size);
        }
        let published = pieces::publish(&file.map, &core.checksums, &new_tail, &[], None);
        for plan in &plans {
            plan.apply(t)?;
        }
        published.unpin(&file.map, &core.checksums);
        if let Tail::Stored(stored) = &tail {
            t.published(stored.ordered());
        }
        pieces::forget_from(&file.map, kept);
        // A file that has lost its name is listed already, for more than this.
        if more && !file.unlinked.load(Ordering::Relaxed) {
            orphans::put(t, file.id, Work::Truncate)?;
        }
        file.cut_by_truncate.store(more, Ordering::Relaxed);
        file.set_finished(size);
        t.change_inode(file, |inode| {
            for plan in &plans {
                inode.extents = inode.extents.wrapping_add_signed(plan.extents);
                inode.blocks = inode.blocks.wrapping_add_signed(plan.blocks);
            }
        });
        Ok(more)
    })
    .await?;
    if let Tail::Stored(stored) = tail {
        stored.finish();
    }
    let mut more = more;
    while more {
        reached(Point::TruncateStep);
        let step = drop_step(core, io, file.id, Some(file), kept, Work::Truncate).await;
        // If that fails, what is left would show when the file grows.
        file.cut_failed.store(step.is_err(), Ordering::Relaxed);
        more = step?;
    }
    Ok(())
}

/// What becomes of the block that contains the new end.
enum Tail {
    /// Nothing.
    Stays,
    /// It is written anew.
    Stored(Stored),
    /// Its inline content is this.
    Inline(Content),
}

impl Tail {
    fn records(&self, birth: Generation) -> SmallVec<[Extent; 1]> {
        match self {
            Tail::Stays => SmallVec::new(),
            Tail::Stored(stored) => stored.records(birth).collect(),
            Tail::Inline(_) => smallvec![Extent::inline(birth)],
        }
    }

    fn content(&self) -> Content {
        if let Tail::Inline(content) = self { content.clone() } else { Content::new() }
    }
}

/// Plans to drop `dropped`, records that reach beyond block `kept`, and to let the block before `kept` be `tail`, if there is one
/// (of this inline `content`, if it is of that kind).
fn plan(
    t: &mut Txn<'_>,
    id: InodeId,
    kept: FileBlock,
    dropped: &[Extent],
    tail: &[Extent],
    content: Content,
) -> Result<SmallVec<[Replacement; 2]>, Stop> {
    let beyond = (kept, FileBlock(FILE_BLOCKS_MAX));
    let Some(at) = tail.first().map(|tail| tail.at) else {
        return Ok(smallvec![extents::plan(t, id, &[beyond], dropped, &[])?]);
    };
    let old = extents::overlapping(t, id, at, kept, usize::MAX)?;
    // One record may hold the tail's block and reach beyond it: it must be cut once, not twice.
    if old.last().is_some_and(|old| dropped.first().is_some_and(|first| first.at == old.at)) {
        return Ok(smallvec![extents::plan(t, id, &[(at, beyond.1)], dropped, tail)?.with_content(content)]);
    }
    Ok(smallvec![
        extents::plan(t, id, &[(at, kept)], &old, tail)?.with_content(content),
        extents::plan(t, id, &[beyond], dropped, &[])?
    ])
}

/// The block that contains byte `size` with zeroes from there on, on the device; none if it is zero there already.
async fn zeroed_tail(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, size: u64) -> Result<Tail> {
    let keep = (size % BLOCK_SIZE as u64) as usize;
    if keep == 0 {
        return Ok(Tail::Stays);
    }
    let block = FileBlock::containing(size);
    if block.0 == 0
        && let Some(mut content) = inline::content(core, io, file).await?
    {
        let shrinks = content.len() > keep;
        content.truncate(keep);
        return Ok(if shrinks { Tail::Inline(content) } else { Tail::Stays });
    }
    let (result, mut buf) = read::read_blocks(core, io, file, block, io.buffer(BLOCK_SIZE)?).await;
    result?;
    if buf[keep..].iter().all(|byte| *byte == 0) {
        return Ok(Tail::Stays);
    }
    buf[keep..].fill(0);
    let ordered = store::place(core, io, file, block, 1, |_| Room::Shrink).await?;
    store::store(core, io, block, ordered, buf).await.0.map(Tail::Stored)
}

/// Drops some of the records of file `id` from its end down to block `kept`. True when there may be more; when there are none,
/// the file's entry among the orphans goes in the same transaction (with the inode, if it was deleted).
async fn drop_step(
    core: &Arc<Core>,
    io: &Io,
    id: InodeId,
    file: Option<&Arc<FileInner>>,
    kept: FileBlock,
    work: Work,
) -> Result<bool> {
    transact(core, io, |t| {
        let step = t.meta.drop_step();
        let beyond = extents::last_beyond(t, id, kept, step + 1)?;
        let more = beyond.len() > step;
        let dropped = &beyond[beyond.len().saturating_sub(step)..];
        let plan = extents::plan(t, id, &[(kept, FileBlock(FILE_BLOCKS_MAX))], dropped, &[])?;
        let entry = orphans::find(t, id)?;
        orphans::touch(t, id)?;
        inodes::touch(t, id)?;
        t.ready(plan.len() + 2)?;
        plan.apply(t)?;
        if let Some(file) = file {
            if !broken(Mutation::TruncateWithoutInvalidate) {
                pieces::forget_from(&file.map, kept);
            }
            t.change_inode(file, |inode| {
                inode.extents = inode.extents.wrapping_add_signed(plan.extents);
                inode.blocks = inode.blocks.wrapping_add_signed(plan.blocks);
            });
        }
        if let (Some(file), false) = (file, more) {
            file.cut_by_truncate.store(false, Ordering::Relaxed);
        }
        // A file that lost its name during a long truncate keeps its entry, which says delete by now; one whose size on disk
        // lags keeps it for the next commit to decide.
        let kept = file.is_some_and(|file| file.cut_by_commit.load(Ordering::Relaxed));
        if !more && entry == Some(work) && !kept {
            orphans::remove(t, id)?;
            if work == Work::Delete {
                inodes::remove(t, id)?;
            }
        }
        Ok(more)
    })
    .await
}

/// Drops the content of every deleted file that nobody has open any more. One that is damaged is left for later, and
/// keeps no other from going.
///
/// # Errors
/// The first failure.
pub(crate) async fn reap(core: &Arc<Core>, io: &Io) -> Result<()> {
    let mut result = Ok(());
    let mut failed = Vec::new();
    loop {
        let Some(id) = core.meta.lock().reap.pop() else { break };
        if let Err(error) = reap_one(core, io, id).await {
            failed.push(id);
            result = result.and(Err(error));
        }
    }
    core.meta.lock().reap.append(&mut failed);
    result
}

/// [`reap`] after a change that is done: what cannot be dropped, which may be another file, is no failure of the change. It is
/// listed as an orphan, and tried again.
pub(crate) async fn reap_or_log(core: &Arc<Core>, io: &Io) {
    if let Err(error) = reap(core, io).await {
        log::warn!("{}: the space of a deleted file stays in use for now: {error}", core.device.name());
    }
}

async fn reap_one(core: &Arc<Core>, io: &Io, id: InodeId) -> Result<()> {
    let file = core.meta.lock().open.get(&id).cloned();
    if let Some(file) = file {
        // Write-back may have some of it under way, which must be over before the file is forgotten.
        let _guard = coherence::lock_exclusive(core, io, &file, 0..u64::MAX, Pages::Discard).await?;
        file.discard_pages(&mut core.meta.lock(), FileBlock(0), FileBlock(FILE_BLOCKS_MAX));
    }
    core.forget_file(id);
    while drop_step(core, io, id, None, FileBlock(0), Work::Delete).await? {}
    Ok(())
}

/// Finishes the work that an earlier mount left. A deleted file that cannot be read stays where it is until a later mount:
/// its damage is its own. A truncate must be finished, because what it left would show when the file grows.
pub(crate) async fn finish_orphans(core: &Arc<Core>, io: &Io) -> Result<()> {
    let mut from = InodeId(0);
    loop {
        let found = transact(core, io, |t| orphans::list(t, from, 64)).await?;
        let Some((last, _)) = found.last() else { return Ok(()) };
        from = InodeId(last.0 + 1);
        for (id, work) in found {
            match work {
                Work::Delete => match reap_one(core, io, id).await {
                    Err(error @ (Error::Corrupt { .. } | Error::Io { .. })) if !core.is_read_only() => {
                        let name = core.device.name();
                        log::warn!("{name}: the space of deleted {id:?} stays in use: {error}");
                    }
                    result => result?,
                },
                Work::Truncate => finish_truncate(core, io, id).await?,
            }
        }
    }
}

/// Cuts off what a crash left behind the end of a file: of a long truncate, or of writes that were finished before others that the end
/// waited for. Blocks that were preallocated there stay: they read as zeroes in any case, and are promised. The mount is not ready
/// yet; the file stays in memory as one that changed, until the next commit has stored its inode.
async fn finish_truncate(core: &Arc<Core>, io: &Io, id: InodeId) -> Result<()> {
    let inode = transact(core, io, |t| inodes::expect(t, id)).await?;
    let file = Arc::new(FileInner::new(id, b"", inode, false));
    let kept = FileBlock::at_or_after(inode.size);
    let mut from = kept;
    loop {
        let (next, done) = transact(core, io, |t| {
            let step = t.meta.drop_step();
            let found = extents::overlapping(t, id, from, FileBlock(FILE_BLOCKS_MAX), step)?;
            let done = found.len() < step;
            let content = found.iter().filter(|extent| extent.kind != Kind::Preallocated);
            let spans: SmallVec<[Span; 4]> =
                content.map(|extent| (extent.at.max(kept), extent.end())).collect();
            let plan = extents::replace(t, id, &spans, &[])?;
            orphans::touch(t, id)?;
            t.ready(plan.len() + 1)?;
            plan.apply(t)?;
            t.change_inode(&file, |inode| {
                inode.extents = inode.extents.wrapping_add_signed(plan.extents);
                inode.blocks = inode.blocks.wrapping_add_signed(plan.blocks);
            });
            if done {
                orphans::remove(t, id)?;
            }
            Ok((found.last().map_or(from, Extent::end), done))
        })
        .await?;
        if done {
            return Ok(());
        }
        from = next;
    }
}
