//! Where things lie: the extents of a file as its readers see them, and, the other way round, what a block of the device is.
//!
//! [`extents`] lists the file view, which may be ahead of the trees. [`owner_of`] is for debugging: nothing is indexed by block, so
//! it walks the extent tree, and the nodes of the others, until it finds the block. It takes as long as that takes.

use std::sync::Arc;

use crate::channel::Channel;
use crate::channel::io::Io;
use crate::channel::operation::{ExtentState, FileExtent};
use crate::core::Core;
use crate::error::Result;
use crate::extent_map::{BlockEnd, BlockRange, Mapping, View};
use crate::file::{FILE_SIZE_MAX, FileInner};
use crate::records::extents::Kind;
use crate::records::{TreeKind, extents as records, names};
use crate::tree::Walk;
use crate::txn::{Stop, transact};
use crate::types::{BLOCK_SHIFT, BlockAddr, FileBlock, InodeId};
use crate::{load, superblock, writeback};

/// Records, or names, looked at in one transaction.
const BATCH: usize = 512;
/// Most extents of a page.
const PAGE_MAX: usize = 4096;

/// Up to `max` extents in `len` bytes at `offset`, in one state of the file. What is dirty there is written back first: it has no
/// place before.
pub(crate) async fn extents(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    offset: u64,
    len: u64,
    max: usize,
) -> Result<Vec<FileExtent>> {
    let end = offset.saturating_add(len).min(FILE_SIZE_MAX);
    if offset >= end {
        return Ok(Vec::new());
    }
    let range = BlockRange::between(FileBlock::containing(offset), BlockEnd(FileBlock::at_or_after(end).0));
    writeback::range(core, io, file, range.start().0..range.end().0).await?;
    loop {
        let page = {
            let guard = crate::extent_map::pin();
            page(core, &file.map.view(&guard), range, max.min(PAGE_MAX))
        };
        match page {
            Ok(page) => return Ok(page),
            Err(missing) => load::extents(core, io, file, missing).await?,
        }
    }
}

/// The first `max` extents of `range`; or a block that is not in memory. Neighbours that continue each other are one.
fn page(core: &Core, view: &View<'_>, range: BlockRange, max: usize) -> Result<Vec<FileExtent>, FileBlock> {
    let mut page: Vec<FileExtent> = Vec::new();
    for entry in view.iter(range) {
        let (state, device) = match entry.mapping() {
            Mapping::Unknown => return Err(entry.start()),
            Mapping::Hole => continue,
            Mapping::Inline => (ExtentState::Inline, None),
            Mapping::Data { addr, .. } => (ExtentState::Data, Some(core.locate(addr))),
            Mapping::Preallocated { addr } => (ExtentState::Preallocated, Some(core.locate(addr))),
        };
        let (offset, len) = (entry.start().byte(), entry.len().0 << BLOCK_SHIFT);
        let full = page.len() >= max;
        match page.last_mut() {
            Some(last)
                if last.state == state
                    && last.offset + last.len == offset
                    && last.device.map(|device| device + last.len) == device =>
            {
                last.len += len;
            }
            _ if full => break,
            _ => page.push(FileExtent { offset, len, device, state }),
        }
    }
    Ok(page)
}

/// What a block of the device is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockOwner {
    /// Nothing refers to it.
    Nothing,
    /// It holds a superblock.
    Superblock,
    /// It holds a node of the metadata tree of this name.
    Metadata(&'static str),
    /// It belongs to a file.
    File {
        /// The file.
        id: InodeId,
        /// Its name; `None` if it was deleted and its space is not given back yet.
        name: Option<Vec<u8>>,
        /// The byte of the file that the block begins with.
        offset: u64,
        /// Data or preallocated.
        state: ExtentState,
    },
}

impl crate::Filesystem {
    /// What refers to the block at byte `device_offset` of the device, by the metadata in memory (what is being written at this moment
    /// belongs to nothing yet). For debugging: it walks the metadata, so it takes long on a large filesystem.
    ///
    /// # Errors
    /// [`Error::Corrupt`](crate::Error::Corrupt) and [`Error::Io`](crate::Error::Io), when metadata on the way cannot be read.
    pub fn owner_of(&self, channel: &Channel, device_offset: u64) -> Result<BlockOwner> {
        let (core, io) = (&channel.core, &channel.shared.io);
        core.check_mounted()?;
        channel.block_on(owner_of(core, io, BlockAddr(device_offset >> BLOCK_SHIFT)))
    }
}

async fn owner_of(core: &Arc<Core>, io: &Io, block: BlockAddr) -> Result<BlockOwner> {
    let within = |run: crate::types::Run| run.start <= block && block < run.end();
    if superblock::reserved_runs(core.total_blocks).into_iter().any(within) {
        return Ok(BlockOwner::Superblock);
    }
    let (mut id, mut at) = (InodeId(0), FileBlock(0));
    loop {
        let (mut owner, mut last, mut seen) = (None, None, 0);
        transact(core, io, |t| {
            (owner, last, seen) = (None, None, 0);
            records::scan_all(t, id, at, |id, extent| {
                seen += 1;
                last = Some((id, extent.at));
                if extent.run().is_some_and(within) {
                    owner = Some((id, extent));
                }
                owner.is_none() && seen < BATCH
            })
        })
        .await?;
        if let Some((id, extent)) = owner {
            let offset = extent.at.plus(block.0 - extent.addr.0).byte();
            let preallocated = extent.kind == Kind::Preallocated;
            let state = if preallocated { ExtentState::Preallocated } else { ExtentState::Data };
            return Ok(BlockOwner::File { id, name: name_of(core, io, id).await?, offset, state });
        }
        match last {
            Some((last, block)) if seen >= BATCH => (id, at) = (last, block.plus(1)),
            _ => break,
        }
    }
    node_of(core, io, block).await
}

/// The name that leads to `id`.
async fn name_of(core: &Arc<Core>, io: &Io, id: InodeId) -> Result<Option<Vec<u8>>> {
    let mut after: Option<Vec<u8>> = None;
    loop {
        let page = transact(core, io, |t| names::list(t, b"", after.as_deref(), BATCH)).await?;
        if let Some(entry) = page.iter().find(|entry| entry.id == id) {
            return Ok(Some(entry.name.clone()));
        }
        match page.into_iter().next_back() {
            Some(last) => after = Some(last.name),
            None => return Ok(None),
        }
    }
}

/// The tree that has `block` for a node.
async fn node_of(core: &Arc<Core>, io: &Io, block: BlockAddr) -> Result<BlockOwner> {
    for kind in TreeKind::ALL {
        let mut walk = Walk::new();
        loop {
            let next = transact(core, io, |t| {
                let meta = &mut *t.meta;
                let step = walk.step(&meta.trees[kind.index()], &mut meta.cache).map_err(Stop::from)?;
                Ok(step.map(|(ptr, _)| ptr.addr))
            })
            .await?;
            match next {
                Some(addr) if addr == block => return Ok(BlockOwner::Metadata(kind.name())),
                Some(_) => {}
                None => break,
            }
        }
    }
    Ok(BlockOwner::Nothing)
}
