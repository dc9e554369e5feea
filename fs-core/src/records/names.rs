//! The names tree: name -> inode id. Flat and ordered by the bytes of the names.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::{TreeKind, value_of};
use crate::channel::operation::DirEntry;
use crate::error::{Error, Result};
use crate::txn::{Stop, Txn};
use crate::types::InodeId;

/// Longest file name in bytes.
pub const NAME_MAX: usize = 255;

/// Checks that `name` may name a file.
pub(crate) fn check(name: &[u8]) -> Result<()> {
    if name.is_empty() {
        return Err(Error::NameEmpty);
    }
    if name.len() > NAME_MAX {
        return Err(Error::NameTooLong { len: name.len() });
    }
    match name.iter().position(|b| *b == 0) {
        Some(at) => Err(Error::NameHasNul { at }),
        None => Ok(()),
    }
}

/// The file that `name` names.
pub(crate) fn find(t: &mut Txn<'_>, name: &[u8]) -> Result<Option<InodeId>, Stop> {
    match t.get(TreeKind::Names, name)? {
        Some(value) => Ok(Some(InodeId(value_of::<U64>(TreeKind::Names, &value)?.get()))),
        None => Ok(None),
    }
}

/// The file that `name` names, or the error that there is none.
pub(crate) fn expect(t: &mut Txn<'_>, name: &[u8]) -> Result<InodeId, Stop> {
    find(t, name)?.ok_or_else(|| Stop::Fail(Error::NotFound { name: name.to_vec() }))
}

/// Lets `name` name `id`.
pub(crate) fn put(t: &mut Txn<'_>, name: &[u8], id: InodeId) -> Result<(), Stop> {
    t.put(TreeKind::Names, name, U64::new(id.0).as_bytes())
}

/// Removes `name`.
pub(crate) fn remove(t: &mut Txn<'_>, name: &[u8]) -> Result<(), Stop> {
    t.remove(TreeKind::Names, name).map(|_| ())
}

/// Up to `max` names that start with `prefix` and are greater than `after`, in order.
pub(crate) fn list(
    t: &mut Txn<'_>,
    prefix: &[u8],
    after: Option<&[u8]>,
    max: usize,
) -> Result<Vec<DirEntry>, Stop> {
    let mut entries = Vec::new();
    // The smallest name greater than `after` is `after` with a zero byte behind it; names have none, so `>=` is right.
    let mut from = match after {
        Some(after) if after >= prefix => [after, &[0]].concat(),
        _ => prefix.to_vec(),
    };
    if from.is_empty() {
        from.push(0);
    }
    let mut bad = false;
    t.scan(TreeKind::Names, &from, |name, value| {
        if entries.len() == max || !name.starts_with(prefix) {
            return false;
        }
        match value_of::<U64>(TreeKind::Names, value) {
            Ok(id) => entries.push(DirEntry { name: name.to_vec(), id: InodeId(id.get()) }),
            Err(_) => bad = true,
        }
        !bad
    })?;
    if bad {
        return Err(Stop::corrupt("a name without an inode id".to_owned()));
    }
    Ok(entries)
}
