//! Rule 3, what readers see: sizes and views. (The rest of the rule is in [`super::coherence`].)

use super::common::gate::Keep;
use super::common::{BLOCK, pattern};
use super::scene::{ONE, Run, Scene, step};
use crate::mutation::{Point, forget_act};

/// A reader polls the size while a direct append is on its way to the device. The size must not tell of bytes that cannot be read yet:
/// they would read as zeroes, or as what the blocks held before.
#[test]
pub(super) fn the_size_grows_with_the_data() {
    let scene = Scene::new("the_size_grows_with_the_data");
    scene.gate.keep(Keep::Writes);
    let mut write = scene.write(&scene.a, &scene.direct, 16 * BLOCK, &pattern(1, 4 * ONE));
    assert!(step(&mut write).is_none());
    let (size, mut found) = (scene.direct.size(), vec![0xEE; 20 * ONE]);
    let there = scene.b.read(&scene.direct, 0, &mut found).expect("read");
    assert_eq!((size, there as u64), (16 * BLOCK, 16 * BLOCK), "the size is ahead of the data");
    scene.gate.keep(Keep::Nothing);
    step(&mut write).expect("answered").expect("write");
    scene.finds(16 * BLOCK, &pattern(1, 4 * ONE), "after the append");
    drop(write);
    scene.end();
}

/// A page is dirty when a direct read begins. The read takes its view, which knows the old block; then the page is written back and is
/// clean, so that no newer page is found. The view must be looked at again: what was written before the read began would be missing.
#[test]
pub(super) fn a_direct_read_looks_at_its_view_again() {
    let scene = Scene::shared("a_direct_read_looks_again");
    scene.a.write(&scene.buffered, 0, &pattern(1, ONE)).expect("write");
    scene.at(Point::ViewTaken, |scene| {
        let mut sync: Run<'_, _> = Box::pin(scene.b.sync_file_async(&scene.direct));
        step(&mut sync).expect("nothing is held").expect("sync");
    });
    // Not a whole block: it goes the general way.
    let mut read = scene.read(&scene.a, &scene.direct, 0, ONE - 1);
    assert_eq!(step(&mut read).expect("nothing is held"), pattern(1, ONE - 1), "a write was missed");
    assert!(!forget_act());
    drop(read);
    scene.end();
}
