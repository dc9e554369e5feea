//! Publication: stored content becomes what readers see and what the next commit has.
//!
//! One transaction for any number of ranges of any number of files, so that a crash sees all of it or nothing. Its steps:
//!
//! 1. plan the changes of the trees; nothing stops after that;
//! 2. for each file, let readers see all its new mappings and its size, in one swap of its view; the mappings are pinned (rule 1:
//!    no loader and no eviction touches them while the tree still holds the old ones);
//! 3. put extents and checksums into the trees, free what was replaced;
//! 4. unpin, and finish the ordered extents.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::channel::io::Io;
use crate::core::Core;
use crate::error::Result;
use crate::file::FileInner;
use crate::pieces;
use crate::records::extents::{Extent, Replacement};
use crate::records::{checksums, extents};
use crate::store::Stored;
use crate::txn::{Stop, Txn, transact};

/// What changes in one file.
pub(crate) struct Change {
    pub(crate) file: Arc<FileInner>,
    /// Disjoint, in order.
    pub(crate) stored: SmallVec<[Stored; 1]>,
    /// The file ends at this byte at least.
    pub(crate) size: u64,
}

impl Change {
    /// A change of one range.
    pub(crate) fn one(file: &Arc<FileInner>, stored: Stored, size: u64) -> Change {
        Change { file: Arc::clone(file), stored: SmallVec::from_buf([stored]), size }
    }
}

/// The plan for one file.
struct Plan {
    new: SmallVec<[Extent; 4]>,
    replace: Replacement,
}

/// See the module documentation. The caller holds the ranges, or owns the ordered extents that others wait for.
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
    for stored in changes.into_iter().flat_map(|change| change.stored) {
        stored.finish();
    }
    Ok(())
}

/// Step 1.
fn plan(t: &mut Txn<'_>, change: &Change, chunks: &mut checksums::Plan) -> Result<Plan, Stop> {
    let birth = t.generation();
    let mut new = SmallVec::new();
    let mut ranges = SmallVec::<[_; 1]>::new();
    for stored in &change.stored {
        new.extend(stored.records(birth));
        ranges.push((stored.at(), stored.end()));
        for (run, sums) in stored.apart() {
            checksums::plan(t, chunks, run, sums)?;
        }
    }
    let replace = extents::replace(t, change.file.id, &ranges, &new)?;
    Ok(Plan { new, replace })
}

/// Steps 2 to 4, but for the checksums in the tree.
fn apply(t: &mut Txn<'_>, change: &Change, plan: &Plan) -> Result<(), Stop> {
    let Change { file, stored, size } = change;
    for (run, sums) in stored.iter().flat_map(Stored::apart) {
        t.core.checksums.insert(run.start, sums);
    }
    let grown = (*size > file.size()).then_some(*size);
    let published = pieces::publish(&file.map, &plan.new, grown);
    plan.replace.apply(t)?;
    published.unpin(&file.map, &t.core.checksums);
    for stored in stored {
        t.published(stored.ordered());
    }
    t.change_inode(file, |inode| {
        inode.size = inode.size.max(*size);
        inode.extents = inode.extents.wrapping_add_signed(plan.replace.extents);
        inode.blocks = inode.blocks.wrapping_add_signed(plan.replace.blocks);
    });
    Ok(())
}
