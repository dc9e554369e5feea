//! Bad input: devices that are none, images that are damaged, names and ranges that cannot be, devices that are full or fail.
//!
//! Each gets an error that names the thing; nothing panics or hangs; what was synced is there afterwards.

mod common;

use std::sync::Arc;

use bdev_adapter::mem::MemDevice;
use bdev_adapter::wrap::counters::CountingDevice;
use bdev_adapter::wrap::fault::{Effect, Fault, FaultDevice, FaultPlan, Target, When};
use bdev_adapter::wrap::recorder::Survive;
use bdev_adapter::{Device, IoErrorKind};
use common::{BLOCK, MIB, Watchdog, check, check_statfs, fresh, mount, pattern, quiet, seed};
use fs_core::{Channel, Error, FILE_SIZE_MAX, Filesystem, FormatOptions, MountOptions, OpenFlags, format};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Bytes of a small device.
const SMALL: u64 = 32 * MIB;
const EIO: IoErrorKind = IoErrorKind::Os(5);

fn memory(bytes: u64) -> Arc<MemDevice> {
    MemDevice::new(bytes, 4096).expect("a device")
}

fn as_device(device: &Arc<MemDevice>) -> Arc<dyn Device> {
    Arc::clone(device) as Arc<dyn Device>
}

fn try_mount(device: &Arc<dyn Device>) -> Result<Filesystem, Error> {
    Filesystem::mount(Arc::clone(device), &quiet())
}

fn put(channel: &Channel, name: &str, data: &[u8]) {
    let file = channel.open(name, OpenFlags::CREATE | OpenFlags::TRUNCATE).expect("open");
    channel.write(&file, 0, data).expect("write");
}

fn get(channel: &Channel, name: &str) -> Result<Vec<u8>, Error> {
    let file = channel.open(name, OpenFlags::READ_ONLY)?;
    let mut data = vec![0; file.size() as usize];
    let n = channel.read(&file, 0, &mut data)?;
    assert_eq!(n, data.len());
    Ok(data)
}

/// The byte addresses of the superblock slots, by slot.
fn slots(bytes: u64) -> [u64; 4] {
    [0, BLOCK, bytes - 2 * BLOCK, bytes - BLOCK]
}

fn flip(device: &MemDevice, offset: u64) {
    let mut byte = [0];
    device.read_raw(offset, &mut byte).expect("read");
    device.write_raw(offset, &[byte[0] ^ 0x10]).expect("write");
}

#[test]
fn what_holds_no_filesystem_is_refused_by_name() {
    let _watchdog = Watchdog::start("what_holds_no_filesystem", 0, 60);
    let zero = as_device(&memory(SMALL));
    let error = try_mount(&zero).expect_err("a device of zeroes was mounted");
    assert!(matches!(error, Error::NotAFilesystem { .. }), "{error}");
    assert!(error.to_string().contains("mkfs"), "it says what to do: {error}");

    let garbage = memory(SMALL);
    garbage.write_raw(0, &pattern(1, SMALL as usize)).expect("write");
    assert!(matches!(try_mount(&as_device(&garbage)), Err(Error::NotAFilesystem { .. })));

    let tiny = as_device(&memory(MIB));
    assert!(matches!(try_mount(&tiny), Err(Error::DeviceTooSmall { .. })));
    let error = format(&tiny, &FormatOptions::default()).expect_err("a tiny device was formatted");
    assert!(matches!(error, Error::DeviceTooSmall { bytes: MIB, .. }), "{error}");

    let label = "x".repeat(65);
    let error = format(&zero, &FormatOptions { label, force: false }).expect_err("a long label");
    assert!(matches!(error, Error::BadOption { .. }), "{error}");
}

#[test]
fn format_does_not_overwrite_unasked() {
    let _watchdog = Watchdog::start("format_does_not_overwrite", 0, 60);
    let device = as_device(&memory(SMALL));
    format(&device, &FormatOptions::default()).expect("format");
    let error = format(&device, &FormatOptions::default()).expect_err("overwritten");
    assert!(matches!(error, Error::AlreadyFormatted { .. }), "{error}");
    format(&device, &FormatOptions { force: true, ..FormatOptions::default() }).expect("forced");
    let fs = try_mount(&device).expect("mount");
    let error =
        format(&device, &FormatOptions { force: true, ..FormatOptions::default() }).expect_err("mounted");
    assert!(matches!(error, Error::Device(_)), "{error}");
    assert!(matches!(try_mount(&device), Err(Error::Device(_))), "mounted twice");
    fs.unmount().expect("unmount");
}

/// A filesystem with one synced file, unmounted; and the slots of its newest generation.
fn with_a_file() -> (Arc<MemDevice>, [usize; 2], Vec<u8>) {
    let memory = memory(SMALL);
    let device = as_device(&memory);
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let data = pattern(9, 100_000);
    put(&channel, "kept", &data);
    channel.sync().expect("sync");
    drop(channel);
    let newest = if fs.info().generation.is_multiple_of(2) { [0, 3] } else { [1, 2] };
    fs.unmount().expect("unmount");
    (memory, newest, data)
}

#[test]
fn one_rotten_superblock_costs_nothing() {
    let _watchdog = Watchdog::start("one_rotten_superblock", 0, 60);
    let (memory, newest, data) = with_a_file();
    let image = memory.snapshot();
    for slot in newest {
        let device = MemDevice::from_image(&image).expect("a device");
        flip(&device, slots(SMALL)[slot] + 200);
        let fs = try_mount(&as_device(&device)).expect("one slot is enough");
        let channel = fs.channel().expect("channel");
        assert_eq!(get(&channel, "kept").expect("read"), data, "slot {slot}");
        check(&fs, &channel);
    }
    // Both copies of the newest: the generation before is there, whole.
    let device = MemDevice::from_image(&image).expect("a device");
    newest.iter().for_each(|slot| flip(&device, slots(SMALL)[*slot] + 200));
    let fs = try_mount(&as_device(&device)).expect("the generation before");
    check(&fs, &fs.channel().expect("channel"));
    drop(fs);
    // All four: an error that says so.
    let device = MemDevice::from_image(&image).expect("a device");
    slots(SMALL).iter().for_each(|at| flip(&device, at + 200));
    let error = try_mount(&as_device(&device)).expect_err("nothing is left");
    assert!(matches!(error, Error::NoSuperblock { .. }), "{error}");
}

#[test]
fn a_device_that_was_cut_is_refused() {
    let _watchdog = Watchdog::start("a_device_that_was_cut", 0, 60);
    let (memory, ..) = with_a_file();
    let mut bytes = vec![0; (SMALL / 2) as usize];
    memory.read_raw(0, &mut bytes).expect("read");
    let half = self::memory(SMALL / 2);
    half.write_raw(0, &bytes).expect("write");
    let error = try_mount(&as_device(&half)).expect_err("half a filesystem");
    assert!(matches!(error, Error::UnsupportedFormat { .. }), "{error}");
}

#[test]
fn names_and_ranges_are_checked() {
    let _watchdog = Watchdog::start("names_and_ranges", 0, 60);
    let device = as_device(&memory(SMALL));
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    assert!(matches!(channel.create(""), Err(Error::NameEmpty)));
    assert!(matches!(channel.create([b'a'; 256]), Err(Error::NameTooLong { len: 256 })));
    assert!(matches!(channel.create(b"a\0b"), Err(Error::NameHasNul { at: 1 })));
    assert!(matches!(channel.open("none", OpenFlags::default()), Err(Error::NotFound { .. })));
    assert!(matches!(channel.rename("none", "other"), Err(Error::NotFound { .. })));
    channel.create([0xff; 255]).expect("255 bytes, any but NUL");
    assert!(matches!(channel.create([0xff; 255]), Err(Error::Exists { .. })));
    assert!(matches!(channel.rename([0xff; 255], ""), Err(Error::NameEmpty)));

    let file = channel.open("file", OpenFlags::CREATE).expect("open");
    for offset in [FILE_SIZE_MAX, FILE_SIZE_MAX - 1, u64::MAX] {
        let error = channel.write(&file, offset, b"ab").expect_err("beyond the largest file");
        assert!(matches!(error, Error::FileTooLarge { .. }), "{error}");
    }
    assert!(matches!(channel.truncate(&file, FILE_SIZE_MAX + 1), Err(Error::FileTooLarge { .. })));
    channel.write(&file, FILE_SIZE_MAX - 2, b"ab").expect("the last two bytes");
    assert_eq!(channel.read(&file, u64::MAX, &mut [0; 9]).expect("read"), 0);
    let read_only = channel.open("file", OpenFlags::READ_ONLY).expect("open");
    assert!(matches!(channel.write(&read_only, 0, b"a"), Err(Error::ReadOnly { .. })));
    check(&fs, &channel);
}

#[test]
fn a_full_device_loses_nothing_and_empties_again() {
    let _watchdog = Watchdog::start("a_full_device", 0, 120);
    let device = as_device(&memory(SMALL));
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let before = channel.statfs().expect("statfs");
    let data = pattern(3, 300_000);
    let mut files = 0;
    let error = loop {
        let name = format!("file-{files}");
        let file = match channel.open(&name, OpenFlags::CREATE) {
            Ok(file) => file,
            Err(error) => break error,
        };
        if let Err(error) = channel.write(&file, 0, &data) {
            assert_eq!(file.size(), 0, "a write that failed has changed the file");
            break error;
        }
        files += 1;
    };
    assert!(matches!(error, Error::NoSpace { .. }), "{error}");
    assert!(files > 60, "only {files} files fit");
    // An overwrite needs new blocks too; if it fails, the old content stays.
    let victim = channel.open("file-1", OpenFlags::default()).expect("open");
    if channel.write(&victim, 0, &pattern(4, 300_000)).is_err() {
        assert_eq!(get(&channel, "file-1").expect("read"), data);
    }
    drop(victim);
    channel.sync().expect("a full device can be synced");
    check(&fs, &channel);
    for i in 0..=files {
        match channel.delete(format!("file-{i}")) {
            Ok(()) | Err(Error::NotFound { .. }) => {}
            Err(error) => panic!("deleting on a full device: {error}"),
        }
    }
    channel.sync().expect("sync");
    check(&fs, &channel);
    let after = channel.statfs().expect("statfs");
    check_statfs(&after);
    // What stays are the records of checksums and space.
    assert!(before.free_bytes - after.free_bytes < MIB, "{before:?} {after:?}");
    put(&channel, "again", &data);
    assert_eq!(get(&channel, "again").expect("read"), data);
}

/// A filesystem on a device with faults, with one synced file on it.
fn on_faulty() -> (Arc<MemDevice>, Arc<FaultDevice>, Filesystem, Vec<u8>) {
    let memory = memory(SMALL);
    let faulty = FaultDevice::wrap(as_device(&memory), FaultPlan::new(1, Vec::new()));
    let device: Arc<dyn Device> = faulty.clone();
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let data = pattern(5, 200_000);
    put(&channel, "kept", &data);
    channel.sync().expect("sync");
    (memory, faulty, fs, data)
}

fn fail(target: Target) -> FaultPlan {
    FaultPlan::new(1, vec![Fault::new(target, When::Probability(1.0), Effect::Error(EIO))])
}

fn healthy() -> FaultPlan {
    FaultPlan::new(1, Vec::new())
}

#[test]
fn failing_reads_are_errors_and_pass() {
    let _watchdog = Watchdog::start("failing_reads", 0, 60);
    let (_memory, faulty, fs, data) = on_faulty();
    let channel = fs.channel().expect("channel");
    faulty.set_plan(fail(Target::Reads));
    let error = get(&channel, "kept").expect_err("the device fails every read");
    assert!(matches!(error, Error::Io { .. }), "{error}");
    faulty.set_plan(healthy());
    assert_eq!(get(&channel, "kept").expect("read"), data);
    put(&channel, "more", &data);
    channel.sync().expect("sync");
    check(&fs, &channel);
}

#[test]
fn failing_writes_leave_the_old_content() {
    let _watchdog = Watchdog::start("failing_writes", 0, 60);
    let (_memory, faulty, fs, data) = on_faulty();
    let channel = fs.channel().expect("channel");
    let file = channel.open("kept", OpenFlags::default()).expect("open");
    let free = channel.statfs().expect("statfs");
    faulty.set_plan(fail(Target::Writes));
    let error = channel.write(&file, 1000, &pattern(6, 50_000)).expect_err("the device fails every write");
    assert!(matches!(error, Error::Io { .. }), "{error}");
    let mut buf = channel.buffer(8192).expect("buffer");
    buf.fill(1);
    let (result, buf) = channel.write_buf(&file, 0, buf);
    assert!(result.is_err() && buf.len() == 8192, "the buffer comes back");
    assert_eq!(channel.statfs().expect("statfs"), free, "a failed write keeps no space");
    faulty.set_plan(healthy());
    assert_eq!(get(&channel, "kept").expect("read"), data);
    channel.write(&file, 0, b"now it works").expect("write");
    channel.sync().expect("sync");
    check(&fs, &channel);
}

/// A commit that fails, by requests of `target`, turns the mount read-only; what was synced is readable and there after a
/// remount.
fn a_failing_commit(target: Target) {
    let (memory, faulty, fs, data) = on_faulty();
    let channel = fs.channel().expect("channel");
    put(&channel, "unsynced", b"perhaps");
    faulty.set_plan(fail(target));
    let error = channel.sync().expect_err("the commit cannot succeed");
    assert!(matches!(error, Error::Io { .. }), "{error}");
    faulty.set_plan(healthy());
    assert!(matches!(channel.create("x"), Err(Error::ReadOnly { .. })));
    assert!(matches!(channel.sync(), Err(Error::ReadOnly { .. })), "a lost sync must not be forgotten");
    assert_eq!(get(&channel, "kept").expect("read"), data);
    drop(channel);
    assert!(fs.unmount().is_err(), "unmounting says that not all is durable");
    let fs = try_mount(&as_device(&memory)).expect("mount");
    let channel = fs.channel().expect("channel");
    assert_eq!(get(&channel, "kept").expect("read"), data);
    check(&fs, &channel);
}

#[test]
fn a_commit_whose_writes_fail() {
    let _watchdog = Watchdog::start("a_commit_whose_writes_fail", 0, 60);
    a_failing_commit(Target::Writes);
}

#[test]
fn a_commit_whose_flush_fails() {
    let _watchdog = Watchdog::start("a_commit_whose_flush_fails", 0, 60);
    a_failing_commit(Target::Flushes);
}

/// A reset that loses nothing costs nothing but reading back what was not flushed.
#[test]
fn a_reset_between_write_and_sync() {
    let _watchdog = Watchdog::start("a_reset_between_write_and_sync", 0, 60);
    let (memory, faulty, fs, _) = on_faulty();
    let channel = fs.channel().expect("channel");
    let large = common::pattern(7, 300 * BLOCK as usize + 5);
    put(&channel, "unsynced", b"perhaps lost in the device's cache");
    put(&channel, "large", &large);
    faulty.reset();
    put(&channel, "after", b"in the new epoch");
    channel.sync().expect("everything was still there");
    for _ in 0..3 {
        put(&channel, "again", b"and again");
        faulty.reset();
        channel.sync().expect("everything was still there");
    }
    drop((channel, fs));
    let device: Arc<dyn Device> = memory;
    let fs = common::mount(&device, &quiet());
    let channel = fs.channel().expect("channel");
    assert_eq!(get(&channel, "unsynced").expect("there"), b"perhaps lost in the device's cache");
    assert!(get(&channel, "large").expect("there") == large);
    assert_eq!(get(&channel, "again").expect("there"), b"and again");
    check(&fs, &channel);
}

/// A reset that loses what was not flushed is reported by the next sync, and what was synced before is there.
#[test]
fn a_reset_that_loses_the_cache_is_reported() {
    let _watchdog = Watchdog::start("a_reset_that_loses_the_cache", 0, 60);
    for large in [false, true] {
        let memory = MemDevice::new(64 * MIB, BLOCK as u32).expect("a device");
        let mut plan = FaultPlan::default();
        plan.volatile = true;
        let faulty = FaultDevice::wrap(memory.clone(), plan);
        let device: Arc<dyn Device> = faulty.clone();
        let fs = common::fresh(&device, &quiet());
        let channel = fs.channel().expect("channel");
        put(&channel, "kept", b"synced");
        channel.sync().expect("a sync");
        // Less than a KiB would lie in the metadata, which is still in memory.
        let len = if large { 100 * BLOCK as usize } else { 2000 };
        put(&channel, "lost", &common::pattern(3, len));
        faulty.power_cut(Survive::Nothing).expect("the cut");
        faulty.restore();
        let error = channel.sync().expect_err("the data is gone");
        assert!(matches!(error, Error::DataLost { .. }), "{error}");
        assert!(matches!(channel.create("more"), Err(Error::ReadOnly { .. })), "nothing more is written");
        drop((channel, fs, device, faulty));
        let device: Arc<dyn Device> = memory;
        let fs = common::mount(&device, &quiet());
        let channel = fs.channel().expect("channel");
        assert_eq!(get(&channel, "kept").expect("there"), b"synced");
        assert!(matches!(get(&channel, "lost"), Err(Error::NotFound { .. })));
        check(&fs, &channel);
    }
}

#[test]
fn a_vanished_device_is_an_error() {
    let _watchdog = Watchdog::start("a_vanished_device", 0, 60);
    let (memory, faulty, fs, data) = on_faulty();
    let channel = fs.channel().expect("channel");
    faulty.remove();
    assert!(get(&channel, "kept").is_err());
    let file = channel.open("kept", OpenFlags::default()).expect("open");
    assert!(channel.write(&file, 0, b"x").is_err());
    channel.create("new").expect("in memory");
    assert!(channel.sync().is_err());
    drop((file, channel));
    assert!(fs.unmount().is_err());
    let fs = try_mount(&as_device(&memory)).expect("mount");
    assert_eq!(get(&fs.channel().expect("channel"), "kept").expect("read"), data);
}

#[test]
fn a_read_only_mount_writes_nothing() {
    let _watchdog = Watchdog::start("a_read_only_mount", 0, 60);
    let (memory, _, data) = with_a_file();
    let counting = CountingDevice::wrap(as_device(&memory));
    let device: Arc<dyn Device> = counting.clone();
    let fs = mount(&device, &MountOptions { read_only: true, ..MountOptions::default() });
    let channel = fs.channel().expect("channel");
    assert_eq!(get(&channel, "kept").expect("read"), data);
    assert!(matches!(channel.create("x"), Err(Error::ReadOnly { .. })));
    assert!(matches!(channel.delete("kept"), Err(Error::ReadOnly { .. })));
    channel.sync().expect("there is nothing to sync");
    check(&fs, &channel);
    drop(channel);
    fs.unmount().expect("unmount");
    let counts = counting.counts();
    assert_eq!((counts.writes.ops, counts.zeroes.ops, counts.unmaps.ops), (0, 0, 0), "{counts:?}");
}

#[test]
fn a_rotten_data_block_costs_its_file_only() {
    let _watchdog = Watchdog::start("a_rotten_data_block", 0, 60);
    let memory = memory(SMALL);
    let device = as_device(&memory);
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let (one, other) = (pattern(1, 3 * 4096), pattern(2, 3 * 4096));
    put(&channel, "one", &one);
    put(&channel, "other", &other);
    channel.sync().expect("sync");
    // The second block of `one`, wherever it lies.
    let at = (0..SMALL / BLOCK)
        .map(|block| block * BLOCK)
        .find(|at| {
            let mut bytes = [0; 4096];
            memory.read_raw(*at, &mut bytes).expect("read");
            bytes == one[4096..8192]
        })
        .expect("the data is on the device");
    flip(&memory, at + 17);
    let error = get(&channel, "one").expect_err("rotten data was returned");
    assert!(matches!(error, Error::DataChecksum { offset: 4096, .. }), "{error}");
    assert_eq!(get(&channel, "other").expect("read"), other);
    let report = fs.check(&channel, &mut |_| {}).expect("check");
    assert_eq!(report.problem_count, 1, "{:?}", report.problems);
}

/// Mounts a damaged image and reads all of it: errors are fine, wrong data, panics and hangs are not.
fn survive(device: &Arc<MemDevice>, expected: &[(String, Vec<u8>)]) -> bool {
    let Ok(fs) = try_mount(&as_device(device)) else { return false };
    let Ok(channel) = fs.channel() else { return false };
    let mut whole = true;
    for (name, data) in expected {
        match get(&channel, name) {
            Ok(found) => assert!(found == *data, "{name}: wrong data without an error"),
            Err(_) => whole = false,
        }
    }
    whole &= channel.list("").all(|entry| entry.is_ok());
    whole &= fs.check(&channel, &mut |_| {}).is_ok_and(|report| report.is_clean());
    fs.abandon();
    whole
}

#[test]
fn every_metadata_block_may_rot() {
    let seed = seed("every_metadata_block_may_rot");
    let _watchdog = Watchdog::start("every_metadata_block_may_rot", seed, 300);
    let mut rng = SmallRng::seed_from_u64(seed);
    let memory = memory(SMALL);
    let device = as_device(&memory);
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let files: Vec<(String, Vec<u8>)> = (0..150u64).map(|i| (format!("f{i:03}"), pattern(i, 5000))).collect();
    files.iter().for_each(|(name, data)| put(&channel, name, data));
    channel.sync().expect("sync");
    drop(channel);
    fs.unmount().expect("unmount");
    let image = memory.snapshot();
    let mut nodes = 0;
    for block in 2..SMALL / BLOCK - 2 {
        let mut bytes = [0; 4096];
        memory.read_raw(block * BLOCK, &mut bytes).expect("read");
        if &bytes[..4] != b"GNOD" {
            continue;
        }
        nodes += 1;
        let damaged = MemDevice::from_image(&image).expect("a device");
        for _ in 0..rng.random_range(1..4) {
            flip(&damaged, block * BLOCK + rng.random_range(0..4096));
        }
        survive(&damaged, &files);
    }
    assert!(nodes >= 8, "only {nodes} metadata blocks were found");
    assert!(survive(&MemDevice::from_image(&image).expect("a device"), &files), "the undamaged image");
}

#[test]
fn images_of_garbage_are_errors() {
    let seed = seed("images_of_garbage_are_errors");
    let _watchdog = Watchdog::start("images_of_garbage_are_errors", seed, 300);
    let mut rng = SmallRng::seed_from_u64(seed);
    let (memory, _, data) = with_a_file();
    let image = memory.snapshot();
    let expected = [("kept".to_owned(), data)];
    for _ in 0..60 {
        let damaged = MemDevice::from_image(&image).expect("a device");
        for _ in 0..rng.random_range(1..40) {
            let len = rng.random_range(1..3000);
            let garbage: Vec<u8> = (0..len).map(|_| rng.random()).collect();
            // Mostly where something is: at the ends and in the first megabytes.
            let at =
                if rng.random() { rng.random_range(0..4 * MIB) } else { rng.random_range(0..SMALL - 4096) };
            damaged.write_raw(at, &garbage).expect("write");
        }
        survive(&damaged, &expected);
    }
}
