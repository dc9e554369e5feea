//! SPDK's own programs, as processes: finding, starting and ending them, and reading what they print.

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::{Doing, Failure, Result};
use crate::sys::end_with_us;

/// How long a target may take until it listens.
const START: Duration = Duration::from_secs(60);
/// How long a measuring program may take.
const RUN: Duration = Duration::from_secs(300);
const NAP: Duration = Duration::from_millis(20);

/// A script of this checkout.
pub(super) fn script(path: &str) -> Result<Command> {
    match Path::new(path).exists() {
        true => Ok(Command::new(path)),
        false => Err(Failure::Skipped(format!("there is no {path}; run it at the top of the checkout"))),
    }
}

/// A program of the installed SPDK, by any of its names.
pub(super) fn program(names: &[&str]) -> Result<String> {
    let mut prefixes: Vec<PathBuf> = std::env::var_os("SPDK_DIR").map(PathBuf::from).into_iter().collect();
    if let Ok(mut command) = script("scripts/spdk.sh") {
        prefixes.push(output_of(command.arg("prefix"))?.trim().into());
    }
    let places = ["bin", "build/bin", "build/examples", "test/bdev/bdevperf"];
    prefixes
        .iter()
        .flat_map(|prefix| places.map(|place| prefix.join(place)))
        .flat_map(|place| names.iter().map(move |name| place.join(name)))
        .find(|path| path.is_file())
        .map(|path| path.to_string_lossy().into_owned())
        .ok_or_else(|| {
            let name = names[names.len() - 1];
            Failure::Skipped(format!("SPDK's program {name} is not installed (make spdk installs it)"))
        })
}

/// Refuses when there are less than `mib` MiB of free huge pages.
pub(super) fn need_huge_pages(mib: u64) -> Result<()> {
    let info = fs::read_to_string("/proc/meminfo").doing("read /proc/meminfo")?;
    let number = |name: &str| -> u64 {
        let line = info.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
    };
    let page = number("Hugepagesize:").max(1);
    let (free, wanted) = (number("HugePages_Free:"), mib * 1024 / page);
    if free >= wanted {
        return Ok(());
    }
    Err(Failure::Skipped(format!(
        "{free} huge pages are free, it needs {wanted}; as root: scripts/spdk.sh hugepages {wanted}"
    )))
}

/// Runs a program to its end; what it printed on its standard output.
pub(super) fn output_of(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let child = end_with_us(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .doing(format!("run {name}"))?;
    let mut running = Running { child, name };
    // What they print fits into the buffers of their pipes: some lines.
    let status = running.wait(RUN)?;
    let out = running.out();
    match status.success() {
        true => Ok(out),
        false => Err(running.failed(status, &out)),
    }
}

/// A process that is killed when this is dropped.
pub(super) struct Running {
    child: Child,
    name: String,
}

impl Running {
    /// Starts a program that goes on until it is killed.
    pub(super) fn start(mut command: Command) -> Result<Running> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = end_with_us(&mut command)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .doing(format!("run {name}"))?;
        Ok(Running { child, name })
    }

    /// Waits until it listens on a port of this machine.
    pub(super) fn wait_for_port(&mut self, port: u16) -> Result<()> {
        let deadline = Instant::now() + START;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if let Some(status) = self.child.try_wait().doing(format!("wait for {}", self.name))? {
                return Err(self.failed(status, ""));
            }
            if Instant::now() >= deadline {
                return Err(Failure::new(format!("{} does not listen on port {port}", self.name)));
            }
            thread::sleep(NAP);
        }
        Ok(())
    }

    /// What it printed on its standard output, once it has ended.
    fn out(&mut self) -> String {
        let mut bytes = Vec::new();
        if let Some(stream) = &mut self.child.stdout {
            // What cannot be read is missing in what is made of it.
            let _ = stream.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// That it ended with an error, and the last it had to say.
    fn failed(&mut self, status: ExitStatus, out: &str) -> Failure {
        let mut bytes = Vec::new();
        if let Some(stream) = &mut self.child.stderr {
            let _ = stream.read_to_end(&mut bytes);
        }
        let errors = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> =
            out.lines().chain(errors.lines()).filter(|line| !line.trim().is_empty()).collect();
        let last = lines[lines.len().saturating_sub(3)..].join("; ");
        Failure::new(format!("{} failed ({status}): {last}", self.name))
    }

    fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().doing(format!("wait for {}", self.name))? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(Failure::new(format!("{} does not end", self.name)));
            }
            thread::sleep(NAP);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The I/Os per second in the last line of the table of `perf` or `bdevperf`: `Total : 1234.56 ...`, with or without words
/// after the number.
pub(super) fn total_iops(output: &str) -> Result<f64> {
    output
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix("Total")?.trim().strip_prefix(':'))
        .and_then(|figures| figures.split_whitespace().next()?.parse().ok())
        .filter(|iops| *iops > 0.0)
        .ok_or_else(|| Failure::new(format!("found no total in what the peer printed:\n{output}")))
}

#[cfg(test)]
mod tests {
    use super::total_iops;

    #[test]
    fn totals_are_found_in_the_tables_of_both_programs() {
        let perf = "\
========================================================
                                                                           Latency(us)
Device Information                       :       IOPS      MiB/s    Average        min        max
TCP  (addr:127.0.0.1 subnqn:x) NSID 1 from core  0:  281034.10    1097.79     113.84      71.02     503.93
========================================================
Total                                    :  281034.10    1097.79     113.84      71.02     503.93
";
        assert_eq!(total_iops(perf).ok(), Some(281_034.10));
        let bdevperf = "\
 Malloc0             : 1496416.00 IOPS    5845.38 MiB/s
 =====================================================
 Total               : 1496416.50 IOPS    5845.38 MiB/s
";
        assert_eq!(total_iops(bdevperf).ok(), Some(1_496_416.5));
        assert!(total_iops("Total               :       0.00 IOPS       0.00 MiB/s").is_err());
        assert!(total_iops("no such device").is_err());
    }
}
