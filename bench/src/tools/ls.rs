//! `bench ls`: lists names.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use fs_core::{Channel, DirEntry, Stat};
use serde::Serialize;

use crate::failure::{Doing, Result, show_name};
use crate::out::Out;
use crate::session::{Access, DeviceArg, with_mounted};

/// Arguments of `bench ls`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench ls --device file:gaur.img
  bench ls --device file:gaur.img -l share/doc/        size, space, extents, time (UTC) and name
  bench ls --device file:gaur.img --json | jq '.[].size'")]
pub(crate) struct LsArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// Print size, allocated space, extents and time of the last change too
    #[arg(long, short = 'l')]
    long: bool,
    /// Print JSON: an array of objects
    #[arg(long)]
    json: bool,
    /// List the names that start with this; default: all
    #[arg(default_value = "")]
    prefix: OsString,
}

#[derive(Serialize)]
struct Line {
    name: String,
    /// The bytes of the name in hexadecimal, when it is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    name_hex: Option<String>,
    id: u64,
    size: u64,
    allocated_bytes: u64,
    extents: u64,
    modified: f64,
    created: f64,
    version: u64,
}

/// Runs the command.
pub(crate) fn run(args: &LsArgs) -> Result<()> {
    with_mounted(&args.device, Access::Read, |_, channel| {
        let mut out = Out::new(args.json);
        let mut lines = Vec::new();
        let terminal = std::io::stdout().is_terminal();
        for entry in channel.list(args.prefix.as_bytes()) {
            let entry = entry.doing("list the files")?;
            if args.json {
                lines.push(json_line(&entry, &stat(channel, &entry)?));
            } else {
                if args.long {
                    out.bytes(long_line(&stat(channel, &entry)?).as_bytes())?;
                }
                // A terminal gets control characters escaped; a pipe gets the bytes as they are.
                let shown = if terminal { show_name(&entry.name).into_bytes() } else { entry.name };
                out.bytes(&shown)?;
                out.bytes(b"\n")?;
            }
        }
        if args.json {
            out.json(&lines)?;
        }
        out.flush()
    })
}

fn stat(channel: &Channel, entry: &DirEntry) -> Result<Stat> {
    channel.stat(&entry.name).doing(format!("look at '{}'", show_name(&entry.name)))
}

fn long_line(stat: &Stat) -> String {
    format!("{:>14} {:>14} {:>8} {}  ", stat.size, stat.allocated_bytes, stat.extents, utc(stat.modified))
}

fn json_line(entry: &DirEntry, stat: &Stat) -> Line {
    let hex = || entry.name.iter().map(|byte| format!("{byte:02x}")).collect();
    Line {
        name: String::from_utf8_lossy(&entry.name).into_owned(),
        name_hex: std::str::from_utf8(&entry.name).is_err().then(hex),
        id: stat.id.0,
        size: stat.size,
        allocated_bytes: stat.allocated_bytes,
        extents: stat.extents,
        modified: seconds(stat.modified),
        created: seconds(stat.created),
        version: stat.version,
    }
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map(|since| since.as_secs_f64()).unwrap_or(0.0)
}

/// `2025-03-01 12:34:56`, by the days-to-civil algorithm of Howard Hinnant (chrono-compatible low-level date algorithms).
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or(0);
    let (days, second) = (seconds / 86400 + 719468, seconds % 86400);
    let (era, day_of_era) = (days / 146097, days % 146097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn days_become_dates() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01 00:00:00");
        assert_eq!(at(951_782_399), "2000-02-28 23:59:59");
        assert_eq!(at(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(at(4_107_542_399), "2100-02-28 23:59:59");
        assert_eq!(at(4_107_542_400), "2100-03-01 00:00:00");
    }
}
