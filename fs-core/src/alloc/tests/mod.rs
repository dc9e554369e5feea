//! Tests of the allocator: its parts, its stored values, its rules one by one, and a reference model in lockstep.

mod format;
mod model;
mod parts;
mod rules;

use super::*;

/// Calls until the allocator stops asking for something, loading "nothing is stored" for everything.
fn on_empty<T>(
    space: &mut Allocator,
    mut call: impl FnMut(&mut Allocator) -> Result<T, Stop>,
) -> Result<T, Stop> {
    loop {
        match call(space) {
            Err(Stop::Load(Need::Group(group))) => space.load_group(group, None).unwrap(),
            Err(Stop::Load(Need::Region(region))) => space.load_region(region, None).unwrap(),
            done => return done,
        }
    }
}

fn take(space: &mut Allocator, stream: Stream, want: u64) -> Run {
    on_empty(space, |space| space.allocate(stream, want, 1, None)).unwrap()
}

fn run(start: u64, len: u64) -> Run {
    Run::new(BlockAddr(start), len)
}

/// A commit that stores nothing anywhere.
fn commit(space: &mut Allocator, generation: u64) -> Vec<SpaceError> {
    load_needs(space, generation);
    let rejected = space.begin_commit(Generation(generation), &[]).unwrap();
    while space.pop_dirty_region().is_some() {}
    while space.pop_dirty_group().is_some() {}
    space.end_commit().unwrap();
    rejected
}

fn load_needs(space: &mut Allocator, generation: u64) {
    loop {
        let needs = space.needs_for_commit(Generation(generation), 16);
        if needs.is_empty() {
            return;
        }
        for need in needs {
            match need {
                Need::Group(group) => space.load_group(group, None).unwrap(),
                Need::Region(region) => {
                    let _ = space.load_group(group_of(region), None);
                    space.load_region(region, None).unwrap();
                }
            }
        }
    }
}
