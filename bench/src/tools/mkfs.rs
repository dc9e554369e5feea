//! `bench mkfs`: makes a filesystem.

use serde::Serialize;

use crate::failure::{Doing, Result};
use crate::out::Out;
use crate::session::{Access, DeviceArg, format_device, mount_device, open_device};
use crate::units;

/// Arguments of `bench mkfs`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench mkfs --device 'file:gaur.img?size=1GiB'        makes the file when there is none
  bench mkfs --device file:/dev/sdX --label scratch
  bench mkfs --device file:gaur.img --force            erases the filesystem that is there")]
pub(crate) struct MkfsArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// A name for the filesystem
    #[arg(long, default_value = "")]
    label: String,
    /// Erase the Gaur filesystem that the device holds
    #[arg(long, short = 'f')]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Made {
    device: String,
    uuid: String,
    label: String,
    capacity_bytes: u64,
    block_size: u64,
    format_version: u64,
}

/// Runs the command.
pub(crate) fn run(args: &MkfsArgs) -> Result<()> {
    let device = open_device(&args.device.device, Access::Create)?;
    format_device(&device, &args.label, args.force)?;
    // Mounting what was just made is the best test that it can be mounted.
    let fs = mount_device(&device, true)?;
    let info = fs.info();
    fs.unmount().doing("unmount the new filesystem")?;
    let uuid = info.uuid_text();
    let mut out = Out::new(args.json);
    if args.json {
        out.json(&Made {
            device: args.device.device.clone(),
            uuid,
            label: info.label,
            capacity_bytes: info.capacity_bytes,
            block_size: u64::from(info.block_size),
            format_version: u64::from(info.format_version),
        })?;
    } else {
        let (size, block) = (units::bytes(info.capacity_bytes), info.block_size);
        out.line(format!(
            "{}: Gaur filesystem {uuid}, {size} in blocks of {block} bytes",
            args.device.device
        ))?;
    }
    out.flush()
}
