//! The URI by which a device is named: one grammar for library, bench and tests.
//!
//! ```text
//! uri     = { wrapper "/" } backend
//! wrapper = "fault"     ":" [ keys ]                    keys of [`FaultPlan`](crate::wrap::fault::plan)
//!         | "latency"   ":" [ keys ]                    keys of [`LatencyPlan`](crate::wrap::latency::plan)
//!         | "count"     ":"
//!         | "record"    ":" [ keys ]                    keys: limit
//! keys    = key "=" value { "," key "=" value }
//! backend = "mem"       ":" SIZE [ "?" options ]       options: block
//!         | "file"      ":" PATH [ "?" options ]       options: size, block, direct, depth
//!         | "spdk-bdev" ":" NAME [ "?" options ]       options: config
//!         | "spdk-nvme" ":" controller [ "?" options ] options: ns, depth, timeout, reconnect, fua; tcp: hostnqn, digest
//! controller = "pcie" ":" ADDRESS | ( "tcp" | "rdma" ) ":" HOST ":" PORT "/" NQN
//! options = key "=" value { "&" key "=" value }
//! ```
//!
//! Examples:
//!
//! | URI | names |
//! |---|---|
//! | `mem:1GiB` | one GiB of memory, empty, in blocks of 4096 bytes |
//! | `mem:8TiB?block=512` | the same, sparse, in blocks of 512 bytes |
//! | `file:/dev/nvme0n1` | a block device |
//! | `file:disk.img?size=1GiB&direct=off` | a file, created if [`OpenOptions::create`](crate::OpenOptions) says so |
//! | `file:a%3Fb.img` | the file `a?b.img` |
//! | `spdk-bdev:Malloc0?config=spdk.json` | a bdev of SPDK's JSON configuration |
//! | `spdk-nvme:pcie:0000:00:04.0` | the only namespace of a local NVMe controller, through SPDK's driver |
//! | `spdk-nvme:tcp:127.0.0.1:4420/nqn.2016-06.io.spdk:disk?ns=1` | a namespace of an NVMe/TCP target |
//! | `fault:seed=7,read_error=1e-4/mem:1GiB` | memory of which one read in ten thousand fails |
//! | `fault:write_error_nth=3/fault:gone_after=100/file:disk.img` | two wrappers; requests enter at the left |
//! | `latency:read=lognormal(80us,0.3),write=15us/mem:1GiB` | memory that takes its time |
//! | `count:/latency:read=20us/fault:seed=7,bit_rot=1e-4/mem:64MiB` | any wrappers, in any order |
//! | `record:limit=64MiB/mem:64MiB` | a recording from which crash states are built; see [`open_stack`](crate::open_stack) |
//!
//! Sizes are bytes with an optional unit: `KiB`, `MiB`, `GiB`, `TiB`, or short `K`, `M`, `G`, `T` (binary as well).
//! Paths, bdev names and option values are percent-decoded; `?`, `&` and `%` in them must be encoded (`%3F`, `%26`,
//! `%25`). Wrapper arguments contain no `/`; commas in parentheses belong to the value. Times are whole numbers with a unit:
//! `ns`, `us`, `ms`, `s`.
//!
//! Parsing is strict: an unknown key, a key given twice, a size that is no multiple of the block size are all
//! [`Error::BadUri`] with what would be right. Parsing touches no device.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::Error;
use crate::wrap::fault::FaultPlan;
use crate::wrap::latency::LatencyPlan;
use crate::wrap::recorder::RecordOptions;

mod nvme;

pub use nvme::{Fabric, NvmeAddress, NvmeOptions};

/// Wrappers around one device at most.
const MAX_WRAPPERS: usize = 16;

/// A parsed device URI.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceUri {
    text: String,
    wrappers: Vec<WrapperAt>,
    /// Where in `text` the backend begins.
    backend_at: usize,
    backend: Backend,
}

#[derive(Debug, Clone, PartialEq)]
struct WrapperAt {
    at: usize,
    wrapper: Wrapper,
}

/// The device itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// `mem:`
    Memory {
        /// Capacity in bytes.
        size: u64,
        /// Block size in bytes.
        block_size: u32,
    },
    /// `file:`
    File(FileOptions),
    /// `spdk-bdev:`
    SpdkBdev {
        /// Name of the bdev.
        name: String,
        /// SPDK's JSON configuration that creates it; none when the program has set SPDK up itself.
        config: Option<PathBuf>,
    },
    /// `spdk-nvme:`
    SpdkNvme(NvmeOptions),
}

/// What `file:` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileOptions {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Size in bytes that the file has, or gets when it is created.
    pub size: Option<u64>,
    /// Block size in bytes; none for what suits the file.
    pub block_size: Option<u32>,
    /// Whether the page cache of the kernel is bypassed.
    pub direct: Direct,
    /// Requests in flight per queue pair.
    pub depth: u32,
}

/// Whether a file is opened with `O_DIRECT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Direct {
    /// If its filesystem can.
    #[default]
    Auto,
    /// Yes; opening fails if that does not work.
    On,
    /// No.
    Off,
}

/// What stands between the caller and the device.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Wrapper {
    /// `fault:`
    Fault(FaultPlan),
    /// `latency:`
    Latency(LatencyPlan),
    /// `count:`
    Count,
    /// `record:`
    Record(RecordOptions),
}

/// Why a piece of a URI is wrong; becomes the `why` of [`Error::BadUri`].
type Parsed<T> = Result<T, String>;

impl DeviceUri {
    /// Parses a URI.
    ///
    /// # Errors
    /// [`Error::BadUri`] with what is wrong and an example of what is right.
    pub fn parse(text: &str) -> Result<DeviceUri, Error> {
        parse(text).map_err(|why| Error::BadUri { uri: text.to_owned(), why })
    }

    /// The URI as it was given.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The device itself.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The URI without its wrappers.
    pub fn backend_str(&self) -> &str {
        &self.text[self.backend_at..]
    }

    /// The wrappers from the inside out, each with the URI of the device that it makes.
    pub fn wrappers(&self) -> impl Iterator<Item = (&Wrapper, &str)> {
        self.wrappers.iter().rev().map(|w| (&w.wrapper, &self.text[w.at..]))
    }
}

fn parse(text: &str) -> Parsed<DeviceUri> {
    let mut wrappers = Vec::new();
    let mut at = 0;
    loop {
        let rest = &text[at..];
        let Some((scheme, body)) = rest.split_once(':') else {
            return Err(format!("'{rest}' has no scheme; {EXAMPLES}"));
        };
        if !WRAPPERS.contains(&scheme) {
            let backend = parse_backend(scheme, body)?;
            return Ok(DeviceUri { text: text.to_owned(), wrappers, backend_at: at, backend });
        }
        if wrappers.len() == MAX_WRAPPERS {
            return Err(format!("more than {MAX_WRAPPERS} wrappers"));
        }
        let Some((arguments, _)) = body.split_once('/') else {
            return Err(format!(
                "wrapper '{scheme}' has no device behind it; write {scheme}:{body}/mem:1GiB"
            ));
        };
        wrappers.push(WrapperAt { at, wrapper: parse_wrapper(scheme, &arguments_of(arguments)?)? });
        at += scheme.len() + 1 + arguments.len() + 1;
    }
}

/// Schemes of wrappers; every other scheme is a backend.
const WRAPPERS: [&str; 4] = ["fault", "latency", "count", "record"];

fn parse_wrapper(scheme: &str, arguments: &[(&str, &str)]) -> Parsed<Wrapper> {
    match scheme {
        "fault" => FaultPlan::parse(arguments).map(Wrapper::Fault),
        "latency" => LatencyPlan::parse(arguments).map(Wrapper::Latency),
        "count" if arguments.is_empty() => Ok(Wrapper::Count),
        "count" => Err("count takes no arguments; write count:/mem:1GiB".to_owned()),
        "record" => RecordOptions::parse(arguments).map(Wrapper::Record),
        _ => Err(format!("unknown wrapper '{scheme}'")),
    }
}

const EXAMPLES: &str = "write mem:1GiB, file:PATH?size=1GiB, spdk-bdev:Malloc0?config=PATH or \
                        spdk-nvme:pcie:0000:00:04.0";

/// Splits the arguments of a wrapper at the commas that are not in parentheses.
fn arguments_of(text: &str) -> Parsed<Vec<(&str, &str)>> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let mut depth = 0i64;
    let outside = |c: char| {
        depth += match c {
            '(' => 1,
            ')' => -1,
            _ => 0,
        };
        c == ',' && depth <= 0
    };
    text.split(outside).map(pair).collect()
}

fn parse_backend(scheme: &str, body: &str) -> Parsed<Backend> {
    let (what, options) = match body.split_once('?') {
        Some((what, options)) => (what, pairs(options, '&')?),
        None => (body, Vec::new()),
    };
    no_key_twice(&options)?;
    match scheme {
        "mem" => memory(what, &options),
        "file" => file(what, &options),
        "spdk-bdev" => spdk_bdev(what, &options),
        "spdk-nvme" => nvme::parse(what, &options).map(Backend::SpdkNvme),
        _ => Err(format!("unknown scheme '{scheme}'; {EXAMPLES}")),
    }
}

fn memory(size: &str, options: &[(&str, &str)]) -> Parsed<Backend> {
    if size.is_empty() {
        return Err("a memory device needs its size; write mem:1GiB".to_owned());
    }
    let size = parse_size(size).map_err(|why| format!("{why}, as in mem:1GiB"))?;
    let mut block_size = 4096;
    for (key, value) in options {
        match *key {
            "block" => block_size = parse_block_size(value)?,
            _ => return Err(unknown_option("mem", key, "block", "mem:1GiB?block=512")),
        }
    }
    check_capacity(size, block_size)?;
    Ok(Backend::Memory { size, block_size })
}

fn file(path: &str, options: &[(&str, &str)]) -> Parsed<Backend> {
    if path.is_empty() {
        return Err("a file needs its path; write file:disk.img or file:/dev/nvme0n1".to_owned());
    }
    let path = decode_path(path)?;
    let mut file = FileOptions { path, size: None, block_size: None, direct: Direct::Auto, depth: 128 };
    for (key, value) in options {
        match *key {
            "size" => file.size = Some(parse_size(value).map_err(|why| format!("{why}, as in size=1GiB"))?),
            "block" => file.block_size = Some(parse_block_size(value)?),
            "direct" => file.direct = parse_direct(value)?,
            "depth" => file.depth = parse_depth(value)?,
            _ => {
                let all = "size, block, direct, depth";
                return Err(unknown_option("file", key, all, "file:disk.img?size=1GiB&direct=off"));
            }
        }
    }
    if let Some(size) = file.size {
        check_capacity(size, file.block_size.unwrap_or(512))?;
    }
    Ok(Backend::File(file))
}

fn spdk_bdev(name: &str, options: &[(&str, &str)]) -> Parsed<Backend> {
    const RIGHT: &str = "spdk-bdev:Malloc0?config=spdk.json";
    let name = String::from_utf8(decode(name)?).map_err(|_| "a bdev name must be UTF-8".to_owned())?;
    if name.is_empty() || name.contains('\0') {
        return Err(format!("a bdev needs a name; write {RIGHT}"));
    }
    let mut config = None;
    for (key, value) in options {
        match *key {
            "config" if value.is_empty() => return Err(format!("option 'config' is empty; write {RIGHT}")),
            "config" => config = Some(decode_path(value)?),
            _ => return Err(unknown_option("spdk-bdev", key, "config", RIGHT)),
        }
    }
    Ok(Backend::SpdkBdev { name, config })
}

fn unknown_option(scheme: &str, key: &str, known: &str, right: &str) -> String {
    format!("{scheme} has no option '{key}' (it has: {known}); write {right}")
}

fn check_capacity(size: u64, block_size: u32) -> Parsed<()> {
    if size == 0 || !size.is_multiple_of(u64::from(block_size)) {
        return Err(format!("size {size} is not a positive multiple of the block size {block_size}"));
    }
    Ok(())
}

/// Splits `a=1,b=2`; an empty text has no pairs.
fn pairs(text: &str, separator: char) -> Parsed<Vec<(&str, &str)>> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    text.split(separator).map(pair).collect()
}

fn pair(text: &str) -> Parsed<(&str, &str)> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key, value)),
        _ => Err(format!("'{text}' is not of the form key=value")),
    }
}

fn no_key_twice(options: &[(&str, &str)]) -> Parsed<()> {
    for (number, (key, _)) in options.iter().enumerate() {
        if options[..number].iter().any(|(other, _)| other == key) {
            return Err(format!("option '{key}' is given twice"));
        }
    }
    Ok(())
}

/// Parses a size: bytes, or a whole number of `K`, `KiB`, `M`, `MiB`, `G`, `GiB`, `T`, `TiB` (all binary).
///
/// # Errors
/// What is wrong and what would be right.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(bad_size(text)),
    };
    let number: u64 = number.parse().map_err(|_| bad_size(text))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("size '{text}' is beyond 64 bits"))
}

fn bad_size(text: &str) -> String {
    format!("'{text}' is not a size; write a whole number of bytes, KiB, MiB, GiB or TiB")
}

fn parse_block_size(text: &str) -> Parsed<u32> {
    match parse_size(text) {
        Ok(size @ (512 | 1024 | 2048 | 4096)) => Ok(size as u32),
        _ => Err(format!("'{text}' is not a block size; write block=512, 1024, 2048 or 4096")),
    }
}

fn parse_direct(text: &str) -> Parsed<Direct> {
    match text {
        "auto" => Ok(Direct::Auto),
        "on" => Ok(Direct::On),
        "off" => Ok(Direct::Off),
        _ => Err(format!("direct='{text}' is unknown; write direct=auto, on or off")),
    }
}

fn parse_depth(text: &str) -> Parsed<u32> {
    match text.parse() {
        Ok(depth @ 1..=4096) => Ok(depth),
        _ => Err(format!("'{text}' is not a queue depth; write depth=128 (1 to 4096)")),
    }
}

/// Parses a time: a whole number of `ns`, `us`, `ms` or `s`, up to a day.
pub(crate) fn parse_duration(text: &str) -> Parsed<Duration> {
    let wrong = || format!("'{text}' is not a time up to a day; write a whole number of ns, us, ms or s");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let nanoseconds = match unit {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        _ => return Err(wrong()),
    };
    let time = number.parse::<u64>().ok().and_then(|number| number.checked_mul(nanoseconds));
    let time = time.map(Duration::from_nanos).filter(|time| *time <= Duration::from_secs(86_400));
    time.ok_or_else(wrong)
}

/// Parses a range of bytes, `1MiB-2MiB`, end excluded.
pub(crate) fn parse_range(text: &str) -> Parsed<std::ops::Range<u64>> {
    let wrong = || format!("'{text}' is not a range of bytes; write 1MiB-2MiB (end excluded)");
    let (start, end) = text.split_once('-').ok_or_else(wrong)?;
    let range = parse_size(start)?..parse_size(end)?;
    if range.is_empty() { Err(wrong()) } else { Ok(range) }
}

fn decode_path(text: &str) -> Parsed<PathBuf> {
    let bytes = decode(text)?;
    if bytes.contains(&0) {
        return Err("a path cannot contain a NUL byte (%00)".to_owned());
    }
    Ok(PathBuf::from(OsString::from_vec(bytes)))
}

/// Replaces `%41` by the byte 0x41.
fn decode(text: &str) -> Parsed<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            decoded.push(*first);
            continue;
        }
        let hex = |digit: &u8| (*digit as char).to_digit(16);
        let byte = match tail {
            [high, low, ..] => hex(high).zip(hex(low)).map(|(high, low)| (high * 16 + low) as u8),
            _ => None,
        };
        let wrong =
            || format!("'%' in '{text}' is not followed by two hex digits; write %25 for a percent sign");
        decoded.push(byte.ok_or_else(wrong)?);
        rest = &tail[2..];
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(uri: &str) -> Backend {
        DeviceUri::parse(uri).unwrap().backend
    }

    fn file_options(path: &str) -> FileOptions {
        FileOptions { path: path.into(), size: None, block_size: None, direct: Direct::Auto, depth: 128 }
    }

    #[test]
    fn good_uris() {
        assert_eq!(parsed("mem:1GiB"), Backend::Memory { size: 1 << 30, block_size: 4096 });
        assert_eq!(parsed("mem:8T?block=512"), Backend::Memory { size: 8 << 40, block_size: 512 });
        assert_eq!(parsed("mem:8192"), Backend::Memory { size: 8192, block_size: 4096 });
        assert_eq!(parsed("file:/dev/nvme0n1"), Backend::File(file_options("/dev/nvme0n1")));
        assert_eq!(parsed("file:a:b%3f%25%20c"), Backend::File(file_options("a:b?% c")));
        assert_eq!(
            parsed("file:x/y?size=1GiB&block=4096&direct=off&depth=4"),
            Backend::File(FileOptions {
                size: Some(1 << 30),
                block_size: Some(4096),
                direct: Direct::Off,
                depth: 4,
                ..file_options("x/y")
            })
        );
        assert_eq!(
            parsed("spdk-bdev:Malloc0?config=a/b.json"),
            Backend::SpdkBdev { name: "Malloc0".into(), config: Some("a/b.json".into()) }
        );
    }

    #[test]
    fn wrappers_come_from_the_inside_out_with_the_uri_of_what_they_make() {
        let uri = DeviceUri::parse("fault:seed=1/fault:/mem:1MiB").unwrap();
        assert_eq!(uri.backend_str(), "mem:1MiB");
        let names: Vec<_> = uri.wrappers().map(|(_, name)| name).collect();
        assert_eq!(names, ["fault:/mem:1MiB", "fault:seed=1/fault:/mem:1MiB"]);
    }

    #[test]
    fn sizes() {
        for (text, size) in
            [("0", 0), ("512", 512), ("4K", 4096), ("4KiB", 4096), ("2m", 2 << 20), ("3GiB", 3 << 30)]
        {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in
            ["", "K", "-1", "1.5G", "1KB", "1 G", "0x10", "1GiBs", "99999999999999999999", "16777216T"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_mistake_says_what_is_wrong_and_what_is_right() {
        // URI, what the message must contain.
        let table = [
            ("", "mem:1GiB"),
            ("mem", "no scheme"),
            ("/dev/sda", "file:PATH"),
            ("nvme:0", "unknown scheme 'nvme'"),
            ("MEM:1GiB", "unknown scheme 'MEM'"),
            ("mem:", "mem:1GiB"),
            ("mem:big", "'big' is not a size"),
            ("mem:1GB", "KiB, MiB, GiB"),
            ("mem:0", "positive multiple"),
            ("mem:1000", "multiple of the block size 4096"),
            ("mem:1GiB?block", "key=value"),
            ("mem:1GiB?block=", "block=512"),
            ("mem:1GiB?block=8192", "block=512"),
            ("mem:1GiB?block=513", "block=512"),
            ("mem:1GiB?block=512&block=512", "given twice"),
            ("mem:1GiB?size=1", "no option 'size' (it has: block)"),
            ("mem:1GiB?block=512?x=1", "block=512"),
            ("mem:99999999TiB", "64 bits"),
            ("file:", "file:disk.img"),
            ("file:?size=1GiB", "file:disk.img"),
            ("file:x?size=0", "positive multiple"),
            ("file:x?size=1000", "multiple of the block size 512"),
            ("file:x?size=512&block=4096", "multiple of the block size 4096"),
            ("file:x?direct=maybe", "direct=auto, on or off"),
            ("file:x?depth=0", "depth=128"),
            ("file:x?=1", "key=value"),
            ("file:x?&", "key=value"),
            ("file:x%2", "%25"),
            ("file:x%zz", "%25"),
            ("file:x%00", "NUL"),
            ("spdk-bdev:", "needs a name"),
            ("spdk-bdev:M0?config=", "config=spdk.json"),
            ("spdk-bdev:M0?conf=x", "no option 'conf'"),
            ("spdk-bdev:%ff", "UTF-8"),
            ("fault:seed=1", "no device behind it"),
            ("fault:seed=1/", "no scheme"),
            ("fault:seed=x/mem:1MiB", "seed=7"),
            ("fault:seed=1,seed=2/mem:1MiB", "twice"),
            ("fault:,/mem:1MiB", "key=value"),
            ("fault:explode=1/mem:1MiB", "read_error"),
            ("fault:read_error=2/mem:1MiB", "0 to 1"),
            ("fault:read_error=nan/mem:1MiB", "0 to 1"),
            ("fault:read_error_nth=0/mem:1MiB", "counted from 1"),
            ("fault:read_error_range=5-5/mem:1MiB", "end excluded"),
            ("fault:read_error_sometimes=5/mem:1MiB", "read_error"),
        ];
        for (uri, expected) in table {
            match DeviceUri::parse(uri) {
                Err(Error::BadUri { uri: shown, why }) => {
                    assert_eq!(shown, uri);
                    assert!(why.contains(expected), "{uri}: '{why}' does not say '{expected}'");
                }
                other => panic!("{uri}: {other:?}"),
            }
        }
        let deep = "fault:/".repeat(MAX_WRAPPERS + 1) + "mem:1MiB";
        assert!(matches!(DeviceUri::parse(&deep), Err(Error::BadUri { .. })));
    }
}
