//! Rule 5: a retry finds its block through the extent map, and the map keeps what is still valid.

use bdev_adapter::wrap::fault::{Target, When};

use super::common::{BLOCK, pattern};
use super::scene::{ONE, Scene, step};

/// A buffered write reads the edge of its range, which it holds exclusively, and the device fails once. In btrfs the repair of a read
/// locked the range to find its extent: who reads under that lock waited for himself.
#[test]
pub(super) fn a_retry_takes_no_lock() {
    let scene = Scene::new("a_retry_takes_no_lock");
    scene.fail(Target::Reads, When::Nth(1));
    let mut write = scene.write(&scene.a, &scene.buffered, 100, b"part");
    step(&mut write)
        .expect("the retry waits for the lock of its own caller")
        .expect("the second try is good");
    let mut expected = pattern(0, ONE);
    expected[100..104].copy_from_slice(b"part");
    scene.finds(0, &expected, "after the retry");
    drop(write);
    scene.end();
}

/// A truncate cuts a block whose rest is zero already, so that it is not written anew: its mapping must stay. btrfs dropped from
/// the exact size on, and with it the mapping that the retry of a failed read would have needed.
#[test]
pub(super) fn a_truncate_keeps_the_block_that_it_cuts() {
    let scene = Scene::new("a_truncate_keeps_the_block");
    scene.a.write(&scene.direct, 16 * BLOCK, b"the end").expect("write");
    scene.a.truncate(&scene.direct, 20 * BLOCK).expect("truncate");
    scene.a.truncate(&scene.direct, 16 * BLOCK + 7).expect("truncate");
    scene.finds(16 * BLOCK, b"the end", "the block that was cut is gone");
    scene.a.truncate(&scene.direct, 16 * BLOCK + 3).expect("truncate");
    scene.finds(16 * BLOCK, b"the", "the block that was cut again is gone");
    scene.end();
}
