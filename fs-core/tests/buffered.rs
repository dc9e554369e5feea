//! Buffered I/O, and direct I/O beside it: both see the same bytes at every moment; what was accepted gets to the device; what is
//! reserved comes back; and a file at rest has nothing on its way.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bdev_adapter::mem::MemDevice;
use bdev_adapter::wrap::fault::{Effect, Fault, FaultDevice, FaultPlan, Target, When};
use bdev_adapter::{Device, IoErrorKind};
use common::{BLOCK, MIB, TestDevice, Watchdog, check, check_statfs, fresh, mount, pattern, quiet, seed};
use fs_core::{Accounting, Channel, Error, File, Filesystem, MountOptions, OpenFlags, Operation, Priority};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BUFFERED: OpenFlags = OpenFlags::BUFFERED;
const CREATE: OpenFlags = OpenFlags::CREATE;

fn small_cache(bytes: usize) -> MountOptions {
    MountOptions { page_cache_bytes: bytes, ..quiet() }
}

/// One file, opened twice.
fn both(channel: &Channel, name: &str) -> (File, File) {
    let buffered = channel.open(name, CREATE | BUFFERED).expect("open");
    (buffered, channel.open(name, OpenFlags::READ_WRITE).expect("open"))
}

fn read(channel: &Channel, file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; len];
    let there = channel.read(file, offset, &mut bytes).expect("read");
    bytes.truncate(there);
    bytes
}

#[track_caller]
fn at_rest(file: &File) {
    assert_eq!(file.accounting(), Accounting::default(), "a file at rest");
}

#[test]
fn both_kinds_of_handles_see_the_same_bytes() {
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let (buffered, direct) = both(&channel, "f");
    channel.write(&buffered, 100, b"buffered").expect("write");
    assert_eq!((buffered.size(), direct.size()), (108, 108));
    assert_eq!(read(&channel, &direct, 100, 8), b"buffered");
    assert_eq!(fs.stats().data_written_bytes, 0, "a read is no reason to write");
    assert_eq!(channel.stat("f").expect("stat").size, 108);
    channel.write(&direct, 104, b"DIRECT").expect("write");
    assert_eq!(read(&channel, &buffered, 100, 100), b"buffDIRECT");
    // Clean pages go when a direct write replaces their blocks.
    assert_eq!(read(&channel, &buffered, 0, 200)[100..], *b"buffDIRECT");
    channel.write(&direct, 0, &pattern(1, 3 * BLOCK as usize)).expect("write");
    assert_eq!(read(&channel, &buffered, 0, 20_000), pattern(1, 3 * BLOCK as usize));
    // A page at a time from either side, as a mapping would.
    for round in 0..200u64 {
        let (at, data) = (round * 1777 % (40 * BLOCK), pattern(round, 4097));
        let (write, other) = if round % 2 == 0 { (&buffered, &direct) } else { (&direct, &buffered) };
        channel.write(write, at, &data).expect("write");
        assert_eq!(read(&channel, other, at, data.len()), data, "round {round}");
        assert_eq!(read(&channel, write, at, data.len()), data, "round {round}");
    }
    channel.sync().expect("sync");
    at_rest(&direct);
    check(&fs, &channel);
}

#[test]
fn every_form_of_a_call_goes_through_the_cache() {
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let (file, direct) = both(&channel, "f");
    let buffer = |data: &[u8]| {
        let mut buf = channel.buffer(data.len()).expect("buffer");
        buf.copy_from_slice(data);
        buf
    };
    channel.write_buf(&file, 0, buffer(&pattern(1, 8192))).0.expect("write");
    channel.submit(Operation::Write { file: file.clone(), offset: 8192, buf: buffer(&pattern(2, 100)) }, 1);
    let mut done = Vec::new();
    while channel.poll(&mut done) == 0 {}
    done.remove(0).result.expect("write");
    let at = channel.append(&file, b"end").expect("append");
    assert_eq!(at, 8292);
    channel.submit(Operation::Append { file: file.clone(), buf: buffer(b"more") }, 2);
    while channel.poll(&mut done) == 0 {}
    done.remove(0).result.expect("append");
    assert_eq!(fs.stats().data_written_bytes, 0, "nothing of it went to the device");
    let expected = [pattern(1, 8192), pattern(2, 100), b"endmore".to_vec()].concat();
    assert_eq!(read(&channel, &file, 0, 10_000), expected);
    assert_eq!(read(&channel, &direct, 0, 10_000), expected);
    for handle in [&file, &direct] {
        let (result, buf) = channel.read_buf(handle, 4096, channel.buffer(8192).expect("buffer"));
        assert_eq!(result.expect("read"), expected.len() - 4096);
        assert_eq!(buf[..expected.len() - 4096], expected[4096..]);
        channel.submit(
            Operation::Read { file: handle.clone(), offset: 0, buf: channel.buffer(8192).expect("buffer") },
            3,
        );
        while channel.poll(&mut done) == 0 {}
        assert_eq!(done.remove(0).bufs.into_one().expect("a buffer")[..], expected[..8192]);
    }
    channel.sync_range(&file, 0, 1).expect("sync");
    channel.sync_file(&file).expect("sync");
    at_rest(&file);
    assert!(fs.stats().data_written_bytes >= 3 * BLOCK);
}

#[test]
fn holes_ends_and_unaligned_edges() {
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &small_cache(1 << 20));
    let channel = fs.channel().expect("channel");
    let (file, direct) = both(&channel, "f");
    // Over old content, with edges that have to be read first.
    channel.write(&direct, 0, &pattern(1, 20_000)).expect("write");
    channel.write(&file, 5000, &pattern(2, 3000)).expect("write");
    let mut expected = pattern(1, 20_000);
    expected[5000..8000].copy_from_slice(&pattern(2, 3000));
    assert_eq!(read(&channel, &direct, 0, 30_000), expected);
    // Behind the end, with a hole between.
    channel.write(&file, 100_001, b"x").expect("write");
    expected.resize(100_001, 0);
    expected.push(b'x');
    assert_eq!(read(&channel, &file, 0, 200_000), expected);
    assert_eq!(read(&channel, &direct, 0, 200_000), expected);
    assert_eq!(read(&channel, &file, 100_002, 10), b"");
    assert_eq!(read(&channel, &file, u64::MAX - 5, 10), b"");
    assert!(channel.write(&file, u64::MAX - 5, &[0; 10]).is_err());
    // What is cut off reads as zeroes when the file grows again.
    channel.truncate(&file, 5500).expect("truncate");
    channel.truncate(&file, 30_000).expect("truncate");
    expected.truncate(5500);
    expected.resize(30_000, 0);
    assert_eq!(read(&channel, &file, 0, 200_000), expected);
    assert_eq!(read(&channel, &direct, 0, 200_000), expected);
    channel.sync().expect("sync");
    at_rest(&file);
    drop((file, direct, channel));
    fs.unmount().expect("unmount");
    let fs = mount(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", OpenFlags::READ_ONLY).expect("open");
    assert_eq!(read(&channel, &file, 0, 200_000), expected);
    check(&fs, &channel);
}

#[test]
fn unmount_writes_back_and_a_dropped_handle_loses_nothing() {
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", CREATE | BUFFERED).expect("open");
    channel.write(&file, 0, &pattern(7, 300_000)).expect("write");
    channel.close(file).expect("close");
    // It is still there, though nobody has it open.
    let file = channel.open("f", OpenFlags::READ_ONLY).expect("open");
    assert_eq!(read(&channel, &file, 0, 300_000), pattern(7, 300_000));
    drop((file, channel));
    fs.unmount().expect("unmount");
    let fs = mount(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", OpenFlags::READ_ONLY).expect("open");
    assert_eq!(read(&channel, &file, 0, 400_000), pattern(7, 300_000));
    check(&fs, &channel);
}

#[test]
fn a_deleted_file_gives_its_reservations_back() {
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let before = channel.statfs().expect("statfs");
    let file = channel.open("f", CREATE | BUFFERED).expect("open");
    channel.write(&file, 0, &pattern(7, 3_000_000)).expect("write");
    let during = channel.statfs().expect("statfs");
    check_statfs(&during);
    assert!(before.free_bytes - during.free_bytes >= 3_000_000, "what is accepted is reserved");
    channel.delete("f").expect("delete");
    assert_eq!(read(&channel, &file, 0, 10), pattern(7, 10));
    channel.close(file).expect("close");
    channel.sync().expect("sync");
    // But for the nodes of the trees.
    assert!(channel.statfs().expect("statfs").free_bytes + 8 * BLOCK >= before.free_bytes);
    assert_eq!(fs.stats().data_written_bytes, 0);
    // And a truncate.
    let file = channel.open("g", CREATE | BUFFERED).expect("open");
    channel.write(&file, 0, &pattern(7, 1_000_000)).expect("write");
    channel.truncate(&file, 5000).expect("truncate");
    assert_eq!(read(&channel, &file, 0, 10_000), pattern(7, 5000));
    assert_eq!(file.accounting().reserved_bytes, 0, "the unit that is cut in two went to the device");
    channel.truncate(&file, 0).expect("truncate");
    at_rest(&file);
    check(&fs, &channel);
}

#[test]
fn many_small_writes_become_long_extents() {
    let long = std::env::var_os("GAUR_OPS").is_some();
    for bytes in [64 * MIB, 1024 * MIB].into_iter().take(if long { 2 } else { 1 }) {
        let device = TestDevice::new(bytes + bytes / 8 + 32 * MIB);
        let options = MountOptions { page_cache_bytes: 16 << 20, ..quiet() };
        let fs = fresh(&device.device, &options);
        let channel = fs.channel().expect("channel");
        let file = channel.open("f", CREATE | BUFFERED).expect("open");
        for block in 0..bytes / BLOCK {
            channel.write(&file, block * BLOCK, &pattern(block, BLOCK as usize)).expect("write");
            assert!(fs.stats().page_cache_bytes <= 18 << 20, "memory is bounded: {:?}", fs.stats());
        }
        channel.sync_file(&file).expect("sync");
        at_rest(&file);
        let (runs, extents) = (
            channel.extents(&file, 0, u64::MAX).count() as u64,
            channel.stat_file(&file).expect("stat").extents,
        );
        println!("{bytes} bytes in {runs} runs, {extents} extents");
        assert!(runs < 50 && runs <= 4 + bytes / (16 * MIB), "{runs} runs");
        // An extent record does not reach over a flight of a MiB.
        assert!(extents <= bytes / MIB * 5 / 4 + 50, "{extents} extents");
        assert!(fs.stats().data_written_bytes <= bytes + MIB);
        for block in (0..bytes / BLOCK).step_by(1777) {
            assert_eq!(read(&channel, &file, block * BLOCK, BLOCK as usize), pattern(block, BLOCK as usize));
        }
        check(&fs, &channel);
    }
}

/// Fills a filesystem with buffered writes until they are refused. All that was accepted must get to the device.
#[test]
fn want_of_space_is_answered_to_the_write_and_never_later() {
    let seed = seed("full");
    let _watchdog = Watchdog::start("full", seed, 300);
    let mut rng = SmallRng::seed_from_u64(seed);
    for round in 0..4 {
        let device = TestDevice::new([16, 24, 40, 16][round] * MIB);
        let fs = fresh(&device.device, &MountOptions { page_cache_bytes: 64 << 20, ..quiet() });
        let channel = fs.channel().expect("channel");
        let file = channel.open("f", CREATE | BUFFERED).expect("open");
        let direct = channel.open("d", CREATE).expect("open");
        let mut accepted = std::collections::BTreeMap::new();
        let mut refused = 0;
        for tag in 0u64.. {
            // Single blocks all over, so that each becomes an extent of its own; the rest in pieces.
            let block = if round % 2 == 0 { rng.random_range(0..1 << 20) } else { tag };
            match channel.write(&file, block * BLOCK, &pattern(tag, BLOCK as usize)) {
                Ok(()) => drop(accepted.insert(block, tag)),
                Err(Error::NoSpace { .. }) => refused += 1,
                Err(error) => panic!("{error}"),
            }
            if tag % 100 == 0 {
                let _ = channel.write(&direct, tag * 64, &pattern(tag, 4096));
                check_statfs(&channel.statfs().expect("statfs"));
            }
            if refused > 5 {
                break;
            }
        }
        // Overwrites of what is there; some find space, what they get they keep.
        for tag in 1 << 40..(1 << 40) + 2000u64 {
            let index = rng.random_range(0..accepted.len());
            let block = *accepted.keys().nth(index).expect("in range");
            match channel.write(&file, block * BLOCK, &pattern(tag, BLOCK as usize)) {
                Ok(()) => drop(accepted.insert(block, tag)),
                Err(Error::NoSpace { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            if tag % 500 == 0 {
                channel.sync_file(&file).expect("sync of what was accepted");
            }
        }
        channel.sync().expect("sync of what was accepted");
        at_rest(&file);
        println!("{} blocks accepted; {:?}", accepted.len(), channel.statfs().expect("statfs"));
        check(&fs, &channel);
        drop((file, direct, channel));
        fs.unmount().expect("unmount");
        let fs = mount(&device.device, &quiet());
        let channel = fs.channel().expect("channel");
        let file = channel.open("f", OpenFlags::READ_ONLY).expect("open");
        for (block, tag) in &accepted {
            let found = read(&channel, &file, block * BLOCK, BLOCK as usize);
            assert_eq!(found, pattern(*tag, BLOCK as usize), "block {block}");
        }
        // A full filesystem can be emptied.
        drop(file);
        channel.delete("f").expect("delete");
        check(&fs, &channel);
    }
}

#[test]
fn a_failed_write_back_is_told_until_it_is_acknowledged() {
    let memory: Arc<dyn Device> = MemDevice::new(64 * MIB, 4096).expect("a device");
    let fault = FaultDevice::wrap(memory.clone(), FaultPlan::default());
    let device: Arc<dyn Device> = fault.clone();
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let (file, direct) = both(&channel, "f");
    let other = channel.open("g", CREATE | BUFFERED).expect("open");
    channel.write(&direct, 0, &pattern(1, 100_000)).expect("write");
    channel.sync().expect("sync");
    channel.write(&file, 0, &pattern(2, 100_000)).expect("write");
    channel.write(&other, 0, b"other").expect("write");
    let free = channel.statfs().expect("statfs").free_bytes;
    let eio = Effect::Error(IoErrorKind::Os(5));
    fault.set_plan(FaultPlan::new(1, vec![Fault::new(Target::Writes, When::Nth(1), eio)]));
    assert!(matches!(channel.sync_file(&file), Err(Error::Io { .. })), "the sync tells");
    // The data is still there for readers, with its space; nothing of it was lost.
    assert_eq!(read(&channel, &file, 0, 100_000), pattern(2, 100_000));
    assert_eq!(read(&channel, &direct, 0, 100_000), pattern(2, 100_000));
    assert_eq!(file.accounting().delalloc_bytes, 25 * BLOCK);
    assert_eq!(channel.statfs().expect("statfs").free_bytes, free);
    // The device works again: the data goes there, and every sync still tells.
    for _ in 0..2 {
        assert!(matches!(channel.sync_file(&file), Err(Error::Io { .. })));
        assert!(matches!(channel.sync(), Err(Error::Io { .. })));
        channel.sync_file(&other).expect("another file has no part in it");
    }
    at_rest(&file);
    assert!(matches!(direct.clear_error(), Some(Error::Io { .. })));
    channel.sync_file(&file).expect("acknowledged");
    channel.sync().expect("acknowledged");
    assert_eq!(read(&channel, &direct, 0, 100_000), pattern(2, 100_000));
    // A direct write that has to write pages back first gets the error, and changes nothing.
    channel.write(&file, 0, &pattern(3, 8192)).expect("write");
    fault.set_plan(FaultPlan::new(1, vec![Fault::new(Target::Writes, When::Nth(1), eio)]));
    assert!(matches!(channel.write(&direct, 4096, &pattern(4, 4096)), Err(Error::Io { .. })));
    assert_eq!(read(&channel, &direct, 0, 8192), pattern(3, 8192));
    file.clear_error();
    channel.write(&direct, 4096, &pattern(4, 4096)).expect("write");
    assert_eq!(read(&channel, &file, 4096, 4096), pattern(4, 4096));
    check(&fs, &channel);
    at_rest(&file);
}

#[test]
fn sequential_readers_are_read_ahead_for() {
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let (file, direct) = both(&channel, "f");
    channel.write(&direct, 0, &pattern(1, 8 * MIB as usize)).expect("write");
    let expected = pattern(1, 8 * MIB as usize);
    let requests = |fs: &Filesystem| fs.stats().data_read_bytes;
    let begin = requests(&fs);
    for at in (0..8 * MIB).step_by(4096) {
        assert_eq!(read(&channel, &file, at, 4096), expected[at as usize..at as usize + 4096]);
    }
    assert_eq!(requests(&fs) - begin, 8 * MIB, "each byte was read once");
    fs.set_cache_bytes(0);
    assert_eq!(fs.stats().page_cache_bytes, 0);
    fs.set_cache_bytes(64 << 20);
    let begin = requests(&fs);
    for at in [5, 900, 77, 3, 1500] {
        assert_eq!(read(&channel, &file, at * 4096, 100), expected[at as usize * 4096..][..100]);
    }
    assert_eq!(requests(&fs) - begin, 5 * BLOCK, "nothing is read ahead of random reads");
}

#[test]
fn the_cache_is_bounded_and_what_is_used_stays() {
    let device = TestDevice::new(128 * MIB);
    let options = MountOptions { page_cache_bytes: 4 << 20, ..quiet() };
    let fs = fresh(&device.device, &options);
    assert_eq!(fs.cache_bytes(), 4 << 20);
    let channel = fs.channel().expect("channel");
    let (hot, hot_direct) = both(&channel, "hot");
    let (cold, cold_direct) = both(&channel, "cold");
    channel.write(&hot_direct, 0, &pattern(1, 1 << 20)).expect("write");
    channel.write(&cold_direct, 0, &pattern(2, 64 << 20)).expect("write");
    hot.set_priority(Priority::High);
    assert_eq!(hot_direct.priority(), Priority::High);
    for _ in 0..3 {
        assert_eq!(read(&channel, &hot, 0, 1 << 20), pattern(1, 1 << 20));
    }
    for at in (0..64 << 20).step_by(1 << 16) {
        read(&channel, &cold, at, 1 << 16);
        assert!(fs.stats().page_cache_bytes <= 4 << 20);
    }
    let before = fs.stats().data_read_bytes;
    assert_eq!(read(&channel, &hot, 0, 1 << 20), pattern(1, 1 << 20));
    assert_eq!(fs.stats().data_read_bytes, before, "a scan washed out what is used");
}

#[test]
fn dirty_memory_is_bounded_and_the_helper_writes_back_by_age() {
    let device = TestDevice::new(128 * MIB);
    let fs = fresh(&device.device, &small_cache(8 << 20));
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", CREATE | BUFFERED).expect("open");
    for at in 0..300u64 {
        channel.write(&file, at * 100_000, &pattern(at, 100_000)).expect("write");
        assert!(fs.stats().dirty_bytes <= 5 << 20, "{:?}", fs.stats());
    }
    channel.write(&file, 0, &pattern(5, 40_000_000)).expect("one long write");
    assert!(fs.stats().dirty_bytes <= 5 << 20, "{:?}", fs.stats());
    assert_eq!(read(&channel, &file, 0, 40_000_000), pattern(5, 40_000_000));
    drop((file, channel));
    fs.unmount().expect("unmount");
    let age = Some(Duration::from_millis(50));
    let fs = mount(&device.device, &MountOptions { writeback_age: age, ..MountOptions::default() });
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", BUFFERED).expect("open");
    channel.write(&file, 10, b"old by now").expect("write");
    let began = Instant::now();
    while file.accounting() != Accounting::default() {
        assert!(began.elapsed() < Duration::from_secs(30), "nobody writes back: {:?}", file.accounting());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(read(&channel, &file, 10, 10), b"old by now");
    check(&fs, &channel);
}

/// A commit while appends of one file are finished in any order: the durable size covers none that is not.
#[test]
fn the_size_on_disk_covers_no_unfinished_write() {
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let (file, direct) = both(&channel, "f");
    channel.write(&file, 0, &pattern(1, 10_000)).expect("write");
    channel.write(&direct, 65_536, &pattern(2, 10_000)).expect("write");
    channel.write(&file, 131_072, &pattern(3, 10_000)).expect("write");
    // A commit without a sync of the file: by the sync of a range behind what holds the size back, whose pages it writes too.
    channel.sync_range(&direct, 65_536, 10).expect("sync");
    drop((file, direct));
    drop(channel);
    fs.abandon();
    let fs = mount(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    check(&fs, &channel);
    let file = channel.open("f", OpenFlags::READ_WRITE).expect("open");
    assert!(file.size() >= 75_536, "{} bytes: what was synced is gone", file.size());
    assert_eq!(read(&channel, &file, 65_536, 10_000), pattern(2, 10_000));
    assert_eq!(read(&channel, &file, 0, 10_000), pattern(1, 10_000));
}

/// The same with a commit that no sync of the file asked for: finished content behind the size is cut off by the next mount.
#[test]
fn what_lies_beyond_the_size_on_disk_is_cut_off_after_a_crash() {
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let (file, direct) = both(&channel, "f");
    let other = channel.open("other", CREATE).expect("open");
    channel.write(&file, 0, &pattern(1, 10_000)).expect("write");
    channel.write(&direct, 65_536, &pattern(2, 10_000)).expect("write");
    channel.write(&other, 0, b"x").expect("write");
    channel.sync_range(&other, 0, 1).expect("sync");
    assert_eq!(file.accounting().delalloc_bytes, 3 * BLOCK, "that is still dirty");
    drop((file, direct, other));
    drop(channel);
    fs.abandon();
    let fs = mount(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    check(&fs, &channel);
    let file = channel.open("f", OpenFlags::READ_WRITE).expect("open");
    assert_eq!(file.size(), 0, "the write at the beginning was not finished");
    channel.truncate(&file, 200_000).expect("truncate");
    assert!(read(&channel, &file, 0, 200_000).iter().all(|byte| *byte == 0), "cut off content came back");
    channel.sync().expect("sync");
    check(&fs, &channel);
}

/// Tagged 32 KiB writes at random, direct and buffered mixed and some direct ones forced through the cache, by eight threads; readers
/// that must see whole blocks of one tag; now and then a truncate or a sync.
#[test]
fn eight_threads_of_both_kinds_leave_nothing_on_the_way() {
    let seed = seed("eight_threads");
    let rounds = common::ops(4_000) as u64 / 8;
    let _watchdog = Watchdog::start("eight_threads", seed, 240 + rounds / 20);
    let device = TestDevice::slow(256 * MIB, seed);
    let options = MountOptions {
        page_cache_bytes: 2 << 20,
        writeback_age: Some(Duration::from_millis(5)),
        ..MountOptions::default()
    };
    let fs = fresh(&device.device, &options);
    fs.force_fallback(3);
    const LEN: usize = 32 << 10;
    const SLOTS: u64 = 64;
    let tags = AtomicU64::new(1);
    let stop = AtomicBool::new(false);
    let file = fs.channel().expect("channel").open("f", CREATE).expect("open");
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let (fs, tags) = (fs.clone(), &tags);
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(seed ^ thread);
                let channel = fs.channel().expect("channel");
                let (buffered, direct) = both(&channel, "f");
                for _ in 0..rounds {
                    let slot = rng.random_range(0..SLOTS);
                    let file = if rng.random() { &buffered } else { &direct };
                    match rng.random_range(0..20) {
                        0..12 => {
                            let tag = tags.fetch_add(1, Ordering::Relaxed) as u8;
                            channel.write(file, slot * LEN as u64, &vec![tag | 1; LEN]).expect("write");
                        }
                        12..18 => {
                            let found = read(&channel, file, slot * LEN as u64, LEN);
                            let whole = found.windows(2).all(|pair| pair[0] == pair[1]);
                            assert!(whole, "a read saw parts of two writes at slot {slot}");
                        }
                        18 => {
                            let size = rng.random_range(SLOTS / 2..SLOTS) * LEN as u64;
                            channel.truncate(file, size).expect("truncate");
                        }
                        _ => channel.sync_range(file, slot * LEN as u64, LEN as u64).expect("sync"),
                    }
                }
            });
        }
        let (fs, stop) = (fs.clone(), &stop);
        scope.spawn(move || {
            let channel = fs.channel().expect("channel");
            while !stop.load(Ordering::Relaxed) {
                check_statfs(&channel.statfs().expect("statfs"));
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        scope.spawn(move || {
            // The other threads end by themselves.
            std::thread::sleep(Duration::from_millis(50));
            stop.store(true, Ordering::Relaxed);
        });
    });
    let channel = fs.channel().expect("channel");
    channel.sync().expect("sync");
    at_rest(&file);
    assert_eq!(fs.stats().ordered_extents + fs.stats().dirty_bytes, 0);
    check_statfs(&channel.statfs().expect("statfs"));
    let before = read(&channel, &file, 0, SLOTS as usize * LEN);
    check(&fs, &channel);
    drop((file, channel));
    fs.unmount().expect("unmount");
    let fs = mount(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", OpenFlags::READ_ONLY).expect("open");
    assert_eq!(read(&channel, &file, 0, SLOTS as usize * LEN), before, "the cache and the device disagreed");
}

/// Short reads at the end of the file leave no lock: pairs of an appender and a reader of each kind.
#[test]
fn readers_at_the_end_of_a_growing_file_never_see_more_than_data() {
    let seed = seed("growing");
    let blocks = common::ops(2_000) as u64 / 4;
    let _watchdog = Watchdog::start("growing", seed, 240);
    let device = TestDevice::slow(128 * MIB, seed);
    let fs = fresh(&device.device, &MountOptions { page_cache_bytes: 1 << 20, ..MountOptions::default() });
    std::thread::scope(|scope| {
        for pair in 0..4u64 {
            let name = format!("f{pair}");
            let (write_flags, read_flags) = (pair & 1, pair >> 1);
            let flags = |buffered| if buffered == 1 { CREATE | BUFFERED } else { CREATE };
            let (writer, reader) = (fs.clone(), fs.clone());
            let (name, other) = (name.clone(), name);
            scope.spawn(move || {
                let channel = writer.channel().expect("channel");
                let file = channel.open(&name, flags(write_flags)).expect("open");
                for block in 0..blocks {
                    let at = channel.append(&file, &[1 + (block % 200) as u8; 3000]).expect("append");
                    assert_eq!(at, block * 3000);
                }
            });
            scope.spawn(move || {
                let channel = reader.channel().expect("channel");
                let file = channel.open(&other, flags(read_flags)).expect("open");
                let mut seen = 0;
                while seen < blocks * 3000 {
                    let size = file.size();
                    let from = size.saturating_sub(5000);
                    let found = read(&channel, &file, from, 20_000);
                    assert!(found.len() as u64 >= size - from, "the size ran ahead of the data");
                    for (at, byte) in (from..).zip(&found) {
                        assert_eq!(*byte, 1 + (at / 3000 % 200) as u8, "byte {at} of {size}");
                    }
                    seen = from + found.len() as u64;
                }
            });
        }
    });
    let channel = fs.channel().expect("channel");
    channel.sync().expect("sync");
    for pair in 0..4 {
        at_rest(&channel.open(format!("f{pair}"), OpenFlags::READ_ONLY).expect("open"));
    }
    check(&fs, &channel);
}

/// A reader that waits for nothing any more has started to read ahead. Somebody else who wants what it brings gets it, though the first
/// never polls its channel again.
#[test]
fn what_is_read_ahead_comes_without_its_reader() {
    let _watchdog = Watchdog::start("what_is_read_ahead_comes", 0, 60);
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", CREATE).expect("open");
    channel.write(&file, 0, &pattern(1, 1 << 20)).expect("write");
    drop(file);
    let file = channel.open("f", BUFFERED).expect("open");
    let mut block = vec![0; BLOCK as usize];
    for at in 0..2 {
        channel.read(&file, at * BLOCK, &mut block).expect("read");
    }
    std::thread::scope(|scope| {
        let (fs, file) = (&fs, file.clone());
        scope.spawn(move || {
            let channel = fs.channel().expect("channel");
            let mut found = vec![0; 4 * BLOCK as usize];
            channel.read(&file, 2 * BLOCK, &mut found).expect("read");
            assert!(found == pattern(1, 1 << 20)[2 * BLOCK as usize..][..found.len()]);
        });
    });
}
