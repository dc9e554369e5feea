//! Content on its way to the device: blocks are allocated, checksummed while they are hot, and written. Nothing refers to them yet.
//!
//! Invariant: the blocks belong to an [`Ordered`] extent from their allocation on. Whatever fails, its drop gives them back.

use std::sync::Arc;

use bdev_adapter::{DmaBuf, Request};
use smallvec::SmallVec;

use crate::alloc::Stream;
use crate::channel::io::Io;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::ordered::Ordered;
use crate::records::extents::Extent;
use crate::superblock::checksum32;
use crate::txn::{Room, transact};
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, FileBlock, Generation, Run};

/// Allocates `blocks` blocks for file data, as one or several runs.
pub(crate) async fn allocate(core: &Arc<Core>, io: &Io, blocks: u64, room: Room) -> Result<Ordered> {
    let runs = transact(core, io, |t| {
        t.check_room(room)?;
        t.allocate(Stream::Data, blocks)
    })
    .await?;
    Ok(Ordered::new(core, runs))
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
            Extent { at, len: run.len, addr: run.start, checksum, birth }
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

    pub(crate) fn ordered(&self) -> &Ordered {
        &self.ordered
    }

    /// The trees refer to the blocks now.
    pub(crate) fn finish(self) {
        self.ordered.finish();
    }
}

/// Writes the whole blocks of `buf`, which go to file block `at`, to the blocks of `ordered`.
pub(crate) async fn store(
    core: &Arc<Core>,
    io: &Io,
    at: FileBlock,
    ordered: Ordered,
    buf: DmaBuf,
) -> (Result<Stored>, DmaBuf) {
    let sums = buf.chunks_exact(BLOCK_SIZE).map(checksum32).collect();
    let (result, buf) = send_all(core, io, ordered.runs(), buf).await;
    // On failure the ordered extent gives its blocks back on drop.
    (result.map(|()| Stored { at, ordered, sums }), buf)
}

async fn send_all(core: &Arc<Core>, io: &Io, runs: &[Run], mut buf: DmaBuf) -> (Result<()>, DmaBuf) {
    let mut handles = SmallVec::<[_; 4]>::new();
    core.stats.wrote_data(buf.len() as u64);
    for run in runs {
        let rest = buf.split_off((run.len as usize) << BLOCK_SHIFT);
        handles.push(io.send(Request::write(core.locate(run.start), buf, 0)));
        buf = rest;
    }
    let mut outcome = Ok(());
    let mut whole = None;
    for handle in handles {
        let (result, bufs) = handle.await;
        if let (Err(error), true) = (result, outcome.is_ok()) {
            outcome = Err(Error::io("writing file data", error));
        }
        if let Some(piece) = bufs.into_one() {
            whole = Some(join(whole, piece));
        }
    }
    (outcome, join(whole, buf))
}

/// Puts a buffer together again that was cut in two.
pub(crate) fn join(front: Option<DmaBuf>, back: DmaBuf) -> DmaBuf {
    match front {
        None => back,
        Some(mut front) => {
            let joined = front.unsplit(back);
            debug_assert!(joined.is_ok(), "the parts of a buffer do not follow each other");
            front
        }
    }
}
