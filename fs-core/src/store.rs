//! Content on its way to the device: blocks are allocated, checksummed while they are hot, and written. Nothing refers to them yet.
//!
//! Invariant: the blocks belong to an [`Ordered`] extent from their allocation on. Whatever fails, its drop gives them back.

use std::sync::Arc;

use bdev_adapter::{Request, Segments};
use smallvec::SmallVec;

use crate::alloc::Stream;
use crate::channel::io::{Io, IoHandle};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::file::FileInner;
use crate::ordered::{Ordered, Runs, Slot};
use crate::pieces;
use crate::records::extents::{self, Extent, Kind, Span};
use crate::superblock::checksum32;
use crate::txn::{Room, Stop, Txn, transact};
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock, Generation, Run};

/// Finds blocks for what is to be written to `[at, at + blocks)` of a file. The caller holds that range exclusively, and there is
/// no other ordered extent in it. Blocks that were preallocated there serve themselves, which asks for no space; for the
/// rest blocks are allocated.
///
/// To write to them in place is sound: until publication the trees say that they were never written, so a crash shows zeroes,
/// and so does a reader.
pub(crate) async fn place(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    at: FileBlock,
    blocks: u64,
    room: fn(u64) -> Room,
) -> Result<Ordered> {
    let mut slot = None;
    let (runs, promised) = transact(core, io, |t| {
        slot.get_or_insert_with(|| Slot::register(core, file, at, blocks));
        let kept = promised(t, file, at, at.plus(blocks))?;
        let fresh = blocks - blocks_of(&kept);
        t.check_room(if fresh == 0 { Room::Promised } else { room(fresh) })?;
        let runs = t.allocate(Stream::Data, fresh)?;
        Ok(fill_gaps(t, (at, at.plus(blocks)), runs, &kept))
    })
    .await?;
    Ok(Ordered::new(core, slot.as_ref(), runs).with_promised(promised))
}

/// The same for several spans of a file that are written back: what is allocated comes from what the file has reserved. `slot` has
/// them.
pub(crate) async fn place_reserved(
    core: &Arc<Core>,
    io: &Io,
    slot: &Arc<Slot>,
    spans: &[Span],
) -> Result<SmallVec<[Ordered; 1]>> {
    let placed = transact(core, io, |t| {
        let mut kept = SmallVec::<[_; 1]>::new();
        let mut fresh = SmallVec::<[u64; 4]>::new();
        for (at, end) in spans {
            let promised = promised(t, slot.file(), *at, *end)?;
            fresh.push(end.0 - at.0 - blocks_of(&promised));
            kept.push(promised);
        }
        let all = t.allocate_reserved(slot.file(), &fresh)?;
        let spans = spans.iter().zip(all).zip(&kept);
        Ok(spans.map(|((span, runs), kept)| fill_gaps(t, *span, runs, kept)).collect::<SmallVec<[_; 1]>>())
    })
    .await?;
    let ordered =
        |(runs, promised)| Ordered::new(core, Some(slot), runs).with_promised(promised).with_reserved();
    Ok(placed.into_iter().map(ordered).collect())
}

fn blocks_of(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len).sum()
}

/// Lets fresh `runs` fill what `kept` leaves of a span. All runs in the order of the file; and those of `kept`.
fn fill_gaps(t: &mut Txn<'_>, (at, end): Span, runs: Runs, kept: &[Extent]) -> (Runs, Runs) {
    if kept.is_empty() {
        return (runs, Runs::new());
    }
    let gaps = gaps(at, end, kept);
    let cut = t.cut(runs, gaps.iter().map(|(_, len)| *len));
    weave(&gaps, &cut, kept)
}

/// The preallocated parts of `[at, end)`.
fn promised(
    t: &mut Txn<'_>,
    file: &FileInner,
    at: FileBlock,
    end: FileBlock,
) -> Result<SmallVec<[Extent; 4]>, Stop> {
    if t.meta.preallocated == 0 || !pieces::may_be_preallocated(&file.map, at, end) {
        return Ok(SmallVec::new());
    }
    let found = extents::overlapping(t, file.id, at, end, usize::MAX)?;
    let promised = found.iter().filter(|extent| extent.kind == Kind::Preallocated);
    Ok(promised.map(|extent| extent.clip(at, end)).collect())
}

/// What `kept` (in order, inside) leaves of `[at, end)`: first block and length of each gap.
fn gaps(at: FileBlock, end: FileBlock, kept: &[Extent]) -> SmallVec<[(FileBlock, u64); 4]> {
    let mut gaps = SmallVec::new();
    let mut from = at;
    for (start, next) in kept.iter().map(|e| (e.at, e.end())).chain([(end, end)]) {
        if from < start {
            gaps.push((from, start.0 - from.0));
        }
        from = next;
    }
    gaps
}

/// The runs of gaps and kept extents in the order of the file; and those of the kept ones.
fn weave(gaps: &[(FileBlock, u64)], cut: &[(usize, Run)], kept: &[Extent]) -> (Runs, Runs) {
    let mut fresh = cut.iter().peekable();
    let mut gaps = gaps.iter().enumerate().peekable();
    let (mut runs, mut promised) = (Runs::new(), Runs::new());
    let mut fill = |runs: &mut Runs, before: Option<FileBlock>| {
        while let Some((index, _)) = gaps.next_if(|(_, (at, _))| before.is_none_or(|before| *at < before)) {
            while let Some((_, run)) = fresh.next_if(|(gap, _)| *gap == index) {
                runs.push(*run);
            }
        }
    };
    for extent in kept {
        fill(&mut runs, Some(extent.at));
        let run = Run::new(extent.addr, extent.len);
        runs.push(run);
        promised.push(run);
    }
    fill(&mut runs, None);
    (runs, promised)
}

/// Blocks of a file that are on the device, and that nothing refers to yet.
pub(crate) struct Stored {
    at: FileBlock,
    ordered: Ordered,
    /// One for each block.
    sums: Vec<u32>,
}

impl Stored {
    /// First block in the file.
    pub(crate) fn at(&self) -> FileBlock {
        self.at
    }

    /// The block behind the last.
    pub(crate) fn end(&self) -> FileBlock {
        self.at.plus(self.sums.len() as u64)
    }

    /// The extent records: one for each run; a run of one block carries its checksum.
    pub(crate) fn records(&self, birth: Generation) -> impl Iterator<Item = Extent> {
        self.parts().map(move |(at, run, sums)| {
            let checksum = if let [only] = sums { Some(*only) } else { None };
            Extent { at, len: run.len, kind: Kind::Data, addr: run.start, checksum, birth }
        })
    }

    /// The runs whose checksums are kept apart from their records, with these.
    pub(crate) fn apart(&self) -> impl Iterator<Item = (Run, &[u32])> {
        self.parts().filter(|(_, run, _)| run.len > 1).map(|(_, run, sums)| (run, sums))
    }

    /// Its runs: where each lies in the file, and the checksums of its blocks.
    fn parts(&self) -> impl Iterator<Item = (FileBlock, Run, &[u32])> {
        let mut done = 0;
        self.ordered.runs().iter().map(move |run| {
            let from = done;
            done += run.len as usize;
            (self.at.plus(from as u64), *run, &self.sums[from..done])
        })
    }

    /// How many blocks it has.
    pub(crate) fn blocks(&self) -> u64 {
        self.sums.len() as u64
    }

    pub(crate) fn ordered(&self) -> &Ordered {
        &self.ordered
    }

    /// The trees refer to the blocks now.
    pub(crate) fn finish(self) {
        self.ordered.finish();
    }
}

/// Writes the whole blocks of `bufs`, which go to file block `at`, to the blocks of `ordered`.
pub(crate) async fn store(
    core: &Arc<Core>,
    io: &Io,
    at: FileBlock,
    ordered: Ordered,
    bufs: impl Into<Segments>,
) -> (Result<Stored>, Segments) {
    send(core, io, at, ordered, bufs).finish().await
}

/// [`store`] without waiting: what was sent, to be [finished](Sent::finish). So many may be on their way together.
pub(crate) fn send(
    core: &Arc<Core>,
    io: &Io,
    at: FileBlock,
    ordered: Ordered,
    bufs: impl Into<Segments>,
) -> Sent {
    let mut bufs = bufs.into();
    let sums = bufs.chunks(BLOCK_SIZE).map(checksum32).collect();
    let mut handles = SmallVec::new();
    core.stats.wrote_data(bufs.len());
    for run in ordered.runs() {
        let rest = bufs.split_off((run.len as usize) << BLOCK_SHIFT);
        handles.push(io.send(Request::write(core.locate(run.start), bufs, 0)));
        bufs = rest;
    }
    Sent { stored: Stored { at, ordered, sums }, handles, rest: bufs }
}

/// Content that the device is writing.
pub(crate) struct Sent {
    stored: Stored,
    handles: SmallVec<[IoHandle; 4]>,
    /// What is left of the buffers: nothing.
    rest: Segments,
}

impl Sent {
    /// Waits for the device. On failure the ordered extent gives its blocks back. The buffers come back in any case.
    pub(crate) async fn finish(self) -> (Result<Stored>, Segments) {
        let mut outcome = Ok(());
        let mut whole = Segments::None;
        for handle in self.handles {
            let (result, bufs) = handle.await;
            outcome = outcome.and(result.map_err(|error| Error::io("writing file data", error)));
            whole.append(bufs);
        }
        whole.append(self.rest);
        let stored = self.stored;
        (outcome.map(|()| stored), whole)
    }
}
