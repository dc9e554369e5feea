//! Truncate, and the slow end of delete.
//!
//! Growing changes the size only: what is added is a hole. Shrinking first rewrites the last block with zeroes behind the new
//! end (so that growing again shows zeroes), then, in one transaction, sets the size, lets readers see a hole, and drops
//! extents. When there are too many for one transaction, the file is listed as an orphan with work left, and the rest
//! goes in steps of [`STEP`] records; a crash in between leaves the entry, and the next mount goes on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::channel::io::Io;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::{FILE_BLOCKS_MAX, FILE_SIZE_MAX, File, FileInner};
use crate::range_lock::Mode;
use crate::records::orphans::{self, Work};
use crate::records::{extents, inodes};
use crate::txn::transact;
use crate::types::{BLOCK_SIZE, FileBlock, InodeId};
use crate::{pieces, read, write};

/// Extent records dropped in one transaction.
const STEP: usize = 256;

/// Sets the size of a file.
pub(crate) async fn truncate(core: &Arc<Core>, io: &Io, file: &File, size: u64) -> Result<()> {
    file.check_writable()?;
    if size > FILE_SIZE_MAX {
        return Err(Error::FileTooLarge { offset: 0, len: size });
    }
    truncate_inner(core, io, file.inner(), size).await
}

/// The same for a file whose handle has been checked.
pub(crate) async fn truncate_inner(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, size: u64) -> Result<()> {
    // From the last block that stays on: whoever appends or writes there waits.
    let _guard = file.lock.lock(FileBlock::containing(size).byte()..u64::MAX, Mode::Exclusive).await;
    let old = file.size();
    if size == old {
        return Ok(());
    }
    if size < old && size % BLOCK_SIZE as u64 != 0 {
        zero_behind(core, io, file, size).await?;
    }
    let kept = FileBlock::at_or_after(size);
    let more = transact(core, io, |t| {
        let beyond = if size < old { extents::last_beyond(t, file.id, kept, STEP + 1)? } else { Default::default() };
        let more = beyond.len() > STEP;
        let dropped = &beyond[beyond.len().saturating_sub(STEP)..];
        let plan = extents::plan(t, file.id, (kept, FileBlock(FILE_BLOCKS_MAX)), dropped, &[])?;
        if more {
            orphans::touch(t, file.id)?;
        }
        t.ready(plan.len() + 1)?;
        if size < old {
            file.map.truncate(size);
        } else {
            file.map.set_size(size);
        }
        plan.apply(t)?;
        pieces::forget_from(&file.map, kept);
        // A file that has lost its name is listed already, for more than this.
        if more && !file.unlinked.load(Ordering::Relaxed) {
            orphans::put(t, file.id, Work::Truncate)?;
        }
        t.change_inode(file, |inode| {
            inode.size = size;
            inode.extents = inode.extents.wrapping_add_signed(plan.extents);
            inode.blocks = inode.blocks.wrapping_add_signed(plan.blocks);
        });
        Ok(more)
    })
    .await?;
    if more {
        while drop_step(core, io, file.id, Some(file), kept, Work::Truncate).await? {}
    }
    Ok(())
}

/// Rewrites the block that contains byte `size` with zeroes from there on.
async fn zero_behind(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, size: u64) -> Result<()> {
    let block = FileBlock::containing(size);
    let (result, mut buf) = read::read_blocks(core, io, file, block, io.buffer(BLOCK_SIZE)?).await;
    result?;
    let keep = (size % BLOCK_SIZE as u64) as usize;
    if buf[keep..].iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    buf[keep..].fill(0);
    write::write_blocks(core, io, file, block, buf, 0).await.0
}

/// Drops up to [`STEP`] records of file `id` from its end down to block `kept`. True when there may be more; when there are none,
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
        let beyond = extents::last_beyond(t, id, kept, STEP + 1)?;
        let more = beyond.len() > STEP;
        let dropped = &beyond[beyond.len().saturating_sub(STEP)..];
        let plan = extents::plan(t, id, (kept, FileBlock(FILE_BLOCKS_MAX)), dropped, &[])?;
        let entry = orphans::find(t, id)?;
        orphans::touch(t, id)?;
        inodes::touch(t, id)?;
        t.ready(plan.len() + 2)?;
        plan.apply(t)?;
        if let Some(file) = file {
            pieces::forget_from(&file.map, kept);
            t.change_inode(file, |inode| {
                inode.extents = inode.extents.wrapping_add_signed(plan.extents);
                inode.blocks = inode.blocks.wrapping_add_signed(plan.blocks);
            });
        }
        // A file that lost its name during a long truncate keeps its entry, which says delete by now.
        if !more && entry == Some(work) {
            orphans::remove(t, id)?;
            if work == Work::Delete {
                inodes::remove(t, id)?;
            }
        }
        Ok(more)
    })
    .await
}

/// Drops the content of every deleted file that nobody has open any more.
pub(crate) async fn reap(core: &Arc<Core>, io: &Io) -> Result<()> {
    loop {
        let Some(id) = core.meta.lock().reap.pop() else { return Ok(()) };
        if let Err(error) = reap_one(core, io, id).await {
            core.meta.lock().reap.push(id);
            return Err(error);
        }
    }
}

async fn reap_one(core: &Arc<Core>, io: &Io, id: InodeId) -> Result<()> {
    core.forget_file(id);
    while drop_step(core, io, id, None, FileBlock(0), Work::Delete).await? {}
    Ok(())
}

/// Finishes the work that an earlier mount left.
pub(crate) async fn finish_orphans(core: &Arc<Core>, io: &Io) -> Result<()> {
    let mut from = InodeId(0);
    loop {
        let found = transact(core, io, |t| orphans::list(t, from, 64)).await?;
        let Some((last, _)) = found.last() else { return Ok(()) };
        from = InodeId(last.0 + 1);
        for (id, work) in found {
            match work {
                Work::Delete => reap_one(core, io, id).await?,
                Work::Truncate => finish_truncate(core, io, id).await?,
            }
        }
    }
}

/// Goes on with a truncate that a crash interrupted. The file is not open: the mount is not ready yet.
async fn finish_truncate(core: &Arc<Core>, io: &Io, id: InodeId) -> Result<()> {
    let inode = transact(core, io, |t| inodes::expect(t, id)).await?;
    let file = Arc::new(FileInner::new(id, b"", inode, false));
    let kept = FileBlock::at_or_after(inode.size);
    while drop_step(core, io, id, Some(&file), kept, Work::Truncate).await? {}
    core.meta.lock().open.remove(&id);
    Ok(())
}
