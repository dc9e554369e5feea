//! Transactions on the metadata: trees and space, under one lock.
//!
//! [`Meta`] is all metadata in memory. A transaction is a closure that runs under its lock, does no I/O and either completes
//! or stops *before it has changed anything*: what it lacks is named by [`Stop`], [`transact`] brings it (a tree node, a
//! region's bitmap, room by way of a commit), and runs the closure again from its beginning. So the shape of every
//! transaction is: look up, or [`Txn::touch`], every key that will change; [`Txn::ready`]; then change. A closure may consist of
//! several such units with [`Txn::checkpoint`] between them.
//!
//! Atomicity against crashes: a commit takes the trees as they are while it holds the lock, so it has all of a
//! transaction or nothing. A stop after a change would break that; it is a bug, and turns the mount read-only.
//!
//! Lock order: range locks, this lock, then the mutexes of single files. No I/O and no waiting under it.
//!
//! Absent here: more than one lock for the metadata. The reads of files do not come here (extent map), so it is writes and names
//! that share it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hashbrown::{HashMap, HashSet};
use smallvec::SmallVec;
use zerocopy::FromZeros;

use crate::alloc::{self, Allocator, Need, RegionId, SpaceError, Stream, group_of, region_of};
use crate::channel::io::Io;
use crate::commit;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::FileInner;
use crate::mutation::{Mutation, broken};
use crate::ordered::{Ordered, Runs, Slot};
use crate::records::inodes::Inode;
use crate::records::{TreeKind, space};
use crate::reserve::{PAGES_PER_NODE, Reserved};
use crate::superblock::RootOnDisk;
use crate::tree::{self, KeyBuf, Node, NodeAlloc, NodeCache, NodePtr, Tree};
use crate::types::{BLOCK_SIZE, BlockAddr, Generation, InodeId, Run};

/// Commits that a transaction asks for before it gives up for lack of space. The first may leave blocks that a reader holds
/// or that a commit running before it freed.
const COMMITS_MAX: u32 = 2;

/// Extent records that one transaction drops at most; a small device drops fewer ([`Meta::drop_step`]).
const DROP_STEP_MAX: usize = 256;

/// Nodes that any commit may need.
const COMMIT_NEED_MIN: u64 = 64;
/// Inodes in a leaf that is not about to be merged with its neighbour.
const INODES_PER_LEAF_MIN: u64 = 8;

/// A value read from a tree.
pub(crate) type Value = SmallVec<[u8; 64]>;

/// Why a transaction did not complete. Nothing was changed.
#[derive(Debug)]
pub(crate) enum Stop {
    /// A tree node is not in memory.
    Node(NodePtr),
    /// A part of the allocator's state is not in memory.
    Space(Need),
    /// A commit must come first: it frees blocks, or cleans metadata.
    Commit,
    /// It cannot be done.
    Fail(Error),
}

impl Stop {
    pub(crate) fn corrupt(what: String) -> Stop {
        Stop::Fail(Error::Corrupt { what })
    }
}

impl From<SpaceError> for Stop {
    fn from(error: SpaceError) -> Stop {
        Stop::corrupt(format!("space: {error}"))
    }
}

/// What a transaction wants to use up.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Room {
    /// So many data blocks, and the metadata that they need.
    Data(u64),
    /// So many blocks to preallocate, and the metadata that their first writes may need, to be kept back from now on.
    Preallocated(u64),
    /// A first write of preallocated blocks: it needs no data block, and its metadata was kept back for it.
    Promised,
    /// A few tree nodes.
    Metadata,
    /// So many pages that are written later, and the metadata that they will need.
    Delayed(u64),
    /// So many data blocks that were reserved.
    Reserved(u64),
    /// One data block that lets many go: it may come from what is kept back for deletes.
    Shrink,
}

/// What addresses are possible.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    total_blocks: u64,
}

impl Limits {
    pub(crate) fn new(total_blocks: u64) -> Limits {
        Limits { total_blocks }
    }

    /// True when `run` lies on the device.
    pub(crate) fn contains(self, run: Run) -> bool {
        run.start.0.checked_add(run.len).is_some_and(|end| end <= self.total_blocks)
    }
}

/// All metadata in memory.
pub(crate) struct Meta {
    pub(crate) cache: NodeCache,
    pub(crate) trees: [Tree; TreeKind::ALL.len()],
    pub(crate) alloc: Allocator,
    /// The open generation: what is changed now becomes durable with it.
    pub(crate) generation: Generation,
    /// Something was changed in the open generation.
    pub(crate) changed: bool,
    pub(crate) next_inode: InodeId,
    /// Files that have a name.
    pub(crate) files: u64,
    pub(crate) total_blocks: u64,
    /// Files that are open or have unstored changes.
    pub(crate) open: HashMap<InodeId, Arc<FileInner>>,
    /// Files whose inode the next commit stores.
    pub(crate) dirty: Vec<Arc<FileInner>>,
    /// Deleted files whose content can go.
    pub(crate) reap: Vec<InodeId>,
    /// Blocks of files that were never written.
    pub(crate) preallocated: u64,
    /// Blocks allocated to become such: no tree refers to them yet.
    pub(crate) preallocating: u64,
    /// Incompatible features that the next commit notes in the superblock; they only grow.
    pub(crate) features: u64,
    /// Runs that were allocated and that no tree refers to yet: a commit stores them as free.
    pub(crate) unpublished: HashSet<Run>,
    /// The earliest device epoch in which file data of the open generation was written; `u64::MAX`: there is none.
    pub(crate) oldest_epoch: u64,
    /// What buffered writes were promised.
    pub(crate) reserved: Reserved,
    /// Regions in which the open generation freed something.
    pub(crate) freed_in: HashSet<RegionId>,
    /// Space records that the commit in progress must bring into place.
    pub(crate) space_needs: BTreeSet<Need>,
    /// Those that it has brought into place.
    pub(crate) space_stored: BTreeSet<Need>,
}

impl Meta {
    /// Blocks kept back so that commits and deletes work on a full device.
    pub(crate) fn reserve(&self) -> u64 {
        (self.total_blocks / 64).clamp(256, 65536)
    }

    /// Extent records that one transaction may drop. [`Txn::ready`] asks for two nodes for each, which must be there on a device that
    /// is full: a quarter of what is kept back at most.
    pub(crate) fn drop_step(&self) -> usize {
        (self.reserve() as usize / 8).min(DROP_STEP_MAX)
    }

    /// The last generation that has a change in it. A file whose size on disk lags behind what is finished is a change to come: what holds
    /// it back may have ended, in whatever way, since the last commit looked.
    pub(crate) fn last_changed(&self) -> Generation {
        let changed = self.changed || !self.dirty.is_empty();
        if changed { self.generation } else { Generation(self.generation.0 - 1) }
    }

    /// Blocks that writes may still take.
    pub(crate) fn user_free(&self) -> u64 {
        let kept =
            self.reserve() + self.reserved.total() + promise_share(self.preallocated + self.preallocating);
        self.alloc.counts().free.saturating_sub(kept)
    }

    /// Nodes that committing what is open now may allocate: each record that it stores may copy its leaf and split it, and
    /// there are no more space records than regions and groups, nor more inode leaves than the files fill.
    fn commit_need(&self) -> u64 {
        let space = (self.freed_in.len() + self.unpublished.len() + self.alloc.dirty()) as u64;
        let space = space.min(u64::from(self.alloc.regions()) + u64::from(self.alloc.groups()));
        let inodes = (self.dirty.len() as u64).min(self.files / INODES_PER_LEAF_MIN + 8);
        COMMIT_NEED_MIN + 4 * space + 2 * inodes
    }

    /// Dirty nodes at which a commit is due: half of what the node cache holds, or a quarter of what is kept back if that is more. (Free
    /// space is no bound: a dirty node has its block.)
    fn dirty_limit(&self) -> usize {
        let stats = self.cache.stats();
        let by_memory = (stats.capacity / BLOCK_SIZE / 2) as u64;
        by_memory.max(self.reserve() / 4) as usize
    }
}

/// Blocks of metadata kept back for the first writes of `preallocated` blocks.
///
/// The worst is that each is written alone, in an unlucky order: then each ends in an extent record of its own, 48 bytes of a leaf
/// (key 16, value 24, slot 8). With checksum chunks (280 bytes for 64 blocks) and inner nodes that is less than 55 bytes a
/// block. A split leaves two halves of at least 1300 of 4032 bytes, unless it follows an ascending run; that leaves a full node
/// and one that may be small, but the next split of the full one is of the first kind. So three nodes have one node's bytes at
/// least, and 16 blocks, 880 bytes, fill a node.
///
/// On the way there are never more records of the range than blocks, and every record that is still to come belongs to a
/// block that is still unwritten, so the share may go down with each first write. What a commit copies is not counted here:
/// it is bounded by [`Meta::dirty_limit`], and the reserve is for it.
pub(crate) fn promise_share(preallocated: u64) -> u64 {
    preallocated.div_ceil(16)
}

/// A transaction in progress; see the module documentation.
pub(crate) struct Txn<'m> {
    pub(crate) core: &'m Core,
    pub(crate) meta: &'m mut Meta,
    /// Something was changed since the last checkpoint.
    changed: bool,
    /// Room was made for all changes to come.
    ready: bool,
    /// Commits that were tried on behalf of this transaction.
    commits: u32,
}

/// Runs `body` until it completes, bringing what it stops for. See the module documentation for the rules that it follows.
pub(crate) async fn transact<T>(
    core: &Arc<Core>,
    io: &Io,
    body: impl FnMut(&mut Txn<'_>) -> Result<T, Stop> + Send,
) -> Result<T> {
    transact_after(core, io, Core::check_not_sealed, 0, body).await
}

/// The same for the commit itself, which cannot ask for a commit to make room.
pub(crate) async fn transact_in_commit<T>(
    core: &Arc<Core>,
    io: &Io,
    body: impl FnMut(&mut Txn<'_>) -> Result<T, Stop> + Send,
) -> Result<T> {
    // Commits go on to the end of an unmount.
    transact_after(core, io, |_| Ok(()), COMMITS_MAX, body).await
}

/// The same while `check` allows it, after `commits` commits to make room for it.
async fn transact_after<T>(
    core: &Arc<Core>,
    io: &Io,
    check: fn(&Core) -> Result<()>,
    mut commits: u32,
    mut body: impl FnMut(&mut Txn<'_>) -> Result<T, Stop> + Send,
) -> Result<T> {
    // Keeps the nodes that were brought until the transaction is done, however small the cache.
    let mut pins: Vec<Arc<Node>> = Vec::new();
    loop {
        let stop = {
            let mut meta = core.meta.lock();
            check(core)?;
            let mut txn = Txn { core, meta: &mut meta, changed: false, ready: false, commits };
            match body(&mut txn) {
                Ok(value) => return Ok(value),
                Err(stop) if txn.changed => {
                    let error = Error::corrupt(format!("a transaction stopped half way: {stop:?}"));
                    core.fail(error.clone());
                    return Err(error);
                }
                Err(stop) => stop,
            }
        };
        match stop {
            Stop::Node(ptr) => pins.push(load_node(core, io, &ptr).await?),
            Stop::Space(need) => load_space(core, io, need, &mut pins).await?,
            Stop::Commit => {
                commits += u32::from(commit::make_room(core, io).await?);
            }
            Stop::Fail(error) => return Err(error),
        }
    }
}

/// Reads a node from the device into the cache.
async fn load_node(core: &Arc<Core>, io: &Io, ptr: &NodePtr) -> Result<Arc<Node>> {
    core.stats.read_metadata(BLOCK_SIZE as u64);
    let what = || format!("metadata block {}", ptr.addr);
    if !core.limits().contains(Run::new(ptr.addr, 1)) {
        return Err(Error::corrupt(format!("a tree refers to block {}, beyond the device", ptr.addr)));
    }
    let buf = io.read(core.locate(ptr.addr), BLOCK_SIZE, &what()).await?;
    core.meta.lock().cache.admit(ptr, &buf).map_err(|e| Error::corrupt(e.to_string()))
}

/// Reads a part of the allocator's state from the space tree.
async fn load_space(core: &Arc<Core>, io: &Io, need: Need, pins: &mut Vec<Arc<Node>>) -> Result<()> {
    loop {
        let stop = {
            let mut meta = core.meta.lock();
            let mut txn = Txn { core, meta: &mut meta, changed: false, ready: false, commits: COMMITS_MAX };
            match txn.load_space(need) {
                Ok(()) => return Ok(()),
                Err(stop) => stop,
            }
        };
        match stop {
            Stop::Node(ptr) => pins.push(load_node(core, io, &ptr).await?),
            Stop::Fail(error) => return Err(error),
            Stop::Space(_) | Stop::Commit => return Err(Error::corrupt("space records need themselves")),
        }
    }
}

impl Txn<'_> {
    /// The open generation.
    pub(crate) fn generation(&self) -> Generation {
        self.meta.generation
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits::new(self.meta.total_blocks)
    }

    // ---- looking up

    /// The value of `key`.
    pub(crate) fn get(&mut self, kind: TreeKind, key: &[u8]) -> Result<Option<Value>, Stop> {
        let meta = &mut *self.meta;
        Ok(meta.trees[kind.index()].get(&mut meta.cache, key, Value::from_slice)?)
    }

    /// The item with the greatest key at or below `key`.
    pub(crate) fn floor(&mut self, kind: TreeKind, key: &[u8]) -> Result<Option<(KeyBuf, Value)>, Stop> {
        let meta = &mut *self.meta;
        let found = meta.trees[kind.index()]
            .floor(&mut meta.cache, key, |key, value| (key.to_buf(), Value::from_slice(value)))?;
        Ok(found)
    }

    /// Calls `visit` with the items from key `from` on, in order, until it returns false.
    pub(crate) fn scan(
        &mut self,
        kind: TreeKind,
        from: &[u8],
        mut visit: impl FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Stop> {
        let meta = &mut *self.meta;
        let tree = &meta.trees[kind.index()];
        let mut from = KeyBuf::from_slice(from);
        let mut joined = KeyBuf::new();
        while let Some(mut leaf) = tree.leaf_from(&mut meta.cache, &from, true)? {
            while let Some((key, value)) = leaf.next() {
                if !visit(key.join(&mut joined), value) {
                    return Ok(());
                }
            }
            match leaf.high() {
                Some(high) => from = KeyBuf::from_slice(high),
                None => return Ok(()),
            }
        }
        Ok(())
    }

    // ---- making sure

    /// Makes sure that `key` can be changed without a missing node.
    pub(crate) fn touch(&mut self, kind: TreeKind, key: &[u8]) -> Result<(), Stop> {
        let meta = &mut *self.meta;
        Ok(meta.trees[kind.index()].touch(&mut meta.cache, key)?)
    }

    /// Makes sure that there is room for what the transaction will use up. Deletes and commits do not ask.
    pub(crate) fn check_room(&mut self, room: Room) -> Result<(), Stop> {
        let (needed, available) = match room {
            Room::Data(blocks) => (blocks + blocks / 64 + 8, self.meta.user_free()),
            Room::Preallocated(blocks) => (blocks + promise_share(blocks) + 8, self.meta.user_free()),
            Room::Metadata => (16, self.meta.user_free()),
            Room::Delayed(pages) => (pages + pages.div_ceil(PAGES_PER_NODE) + 8, self.meta.user_free()),
            Room::Reserved(blocks) => (blocks, self.meta.alloc.counts().free),
            Room::Shrink | Room::Promised => (8, self.meta.alloc.counts().free),
        };
        if needed > available {
            return Err(Stop::Fail(Error::NoSpace { needed, available }));
        }
        // What is delayed uses up nothing yet: it may wait for commits when its time comes.
        if matches!(room, Room::Delayed(_)) {
            return Ok(());
        }
        if self.meta.cache.stats().dirty > self.meta.dirty_limit() {
            return Err(Stop::Commit);
        }
        // What is free may have to be committed first; commits themselves need the reserve.
        let kept = match room {
            Room::Shrink | Room::Promised | Room::Reserved(_) => 0,
            _ => self.meta.reserve() / 2,
        };
        if needed + self.meta.commit_need().max(kept) > self.meta.alloc.counts().available_now {
            return Err(self.no_space_now(needed));
        }
        Ok(())
    }

    /// A commit would make room: it frees blocks, or what it needs itself is much.
    fn commit_helps(&self) -> bool {
        self.meta.alloc.counts().pending > 0 || self.meta.commit_need() > COMMIT_NEED_MIN
    }

    /// There is no space at this moment: a commit may free some; else it is an error.
    fn no_space_now(&self, needed: u64) -> Stop {
        let counts = self.meta.alloc.counts();
        if self.commit_helps() && self.commits < COMMITS_MAX {
            return Stop::Commit;
        }
        Stop::Fail(Error::NoSpace { needed, available: counts.available_now })
    }

    /// Makes sure that `changes` puts and removes of touched keys can be done. Nothing stops after this.
    pub(crate) fn ready(&mut self, changes: usize) -> Result<(), Stop> {
        // Every change may copy its leaf and split it; the levels above are shared by the changes of a tree.
        let height: usize = self.meta.trees.iter().map(Tree::insert_bound).sum();
        let nodes = (2 * changes + height) as u64;
        // The commit that makes this durable must have its room too.
        let counts = self.meta.alloc.counts();
        if nodes + self.meta.commit_need() > counts.available_now
            && self.commit_helps()
            && self.commits < COMMITS_MAX
        {
            return Err(Stop::Commit);
        }
        match self.meta.alloc.ensure_ready(Stream::Metadata, nodes) {
            Ok(()) => {
                self.ready = true;
                Ok(())
            }
            Err(alloc::Stop::Load(need)) => Err(Stop::Space(need)),
            Err(alloc::Stop::NoSpace) => Err(self.no_space_now(nodes)),
        }
    }

    /// What was changed so far is whole: a stop after this is no harm.
    pub(crate) fn checkpoint(&mut self) {
        self.changed = false;
        self.ready = false;
    }

    /// Declares that a stop from here on is a failure (the commit).
    pub(crate) fn begin_unstoppable(&mut self) {
        self.changed = true;
    }

    // ---- changing

    /// A mount that has failed is still read; nothing more is changed on it.
    fn check_changeable(&self) -> Result<(), Stop> {
        // What has begun is finished: this transaction holds the lock.
        if self.changed { Ok(()) } else { self.core.check_failed().map_err(Stop::Fail) }
    }

    /// Sets the value of `key`.
    pub(crate) fn put(&mut self, kind: TreeKind, key: &[u8], value: &[u8]) -> Result<(), Stop> {
        self.change(kind, |tree, ctx| tree.insert(ctx, key, value).map(|_| ()))
    }

    /// Removes `key`; says whether it was there.
    pub(crate) fn remove(&mut self, kind: TreeKind, key: &[u8]) -> Result<bool, Stop> {
        self.change(kind, |tree, ctx| tree.remove(ctx, key))
    }

    fn change<T>(
        &mut self,
        kind: TreeKind,
        change: impl FnOnce(&mut Tree, &mut tree::Ctx<'_>) -> Result<T, tree::Stop>,
    ) -> Result<T, Stop> {
        self.check_changeable()?;
        let meta = &mut *self.meta;
        let mut nodes = Nodes {
            alloc: &mut meta.alloc,
            freed_in: &mut meta.freed_in,
            generation: meta.generation,
            ready: self.ready,
            stop: None,
            broken: None,
        };
        let mut ctx = tree::Ctx { cache: &mut meta.cache, alloc: &mut nodes, generation: meta.generation };
        let result = change(&mut meta.trees[kind.index()], &mut ctx);
        let (stop, broken) = (nodes.stop.take(), nodes.broken.take());
        if let Some(error) = broken {
            self.changed = true;
            return Err(error.into());
        }
        match result {
            Ok(value) => {
                self.changed = true;
                self.meta.changed = true;
                Ok(value)
            }
            Err(tree::Stop::NoSpace) => match stop {
                Some(alloc::Stop::Load(need)) => Err(Stop::Space(need)),
                _ => Err(self.no_space_now(1)),
            },
            Err(other) => Err(other.into()),
        }
    }

    /// Stops referring to blocks of data. They are reused when this generation is durable and nobody reads them.
    pub(crate) fn free(&mut self, run: Run) -> Result<(), Stop> {
        self.check_changeable()?;
        self.changed = true;
        self.meta.changed = true;
        self.meta.freed_in.insert(region_of(run.start));
        Ok(self.meta.alloc.free(run, self.meta.generation)?)
    }

    /// Allocates `blocks` blocks, as few runs as may be. They count as unpublished until [`published`](Self::published) or given back.
    pub(crate) fn allocate(&mut self, stream: Stream, blocks: u64) -> Result<Runs, Stop> {
        self.allocate_up_to(stream, blocks, usize::MAX)
    }

    /// The same, but fewer blocks where they would be more than `max` runs.
    pub(crate) fn allocate_up_to(&mut self, stream: Stream, blocks: u64, max: usize) -> Result<Runs, Stop> {
        self.check_changeable()?;
        let mut runs = Runs::new();
        let mut left = blocks;
        while left > 0 && runs.len() < max {
            match self.meta.alloc.allocate(stream, left, 1, None) {
                Ok(run) => {
                    left -= run.len;
                    match runs.last_mut() {
                        Some(last)
                            if last.end() == run.start && region_of(last.start) == region_of(run.start) =>
                        {
                            last.len += run.len;
                        }
                        _ => runs.push(run),
                    }
                }
                Err(stop) => {
                    for run in runs {
                        self.meta.alloc.free_now(run)?;
                    }
                    return Err(match stop {
                        alloc::Stop::Load(need) => Stop::Space(need),
                        alloc::Stop::NoSpace => self.no_space_now(blocks),
                    });
                }
            }
        }
        self.meta.unpublished.extend(runs.iter().copied());
        Ok(runs)
    }

    /// Cuts freshly allocated `runs` so that they fill gaps of these lengths (in blocks) one after the other. Yields the runs of
    /// each gap, with its index.
    pub(crate) fn cut(&mut self, runs: Runs, gaps: impl Iterator<Item = u64>) -> SmallVec<[(usize, Run); 4]> {
        let mut cut = SmallVec::new();
        let mut gaps = gaps.enumerate();
        let mut gap = gaps.next();
        for run in runs {
            let mut rest = run;
            while let Some((index, wanted)) = gap.filter(|_| rest.len > 0) {
                let len = wanted.min(rest.len);
                cut.push((index, Run::new(rest.start, len)));
                rest = Run::new(rest.start.plus(len), rest.len - len);
                gap = if len < wanted { Some((index, wanted - len)) } else { gaps.next() };
            }
            debug_assert_eq!(rest.len, 0, "more blocks than gaps");
            self.meta.unpublished.remove(&run);
        }
        self.meta.unpublished.extend(cut.iter().map(|(_, run)| *run));
        cut
    }

    /// Allocates `lens` blocks each, all or nothing, from what `file` has reserved.
    pub(crate) fn allocate_reserved(
        &mut self,
        file: &FileInner,
        lens: &[u64],
    ) -> Result<SmallVec<[Runs; 1]>, Stop> {
        let blocks = lens.iter().sum();
        self.check_room(Room::Reserved(blocks))?;
        let mut all = SmallVec::<[Runs; 1]>::new();
        for len in lens {
            match self.allocate(Stream::Data, *len) {
                Ok(runs) => all.push(runs),
                Err(stop) => {
                    for run in all.into_iter().flatten() {
                        self.meta.unpublished.remove(&run);
                        self.meta.alloc.free_now(run)?;
                    }
                    return Err(stop);
                }
            }
        }
        self.meta.use_reserved(file, blocks);
        Ok(all)
    }

    /// The trees refer to `runs` now.
    pub(crate) fn published(&mut self, ordered: &Ordered) {
        for run in ordered.runs() {
            self.meta.unpublished.remove(run);
        }
        ordered.slot().into_iter().for_each(Slot::inserted);
        self.meta.oldest_epoch = self.meta.oldest_epoch.min(ordered.epoch());
    }

    /// Changes the inode of a file in memory; the next commit stores it.
    pub(crate) fn change_inode(&mut self, file: &Arc<FileInner>, change: impl FnOnce(&mut Inode)) {
        self.change_inode_quietly(file, |inode| {
            change(inode);
            inode.touch();
        });
    }

    /// The same for what is no change to readers: neither version nor time follow.
    pub(crate) fn change_inode_quietly(&mut self, file: &Arc<FileInner>, change: impl FnOnce(&mut Inode)) {
        change(&mut file.inode.lock());
        self.meta.changed = true;
        if !file.dirty.swap(true, Ordering::Relaxed) {
            self.meta.dirty.push(Arc::clone(file));
            self.meta.open.insert(file.id, Arc::clone(file));
        }
    }

    // ---- space records and commit

    /// Brings a part of the allocator's state into memory.
    pub(crate) fn load_space(&mut self, need: Need) -> Result<(), Stop> {
        if self.meta.alloc.is_loaded(need) {
            return Ok(());
        }
        match need {
            Need::Group(id) => {
                let value = space::group(self, id)?;
                self.meta.alloc.load_group(id, value.as_deref())?;
            }
            Need::Region(id) => {
                self.load_space(Need::Group(group_of(id)))?;
                let value = space::region(self, id)?;
                self.meta.alloc.load_region(id, value.as_deref())?;
            }
        }
        Ok(())
    }

    /// Gathers in `meta.space_needs` every record that the commit will store and that has no place in the tree yet.
    pub(crate) fn collect_space_needs(&mut self) {
        let meta = &mut *self.meta;
        while let Some(id) = meta.alloc.pop_dirty_region() {
            meta.space_needs.insert(Need::Region(id));
        }
        while let Some(id) = meta.alloc.pop_dirty_group() {
            meta.space_needs.insert(Need::Group(id));
        }
        let freed = meta.freed_in.iter().copied();
        let unpublished = meta.unpublished.iter().map(|run| region_of(run.start));
        for id in freed.chain(unpublished) {
            meta.space_needs.insert(Need::Region(id));
            meta.space_needs.insert(Need::Group(group_of(id)));
        }
        meta.space_needs.retain(|need| !meta.space_stored.contains(need));
    }

    /// Seals a tree; returns its root as the superblock has it.
    pub(crate) fn seal(
        &mut self,
        kind: TreeKind,
        nodes: &mut Vec<(BlockAddr, Arc<Node>)>,
    ) -> Result<RootOnDisk, Stop> {
        let mut root = RootOnDisk::new_zeroed();
        self.change(kind, |tree, ctx| {
            let ptr = tree.seal(ctx, nodes);
            if !ptr.is_null() {
                root.addr = ptr.addr.0.into();
                root.generation = ptr.generation.0.into();
                root.checksum = ptr.checksum.into();
                root.height = (tree.height() as u32).into();
            }
            Ok(())
        })?;
        Ok(root)
    }

    /// The open generation is frozen; the next one begins.
    pub(crate) fn open_next_generation(&mut self) {
        self.meta.generation = Generation(self.meta.generation.0 + 1);
        self.meta.changed = false;
        self.meta.oldest_epoch = u64::MAX;
        self.meta.freed_in.clear();
        // What the commit was promised and did not take is free for all again; dropping a promise cannot fail.
        let _ = self.meta.alloc.ensure_ready(Stream::Metadata, 0);
        self.core.set_open_generation(self.meta.generation);
    }
}

impl From<tree::Stop> for Stop {
    fn from(stop: tree::Stop) -> Stop {
        match stop {
            tree::Stop::Miss(ptr) => Stop::Node(ptr),
            tree::Stop::NoSpace => Stop::corrupt("a lookup wanted space".to_owned()),
            tree::Stop::Corrupt(error) => Stop::corrupt(error.to_string()),
        }
    }
}

/// Gives tree operations their blocks, on behalf of a transaction.
struct Nodes<'a> {
    alloc: &'a mut Allocator,
    freed_in: &'a mut HashSet<RegionId>,
    generation: Generation,
    /// [`Txn::ready`] has made room for the whole transaction.
    ready: bool,
    /// Why `ensure` said no.
    stop: Option<alloc::Stop>,
    /// What went wrong in a call that cannot fail.
    broken: Option<SpaceError>,
}

impl NodeAlloc for Nodes<'_> {
    fn ensure(&mut self, nodes: usize) -> Result<(), tree::Stop> {
        if self.ready {
            return Ok(());
        }
        self.alloc.ensure_ready(Stream::Metadata, nodes as u64).map_err(|stop| {
            self.stop = Some(stop);
            tree::Stop::NoSpace
        })
    }

    fn allocate_node(&mut self) -> BlockAddr {
        match self.alloc.allocate(Stream::Metadata, 1, 1, None) {
            Ok(run) => run.start,
            // `ensure` promised it. Should that be wrong, the mount fails before anything of this generation is written.
            Err(_) => {
                self.broken = Some(SpaceError::CommitOrder("a node was allocated that was not ensured"));
                BlockAddr(u64::MAX >> 16)
            }
        }
    }

    fn free_node(&mut self, addr: BlockAddr, birth: Generation) {
        let run = Run::new(addr, 1);
        let result = if birth == self.generation {
            // Nothing durable knows of it.
            self.alloc.free_now(run)
        } else {
            self.freed_in.insert(region_of(addr));
            self.alloc.free(run, self.generation)
        };
        if let Err(error) = result {
            self.broken = Some(error);
        }
    }
}

impl Meta {
    /// Keeps the extent maps of all files within `budget` bytes together.
    pub(crate) fn trim_maps(&self, budget: u64) {
        let total: u64 = self.open.values().map(|file| file.map.memory_bytes()).sum();
        if total <= budget {
            return;
        }
        // Each file gives its share, and a tenth more so that this is not needed at every turn.
        for file in self.open.values() {
            let mine = u128::from(file.map.memory_bytes());
            let excess = u128::from(total - budget + budget / 10);
            file.map.evict((mine * excess / u128::from(total)) as u64);
        }
    }

    /// Drops a file from memory when it has neither handles nor unstored changes. Who asks may be late: the file may have been
    /// dropped and opened again since, and the object of today is not his.
    pub(crate) fn forget_if_unused(&mut self, file: &Arc<FileInner>) {
        let same = |known: &Arc<FileInner>| Arc::ptr_eq(known, file) || broken(Mutation::ForgetByNumber);
        let known = self.open.get(&file.id).is_some_and(same);
        let unused = known
            && file.handles.load(Ordering::Acquire) == 0
            && !file.dirty.load(Ordering::Relaxed)
            && !file.has_cached_writes()
            && file.ordered.count() == 0
            && !file.unlinked.load(Ordering::Relaxed);
        if unused {
            self.open.remove(&file.id);
        }
    }
}
