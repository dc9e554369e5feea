//! What becomes of operations whose future, channel or mount goes away: an accepted operation completes as long as
//! anybody drives its channel, whoever was told that it is done finds it done, and whatever remains is told that
//! the filesystem is unmounted.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bdev_adapter::Device;
use fs_core::{Channel, Completion, Error, File, Filesystem, MountOptions, OpenFlags, Operation};

use common::{BLOCK, MIB, TestDevice, Watchdog, check, difference, fresh, mount, pattern, quiet};

const LEN: usize = 64 << 10;

fn written(channel: &Channel, tag: u64, len: usize) -> bdev_adapter::DmaBuf {
    let mut buf = channel.buffer(len).unwrap();
    common::fill(tag, &mut buf);
    buf
}

/// True when the file has the pattern of `tag` at `offset`; panics when it has something else but nothing.
fn holds(channel: &Channel, file: &File, offset: u64, tag: u64, len: usize) -> bool {
    let mut bytes = vec![0; len];
    let there = channel.read(file, offset, &mut bytes).unwrap();
    if there == 0 || bytes.iter().all(|byte| *byte == 0) {
        return false;
    }
    if let Some(why) = difference(&bytes[..there], &pattern(tag, len)) {
        panic!("a write at byte {offset} of {file:?} is not whole: {why}");
    }
    true
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "{what}: not within ten seconds");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Polls every future once, so that it has begun, and forgets it.
fn begin_and_detach(future: impl Future) {
    let _ = pin!(future).poll(&mut Context::from_waker(Waker::noop()));
}

/// Futures are dropped, some before they were polled, and their thread never polls its channel again.
#[test]
fn detached_operations_complete_through_the_helper() {
    let _watchdog = Watchdog::start("detached", 0, 60);
    let device = TestDevice::slow(64 * MIB, 1);
    let fs = fresh(&device.device, &MountOptions { commit_interval: None, ..MountOptions::default() });
    let lonely = fs.channel().unwrap();
    let file = lonely.open("a", OpenFlags::CREATE).unwrap();
    for i in 0..16 {
        let write = lonely.write_async(&file, i * LEN as u64, written(&lonely, i, LEN));
        if i % 2 == 0 { drop(write) } else { begin_and_detach(write) }
    }
    drop(lonely.create_async("b"));
    drop(lonely.rename_async("a", "c"));
    drop(lonely.sync_async());
    let watcher = fs.channel().unwrap();
    for i in 0..16 {
        wait_until("a detached write", || holds(&watcher, &file, i * LEN as u64, i, LEN));
    }
    wait_until("a detached create", || watcher.stat("b").is_ok());
    wait_until("a detached rename", || watcher.stat("c").is_ok() && watcher.stat("a").is_err());
    wait_until("a detached sync", || fs.stats().commits > 0);
}

/// Modified nodes cannot be evicted: whoever would modify more than a part of the cache commits first, with no helper and no sync.
#[test]
fn modified_metadata_is_bounded() {
    let _watchdog = Watchdog::start("modified_metadata", 0, 60);
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &MountOptions { node_cache_bytes: 256 << 10, ..quiet() });
    let channel = fs.channel().unwrap();
    channel.create("only").unwrap();
    assert_eq!(fs.stats().commits, 0, "a little is no reason");
    let mut most = 0;
    for i in 0..4000 {
        channel.create(format!("file {i}")).unwrap();
        most = most.max(fs.stats().dirty_nodes);
    }
    // A quarter of the 256 blocks that a device of this size keeps back, which is more than half of the cache; and what one
    // operation adds.
    assert!((32..=64 + 16).contains(&most), "{most} modified nodes at once");
    assert!(fs.stats().commits > 0);
}

/// Without a helper: a thread that waits for what a channel owns that was left alone drives that channel.
#[test]
fn a_waiting_call_drives_the_channel_that_it_waits_for() {
    let _watchdog = Watchdog::start("abandoned", 0, 60);
    let device = TestDevice::slow(64 * MIB, 1);
    let fs = fresh(&device.device, &quiet());
    let (lonely, busy) = (fs.channel().unwrap(), fs.channel().unwrap());
    let file = lonely.open("a", OpenFlags::CREATE).unwrap();
    for i in 0..50 {
        // They hold the range lock, or wait for it, and nobody polls them.
        for _ in 0..4 {
            begin_and_detach(lonely.write_async(&file, 0, written(&lonely, 1, LEN)));
        }
        begin_and_detach(lonely.sync_async());
        busy.write(&file, 0, &pattern(2 + i, LEN)).unwrap();
        assert!(holds(&busy, &file, 0, 2 + i, LEN), "the write that waited came last");
        busy.sync().unwrap();
    }
}

/// A channel is dropped with operations in flight: they complete, and unmounting loses none of them.
#[test]
fn operations_of_a_dropped_channel_complete() {
    let _watchdog = Watchdog::start("dropped_channel", 0, 60);
    for helper_thread in [true, false] {
        let device = TestDevice::slow(64 * MIB, 1);
        let options = MountOptions { helper_thread, ..quiet() };
        let fs = fresh(&device.device, &options);
        let channel = fs.channel().unwrap();
        let file = channel.open("a", OpenFlags::CREATE).unwrap();
        for i in 0..32 {
            let (offset, buf) = (i * LEN as u64, written(&channel, i, LEN));
            channel.submit(Operation::Write { file: file.clone(), offset, buf }, i);
        }
        let mut found = Vec::new();
        channel.poll(&mut found);
        drop(channel);
        let watcher = fs.channel().unwrap();
        if helper_thread {
            for i in 0..32 {
                wait_until("a write of a dropped channel", || holds(&watcher, &file, i * LEN as u64, i, LEN));
            }
        }
        drop((file, watcher));
        fs.unmount().unwrap();
        let fs = mount(&device.device, &quiet());
        let channel = fs.channel().unwrap();
        let file = channel.open("a", OpenFlags::READ_ONLY).unwrap();
        let there = (0..32).filter(|i| holds(&channel, &file, i * LEN as u64, *i, LEN)).count();
        assert_eq!(there, 32, "writes that were accepted before the unmount, helper: {helper_thread}");
        check(&fs, &channel);
    }
}

/// Whoever is told after an unmount that an operation is done finds it done at the next mount.
#[test]
fn what_was_answered_with_success_outlives_the_unmount() {
    let _watchdog = Watchdog::start("answered", 0, 60);
    let device = TestDevice::slow(64 * MIB, 1);
    for polls in [0, 1, 2, 5] {
        let fs = fresh(&device.device, &quiet());
        let channel = fs.channel().unwrap();
        let file = channel.open("a", OpenFlags::CREATE).unwrap();
        for i in 0..32 {
            let (offset, buf) = (i * LEN as u64, written(&channel, i, LEN));
            channel.submit(Operation::Write { file: file.clone(), offset, buf }, i);
        }
        channel.submit(Operation::Create { name: b"b".to_vec() }, 100);
        let mut found = Vec::new();
        for _ in 0..polls {
            channel.poll(&mut found);
        }
        fs.unmount().unwrap();
        while channel.in_flight() > 0 {
            channel.poll(&mut found);
        }
        assert_eq!(found.len(), 33);
        let fs = mount(&device.device, &quiet());
        let channel = fs.channel().unwrap();
        let file = channel.open("a", OpenFlags::READ_ONLY).unwrap();
        for Completion { tag, result, bufs } in found {
            let done = match result {
                Ok(_) => true,
                Err(Error::Unmounted) => false,
                Err(error) => panic!("{error}"),
            };
            if tag == 100 {
                assert!(!done || channel.stat("b").is_ok(), "a create that was answered is lost");
                continue;
            }
            assert_eq!(bufs.len(), LEN as u64);
            let there = holds(&channel, &file, tag * LEN as u64, tag, LEN);
            assert!(!done || there, "write {tag} was answered with success, and is lost; {polls} polls");
        }
        check(&fs, &channel);
    }
}

/// Operations of two channels wait for each other when the filesystem is unmounted, and nobody polls them.
#[test]
fn unmount_with_channels_that_wait_for_each_other() {
    let _watchdog = Watchdog::start("crossed", 0, 60);
    for helper_thread in [false, true] {
        let device = TestDevice::slow(64 * MIB, 1);
        let fs = fresh(&device.device, &MountOptions { helper_thread, ..quiet() });
        let channels: Vec<Channel> = (0..4).map(|_| fs.channel().unwrap()).collect();
        let (a, b) = (
            channels[0].open("a", OpenFlags::CREATE).unwrap(),
            channels[0].open("b", OpenFlags::CREATE).unwrap(),
        );
        for i in 0..8 {
            for (j, channel) in channels.iter().enumerate() {
                let (first, second) = if j % 2 == 0 { (&a, &b) } else { (&b, &a) };
                begin_and_detach(channel.write_async(first, 0, written(channel, 1 + i, LEN)));
                drop(channel.write_async(second, 0, written(channel, 100 + i, LEN)));
                begin_and_detach(channel.sync_async());
            }
        }
        fs.unmount().unwrap();
        for channel in &channels {
            assert!(matches!(channel.read(&a, 0, &mut [0; 8]), Err(Error::Unmounted)));
        }
        let fs = mount(&device.device, &quiet());
        check(&fs, &fs.channel().unwrap());
    }
}

/// Threads work in all forms when the filesystem goes away under them: each ends with `Unmounted`, none hangs, what was
/// answered with success is there, and the device can be mounted again at once.
#[test]
fn unmount_under_load() {
    let _watchdog = Watchdog::start("under_load", 0, 120);
    let device = TestDevice::slow(64 * MIB, 1);
    for round in 0..30 {
        let fs = fresh(&device.device, &MountOptions { helper_thread: round % 2 == 0, ..quiet() });
        let begun = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let work = |thread| {
                let (fs, begun) = (fs.clone(), &begun);
                scope.spawn(move || work_until_unmounted(&fs, thread, begun))
            };
            let threads: Vec<_> = (0..4).map(work).collect();
            wait_until("work", || begun.load(Ordering::Relaxed) > 40 + 10 * round);
            fs.clone().unmount().unwrap();
            // The device is free though files and channels still exist.
            let again = mount(&device.device, &quiet());
            let channel = again.channel().unwrap();
            for (thread, acknowledged) in threads.into_iter().map(|thread| thread.join().unwrap()).enumerate()
            {
                for (name, tag) in acknowledged {
                    let file = channel.open(&name, OpenFlags::READ_ONLY);
                    let file = file.unwrap_or_else(|error| panic!("answered, then lost: {error}"));
                    let there = holds(&channel, &file, 0, tag, LEN);
                    assert!(
                        there,
                        "round {round}, thread {thread}: write {tag} to {name} was answered and is lost"
                    );
                }
            }
            check(&again, &channel);
        });
    }
}

/// Writes each time to a file of its own; returns what was answered with success.
fn work_until_unmounted(fs: &Filesystem, thread: u64, begun: &AtomicU64) -> Vec<(String, u64)> {
    let mut acknowledged = Vec::new();
    let mut files = Vec::new();
    for turn in 0.. {
        let name = format!("{thread}-{turn}");
        match write_in_some_form(fs, &name, turn, &mut files) {
            Ok(()) => acknowledged.push((name, turn)),
            Err(Error::Unmounted) => break,
            Err(error) => panic!("{error:?}"),
        }
        begun.fetch_add(1, Ordering::Relaxed);
        files.truncate(3);
    }
    acknowledged
}

fn write_in_some_form(fs: &Filesystem, name: &str, turn: u64, files: &mut Vec<File>) -> Result<(), Error> {
    let channel = fs.channel()?;
    let file = channel.open(name, OpenFlags::CREATE)?;
    files.push(file.clone());
    let buf = written(&channel, turn, LEN);
    match turn % 4 {
        0 => channel.write(&file, 0, &pattern(turn, LEN))?,
        1 => channel.write_buf(&file, 0, buf).0?,
        2 => {
            let mut future = pin!(channel.write_async(&file, 0, buf));
            let mut cx = Context::from_waker(Waker::noop());
            loop {
                if let Poll::Ready((result, _)) = future.as_mut().poll(&mut cx) {
                    break result?;
                }
            }
        }
        _ => {
            channel.submit(Operation::Write { file, offset: 0, buf }, turn);
            let mut found = Vec::new();
            while found.is_empty() {
                channel.poll(&mut found);
            }
            found.pop().unwrap().result.map(|_| ())?;
        }
    }
    // What the sync says does not change that the write was answered.
    if turn.is_multiple_of(5) {
        channel.sync().or_else(|e| if matches!(e, Error::Unmounted) { Ok(()) } else { Err(e) })
    } else {
        Ok(())
    }
}

/// Two devices mounted in one process have nothing to do with each other.
#[test]
fn two_mounts_in_one_process() {
    let _watchdog = Watchdog::start("two_mounts", 0, 60);
    let devices = [TestDevice::slow(32 * MIB, 1), TestDevice::slow(48 * MIB, 1)];
    let mounts = [0, 1].map(|i| fresh(&devices[i].device, &MountOptions::default()));
    assert_ne!(mounts[0].info().uuid, mounts[1].info().uuid);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let mounts = mounts.clone();
            scope.spawn(move || {
                let channels = [0, 1].map(|i| mounts[i].channel().unwrap());
                for turn in 0..40 {
                    for (i, channel) in channels.iter().enumerate() {
                        let file = channel.open(format!("{thread}-{turn}"), OpenFlags::CREATE).unwrap();
                        channel
                            .write(&file, 0, &pattern(thread << 32 | turn << 1 | i as u64, 20_000))
                            .unwrap();
                    }
                }
                channels.iter().for_each(|channel| channel.sync().unwrap());
            });
        }
    });
    let [first, second] = mounts;
    first.unmount().unwrap();
    let verify = |fs: &Filesystem, i: u64| {
        let channel = fs.channel().unwrap();
        assert_eq!(channel.list("").count(), 160);
        for (thread, turn) in (0..160).map(|n| (n / 40, n % 40)) {
            let file = channel.open(format!("{thread}-{turn}"), OpenFlags::READ_ONLY).unwrap();
            assert!(holds(&channel, &file, 0, thread << 32 | turn << 1 | i, 20_000));
        }
        check(fs, &channel);
    };
    verify(&second, 1);
    verify(&mount(&devices[0].device, &quiet()), 0);
}

/// A device that is mounted, or being formatted, is in use; afterwards it is not.
#[test]
fn a_mounted_device_is_busy() {
    let _watchdog = Watchdog::start("busy", 0, 60);
    let device = TestDevice::slow(16 * MIB, 1);
    let device: &Arc<dyn Device> = &device.device;
    let fs = fresh(device, &quiet());
    let busy = |result: Result<(), Error>| match result {
        Err(Error::Device(error)) => assert!(matches!(*error, bdev_adapter::Error::Busy { .. }), "{error}"),
        other => panic!("{other:?}"),
    };
    let read_only = MountOptions { read_only: true, ..quiet() };
    for options in [&quiet(), &read_only] {
        busy(Filesystem::mount(Arc::clone(device), options).map(|_| ()));
    }
    busy(fs_core::format(device, &fs_core::FormatOptions::default()));
    let channel = fs.channel().unwrap();
    let file = channel.open("a", OpenFlags::CREATE).unwrap();
    drop(fs);
    assert!(
        matches!(channel.write(&file, 0, b"x"), Err(Error::Unmounted)),
        "dropping the last clone unmounts"
    );
    assert!(matches!(channel.sync(), Err(Error::Unmounted)));
    assert!(matches!(channel.stat_file(&file), Err(Error::Unmounted)));
    drop(mount(device, &quiet()));
    drop((channel, file));
    drop(mount(device, &quiet()));
}

/// A reader that stops in the middle keeps blocks from reuse, and nothing else: writers go on until space runs out, and
/// all of it comes back.
#[test]
fn channels_left_alone_do_not_stop_the_others() {
    let _watchdog = Watchdog::start("left_alone", 0, 60);
    let device = TestDevice::slow(32 * MIB, 1);
    let fs = fresh(&device.device, &MountOptions::default());
    let stop = AtomicBool::new(false);
    let lonely = fs.channel().unwrap();
    let file = lonely.open("a", OpenFlags::CREATE).unwrap();
    lonely.write(&file, 0, &pattern(1, MIB as usize)).unwrap();
    std::thread::scope(|scope| {
        let (fs, file, stop) = (fs.clone(), file.clone(), &stop);
        let writer = scope.spawn(move || {
            let channel = fs.channel().unwrap();
            for turn in 0..200 {
                channel.write(&file, turn % 16 * 16 * BLOCK, &pattern(turn, LEN)).unwrap();
                channel.sync().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        for i in 0.. {
            lonely.submit(
                Operation::Read { file: file_of(&lonely), offset: 0, buf: lonely.buffer(LEN).unwrap() },
                i,
            );
            let mut found = Vec::new();
            lonely.poll(&mut found);
            std::thread::sleep(Duration::from_millis(3));
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        writer.join().unwrap();
    });
}

fn file_of(channel: &Channel) -> File {
    channel.open("a", OpenFlags::READ_ONLY).unwrap()
}

/// A write of nothing is nothing, wherever it goes: neither size nor content nor version change.
#[test]
fn writing_nothing_changes_nothing() {
    let _watchdog = Watchdog::start("writing nothing", 0, 60);
    let device = TestDevice::new(16 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().unwrap();
    for (name, content) in [("empty", 0), ("inline", 10), ("block", 5000)] {
        for flags in [OpenFlags::CREATE, OpenFlags::CREATE | OpenFlags::BUFFERED] {
            let file = channel.open(name, flags).unwrap();
            channel.write(&file, 0, &pattern(1, content)).unwrap();
            let before = channel.stat_file(&file).unwrap();
            for offset in [0, 5, 500, 4096, 10_000] {
                channel.write(&file, offset, &[]).unwrap();
                channel.writev(&file, offset, &[]).unwrap();
                channel.write_buf(&file, offset, channel.buffer(0).unwrap()).0.unwrap();
                channel.writev_bufs(&file, offset, Vec::new()).0.unwrap();
                let nothing = vec![channel.buffer(0).unwrap(), channel.buffer(0).unwrap()];
                channel.writev_bufs(&file, offset, nothing).0.unwrap();
                assert_eq!(channel.read(&file, offset, &mut []).unwrap(), 0);
                assert_eq!(channel.readv(&file, offset, &mut []).unwrap(), 0);
                assert_eq!(channel.readv_bufs(&file, offset, Vec::new()).0.unwrap(), 0);
            }
            assert_eq!(channel.append(&file, &[]).unwrap(), content as u64);
            assert_eq!(channel.stat_file(&file).unwrap(), before, "{name}");
            let mut found = vec![0; content + 1];
            assert_eq!(channel.read(&file, 0, &mut found).unwrap(), content);
            assert!(found[..content] == pattern(1, content));
        }
    }
}
