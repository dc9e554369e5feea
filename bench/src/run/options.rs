//! The arguments of `bench run`: fio's names, and what of them makes sense here.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use crate::failure::{Failure, Result};
use crate::session::DeviceArg;
use crate::units::{parse_bytes_not_zero, parse_time};

/// Most operations in flight a job, and most jobs: beyond them there is only memory to lose.
const DEPTH_MAX: usize = 65536;
const JOBS_MAX: usize = 1024;

/// What kind of I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rw {
    /// Sequential reads
    Read,
    /// Sequential writes
    Write,
    /// Random reads
    Randread,
    /// Random writes
    Randwrite,
    /// Sequential reads and writes
    #[value(name = "rw", alias = "readwrite")]
    Mixed,
    /// Random reads and writes
    Randrw,
}

impl Rw {
    /// True when some of it is reads.
    pub(crate) fn reads(self) -> bool {
        !matches!(self, Rw::Write | Rw::Randwrite)
    }

    /// True when some of it is writes.
    pub(crate) fn writes(self) -> bool {
        !matches!(self, Rw::Read | Rw::Randread)
    }

    /// True when offsets are random.
    pub(crate) fn random(self) -> bool {
        matches!(self, Rw::Randread | Rw::Randwrite | Rw::Randrw)
    }

    /// fio's name of it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Rw::Read => "read",
            Rw::Write => "write",
            Rw::Randread => "randread",
            Rw::Randwrite => "randwrite",
            Rw::Mixed => "rw",
            Rw::Randrw => "randrw",
        }
    }
}

/// What the I/O goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// A file of the filesystem on the device
    Fs,
    /// The device itself, without a filesystem
    Raw,
}

/// How the report looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Normal,
    /// fio's JSON
    Json,
}

/// What is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Verify {
    /// Nothing
    None,
    /// Written blocks carry a pattern that depends on their place; they are read back at the end and compared
    Pattern,
}

/// Arguments of `bench run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench run --device mem:4GiB --rw randread --bs 4k --iodepth 32 --size 1g --runtime 10 --time_based
  bench run --device 'file:gaur.img?size=4GiB' --format --rw randwrite --bs 4k --fsync 1 --size 256m --runtime 10
  bench run --device file:gaur.img --rw randrw --rwmixread 70 --numjobs 2 --size 256m --output-format json
  bench run --device 'spdk-bdev:Malloc0?config=scripts/spdk-malloc.json' --target raw --rw randread --iodepth 128

Option names and JSON keys are fio's. Each job has its own thread, channel and file (NAME.NUMBER.0), as in fio.
All suffixes of sizes are powers of 1024.")]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) device: DeviceArg,
    /// Name of the jobs
    #[arg(long, default_value = "bench")]
    pub(crate) name: String,
    /// Kind of I/O
    #[arg(long, alias = "readwrite", value_enum, default_value = "read")]
    pub(crate) rw: Rw,
    /// Share of reads of mixed I/O, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) rwmixread: u8,
    /// Bytes of one I/O
    #[arg(long, alias = "blocksize", value_name = "SIZE", default_value = "4k", value_parser = parse_bytes_not_zero)]
    bs: u64,
    /// I/Os in flight, per job
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) iodepth: usize,
    /// Jobs, each a thread
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) numjobs: usize,
    /// Size of the file (or range of the device) of each job, and bytes that it moves unless --time_based
    #[arg(long, value_name = "SIZE", default_value = "64m", value_parser = parse_bytes_not_zero)]
    pub(crate) size: u64,
    /// Stop after this time
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) runtime: Option<Duration>,
    /// Go on for the whole --runtime, however often --size was moved
    #[arg(long = "time_based", alias = "time-based", requires = "runtime")]
    pub(crate) time_based: bool,
    /// Run this long before anything is counted
    #[arg(long = "ramp_time", alias = "ramp-time", value_name = "TIME", default_value = "0", value_parser = parse_time)]
    pub(crate) ramp_time: Duration,
    /// Sync after every N writes; 0 is never
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) fsync: u64,
    /// Sync when a job has written all
    #[arg(long = "end_fsync", alias = "end-fsync", value_name = "0|1", default_value_t = 0, num_args = 0..=1,
          default_missing_value = "1", value_parser = clap::value_parser!(u8).range(0..=1))]
    pub(crate) end_fsync: u8,
    /// Verify what was written
    #[arg(long, value_enum, default_value = "none", num_args = 0..=1, default_missing_value = "pattern")]
    pub(crate) verify: Verify,
    /// What the I/O goes to
    #[arg(long, value_enum, default_value = "fs")]
    pub(crate) target: Target,
    /// One file for all jobs instead of one each
    #[arg(long, value_name = "NAME")]
    filename: Option<String>,
    /// Make a filesystem first (always done on mem: devices, which begin empty)
    #[arg(long)]
    pub(crate) format: bool,
    /// Erase the filesystem that is there (--format, or writing to --target raw)
    #[arg(long)]
    pub(crate) force: bool,
    /// Seed of random offsets and of written data
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) randseed: u64,
    /// Never sleep while waiting for completions
    #[arg(long)]
    pub(crate) hipri: bool,
    /// Report for people or as JSON
    #[arg(long = "output-format", value_enum, default_value = "normal")]
    pub(crate) output_format: Format,
    /// Write the report to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

impl RunArgs {
    /// What the parser cannot check.
    pub(crate) fn check(&self) -> Result<()> {
        let complain = |what: &str| Err(Failure::Usage(what.to_owned()));
        if self.bs > self.size {
            return complain("--bs is larger than --size");
        }
        if self.bs > bdev_adapter::MAX_REQUEST {
            return complain("--bs is larger than 1 GiB, the largest single I/O");
        }
        if !(1..=DEPTH_MAX).contains(&self.iodepth) {
            return complain("--iodepth must be from 1 to 65536");
        }
        if !(1..=JOBS_MAX).contains(&self.numjobs) {
            return complain("--numjobs must be from 1 to 1024");
        }
        if self.target == Target::Raw && self.rw.writes() && !self.force && !self.is_volatile() {
            return complain(
                "writing to the raw device destroys what is on it; add --force if that is what you want",
            );
        }
        if self.verify == Verify::Pattern && !self.rw.writes() {
            return complain("--verify needs writes: only what was written can be verified");
        }
        Ok(())
    }

    /// True when the device begins empty and ends with this command.
    pub(crate) fn is_volatile(&self) -> bool {
        self.device.device.starts_with("mem:")
    }

    /// Bytes of one I/O.
    pub(crate) fn bs(&self) -> usize {
        // At most MAX_REQUEST, see `check`.
        self.bs as usize
    }

    /// The file of job `number`.
    pub(crate) fn file_of(&self, number: usize) -> String {
        self.filename.clone().unwrap_or_else(|| format!("{}.{number}.0", self.name))
    }
}
