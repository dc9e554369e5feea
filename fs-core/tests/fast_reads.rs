//! Reads of the short way: one extent, aligned, submitted or waited for. Each is answered once; what it reads is what its file
//! view shows, however late the device reads; what the device gets wrong is read again.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bdev_adapter::mem::MemDevice;
use bdev_adapter::{
    ClaimFlag, Completion, Device, DmaBuf, DmaSource, Error as DeviceError, Geometry, Kind, QueuePair,
    Request,
};
use common::{BLOCK, MIB, TestDevice, Watchdog, check, difference, fresh, pattern, quiet};
use fs_core::{Channel, Error, File, Filesystem, MountOptions, OpenFlags, Output};

const LEN: usize = BLOCK as usize;

/// Keeps one read from the device as long as it is shut, the first that comes then (others may be of metadata, that a write
/// waits for), and spoils answers when it is told to.
#[derive(Debug)]
struct Gate {
    inner: Arc<dyn Device>,
    shut: AtomicBool,
    keeps: AtomicBool,
    spoil: AtomicU32,
}

impl Gate {
    fn over(bytes: u64) -> Arc<Gate> {
        let inner = MemDevice::new(bytes, BLOCK as u32).unwrap();
        Arc::new(Gate {
            inner,
            shut: AtomicBool::new(false),
            keeps: AtomicBool::new(false),
            spoil: AtomicU32::new(0),
        })
    }
}

impl Device for Gate {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn geometry(&self) -> &Geometry {
        self.inner.geometry()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, DeviceError> {
        let inner = Arc::clone(&self.inner).queue_pair()?;
        Ok(Box::new(GateQueue { inner, gate: self, kept: Vec::new() }))
    }

    fn dma(&self) -> Arc<dyn DmaSource> {
        self.inner.dma()
    }

    fn epoch(&self) -> u64 {
        self.inner.epoch()
    }

    fn claim_flag(&self) -> &ClaimFlag {
        self.inner.claim_flag()
    }
}

struct GateQueue {
    inner: Box<dyn QueuePair>,
    gate: Arc<Gate>,
    kept: Vec<Request>,
}

impl QueuePair for GateQueue {
    fn submit(&mut self, request: Request) {
        let shut = request.kind == Kind::Read && self.gate.shut.load(Ordering::SeqCst);
        if shut && !self.gate.keeps.swap(true, Ordering::SeqCst) {
            self.kept.push(request);
        } else {
            self.inner.submit(request);
        }
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        if !self.gate.shut.load(Ordering::SeqCst) {
            self.kept.drain(..).for_each(|request| self.inner.submit(request));
        }
        let before = completions.len();
        let count = self.inner.poll(completions);
        for completion in &mut completions[before..] {
            let spoiled = |left: u32| left.checked_sub(1);
            if self.gate.spoil.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spoiled).is_ok() {
                completion.bufs.as_mut_slice()[0][7] ^= 1;
            }
        }
        count
    }

    fn outstanding(&self) -> usize {
        self.inner.outstanding() + self.kept.len()
    }

    fn wait(&mut self, timeout: Duration) {
        if self.kept.is_empty() {
            self.inner.wait(timeout);
        }
    }
}

/// A file of `blocks` blocks, each an extent of its own, block `i` with the pattern of `tag + i`.
fn scattered(channel: &Channel, name: &str, blocks: u64, tag: u64) -> File {
    let file = channel.open(name, OpenFlags::CREATE).unwrap();
    for block in (0..blocks).rev() {
        channel.write(&file, block * BLOCK, &pattern(tag + block, LEN)).unwrap();
    }
    file
}

fn buffer(fs: &Channel) -> DmaBuf {
    let mut buf = fs.buffer(LEN).unwrap();
    buf.fill(0);
    buf
}

fn poll_until(channel: &Channel, count: usize) -> Vec<fs_core::Completion> {
    let mut done = Vec::new();
    while done.len() < count {
        if channel.poll(&mut done) == 0 {
            std::thread::yield_now();
        }
    }
    done
}

fn assert_is(bytes: &[u8], tag: u64, what: &str) {
    if let Some(why) = difference(bytes, &pattern(tag, LEN)) {
        panic!("{what}: {why}");
    }
}

/// Runs of reads of two files, of every length up to several batches: each is answered once, with its own block.
#[test]
fn batches_of_every_length_are_answered_once() {
    let _watchdog = Watchdog::start("batches", 0, 120);
    for device in [TestDevice::new(64 * MIB), TestDevice::slow(64 * MIB, 1)] {
        let fs = fresh(&device.device, &quiet());
        let channel = fs.channel().unwrap();
        let files = [scattered(&channel, "a", 50, 1000), scattered(&channel, "b", 50, 2000)];
        for count in 1..=100_u64 {
            for tag in 0..count {
                // Runs of one file of 1, 2, 3... reads.
                let file = (tag.isqrt() % 2) as usize;
                channel.submit_read(&files[file], tag % 50 * BLOCK, buffer(&channel), tag);
            }
            let mut answered = vec![false; count as usize];
            for completion in poll_until(&channel, count as usize) {
                let tag = completion.tag;
                assert!(!std::mem::replace(&mut answered[tag as usize], true), "{tag} was answered twice");
                assert!(matches!(completion.result, Ok(Output::Bytes(LEN))), "{:?}", completion.result);
                let expected = if tag.isqrt().is_multiple_of(2) { 1000 } else { 2000 } + tag % 50;
                assert_is(&completion.bufs.into_one().unwrap(), expected, "a read of many");
            }
            assert_eq!(channel.in_flight(), 0);
            assert_eq!(channel.poll(&mut Vec::new()), 0, "answered more often than asked");
        }
        // 5050 blocks; and what a channel has counted stays when it is gone.
        let bytes = fs.stats().data_read_bytes;
        assert!(bytes >= 5050 * BLOCK, "{bytes} bytes were counted");
        drop(channel);
        let _another = fs.channel().unwrap();
        assert_eq!(fs.stats().data_read_bytes, bytes);
    }
}

/// The device is slow to read; meanwhile the block is overwritten, and its file so often that every block of the device would
/// be used again. The read still sees what its view showed when it started.
fn a_late_read(late: impl FnOnce(&Filesystem, &File, &Gate)) {
    let gate = Gate::over(16 * MIB);
    let device: Arc<dyn Device> = Arc::clone(&gate) as Arc<dyn Device>;
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().unwrap();
    let file = scattered(&channel, "file", 4, 1);
    channel.sync().unwrap();
    late(&fs, &file, &gate);
    check(&fs, &channel);
}

/// Overwrites `file` and syncs, until the device was written three times over. What is held is missing in the end, and then each
/// write waits a while for reads to end: so not for long.
fn churn(fs: &Filesystem, file: &File) {
    let channel = fs.channel().unwrap();
    let end = Instant::now() + Duration::from_secs(3);
    for turn in (0..48).take_while(|_| Instant::now() < end) {
        match channel.write(file, 0, &pattern(100 + turn, MIB as usize)) {
            Ok(()) => {}
            Err(Error::NoSpace { .. }) => break,
            Err(error) => panic!("{error}"),
        }
        channel.sync().unwrap();
    }
}

#[test]
fn a_submitted_read_keeps_its_block() {
    let _watchdog = Watchdog::start("a_submitted_read", 0, 120);
    a_late_read(|fs, file, gate| {
        let channel = fs.channel().unwrap();
        gate.shut.store(true, Ordering::SeqCst);
        channel.submit_read(file, 2 * BLOCK, buffer(&channel), 5);
        channel.poll(&mut Vec::new());
        churn(fs, file);
        gate.shut.store(false, Ordering::SeqCst);
        let done = poll_until(&channel, 1).pop().unwrap();
        assert!(done.result.is_ok(), "{:?}", done.result);
        assert_is(&done.bufs.into_one().unwrap(), 3, "a late read");
    });
}

#[test]
fn a_waiting_read_keeps_its_block() {
    let _watchdog = Watchdog::start("a_waiting_read", 0, 120);
    a_late_read(|fs, file, gate| {
        gate.shut.store(true, Ordering::SeqCst);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut bytes = vec![0; LEN];
                assert_eq!(fs.channel().unwrap().read(file, 2 * BLOCK, &mut bytes).unwrap(), LEN);
                bytes
            });
            std::thread::sleep(Duration::from_millis(100));
            churn(fs, file);
            gate.shut.store(false, Ordering::SeqCst);
            assert_is(&reader.join().unwrap(), 3, "a late read");
        });
    });
}

#[test]
fn what_the_device_gets_wrong_once_is_read_again() {
    let _watchdog = Watchdog::start("read_again", 0, 60);
    a_late_read(|fs, file, gate| {
        let channel = fs.channel().unwrap();
        for block in 0..4 {
            gate.spoil.store(1, Ordering::SeqCst);
            channel.submit_read(file, block * BLOCK, buffer(&channel), 0);
            let done = poll_until(&channel, 1).pop().unwrap();
            assert!(done.result.is_ok(), "{:?}", done.result);
            assert_is(&done.bufs.into_one().unwrap(), 1 + block, "submitted");
            gate.spoil.store(1, Ordering::SeqCst);
            let mut bytes = vec![0; LEN];
            channel.read(file, block * BLOCK, &mut bytes).unwrap();
            assert_is(&bytes, 1 + block, "through a copy");
            gate.spoil.store(1, Ordering::SeqCst);
            let (result, buf) = channel.read_buf(file, block * BLOCK, buffer(&channel));
            assert_eq!(result.unwrap(), LEN);
            assert_is(&buf, 1 + block, "without a copy");
            assert_eq!(gate.spoil.load(Ordering::SeqCst), 0, "the device got nothing wrong");
        }
    });
}

/// A read that was accepted and that no poll has started before the unmount is refused, with its buffer.
#[test]
fn an_unmount_refuses_what_was_not_started() {
    let _watchdog = Watchdog::start("not_started", 0, 60);
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().unwrap();
    let file = scattered(&channel, "file", 4, 1);
    channel.submit_read(&file, 0, buffer(&channel), 9);
    fs.unmount().unwrap();
    let done = poll_until(&channel, 1).pop().unwrap();
    assert_eq!(done.tag, 9);
    assert!(matches!(done.result, Err(Error::Unmounted)), "{:?}", done.result);
    assert_eq!(done.bufs.into_one().unwrap().len(), LEN);
    channel.submit_read(&file, 0, buffer(&channel), 10);
    assert!(matches!(poll_until(&channel, 1)[0].result, Err(Error::Unmounted)));
}

/// What a channel has accepted when it is dropped is read all the same, and its file is closed then.
#[test]
fn a_dropped_channel_ends_its_reads() {
    let _watchdog = Watchdog::start("dropped", 0, 60);
    let device = TestDevice::slow(64 * MIB, 3);
    let fs = fresh(&device.device, &MountOptions::default());
    let other = fs.channel().unwrap();
    let file = scattered(&other, "file", 64, 1);
    other.sync().unwrap();
    let free = fs.channel().unwrap().statfs().unwrap().free_bytes;
    let channel = fs.channel().unwrap();
    for block in 0..40 {
        channel.submit_read(&file, block * BLOCK, buffer(&channel), block);
    }
    drop((channel, file));
    other.delete("file").unwrap();
    // The helper drives what was left alone; the last read closes the file, and its space comes back.
    let end = Instant::now() + Duration::from_secs(20);
    while other.statfs().unwrap().free_bytes < free + 32 * BLOCK {
        assert!(Instant::now() < end, "the space of the file does not come back");
        std::thread::sleep(Duration::from_millis(2));
        other.sync().unwrap();
    }
    check(&fs, &other);
}

/// A blocking read that needs no device comes between reads that are submitted: they are answered all the same, once.
#[test]
fn a_blocking_read_amid_submitted_ones() {
    let _watchdog = Watchdog::start("a_blocking_read_amid_submitted_ones", 0, 60);
    let device = TestDevice::new(64 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().unwrap();
    let file = channel.open("f", OpenFlags::CREATE).unwrap();
    channel.write(&file, 0, &pattern(1, LEN)).unwrap();
    channel.truncate(&file, 1 << 20).unwrap();
    channel.submit_read(&file, 0, channel.buffer(LEN).unwrap(), 1);
    let mut hole = vec![1; LEN];
    assert_eq!(channel.read(&file, 512 << 10, &mut hole).unwrap(), LEN);
    assert!(hole.iter().all(|byte| *byte == 0));
    channel.submit_read(&file, 0, channel.buffer(LEN).unwrap(), 2);
    let mut done = Vec::new();
    while done.len() < 2 {
        channel.poll(&mut done);
    }
    let mut tags: Vec<u64> = done.iter().map(|done| done.tag).collect();
    tags.sort_unstable();
    assert_eq!(tags, [1, 2]);
    for answer in done {
        assert!(answer.bufs.into_one().unwrap()[..] == pattern(1, LEN)[..]);
    }
    assert_eq!(channel.in_flight(), 0);
}
