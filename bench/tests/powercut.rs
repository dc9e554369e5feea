//! `bench powercut`, with a process that is killed in the place of a machine that loses its power. (With a machine:
//! `scripts/powercut.sh`.)

#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{bench, command};

/// A writer that is killed when the test ends early.
struct Writer(Child);

impl Writer {
    fn start(args: &[&str]) -> Writer {
        Writer(command(args).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// Lets it acknowledge rounds for `time`, kills it, and returns the last one.
    fn kill_after(mut self, time: Duration) -> u64 {
        let mut lines = BufReader::new(self.0.stdout.take().unwrap()).lines();
        let (mut last, mut begun, mut killed) = (None, None, false);
        // After the kill, what it printed before is still in the pipe.
        while let Some(Ok(line)) = lines.next() {
            let Some(round) = line.strip_prefix("powercut: durable ") else { continue };
            last = Some(round.parse().unwrap());
            if !killed && begun.get_or_insert_with(Instant::now).elapsed() >= time {
                self.0.kill().unwrap();
                killed = true;
            }
        }
        last.expect("it acknowledged something")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_was_acknowledged_survives_a_killed_process() {
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file:{}", dir.path().join("cut.img").display());
    let sized = format!("{uri}?size=64MiB");
    let write = ["powercut", "write", "--seed", "7", "--device"];
    let mut acked =
        Writer::start(&[&write[..], &[&sized, "--format"]].concat()).kill_after(Duration::from_millis(300));
    for round in 1..4 {
        let text = acked.to_string();
        let writer = Writer::start(&[&write[..], &[&uri, "--acked", &text]].concat());
        let now = writer.kill_after(Duration::from_millis(100 * round));
        assert!(now > acked, "{now} after {acked}");
        acked = now;
    }
    let verify = ["powercut", "verify", "--device", &uri, "--seed"];
    let text = acked.to_string();
    let verified = bench([&verify[..], &["7", "--acked", &text]].concat()).ok().text();
    assert!(verified.contains("powercut: verified "), "{verified}");

    // It does notice: a round that is not there, and content that is not this seed's.
    let future = (acked + 1000).to_string();
    bench([&verify[..], &["7", "--acked", &future]].concat()).failed(1, "LOST");
    bench([&verify[..], &["8", "--acked", &text]].concat()).failed(1, "of seed 8");
}

#[test]
fn the_writer_stops_where_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file:{}", dir.path().join("cut.img").display());
    let sized = format!("{uri}?size=64MiB");
    let text = bench(["powercut", "write", "--device", &sized, "--format", "--rounds", "20"]).ok().text();
    assert_eq!(text.lines().last(), Some("powercut: durable 20"));
    let text = bench(["powercut", "write", "--device", &uri, "--acked", "20", "--rounds", "3"]).ok().text();
    assert!(text.starts_with("powercut: verified 20 ") && text.ends_with("powercut: durable 23\n"), "{text}");
    let sequence = bench(["cat", "--device", &uri, "sequence"]).ok().text();
    assert_eq!(sequence.trim_start_matches('0'), "23\n");
}

#[test]
fn a_drive_without_a_machine_gives_up_with_a_message() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("drive");
    let (socket, image) = (socket.to_str().unwrap(), dir.path().join("none.img"));
    let drive = ["powercut", "drive", "--socket", socket, "--image", image.to_str().unwrap()];
    bench(drive).failed(1, "none.img");
    bench([&drive[..], &["--sector", "1000"]].concat()).failed(2, "--sector");
}
