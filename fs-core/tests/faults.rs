//! Devices that misbehave under the filesystem: for every n, the n-th request of a small workload goes wrong, in every way
//! that a device has.
//!
//! - What fails is a typed error; nothing panics or hangs; what a sync acknowledged before is there after a remount.
//! - What the device gets wrong silently (rot, lost, torn and misdirected writes, stale reads) is found: a read gives the
//!   right data or an error, never wrong data.
//! - After a flush that lied and a power cut there is an older synced state, or an error.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bdev_adapter::image::Image;
use bdev_adapter::mem::MemDevice;
use bdev_adapter::wrap::fault::{Effect, Fault, FaultDevice, FaultPlan, Target, When};
use bdev_adapter::wrap::recorder::Survive;
use bdev_adapter::{Device, IoErrorKind};
use common::{MIB, Watchdog, check, difference, fresh, mount, pattern, quiet, seed};
use fs_core::{Channel, Error, Filesystem, OpenFlags};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

type Files = BTreeMap<Vec<u8>, Vec<u8>>;
/// What reading every file gave.
type Found = BTreeMap<Vec<u8>, Result<Vec<u8>, Error>>;

const EIO: Effect = Effect::Error(IoErrorKind::Os(5));

/// A filesystem with some files, all synced.
struct Base {
    image: Image,
    files: Files,
}

fn base() -> Base {
    let memory = MemDevice::new(16 * MIB, 512).expect("a device");
    let fs = fresh(&(memory.clone() as Arc<dyn Device>), &quiet());
    let channel = fs.channel().expect("channel");
    let mut files = Files::new();
    for number in 0..6u8 {
        let (name, data) = (vec![b'a' + number], pattern(number.into(), 30_000 * usize::from(number) + 100));
        let file = channel.open(&name, OpenFlags::CREATE).expect("open");
        channel.write(&file, 0, &data).expect("write");
        files.insert(name, data);
    }
    channel.sync().expect("sync");
    drop(channel);
    fs.unmount().expect("unmount");
    Base { image: memory.snapshot(), files }
}

/// What became of a workload.
struct Run {
    memory: Arc<MemDevice>,
    fault: Arc<FaultDevice>,
    /// States that were synced, the first one being that of the base; the last may be one whose sync failed.
    states: Vec<Files>,
    /// How many of them were acknowledged.
    acknowledged: usize,
    /// Calls that failed.
    errors: usize,
}

/// One change, to the filesystem and, if that succeeds, to the model.
fn change(rng: &mut SmallRng, channel: &Channel, files: &mut Files, tag: u64) -> Result<(), Error> {
    let name = |rng: &mut SmallRng| vec![b'a' + rng.random_range(0..8u8)];
    let (a, b) = (name(rng), name(rng));
    let (kind, offset, len) =
        (rng.random_range(0..8), rng.random_range(0..60_000), rng.random_range(1..40_000));
    match kind {
        0..5 => {
            let file = channel.open(&a, OpenFlags::CREATE)?;
            let content = files.entry(a).or_default();
            let data = pattern(tag, len);
            channel.write(&file, offset as u64, &data)?;
            content.resize(content.len().max(offset + len), 0);
            content[offset..offset + len].copy_from_slice(&data);
        }
        5 => {
            let file = channel.open(&a, OpenFlags::CREATE)?;
            let content = files.entry(a).or_default();
            channel.truncate(&file, offset as u64)?;
            content.resize(offset, 0);
        }
        6 if files.contains_key(&a) => {
            channel.rename(&a, &b)?;
            let content = files.remove(&a).expect("it is there");
            files.insert(b, content);
        }
        _ if files.contains_key(&a) => {
            channel.delete(&a)?;
            files.remove(&a);
        }
        _ => {}
    }
    Ok(())
}

/// Reads every file. None if not even the names can be read.
fn read_all(channel: &Channel) -> Option<Found> {
    let names: Result<Vec<_>, _> = channel.list("").map(|entry| entry.map(|entry| entry.name)).collect();
    let read = |name: &[u8]| -> Result<Vec<u8>, Error> {
        let file = channel.open(name, OpenFlags::READ_ONLY)?;
        let mut content = vec![0; file.size() as usize];
        let len = channel.read(&file, 0, &mut content)?;
        assert_eq!(len, content.len());
        Ok(content)
    };
    Some(names.ok()?.into_iter().map(|name| (name.clone(), read(&name))).collect())
}

/// The synced states with which everything that could be read agrees, by number.
fn agrees_with(found: &Found, states: &[Files]) -> Vec<usize> {
    (0..states.len()).filter(|number| wrong(found, &states[*number]).is_none()).collect()
}

/// Where what was read contradicts `right`, in words.
fn wrong(found: &Found, right: &Files) -> Option<String> {
    if !found.keys().eq(right.keys()) {
        return Some(format!("names {:?} instead of {:?}", found.keys(), right.keys()));
    }
    found.iter().zip(right.values()).find_map(|((name, found), right)| {
        let what = difference(found.as_ref().ok()?, right)?;
        Some(format!("{}: {what}", String::from_utf8_lossy(name)))
    })
}

/// The base on a device with faults.
fn prepare(base: &Base, plan: FaultPlan) -> (Arc<MemDevice>, Arc<FaultDevice>) {
    let memory = MemDevice::from_image(&base.image).expect("a device");
    (memory.clone(), FaultDevice::wrap(memory, plan))
}

/// Mounts, and runs the same few rounds of changes, reads and syncs as ever, on a device with faults.
fn run_on(base: &Base, seed: u64, (memory, fault): (Arc<MemDevice>, Arc<FaultDevice>)) -> Run {
    let mut run =
        Run { memory, fault: fault.clone(), states: vec![base.files.clone()], acknowledged: 1, errors: 0 };
    let Ok(fs) = Filesystem::mount(fault, &quiet()) else {
        run.errors += 1;
        return run;
    };
    if let Ok(channel) = fs.channel() {
        rounds(&channel, seed, &mut run);
    }
    fs.abandon();
    run
}

fn run(base: &Base, seed: u64, faults: Vec<Fault>) -> Run {
    run_on(base, seed, prepare(base, FaultPlan::new(seed, faults)))
}

fn rounds(channel: &Channel, seed: u64, run: &mut Run) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut files = run.states[0].clone();
    for round in 0..8 {
        for step in 0..4 {
            run.errors +=
                usize::from(change(&mut rng, channel, &mut files, round * 10 + step + 100).is_err());
        }
        if let Some(found) = read_all(channel) {
            if let Some(why) = wrong(&found, &files) {
                panic!("{:?}, seed {seed}, round {round}: {why}", run.fault);
            }
            run.errors += found.values().filter(|result| result.is_err()).count();
        }
        let synced = channel.sync();
        run.states.push(files.clone());
        if synced.is_err() {
            run.errors += 1;
            return;
        }
        run.acknowledged += 1;
    }
}

/// After the device is well again: what was acknowledged is there, or what the sync that failed wanted.
fn all_is_there(run: &Run, what: &str) {
    let fs = mount(&(run.memory.clone() as Arc<dyn Device>), &quiet());
    let channel = fs.channel().expect("channel");
    let found = read_all(&channel).unwrap_or_else(|| panic!("{what}: the names cannot be read"));
    assert!(found.values().all(Result::is_ok), "{what}: {found:?}");
    let agrees = agrees_with(&found, &run.states);
    assert!(
        agrees.iter().any(|state| *state + 1 >= run.acknowledged),
        "{what}: state {agrees:?} instead of {}",
        run.acknowledged - 1
    );
    check(&fs, &channel);
}

/// Which requests go wrong, by n.
type Which = fn(u64) -> When;
/// The n-th alone. A read that fails once is often tried again.
const ONE: Which = When::Nth;
/// The n-th and all after it.
const FROM_THEN_ON: Which = |n| When::After(n - 1);

/// Does `one` for n = 1, 2, ... until the workload has no n-th request of this kind. Returns how many there were.
fn for_every_n(
    base: &Base,
    seed: u64,
    (what, on, which, effect): (&str, Target, Which, Effect),
    mut one: impl FnMut(Run, &str),
) -> u64 {
    let mut n = 0;
    loop {
        n += 1;
        let run = run(base, seed, vec![Fault::new(on, which(n), effect)]);
        let seen = run.fault.seen();
        one(run, &format!("{what}, n = {n}, seed {seed}"));
        let all = match on {
            Target::Reads => seen.reads,
            Target::Writes => seen.writes,
            Target::Flushes => seen.flushes,
            Target::Barriers => seen.barriers,
            Target::All => seen.all,
        };
        // A workload that ended early at its n-th request would have had more of them.
        if all < n {
            return n - 1;
        }
    }
}

#[test]
fn failing_the_nth_request_for_every_n() {
    let seed = seed("failing_the_nth_request_for_every_n");
    let _watchdog = Watchdog::start("failing_the_nth_request_for_every_n", seed, 300);
    let base = base();
    let moment = Effect::GoneFor(Duration::from_micros(50));
    let ways = [
        ("one read error", Target::Reads, ONE, EIO),
        ("read errors", Target::Reads, FROM_THEN_ON, EIO),
        ("one write error", Target::Writes, ONE, EIO),
        ("write errors", Target::Writes, FROM_THEN_ON, EIO),
        ("one flush error", Target::Flushes, ONE, EIO),
        ("one flush or FUA error", Target::Barriers, ONE, EIO),
        ("flush and FUA errors", Target::Barriers, FROM_THEN_ON, EIO),
        ("errors of all kinds", Target::All, FROM_THEN_ON, EIO),
        ("gone", Target::All, ONE, Effect::Gone),
        ("gone for a moment", Target::All, ONE, moment),
        ("torn write, then gone", Target::Writes, ONE, Effect::Torn),
        ("power cut", Target::All, ONE, Effect::PowerCut),
        ("slow", Target::All, ONE, Effect::Slow(Duration::from_millis(1))),
    ];
    for way in ways {
        let what = way.0;
        let (mut errors, mut runs_with_errors) = (0, 0);
        let count = for_every_n(&base, seed, way, |run, what| {
            errors += run.errors;
            runs_with_errors += usize::from(run.errors > 0);
            all_is_there(&run, what);
        });
        println!("{what}: {count} requests, {runs_with_errors} runs with {errors} failed calls; seed {seed}");
        assert!(count >= 8, "{what}: only {count}");
        assert_eq!(errors == 0, what == "slow", "{what}: {errors}");
    }
}

/// Runs the workload while somebody releases the request that hangs, or pulls the cable.
fn run_with_a_helper(base: &Base, seed: u64, n: u64, help: impl Fn(&FaultDevice) + Sync) -> Run {
    let plan = FaultPlan::new(seed, vec![Fault::new(Target::All, When::Nth(n), Effect::Never)]);
    let (memory, fault) = prepare(base, plan);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_micros(500));
                if fault.hits() > 0 {
                    help(&fault);
                }
            }
        });
        let run = run_on(base, seed, (memory, fault.clone()));
        done.store(true, Ordering::Release);
        run
    })
}

#[test]
fn a_request_that_is_never_answered() {
    let seed = seed("a_request_that_is_never_answered");
    let _watchdog = Watchdog::start("a_request_that_is_never_answered", seed, 300);
    let base = base();
    for what in ["released", "gone"] {
        let help = if what == "gone" { FaultDevice::remove } else { FaultDevice::release_hung };
        let (mut n, mut errors) = (1, 0);
        loop {
            let run = run_with_a_helper(&base, seed, n, help);
            all_is_there(&run, &format!("never answered, then {what}, n = {n}, seed {seed}"));
            errors += run.errors;
            if run.fault.hits() == 0 {
                break;
            }
            n += 1;
        }
        println!("never answered, then {what}: {} requests, {errors} failed calls; seed {seed}", n - 1);
        assert_eq!(errors > 0, what == "gone");
    }
}

/// How runs on a device that gets things wrong silently ended.
#[derive(Debug, Default)]
struct Tally {
    /// No call failed, and all is there.
    unharmed: usize,
    /// Calls failed, or the check complains.
    noticed: usize,
    /// The mount fails.
    no_mount: usize,
    /// An older synced state is there, as a whole or in parts.
    older: usize,
}

impl Tally {
    /// Mounts what a run left, and reads it: right data, or errors. What `stays` wrong is found by the check too.
    fn look(&mut self, device: Arc<dyn Device>, run: &Run, stays: bool, what: &str) {
        let Ok(fs) = Filesystem::mount(device, &quiet()) else {
            self.no_mount += 1;
            return;
        };
        let Ok(channel) = fs.channel() else { panic!("{what}: no channel") };
        let found = read_all(&channel);
        let clean = fs.check(&channel, &mut |_| {}).is_ok_and(|report| report.is_clean());
        let whole = found.as_ref().is_some_and(|found| found.values().all(Result::is_ok));
        if let Some(found) = &found {
            let agrees = agrees_with(found, &run.states);
            assert!(!agrees.is_empty(), "{what}: wrong data without an error");
            self.older += usize::from(*agrees.iter().max().unwrap_or(&0) + 1 < run.acknowledged);
        }
        assert!(
            whole || !clean || !stays,
            "{what}: the check finds nothing, yet something cannot be read: {found:?}"
        );
        if whole && clean && run.errors == 0 {
            self.unharmed += 1;
        } else {
            self.noticed += 1;
        }
        fs.abandon();
    }
}

#[test]
fn what_the_device_gets_wrong_silently_is_an_error_and_never_data() {
    let seed = seed("what_the_device_gets_wrong_silently");
    let _watchdog = Watchdog::start("what_the_device_gets_wrong_silently", seed, 300);
    let base = base();
    let ways = [
        ("bit rot", Target::Reads, ONE, Effect::Rot),
        ("one stale read", Target::Reads, ONE, Effect::Stale),
        ("stale reads", Target::Reads, FROM_THEN_ON, Effect::Stale),
        ("lost write", Target::Writes, ONE, Effect::Lost),
        ("silently torn write", Target::Writes, ONE, Effect::TornSilently),
        ("misdirected write", Target::Writes, ONE, Effect::Misdirected),
    ];
    for way in ways {
        let (what, _, _, effect) = way;
        let mut tally = Tally::default();
        let count = for_every_n(&base, seed, way, |run, what| {
            run.fault.set_plan(FaultPlan::default());
            tally.look(run.fault.clone(), &run, effect != Effect::Stale, what);
        });
        println!("{what}: {count} requests: {tally:?}; seed {seed}");
        // A stale read is often tried again, and right then.
        assert!(tally.noticed > 0 || what == "one stale read", "{what}: {tally:?}");
        assert!(tally.unharmed > 0, "{what}: {tally:?}");
    }
}

/// The same while an undamaged filesystem is mounted and read, with old content of every block at hand.
#[test]
fn rot_and_stale_reads_while_mounting() {
    let seed = seed("rot_and_stale_reads_while_mounting");
    let _watchdog = Watchdog::start("rot_and_stale_reads_while_mounting", seed, 300);
    let base = base();
    for (what, effect) in [("bit rot", Effect::Rot), ("stale read", Effect::Stale)] {
        let mut tally = Tally::default();
        // The plan has to ask for old content before the first write.
        let never = Fault::new(Target::Reads, When::Nth(u64::MAX), Effect::Stale);
        let run = run(&base, seed, vec![never]);
        assert_eq!(run.errors, 0);
        for n in 1.. {
            let plan = FaultPlan::new(seed, vec![Fault::new(Target::Reads, When::Nth(n), effect)]);
            run.fault.set_plan(plan);
            tally.look(
                run.fault.clone(),
                &run,
                effect == Effect::Rot,
                &format!("{what}, n = {n}, seed {seed}"),
            );
            run.fault.heal();
            if n >= run.fault.seen().reads {
                println!("{what} while mounting: {n} reads: {tally:?}; seed {seed}");
                break;
            }
        }
        assert!(tally.noticed + tally.no_mount + tally.older > 0, "{what}: {tally:?}");
    }
}

#[test]
fn after_a_flush_that_lied_there_is_an_older_state_or_an_error() {
    let seed = seed("after_a_flush_that_lied");
    let _watchdog = Watchdog::start("after_a_flush_that_lied", seed, 300);
    let base = base();
    let mut tally = Tally::default();
    let mut lies_after = 0;
    loop {
        let lie = Fault::new(Target::Barriers, When::After(lies_after), Effect::Lie);
        for cut in 0..6u64 {
            let survive = if cut == 0 { Survive::Nothing } else { Survive::Random(seed ^ cut) };
            let run = run(&base, seed, vec![lie.clone()]);
            assert_eq!(run.errors, 0, "a lie is not noticed before the power fails");
            run.fault.power_cut(survive).expect("the memory takes it");
            run.fault.restore();
            run.fault.set_plan(FaultPlan::default());
            let what = format!("lies after {lies_after} flushes and FUA writes, {survive:?}, seed {seed}");
            if cut == 0 {
                // Nothing after the last honest flush: exactly the state that it left.
                let fs = mount(&(run.memory.clone() as Arc<dyn Device>), &quiet());
                let channel = fs.channel().expect("channel");
                let found = read_all(&channel).unwrap_or_else(|| panic!("{what}: no names"));
                assert!(found.values().all(Result::is_ok), "{what}");
                assert!(!agrees_with(&found, &run.states).is_empty(), "{what}: no synced state");
                check(&fs, &channel);
                drop(channel);
                fs.abandon();
            }
            tally.look(run.fault.clone(), &run, true, &what);
        }
        let run = run(&base, seed, vec![lie]);
        if run.fault.seen().barriers <= lies_after {
            break;
        }
        lies_after += 1;
    }
    println!("lying flushes and power cuts: {lies_after} moments: {tally:?}; seed {seed}");
    assert!(tally.older > 0, "{tally:?}");
}

#[test]
fn a_deleted_file_that_is_damaged_keeps_nothing_from_being_mounted() {
    let seed = seed("a_deleted_file_that_is_damaged");
    let _watchdog = Watchdog::start("a_deleted_file_that_is_damaged", seed, 300);
    let base = base();
    // A file with so many extents that they fill nodes of their own loses its name while it is open, and the power fails.
    let memory = MemDevice::from_image(&base.image).expect("a device");
    let fs = mount(&(memory.clone() as Arc<dyn Device>), &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("victim", OpenFlags::CREATE).expect("open");
    for block in 0..600u64 {
        channel.write(&file, block * 8192, &pattern(block, 4096)).expect("write");
    }
    channel.delete("victim").expect("delete");
    channel.sync().expect("sync");
    fs.abandon();
    let base = Base { image: memory.snapshot(), files: base.files };
    let (mut refused, mut whole, mut n) = (0, 0, 0);
    loop {
        n += 1;
        let plan = FaultPlan::new(seed, vec![Fault::new(Target::Reads, When::Nth(n), Effect::Rot)]);
        let (_memory, fault) = prepare(&base, plan);
        let result = Filesystem::mount(fault.clone(), &quiet());
        if fault.hits() == 0 {
            break;
        }
        let Ok(fs) = result else {
            refused += 1;
            continue;
        };
        let channel = fs.channel().expect("channel");
        let found = read_all(&channel).unwrap_or_default();
        let all = found.len() == base.files.len() && found.values().all(Result::is_ok);
        whole += usize::from(all && wrong(&found, &base.files).is_none());
        channel.sync().expect("sync");
        drop(channel);
        fs.unmount().expect("unmount");
    }
    println!(
        "rot in one of {} reads of a mount: {refused} mounts refused, {whole} with all other files",
        n - 1
    );
    // The list of what is to be finished itself, if anything.
    assert!(refused <= 1, "{refused} mounts refused");
    assert!(whole > 6, "the four superblocks, and nodes of the deleted file alone: {whole}");
}
