//! The figures of a demo run, as a table and as JSON.

use serde::Serialize;

use crate::failure::Result;
use crate::out::{Out, Table};
use crate::units;

/// Everything that a demo run measured. The field names are those of the JSON output.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) device: String,
    pub(crate) seed: u64,
    pub(crate) source: Vec<String>,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    pub(crate) import_seconds: f64,
    pub(crate) files_per_s_in: f64,
    pub(crate) mib_per_s_in: f64,
    pub(crate) overwrites: u64,
    pub(crate) truncates: u64,
    pub(crate) renames: u64,
    pub(crate) deletes: u64,
    pub(crate) edits_seconds: f64,
    pub(crate) read_bytes: u64,
    pub(crate) read_seconds: f64,
    pub(crate) mib_per_s_out: f64,
    pub(crate) random_read_4k_per_s: f64,
    pub(crate) durable_overwrite_4k_per_s: f64,
    pub(crate) device_bytes_per_user_byte_import: f64,
    pub(crate) device_bytes_per_user_byte_edits: f64,
    pub(crate) device_bytes_per_durable_byte: f64,
    pub(crate) mount_ms: f64,
    pub(crate) peak_memory_bytes: Option<u64>,
    pub(crate) space_total_bytes: u64,
    pub(crate) space_used_bytes: u64,
    pub(crate) space_free_bytes: u64,
    pub(crate) verified_files: u64,
    pub(crate) verified_bytes: u64,
    pub(crate) differences: u64,
    pub(crate) check_problems: u64,
    pub(crate) first_figures_seconds: f64,
    pub(crate) total_seconds: f64,
    pub(crate) ok: bool,
}

impl Report {
    /// Prints the table.
    pub(crate) fn print(&self, out: &mut Out) -> Result<()> {
        let mut table = Table::new(&[false, true, false, false]);
        let mut row = |what: &str, figure: f64, unit: &str, note: String| {
            table.row([what, &units::figure(figure), unit, &note]);
        };
        let user = format!("{} files, {}, synced", units::count(self.files), units::bytes(self.bytes));
        row("files in", self.files_per_s_in, "files/s", user);
        row("bytes in", self.mib_per_s_in, "MiB/s", "the same, from the host's files".to_owned());
        let out_note = format!("{} after the remount", units::bytes(self.read_bytes));
        row("bytes out", self.mib_per_s_out, "MiB/s", out_note);
        row(
            "random 4 KiB reads",
            self.random_read_4k_per_s,
            "per s",
            "32 in flight, checksums verified".to_owned(),
        );
        row(
            "durable 4 KiB overwrites",
            self.durable_overwrite_4k_per_s,
            "per s",
            "write + sync, one at a time".to_owned(),
        );
        row("device bytes per user byte", self.device_bytes_per_user_byte_import, "x", "import".to_owned());
        row("", self.device_bytes_per_user_byte_edits, "x", "overwrites, renames, deletes".to_owned());
        row("", self.device_bytes_per_durable_byte, "x", "durable 4 KiB overwrites".to_owned());
        row("mount", self.mount_ms, "ms", "to the first answer".to_owned());
        if let Some(bytes) = self.peak_memory_bytes {
            let note = if self.device.starts_with("mem:") { "peak, with the memory device" } else { "peak" };
            row("memory", bytes as f64 / units::MIB, "MiB", note.to_owned());
        }
        let space = format!("used of {}", units::bytes(self.space_total_bytes));
        row("space", self.space_used_bytes as f64 / units::MIB, "MiB", space);
        out.line("")?;
        table.print(out)
    }
}
