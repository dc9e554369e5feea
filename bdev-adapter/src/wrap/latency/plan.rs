//! How long each kind of request takes: the plan of a latency wrapper, its grammar, and its decisions.
//!
//! | key | is |
//! |---|---|
//! | `read`, `write`, `flush`, `unmap` | the time of such a request, none if not given; `write` is for write-zeroes too |
//! | `fua` | what FUA adds to a write |
//! | `jitter=10us` | every request that takes any time takes up to this much more, evenly distributed |
//! | `channels=8` | requests that the device works on at once, all queue pairs together; without it, any number |
//! | `seed=7` | makes the random decisions; 0 if not given |
//!
//! | a time | is |
//! |---|---|
//! | `80us` | always the same |
//! | `uniform(50us,100us)` | evenly distributed between the two |
//! | `normal(80us,10us)` | normally distributed by mean and standard deviation, never below zero |
//! | `lognormal(80us,0.5)` | its logarithm is normally distributed: median, and standard deviation of the logarithm |
//! | `pareto(50us,1.5)` | a long tail: smallest time and exponent; one in 2^1.5 is above twice the smallest time |
//! | `percentiles(50:80us,99:300us,100:5ms)` | a table, straight lines between its entries; below the first it is constant |
//!
//! No time is drawn above [`TIME_MAX`].

use std::time::Duration;

use crate::uri::parse_duration;
use crate::wrap::random::{mix, unit};
use crate::{Kind, Request};

/// The longest time that is drawn from a distribution: tails have no end, tests have.
pub const TIME_MAX: Duration = Duration::from_secs(60);

/// How long requests take. See the [module documentation](self) for the grammar; tests may also build it directly.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LatencyPlan {
    /// Seed of the random decisions.
    pub seed: u64,
    /// The time of a read.
    pub read: Time,
    /// The time of a write or write-zeroes.
    pub write: Time,
    /// The time of a flush.
    pub flush: Time,
    /// The time of an unmap.
    pub unmap: Time,
    /// What FUA adds to a write.
    pub fua: Time,
    /// What is added to every request that takes any time, at most.
    pub jitter: Duration,
    /// Requests that the device works on at once; none for any number.
    pub channels: Option<u32>,
}

/// A time, fixed or from a distribution.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Time {
    /// No time at all.
    #[default]
    None,
    /// Always the same.
    Fixed(Duration),
    /// Between the two.
    Uniform(Duration, Duration),
    /// By mean and standard deviation.
    Normal(Duration, Duration),
    /// By median and standard deviation of the natural logarithm.
    LogNormal(Duration, f64),
    /// By smallest time and exponent.
    Pareto(Duration, f64),
    /// Shares of the requests, 0 to 1 and rising, that take no longer than the time beside them, which rises too.
    Percentiles(Vec<(f64, Duration)>),
}

impl Time {
    /// The time that `bits`, random ones, give.
    fn draw(&self, bits: u64) -> Duration {
        let (even, other) = (unit(mix(bits)), unit(mix(bits ^ u64::MAX)));
        // Box and Muller, 1958. `1 - even` is never 0.
        let normal = || (-2.0 * (1.0 - even).ln()).sqrt() * (std::f64::consts::TAU * other).cos();
        let seconds = match self {
            Time::None => 0.0,
            Time::Fixed(time) => return *time,
            Time::Uniform(low, high) => between(*low, *high, even),
            Time::Normal(mean, deviation) => mean.as_secs_f64() + deviation.as_secs_f64() * normal(),
            Time::LogNormal(median, deviation) => median.as_secs_f64() * (deviation * normal()).exp(),
            Time::Pareto(least, exponent) => least.as_secs_f64() * (1.0 - even).powf(-1.0 / exponent),
            Time::Percentiles(table) => from_table(table, even),
        };
        // `max` and `min` take the number where the other one is NaN.
        Duration::from_secs_f64(seconds.max(0.0).min(TIME_MAX.as_secs_f64()))
    }
}

fn between(low: Duration, high: Duration, share: f64) -> f64 {
    low.as_secs_f64() + (high.as_secs_f64() - low.as_secs_f64()) * share
}

fn from_table(table: &[(f64, Duration)], share: f64) -> f64 {
    let above = table.iter().position(|(upto, _)| share <= *upto);
    match above {
        Some(0) => table[0].1.as_secs_f64(),
        Some(at) => {
            let ((from, low), (upto, high)) = (table[at - 1], table[at]);
            between(low, high, (share - from) / (upto - from))
        }
        None => table.last().map_or(0.0, |(_, time)| time.as_secs_f64()),
    }
}

impl LatencyPlan {
    /// The plan of these keys and values of the URI grammar.
    pub(crate) fn parse(arguments: &[(&str, &str)]) -> Result<LatencyPlan, String> {
        let mut plan = LatencyPlan::default();
        for (number, (key, value)) in arguments.iter().enumerate() {
            if arguments[..number].iter().any(|(other, _)| other == key) {
                return Err(format!("latency has '{key}' twice"));
            }
            plan.set(key, value)?;
        }
        Ok(plan)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "seed" => {
                self.seed = value.parse().map_err(|_| format!("'{value}' is not a seed; write seed=7"))?
            }
            "read" => self.read = parse_time(key, value)?,
            "write" => self.write = parse_time(key, value)?,
            "flush" => self.flush = parse_time(key, value)?,
            "unmap" => self.unmap = parse_time(key, value)?,
            "fua" => self.fua = parse_time(key, value)?,
            "jitter" => {
                self.jitter = parse_duration(value).map_err(|why| format!("{why}, as in jitter=10us"))?
            }
            "channels" => match value.parse() {
                Ok(channels @ 1..=65_536) => self.channels = Some(channels),
                _ => {
                    return Err(format!("'{value}' is no number of channels; write channels=8 (1 to 65536)"));
                }
            },
            _ => {
                return Err(format!(
                    "latency has no '{key}' (it has: read, write, flush, unmap, fua, jitter, channels, seed); \
                     write latency:read=80us,write=15us"
                ));
            }
        }
        Ok(())
    }

    /// The time of `request`, the `number`-th of its queue pair, which is the `queue_pair`-th.
    pub(super) fn time(&self, request: &Request, queue_pair: u64, number: u64) -> Duration {
        let bits = mix(mix(mix(self.seed) ^ queue_pair) ^ number);
        let time = match request.kind {
            Kind::Read => self.read.draw(bits),
            Kind::Write | Kind::WriteZeroes if request.hints.fua => {
                self.write.draw(bits) + self.fua.draw(mix(bits))
            }
            Kind::Write | Kind::WriteZeroes => self.write.draw(bits),
            Kind::Flush { .. } => self.flush.draw(bits),
            Kind::Unmap => self.unmap.draw(bits),
        };
        if time.is_zero() { time } else { time + self.jitter.mul_f64(unit(mix(bits ^ 1))) }
    }
}

fn parse_time(key: &str, text: &str) -> Result<Time, String> {
    let wrong = || {
        format!(
            "'{text}' is no time; write {key}=80us, or one of uniform(50us,100us), normal(80us,10us), \
             lognormal(80us,0.5), pareto(50us,1.5), percentiles(50:80us,99:300us,100:5ms)"
        )
    };
    let Some((name, rest)) = text.split_once('(') else {
        return parse_duration(text).map(Time::Fixed).map_err(|_| wrong());
    };
    let arguments: Vec<&str> = rest.strip_suffix(')').ok_or_else(wrong)?.split(',').collect();
    let time = |text: &str| parse_duration(text).map_err(|_| wrong());
    match (name, arguments.as_slice()) {
        ("uniform", [low, high]) if time(low)? <= time(high)? => Ok(Time::Uniform(time(low)?, time(high)?)),
        ("normal", [mean, deviation]) => Ok(Time::Normal(time(mean)?, time(deviation)?)),
        ("lognormal", [median, deviation]) => {
            Ok(Time::LogNormal(time(median)?, number(deviation, 0.0..=10.0).ok_or_else(wrong)?))
        }
        ("pareto", [least, exponent]) => {
            Ok(Time::Pareto(time(least)?, number(exponent, 0.1..=100.0).ok_or_else(wrong)?))
        }
        ("percentiles", table) => parse_table(table).map(Time::Percentiles).ok_or_else(wrong),
        _ => Err(wrong()),
    }
}

fn number(text: &str, within: std::ops::RangeInclusive<f64>) -> Option<f64> {
    text.parse().ok().filter(|number| within.contains(number))
}

/// `50:80us` and so on, both sides rising.
fn parse_table(entries: &[&str]) -> Option<Vec<(f64, Duration)>> {
    let mut table: Vec<(f64, Duration)> = Vec::with_capacity(entries.len());
    for entry in entries {
        let (share, time) = entry.split_once(':')?;
        let entry = (number(share, 0.0..=100.0)? / 100.0, parse_duration(time).ok()?);
        if table.last().is_some_and(|last| last.0 >= entry.0 || last.1 > entry.1) {
            return None;
        }
        table.push(entry);
    }
    Some(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The times of many requests, in microseconds, sorted.
    fn sample(text: &str) -> Vec<f64> {
        let time = parse_time("read", text).unwrap();
        let mut times: Vec<f64> =
            (0..100_000).map(|number| time.draw(mix(number)).as_secs_f64() * 1e6).collect();
        times.sort_by(f64::total_cmp);
        times
    }

    fn percentile(times: &[f64], percent: f64) -> f64 {
        times[((times.len() - 1) as f64 * percent / 100.0) as usize]
    }

    fn near(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 0.05, "{found} instead of {expected}");
    }

    #[test]
    fn distributions_have_their_shape() {
        // Distribution, percentile, value in microseconds.
        let table = [
            ("80us", 0.0, 80.0),
            ("80us", 100.0, 80.0),
            ("uniform(50us,150us)", 50.0, 100.0),
            ("uniform(50us,150us)", 90.0, 140.0),
            ("normal(80us,10us)", 50.0, 80.0),
            ("normal(80us,10us)", 97.725, 100.0),
            ("normal(80us,10us)", 15.866, 70.0),
            ("lognormal(80us,0.5)", 50.0, 80.0),
            ("lognormal(80us,0.5)", 97.725, 80.0 * std::f64::consts::E),
            ("pareto(50us,2)", 0.0, 50.0),
            ("pareto(50us,2)", 75.0, 100.0),
            ("pareto(50us,2)", 99.0, 500.0),
            ("percentiles(50:80us,99:300us,100:5ms)", 10.0, 80.0),
            ("percentiles(50:80us,99:300us,100:5ms)", 74.5, 190.0),
            ("percentiles(50:80us,99:300us,100:5ms)", 99.5, 2650.0),
        ];
        for (text, percent, expected) in table {
            near(percentile(&sample(text), percent), expected);
        }
        assert!(sample("normal(10us,100us)")[0] == 0.0, "no time is below zero");
        assert!(sample("pareto(1s,0.1)").iter().all(|time| *time <= TIME_MAX.as_secs_f64() * 1e6));
    }

    #[test]
    fn jitter_and_fua() {
        let plan = LatencyPlan::parse(&[("write", "100us"), ("fua", "1ms"), ("jitter", "50us")]).unwrap();
        let request = |fua: bool| {
            let request = Request::write_zeroes(0, 512, 0);
            if fua { request.with_hints(crate::Hints::fua()) } else { request }
        };
        let times: Vec<_> =
            (0..1000).map(|number| plan.time(&request(false), 0, number).as_micros()).collect();
        assert!(times.iter().all(|time| (100..=150).contains(time)));
        assert!(times.iter().any(|time| *time < 105) && times.iter().any(|time| *time > 145));
        assert!(plan.time(&request(true), 0, 1) >= Duration::from_micros(1100));
        assert!(plan.time(&Request::flush(0, 0), 0, 1).is_zero(), "no jitter where there is no time");
    }
}
