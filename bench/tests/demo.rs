//! The main job on small devices with a tiny tree.

mod common;

use common::{bench, make_tree};

#[test]
fn the_demo_verifies_a_small_tree() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let files = make_tree(&source);
    let image = format!("file:{}?size=256MiB", dir.path().join("gaur.img").display());
    for device in ["mem:256MiB", &image] {
        let args = [
            "demo",
            "--device",
            device,
            "--import",
            source.to_str().unwrap(),
            "--probe-time",
            "100ms",
            "--json",
        ];
        let run = bench(args).ok();
        let report = run.json();
        assert_eq!(report["ok"], true, "{report}");
        assert_eq!(report["differences"], 0);
        assert_eq!(report["files"], files.len());
        assert_eq!(report["bytes"], files.iter().map(|(_, bytes)| bytes.len()).sum::<usize>());
        for figure in [
            "files_per_s_in",
            "mib_per_s_in",
            "mib_per_s_out",
            "random_read_4k_per_s",
            "durable_overwrite_4k_per_s",
            "device_bytes_per_user_byte_import",
            "device_bytes_per_durable_byte",
            "mount_ms",
            "peak_memory_bytes",
            "space_used_bytes",
            "overwrites",
            "truncates",
            "renames",
            "deletes",
            "verified_bytes",
        ] {
            assert!(report[figure].as_f64().is_some_and(|value| value > 0.0), "{figure}: {report}");
        }
        assert_eq!(run.stderr, "");
    }
    // What the demo left on the image is a filesystem like any other.
    let uri = format!("file:{}", dir.path().join("gaur.img").display());
    bench(["check", "--device", &uri]).ok();
    assert!(bench(["ls", "--device", &uri]).ok().text().contains("gaur-demo/durable-overwrites"));
}

#[test]
fn the_demo_prints_figures_as_it_goes_and_a_table() {
    let dir = tempfile::tempdir().unwrap();
    make_tree(dir.path());
    let import = dir.path().to_str().unwrap();
    let text =
        bench(["demo", "--device", "mem:256MiB", "--import", import, "--probe-time", "50ms"]).ok().text();
    for line in
        ["import", "overwrite", "truncate", "rename", "delete", "remount", "verify", "files/s", "verified:"]
    {
        assert!(text.contains(line), "no '{line}' in: {text}");
    }
}

#[test]
fn other_seeds_do_other_things_and_limits_hold() {
    let dir = tempfile::tempdir().unwrap();
    make_tree(dir.path());
    let import = dir.path().to_str().unwrap();
    let base = ["demo", "--device", "mem:256MiB", "--import", import, "--probe-time", "20ms", "--json"];
    for seed in ["2", "3"] {
        let report = bench(base.iter().chain(&["--seed", seed])).ok().json();
        assert_eq!(report["ok"], true, "{report}");
    }
    let report = bench(base.iter().chain(&["--max-files", "7", "--max-bytes", "1MiB"])).ok().json();
    assert_eq!(report["files"], 7);
    assert!(report["bytes"].as_u64().unwrap() <= 1 << 20);
}

#[test]
fn a_device_that_fails_ends_the_demo_with_a_message() {
    let dir = tempfile::tempdir().unwrap();
    make_tree(dir.path());
    let import = dir.path().to_str().unwrap();
    for fault in ["write_error_nth=200", "read_error_nth=100", "gone_after=400"] {
        let device = format!("fault:{fault}/mem:256MiB");
        let run = bench(["demo", "--device", &device, "--import", import, "--probe-time", "20ms"]);
        run.failed(1, "error: ");
    }
    // A write that the device swallowed is found at the latest when its block is read back.
    let device = "fault:lost_write_nth=100/mem:256MiB";
    let run = bench(["demo", "--device", device, "--import", import, "--probe-time", "20ms"]);
    assert_eq!(run.code, 1, "{}\n{}", run.text(), run.stderr);
}

#[test]
fn nothing_to_import_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let import = dir.path().to_str().unwrap();
    bench(["demo", "--device", "mem:64MiB", "--import", import]).failed(1, "--import");
    bench(["demo", "--device", "mem:64MiB", "--import", "no/such/dir"]).failed(1, "no/such/dir");
}
