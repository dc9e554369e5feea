//! What the integration tests share: seeds, scales, watchdogs, devices, and the model with its driver.
//!
//! Environment:
//!
//! | variable | is | default |
//! |---|---|---|
//! | `GAUR_SEED` | the seed of every randomised test | random, printed |
//! | `GAUR_OPS` | operations of a randomised test, all its scenarios together | the short form |
//! | `GAUR_CRASHES` | crash states of `crash.rs`, all workloads together | the short form |
//! | `GAUR_DEVICE` | `mem:`; or `file:PATH[?options]`: each test makes a file `PATH.N` of the size it needs; or any other device URI: the beginning of that device is used (and erased), by one test at a time (`--test-threads 1`) | `mem:` |
//! | `GAUR_TRACE` | set: the model prints every operation before it is done | |
//! | `GAUR_TIME_LIMIT` | seconds after which a watchdog aborts a test | per test, longer for long forms |

#![allow(dead_code, reason = "each test binary uses its own part of the helpers")]

pub(crate) mod driver;
pub(crate) mod footprint;
pub(crate) mod gate;
pub(crate) mod generate;
pub(crate) mod op;
pub(crate) mod reference;
pub(crate) mod slow;
pub(crate) mod window;

use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use bdev_adapter::{Device, OpenOptions};
use fs_core::{Filesystem, FormatOptions, MountOptions};

pub(crate) const BLOCK: u64 = fs_core::BLOCK_SIZE as u64;
pub(crate) const MIB: u64 = 1 << 20;

fn env<T: FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    match text.parse() {
        Ok(value) => Some(value),
        Err(_) => panic!("{name}={text} is not what {name} should be"),
    }
}

/// The seed of this run of `test`; printed, so that a failure can be replayed.
pub(crate) fn seed(test: &str) -> u64 {
    // A hasher of the standard library has a random key: good enough for a seed.
    let seed = env("GAUR_SEED").unwrap_or_else(|| RandomState::new().hash_one(test));
    println!("{test}: replay with GAUR_SEED={seed}");
    seed
}

/// How many operations a randomised test is to do.
pub(crate) fn ops(default: usize) -> usize {
    env("GAUR_OPS").unwrap_or(default)
}

/// Whether operations are printed.
pub(crate) fn trace() -> bool {
    std::env::var_os("GAUR_TRACE").is_some()
}

/// How many crash states are to be tried.
pub(crate) fn crashes(default: usize) -> usize {
    env("GAUR_CRASHES").unwrap_or(default)
}

/// Aborts the process when a test takes too long: a hang is a failure with a seed, not a stuck CI.
pub(crate) struct Watchdog {
    _alive: Sender<()>,
    began: Instant,
    what: String,
}

impl Watchdog {
    /// Watches `test` for `seconds` (`GAUR_TIME_LIMIT` wins).
    pub(crate) fn start(test: &str, seed: u64, seconds: u64) -> Watchdog {
        let limit = Duration::from_secs(env("GAUR_TIME_LIMIT").unwrap_or(seconds));
        let (alive, gone) = channel::<()>();
        let what = format!("{test} (GAUR_SEED={seed})");
        let name = what.clone();
        std::thread::spawn(move || {
            if gone.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{name}: not done after {limit:?}: it hangs; aborting");
                std::process::abort();
            }
        });
        Watchdog { _alive: alive, began: Instant::now(), what }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        println!("{}: {:.2?}", self.what, self.began.elapsed());
    }
}

/// A device for one test; its file, if it has one, goes with it.
pub(crate) struct TestDevice {
    pub(crate) device: Arc<dyn Device>,
    file: Option<PathBuf>,
}

impl TestDevice {
    /// A device of `bytes` as `GAUR_DEVICE` says.
    pub(crate) fn new(bytes: u64) -> TestDevice {
        TestDevice::in_blocks(bytes, 4096)
    }

    /// The same, in blocks of `block` bytes if it is in memory and nothing else is asked for.
    pub(crate) fn in_blocks(bytes: u64, block: u32) -> TestDevice {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let wanted = std::env::var("GAUR_DEVICE").unwrap_or_else(|_| "mem:".to_owned());
        let (uri, file) = match wanted.split_once(':') {
            Some(("mem", "")) => (format!("mem:{bytes}?block={block}"), None),
            Some(("mem", options)) => (format!("mem:{bytes}{options}"), None),
            Some(("file", rest)) => {
                let (path, options) = rest.split_once('?').unwrap_or((rest, ""));
                let number = NUMBER.fetch_add(1, Ordering::Relaxed);
                let path = format!("{path}.{}.{number}", std::process::id());
                let and = if options.is_empty() { "" } else { "&" };
                (format!("file:{path}?size={bytes}{and}{options}"), Some(PathBuf::from(path)))
            }
            _ => (wanted.clone(), None),
        };
        let options = OpenOptions::default().create(true);
        let mut device = bdev_adapter::open(&uri, &options).unwrap_or_else(|error| panic!("{error}"));
        if device.geometry().capacity != bytes {
            device = window::Window::over(device, bytes);
        }
        TestDevice { device, file }
    }

    /// The same, answering late and out of order.
    pub(crate) fn slow(bytes: u64, seed: u64) -> TestDevice {
        let mut this = TestDevice::new(bytes);
        this.device = slow::SlowDevice::wrap(Arc::clone(&this.device), seed, 6);
        this
    }
}

impl Drop for TestDevice {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// Mount options for a test that decides itself when something is committed.
pub(crate) fn quiet() -> MountOptions {
    MountOptions { helper_thread: false, commit_interval: None, ..MountOptions::default() }
}

/// Formats `device` and mounts it.
pub(crate) fn fresh(device: &Arc<dyn Device>, options: &MountOptions) -> Filesystem {
    fs_core::format(device, &FormatOptions { force: true, ..FormatOptions::default() }).expect("format");
    mount(device, options)
}

/// Mounts `device`.
pub(crate) fn mount(device: &Arc<dyn Device>, options: &MountOptions) -> Filesystem {
    Filesystem::mount(Arc::clone(device), options).expect("mount")
}

/// Walks the whole filesystem, and panics when something is wrong with it or lost.
pub(crate) fn check(fs: &Filesystem, channel: &fs_core::Channel) {
    let report = fs.check(channel, &mut |_| {}).expect("a check");
    assert!(report.is_clean(), "{} problems: {:#?}", report.problem_count, report.problems);
    assert_eq!(report.leaked_blocks, 0, "blocks that nothing refers to: {report:?}");
}

/// Fills `bytes` with a pattern that no other `tag` has.
pub(crate) fn fill(tag: u64, bytes: &mut [u8]) {
    let mut state = tag.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678_9ABC_DEF1;
    for chunk in bytes.chunks_mut(8) {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let word = (state ^ (state >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        chunk.copy_from_slice(&(word ^ (word >> 32)).to_le_bytes()[..chunk.len()]);
    }
}

/// `len` bytes of the pattern of `tag`.
pub(crate) fn pattern(tag: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fill(tag, &mut bytes);
    bytes
}

/// Says where two byte strings differ first, for messages.
pub(crate) fn difference(found: &[u8], expected: &[u8]) -> Option<String> {
    if found.len() != expected.len() {
        return Some(format!("{} bytes instead of {}", found.len(), expected.len()));
    }
    if found == expected {
        return None;
    }
    let at = found.iter().zip(expected).position(|(a, b)| a != b)?;
    let last = found.iter().zip(expected).rposition(|(a, b)| a != b)?;
    let near = |bytes: &[u8]| format!("{:02x?}", &bytes[at..bytes.len().min(at + 8)]);
    Some(format!("bytes {at}..={last} differ: {} instead of {}", near(found), near(expected)))
}

/// A filesystem in which something is wrong in numbers.
pub(crate) fn check_statfs(statfs: &fs_core::StatFs) {
    let sum = statfs.used_bytes + statfs.free_bytes + statfs.reserved_bytes;
    assert_eq!(statfs.total_bytes, sum, "total = used + free + reserved: {statfs:?}");
}
