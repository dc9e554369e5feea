//! The short way of a direct read: one extent, aligned, its checksums at hand.
//!
//! Such a read needs no task: it takes the file view, holds the generation, sends one device request, and verifies on
//! completion. Whatever does not fit (several extents, holes, end of file, mappings or checksums that are not in
//! memory, unaligned edges) is refused here and goes the general way ([`crate::read`]). So is a read whose checksum does
//! not match: the general way reads again and reports.

use std::future::Future;
use std::sync::Arc;

use bdev_adapter::{DmaBuf, Request};

use super::engine::FAST_READ;
use super::holds::HoldSet;
use super::io::Io;
use super::operation::{Completion, Output};
use crate::core::Core;
use crate::file::FileInner;
use crate::pieces;
use crate::superblock::checksum32;
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock, Generation};

/// Blocks whose checksums fit in the state of a fast read.
const BLOCKS_MAX: usize = 8;

struct FastRead {
    file: Arc<FileInner>,
    offset: u64,
    tag: u64,
    hold: Generation,
    len: usize,
    sums: [u32; BLOCKS_MAX],
}

/// The fast reads of a channel.
pub(crate) struct FastReads {
    core: Arc<Core>,
    holds: HoldSet,
    slots: Vec<Option<FastRead>>,
    free: Vec<u32>,
    pub(super) done: Vec<Completion>,
}

impl FastReads {
    pub(super) fn new(core: Arc<Core>, holds: HoldSet) -> FastReads {
        FastReads { core, holds, slots: Vec::new(), free: Vec::new(), done: Vec::new() }
    }

    pub(super) fn active(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The device request of a read of `buf` at `offset`, or the buffer back when it must go the general way.
    pub(super) fn start(
        &mut self,
        file: &Arc<FileInner>,
        offset: u64,
        buf: DmaBuf,
        tag: u64,
    ) -> Result<Request, DmaBuf> {
        let len = buf.len();
        let blocks = len >> BLOCK_SHIFT;
        if (offset | len as u64) & (BLOCK_SIZE as u64 - 1) != 0 || blocks == 0 || blocks > BLOCKS_MAX {
            return Err(buf);
        }
        let hold = self.holds.acquire(self.core.open_generation());
        let mut sums = [0; BLOCKS_MAX];
        let Some(addr) = self.locate(file, offset, blocks, &mut sums) else {
            self.holds.release(hold);
            return Err(buf);
        };
        let read = FastRead { file: Arc::clone(file), offset, tag, hold, len, sums };
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = Some(read);
                index
            }
            None => {
                self.slots.push(Some(read));
                (self.slots.len() - 1) as u32
            }
        };
        self.core.stats.read_data(len as u64);
        Ok(Request::read(addr, buf, FAST_READ | u64::from(index)))
    }

    /// The device address of `blocks` blocks at `offset`, when they lie in one extent whose checksums are in memory.
    fn locate(&self, file: &FileInner, offset: u64, blocks: usize, sums: &mut [u32; BLOCKS_MAX]) -> Option<u64> {
        let guard = crate::extent_map::pin();
        let view = file.map.view(&guard);
        if offset + ((blocks as u64) << BLOCK_SHIFT) > view.size() {
            return None;
        }
        let at = FileBlock::containing(offset);
        let (addr, inline) = pieces::single(&view.lookup(at), at, blocks as u64)?;
        if self.core.options.verify_data {
            match inline {
                Some(sum) => sums[0] = sum,
                None if self.core.checksums.lookup_into(addr, &mut sums[..blocks]) => {}
                None => return None,
            }
        }
        Some(self.core.locate(addr))
    }

    /// Takes the device's answer. A read that has to be repeated the general way is returned as a task.
    pub(super) fn finish(
        &mut self,
        completion: bdev_adapter::Completion,
        io: &Io,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        let index = (completion.tag & !FAST_READ) as u32;
        let read = self.slots[index as usize].take()?;
        self.free.push(index);
        self.holds.release(read.hold);
        let buf = completion.bufs.into_one()?;
        if completion.result.is_ok() && self.verified(&read, &buf) {
            self.done.push(Completion { tag: read.tag, result: Ok(Output::Bytes(read.len)), buf: Some(buf) });
            return None;
        }
        let (core, io) = (Arc::clone(&self.core), io.clone());
        Some(async move {
            let (result, buf) = crate::read::read_buf(&core, &io, &read.file, read.offset, buf).await;
            io.results.lock().push(Completion { tag: read.tag, result: result.map(Output::Bytes), buf: Some(buf) });
        })
    }

    fn verified(&self, read: &FastRead, buf: &[u8]) -> bool {
        !self.core.options.verify_data
            || buf.chunks_exact(BLOCK_SIZE).zip(read.sums).all(|(block, sum)| checksum32(block) == sum)
    }
}
