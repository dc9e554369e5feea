//! The rules one by one.

use super::*;

const R: u64 = REGION_BLOCKS;

/// The story: generation 7 refers to block X; X is freed and handed out again before generation 8 is durable; power
/// fails; generation 7 then refers to foreign data.
#[test]
fn freed_blocks_wait_for_their_generation() {
    let mut space = Allocator::new(64, 64).unwrap();
    let all = take(&mut space, Stream::Data, 64);
    assert_eq!(all, run(0, 64));
    commit(&mut space, 7);
    space.free(run(10, 4), Generation(8)).unwrap();
    assert_eq!(space.counts(), Counts { total: 64, free: 4, available_now: 0, pending: 4 });
    let none = |space: &mut Allocator| on_empty(space, |s| s.allocate(Stream::Data, 1, 1, None));
    assert_eq!(none(&mut space), Err(Stop::NoSpace), "queued");
    load_needs(&mut space, 8);
    assert_eq!(space.begin_commit(Generation(8), &[]).unwrap(), []);
    assert_eq!(none(&mut space), Err(Stop::NoSpace), "commit under way");
    assert!(space.release(Generation(8), &[]).is_err(), "its commit is running");
    assert!(space.end_commit().is_err(), "dirty regions are left");
    while space.pop_dirty_region().is_some() {}
    while space.pop_dirty_group().is_some() {}
    space.end_commit().unwrap();
    assert_eq!(space.persisted_free(), 4);
    space.release(Generation(7), &[]).unwrap();
    assert_eq!(none(&mut space), Err(Stop::NoSpace), "commit not durable");
    space.release(Generation(8), &[run(0, 1), run(11, 2), run(20, 1)]).unwrap();
    assert_eq!(space.counts(), Counts { total: 64, free: 4, available_now: 2, pending: 2 });
    assert_eq!(take(&mut space, Stream::Data, 4), run(10, 1));
    assert_eq!(take(&mut space, Stream::Data, 4), run(13, 1));
    assert_eq!(none(&mut space), Err(Stop::NoSpace), "two are held");
    space.release(Generation(8), &[]).unwrap();
    assert_eq!(take(&mut space, Stream::Data, 4), run(11, 2));
    space.check().unwrap();
}

#[test]
fn never_published_blocks_come_back_at_once() {
    let mut space = Allocator::new(R, R).unwrap();
    let got = take(&mut space, Stream::Data, 100);
    space.free_now(got).unwrap();
    assert_eq!(space.free_now(got), Err(SpaceError::NotAllocated(got)));
    assert_eq!(space.counts().available_now, R);
    space.check().unwrap();
}

#[test]
fn bad_frees_are_errors() {
    let mut space = Allocator::new(R + 10, R + 10).unwrap();
    let got = take(&mut space, Stream::Data, 8);
    for bad in [run(0, 0), run(R + 10, 1), run(R, 11), run(u64::MAX, 2), run(5, u64::MAX)] {
        let error = Err(SpaceError::OutOfRange { run: bad, total: R + 10 });
        assert_eq!(space.free(bad, Generation(1)), error);
        assert_eq!(space.free_now(bad), error);
        assert_eq!(space.mark_used(bad), error);
    }
    assert_eq!(space.free_now(run(4, 8)), Err(SpaceError::NotAllocated(run(4, 8))), "half of it");
    assert_eq!(space.mark_used(run(7, 2)), Err(SpaceError::NotFree(run(7, 2))));
    assert_eq!(space.free_now(run(R, 1)), Err(SpaceError::NotLoaded(Need::Region(RegionId(1)))));
    // Twice in one generation: the first is good, the second is rejected.
    space.free(got, Generation(1)).unwrap();
    space.free(run(got.start.0, 3), Generation(1)).unwrap();
    // Never allocated, in a region that is not loaded.
    space.free(run(R + 2, 2), Generation(1)).unwrap();
    assert!(matches!(space.begin_commit(Generation(1), &[]), Err(SpaceError::NotLoaded(_))));
    let rejected = commit(&mut space, 1);
    assert_eq!(rejected, [SpaceError::NotAllocated(run(0, 3)), SpaceError::NotAllocated(run(R + 2, 2))]);
    assert!(matches!(space.free(got, Generation(1)), Err(SpaceError::WrongGeneration { .. })));
    assert!(matches!(space.free_in_commit(got, Generation(2)), Err(SpaceError::CommitOrder(_))));
    space.check().unwrap();
    space.release(Generation(1), &[]).unwrap();
    assert_eq!(space.counts(), Counts { total: R + 10, free: R + 10, available_now: R + 10, pending: 0 });
}

/// The story: a write is on its way when a commit encodes its region. The commit's trees do not know the block; if the
/// region says "in use" and the power fails, the block is lost for good.
#[test]
fn unpublished_runs_are_encoded_as_free() {
    let mut space = Allocator::new(R, R).unwrap();
    let published = take(&mut space, Stream::Data, 5);
    let on_its_way = take(&mut space, Stream::Data, 7);
    assert!(space.begin_commit(Generation(1), &[run(12, 1)]).is_err());
    assert!(space.begin_commit(Generation(1), &[on_its_way, run(6, 1)]).is_err(), "named twice");
    // A damaged tree frees a block of it: rejected.
    space.free(run(6, 1), Generation(1)).unwrap();
    let rejected = space.begin_commit(Generation(1), &[on_its_way]).unwrap();
    assert_eq!(rejected, [SpaceError::NotAllocated(run(6, 1))]);
    let mut value = Vec::new();
    let region = space.pop_dirty_region().unwrap();
    space.encode_region(region, &mut value).unwrap();
    assert_eq!(value[2..4], [5, 0]);
    assert_eq!(space.used_runs(region).unwrap().collect::<Vec<_>>(), [published]);
    assert_eq!(space.pop_dirty_group(), Some(GroupId(0)));
    assert_eq!(space.persisted_free(), R - 5);
    assert_eq!(take(&mut space, Stream::Metadata, 1).start.0, 12, "not handed out again");
    while space.pop_dirty_region().is_some() {}
    while space.pop_dirty_group().is_some() {}
    space.check().unwrap();
    space.end_commit().unwrap();
    space.check().unwrap();
    // The next commit has to store it again.
    assert_eq!(space.pop_dirty_region(), Some(region));
    assert_eq!(space.used_runs(region).unwrap().collect::<Vec<_>>(), [run(0, 13)]);
    space.free_now(on_its_way).unwrap();
}

#[test]
fn streams_keep_apart_and_runs_stay_long() {
    let mut space = Allocator::new(64 * R, 64 * R).unwrap();
    let (mut data, mut metadata) = (Vec::new(), Vec::new());
    for n in 0..32 * R / 16 {
        let got = take(&mut space, Stream::Data, 16);
        assert_eq!(got.len, 16);
        data.push(got);
        if n % 16 == 0 {
            metadata.push(take(&mut space, Stream::Metadata, 1));
        }
    }
    let pieces = |runs: &[Run]| 1 + runs.windows(2).filter(|pair| pair[0].end() != pair[1].start).count();
    assert!(pieces(&data) <= 3, "{}", pieces(&data));
    assert_eq!(pieces(&metadata), 1);
    space.check().unwrap();
}

#[test]
fn hints_are_followed_where_there_is_room() {
    let mut space = Allocator::new(8 * R, 8 * R).unwrap();
    let a = take(&mut space, Stream::Data, 10);
    let b = take(&mut space, Stream::Data, 10);
    space.free_now(run(b.start.0, 5)).unwrap();
    let hinted = |space: &mut Allocator, at, want, min| {
        on_empty(space, |s| s.allocate(Stream::Data, want, min, Some(BlockAddr(at)))).unwrap()
    };
    assert_eq!(hinted(&mut space, a.end().0, 4, 1), run(10, 4));
    assert_eq!(hinted(&mut space, 14, 4, 1), run(20, 4), "one block where four are wanted is not worth it");
    assert_eq!(hinted(&mut space, 14, 2, 1), run(14, 1), "half of it is");
    assert_eq!(hinted(&mut space, 5 * R, 4, 1).start.0, 24, "a region that is not loaded is not waited for");
    assert_eq!(hinted(&mut space, u64::MAX, 4, 1).start.0, 28, "nonsense");
    let m = take(&mut space, Stream::Metadata, 1);
    assert_eq!(hinted(&mut space, m.end().0, 4, 1).start.0, 32, "a region of another stream");
    space.check().unwrap();
}

#[test]
fn fragmented_space_is_found_to_the_last_block() {
    // Every second block is used; then a few runs are opened.
    let total = 6 * R + 100;
    let mut space = Allocator::new(total, total).unwrap();
    let mut got = 0;
    while got < total {
        got += take(&mut space, Stream::Data, R).len;
    }
    for block in (0..total).step_by(2) {
        space.free_now(run(block, 1)).unwrap();
    }
    for (at, len) in [(R - 40, 40), (3 * R + 1000, 300), (5 * R + 10, 70)] {
        (at..at + len)
            .filter(|block| block % 2 == 1)
            .for_each(|block| space.free_now(run(block, 1)).unwrap());
    }
    space.check().unwrap();
    let free = space.counts().available_now;
    let want =
        |space: &mut Allocator, want, min| on_empty(space, |s| s.allocate(Stream::Data, want, min, None));
    let long = want(&mut space, 256, 256).unwrap();
    assert!(long.start.0 >= 3 * R + 1000 && long.len == 256, "{long:?}");
    assert_eq!(want(&mut space, 128, 128), Err(Stop::NoSpace));
    let shorter = want(&mut space, 256, 1).unwrap();
    assert!(shorter.len >= 41, "{shorter:?}");
    let mut left = free - 256 - shorter.len;
    let mut pieces = 0;
    while left > 0 {
        left -= want(&mut space, 64, 1).unwrap().len;
        pieces += 1;
    }
    assert!(pieces < 25_000);
    assert_eq!(want(&mut space, 1, 1), Err(Stop::NoSpace));
    assert_eq!(space.counts().free, 0);
    space.check().unwrap();
}

#[test]
fn promises_hold_against_other_streams() {
    for total in [R / 2, 2 * R, 3 * R + 5] {
        let mut space = Allocator::new(total, total).unwrap();
        on_empty(&mut space, |s| s.ensure_ready(Stream::Metadata, 1000)).unwrap();
        let mut data = 0;
        while let Ok(got) = on_empty(&mut space, |s| s.allocate(Stream::Data, 64, 1, None)) {
            data += got.len;
            space.check().unwrap();
        }
        assert_eq!(data, total - 1000);
        for _ in 0..1000 {
            space.allocate(Stream::Metadata, 1, 1, None).unwrap();
        }
        assert_eq!(space.allocate(Stream::Metadata, 1, 1, None), Err(Stop::NoSpace));
        assert_eq!(on_empty(&mut space, |s| s.ensure_ready(Stream::Metadata, 1)), Err(Stop::NoSpace));
        space.check().unwrap();
    }
}

#[test]
fn damaged_values_are_errors_and_change_nothing() {
    assert!(matches!(Allocator::new(0, 0), Err(SpaceError::Geometry { .. })));
    assert!(matches!(Allocator::new(10, 11), Err(SpaceError::Geometry { .. })));
    assert!(matches!(Allocator::new(MAX_BLOCKS + 1, 0), Err(SpaceError::Geometry { .. })));
    let total = (512 + 2) * R - 5;
    let mut space = Allocator::new(total, total - 1).unwrap();
    let group = |space: &mut Allocator, n, value: Option<&[u8]>| space.load_group(GroupId(n), value);
    assert_eq!(group(&mut space, 2, None), Err(SpaceError::NoSuch(Need::Group(GroupId(2)))));
    assert!(matches!(group(&mut space, 1, Some(&[1, 2])), Err(SpaceError::BadGroup { .. })));
    let early = space.load_region(RegionId(513), None);
    assert_eq!(early, Err(SpaceError::NotLoaded(Need::Group(GroupId(1)))));
    group(&mut space, 0, None).unwrap();
    // The superblock says that one block is used.
    assert!(matches!(group(&mut space, 1, None), Err(SpaceError::TotalMismatch { .. })));
    let mut value = Vec::new();
    super::super::format::encode_group(&[8190, 8187], &mut value);
    assert!(matches!(group(&mut space, 1, Some(&value)), Err(SpaceError::TotalMismatch { .. })));
    value.clear();
    super::super::format::encode_group(&[8191, 8187], &mut value);
    group(&mut space, 1, Some(&value)).unwrap();
    let region = |space: &mut Allocator, n, value: Option<&[u8]>| space.load_region(RegionId(n), value);
    assert_eq!(region(&mut space, 514, None), Err(SpaceError::NoSuch(Need::Region(RegionId(514)))));
    assert!(matches!(region(&mut space, 512, Some(&[])), Err(SpaceError::BadRegion { .. })));
    assert_eq!(
        region(&mut space, 512, None),
        Err(SpaceError::CountMismatch { region: RegionId(512), bitmap: 8192, summary: 8191 })
    );
    region(&mut space, 512, Some(&[0x11, 0, 1, 0, 7, 0, 1, 0])).unwrap();
    assert!(region(&mut space, 513, Some(&[0x11, 0, 1, 0, 0xfb, 0x1f, 1, 0])).is_err(), "past the end");
    region(&mut space, 513, None).unwrap();
    assert_eq!(space.is_used(BlockAddr(512 * R + 7)), Ok(true));
    assert_eq!(space.is_used(BlockAddr(512 * R + 8)), Ok(false));
    space.check().unwrap();
}

#[test]
fn eviction_bounds_memory_and_loses_nothing() {
    let total = 200 * R;
    let mut space = Allocator::new(total, total).unwrap();
    let mut values = std::collections::BTreeMap::new();
    let mut generation = 0;
    for _ in 0..100 {
        let mut loads = 0;
        while on_empty(&mut space, |s| s.allocate(Stream::Data, R, R, None)).unwrap().start.0 % R != 0 {}
        generation += 1;
        space.begin_commit(Generation(generation), &[]).unwrap();
        while let Some(region) = space.pop_dirty_region() {
            loads += 1;
            let mut value = Vec::new();
            space.encode_region(region, &mut value).unwrap();
            values.insert(region, value);
        }
        while space.pop_dirty_group().is_some() {}
        space.end_commit().unwrap();
        assert_eq!(loads, 1);
        space.evict_clean(10);
        assert!(space.loaded_regions() <= 74, "{}", space.loaded_regions());
    }
    for _ in 0..10 {
        space.evict_clean(10);
    }
    assert!(space.loaded_regions() <= 10);
    space.check().unwrap();
    for (&region, value) in &values {
        space.load_region(region, Some(value)).unwrap();
        assert_eq!(space.used_runs(region).unwrap().collect::<Vec<_>>(), [space.region_run(region).unwrap()]);
    }
    space.check().unwrap();
}

/// The story: a caller takes the dirty regions out before the commit, and evicts before it has stored them; what was
/// changed in memory only would be gone.
#[test]
fn a_region_on_its_way_to_the_tree_is_not_evicted() {
    let mut space = Allocator::new(4 * R, 4 * R).unwrap();
    let got = take(&mut space, Stream::Data, R);
    take(&mut space, Stream::Data, R);
    let region = region_of(got.start);
    while space.pop_dirty_region().is_some() {}
    while space.pop_dirty_group().is_some() {}
    (0..5).for_each(|_| space.evict_clean(0));
    assert!(space.is_loaded(Need::Region(region)));
    space.begin_commit(Generation(1), &[]).unwrap();
    space.end_commit().unwrap();
    space.check().unwrap();
    (0..5).for_each(|_| space.evict_clean(0));
    assert!(!space.is_loaded(Need::Region(region)));
}

/// Nothing costs a pass over the regions: an 8 TiB device, nearly full, is used through a handful of loads.
#[test]
fn few_loads_on_a_large_full_device() {
    let total = 8 << 28;
    let regions = total / R;
    let free_at = |region: u64| if region % 50_000 == 49_999 { 600 } else { 3 };
    let free: u64 = (0..regions).map(free_at).sum();
    let mut space = Allocator::new(total, free).unwrap();
    let mut loads = [0, 0];
    let mut call = |space: &mut Allocator, want, min| {
        loop {
            match space.allocate(Stream::Data, want, min, None) {
                Err(Stop::Load(Need::Group(group))) => {
                    loads[0] += 1;
                    let first = u64::from(group.0) * GROUP_REGIONS;
                    let counts: Vec<u16> =
                        (first..first + GROUP_REGIONS).map(|r| free_at(r) as u16).collect();
                    let mut value = Vec::new();
                    super::super::format::encode_group(&counts, &mut value);
                    space.load_group(group, Some(&value)).unwrap();
                }
                Err(Stop::Load(Need::Region(region))) => {
                    loads[1] += 1;
                    let used = R - free_at(region.0.into());
                    let [low, high] = (used as u16).to_le_bytes();
                    space.load_region(region, Some(&[0x11, 0, low, high, 0, 0, low, high])).unwrap();
                }
                done => return (done.unwrap().len, loads),
            }
        }
    };
    assert_eq!(call(&mut space, 1, 1).0, 1);
    let (len, loads) = call(&mut space, 400, 400);
    assert_eq!(len, 400);
    assert!(loads[0] <= 512 && loads[1] <= 8, "{loads:?}");
    space.check().unwrap();
}
