//! What is done when the device was reset (a controller reset, a connection that was lost) while a generation was open: its
//! volatile cache may be gone, and with it writes that were answered and not flushed.
//!
//! Metadata nodes are still in memory, and are written again. File data is not, but its checksums are: every extent that
//! was written in the generation is read back ([`data`]). What reads right is in the device now, so a flush in the
//! device's present epoch makes it durable. If something does not, the commit fails, and the mount turns read-only: the last
//! durable state stays as it is.
//!
//! All extents of a generation, and their checksums, are in leaves that changed in it, which the commit has in memory.

use std::collections::VecDeque;
use std::sync::Arc;

use bdev_adapter::Request;
use hashbrown::HashMap;

use crate::channel::io::{Io, IoHandle};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::records::extents::Extent;
use crate::records::{TreeKind, checksums, extents};
use crate::superblock::checksum32;
use crate::tree::Node;
use crate::txn::{Limits, Stop};
use crate::types::{BLOCK_SIZE, BlockAddr, FileBlock, Generation, InodeId};

/// Largest single read, in blocks.
const READ_BLOCKS: u64 = 64;
/// Reads in flight.
const READS_IN_FLIGHT: usize = 32;

/// Reads back all file data that was written in `generation`, whose new nodes are `nodes`.
///
/// # Errors
/// [`Error::DataLost`] for data that is lost, and what the device answers.
pub(crate) async fn data(
    core: &Arc<Core>,
    io: &Io,
    generation: Generation,
    nodes: &[(BlockAddr, Arc<Node>)],
) -> Result<()> {
    let written = written_in(core.limits(), generation, nodes).map_err(|stop| match stop {
        Stop::Fail(error) => error,
        _ => Error::corrupt("a leaf that was just made is not in memory"),
    })?;
    let blocks: u64 = written.iter().map(|written| written.extent.len).sum();
    log::warn!(
        "{}: the device was reset: reading {blocks} blocks of generation {generation} back",
        core.device.name()
    );
    let mut in_flight: VecDeque<(IoHandle, Part<'_>)> = VecDeque::new();
    for written in &written {
        let mut done = 0;
        while done < written.extent.len {
            let len = (written.extent.len - done).min(READ_BLOCKS);
            let buf = io.buffer(len as usize * BLOCK_SIZE)?;
            let handle = io.send(Request::read(core.locate(written.extent.addr.plus(done)), buf, 0));
            let sums = &written.sums[done as usize..(done + len) as usize];
            in_flight
                .push_back((handle, Part { inode: written.inode, at: written.extent.at.plus(done), sums }));
            done += len;
            if in_flight.len() >= READS_IN_FLIGHT {
                verify_first(core, &mut in_flight).await?;
            }
        }
    }
    while !in_flight.is_empty() {
        verify_first(core, &mut in_flight).await?;
    }
    Ok(())
}

/// A part of an extent that is being read back.
struct Part<'a> {
    inode: InodeId,
    at: FileBlock,
    sums: &'a [u32],
}

async fn verify_first(core: &Core, in_flight: &mut VecDeque<(IoHandle, Part<'_>)>) -> Result<()> {
    let Some((handle, part)) = in_flight.pop_front() else { return Ok(()) };
    let (result, bufs) = handle.await;
    result.map_err(|e| Error::io("reading file data back after a reset of the device", e))?;
    let buf = bufs.into_one().ok_or_else(|| Error::corrupt("the device lost a buffer"))?;
    for (i, (block, sum)) in buf.chunks_exact(BLOCK_SIZE).zip(part.sums).enumerate() {
        if checksum32(block) != *sum {
            let error = Error::DataLost { inode: part.inode, offset: part.at.plus(i as u64).byte() };
            log::error!("{}: {error}", core.device.name());
            return Err(error);
        }
    }
    Ok(())
}

/// An extent, with a checksum for each of its blocks.
struct Written {
    inode: InodeId,
    extent: Extent,
    sums: Vec<u32>,
}

/// The extents that were written in `generation`.
fn written_in(
    limits: Limits,
    generation: Generation,
    nodes: &[(BlockAddr, Arc<Node>)],
) -> Result<Vec<Written>, Stop> {
    let leaves = |kind: TreeKind| {
        nodes.iter().map(|(_, node)| node).filter(move |node| node.is_leaf() && node.tree() == kind.id())
    };
    let mut chunks: HashMap<u64, checksums::Chunk> = HashMap::new();
    for leaf in leaves(TreeKind::Checksums) {
        for i in 0..leaf.len() {
            let (number, chunk) = checksums::parse(leaf.key(i).to_buf().as_slice(), leaf.value(i))?;
            chunks.insert(number, chunk);
        }
    }
    let mut written = Vec::new();
    for leaf in leaves(TreeKind::Extents) {
        for i in 0..leaf.len() {
            let (inode, extent) = extents::parse(limits, leaf.key(i).to_buf().as_slice(), leaf.value(i))?;
            if extent.birth != generation || extent.kind != extents::Kind::Data {
                continue;
            }
            let sums = match extent.checksum {
                Some(sum) => vec![sum],
                None => {
                    let sum = |addr: u64| {
                        chunks
                            .get(&(addr / checksums::CHUNK))
                            .and_then(|chunk| chunk.sum(addr % checksums::CHUNK))
                    };
                    (extent.addr.0..extent.addr.0 + extent.len)
                        .map(|addr| {
                            sum(addr).ok_or_else(|| {
                                Stop::corrupt(format!("block {addr} was written and has no checksum"))
                            })
                        })
                        .collect::<Result<_, Stop>>()?
                }
            };
            written.push(Written { inode, extent, sums });
        }
    }
    Ok(written)
}
