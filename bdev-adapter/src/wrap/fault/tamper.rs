//! What is done to the data of a read: bits that rotted, content that is out of date.

use hashbrown::HashMap;

use super::history::{Block, History};
use crate::Segments;
use crate::wrap::random::mix;

/// Blocks that may be rotten at a time; beyond it no more begin to rot.
const ROTTEN_MAX: usize = 1 << 20;
/// Bits of a block that are flipped at most.
const FLIPS_MAX: u64 = 3;

/// The rotten blocks of a device: each with the seed of the bits that are flipped in it. A block reads rotten the same way
/// until it is changed.
#[derive(Debug, Default)]
pub(super) struct Rot(HashMap<u64, u64>);

impl Rot {
    /// Lets a block rot; one that is rotten already stays as it is.
    pub(super) fn begin(&mut self, block: u64, seed: u64) {
        if self.0.len() < ROTTEN_MAX {
            self.0.entry(block).or_insert(seed);
        }
    }

    /// New content is written: these blocks are whole again.
    pub(super) fn heal(&mut self, blocks: std::ops::Range<u64>) {
        if self.0.is_empty() {
            return;
        }
        if blocks.end - blocks.start > self.0.len() as u64 {
            self.0.retain(|block, _| !blocks.contains(block));
        } else {
            for block in blocks {
                self.0.remove(&block);
            }
        }
    }

    pub(super) fn heal_all(&mut self) {
        self.0.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// What is to be done to the data of one read when it arrives: by block of the request.
#[derive(Debug, Default)]
pub(super) struct Tamper {
    stale: Vec<(u64, Block)>,
    /// Blocks and seeds.
    rot: Vec<(u64, u64)>,
}

impl Tamper {
    /// What is out of date in a read of `blocks`: all of them whose previous content is known.
    pub(super) fn stale(history: &History, blocks: std::ops::Range<u64>) -> Tamper {
        let first = blocks.start;
        let stale = blocks.filter_map(|block| Some((block - first, history.previous(block)?.clone())));
        Tamper { stale: stale.collect(), rot: Vec::new() }
    }

    pub(super) fn add_rot(&mut self, rot: &Rot, blocks: std::ops::Range<u64>) {
        if !rot.0.is_empty() {
            let first = blocks.start;
            self.rot.extend(blocks.filter_map(|block| Some((block - first, *rot.0.get(&block)?))));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.stale.is_empty() && self.rot.is_empty()
    }

    /// Changes the data that was read.
    pub(super) fn apply(&self, bufs: &mut Segments, block_size: usize) {
        for (block, content) in &self.stale {
            if let Some(bytes) = block_of(bufs, *block, block_size) {
                bytes.copy_from_slice(content);
            }
        }
        for (block, seed) in &self.rot {
            if let Some(bytes) = block_of(bufs, *block, block_size) {
                flip(bytes, *seed);
            }
        }
    }
}

/// A block of a scatter list; the contract lets no block lie in two buffers.
fn block_of(bufs: &mut Segments, block: u64, block_size: usize) -> Option<&mut [u8]> {
    let mut at = usize::try_from(block).ok()?.checked_mul(block_size)?;
    for buf in bufs.as_mut_slice() {
        if at < buf.len() {
            return buf.get_mut(at..at + block_size);
        }
        at -= buf.len();
    }
    None
}

/// Flips one to [`FLIPS_MAX`] different bits.
fn flip(bytes: &mut [u8], seed: u64) {
    let bits = bytes.len() as u64 * 8;
    // An odd step: up to `bits` (a power of two), no bit comes twice.
    let (first, step) = (mix(seed), mix(seed ^ 1) | 1);
    for number in 0..1 + seed % FLIPS_MAX {
        let bit = first.wrapping_add(step.wrapping_mul(number)) % bits;
        bytes[(bit / 8) as usize] ^= 1 << (bit % 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_to_three_bits_flip_and_the_same_ones_each_time() {
        let mut counts = [0; 4];
        for seed in 0..1000 {
            let mut bytes = [0u8; 512];
            flip(&mut bytes, mix(seed));
            counts[bytes.iter().map(|byte| byte.count_ones() as usize).sum::<usize>()] += 1;
            flip(&mut bytes, mix(seed));
            assert_eq!(bytes, [0; 512]);
        }
        assert_eq!(counts[0], 0);
        assert!(counts[1..].iter().all(|count| *count > 200), "{counts:?}");
    }
}
