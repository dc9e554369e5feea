//! `bench`: Gaur's demo, everyday tools and measurements, in one program.
//!
//! - [`demo`] is the main job: a real tree goes in, is changed, and is verified after a remount.
//! - [`tools`] are the everyday commands on a device: `mkfs`, `ls`, `cp`, `cat`, `rm`, `df`, `check`.
//! - [`run`] measures one workload, like fio; [`compare`] measures figures side by side with their peers.
//! - [`powercut`] writes and syncs until the power fails, and verifies what is left.
//! - Below them: [`transfer`] (many files in and out at once), [`flight`] (many operations on one channel), [`lane`] (one
//!   loop over a file or the bare device), [`session`] (devices and mounts), [`source`] (trees of the host), [`out`],
//!   [`units`], [`sys`], [`failure`].
//!
//! The bench uses the public API of `fs-core` only, and of `bdev-adapter` for raw loops (and its hidden loop over SPDK's
//! own functions, as a peer).

mod compare;
mod demo;
mod failure;
mod flight;
mod lane;
mod out;
mod powercut;
mod run;
mod session;
mod source;
mod sys;
mod tools;
mod transfer;
mod units;

use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand};

use crate::failure::{Failure, Result};

#[derive(Debug, Parser)]
#[command(name = "bench", version, about = "Gaur's demo, everyday tools and measurements")]
#[command(after_help = "Examples:
  bench demo                                             the main job, on a temporary file
  bench mkfs --device 'file:gaur.img?size=1GiB'
  bench cp --device file:gaur.img -r ./docs :docs/
  bench run --device mem:4GiB --rw randread --iodepth 32 --size 1g --runtime 5 --time_based
  bench compare --list

Devices: file:PATH[?size=1GiB], mem:SIZE (gone when the command ends) and, in a build with --features spdk,
spdk-bdev:NAME?config=FILE, spdk-nvme:pcie:ADDRESS or
spdk-nvme:tcp:HOST:PORT/NQN.
Exit codes: 0 success; 1 failure, or problems were found; 2 wrong arguments.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print what the filesystem logs; twice for more
    #[arg(long, short = 'v', global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put a real tree through everything and verify it byte for byte
    Demo(demo::DemoArgs),
    /// Measure one workload, with fio's options and JSON keys
    Run(run::RunArgs),
    /// Measure figures side by side with their peers
    Compare(compare::CompareArgs),
    /// Write and sync until the power fails; verify what is left
    Powercut(powercut::PowercutArgs),
    /// Make a filesystem
    Mkfs(tools::mkfs::MkfsArgs),
    /// List files
    Ls(tools::ls::LsArgs),
    /// Copy files in or out
    Cp(tools::cp::CpArgs),
    /// Print files
    Cat(tools::cat::CatArgs),
    /// Delete files
    Rm(tools::rm::RmArgs),
    /// Show the space of a filesystem
    Df(tools::df::DfArgs),
    /// Walk everything and report problems
    Check(tools::check::CheckArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr(cli.verbose);
    match dispatch(&cli.command) {
        Ok(()) | Err(Failure::OutputClosed) => ExitCode::SUCCESS,
        Err(Failure::Reported) => ExitCode::FAILURE,
        Err(Failure::Failed(what) | Failure::Skipped(what)) => {
            out::remark(format!("error: {what}"));
            ExitCode::FAILURE
        }
        Err(Failure::Usage(what)) => {
            out::remark(format!("error: {what}\n\nFor more information, try '--help'."));
            ExitCode::from(2)
        }
    }
}

fn dispatch(command: &Command) -> Result<()> {
    match command {
        Command::Demo(args) => demo::run(args),
        Command::Run(args) => run::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Powercut(args) => powercut::run(args),
        Command::Mkfs(args) => tools::mkfs::run(args),
        Command::Ls(args) => tools::ls::run(args),
        Command::Cp(args) => tools::cp::run(args),
        Command::Cat(args) => tools::cat::run(args),
        Command::Rm(args) => tools::rm::run(args),
        Command::Df(args) => tools::df::run(args),
        Command::Check(args) => tools::check::run(args),
    }
}

/// Prints log records as remarks. The filesystem logs what has no caller to return an error to.
struct StderrLog;

impl log::Log for StderrLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        out::remark(format!(
            "{}: {}: {}",
            record.level().as_str().to_lowercase(),
            record.target(),
            record.args()
        ));
    }

    fn flush(&self) {}
}

fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        2 => log::LevelFilter::Debug,
        _ => log::LevelFilter::Trace,
    };
    // Nobody else sets a logger in this program, so this cannot fail.
    if log::set_logger(&StderrLog).is_ok() {
        log::set_max_level(level);
    }
}
