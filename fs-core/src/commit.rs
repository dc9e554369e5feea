//! Commit: how the open generation becomes durable.
//!
//! 1. [`freeze`], one transaction: store the inodes that changed ([`store_inodes`]) and make room for the region records
//!    ([`prepare_space`]); then, with nothing that could stop any more, store the region records ([`store_space`]), seal the
//!    trees (checksums bottom-up), note roots and counts in a superblock, and open the next generation;
//! 2. [`write_nodes`]: write the sealed nodes, adjacent ones together;
//! 3. flush: nodes, and all file data that was written before, are durable. If the device was reset since any of that was
//!    written, steps 2 and 3 are done again, after what is in the device was looked at ([`recheck`]);
//! 4. [`write_superblock`] with FUA, near both ends of the device: the generation is durable;
//! 5. [`finish`]: nodes may be evicted, freed blocks that no reader holds may be reused, waiters go on.
//!
//! A sync first writes dirty pages back ([`crate::writeback`]); a commit alone does not.
//!
//! Operations go on in the next generation from the end of step 1. One commit runs at a time; a sync that comes while one runs
//! joins the next, together with all others that wait ([`reach`]).
//!
//! The intent log will make a sync of one file cheaper than a commit; its place is [`sync_file`].

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bdev_adapter::{Hints, IoErrorKind, Request};
use zerocopy::IntoBytes;

use crate::alloc::Need;
use crate::channel::io::{Io, IoHandle};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::{FILE_BLOCKS_MAX, File, FileInner};
use crate::recheck;
use crate::records::orphans::{self, Work};
use crate::records::{TreeKind, inodes, space};
use crate::superblock::{OnDisk, slot_byte, slots_of};
use crate::sync::Mutex;
use crate::tree::Node;
use crate::txn::{Stop, Txn, transact_in_commit};
use crate::types::{BLOCK_SIZE, BlockAddr, FileBlock, Generation};
use crate::writeback;

/// Largest write of adjacent nodes, in blocks.
const NODES_PER_WRITE: usize = 64;
/// Longest wait in a transaction that lacks space for reads that hold what was freed.
const READERS_WAIT: Duration = Duration::from_secs(1);
/// Resets of the device that one commit may see before it gives up.
const RESETS_MAX: u32 = 16;
/// Node writes in flight.
const WRITES_IN_FLIGHT: usize = 32;

/// Bitmaps of regions kept in memory (about 2 KiB each).
const REGIONS_IN_MEMORY: usize = 1 << 15;

/// Who commits, who waits.
#[derive(Default)]
pub(crate) struct Gate(Mutex<GateState>);

#[derive(Default)]
struct GateState {
    running: bool,
    durable: Generation,
    waiting: Vec<Waker>,
}

impl Gate {
    pub(crate) fn new(durable: Generation) -> Gate {
        Gate(Mutex::new(GateState { durable, ..GateState::default() }))
    }

    pub(crate) fn durable(&self) -> Generation {
        self.0.lock().durable
    }

    fn wake_all(&self, change: impl FnOnce(&mut GateState)) {
        let waiting = {
            let mut state = self.0.lock();
            change(&mut state);
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// Makes everything that has completed durable.
pub(crate) async fn sync(core: &Arc<Core>, io: &Io) -> Result<()> {
    core.check_failed()?;
    if core.is_read_only() {
        return Ok(());
    }
    let written = writeback::all(core, io).await;
    wait_for_sizes(core, None).await;
    let target = core.meta.lock().last_changed();
    reach(core, io, target, Core::check_not_sealed).await?;
    written
}

/// Waits until the size on disk of files is not held back by writes that were under way when this was called: what was
/// finished lies beyond it, and is to become durable.
async fn wait_for_sizes(core: &Core, only: Option<&Arc<FileInner>>) {
    let lagging: Vec<Arc<FileInner>> = {
        let meta = core.meta.lock();
        let wanted = meta.dirty.iter().filter(|file| only.is_none_or(|only| only.id == file.id));
        let wanted = wanted.filter(|file| file.dirty.load(Ordering::Relaxed));
        wanted.filter(|file| file.disk_size().1).cloned().collect()
    };
    for file in lagging {
        file.ordered.wait(0..u64::MAX).await;
    }
}

/// The last sync of an unmount: all others that would begin now are refused.
pub(crate) async fn sync_last(core: &Arc<Core>, io: &Io) -> Result<()> {
    core.check_failed()?;
    let target = core.meta.lock().last_changed();
    reach(core, io, target, |_| Ok(())).await
}

/// Makes a file durable. As yet by a whole commit; the intent log goes here.
pub(crate) async fn sync_file(core: &Arc<Core>, io: &Io, file: &File) -> Result<()> {
    sync_range(core, io, file, 0, u64::MAX).await
}

/// Makes `len` bytes at `offset` of a file durable, with its size and name.
pub(crate) async fn sync_range(core: &Arc<Core>, io: &Io, file: &File, offset: u64, len: u64) -> Result<()> {
    core.check_failed()?;
    if core.is_read_only() {
        return Ok(());
    }
    let inner = file.inner();
    let first = FileBlock::containing(offset);
    let end = FileBlock::at_or_after(offset.saturating_add(len)).0.min(FILE_BLOCKS_MAX);
    let written = writeback::sync(core, io, inner, first.0..end).await;
    wait_for_sizes(core, Some(inner)).await;
    let target = core.meta.lock().last_changed();
    reach(core, io, target, Core::check_not_sealed).await?;
    written
}

/// Makes room for a transaction: waits for the commit that is on its way, if there is one, else commits the open generation,
/// whatever is in it. Says whether it was the open one.
///
/// What the one on its way frees may be enough; and committing right behind it what little came meanwhile would copy the same
/// nodes again for it.
///
/// Boxed, since a commit is itself made of transactions.
pub(crate) fn make_room<'a>(
    core: &'a Arc<Core>,
    io: &'a Io,
) -> Pin<Box<dyn Future<Output = Result<bool>> + Send + 'a>> {
    let open = core.meta.lock().generation;
    let frozen = Generation(open.0 - 1);
    let is_open = core.gate.durable() >= frozen;
    let target = if is_open { open } else { frozen };
    Box::pin(async move {
        reach(core, io, target, Core::check_not_sealed).await?;
        wait_for_readers(core, io, target).await?;
        Ok(is_open)
    })
}

/// Waits, if space is scarce, until the reads have ended that keep the blocks from reuse which `generation` and earlier ones
/// freed: a reader that is slow for a moment must not turn into want of space for writers.
///
/// It waits by round trips to the device, so that readers need not look whether anybody waits for them.
async fn wait_for_readers(core: &Arc<Core>, io: &Io, generation: Generation) -> Result<()> {
    let began = Instant::now();
    let mut driven = began;
    loop {
        core.release_freed()?;
        let counts = core.meta.lock().alloc.counts();
        let held = core.holds.oldest().is_some_and(|oldest| oldest <= generation);
        if !held || counts.available_now >= counts.pending || began.elapsed() > READERS_WAIT {
            return Ok(());
        }
        if driven.elapsed() > Duration::from_millis(1) {
            driven = Instant::now();
            core.drive_abandoned();
        }
        io.read(slot_byte(0, core.total_blocks), BLOCK_SIZE, "a superblock").await?;
    }
}

/// Returns when `target` is durable, by waiting for the commit that runs or by running one while `check` allows it.
async fn reach(core: &Arc<Core>, io: &Io, target: Generation, check: fn(&Core) -> Result<()>) -> Result<()> {
    loop {
        let mine = poll_fn(|cx| {
            let mut state = core.gate.0.lock();
            if state.durable >= target {
                return Poll::Ready(Ok::<_, Error>(false));
            }
            if !state.running {
                check(core)?;
                state.running = true;
                return Poll::Ready(Ok(true));
            }
            state.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await?;
        if !mine {
            return Ok(());
        }
        let turn = Turn { core, done: false };
        turn.run(io).await?;
    }
}

/// The right to commit. If it is lost half way, the mount fails: what was frozen cannot be thawed.
struct Turn<'a> {
    core: &'a Arc<Core>,
    done: bool,
}

impl Turn<'_> {
    async fn run(mut self, io: &Io) -> Result<()> {
        let result = match self.core.check_failed() {
            Ok(()) => commit(self.core, io).await,
            Err(error) => Err(error),
        };
        self.done = true;
        if let Err(error) = &result {
            self.core.fail(error.clone());
        }
        result
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.core.fail(Error::corrupt("a commit was abandoned"));
        }
        self.core.gate.wake_all(|state| state.running = false);
    }
}

/// What step 1 hands to the others.
struct Frozen {
    generation: Generation,
    nodes: Vec<(BlockAddr, Arc<Node>)>,
    superblock: OnDisk,
    /// The earliest device epoch in which its file data was written.
    oldest_epoch: u64,
}

async fn commit(core: &Arc<Core>, io: &Io) -> Result<()> {
    let frozen = transact_in_commit(core, io, freeze).await?;
    make_durable(core, io, &frozen).await?;
    write_superblock(core, io, &frozen).await?;
    finish(core, frozen.generation)
}

/// Step 1.
fn freeze(t: &mut Txn<'_>) -> Result<Frozen, Stop> {
    store_inodes(t)?;
    prepare_space(t)?;
    t.begin_unstoppable();
    let free_blocks = store_space(t)?;
    let mut nodes = Vec::new();
    let mut superblock = t.core.superblock_template();
    for kind in TreeKind::ALL {
        superblock.roots[kind.index()] = t.seal(kind, &mut nodes)?;
    }
    let generation = t.generation();
    superblock.generation = generation.0.into();
    superblock.free_blocks = free_blocks.into();
    superblock.next_inode = t.meta.next_inode.0.into();
    superblock.files = t.meta.files.into();
    superblock.preallocated_blocks = t.meta.preallocated.into();
    superblock.incompatible = t.meta.features.into();
    let oldest_epoch = t.meta.oldest_epoch;
    t.open_next_generation();
    Ok(Frozen { generation, nodes, superblock, oldest_epoch })
}

/// Stores the inodes of files that changed. Each is a unit of its own.
fn store_inodes(t: &mut Txn<'_>) -> Result<(), Stop> {
    let mut lagging = Vec::new();
    let result = loop {
        let Some(file) = t.meta.dirty.last().cloned() else { break Ok(()) };
        t.checkpoint();
        if !file.dirty.load(Ordering::Relaxed) {
            // It was deleted.
            t.meta.dirty.pop();
            continue;
        }
        let lags = match store_inode(t, &file) {
            Ok(lags) => lags,
            Err(stop) => break Err(stop),
        };
        t.meta.dirty.pop();
        if lags {
            lagging.push(file);
            continue;
        }
        file.dirty.store(false, Ordering::Relaxed);
        t.meta.forget_if_unused(&file);
    };
    // Their size goes on growing: the next commit looks at them again.
    t.meta.dirty.append(&mut lagging);
    t.checkpoint();
    result
}

/// Stores the inode of one file, with a size that covers no unfinished write (see [`crate::ordered`]). True if it has finished content
/// beyond that size: an entry among the orphans says so, and a mount after a crash cuts it off.
fn store_inode(t: &mut Txn<'_>, file: &Arc<FileInner>) -> Result<bool, Stop> {
    let (size, lags) = file.disk_size();
    let unlinked = file.unlinked.load(Ordering::Relaxed);
    if lags != file.cut_by_commit.load(Ordering::Relaxed) && !unlinked {
        // A long truncate in progress has the same entry, and keeps it.
        if lags {
            orphans::put(t, file.id, Work::Truncate)?;
        } else if !file.cut_by_truncate.load(Ordering::Relaxed) {
            orphans::remove(t, file.id)?;
        }
        file.cut_by_commit.store(lags, Ordering::Relaxed);
        t.checkpoint();
    }
    let inode = {
        let mut inode = file.inode.lock();
        inode.size = size;
        *inode
    };
    inodes::put(t, file.id, &inode)?;
    Ok(lags)
}

/// Brings every region record that this commit may store into its place in the tree, at its largest size. Storing the records
/// then changes them in place: it allocates and frees nothing, so it ends. Each record is a unit of its own.
fn prepare_space(t: &mut Txn<'_>) -> Result<(), Stop> {
    let mut value = Vec::new();
    loop {
        t.collect_space_needs();
        let Some(need) = t.meta.space_needs.first().copied() else { break };
        t.checkpoint();
        t.load_space(need)?;
        value.clear();
        match need {
            Need::Region(id) => {
                t.meta.alloc.encode_region_largest(id, &mut value)?;
                space::put_region(t, id, &value)?;
            }
            Need::Group(id) => {
                t.meta.alloc.encode_group(id, &mut value)?;
                space::put_group(t, id, &value)?;
            }
        }
        t.meta.space_needs.remove(&need);
        t.meta.space_stored.insert(need);
    }
    t.checkpoint();
    Ok(())
}

/// Stores the region records; returns the free blocks that they add up to.
fn store_space(t: &mut Txn<'_>) -> Result<u64, Stop> {
    let mut unpublished: Vec<_> = t.meta.unpublished.iter().copied().collect();
    unpublished.sort_unstable();
    let rejected = t.meta.alloc.begin_commit(t.generation(), &unpublished)?;
    for error in rejected {
        log::error!("{}: {error}", t.core.device.name());
    }
    let mut value = Vec::new();
    // Every value that was brought into place is stored again: it has its largest size there.
    t.collect_space_needs();
    if let Some(need) = t.meta.space_needs.first() {
        return Err(Stop::corrupt(format!("{need:?} changed and has no place in the space tree")));
    }
    for need in std::mem::take(&mut t.meta.space_stored) {
        value.clear();
        match need {
            Need::Region(id) => {
                t.meta.alloc.encode_region(id, &mut value)?;
                space::put_region(t, id, &value)?;
            }
            Need::Group(id) => {
                t.meta.alloc.encode_group(id, &mut value)?;
                space::put_group(t, id, &value)?;
            }
        }
    }
    let free = t.meta.alloc.persisted_free();
    t.meta.alloc.end_commit()?;
    Ok(free)
}

/// Steps 2 and 3, until all of it happened in one device epoch.
async fn make_durable(core: &Arc<Core>, io: &Io, frozen: &Frozen) -> Result<()> {
    let mut data_epoch = frozen.oldest_epoch;
    for _ in 0..RESETS_MAX {
        let epoch = core.device.epoch();
        if data_epoch < epoch {
            recheck::data(core, io, frozen.generation, &frozen.nodes).await?;
            data_epoch = epoch;
        }
        write_nodes(core, io, &frozen.nodes).await?;
        core.stats.flushed();
        match io.call(Request::flush(epoch, 0)).await.0 {
            Ok(()) => return Ok(()),
            Err(error) if matches!(error.kind, IoErrorKind::EpochLost { .. }) => {}
            Err(error) => return Err(Error::io("flushing before a commit", error)),
        }
    }
    Err(Error::corrupt(format!("the device was reset {RESETS_MAX} times in one commit")))
}

/// Step 2.
async fn write_nodes(core: &Arc<Core>, io: &Io, nodes: &[(BlockAddr, Arc<Node>)]) -> Result<()> {
    let mut order: Vec<&(BlockAddr, Arc<Node>)> = nodes.iter().collect();
    order.sort_unstable_by_key(|(addr, _)| *addr);
    let mut in_flight: VecDeque<IoHandle> = VecDeque::new();
    let mut at = 0;
    while at < order.len() {
        let first = order[at].0;
        let adjacent =
            order[at..].iter().zip(first.0..).take(NODES_PER_WRITE).take_while(|(n, a)| n.0.0 == *a);
        let count = adjacent.count();
        let mut buf = io.buffer(count * BLOCK_SIZE)?;
        for (block, (_, node)) in buf.chunks_exact_mut(BLOCK_SIZE).zip(&order[at..at + count]) {
            block.copy_from_slice(node.bytes());
        }
        core.stats.wrote_metadata(buf.len() as u64);
        in_flight.push_back(io.send(Request::write(core.locate(first), buf, 0)));
        at += count;
        if in_flight.len() >= WRITES_IN_FLIGHT {
            wait_first(&mut in_flight).await?;
        }
    }
    while !in_flight.is_empty() {
        wait_first(&mut in_flight).await?;
    }
    Ok(())
}

async fn wait_first(in_flight: &mut VecDeque<IoHandle>) -> Result<()> {
    match in_flight.pop_front() {
        Some(handle) => handle.await.0.map_err(|e| Error::io("writing metadata nodes", e)),
        None => Ok(()),
    }
}

/// Step 4. Both copies must arrive.
async fn write_superblock(core: &Arc<Core>, io: &Io, frozen: &Frozen) -> Result<()> {
    let mut handles = Vec::new();
    for slot in slots_of(frozen.generation) {
        let mut buf = io.buffer(BLOCK_SIZE)?;
        buf.copy_from_slice(frozen.superblock.sealed(slot).as_bytes());
        core.stats.wrote_superblock(BLOCK_SIZE as u64);
        let request = Request::write(slot_byte(slot, core.total_blocks), buf, 0).with_hints(Hints::fua());
        handles.push(io.send(request));
    }
    for handle in handles {
        handle.await.0.map_err(|e| Error::io("writing a superblock", e))?;
    }
    Ok(())
}

/// Step 5.
fn finish(core: &Core, generation: Generation) -> Result<()> {
    core.stats.committed();
    let mut meta = core.meta.lock();
    meta.cache.written(generation);
    meta.alloc.evict_clean(REGIONS_IN_MEMORY);
    meta.trim_maps(core.options.extent_map_bytes as u64);
    drop(meta);
    core.gate.wake_all(|state| state.durable = generation);
    core.release_freed()
}
