//! The checksum tree: checksums of the data blocks of extents that are longer than one block, by device address.
//!
//! A chunk is 64 blocks of the address space: a word of presence bits and 64 CRC-32C values. Keyed by address, a long extent
//! stays one record, shared extents share their checksums, and a read can fetch data and checksums side by side. New
//! data is mostly allocated in sequence, so a commit touches few chunks. Checksums of freed blocks stay until the
//! block is written again: nothing refers to them. Extents of one block carry their checksum in their own record.

use smallvec::SmallVec;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::{TreeKind, key_u64, value_of};
use crate::txn::{Stop, Txn};
use crate::types::Run;

/// Blocks per chunk.
pub(crate) const CHUNK: u64 = 64;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct OnDisk {
    present: U64,
    sums: [U32; CHUNK as usize],
}

const _: () = assert!(size_of::<OnDisk>() == 264);

fn key(chunk: u64) -> [u8; 8] {
    chunk.to_be_bytes()
}

/// The part of a run that lies in one chunk: chunk, first index, length.
fn parts(run: Run) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = run.start.0;
    let end = run.end().0;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (chunk, first) = (at / CHUNK, at % CHUNK);
        let len = (CHUNK - first).min(end - at);
        at += len;
        Some((chunk, first as usize, len as usize))
    })
}

/// The chunks that must be rewritten for the runs of a write.
#[derive(Default)]
pub(crate) struct Plan(SmallVec<[(u64, Box<OnDisk>); 1]>);

/// Makes sure that the checksums of `run` can be stored without stopping, and adds them to `plan`. Several runs of one write
/// may lie in one chunk: they must share a plan, or the last would store the chunk without the others.
pub(crate) fn plan(t: &mut Txn<'_>, plan: &mut Plan, run: Run, sums: &[u32]) -> Result<(), Stop> {
    let mut done = 0;
    for (chunk, first, len) in parts(run) {
        let index = match plan.0.iter().position(|(other, _)| *other == chunk) {
            Some(index) => index,
            None => {
                // A chunk that is replaced whole needs only its path.
                let disk: Box<OnDisk> = if len == CHUNK as usize {
                    t.touch(TreeKind::Checksums, &key(chunk))?;
                    Box::new(OnDisk::new_zeroed())
                } else {
                    match t.get(TreeKind::Checksums, &key(chunk))? {
                        Some(value) => Box::new(value_of(TreeKind::Checksums, &value)?),
                        None => Box::new(OnDisk::new_zeroed()),
                    }
                };
                plan.0.push((chunk, disk));
                plan.0.len() - 1
            }
        };
        let disk = &mut plan.0[index].1;
        let mut present = disk.present.get();
        for i in 0..len {
            present |= 1 << (first + i);
            disk.sums[first + i] = sums[done + i].into();
        }
        disk.present = present.into();
        done += len;
    }
    Ok(())
}

/// Stores what was planned.
pub(crate) fn apply(t: &mut Txn<'_>, plan: &Plan) -> Result<(), Stop> {
    for (chunk, disk) in &plan.0 {
        t.put(TreeKind::Checksums, &key(*chunk), disk.as_bytes())?;
    }
    Ok(())
}

impl Plan {
    /// Number of tree values that it writes.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// The checksums of a chunk.
pub(crate) struct Chunk(OnDisk);

impl Chunk {
    /// The checksum of block `index` of the chunk.
    pub(crate) fn sum(&self, index: u64) -> Option<u32> {
        (self.0.present.get() >> index & 1 == 1).then(|| self.0.sums[index as usize].get())
    }
}

/// A record of the tree: the chunk's number and its checksums.
pub(crate) fn parse(key: &[u8], value: &[u8]) -> Result<(u64, Chunk), Stop> {
    Ok((key_u64(TreeKind::Checksums, key, 0)?, Chunk(value_of(TreeKind::Checksums, value)?)))
}

/// The checksums of `run`; `None` where none is stored.
pub(crate) fn find(t: &mut Txn<'_>, run: Run) -> Result<Vec<Option<u32>>, Stop> {
    let mut found = Vec::with_capacity(run.len as usize);
    for (chunk, first, len) in parts(run) {
        match t.get(TreeKind::Checksums, &key(chunk))? {
            Some(value) => {
                let disk: OnDisk = value_of(TreeKind::Checksums, &value)?;
                let present = disk.present.get();
                found.extend(
                    (first..first + len).map(|i| (present >> i & 1 == 1).then(|| disk.sums[i].get())),
                );
            }
            None => found.extend(std::iter::repeat_n(None, len)),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::BlockAddr;

    #[test]
    fn runs_are_cut_at_chunk_borders() {
        let cut = |start, len| parts(Run::new(BlockAddr(start), len)).collect::<Vec<_>>();
        assert_eq!(cut(0, 64), [(0, 0, 64)]);
        assert_eq!(cut(63, 2), [(0, 63, 1), (1, 0, 1)]);
        assert_eq!(cut(10, 128), [(0, 10, 54), (1, 0, 64), (2, 0, 10)]);
    }
}
