//! Sizes, times and counts as people write and read them.

use std::time::Duration;

/// One MiB, as a divisor for rates.
pub(crate) const MIB: f64 = 1048576.0;

/// Parses a size as fio does: `4k`, `1M`, `2GiB`, `512`. All suffixes are powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, suffix) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("'{text}' is not a size; write 4k, 1MiB or 2g"))?;
    let suffix = suffix.to_ascii_lowercase();
    let shift = match suffix.strip_suffix("ib").or_else(|| suffix.strip_suffix('b')).unwrap_or(&suffix) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        other => return Err(format!("'{other}' in '{text}' is not a unit; the units are k, m, g and t")),
    };
    number.checked_shl(shift).filter(|bytes| bytes >> shift == number).ok_or(format!("'{text}' is too large"))
}

/// Like [`parse_bytes`], for sizes of something that must not be empty.
pub(crate) fn parse_bytes_not_zero(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        0 => Err("must be more than zero".to_owned()),
        bytes => Ok(bytes),
    }
}

/// Parses a time as fio does: a plain number means seconds; `500ms`, `10s`, `2m` work too.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("'{unit}' in '{text}' is not a unit of time; write 10, 10s, 500ms or 2m")),
    };
    let number: f64 =
        number.parse().map_err(|_| format!("'{text}' is not a time; write 10, 10s, 500ms or 2m"))?;
    Duration::try_from_secs_f64(number * factor).map_err(|_| format!("'{text}' is too long a time"))
}

/// A size for people: `1.2 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A count with its thousands set apart: `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time for people, three digits or so: `1.25 s`, `340 us`.
pub(crate) fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.1} ms", s * 1e3),
        s if s >= 1e-6 => format!("{:.1} us", s * 1e6),
        s => format!("{:.0} ns", s * 1e9),
    }
}

/// A figure of any magnitude with a sensible number of digits.
pub(crate) fn figure(value: f64) -> String {
    if !value.is_finite() {
        "-".to_owned()
    } else if value >= 1000.0 {
        count(value.round() as u64)
    } else if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    }
}

/// `events` per second of `time`.
pub(crate) fn per_second(events: f64, time: Duration) -> f64 {
    events / time.as_secs_f64().max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_fio_reads_them() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("4k", 4096), ("4K", 4096), ("1MiB", 1 << 20), ("2gb", 2 << 30)]
        {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "k", "4x", "-1", "4 k", "99999999999999999999", "20000000t"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_read_as_fio_reads_them() {
        assert_eq!(parse_time("2"), Ok(Duration::from_secs(2)));
        assert_eq!(parse_time("0.5s"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_time("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(parse_time("2m"), Ok(Duration::from_secs(120)));
        for text in ["", "s", "1.2.3", "-3", "4 s", "1e400", "99999999999999999999999h"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn figures_for_people() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(1 << 30), "1.0 GiB");
        assert_eq!(count(7), "7");
        assert_eq!(count(1234567), "1,234,567");
        assert_eq!(time(Duration::from_micros(340)), "340.0 us");
    }
}
