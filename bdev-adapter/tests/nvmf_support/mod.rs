//! A real NVMe/TCP target (SPDK's nvmf_tgt, started by `scripts/nvmf.sh`) for tests, and what stands between it and the
//! device under test: a proxy that cuts connections, and impostors that are no targets at all.
//!
//! A target wants a CPU of its own and some 130 MiB of huge pages. Where SPDK cannot run, tests are skipped, and say so;
//! with `GAUR_REQUIRE_SPDK=1` that is a failure.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses its own part; a panic is how a test fails"
)]

pub(crate) mod impostor;
pub(crate) mod proxy;

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use bdev_adapter::{Error, spdk};

use crate::nvme_support::log_to_stdout;

/// How long a target may take to start.
const START: Duration = Duration::from_secs(40);

/// Whether SPDK runs here.
pub(crate) fn available() -> bool {
    log_to_stdout();
    match spdk::bdev_names() {
        Ok(_) => true,
        Err(Error::Unavailable { why, .. }) if std::env::var_os("GAUR_REQUIRE_SPDK").is_none() => {
            println!("SKIPPED: {why}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// A TCP port that nobody listens on now.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A running target. It is killed when this is dropped.
pub(crate) struct Target {
    arguments: Vec<String>,
    pub(crate) port: u16,
    child: Option<Child>,
}

impl Target {
    /// Starts a target with these arguments of `scripts/nvmf.sh run`, at a port of its own.
    pub(crate) fn start(arguments: &[&str]) -> Target {
        Target::start_at(free_port(), arguments)
    }

    /// The same at a given port.
    pub(crate) fn start_at(port: u16, arguments: &[&str]) -> Target {
        let mut all: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        all.extend(["--port".to_owned(), port.to_string()]);
        let mut target = Target { arguments: all, port, child: None };
        target.restart();
        target
    }

    /// Over a file, whose content survives the target.
    pub(crate) fn over_file(file: &Path, mib: u64) -> Target {
        Target::start(&["--file", file.to_str().unwrap(), "--size", &mib.to_string(), "--block", "512"])
    }

    /// Starts it again, after [`kill`](Self::kill).
    pub(crate) fn restart(&mut self) {
        assert!(self.child.is_none());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/nvmf.sh");
        let mut command = Command::new(script);
        command.arg("run").args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        // SAFETY: between fork and exec only one system call is made.
        unsafe {
            command.pre_exec(|| {
                // A test that is aborted takes its target along.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        self.child = Some(child);
        let (listening, heard) = mpsc::channel();
        // Reads on to the end, so that the target never waits for a reader.
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if line == "listening" {
                    let _ = listening.send(());
                }
            }
        });
        assert!(heard.recv_timeout(START).is_ok(), "the target did not start");
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGSTOP: it is there, but does nothing.
    pub(crate) fn freeze(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// SIGCONT.
    pub(crate) fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: i32) {
        let pid = self.child.as_ref().unwrap().id() as i32;
        // SAFETY: sends a signal to a child that was not waited for; no memory is involved.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// The device, with options such as `timeout=1s`.
    pub(crate) fn uri(&self, options: &str) -> String {
        uri(self.port, options)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The name of the subsystem that `scripts/nvmf.sh` makes.
pub(crate) const NQN: &str = "nqn.2016-06.io.spdk:gaur";

pub(crate) fn uri(port: u16, options: &str) -> String {
    let question = if options.is_empty() { "" } else { "?" };
    format!("spdk-nvme:tcp:127.0.0.1:{port}/{NQN}{question}{options}")
}

/// A directory that is not on a tmpfs, which has no O_DIRECT.
pub(crate) fn directory() -> tempfile::TempDir {
    let beside: PathBuf = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    tempfile::tempdir_in(beside).unwrap()
}
