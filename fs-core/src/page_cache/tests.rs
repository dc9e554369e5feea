//! The cache by itself, with files that have no filesystem under them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::records::inodes::Inode;
use crate::types::{BLOCK_SHIFT, Generation};

fn file(cache: &Arc<PageCache>, id: u64) -> (Arc<FileInner>, Arc<FilePages>) {
    let inode = Inode::new(Generation(1));
    let file = Arc::new(FileInner::new(InodeId(id), b"f", inode, true));
    let pages = file.pages_in(cache).clone();
    (file, pages)
}

fn page(byte: u8) -> Page {
    Page::copied(&[byte; BLOCK_SIZE])
}

fn look(pages: &FilePages, block: u64) -> Option<u8> {
    let mut found = Vec::new();
    pages.look_up(block..block + 1, &mut found);
    found[0].as_ref().map(|page| page[0])
}

/// Writes whole pages from `at` on, with the reservation that nobody checks here.
fn write(file: &Arc<FileInner>, pages: &FilePages, at: u64, bytes: &[u8], size: u64) -> u64 {
    let mut new: Vec<_> =
        (at..).zip(bytes).map(|(at, byte)| NewPage::Whole { at, page: page(*byte) }).collect();
    let end = (at + bytes.len() as u64) << BLOCK_SHIFT;
    pages.write(file, &mut new, end, size, || true).expect("whole pages need no base")
}

#[test]
fn a_page_in_flight_keeps_its_content_and_a_newer_one_stays_dirty() {
    let cache = Arc::new(PageCache::new(1 << 20));
    let (file, pages) = file(&cache, 1);
    assert_eq!(write(&file, &pages, 3, &[1, 2], 0), 2);
    let batch = pages.begin_writeback(0..1);
    assert_eq!((batch.pages.len(), batch.bound, batch.end), (2, 3 << 12, 5 << 12));
    let mut part = [NewPage::Part { at: 3, skip: 0, bytes: &[9], base: None }];
    assert_eq!(pages.write(&file, &mut part, (3 << 12) + 1, 5 << 12, || true), Ok(1));
    assert_eq!(batch.pages[0].1[0], 1, "a page changed under a flight");
    pages.end_writeback(&file, &batch);
    let counts = pages.counts();
    assert_eq!((counts.dirty, counts.writeback, counts.pool), (1, 0, 1));
    assert_eq!(look(&pages, 3), Some(9));
    assert_eq!(pages.bound(), NO_BOUND, "an overwrite holds no size back");
    assert_eq!(pages.discard(&file, &(0..100)), 1);
    assert!(!pages.is_busy() && cache.dirty_files().is_empty());
    assert_eq!(cache.resident_bytes(), 0);
}

const NO_BOUND: u64 = u64::MAX;

#[test]
fn a_failed_flight_is_dirty_again_and_superseded_pages_are_counted_once() {
    let cache = Arc::new(PageCache::new(1 << 20));
    let (file, pages) = file(&cache, 1);
    write(&file, &pages, 0, &[1, 2, 3], 0);
    let batch = pages.begin_writeback(0..1);
    assert_eq!(write(&file, &pages, 1, &[7], 3 << 12), 1);
    assert_eq!(pages.fail_writeback(&file, &batch), 2, "page 1 has a reservation of its own already");
    let counts = pages.counts();
    assert_eq!((counts.dirty, counts.writeback, counts.pool), (3, 0, 3));
    assert_eq!(pages.bound(), 0, "the size may not cover what did not arrive");
    assert_eq!(look(&pages, 1), Some(7));
    assert_eq!(pages.discard(&file, &(0..16)), 3);
}

#[test]
fn dirty_pages_and_pages_in_flight_are_never_evicted() {
    let cache = Arc::new(PageCache::new(64 << 12));
    let (file, pages) = file(&cache, 1);
    write(&file, &pages, 0, &[5; 16], 0);
    write(&file, &pages, 16, &[6; 16], 16 << 12);
    let batch = pages.begin_writeback(1..2);
    for unit in 10..60u64 {
        pages.insert(&file, unit * 16, &vec![page(1); 16], true);
    }
    assert!((0..16).all(|block| look(&pages, block) == Some(5)), "a dirty page was evicted");
    assert!((16..32).all(|block| look(&pages, block) == Some(6)), "a page in flight was evicted");
    assert!(cache.resident_bytes() <= 64 << 12);
    pages.end_writeback(&file, &batch);
    cache.set_limit_bytes(0);
    assert_eq!(look(&pages, 16), None, "a clean page stayed without any room");
    assert_eq!(cache.resident_bytes(), 16 << 12);
    pages.discard(&file, &(0..16));
}

#[test]
fn a_scan_does_not_wash_out_what_is_used() {
    let cache = Arc::new(PageCache::new((100 * 16) << 12));
    let (file, pages) = file(&cache, 1);
    for unit in 0..20u64 {
        pages.insert(&file, unit * 16, &vec![page(1); 16], true);
    }
    // Used again, page by page.
    for block in 0..20 * 16 {
        look(&pages, block);
    }
    for unit in 1000..3000u64 {
        pages.insert(&file, unit * 16, &vec![page(2); 16], false);
        for slot in 0..16 {
            look(&pages, unit * 16 + slot);
        }
        assert!(cache.resident_bytes() <= (100 * 16) << 12, "the cache is larger than it may be");
    }
    let kept = (0..20 * 16).filter(|block| look(&pages, *block).is_some()).count();
    assert!(kept >= 300, "{kept} of 320 used pages are left after a scan");
    let (listed, ghosts) = cache.queues.lock().counts();
    assert!(listed <= 101 && ghosts <= 101, "{listed} units and {ghosts} names are listed");
}

#[test]
fn low_priority_goes_first_and_high_stays() {
    let cache = Arc::new(PageCache::new((30 * 16) << 12));
    let files: Vec<_> = (0..3).map(|id| file(&cache, id)).collect();
    files[0].0.set_priority(Priority::Low);
    files[2].0.set_priority(Priority::High);
    for unit in 0..10u64 {
        for (file, pages) in &files {
            pages.insert(file, unit * 16, &vec![page(1); 16], true);
        }
    }
    let left =
        |n: usize| (0..160).filter(|block| files[n].1.first_missing(*block..block + 1).is_none()).count();
    cache.set_limit_bytes((20 * 16) << 12);
    assert_eq!((left(0), left(1), left(2)), (0, 160, 160));
    cache.set_limit_bytes((12 * 16) << 12);
    assert_eq!(left(2), 160, "a page of high priority went before others");
}

#[test]
fn units_that_come_and_go_leave_nothing_in_the_queues() {
    let cache = Arc::new(PageCache::new(1 << 30));
    let (file, pages) = file(&cache, 1);
    for round in 0..10_000u64 {
        pages.insert(&file, round % 7 * 16, &[page(1)], true);
        assert!(pages.drop_clean(&(0..1000)));
    }
    let (listed, _) = cache.queues.lock().counts();
    assert!(listed <= 200, "{listed} entries for nothing");
    assert_eq!(cache.resident.load(Ordering::Relaxed), 0);
}
