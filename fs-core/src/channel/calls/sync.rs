//! Sync of a part of a file.

use super::super::operation::Operation;
use super::super::{Channel, OpFuture};
use super::done;
use crate::commit;
use crate::error::Result;
use crate::file::File;

impl Channel {
    /// Makes `len` bytes at byte `offset` of a file durable, with its size and name: pages of the range that were written through the cache
    /// go to the device first. Other dirty pages of the file may stay where they are.
    ///
    /// # Errors
    /// Those of [`sync_file`](Self::sync_file).
    pub fn sync_range(&self, file: &File, offset: u64, len: u64) -> Result<()> {
        self.blocking(commit::sync_range(&self.core, &self.shared.io, file, offset, len))
    }

    /// [`sync_range`](Self::sync_range) as a future.
    pub fn sync_range_async(&self, file: &File, offset: u64, len: u64) -> OpFuture<'_, Result<()>> {
        self.start(Operation::SyncRange { file: file.clone(), offset, len }, done)
    }
}
