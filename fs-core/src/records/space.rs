//! The space tree: allocation state of regions and the free counts of groups of regions, as the allocator encodes them.

use super::TreeKind;
use crate::alloc::{GroupId, RegionId};
use crate::txn::{Stop, Txn, Value};

const GROUP: u8 = 0;
const REGION: u8 = 1;

fn key(kind: u8, id: u64) -> [u8; 9] {
    let mut key = [kind; 9];
    key[1..].copy_from_slice(&id.to_be_bytes());
    key
}

fn region_key(id: RegionId) -> [u8; 9] {
    key(REGION, u64::from(id.0))
}

fn group_key(id: GroupId) -> [u8; 9] {
    key(GROUP, u64::from(id.0))
}

/// The stored state of a region; none: all free.
pub(crate) fn region(t: &mut Txn<'_>, id: RegionId) -> Result<Option<Value>, Stop> {
    t.get(TreeKind::Space, &region_key(id))
}

/// The stored free counts of a group; none: all free.
pub(crate) fn group(t: &mut Txn<'_>, id: GroupId) -> Result<Option<Value>, Stop> {
    t.get(TreeKind::Space, &group_key(id))
}

/// Stores the state of a region.
pub(crate) fn put_region(t: &mut Txn<'_>, id: RegionId, value: &[u8]) -> Result<(), Stop> {
    t.put(TreeKind::Space, &region_key(id), value)
}

/// Stores the counts of a group.
pub(crate) fn put_group(t: &mut Txn<'_>, id: GroupId, value: &[u8]) -> Result<(), Stop> {
    t.put(TreeKind::Space, &group_key(id), value)
}
