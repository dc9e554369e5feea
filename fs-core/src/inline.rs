//! Inline content: a small file lies in the metadata tree, and takes no block.
//!
//! Block 0 of a file is inline when it was written at the beginning of a file of at most [`INLINE_MAX`] bytes and nothing larger was
//! written to it since. Such a write is a transaction and no I/O: it becomes durable with the next commit's nodes. A write that
//! needs more turns block 0 into a data block, like any block that is written over (its way out); what lies behind block 0 is
//! data in any case, so a file may begin inline and go on elsewhere. Bytes of block 0 behind the content are zero.
//!
//! Invariants: only block 0 is inline; the content never reaches beyond the end of the file; it changes only by publication, under
//! the exclusive lock of block 0. So a writer that holds it may look at the content in one transaction and publish in another. A
//! reader holds nothing, so it takes view and content in one ([`snapshot`]): both change under the metadata lock.

use std::sync::Arc;

use crate::channel::io::Io;
use crate::core::Core;
use crate::error::Result;
use crate::extent_map::Mapping;
use crate::file::FileInner;
use crate::page_cache::FilePages;
use crate::pieces::{self, Missing, Pieces};
use crate::read::By;
use crate::records::extents::{self, Content, INLINE_MAX, Kind};
use crate::txn::{Room, Stop, Txn, transact};
use crate::types::{BLOCK_SIZE, FileBlock};

const _: () = assert!(INLINE_MAX <= BLOCK_SIZE);

const BEHIND: FileBlock = FileBlock(1);

/// What a reader finds in a file that has inline content.
pub(crate) enum Inlined {
    /// What its range holds, and the size of the file, in one state.
    Here(Pieces, u64),
    /// A block whose mapping must be loaded first.
    Missing(FileBlock),
    /// The cache has newer pages.
    Newer,
}

/// What `[offset, offset + len)` holds. View and content change under the metadata lock, so they are taken under it. So does write-back
/// publish: pages that are not seen here are in the view.
pub(crate) async fn snapshot(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    offset: u64,
    len: u64,
    by: By,
) -> Result<Inlined> {
    transact(core, io, |t| {
        let content = extents::content(t, file.id)?;
        let guard = crate::extent_map::pin();
        let view = file.map.view(&guard);
        let size = view.size();
        let end = offset.saturating_add(len).min(size);
        if end <= offset {
            return Ok(Inlined::Here(Pieces::default(), size));
        }
        let (from, to) = (FileBlock::containing(offset), FileBlock::at_or_after(end));
        let busy = |pages: &Arc<FilePages>| pages.busy_in(&(from.0..to.0));
        if by == By::Direct && file.pages_if_any().is_some_and(busy) {
            return Ok(Inlined::Newer);
        }
        match pieces::collect(&view, from, to, content.as_ref()) {
            Ok(pieces) => Ok(Inlined::Here(pieces, size)),
            Err(Missing::Block(block)) => Ok(Inlined::Missing(block)),
            Err(Missing::Content) => {
                Err(Stop::corrupt(format!("inode {}: content that should be inline is missing", file.id)))
            }
        }
    })
    .await
}

/// The inline content of a file after `writes` (byte offset and bytes, the later wins), if that is where they belong. The caller
/// holds block 0.
pub(crate) async fn content_after(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    writes: &[(u64, &[u8])],
) -> Result<Option<Content>> {
    let end = writes.iter().map(|(offset, data)| offset.saturating_add(data.len() as u64)).max();
    let Some(end) = end.filter(|end| (1..=INLINE_MAX as u64).contains(end)) else { return Ok(None) };
    if has_block(file) {
        return Ok(None);
    }
    let old = transact(core, io, |t| {
        let old = match first(t, file)? {
            None if file.size().max(end) <= INLINE_MAX as u64 => Content::new(),
            Some(Kind::Inline) => extents::content(t, file.id)?.unwrap_or_default(),
            _ => return Ok(None),
        };
        t.check_room(Room::Metadata)?;
        Ok(Some(old))
    })
    .await?;
    Ok(old.map(|mut content| {
        content.resize(content.len().max(end as usize), 0);
        for (offset, data) in writes {
            content[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
        }
        content
    }))
}

/// The inline content, if block 0 has some. The caller holds block 0.
pub(crate) async fn content(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>) -> Result<Option<Content>> {
    if has_block(file) {
        return Ok(None);
    }
    transact(core, io, |t| extents::content(t, file.id)).await
}

/// What is behind block 0.
fn first(t: &mut Txn<'_>, file: &FileInner) -> Result<Option<Kind>, Stop> {
    Ok(extents::overlapping(t, file.id, FileBlock(0), BEHIND, 1)?.first().map(|extent| extent.kind))
}

/// Whether the map knows that block 0 takes a block: the quick answer for most files.
fn has_block(file: &FileInner) -> bool {
    let guard = crate::extent_map::pin();
    let entry = file.map.view(&guard).lookup(FileBlock(0));
    matches!(entry.mapping(), Mapping::Data { .. } | Mapping::Preallocated { .. })
}
