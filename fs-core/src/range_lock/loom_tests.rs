//! All schedules of small cases, with all that the memory model allows (up to a number of preemptions). What loom itself notices:
//! two that touch a cell at once or unordered, be it what the lock protects or the request inside a node; and threads
//! that all wait, so a lost wake-up.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p fs-core --lib range_lock`, with a build directory of its own.

use std::sync::Arc;
use std::task::Wake;

use loom::cell::UnsafeCell;
use loom::sync::{Condvar, Mutex};
use loom::thread;

use super::*;

/// Explores `case` with at most so many preemptions; each thread switch at a point where the thread waits is free.
fn explore(preemptions: usize, case: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(case);
}

/// What is locked: blocks that know who is in them.
struct File {
    lock: RangeLock,
    blocks: [UnsafeCell<u32>; 2],
}

// SAFETY: that the range lock keeps writers alone is what is tested; loom notices if it does not.
unsafe impl Sync for File {}

impl File {
    fn new() -> Arc<File> {
        let file = File { lock: RangeLock::default(), blocks: [UnsafeCell::new(0), UnsafeCell::new(0)] };
        // The stripes come from a cell of `std`, which loom does not see.
        file.lock.stripe(0);
        Arc::new(file)
    }

    fn write(&self, guard: RangeGuard, blocks: Range<usize>) {
        for block in &self.blocks[blocks] {
            // SAFETY: as for `Sync`.
            block.with_mut(|block| unsafe { *block += 1 });
        }
        drop(guard);
    }

    fn read(&self, guard: RangeGuard, block: usize) -> u32 {
        // SAFETY: as for `Sync`.
        let value = self.blocks[block].with(|block| unsafe { *block });
        drop(guard);
        value
    }

    /// Everybody is gone, and left nothing.
    fn end(&self, writes: [u32; 2]) {
        let guard = self.lock.try_lock(0..u64::MAX, Mode::Exclusive).expect("nobody is left");
        for (block, expected) in self.blocks.iter().zip(writes) {
            // SAFETY: as for `Sync`.
            assert_eq!(block.with(|block| unsafe { *block }), expected);
        }
        drop(guard);
        for stripe in &self.lock.stripes.get().expect("made by `new`").0 {
            assert!(stripe.is_empty() && stripe.waiting() == 0, "something is left");
        }
    }
}

#[derive(Default)]
struct Bell(Mutex<bool>, Condvar);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        *self.0.lock().expect("no panic") = true;
        self.1.notify_one();
    }
}

fn poll(request: &mut Pin<Box<Acquire<'_>>>, waker: &Waker) -> Option<RangeGuard> {
    match request.as_mut().poll(&mut Context::from_waker(waker)) {
        Poll::Ready(guard) => Some(guard),
        Poll::Pending => None,
    }
}

fn block_on(mut request: Pin<Box<Acquire<'_>>>) -> RangeGuard {
    let bell = Arc::new(Bell::default());
    let waker = Waker::from(Arc::clone(&bell));
    loop {
        if let Some(guard) = poll(&mut request, &waker) {
            return guard;
        }
        let mut rung = bell.0.lock().expect("no panic");
        while !*rung {
            rung = bell.1.wait(rung).expect("no panic");
        }
        *rung = false;
    }
}

fn take(file: &File, range: Range<u64>, mode: Mode) -> RangeGuard {
    block_on(Box::pin(file.lock.lock(range, mode)))
}

fn spawn(file: &Arc<File>, run: impl FnOnce(&File) + 'static) -> thread::JoinHandle<()> {
    let file = Arc::clone(file);
    thread::spawn(move || run(&file))
}

fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
}

/// Two offsets whose ranges are in different stripes, the first in the earlier one.
fn two_stripes() -> (u64, u64) {
    let at = (1..).find(|&segment| stripe_of(segment) > stripe_of(0)).expect("there are others");
    (0, at << SEGMENT_SHIFT)
}

#[test]
fn two_writers() {
    explore(4, || {
        let file = File::new();
        let other = spawn(&file, |file| file.write(take(file, 0..10, Mode::Exclusive), 0..1));
        file.write(take(&file, 5..15, Mode::Exclusive), 0..1);
        join([other]);
        file.end([2, 0]);
    });
}

#[test]
fn three_writers() {
    explore(3, || {
        let file = File::new();
        let others: [_; 2] = std::array::from_fn(|_| {
            spawn(&file, |file| file.write(take(file, 0..10, Mode::Exclusive), 0..1))
        });
        file.write(take(&file, 0..10, Mode::Exclusive), 0..1);
        join(others);
        file.end([3, 0]);
    });
}

#[test]
fn a_writer_among_readers() {
    explore(3, || {
        let file = File::new();
        let others: [_; 2] = std::array::from_fn(|_| {
            spawn(&file, |file| {
                assert!(file.read(take(file, 0..10, Mode::Shared), 0) <= 1);
            })
        });
        file.write(take(&file, 0..10, Mode::Exclusive), 0..1);
        join(others);
        file.end([1, 0]);
    });
}

/// Nobody waits: the list alone, nodes entered, unlinked and used again.
#[test]
fn neighbours_in_a_list() {
    explore(3, || {
        let file = File::new();
        let other = spawn(&file, |file| {
            file.write(take(file, 0..10, Mode::Exclusive), 0..1);
            file.write(take(file, 0..10, Mode::Exclusive), 0..1);
        });
        file.write(take(&file, 10..20, Mode::Exclusive), 1..2);
        file.write(take(&file, 10..20, Mode::Exclusive), 1..2);
        join([other]);
        file.end([2, 2]);
    });
}

#[test]
fn three_neighbours_in_a_list() {
    explore(3, || {
        let file = File::new();
        let others: [_; 2] = std::array::from_fn(|i| {
            spawn(&file, move |file| {
                let at = 10 + i as u64 * 10;
                drop(take(file, at..at + 10, Mode::Exclusive));
            })
        });
        let first = take(&file, 0..10, Mode::Exclusive);
        drop(take(&file, 30..40, Mode::Shared));
        drop(first);
        join(others);
        file.end([0, 0]);
    });
}

/// Two walk past neighbours that are released in this moment: each is unlinked once, and none comes back.
#[test]
fn walkers_meet() {
    explore(3, || {
        let file = File::new();
        let oldest = take(&file, 0..10, Mode::Exclusive);
        let older = take(&file, 10..20, Mode::Exclusive);
        let newest = take(&file, 20..30, Mode::Exclusive);
        let walkers: [_; 2] = std::array::from_fn(|i| {
            let at = 30 + i as u64 * 10;
            spawn(&file, move |file| drop(take(file, at..at + 10, Mode::Exclusive)))
        });
        drop(oldest);
        drop(older);
        join(walkers);
        drop(newest);
        file.end([0, 0]);
    });
}

/// One gives up while what it waits for is released, and one waits behind it.
#[test]
fn a_waiter_gives_up() {
    explore(3, || {
        let file = File::new();
        let held = take(&file, 0..10, Mode::Exclusive);
        let gives_up = spawn(&file, |file| {
            let mut request = Box::pin(file.lock.lock(0..10, Mode::Exclusive));
            if let Some(guard) = poll(&mut request, Waker::noop()) {
                file.write(guard, 1..2);
            }
        });
        let stays = spawn(&file, |file| file.write(take(file, 0..10, Mode::Exclusive), 0..1));
        file.write(held, 0..1);
        join([gives_up, stays]);
        let mut writes = [2, 0];
        // SAFETY: all others are gone.
        writes[1] = file.blocks[1].with(|block| unsafe { *block });
        file.end(writes);
    });
}

/// A second poll brings another waker while the first is about to be called.
#[test]
fn a_waker_is_exchanged() {
    explore(3, || {
        let file = File::new();
        let held = take(&file, 0..10, Mode::Exclusive);
        let other = spawn(&file, |file| {
            let mut request = Box::pin(file.lock.lock(0..10, Mode::Shared));
            let guard = poll(&mut request, Waker::noop()).unwrap_or_else(|| block_on(request));
            assert_eq!(file.read(guard, 0), 1);
        });
        file.write(held, 0..1);
        join([other]);
        file.end([1, 0]);
    });
}

/// Two that meet in several stripes: were those taken in different orders, both would wait for ever.
#[test]
fn requests_over_several_stripes() {
    explore(3, || {
        let file = File::new();
        let (low, high) = two_stripes();
        let other = spawn(&file, move |file| {
            file.write(take(file, low..high + 10, Mode::Exclusive), 0..2);
        });
        file.write(take(&file, high..u64::MAX, Mode::Exclusive), 1..2);
        join([other]);
        file.end([1, 2]);
    });
}

#[test]
fn of_two_that_try_one_succeeds() {
    explore(4, || {
        let file = File::new();
        let succeeded = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let attempt = |succeeded: &std::sync::atomic::AtomicUsize, file: &File| {
            if let Some(guard) = file.lock.try_lock(0..10, Mode::Exclusive) {
                file.write(guard, 0..1);
                succeeded.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        };
        let count = Arc::clone(&succeeded);
        let other = spawn(&file, move |file| attempt(&count, file));
        attempt(&succeeded, &file);
        join([other]);
        let succeeded = succeeded.load(std::sync::atomic::Ordering::Relaxed);
        assert!(succeeded >= 1);
        file.end([succeeded as u32, 0]);
    });
}
