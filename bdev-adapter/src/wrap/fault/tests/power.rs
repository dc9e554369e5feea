//! Flushes that lie, and power that goes away.

use super::*;
use crate::wrap::recorder::Recorder;

fn marks(memory: &MemDevice, blocks: usize) -> Vec<u8> {
    let mut bytes = vec![0; blocks * 512];
    memory.read_raw(0, &mut bytes).unwrap();
    bytes.iter().step_by(512).copied().collect()
}

fn mark(io: &mut BlockingIo, block: u64, value: u8) {
    io.write(block * 512, &[value; 512]).unwrap();
}

#[test]
fn a_power_cut_takes_back_what_was_not_flushed() {
    let (memory, device, mut io) = wrapped(&[("volatile", "on")]);
    memory.write_raw(512, &[9; 512]).unwrap();
    mark(&mut io, 0, 1);
    io.flush().unwrap();
    mark(&mut io, 0, 2);
    mark(&mut io, 0, 3);
    mark(&mut io, 1, 3);
    io.write_fua(2 * 512, &[4; 512]).unwrap();
    io.write_zeroes(2 * 512, 512).unwrap();
    let before = device.epoch();
    assert_eq!(device.power_cut(Survive::Nothing).unwrap(), 3);
    assert_eq!(kind(io.read(0, &mut [0; 512])), IoErrorKind::Gone);
    assert_eq!(marks(&memory, 3), [1, 9, 4]);
    device.restore();
    assert!(device.epoch() > before);
    mark(&mut io, 0, 5);
    assert_eq!(device.power_cut(Survive::Everything).unwrap(), 0);
    assert_eq!(marks(&memory, 3), [5, 9, 4]);
    device.restore();
    (0..64).for_each(|block| mark(&mut io, block, 6));
    let lost = device.power_cut(Survive::Random(7)).unwrap();
    let survived = marks(&memory, 64).iter().filter(|mark| **mark == 6).count() as u64;
    assert!(lost + survived == 64 && (16..48).contains(&lost), "{lost} lost, {survived} survived");
}

#[test]
fn a_lying_flush_makes_nothing_durable() {
    let (memory, device, mut io) = wrapped(&[("lying_flush_after", "1")]);
    mark(&mut io, 0, 1);
    io.flush().unwrap();
    mark(&mut io, 0, 2);
    io.flush().unwrap();
    io.write_fua(512, &[2; 512]).unwrap();
    assert_eq!(marks(&memory, 2), [2, 2]);
    assert_eq!(device.hits(), 2);
    device.power_cut(Survive::Nothing).unwrap();
    assert_eq!(marks(&memory, 2), [1, 0], "the honest flush counts, the lying ones do not");
    device.restore();
    let lost = IoErrorKind::EpochLost { expected: 0, now: 1 };
    let completion = io.run(Request::flush(0, 1));
    assert_eq!(kind(completion.result), lost, "it lies about the cache, not about resets");
}

#[test]
fn a_recorder_inside_sees_the_medium_and_one_outside_the_promises() {
    let inside = Recorder::over(memory());
    let mut plan = FaultPlan::default();
    plan.set("lying_flush", "1").unwrap();
    let fault = FaultDevice::wrap(inside.clone(), plan);
    let outside = Recorder::around(fault.clone(), Default::default()).unwrap();
    let mut io = BlockingIo::new(&(outside.clone() as Arc<dyn Device>)).unwrap();
    mark(&mut io, 0, 1);
    io.flush().unwrap();
    io.write_fua(512, &[1; 512]).unwrap();
    let lost = |recorder: &Recorder| {
        let log = recorder.log();
        let mut bytes = [0; 1024];
        log.state(usize::MAX, Survive::Nothing).image.read(0, &mut bytes).unwrap();
        ((bytes[0], bytes[512]), log.volatile_at(usize::MAX).len())
    };
    assert_eq!(lost(&inside), ((0, 0), 2), "neither flush nor FUA reached the medium");
    assert_eq!(lost(&outside), ((1, 1), 0), "what an honest device would have kept");
    fault.set_plan(FaultPlan::default());
    io.flush().unwrap();
    assert_eq!(lost(&inside), ((1, 1), 0), "an honest flush covers what the lies left behind");
}

#[test]
fn power_cut_as_a_fault() {
    let (memory, device, mut io) = wrapped(&[("seed", "5"), ("power_cut_nth", "66")]);
    mark(&mut io, 64, 1);
    io.flush().unwrap();
    (0..63).for_each(|block| mark(&mut io, block, 1));
    assert_eq!(kind(io.flush()), IoErrorKind::Gone);
    let left: usize = marks(&memory, 63).iter().map(|mark| usize::from(*mark)).sum();
    assert!((15..48).contains(&left), "{left} of 63 left");
    assert_eq!(marks(&memory, 65)[64], 1);
    device.restore();
    io.read(0, &mut [0; 512]).unwrap();
}

#[test]
fn a_cut_in_the_middle_of_requests_answers_them_all() {
    let (_, device, io) = wrapped(&[("power_cut_nth", "50")]);
    let mut queue_pair = queue_pair(&device);
    for tag in 0..100 {
        queue_pair.submit(Request::write(tag * 512, io.buffer(512).unwrap(), tag));
    }
    let completions = poll_for(&mut *queue_pair, 100, Duration::from_secs(10));
    assert_eq!((completions.len(), queue_pair.outstanding()), (100, 0));
    for completion in completions {
        assert_eq!((kind(completion.result), completion.bufs.len()), (IoErrorKind::Gone, 512));
    }
}
