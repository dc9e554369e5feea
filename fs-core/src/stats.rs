//! What a mount has done, counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of a mount since it was mounted, and sizes at this moment. Bytes unless said otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// File data read from the device.
    pub data_read_bytes: u64,
    /// File data written to the device.
    pub data_written_bytes: u64,
    /// Metadata nodes read.
    pub metadata_read_bytes: u64,
    /// Metadata nodes written.
    pub metadata_written_bytes: u64,
    /// Superblocks written.
    pub superblock_written_bytes: u64,
    /// Flushes sent to the device.
    pub flushes: u64,
    /// Commits.
    pub commits: u64,
    /// Reads that were repeated after an error or a wrong checksum.
    pub repeated_reads: u64,
    /// Node cache: lookups that found the node in memory.
    pub node_cache_hits: u64,
    /// Node cache: lookups that had to wait for the device.
    pub node_cache_misses: u64,
    /// Node cache: memory.
    pub node_cache_bytes: u64,
    /// Nodes that the next commit will write.
    pub dirty_nodes: u64,
    /// Extent maps of open files: memory.
    pub extent_map_bytes: u64,
    /// Cached checksums: memory.
    pub checksum_cache_bytes: u64,
}

/// The counters behind [`Stats`]. Relaxed: each stands alone.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    data_read: AtomicU64,
    data_written: AtomicU64,
    metadata_read: AtomicU64,
    metadata_written: AtomicU64,
    superblock_written: AtomicU64,
    flushes: AtomicU64,
    commits: AtomicU64,
    repeated_reads: AtomicU64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn read_data(&self, bytes: u64) {
        add(&self.data_read, bytes);
    }

    pub(crate) fn wrote_data(&self, bytes: u64) {
        add(&self.data_written, bytes);
    }

    pub(crate) fn read_metadata(&self, bytes: u64) {
        add(&self.metadata_read, bytes);
    }

    pub(crate) fn wrote_metadata(&self, bytes: u64) {
        add(&self.metadata_written, bytes);
    }

    pub(crate) fn wrote_superblock(&self, bytes: u64) {
        add(&self.superblock_written, bytes);
    }

    pub(crate) fn flushed(&self) {
        add(&self.flushes, 1);
    }

    pub(crate) fn committed(&self) {
        add(&self.commits, 1);
    }

    pub(crate) fn repeated_read(&self) {
        add(&self.repeated_reads, 1);
    }

    /// The counters as they are; the sizes are filled in by the caller.
    pub(crate) fn snapshot(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            data_read_bytes: get(&self.data_read),
            data_written_bytes: get(&self.data_written),
            metadata_read_bytes: get(&self.metadata_read),
            metadata_written_bytes: get(&self.metadata_written),
            superblock_written_bytes: get(&self.superblock_written),
            flushes: get(&self.flushes),
            commits: get(&self.commits),
            repeated_reads: get(&self.repeated_reads),
            ..Stats::default()
        }
    }
}
