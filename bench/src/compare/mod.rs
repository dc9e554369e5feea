//! `bench compare`: rows of figures, each side by side with its peer in one process.
//!
//! A row takes its samples interleaved (ours, peer, ours, peer...), so that whatever slows the machine down slows both;
//! the figure of a row is the median over the repeats, and the spread is printed with it. Nothing is left out as an
//! outlier. One round beforehand warms up both sides and is not counted. (A row whose samples take many seconds and begin
//! from nothing takes fewer of them, and no round beforehand; its description says so.)
//!
//! To add a row: write a [`Contest`](row::Contest) in a file of its family under `rows/`, and name it in that file's
//! `ROWS`. To add a family: one more line in [`rows::all`].

mod blanks;
mod lab;
mod pump;
mod row;
mod rows;

use std::time::{Duration, Instant};

use serde::Serialize;

use self::lab::Lab;
use self::row::{Figure, Row, Sample};
use crate::failure::{Failure, Result};
use crate::out::{Bars, Out, Table, remark};
use crate::sys::{Clock, thread_cpu_ns};
use crate::units;

/// The device when none is given: SPDK's RAM disk in a build that has it, else plain memory.
const SPDK_DEVICE: &str = "spdk-bdev:Malloc0?config=scripts/spdk-malloc.json";
const MEMORY_DEVICE: &str = "mem:4GiB";

/// A measuring thread polls all the time. Below this share of its core something else had the core.
const BUSY_ENOUGH: f64 = 0.9;

/// Arguments of `bench compare`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench compare --list                                  what there is
  bench compare --only randread4k_qd32_vs_raw
  bench compare --repeats 9 --seconds 2 --json
  bench compare --device 'file:scratch.img?size=4GiB'

The device is erased. Without --device: the SPDK malloc bdev of scripts/spdk-malloc.json in a build with SPDK,
else memory. A row that needs what this machine or build lacks is skipped, with the reason on standard error.
Exit code: 0 when every row was measured or skipped (with --strict: was measured and reached its goal), else 1.")]
pub(crate) struct CompareArgs {
    /// Device, which is erased
    #[arg(long, short = 'd', value_name = "URI")]
    device: Option<String>,
    /// Erase the device even when it holds a Gaur filesystem
    #[arg(long)]
    force: bool,
    /// Measure only this row (may be given several times)
    #[arg(long, value_name = "METRIC")]
    only: Vec<String>,
    /// Print the rows that there are, and measure nothing
    #[arg(long)]
    list: bool,
    /// Samples of each side
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// How long one sample takes, about
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = units::parse_time)]
    seconds: Duration,
    /// Which time counts
    #[arg(long, value_enum, default_value = "wall")]
    clock: Clock,
    /// Seed of everything random
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Exit with 1 when a goal is missed
    #[arg(long)]
    strict: bool,
    /// Print JSON: an array with an object for each row
    #[arg(long)]
    json: bool,
}

/// A row that was measured. The field names are those of the JSON output.
#[derive(Debug, Serialize)]
struct Outcome {
    metric: &'static str,
    unit: &'static str,
    ours: f64,
    peer_name: Option<&'static str>,
    peer: Option<f64>,
    ratio: Option<f64>,
    median: f64,
    min: f64,
    max: f64,
    repeats: usize,
    goal: Option<String>,
    pass: Option<bool>,
}

/// What `--list --json` prints of a row.
#[derive(Debug, Serialize)]
struct Listed {
    metric: &'static str,
    unit: &'static str,
    peer_name: Option<&'static str>,
    goal: Option<String>,
    description: &'static str,
}

/// Measures, or lists.
pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    let rows = choose(&args.only)?;
    let mut out = Out::new(args.json);
    if args.list {
        list(&rows, &mut out)?;
        return out.flush();
    }
    let uri = args.device.clone().unwrap_or_else(default_device);
    let on_device = rows.iter().any(|row| row.on_device);
    let bars = Bars::new(args.json);
    let named = args.device.is_some();
    let lab =
        Lab::open(uri.clone(), named, on_device, args.force, args.seconds, args.clock, args.seed, bars)?;
    let uri = if on_device { &uri } else { "-" };
    out.line(format!("device {uri}, {} repeats of {} each side", args.repeats, units::time(args.seconds)))?;
    if args.clock == Clock::Cpu {
        remark("NOTE: the times are CPU times of the measuring thread (--clock cpu)");
    }
    out.line_now(header())?;
    let mut outcomes = Vec::new();
    let (mut failed, mut skipped) = (false, false);
    for row in rows {
        match measure(row, &lab, args.repeats) {
            Ok(outcome) => {
                out.line_now(line(&outcome, row.figure))?;
                outcomes.push(outcome);
            }
            Err(failure @ (Failure::Usage(_) | Failure::OutputClosed)) => return Err(failure),
            Err(Failure::Skipped(why)) => {
                remark(format!("SKIPPED: {}: {why}", row.metric));
                skipped = true;
            }
            Err(failure) => {
                remark(format!("error: {}: {failure}", row.metric));
                failed = true;
            }
        }
    }
    if args.json {
        out.json(&outcomes)?;
    }
    out.flush()?;
    let missed = args.strict && (skipped || outcomes.iter().any(|outcome| outcome.pass == Some(false)));
    if failed || missed { Err(Failure::Reported) } else { Ok(()) }
}

fn choose(only: &[String]) -> Result<Vec<&'static Row>> {
    let all: Vec<&Row> = rows::all().collect();
    if only.is_empty() {
        return Ok(all);
    }
    only.iter()
        .map(|metric| {
            all.iter().copied().find(|row| row.metric == metric).ok_or_else(|| {
                Failure::Usage(format!(
                    "there is no metric '{metric}'; `bench compare --list` prints those that are"
                ))
            })
        })
        .collect()
}

fn default_device() -> String {
    if cfg!(feature = "spdk") {
        return SPDK_DEVICE.to_owned();
    }
    remark(format!(
        "NOTE: this build has no SPDK; measuring on {MEMORY_DEVICE}. The goals are meant for an SPDK malloc bdev:\n\
         NOTE: build with --features spdk (see `make spdk`) or name another device with --device."
    ));
    MEMORY_DEVICE.to_owned()
}

fn list(rows: &[&'static Row], out: &mut Out) -> Result<()> {
    if out.is_json() {
        let listed = |row: &&'static Row| Listed {
            metric: row.metric,
            unit: row.unit,
            peer_name: row.peer_name,
            goal: row.goal.map(|goal| goal.to_string()),
            description: row.about,
        };
        return out.json(&rows.iter().map(listed).collect::<Vec<_>>());
    }
    let mut table = Table::new(&[]);
    table.row(["metric", "unit", "goal", "description"]);
    for row in rows {
        let what = if row.figure == Figure::Ratio { " x" } else { "" };
        let goal = row.goal.map_or("-".to_owned(), |goal| format!("{goal}{what}"));
        table.row([row.metric, row.unit, &goal, row.about]);
    }
    table.print(out)
}

fn measure(row: &Row, lab: &Lab, repeats: u32) -> Result<Outcome> {
    let bar = lab.bars.spinner(&format!("{}: preparing", row.metric));
    let result = (row.prepare)(lab).and_then(|mut contest| {
        if contest.warms_up() {
            bar.set_message(format!("{}: warming up", row.metric));
            contest.ours(lab)?;
            contest.peer(lab)?;
        }
        let repeats = contest.repeats(repeats);
        let mut samples = Vec::with_capacity(repeats as usize);
        // Of our side only: a peer may be a process of its own.
        let (mut wall, mut cpu) = (Duration::ZERO, 0);
        for repeat in 1..=repeats {
            bar.set_message(format!("{}: {repeat}/{repeats}", row.metric));
            let (began, cpu_before) = (Instant::now(), thread_cpu_ns());
            let ours = contest.ours(lab)?;
            (wall, cpu) = (wall + began.elapsed(), cpu + thread_cpu_ns() - cpu_before);
            samples.push(Sample { ours, peer: contest.peer(lab)? });
        }
        let busy = cpu as f64 / wall.as_nanos() as f64;
        let mut remarks = contest.remarks();
        if busy < BUSY_ENOUGH && lab.clock == Clock::Wall {
            let percent = busy * 100.0;
            remarks.push(format!(
                "NOTE: this thread ran only {percent:.0} % of the time: it waited for the device, or the machine is busy\n\
                 NOTE: and these figures mean little (--clock cpu leaves out the time of others)"
            ));
        }
        contest.finish()?;
        Ok((samples, remarks))
    });
    bar.finish_and_clear();
    let (samples, remarks) = result?;
    for text in remarks {
        remark(format!("{}: {text}", row.metric));
    }
    Ok(outcome(row, &samples))
}

fn outcome(row: &Row, samples: &[Sample]) -> Outcome {
    let sorted = |of: &dyn Fn(&Sample) -> Option<f64>| {
        let mut values: Vec<f64> = samples.iter().filter_map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let ours = sorted(&|sample| Some(sample.ours));
    let peer = sorted(&|sample| sample.peer);
    let ratios = sorted(&|sample| sample.peer.map(|peer| sample.ours / peer));
    let differences = sorted(&|sample| sample.peer.map(|peer| sample.ours - peer));
    let figures = match row.figure {
        Figure::Ratio => &ratios,
        Figure::Difference => &differences,
        Figure::Ours => &ours,
    };
    let middle = median(figures).unwrap_or(f64::NAN);
    Outcome {
        metric: row.metric,
        unit: row.unit,
        ours: median(&ours).unwrap_or(f64::NAN),
        peer_name: row.peer_name,
        peer: median(&peer),
        ratio: median(&ratios),
        median: middle,
        min: figures.first().copied().unwrap_or(f64::NAN),
        max: figures.last().copied().unwrap_or(f64::NAN),
        repeats: samples.len(),
        goal: row.goal.map(|goal| goal.to_string()),
        pass: row.goal.map(|goal| goal.reached(middle)),
    }
}

fn median(sorted: &[f64]) -> Option<f64> {
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[half]),
        _ => Some((sorted[half - 1] + sorted[half]) / 2.0),
    }
}

fn header() -> String {
    format!(
        "{:<28} {:>12} {:>12} {:<8} {:>7}  {:<26} {:<12} {}",
        "metric", "ours", "peer", "unit", "ratio", "median [min .. max]", "goal", ""
    )
}

fn line(outcome: &Outcome, figure: Figure) -> String {
    let optional = |value: Option<f64>| value.map_or("-".to_owned(), units::figure);
    let spread = format!(
        "{} [{} .. {}]",
        units::figure(outcome.median),
        units::figure(outcome.min),
        units::figure(outcome.max)
    );
    let goal = match (&outcome.goal, figure) {
        (None, _) => "-".to_owned(),
        (Some(goal), Figure::Ratio) => format!("{goal} x"),
        (Some(goal), Figure::Difference | Figure::Ours) => goal.clone(),
    };
    let verdict = match outcome.pass {
        None => "",
        Some(true) => "reached",
        Some(false) => "MISSED",
    };
    format!(
        "{:<28} {:>12} {:>12} {:<8} {:>7}  {:<26} {:<12} {}",
        outcome.metric,
        units::figure(outcome.ours),
        optional(outcome.peer),
        outcome.unit,
        optional(outcome.ratio),
        spread,
        goal,
        verdict
    )
}

#[cfg(test)]
mod tests {
    use super::row::Goal;
    use super::*;

    #[test]
    fn the_median_is_of_the_figure_that_the_goal_is_about() {
        let row = |figure, goal| Row {
            metric: "m",
            unit: "u",
            peer_name: Some("p"),
            figure,
            goal: Some(goal),
            on_device: false,
            about: "",
            prepare: |_| Err(Failure::new("not used")),
        };
        let samples: Vec<Sample> = [(10.0, 20.0), (30.0, 20.0), (20.0, 20.0), (40.0, 80.0)]
            .map(|(ours, peer)| Sample { ours, peer: Some(peer) })
            .to_vec();
        let ratio = outcome(&row(Figure::Ratio, Goal::AtLeast(0.75)), &samples);
        assert_eq!((ratio.median, ratio.min, ratio.max, ratio.pass), (0.75, 0.5, 1.5, Some(true)));
        let ours = outcome(&row(Figure::Ours, Goal::AtMost(24.0)), &samples);
        assert_eq!((ours.median, ours.min, ours.max, ours.pass), (25.0, 10.0, 40.0, Some(false)));
        assert_eq!((ours.ours, ours.peer, ours.ratio), (25.0, Some(20.0), Some(0.75)));
        let difference = outcome(&row(Figure::Difference, Goal::AtMost(-5.0)), &samples);
        let figures = (difference.median, difference.min, difference.max, difference.pass);
        assert_eq!(figures, (-5.0, -40.0, 10.0, Some(true)));
    }

    #[test]
    fn metrics_have_names_of_their_own() {
        let mut names: Vec<&str> = rows::all().map(|row| row.metric).collect();
        let number = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), number);
    }
}
