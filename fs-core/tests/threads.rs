//! Several threads with channels of their own on one mount: what each sees must be as if it were alone with its files;
//! where they share, every read shows whole writes and every name leads to a whole file.
//!
//! What becomes of operations whose future, channel or mount goes away is in `lifecycle.rs`.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fs_core::{
    Channel, Completion, Error, File, Filesystem, Growth, MountOptions, OpenFlags, Operation, WriteBatch,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use common::driver::{Driver, Form};
use common::footprint::Footprint;
use common::generate::{Generator, Shape};
use common::reference::Reference;
use common::{MIB, TestDevice, Watchdog, check, fresh, mount, quiet};

/// Threads of a test.
const THREADS: u64 = 4;

fn little_memory() -> MountOptions {
    MountOptions {
        node_cache_bytes: 256 << 10,
        checksum_cache_bytes: 64 << 10,
        commit_interval: Some(Duration::from_millis(10)),
        ..MountOptions::default()
    }
}

// ---- each thread with files of its own

/// Every thread has its own names and its own reference, which steps in lockstep; they share the mount.
#[test]
fn each_thread_sees_its_own_files_as_if_alone() {
    let seed = common::seed("own_files");
    let count = common::ops(6_000);
    let _watchdog = Watchdog::start("own_files", seed, 120 + count as u64 / 200);
    let device = TestDevice::slow(512 * MIB, seed);
    for (round, options) in [MountOptions::default(), little_memory()].into_iter().enumerate() {
        let fs = fresh(&device.device, &options);
        let mut references: Vec<Reference> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (fs, seed) = (fs.clone(), seed ^ thread ^ (round as u64) << 32);
                    scope.spawn(move || own_files(fs, thread, seed, count / 2 / THREADS as usize))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let verify = |fs: &Filesystem, references: &mut Vec<Reference>| {
            let channel = fs.channel().unwrap();
            for (thread, reference) in references.iter_mut().enumerate() {
                reference.verify_all(&channel, &prefix(thread as u64));
            }
            check(fs, &channel);
        };
        verify(&fs, &mut references);
        fs.unmount().unwrap();
        verify(&mount(&device.device, &options), &mut references);
    }
}

fn prefix(thread: u64) -> Vec<u8> {
    format!("thread{thread}-").into()
}

fn own_files(fs: Filesystem, thread: u64, seed: u64, count: usize) -> Reference {
    let shape = Shape { file_bytes: 512 << 10, bad_one_in: 200, ..Shape::few_names() }.under(&prefix(thread));
    let mut generator = Generator::new(seed, shape);
    let mut reference = Reference { shared: true, ..Reference::default() };
    let mut driver = Driver::new(fs);
    let mut done = 0;
    while done < count {
        let (form, most) = [(Form::Blocking, 1), (Form::Futures, 12), (Form::Submitted, 12)][done % 3];
        let mut footprint = Footprint::default();
        let mut ops = Vec::new();
        for _ in 0..most {
            let op = generator.op(&reference);
            if form == Form::Blocking || op.is_asynchronous() && footprint.admit(&reference, &op) {
                ops.push(op);
            }
        }
        done += most;
        let rng = &mut generator.rng;
        driver.run(form, &ops, rng, |index, outcome| reference.settle(&ops[index], outcome));
    }
    let Driver { handles, channel, .. } = driver;
    handles.into_values().for_each(|file| channel.close(file).unwrap());
    reference.close_all();
    reference
}

// ---- one file, many threads

/// A part of the file that is always written whole.
#[derive(Clone, Copy)]
struct Slot {
    offset: u64,
    len: usize,
}

/// Slots of 4 KiB to 64 KiB, one after the other.
fn slots() -> Vec<Slot> {
    let mut offset = 0;
    let lens = [4096, 65536, 8192, 16384, 4096, 32768, 4096, 12288];
    lens.iter()
        .cycle()
        .take(24)
        .map(|len| {
            let slot = Slot { offset, len: *len };
            offset += *len as u64;
            slot
        })
        .collect()
}

/// What a slot is filled with: nothing but `tag`.
fn stamp(tag: u64, bytes: &mut [u8]) {
    bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&tag.to_le_bytes()));
}

/// The tag that fills `bytes`.
fn tag_of(slot: usize, bytes: &[u8]) -> u64 {
    let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    for (i, word) in bytes.chunks_exact(8).enumerate() {
        let other = u64::from_le_bytes(word.try_into().unwrap());
        assert_eq!(
            other,
            tag,
            "slot {slot} is torn: {tag:#x} at its beginning, {other:#x} at byte {}",
            i * 8
        );
    }
    tag
}

/// What the threads that share a file know together.
struct Shared {
    slots: Vec<Slot>,
    /// By slot: the last write of its owner that has returned. Slots in the first half have one writer.
    acknowledged: Vec<AtomicU64>,
    stop: AtomicBool,
}

#[test]
fn readers_of_a_shared_file_see_whole_writes_and_never_go_back() {
    let seed = common::seed("shared_file");
    let count = common::ops(6_000) / THREADS as usize;
    let _watchdog = Watchdog::start("shared_file", seed, 120 + count as u64 / 100);
    let device = TestDevice::slow(64 * MIB, seed);
    let fs = fresh(&device.device, &little_memory());
    let shared = Arc::new(Shared {
        slots: slots(),
        acknowledged: slots().iter().map(|_| AtomicU64::new(0)).collect(),
        stop: AtomicBool::new(false),
    });
    fs.channel().unwrap().create("shared").unwrap();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|i| {
                let (fs, shared) = (fs.clone(), Arc::clone(&shared));
                scope.spawn(move || read_slots(&fs, &shared, seed ^ i << 40))
            })
            .collect();
        let writers: Vec<_> = (0..THREADS)
            .map(|i| {
                let (fs, shared) = (fs.clone(), Arc::clone(&shared));
                scope.spawn(move || write_slots(&fs, &shared, i, seed ^ i << 50, count))
            })
            .collect();
        let ends: Vec<_> = writers.into_iter().map(|thread| thread.join()).collect();
        shared.stop.store(true, Ordering::Relaxed);
        ends.into_iter().for_each(|end| end.unwrap());
        let reads: usize = readers.into_iter().map(|thread| thread.join().unwrap()).sum();
        println!("shared_file: {reads} reads beside {} writes", count * THREADS as usize);
    });
    let verify = |fs: &Filesystem| {
        let channel = fs.channel().unwrap();
        let file = channel.open("shared", OpenFlags::READ_ONLY).unwrap();
        for (i, slot) in shared.slots.iter().enumerate().take(shared.slots.len() / 2) {
            let mut bytes = vec![0; slot.len];
            channel.read(&file, slot.offset, &mut bytes).unwrap();
            assert_eq!(tag_of(i, &bytes), shared.acknowledged[i].load(Ordering::Relaxed), "slot {i}");
        }
        check(fs, &channel);
    };
    verify(&fs);
    fs.unmount().unwrap();
    verify(&mount(&device.device, &quiet()));
}

/// Slots in the first half have one writer each; the others are written by all.
fn write_slots(fs: &Filesystem, shared: &Shared, me: u64, seed: u64, count: usize) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let channel = fs.channel().unwrap();
    let file = channel.open("shared", OpenFlags::READ_WRITE).unwrap();
    let half = shared.slots.len() / 2;
    for turn in 1..=count as u64 {
        let own = rng.random_ratio(2, 3);
        let index = if own {
            (rng.random_range(0..half) as u64 / THREADS * THREADS + me) as usize % half
        } else {
            rng.random_range(half..shared.slots.len())
        };
        let slot = shared.slots[index];
        let tag = turn << 8 | me;
        if rng.random() {
            let mut bytes = vec![0; slot.len];
            stamp(tag, &mut bytes);
            channel.write(&file, slot.offset, &bytes).unwrap();
        } else {
            let mut buf = channel.buffer(slot.len).unwrap();
            stamp(tag, &mut buf);
            channel.write_buf(&file, slot.offset, buf).0.unwrap();
        }
        if own {
            shared.acknowledged[index].store(tag, Ordering::Release);
        }
        match rng.random_range(0..60) {
            0 => channel.sync_file(&file).unwrap(),
            1 => channel.sync().unwrap(),
            _ => {}
        }
    }
}

fn read_slots(fs: &Filesystem, shared: &Shared, seed: u64) -> usize {
    let mut rng = SmallRng::seed_from_u64(seed);
    let channel = fs.channel().unwrap();
    let file = channel.open("shared", OpenFlags::READ_ONLY).unwrap();
    let half = shared.slots.len() / 2;
    let mut reads = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        let first = rng.random_range(0..shared.slots.len());
        let last = (first + rng.random_range(0..3)).min(shared.slots.len() - 1);
        let slots = &shared.slots[first..=last];
        let before: Vec<u64> =
            (first..=last).map(|i| shared.acknowledged[i].load(Ordering::Acquire)).collect();
        let (from, len) = (slots[0].offset, slots.iter().map(|slot| slot.len).sum());
        let bytes = read_in_some_form(&channel, &file, from, len, &mut rng);
        for (i, slot) in slots.iter().enumerate() {
            let start = (slot.offset - from) as usize;
            if bytes.len() < start + slot.len {
                // Not written yet; then nobody can have been told that it was.
                assert!(first + i >= half || before[i] == 0, "slot {}: lies beyond the end", first + i);
                continue;
            }
            let tag = tag_of(first + i, &bytes[start..start + slot.len]);
            if first + i < half {
                assert!(tag >= before[i], "slot {}: {tag:#x} after {:#x} was written", first + i, before[i]);
            }
        }
        reads += 1;
    }
    reads
}

fn read_in_some_form(channel: &Channel, file: &File, from: u64, len: usize, rng: &mut SmallRng) -> Vec<u8> {
    match rng.random_range(0..3) {
        0 => {
            let mut bytes = vec![0xEE; len];
            let there = channel.read(file, from, &mut bytes).unwrap();
            bytes.truncate(there);
            bytes
        }
        1 => {
            let (there, buf) = channel.read_buf(file, from, channel.buffer(len).unwrap());
            buf[..there.unwrap()].to_vec()
        }
        _ => {
            let buf = channel.buffer(len).unwrap();
            channel.submit(Operation::Read { file: file.clone(), offset: from, buf }, 7);
            let answer = answers(channel, 1).pop().unwrap();
            match answer.result.unwrap() {
                fs_core::Output::Bytes(there) => answer.bufs.into_one().unwrap()[..there].to_vec(),
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Waits for `count` answers.
fn answers(channel: &Channel, count: usize) -> Vec<Completion> {
    let mut found = Vec::new();
    while found.len() < count {
        if channel.poll(&mut found) == 0 {
            channel.wait(Duration::from_millis(1));
        }
    }
    found
}

// ---- shared names

/// Threads create, rename, delete and open the same few names. Whatever wins: a name leads to one whole file.
#[test]
fn names_that_are_fought_over_lead_to_whole_files() {
    let seed = common::seed("shared_names");
    let count = common::ops(4_000) / THREADS as usize;
    let _watchdog = Watchdog::start("shared_names", seed, 120 + count as u64 / 100);
    let device = TestDevice::slow(64 * MIB, seed);
    let fs = fresh(&device.device, &little_memory());
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let fs = fs.clone();
            scope.spawn(move || fight(&fs, seed ^ thread, count));
        }
    });
    let look = |fs: &Filesystem| {
        let channel = fs.channel().unwrap();
        let names: Vec<_> = channel.list("").map(|entry| entry.unwrap()).collect();
        assert_eq!(channel.statfs().unwrap().files, names.len() as u64);
        for entry in &names {
            let file = channel.open(&entry.name, OpenFlags::READ_ONLY).unwrap();
            assert_eq!(file.id(), entry.id);
            check_owner(&channel, &file);
        }
        check(fs, &channel);
        names
    };
    let before = look(&fs);
    fs.unmount().unwrap();
    assert_eq!(look(&mount(&device.device, &quiet())), before);
}

/// A file holds its own id all over, and zeroes where it was grown.
fn check_owner(channel: &Channel, file: &File) {
    let mut bytes = vec![0; 40_000];
    let there = channel.read(file, 0, &mut bytes).unwrap();
    let id = file.id().0.to_le_bytes();
    let own = bytes[..there].chunks_exact(8).all(|word| word == id || word == [0; 8]);
    assert!(own, "{file:?} has content of another");
}

fn fight(fs: &Filesystem, seed: u64, count: usize) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let channel = fs.channel().unwrap();
    let name = |rng: &mut SmallRng| format!("name{}", rng.random_range(0..6));
    let fine = |result: Result<(), Error>| match result {
        Ok(()) | Err(Error::NotFound { .. } | Error::Exists { .. }) => {}
        Err(error) => panic!("{error}"),
    };
    for _ in 0..count {
        match rng.random_range(0..12) {
            0..2 => fine(channel.create(name(&mut rng)).map(|_| ())),
            2..4 => fine(channel.delete(name(&mut rng))),
            4..6 => fine(channel.rename(name(&mut rng), name(&mut rng))),
            6 => drop(channel.list("name").map(|entry| entry.unwrap()).collect::<Vec<_>>()),
            7 => channel.sync().unwrap(),
            8 => fine(channel.stat(name(&mut rng)).map(|_| ())),
            _ => {
                let flags = if rng.random() { OpenFlags::CREATE } else { OpenFlags::READ_WRITE };
                let Ok(file) = channel.open(name(&mut rng), flags) else { continue };
                check_owner(&channel, &file);
                let len = rng.random_range(1..40_000) / 8 * 8;
                let mut bytes = vec![0; len];
                stamp(file.id().0, &mut bytes);
                channel.write(&file, 0, &bytes).unwrap();
                if rng.random_ratio(1, 3) {
                    channel.truncate(&file, rng.random_range(0..5000) * 8).unwrap();
                    // What was cut and grown again are zeroes.
                    channel.write(&file, 0, &bytes).unwrap();
                    channel.truncate(&file, len as u64).unwrap();
                }
                if rng.random() {
                    channel.close(file).unwrap();
                }
            }
        }
    }
}

// ---- batches, and content in the metadata

/// Where a batch writes in each file, all of it words of its tag: inline content; inline content and data; data alone.
const STAMPED: [&[(u64, usize)]; 3] = [&[(0, 600)], &[(0, 800), (50_000, 10_000)], &[(4096, 9000)]];

/// The tag that all stamped bytes of file `index` in `bytes` have.
fn one_tag(index: usize, bytes: &[u8]) -> u64 {
    let mut tags = STAMPED[index].iter().flat_map(|(at, len)| bytes[*at as usize..][..*len].chunks_exact(8));
    let tag = tags.next().unwrap();
    assert!(tags.all(|other| other == tag), "file {index}: a reader saw half of a batch");
    u64::from_le_bytes(tag.try_into().unwrap())
}

/// Two threads write batches over three files, a third punches and preallocates beside them, others read: each file is always that of
/// one batch as a whole, and never of an older one than was seen before.
#[test]
fn readers_of_a_file_see_whole_batches() {
    let seed = common::seed("readers_of_a_file_see_whole_batches");
    let _watchdog = Watchdog::start("readers_of_a_file_see_whole_batches", seed, 120);
    let device = TestDevice::slow(64 * MIB, seed);
    let fs = fresh(&device.device, &little_memory());
    let next = AtomicU64::new(1);
    // Batches are numbered as they are written: one at a time, so that "older" has a meaning.
    let turn = std::sync::Mutex::new(());
    let writing = AtomicBool::new(true);
    let open = |channel: &Channel| ["x", "y", "z"].map(|name| channel.open(name, OpenFlags::CREATE).unwrap());
    let write = |channel: &Channel, files: &[File]| {
        let _turn = turn.lock().unwrap();
        let tag = next.fetch_add(1, Ordering::Relaxed);
        let mut batch = WriteBatch::new();
        for (file, ranges) in files.iter().zip(STAMPED) {
            for (at, len) in ranges {
                batch.write(file, *at, &tag.to_le_bytes().repeat(len / 8));
            }
        }
        channel.write_batch(&batch).unwrap();
    };
    let channel = fs.channel().unwrap();
    write(&channel, &open(&channel));
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let channel = fs.channel().unwrap();
                    let files = open(&channel);
                    (0..400).for_each(|_| write(&channel, &files));
                })
            })
            .collect();
        scope.spawn(|| {
            let channel = fs.channel().unwrap();
            let files = open(&channel);
            while writing.load(Ordering::Relaxed) {
                // Next to what is stamped, in blocks of the same records.
                channel.preallocate(&files[2], 0, 200_000, Growth::Keep).unwrap();
                channel.write(&files[2], 13_096, b"beside").unwrap();
                channel.punch(&files[2], 13_096, 90_000).unwrap();
                channel.zero(&files[1], 1000, 20_000, Growth::Keep).unwrap();
                // Waits for both ranges of a batch.
                channel.punch(&files[1], 1000, 48_500).unwrap();
                channel.punch(&files[1], 20_000, 20_000).unwrap();
            }
        });
        for _ in 0..2 {
            scope.spawn(|| {
                let channel = fs.channel().unwrap();
                let files = open(&channel);
                let mut seen = [0; 3];
                let mut bytes = vec![0; 60_000];
                while writing.load(Ordering::Relaxed) {
                    for (index, file) in files.iter().enumerate() {
                        channel.read(file, 0, &mut bytes).unwrap();
                        let tag = one_tag(index, &bytes);
                        assert!(tag >= seen[index], "file {index} went back from {} to {tag}", seen[index]);
                        seen[index] = tag;
                    }
                }
            });
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        writing.store(false, Ordering::Relaxed);
    });
    check(&fs, &channel);
}
