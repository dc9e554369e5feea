//! What a job counts.

use hdrhistogram::Histogram;

use crate::failure::{Doing, Result};
use crate::sys::ThreadUsage;

/// Longest latency that the histograms tell apart, in nanoseconds (an hour).
const LATENCY_MAX_NS: u64 = 3_600_000_000_000;

/// One direction of a job.
pub(crate) struct Side {
    /// Operations.
    pub(crate) ios: u64,
    /// Bytes.
    pub(crate) bytes: u64,
    /// Time from submission to completion, in nanoseconds.
    pub(crate) latency: Histogram<u64>,
}

impl Side {
    fn new() -> Result<Side> {
        // Two significant digits are finer than fio's own buckets, and fit the cache.
        let latency = Histogram::new_with_bounds(1, LATENCY_MAX_NS, 2).doing("make a histogram")?;
        Ok(Side { ios: 0, bytes: 0, latency })
    }

    /// Counts an operation.
    #[inline]
    pub(crate) fn record(&mut self, bytes: usize, latency_ns: u64) {
        self.ios += 1;
        self.bytes += bytes as u64;
        self.latency.saturating_record(latency_ns);
    }

    fn add(&mut self, other: &Side) -> Result<()> {
        self.ios += other.ios;
        self.bytes += other.bytes;
        self.latency.add(&other.latency).doing("add histograms")
    }
}

/// What a job, or all of them together, did.
pub(crate) struct JobStats {
    /// Number of the job.
    pub(crate) number: usize,
    /// Reads.
    pub(crate) read: Side,
    /// Writes.
    pub(crate) write: Side,
    /// Syncs.
    pub(crate) sync: Side,
    /// Time that counted, in nanoseconds.
    pub(crate) elapsed_ns: u64,
    /// CPU time of the thread meanwhile, in nanoseconds.
    pub(crate) cpu_ns: u64,
    /// What else it used.
    pub(crate) usage: ThreadUsage,
    /// Blocks that were read back and compared.
    pub(crate) verified: u64,
}

impl JobStats {
    /// Nothing yet.
    pub(crate) fn new(number: usize) -> Result<JobStats> {
        Ok(JobStats {
            number,
            read: Side::new()?,
            write: Side::new()?,
            sync: Side::new()?,
            elapsed_ns: 0,
            cpu_ns: 0,
            usage: ThreadUsage::default(),
            verified: 0,
        })
    }

    /// All jobs together: counts are added, the time is the longest.
    pub(crate) fn sum(jobs: &[JobStats]) -> Result<JobStats> {
        let mut all = JobStats::new(0)?;
        for job in jobs {
            all.read.add(&job.read)?;
            all.write.add(&job.write)?;
            all.sync.add(&job.sync)?;
            all.elapsed_ns = all.elapsed_ns.max(job.elapsed_ns);
            all.cpu_ns += job.cpu_ns;
            all.usage.user_us += job.usage.user_us;
            all.usage.system_us += job.usage.system_us;
            all.usage.switches += job.usage.switches;
            all.usage.major_faults += job.usage.major_faults;
            all.usage.minor_faults += job.usage.minor_faults;
            all.verified += job.verified;
        }
        Ok(all)
    }

    /// CPU time per read or write, in nanoseconds.
    pub(crate) fn cpu_ns_per_op(&self) -> f64 {
        self.cpu_ns as f64 / (self.read.ios + self.write.ios).max(1) as f64
    }
}
