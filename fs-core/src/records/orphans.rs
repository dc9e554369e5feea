//! The orphans tree: files with work left that must survive a crash.
//!
//! A file that lost its name while it was open, or whose extents are too many to be dropped in one transaction, is
//! listed here until the work is done. A mount for writing finishes what it finds.

use super::{TreeKind, key_u64};
use crate::txn::{Stop, Txn};
use crate::types::InodeId;

/// What is left to do for a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Work {
    /// It has no name any more: drop content and inode.
    Delete = 1,
    /// Drop the extents beyond its size.
    Truncate = 2,
}

impl Work {
    fn parse(value: &[u8]) -> Result<Work, Stop> {
        match value {
            [1] => Ok(Work::Delete),
            [2] => Ok(Work::Truncate),
            _ => Err(Stop::corrupt("an orphan of unknown kind".to_owned())),
        }
    }
}

/// Makes sure that the entry of `id` can be changed without stopping.
pub(crate) fn touch(t: &mut Txn<'_>, id: InodeId) -> Result<(), Stop> {
    t.touch(TreeKind::Orphans, &id.0.to_be_bytes())
}

/// What is noted for `id`.
pub(crate) fn find(t: &mut Txn<'_>, id: InodeId) -> Result<Option<Work>, Stop> {
    match t.get(TreeKind::Orphans, &id.0.to_be_bytes())? {
        Some(value) => Work::parse(&value).map(Some),
        None => Ok(None),
    }
}

/// Notes `work` for `id`.
pub(crate) fn put(t: &mut Txn<'_>, id: InodeId, work: Work) -> Result<(), Stop> {
    t.put(TreeKind::Orphans, &id.0.to_be_bytes(), &[work as u8])
}

/// The work for `id` is done.
pub(crate) fn remove(t: &mut Txn<'_>, id: InodeId) -> Result<(), Stop> {
    t.remove(TreeKind::Orphans, &id.0.to_be_bytes()).map(|_| ())
}

/// Up to `max` orphans from `from` on.
pub(crate) fn list(t: &mut Txn<'_>, from: InodeId, max: usize) -> Result<Vec<(InodeId, Work)>, Stop> {
    let mut found = Vec::new();
    let mut bad = None;
    t.scan(TreeKind::Orphans, &from.0.to_be_bytes(), |key, value| {
        match key_u64(TreeKind::Orphans, key, 0).and_then(|id| Ok((InodeId(id), Work::parse(value)?))) {
            Ok(orphan) => found.push(orphan),
            Err(stop) => bad = Some(stop),
        }
        bad.is_none() && found.len() < max
    })?;
    bad.map_or(Ok(found), Err)
}
