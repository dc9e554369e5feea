//! Publication: what was prepared becomes what readers see and what the next commit has.
//!
//! One transaction for any number of ranges of any number of files, so that a crash sees all of it or nothing. Its steps:
//!
//! 1. plan the changes of the trees; nothing stops after that;
//! 2. for each file, let readers see all its new mappings, holes included, and its size, in one swap of its view; the mappings are
//!    pinned (rule 1: no loader and no eviction touches them while the tree still holds the old ones);
//! 3. put extents and checksums into the trees, free what was replaced;
//! 4. unpin, and finish the ordered extents.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::channel::io::Io;
use crate::core::Core;
use crate::error::Result;
use crate::file::FileInner;
use crate::ordered::Ordered;
use crate::pieces;
use crate::records::extents::{Content, Extent, Replacement, Span};
use crate::records::{checksums, extents};
use crate::store::Stored;
use crate::txn::{Stop, Txn, transact};
use crate::types::{FileBlock, Run};

/// What changes in one file. The ranges of all parts are disjoint.
pub(crate) struct Change {
    pub(crate) file: Arc<FileInner>,
    /// Written content.
    pub(crate) stored: SmallVec<[Stored; 1]>,
    /// The new inline content of block 0.
    pub(crate) inline: Option<Content>,
    /// Blocks that become the file's without content.
    pub(crate) promise: Option<Promise>,
    /// What is dropped.
    pub(crate) holes: SmallVec<[Span; 1]>,
    /// The file ends at this byte at least.
    pub(crate) size: u64,
    /// Write-back: so many pages were reserved for it. They are settled, and readers see nothing new.
    pub(crate) reserved: Option<u64>,
}

impl Change {
    /// A change of nothing.
    pub(crate) fn none(file: &Arc<FileInner>) -> Change {
        Change {
            file: Arc::clone(file),
            stored: SmallVec::new(),
            inline: None,
            promise: None,
            holes: SmallVec::new(),
            size: 0,
            reserved: None,
        }
    }

    /// A change of one range.
    pub(crate) fn one(file: &Arc<FileInner>, stored: Stored, size: u64) -> Change {
        Change { stored: SmallVec::from_buf([stored]), size, ..Change::none(file) }
    }

    /// A change of inline content.
    pub(crate) fn inline(file: &Arc<FileInner>, content: Content, size: u64) -> Change {
        Change { inline: Some(content), size, ..Change::none(file) }
    }
}

/// Blocks that were allocated to be preallocated: their metadata share is kept back from now on. Given back on drop.
pub(crate) struct Promise {
    core: Arc<Core>,
    /// Where in the file each run goes; in order.
    parts: Vec<(FileBlock, Run)>,
    ordered: Ordered,
    /// Blocks that count as about to be preallocated.
    blocks: u64,
}

impl Promise {
    /// Takes over the runs of `parts`, whose blocks were counted in `Meta::preallocating` as they were allocated.
    pub(crate) fn new(core: &Arc<Core>, parts: Vec<(FileBlock, Run)>) -> Promise {
        let ordered = Ordered::new(core, None, parts.iter().map(|(_, run)| *run).collect());
        let blocks = parts.iter().map(|(_, run)| run.len).sum();
        Promise { core: Arc::clone(core), parts, ordered, blocks }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if self.blocks > 0 {
            self.core.meta.lock().preallocating -= self.blocks;
        }
    }
}

impl Promise {
    /// The trees have them.
    fn finish(mut self) {
        self.blocks = 0;
        let none = Ordered::new(&self.core, None, Default::default());
        std::mem::replace(&mut self.ordered, none).finish();
    }
}

/// The plan for one file.
struct Plan {
    new: SmallVec<[Extent; 4]>,
    replace: Replacement,
}

/// See the module documentation. The caller holds the ranges, or owns the ordered extents that others wait for.
///
/// On failure nothing was changed, and the blocks are given back; what was reserved for them is reserved again.
pub(crate) async fn publish(core: &Arc<Core>, io: &Io, changes: SmallVec<[Change; 1]>) -> Result<()> {
    transact(core, io, |t| {
        let mut chunks = checksums::Plan::default();
        let mut plans = SmallVec::<[Plan; 1]>::new();
        for change in &changes {
            plans.push(plan(t, change, &mut chunks)?);
        }
        t.ready(plans.iter().map(|plan| plan.replace.len()).sum::<usize>() + chunks.len())?;
        for (change, plan) in changes.iter().zip(&plans) {
            apply(t, change, plan)?;
        }
        checksums::apply(t, &chunks)
    })
    .await?;
    for change in changes {
        change.stored.into_iter().for_each(Stored::finish);
        change.promise.into_iter().for_each(Promise::finish);
    }
    Ok(())
}

/// Step 1.
fn plan(t: &mut Txn<'_>, change: &Change, chunks: &mut checksums::Plan) -> Result<Plan, Stop> {
    let birth = t.generation();
    let mut new = SmallVec::<[Extent; 4]>::new();
    let mut spans: SmallVec<[Span; 1]> = change.holes.clone();
    for stored in &change.stored {
        new.extend(stored.records(birth));
        spans.push((stored.at(), stored.end()));
        for (run, sums) in stored.apart() {
            checksums::plan(t, chunks, run, sums)?;
        }
    }
    if change.inline.is_some() {
        new.push(Extent::inline(birth));
        spans.push((FileBlock(0), FileBlock(1)));
    }
    for (at, run) in change.promise.iter().flat_map(|promise| &promise.parts) {
        new.push(Extent::preallocated(*at, *run, birth));
        match spans.last_mut() {
            Some((_, end)) if end == at => *end = at.plus(run.len),
            _ => spans.push((*at, at.plus(run.len))),
        }
    }
    new.sort_unstable_by_key(|extent| extent.at);
    spans.sort_unstable();
    let replace = extents::replace(t, change.file.id, &spans, &new)?;
    let replace = replace.with_content(change.inline.clone().unwrap_or_default());
    Ok(Plan { new, replace })
}

/// Steps 2 to 4, but for the checksums in the tree.
fn apply(t: &mut Txn<'_>, change: &Change, plan: &Plan) -> Result<(), Stop> {
    let Change { file, stored, promise, size, reserved, .. } = change;
    for (run, sums) in stored.iter().flat_map(Stored::apart) {
        t.core.checksums.insert(run.start, sums);
    }
    let size_seen = reserved.is_none().then_some(*size);
    let published = pieces::publish(&file.map, &t.core.checksums, &plan.new, &plan.replace.holes, size_seen);
    plan.replace.apply(t)?;
    published.unpin(&file.map, &t.core.checksums);
    for stored in stored {
        t.published(stored.ordered());
    }
    if let Some(promise) = promise {
        t.published(&promise.ordered);
        t.meta.preallocating -= promise.blocks;
    }
    file.finished_up_to(*size);
    if let Some(pages) = reserved {
        // Blocks that were promised, and inline content, took none of what was reserved.
        let taken: u64 = stored.iter().map(|stored| stored.blocks() - stored.ordered().promised()).sum();
        t.meta.use_reserved(file, pages - taken);
        t.meta.settle_shares(file, *pages);
    }
    t.change_inode_quietly(file, |inode| {
        if reserved.is_none() {
            inode.touch();
        }
        inode.extents = inode.extents.wrapping_add_signed(plan.replace.extents);
        inode.blocks = inode.blocks.wrapping_add_signed(plan.replace.blocks);
    });
    Ok(())
}
