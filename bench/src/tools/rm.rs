//! `bench rm`: deletes files.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use fs_core::{Error, Operation};

use super::names;
use crate::failure::{Doing, Failure, Result, show_name};
use crate::flight::Flight;
use crate::out::{Bars, remark};
use crate::session::{Access, DeviceArg, with_mounted};
use crate::units;

/// Arguments of `bench rm`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench rm --device file:gaur.img old.log older.log
  bench rm --device file:gaur.img -r share/doc/        every name that starts with share/doc/")]
pub(crate) struct RmArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// Take the names as prefixes: delete every file whose name starts with one of them
    #[arg(long, short = 'r')]
    recursive: bool,
    /// Do not complain about names that are not there
    #[arg(long, short = 'f')]
    force: bool,
    /// Names of the files to delete
    #[arg(required = true)]
    names: Vec<OsString>,
}

/// Runs the command.
pub(crate) fn run(args: &RmArgs) -> Result<()> {
    if args.recursive && args.names.iter().any(|name| name.is_empty()) && !args.force {
        return Err(Failure::Usage(
            "an empty prefix means every file; add --force if that is what you want".to_owned(),
        ));
    }
    with_mounted(&args.device, Access::Write, |_, channel| {
        let mut doomed = Vec::new();
        for name in &args.names {
            if args.recursive {
                let found = names(channel, name.as_bytes())?;
                if found.is_empty() && !args.force {
                    return Err(Failure::new(format!(
                        "no name starts with '{}'",
                        show_name(name.as_bytes())
                    )));
                }
                doomed.extend(found);
            } else {
                doomed.push(name.as_bytes().to_vec());
            }
        }
        doomed.sort();
        doomed.dedup();
        let missing = delete_all(channel, doomed, args.force)?;
        channel.sync().doing("sync the filesystem")?;
        if missing { Err(Failure::Reported) } else { Ok(()) }
    })
}

/// Deletes all `names`, many at once. True when some were not there, and that matters.
fn delete_all(channel: &fs_core::Channel, names: Vec<Vec<u8>>, force: bool) -> Result<bool> {
    let bar = Bars::new(false).steps("delete", names.len() as u64);
    let mut names = names.into_iter();
    let mut flight = Flight::new(channel, 128);
    let (mut deleted, mut missing) = (0u64, false);
    loop {
        while flight.has_room()
            && let Some(name) = names.next()
        {
            flight.submit(Operation::Delete { name: name.clone() }, name);
        }
        let Some((name, completion)) = flight.next() else { break };
        match completion.result {
            Ok(_) => deleted += 1,
            Err(Error::NotFound { .. }) if force => {}
            Err(error @ Error::NotFound { .. }) => {
                remark(format!("cannot delete: {error}"));
                missing = true;
            }
            Err(error) => return Err(error).doing(format!("delete '{}'", show_name(&name))),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if deleted > 1 {
        remark(format!("deleted {} files", units::count(deleted)));
    }
    Ok(missing)
}
