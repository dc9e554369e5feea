//! What a mount has done, counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

use crate::sync::Mutex;

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
    /// Page cache: memory.
    pub page_cache_bytes: u64,
    /// Bytes accepted by buffered writes that are not on the device yet.
    pub dirty_bytes: u64,
    /// Writes that have blocks and are not in the metadata yet.
    pub ordered_extents: u64,
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
    /// Counters of channels for what they read the short way, so that such reads write nothing shared.
    of_channels: Mutex<Vec<Arc<CachePadded<AtomicU64>>>>,
}

/// Bytes of file data that one channel has read the short way. Added to by one thread at a time.
#[derive(Debug)]
pub(crate) struct ReadBytes(Arc<CachePadded<AtomicU64>>);

impl ReadBytes {
    #[inline]
    pub(crate) fn add(&self, bytes: u64) {
        // No read-modify-write: there is no other writer.
        self.0.store(self.0.load(Ordering::Relaxed) + bytes, Ordering::Relaxed);
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Counters {
    /// A counter for one channel, which [`snapshot`](Self::snapshot) adds to the others.
    pub(crate) fn read_bytes(&self) -> ReadBytes {
        let mut all = self.of_channels.lock();
        // What channels that are gone have counted stays.
        all.retain(|bytes| {
            let gone = Arc::strong_count(bytes) == 1;
            if gone {
                self.read_data(bytes.load(Ordering::Relaxed));
            }
            !gone
        });
        let bytes = Arc::new(CachePadded::new(AtomicU64::new(0)));
        all.push(Arc::clone(&bytes));
        ReadBytes(bytes)
    }

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
        let of_channels = self.of_channels.lock();
        let short = of_channels.iter().map(|bytes| bytes.load(Ordering::Relaxed)).sum::<u64>();
        Stats {
            data_read_bytes: get(&self.data_read) + short,
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
