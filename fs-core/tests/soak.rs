//! Soak: real threads, direct and buffered at once, on one file and on many, with the helper thread on.
//!
//! Contents are verified by tags. A file is a row of cells of [`CELL`] bytes; each cell that was written names its file, its place
//! and the write that it came from, and is filled with what these determine. So any torn, stale, foreign or misplaced cell is
//! seen by whoever reads it, without knowing who wrote last. Cells are smaller than blocks: writers of different cells of a block
//! meet in it.
//!
//! `GAUR_OPS` makes it longer.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fs_core::{Accounting, Channel, Error, File, Filesystem, Growth, MountOptions, OpenFlags, WriteBatch};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use common::{BLOCK, MIB, TestDevice, Watchdog, check, check_statfs, fresh, mount};

const CELL: u64 = 512;
const THREADS: u64 = 4;

/// Fills the cells of `bytes`, which go to byte `offset` of file `file`, with what write `tag` (not 0) makes of them.
fn write_cells(file: u64, offset: u64, tag: u64, bytes: &mut [u8]) {
    for (cell, number) in bytes.chunks_mut(CELL as usize).zip(offset / CELL..) {
        common::fill(file << 48 ^ number << 20 ^ tag.rotate_left(7), &mut cell[8..]);
        cell[..8].copy_from_slice(&tag.to_le_bytes());
    }
}

/// The tag of a whole cell; 0 for one that reads as zeroes.
fn read_cell(file: u64, offset: u64, cell: &[u8]) -> Result<u64, String> {
    let tag = u64::from_le_bytes(cell[..8].try_into().unwrap());
    let mut expected = vec![0; cell.len()];
    if tag != 0 {
        write_cells(file, offset, tag, &mut expected);
    }
    match common::difference(cell, &expected) {
        None => Ok(tag),
        Some(difference) => Err(format!("file {file}, byte {offset}, tag {tag:#x}: {difference}")),
    }
}

/// A thread of the soak: its channel, its dice, and a number for each of its writes.
struct Worker {
    thread: u64,
    channel: Channel,
    random: SmallRng,
    writes: u64,
}

impl Worker {
    fn new(fs: &Filesystem, thread: u64, seed: u64) -> Worker {
        let random = SmallRng::seed_from_u64(seed ^ thread.wrapping_mul(0x9E37_79B9));
        Worker { thread, channel: fs.channel().unwrap(), random, writes: 0 }
    }

    fn tag(&mut self) -> u64 {
        self.writes += 1;
        (self.thread + 1) << 40 | self.writes
    }

    /// Some cells from cell 0 to `cells`: byte offset and length.
    fn range(&mut self, cells: u64, longest: u64) -> (u64, u64) {
        let len = match self.random.random_range(0..4) {
            0 => 1,
            1 => BLOCK / CELL,
            _ => self.random.random_range(1..=longest),
        };
        let at = self.random.random_range(0..cells.saturating_sub(len).max(1));
        // Some are aligned to blocks, and may go without a copy.
        let at = if self.random.random_bool(0.4) { at / 8 * 8 } else { at };
        (at * CELL, len * CELL)
    }

    /// Handles on `name`, a direct and a buffered one.
    fn open(&self, name: &str) -> [File; 2] {
        let flags = [OpenFlags::CREATE, OpenFlags::CREATE | OpenFlags::BUFFERED];
        flags.map(|flags| self.channel.open(name, flags).unwrap())
    }

    fn write(&mut self, file: &File, id: u64, offset: u64, len: u64, tag: u64) -> Result<(), Error> {
        if self.random.random_bool(0.5) {
            let mut buf = self.channel.buffer(len as usize)?;
            write_cells(id, offset, tag, &mut buf);
            self.channel.write_buf(file, offset, buf).0
        } else {
            let mut bytes = vec![0; len as usize];
            write_cells(id, offset, tag, &mut bytes);
            self.channel.write(file, offset, &bytes)
        }
    }

    /// Reads and looks at every whole cell; returns the tags.
    fn read(&mut self, file: &File, id: u64, offset: u64, len: u64) -> Vec<u64> {
        let mut bytes = vec![0; len as usize];
        let len = self.channel.read(file, offset, &mut bytes).unwrap();
        let cells = bytes[..len].chunks_exact(CELL as usize).zip((offset..).step_by(CELL as usize));
        cells.map(|(cell, at)| read_cell(id, at, cell).unwrap_or_else(|error| panic!("{error}"))).collect()
    }
}

/// A device that is full for a moment is no failure of the soak.
fn done_or_full(result: Result<(), Error>) -> bool {
    match result {
        Ok(()) => true,
        Err(Error::NoSpace { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

// ---- a file that all write, each its own cells: every cell is exact

const OWNED_CELLS: u64 = 4096;

fn owner(cell: u64) -> u64 {
    cell / 3 % THREADS
}

/// Writes runs of own cells, reads anything; own cells must have the last tag that was written to them.
fn owned(worker: &mut Worker, files: &[File; 2], tags: &mut BTreeMap<u64, u64>) {
    let file = files[worker.random.random_range(0..2)].clone();
    if worker.random.random_bool(0.5) {
        let group =
            worker.random.random_range(0..OWNED_CELLS / 3 / THREADS) * 3 * THREADS + worker.thread * 3;
        let len = worker.random.random_range(1..=3);
        let tag = worker.tag();
        if done_or_full(worker.write(&file, 1, group * CELL, len * CELL, tag)) {
            (group..group + len).for_each(|cell| {
                tags.insert(cell, tag);
            });
        }
    } else {
        let (offset, len) = worker.range(OWNED_CELLS, 64);
        let found = worker.read(&file, 1, offset, len);
        for (cell, tag) in (offset / CELL..).zip(found).filter(|(cell, _)| owner(*cell) == worker.thread) {
            assert_eq!(tag, tags.get(&cell).copied().unwrap_or(0), "cell {cell} of the owned file");
        }
    }
}

// ---- files to which all do everything: every cell is whole

const CHAOS_FILES: u64 = 3;
const CHAOS_CELLS: u64 = 2048;

fn chaos(worker: &mut Worker) {
    let id = 10 + worker.random.random_range(0..CHAOS_FILES);
    let files = worker.open(&format!("chaos{id}"));
    let file = files[worker.random.random_range(0..2)].clone();
    let (offset, len) = worker.range(CHAOS_CELLS, 600);
    let (channel, tag) = (&worker.channel, worker.writes + 1);
    match worker.random.random_range(0..20) {
        0..=6 => {
            let tag = worker.tag();
            done_or_full(worker.write(&file, id, offset, len, tag));
        }
        7..=12 => {
            worker.read(&file, id, offset, len);
        }
        13 => {
            done_or_full(channel.truncate(&file, offset));
        }
        14 => {
            done_or_full(channel.punch(&file, offset, len));
        }
        15 => {
            done_or_full(channel.zero(&file, offset, len, Growth::Grow));
        }
        16 => {
            done_or_full(channel.preallocate(&file, offset, len, Growth::Keep));
        }
        17 => channel.sync_file(&file).unwrap(),
        18 => {
            let tag = (worker.thread + 1) << 40 | tag;
            let mut batch = WriteBatch::new();
            let other = 10 + (id - 9) % CHAOS_FILES;
            let others = worker.open(&format!("chaos{other}"));
            for (id, file) in [(id, &file), (other, &others[0])] {
                let mut bytes = vec![0; len.min(64 << 10) as usize];
                write_cells(id, offset, tag, &mut bytes);
                batch.write(file, offset, &bytes);
            }
            worker.writes += 1;
            done_or_full(worker.channel.write_batch(&batch));
        }
        _ => {
            let extents = channel.extents(&file, 0, u64::MAX).collect::<Result<Vec<_>, _>>().unwrap();
            assert!(extents.windows(2).all(|pair| pair[0].offset + pair[0].len <= pair[1].offset));
        }
    }
}

// ---- files of one thread: exact, whatever is done to them

const OWN_CELLS: u64 = 1024;

struct Own {
    name: String,
    id: u64,
    /// The tag of every cell, up to the size.
    cells: Vec<u64>,
}

impl Own {
    fn step(&mut self, worker: &mut Worker) {
        let files = worker.open(&self.name);
        let file = files[worker.random.random_range(0..2)].clone();
        let (offset, len) = worker.range(OWN_CELLS, 200);
        let (first, end) = ((offset / CELL) as usize, ((offset + len) / CELL) as usize);
        match worker.random.random_range(0..16) {
            0..=6 => {
                let tag = worker.tag();
                if done_or_full(worker.write(&file, self.id, offset, len, tag)) {
                    self.cells.resize(self.cells.len().max(end), 0);
                    self.cells[first..end].fill(tag);
                }
            }
            7..=10 => self.verify(worker, &file, offset, len),
            11 => {
                if done_or_full(worker.channel.truncate(&file, offset)) {
                    self.cells.resize(first, 0);
                }
            }
            12 => {
                if done_or_full(worker.channel.punch(&file, offset, len)) {
                    self.zeroed(first, end);
                }
            }
            13 => {
                if done_or_full(worker.channel.zero(&file, offset, len, Growth::Grow)) {
                    self.cells.resize(self.cells.len().max(end), 0);
                    self.zeroed(first, end);
                }
            }
            14 => {
                let name = format!("own{}-{}", worker.thread, worker.random.random_range(0..1000));
                worker.channel.rename(&self.name, &name).unwrap();
                self.name = name;
            }
            _ => {
                drop((files, file));
                worker.channel.delete(&self.name).unwrap();
                self.cells.clear();
            }
        }
    }

    fn zeroed(&mut self, first: usize, end: usize) {
        let size = self.cells.len();
        self.cells[first.min(size)..end.min(size)].fill(0);
    }

    fn verify(&self, worker: &mut Worker, file: &File, offset: u64, len: u64) {
        let first = ((offset / CELL) as usize).min(self.cells.len());
        let end = (((offset + len) / CELL) as usize).min(self.cells.len());
        let found = worker.read(file, self.id, offset, len);
        assert_eq!(found, self.cells[first..end], "{} at byte {offset}", self.name);
    }

    fn verify_all(&self, worker: &mut Worker) {
        for file in worker.open(&self.name) {
            assert_eq!(file.size(), self.cells.len() as u64 * CELL, "size of {}", self.name);
            self.verify(worker, &file, 0, OWN_CELLS * CELL);
        }
    }
}

/// What a thread knows at the end.
struct Known {
    thread: u64,
    owned: BTreeMap<u64, u64>,
    own: Own,
}

impl Known {
    fn verify(&self, fs: &Filesystem) {
        let mut worker = Worker::new(fs, self.thread, 0);
        self.own.verify_all(&mut worker);
        for file in worker.open("owned") {
            let tags = worker.read(&file, 1, 0, OWNED_CELLS * CELL);
            for (cell, tag) in &self.owned {
                assert_eq!(tags[*cell as usize], *tag, "cell {cell} of the owned file");
            }
        }
    }
}

fn work(fs: &Filesystem, thread: u64, seed: u64, count: usize) -> Known {
    let mut worker = Worker::new(fs, thread, seed);
    let files = worker.open("owned");
    let mut tags = BTreeMap::new();
    let own = Own { name: format!("own{thread}"), id: 100 + thread, cells: Vec::new() };
    let mut own = own;
    for _ in 0..count {
        match worker.random.random_range(0..10) {
            0..=3 => owned(&mut worker, &files, &mut tags),
            4..=6 => chaos(&mut worker),
            7..=8 => own.step(&mut worker),
            _ if worker.random.random_bool(0.2) => worker.channel.sync().unwrap(),
            _ => check_statfs(&worker.channel.statfs().unwrap()),
        }
    }
    Known { thread, owned: tags, own }
}

/// At rest nothing is outstanding in any file.
fn at_rest(fs: &Filesystem, channel: &Channel) {
    let names: Vec<_> = channel.list("").map(|entry| entry.unwrap().name).collect();
    for name in names {
        let file = channel.open(&name, OpenFlags::READ_ONLY).unwrap();
        let accounting = file.accounting();
        assert_eq!(accounting, Accounting::default(), "{}", String::from_utf8_lossy(&name));
    }
    check_statfs(&channel.statfs().unwrap());
    check(fs, channel);
}

fn soak(test: &str, bytes: u64, options: &MountOptions) {
    let seed = common::seed(test);
    let count = common::ops(8_000) / THREADS as usize;
    let _watchdog = Watchdog::start(test, seed, 240 + count as u64 / 20);
    let device = TestDevice::slow(bytes, seed);
    let fs = fresh(&device.device, options);
    let known: Vec<Known> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| (thread, fs.clone()))
            .map(|(thread, fs)| scope.spawn(move || work(&fs, thread, seed, count)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    known.iter().for_each(|known| known.verify(&fs));
    let channel = fs.channel().unwrap();
    channel.sync().unwrap();
    at_rest(&fs, &channel);
    drop(channel);
    fs.unmount().unwrap();
    let fs = mount(&device.device, options);
    known.iter().for_each(|known| known.verify(&fs));
    at_rest(&fs, &fs.channel().unwrap());
}

#[test]
fn everything_at_once() {
    soak("everything_at_once", 256 * MIB, &MountOptions::default());
}

#[test]
fn everything_at_once_with_little_memory() {
    let options = MountOptions {
        node_cache_bytes: 256 << 10,
        checksum_cache_bytes: 64 << 10,
        page_cache_bytes: 1 << 20,
        extent_map_bytes: 64 << 10,
        writeback_age: Some(Duration::from_millis(5)),
        commit_interval: Some(Duration::from_millis(10)),
        ..MountOptions::default()
    };
    soak("everything_at_once_with_little_memory", 256 * MIB, &options);
}

#[test]
fn everything_at_once_on_a_device_that_is_full_at_times() {
    soak("everything_at_once_on_a_device_that_is_full_at_times", 16 * MIB, &MountOptions::default());
}

// ---- the end of a file

/// A writer lengthens a file, direct and buffered in turn; whoever sees a size must find data up to it, whole.
#[test]
fn size_never_runs_ahead_of_data() {
    let seed = common::seed("size_never_runs_ahead_of_data");
    let count = common::ops(1_500) as u64;
    let _watchdog = Watchdog::start("size_never_runs_ahead_of_data", seed, 120 + count / 50);
    let device = TestDevice::slow(512 * MIB, seed);
    let fs = fresh(&device.device, &MountOptions::default());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (fs, done) = (&fs, &done);
        scope.spawn(move || {
            let mut worker = Worker::new(fs, 0, seed);
            let files = worker.open("grows");
            for step in 0..count {
                let file = files[worker.random.random_range(0..2)].clone();
                let (len, tag) = (worker.random.random_range(1..=24) * CELL, worker.tag());
                if step % 100 == 99 {
                    worker.channel.truncate(&file, 0).unwrap();
                }
                let size = file.size();
                worker.write(&file, 7, size, len, tag).unwrap();
            }
            done.store(true, Ordering::Release);
        });
        for thread in 1..3 {
            scope.spawn(move || {
                let mut worker = Worker::new(fs, thread, seed);
                let files = worker.open("grows");
                while !done.load(Ordering::Acquire) {
                    let file = files[worker.random.random_range(0..2)].clone();
                    let size = file.size();
                    let from = size.saturating_sub(24 * CELL) / CELL * CELL;
                    // The file may have been cut since; but what is there was written.
                    let tags = worker.read(&file, 7, from, size - from);
                    assert!(tags.iter().all(|tag| *tag != 0), "zeroes before the end of the file: {tags:?}");
                }
            });
        }
    });
    check(&fs, &fs.channel().unwrap());
}

/// Four pairs, each a writer that appends and cuts, and a reader that reads beyond the end, on one file. Short reads must give back what
/// they had locked and held: if one does not, the next writer hangs, and the watchdog says so.
#[test]
fn short_reads_at_the_end_leave_no_lock() {
    let seed = common::seed("short_reads_at_the_end_leave_no_lock");
    let count = common::ops(4_000) as u64 / 4;
    let _watchdog = Watchdog::start("short_reads_at_the_end_leave_no_lock", seed, 120 + count / 10);
    let device = TestDevice::slow(256 * MIB, seed);
    let fs = fresh(&device.device, &MountOptions::default());
    let short = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for pair in 0..4 {
            let (fs, short) = (&fs, &short);
            scope.spawn(move || {
                let mut worker = Worker::new(fs, pair, seed);
                let files = worker.open("short");
                for _ in 0..count {
                    let file = files[worker.random.random_range(0..2)].clone();
                    if file.size() > 64 * BLOCK {
                        worker.channel.truncate(&file, worker.random.random_range(0..8) * BLOCK).unwrap();
                    }
                    let len = worker.random.random_range(1..3 * BLOCK) as usize;
                    worker.channel.append(&file, &vec![pair as u8 + 1; len]).unwrap();
                }
            });
            scope.spawn(move || {
                let mut worker = Worker::new(fs, pair + 4, seed);
                let files = worker.open("short");
                for _ in 0..count {
                    let file = files[worker.random.random_range(0..2)].clone();
                    let offset = file.size().saturating_sub(worker.random.random_range(0..2 * BLOCK));
                    let mut bytes = vec![0; 4 * BLOCK as usize];
                    let offset = if worker.random.random_bool(0.5) { offset / BLOCK * BLOCK } else { offset };
                    if worker.channel.read(&file, offset, &mut bytes).unwrap() < bytes.len() {
                        short.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert!(short.load(Ordering::Relaxed) > count, "hardly any read was short");
    // Nobody holds anything: these want all of the file.
    let channel = fs.channel().unwrap();
    let file = channel.open("short", OpenFlags::READ_WRITE).unwrap();
    channel.truncate(&file, 0).unwrap();
    channel.write(&file, 0, &vec![1; 300 * BLOCK as usize]).unwrap();
    channel.sync().unwrap();
    drop(file);
    at_rest(&fs, &channel);
}
