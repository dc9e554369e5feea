//! Ordered extents: device blocks between their allocation and the entry of their content in the metadata tree.
//!
//! Invariant: an ordered extent ends exactly once: [`finish`](Ordered::finish) when the trees refer to its blocks, or drop,
//! which gives the blocks back (nothing refers to them, so they may be used again at once). Blocks that were promised to the file
//! before (preallocated) stay with it: its record names them all the time. The direct write of this version
//! holds the range lock over the whole life of its ordered extent, so nobody else has to find and wait for it.

use std::sync::Arc;

use smallvec::SmallVec;

use crate::core::Core;
use crate::types::Run;

/// Runs as an allocation yields them.
pub(crate) type Runs = SmallVec<[Run; 4]>;

/// See the module documentation.
pub(crate) struct Ordered {
    core: Arc<Core>,
    runs: Runs,
    /// Those of `runs`, in the same order, that were the file's before.
    promised: Runs,
    /// The device epoch before anything was written to them.
    epoch: u64,
}

impl Ordered {
    /// Takes over freshly allocated `runs`.
    pub(crate) fn new(core: &Arc<Core>, runs: Runs) -> Ordered {
        Ordered::with_promised(core, runs, Runs::new())
    }

    /// Takes over `runs`, of which `promised` (in the same order) were preallocated for the file.
    pub(crate) fn with_promised(core: &Arc<Core>, runs: Runs, promised: Runs) -> Ordered {
        Ordered { core: Arc::clone(core), runs, promised, epoch: core.device.epoch() }
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The trees refer to the blocks now.
    pub(crate) fn finish(mut self) {
        self.runs.clear();
    }
}

impl Drop for Ordered {
    fn drop(&mut self) {
        let mut promised = self.promised.iter().peekable();
        self.runs.retain(|run| promised.next_if(|promised| *promised == run).is_none());
        if !self.runs.is_empty() {
            self.core.give_back(&self.runs);
        }
    }
}
