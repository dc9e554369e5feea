//! Lists of runs in chunks that are used again.
//!
//! A generation may free millions of runs. A list in one piece would be copied each time it doubles, and would grow into fresh
//! memory, which is a page fault every 256 runs: one allocation or free in a few hundred would wait for the one, now and then one
//! for milliseconds for the other.

use crate::types::Run;

/// Runs in a chunk: 64 KiB.
const CHUNK: usize = 4096;
/// Chunks kept for reuse: 32 MiB.
const SPARE_MAX: usize = 512;

/// Runs in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct RunList {
    /// None is empty, and all but the last are full.
    chunks: Vec<Vec<Run>>,
}

/// Emptied chunks.
#[derive(Debug, Default)]
pub(super) struct SpareChunks {
    chunks: Vec<Vec<Run>>,
}

impl RunList {
    /// Appends a run, or makes the last one longer if it ends where this one begins.
    pub(super) fn push(&mut self, run: Run, spare: &mut SpareChunks) {
        if let Some(chunk) = self.chunks.last_mut() {
            if let Some(last) = chunk.last_mut().filter(|last| last.end() == run.start) {
                last.len += run.len;
                return;
            }
            if chunk.len() < CHUNK {
                chunk.push(run);
                return;
            }
        }
        let mut chunk = spare.chunks.pop().unwrap_or_else(|| Vec::with_capacity(CHUNK));
        chunk.push(run);
        self.chunks.push(chunk);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Run> {
        self.chunks.iter().flatten().copied()
    }

    /// The chunks in order, for [`SpareChunks::put`] once they are done with.
    pub(super) fn into_chunks(self) -> impl Iterator<Item = Vec<Run>> {
        self.chunks.into_iter()
    }

    /// Bytes of memory.
    pub(super) fn memory(&self) -> usize {
        self.chunks.len() * CHUNK * size_of::<Run>()
    }
}

impl SpareChunks {
    pub(super) fn put(&mut self, mut chunk: Vec<Run>) {
        if self.chunks.len() < SPARE_MAX {
            chunk.clear();
            self.chunks.push(chunk);
        }
    }

    /// Bytes of memory.
    pub(super) fn memory(&self) -> usize {
        self.chunks.len() * CHUNK * size_of::<Run>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::BlockAddr;

    #[test]
    fn runs_come_back_in_order_and_chunks_are_used_again() {
        let (mut list, mut spare) = (RunList::default(), SpareChunks::default());
        assert!(list.is_empty());
        let apart = |i: usize| Run::new(BlockAddr(i as u64 * 10), 3);
        let count = 3 * CHUNK + 1;
        (0..count).for_each(|i| list.push(apart(i), &mut spare));
        assert!(list.iter().eq((0..count).map(apart)));
        assert_eq!((list.memory(), spare.memory()), (4 * CHUNK * size_of::<Run>(), 0));
        list.into_chunks().for_each(|chunk| spare.put(chunk));
        assert_eq!(spare.memory(), 4 * CHUNK * size_of::<Run>());

        // What continues the last run is part of it, also where a chunk is full.
        let mut list = RunList::default();
        for i in 0..CHUNK {
            list.push(Run::new(BlockAddr(i as u64 * 10), 3), &mut spare);
            list.push(Run::new(BlockAddr(i as u64 * 10 + 3), 2), &mut spare);
        }
        assert!(list.iter().eq((0..CHUNK).map(|i| Run::new(BlockAddr(i as u64 * 10), 5))));
        assert_eq!(spare.memory(), 3 * CHUNK * size_of::<Run>());
    }

    #[test]
    fn few_chunks_are_kept() {
        let mut spare = SpareChunks::default();
        (0..SPARE_MAX + 5).for_each(|_| spare.put(Vec::with_capacity(CHUNK)));
        assert_eq!(spare.memory(), SPARE_MAX * CHUNK * size_of::<Run>());
    }
}
