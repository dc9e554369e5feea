//! NVMe over PCIe: controllers that misbehave. Commands that stall, resets under load, a device that is pulled out.
//!
//! They need a device that does so when it is told to, which is an emulated one: `scripts/guest-tests.sh misbehave` runs
//! them. `GAUR_NVME_URI` names it (`spdk-nvme:pcie:0000:00:04.0`); **what is on it is lost**. Then, for each test:
//!
//! - `GAUR_NVME_STALLS_FROM=BYTES`: the first command at each offset from there on is answered after some
//!   [`STALL`] (`bench powercut drive --stall-from`), and a reset waits for it, as QEMU's does;
//! - `GAUR_NVME_REMOVAL=1`: somebody removes the device after reading [`REMOVE_NOW`] on standard output.
//!
//! Without them tests are skipped, and say so.

#![cfg(feature = "spdk")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod nvme_support;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bdev_adapter::{Device, DmaBuf, Error, IoErrorKind, OpenOptions, QueuePair, Request, open};
use nvme_support::{BLOCK, LIMIT, buffer, collect, device, kind, log_to_stdout, queue, run, under_load};
use parking_lot::{Mutex, MutexGuard};

/// What the script waits for.
const REMOVE_NOW: &str = "gaur-test: remove the device";
/// How long after its last answer a removed device may keep its users waiting.
const REMOVAL_LIMIT: Duration = Duration::from_secs(8);
/// How long a stalled command takes (`scripts/guest-tests.sh` says the same to the drive).
const STALL: Duration = Duration::from_millis(4500);
/// A stalled command is aborted after the first, and the controller reset after twice that: well before it would be answered.
const OPTIONS: &str = "timeout=1500ms&reconnect=60s";
const TIMEOUT: Duration = Duration::from_millis(1500);

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock()
}

/// The device's URI and the value of the variable, if both are given.
fn told(variable: &str, options: &str) -> Option<(String, String)> {
    log_to_stdout();
    match (std::env::var("GAUR_NVME_URI"), std::env::var(variable)) {
        (Ok(uri), Ok(value)) => {
            let and = if uri.contains('?') { '&' } else { '?' };
            Some((format!("{uri}{and}{options}"), value))
        }
        _ => {
            println!("SKIPPED: GAUR_NVME_URI and {variable} are not both set");
            None
        }
    }
}

/// A device, some of whose commands stall.
struct Stalling {
    device: Arc<dyn Device>,
    from: u64,
    _turn: MutexGuard<'static, ()>,
}

impl Stalling {
    fn open() -> Option<Stalling> {
        let (uri, from) = told("GAUR_NVME_STALLS_FROM", OPTIONS)?;
        let _turn = turn();
        Some(Stalling { device: device(&uri), from: from.parse().unwrap(), _turn })
    }

    /// An offset that stalls, once.
    fn next(&self) -> u64 {
        static USED: AtomicU64 = AtomicU64::new(0);
        let offset = self.from + USED.fetch_add(1, Ordering::Relaxed) * BLOCK as u64;
        assert!(offset < self.device.geometry().capacity);
        offset
    }

    /// Has the controller reset, by a command that is not answered.
    fn provoke_reset(&self) {
        let (before, began) = (self.device.epoch(), Instant::now());
        let mut queue = queue(&self.device);
        let answer = run(queue.as_mut(), Request::read(self.next(), buffer(&self.device, BLOCK, 0), 1));
        assert_eq!(kind(&answer), Err(IoErrorKind::TimedOut));
        assert_eq!(answer.bufs.len(), BLOCK as u64, "the buffer comes back");
        assert!(self.device.epoch() > before, "epoch {before} is over");
        println!("a reset, {:.1?} after the command that stalls", began.elapsed());
    }
}

/// Writes a block and reads it.
fn use_it(device: &Arc<dyn Device>, queue: &mut dyn QueuePair, offset: u64, byte: u8) {
    run(queue, Request::write(offset, buffer(device, BLOCK, byte), 1)).result.unwrap();
    let read = run(queue, Request::read(offset, buffer(device, BLOCK, 0), 2));
    read.result.unwrap();
    assert!(read.bufs.into_one().unwrap().iter().all(|&it| it == byte));
}

#[test]
fn a_command_that_stalls() {
    let Some(stalling) = Stalling::open() else { return };
    let device = &stalling.device;
    assert!(device.geometry().volatile_cache);
    let (mut one, mut other) = (queue(device), queue(device));
    let (before, began) = (device.epoch(), Instant::now());
    let (first, second) = (stalling.next(), stalling.next());
    one.submit(Request::write(first, buffer(device, BLOCK, 3), 1));
    one.kick();
    // It is in nobody's way.
    for tag in 2..100 {
        one.submit(Request::read(tag * BLOCK as u64, buffer(device, BLOCK, 0), tag));
    }
    let mut answers = Vec::new();
    while answers.len() < 98 && began.elapsed() < TIMEOUT {
        one.poll(&mut answers);
    }
    if answers.len() < 98 {
        // Seen once in ten runs, with the commands of all queues at once: the emulated controller stalls as a whole. Then
        // they are late like the first, and answered once all the same.
        println!("everything stalls: {} answers", answers.len());
        let rest = 99 - answers.len();
        answers.extend(collect(one.as_mut(), rest));
        assert!(answers.iter().all(|answer| {
            let found = kind(answer);
            found == Err(IoErrorKind::TimedOut) || answer.tag != 1 && found == Ok(())
        }));
        let mut tags: Vec<u64> = answers.iter().map(|answer| answer.tag).collect();
        tags.sort_unstable();
        return assert!(tags.into_iter().eq(1..100));
    }
    assert!(answers.iter().all(|answer| answer.tag != 1 && kind(answer) == Ok(())));
    // The first is given up after twice the timeout. The second is not late yet, and lost all the same.
    thread::sleep((TIMEOUT * 8 / 5).saturating_sub(began.elapsed()));
    other.submit(Request::write(second, buffer(device, BLOCK, 4), 1));
    other.kick();
    let submitted = Instant::now();
    let timed_out = collect(one.as_mut(), 1).remove(0);
    println!("the stalled command was answered after {:.1?}", began.elapsed());
    assert_eq!(kind(&timed_out), Err(IoErrorKind::TimedOut));
    assert_eq!((timed_out.tag, timed_out.bufs.len()), (1, BLOCK as u64));
    let repeated = collect(other.as_mut(), 1).remove(0);
    println!("the lost command was answered after {:.1?}", submitted.elapsed());
    repeated.result.unwrap();
    assert_eq!((repeated.tag, repeated.bufs.len()), (1, BLOCK as u64));
    assert_eq!((one.outstanding(), other.outstanding()), (0, 0));
    let now = device.epoch();
    assert!(now > before, "epoch {now}");
    let old = run(one.as_mut(), Request::flush(before, 1));
    assert_eq!(kind(&old), Err(IoErrorKind::EpochLost { expected: before, now }));
    assert_eq!(kind(&run(one.as_mut(), Request::flush(now, 1))), Ok(()));
    let read = run(other.as_mut(), Request::read(second, buffer(device, BLOCK, 0), 1));
    assert!(read.bufs.into_one().unwrap().iter().all(|&byte| byte == 4));
    for queue in [&mut one, &mut other] {
        use_it(device, queue.as_mut(), first, 5);
    }
    // No late answer comes.
    thread::sleep(STALL.saturating_sub(submitted.elapsed()));
    let mut late = Vec::new();
    assert_eq!((one.poll(&mut late), other.poll(&mut late)), (0, 0));
}

#[test]
fn resets_under_load() {
    let Some(stalling) = Stalling::open() else { return };
    let before = stalling.device.epoch();
    // A host that is busy may be late too.
    under_load(&stalling.device, true, |some_more_writes| {
        for _ in 0..3 {
            some_more_writes();
            stalling.provoke_reset();
        }
        some_more_writes();
    });
    assert!(stalling.device.epoch() >= before + 3);
}

#[test]
fn queue_pairs_come_and_go_over_resets() {
    let Some(stalling) = Stalling::open() else { return };
    let device = &stalling.device;
    // One after another: far more than the controller has.
    for round in 0..200 {
        use_it(device, queue(device).as_mut(), 0, round as u8);
    }
    let use_all = |pairs: &mut Vec<Box<dyn QueuePair>>, byte: u8| {
        for (pair, offset) in pairs.iter_mut().zip((0..).step_by(BLOCK)) {
            use_it(device, pair.as_mut(), offset, byte);
        }
    };
    let mut pairs = Vec::new();
    let refused = loop {
        match Arc::clone(device).queue_pair() {
            Ok(pair) => pairs.push(pair),
            Err(error) => break error,
        }
        assert!(pairs.len() < 10_000);
    };
    println!("{} queue pairs; then: {refused}", pairs.len());
    assert!(matches!(refused, Error::Spdk { .. }), "{refused}");
    let all = pairs.len();
    use_all(&mut pairs, 1);
    // Most are nobody's while the controller is reset, and then somebody's again.
    for round in 2..4 {
        pairs.truncate(all / 4);
        stalling.provoke_reset();
        use_all(&mut pairs, round);
        // `provoke_reset` had one of its own.
        pairs.extend((pairs.len()..all).map(|_| queue(device)));
        use_all(&mut pairs, round + 10);
    }
}

/// Keeps requests of all kinds in flight until the device is gone. Gives how many went well, and how many did not.
fn storm(device: &Arc<dyn Device>, which: u64, progress: &AtomicU64) -> (u64, u64) {
    let mut queue = queue(device);
    // Those of 1 MiB are several commands each.
    let sizes = [BLOCK, BLOCK, 16 * BLOCK, 256 * BLOCK];
    let mut buffers: Vec<DmaBuf> = (0..32).map(|i| buffer(device, sizes[i % sizes.len()], i as u8)).collect();
    let mut busy: HashMap<u64, u64> = HashMap::new();
    let (mut tag, mut good, mut gone) = (0, 0, 0);
    let (mut completions, mut last_good) = (Vec::new(), Instant::now());
    let first = which * (8 << 20);
    while gone == 0 || queue.outstanding() > 0 {
        while gone == 0
            && let Some(buf) = buffers.pop()
        {
            tag += 1;
            let (len, offset) = (buf.len() as u64, first + tag * 7 % 1024 * BLOCK as u64);
            busy.insert(tag, len);
            queue.submit(if tag % 3 == 0 {
                Request::read(offset, buf, tag)
            } else {
                Request::write(offset, buf, tag)
            });
            if tag % 50 == 0 {
                tag += 1;
                busy.insert(tag, 0);
                queue.submit(Request::flush(device.epoch(), tag));
            }
        }
        if queue.poll(&mut completions) == 0 {
            queue.wait(Duration::from_millis(1));
        }
        for completion in completions.drain(..) {
            let len = busy.remove(&completion.tag).expect("answered once");
            match kind(&completion) {
                Ok(()) => {
                    (good, last_good) = (good + 1, Instant::now());
                    progress.fetch_add(1, Ordering::Relaxed);
                }
                Err(IoErrorKind::Gone) => gone += 1,
                other => panic!("{other:?}"),
            }
            assert_eq!(completion.bufs.len(), len, "the buffers come back");
            buffers.extend(completion.bufs.into_one());
        }
        assert!(last_good.elapsed() < LIMIT, "{} requests hang", busy.len());
    }
    let waited = last_good.elapsed();
    println!("{good} answers, then {gone} errors, the last of them {waited:.1?} after the last good one");
    assert!(waited < REMOVAL_LIMIT);
    assert!(busy.is_empty());
    // From now on everything is answered at once.
    let began = Instant::now();
    for (tag, buf) in (0..).zip(buffers) {
        let answer = run(queue.as_mut(), Request::write(0, buf, tag));
        assert_eq!((kind(&answer), answer.tag), (Err(IoErrorKind::Gone), tag));
    }
    assert!(began.elapsed() < Duration::from_secs(1), "{:.1?}", began.elapsed());
    (good, gone)
}

#[test]
fn a_device_that_is_removed_under_load() {
    let Some((uri, _)) = told("GAUR_NVME_REMOVAL", "") else { return };
    let _turn = turn();
    let uri = uri.trim_end_matches(['?', '&']);
    let removed = device(uri);
    let mut idle = queue(&removed);
    use_it(&removed, idle.as_mut(), 0, 1);
    let progress = AtomicU64::new(0);
    thread::scope(|scope| {
        let (device, progress) = (&removed, &progress);
        let storms: Vec<_> =
            (0..2).map(|which| scope.spawn(move || storm(device, which, progress))).collect();
        while progress.load(Ordering::Relaxed) < 500 && !storms.iter().any(|storm| storm.is_finished()) {
            thread::sleep(Duration::from_millis(10));
        }
        println!("{REMOVE_NOW}");
        for storm in storms {
            let (good, gone) = storm.join().unwrap();
            assert!(good > 0 && gone > 0);
        }
    });
    for request in [
        Request::read(0, buffer(&removed, BLOCK, 0), 1),
        Request::write(0, buffer(&removed, BLOCK, 0), 1),
        Request::flush(removed.epoch(), 1),
    ] {
        assert_eq!(kind(&run(idle.as_mut(), request)), Err(IoErrorKind::Gone));
    }
    let pair = Arc::clone(&removed).queue_pair();
    assert!(matches!(pair.err(), Some(Error::NotFound { .. })));
    let not_found = |why: &str| {
        let Err(error) = open(uri, &OpenOptions::new()) else { panic!("it opens {why}") };
        println!("{why}: {error}");
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
    };
    not_found("while somebody has it");
    let began = Instant::now();
    drop((idle, removed));
    println!("closed within {:.1?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(5));
    not_found("when all have closed it");
}
