//! Crash test: a workload is recorded, crash states are built from the recording, and each is mounted, checked and compared.
//!
//! States are built right after *every* flush and FUA write of the recording, and at sampled moments between them; at each
//! with nothing, everything, and random subsets of what was not flushed, some of it torn at any block.
//!
//! The filesystem commits in this test only when it is told to (no helper, no lack of space), so every state must be exactly
//! that of the last sync that was acknowledged before the crash, or that of the sync that was under way: a commit
//! is whole or absent.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bdev_adapter::Device;
use bdev_adapter::mem::MemDevice;
use bdev_adapter::wrap::recorder::{
    Change, CrashLog, CrashOptions, CrashState, Event, Points, RecordOptions, Recorder,
};
use common::{MIB, TestDevice, Watchdog, check, crashes, difference, fresh, mount, pattern, quiet, seed};
use fs_core::{Channel, File, Growth, OpenFlags, WriteBatch};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

type Files = BTreeMap<Vec<u8>, Vec<u8>>;

/// What must be there after a crash: `files` was synced when the recording was at `point`.
struct Synced {
    point: usize,
    files: Files,
}

fn name(rng: &mut SmallRng) -> Vec<u8> {
    format!("file-{}", rng.random_range(0..12)).into_bytes()
}

/// One change, to the filesystem and to the model.
fn change(rng: &mut SmallRng, channel: &Channel, files: &mut Files, tag: u64) {
    let (a, b) = (name(rng), name(rng));
    // Some go through the page cache, where they stay until the next sync, or a direct write, needs them on the device.
    let flags = if rng.random() { OpenFlags::CREATE | OpenFlags::BUFFERED } else { OpenFlags::CREATE };
    match rng.random_range(0..15) {
        10..15 => space(rng, channel, files, tag),
        0..=5 => {
            let file = channel.open(&a, flags).expect("open");
            let content = files.entry(a).or_default();
            let offset = rng.random_range(0..200_000usize);
            let data = pattern(tag, rng.random_range(1..150_000));
            channel.write(&file, offset as u64, &data).expect("write");
            content.resize(content.len().max(offset + data.len()), 0);
            content[offset..offset + data.len()].copy_from_slice(&data);
        }
        6 => {
            let file = channel.open(&a, OpenFlags::CREATE).expect("open");
            let size = rng.random_range(0..300_000usize);
            channel.truncate(&file, size as u64).expect("truncate");
            files.entry(a).or_default().resize(size, 0);
        }
        7 | 8 if files.contains_key(&a) => {
            channel.rename(&a, &b).expect("rename");
            let content = files.remove(&a).expect("it is there");
            files.insert(b, content);
        }
        _ if files.contains_key(&a) => {
            channel.delete(&a).expect("delete");
            files.remove(&a);
        }
        _ => {}
    }
}

/// A change of the space behind a file, a small write, or several files at once.
fn space(rng: &mut SmallRng, channel: &Channel, files: &mut Files, tag: u64) {
    let name = name(rng);
    let file = channel.open(&name, OpenFlags::CREATE).expect("open");
    let content = files.entry(name.clone()).or_default();
    let (offset, len) = (rng.random_range(0..200_000usize), rng.random_range(1..100_000usize));
    let (at, n) = (offset as u64, len as u64);
    let zero = |content: &mut Vec<u8>| {
        let end = (offset + len).min(content.len());
        content[offset.min(end)..end].fill(0);
    };
    match rng.random_range(0..5) {
        0 => {
            channel.preallocate(&file, at, n, Growth::Grow).expect("preallocate");
            content.resize(content.len().max(offset + len), 0);
        }
        1 => {
            channel.zero(&file, at, n, Growth::Keep).expect("zero");
            zero(content);
        }
        2 => {
            channel.punch(&file, at, n).expect("punch");
            zero(content);
        }
        3 => {
            let data = pattern(tag, rng.random_range(1..1100));
            channel.truncate(&file, 0).expect("truncate");
            channel.write(&file, 0, &data).expect("write");
            *content = data;
        }
        _ => {
            let mut batch = WriteBatch::new();
            let data = pattern(tag, rng.random_range(1..20_000));
            for name in [name, self::name(rng)] {
                batch.write(&channel.open(&name, OpenFlags::CREATE).expect("open"), at, &data);
                let content = files.entry(name).or_default();
                content.resize(content.len().max(offset + data.len()), 0);
                content[offset..offset + data.len()].copy_from_slice(&data);
            }
            channel.write_batch(&batch).expect("batch");
        }
    }
}

fn read_all(channel: &Channel) -> Files {
    let names = channel.list("").map(|entry| entry.expect("list").name);
    names
        .map(|name| {
            let file = channel.open(&name, OpenFlags::READ_ONLY).expect("open");
            let mut content = vec![0; file.size() as usize];
            assert_eq!(channel.read(&file, 0, &mut content).expect("read"), content.len());
            (name, content)
        })
        .collect()
}

/// Where `found` differs from `expected`, in words.
fn differ(found: &Files, expected: &Files) -> Option<String> {
    let names =
        |files: &Files| files.keys().map(|n| String::from_utf8_lossy(n).into_owned()).collect::<Vec<_>>();
    if names(found) != names(expected) {
        return Some(format!("names {:?} instead of {:?}", names(found), names(expected)));
    }
    found.iter().zip(expected).find_map(|((name, found), (_, expected))| {
        difference(found, expected).map(|what| format!("{}: {what}", String::from_utf8_lossy(name)))
    })
}

/// Runs `rounds` rounds of changes and a sync each on a recorded device: small, so that the allocator comes round and uses
/// blocks again that earlier rounds freed.
fn record(rng: &mut SmallRng, rounds: usize) -> (Arc<Recorder>, Vec<Synced>) {
    // Small blocks, so that writes are torn inside a block of the filesystem.
    let inner = TestDevice::in_blocks(16 * MIB, 512);
    let recorder = Recorder::around(inner.device.clone(), RecordOptions::default()).expect("a recorder");
    let device: Arc<dyn Device> = recorder.clone();
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let mut files = Files::new();
    let mut synced = vec![Synced { point: recorder.point(), files: files.clone() }];
    for round in 0..rounds {
        for step in 0..rng.random_range(1..8) {
            change(rng, &channel, &mut files, (round * 100 + step) as u64);
        }
        channel.sync().expect("sync");
        synced.push(Synced { point: recorder.point(), files: files.clone() });
    }
    drop(channel);
    fs.abandon();
    (recorder, synced)
}

/// What was tried.
#[derive(Debug, Default)]
struct Tried {
    /// Flushes and FUA writes after which states were built.
    durable_points: usize,
    /// States right after them.
    at_durable_points: usize,
    /// Sampled moments between them.
    other_points: usize,
    /// States there.
    between: usize,
    /// States of both kinds in which a write was torn.
    torn: usize,
    /// States with the commit that was under way.
    newer: usize,
}

impl Tried {
    fn states(&self) -> usize {
        self.at_durable_points + self.between
    }
}

/// Whether a flush or FUA write completed right before `point`.
fn is_durable_point(log: &CrashLog, point: usize) -> bool {
    let Some(Event::Completed(index)) = point.checked_sub(1).and_then(|last| log.events().get(last)) else {
        return false;
    };
    let record = &log.records()[*index];
    record.fua || matches!(record.change, Change::Flush { .. })
}

/// Mounts the state, compares it, checks it, and goes on from there.
fn survives(state: &CrashState, synced: &[Synced], last: usize, what: &str, tried: &mut Tried) {
    let device: Arc<dyn Device> = MemDevice::from_image(&state.image).expect("a device");
    let fs = mount(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let found = read_all(&channel);
    if let Some(why) = differ(&found, &synced[last].files) {
        let next = synced.get(last + 1).unwrap_or_else(|| panic!("{what}: {why}"));
        if let Some(other) = differ(&found, &next.files) {
            panic!("{what}: neither the synced state ({why}) nor the next one ({other})");
        }
        tried.newer += 1;
    }
    check(&fs, &channel);
    let file = channel.open("after", OpenFlags::CREATE).expect("open");
    channel.write(&file, 5, b"the crash").expect("write");
    channel.close(file).expect("close");
    channel.sync().expect("sync");
    check(&fs, &channel);
    drop(channel);
    fs.unmount().expect("unmount");
}

/// Tries every state of one recording that `options` asks for.
fn crash(
    recorder: &Recorder,
    synced: &[Synced],
    options: CrashOptions,
    seed: u64,
    rng: &mut SmallRng,
    tried: &mut Tried,
) {
    let log = recorder.log();
    // Formatting is not what is being tested.
    let begin = synced[0].point;
    let mut last_point = None;
    let before = tried.durable_points;
    for state in log.crash_states(rng.random(), options) {
        let Some(last) = synced.iter().rposition(|s| s.point <= state.point) else { continue };
        let durable = is_durable_point(&log, state.point);
        let new_point = last_point.replace(state.point) != Some(state.point);
        let (points, states) = if durable {
            (&mut tried.durable_points, &mut tried.at_durable_points)
        } else {
            (&mut tried.other_points, &mut tried.between)
        };
        *points += usize::from(new_point);
        *states += 1;
        tried.torn += usize::from(state.torn > 0);
        let what = format!("seed {seed}, crash at event {}, {:?}", state.point, state.survive);
        survives(&state, synced, last, &what, tried);
    }
    let all = (begin..=log.events().len()).filter(|point| is_durable_point(&log, *point)).count();
    assert_eq!(tried.durable_points - before, all, "a state after every flush and FUA write");
}

#[test]
fn every_crash_state_is_that_of_a_sync() {
    let seed = seed("every_crash_state_is_that_of_a_sync");
    let wanted = crashes(1000);
    let _watchdog = Watchdog::start("every_crash_state_is_that_of_a_sync", seed, 600 + wanted as u64);
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut tried = Tried::default();
    // Whole workloads only: no flush and no FUA write is left out.
    while tried.states() < wanted {
        let (recorder, synced) = record(&mut rng, 60);
        let options = CrashOptions { points: Points::Sampled(4), subsets: 4 };
        crash(&recorder, &synced, options, seed, &mut rng, &mut tried);
    }
    println!(
        "{} crash states tried: {} right after each of the {} flushes and FUA writes, {} at {} moments between; {} with \
         torn writes, {} with the commit that was under way; seed {seed}",
        tried.states(),
        tried.at_durable_points,
        tried.durable_points,
        tried.between,
        tried.other_points,
        tried.torn,
        tried.newer,
    );
    assert!(tried.torn > 0 && tried.newer > 0 && tried.between > 0, "the test has lost its teeth: {tried:?}");
}

/// Batches over several files, while another thread commits as fast as it can: after every crash all files are those of one batch, not
/// older than what was synced. The files begin inline, grow out of it, and lie on preallocated blocks in part.
#[test]
fn a_batch_is_whole_or_absent() {
    let seed = seed("a_batch_is_whole_or_absent");
    let _watchdog = Watchdog::start("a_batch_is_whole_or_absent", seed, 300);
    let mut rng = SmallRng::seed_from_u64(seed);
    let inner = TestDevice::in_blocks(16 * MIB, 512);
    let recorder = Recorder::around(inner.device.clone(), RecordOptions::default()).expect("a recorder");
    let device: Arc<dyn Device> = recorder.clone();
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let open = |i: usize| channel.open(format!("file {i}"), OpenFlags::CREATE).expect("open");
    let files: Vec<File> = (0..12).map(open).collect();
    for file in &files[8..] {
        channel.preallocate(file, 4096, 100_000, Growth::Keep).expect("preallocate");
    }
    channel.sync().expect("sync");
    // Of each batch: its length. From which point on which batch is synced.
    let (mut batches, mut synced) = (vec![0], vec![(recorder.point(), 0)]);
    let writing = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let channel = fs.channel().expect("channel");
            while writing.load(Ordering::Relaxed) {
                channel.sync().expect("sync");
            }
        });
        for tag in 1..60u64 {
            let len = rng.random_range(1..if tag < 20 { 1200 } else { 20_000 });
            let mut batch = WriteBatch::new();
            for file in &files {
                batch.write(file, 0, &pattern(tag, len));
            }
            channel.write_batch(&batch).expect("batch");
            batches.push(len);
            if tag % 5 == 0 {
                channel.sync().expect("sync");
                synced.push((recorder.point(), batches.len() - 1));
            }
        }
        writing.store(false, Ordering::Relaxed);
    });
    drop((files, channel));
    fs.abandon();
    // What a file is after batch `last`: the longest so far, each written over from its beginning.
    let after = |last: usize| {
        let mut content: Vec<u8> = Vec::new();
        for (tag, len) in batches.iter().enumerate().take(last + 1) {
            content.resize(content.len().max(*len), 0);
            content[..*len].copy_from_slice(&pattern(tag as u64, *len));
        }
        content
    };
    let contents: Vec<Vec<u8>> = (0..batches.len()).map(after).collect();
    let (mut states, mut newer) = (0, 0);
    let log = recorder.log();
    for state in log.crash_states(rng.random(), CrashOptions { points: Points::Sampled(2), subsets: 1 }) {
        let Some((_, least)) = synced.iter().rev().find(|(point, _)| *point <= state.point) else { continue };
        let device: Arc<dyn Device> = MemDevice::from_image(&state.image).expect("a device");
        let fs = mount(&device, &quiet());
        let channel = fs.channel().expect("channel");
        let found = read_all(&channel);
        let which = contents.iter().rposition(|content| found.values().all(|found| found == content));
        let sizes: Vec<usize> = found.values().map(Vec::len).collect();
        let what = format!("seed {seed}, crash at event {}: sizes {sizes:?}", state.point);
        let which = which.unwrap_or_else(|| panic!("{what}: the files are of different batches"));
        assert!(which >= *least, "{what}: batch {which}, although {least} was synced");
        check(&fs, &channel);
        states += 1;
        newer += usize::from(which > *least);
    }
    println!(
        "{states} crash states, {newer} with a batch newer than the last that was surely synced; seed {seed}"
    );
    assert!(states > 100 && newer > 10, "the test has lost its teeth: {states} states, {newer} newer");
}
