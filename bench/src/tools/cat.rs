//! `bench cat`: prints files.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use fs_core::OpenFlags;

use crate::failure::{Doing, Failure, Result, show_name};
use crate::out::Out;
use crate::session::{Access, DeviceArg, with_mounted};

/// Bytes read at once.
const PIECE: usize = 1 << 20;

/// Arguments of `bench cat`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench cat --device file:gaur.img share/doc/rust/README.md
  bench cat --device file:gaur.img part1 part2 > whole")]
pub(crate) struct CatArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// Names of the files to print, one after the other
    #[arg(required = true)]
    names: Vec<OsString>,
}

/// Runs the command.
pub(crate) fn run(args: &CatArgs) -> Result<()> {
    with_mounted(&args.device, Access::Read, |_, channel| {
        let mut out = Out::new(false);
        let mut piece = vec![0; PIECE];
        for name in &args.names {
            let shown = show_name(name.as_bytes());
            let file = channel
                .open(name.as_bytes(), OpenFlags::READ_ONLY)
                .map_err(|error| not_opened(&shown, &error))?;
            let mut offset = 0;
            loop {
                let len = channel.read(&file, offset, &mut piece).doing(format!("read '{shown}'"))?;
                if len == 0 {
                    break;
                }
                out.bytes(&piece[..len])?;
                offset += len as u64;
            }
            channel.close(file).doing(format!("close '{shown}'"))?;
        }
        out.flush()
    })
}

fn not_opened(shown: &str, error: &fs_core::Error) -> Failure {
    let hint = if shown.starts_with(':') { "; only `bench cp` wants a colon before names" } else { "" };
    Failure::new(format!("cannot open '{shown}': {error}{hint}"))
}
