//! Space of files: preallocation, punching, zeroing, inline content, extents, and writes of several files at once.
//!
//! What a file must read as is compared byte by byte, before and after a remount; the filesystem is checked each time.

mod common;

use std::sync::Arc;

use bdev_adapter::Device;
use bdev_adapter::mem::MemDevice;
use bdev_adapter::wrap::counters::CountingDevice;
use bdev_adapter::wrap::fault::{Effect, Fault, FaultDevice, FaultPlan, Target, When};
use common::{BLOCK, MIB, Watchdog, check, check_statfs, difference, fresh, mount, pattern, quiet, seed};
use fs_core::{
    BlockOwner, Channel, Error, ExtentState, FILE_SIZE_MAX, File, FileExtent, Filesystem, Growth, OpenFlags,
    WRITE_BATCH_BYTES_MAX, WriteBatch,
};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

const K: u64 = 1024;

/// A mounted filesystem in memory, and a channel.
struct Lab {
    device: Arc<dyn Device>,
    fs: Option<Filesystem>,
    channel: Option<Channel>,
}

impl Lab {
    fn new(bytes: u64) -> Lab {
        let device: Arc<dyn Device> = MemDevice::new(bytes, 4096).expect("a device");
        Lab::over(device)
    }

    fn over(device: Arc<dyn Device>) -> Lab {
        let fs = fresh(&device, &quiet());
        let channel = fs.channel().expect("channel");
        Lab { device, fs: Some(fs), channel: Some(channel) }
    }

    fn fs(&self) -> &Filesystem {
        self.fs.as_ref().expect("mounted")
    }

    fn channel(&self) -> &Channel {
        self.channel.as_ref().expect("mounted")
    }

    fn remount(&mut self) {
        self.channel = None;
        self.fs.take().expect("mounted").unmount().expect("unmount");
        let fs = mount(&self.device, &quiet());
        self.channel = Some(fs.channel().expect("channel"));
        self.fs = Some(fs);
    }

    fn open(&self, name: &str) -> File {
        self.channel().open(name, OpenFlags::CREATE).expect("open")
    }

    fn check(&self) {
        check(self.fs(), self.channel());
        check_statfs(&self.channel().statfs().expect("statfs"));
    }

    /// Compares a file before and after a remount.
    fn expect(&mut self, name: &str, expected: &[u8]) {
        self.same(name, expected);
        self.check();
        self.remount();
        self.same(name, expected);
        self.check();
    }

    fn same(&self, name: &str, expected: &[u8]) {
        let file = self.open(name);
        assert_eq!(file.size(), expected.len() as u64, "size of {name}");
        let mut found = vec![0xEE; expected.len()];
        assert_eq!(self.channel().read(&file, 0, &mut found).expect("read"), expected.len());
        if let Some(why) = difference(&found, expected) {
            panic!("{name}: {why}");
        }
    }

    /// The extents of a file, as (first block, blocks, state).
    fn layout(&self, file: &File) -> Vec<(u64, u64, ExtentState)> {
        let extents = self.channel().extents(file, 0, u64::MAX).map(|e| e.expect("extents"));
        extents.map(|e: FileExtent| (e.offset / BLOCK, e.len / BLOCK, e.state)).collect()
    }

    fn free(&self) -> u64 {
        self.channel().statfs().expect("statfs").free_bytes
    }

    /// Writes to a file of its own until nothing is free.
    fn fill_up(&self) -> File {
        let file = self.open("filler");
        let mut len = MIB as usize;
        while len >= BLOCK as usize {
            match self.channel().append(&file, &pattern(len as u64, len)) {
                Ok(_) => {}
                Err(Error::NoSpace { .. }) => len /= 2,
                Err(error) => panic!("{error}"),
            }
        }
        self.channel().sync().expect("sync");
        file
    }
}

use ExtentState::{Data, Inline, Preallocated};

#[test]
fn preallocated_blocks_read_as_zeroes_and_take_the_first_write() {
    let _watchdog = Watchdog::start("preallocated_blocks", 0, 60);
    let mut lab = Lab::new(64 * MIB);
    let file = lab.open("f");
    lab.channel().write(&file, 2 * BLOCK, &pattern(1, 4096)).expect("write");
    lab.channel().preallocate(&file, 100, 8 * BLOCK, Growth::Grow).expect("preallocate");
    assert_eq!(file.size(), 100 + 8 * BLOCK);
    let layout = lab.layout(&file);
    assert_eq!(layout, [(0, 2, Preallocated), (2, 1, Data), (3, 6, Preallocated)]);
    let stat = lab.channel().stat_file(&file).expect("stat");
    assert_eq!((stat.allocated_bytes, stat.extents), (9 * BLOCK, 3));
    let mut expected = vec![0; (100 + 8 * BLOCK) as usize];
    expected[2 * BLOCK as usize..3 * BLOCK as usize].copy_from_slice(&pattern(1, 4096));
    lab.expect("f", &expected);

    // The first write goes to the very block, also of a part of it; the second one elsewhere.
    let file = lab.open("f");
    let place = |lab: &Lab, block: u64| {
        let mut extents = lab.channel().extents(&file, block * BLOCK, 1).map(|e| e.expect("extents"));
        let found = extents.next().expect("an extent");
        (found.device.expect("a block") + block * BLOCK - found.offset, found.state)
    };
    let (before, state) = place(&lab, 5);
    assert_eq!(state, Preallocated);
    lab.channel().write(&file, 5 * BLOCK + 10, b"half").expect("write");
    assert_eq!(place(&lab, 5), (before, Data), "the first write");
    lab.channel().write(&file, 5 * BLOCK + 20, b"again").expect("write");
    assert_ne!(place(&lab, 5).0, before, "the second write");
    expected[5 * BLOCK as usize + 10..][..4].copy_from_slice(b"half");
    expected[5 * BLOCK as usize + 20..][..5].copy_from_slice(b"again");
    // One write over a half-written range: data, preallocated and a hole behind the end.
    lab.channel().write(&file, 4 * BLOCK, &pattern(3, 40_000)).expect("write");
    expected.resize(4 * BLOCK as usize + 40_000, 0);
    expected[4 * BLOCK as usize..].copy_from_slice(&pattern(3, 40_000));
    lab.expect("f", &expected);
}

#[test]
fn blocks_kept_beyond_the_end_are_used_and_truncated() {
    let _watchdog = Watchdog::start("blocks_beyond_the_end", 0, 60);
    let mut lab = Lab::new(64 * MIB);
    let file = lab.open("f");
    lab.channel().write(&file, 0, &pattern(1, 5000)).expect("write");
    lab.channel().preallocate(&file, 0, MIB, Growth::Keep).expect("preallocate");
    assert_eq!(file.size(), 5000);
    assert_eq!(lab.layout(&file), [(0, 2, Data), (2, 254, Preallocated)]);
    lab.expect("f", &pattern(1, 5000));
    let file = lab.open("f");
    lab.channel().append(&file, &pattern(2, 5000)).expect("append");
    let expected = [pattern(1, 5000), pattern(2, 5000)].concat();
    lab.expect("f", &expected);
    let file = lab.open("f");
    lab.channel().truncate(&file, 6000).expect("truncate");
    assert_eq!(lab.layout(&file).iter().map(|(_, len, _)| len).sum::<u64>(), 2);
    lab.expect("f", &expected[..6000]);
    let file = lab.open("f");
    lab.channel().preallocate(&file, 0, 3 * MIB, Growth::Keep).expect("preallocate");
    let free = lab.free();
    drop(file);
    lab.channel().delete("f").expect("delete");
    lab.channel().sync().expect("sync");
    assert!(lab.free() >= free + 3 * MIB, "a deleted file gives its blocks back, and what was kept for them");
    lab.check();
}

/// Walk over hole, implicit hole, preallocated, half-written preallocated (btrfs' extent-map self-tests).
#[test]
fn a_walk_over_every_state() {
    let _watchdog = Watchdog::start("a_walk_over_every_state", 0, 60);
    let mut lab = Lab::new(64 * MIB);
    let file = lab.open("f");
    let channel = lab.channel();
    channel.write(&file, 0, &pattern(1, 300)).expect("inline");
    channel.write(&file, 2 * BLOCK, &pattern(2, 2 * 4096)).expect("data");
    channel.preallocate(&file, 6 * BLOCK, 6 * BLOCK, Growth::Grow).expect("preallocate");
    channel.write(&file, 8 * BLOCK, &pattern(3, 2 * 4096)).expect("half");
    channel.write(&file, 11 * BLOCK + 1, b"x").expect("the last block");
    channel.punch(&file, 3 * BLOCK, BLOCK).expect("a hole in data");
    channel.punch(&file, 6 * BLOCK, BLOCK).expect("a hole in what is preallocated");
    channel.truncate(&file, 20 * BLOCK).expect("an implicit hole at the end");
    let expected_layout = [
        (0, 1, Inline),
        (2, 1, Data),
        (7, 1, Preallocated),
        (8, 2, Data),
        (10, 1, Preallocated),
        (11, 1, Data),
    ];
    let merged: Vec<_> = lab.layout(&file);
    assert_eq!(merged, expected_layout);
    let mut expected = vec![0; 20 * BLOCK as usize];
    expected[..300].copy_from_slice(&pattern(1, 300));
    expected[2 * BLOCK as usize..3 * BLOCK as usize].copy_from_slice(&pattern(2, 8192)[..4096]);
    expected[8 * BLOCK as usize..10 * BLOCK as usize].copy_from_slice(&pattern(3, 8192));
    expected[11 * BLOCK as usize + 1] = b'x';
    lab.expect("f", &expected);
    // The same from the trees, and every read that begins or ends anywhere.
    let file = lab.open("f");
    assert_eq!(lab.layout(&file), expected_layout);
    for from in (0..expected.len()).step_by(1777) {
        for len in [1, 300, 4096, 9000, 50_000] {
            let mut found = vec![0xEE; len];
            let n = lab.channel().read(&file, from as u64, &mut found).expect("read");
            let end = (from + len).min(expected.len());
            assert_eq!(difference(&found[..n], &expected[from..end]), None, "{from}+{len}");
        }
    }
    // Whole blocks into a buffer.
    let (result, buf) = lab.channel().read_buf(&file, 0, lab.channel().buffer(20 * 4096).expect("buffer"));
    assert_eq!(result.expect("read"), 20 * 4096);
    assert_eq!(difference(&buf, &expected), None);
    // A page at a time, by futures.
    let mut offset = 0;
    let mut paged = Vec::new();
    loop {
        let future = lab.channel().extents_async(&file, offset, u64::MAX, 2);
        let page = block_on(future).expect("extents");
        let Some(last) = page.last() else { break };
        offset = last.offset + last.len;
        paged.extend(page.iter().map(|e| (e.offset / BLOCK, e.len / BLOCK, e.state)));
    }
    assert_eq!(paged, expected_layout);
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut cx) {
            return value;
        }
    }
}

/// Inline content: no block and no device write of its own; re-insertion; its way out; truncated, punched and renamed.
#[test]
fn small_files_live_in_the_tree() {
    let _watchdog = Watchdog::start("small_files", 0, 60);
    let memory: Arc<dyn Device> = MemDevice::new(64 * MIB, 4096).expect("a device");
    let counting = CountingDevice::wrap(memory);
    let mut lab = Lab::over(counting.clone());
    let file = lab.open("f");
    lab.channel().sync().expect("sync");
    let before = counting.counts();
    lab.channel().write(&file, 0, &pattern(1, 100)).expect("write");
    lab.channel().write(&file, 50, &pattern(2, 950)).expect("write");
    let mut buf = lab.channel().buffer(24).expect("buffer");
    buf.copy_from_slice(&pattern(3, 24));
    lab.channel().write_buf(&file, 1000, buf).0.expect("write");
    assert_eq!((counting.counts() - before).writes.ops, 0, "a small write reached the device");
    let stat = lab.channel().stat_file(&file).expect("stat");
    assert_eq!((stat.size, stat.allocated_bytes, stat.extents), (1024, 0, 1));
    assert_eq!(lab.layout(&file), [(0, 1, Inline)]);
    let mut expected = pattern(1, 50);
    expected.extend(pattern(2, 950));
    expected.extend(pattern(3, 24));
    lab.expect("f", &expected);

    // Cut, grown again (zeroes), punched, rewritten, renamed.
    let file = lab.open("f");
    lab.channel().truncate(&file, 500).expect("truncate");
    lab.channel().truncate(&file, 800).expect("truncate");
    expected[500..].fill(0);
    expected.truncate(800);
    lab.channel().punch(&file, 100, 50).expect("punch");
    expected[100..150].fill(0);
    lab.channel().zero(&file, 200, 10, Growth::Keep).expect("zero");
    expected[200..210].fill(0);
    assert_eq!(lab.layout(&file), [(0, 1, Inline)]);
    lab.channel().rename("f", "g").expect("rename");
    lab.expect("g", &expected);

    // Data behind it leaves it where it is; a byte too many turns it into a block.
    let file = lab.open("g");
    lab.channel().write(&file, 3 * BLOCK, &pattern(4, 4096)).expect("write");
    expected.resize(3 * BLOCK as usize, 0);
    expected.extend(pattern(4, 4096));
    assert_eq!(lab.layout(&file), [(0, 1, Inline), (3, 1, Data)]);
    lab.expect("g", &expected);
    let file = lab.open("g");
    lab.channel().write(&file, 1024, b"!").expect("write");
    expected[1024] = b'!';
    assert_eq!(lab.layout(&file), [(0, 1, Data), (3, 1, Data)]);
    lab.expect("g", &expected);

    // Punched as a whole; then a small write to a file that is not small goes to a block; in a small one it is inline again.
    let file = lab.open("g");
    lab.channel().punch(&file, 0, BLOCK).expect("punch");
    lab.channel().write(&file, 0, b"back").expect("write");
    assert_eq!(lab.layout(&file), [(0, 1, Data), (3, 1, Data)]);
    lab.channel().truncate(&file, 0).expect("truncate");
    lab.channel().append(&file, b"again").expect("append");
    assert_eq!(lab.layout(&file), [(0, 1, Inline)]);
    lab.expect("g", b"again");
    lab.channel().delete("g").expect("delete");
    lab.check();
    // A punch of all its bytes, which are not a whole block, lets it go as well.
    let file = lab.open("h");
    lab.channel().write(&file, 0, b"all of it").expect("write");
    lab.channel().punch(&file, 0, 9).expect("punch");
    assert_eq!(lab.layout(&file), []);
    lab.expect("h", &[0; 9]);
}

#[test]
fn punching_and_zeroing_any_range() {
    let seed = seed("punching_and_zeroing_any_range");
    let _watchdog = Watchdog::start("punching_and_zeroing", seed, 120);
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut lab = Lab::new(64 * MIB);
    for round in 0..30 {
        let name = format!("f{round}");
        let file = lab.open(&name);
        let mut expected = Vec::new();
        for step in 0..rng.random_range(1..40) {
            let offset = rng.random_range(0..100_000usize);
            let len = rng.random_range(1..40_000usize);
            let (at, n) = (offset as u64, len as u64);
            let growth = if rng.random() { Growth::Grow } else { Growth::Keep };
            let grow = |expected: &mut Vec<u8>| {
                if growth == Growth::Grow {
                    expected.resize(expected.len().max(offset + len), 0);
                }
            };
            let zero = |expected: &mut Vec<u8>| {
                let end = (offset + len).min(expected.len());
                expected[offset.min(end)..end].fill(0);
            };
            match rng.random_range(0..6) {
                0 | 1 => {
                    let data = pattern(round * 1000 + step, len);
                    lab.channel().write(&file, at, &data).expect("write");
                    expected.resize(expected.len().max(offset + len), 0);
                    expected[offset..offset + len].copy_from_slice(&data);
                }
                2 => {
                    lab.channel().punch(&file, at, n).expect("punch");
                    zero(&mut expected);
                }
                3 => {
                    lab.channel().zero(&file, at, n, growth).expect("zero");
                    zero(&mut expected);
                    grow(&mut expected);
                    let lacks = lab.channel().extents(&file, at, n).map(|e| e.expect("extents"));
                    let whole = (at.div_ceil(BLOCK), (at + n) / BLOCK);
                    for extent in lacks.filter(|e| e.state != Inline) {
                        let (from, to) = (extent.offset / BLOCK, (extent.offset + extent.len) / BLOCK);
                        let inside = from.max(whole.0) < to.min(whole.1);
                        assert!(!inside || extent.state == Preallocated, "{extent:?} after zeroing {at}+{n}");
                    }
                }
                4 => {
                    lab.channel().preallocate(&file, at, n, growth).expect("preallocate");
                    grow(&mut expected);
                }
                _ => {
                    lab.channel().truncate(&file, at).expect("truncate");
                    expected.resize(offset, 0);
                }
            }
            if rng.random_ratio(1, 10) {
                lab.channel().sync().expect("sync");
            }
            lab.same(&name, &expected);
        }
        drop(file);
        lab.expect(&name, &expected);
    }
}

/// Long ranges go in steps; nothing of a file of many extents is left behind.
#[test]
fn long_ranges_go_in_steps() {
    let _watchdog = Watchdog::start("long_ranges", 0, 120);
    let mut lab = Lab::new(256 * MIB);
    let file = lab.open("f");
    for block in 0..3000 {
        lab.channel().write(&file, 2 * block * BLOCK, &pattern(block, 4096)).expect("write");
    }
    lab.channel().preallocate(&file, 0, 6000 * BLOCK, Growth::Grow).expect("preallocate");
    let stat = lab.channel().stat_file(&file).expect("stat");
    assert_eq!(stat.allocated_bytes, 6000 * BLOCK);
    lab.check();
    lab.channel().zero(&file, BLOCK, 5000 * BLOCK, Growth::Keep).expect("zero");
    let stat = lab.channel().stat_file(&file).expect("stat");
    assert_eq!(stat.allocated_bytes, 6000 * BLOCK);
    lab.check();
    let mut block = vec![0xEE; 4096];
    for (at, expected) in [(0, pattern(0, 4096)), (2, vec![0; 4096]), (5000, vec![0; 4096])] {
        lab.channel().read(&file, at * BLOCK, &mut block).expect("read");
        assert_eq!(difference(&block, &expected), None, "block {at}");
    }
    lab.channel().punch(&file, BLOCK, FILE_SIZE_MAX).expect("punch");
    assert_eq!(lab.layout(&file), [(0, 1, Data)]);
    lab.expect("f", &[pattern(0, 4096), vec![0; 5999 * 4096]].concat());
    // More than there is: refused, and nothing was done.
    let file = lab.open("f");
    let free = lab.free();
    let error = lab.channel().preallocate(&file, 0, 1 << 40, Growth::Grow).expect_err("1 TiB");
    assert!(matches!(error, Error::NoSpace { .. }), "{error}");
    assert_eq!((file.size(), lab.free(), lab.layout(&file)), (6000 * BLOCK, free, vec![(0, 1, Data)]));
    let error = lab.channel().preallocate(&file, FILE_SIZE_MAX, 1, Growth::Grow).expect_err("too far");
    assert!(matches!(error, Error::FileTooLarge { .. }), "{error}");
    lab.check();
}

/// Many runs: what is free lies in single blocks.
#[test]
fn preallocation_of_scattered_space() {
    let _watchdog = Watchdog::start("scattered_space", 0, 120);
    let mut lab = Lab::new(32 * MIB);
    let filler = lab.fill_up();
    for block in (0..filler.size() / BLOCK - 1).step_by(2) {
        lab.channel().punch(&filler, block * BLOCK, BLOCK).expect("punch");
    }
    lab.channel().sync().expect("sync");
    let file = lab.open("f");
    let len = lab.free() / BLOCK * 8 / 10 * BLOCK;
    assert!(len > 4 * MIB);
    lab.channel().preallocate(&file, 0, len, Growth::Grow).expect("preallocate");
    let stat = lab.channel().stat_file(&file).expect("stat");
    assert!(stat.extents > 256 && stat.allocated_bytes == len, "{stat:?}");
    lab.expect("f", &vec![0; len as usize]);
    // The rest is not enough: nothing is done.
    let (file, free) = (lab.open("g"), lab.free());
    let error = lab.channel().preallocate(&file, 0, free + BLOCK, Growth::Grow).expect_err("too much");
    assert!(matches!(error, Error::NoSpace { .. }), "{error}");
    assert_eq!((file.size(), lab.layout(&file), lab.free()), (0, vec![], free));
    lab.check();
}

/// The promise: on a device without free space every preallocated block can be written, alone and in random order, past the cache and through it.
#[test]
fn every_preallocated_block_can_be_written_on_a_full_device() {
    let seed = seed("every_preallocated_block_can_be_written_on_a_full_device");
    let _watchdog = Watchdog::start("every_preallocated_block", seed, 300);
    let mut rng = SmallRng::seed_from_u64(seed);
    for (bytes, order) in [(16 * MIB, "random"), (64 * MIB, "random"), (48 * MIB, "down")] {
        let mut lab = Lab::new(bytes);
        let file = lab.open("promised");
        let (refused, filler) = (lab.open("more"), lab.open("filler"));
        // As many as there can be.
        let mut blocks = lab.free() / BLOCK;
        while let Err(error) = lab.channel().preallocate(&file, 0, blocks * BLOCK, Growth::Grow) {
            assert!(matches!(error, Error::NoSpace { .. }), "{error}");
            blocks -= 16;
        }
        lab.fill_up();
        let error = lab.channel().preallocate(&refused, 0, 16 * BLOCK, Growth::Keep);
        assert!(matches!(error, Err(Error::NoSpace { .. })), "{error:?}");
        if rng.random() {
            drop(file);
            lab.remount();
        }
        let file = lab.open("promised");
        let buffered = lab.channel().open("promised", OpenFlags::BUFFERED).expect("open");
        let mut todo: Vec<u64> = (0..blocks).rev().collect();
        if order == "random" {
            todo.shuffle(&mut rng);
        }
        let mut expected = vec![0; (blocks * BLOCK) as usize];
        for (done, block) in todo.into_iter().enumerate() {
            let data = pattern(block, if block % 3 == 0 { 1000 } else { 4096 });
            let file = if rng.random() { &file } else { &buffered };
            if let Err(error) = lab.channel().write(file, block * BLOCK, &data) {
                panic!("seed {seed}: block {block}, after {done} of {blocks}: {error}");
            }
            expected[(block * BLOCK) as usize..][..data.len()].copy_from_slice(&data);
        }
        lab.channel().sync().expect("sync");
        drop((file, buffered, refused, filler));
        lab.expect("promised", &expected);
    }
}

/// On a device without free space what gives space back works.
#[test]
fn a_full_device_can_be_emptied() {
    let _watchdog = Watchdog::start("a_full_device_can_be_emptied", 0, 120);
    let mut lab = Lab::new(16 * MIB);
    let filler = lab.fill_up();
    let size = filler.size();
    let write = lab.channel().write(&filler, 0, &pattern(1, 1 << 16));
    assert!(matches!(write, Err(Error::NoSpace { .. })), "{write:?}");
    lab.channel().punch(&filler, 100_000, 50_000).expect("punch");
    lab.channel().punch(&filler, 1_000_001, 99_999).expect("punch");
    lab.channel().truncate(&filler, size - 12_345).expect("truncate");
    lab.channel().sync().expect("sync");
    lab.check();
    let mut expected = Vec::new();
    let mut data = vec![0; filler.size() as usize];
    lab.channel().read(&filler, 0, &mut data).expect("read");
    expected.append(&mut data);
    assert!(expected[100_000..150_000].iter().all(|b| *b == 0) && expected[99_999] != 0);
    drop(filler);
    lab.expect("filler", &expected);
    lab.channel().delete("filler").expect("delete");
    lab.channel().sync().expect("sync");
    assert!(lab.free() > 14 * MIB, "{} free", lab.free());
    lab.check();
}

/// A write to preallocated blocks that fails leaves them as they were.
#[test]
fn a_failed_first_write_keeps_the_promise() {
    let _watchdog = Watchdog::start("a_failed_first_write", 0, 60);
    let memory: Arc<dyn Device> = MemDevice::new(16 * MIB, 4096).expect("a device");
    let faults = FaultDevice::wrap(memory, FaultPlan::default());
    let mut lab = Lab::over(faults.clone());
    let file = lab.open("f");
    lab.channel().write(&file, 4 * BLOCK, &pattern(1, 4096)).expect("write");
    lab.channel().preallocate(&file, 0, 16 * BLOCK, Growth::Grow).expect("preallocate");
    lab.channel().sync().expect("sync");
    let layout = lab.layout(&file);
    let eio = Effect::Error(bdev_adapter::IoErrorKind::Os(5));
    faults.set_plan(FaultPlan::new(1, vec![Fault::new(Target::Writes, When::Probability(1.0), eio)]));
    // Over preallocated blocks, data, and a hole behind.
    let error = lab.channel().write(&file, 2 * BLOCK, &pattern(2, 20 * 4096)).expect_err("a fault");
    assert!(matches!(error, Error::Io { .. }), "{error}");
    faults.set_plan(FaultPlan::default());
    assert_eq!(lab.layout(&file), layout);
    let mut expected = vec![0; 16 * 4096];
    expected[4 * 4096..5 * 4096].copy_from_slice(&pattern(1, 4096));
    lab.check();
    lab.expect("f", &expected);
    let file = lab.open("f");
    lab.channel().write(&file, 2 * BLOCK, &pattern(2, 20 * 4096)).expect("write");
    expected.resize(22 * 4096, 0);
    expected[2 * 4096..].copy_from_slice(&pattern(2, 20 * 4096));
    lab.expect("f", &expected);
}

#[test]
fn a_batch_is_written_as_if_one_by_one() {
    let seed = seed("a_batch_is_written_as_if_one_by_one");
    let _watchdog = Watchdog::start("a_batch", seed, 120);
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut lab = Lab::new(64 * MIB);
    let names = ["a", "b", "c", "d"];
    let mut contents = vec![Vec::new(); names.len()];
    for round in 0..60u64 {
        let files = names.map(|name| lab.open(name));
        let mut batch = WriteBatch::new();
        for step in 0..rng.random_range(0..20) {
            let index = rng.random_range(0..names.len());
            let small = rng.random_ratio(1, 3);
            let offset = rng.random_range(0..if small { 900 } else { 60_000usize });
            let len = rng.random_range(0..if small { 200 } else { 20_000usize });
            let data = pattern(round * 100 + step, len);
            batch.write(&files[index], offset as u64, &data);
            if len > 0 {
                let content: &mut Vec<u8> = &mut contents[index];
                content.resize(content.len().max(offset + len), 0);
                content[offset..offset + len].copy_from_slice(&data);
            }
        }
        match round % 2 {
            0 => lab.channel().write_batch(&batch).expect("batch"),
            _ => block_on(lab.channel().write_batch_async(&Arc::new(batch))).expect("batch"),
        }
        if rng.random_ratio(1, 8) {
            let index = rng.random_range(0..names.len());
            lab.channel().truncate(&files[index], 0).expect("truncate");
            contents[index].clear();
            lab.channel().preallocate(&files[index], 0, 30_000, Growth::Keep).expect("preallocate");
        }
        for (name, content) in names.iter().zip(&contents) {
            lab.same(name, content);
        }
    }
    for (name, content) in names.iter().zip(&contents) {
        lab.expect(name, content);
    }
}

#[test]
fn a_batch_that_cannot_be_changes_nothing() {
    let _watchdog = Watchdog::start("a_batch_that_cannot_be", 0, 60);
    let mut lab = Lab::new(16 * MIB);
    let (a, b) = (lab.open("a"), lab.open("b"));
    lab.channel().write(&a, 0, b"old a").expect("write");
    let try_it = |batch: &WriteBatch| lab.channel().write_batch(batch).expect_err("a batch that cannot be");
    let mut batch = WriteBatch::new();
    batch.write(&a, 0, b"new a").write(&b, FILE_SIZE_MAX - 1, b"far");
    assert!(matches!(try_it(&batch), Error::FileTooLarge { .. }));
    batch.clear();
    batch.write(&a, 0, b"new a").write(&b, 0, &vec![1; WRITE_BATCH_BYTES_MAX]);
    assert!(matches!(try_it(&batch), Error::BatchTooLarge { .. }));
    batch.clear();
    for block in 0..3000 {
        batch.write(&b, block * BLOCK, b"x");
    }
    assert!(matches!(try_it(&batch), Error::BatchTooLarge { bytes: 3000, blocks: 3000 }));
    let read_only = lab.channel().open("b", OpenFlags::READ_ONLY).expect("open");
    batch.clear();
    batch.write(&a, 0, b"new a").write(&read_only, 0, b"x");
    assert!(matches!(try_it(&batch), Error::ReadOnly { .. }));
    lab.fill_up();
    batch.clear();
    batch.write(&a, 0, b"new a").write(&b, 0, &vec![1; MIB as usize]);
    assert!(matches!(try_it(&batch), Error::NoSpace { .. }));
    drop((a, b, read_only));
    lab.expect("a", b"old a");
    lab.expect("b", b"");
}

/// What refers to a block, and the other way round.
#[test]
fn every_block_has_its_owner() {
    let _watchdog = Watchdog::start("every_block_has_its_owner", 0, 60);
    let lab = Lab::new(16 * MIB);
    let file = lab.open("f");
    lab.channel().write(&file, 4 * K, &pattern(1, 40_000)).expect("write");
    lab.channel().preallocate(&file, MIB, 8 * BLOCK, Growth::Grow).expect("preallocate");
    lab.channel().sync().expect("sync");
    for extent in lab.channel().extents(&file, 0, u64::MAX) {
        let FileExtent { offset, len, device, state, .. } = extent.expect("extents");
        for at in (0..len).step_by(BLOCK as usize) {
            let owner = lab.fs().owner_of(lab.channel(), device.expect("a block") + at).expect("owner");
            let name = Some(b"f".to_vec());
            assert_eq!(owner, BlockOwner::File { id: file.id(), name, offset: offset + at, state });
        }
    }
    let (mut nodes, mut files) = (0, 0);
    for block in 0..16 * MIB / BLOCK {
        match lab.fs().owner_of(lab.channel(), block * BLOCK).expect("owner") {
            BlockOwner::Metadata(_) => nodes += 1,
            BlockOwner::File { .. } => files += 1,
            BlockOwner::Superblock => assert!([0, 1, 4094, 4095].contains(&block)),
            _ => {}
        }
    }
    let report = lab.fs().check(lab.channel(), &mut |_| {}).expect("check");
    assert_eq!((nodes, files), (report.metadata_blocks, report.data_blocks + report.preallocated_blocks));
}
