//! The inode tree: inode id -> what is known of a file besides its content and name.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{TreeKind, key_u64, value_of};
use crate::channel::operation::Stat;
use crate::txn::{Stop, Txn};
use crate::types::{BLOCK_SIZE, Generation, InodeId};

/// An inode as it lies in the tree. 64 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct OnDisk {
    size: U64,
    blocks: U64,
    extents: U64,
    created_ns: U64,
    modified_ns: U64,
    version: U64,
    birth: U64,
    flags: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<OnDisk>() == 64);

/// What is known of a file. Times are nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inode {
    /// Bytes.
    pub(crate) size: u64,
    /// Data blocks that the file's extents take.
    pub(crate) blocks: u64,
    /// Extent records.
    pub(crate) extents: u64,
    pub(crate) created_ns: u64,
    pub(crate) modified_ns: u64,
    /// Grows with each change of content or size.
    pub(crate) version: u64,
    /// The generation in which the file was made.
    pub(crate) birth: Generation,
}

impl Inode {
    /// An empty file made now.
    pub(crate) fn new(birth: Generation) -> Inode {
        let now = now_ns();
        Inode { size: 0, blocks: 0, extents: 0, created_ns: now, modified_ns: now, version: 0, birth }
    }

    /// Notes a change of content or size.
    pub(crate) fn touch(&mut self) {
        self.version += 1;
        self.modified_ns = now_ns();
    }

    /// The public form.
    pub(crate) fn stat(&self, id: InodeId) -> Stat {
        let time = |ns| UNIX_EPOCH + Duration::from_nanos(ns);
        Stat {
            id,
            size: self.size,
            allocated_bytes: self.blocks * BLOCK_SIZE as u64,
            delayed_bytes: 0,
            extents: self.extents,
            modified: time(self.modified_ns),
            created: time(self.created_ns),
            version: self.version,
        }
    }
}

/// Nanoseconds since 1970, by the system's coarse view of it: good to a few milliseconds and cheap.
pub(crate) fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

fn key(id: InodeId) -> [u8; 8] {
    id.0.to_be_bytes()
}

/// The inode `id`.
pub(crate) fn find(t: &mut Txn<'_>, id: InodeId) -> Result<Option<Inode>, Stop> {
    let Some(value) = t.get(TreeKind::Inodes, &key(id))? else { return Ok(None) };
    let disk: OnDisk = value_of(TreeKind::Inodes, &value)?;
    if disk.size.get() > crate::file::FILE_SIZE_MAX {
        return Err(Stop::corrupt(format!("inode {id} has a size of {} bytes", disk.size)));
    }
    Ok(Some(Inode {
        size: disk.size.get(),
        blocks: disk.blocks.get(),
        extents: disk.extents.get(),
        created_ns: disk.created_ns.get(),
        modified_ns: disk.modified_ns.get(),
        version: disk.version.get(),
        birth: Generation(disk.birth.get()),
    }))
}

/// The inode that a name or an orphan refers to; that it is missing is corruption.
pub(crate) fn expect(t: &mut Txn<'_>, id: InodeId) -> Result<Inode, Stop> {
    find(t, id)?.ok_or_else(|| Stop::corrupt(format!("inode {id} is referred to and missing")))
}

/// Makes sure that inode `id` can be changed without stopping.
pub(crate) fn touch(t: &mut Txn<'_>, id: InodeId) -> Result<(), Stop> {
    t.touch(TreeKind::Inodes, &key(id))
}

/// Stores inode `id`.
pub(crate) fn put(t: &mut Txn<'_>, id: InodeId, inode: &Inode) -> Result<(), Stop> {
    let disk = OnDisk {
        size: inode.size.into(),
        blocks: inode.blocks.into(),
        extents: inode.extents.into(),
        created_ns: inode.created_ns.into(),
        modified_ns: inode.modified_ns.into(),
        version: inode.version.into(),
        birth: inode.birth.0.into(),
        flags: 0.into(),
        reserved: 0.into(),
    };
    t.put(TreeKind::Inodes, &key(id), disk.as_bytes())
}

/// Removes inode `id`.
pub(crate) fn remove(t: &mut Txn<'_>, id: InodeId) -> Result<(), Stop> {
    t.remove(TreeKind::Inodes, &key(id)).map(|_| ())
}

/// Up to `max` inode ids from `from` on.
pub(crate) fn list(t: &mut Txn<'_>, from: InodeId, max: usize) -> Result<Vec<InodeId>, Stop> {
    let mut found = Vec::new();
    let mut bad = None;
    t.scan(TreeKind::Inodes, &key(from), |key, _| {
        match key_u64(TreeKind::Inodes, key, 0) {
            Ok(id) => found.push(InodeId(id)),
            Err(stop) => bad = Some(stop),
        }
        bad.is_none() && found.len() < max
    })?;
    bad.map_or(Ok(found), Err)
}
