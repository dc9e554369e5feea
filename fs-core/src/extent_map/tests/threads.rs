//! Real threads: every view is whole.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::*;

/// Three places of the file that every write changes together.
const PLACES: [u64; 3] = [7, 3000, 59_999];
/// Tags are this far apart on the device.
const STRIDE: u64 = 1 << 20;

/// Two writers publish tagged writes of three extents and a size; readers check that they never see parts of two writes.
/// Returns how often they did.
fn torn_views(rule: Option<Mutation>, writes: u64) -> u64 {
    let map = ExtentMap::new_empty();
    settle(&map, &[data(0, 60_000, 0)]);
    let tag = AtomicU64::new(1);
    let (done, torn) = (AtomicBool::new(false), AtomicU64::new(0));
    // The size never shrinks by a publication, so tags are published in their order.
    let order = parking_lot::Mutex::new(());
    let write_one = || {
        let _turn = order.lock();
        let tag = tag.fetch_add(1, Ordering::Relaxed);
        let extents = PLACES.map(|block| data(block, 1, tag * STRIDE + block));
        map.publish(PublishWrite { extents: &extents, size: Some(tag) });
        map.unpin(&extents, &mut no_sink);
    };
    write_one();
    let write = || {
        for round in 0..writes {
            match rule {
                Some(rule) => with_broken(rule, write_one),
                None => write_one(),
            }
            // Others change the tree around them.
            settle(&map, &[data((round * 7919) % 60_000 / 10 * 10, 1, STRIDE * STRIDE + 2 * round)]);
        }
    };
    let read = || {
        let mut last = FileVersion(0);
        while !done.load(Ordering::Acquire) {
            let guard = pin();
            let view = map.view(&guard);
            assert!(view.version() >= last, "versions go backwards");
            last = view.version();
            let mut entries = [Entry::EMPTY; 3];
            view.lookup_batch(&PLACES.map(FileBlock), &mut entries);
            let whole = PLACES.iter().zip(&entries).all(|(block, entry)| {
                assert_eq!(entry, &view.lookup(FileBlock(*block)));
                let addr = entry.data_addr(FileBlock(*block)).expect("data");
                addr.0 / STRIDE == view.size() && addr.0 % STRIDE == *block
            });
            torn.fetch_add(u64::from(!whole), Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        let readers = [scope.spawn(read), scope.spawn(read)];
        let writers = [scope.spawn(write), scope.spawn(write)];
        let written = writers.map(|writer| writer.join());
        done.store(true, Ordering::Release);
        let read = readers.map(|reader| reader.join());
        assert!(written.iter().chain(&read).all(Result::is_ok));
    });
    map.check().unwrap();
    assert_eq!(map.view(&pin()).stats().pinned, 0);
    torn.into_inner()
}

#[test]
fn every_view_is_whole() {
    assert_eq!(torn_views(None, 5000), 0);
}

#[test]
fn torn_views_are_noticed() {
    for rule in [Mutation::PublishPiecemeal, Mutation::SizeAfterMappings] {
        assert!((0..20).any(|_| torn_views(Some(rule), 5000) > 0), "{rule:?}");
    }
}

/// Writers, loaders and eviction on real threads, against one small file whose tree is a vector under a lock. No reader may see
/// a block go back in time.
#[test]
fn loaders_never_bring_back_the_past() {
    const BLOCKS: u64 = 256;
    let map = ExtentMap::new_unloaded(BLOCKS << 12);
    // Addresses grow with each write of a block: block + BLOCKS * round.
    let tree = parking_lot::RwLock::new((0..BLOCKS).collect::<Vec<u64>>());
    let done = AtomicBool::new(false);
    let load = |range: BlockRange| {
        let ticket = map.load_ticket();
        let tree = tree.read();
        let found: Vec<NewExtent> =
            (range.start().0..range.end().0).map(|block| data(block, 1, tree[block as usize])).collect();
        drop(tree);
        map.load(range, ticket, &found, &mut no_sink).unwrap();
    };
    let write = || {
        for i in 0..20_000_u64 {
            let block = i * 31 % BLOCKS;
            let extent = data(block, 1, block + BLOCKS * (i / BLOCKS + 1));
            publish(&map, &[extent]);
            if i % 64 == 0 {
                thread::yield_now();
            }
            if let Mapping::Data { addr, .. } = extent.mapping {
                tree.write()[block as usize] = addr.0;
            }
            map.unpin(&[extent], &mut no_sink);
            if i % 3 == 0 {
                map.evict(1000);
            }
        }
        done.store(true, Ordering::Release);
    };
    let read = |first: u64| {
        let mut last = vec![0; BLOCKS as usize];
        let mut block = first;
        while !done.load(Ordering::Acquire) {
            block = (block + 97) % BLOCKS;
            let found = lookup(&map, block).data_addr(FileBlock(block));
            match found {
                None => load(blocks(block.saturating_sub(3), (block + 5).min(BLOCKS))),
                Some(addr) => {
                    let newest = &mut last[block as usize];
                    assert!(addr.0 >= *newest && addr.0 % BLOCKS == block, "block {block} went back");
                    *newest = addr.0;
                }
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| read(0));
        scope.spawn(|| read(50));
        scope.spawn(write);
    });
    map.check().unwrap();
}
