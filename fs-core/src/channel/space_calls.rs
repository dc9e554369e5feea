//! Calls of a channel about the space behind files, and writes of several files: each blocking, and as a future.

use std::sync::Arc;

use super::calls::{done, unexpected};
use super::operation::{FileExtent, Growth, Operation, Output};
use super::{Channel, OpFuture};
use crate::batch::WriteBatch;
use crate::error::Result;
use crate::file::File;
use crate::preallocate::Content;
use crate::{batch, layout, preallocate, punch};

/// Extents per page of a listing.
const EXTENTS_PAGE: usize = 512;

impl Channel {
    /// Gives every hole in the blocks of `len` bytes at `offset` blocks of its own, in as few runs as there are. They read as
    /// zeroes; content stays.
    ///
    /// The first write of each such block finds its space, also on a full device; a later one is like any other. Truncating or
    /// punching gives them back. Some metadata is kept back for them: a sixteenth of their number.
    ///
    /// Any length will do. For want of space nothing is done. A range that takes more than some hundred runs goes in several
    /// transactions: a crash in between leaves its beginning preallocated, and the size as it was.
    ///
    /// # Errors
    /// [`Error::NoSpace`], [`Error::FileTooLarge`], [`Error::ReadOnly`].
    ///
    /// [`Error::NoSpace`]: crate::Error::NoSpace
    /// [`Error::FileTooLarge`]: crate::Error::FileTooLarge
    /// [`Error::ReadOnly`]: crate::Error::ReadOnly
    pub fn preallocate(&self, file: &File, offset: u64, len: u64, growth: Growth) -> Result<()> {
        let (core, io) = (&self.core, &self.shared.io);
        self.blocking(preallocate::preallocate(core, io, file, (offset, len), Content::Stays, growth))
    }

    /// Lets `len` bytes at `offset` read as zeroes and keeps blocks for them: what whole blocks the range has are
    /// [preallocated](Self::preallocate) afterwards, in new places where they held data. For want of space nothing is done.
    ///
    /// A range of more than some hundred extents goes in steps, each of them atomic.
    ///
    /// # Errors
    /// Those of [`preallocate`](Self::preallocate), and those of reading the edges.
    pub fn zero(&self, file: &File, offset: u64, len: u64, growth: Growth) -> Result<()> {
        let (core, io) = (&self.core, &self.shared.io);
        self.blocking(preallocate::preallocate(core, io, file, (offset, len), Content::Zeroed, growth))
    }

    /// Lets `len` bytes at `offset` read as zeroes and gives back the blocks that lie in the range as a whole. The size stays.
    /// It works on a full device; only what frees no block asks for space, like a write.
    ///
    /// A range of more than some hundred extents goes in steps, each of them atomic.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::NoSpace`], and those of reading the edges.
    ///
    /// [`Error::NoSpace`]: crate::Error::NoSpace
    /// [`Error::ReadOnly`]: crate::Error::ReadOnly
    pub fn punch(&self, file: &File, offset: u64, len: u64) -> Result<()> {
        self.blocking(punch::punch(&self.core, &self.shared.io, file, offset, len))
    }

    /// Writes all of `batch` or nothing: after a crash, and to readers as far as one file goes (who reads two files may see the
    /// one before and the other after). Durable after the next sync.
    ///
    /// # Errors
    /// [`Error::BatchTooLarge`], [`Error::NoSpace`], [`Error::FileTooLarge`], [`Error::ReadOnly`], [`Error::Io`]. Nothing was
    /// done then.
    ///
    /// [`Error::BatchTooLarge`]: crate::Error::BatchTooLarge
    /// [`Error::NoSpace`]: crate::Error::NoSpace
    /// [`Error::FileTooLarge`]: crate::Error::FileTooLarge
    /// [`Error::ReadOnly`]: crate::Error::ReadOnly
    /// [`Error::Io`]: crate::Error::Io
    pub fn write_batch(&self, batch: &WriteBatch) -> Result<()> {
        self.blocking(batch::write(&self.core, &self.shared.io, batch))
    }

    /// Where `len` bytes at `offset` lie, in order, holes left out; blocks kept beyond the end of the file are among them. Each page
    /// of some hundred extents shows one state of the file.
    pub fn extents(&self, file: &File, offset: u64, len: u64) -> Extents<'_> {
        Extents {
            channel: self,
            file: file.clone(),
            offset,
            end: offset.saturating_add(len),
            page: Vec::new().into_iter(),
            ended: false,
        }
    }

    /// [`preallocate`](Self::preallocate) as a future.
    pub fn preallocate_async(
        &self,
        file: &File,
        offset: u64,
        len: u64,
        growth: Growth,
    ) -> OpFuture<'_, Result<()>> {
        self.start(Operation::Preallocate { file: file.clone(), offset, len, growth }, done)
    }

    /// [`zero`](Self::zero) as a future.
    pub fn zero_async(&self, file: &File, offset: u64, len: u64, growth: Growth) -> OpFuture<'_, Result<()>> {
        self.start(Operation::Zero { file: file.clone(), offset, len, growth }, done)
    }

    /// [`punch`](Self::punch) as a future.
    pub fn punch_async(&self, file: &File, offset: u64, len: u64) -> OpFuture<'_, Result<()>> {
        self.start(Operation::Punch { file: file.clone(), offset, len }, done)
    }

    /// [`write_batch`](Self::write_batch) as a future. The batch is shared: it can be tried again.
    pub fn write_batch_async(&self, batch: &Arc<WriteBatch>) -> OpFuture<'_, Result<()>> {
        self.start(Operation::WriteBatch { batch: Arc::clone(batch) }, done)
    }

    /// One page of [`extents`](Self::extents) as a future: up to `max`; empty if there are none.
    pub fn extents_async(
        &self,
        file: &File,
        offset: u64,
        len: u64,
        max: usize,
    ) -> OpFuture<'_, Result<Vec<FileExtent>>> {
        let file = file.clone();
        self.start(Operation::Extents { file, offset, len, max }, |(result, _)| match result? {
            Output::Extents(extents) => Ok(extents),
            other => Err(unexpected(&other)),
        })
    }
}

/// An iterator over the extents of a file; made by [`Channel::extents`].
#[derive(Debug)]
pub struct Extents<'c> {
    channel: &'c Channel,
    file: File,
    offset: u64,
    end: u64,
    page: std::vec::IntoIter<FileExtent>,
    ended: bool,
}

impl Iterator for Extents<'_> {
    type Item = Result<FileExtent>;

    fn next(&mut self) -> Option<Result<FileExtent>> {
        loop {
            if let Some(extent) = self.page.next() {
                return Some(Ok(extent));
            }
            if self.ended {
                return None;
            }
            let (channel, len) = (self.channel, self.end - self.offset);
            let (core, io, file) = (&channel.core, &channel.shared.io, self.file.inner());
            match channel.blocking(layout::extents(core, io, file, self.offset, len, EXTENTS_PAGE)) {
                Ok(extents) => {
                    self.ended = extents.len() < EXTENTS_PAGE;
                    let reached = extents.last().map_or(self.end, |last| last.offset + last.len);
                    self.offset = reached.min(self.end);
                    self.page = extents.into_iter();
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
    }
}
