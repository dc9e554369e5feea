//! What tests of SPDK's NVMe driver share, over TCP (`nvmf.rs`) and over PCIe (`nvme_pcie.rs`): requests one by one, and
//! writers that remember what was acknowledged.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses its own part; a panic is how a test fails"
)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use bdev_adapter::{Completion, Device, DmaBuf, IoErrorKind, OpenOptions, QueuePair, Request, open};

pub(crate) const BLOCK: usize = 4096;
/// A hang is a failure.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);

pub(crate) fn device(uri: &str) -> Arc<dyn Device> {
    open(uri, &OpenOptions::new()).unwrap_or_else(|error| panic!("{error}"))
}

pub(crate) fn queue(device: &Arc<dyn Device>) -> Box<dyn QueuePair> {
    Arc::clone(device).queue_pair().unwrap()
}

pub(crate) fn buffer(device: &Arc<dyn Device>, len: usize, byte: u8) -> DmaBuf {
    let mut buf = DmaBuf::new(&device.dma(), len).unwrap();
    buf.fill(byte);
    buf
}

/// Polls until `count` requests were answered.
pub(crate) fn collect(queue: &mut dyn QueuePair, count: usize) -> Vec<Completion> {
    let (mut completions, deadline) = (Vec::new(), Instant::now() + LIMIT);
    while completions.len() < count {
        if queue.poll(&mut completions) == 0 {
            queue.wait(Duration::from_millis(1));
        }
        assert!(Instant::now() < deadline, "{} of {count} answered", completions.len());
    }
    assert_eq!(completions.len(), count);
    completions
}

pub(crate) fn run(queue: &mut dyn QueuePair, request: Request) -> Completion {
    queue.submit(request);
    collect(queue, 1).remove(0)
}

pub(crate) fn kind(completion: &Completion) -> Result<(), IoErrorKind> {
    completion.result.as_ref().map(|_| ()).map_err(|error| error.kind)
}

/// Writes to blocks of one's own, each with a number that grows, and remembers what was acknowledged.
pub(crate) struct Writer {
    device: Arc<dyn Device>,
    first_block: u64,
    random: u64,
    number: u64,
    acknowledged: HashMap<u64, u64>,
    /// A write may time out; nobody knows then what its block holds.
    may_time_out: bool,
    timed_out: u64,
}

impl Writer {
    pub(crate) const BLOCKS: u64 = 1024;
    const DEPTH: usize = 16;

    fn new(device: &Arc<dyn Device>, which: u64, may_time_out: bool) -> Writer {
        let (first_block, random) = (which * Writer::BLOCKS, which + 1);
        Writer {
            device: Arc::clone(device),
            first_block,
            random,
            number: 0,
            acknowledged: HashMap::new(),
            may_time_out,
            timed_out: 0,
        }
    }

    fn next(&mut self, busy: &HashMap<u64, (u64, u64)>) -> u64 {
        loop {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let block = self.first_block + self.random % Writer::BLOCKS;
            // Two writes to one block at once would have no order.
            if !busy.values().any(|(other, _)| *other == block) {
                return block;
            }
        }
    }

    /// Until `stop`; every request is answered exactly once, and well.
    fn work(&mut self, stop: &AtomicBool, progress: &AtomicU64) {
        let mut queue = queue(&self.device);
        let mut busy: HashMap<u64, (u64, u64)> = HashMap::new();
        let mut buffers: Vec<DmaBuf> = (0..Writer::DEPTH).map(|_| buffer(&self.device, BLOCK, 0)).collect();
        let mut completions = Vec::new();
        let mut last_answer = Instant::now();
        while !stop.load(Ordering::Acquire) || !busy.is_empty() {
            while !stop.load(Ordering::Acquire)
                && let Some(mut buf) = buffers.pop()
            {
                let block = self.next(&busy);
                self.number += 1;
                fill(&mut buf, block, self.number);
                busy.insert(self.number, (block, self.number));
                queue.submit(Request::write(block * BLOCK as u64, buf, self.number));
            }
            if queue.poll(&mut completions) > 0 {
                last_answer = Instant::now();
            }
            assert!(last_answer.elapsed() < LIMIT, "{} requests hang", busy.len());
            for completion in completions.drain(..) {
                let (block, number) = busy.remove(&completion.tag).expect("answered once");
                if self.may_time_out && kind(&completion) == Err(IoErrorKind::TimedOut) {
                    self.timed_out += 1;
                    self.acknowledged.remove(&block);
                } else {
                    completion.result.unwrap();
                    self.acknowledged.insert(block, number);
                }
                progress.fetch_add(1, Ordering::Relaxed);
                buffers.push(completion.bufs.into_one().unwrap());
            }
        }
        assert_eq!(queue.outstanding(), 0);
    }

    fn verify(&self) {
        let mut queue = queue(&self.device);
        for (block, number) in &self.acknowledged {
            let buf = buffer(&self.device, BLOCK, 0);
            let completion = run(queue.as_mut(), Request::read(block * BLOCK as u64, buf, 0));
            completion.result.unwrap();
            let buf = completion.bufs.into_one().unwrap();
            let mut expected = vec![0; BLOCK];
            fill(&mut expected, *block, *number);
            assert!(buf[..] == expected[..], "block {block} holds what was acknowledged last");
        }
    }
}

fn fill(buf: &mut [u8], block: u64, number: u64) {
    for chunk in buf.chunks_exact_mut(16) {
        chunk[..8].copy_from_slice(&block.to_le_bytes());
        chunk[8..].copy_from_slice(&number.to_le_bytes());
    }
}

/// Has the writers end, also when what disturbs them panics.
struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Two threads write while `disturb` runs, which may wait for some more writes; then everything acknowledged is there.
pub(crate) fn under_load(device: &Arc<dyn Device>, may_time_out: bool, disturb: impl FnOnce(&dyn Fn())) {
    let (stop, progress) = (AtomicBool::new(false), AtomicU64::new(0));
    let some_more_writes = || {
        let (goal, began) = (progress.load(Ordering::Relaxed) + 200, Instant::now());
        while progress.load(Ordering::Relaxed) < goal {
            thread::sleep(Duration::from_millis(1));
            assert!(began.elapsed() < LIMIT, "the writers do not get on");
        }
    };
    let writers: Vec<Writer> = thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|which| {
                let (mut writer, stop, progress) =
                    (Writer::new(device, which, may_time_out), &stop, &progress);
                scope.spawn(move || {
                    writer.work(stop, progress);
                    writer
                })
            })
            .collect();
        let stopper = Stopper(&stop);
        disturb(&some_more_writes);
        drop(stopper);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for writer in &writers {
        let Writer { number, acknowledged, timed_out, .. } = writer;
        println!("{number} writes, {timed_out} timed out, {} blocks", acknowledged.len());
        writer.verify();
    }
}

/// Prints what the adapter and SPDK log.
pub(crate) fn log_to_stdout() {
    struct Print;
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

    impl log::Log for Print {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &log::Record<'_>) {
            let since = BEGAN.elapsed();
            println!("{since:.2?} {} {}: {}", record.level(), record.target(), record.args());
        }

        fn flush(&self) {}
    }

    // Another test of the program may have been first.
    if log::set_logger(&Print).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}
