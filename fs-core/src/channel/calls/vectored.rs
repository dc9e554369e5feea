//! Reads and writes of several buffers at once: one operation on a contiguous range of the file, scattered in memory.

use std::io::{IoSlice, IoSliceMut};

use bdev_adapter::DmaBuf;

use super::super::future::Answer;
use super::super::operation::{Operation, Output};
use super::super::{Channel, OpFuture};
use super::unexpected;
use crate::error::Result;
use crate::file::File;

impl Channel {
    /// Reads from byte `offset` into `bufs`, one behind the other, through a copy. All of it is seen in one state of the file.
    /// Returns the bytes read: fewer than asked at end of file.
    ///
    /// # Errors
    /// Those of [`read`](Self::read); that of [`buffer`](Self::buffer) when the lengths add up to more than there is memory.
    pub fn readv(&self, file: &File, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<usize> {
        if let [only] = bufs {
            return self.read(file, offset, only);
        }
        let whole = self.buffer(bufs.iter().fold(0, |sum, buf| buf.len().saturating_add(sum)))?;
        let (result, whole) = self.read_buf(file, offset, whole);
        let mut rest = &whole[..result?];
        let there = rest.len();
        for buf in bufs {
            let (front, back) = rest.split_at(buf.len().min(rest.len()));
            buf[..front.len()].copy_from_slice(front);
            rest = back;
        }
        Ok(there)
    }

    /// Reads from byte `offset` into `bufs`, one behind the other; without a copy when the offset and every length are multiples of
    /// 4096. All of it is seen in one state of the file. The buffers come back in any case, in their order.
    pub fn readv_bufs(&self, file: &File, offset: u64, bufs: Vec<DmaBuf>) -> (Result<usize>, Vec<DmaBuf>) {
        let operation = Operation::Readv { file: file.clone(), offset, bufs };
        let (result, bufs) = self.blocking_operation(operation);
        (result.and_then(bytes), bufs.into_vec())
    }

    /// Writes `bufs`, one behind the other, to byte `offset`, through a copy: one write, as atomic as [`write`](Self::write).
    ///
    /// # Errors
    /// Those of [`write`](Self::write); that of [`buffer`](Self::buffer) when the lengths add up to more than there is memory.
    pub fn writev(&self, file: &File, offset: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        if let [only] = bufs {
            return self.write(file, offset, only);
        }
        let mut whole = self.buffer(bufs.iter().fold(0, |sum, buf| buf.len().saturating_add(sum)))?;
        let mut at = 0;
        for buf in bufs {
            whole[at..at + buf.len()].copy_from_slice(buf);
            at += buf.len();
        }
        self.write_buf(file, offset, whole).0
    }

    /// Writes `bufs`, one behind the other, to byte `offset`: one write, as atomic as [`write`](Self::write); without a copy when the
    /// offset and every length are multiples of 4096. The buffers come back in any case, in their order.
    pub fn writev_bufs(&self, file: &File, offset: u64, bufs: Vec<DmaBuf>) -> (Result<()>, Vec<DmaBuf>) {
        let operation = Operation::Writev { file: file.clone(), offset, bufs };
        let (result, bufs) = self.blocking_operation(operation);
        (result.map(|_| ()), bufs.into_vec())
    }

    /// [`readv_bufs`](Self::readv_bufs) as a future.
    pub fn readv_async(
        &self,
        file: &File,
        offset: u64,
        bufs: Vec<DmaBuf>,
    ) -> OpFuture<'_, (Result<usize>, Vec<DmaBuf>)> {
        self.start(Operation::Readv { file: file.clone(), offset, bufs }, |(result, bufs)| {
            (result.and_then(bytes), bufs.into_vec())
        })
    }

    /// [`writev_bufs`](Self::writev_bufs) as a future.
    pub fn writev_async(
        &self,
        file: &File,
        offset: u64,
        bufs: Vec<DmaBuf>,
    ) -> OpFuture<'_, (Result<()>, Vec<DmaBuf>)> {
        self.start(Operation::Writev { file: file.clone(), offset, bufs }, |(result, bufs)| {
            (result.map(|_| ()), bufs.into_vec())
        })
    }

    /// Runs an operation that the calling thread waits for; its buffers come back in any case.
    fn blocking_operation(&self, operation: Operation) -> Answer {
        match self.core.check_mounted() {
            Ok(()) => {
                let (result, bufs) =
                    self.block_on(crate::dispatch::run(&self.core, &self.shared.io, operation));
                (result.map_err(|error| self.core.explain(error)), bufs)
            }
            Err(error) => (Err(error), crate::dispatch::into_bufs(operation)),
        }
    }
}

fn bytes(output: Output) -> Result<usize> {
    match output {
        Output::Bytes(there) => Ok(there),
        other => Err(unexpected(&other)),
    }
}
