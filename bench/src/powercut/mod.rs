//! `bench powercut`: is everything there that was synced, when the power fails?
//!
//! `write` changes a filesystem for ever, round by round ([`workload`]), syncs after each, and says on standard output
//! what is durable now. Somebody kills it: the process, or the whole machine that it runs in. `verify` then mounts what
//! is left, checks it, finds out which round it holds, computes from the seed alone what every file must be after that
//! round, and compares. The round must not be older than the last that was acknowledged. `write` without `--format`
//! verifies likewise before it goes on.
//!
//! The filesystem commits only when it is told to here, so what is left must be exactly the state of one round: a
//! sync is whole or absent, also the one that was under way.
//!
//! `drive` is the honest opponent: the medium of a virtual machine, with a write cache that loses its content
//! ([`drive`], [`cache`]).

mod cache;
mod drive;
mod workload;

use std::sync::Arc;
use std::time::Instant;

use bdev_adapter::Device;
use clap::Subcommand;
use fs_core::{Channel, Filesystem, MountOptions, OpenFlags};

use self::workload::{Change, Files, SEQUENCE, Workload};
use crate::failure::{Doing, Failure, Result, show_name};
use crate::out::{Bars, Out};
use crate::session::{Access, DeviceArg, format_device, open_device};
use crate::{tools, units};

/// Arguments of `bench powercut`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: a process that is killed
  bench powercut write --device 'file:cut.img?size=128MiB' --format &
  sleep 3; kill -9 $!                      # its last line was `powercut: durable 1234`
  bench powercut verify --device file:cut.img --acked 1234

scripts/powercut.sh does it with a virtual machine and an NVMe drive that loses its cache.")]
pub(crate) struct PowercutArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Change files and sync, for ever; print what is durable
    Write(WriteArgs),
    /// Check and compare what a power cut left behind
    Verify(VerifyArgs),
    /// Serve an image over NBD as a drive with a volatile write cache, until the connection ends
    Drive(drive::DriveArgs),
}

#[derive(Debug, clap::Args)]
struct WriteArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// What is done follows from this number
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Begin with an empty filesystem, whatever the device holds
    #[arg(long)]
    format: bool,
    /// Without --format: the last round that was acknowledged before
    #[arg(long, value_name = "ROUND", default_value_t = 0)]
    acked: u64,
    /// Stop after this many rounds, and unmount
    #[arg(long, value_name = "N")]
    rounds: Option<u64>,
}

#[derive(Debug, clap::Args)]
struct VerifyArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// The seed of the writer
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// The last round that was acknowledged
    #[arg(long, value_name = "ROUND")]
    acked: u64,
}

/// Runs the command.
pub(crate) fn run(args: &PowercutArgs) -> Result<()> {
    match &args.command {
        Command::Write(args) => write(args),
        Command::Verify(args) => verify(args),
        Command::Drive(args) => drive::run(args),
    }
}

fn write(args: &WriteArgs) -> Result<()> {
    let mut out = Out::new(false);
    let device = open_device(&args.device.device, Access::Create)?;
    if args.format {
        format_device(&device, "powercut", true)?;
    }
    let fs = mount(&device)?;
    let channel = fs.channel().doing("open a channel")?;
    let mut workload = if args.format {
        Workload::new(args.seed)
    } else {
        recovered(&fs, &channel, args.seed, args.acked, &mut out)?
    };
    for _ in 0..args.rounds.unwrap_or(u64::MAX) {
        for change in workload.next_round() {
            apply(&channel, &change).doing(format!("round {}: {change}", workload.round()))?;
        }
        channel.sync().doing(format!("round {}: sync", workload.round()))?;
        out.line_now(format!("powercut: durable {}", workload.round()))?;
    }
    drop(channel);
    fs.unmount().doing("unmount")
}

fn verify(args: &VerifyArgs) -> Result<()> {
    let mut out = Out::new(false);
    let device = open_device(&args.device.device, Access::Write)?;
    let fs = mount(&device)?;
    let channel = fs.channel().doing("open a channel")?;
    recovered(&fs, &channel, args.seed, args.acked, &mut out)?;
    drop(channel);
    fs.unmount().doing("unmount")
}

/// Only syncs commit.
fn mount(device: &Arc<dyn Device>) -> Result<Filesystem> {
    let options = MountOptions { helper_thread: false, commit_interval: None, ..MountOptions::default() };
    Filesystem::mount(Arc::clone(device), &options).doing("mount what the power cut left")
}

/// Checks a filesystem after a power cut and compares it with what it must be; the workload, ready to go on from there.
fn recovered(fs: &Filesystem, channel: &Channel, seed: u64, acked: u64, out: &mut Out) -> Result<Workload> {
    let started = Instant::now();
    let report = tools::check::walk(fs, channel, Bars::new(true))?;
    if !report.is_clean() {
        for problem in &report.problems {
            out.line(format!("problem: {problem}"))?;
        }
        return Err(Failure::new(format!("the check found {} problems", report.problem_count)));
    }
    let found = read_all(channel)?;
    let round = match found.get(SEQUENCE) {
        Some(text) => {
            workload::parse_round(text).ok_or_else(|| Failure::new("the file of the round is garbage"))?
        }
        None => 0,
    };
    if round < acked {
        return Err(Failure::new(format!(
            "LOST: round {acked} was acknowledged as durable, and the device holds round {round}"
        )));
    }
    let workload = Workload::at(seed, round);
    compare(&found, workload.files())
        .map_err(|what| Failure::new(format!("what is there is not round {round} of seed {seed}: {what}")))?;
    let (files, bytes) = (found.len() as u64, found.values().map(|content| content.len() as u64).sum());
    out.line_now(format!(
        "powercut: verified {round} (acknowledged: {acked}; {} files, {}, check clean, {})",
        units::count(files),
        units::bytes(bytes),
        units::time(started.elapsed()),
    ))?;
    Ok(workload)
}

fn apply(channel: &Channel, change: &Change) -> fs_core::Result<()> {
    match change {
        Change::Write { name, offset, data } => {
            let file = channel.open(name, OpenFlags::CREATE)?;
            channel.write(&file, *offset, data)?;
            channel.close(file)
        }
        Change::Append { name, data } => {
            let file = channel.open(name, OpenFlags::CREATE)?;
            channel.append(&file, data)?;
            channel.close(file)
        }
        Change::Truncate { name, size } => {
            let file = channel.open(name, OpenFlags::default())?;
            channel.truncate(&file, *size)?;
            channel.close(file)
        }
        Change::Rename { from, to } => channel.rename(from, to),
        Change::Delete { name } => channel.delete(name),
    }
}

fn read_all(channel: &Channel) -> Result<Files> {
    let mut files = Files::new();
    for entry in channel.list("") {
        let name = entry.doing("list the files")?.name;
        let file = channel.open(&name, OpenFlags::READ_ONLY).doing(format!("open '{}'", show_name(&name)))?;
        let mut content = vec![0; file.size() as usize];
        let len = channel.read(&file, 0, &mut content).doing(format!("read '{}'", show_name(&name)))?;
        content.truncate(len);
        channel.close(file).doing("close a file")?;
        files.insert(name, content);
    }
    Ok(files)
}

/// The first difference, in words.
fn compare(found: &Files, expected: &Files) -> std::result::Result<(), String> {
    if let Some(name) = expected.keys().find(|name| !found.contains_key(*name)) {
        return Err(format!("'{}' is missing", show_name(name)));
    }
    for (name, found) in found {
        let Some(expected) = expected.get(name) else {
            return Err(format!("'{}' should not be there", show_name(name)));
        };
        if found.len() != expected.len() {
            return Err(format!(
                "'{}' has {} bytes instead of {}",
                show_name(name),
                found.len(),
                expected.len()
            ));
        }
        if let Some(at) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
            return Err(format!("'{}' differs at byte {at}", show_name(name)));
        }
    }
    Ok(())
}
