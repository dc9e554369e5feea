//! The calls of a channel: each blocking, and as a future.

use std::future::Future;

use bdev_adapter::{DmaBuf, Segments};

use super::future::Answer;
use super::operation::{DirEntry, OpenFlags, Operation, Output, Stat, StatFs};
use super::{Channel, OpFuture};
use crate::error::{Error, Result};
use crate::file::File;
use crate::types::InodeId;
use crate::{buffered, commit, namespace, truncate, write};

mod sync;
mod vectored;

/// Names per page of a listing.
const LIST_PAGE: usize = 512;

impl Channel {
    /// Runs `work`, which the calling thread waits for.
    pub(super) fn blocking<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.core.check_mounted()?;
        self.block_on(work).map_err(|error| self.core.explain(error))
    }

    /// Creates an empty file and returns its id. Durable after the next sync.
    ///
    /// # Errors
    /// [`Error::Exists`], the name errors, [`Error::NoSpace`], [`Error::ReadOnly`].
    pub fn create(&self, name: impl AsRef<[u8]>) -> Result<InodeId> {
        self.blocking(namespace::create(&self.core, &self.shared.io, name.as_ref()))
    }

    /// Opens a file; see [`OpenFlags`].
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Exists`] with `EXCLUSIVE`, and those of [`create`](Self::create).
    pub fn open(&self, name: impl AsRef<[u8]>, flags: OpenFlags) -> Result<File> {
        self.blocking(namespace::open(&self.core, &self.shared.io, name.as_ref(), flags))
    }

    /// Closes a handle. If it is the last one of a deleted file, its space is given back before the call returns.
    /// Dropping the handle does the same later.
    ///
    /// # Errors
    /// Those of giving the space back; the handle is closed in any case.
    pub fn close(&self, file: File) -> Result<()> {
        self.blocking(namespace::close(&self.core, &self.shared.io, file))
    }

    /// Removes a name. The content of a file that is open stays until its last handle is closed.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::ReadOnly`].
    pub fn delete(&self, name: impl AsRef<[u8]>) -> Result<()> {
        self.blocking(namespace::delete(&self.core, &self.shared.io, name.as_ref()))
    }

    /// Renames a file, atomically; a file of the new name is replaced (deleted).
    ///
    /// # Errors
    /// [`Error::NotFound`], the name errors, [`Error::NoSpace`], [`Error::ReadOnly`].
    pub fn rename(&self, from: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> Result<()> {
        self.blocking(namespace::rename(&self.core, &self.shared.io, from.as_ref(), to.as_ref()))
    }

    /// Looks a file up by name.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn stat(&self, name: impl AsRef<[u8]>) -> Result<Stat> {
        self.blocking(namespace::stat(&self.core, &self.shared.io, name.as_ref()))
    }

    /// What is known of an open file.
    ///
    /// # Errors
    /// [`Error::Unmounted`].
    pub fn stat_file(&self, file: &File) -> Result<Stat> {
        self.core.check_mounted()?;
        Ok(file.inner().stat())
    }

    /// Names that start with `prefix`, in order. Names that come or go during the listing may or may not be seen.
    pub fn list(&self, prefix: impl AsRef<[u8]>) -> List<'_> {
        List {
            channel: self,
            prefix: prefix.as_ref().to_vec(),
            after: None,
            page: Vec::new().into_iter(),
            ended: false,
        }
    }

    /// Reads into `buf` from byte `offset`, through a copy. Returns the bytes read: fewer than asked at end of file.
    ///
    /// # Errors
    /// [`Error::DataChecksum`], [`Error::Io`], [`Error::Corrupt`].
    pub fn read(&self, file: &File, offset: u64, buf: &mut [u8]) -> Result<usize> {
        self.core.check_mounted()?;
        if self.read_short_copy(file, offset, buf) {
            return Ok(buf.len());
        }
        self.blocking(buffered::read_slice(&self.core, &self.shared.io, file, offset, buf))
    }

    /// Reads into `buf`, without a copy when offset and length are multiples of 4096. The buffer comes back in any case.
    pub fn read_buf(&self, file: &File, offset: u64, buf: DmaBuf) -> (Result<usize>, DmaBuf) {
        match self.core.check_mounted() {
            Ok(()) => {
                let len = buf.len();
                let buf = match self.read_short(file, offset, buf) {
                    Ok(buf) => return (Ok(len), buf),
                    Err(buf) => buf,
                };
                let read = buffered::read_bufs(&self.core, &self.shared.io, file, offset, buf.into());
                let (result, bufs) = self.block_on(read);
                (result.map_err(|error| self.core.explain(error)), only(bufs))
            }
            Err(error) => (Err(error), buf),
        }
    }

    /// Writes `data` at byte `offset`, through a copy. Whole or absent after a crash up to
    /// [`ATOMIC_WRITE_MAX`](crate::ATOMIC_WRITE_MAX) bytes; durable after the next sync.
    ///
    /// # Errors
    /// [`Error::NoSpace`], [`Error::FileTooLarge`], [`Error::ReadOnly`], [`Error::Io`]. The old content stays then.
    pub fn write(&self, file: &File, offset: u64, data: &[u8]) -> Result<()> {
        let at = write::At::Offset(offset);
        self.blocking(buffered::write_slice(&self.core, &self.shared.io, file, at, data)).map(|_| ())
    }

    /// Writes `buf`, without a copy when offset and length are multiples of 4096. The buffer comes back in any case.
    pub fn write_buf(&self, file: &File, offset: u64, buf: DmaBuf) -> (Result<()>, DmaBuf) {
        if let Err(error) = self.core.check_mounted() {
            return (Err(error), buf);
        }
        let at = write::At::Offset(offset);
        let write = buffered::write_bufs(&self.core, &self.shared.io, file, at, buf.into());
        let (result, bufs) = self.block_on(write);
        (result.map(|_| ()).map_err(|error| self.core.explain(error)), only(bufs))
    }

    /// Writes `data` at the end of the file; returns the byte offset that it went to.
    ///
    /// # Errors
    /// Those of [`write`](Self::write).
    pub fn append(&self, file: &File, data: &[u8]) -> Result<u64> {
        self.blocking(buffered::write_slice(&self.core, &self.shared.io, file, write::At::End, data))
    }

    /// Sets the size in bytes. What is added reads as zeroes and takes no space.
    ///
    /// # Errors
    /// [`Error::FileTooLarge`], [`Error::ReadOnly`], [`Error::NoSpace`], [`Error::Io`].
    pub fn truncate(&self, file: &File, size: u64) -> Result<()> {
        self.blocking(truncate::truncate(&self.core, &self.shared.io, file, size))
    }

    /// Makes the bytes, size and name of a file durable: they survive any crash once this returns.
    ///
    /// # Errors
    /// [`Error::Io`] and what made the mount read-only.
    pub fn sync_file(&self, file: &File) -> Result<()> {
        self.blocking(commit::sync_file(&self.core, &self.shared.io, file))
    }

    /// Makes every operation that has completed durable.
    ///
    /// # Errors
    /// [`Error::Io`] and what made the mount read-only.
    pub fn sync(&self) -> Result<()> {
        self.blocking(commit::sync(&self.core, &self.shared.io))
    }

    /// Space of the filesystem, exactly.
    ///
    /// # Errors
    /// [`Error::Unmounted`].
    pub fn statfs(&self) -> Result<StatFs> {
        self.core.statfs()
    }

    /// [`create`](Self::create) as a future.
    pub fn create_async(&self, name: impl AsRef<[u8]>) -> OpFuture<'_, Result<InodeId>> {
        self.start(Operation::Create { name: name.as_ref().to_vec() }, |(result, _)| match result? {
            Output::Created(id) => Ok(id),
            other => Err(unexpected(&other)),
        })
    }

    /// [`open`](Self::open) as a future.
    pub fn open_async(&self, name: impl AsRef<[u8]>, flags: OpenFlags) -> OpFuture<'_, Result<File>> {
        self.start(Operation::Open { name: name.as_ref().to_vec(), flags }, |(result, _)| match result? {
            Output::Opened(file) => Ok(file),
            other => Err(unexpected(&other)),
        })
    }

    /// [`close`](Self::close) as a future.
    pub fn close_async(&self, file: File) -> OpFuture<'_, Result<()>> {
        self.start(Operation::Close { file }, done)
    }

    /// [`delete`](Self::delete) as a future.
    pub fn delete_async(&self, name: impl AsRef<[u8]>) -> OpFuture<'_, Result<()>> {
        self.start(Operation::Delete { name: name.as_ref().to_vec() }, done)
    }

    /// [`rename`](Self::rename) as a future.
    pub fn rename_async(&self, from: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> OpFuture<'_, Result<()>> {
        self.start(Operation::Rename { from: from.as_ref().to_vec(), to: to.as_ref().to_vec() }, done)
    }

    /// [`stat`](Self::stat) as a future.
    pub fn stat_async(&self, name: impl AsRef<[u8]>) -> OpFuture<'_, Result<Stat>> {
        self.start(Operation::Stat { name: name.as_ref().to_vec() }, found)
    }

    /// [`stat_file`](Self::stat_file) as a future.
    pub fn stat_file_async(&self, file: &File) -> OpFuture<'_, Result<Stat>> {
        self.start(Operation::StatFile { file: file.clone() }, found)
    }

    /// [`statfs`](Self::statfs) as a future.
    pub fn statfs_async(&self) -> OpFuture<'_, Result<StatFs>> {
        self.start(Operation::StatFs, |(result, _)| match result? {
            Output::StatFs(statfs) => Ok(*statfs),
            other => Err(unexpected(&other)),
        })
    }

    /// One page of [`list`](Self::list) as a future: up to `max` names greater than `after`; empty at the end.
    pub fn list_async(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        max: usize,
    ) -> OpFuture<'_, Result<Vec<DirEntry>>> {
        let (prefix, after) = (prefix.to_vec(), after.map(<[u8]>::to_vec));
        self.start(Operation::List { prefix, after, max }, |(result, _)| match result? {
            Output::Entries(entries) => Ok(entries),
            other => Err(unexpected(&other)),
        })
    }

    /// [`read_buf`](Self::read_buf) as a future.
    pub fn read_async(&self, file: &File, offset: u64, buf: DmaBuf) -> OpFuture<'_, (Result<usize>, DmaBuf)> {
        self.start(Operation::Read { file: file.clone(), offset, buf }, |answer| {
            with_buffer(answer, |output| match output {
                Output::Bytes(n) => Ok(n),
                other => Err(unexpected(&other)),
            })
        })
    }

    /// [`write_buf`](Self::write_buf) as a future.
    pub fn write_async(&self, file: &File, offset: u64, buf: DmaBuf) -> OpFuture<'_, (Result<()>, DmaBuf)> {
        self.start(Operation::Write { file: file.clone(), offset, buf }, |answer| {
            with_buffer(answer, |_| Ok(()))
        })
    }

    /// [`append`](Self::append) of a buffer as a future.
    pub fn append_async(&self, file: &File, buf: DmaBuf) -> OpFuture<'_, (Result<u64>, DmaBuf)> {
        self.start(Operation::Append { file: file.clone(), buf }, |answer| {
            with_buffer(answer, |output| match output {
                Output::Offset(offset) => Ok(offset),
                other => Err(unexpected(&other)),
            })
        })
    }

    /// [`truncate`](Self::truncate) as a future.
    pub fn truncate_async(&self, file: &File, size: u64) -> OpFuture<'_, Result<()>> {
        self.start(Operation::Truncate { file: file.clone(), size }, done)
    }

    /// [`sync_file`](Self::sync_file) as a future.
    pub fn sync_file_async(&self, file: &File) -> OpFuture<'_, Result<()>> {
        self.start(Operation::SyncFile { file: file.clone() }, done)
    }

    /// [`sync`](Self::sync) as a future.
    pub fn sync_async(&self) -> OpFuture<'_, Result<()>> {
        self.start(Operation::Sync, done)
    }
}

pub(super) fn done((result, _): Answer) -> Result<()> {
    result.map(|_| ())
}

fn found((result, _): Answer) -> Result<Stat> {
    match result? {
        Output::Stat(stat) => Ok(*stat),
        other => Err(unexpected(&other)),
    }
}

fn with_buffer<T>((result, bufs): Answer, convert: impl FnOnce(Output) -> Result<T>) -> (Result<T>, DmaBuf) {
    (result.and_then(convert), only(bufs))
}

/// The buffer of an operation that has one.
fn only(bufs: Segments) -> DmaBuf {
    // Every operation returns what it was given: the device gives the parts of a buffer back, and they join again; `dispatch::into_bufs`
    // returns that of an operation that is refused.
    bufs.into_one().expect("an operation with a buffer returns it")
}

/// An answer of another kind than the operation has: `dispatch` gives none, so this is never seen.
pub(super) fn unexpected(output: &Output) -> Error {
    Error::corrupt(format!("internal: unexpected answer {output:?}"))
}

/// An iterator over names; made by [`Channel::list`].
#[derive(Debug)]
pub struct List<'c> {
    channel: &'c Channel,
    prefix: Vec<u8>,
    after: Option<Vec<u8>>,
    page: std::vec::IntoIter<DirEntry>,
    ended: bool,
}

impl Iterator for List<'_> {
    type Item = Result<DirEntry>;

    fn next(&mut self) -> Option<Result<DirEntry>> {
        loop {
            if let Some(entry) = self.page.next() {
                return Some(Ok(entry));
            }
            if self.ended {
                return None;
            }
            let channel = self.channel;
            let page = namespace::list(
                &channel.core,
                &channel.shared.io,
                &self.prefix,
                self.after.as_deref(),
                LIST_PAGE,
            );
            match channel.blocking(page) {
                Ok(entries) => {
                    self.ended = entries.len() < LIST_PAGE;
                    self.after = entries.last().map(|e| e.name.clone()).or(self.after.take());
                    self.page = entries.into_iter();
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
    }
}
