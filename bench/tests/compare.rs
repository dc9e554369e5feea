//! `bench compare`: the list, and the schema of its JSON.

mod common;

use common::{bench, uri};

const KEYS: [&str; 12] = [
    "metric",
    "unit",
    "ours",
    "peer_name",
    "peer",
    "ratio",
    "median",
    "min",
    "max",
    "repeats",
    "goal",
    "pass",
];

#[test]
fn the_list_names_every_metric_of_the_issues() {
    let text = bench(["compare", "--list"]).ok().text();
    let json = bench(["compare", "--list", "--json"]).ok().json();
    for metric in [
        "randread4k_qd32_vs_raw",
        "seqwrite1m_vs_raw",
        "seqread1m_vs_raw",
        "mount_100k_vs_100_files",
        "mount_8tib_vs_8gib",
        "create_delete_per_s",
        "tcp_randread4k_qd32_vs_spdk_perf",
        "malloc_randread4k_qd128_vs_bdevperf",
        "adapter_added_ns_per_io",
    ] {
        assert!(text.contains(metric), "{metric}");
        let row = json.as_array().unwrap().iter().find(|row| row["metric"] == metric).unwrap();
        assert!(row["unit"].is_string() && row["goal"].is_string() && row["description"].is_string());
    }
    // Goals of the issues, and a row that is reported without one.
    for (metric, peer, goal) in [
        ("lookup_batched_ns_1e3", None, Some("<= 12")),
        ("lookup_batched_ns_1e7", None, Some("<= 60")),
        ("lookup_dependent_ns_1e3", Some("std BTreeMap"), Some("<= 40")),
        ("lookup_dependent_ns_1e7", Some("std BTreeMap"), Some("<= 600")),
        ("bytes_per_extent", None, Some("<= 24")),
        ("blocking_read4k_vs_blobfs", Some("BlobFS"), Some(">= 10")),
        ("append_sync4k_vs_blobfs", Some("BlobFS"), None),
        ("alloc_free_ns_95_full", None, Some("<= 50")),
        ("alloc_free_p9999_over_median", None, Some("<= 20")),
        ("overwrite_wa_50", None, Some("<= 1.05")),
        ("overwrite_wa_80", None, Some("<= 1.15")),
        ("overwrite_wa_95", None, Some("<= 1.5")),
        ("overwrite_throughput_95_vs_50", Some("file of 50 %"), Some(">= 0.6")),
    ] {
        let row = json.as_array().unwrap().iter().find(|row| row["metric"] == metric).unwrap();
        assert_eq!(row["peer_name"].as_str(), peer, "{metric}");
        assert_eq!(row["goal"].as_str(), goal, "{metric}");
        assert!(row["description"].as_str().is_some_and(|about| about.len() > 20), "{metric}");
    }
}

#[test]
fn a_row_has_exactly_the_keys_of_the_schema() {
    let args = ["compare", "--device", "mem:128MiB", "--repeats", "3", "--seconds", "0.02", "--json"];
    let only = ["--only", "seqwrite1m_vs_raw", "--only", "seqread1m_vs_raw"];
    let json = bench(args.iter().chain(&only)).ok().json();
    let rows = json.as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        let object = row.as_object().unwrap();
        let mut keys: Vec<&str> = object.keys().map(String::as_str).collect();
        let mut expected = KEYS.to_vec();
        keys.sort_unstable();
        expected.sort_unstable();
        assert_eq!(keys, expected);
        assert_eq!(row["repeats"], 3);
        assert_eq!(row["unit"], "MiB/s");
        let figure = |key: &str| row[key].as_f64().unwrap();
        assert!(figure("min") <= figure("median") && figure("median") <= figure("max"));
        // The goal is about the ratio, so the median is the ratio's.
        assert_eq!(figure("median"), figure("ratio"));
        assert!(figure("ours") > 0.0 && figure("peer") > 0.0);
        assert_eq!(row["pass"].as_bool().unwrap(), figure("median") >= 0.6);
    }
}

#[test]
fn a_row_that_cannot_be_measured_here_is_skipped_with_a_reason() {
    // It wants the default device, and SPDK.
    let args =
        ["compare", "--device", "mem:64MiB", "--only", "malloc_randread4k_qd128_vs_bdevperf", "--json"];
    let run = bench(args).ok();
    assert_eq!(run.json().as_array().unwrap().len(), 0);
    let line =
        run.stderr.lines().find(|line| line.starts_with("SKIPPED: malloc_randread4k_qd128_vs_bdevperf: "));
    assert!(line.is_some_and(|line| line.contains("SPDK") || line.contains("spdk")), "{}", run.stderr);
    bench(args.iter().chain(&["--strict"])).failed(1, "SKIPPED");
}

#[test]
fn cpu_time_can_be_the_clock() {
    let args = ["compare", "--device", "mem:128MiB", "--repeats", "1", "--seconds", "0.01", "--clock", "cpu"];
    let run = bench(args.iter().chain(&["--only", "seqread1m_vs_raw", "--json"])).ok();
    assert!(run.json()[0]["ours"].as_f64().unwrap() > 0.0);
    assert!(run.stderr.contains("CPU time"), "{}", run.stderr);
}

#[test]
fn mount_time_of_a_huge_sparse_device_is_measured() {
    let args =
        ["compare", "--device", "mem:64MiB", "--repeats", "1", "--only", "mount_8tib_vs_8gib", "--json"];
    let json = bench(args).ok().json();
    assert!(json[0]["ratio"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_device_that_is_too_small_for_a_row_fails_that_row_only() {
    let dir = tempfile::tempdir().unwrap();
    let device = format!("{}?size=128MiB", uri(dir.path()));
    let base = ["compare", "--device", &device, "--repeats", "1", "--seconds", "0.01"];
    let run = bench(base.iter().chain(&["--only", "randread4k_qd32_vs_raw", "--only", "seqwrite1m_vs_raw"]));
    let text = run.failed(1, "2.0 GiB").text();
    assert!(text.contains("seqwrite1m_vs_raw"), "{text}");
}

#[test]
fn overwrites_write_a_little_more_than_their_bytes() {
    let args = ["compare", "--device", "mem:128MiB", "--clock", "cpu", "--json", "--only"];
    let run = bench(args.iter().chain(&["overwrite_wa_50", "--only", "overwrite_throughput_95_vs_50"])).ok();
    let json = run.json();
    let amplification = json[0]["ours"].as_f64().unwrap();
    assert!((1.0..1.2).contains(&amplification), "{amplification}");
    // Samples from nothing: fewer than the five that are the default.
    assert_eq!((json[0]["repeats"].as_u64(), json[1]["repeats"].as_u64()), (Some(1), Some(2)));
    assert!(json[1]["ours"].as_f64().unwrap() > 0.0 && json[1]["peer"].as_f64().unwrap() > 0.0);
    assert!(run.stderr.contains("writes a commit"), "{}", run.stderr);
}

#[test]
fn a_micro_row_needs_no_device() {
    let args =
        ["compare", "--repeats", "1", "--seconds", "0.01", "--json", "--only", "lookup_dependent_ns_1e3"];
    let json = bench(args).ok().json();
    assert!(json[0]["ours"].as_f64().unwrap() > 0.0 && json[0]["peer"].as_f64().unwrap() > 0.0);
}
