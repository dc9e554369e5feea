//! Rules 2 and 4: what is done under a range lock is done before it is given up; and what an operation holds is given back exactly once,
//! on each way out.

use bdev_adapter::wrap::fault::{Target, When};
use fs_core::{Error, OpenFlags};

use super::common::gate::Keep;
use super::common::{BLOCK, MIB, pattern};
use super::scene::{ONE, Run, Scene, step};
use crate::mutation::{Point, forget_act};

/// Two threads append. If the first unlocked before the file had grown, the second would find the old end, and write over it.
#[test]
pub(super) fn two_appenders_never_get_the_same_place() {
    let scene = Scene::shared("two_appenders");
    scene.at(Point::Unlocked, |scene| {
        scene.b.append(&scene.buffered, b"second").expect("append");
    });
    let first = scene.a.append(&scene.buffered, b"first!").expect("append");
    if forget_act() {
        scene.b.append(&scene.buffered, b"second").expect("append");
    }
    assert_eq!(first, 16 * BLOCK);
    scene.finds(16 * BLOCK, b"first!second", "an append was lost");
    scene.end();
}

/// A direct write finds that it must go through the cache, and gives its range up. Before it has it again, somebody else writes there.
/// In btrfs the way out cleared the marks of delayed allocation on the whole range, also those that were not its own: dirty
/// pages that never got to the device, and reservations that never came back.
#[test]
pub(super) fn a_fallback_leaves_the_pages_of_others_alone() {
    let scene = Scene::shared("a_fallback_leaves");
    scene.fs().force_fallback(1);
    scene.at(Point::FellBack, |scene| {
        scene.b.write(&scene.buffered, 200, b"other").expect("write");
    });
    scene.a.write(&scene.direct, 0, b"mine").expect("write");
    assert!(!forget_act(), "it did not fall back");
    let mut expected = pattern(0, ONE);
    expected[..4].copy_from_slice(b"mine");
    expected[200..205].copy_from_slice(b"other");
    scene.finds(0, &expected, "the write of another was lost");
    scene.fs().force_fallback(0);
    scene.end();
}

/// The same write gives its lock up before it takes the buffered way, which locks the range itself.
#[test]
pub(super) fn a_fallback_gives_its_lock_up() {
    let scene = Scene::new("a_fallback_gives_its_lock_up");
    scene.fs().force_fallback(1);
    let mut write = scene.write(&scene.a, &scene.direct, 0, &pattern(1, ONE));
    step(&mut write).expect("it waits for nobody, not for itself either").expect("write");
    scene.fs().force_fallback(0);
    scene.finds(0, &pattern(1, ONE), "after the fallback");
    drop(write);
    scene.end();
}

/// A truncate whose new end lies between two blocks has no edge that it would look at. It waits for the ordered extents beyond its end all
/// the same: their completions would bring back what it drops, and give it blocks that it has freed.
#[test]
pub(super) fn a_truncate_between_blocks_waits_for_flights() {
    let scene = Scene::new("a_truncate_between_blocks");
    scene.a.write(&scene.buffered, 0, &pattern(1, 16 * ONE)).expect("write");
    scene.gate.keep(Keep::Writes);
    let mut sync: Run<'_, _> = Box::pin(scene.a.sync_file_async(&scene.direct));
    assert!(step(&mut sync).is_none());
    let mut truncate: Run<'_, _> = Box::pin(scene.b.truncate_async(&scene.direct, 4 * BLOCK));
    assert!(step(&mut truncate).is_none(), "it went past a flight");
    scene.gate.keep(Keep::Nothing);
    step(&mut sync).expect("answered").expect("sync");
    step(&mut truncate).expect("free").expect("truncate");
    assert_eq!(scene.direct.size(), 4 * BLOCK);
    scene.finds(0, &pattern(1, 16 * ONE)[..4 * ONE], "after the truncate");
    drop((sync, truncate));
    scene.end();
}

/// A direct read asks for more than the file has. In btrfs it unlocked the part that it had read, and the rest of the
/// locked range stayed locked for ever.
#[test]
pub(super) fn a_short_read_holds_nothing() {
    let scene = Scene::new("a_short_read_holds_nothing");
    let mut read = scene.read(&scene.a, &scene.direct, 8 * BLOCK, 32 * ONE);
    assert_eq!(step(&mut read).expect("nothing is held"), pattern(0, 16 * ONE)[8 * ONE..]);
    assert_eq!(scene.a.core.holds.oldest(), None, "a read that is over holds blocks");
    drop(read);
    scene.end();
}

/// The same through the cache.
#[test]
pub(super) fn a_short_buffered_read_leaves_no_lock() {
    let scene = Scene::new("a_short_buffered_read");
    let mut read = scene.read(&scene.a, &scene.buffered, 8 * BLOCK, 32 * ONE);
    assert_eq!(step(&mut read).expect("nothing is held"), pattern(0, 16 * ONE)[8 * ONE..]);
    for block in [8, 15, 16, 39] {
        let mut write = scene.write(&scene.b, &scene.direct, block * BLOCK, &pattern(1, ONE));
        step(&mut write).expect("a read that is over holds a lock").expect("write");
    }
    drop(read);
    scene.end();
}

/// A buffered write has reserved space for two pages, when it turns out that the page of its first edge has left the cache and
/// cannot be read again. Both reservations come back.
#[test]
pub(super) fn a_buffered_write_that_fails_keeps_no_reservation() {
    let scene = Scene::shared("a_buffered_write_that_fails");
    let mut page = vec![0; ONE];
    scene.a.read(&scene.buffered, 0, &mut page).expect("read");
    scene.at(Point::Reserved, |scene| {
        scene.fs().set_cache_bytes(0);
        // Both tries.
        scene.fail(Target::Reads, When::After(0));
    });
    let result = scene.a.write(&scene.buffered, 100, &pattern(1, 2 * ONE - 100));
    assert!(!forget_act());
    assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
    scene.fault.set_plan(Default::default());
    assert_eq!(scene.direct.accounting(), Default::default(), "a write that failed keeps space");
    scene.finds(0, &pattern(0, 2 * ONE), "it changed something");
    scene.end();
}

/// A direct write of several pieces fails at the device, and one fails for want of space when most of its pieces have theirs. All blocks
/// of all pieces come back, and its range is free.
#[test]
pub(super) fn a_direct_write_that_fails_gives_all_back() {
    let scene = Scene::new("a_direct_write_that_fails");
    let free = scene.a.statfs().expect("statfs").free_bytes;
    scene.fail(Target::Writes, When::Nth(1));
    let result = scene.a.write(&scene.direct, 0, &pattern(1, 3 * MIB as usize));
    assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
    assert_eq!(scene.a.statfs().expect("statfs").free_bytes, free, "blocks of a failed write are lost");
    let result = scene.a.write(&scene.direct, 0, &pattern(1, 40 * MIB as usize));
    assert!(matches!(result, Err(Error::NoSpace { .. })), "{result:?}");
    assert_eq!(
        scene.a.statfs().expect("statfs").free_bytes,
        free,
        "blocks of a write without space are lost"
    );
    assert_eq!(scene.direct.accounting(), Default::default());
    scene.finds(0, &pattern(0, 16 * ONE), "a write that failed changed something");
    let mut write = scene.write(&scene.b, &scene.direct, 0, &pattern(1, ONE));
    step(&mut write).expect("a write that failed holds its range").expect("write");
    drop(write);
    scene.end();
}

/// A read fails and is tried again. Meanwhile its blocks are written anew, and everything that is free is used up by another file: but for
/// the blocks that the read holds.
#[test]
pub(super) fn a_read_keeps_its_blocks_until_its_last_try() {
    let scene = Scene::new("a_read_keeps_its_blocks");
    scene.gate.keep(Keep::Reads);
    scene.fail(Target::Reads, When::Nth(1));
    // Not a whole block: it goes the general way.
    let mut read = scene.read(&scene.a, &scene.direct, 0, ONE - 1);
    assert!(step(&mut read).is_none(), "the device has not answered");
    scene.gate.keep(Keep::NothingMore);
    scene.b.write(&scene.direct, 0, &pattern(1, 16 * ONE)).expect("write");
    scene.b.sync().expect("sync");
    let other = scene.b.open("other", OpenFlags::CREATE).expect("open");
    for at in 0.. {
        match scene.b.write(&other, at * 16 * BLOCK, &pattern(2, 16 * ONE)) {
            Ok(_) => {}
            Err(Error::NoSpace { .. }) => break,
            Err(error) => panic!("{error}"),
        }
    }
    scene.gate.keep(Keep::Nothing);
    assert!(step(&mut read).expect("answered") == pattern(0, ONE - 1), "a read got the blocks of another");
    drop((read, other));
    scene.end();
}
