//! Random schedules of whole lives of requests: taken, tried, waited for, given up, over one stripe and over all of them. Nodes are
//! recycled as early as they may be. Shuttle notices when all threads wait.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test --release -p fs-core --lib range_lock`, with a build directory of its own. `GAUR_SEED=N`
//! replays, `GAUR_STEPS=N` sets the number of schedules.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner, thread};

use super::*;

/// Blocks of the checker: half of them in one segment, half in one of another stripe.
const BLOCKS: usize = 6;

fn offset(block: usize) -> u64 {
    ((block / 3) as u64) << SEGMENT_SHIFT | (block % 3) as u64
}

#[derive(Default)]
struct File {
    lock: RangeLock,
    /// Who is in each block: -1 a writer, n readers. Not shuttle's: no point at which it may switch.
    blocks: [AtomicI32; BLOCKS],
}

impl File {
    fn inside(&self, blocks: Range<usize>, mode: Mode) {
        let change = if mode == Mode::Shared { 1 } else { -1 };
        for block in &self.blocks[blocks.clone()] {
            let before = block.fetch_add(change, Ordering::Relaxed);
            assert!(before == 0 || (before > 0 && mode == Mode::Shared), "{mode:?} beside {before}");
        }
        thread::yield_now();
        for block in &self.blocks[blocks] {
            block.fetch_sub(change, Ordering::Relaxed);
        }
    }
}

fn one_request(file: &File) {
    let mut rng = thread_rng();
    let first = rng.gen_range(0..BLOCKS);
    let end = rng.gen_range(first + 1..BLOCKS + 1);
    let mode = if rng.r#gen::<bool>() { Mode::Shared } else { Mode::Exclusive };
    let (blocks, bytes) = match rng.gen_range(0..8) {
        0 => (first..BLOCKS, offset(first)..u64::MAX),
        _ => (first..end, offset(first)..offset(end - 1) + 1),
    };
    let once = |request: &mut Pin<Box<Acquire<'_>>>| match request
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(guard) => Some(guard),
        Poll::Pending => None,
    };
    let mut request = Box::pin(file.lock.lock(bytes.clone(), mode));
    let guard = match rng.gen_range(0..6) {
        0 => file.lock.try_lock(bytes, mode),
        1 => once(&mut request),
        2 => once(&mut request).or_else(|| {
            thread::yield_now();
            once(&mut request)
        }),
        3 => once(&mut request).or_else(|| Some(shuttle::future::block_on(request))),
        _ => Some(shuttle::future::block_on(request)),
    };
    if let Some(guard) = guard {
        file.inside(blocks, mode);
        drop(guard);
    }
}

fn lives(threads: usize, requests: usize) {
    let file = Arc::new(File::default());
    let threads: Vec<_> = (0..threads)
        .map(|_| {
            let file = Arc::clone(&file);
            thread::spawn(move || (0..requests).for_each(|_| one_request(&file)))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    drop(file.lock.try_lock(0..u64::MAX, Mode::Exclusive).expect("nobody is left"));
    for stripe in &file.lock.stripes.get().expect("used").0 {
        assert!(stripe.is_empty() && stripe.waiting() == 0, "something is left");
    }
}

fn schedules(default: usize) -> usize {
    std::env::var("GAUR_STEPS").map_or(default, |steps| steps.parse().expect("GAUR_STEPS is a number"))
}

fn seed() -> u64 {
    let seed = match std::env::var("GAUR_SEED") {
        Ok(text) => text.parse().expect("GAUR_SEED is a number"),
        Err(_) => RandomState::new().hash_one("range lock"),
    };
    println!("GAUR_SEED={seed}");
    seed
}

#[test]
fn random_schedules() {
    let scheduler = RandomScheduler::new_from_seed(seed(), schedules(20_000));
    Runner::new(scheduler, Config::new()).run(|| lives(4, 4));
}

/// Few switches at the worst places.
#[test]
fn schedules_of_few_switches() {
    let scheduler = PctScheduler::new_from_seed(seed(), 3, schedules(20_000));
    Runner::new(scheduler, Config::new()).run(|| lives(3, 4));
}
