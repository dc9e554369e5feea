//! Check: walks everything that the filesystem refers to and compares it with what it says about itself.
//!
//! 1. commit, so that what is in memory and what is durable are one ([`run`]);
//! 2. every tree node: checksum, place, bounds, order ([`walk_trees`]);
//! 3. every name leads to an inode, every inode has one name or is an orphan ([`check_names`], [`check_inodes`]);
//! 4. every extent lies inside its file (but for blocks kept beyond its end) and on blocks of its own; the counts of its inode, and
//!    of preallocated blocks, agree; its data has its checksums ([`check_extents`]);
//! 5. the allocator says of every block what the walk has found ([`check_space`]).
//!
//! It finds and reports; it repairs nothing. No other operation should run meanwhile, or it may report what has just changed.
//! Memory: a bit for every block of the regions that are in use, and some 16 bytes a file.

use std::sync::Arc;

use bdev_adapter::Request;
use hashbrown::{HashMap, HashSet};

use crate::alloc::{Need, REGION_BLOCKS, RegionId, region_of};
use crate::channel::Channel;
use crate::channel::io::Io;
use crate::commit;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::records::extents::{Extent, Kind};
use crate::records::orphans::Work;
use crate::records::{TreeKind, checksums, extents, inodes, names, orphans};
use crate::superblock::{self, checksum32};
use crate::tree::Walk;
use crate::txn::{Stop, transact};
use crate::types::{BLOCK_SIZE, BlockAddr, FileBlock, InodeId, Run};

/// Items looked at in one transaction.
const BATCH: usize = 512;
/// Largest single read of file data, in blocks.
const READ_BLOCKS: u64 = 256;
/// Problems that are spelled out; more are only counted.
const PROBLEMS_MAX: usize = 1000;

/// How far a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckProgress {
    /// What is being checked.
    pub phase: &'static str,
    /// Units done: nodes, files, bytes or regions, by phase.
    pub done: u64,
    /// Units altogether, where that is known.
    pub total: Option<u64>,
}

/// What a check has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Files with a name.
    pub files: u64,
    /// Files with work left from a crash or still open without a name.
    pub orphans: u64,
    /// Extent records.
    pub extents: u64,
    /// Blocks of file data.
    pub data_blocks: u64,
    /// Blocks of files that were never written.
    pub preallocated_blocks: u64,
    /// Files that begin with inline content.
    pub inline_files: u64,
    /// Tree nodes.
    pub metadata_blocks: u64,
    /// Blocks that the allocator holds as used and nothing refers to.
    pub leaked_blocks: u64,
    /// Data blocks whose checksum was verified.
    pub verified_blocks: u64,
    /// What is wrong, spelled out (the first thousand).
    pub problems: Vec<String>,
    /// How many things are wrong.
    pub problem_count: u64,
}

impl CheckReport {
    /// True when nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.problem_count == 0
    }

    fn problem(&mut self, what: String) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(what);
        }
    }
}

/// Blocks that something refers to, by region.
#[derive(Default)]
struct Referenced(HashMap<RegionId, Box<[u64; REGION_BLOCKS as usize / 64]>>);

impl Referenced {
    /// Marks a block; false when it was marked already.
    fn mark(&mut self, addr: BlockAddr) -> bool {
        let words =
            self.0.entry(region_of(addr)).or_insert_with(|| Box::new([0; REGION_BLOCKS as usize / 64]));
        let bit = addr.0 % REGION_BLOCKS;
        let word = &mut words[(bit / 64) as usize];
        let fresh = *word >> (bit % 64) & 1 == 0;
        *word |= 1 << (bit % 64);
        fresh
    }

    fn contains(&self, addr: BlockAddr) -> bool {
        let bit = addr.0 % REGION_BLOCKS;
        self.0.get(&region_of(addr)).is_some_and(|words| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
    }

    fn count(&self, region: RegionId) -> u64 {
        self.0.get(&region).map_or(0, |words| words.iter().map(|w| u64::from(w.count_ones())).sum())
    }
}

struct Checker<'a> {
    core: &'a Arc<Core>,
    io: &'a Io,
    report: CheckReport,
    referenced: Referenced,
    named: HashSet<InodeId>,
    orphans: HashMap<InodeId, Work>,
    progress: &'a mut dyn FnMut(CheckProgress),
}

impl crate::Filesystem {
    /// Checks the whole filesystem: every tree node, name, inode, extent, data checksum, and the allocator's records. Writes
    /// nothing but the commit that it begins with (none on a read-only mount). `progress` is called now and then.
    ///
    /// # Errors
    /// Only what keeps the check from going on; what is wrong with the filesystem is in the report.
    pub fn check(&self, channel: &Channel, progress: &mut dyn FnMut(CheckProgress)) -> Result<CheckReport> {
        let (core, io) = (&channel.core, &channel.shared.io);
        core.check_mounted()?;
        channel.block_on(run(core, io, progress))
    }
}

/// Step 1, then the others.
async fn run(core: &Arc<Core>, io: &Io, progress: &mut dyn FnMut(CheckProgress)) -> Result<CheckReport> {
    if core.check_writable().is_ok() {
        commit::sync(core, io).await?;
    }
    let mut checker = Checker {
        core,
        io,
        report: CheckReport::default(),
        referenced: Referenced::default(),
        named: HashSet::new(),
        orphans: HashMap::new(),
        progress,
    };
    for run in superblock::reserved_runs(core.total_blocks) {
        checker.reference(run, || "superblocks".to_owned());
    }
    checker.walk_trees().await?;
    checker.read_orphans().await?;
    checker.check_names().await?;
    checker.check_inodes().await?;
    checker.check_extents().await?;
    checker.check_space().await?;
    Ok(checker.report)
}

impl Checker<'_> {
    fn reference(&mut self, run: Run, who: impl Fn() -> String) {
        for addr in (run.start.0..run.end().0).map(BlockAddr) {
            if !self.referenced.mark(addr) {
                self.report.problem(format!("block {addr} of {} is referred to twice", who()));
            }
        }
    }

    fn step(&mut self, phase: &'static str, done: u64, total: Option<u64>) {
        (self.progress)(CheckProgress { phase, done, total });
    }

    /// Notes that a part cannot be read, or passes on an error that ends the check.
    fn unreadable(&mut self, what: &str, error: Error) -> Result<()> {
        match error {
            Error::Corrupt { .. } | Error::Io { .. } | Error::DataChecksum { .. } => {
                self.report.problem(format!("{what}: {error}"));
                Ok(())
            }
            other => Err(other),
        }
    }

    /// Step 2.
    async fn walk_trees(&mut self) -> Result<()> {
        for kind in TreeKind::ALL {
            let mut walk = Walk::new();
            loop {
                let next = transact(self.core, self.io, |t| {
                    let meta = &mut *t.meta;
                    Ok(walk
                        .step(&meta.trees[kind.index()], &mut meta.cache)
                        .map_err(Stop::from)?
                        .map(|(ptr, _)| ptr))
                })
                .await;
                match next {
                    Ok(Some(ptr)) => {
                        self.report.metadata_blocks += 1;
                        self.reference(Run::new(ptr.addr, 1), || format!("the {} tree", kind.name()));
                    }
                    Ok(None) => break,
                    Err(error) => {
                        self.unreadable(&format!("{} tree", kind.name()), error)?;
                        walk.skip();
                    }
                }
                if self.report.metadata_blocks.is_multiple_of(BATCH as u64) {
                    self.step("metadata nodes", self.report.metadata_blocks, None);
                }
            }
        }
        Ok(())
    }

    /// Step 3: orphans first, so that inodes without a name can be told apart.
    async fn read_orphans(&mut self) -> Result<()> {
        let mut from = InodeId(0);
        loop {
            let found = match transact(self.core, self.io, |t| orphans::list(t, from, BATCH)).await {
                Ok(found) => found,
                Err(error) => return self.unreadable("orphans", error),
            };
            let Some((last, _)) = found.last() else { break };
            from = InodeId(last.0 + 1);
            self.orphans.extend(found);
        }
        self.report.orphans = self.orphans.len() as u64;
        Ok(())
    }

    /// Step 3.
    async fn check_names(&mut self) -> Result<()> {
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = transact(self.core, self.io, |t| {
                let entries = names::list(t, b"", after.as_deref(), BATCH)?;
                let mut found = Vec::with_capacity(entries.len());
                for entry in &entries {
                    found.push(inodes::find(t, entry.id)?.is_some());
                }
                Ok((entries, found))
            })
            .await;
            let (entries, found) = match page {
                Ok(page) => page,
                Err(error) => return self.unreadable("names", error),
            };
            for (entry, found) in entries.iter().zip(found) {
                let name = String::from_utf8_lossy(&entry.name);
                if !found {
                    self.report.problem(format!("'{name}' refers to inode {}, which is missing", entry.id));
                }
                if !self.named.insert(entry.id) {
                    self.report.problem(format!("'{name}' is a second name of inode {}", entry.id));
                }
                if let Err(error) = names::check(&entry.name) {
                    self.report.problem(format!("'{name}': {error}"));
                }
            }
            self.report.files += entries.len() as u64;
            self.step("names", self.report.files, Some(self.core.meta.lock().files));
            match entries.into_iter().last() {
                Some(last) => after = Some(last.name),
                None => break,
            }
        }
        let stored = self.core.meta.lock().files;
        if stored != self.report.files {
            let found = self.report.files;
            self.report.problem(format!("the superblock counts {stored} files, there are {found} names"));
        }
        Ok(())
    }

    /// Step 3.
    async fn check_inodes(&mut self) -> Result<()> {
        let mut from = InodeId(0);
        let mut done = 0;
        loop {
            let page = transact(self.core, self.io, |t| inodes::list(t, from, BATCH)).await;
            let ids = match page {
                Ok(ids) => ids,
                Err(error) => return self.unreadable("inodes", error),
            };
            let Some(last) = ids.last() else { return Ok(()) };
            from = InodeId(last.0 + 1);
            done += ids.len() as u64;
            let next = self.core.meta.lock().next_inode;
            for id in ids {
                let deleted = self.orphans.get(&id) == Some(&Work::Delete);
                if self.named.contains(&id) == deleted {
                    let what = if deleted { "has a name and is listed as deleted" } else { "has no name" };
                    self.report.problem(format!("inode {id} {what}"));
                }
                if id >= next {
                    self.report.problem(format!("inode {id} exists, and the next one to be given is {next}"));
                }
            }
            self.step("inodes", done, Some(self.named.len() as u64));
        }
    }

    /// Step 4.
    async fn check_extents(&mut self) -> Result<()> {
        let total = self.core.statfs().map(|s| s.used_bytes).ok();
        let (mut id, mut at) = (InodeId(0), FileBlock(0));
        let mut owner = Owner::default();
        loop {
            let page = transact(self.core, self.io, |t| {
                let mut found = Vec::new();
                extents::scan_all(t, id, at, |id, extent| {
                    found.push((id, extent));
                    found.len() < BATCH
                })?;
                Ok(found)
            })
            .await;
            let found = match page {
                Ok(found) => found,
                Err(error) => return self.unreadable("extents", error),
            };
            let Some((last_id, last)) = found.last() else { break };
            (id, at) = (*last_id, last.at.plus(1));
            for (id, extent) in &found {
                if owner.id != *id {
                    self.close_owner(&owner);
                    owner = self.open_owner(*id).await?;
                }
                self.check_extent(&mut owner, extent);
                match extent.kind {
                    Kind::Data => self.verify(*id, extent).await?,
                    Kind::Preallocated => self.report.preallocated_blocks += extent.len,
                    Kind::Inline => self.check_inline(&owner).await?,
                }
            }
            self.step("file data", self.report.data_blocks * BLOCK_SIZE as u64, total);
        }
        self.close_owner(&owner);
        self.check_kinds();
        Ok(())
    }

    /// Step 4: what the superblock says of the kinds of extents.
    fn check_kinds(&mut self) {
        let (stored, features) = {
            let meta = self.core.meta.lock();
            (meta.preallocated, meta.features)
        };
        let found = self.report.preallocated_blocks;
        if stored != found {
            self.report.problem(format!("{stored} blocks are counted as preallocated, there are {found}"));
        }
        for (feature, found, what) in [
            (superblock::FEATURE_PREALLOCATED, found, "preallocated blocks"),
            (superblock::FEATURE_INLINE, self.report.inline_files, "inline content"),
        ] {
            if found > 0 && features & feature == 0 {
                self.report.problem(format!("there is {what}, and the superblock lacks its feature flag"));
            }
        }
    }

    /// Step 4: inline content ends inside its file.
    async fn check_inline(&mut self, owner: &Owner) -> Result<()> {
        self.report.inline_files += 1;
        match transact(self.core, self.io, |t| extents::content(t, owner.id)).await {
            Ok(Some(content)) if content.len() as u64 <= owner.size || owner.unfinished => Ok(()),
            Ok(_) => {
                self.report.problem(format!("inode {}: inline content beyond its end", owner.id));
                Ok(())
            }
            Err(error) => self.unreadable("extents", error),
        }
    }

    async fn open_owner(&mut self, id: InodeId) -> Result<Owner> {
        let inode = match transact(self.core, self.io, |t| inodes::find(t, id)).await {
            Ok(inode) => inode,
            Err(error) => {
                self.unreadable("inodes", error)?;
                None
            }
        };
        match inode {
            Some(inode) => {
                let unfinished = self.orphans.contains_key(&id);
                Ok(Owner {
                    id,
                    size: inode.size,
                    counts: Some((inode.extents, inode.blocks)),
                    unfinished,
                    ..Owner::default()
                })
            }
            None => {
                self.report.problem(format!("extents of inode {id}, which is missing"));
                Ok(Owner { id, size: u64::MAX, ..Owner::default() })
            }
        }
    }

    fn close_owner(&mut self, owner: &Owner) {
        let found = (owner.extents, owner.blocks);
        // A file with work left is changed step by step; its counts follow each step once its inode is stored.
        if let Some(counts) = owner.counts.filter(|counts| *counts != found && !owner.unfinished) {
            self.report.problem(format!(
                "inode {} has {} extents with {} blocks and counts {} with {}",
                owner.id, found.0, found.1, counts.0, counts.1
            ));
        }
    }

    fn check_extent(&mut self, owner: &mut Owner, extent: &Extent) {
        let id = owner.id;
        if extent.at < owner.end {
            self.report.problem(format!("inode {id}: two extents at file block {}", extent.at));
        }
        let kept = owner.unfinished || extent.kind == Kind::Preallocated;
        if !kept && extent.end() > FileBlock::at_or_after(owner.size) {
            self.report.problem(format!("inode {id}: an extent at file block {} beyond its end", extent.at));
        }
        owner.end = extent.end();
        owner.extents += 1;
        owner.blocks += extent.blocks();
        self.report.extents += 1;
        if let Some(run) = extent.run() {
            self.report.data_blocks += if extent.kind == Kind::Data { run.len } else { 0 };
            self.reference(run, || format!("inode {id}"));
        }
    }

    /// Step 4: reads an extent and verifies its checksums.
    async fn verify(&mut self, id: InodeId, extent: &Extent) -> Result<()> {
        let mut done = 0;
        while done < extent.len {
            let len = (extent.len - done).min(READ_BLOCKS);
            let run = Run::new(extent.addr.plus(done), len);
            let at = extent.at.plus(done);
            done += len;
            let sums = match extent.checksum {
                Some(sum) => Ok(vec![Some(sum)]),
                None => transact(self.core, self.io, |t| checksums::find(t, run)).await,
            };
            let what = format!("inode {id} at byte {}", at.byte());
            match sums {
                Ok(sums) => match self.read(run).await {
                    Ok(data) => self.compare(&what, run, &sums, &data),
                    Err(error) => self.unreadable(&what, error)?,
                },
                Err(error) => self.unreadable(&what, error)?,
            }
        }
        Ok(())
    }

    async fn read(&self, run: Run) -> Result<bdev_adapter::DmaBuf> {
        let buf = self.io.buffer(run.len as usize * BLOCK_SIZE)?;
        let (result, bufs) = self.io.call(Request::read(self.core.locate(run.start), buf, 0)).await;
        result.map_err(|e| Error::io("reading file data", e))?;
        bufs.into_one().ok_or_else(|| Error::corrupt("the device lost a buffer"))
    }

    fn compare(&mut self, what: &str, run: Run, sums: &[Option<u32>], data: &[u8]) {
        for (i, (block, sum)) in data.chunks_exact(BLOCK_SIZE).zip(sums).enumerate() {
            let addr = run.start.plus(i as u64);
            match sum {
                None => self.report.problem(format!("{what}: block {addr} has no checksum")),
                Some(sum) if checksum32(block) != *sum => {
                    self.report.problem(format!("{what}: block {addr} does not have its checksum"));
                }
                Some(_) => self.report.verified_blocks += 1,
            }
        }
    }

    /// Step 5.
    async fn check_space(&mut self) -> Result<()> {
        let regions = self.core.meta.lock().alloc.regions();
        let mut used = 0;
        for region in (0..regions).map(RegionId) {
            let runs = transact(self.core, self.io, |t| {
                t.load_space(Need::Region(region))?;
                let runs: Vec<Run> = t.meta.alloc.used_runs(region)?.collect();
                if region.0.is_multiple_of(BATCH as u32) {
                    t.meta.alloc.evict_clean(BATCH);
                }
                Ok(runs)
            })
            .await;
            let runs = match runs {
                Ok(runs) => runs,
                Err(error) => {
                    self.unreadable(&format!("space record of region {}", region.0), error)?;
                    continue;
                }
            };
            used += self.compare_region(region, &runs);
            if region.0.is_multiple_of(BATCH as u32) {
                self.step("space", u64::from(region.0), Some(u64::from(regions)));
            }
        }
        let counts = self.core.meta.lock().alloc.counts();
        if counts.total - counts.free != used {
            let stored = counts.total - counts.free;
            self.report
                .problem(format!("{stored} blocks are counted as used, the region records have {used}"));
        }
        Ok(())
    }

    /// Compares a region's record with what was found; returns the blocks that it has as used.
    fn compare_region(&mut self, region: RegionId, runs: &[Run]) -> u64 {
        let mut used = 0;
        let mut both = 0;
        for run in runs {
            used += run.len;
            for addr in (run.start.0..run.end().0).map(BlockAddr) {
                if self.referenced.contains(addr) {
                    both += 1;
                } else {
                    self.report.leaked_blocks += 1;
                    self.report.problem(format!("block {addr} is held as used and nothing refers to it"));
                }
            }
        }
        let missing = self.referenced.count(region) - both;
        if missing > 0 {
            self.report.problem(format!("region {}: {missing} blocks in use are held as free", region.0));
        }
        used
    }
}

/// The file whose extents are being checked.
#[derive(Default)]
struct Owner {
    id: InodeId,
    size: u64,
    /// Extents and blocks by the inode.
    counts: Option<(u64, u64)>,
    /// It has work left.
    unfinished: bool,
    end: FileBlock,
    extents: u64,
    blocks: u64,
}
