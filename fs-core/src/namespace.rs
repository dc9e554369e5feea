//! Names and files: create, open, close, delete, rename, stat, list.
//!
//! Each is one transaction (two, when a deleted file has many extents), atomic against crashes and other threads. Shape
//! of all of them: look up everything that will change (a key that was looked up can be changed without a missing node), then
//! change; see [`crate::txn`].

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::channel::io::Io;
use crate::channel::operation::{DirEntry, OpenFlags, Stat};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::{File, FileInner};
use crate::records::inodes::{self, Inode};
use crate::records::orphans::{self, Work};
use crate::records::{extents, names};
use crate::truncate;
use crate::txn::{Room, Stop, Txn, transact};
use crate::types::{FileBlock, InodeId};
use crate::writeback::transact_with_room;

/// A deleted file with at most so many extents is gone in the transaction that removes its name.
const SMALL_FILE_EXTENTS: u64 = 16;
/// Most names a page of a listing may have.
const LIST_MAX: usize = 4096;

/// Creates an empty file.
pub(crate) async fn create(core: &Arc<Core>, io: &Io, name: &[u8]) -> Result<InodeId> {
    core.check_writable()?;
    names::check(name)?;
    transact_with_room(core, io, |t| {
        if names::find(t, name)?.is_some() {
            return Err(Stop::Fail(Error::Exists { name: name.to_vec() }));
        }
        add(t, name).map(|(id, _)| id)
    })
    .await
}

/// Adds an inode and its name, which was looked up and does not exist.
fn add(t: &mut Txn<'_>, name: &[u8]) -> Result<(InodeId, Inode), Stop> {
    t.check_room(Room::Metadata)?;
    let (id, inode) = (t.meta.next_inode, Inode::new(t.generation()));
    t.ready(2)?;
    // The name was looked up; the inode comes first, so that a node missing on its way stops us in time.
    inodes::put(t, id, &inode)?;
    names::put(t, name, id)?;
    t.meta.next_inode = InodeId(id.0 + 1);
    t.meta.files += 1;
    Ok((id, inode))
}

/// Opens a file.
pub(crate) async fn open(core: &Arc<Core>, io: &Io, name: &[u8], flags: OpenFlags) -> Result<File> {
    names::check(name)?;
    let writes = flags.contains(OpenFlags::CREATE) || flags.contains(OpenFlags::TRUNCATE);
    if writes {
        core.check_writable()?;
    }
    let inner = transact_with_room(core, io, |t| {
        let (id, inode, fresh) = match names::find(t, name)? {
            Some(_) if flags.contains(OpenFlags::CREATE | OpenFlags::EXCLUSIVE) => {
                return Err(Stop::Fail(Error::Exists { name: name.to_vec() }));
            }
            Some(id) => match t.meta.open.get(&id) {
                Some(file) => {
                    // Crash recovery knows a file by its number.
                    name.clone_into(&mut file.name.lock());
                    return Ok(counted(file));
                }
                None => (id, inodes::expect(t, id)?, false),
            },
            None if flags.contains(OpenFlags::CREATE) => {
                let (id, inode) = add(t, name)?;
                (id, inode, true)
            }
            None => return Err(Stop::Fail(Error::NotFound { name: name.to_vec() })),
        };
        let file = Arc::new(FileInner::new(id, name, inode, fresh));
        t.meta.open.insert(id, Arc::clone(&file));
        Ok(counted(&file))
    })
    .await?;
    let file = File::new(core, inner, flags);
    if flags.contains(OpenFlags::TRUNCATE) && file.size() > 0 {
        truncate::truncate_inner(core, io, file.inner(), 0).await?;
    }
    Ok(file)
}

/// Counts a handle on `file`; under the metadata lock.
fn counted(file: &Arc<FileInner>) -> Arc<FileInner> {
    file.handles.fetch_add(1, Ordering::Relaxed);
    Arc::clone(file)
}

/// Closes a handle, and waits until the space of a deleted file is given back if it was the last one.
pub(crate) async fn close(core: &Arc<Core>, io: &Io, file: File) -> Result<()> {
    drop(file);
    truncate::reap(core, io).await
}

/// Removes a name.
pub(crate) async fn delete(core: &Arc<Core>, io: &Io, name: &[u8]) -> Result<()> {
    core.check_writable()?;
    names::check(name)?;
    let later = transact(core, io, |t| {
        let id = names::expect(t, name)?;
        let victim = Victim::plan(t, id)?;
        t.ready(1 + victim.changes())?;
        names::remove(t, name)?;
        t.meta.files -= 1;
        victim.apply(t)
    })
    .await?;
    if later {
        truncate::reap_or_log(core, io).await;
    }
    Ok(())
}

/// Renames a file; a file of the new name is deleted in the same transaction.
pub(crate) async fn rename(core: &Arc<Core>, io: &Io, from: &[u8], to: &[u8]) -> Result<()> {
    core.check_writable()?;
    names::check(from)?;
    names::check(to)?;
    let later = transact_with_room(core, io, |t| {
        let id = names::expect(t, from)?;
        if from == to {
            return Ok(false);
        }
        t.check_room(Room::Metadata)?;
        let victim = match names::find(t, to)? {
            Some(old) => Some(Victim::plan(t, old)?),
            None => None,
        };
        t.ready(2 + victim.as_ref().map_or(0, Victim::changes))?;
        names::remove(t, from)?;
        names::put(t, to, id)?;
        if let Some(file) = t.meta.open.get(&id) {
            *file.name.lock() = to.to_vec();
        }
        match victim {
            Some(victim) => {
                t.meta.files -= 1;
                victim.apply(t)
            }
            None => Ok(false),
        }
    })
    .await?;
    if later {
        truncate::reap_or_log(core, io).await;
    }
    Ok(())
}

/// A file that is about to lose its name.
#[allow(clippy::large_enum_variant, reason = "lives on the stack of one transaction")]
enum Victim {
    /// Nobody has it open and it is small: it goes at once.
    Now { id: InodeId, extents: Option<extents::Replacement> },
    /// It is listed as an orphan, and goes when its last handle is closed, or step by step.
    Orphan { id: InodeId, file: Option<Arc<FileInner>> },
}

impl Victim {
    fn plan(t: &mut Txn<'_>, id: InodeId) -> Result<Victim, Stop> {
        if let Some(file) = t.meta.open.get(&id).cloned() {
            orphans::touch(t, id)?;
            return Ok(Victim::Orphan { id, file: Some(file) });
        }
        let inode = inodes::expect(t, id)?;
        if inode.extents > SMALL_FILE_EXTENTS {
            orphans::touch(t, id)?;
            return Ok(Victim::Orphan { id, file: None });
        }
        let mut extents = None;
        if inode.extents > 0 {
            let range = (FileBlock(0), FileBlock(crate::file::FILE_BLOCKS_MAX));
            let old = extents::overlapping(t, id, range.0, range.1, usize::MAX)?;
            extents = Some(extents::plan(t, id, &[range], &old, &[])?);
        }
        Ok(Victim::Now { id, extents })
    }

    fn changes(&self) -> usize {
        match self {
            Victim::Now { extents, .. } => 1 + extents.as_ref().map_or(0, |e| e.len()),
            Victim::Orphan { .. } => 1,
        }
    }

    /// Lets the file go. True when [`truncate::reap`] has work to do.
    fn apply(self, t: &mut Txn<'_>) -> Result<bool, Stop> {
        match self {
            Victim::Now { id, extents } => {
                if let Some(extents) = extents {
                    extents.apply(t)?;
                }
                inodes::remove(t, id)?;
                Ok(false)
            }
            Victim::Orphan { id, file } => {
                orphans::put(t, id, Work::Delete)?;
                match file {
                    Some(file) => {
                        file.unlinked.store(true, Ordering::Relaxed);
                        let unused = file.handles.load(Ordering::Relaxed) == 0;
                        if unused {
                            t.meta.reap.push(id);
                        }
                        Ok(unused)
                    }
                    None => {
                        t.meta.reap.push(id);
                        Ok(true)
                    }
                }
            }
        }
    }
}

/// Looks a file up by name.
pub(crate) async fn stat(core: &Arc<Core>, io: &Io, name: &[u8]) -> Result<Stat> {
    names::check(name)?;
    transact(core, io, |t| {
        let id = names::expect(t, name)?;
        match t.meta.open.get(&id) {
            Some(file) => Ok(file.stat()),
            None => Ok(inodes::expect(t, id)?.stat(id)),
        }
    })
    .await
}

/// Up to `max` names that start with `prefix` and are greater than `after`.
pub(crate) async fn list(
    core: &Arc<Core>,
    io: &Io,
    prefix: &[u8],
    after: Option<&[u8]>,
    max: usize,
) -> Result<Vec<DirEntry>> {
    transact(core, io, |t| names::list(t, prefix, after, max.min(LIST_MAX))).await
}
