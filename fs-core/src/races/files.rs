//! Files and blocks that come again: what belonged to an earlier life is not believed.

use fs_core::{OpenFlags, Result};

use super::common::{BLOCK, MIB, TestDevice, Watchdog, check, fresh, pattern, quiet};
use super::scene::{ONE, Scene};
use crate::mutation::{Point, forget_act};

/// A file without handles is in memory for its dirty pages. A pass of write-back cleans them, and is about to have the file forgotten.
/// Before it does, a commit stores the file's last change and forgets it; and it is opened again, and written to. Who comes late
/// must not forget the new object: the next to open the file would get a third one, which knows nothing of what is dirty in the second.
#[test]
pub(super) fn who_forgets_late_forgets_nobody_else() {
    let scene = Scene::shared("who_forgets_late");
    let file = scene.a.open("again", OpenFlags::CREATE | OpenFlags::BUFFERED).expect("open");
    scene.a.write(&file, 0, &pattern(1, ONE)).expect("write");
    let before = std::sync::Arc::downgrade(file.inner());
    drop(file);
    scene.at(Point::PassOver, |scene| {
        scene.b.sync().expect("sync");
        let file = scene.b.open("again", OpenFlags::BUFFERED).expect("open");
        scene.b.write(&file, 0, &pattern(2, ONE)).expect("write");
        // Open to the end of the test.
        std::mem::forget(file);
    });
    scene.a.sync().expect("sync");
    assert!(!forget_act(), "there was nothing to write back");
    let file = scene.a.open("again", OpenFlags::READ_ONLY).expect("open");
    assert!(
        !std::ptr::eq(before.as_ptr(), std::sync::Arc::as_ptr(file.inner())),
        "the file was never forgotten"
    );
    let mut found = vec![0; ONE];
    scene.a.read(&file, 0, &mut found).expect("read");
    assert!(found == pattern(2, ONE), "there are two objects for one file");
    drop(file);
    scene.end();
}

/// Blocks are used again: first as runs whose checksums are kept apart, then one by one, with the checksum in the record of each.
/// When such records are loaded and merged, what the cache still has of the first use must not be believed.
#[test]
pub(super) fn checksums_of_an_earlier_use_of_blocks_are_not_believed() {
    let _watchdog = Watchdog::start("earlier use", 0, 60);
    let device = TestDevice::new(16 * MIB);
    let fs = fresh(&device.device, &quiet());
    let channel = fs.channel().expect("channel");
    // All blocks, in pairs.
    let file = channel.open("before", OpenFlags::CREATE).expect("open");
    let mut offset = 0;
    while channel.write(&file, offset, &pattern(offset, 2 * ONE)).is_ok() {
        offset += 2 * BLOCK;
    }
    assert!(offset > 10 * MIB);
    drop(file);
    channel.sync().expect("sync");
    channel.delete("before").expect("delete");
    channel.sync().expect("sync");
    // One by one. The file leaves memory each time, so no mapping meets the one before it.
    for block in 0..200 {
        let file = channel.open("after", OpenFlags::CREATE).expect("open");
        channel.write(&file, block * BLOCK, &pattern(block, ONE)).expect("write");
        drop(file);
        channel.sync().expect("sync");
    }
    let file = channel.open("after", OpenFlags::READ_ONLY).expect("open");
    let extents = channel.extents(&file, 0, u64::MAX).collect::<Result<Vec<_>>>().expect("extents");
    assert!(extents.len() < 150, "hardly two of the blocks follow each other: {}", extents.len());
    for block in 0..200 {
        let mut found = vec![0; ONE];
        channel.read(&file, block * BLOCK, &mut found).expect("read");
        assert!(found == pattern(block, ONE), "block {block}");
    }
    check(&fs, &channel);
}
