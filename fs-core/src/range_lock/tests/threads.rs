//! Real threads: what is held is checked block by block, and nobody waits for ever.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

/// The seed of a randomised test: `GAUR_SEED`, or a new one. Printed, so that a failure can be replayed.
pub(super) fn seed() -> u64 {
    let seed = match std::env::var("GAUR_SEED") {
        Ok(text) => text.parse().expect("GAUR_SEED is a number"),
        Err(_) => RandomState::new().hash_one("range lock"),
    };
    println!("GAUR_SEED={seed}");
    seed
}

/// Runs `test`; aborts everything if it hangs.
pub(super) fn in_time<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let (done, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            if ended.recv_timeout(Duration::from_secs(120)) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("hung: somebody waits for ever");
                std::process::abort();
            }
        });
        let _done = done;
        test()
    })
}

struct Unpark(thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on(request: &mut Request<'_>) -> RangeGuard {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        if let Some(guard) = poll(request, &waker) {
            return guard;
        }
        thread::park();
    }
}

/// Blocks of the checker: some in each of three segments, two of which meet.
const BLOCKS: usize = 24;

fn offset(block: usize) -> u64 {
    const MIB: u64 = 1 << SEGMENT_SHIFT;
    match block / 8 {
        0 => MIB - 8 + block as u64,
        1 => MIB + block as u64 - 8,
        _ => 9 * MIB + block as u64,
    }
}

/// Who is in each block: -1 a writer, n readers.
#[derive(Default)]
struct Checker([AtomicI32; BLOCKS]);

impl Checker {
    fn enter(&self, blocks: Range<usize>, mode: Mode) {
        for block in &self.0[blocks] {
            let before = match mode {
                Mode::Shared => block.fetch_add(1, Ordering::Relaxed),
                Mode::Exclusive => block.swap(-1, Ordering::Relaxed),
            };
            let free = before == 0 || (before > 0 && mode == Mode::Shared);
            assert!(free, "a {mode:?} holder found {before} in its range");
        }
    }

    fn leave(&self, blocks: Range<usize>, mode: Mode) {
        for block in &self.0[blocks] {
            let before = match mode {
                Mode::Shared => block.fetch_sub(1, Ordering::Relaxed),
                Mode::Exclusive => block.swap(0, Ordering::Relaxed),
            };
            let mine = before == -1 || (before > 0 && mode == Mode::Shared);
            assert!(mine, "a {mode:?} holder left {before} in its range");
        }
    }
}

fn hammer(lock: &RangeLock, checker: &Checker, rng: &mut SmallRng, rounds: usize) {
    for _ in 0..rounds {
        let first = rng.random_range(0..BLOCKS);
        let end = rng.random_range(first + 1..=BLOCKS.min(first + 8));
        let wide = rng.random_ratio(1, 16);
        let (blocks, bytes) = match wide {
            true => (first..BLOCKS, offset(first)..u64::MAX),
            false => (first..end, offset(first)..offset(end - 1) + 1),
        };
        let mode = if rng.random() { Mode::Shared } else { Mode::Exclusive };
        let mut request = Box::pin(lock.lock(bytes.clone(), mode));
        let guard = match rng.random_range(0..8) {
            0 => lock.try_lock(bytes, mode),
            // Given up if it is not granted at once, or a little later.
            1 => try_now(&mut request),
            2 => try_now(&mut request).or_else(|| {
                thread::yield_now();
                try_now(&mut request)
            }),
            _ => Some(block_on(&mut request)),
        };
        drop(request);
        if let Some(guard) = guard {
            checker.enter(blocks.clone(), mode);
            if rng.random_ratio(1, 8) {
                thread::yield_now();
            }
            checker.leave(blocks, mode);
            drop(guard);
        }
    }
}

#[test]
fn threads_exclude_each_other() {
    let (threads, rounds) = if cfg!(miri) { (3, 40) } else { (6, 20_000) };
    let seed = seed();
    in_time(|| {
        let lock = RangeLock::default();
        let checker = Checker::default();
        thread::scope(|scope| {
            for thread in 0..threads {
                let (lock, checker) = (&lock, &checker);
                let mut rng = SmallRng::seed_from_u64(seed ^ thread);
                scope.spawn(move || hammer(lock, checker, &mut rng, rounds));
            }
        });
        drop(lock.try_lock(0..u64::MAX, Mode::Exclusive).expect("nobody is left"));
        assert_idle(&lock);
    });
}

/// The lock orders what is done under it: a plain counter.
#[test]
fn nothing_is_lost_under_the_lock() {
    struct Plain(std::cell::UnsafeCell<u64>);
    // SAFETY: only touched with the range lock held alone; that this is enough is what the test is about (Miri and a sanitizer
    // would tell).
    unsafe impl Sync for Plain {}
    let (threads, rounds) = if cfg!(miri) { (3, 30) } else { (4, 20_000) };
    let lock = RangeLock::default();
    let counter = Plain(std::cell::UnsafeCell::new(0));
    in_time(|| {
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let counter = &counter;
                    for _ in 0..rounds {
                        let guard = block_on(&mut Box::pin(lock.lock(7..9, Mode::Exclusive)));
                        // SAFETY: as above.
                        unsafe { *counter.0.get() += 1 };
                        drop(guard);
                    }
                });
            }
        });
    });
    assert_eq!(counter.0.into_inner(), threads * rounds);
    assert_idle(&lock);
}

/// Readers come without end. None that came after the writer is granted before it: counted, not timed.
#[test]
fn no_reader_overtakes_a_waiting_writer() {
    let turns = if cfg!(miri) { 10 } else { 2000 };
    let lock = RangeLock::default();
    // The number of the writer's turn while its request is in the queue, else 0.
    let waits = AtomicU64::new(0);
    let (overtaken, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    in_time(|| {
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::SeqCst) {
                        let turn = waits.load(Ordering::SeqCst);
                        let guard = block_on(&mut Box::pin(lock.lock(0..10, Mode::Shared)));
                        if turn != 0 && waits.load(Ordering::SeqCst) == turn {
                            overtaken.fetch_add(1, Ordering::SeqCst);
                        }
                        thread::yield_now();
                        drop(guard);
                    }
                });
            }
            for turn in 1..=turns {
                let mut request = Box::pin(lock.lock(5..15, Mode::Exclusive));
                let guard = try_now(&mut request).unwrap_or_else(|| {
                    waits.store(turn, Ordering::SeqCst);
                    block_on(&mut request)
                });
                // Still holding: who finds this set was granted before the writer let go.
                waits.store(0, Ordering::SeqCst);
                drop(guard);
            }
            over.store(true, Ordering::SeqCst);
        });
    });
    assert_eq!(overtaken.into_inner(), 0);
    assert_idle(&lock);
}
