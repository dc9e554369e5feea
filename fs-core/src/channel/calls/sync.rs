//! Sync of a part of a file.

use super::super::operation::Operation;
use super::super::{Channel, OpFuture};
use super::done;
use crate::commit;
use crate::error::Result;
use crate::file::{FILE_BLOCKS_MAX, File};
use crate::records::extents;
use crate::txn::transact;
use crate::types::FileBlock;

impl Channel {
    /// Makes `len` bytes at byte `offset` of a file durable, with its size and name: pages of the range that were written through the cache
    /// go to the device first. Other dirty pages of the file may stay where they are.
    ///
    /// # Errors
    /// Those of [`sync_file`](Self::sync_file).
    pub fn sync_range(&self, file: &File, offset: u64, len: u64) -> Result<()> {
        self.blocking(commit::sync_range(&self.core, &self.shared.io, file, offset, len))
    }

    /// Runs on the device that follow each other, in the order of the file: what a sequential reader sees. For tests.
    ///
    /// # Errors
    /// Those of reading metadata.
    #[doc(hidden)]
    pub fn physical_runs(&self, file: &File) -> Result<u64> {
        let end = FileBlock(FILE_BLOCKS_MAX);
        self.blocking(transact(&self.core, &self.shared.io, |t| {
            let extents = extents::overlapping(t, file.id(), FileBlock(0), end, usize::MAX)?;
            let breaks = extents.windows(2).filter(|pair| pair[0].run().end() != pair[1].addr);
            Ok(breaks.count() as u64 + u64::from(!extents.is_empty()))
        }))
    }

    /// [`sync_range`](Self::sync_range) as a future.
    pub fn sync_range_async(&self, file: &File, offset: u64, len: u64) -> OpFuture<'_, Result<()>> {
        self.start(Operation::SyncRange { file: file.clone(), offset, len }, done)
    }
}
