//! `bench check`: walks everything and says what is wrong.

use std::time::Instant;

use fs_core::{Channel, CheckReport, Filesystem};
use serde::Serialize;

use crate::failure::{Doing, Failure, Result};
use crate::out::{Bars, Out};
use crate::session::{Access, DeviceArg, with_mounted};
use crate::units;

/// Arguments of `bench check`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench check --device file:gaur.img
  bench check --device file:gaur.img --json

Walks every tree; verifies all checksums, references and the free space. Changes nothing.
Exit code: 0 when all is well, 1 when there are problems.")]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Checked<'a> {
    device: &'a str,
    files: u64,
    extents: u64,
    data_blocks: u64,
    metadata_blocks: u64,
    leaked_blocks: u64,
    verified_blocks: u64,
    orphans: u64,
    problem_count: u64,
    /// The first thousand of them.
    problems: &'a [String],
    seconds: f64,
    ok: bool,
}

/// Runs the command.
pub(crate) fn run(args: &CheckArgs) -> Result<()> {
    let started = Instant::now();
    let bars = Bars::new(args.json);
    let report = with_mounted(&args.device, Access::Read, |fs, channel| walk(fs, channel, bars))?;
    let time = started.elapsed();
    let ok = report.is_clean();
    let mut out = Out::new(args.json);
    if args.json {
        out.json(&Checked {
            device: &args.device.device,
            files: report.files,
            extents: report.extents,
            data_blocks: report.data_blocks,
            metadata_blocks: report.metadata_blocks,
            leaked_blocks: report.leaked_blocks,
            verified_blocks: report.verified_blocks,
            orphans: report.orphans,
            problem_count: report.problem_count,
            problems: &report.problems,
            seconds: time.as_secs_f64(),
            ok,
        })?;
    } else {
        for problem in &report.problems {
            out.line(format!("problem: {problem}"))?;
        }
        out.line(format!(
            "{} files, {} extents, {} data and {} metadata blocks, {} verified, {} leaked: {} ({})",
            units::count(report.files),
            units::count(report.extents),
            units::count(report.data_blocks),
            units::count(report.metadata_blocks),
            units::count(report.verified_blocks),
            units::count(report.leaked_blocks),
            if ok {
                "no problem".to_owned()
            } else {
                format!("{} PROBLEMS", units::count(report.problem_count))
            },
            units::time(time),
        ))?;
    }
    out.flush()?;
    if ok { Ok(()) } else { Err(Failure::Reported) }
}

/// Checks a mounted filesystem with a progress bar.
pub(crate) fn walk(fs: &Filesystem, channel: &Channel, bars: Bars) -> Result<CheckReport> {
    let bar = bars.steps("check", 0);
    let report = fs.check(channel, &mut |progress| {
        bar.set_message(progress.phase);
        bar.set_length(progress.total.unwrap_or(progress.done));
        bar.set_position(progress.done);
    });
    bar.finish_and_clear();
    report.doing("check the filesystem")
}
