//! Tests of the DMA memory pool.

use std::collections::HashMap;
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::central::CLASSES;
use super::*;
use crate::DmaBuf;

fn pool(limit: usize, keep_idle: usize) -> Arc<Pool<MapArenas>> {
    Arc::new(Pool::new(MapArenas, PoolOptions { limit, keep_idle }))
}

fn alloc(pool: &Arc<Pool<MapArenas>>, len: usize) -> Result<DmaBuf, Error> {
    let source: Arc<dyn DmaSource> = pool.clone();
    DmaBuf::new(&source, len)
}

#[test]
fn classes_cover_their_sizes() {
    assert_eq!(class_of(1), Some(0));
    assert_eq!(class_of(4096), Some(0));
    assert_eq!(class_of(4097), Some(1));
    assert_eq!(class_of(MAX_BLOCK), Some(CLASSES - 1));
    assert_eq!(class_of(MAX_BLOCK + 1), None);
    for class in 0..CLASSES {
        assert_eq!(class_of(class_len(class)), Some(class));
    }
}

#[test]
fn blocks_are_aligned_to_their_size_and_do_not_overlap() {
    let pool = pool(1 << 30, 0);
    let mut bufs = Vec::new();
    for len in [1, 4096, 5000, 8192, 65536, 65537, 1 << 20, (1 << 20) + 1, 3 << 20] {
        for _ in 0..9 {
            let mut buf = alloc(&pool, len).unwrap();
            let align = len.next_power_of_two().clamp(MIN_BLOCK, MAX_BLOCK);
            assert_eq!(buf.as_ptr() as usize % align, 0, "{len}");
            let mark = bufs.len() as u8;
            buf.fill(mark);
            bufs.push(buf);
        }
    }
    for (number, buf) in bufs.iter().enumerate() {
        assert!(buf.iter().all(|byte| *byte == number as u8));
    }
    assert_eq!(pool.stats().allocations, bufs.len());
    drop(bufs);
    assert_eq!(pool.stats().allocations, 0);
    pool.trim();
    assert_eq!(pool.stats(), PoolStats { arena_bytes: 0, idle_bytes: 0, allocations: 0 });
    assert!(pool.retired() > 0);
}

#[test]
fn the_limit_holds_and_other_classes_memory_is_found() {
    let pool = pool(2 * ARENA_LEN, 2 * ARENA_LEN);
    // Use everything up in 4 KiB blocks, let them go (magazines and idle arenas keep them), then ask for a large one.
    let small: Vec<_> = (0..1024).map(|_| alloc(&pool, 4096).unwrap()).collect();
    let refused = alloc(&pool, 4096);
    assert!(matches!(refused, Err(Error::NoMemory { .. })), "{refused:?}");
    drop(small);
    let large = alloc(&pool, 2 * ARENA_LEN).unwrap();
    assert!(alloc(&pool, 4096).is_err());
    drop(large);
    alloc(&pool, 4096).unwrap();
    assert!(alloc(&pool, usize::MAX).is_err());
}

#[test]
fn idle_memory_goes_back() {
    let pool = pool(1 << 30, ARENA_LEN);
    let bufs: Vec<_> = (0..32).map(|_| alloc(&pool, 1 << 20).unwrap()).collect();
    assert_eq!(pool.stats().arena_bytes, 16 * ARENA_LEN);
    drop(bufs);
    assert_eq!(pool.stats(), PoolStats { arena_bytes: ARENA_LEN, idle_bytes: ARENA_LEN, allocations: 0 });
}

#[test]
fn a_token_names_its_arena_until_it_is_given_back() {
    let pool = pool(1 << 30, 0);
    let other = self::pool(1 << 30, 0);
    let buf = alloc(&pool, 1 << 20).unwrap();
    let token = ArenaToken::from_raw(buf.token());
    let arena = pool.arena(token).unwrap();
    let (start, at) = (arena.ptr.as_ptr() as usize, buf.as_ptr() as usize);
    assert!(start <= at && at + buf.len() <= start + arena.len);
    let _same_slot = alloc(&other, 1 << 20).unwrap();
    assert!(other.arena(token).is_none(), "tokens of two pools coincide");
    drop(buf);
    assert!(pool.arena(token).is_none());
    let again = alloc(&pool, 1 << 20).unwrap();
    assert_ne!(again.token(), token.0);
    assert_eq!(ArenaToken::from_raw(again.token()).slot(), token.slot());
}

#[test]
fn random_use_by_several_threads() {
    let seed = crate::test_util::seed();
    let pool = pool(1 << 30, 4 * ARENA_LEN);
    let (give, take) = std::sync::mpsc::channel::<DmaBuf>();
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (pool, give) = (pool.clone(), give.clone());
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(seed.wrapping_add(thread));
                let mut held: HashMap<u64, DmaBuf> = HashMap::new();
                for number in 0..4000u64 {
                    let len = 1usize << rng.random_range(8..23);
                    let mut buf = alloc(&pool, len).unwrap();
                    let mark = number ^ thread << 32;
                    buf[..8].copy_from_slice(&mark.to_le_bytes());
                    held.insert(mark, buf);
                    if held.len() > 40 {
                        let key = *held.keys().nth(rng.random_range(0..held.len())).unwrap();
                        let buf = held.remove(&key).unwrap();
                        assert_eq!(buf[..8], key.to_le_bytes());
                        if rng.random_bool(0.5) {
                            give.send(buf).unwrap();
                        }
                    }
                }
                for (key, buf) in held {
                    assert_eq!(buf[..8], key.to_le_bytes());
                }
            });
        }
        drop(give);
        // Buffers are also released by a thread that did not allocate them.
        for buf in take {
            drop(buf);
        }
    });
    assert_eq!(pool.stats().allocations, 0);
    pool.trim();
    assert_eq!(pool.stats().arena_bytes, 0);
}
