//! Runs the program as its users do.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test ends there")]

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

/// What a run gave back.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Run {
    /// Standard output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }

    /// Standard output as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("no JSON ({error}): {}\n{}", self.text(), self.stderr))
    }

    /// Asserts that it went well.
    #[track_caller]
    pub(crate) fn ok(self) -> Run {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.text(), self.stderr);
        self
    }

    /// Asserts that it failed with `code` and that the message contains `message`.
    #[track_caller]
    pub(crate) fn failed(self, code: i32, message: &str) -> Run {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.text(), self.stderr);
        assert!(self.stderr.contains(message), "no '{message}' in: {}", self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }
}

/// The program, not run yet.
pub(crate) fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs the program to its end.
pub(crate) fn bench<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    let output = command(args).output().unwrap();
    let code = output.status.code().expect("the program was killed by a signal");
    Run { code, stdout: output.stdout, stderr: String::from_utf8_lossy(&output.stderr).into_owned() }
}

/// The URI of an image in `dir`.
pub(crate) fn uri(dir: &Path) -> String {
    format!("file:{}", dir.join("gaur.img").display())
}

/// Makes a filesystem of 256 MiB on an image in `dir` and returns its URI.
pub(crate) fn formatted(dir: &Path) -> String {
    let uri = uri(dir);
    bench(["mkfs", "--device", &format!("{uri}?size=256MiB")]).ok();
    uri
}

/// Makes a small tree of files below `root`: empty, small, odd-sized and larger than a chunk.
pub(crate) fn make_tree(root: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for (index, size) in
        [0usize, 1, 100, 4095, 4096, 4097, 20_000, 300_000, 1_500_001].into_iter().enumerate()
    {
        for copy in 0..4 {
            let bytes: Vec<u8> = (0..size).map(|at| (at * 31 + at / 251 + index * 7 + copy) as u8).collect();
            let name = format!("dir{copy}/sub{index}/file-{size}.bin");
            let path = root.join(&name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, &bytes).unwrap();
            files.push((name, bytes));
        }
    }
    files.sort();
    files
}
