//! Tests of the recorder and of the crash states built from it.

use std::collections::HashSet;
use std::sync::Arc;

use super::*;
use crate::blocking::BlockingIo;
use crate::mem::MemDevice;
use crate::wrap::fault::{FaultDevice, FaultPlan};
use crate::wrap::recorder::Recorder;
use crate::{Device, Hints, QueuePair, Request};

const BLOCK: usize = 512;

fn recorder() -> (Arc<Recorder>, BlockingIo) {
    let recorder = Recorder::over(MemDevice::new(1 << 20, BLOCK as u32).unwrap());
    let io = BlockingIo::new(&(recorder.clone() as Arc<dyn Device>)).unwrap();
    (recorder, io)
}

/// First byte of each of the first `blocks` blocks.
fn marks(image: &Image, blocks: usize) -> Vec<u8> {
    let mut bytes = vec![0; blocks * BLOCK];
    image.read(0, &mut bytes).unwrap();
    bytes.iter().step_by(BLOCK).copied().collect()
}

fn mark(io: &mut BlockingIo, block: usize, value: u8) {
    io.write((block * BLOCK) as u64, &[value; BLOCK]).unwrap();
}

#[test]
fn every_subset_of_the_unflushed_writes_appears_and_nothing_else() {
    let (recorder, mut io) = recorder();
    mark(&mut io, 0, 1);
    mark(&mut io, 1, 1);
    io.flush().unwrap();
    let acknowledged = recorder.point();
    for block in 0..3 {
        mark(&mut io, block, 2);
    }
    let log = recorder.log();
    let seen: HashSet<_> =
        (0..400).map(|seed| marks(&log.state(usize::MAX, Survive::Random(seed)).image, 3)).collect();
    let expected: HashSet<_> = (0..8)
        .map(|bits| {
            vec![if bits & 1 != 0 { 2 } else { 1 }, if bits & 2 != 0 { 2 } else { 1 }, (bits >> 2 & 1) * 2]
        })
        .collect();
    assert_eq!(seen, expected);
    for state in log.crash_states(1, CrashOptions { points: Points::All, subsets: 3 }) {
        if state.point >= acknowledged {
            assert!(marks(&state.image, 2).iter().all(|mark| *mark >= 1), "{:?}", state.survive);
        }
    }
    assert_eq!(marks(&log.state(acknowledged, Survive::Nothing).image, 3), [1, 1, 0]);
    assert_eq!(marks(&log.state(usize::MAX, Survive::Everything).image, 3), [2, 2, 2]);
    let volatile = log.volatile_at(usize::MAX);
    assert_eq!(volatile.len(), 3);
    assert_eq!(marks(&log.image_at(usize::MAX, &volatile[1..2]), 3), [1, 2, 0]);
}

#[test]
fn writes_are_torn_at_any_block() {
    let (recorder, mut io) = recorder();
    io.write(0, &[7; 4 * BLOCK]).unwrap();
    let log = recorder.log();
    let seen: HashSet<_> =
        (0..2000).map(|seed| marks(&log.state(usize::MAX, Survive::Random(seed)).image, 4)).collect();
    assert_eq!(seen.len(), 16, "every set of blocks");
}

#[test]
fn a_later_write_wins_over_an_earlier_one() {
    let (recorder, mut io) = recorder();
    mark(&mut io, 0, 1);
    io.write_fua(0, &[2; BLOCK]).unwrap();
    mark(&mut io, 1, 1);
    mark(&mut io, 1, 2);
    let log = recorder.log();
    for seed in 0..100 {
        let state = log.state(usize::MAX, Survive::Random(seed));
        assert_eq!(marks(&state.image, 1), [2], "a volatile write came back over a durable one");
    }
    assert_eq!(marks(&log.state(usize::MAX, Survive::Everything).image, 2), [2, 2]);
    io.flush().unwrap();
    assert_eq!(marks(&recorder.log().state(usize::MAX, Survive::Nothing).image, 2), [2, 2]);
}

#[test]
fn writes_in_flight_together_land_in_either_order() {
    let (recorder, io) = recorder();
    let mut queue_pair = (recorder.clone() as Arc<dyn Device>).queue_pair().unwrap();
    for value in 1..3 {
        let mut buf = io.buffer(BLOCK).unwrap();
        buf.fill(value);
        queue_pair.submit(Request::write(0, buf, 0));
    }
    finish(&mut *queue_pair);
    let log = recorder.log();
    let seen: HashSet<_> =
        (0..200).map(|seed| marks(&log.state(usize::MAX, Survive::Random(seed)).image, 1)[0]).collect();
    assert_eq!(seen, HashSet::from([0, 1, 2]));
}

#[test]
fn a_flush_covers_what_completed_before_it_was_submitted() {
    let (recorder, io) = recorder();
    let mut queue_pair = (recorder.clone() as Arc<dyn Device>).queue_pair().unwrap();
    let mut buf = io.buffer(BLOCK).unwrap();
    buf.fill(1);
    queue_pair.submit(Request::write(0, buf, 0));
    queue_pair.submit(Request::flush(0, 1));
    finish(&mut *queue_pair);
    let log = recorder.log();
    assert_eq!(marks(&log.state(usize::MAX, Survive::Nothing).image, 1), [0]);
    assert_eq!(log.volatile_at(usize::MAX), [0]);
}

#[test]
fn fua_zeroes_and_unmap() {
    let (recorder, mut io) = recorder();
    io.write_fua(0, &[1; 3 * BLOCK]).unwrap();
    io.write_zeroes(0, BLOCK as u64).unwrap();
    io.unmap(BLOCK as u64, BLOCK as u64).unwrap();
    let log = recorder.log();
    assert_eq!(marks(&log.state(usize::MAX, Survive::Nothing).image, 3), [1, 1, 1]);
    assert_eq!(marks(&log.state(usize::MAX, Survive::Everything).image, 3), [0, 0, 1]);
    io.flush().unwrap();
    assert_eq!(marks(&recorder.log().state(usize::MAX, Survive::Nothing).image, 3), [0, 0, 1]);
    let mut buf = io.buffer(BLOCK).unwrap();
    buf.fill(5);
    let completion = io.run(Request::write(0, buf, 9).with_hints(Hints::fua()));
    assert_eq!(completion.tag, 9);
    assert_eq!(marks(&recorder.log().state(usize::MAX, Survive::Nothing).image, 1), [5]);
}

#[test]
fn a_failed_write_stays_volatile_and_epochs_are_respected() {
    let inner = MemDevice::new(1 << 20, BLOCK as u32).unwrap();
    let base = inner.snapshot();
    let mut plan = FaultPlan::default();
    plan.set("write_error_nth", "1").unwrap();
    let fault = FaultDevice::wrap(inner, plan);
    let recorder = Recorder::with_base(fault.clone(), base);
    let mut io = BlockingIo::new(&(recorder.clone() as Arc<dyn Device>)).unwrap();
    io.write(0, &[1; BLOCK]).unwrap_err();
    io.flush().unwrap();
    assert_eq!(recorder.log().volatile_at(usize::MAX), [0]);
    mark(&mut io, 1, 1);
    fault.reset();
    mark(&mut io, 2, 1);
    // The first write of the pair belongs to the old epoch: this flush fails, the next covers the new epoch only.
    io.flush().unwrap_err();
    io.flush().unwrap();
    let state = recorder.log().state(usize::MAX, Survive::Nothing);
    assert_eq!(marks(&state.image, 3), [0, 0, 1]);
}

#[test]
fn states_can_be_replayed_and_mounted_as_devices() {
    let (recorder, mut io) = recorder();
    for round in 0..40u8 {
        io.write(u64::from(round % 7) * 1024, &[round; 2048]).unwrap();
        if round % 5 == 4 {
            io.flush().unwrap();
        }
    }
    let log = recorder.log();
    let seed = crate::test_util::seed();
    let options = CrashOptions { points: Points::Sampled(3), subsets: 3 };
    let states: Vec<_> = log.crash_states(seed, options).collect();
    assert!(states.len() > 40);
    for state in &states {
        assert_eq!(log.state(state.point, state.survive).image, state.image);
    }
    let last = states.last().unwrap();
    assert_eq!(last.point, log.events().len());
    let device = MemDevice::from_image(&last.image).unwrap();
    assert_eq!(device.snapshot().capacity(), 1 << 20);
}

fn finish(queue_pair: &mut dyn QueuePair) {
    let mut completions = Vec::new();
    while queue_pair.outstanding() > 0 {
        queue_pair.poll(&mut completions);
    }
    assert!(completions.iter().all(|completion| completion.result.is_ok()));
}
