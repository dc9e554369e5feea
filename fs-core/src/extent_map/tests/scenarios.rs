//! The scenarios of btrfs's extent-map self-tests, and others that one can name. Unit: blocks (4 KiB).
//!
//! | scenario of btrfs | test |
//! |---|---|
//! | 1. two readers load the same extent | [`two_readers_load_the_same_extent`]; one of them a part of what has merged: [`a_loader_of_a_part_finds_the_whole`] |
//! | 2. an inline extent is inserted again, with data behind it | [`an_inline_extent_is_inserted_again`] |
//! | 3. a loader of [0, 16K) after a writer inserted [4K, 8K), asked left, right and far right of it | [`a_loader_comes_after_a_writer`] |
//! | 4. a split beats the loader, asked before and behind the border | [`a_split_beats_the_loader`], [`a_border_beats_the_loader`] |
//! | 5. drop of a front, a back, the middle, several whole extents | [`drop_splits_and_keeps_the_rest`] |
//! | 6. insertion into a gap between neighbours that are not merged | [`insertion_into_a_gap_between_unmerged_neighbours`] |
//! | 7. drop that skips pinned entries, and later splits | [`drop_skips_pinned_and_splits_behind`] |
//! | 8. a compressed extent beside one that overlaps it | none: there is no compression yet, and an entry of that state cannot be made |
//! | walk over a hole, an implicit hole, a preallocated and a half-written preallocated extent | [`walk_over_all_states`]; through the API: `a_walk_over_every_state` in `tests/space.rs` |
//! | the reverse map of RAID stripes | none: there is one device |

use super::*;

const UNKNOWN: Mapping = Mapping::Unknown;
const HOLE: Mapping = Mapping::Hole;

fn load(map: &ExtentMap, range: BlockRange, ticket: LoadTicket, extents: &[NewExtent]) -> LoadOutcome {
    map.load(range, ticket, extents, &mut no_sink).unwrap()
}

#[test]
fn a_new_file_is_a_hole_and_an_old_one_unknown() {
    let map = ExtentMap::new_empty();
    assert_eq!(entries(&map, 0, MAX_FILE_BLOCKS), [(0, 1 << 30, HOLE), (1 << 30, MAX_FILE_BLOCKS, HOLE)]);
    let map = ExtentMap::new_unloaded(12_345);
    assert_eq!(map.view(&pin()).size(), 12_345);
    assert_eq!(lookup(&map, 77).mapping(), UNKNOWN);
    assert_eq!(lookup(&map, MAX_FILE_BLOCKS).mapping(), HOLE);
    assert_eq!(lookup(&map, u64::MAX).mapping(), HOLE);
}

/// btrfs case 1: two readers load the same extent; the loser finds the winner's and changes nothing.
#[test]
fn two_readers_load_the_same_extent() {
    let map = ExtentMap::new_unloaded(1 << 20);
    let (one, two) = (map.load_ticket(), map.load_ticket());
    assert_eq!(load(&map, blocks(0, 4), one, &[data(0, 4, 100)]).filled, 4);
    let outcome = load(&map, blocks(0, 4), two, &[data(0, 4, 100)]);
    assert_eq!(outcome, LoadOutcome { filled: 0, kept: 4, refused: 0 });
    // The third saw a wider extent: it adds the part that is not there, and its own query is covered.
    let three = map.load_ticket();
    assert_eq!(load(&map, blocks(0, 8), three, &[data(0, 8, 100)]).filled, 4);
    assert_eq!(entries(&map, 0, 9), [(0, 8, at(100)), (8, 9, UNKNOWN)]);
}

/// btrfs case 1, as it was: the extents of two writes have merged in the map, and a loader brings the record of the first of them. What is
/// there stays one entry, and covers the query.
#[test]
fn a_loader_of_a_part_finds_the_whole() {
    let map = ExtentMap::new_unloaded(1 << 20);
    settle(&map, &[data(0, 4, 100), data(4, 1, 104)]);
    for part in [data(0, 2, 100), data(0, 4, 100), data(4, 1, 104)] {
        let range = part.range;
        let outcome = load(&map, range, map.load_ticket(), &[part]);
        assert_eq!(outcome, LoadOutcome { filled: 0, kept: range.len().0, refused: 0 });
        assert_eq!(lookup(&map, range.start().0).range(), blocks(0, 5));
    }
    assert_eq!(entries(&map, 0, 6), [(0, 5, at(100)), (5, 6, UNKNOWN)]);
}

/// btrfs case 2: an inline extent is loaded again, before and after the block behind it.
#[test]
fn an_inline_extent_is_inserted_again() {
    let map = ExtentMap::new_unloaded(1000);
    let inline = NewExtent::new(FileBlock(0), 1, Mapping::Inline);
    for filled in [1, 0] {
        assert_eq!(load(&map, blocks(0, 1), map.load_ticket(), &[inline]).filled, filled);
        assert_eq!(entries(&map, 0, 2), [(0, 1, Mapping::Inline), (1, 2, UNKNOWN)]);
    }
    load(&map, blocks(1, 2), map.load_ticket(), &[data(1, 1, 900)]);
    assert_eq!(load(&map, blocks(0, 1), map.load_ticket(), &[inline]).kept, 1);
    assert_eq!(entries(&map, 0, 3), [(0, 1, Mapping::Inline), (1, 2, at(900)), (2, 3, UNKNOWN)]);
}

/// btrfs case 3: a loader of [0, 16K) comes after a writer inserted [4K, 8K). Whatever it was asked for, left, right or
/// far right of the writer's, it covers its query and leaves the writer's alone.
#[test]
fn a_loader_comes_after_a_writer() {
    for query in [0, 2, 3, 1] {
        let map = ExtentMap::new_unloaded(1 << 20);
        let ticket = map.load_ticket();
        publish(&map, &[data(1, 1, 900)]);
        let outcome = load(&map, blocks(0, 4), ticket, &[data(0, 4, 100)]);
        assert_eq!(outcome, LoadOutcome { filled: 3, kept: 1, refused: 0 });
        let found = lookup(&map, query);
        assert!(found.range().contains(FileBlock(query)) && !found.is_unknown());
        let want = [(0, 1, at(100)), (1, 2, at(900)), (2, 4, at(102))];
        assert_eq!(entries(&map, 0, 4), want);
        // Also when the tree has the writer's and it was unpinned in the meantime, while the loader saw the old one.
        map.unpin(&[data(1, 1, 900)], &mut no_sink);
        load(&map, blocks(0, 4), ticket, &[data(0, 4, 100)]);
        assert_eq!(entries(&map, 0, 4), want);
    }
}

/// The writer's mapping was unpinned and evicted before the loader arrives with the old one.
#[test]
fn a_loader_does_not_bring_back_the_past() {
    let map = ExtentMap::new_unloaded(1 << 20);
    let ticket = map.load_ticket();
    settle(&map, &[data(1, 1, 900)]);
    map.evict(u64::MAX);
    assert_eq!(lookup(&map, 1).mapping(), UNKNOWN);
    let outcome = load(&map, blocks(0, 4), ticket, &[data(0, 4, 100)]);
    assert_eq!(outcome, LoadOutcome { filled: 3, kept: 0, refused: 1 });
    assert_eq!(entries(&map, 0, 4), [(0, 1, at(100)), (1, 2, UNKNOWN), (2, 4, at(102))]);
    load(&map, blocks(1, 2), map.load_ticket(), &[data(1, 1, 900)]);
    assert_eq!(lookup(&map, 1).mapping(), at(900));
}

/// The loader takes its ticket between publication and tree insertion: it reads the old mapping although nothing is
/// published after its ticket. The unpin must count as a change.
#[test]
fn a_ticket_between_publication_and_insertion_is_refused() {
    let map = ExtentMap::new_unloaded(1 << 20);
    publish(&map, &[data(1, 1, 900)]);
    let ticket = map.load_ticket();
    let read_from_the_old_tree = [data(0, 4, 100)];
    map.unpin(&[data(1, 1, 900)], &mut no_sink);
    map.evict(u64::MAX);
    assert_eq!(load(&map, blocks(0, 4), ticket, &read_from_the_old_tree).refused, 1);
    assert_eq!(lookup(&map, 1).mapping(), UNKNOWN);
}

/// A ticket older than the history is refused whole, and a fresh one is not.
#[test]
fn a_forgotten_ticket_is_refused() {
    let map = ExtentMap::new_unloaded(1 << 30);
    let ticket = map.load_ticket();
    for block in 0..history::REACH {
        map.invalidate(blocks(1000 + block, 1001 + block));
    }
    assert_eq!(load(&map, blocks(0, 4), ticket, &[]).filled, 4);
    map.invalidate(blocks(0, 4));
    assert_eq!(load(&map, blocks(8, 12), ticket, &[]).refused, 4);
    assert_eq!(load(&map, blocks(8, 12), map.load_ticket(), &[]).filled, 4);
    // A history that is armed again and again keeps its bounds.
    for block in 0..10 * history::REACH {
        map.load_ticket();
        map.invalidate(blocks(block, block + 1));
    }
    assert!(map.memory_bytes() < 200_000);
}

/// btrfs case 4: an extent is split (a writer overwrites its middle) before the loader of the whole arrives.
#[test]
fn a_split_beats_the_loader() {
    let map = ExtentMap::new_unloaded(1 << 20);
    load(&map, blocks(0, 8), map.load_ticket(), &[data(0, 8, 100)]);
    let ticket = map.load_ticket();
    settle(&map, &[data(3, 2, 900)]);
    map.invalidate(blocks(0, 3));
    let outcome = load(&map, blocks(0, 8), ticket, &[data(0, 8, 100)]);
    assert_eq!(outcome, LoadOutcome { filled: 0, kept: 5, refused: 3 });
    load(&map, blocks(0, 8), map.load_ticket(), &[data(0, 3, 100), data(3, 2, 900), data(5, 3, 105)]);
    assert_eq!(entries(&map, 0, 8), [(0, 3, at(100)), (3, 5, at(900)), (5, 8, at(105))]);
}

/// btrfs case 4, as it was: a direct write of preallocated space splits [0, 8) at block 2 and writes behind it, while a reader brings the
/// whole from before. Whatever it was asked for, before or behind the border, it finds the side of it that is true now.
#[test]
fn a_border_beats_the_loader() {
    let map = ExtentMap::new_unloaded(1 << 20);
    load(&map, blocks(0, 8), map.load_ticket(), &[preallocated(0, 8, 100)]);
    let ticket = map.load_ticket();
    publish(&map, &[data(2, 6, 102)]);
    for pinned in [true, false] {
        let outcome = load(&map, blocks(0, 8), ticket, &[preallocated(0, 8, 100)]);
        assert_eq!(outcome, LoadOutcome { filled: 0, kept: 8, refused: 0 });
        for (query, range) in [(0, blocks(0, 2)), (1, blocks(0, 2)), (2, blocks(2, 8)), (7, blocks(2, 8))] {
            assert_eq!(lookup(&map, query).range(), range);
        }
        let prealloc = Mapping::Preallocated { addr: BlockAddr(100) };
        assert_eq!(entries(&map, 0, 8), [(0, 2, prealloc), (2, 8, at(102))]);
        assert_eq!(lookup(&map, 5).is_pinned(), pinned);
        map.unpin(&[data(2, 6, 102)], &mut no_sink);
    }
}

/// btrfs case 5: drop of the front, the back, the middle, and several whole extents.
#[test]
fn drop_splits_and_keeps_the_rest() {
    let fresh = || {
        let map = ExtentMap::new_empty();
        settle(&map, &[data(0, 4, 100), data(4, 4, 200), data(8, 4, 300)]);
        map
    };
    let map = fresh();
    map.invalidate(blocks(0, 2));
    assert_eq!(entries(&map, 0, 4), [(0, 2, UNKNOWN), (2, 4, at(102))]);
    let map = fresh();
    map.invalidate(blocks(2, 4));
    assert_eq!(entries(&map, 0, 4), [(0, 2, at(100)), (2, 4, UNKNOWN)]);
    let map = fresh();
    map.invalidate(blocks(5, 6));
    assert_eq!(entries(&map, 4, 8), [(4, 5, at(200)), (5, 6, UNKNOWN), (6, 8, at(202))]);
    let map = fresh();
    map.invalidate(blocks(2, 10));
    assert_eq!(entries(&map, 0, 12), [(0, 2, at(100)), (2, 10, UNKNOWN), (10, 12, at(302))]);
    map.invalidate(BlockRange::ALL);
    assert_eq!(map.entries(), 0);
    assert_eq!(lookup(&map, MAX_FILE_BLOCKS - 1).mapping(), UNKNOWN);
}

/// btrfs case 6: insertion into a gap between neighbours that are not merged (one is pinned).
#[test]
fn insertion_into_a_gap_between_unmerged_neighbours() {
    let map = ExtentMap::new_unloaded(1 << 20);
    publish(&map, &[data(0, 4, 100)]);
    load(&map, blocks(8, 12), map.load_ticket(), &[data(8, 4, 108)]);
    let outcome = load(&map, blocks(0, 12), map.load_ticket(), &[data(0, 12, 100)]);
    assert_eq!(outcome, LoadOutcome { filled: 4, kept: 8, refused: 0 });
    assert_eq!(entries(&map, 0, 12), [(0, 4, at(100)), (4, 12, at(104))]);
    map.unpin(&[data(0, 4, 100)], &mut no_sink);
    assert_eq!(entries(&map, 0, 12), [(0, 12, at(100))]);
}

/// btrfs case 7: a drop that skips pinned entries and later splits.
#[test]
fn drop_skips_pinned_and_splits_behind() {
    let map = ExtentMap::new_empty();
    settle(&map, &[data(0, 4, 100), data(8, 8, 300)]);
    publish(&map, &[data(4, 4, 200)]);
    map.invalidate(blocks(0, 9));
    assert_eq!(entries(&map, 0, 16), [(0, 4, UNKNOWN), (4, 8, at(200)), (8, 9, UNKNOWN), (9, 16, at(301))]);
    assert!(lookup(&map, 4).is_pinned());
    map.evict(u64::MAX);
    assert_eq!(entries(&map, 0, 16), [(0, 4, UNKNOWN), (4, 8, at(200)), (8, 16, UNKNOWN)]);
}

/// btrfs's walk over a hole, an implicit hole, a preallocated and a half-written preallocated extent.
#[test]
fn walk_over_all_states() {
    let map = ExtentMap::new_unloaded(1 << 20);
    let explicit_hole = NewExtent::new(FileBlock(2), 2, HOLE);
    let tree = [data(0, 2, 100), explicit_hole, preallocated(6, 4, 600)];
    load(&map, blocks(0, 12), map.load_ticket(), &tree);
    let prealloc = |addr| Mapping::Preallocated { addr: BlockAddr(addr) };
    assert_eq!(entries(&map, 0, 12), [(0, 2, at(100)), (2, 6, HOLE), (6, 10, prealloc(600)), (10, 12, HOLE)]);
    // Writing a preallocated block for the first time keeps its place.
    settle(&map, &[data(7, 1, 601)]);
    let half_written = [(6, 7, prealloc(600)), (7, 8, at(601)), (8, 10, prealloc(602))];
    assert_eq!(entries(&map, 6, 10), half_written);
    settle(&map, &[data(8, 2, 602)]);
    assert_eq!(entries(&map, 6, 10), [(6, 7, prealloc(600)), (7, 10, at(601))]);
}

/// Merging needs all of: the same state, the next address, no pin on either side.
#[test]
fn only_what_continues_merges() {
    let map = ExtentMap::new_empty();
    settle(
        &map,
        &[data(0, 2, 100), data(2, 2, 102), data(4, 2, 105), preallocated(6, 2, 107), data(8, 1, 109)],
    );
    let prealloc = Mapping::Preallocated { addr: BlockAddr(107) };
    assert_eq!(entries(&map, 0, 9), [(0, 4, at(100)), (4, 6, at(105)), (6, 8, prealloc), (8, 9, at(109))]);
    publish(&map, &[data(9, 1, 110)]);
    assert_eq!(entries(&map, 8, 10), [(8, 9, at(109)), (9, 10, at(110))]);
    map.unpin(&[data(9, 1, 110)], &mut no_sink);
    assert_eq!(entries(&map, 8, 10), [(8, 10, at(109))]);
}

/// Checksums of single blocks that merge go to the sink; none is lost, none is invented.
#[test]
fn merging_moves_checksums_to_the_sink() {
    let map = ExtentMap::new_empty();
    let mut moved = Vec::new();
    let extents = [summed(0, 100, 7), summed(1, 101, 8), summed(2, 102, 9), summed(3, 200, 10)];
    publish(&map, &extents);
    assert_eq!(lookup(&map, 1).mapping(), Mapping::Data { addr: BlockAddr(101), checksum: Some(8) });
    map.unpin(&extents, &mut |addr, sum| moved.push((addr.0, sum)));
    moved.sort_unstable();
    assert_eq!(moved, [(100, 7), (101, 8), (102, 9)]);
    assert_eq!(lookup(&map, 1).mapping(), at(100));
    assert_eq!(lookup(&map, 3).mapping(), Mapping::Data { addr: BlockAddr(200), checksum: Some(10) });
}

/// An unpin that comes after a newer write took the place must not unpin the newer one.
#[test]
fn unpin_names_what_it_unpins() {
    let map = ExtentMap::new_empty();
    publish(&map, &[data(0, 8, 100)]);
    publish(&map, &[data(2, 2, 900)]);
    map.unpin(&[data(0, 8, 100)], &mut no_sink);
    let guard = pin();
    let pinned: Vec<bool> = map.view(&guard).iter(blocks(0, 8)).map(|e| e.is_pinned()).collect();
    assert_eq!(pinned, [false, true, false]);
}

/// Truncation starts at the block-rounded size and changes size and mappings together.
#[test]
fn truncate_rounds_up_and_keeps_the_rest() {
    let map = ExtentMap::new_empty();
    map.publish(PublishWrite { extents: &[data(0, 8, 100)], size: Some(8 * BLOCK_SIZE as u64) });
    let version = map.truncate(3 * BLOCK_SIZE as u64 + 1);
    assert_eq!(entries(&map, 0, 8), [(0, 4, at(100)), (4, 8, HOLE)]);
    assert_eq!(map.view(&pin()).size(), 3 * BLOCK_SIZE as u64 + 1);
    assert!(map.truncate(1 << 30) > version);
    assert_eq!(entries(&map, 0, 8), [(0, 4, at(100)), (4, 8, HOLE)]);
    map.truncate(0);
    assert_eq!(map.entries(), 0);
    assert_eq!(map.view(&pin()).stats(), MapStats::default());
}

/// Growing keeps what was preallocated behind the size.
#[test]
fn growing_keeps_blocks_behind_the_size() {
    let map = ExtentMap::new_empty();
    settle(&map, &[preallocated(10, 5, 50)]);
    map.truncate(1 << 20);
    assert_eq!(lookup(&map, 12).mapping(), Mapping::Preallocated { addr: BlockAddr(50) });
}

#[test]
fn versions_grow_with_changes_and_only_with_those() {
    let map = ExtentMap::new_empty();
    let guard = pin();
    let before = map.view(&guard);
    publish(&map, &[data(0, 8, 100)]);
    assert!(!map.is_current(&before));
    assert!(map.is_current_in(&before, blocks(8, 100)));
    assert!(!map.is_current_in(&before, blocks(7, 100)));
    let view = map.view(&guard);
    map.unpin(&[data(0, 8, 100)], &mut no_sink);
    map.evict(u64::MAX);
    assert!(map.is_current(&view));
    assert_eq!(view.lookup(FileBlock(3)).mapping(), at(100));
    map.set_size(5);
    assert!(!map.is_current(&view));
    assert!(map.view(&guard).version() > view.version());
}

/// A size that changes inside the range is a change of the range; one behind it is not.
#[test]
fn a_range_is_current_if_its_part_of_the_size_is() {
    let map = ExtentMap::new_empty();
    map.publish(PublishWrite { extents: &[data(0, 8, 100)], size: Some(8 << 12) });
    let guard = pin();
    let view = map.view(&guard);
    map.set_size(100 << 12);
    assert!(map.is_current_in(&view, blocks(0, 8)));
    assert!(!map.is_current_in(&view, blocks(0, 9)));
}

/// Bad figures from a loader are an error, and change nothing.
#[test]
fn bad_extents_are_refused() {
    let map = ExtentMap::new_unloaded(1 << 20);
    let bad: [&[NewExtent]; 6] = [
        &[data(4, 4, 100), data(0, 4, 200)],
        &[data(0, 4, 100), data(3, 4, 200)],
        &[data(0, 0, 100)],
        &[data(0, 4, (1 << 48) - 3)],
        &[data(0, 4, u64::MAX)],
        &[NewExtent::new(FileBlock(0), 2, Mapping::Data { addr: BlockAddr(0), checksum: Some(1) })],
    ];
    for extents in bad {
        assert_eq!(map.load(blocks(0, 8), map.load_ticket(), extents, &mut no_sink), Err(BadExtents));
    }
    assert_eq!(map.entries(), 0);
    // Outside of the range is not bad, only of no interest.
    load(&map, blocks(4, 8), map.load_ticket(), &[data(0, 6, 100), data(20, 4, 200)]);
    assert_eq!(entries(&map, 0, 9), [(0, 4, UNKNOWN), (4, 6, at(104)), (6, 8, HOLE), (8, 9, UNKNOWN)]);
}

/// Files of many segments: borders at 2^30 blocks, far ends, loads to the very end.
#[test]
fn segments_join_into_one_file() {
    const SEGMENT: u64 = 1 << 30;
    let map = ExtentMap::new_empty();
    settle(&map, &[data(SEGMENT - 2, 4, 100), data(MAX_FILE_BLOCKS - 1, 1, 500)]);
    assert_eq!(
        entries(&map, SEGMENT - 3, SEGMENT + 3),
        [
            (SEGMENT - 3, SEGMENT - 2, HOLE),
            (SEGMENT - 2, SEGMENT, at(100)),
            (SEGMENT, SEGMENT + 2, at(102)),
            (SEGMENT + 2, SEGMENT + 3, HOLE)
        ]
    );
    assert_eq!(lookup(&map, MAX_FILE_BLOCKS - 1).mapping(), at(500));
    map.truncate(0);
    map.set_size(1);
    map.set_hole(BlockRange::from(FileBlock(1)));
    assert_eq!(entries(&map, SEGMENT, MAX_FILE_BLOCKS).len(), 1);

    let map = ExtentMap::new_unloaded(u64::MAX);
    let far = 5 * SEGMENT + 3;
    let outcome = load(&map, BlockRange::from(FileBlock(7)), map.load_ticket(), &[data(far, 2, 100)]);
    assert!(outcome.filled > 0 && outcome.refused == 0);
    assert_eq!(lookup(&map, 6).mapping(), UNKNOWN);
    assert_eq!(lookup(&map, 7).mapping(), HOLE);
    assert_eq!(lookup(&map, far + 1).mapping(), at(100));
    assert_eq!(lookup(&map, far + 2).mapping(), HOLE);
    assert_eq!(lookup(&map, MAX_FILE_BLOCKS - 1).mapping(), HOLE);
    map.check().unwrap();

    // A change far out, behind all listed segments, is seen by a loader of everything.
    let map = ExtentMap::new_unloaded(u64::MAX);
    let ticket = map.load_ticket();
    map.invalidate(blocks(far, far + 2));
    load(&map, BlockRange::ALL, ticket, &[]);
    assert_eq!(
        entries(&map, far - 1, far + 3),
        [(far - 1, far, HOLE), (far, far + 2, UNKNOWN), (far + 2, far + 3, HOLE)]
    );
    assert_eq!(lookup(&map, MAX_FILE_BLOCKS - 1).mapping(), HOLE);
}

/// A hole that is published to the end of the largest file is pinned all over.
#[test]
fn a_pinned_hole_to_the_end() {
    let map = ExtentMap::new_unloaded(0);
    let rest = NewExtent { range: BlockRange::from(FileBlock(5)), mapping: HOLE };
    publish(&map, &[rest]);
    map.check().unwrap();
    assert!(lookup(&map, MAX_FILE_BLOCKS - 1).is_pinned());
    map.invalidate(BlockRange::ALL);
    assert_eq!(lookup(&map, 5).mapping(), HOLE);
    map.unpin(&[rest], &mut no_sink);
    assert_eq!(map.view(&pin()).stats().pinned, 0);
    map.check().unwrap();
}

#[test]
fn a_panicking_sink_leaves_the_map_whole() {
    let map = ExtentMap::new_empty();
    let extents: Vec<NewExtent> = (0..500).map(|i| summed(i, 1000 + 2 * i, 1)).collect();
    settle(&map, &extents);
    publish(&map, &[summed(10, 5000, 1), summed(11, 5001, 1)]);
    let unpin = || map.unpin(&[summed(10, 5000, 1), summed(11, 5001, 1)], &mut |_, _| panic!("full"));
    assert!(catch_unwind(AssertUnwindSafe(unpin)).is_err());
    map.check().unwrap();
    for block in 0..500 {
        settle(&map, &[summed(block, 9000 + 2 * block, 1)]);
    }
    map.check().unwrap();
}
