//! The races between the page cache and what goes past it.

use std::sync::Arc;

use bdev_adapter::mem::MemDevice;
use bdev_adapter::wrap::fault::{Effect, Fault, FaultPlan, Target, When};
use bdev_adapter::{Device, IoErrorKind};
use fs_core::{Error, ExtentState, Growth, OpenFlags};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::common::gate::Keep;
use super::common::{self, BLOCK, check, mount, pattern, quiet};
use super::scene::{ONE, Run, Scene, step};

/// Rule 3, fills: a page that was found missing is brought in under the lock that it was looked up with. A fill that holds nothing puts
/// what it read into the cache after a direct write has replaced it, and it is read from there ever after.
#[test]
pub(super) fn a_direct_write_waits_for_a_fill_and_drops_its_page() {
    let scene = Scene::new("a_direct_write_waits_for_a_fill");
    scene.gate.keep(Keep::Reads);
    let mut fill = scene.read(&scene.a, &scene.buffered, 0, ONE);
    assert!(step(&mut fill).is_none(), "the device has not answered");
    let mut write = scene.write(&scene.b, &scene.direct, 0, &pattern(1, ONE));
    let early = step(&mut write);
    scene.gate.keep(Keep::Nothing);
    assert_eq!(step(&mut fill).expect("answered"), pattern(0, ONE));
    if early.is_none() {
        step(&mut write).expect("the range is free").expect("write");
    }
    scene.finds(0, &pattern(1, ONE), "a stale page stayed in the cache");
    assert!(early.is_none(), "a direct write went on amid a fill");
    drop((fill, write));
    scene.end();
}

/// Rule 3, direct writes: pages are looked for once the lock is held. This write waits for the lock while a page comes in that
/// was not there when it began.
#[test]
pub(super) fn a_direct_write_looks_for_pages_once_it_holds_the_range() {
    let scene = Scene::new("a_direct_write_looks_for_pages");
    // Somebody else fills block 1, and holds blocks 0 and 1 meanwhile; block 0 is here already.
    scene.gate.keep(Keep::Reads);
    let mut fill = scene.read(&scene.a, &scene.buffered, 0, 2 * ONE);
    assert!(step(&mut fill).is_none());
    let mut write = scene.write(&scene.b, &scene.direct, BLOCK, &pattern(1, ONE));
    assert!(step(&mut write).is_none(), "the range is held");
    scene.gate.keep(Keep::Nothing);
    assert_eq!(step(&mut fill).expect("answered"), pattern(0, 2 * ONE));
    step(&mut write).expect("the range is free").expect("write");
    scene.finds(BLOCK, &pattern(1, ONE), "a page that came in while the write waited is stale");
    drop((fill, write));
    scene.end();
}

/// Rule 2: a buffered write holds its range from before it reads edges until its pages are dirty. If it let go in between, a direct
/// write would be lost under the edge that was read before it.
#[test]
pub(super) fn a_buffered_write_holds_its_range_until_its_pages_are_dirty() {
    let scene = Scene::new("a_buffered_write_holds_its_range");
    scene.gate.keep(Keep::Reads);
    let mut part = scene.write(&scene.a, &scene.buffered, 100, b"part");
    assert!(step(&mut part).is_none(), "its edge is being read");
    let mut write = scene.write(&scene.b, &scene.direct, 0, &pattern(1, ONE));
    let early = step(&mut write);
    scene.gate.keep(Keep::Nothing);
    step(&mut part).expect("answered").expect("write");
    if early.is_none() {
        step(&mut write).expect("the range is free").expect("write");
    }
    scene.finds(0, &pattern(1, ONE), "a direct write was lost under an old edge");
    drop((part, write));
    scene.end();
}

/// Buffered reads: the view is taken after a page was found missing. This reader waits for its lock while a page gets dirty, is
/// written back and evicted: a view from before that knows the old block only.
#[test]
pub(super) fn a_fill_takes_its_view_after_the_page_was_found_missing() {
    let scene = Scene::new("a_fill_takes_its_view_late");
    scene.gate.keep(Keep::Reads);
    // It writes block 0 and a part of block 1, whose rest it has to read: so it holds both.
    let mut write = scene.write(&scene.a, &scene.buffered, 0, &pattern(1, ONE + 10));
    assert!(step(&mut write).is_none());
    let mut read = scene.read(&scene.b, &scene.buffered, 0, ONE);
    assert!(step(&mut read).is_none(), "the range is held");
    scene.gate.keep(Keep::Nothing);
    step(&mut write).expect("answered").expect("write");
    // The reader has the range now, and has not looked. Shared, as write-back needs it too.
    scene.a.sync_file(&scene.direct).expect("sync");
    scene.fs().set_cache_bytes(0);
    assert_eq!(scene.fs().stats().page_cache_bytes, 0);
    assert_eq!(step(&mut read).expect("free"), pattern(1, ONE), "a read went to a block of the past");
    drop((read, write));
    scene.end();
}

/// The same for a direct read: it looks for newer pages, and then whether its view is still the current one. Here a view is
/// old by the time that its extents are loaded.
#[test]
pub(super) fn a_direct_read_sees_pages_in_every_state() {
    let scene = Scene::new("a_direct_read_sees_pages");
    scene.a.write(&scene.buffered, 0, &pattern(1, ONE)).expect("write");
    scene.finds(0, &pattern(1, ONE), "dirty");
    // In flight: the device has not answered the write.
    scene.gate.keep(Keep::Writes);
    let mut sync: Run<'_, _> = Box::pin(scene.a.sync_file_async(&scene.direct));
    assert!(step(&mut sync).is_none());
    assert_eq!(scene.direct.accounting().writeback_bytes, BLOCK);
    let mut read = scene.read(&scene.b, &scene.direct, 0, ONE);
    assert_eq!(step(&mut read).expect("from memory"), pattern(1, ONE), "in flight");
    // Written again while it is in flight: the flight has the old page, the cache the new one.
    let mut again = scene.write(&scene.b, &scene.buffered, 0, &pattern(2, ONE));
    step(&mut again).expect("a buffered write waits for no flight").expect("write");
    assert_eq!(scene.direct.accounting().delalloc_bytes, BLOCK);
    // A direct write waits for the flight and for the write-back of what is newer.
    let mut direct = scene.write(&scene.b, &scene.direct, 0, &pattern(3, ONE));
    assert!(step(&mut direct).is_none(), "a direct write went past an ordered extent");
    scene.gate.keep(Keep::Nothing);
    step(&mut sync).expect("answered").expect("sync");
    step(&mut direct).expect("free").expect("write");
    scene.finds(0, &pattern(3, ONE), "after all of it");
    drop((sync, read, again, direct));
    scene.end();
}

/// Two direct appends, of which the second, of `data` at block 32, is finished before the first, of blocks 16 to 32, which is returned;
/// then a commit.
fn commit_amid_appends<'s>(scene: &'s Scene, data: &[u8]) -> Run<'s, Result<(), Error>> {
    let other = scene.a.open("other", OpenFlags::CREATE).expect("open");
    scene.gate.keep(Keep::Writes);
    let mut first = scene.write(&scene.a, &scene.direct, 16 * BLOCK, &pattern(1, 16 * ONE));
    assert!(step(&mut first).is_none());
    // The gate keeps what was sent while it was closed; the rest goes on.
    scene.gate.keep(Keep::Reads);
    let mut second = scene.write(&scene.b, &scene.direct, 32 * BLOCK, data);
    step(&mut second).expect("answered").expect("write");
    let mut commit: Run<'_, _> = Box::pin(scene.b.sync_file_async(&other));
    step(&mut commit).expect("it has no part in it").expect("sync");
    first
}

/// Rule 3, size on disk: of two direct appends the second is finished and the first is not. A commit must not store a size
/// that covers the first; a sync of the file must wait for it.
#[test]
pub(super) fn a_commit_stores_no_size_that_covers_an_unfinished_write() {
    let scene = Scene::new("a_commit_stores_no_size");
    let mut first = commit_amid_appends(&scene, &pattern(2, 16 * ONE));
    assert_eq!(scene.direct.size(), 48 * BLOCK, "readers see it");
    // The power fails here.
    let crashed: Arc<dyn Device> = MemDevice::from_image(&scene.memory.snapshot()).expect("a device");
    let mut sync: Run<'_, _> = Box::pin(scene.b.sync_file_async(&scene.direct));
    assert!(step(&mut sync).is_none(), "what the sync is to save lies behind an unfinished write");
    scene.gate.keep(Keep::Nothing);
    step(&mut first).expect("answered").expect("write");
    step(&mut sync).expect("both are there").expect("sync");
    drop((first, sync));
    let synced: Arc<dyn Device> = MemDevice::from_image(&scene.memory.snapshot()).expect("a device");
    scene.end();

    let fs = mount(&crashed, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", OpenFlags::READ_WRITE).expect("open");
    assert_eq!(file.size(), 16 * BLOCK, "the size covers what is not there");
    // And what lies behind it does not come back.
    channel.truncate(&file, 64 * BLOCK).expect("truncate");
    let mut found = vec![1; 48 * ONE];
    channel.read(&file, 16 * BLOCK, &mut found).expect("read");
    assert!(found.iter().all(|byte| *byte == 0), "content beyond the size came back");
    check(&fs, &channel);
    let fs = mount(&synced, &quiet());
    let channel = fs.channel().expect("channel");
    assert_eq!(channel.open("f", OpenFlags::READ_ONLY).expect("open").size(), 48 * BLOCK);
    check(&fs, &channel);
}

/// After such a crash: recovery has cut the file, and its inode waits for the next commit. Who opens it and appends must find all of that
/// after the next crash, the counts of its extents included; and blocks that were preallocated behind the end are still there.
#[test]
pub(super) fn what_recovery_has_cut_can_be_synced() {
    let scene = Scene::new("what_recovery_has_cut_can_be_synced");
    scene.a.preallocate(&scene.direct, 64 * BLOCK, 8 * BLOCK, Growth::Keep).expect("preallocate");
    scene.a.sync().expect("sync");
    let mut first = commit_amid_appends(&scene, &pattern(2, 16 * ONE));
    let crashed = MemDevice::from_image(&scene.memory.snapshot()).expect("a device");
    scene.gate.keep(Keep::Nothing);
    step(&mut first).expect("answered").expect("write");
    drop(first);
    scene.end();

    let device: Arc<dyn Device> = Arc::clone(&crashed) as Arc<dyn Device>;
    let fs = mount(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", OpenFlags::READ_WRITE).expect("open");
    assert_eq!((file.name(), file.size()), (b"f".to_vec(), 16 * BLOCK));
    let extents = channel.extents(&file, 0, u64::MAX).map(|extent| extent.expect("an extent"));
    let kept: Vec<_> = extents.filter(|extent| extent.state == ExtentState::Preallocated).collect();
    assert_eq!((kept.len(), kept[0].offset, kept[0].len), (1, 64 * BLOCK, 8 * BLOCK), "a promise was broken");
    channel.append(&file, &pattern(3, ONE)).expect("append");
    channel.sync_file(&file).expect("sync");
    let crashed: Arc<dyn Device> = MemDevice::from_image(&crashed.snapshot()).expect("a device");
    let fs = mount(&crashed, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", OpenFlags::READ_ONLY).expect("open");
    let mut found = vec![0; ONE];
    assert_eq!(file.size(), 17 * BLOCK, "a synced append is lost");
    channel.read(&file, 16 * BLOCK, &mut found).expect("read");
    assert!(found == pattern(3, ONE));
    check(&fs, &channel);
}

/// The first of two appends fails: the second, which a commit could not cover until then, must become durable all the same.
#[test]
pub(super) fn a_failed_write_does_not_hold_the_size_back_for_ever() {
    a_failed_write("a_failed_write_does_not_hold", |_| {});
}

/// The same if its blocks were preallocated: they stay with the file, so nothing is given back that a commit would notice.
#[test]
pub(super) fn a_failed_first_write_does_not_hold_the_size_back_for_ever() {
    a_failed_write("a_failed_first_write_does_not_hold", |scene| {
        scene.a.preallocate(&scene.direct, 16 * BLOCK, 16 * BLOCK, Growth::Keep).expect("preallocate");
    });
}

fn a_failed_write(name: &str, prepare: impl FnOnce(&Scene)) {
    let scene = Scene::new(name);
    prepare(&scene);
    let eio = Effect::Error(IoErrorKind::Os(5));
    scene.fault.set_plan(FaultPlan::new(1, vec![Fault::new(Target::Writes, When::Nth(1), eio)]));
    let mut first = commit_amid_appends(&scene, &pattern(2, ONE));
    scene.gate.keep(Keep::Nothing);
    step(&mut first).expect("answered").expect_err("the device said no");
    let mut sync: Run<'_, _> = Box::pin(scene.b.sync_file_async(&scene.direct));
    step(&mut sync).expect("nothing is under way").expect("sync");
    drop((first, sync));
    let crashed: Arc<dyn Device> = MemDevice::from_image(&scene.memory.snapshot()).expect("a device");
    let fs = mount(&crashed, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("f", OpenFlags::READ_ONLY).expect("open");
    assert_eq!(file.size(), 33 * BLOCK);
    let mut found = vec![1; ONE];
    channel.read(&file, 32 * BLOCK, &mut found).expect("read");
    assert_eq!(found, pattern(2, ONE));
    check(&fs, &channel);
    scene.end();
}

/// A truncate waits for what is in flight beyond the new end, and drops what is dirty there.
#[test]
pub(super) fn a_truncate_waits_for_flights_and_discards_what_is_dirty() {
    let scene = Scene::new("a_truncate_waits");
    scene.a.write(&scene.buffered, 0, &pattern(1, 16 * ONE)).expect("write");
    scene.gate.keep(Keep::Writes);
    let mut sync: Run<'_, _> = Box::pin(scene.a.sync_file_async(&scene.direct));
    assert!(step(&mut sync).is_none());
    let mut again = scene.write(&scene.b, &scene.buffered, 8 * BLOCK, &pattern(2, 8 * ONE));
    step(&mut again).expect("it waits for no flight").expect("write");
    let mut truncate: Run<'_, _> = Box::pin(scene.b.truncate_async(&scene.direct, 4 * BLOCK + 10));
    assert!(step(&mut truncate).is_none(), "it went past a flight");
    scene.gate.keep(Keep::Nothing);
    step(&mut sync).expect("answered").expect("sync");
    step(&mut truncate).expect("free").expect("truncate");
    scene.a.truncate(&scene.direct, 16 * BLOCK).expect("truncate");
    let mut expected = pattern(1, 16 * ONE);
    expected[4 * ONE + 10..].fill(0);
    scene.finds(0, &expected, "after the truncate");
    drop((sync, again, truncate));
    scene.end();
}

/// Buffered writes inside units of 64 KiB, some of which get to the device before others, and crashes at any moment: each unit is as it
/// was after some write to it, whole, and not older than its last sync.
#[test]
pub(super) fn a_unit_is_whole_after_a_crash() {
    const UNIT: u64 = 16 * BLOCK;
    const UNITS: u64 = 12;
    let seed = common::seed("a_unit_is_whole");
    let mut rng = SmallRng::seed_from_u64(seed);
    for round in 0..6 {
        let scene = Scene::new("a_unit_is_whole");
        let other = scene.a.open("other", OpenFlags::CREATE).expect("open");
        let file = scene.a.open("units", OpenFlags::CREATE | OpenFlags::BUFFERED).expect("open");
        let old = vec![0; (UNITS * UNIT) as usize];
        scene.a.write(&file, 0, &old).expect("write");
        scene.a.sync().expect("sync");
        // What each unit has been, and which of that is the least that must be there.
        let mut history = vec![vec![vec![0u8; UNIT as usize]]; UNITS as usize];
        let mut synced = vec![0; UNITS as usize];
        let mut images = Vec::new();
        let mut under_way: Option<Run<'_, Result<(), Error>>> = None;
        for tag in 1..200u8 {
            let unit = rng.random_range(0..UNITS);
            let from = rng.random_range(0..UNIT);
            let len = rng.random_range(1..=UNIT - from);
            let data = vec![tag; len as usize];
            let mut write = scene.write(&scene.a, &file, unit * UNIT + from, &data);
            step(&mut write).expect("it waits for nobody").expect("write");
            let mut state = history[unit as usize].last().expect("a state").clone();
            state[from as usize..][..len as usize].copy_from_slice(&data);
            history[unit as usize].push(state);
            match rng.random_range(0..12) {
                0 => {
                    // A flight that stays in the air over the next writes and commits.
                    let (at, len) = (rng.random_range(0..UNITS) * UNIT, rng.random_range(1..4 * UNIT));
                    scene.gate.keep(Keep::Writes);
                    let mut run: Run<'_, _> = Box::pin(scene.b.sync_range_async(&file, at, len));
                    let ended = step(&mut run);
                    scene.gate.keep(Keep::Reads);
                    if ended.is_none() {
                        under_way = Some(run);
                    }
                }
                1 => {
                    let mut commit: Run<'_, _> = Box::pin(scene.a.sync_file_async(&other));
                    let _ = step(&mut commit);
                    scene.gate.keep(Keep::Nothing);
                    scene.a.sync_file(&other).expect("sync");
                }
                2 => {
                    scene.gate.keep(Keep::Nothing);
                    if let Some(mut run) = under_way.take() {
                        step(&mut run).expect("answered").expect("sync");
                    }
                    let unit = rng.random_range(0..UNITS);
                    scene.a.sync_range(&file, unit * UNIT, UNIT).expect("sync");
                    synced[unit as usize] = history[unit as usize].len() - 1;
                }
                3 => images.push((scene.memory.snapshot(), synced.clone(), history.clone())),
                _ => {}
            }
        }
        scene.gate.keep(Keep::Nothing);
        if let Some(mut run) = under_way.take() {
            step(&mut run).expect("answered").expect("sync");
        }
        images.push((scene.memory.snapshot(), synced, history));
        drop((file, other, under_way));
        scene.end();
        for (image, synced, history) in images {
            let device: Arc<dyn Device> = MemDevice::from_image(&image).expect("a device");
            let fs = mount(&device, &quiet());
            let channel = fs.channel().expect("channel");
            check(&fs, &channel);
            let file = channel.open("units", OpenFlags::READ_ONLY).expect("open");
            let mut found = vec![0; (UNITS * UNIT) as usize];
            assert_eq!(channel.read(&file, 0, &mut found).expect("read"), found.len());
            for (unit, found) in found.chunks(UNIT as usize).enumerate() {
                let states = &history[unit][synced[unit]..];
                assert!(
                    states.iter().any(|state| state == found),
                    "round {round}: unit {unit} is in pieces, or old"
                );
            }
        }
    }
}
