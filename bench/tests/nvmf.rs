//! The filesystem over NVMe/TCP, through SPDK's NVMe driver, against SPDK's own target: a target that is killed and restarted
//! under load, one that never comes back, two processes at once, and a process without root and huge pages.

#![cfg(feature = "spdk")]
#![allow(clippy::unwrap_used, reason = "a test ends there")]

mod common;
#[path = "../../bdev-adapter/tests/nvme_support/mod.rs"]
mod nvme_support;
#[path = "../../bdev-adapter/tests/nvmf_support/mod.rs"]
mod nvmf_support;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bdev_adapter::OpenOptions;
use common::{bench, command};
use fs_core::{Filesystem, FormatOptions, MountOptions, OpenFlags};
use nvmf_support::{Target, available, directory, free_port};

/// A hang is a failure.
const LIMIT: Duration = Duration::from_secs(120);
/// A demo of seconds.
const DEMO: [&str; 7] = ["demo", "--max-files", "40", "--max-bytes", "4MiB", "--probe-time", "100ms"];

/// One target at a time: each keeps a CPU busy.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `bench powercut write`, and the rounds that it says are durable.
struct Writer {
    child: Child,
    rounds: Receiver<u64>,
    last: u64,
}

impl Writer {
    fn start(uri: &str) -> Writer {
        let args = ["powercut", "write", "--seed", "11", "--format", "--device", uri];
        let mut child = command(args).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (round, rounds) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let Some(number) = line.strip_prefix("powercut: durable ") else { continue };
                // Nobody listens when the test has failed.
                let _ = round.send(number.parse().unwrap());
            }
        });
        Writer { child, rounds, last: 0 }
    }

    /// Waits for so many more rounds.
    fn go_on(&mut self, rounds: u64) {
        let goal = self.last + rounds;
        while self.last < goal {
            match self.rounds.recv_timeout(LIMIT) {
                Ok(round) => self.last = round,
                Err(_) => panic!("the writer stopped after round {}", self.last),
            }
        }
    }

    /// Kills it; the last round that it acknowledged.
    fn kill(&mut self) -> u64 {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // What it printed before is still in the pipe.
        self.rounds.iter().last().unwrap_or(self.last)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The mount lives through it: what was not flushed is looked at, and written again or found there.
#[test]
fn a_target_is_killed_and_restarted_under_synced_writes() {
    if !available() {
        return;
    }
    let _turn = turn();
    let directory = directory();
    let mut target = Target::over_file(&directory.path().join("disk"), 96);
    let uri = target.uri("reconnect=60s");
    let mut writer = Writer::start(&uri);
    for _ in 0..3 {
        writer.go_on(5);
        target.kill();
        thread::sleep(Duration::from_millis(50));
        target.restart();
    }
    writer.go_on(5);
    let acked = writer.kill();
    println!("{acked} rounds acknowledged");
    bench(["powercut", "verify", "--seed", "11", "--acked", &acked.to_string(), "--device", &uri]).ok();
}

#[test]
fn a_target_that_goes_away_costs_the_mount_and_nothing_that_was_synced() {
    if !available() {
        return;
    }
    let _turn = turn();
    let directory = directory();
    let mut target = Target::over_file(&directory.path().join("disk"), 96);
    let uri = target.uri("reconnect=1s");
    let content = vec![7; 300_000];
    {
        let device = bdev_adapter::open(&uri, &OpenOptions::new()).unwrap();
        fs_core::format(&device, &FormatOptions { force: true, ..FormatOptions::default() }).unwrap();
        let fs = Filesystem::mount(device, &MountOptions::default()).unwrap();
        let channel = fs.channel().unwrap();
        let file = channel.open("kept", OpenFlags::CREATE).unwrap();
        channel.write(&file, 0, &content).unwrap();
        channel.sync().unwrap();
        target.kill();
        let began = Instant::now();
        // One of these fails first, and then all do.
        let lost = channel.open("lost", OpenFlags::CREATE).and_then(|file| {
            channel.write(&file, 0, &content)?;
            channel.sync()
        });
        let error = lost.expect_err("the device is gone");
        println!("after {:.1?}: {error}", began.elapsed());
        assert!(channel.sync().is_err());
        assert!(began.elapsed() < LIMIT);
    }
    target.restart();
    let device = bdev_adapter::open(&uri, &OpenOptions::new()).unwrap();
    let fs = Filesystem::mount(device, &MountOptions::default()).unwrap();
    let channel = fs.channel().unwrap();
    let file = channel.open("kept", OpenFlags::READ_ONLY).unwrap();
    let mut found = vec![0; content.len()];
    assert_eq!(channel.read(&file, 0, &mut found).unwrap(), content.len());
    assert!(found == content);
    assert!(fs.check(&channel, &mut |_| {}).unwrap().is_clean());
}

/// A target with two namespaces of 64 MiB.
fn two_namespaces() -> Target {
    let (directory, port) = (directory(), free_port());
    let (path, nqn) = (directory.path().join("config.json"), nvmf_support::NQN);
    let malloc = |name: &str| {
        format!(
            r#"{{"method":"bdev_malloc_create","params":{{"name":"{name}","num_blocks":16384,"block_size":4096}}}}"#
        )
    };
    let namespace = |nsid: u32, bdev: &str| {
        format!(
            r#"{{"method":"nvmf_subsystem_add_ns","params":
               {{"nqn":"{nqn}","namespace":{{"nsid":{nsid},"bdev_name":"{bdev}"}}}}}}"#
        )
    };
    let config = format!(
        r#"{{"subsystems":[{{"subsystem":"bdev","config":[{},{}]}},{{"subsystem":"nvmf","config":[
        {{"method":"nvmf_create_transport","params":{{"trtype":"TCP"}}}},
        {{"method":"nvmf_create_subsystem","params":{{"nqn":"{nqn}","allow_any_host":true}}}},{},{},
        {{"method":"nvmf_subsystem_add_listener","params":{{"nqn":"{nqn}","listen_address":
            {{"trtype":"TCP","adrfam":"IPv4","traddr":"127.0.0.1","trsvcid":"{port}"}}}}}}]}}]}}"#,
        malloc("A"),
        malloc("B"),
        namespace(1, "A"),
        namespace(2, "B")
    );
    std::fs::write(&path, config).unwrap();
    Target::start_at(port, &["--config", path.to_str().unwrap()])
}

#[test]
fn a_second_process_does_not_get_a_device_that_is_open() {
    if !available() {
        return;
    }
    let _turn = turn();
    let target = two_namespaces();
    let mut writer = Writer::start(&target.uri("ns=1"));
    writer.go_on(1);
    bench(["check", "--device", &target.uri("ns=1")]).failed(1, "is in use by somebody else");
    writer.go_on(1);
    writer.kill();
    bench(["check", "--device", &target.uri("ns=1")]).ok();
}

#[test]
fn two_processes_mount_two_devices_at_once() {
    if !available() {
        return;
    }
    let _turn = turn();
    let target = two_namespaces();
    let demos: Vec<Child> = ["ns=1", "ns=2"]
        .iter()
        .map(|options| {
            let uri = target.uri(options);
            let args = [&DEMO[..], &["--device", &uri]].concat();
            command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for demo in demos {
        let output = demo.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// As an ordinary user, in ordinary memory.
#[test]
fn without_root_and_without_huge_pages() {
    if !available() {
        return;
    }
    let _turn = turn();
    let target = two_namespaces();
    // SAFETY: only reads the process's user id.
    let root = unsafe { libc::geteuid() } == 0;
    // Where anybody may go, as the build directory need not be.
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("bench");
    std::fs::copy(env!("CARGO_BIN_EXE_bench"), &program).unwrap();
    for path in [directory.path(), &program] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let files = directory.path().join("files");
    std::fs::create_dir(&files).unwrap();
    for name in ["a", "b", "c"] {
        std::fs::write(files.join(name), vec![name.as_bytes()[0]; 100_000]).unwrap();
    }
    let demos: Vec<Child> = ["ns=1", "ns=2"]
        .iter()
        .map(|options| {
            let mut demo = Command::new(&program);
            demo.args(DEMO).args(["--import", files.to_str().unwrap(), "--device", &target.uri(options)]);
            demo.env("GAUR_SPDK_NO_HUGE", "512").env("HOME", "/").current_dir("/");
            if root {
                // nobody
                demo.uid(65534).gid(65534);
            }
            demo.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for demo in demos {
        let output = demo.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
