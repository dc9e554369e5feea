//! Loading: from the metadata trees into the caches that reads use.
//!
//! Rule 1 (no loader brings back the past): the version of the file's map is noted before the tree is read, and the map refuses
//! what an overlapping change has overtaken since; then the reader looks again.

use std::sync::Arc;

use crate::channel::io::Io;
use crate::core::Core;
use crate::error::Result;
use crate::file;
use crate::file::FileInner;
use crate::mutation::{Mutation, Point, broken, reached};
use crate::pieces::{self, Piece};
use crate::records::{checksums, extents};
use crate::txn::{Stop, transact};
use crate::types::{BlockAddr, FileBlock, Run};

/// Extent records that are loaded at once.
const BATCH: usize = 128;

/// Loads the extents around `at` into the map of `file`.
pub(crate) async fn extents(core: &Arc<Core>, io: &Io, file: &Arc<FileInner>, at: FileBlock) -> Result<()> {
    let end_of_file = FileBlock(file::FILE_BLOCKS_MAX);
    let late = transact(core, io, |t| {
        let ticket = file.map.load_ticket();
        let found = extents::overlapping(t, file.id, at, end_of_file, BATCH)?;
        let end = match found.last() {
            Some(last) if found.len() == BATCH => last.end(),
            _ => end_of_file,
        };
        if broken(Mutation::LoadInTwoSteps) || broken(Mutation::TicketAfterTheTree) {
            return Ok(Some((ticket, end, found)));
        }
        // Still under the metadata lock: the blocks whose checksums go to the cache cannot be given to others meanwhile.
        pieces::load(&file.map, ticket, at, end, &found, &core.checksums).map_err(Stop::Fail)?;
        Ok(None)
    })
    .await?;
    let Some((mut ticket, end, found)) = late else { return Ok(()) };
    reached(Point::TreeRead);
    if broken(Mutation::TicketAfterTheTree) {
        ticket = file.map.load_ticket();
    }
    pieces::load(&file.map, ticket, at, end, &found, &core.checksums)
}

/// The stored checksums of `piece`, which are put into the cache.
///
/// The piece may stand for several records that continue each other on the device, some with their checksum in them, so the
/// records are asked first, and the checksum tree for the rest. A block without a stored checksum yields none.
pub(crate) async fn checksums(
    core: &Arc<Core>,
    io: &Io,
    file: &Arc<FileInner>,
    piece: &Piece,
) -> Result<Vec<Option<u32>>> {
    let run = Run::new(piece.addr, piece.len);
    transact(core, io, |t| {
        let stored = checksums::find(t, run)?;
        let mut sums = vec![None; stored.len()];
        for extent in extents::overlapping(t, file.id, piece.at, piece.end(), usize::MAX)? {
            let part = extent.clip(piece.at, piece.end());
            let index = (part.at.0 - piece.at.0) as usize;
            // A record that lies elsewhere is newer than the piece: its blocks are held and not referred to any more, and what is stored for
            // them may be of an earlier use.
            if part.addr == piece.addr.plus(index as u64) {
                let behind = index + part.len as usize;
                sums[index..behind].copy_from_slice(&stored[index..behind]);
                if extent.checksum.is_some() {
                    sums[index] = extent.checksum;
                }
            }
        }
        // Under the metadata lock, like every change of checksums: the cache never gets older ones than the tree has.
        cache(core, run.start, &sums);
        Ok(sums)
    })
    .await
}

fn cache(core: &Core, first: BlockAddr, sums: &[Option<u32>]) {
    let mut at = 0;
    while at < sums.len() {
        let known: Vec<u32> = sums[at..].iter().map_while(|s| *s).collect();
        if !known.is_empty() {
            core.checksums.fill(first.plus(at as u64), &known);
        }
        at += known.len() + 1;
    }
}
