//! `bench run`: fio's keys, and figures that agree with each other.

mod common;

use common::{bench, formatted};

const BASE: [&str; 9] =
    ["run", "--device", "mem:256MiB", "--size", "4m", "--randseed", "5", "--output-format", "json"];

#[test]
fn the_json_has_fios_keys() {
    let report =
        bench(BASE.iter().chain(&["--rw", "randrw", "--iodepth", "8", "--name", "mixed"])).ok().json();
    assert!(report["fio version"].is_string());
    assert!(report["timestamp"].is_u64() && report["global options"].is_object());
    let job = &report["jobs"][0];
    assert_eq!((&job["jobname"], &job["error"]), (&"mixed".into(), &0.into()));
    assert_eq!(job["job options"]["rw"], "randrw");
    for key in ["usr_cpu", "sys_cpu", "ctx", "job_runtime", "elapsed", "sync", "trim"] {
        assert!(!job[key].is_null(), "{key}");
    }
    for side in ["read", "write"] {
        let side = &job[side];
        for key in ["io_bytes", "io_kbytes", "bw_bytes", "bw", "iops", "runtime", "total_ios", "short_ios"] {
            assert!(side[key].is_number(), "{key}");
        }
        for key in ["slat_ns", "clat_ns", "lat_ns"] {
            for figure in ["min", "max", "mean", "stddev", "N"] {
                assert!(side[key][figure].is_number(), "{key}.{figure}");
            }
        }
        let (p50, p99) =
            (&side["clat_ns"]["percentile"]["50.000000"], &side["clat_ns"]["percentile"]["99.000000"]);
        assert!(p50.as_u64().unwrap() <= p99.as_u64().unwrap());
        assert_eq!(side["io_bytes"].as_u64().unwrap(), side["total_ios"].as_u64().unwrap() * 4096);
    }
    assert_eq!(
        job["read"]["io_bytes"].as_u64().unwrap() + job["write"]["io_bytes"].as_u64().unwrap(),
        4 << 20
    );
    assert!(job["gaur"]["cpu_ns_per_op"].as_f64().unwrap() > 0.0);
}

#[test]
fn every_kind_of_io_runs_on_both_targets() {
    for target in ["fs", "raw"] {
        for rw in ["read", "write", "randread", "randwrite", "rw", "randrw"] {
            let args = ["--target", target, "--rw", rw, "--bs", "16k", "--iodepth", "4", "--numjobs", "2"];
            let report = bench(BASE.iter().chain(&args)).ok().json();
            assert_eq!(report["jobs"].as_array().unwrap().len(), 2);
            for job in report["jobs"].as_array().unwrap() {
                let bytes = |side: &str| job[side]["io_bytes"].as_u64().unwrap();
                assert_eq!(bytes("read") + bytes("write"), 4 << 20, "{target} {rw}");
                assert_eq!(bytes("read") > 0, rw != "write" && rw != "randwrite", "{target} {rw}");
                assert_eq!(bytes("write") > 0, rw != "read" && rw != "randread", "{target} {rw}");
            }
        }
    }
}

#[test]
fn writes_are_synced_and_verified_when_asked() {
    let args = ["--rw", "randwrite", "--iodepth", "4", "--fsync", "16", "--end_fsync", "1", "--verify"];
    for target in ["fs", "raw"] {
        let report = bench(BASE.iter().chain(&args).chain(&["--target", target])).ok().json();
        let job = &report["jobs"][0];
        let (writes, syncs) =
            (job["write"]["total_ios"].as_u64().unwrap(), job["sync"]["total_ios"].as_u64().unwrap());
        assert_eq!(writes, 1024);
        assert!((writes / 16..=writes / 16 + 1).contains(&syncs), "{syncs}");
        assert!(job["gaur"]["verified_blocks"].as_u64().unwrap() > 500);
    }
}

#[test]
fn time_limits_and_ramps_hold() {
    let args =
        ["--rw", "randread", "--iodepth", "4", "--runtime", "300ms", "--time_based", "--ramp_time", "100ms"];
    let report = bench(BASE.iter().chain(&args)).ok().json();
    let runtime = report["jobs"][0]["read"]["runtime"].as_u64().unwrap();
    assert!((290..2000).contains(&runtime), "{runtime} ms");
    let args = ["--rw", "randread", "--runtime", "100ms", "--time_based", "--target", "raw", "--hipri"];
    bench(BASE.iter().chain(&args)).ok();
}

#[test]
fn files_stay_and_are_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let uri = formatted(dir.path());
    let base = ["run", "--device", &uri, "--size", "2m", "--bs", "64k"];
    bench(base.iter().chain(&["--rw", "write", "--name", "job"])).ok();
    let text = bench(base.iter().chain(&["--rw", "read", "--name", "job"])).ok().text();
    assert!(text.contains("read") && text.contains("MiB/s") && text.contains("ns per I/O"), "{text}");
    assert_eq!(bench(["ls", "--device", &uri]).ok().text(), "job.0.0\n");
    let output = dir.path().join("report.json");
    let to_file = ["--output-format", "json", "--output", output.to_str().unwrap()];
    assert_eq!(bench(base.iter().chain(&to_file)).ok().text(), "");
    assert!(std::fs::read_to_string(output).unwrap().contains("\"jobs\""));
    bench(["run", "--device", "mem:256MiB", "--output", "no/such/dir/x"]).failed(1, "no/such/dir");
}
