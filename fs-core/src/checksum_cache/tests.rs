//! Tests of the checksum cache: a model, the bound, threads.

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::mutation::with_broken;

fn seeds(count: u64) -> std::ops::Range<u64> {
    match std::env::var("GAUR_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 1..1 + count,
    }
}

/// Random operations beside a map without bound. Few addresses: nothing is ever evicted, so misses are exact too.
fn model(seed: u64) {
    const BLOCKS: u64 = 2000;
    let mut rng = SmallRng::seed_from_u64(seed);
    let cache = ChecksumCache::new(1 << 20);
    let base = rng.random_range(0..1_u64 << 47);
    let mut model: HashMap<u64, u32> = HashMap::new();
    for _ in 0..3000 {
        let start = rng.random_range(0..BLOCKS);
        let len = rng.random_range(0..200).min(BLOCKS - start);
        let addr = BlockAddr(base + start);
        let sums: Vec<u32> = (0..len).map(|_| rng.random()).collect();
        match rng.random_range(0..4) {
            0 => {
                cache.insert(addr, &sums);
                model.extend((addr.0..).zip(sums));
            }
            1 => {
                cache.fill(addr, &sums);
                for (addr, sum) in (addr.0..).zip(sums) {
                    model.entry(addr).or_insert(sum);
                }
            }
            2 => {
                cache.remove(addr, len as usize);
                model.retain(|at, _| !(addr.0..addr.0 + len).contains(at));
            }
            _ => {
                let mut found = vec![0; len as usize];
                let all = cache.lookup_into(addr, &mut found);
                let want: Option<Vec<u32>> =
                    (addr.0..addr.0 + len).map(|at| model.get(&at).copied()).collect();
                assert_eq!(all.then_some(found), want);
            }
        }
        let probe = BlockAddr(base + rng.random_range(0..BLOCKS));
        assert_eq!(cache.lookup(probe), model.get(&probe.0).copied());
        assert_eq!(cache.present(probe) & 1 == 1, model.contains_key(&probe.0));
        cache.prefetch(probe);
        cache.prefetch_sum(probe);
    }
}

#[test]
fn equals_the_model() {
    for seed in seeds(30) {
        if let Err(panic) = catch_unwind(|| model(seed)) {
            eprintln!("failed with GAUR_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_fill_that_overwrites_is_noticed() {
    let run = || with_broken(Mutation::FillOverwrites, || model(1));
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
}

/// Under eviction a lookup gives the newest or nothing, memory stays in its bound, and what is used stays longer.
#[test]
fn bounded_and_never_wrong() {
    let bytes = 5 * SEGMENT_BYTES;
    let cache = ChecksumCache::new(bytes);
    let mut rng = SmallRng::seed_from_u64(7);
    let hot: Vec<BlockAddr> = (0..100).map(|i| BlockAddr(i * 64 + 3)).collect();
    let (mut hits, mut hot_hits, mut rounds) = (0, 0, 0);
    let sum_of = |addr: u64| (addr.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32;
    for round in 0..200_000_u64 {
        let addr = rng.random_range(0..4 * cache.capacity());
        cache.insert(BlockAddr(addr), &[sum_of(addr), sum_of(addr + 1), sum_of(addr + 2)]);
        let probe = rng.random_range(0..4 * cache.capacity());
        if let Some(sum) = cache.lookup(BlockAddr(probe)) {
            assert_eq!(sum, sum_of(probe));
            hits += 1;
        }
        if round % 200 == 0 {
            for addr in &hot {
                hot_hits += u64::from(cache.lookup(*addr).is_some());
                rounds += 1;
                cache.fill(*addr, &[sum_of(addr.0)]);
            }
        }
    }
    assert!(hits > 0);
    assert!(hot_hits * 10 > rounds * 8, "{hot_hits} of {rounds}");
    assert!(cache.memory_bytes() <= bytes as u64 + 1000);
}

#[test]
fn odd_sizes_and_ends() {
    let cache = ChecksumCache::new(0);
    assert!(cache.capacity() > 0);
    assert!(cache.lookup_into(BlockAddr(5), &mut []));
    assert_eq!(cache.lookup(BlockAddr(u64::MAX)), None);
    cache.insert(BlockAddr(u64::MAX - 1), &[1, 2, 3]);
    assert_eq!(cache.lookup(BlockAddr(u64::MAX)), Some(2));
    cache.remove(BlockAddr(u64::MAX - 70), 200);
    assert_eq!(cache.lookup(BlockAddr(u64::MAX)), None);
}

/// Memory follows the part of the device in use.
#[test]
fn memory_is_taken_as_it_is_used() {
    let cache = ChecksumCache::new(64 << 20);
    assert!(cache.memory_bytes() < 40_000);
    for chunk in 0..32 {
        cache.insert(BlockAddr(chunk * 64), &[1; 64]);
    }
    assert!(cache.memory_bytes() < 40_000 + SEGMENT_BYTES as u64 + 1);
}

type Hook = Box<dyn FnOnce()>;

thread_local! {
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

/// Where a reader has found its chunk and copies nothing yet: runs what a test wants to happen just then, once.
pub(super) fn between_search_and_copy() {
    if let Some(hook) = HOOK.with(|hook| hook.borrow_mut().take()) {
        hook();
    }
}

/// A reader has found chunk A in its way; before it copies, A makes room for B, which takes the same way. The reader must not
/// take B's checksums for A's.
fn replaced_under_the_reader() {
    let cache = Arc::new(ChecksumCache::new(0));
    let (a, b) = (BlockAddr(0), BlockAddr((BUCKETS * CHUNK) as u64));
    cache.insert(a, &[1; CHUNK]);
    let other = Arc::clone(&cache);
    HOOK.with(|hook| {
        *hook.borrow_mut() = Some(Box::new(move || {
            other.remove(a, CHUNK);
            other.insert(b, &[2; CHUNK]);
        }));
    });
    assert_eq!(cache.lookup(a), None);
    assert_eq!(cache.lookup(b), Some(2));
}

#[test]
fn a_reader_notices_a_writer() {
    replaced_under_the_reader();
    let run = || with_broken(Mutation::SumsUnversioned, replaced_under_the_reader);
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
}

/// A reader that finds its bucket being written all the time gives up: a miss, no hang.
#[test]
fn a_reader_never_waits() {
    let cache = ChecksumCache::new(0);
    cache.insert(BlockAddr(0), &[1]);
    let bucket = cache.bucket(0).expect("a bucket that was written");
    bucket.write(|_| assert_eq!(cache.lookup(BlockAddr(0)), None));
    assert_eq!(cache.lookup(BlockAddr(0)), Some(1));
}

/// Writers stamp whole chunks, readers check that they see one stamp.
#[test]
fn no_torn_read() {
    const CHUNKS: u64 = 8;
    let cache = ChecksumCache::new(0);
    let done = AtomicBool::new(false);
    let write = |first: u32| {
        for stamp in 0..60_000_u32 {
            // Ten chunks compete for the seven ways of a bucket.
            let chunk = u64::from(stamp * 7 % 10) * BUCKETS as u64;
            let sums = [stamp * 2 + first; CHUNK];
            cache.insert(BlockAddr(chunk * CHUNK as u64), &sums);
            if stamp % 5 == 0 {
                cache.remove(BlockAddr(chunk * CHUNK as u64), CHUNK);
            }
        }
    };
    let read = || {
        let mut at = 0;
        while !done.load(Ordering::Acquire) {
            at = (at + 1) % CHUNKS;
            let mut sums = [0; CHUNK];
            if cache.lookup_into(BlockAddr(at * (BUCKETS * CHUNK) as u64), &mut sums) {
                assert!(sums.iter().all(|sum| *sum == sums[0]));
            }
        }
    };
    thread::scope(|scope| {
        let readers = [0, 1].map(|_| scope.spawn(read));
        let writers = [0, 1].map(|first| scope.spawn(move || write(first)));
        let written = writers.map(|writer| writer.join());
        done.store(true, Ordering::Release);
        let read = readers.map(|reader| reader.join());
        assert!(written.iter().chain(&read).all(Result::is_ok));
    });
}
