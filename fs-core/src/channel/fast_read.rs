//! The short way of a direct read: one extent, aligned, its checksums at hand.
//!
//! Such a read needs no task: it takes the file view, holds the generation, sends one device request, and verifies on
//! completion. Reads that were submitted between two polls are looked up together, so that their cache misses overlap.
//! Whatever does not fit (several extents, holes, end of file, mappings or checksums that are not in memory, unaligned edges)
//! is refused here and goes the general way ([`crate::read`]). So is a read whose checksum does not match: the general way
//! reads again and reports.
//!
//! The steps of a read:
//!
//! 1. [`Accepted::push`]: the channel's thread notes it, without a lock;
//! 2. [`FastReads::accept`]: a poll hands over all that were noted;
//! 3. [`FastReads::start`]: hold, look up ([`FastReads::look_up`]), and send, in batches of [`BATCH`];
//! 4. [`FastReads::finish`]: verify while the bytes are hot, and answer.
//!
//! # Invariants
//!
//! - The hold on the open generation is published before the view is taken, and withdrawn when the device has answered.
//! - A file has a handle in [`FastReads::files`] as long as one of its reads is at the device: one reference count for all
//!   reads that were accepted in a row, as threads share it.
//! - Nothing that other threads read or write is written for each read: holds and counters are in lines of the channel.
//!
//! What it does not do: several requests for a read, loading, waiting.

use std::future::Future;
use std::sync::Arc;

use bdev_adapter::{DmaBuf, QueuePair, Request, Segments};

use super::engine::FAST_READ;
use super::holds::HoldSet;
use super::io::Io;
use super::operation::{Completion, Operation, Output};
use crate::buffered;
use crate::core::Core;
use crate::extent_map::{Entry, View, prefetch_read};
use crate::file::File;
use crate::pieces;
use crate::stats::ReadBytes;
use crate::superblock::checksum32;
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, BlockAddr, FileBlock, Generation};

/// Blocks whose checksums fit in the state of a fast read.
pub(super) const BLOCKS_MAX: usize = 8;

/// Reads that are looked up together: as many as the extent map descends for at a time.
const BATCH: usize = 32;

/// The place in [`FastReads::files`] of a read whose caller waits for it and keeps the file.
const NO_FILE: u32 = u32::MAX;

/// Reads that the channel's thread has accepted and not handed over yet. They belong to that thread alone.
#[derive(Default)]
pub(super) struct Accepted {
    files: Vec<File>,
    reads: Vec<Queued>,
}

/// A read that was accepted and waits for the next poll.
struct Queued {
    offset: u64,
    tag: u64,
    /// One buffer, until it is sent.
    bufs: Segments,
    /// Which of the files that were accepted with it.
    file: u32,
}

impl Queued {
    #[inline(always)]
    fn len(&self) -> usize {
        self.bufs.len() as usize
    }
}

impl Accepted {
    pub(super) fn is_empty(&self) -> bool {
        self.reads.is_empty()
    }

    #[inline]
    pub(super) fn push(&mut self, file: &File, offset: u64, buf: DmaBuf, tag: u64) {
        if !self.files.last().is_some_and(|last| last.is_clone_of(file)) {
            self.files.push(file.clone());
        }
        let file = self.files.len() as u32 - 1;
        self.reads.push(Queued { offset, tag, bufs: buf.into(), file });
    }

    /// Gives them up, each with its tag.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = (u64, Segments)> {
        self.files.clear();
        self.reads.drain(..).map(|read| (read.tag, read.bufs))
    }
}

/// A read at the device. Slots are used again and again; a free one has whatever was there.
struct Slot {
    tag: u64,
    offset: u64,
    hold: Generation,
    /// Place in [`FastReads::files`], or [`NO_FILE`].
    file: u32,
    in_flight: bool,
    sums: [u32; BLOCKS_MAX],
}

/// A file of reads at the device.
struct FileSlot {
    file: Option<File>,
    reads: u32,
}

/// How a read that its caller waits for came back.
pub(super) enum Waited {
    /// Read and verified.
    Done(DmaBuf),
    /// It has to be read the general way, again.
    General(DmaBuf),
}

/// Whether a read of what `view` shows may go past the page cache: nothing there is newer than the device, and the view, which
/// was taken before that was looked at, is the current one. (A file that was never buffered needs one look.)
#[inline]
fn bypasses_cache(file: &File, view: &View<'_>) -> bool {
    let inner = file.inner();
    let cached = inner.pages_if_any().is_some();
    !file.is_buffered() && (!cached || (!inner.has_cached_writes() && inner.map.is_current(view)))
}

/// The fast reads of a channel.
pub(crate) struct FastReads {
    core: Arc<Core>,
    holds: HoldSet,
    bytes: ReadBytes,
    incoming: Accepted,
    slots: Vec<Slot>,
    free: Vec<u32>,
    files: Vec<FileSlot>,
    free_files: Vec<u32>,
    /// Withdrawn with the next [`FastReads::settle`]: so many holds on this generation.
    ended: (Generation, u32),
    /// Answers for [`Channel::poll`](super::Channel::poll).
    pub(super) done: Vec<Completion>,
    /// The answer to the read of a blocking call, of which there is at most one.
    pub(super) waited: Option<Waited>,
    // Scratch, kept for its capacity.
    adopted: Vec<u32>,
}

impl FastReads {
    pub(super) fn new(core: Arc<Core>, holds: HoldSet) -> FastReads {
        FastReads {
            bytes: core.stats.read_bytes(),
            core,
            holds,
            incoming: Accepted::default(),
            slots: Vec::new(),
            free: Vec::new(),
            files: Vec::new(),
            free_files: Vec::new(),
            ended: (Generation(0), 0),
            done: Vec::new(),
            waited: None,
            adopted: Vec::new(),
        }
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Reads that are not finished.
    pub(super) fn active(&self) -> usize {
        self.incoming.reads.len() + self.slots.len() - self.free.len()
    }

    /// Step 2. All that was accepted before has been started.
    #[inline]
    pub(super) fn accept(&mut self, accepted: &mut Accepted) {
        debug_assert!(self.incoming.is_empty(), "reads were accepted twice without a poll");
        std::mem::swap(&mut self.incoming, accepted);
    }

    /// Step 3 for all reads that were handed over. What must go the general way is added to `general`, with its tag. False when
    /// there was none.
    pub(super) fn start(
        &mut self,
        queue_pair: &mut dyn QueuePair,
        general: &mut Vec<(Operation, u64)>,
    ) -> bool {
        if self.incoming.is_empty() {
            return false;
        }
        let mut incoming = std::mem::take(&mut self.incoming);
        let mut adopted = std::mem::take(&mut self.adopted);
        adopted.extend(incoming.files.iter().map(|_| self.take_file()));
        for reads in incoming.reads.chunks_mut(BATCH) {
            self.start_batch(queue_pair, &incoming.files, &adopted, reads, general);
        }
        incoming.reads.clear();
        for (file, slot) in incoming.files.drain(..).zip(adopted.drain(..)) {
            match self.files[slot as usize].reads {
                0 => self.free_files.push(slot),
                _ => self.files[slot as usize].file = Some(file),
            }
        }
        (self.incoming, self.adopted) = (incoming, adopted);
        true
    }

    /// Step 3 for at most [`BATCH`] reads of `files`, which have the slots `adopted`.
    fn start_batch(
        &mut self,
        queue_pair: &mut dyn QueuePair,
        files: &[File],
        adopted: &[u32],
        reads: &mut [Queued],
        general: &mut Vec<(Operation, u64)>,
    ) {
        // Published before the views are taken.
        let hold = self.holds.acquire(self.core.open_generation(), reads.len() as u32);
        let mut bytes = 0;
        let mut send = |this: &mut FastReads, place: Option<Place>, read: &mut Queued| {
            let slot = adopted[read.file as usize];
            let new = Slot::new(read.tag, read.offset, hold, slot);
            if let Some((addr, index)) = place.and_then(|place| this.take_slot(place, read.len(), new)) {
                bytes += read.len() as u64;
                this.files[slot as usize].reads += 1;
                let bufs = std::mem::take(&mut read.bufs);
                queue_pair.submit(Request::read(addr, bufs, FAST_READ | u64::from(index)));
            } else if let Some(buf) = read.bufs.take_one() {
                this.holds.release(hold, 1);
                let (file, offset) = (files[read.file as usize].clone(), read.offset);
                general.push((Operation::Read { file, offset, buf }, read.tag));
            }
        };
        if let [read] = reads {
            let place = self.look_up_one(&files[read.file as usize], read.offset, read.len());
            send(self, place, read);
        } else {
            let places = self.look_up(files, reads);
            places.into_iter().zip(reads).for_each(|(place, read)| send(self, place, read));
        }
        self.bytes.add(bytes);
    }

    /// Where a read lies; nothing if it must go the general way.
    #[inline]
    fn look_up_one(&self, file: &File, offset: u64, len: usize) -> Option<Place> {
        debug_assert!(self.holds.holds_any(), "a view is taken that nothing holds");
        let guard = crate::extent_map::pin();
        let view = file.inner().map.view(&guard);
        let fits = bypasses_cache(file, &view) && is_short_and_whole(offset, len, view.size());
        let at = FileBlock::containing(offset);
        if fits { place_of(&view.lookup(at), at, len) } else { None }
    }

    /// Where the reads of `batch` lie, at most [`BATCH`]; nothing for those that must go the general way.
    fn look_up(&self, files: &[File], batch: &[Queued]) -> [Option<Place>; BATCH] {
        let mut places = [None; BATCH];
        let Some(first) = batch.first() else { return places };
        debug_assert!(self.holds.holds_any(), "a view is taken that nothing holds");
        let guard = crate::extent_map::pin();
        let view_of = |file: u32| {
            let file = &files[file as usize];
            let view = file.inner().map.view(&guard);
            (view, bypasses_cache(file, &view))
        };
        let (mut file, (mut view, mut direct)) = (first.file, view_of(first.file));
        let mut queries = [(view, FileBlock(0)); BATCH];
        let mut fits = 0_u32;
        for (index, (read, query)) in batch.iter().zip(&mut queries).enumerate() {
            if read.file != file {
                file = read.file;
                (view, direct) = view_of(file);
            }
            *query = (view, FileBlock::containing(read.offset));
            fits |= u32::from(direct && is_short_and_whole(read.offset, read.len(), view.size())) << index;
        }
        let mut entries = [Entry::EMPTY; BATCH];
        View::lookup_across(&queries[..batch.len()], &mut entries);
        let mut elsewhere = 0;
        for (index, (read, place)) in batch.iter().zip(&mut places).enumerate() {
            if fits & 1 << index != 0 {
                *place = place_of(&entries[index], FileBlock::containing(read.offset), read.len());
                elsewhere += u32::from(place.is_some_and(|place| place.sum.is_none()));
            }
        }
        if elsewhere > 0 && self.core.options.verify_data {
            self.prefetch_sums(&places);
        }
        places
    }

    /// Asks the processor for the checksums that are not in the extents themselves.
    #[cold]
    fn prefetch_sums(&self, places: &[Option<Place>]) {
        let elsewhere = || places.iter().flatten().filter(|place| place.sum.is_none());
        elsewhere().for_each(|place| self.core.checksums.prefetch(place.addr));
        elsewhere().for_each(|place| self.core.checksums.prefetch_sum(place.addr));
    }

    /// Starts a read whose caller waits for it, and keeps `file` meanwhile. The answer comes in `waited`; the buffer comes back at
    /// once if the read must go the general way.
    pub(super) fn start_waited(
        &mut self,
        queue_pair: &mut dyn QueuePair,
        file: &File,
        offset: u64,
        buf: DmaBuf,
    ) -> Result<(), DmaBuf> {
        let hold = self.holds.acquire(self.core.open_generation(), 1);
        let place = self.look_up_one(file, offset, buf.len());
        let new = Slot::new(0, offset, hold, NO_FILE);
        let started = place.and_then(|place| self.take_slot(place, buf.len(), new));
        let Some((addr, index)) = started else {
            self.holds.release(hold, 1);
            return Err(buf);
        };
        self.bytes.add(buf.len() as u64);
        queue_pair.submit(Request::read(addr, buf, FAST_READ | u64::from(index)));
        Ok(())
    }

    /// A slot for `read` of `len` bytes at `place` with the checksums of its blocks, and the byte address on the device. Nothing
    /// if a checksum is not at hand.
    #[inline]
    fn take_slot(&mut self, place: Place, len: usize, read: Slot) -> Option<(u64, u32)> {
        let index = match self.free.last() {
            Some(index) => *index,
            None => {
                self.slots.push(Slot::EMPTY);
                let index = (self.slots.len() - 1) as u32;
                self.free.push(index);
                index
            }
        };
        let slot = &mut self.slots[index as usize];
        if let Some(sum) = place.sum {
            slot.sums[0] = sum;
        } else if self.core.options.verify_data {
            let sums = slot.sums.get_mut(..len >> BLOCK_SHIFT)?;
            if !self.core.checksums.lookup_into(place.addr, sums) {
                return None;
            }
        }
        self.free.pop();
        (slot.tag, slot.offset) = (read.tag, read.offset);
        (slot.hold, slot.file, slot.in_flight) = (read.hold, read.file, true);
        Some((self.core.locate(place.addr), index))
    }

    fn take_file(&mut self) -> u32 {
        self.free_files.pop().unwrap_or_else(|| {
            self.files.push(FileSlot { file: None, reads: 0 });
            (self.files.len() - 1) as u32
        })
    }

    /// Asks the processor for the bytes that will be verified next: the device has put them somewhere near, but not that near.
    #[inline]
    pub(super) fn prefetch(&self, next: &bdev_adapter::Completion) {
        if let Segments::One(buf) = &next.bufs
            && buf.len() == BLOCK_SIZE
            && self.core.options.verify_data
        {
            buf.chunks(64).for_each(|line| prefetch_read(&line[0]));
        }
    }

    /// Step 4: takes the device's answer. A read that has to be repeated the general way is returned as a task. The hold ends
    /// with the next [`settle`](Self::settle).
    #[inline]
    pub(super) fn finish(
        &mut self,
        completion: &mut bdev_adapter::Completion,
        io: &Io,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        let index = (completion.tag & !FAST_READ) as u32;
        // A device that answers twice breaks its contract; the second answer is to nothing.
        let slot = self.slots.get_mut(index as usize).filter(|slot| slot.in_flight)?;
        slot.in_flight = false;
        let (tag, offset, hold, file) = (slot.tag, slot.offset, slot.hold, slot.file);
        self.free.push(index);
        let Segments::One(buf) = &completion.bufs else { return None };
        let len = buf.len();
        let good = completion.result.is_ok()
            && (!self.core.options.verify_data || verified(buf, &self.slots[index as usize].sums));
        self.end_hold(hold);
        if good && file != NO_FILE {
            push_read(&mut self.done, tag, len, std::mem::take(&mut completion.bufs));
            self.end_file(file);
            return None;
        }
        let buf = completion.bufs.take_one()?;
        if file == NO_FILE {
            self.waited = Some(if good { Waited::Done(buf) } else { Waited::General(buf) });
            return None;
        }
        let again = self.files[file as usize].file.clone();
        self.end_file(file);
        let (core, io, file) = (Arc::clone(&self.core), io.clone(), again?);
        Some(async move {
            let (result, bufs) = buffered::read_bufs(&core, &io, &file, offset, buf.into()).await;
            io.answer(Completion { tag, result: result.map(Output::Bytes), bufs });
        })
    }

    /// One read of the file in `slot` is over.
    #[inline]
    fn end_file(&mut self, slot: u32) {
        let file = &mut self.files[slot as usize];
        file.reads -= 1;
        if file.reads == 0 {
            file.file = None;
            self.free_files.push(slot);
        }
    }

    #[inline]
    fn end_hold(&mut self, generation: Generation) {
        if self.ended.0 != generation {
            self.settle();
            self.ended.0 = generation;
        }
        self.ended.1 += 1;
    }

    /// Withdraws the holds of the reads that were finished.
    #[inline]
    pub(super) fn settle(&mut self) {
        if self.ended.1 > 0 {
            self.holds.release(self.ended.0, std::mem::take(&mut self.ended.1));
        }
    }
}

/// Where a read lies.
#[derive(Clone, Copy)]
struct Place {
    addr: BlockAddr,
    /// The checksum of a read of one block, if it is in the extent.
    sum: Option<u32>,
}

impl Slot {
    const EMPTY: Slot = Slot {
        tag: 0,
        offset: 0,
        hold: Generation(0),
        file: NO_FILE,
        in_flight: false,
        sums: [0; BLOCKS_MAX],
    };

    #[inline(always)]
    fn new(tag: u64, offset: u64, hold: Generation, file: u32) -> Slot {
        Slot { tag, offset, hold, file, ..Slot::EMPTY }
    }
}

/// Where a read of `len` bytes from `at` on lies, if `entry` has all of it.
#[inline(always)]
fn place_of(entry: &Entry, at: FileBlock, len: usize) -> Option<Place> {
    pieces::single(entry, at, (len >> BLOCK_SHIFT) as u64).map(|(addr, sum)| Place { addr, sum })
}

/// Whether a read is of whole blocks, few enough, in a file of `size` bytes.
#[inline(always)]
fn is_short_and_whole(offset: u64, len: usize, size: u64) -> bool {
    let len = len as u64;
    let whole = (offset | len) & (BLOCK_SIZE as u64 - 1) == 0;
    let inside = offset.checked_add(len).is_some_and(|end| end <= size);
    whole && inside && (1..=BLOCKS_MAX as u64).contains(&(len >> BLOCK_SHIFT))
}

#[inline(always)]
fn verified(buf: &[u8], sums: &[u32]) -> bool {
    buf.chunks_exact(BLOCK_SIZE).zip(sums).all(|(block, sum)| checksum32(block) == *sum)
}

/// `done.push(..)` of the answer to a read of `len` bytes, made in its place. An answer that is made elsewhere, word by word, and copied
/// in wide registers at once waits for its words to leave the store buffer, which takes longer than all the rest.
#[inline(always)]
fn push_read(done: &mut Vec<Completion>, tag: u64, len: usize, bufs: Segments) {
    done.reserve(1);
    let count = done.len();
    let place = done.spare_capacity_mut()[0].as_mut_ptr();
    // SAFETY: `place` is valid for writes of a `Completion`, and all of its fields are written before it counts as one.
    unsafe {
        (&raw mut (*place).tag).write(tag);
        (&raw mut (*place).result).write(Ok(Output::Bytes(len)));
        (&raw mut (*place).bufs).write(bufs);
        done.set_len(count + 1);
    }
}
