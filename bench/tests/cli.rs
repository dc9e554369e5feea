//! Wrong arguments and wrong devices: a message that says what to do, the right exit code, never a panic.

mod common;

use std::process::Stdio;

use common::{bench, command, formatted, uri};

const COMMANDS: [&str; 10] = ["demo", "run", "compare", "mkfs", "ls", "cp", "cat", "rm", "df", "check"];

#[test]
fn every_command_has_help_with_examples() {
    assert!(bench(["--help"]).ok().text().contains("Examples:"));
    for name in COMMANDS {
        let help = bench([name, "--help"]).ok().text();
        assert!(help.contains("Examples:"), "{name}");
        assert!(help.contains(&format!("bench {name}")), "{name}");
    }
}

#[test]
fn wrong_arguments_end_with_code_2() {
    bench::<&str>([]).failed(2, "Usage");
    bench(["nonsense"]).failed(2, "nonsense");
    bench(["ls"]).failed(2, "--device");
    bench(["run", "--device", "mem:64MiB", "--bs", "0"]).failed(2, "more than zero");
    bench(["run", "--device", "mem:64MiB", "--bs", "4x"]).failed(2, "not a unit");
    bench(["run", "--device", "mem:64MiB", "--rw", "sideways"]).failed(2, "sideways");
    bench(["run", "--device", "mem:64MiB", "--iodepth", "0"]).failed(2, "--iodepth");
    bench(["run", "--device", "mem:64MiB", "--numjobs", "0"]).failed(2, "--numjobs");
    bench(["run", "--device", "mem:64MiB", "--bs", "2m", "--size", "1m"]).failed(2, "--size");
    bench(["run", "--device", "mem:64MiB", "--rw", "read", "--verify"]).failed(2, "--verify");
    bench(["run", "--device", "mem:64MiB", "--time_based"]).failed(2, "--runtime");
    bench(["run", "--device", "mem:64MiB", "--target", "raw", "--size", "1g"]).failed(2, "do not fit");
    bench(["run", "--device", "mem:64MiB", "--target", "raw", "--bs", "100"]).failed(2, "multiple of");
    bench(["compare", "--only", "no_such_metric"]).failed(2, "compare --list");
    bench(["compare", "--repeats", "0"]).failed(2, "--repeats");
    bench(["cp", "--device", "mem:64MiB", "a", "b"]).failed(2, "colon");
    bench(["cp", "--device", "mem:64MiB", ":a", ":b"]).failed(2, "not supported");
}

#[test]
fn wrong_devices_are_named() {
    let dir = tempfile::tempdir().unwrap();
    bench(["ls", "--device", "nonsense"]).failed(1, "nonsense");
    bench(["ls", "--device", "mem:lots"]).failed(1, "mem:lots");
    let missing = uri(dir.path());
    bench(["ls", "--device", &missing]).failed(1, "gaur.img");
    bench(["df", "--device", "mem:64MiB"]).failed(1, "no Gaur filesystem");
    std::fs::write(dir.path().join("gaur.img"), vec![7u8; 64 << 20]).unwrap();
    bench(["check", "--device", &missing]).failed(1, "no Gaur filesystem");
    bench(["mkfs", "--device", "mem:64KiB"]).failed(1, "mem:64KiB");
    #[cfg(not(feature = "spdk"))]
    bench(["ls", "--device", "spdk-bdev:Malloc0?config=x.json"]).failed(1, "--features spdk");
}

#[test]
fn a_filesystem_is_not_erased_unless_forced() {
    let dir = tempfile::tempdir().unwrap();
    let uri = formatted(dir.path());
    bench(["mkfs", "--device", &uri]).failed(1, "already holds");
    bench(["demo", "--device", &uri]).failed(1, "already holds");
    bench(["compare", "--device", &uri, "--only", "seqwrite1m_vs_raw"]).failed(1, "already holds");
    bench(["run", "--device", &uri, "--format"]).failed(1, "already holds");
    bench(["run", "--device", &uri, "--target", "raw", "--rw", "write"]).failed(2, "--force");
    bench(["mkfs", "--device", &uri, "--force", "--label", "again"]).ok();
    assert_eq!(bench(["df", "--device", &uri, "--json"]).ok().json()["label"], "again");
}

#[test]
fn a_closed_output_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let uri = formatted(dir.path());
    let file = dir.path().join("large");
    std::fs::write(&file, vec![1u8; 4 << 20]).unwrap();
    bench(["cp", "--device", &uri, file.to_str().unwrap(), ":large"]).ok();
    let mut child = command(["cat", "--device", &uri, "large"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}
