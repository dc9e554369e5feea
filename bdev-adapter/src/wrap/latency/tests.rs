//! Tests of the latency wrapper.

use super::*;
use crate::blocking::BlockingIo;
use crate::mem::MemDevice;
use crate::{DmaBuf, Hints, IoErrorKind};

const MS: Duration = Duration::from_millis(1);

fn wrapped(arguments: &[(&str, &str)]) -> Arc<dyn Device> {
    let memory = MemDevice::new(1 << 20, 512).unwrap();
    LatencyDevice::wrap(memory, LatencyPlan::parse(arguments).unwrap())
}

fn read(device: &Arc<dyn Device>, tag: u64) -> Request {
    Request::read(0, DmaBuf::new(&device.dma(), 512).unwrap(), tag)
}

/// Polls and waits until everything is answered; each answer with the time since `started`.
fn drain(queue_pair: &mut dyn QueuePair, started: Instant) -> Vec<(u64, Duration)> {
    let (mut answers, mut completions) = (Vec::new(), Vec::new());
    while queue_pair.outstanding() > 0 {
        queue_pair.poll(&mut completions);
        for completion in completions.drain(..) {
            completion.result.unwrap();
            answers.push((completion.tag, started.elapsed()));
        }
        queue_pair.wait(Duration::from_secs(1));
    }
    answers
}

#[test]
fn each_kind_takes_its_time_and_answers_come_when_due() {
    let device = wrapped(&[("read", "60ms"), ("write", "20ms"), ("flush", "40ms"), ("fua", "60ms")]);
    let mut queue_pair = device.clone().queue_pair().unwrap();
    let buf = || DmaBuf::new(&device.dma(), 512).unwrap();
    let started = Instant::now();
    queue_pair.submit(read(&device, 1));
    queue_pair.submit(Request::write(0, buf(), 2));
    queue_pair.submit(Request::flush(0, 3));
    queue_pair.submit(Request::write(0, buf(), 4).with_hints(Hints::fua()));
    queue_pair.submit(Request::unmap(0, 512, 5));
    assert_eq!(queue_pair.outstanding(), 5);
    let answers = drain(&mut *queue_pair, started);
    assert_eq!(answers.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), [5, 2, 3, 1, 4]);
    for ((_, took), expected) in answers.iter().zip([0, 20, 40, 60, 80]) {
        assert!(*took >= expected * MS, "{answers:?}");
    }
    // Side by side, not one after another; generous, for a loaded machine.
    assert!(answers[4].1 < 1000 * MS, "{answers:?}");
}

#[test]
fn channels_are_a_queue() {
    let device = wrapped(&[("read", "20ms"), ("channels", "2")]);
    let mut first = device.clone().queue_pair().unwrap();
    let mut second = device.clone().queue_pair().unwrap();
    let started = Instant::now();
    for tag in 0..5 {
        first.submit(read(&device, tag));
    }
    second.submit(read(&device, 5));
    let answers = drain(&mut *first, started);
    assert_eq!(answers.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    for (tag, took) in &answers {
        assert!(*took >= 20 * MS * (*tag as u32 / 2 + 1), "{answers:?}");
    }
    let (_, took) = drain(&mut *second, started)[0];
    assert!(took >= 60 * MS, "the channels are those of the device: {took:?}");
}

#[test]
fn contract_violations_take_no_time() {
    let device = wrapped(&[("read", "1000s")]);
    let mut io = BlockingIo::new(&device).unwrap();
    let error = io.read(1, &mut [0; 512]).unwrap_err();
    assert_eq!(error.kind, IoErrorKind::Misaligned);
    // A request that is held back does not hold up the end of its queue pair.
    let mut queue_pair = device.clone().queue_pair().unwrap();
    queue_pair.submit(read(&device, 1));
    queue_pair.poll(&mut Vec::new());
    let started = Instant::now();
    queue_pair.wait(20 * MS);
    assert!(started.elapsed() >= 15 * MS, "waiting sleeps until the timeout or the next answer");
    drop(queue_pair);
}
