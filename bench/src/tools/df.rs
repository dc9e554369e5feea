//! `bench df`: space of a filesystem.

use serde::Serialize;

use crate::failure::{Doing, Result};
use crate::out::{Out, Table};
use crate::session::{Access, DeviceArg, with_mounted};
use crate::units;

/// Arguments of `bench df`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench df --device file:gaur.img
  bench df --device file:gaur.img -h --json")]
#[command(disable_help_flag = true)]
pub(crate) struct DfArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// Print sizes as 1.5 GiB instead of KiB
    #[arg(long, short = 'h')]
    human_readable: bool,
    /// Print JSON (always bytes)
    #[arg(long)]
    json: bool,
    /// Print help
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
}

#[derive(Serialize)]
struct Space {
    device: String,
    label: String,
    total_bytes: u64,
    used_bytes: u64,
    reserved_bytes: u64,
    free_bytes: u64,
    files: u64,
}

/// Runs the command.
pub(crate) fn run(args: &DfArgs) -> Result<()> {
    let space = with_mounted(&args.device, Access::Read, |fs, channel| {
        let space = channel.statfs().doing("ask for the space")?;
        Ok(Space {
            device: args.device.device.clone(),
            label: fs.info().label,
            total_bytes: space.total_bytes,
            used_bytes: space.used_bytes,
            reserved_bytes: space.reserved_bytes,
            free_bytes: space.free_bytes,
            files: space.files,
        })
    })?;
    let mut out = Out::new(args.json);
    if args.json {
        out.json(&space)?;
        return out.flush();
    }
    let size =
        |bytes: u64| if args.human_readable { units::bytes(bytes) } else { (bytes / 1024).to_string() };
    let unit = |name: &str| if args.human_readable { name.to_owned() } else { format!("{name} KiB") };
    let mut table = Table::new(&[false, true, true, true, true, true, true]);
    table.row([
        "Device".into(),
        unit("Size"),
        unit("Used"),
        unit("Reserved"),
        unit("Free"),
        "Use%".into(),
        "Files".into(),
    ]);
    let percent = (space.used_bytes + space.reserved_bytes) as f64 / space.total_bytes.max(1) as f64 * 100.0;
    table.row([
        space.device,
        size(space.total_bytes),
        size(space.used_bytes),
        size(space.reserved_bytes),
        size(space.free_bytes),
        format!("{percent:.0}%"),
        space.files.to_string(),
    ]);
    table.print(&mut out)?;
    out.flush()
}
