//! Random schedules of whole operations: threads with a channel each write, read, append, truncate, punch and sync a few small files in
//! both ways. Shuttle switches threads at every lock of the crate; the device answers late and out of order.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test --release -p fs-core --lib races`, with a build directory of its own. `GAUR_SEED=N` replays,
//! `GAUR_SCHEDULES=N` sets the number of schedules.
//!
//! # What is checked
//!
//! - Blocks of `f` are cut into cells, each with one thread that writes it; every cell is written as a whole, with a number that grows. A
//!   read finds each cell whole, not older than the last write of it that had ended when the read began, and not newer than what
//!   had begun when it ended.
//! - Each thread has a block of `f` to itself, which it also punches, and the tail of `f` is appended to and truncated.
//! - `log` is only appended to: readers find whole records up to the size that they see, never zeroes.
//! - `again` is opened and closed for each access.
//! - At the end: what was written last is there, before and after the caches are emptied; nothing is on its way in any file; the check of
//!   the filesystem is clean. A hang is noticed by shuttle: all threads wait, or one takes too many steps.

use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use bdev_adapter::Device;
use bdev_adapter::mem::MemDevice;
use fs_core::{Accounting, Channel, File, Filesystem, MountOptions, OpenFlags};
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, Runner, thread};

use super::common::slow::SlowDevice;
use super::common::{BLOCK, MIB, Watchdog, check, fresh, quiet};
use crate::mutation::{Mutation, with_broken};

const THREADS: usize = 3;
/// Switches between threads at which a schedule aims.
const SWITCHES: usize = 3;
/// Bytes of a cell, of a record of the log.
const CELL: usize = 1024;
/// Cells of the part of `f` that all write: two blocks.
const CELLS: usize = 8;
const OWN: u64 = CELLS as u64 * CELL as u64;
const TAIL: u64 = OWN + THREADS as u64 * BLOCK;

/// Numbers of the writes of a cell. Not shuttle's: no points at which it may switch.
#[derive(Default)]
struct Numbers {
    begun: AtomicU32,
    ended: AtomicU32,
}

/// What the threads share.
struct World {
    fs: Filesystem,
    cells: [Numbers; CELLS],
    again: [Numbers; THREADS],
    logged: AtomicU32,
}

/// What a thread may do.
#[derive(Clone, Copy)]
enum Kind {
    WriteCells,
    ReadCells,
    OwnBlock,
    Tail,
    Log,
    Again,
    Others,
}

/// What the threads of a schedule do: few kinds meet each other more often than many. (Groce et al., "Swarm testing", ISSTA 2012.)
fn swarm() -> Vec<Kind> {
    use Kind::{Again, Log, Others, OwnBlock, ReadCells, Tail, WriteCells};
    let all = [
        WriteCells, ReadCells, WriteCells, ReadCells, OwnBlock, Tail, Log, Log, Again, Again, Others, Others,
    ];
    let some: Vec<Kind> = all.into_iter().filter(|_| thread_rng().gen_range(0..3) == 0).collect();
    if some.is_empty() { all.to_vec() } else { some }
}

/// A thread, with its handles by kind.
struct Worker {
    world: Arc<World>,
    me: usize,
    channel: Channel,
    f: [File; 2],
    log: [File; 2],
    /// What its own block holds.
    own: Vec<u8>,
}

fn content(number: u32, len: usize) -> Vec<u8> {
    number.to_le_bytes().repeat(len / 4)
}

/// The number of a cell, which must be whole.
fn number(cell: &[u8]) -> u32 {
    let number = u32::from_le_bytes(cell[..4].try_into().expect("four bytes"));
    assert!(cell == content(number, cell.len()), "a cell is in pieces");
    number
}

fn any<T>(of: &[T]) -> &T {
    &of[thread_rng().gen_range(0..of.len())]
}

impl Worker {
    fn new(world: &Arc<World>, me: usize) -> Worker {
        let channel = world.fs.channel().expect("channel");
        let open = |name| {
            [OpenFlags::BUFFERED, OpenFlags::READ_WRITE].map(|kind| channel.open(name, kind).expect("open"))
        };
        let (f, log) = (open("f"), open("log"));
        Worker { world: Arc::clone(world), me, channel, f, log, own: vec![0; BLOCK as usize] }
    }

    fn read(&self, file: &File, offset: u64, len: usize) -> Vec<u8> {
        let mut found = vec![0xEE; len];
        let there = self.channel.read(file, offset, &mut found).expect("read");
        found.truncate(there);
        found
    }

    fn write_cells(&self) {
        let cell = (0..CELLS)
            .filter(|cell| cell % THREADS == self.me)
            .nth(thread_rng().gen_range(0..2))
            .expect("two each");
        let numbers = &self.world.cells[cell];
        let number = numbers.begun.fetch_add(1, Ordering::Relaxed) + 1;
        self.channel.write(any(&self.f), (cell * CELL) as u64, &content(number, CELL)).expect("write");
        numbers.ended.store(number, Ordering::Relaxed);
    }

    fn read_cells(&self) {
        let first = thread_rng().gen_range(0..CELLS);
        let last = thread_rng().gen_range(first..CELLS) + 1;
        let cells = &self.world.cells[first..last];
        let least: Vec<u32> = cells.iter().map(|cell| cell.ended.load(Ordering::Relaxed)).collect();
        let found = self.read(any(&self.f), (first * CELL) as u64, (last - first) * CELL);
        assert_eq!(found.len(), (last - first) * CELL, "the file is too short");
        for ((cell, numbers), least) in found.chunks(CELL).zip(cells).zip(least) {
            let (found, most) = (number(cell), numbers.begun.load(Ordering::Relaxed));
            assert!((least..=most).contains(&found), "write {found} of a cell, not {least}..={most}");
        }
    }

    fn own_block(&mut self) {
        let at = OWN + self.me as u64 * BLOCK;
        let tag: u8 = thread_rng().gen_range(1..=255);
        let file = any(&self.f);
        match thread_rng().gen_range(0..4) {
            0 => {
                self.own.fill(tag);
                self.channel.write(file, at, &self.own).expect("write");
            }
            1 => {
                self.own[100..200].fill(tag);
                self.channel.write(file, at + 100, &self.own[100..200]).expect("write");
            }
            2 => {
                self.own.fill(0);
                self.channel.punch(file, at, BLOCK).expect("punch");
            }
            _ => {}
        }
        let found = self.read(any(&self.f), at, BLOCK as usize);
        assert!(found == self.own, "a thread does not find what it wrote");
    }

    fn tail(&self) {
        let file = any(&self.f);
        match thread_rng().gen_range(0..3) {
            0 => drop(self.channel.append(file, &[0x77; 3000]).expect("append")),
            1 => self.channel.truncate(file, TAIL + thread_rng().gen_range(0..3) * 2500).expect("truncate"),
            _ => {
                let found = self.read(file, TAIL, 20_000);
                assert!(found.iter().all(|byte| [0, 0x77].contains(byte)), "foreign bytes");
            }
        }
    }

    fn log(&self) {
        let file = any(&self.log);
        if thread_rng().r#gen() {
            self.channel.append(file, &content(1 + self.me as u32, CELL)).expect("append");
            self.world.logged.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let least = self.world.logged.load(Ordering::Relaxed) as usize;
        let found = self.read(file, 0, 100 * CELL);
        assert!(
            found.len() % CELL == 0 && found.len() >= least * CELL,
            "{} bytes of a log of {least}",
            found.len()
        );
        for record in found.chunks(CELL) {
            assert!((1..=THREADS as u32).contains(&number(record)), "the size is ahead of the data");
        }
    }

    fn again(&self) {
        let open = || {
            let kind = any(&[OpenFlags::BUFFERED, OpenFlags::READ_WRITE]);
            self.channel.open("again", *kind).expect("open")
        };
        let (at, numbers) = ((self.me * CELL) as u64, &self.world.again[self.me]);
        if thread_rng().r#gen() {
            let number = numbers.begun.fetch_add(1, Ordering::Relaxed) + 1;
            self.channel.write(&open(), at, &content(number, CELL)).expect("write");
        }
        let found = self.read(&open(), at, CELL);
        assert_eq!(
            number(&found),
            numbers.begun.load(Ordering::Relaxed),
            "a write to a file that was closed is lost"
        );
    }

    fn others(&self) {
        match thread_rng().gen_range(0..6) {
            0 | 5 => self.channel.sync().expect("sync"),
            1 => self.channel.sync_file(&self.f[0]).expect("sync"),
            2 => {
                self.world.fs.set_cache_bytes(0);
                self.world.fs.set_cache_bytes(1 << 20);
            }
            _ => drop(self.f[0].inner().map.evict(u64::MAX)),
        }
    }

    fn run(&mut self, kinds: &[Kind], steps: usize) {
        for _ in 0..steps {
            match any(kinds) {
                Kind::WriteCells => self.write_cells(),
                Kind::ReadCells => self.read_cells(),
                Kind::OwnBlock => self.own_block(),
                Kind::Tail => self.tail(),
                Kind::Log => self.log(),
                Kind::Again => self.again(),
                Kind::Others => self.others(),
            }
        }
    }
}

/// A schedule: a fresh filesystem, all threads, and what is left of it.
fn lives(steps: usize) {
    let memory = MemDevice::new(16 * MIB, 4096).expect("a device");
    let device: Arc<dyn Device> = SlowDevice::wrap(memory, thread_rng().r#gen(), 3);
    let options = MountOptions { page_cache_bytes: 1 << 20, ..quiet() };
    let fs = fresh(&device, &options);
    let channel = fs.channel().expect("channel");
    for (name, size) in [("f", TAIL), ("log", 0), ("again", (THREADS * CELL) as u64)] {
        let file = channel.open(name, OpenFlags::CREATE).expect("open");
        channel.write(&file, 0, &vec![0; size as usize]).expect("write");
    }
    channel.sync().expect("sync");
    drop(channel);
    let world = Arc::new(World {
        fs,
        cells: Default::default(),
        again: Default::default(),
        logged: AtomicU32::new(0),
    });
    // Half of the schedules send some direct writes the buffered way.
    world.fs.force_fallback(*any(&[0, 0, 1, 3]));
    let kinds = swarm();
    let threads: Vec<_> = (0..THREADS)
        .map(|me| {
            let (world, kinds) = (Arc::clone(&world), kinds.clone());
            thread::spawn(move || {
                let mut worker = Worker::new(&world, me);
                worker.run(&kinds, steps);
                worker.own
            })
        })
        .collect();
    let own: Vec<Vec<u8>> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
    at_rest(&world, &own);
}

fn at_rest(world: &Arc<World>, own: &[Vec<u8>]) {
    let worker = Worker::new(world, 0);
    for emptied in [false, true] {
        if emptied {
            worker.channel.sync().expect("sync");
            world.fs.set_cache_bytes(0);
            worker.f[0].inner().map.evict(u64::MAX);
        }
        for file in &worker.f {
            let found = worker.read(file, 0, TAIL as usize);
            for (cell, numbers) in found.chunks(CELL).zip(&world.cells) {
                assert_eq!(
                    number(cell),
                    numbers.ended.load(Ordering::Relaxed),
                    "the last write of a cell is lost"
                );
            }
            assert!(found[OWN as usize..] == own.concat(), "the last write of a block is lost");
        }
        // More than there is.
        let [log, again] = [0, 1].map(|kind| worker.read(&worker.log[kind], 0, 1000 * CELL));
        assert!(log == again, "the two kinds of handles differ");
        assert_eq!(
            log.len(),
            world.logged.load(Ordering::Relaxed) as usize * CELL,
            "records of the log are lost"
        );
        log.chunks(CELL).for_each(|record| assert_ne!(number(record), 0, "records of the log are lost"));
    }
    for file in worker.f.iter().chain(&worker.log) {
        assert_eq!(file.accounting(), Accounting::default(), "a file at rest");
    }
    // Reads ahead of somebody are nobody's operations.
    while worker.channel.core.drive_abandoned() {
        worker.channel.drive();
        crate::sync::spin();
    }
    assert_eq!(worker.channel.core.holds.oldest(), None, "somebody holds blocks");
    check(&world.fs, &worker.channel);
}

fn schedules(default: usize) -> usize {
    std::env::var("GAUR_SCHEDULES")
        .map_or(default, |count| count.parse().expect("GAUR_SCHEDULES is a number"))
}

fn seed() -> u64 {
    let seed = match std::env::var("GAUR_SEED") {
        Ok(text) => text.parse().expect("GAUR_SEED is a number"),
        Err(_) => RandomState::new().hash_one("races"),
    };
    println!("GAUR_SEED={seed}");
    seed
}

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.failure_persistence = FailurePersistence::None;
    config
}

/// Runs schedules until one fails; how many there were.
fn run(scheduler: impl Scheduler + 'static, steps: usize) -> (usize, bool) {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    COUNT.store(0, Ordering::Relaxed);
    let runner = Runner::new(scheduler, config());
    let result = catch_unwind(AssertUnwindSafe(|| {
        runner.run(move || {
            COUNT.fetch_add(1, Ordering::Relaxed);
            lives(steps);
        })
    }));
    (COUNT.load(Ordering::Relaxed), result.is_err())
}

#[test]
fn random_schedules() {
    let (seed, began) = (seed(), std::time::Instant::now());
    let _watchdog = Watchdog::start("random schedules", seed, 300);
    let (count, failed) = run(RandomScheduler::new_from_seed(seed, schedules(3000)), 6);
    println!("{count} schedules, {:.1} a second", count as f64 / began.elapsed().as_secs_f64());
    assert!(!failed, "schedule {count} of GAUR_SEED={seed} failed");
}

/// Few switches at the worst places.
#[test]
fn schedules_of_few_switches() {
    let seed = seed();
    let _watchdog = Watchdog::start("schedules of few switches", seed, 300);
    let (count, failed) = run(PctScheduler::new_from_seed(seed, SWITCHES, schedules(3000)), 6);
    assert!(!failed, "schedule {count} of GAUR_SEED={seed} failed");
}

/// Schedules within which a broken rule must be found. Mostly it takes fewer than a hundred.
const FOUND_WITHIN: usize = 20_000;

/// Rules that are broken on purpose are found, as far as they are a matter of schedules, without a test that knows the place.
#[test]
fn broken_rules_are_found() {
    let seed = seed();
    let _watchdog = Watchdog::start("broken rules", seed, 600);
    for rule in [
        Mutation::TicketAfterTheTree,
        Mutation::UnlockBeforeDirty,
        Mutation::UnlockBeforeGrowth,
        Mutation::FallbackClearsDirty,
        Mutation::PagesBeforeLock,
        Mutation::NoLookForOrdered,
        Mutation::FillUnlocked,
        Mutation::ReadPastPages,
        Mutation::ViewBeforePages,
        Mutation::SizeBeforeData,
        Mutation::ShortReadKeepsHold,
        Mutation::ShortReadKeepsLock,
        Mutation::FallbackKeepsLock,
        Mutation::ForgetByNumber,
    ] {
        let scheduler = PctScheduler::new_from_seed(seed, SWITCHES, FOUND_WITHIN);
        let (count, failed) = with_broken(rule, || run(scheduler, 6));
        println!("{rule:?}: {count} schedules");
        assert!(failed, "{rule:?} was not found in {count} schedules of GAUR_SEED={seed}");
    }
}
