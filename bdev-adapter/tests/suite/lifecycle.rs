//! Opening, closing, moving, dropping.

use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::{Claim, DmaBuf, DmaSource, Error, Hints, OpenOptions, Request};

use super::{Io, Target, Tracked, fill, is_filled};

pub(crate) fn many_queue_pairs(target: &Target) {
    let device = target.device();
    let mut all: Vec<Io> = (0..12).map(|_| Io::new(&device)).collect();
    for round in 0..3u64 {
        for (number, io) in all.iter_mut().enumerate() {
            let buf = io.filled(4096, number as u64 + round);
            io.queue_pair.submit(Request::write(number as u64 * 4096, buf, 1));
        }
        all.iter_mut().for_each(Io::drain);
        for (number, io) in all.iter_mut().enumerate() {
            io.completions.drain(..).for_each(|completion| completion.result.unwrap());
            io.verify(number as u64 * 4096, 4096, number as u64 + round);
        }
        // Closing some leaves the others at work.
        all.truncate(12 - 4 * (round as usize + 1).min(2));
    }
    // A device lives as long as a queue pair needs it.
    let mut last = all.pop().unwrap();
    drop(all);
    drop(device);
    last.write(0, 4096, 77);
    last.verify(0, 4096, 77);
}

pub(crate) fn moved_between_threads(target: &Target) {
    let device = target.device();
    let block = device.geometry().block_size as usize;
    let per_thread = u64::from(device.geometry().queue_depth) + 16;
    let threads = 4;
    let mut io = Io::new(&device);
    for thread in 0..threads {
        // Each thread submits, and ends with its requests in flight; the next one goes on with the queue pair.
        io = std::thread::spawn(move || {
            for number in 0..per_thread {
                let tag = thread * per_thread + number;
                let buf = io.filled(block, tag);
                io.queue_pair.submit(Request::write(tag * block as u64, buf, tag));
            }
            io.queue_pair.submit(Request::flush(io.device.epoch(), u64::MAX - thread));
            io.queue_pair.kick();
            if thread == 1 {
                io.queue_pair.poll(&mut io.completions);
            }
            io
        })
        .join()
        .unwrap();
    }
    io.drain();
    assert_eq!(io.completions.len() as u64, threads * (per_thread + 1));
    io.completions.drain(..).for_each(|completion| completion.result.unwrap());
    for tag in 0..threads * per_thread {
        io.verify(tag * block as u64, block, tag);
    }
    // The old thread lives on and does other things while the new one waits.
    let (give, take) = std::sync::mpsc::channel::<Io>();
    let receiver = std::thread::spawn(move || {
        for mut io in take {
            io.drain();
            assert_eq!(io.completions.len(), 64);
        }
    });
    for _ in 0..10 {
        let mut io = Io::new(&device);
        for tag in 0..64 {
            let buf = io.buffer(block);
            io.queue_pair.submit(Request::read(tag * block as u64, buf, tag));
        }
        io.queue_pair.kick();
        give.send(io).unwrap();
    }
    drop(give);
    receiver.join().unwrap();
}

pub(crate) fn teardown_with_io_in_flight(target: &Target) {
    let device = target.device();
    let tracked = Tracked::new(device.dma());
    let source: Arc<dyn DmaSource> = tracked.clone();
    let len = 256 << 10;
    for round in 0..12u64 {
        let mut queue_pair = Arc::clone(&device).queue_pair().unwrap();
        let count = [1, 8, 64, 2 * u64::from(device.geometry().queue_depth)][round as usize % 4];
        for tag in 0..count {
            let len = if count > 64 { 4096 } else { len };
            let mut buf = DmaBuf::new(&source, len).unwrap();
            fill(&mut buf, tag);
            let offset = tag % 64 * len as u64;
            let request = match (round + tag) % 3 {
                0 => Request::read(offset, buf, tag),
                1 => Request::write(offset, buf, tag),
                _ => Request::write(offset, buf, tag).with_hints(Hints::fua()),
            };
            queue_pair.submit(request);
        }
        queue_pair.submit(Request::flush(device.epoch(), 1));
        match round % 3 {
            0 => queue_pair.kick(),
            1 => {
                queue_pair.poll(&mut Vec::new());
            }
            _ => {}
        }
        drop(queue_pair);
        assert_eq!(tracked.live(), 0, "buffers are released when the queue pair is gone");
        // The same memory again: nothing may be writing into it any more.
        let len = if count > 64 { 4096 } else { len };
        let mut again: Vec<_> = (0..count).map(|_| DmaBuf::new(&source, len).unwrap()).collect();
        again.iter_mut().for_each(|buf| buf.fill(0x5A));
        std::thread::sleep(Duration::from_millis(20));
        let untouched = again.iter().all(|buf| buf.iter().all(|byte| *byte == 0x5A));
        assert!(untouched, "the device still writes into buffers of a queue pair that is gone");
        drop(again);
        let mut io = Io::new(&device);
        io.write(16 << 20, len, round + 1000);
        io.verify(16 << 20, len, round + 1000);
    }
}

pub(crate) fn exclusive_open(target: &Target) {
    if !target.persistent {
        return;
    }
    let device = target.device();
    let refused = |read_only: bool| match (target.open)(&OpenOptions::new().read_only(read_only)) {
        Err(Error::Busy { .. }) => {}
        Err(other) => panic!("expected Busy: {other}"),
        Ok(_) => panic!("opened twice"),
    };
    refused(false);
    refused(true);
    // The device is still open while a queue pair is.
    let mut io = Io::new(&device);
    drop(device);
    refused(false);
    io.write(0, 4096, 1);
    drop(io);
    let mut io = Io::new(&target.device());
    io.verify(0, 4096, 1);
}

pub(crate) fn content_survives_reopening(target: &Target) {
    if !target.persistent {
        // The content lives as long as the device does: a new queue pair finds it.
        let device = target.device();
        Io::new(&device).write(0, 1 << 20, 3);
        return Io::new(&device).verify(0, 1 << 20, 3);
    }
    for round in 0..3u64 {
        let mut io = Io::new(&target.device());
        if round > 0 {
            io.verify(round * 4096, 1 << 20, round - 1);
        }
        io.write((round + 1) * 4096, 1 << 20, round);
        io.ok(Request::flush(io.device.epoch(), 1));
        let buf = io.filled(4096, 100 + round);
        io.ok(Request::write(8 << 20, buf, 1).with_hints(Hints::fua()));
        drop(io);
        let mut io = Io::new(&target.device());
        io.verify(8 << 20, 4096, 100 + round);
    }
    let mut io = Io::new(&(target.open)(&OpenOptions::new().read_only(true)).unwrap());
    let buf = io.read(3 * 4096, 1 << 20);
    assert!(is_filled(&buf, 2));
}

pub(crate) fn claim(target: &Target) {
    let device = target.device();
    let first = Claim::take(&device).unwrap();
    assert!(matches!(Claim::take(&device), Err(Error::Busy { .. })));
    drop(first);
    let second = Claim::take(&device).unwrap();
    let other = Arc::clone(&device);
    std::thread::spawn(move || assert!(matches!(Claim::take(&other), Err(Error::Busy { .. }))))
        .join()
        .unwrap();
    drop(second);
    // A claim keeps the device.
    let claim = Claim::take(&device).unwrap();
    drop(device);
    std::thread::sleep(Duration::from_millis(1));
    drop(claim);
}
