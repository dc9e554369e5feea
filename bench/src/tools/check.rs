//! `bench check`: walks everything and says what is wrong.

use std::time::Instant;

use fs_core::{BLOCK_SIZE, BlockOwner, Channel, CheckReport, ExtentState, Filesystem};
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
  bench check --device file:gaur.img --block 4711

Walks every tree; verifies all checksums, references and the free space. Changes nothing.
Exit code: 0 when all is well, 1 when there are problems.")]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Say only what this block of 4096 bytes of the device holds, by its number; may take as long as a check
    #[arg(long, value_name = "N")]
    block: Option<u64>,
}

#[derive(Serialize)]
struct Owned<'a> {
    device: &'a str,
    block: u64,
    /// `nothing`, `superblock`, `metadata` or `file`.
    owner: &'static str,
    /// The tree that a node of metadata belongs to.
    tree: Option<&'static str>,
    inode: Option<u64>,
    /// Not there for a file that was deleted.
    file: Option<String>,
    /// The byte of the file that the block begins with.
    offset: Option<u64>,
    preallocated: bool,
}

#[derive(Serialize)]
struct Checked<'a> {
    device: &'a str,
    files: u64,
    extents: u64,
    data_blocks: u64,
    preallocated_blocks: u64,
    inline_files: u64,
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
    if let Some(block) = args.block {
        return show_owner(args, block);
    }
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
            preallocated_blocks: report.preallocated_blocks,
            inline_files: report.inline_files,
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
            "{} files, {} extents, {} data, {} preallocated and {} metadata blocks, {} verified, {} leaked: {} ({})",
            units::count(report.files),
            units::count(report.extents),
            units::count(report.data_blocks),
            units::count(report.preallocated_blocks),
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

/// Says what a block holds.
fn show_owner(args: &CheckArgs, block: u64) -> Result<()> {
    let byte = block.saturating_mul(BLOCK_SIZE as u64);
    let owner = with_mounted(&args.device, Access::Read, |fs, channel| {
        fs.owner_of(channel, byte).doing("look for the block's owner")
    })?;
    let mut owned = Owned {
        device: &args.device.device,
        block,
        owner: "nothing",
        tree: None,
        inode: None,
        file: None,
        offset: None,
        preallocated: false,
    };
    let text = match owner {
        BlockOwner::Superblock => {
            owned.owner = "superblock";
            "a superblock".to_owned()
        }
        BlockOwner::Metadata(tree) => {
            (owned.owner, owned.tree) = ("metadata", Some(tree));
            format!("a node of the {tree} tree")
        }
        BlockOwner::File { id, name, offset, state } => {
            (owned.owner, owned.inode, owned.offset) = ("file", Some(id.0), Some(offset));
            owned.preallocated = state == ExtentState::Preallocated;
            owned.file = name.map(|name| String::from_utf8_lossy(&name).into_owned());
            let what = if owned.preallocated { "preallocated" } else { "data" };
            let name = owned.file.as_deref().map_or("a deleted file".to_owned(), |name| format!("'{name}'"));
            format!("{what} of {name} (inode {id}) at byte {offset}")
        }
        _ => "nothing refers to it".to_owned(),
    };
    let mut out = Out::new(args.json);
    if args.json {
        out.json(&owned)?;
    } else {
        out.line(format!("block {block}: {text}"))?;
    }
    out.flush()
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
