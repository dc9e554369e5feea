//! Tests of the fault wrapper.

mod data;
mod grammar;
mod power;
mod time;

use super::*;
use crate::blocking::BlockingIo;
use crate::mem::MemDevice;
use crate::{Completion, Hints, OpenOptions, open};

const MIB: u64 = 1 << 20;

fn memory() -> Arc<MemDevice> {
    MemDevice::new(4 * MIB, 512).unwrap()
}

fn wrapped(plan: &[(&str, &str)]) -> (Arc<MemDevice>, Arc<FaultDevice>, BlockingIo) {
    let mut faults = FaultPlan::default();
    for (key, value) in plan {
        faults.set(key, value).unwrap();
    }
    let memory = memory();
    let device = FaultDevice::wrap(memory.clone(), faults);
    let io = BlockingIo::new(&(device.clone() as Arc<dyn Device>)).unwrap();
    (memory, device, io)
}

/// A queue pair of its own, for tests that want several requests in flight.
fn queue_pair(device: &Arc<FaultDevice>) -> Box<dyn QueuePair> {
    (device.clone() as Arc<dyn Device>).queue_pair().unwrap()
}

/// Polls for this long at least once, or until `count` answers are there.
fn poll_for(queue_pair: &mut dyn QueuePair, count: usize, limit: Duration) -> Vec<Completion> {
    let (mut completions, started) = (Vec::new(), Instant::now());
    loop {
        queue_pair.poll(&mut completions);
        if completions.len() >= count || started.elapsed() >= limit {
            return completions;
        }
        queue_pair.wait(Duration::from_millis(5));
    }
}

fn kind(result: Result<(), Box<crate::IoError>>) -> IoErrorKind {
    result.unwrap_err().kind
}

const EIO: IoErrorKind = IoErrorKind::Os(libc::EIO);

#[test]
fn the_same_seed_gives_the_same_faults() {
    let pattern = |seed: u64| -> Vec<bool> {
        let seed = seed.to_string();
        let (_, _, mut io) = wrapped(&[("seed", &seed), ("read_error", "0.3")]);
        (0..500).map(|_| io.read(0, &mut [0; 512]).is_err()).collect()
    };
    let first = pattern(7);
    assert_eq!(first, pattern(7));
    assert_ne!(first, pattern(8));
    let errors = first.iter().filter(|failed| **failed).count();
    assert!((100..200).contains(&errors), "{errors} of 500 at 0.3");
}

#[test]
fn conditions_hit_what_they_name() {
    let (_, device, mut io) =
        wrapped(&[("write_error_nth", "3"), ("read_error_range", "1MiB-2MiB"), ("flush_error_after", "1")]);
    io.write(0, &[1; 512]).unwrap();
    io.write_zeroes(0, 512).unwrap();
    assert_eq!(kind(io.write(0, &[2; 512])), EIO);
    io.write(0, &[3; 512]).unwrap();
    io.read(MIB - 512, &mut [0; 512]).unwrap();
    assert_eq!(kind(io.read(MIB - 512, &mut [0; 1024])), EIO);
    assert_eq!(kind(io.read(2 * MIB - 512, &mut [0; 512])), EIO);
    io.read(2 * MIB, &mut [0; 512]).unwrap();
    io.flush().unwrap();
    assert_eq!(kind(io.flush()), EIO);
    assert_eq!(kind(io.flush()), EIO);
    assert_eq!(device.seen(), Seen { reads: 4, writes: 4, flushes: 3, barriers: 3, all: 11 });
    assert_eq!(device.hits(), 5);
}

#[test]
fn a_failed_write_changes_nothing_and_a_lost_one_says_ok() {
    let (memory, _, mut io) = wrapped(&[("write_error_nth", "1"), ("lost_write_nth", "2")]);
    let mut bytes = [9; 512];
    assert_eq!(kind(io.write(0, &[1; 512])), EIO);
    io.write(0, &[2; 512]).unwrap();
    memory.read_raw(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 512]);
    io.write(0, &[3; 512]).unwrap();
    memory.read_raw(0, &mut bytes).unwrap();
    assert_eq!(bytes, [3; 512]);
}

#[test]
fn a_torn_write_leaves_a_prefix_and_no_device() {
    let mut prefixes = std::collections::HashSet::new();
    for seed in 0..60 {
        let seed = seed.to_string();
        let (memory, device, mut io) = wrapped(&[("seed", &seed), ("torn_write_nth", "1")]);
        let sizes = [512, 1024, 512, 2048];
        let bufs: Vec<_> = sizes.iter().map(|len| io.buffer(*len).unwrap()).collect();
        let mut request = Request::write(4096, bufs, 42);
        for buf in request.bufs.as_mut_slice() {
            buf.fill(0xEE);
        }
        let completion = io.run(request);
        assert_eq!(completion.tag, 42);
        let error = completion.result.unwrap_err();
        assert_eq!((error.kind, error.len), (IoErrorKind::Gone, 4096));
        let back: Vec<_> = completion.bufs.as_slice().iter().map(|buf| buf.len()).collect();
        assert_eq!(back, sizes, "the buffers come back as they were");
        let mut bytes = [0; 4096];
        memory.read_raw(4096, &mut bytes).unwrap();
        let written = bytes.iter().take_while(|byte| **byte == 0xEE).count();
        assert!(bytes[written..].iter().all(|byte| *byte == 0));
        assert!(written % 512 == 0 && written < 4096);
        prefixes.insert(written);
        assert!(device.is_gone());
        assert_eq!(kind(io.read(0, &mut [0; 512])), IoErrorKind::Gone);
        device.restore();
        io.read(0, &mut [0; 512]).unwrap();
    }
    assert!(prefixes.len() >= 6, "tears at few places: {prefixes:?}");
}

#[test]
fn a_single_buffer_of_a_torn_write_comes_back_whole() {
    for seed in 0..10 {
        let seed = seed.to_string();
        let (_, _, mut io) = wrapped(&[("seed", &seed), ("torn_write_nth", "1")]);
        let completion = io.run(Request::write(0, io.buffer(8192).unwrap(), 1));
        assert_eq!(completion.bufs.into_one().unwrap().len(), 8192);
    }
}

#[test]
fn a_device_that_disappears_answers_what_is_in_flight() {
    let (_, device, io) = wrapped(&[("gone_after", "2")]);
    let mut queue_pair = (device.clone() as Arc<dyn Device>).queue_pair().unwrap();
    for tag in 0..5 {
        queue_pair.submit(Request::read(0, io.buffer(512).unwrap(), tag));
    }
    let mut completions = Vec::new();
    while queue_pair.outstanding() > 0 {
        queue_pair.poll(&mut completions);
    }
    assert_eq!(completions.len(), 5);
    for completion in completions {
        assert_eq!(kind(completion.result), IoErrorKind::Gone);
        assert_eq!(completion.bufs.len(), 512);
    }
}

#[test]
fn a_reset_starts_an_epoch() {
    let (_, device, mut io) = wrapped(&[]);
    let before = device.epoch();
    io.write(0, &[1; 512]).unwrap();
    device.reset();
    let lost = IoErrorKind::EpochLost { expected: before, now: before + 1 };
    assert_eq!(kind(io.flush()), lost);
    io.write(0, &[1; 512]).unwrap();
    io.flush().unwrap();
    let completion = io.run(Request::flush(before, 1));
    assert_eq!(kind(completion.result), lost);
    let completion = io.run(Request::write(0, io.buffer(512).unwrap(), 1).with_hints(Hints::fua()));
    assert_eq!(completion.epoch, before + 1);
}

#[test]
fn contract_violations_are_not_counted() {
    let (_, device, mut io) = wrapped(&[("io_error_nth", "1")]);
    assert_eq!(kind(io.read(1, &mut [0; 512])), IoErrorKind::Misaligned);
    assert_eq!(device.seen(), Seen::default());
    assert_eq!(kind(io.unmap(0, 512)), EIO);
}

#[test]
fn by_uri() {
    let device = open("fault:write_error_nth=2/mem:1MiB", &OpenOptions::default()).unwrap();
    assert_eq!(device.name(), "fault:write_error_nth=2/mem:1MiB");
    let mut io = BlockingIo::new(&device).unwrap();
    io.write(0, &[0; 4096]).unwrap();
    io.write(0, &[0; 4096]).unwrap_err();
    io.write(0, &[0; 4096]).unwrap();
}
