//! The short way of a direct read: one extent, aligned, its checksums at hand.
//!
//! Such a read needs no task: it takes the file view, holds the generation, sends one device request, and verifies on
//! completion. Reads that were submitted between two polls are looked up together, so that their cache misses overlap. Whatever does not fit (several extents, holes, end of file, mappings or checksums that are not in
//! memory, unaligned edges) is refused here and goes the general way ([`crate::read`]). So is a read whose checksum does
//! not match: the general way reads again and reports.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;

use bdev_adapter::{DmaBuf, Request};
use smallvec::SmallVec;

use super::engine::FAST_READ;
use super::holds::HoldSet;
use super::io::Io;
use super::operation::{Completion, Operation, Output};
use crate::core::Core;
use crate::extent_map::{Entry, View};
use crate::file::File;
use crate::pieces;
use crate::superblock::checksum32;
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock, Generation};

/// Blocks whose checksums fit in the state of a fast read.
const BLOCKS_MAX: usize = 8;

/// Reads that are looked up together: as many as the extent map descends for at a time.
const BATCH: usize = 16;

/// A read that was submitted and waits for the next poll.
struct Queued {
    file: File,
    offset: u64,
    buf: DmaBuf,
    tag: u64,
}

/// A read at the device.
struct FastRead {
    file: File,
    offset: u64,
    tag: u64,
    hold: Generation,
    len: usize,
    sums: [u32; BLOCKS_MAX],
}

/// The byte address on the device of a fast read, and the checksums of its blocks.
type Located = (u64, [u32; BLOCKS_MAX]);

/// Where a read goes on.
pub(super) enum Started {
    /// To the device.
    Fast(Request),
    /// The general way.
    General(Operation, u64),
}

/// The fast reads of a channel.
pub(crate) struct FastReads {
    core: Arc<Core>,
    holds: HoldSet,
    queue: VecDeque<Queued>,
    slots: Vec<Option<FastRead>>,
    free: Vec<u32>,
    pub(super) done: Vec<Completion>,
}

impl FastReads {
    pub(super) fn new(core: Arc<Core>, holds: HoldSet) -> FastReads {
        FastReads {
            core,
            holds,
            queue: VecDeque::new(),
            slots: Vec::new(),
            free: Vec::new(),
            done: Vec::new(),
        }
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Reads that are not finished.
    pub(super) fn active(&self) -> usize {
        self.queue.len() + self.slots.len() - self.free.len()
    }

    /// Accepts a read; it starts with the next poll, together with all others that were accepted before it.
    pub(super) fn push(&mut self, file: File, offset: u64, buf: DmaBuf, tag: u64) {
        self.queue.push_back(Queued { file, offset, buf, tag });
    }

    /// Starts up to [`BATCH`] queued reads, whose lookups overlap. False when none was queued.
    pub(super) fn start_some(&mut self, mut start: impl FnMut(Started)) -> bool {
        let count = self.queue.len().min(BATCH);
        if count == 0 {
            return false;
        }
        let hold = self.holds.acquire(self.core.open_generation());
        let batch: SmallVec<[Queued; BATCH]> = self.queue.drain(..count).collect();
        let located = self.look_up(&batch);
        for (read, located) in batch.into_iter().zip(located) {
            start(match located {
                Some((addr, sums)) => self.send_fast(read, addr, sums),
                None => {
                    let Queued { file, offset, buf, tag } = read;
                    Started::General(Operation::Read { file, offset, buf }, tag)
                }
            });
        }
        self.holds.release(hold);
        true
    }

    /// Where the reads of `batch` lie; nothing for those that must go the general way.
    fn look_up(&self, batch: &[Queued]) -> SmallVec<[Option<Located>; BATCH]> {
        let guard = crate::extent_map::pin();
        let mut entries = [Entry::EMPTY; BATCH];
        let queries: SmallVec<[(View<'_>, FileBlock); BATCH]> = batch
            .iter()
            .map(|read| (read.file.inner().map.view(&guard), FileBlock::containing(read.offset)))
            .collect();
        View::lookup_across(&queries, &mut entries);
        let found = batch.iter().zip(&queries).zip(&entries);
        found
            .map(|((read, (view, _)), entry)| self.locate(view.size(), entry, read.offset, read.buf.len()))
            .collect()
    }

    /// The device address of `len` bytes at `offset` and their checksums, when the read qualifies.
    fn locate(&self, size: u64, entry: &Entry, offset: u64, len: usize) -> Option<Located> {
        let blocks = len >> BLOCK_SHIFT;
        let aligned = (offset | len as u64) & (BLOCK_SIZE as u64 - 1) == 0;
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= size);
        if !aligned || blocks == 0 || blocks > BLOCKS_MAX || !inside {
            return None;
        }
        let (addr, inline) = pieces::single(entry, FileBlock::containing(offset), blocks as u64)?;
        let mut sums = [0; BLOCKS_MAX];
        if self.core.options.verify_data {
            match inline {
                Some(sum) => sums[0] = sum,
                None if self.core.checksums.lookup_into(addr, &mut sums[..blocks]) => {}
                None => return None,
            }
        }
        Some((self.core.locate(addr), sums))
    }

    fn send_fast(&mut self, read: Queued, addr: u64, sums: [u32; BLOCKS_MAX]) -> Started {
        let Queued { file, offset, buf, tag } = read;
        // The batch holds the generation while this takes a hold of its own.
        let hold = self.holds.acquire(self.core.open_generation());
        let read = FastRead { file, offset, tag, hold, len: buf.len(), sums };
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
        self.core.stats.read_data(buf.len() as u64);
        Started::Fast(Request::read(addr, buf, FAST_READ | u64::from(index)))
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
            let (result, buf) = crate::read::read_buf(&core, &io, read.file.inner(), read.offset, buf).await;
            io.results.lock().push(Completion {
                tag: read.tag,
                result: result.map(Output::Bytes),
                buf: Some(buf),
            });
        })
    }

    fn verified(&self, read: &FastRead, buf: &[u8]) -> bool {
        !self.core.options.verify_data
            || buf.chunks_exact(BLOCK_SIZE).zip(read.sums).all(|(block, sum)| checksum32(block) == sum)
    }
}
