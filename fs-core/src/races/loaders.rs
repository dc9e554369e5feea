//! Rule 1: a loader never brings back the past.
//!
//! Loaders read the tree and hand in what they found under one metadata lock, under which changes are also made. That alone keeps the past
//! out. The tests take this wall away ([`Mutation::LoadInTwoSteps`]), so that they see what stands behind it: tickets and versions.

use super::common::{BLOCK, pattern};
use super::scene::{ONE, Scene, step};
use crate::mutation::{Mutation, Point, forget_act, with_broken};

/// A reader looks a block up in the tree. Before it puts what it found into the map, a write of that block is published, gets into the
/// tree, is unpinned, and (`evicted`) leaves the map again. If the reader's old mapping goes in now, everybody reads the old block from
/// then on, long after it has become another file's: in btrfs this was found as stale data that a remount cured.
pub(super) fn a_late_loader(evicted: bool) {
    let scene = Scene::shared("a_late_loader");
    scene.evict();
    scene.at(Point::TreeRead, move |scene| {
        scene.b.write(&scene.direct, BLOCK, &pattern(1, ONE)).expect("write");
        if evicted {
            scene.evict();
        }
    });
    let mut read = scene.read(&scene.a, &scene.direct, 0, 16 * ONE);
    let found = step(&mut read).expect("nothing is held");
    assert!(!forget_act(), "the loader did not get there");
    let mut expected = pattern(0, 16 * ONE);
    assert!(found[..ONE] == expected[..ONE] && found[2 * ONE..] == expected[2 * ONE..]);
    expected[ONE..2 * ONE].copy_from_slice(&pattern(1, ONE));
    scene.finds(0, &expected, "a loader brought the past back");
    drop(read);
    scene.end();
}

#[test]
fn a_late_loader_is_refused() {
    with_broken(Mutation::LoadInTwoSteps, || a_late_loader(true));
}

#[test]
fn a_late_loader_leaves_what_is_newer_alone() {
    with_broken(Mutation::LoadInTwoSteps, || a_late_loader(false));
}

/// A long truncate drops its extents in several transactions. Between two of them a reader of the part that stays loads what follows in
/// the tree, also what the next transaction is about to drop: the map forgets it after each step. If it did not, a file that grows
/// again would show old content, from blocks that are free or another file's.
#[test]
pub(super) fn what_is_loaded_amid_a_truncate_goes_with_the_next_step() {
    const EXTENTS: u64 = 100;
    let scene = Scene::shared("what_is_loaded_amid_a_truncate");
    for extent in 10..EXTENTS {
        scene.a.write(&scene.direct, 2 * extent * BLOCK, &pattern(extent, ONE)).expect("write");
    }
    let size = scene.direct.size();
    scene.at(Point::TruncateStep, |scene| {
        scene.evict();
        let mut read = scene.read(&scene.b, &scene.direct, 0, ONE);
        assert_eq!(step(&mut read).expect("nothing is held"), pattern(0, ONE));
    });
    scene.a.truncate(&scene.direct, BLOCK).expect("truncate");
    assert!(!forget_act(), "it took one step");
    scene.a.truncate(&scene.direct, size).expect("truncate");
    let mut expected = vec![0; size as usize];
    expected[..ONE].copy_from_slice(&pattern(0, ONE));
    scene.finds(0, &expected, "what was cut off came back");
    scene.end();
}
