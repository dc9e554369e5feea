//! The report of `bench run`: fio's JSON keys, or lines for people.
//!
//! What fio does not have (CPU nanoseconds per I/O, verified blocks) is under the key `gaur` of each job.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

use super::options::{Format, RunArgs, Target};
use super::stats::{JobStats, Side};
use crate::failure::Result;
use crate::out::{Out, Table};
use crate::units;

/// The percentiles that fio prints by default.
const PERCENTILES: [f64; 17] =
    [1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99];

/// Prints the report of `jobs`.
pub(crate) fn print(args: &RunArgs, jobs: &[JobStats], out: &mut Out) -> Result<()> {
    match args.output_format {
        Format::Json => out.json(&document(args, jobs)),
        Format::Normal => lines(args, jobs, out),
    }
}

fn document(args: &RunArgs, jobs: &[JobStats]) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        // fio's parsers look at this key first; the value says who really wrote the report.
        "fio version": format!("gaur-bench-{}", env!("CARGO_PKG_VERSION")),
        "timestamp": now.as_secs(),
        "timestamp_ms": now.as_millis() as u64,
        "global options": { "ioengine": engine(args), "filename": args.device.device },
        "jobs": jobs.iter().map(|job| job_json(args, job)).collect::<Vec<_>>(),
    })
}

fn engine(args: &RunArgs) -> &'static str {
    match args.target {
        Target::Fs => "gaur",
        Target::Raw => "gaur-raw",
    }
}

fn job_json(args: &RunArgs, job: &JobStats) -> Value {
    let elapsed_us = job.elapsed_ns as f64 / 1e3;
    let percent = |us: u64| us as f64 / elapsed_us.max(1.0) * 100.0;
    json!({
        "jobname": args.name,
        "groupid": job.number,
        "error": 0,
        "eta": 0,
        "elapsed": job.elapsed_ns.div_ceil(1_000_000_000),
        "job options": options_json(args),
        "read": side_json(&job.read, job.elapsed_ns),
        "write": side_json(&job.write, job.elapsed_ns),
        "trim": side_json_empty(),
        "sync": { "total_ios": job.sync.ios, "lat_ns": latency_json(&job.sync.latency, true) },
        "job_runtime": job.elapsed_ns / 1_000_000,
        "usr_cpu": percent(job.usage.user_us),
        "sys_cpu": percent(job.usage.system_us),
        "ctx": job.usage.switches,
        "majf": job.usage.major_faults,
        "minf": job.usage.minor_faults,
        "iodepth": args.iodepth,
        "gaur": { "cpu_ns_per_op": job.cpu_ns_per_op(), "verified_blocks": job.verified },
    })
}

fn options_json(args: &RunArgs) -> Value {
    json!({
        "name": args.name,
        "rw": args.rw.name(),
        "rwmixread": args.rwmixread.to_string(),
        "bs": args.bs().to_string(),
        "iodepth": args.iodepth.to_string(),
        "numjobs": args.numjobs.to_string(),
        "size": args.size.to_string(),
        "runtime": args.runtime.map(|runtime| runtime.as_secs_f64().to_string()).unwrap_or_default(),
        "ramp_time": args.ramp_time.as_secs_f64().to_string(),
        "fsync": args.fsync.to_string(),
        "randseed": args.randseed.to_string(),
    })
}

fn side_json_empty() -> Value {
    let none = || json!({ "min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0 });
    json!({
        "io_bytes": 0, "io_kbytes": 0, "bw_bytes": 0, "bw": 0, "iops": 0.0, "runtime": 0, "total_ios": 0,
        "short_ios": 0, "drop_ios": 0, "slat_ns": none(), "clat_ns": none(), "lat_ns": none(),
    })
}

fn side_json(side: &Side, elapsed_ns: u64) -> Value {
    let mut value = side_json_empty();
    let Value::Object(fields) = &mut value else { return value };
    if side.ios > 0 {
        let seconds = elapsed_ns as f64 / 1e9;
        let bandwidth = side.bytes as f64 / seconds;
        fields.insert("io_bytes".into(), side.bytes.into());
        fields.insert("io_kbytes".into(), (side.bytes >> 10).into());
        fields.insert("bw_bytes".into(), (bandwidth as u64).into());
        fields.insert("bw".into(), ((bandwidth / 1024.0) as u64).into());
        fields.insert("iops".into(), (side.ios as f64 / seconds).into());
        fields.insert("runtime".into(), (elapsed_ns / 1_000_000).into());
        fields.insert("total_ios".into(), side.ios.into());
        // Submission does not wait here, so all of the latency is completion latency.
        fields.insert("clat_ns".into(), latency_json(&side.latency, true));
        fields.insert("lat_ns".into(), latency_json(&side.latency, false));
    }
    value
}

fn latency_json(latency: &Histogram<u64>, percentiles: bool) -> Value {
    let empty = latency.is_empty();
    let mut fields = Map::new();
    fields.insert("min".into(), (if empty { 0 } else { latency.min() }).into());
    fields.insert("max".into(), latency.max().into());
    fields.insert("mean".into(), (if empty { 0.0 } else { latency.mean() }).into());
    fields.insert("stddev".into(), (if empty { 0.0 } else { latency.stdev() }).into());
    fields.insert("N".into(), latency.len().into());
    if percentiles && !empty {
        let percentile = |p: f64| (format!("{p:.6}"), latency.value_at_percentile(p).into());
        fields.insert("percentile".into(), Value::Object(PERCENTILES.into_iter().map(percentile).collect()));
    }
    Value::Object(fields)
}

fn lines(args: &RunArgs, jobs: &[JobStats], out: &mut Out) -> Result<()> {
    let all = JobStats::sum(jobs)?;
    let elapsed = Duration::from_nanos(all.elapsed_ns);
    out.line(format!(
        "{}: rw={}, bs={}, iodepth={}, jobs={}, on {} ({}), {}",
        args.name,
        args.rw.name(),
        units::bytes(args.bs() as u64),
        args.iodepth,
        jobs.len(),
        args.device.device,
        engine(args),
        units::time(elapsed),
    ))?;
    let mut table = Table::new(&[false, true, true, true, true, true, true, true, true]);
    table.row(["", "IOPS", "MiB/s", "done", "lat mean", "p50", "p99", "p99.9", "max"]);
    for (name, side) in [("read", &all.read), ("write", &all.write), ("sync", &all.sync)] {
        if side.ios == 0 {
            continue;
        }
        let ns = |ns: u64| units::time(Duration::from_nanos(ns));
        let percentile = |p| ns(side.latency.value_at_percentile(p));
        table.row([
            name.to_owned(),
            units::figure(units::per_second(side.ios as f64, elapsed)),
            units::figure(units::per_second(side.bytes as f64 / units::MIB, elapsed)),
            units::bytes(side.bytes),
            ns(side.latency.mean() as u64),
            percentile(50.0),
            percentile(99.0),
            percentile(99.9),
            ns(side.latency.max()),
        ]);
    }
    table.print(out)?;
    let busy = all.cpu_ns as f64 / (all.elapsed_ns * jobs.len() as u64) as f64 * 100.0;
    out.line(format!(
        "CPU: {} ns per I/O, {busy:.0} % of each job's time",
        units::figure(all.cpu_ns_per_op())
    ))?;
    if all.verified > 0 {
        out.line(format!("verified: {} blocks read back as written", units::count(all.verified)))?;
    }
    Ok(())
}
