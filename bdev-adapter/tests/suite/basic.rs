//! What a device does with good requests, one at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev_adapter::mem::MemDevice;
use bdev_adapter::{Device, DmaBuf, Hints, IoErrorKind, Priority, Request};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::{Io, Target, fill, is_filled, seed};

pub(crate) fn geometry_is_sane(target: &Target) {
    let device = target.device();
    let geometry = device.geometry();
    assert!(geometry.block_size.is_power_of_two() && (512..=4096).contains(&geometry.block_size));
    assert!(geometry.capacity >= 32 << 20);
    assert_eq!(geometry.capacity % u64::from(geometry.block_size), 0);
    assert!(geometry.buffer_align.is_power_of_two());
    assert!(geometry.max_transfer >= geometry.block_size);
    assert!(geometry.queue_depth > 0);
    assert!(geometry.atomic_write >= geometry.block_size);
    assert!(!device.name().is_empty());
    assert!(!device.read_only());
    let buf = DmaBuf::new(&device.dma(), 1).unwrap();
    assert_eq!(buf.as_ptr() as usize % geometry.buffer_align as usize, 0, "its own buffers are aligned");
}

pub(crate) fn every_kind(target: &Target) {
    let mut io = Io::new(&target.device());
    let block = io.block();
    let (offset, len) = (7 * block as u64, 4 * block);
    let epoch = io.device.epoch();

    let buf = io.filled(len, 1);
    let address = buf.as_ptr();
    let completion = io.ok(Request::write(offset, buf, u64::MAX));
    assert_eq!(completion.epoch, epoch);
    let buf = completion.bufs.into_one().unwrap();
    assert_eq!((buf.as_ptr(), buf.len()), (address, len), "the same buffer comes back");
    assert!(is_filled(&buf, 1), "a write does not change its buffer");
    io.verify(offset, len, 1);

    io.ok(Request::flush(epoch, 3));
    let buf = io.filled(block, 2);
    io.ok(Request::write(offset, buf, 4).with_hints(Hints::fua()));
    io.verify(offset, block, 2);

    for priority in [Priority::Low, Priority::High] {
        let mut hints = Hints::default();
        hints.priority = priority;
        let buf = io.filled(block, 5);
        io.ok(Request::write(offset, buf, 5).with_hints(hints));
        let buf = io.buffer(block);
        let buf = io.ok(Request::read(offset, buf, 6).with_hints(hints)).bufs.into_one().unwrap();
        assert!(is_filled(&buf, 5));
    }

    for fua in [false, true] {
        io.write(offset, len, 7);
        let zeroes = Request::write_zeroes(offset + block as u64, 2 * block as u64, 8);
        io.ok(zeroes.with_hints(if fua { Hints::fua() } else { Hints::default() }));
        let buf = io.read(offset, len);
        let mut expected = vec![0; len];
        fill(&mut expected, 7);
        expected[block..3 * block].fill(0);
        assert!(buf[..] == expected[..], "zeroes exactly the range");
    }

    io.write(offset, len, 9);
    io.ok(Request::unmap(offset + block as u64, block as u64, 10));
    let buf = io.read(offset, len);
    let mut expected = vec![0; len];
    fill(&mut expected, 9);
    assert!(buf[..block] == expected[..block], "unmap leaves its neighbours alone");
    assert!(buf[2 * block..] == expected[2 * block..], "unmap leaves its neighbours alone");
    io.write(offset, len, 11);
    io.verify(offset, len, 11);
    io.ok(Request::flush(epoch, 12));
}

pub(crate) fn sizes_from_a_block_to_8_mib(target: &Target) {
    let mut io = Io::new(&target.device());
    let block = io.block();
    let mib = 1 << 20;
    let max = io.device.geometry().max_transfer as usize;
    let mut sizes = vec![block, 2 * block, 3 * block, 4096, 12288, 65536, 131_072 + block];
    sizes.extend([mib - block, mib, mib + block, 3 * mib + 5 * block, 8 * mib]);
    sizes.extend([max, max + block, 2 * max + block].into_iter().filter(|len| *len <= 8 * mib));
    for (number, len) in sizes.into_iter().map(|len| len.next_multiple_of(block)).enumerate() {
        let seed = number as u64 + 1;
        let offset = (3 + number as u64) * block as u64;
        let (before, after) = (offset - block as u64, offset + len as u64);
        io.write(before, block, 1000);
        io.write(after, block, 2000);
        io.write(offset, len, seed);
        io.verify(offset, len, seed);
        io.verify(before, block, 1000);
        io.verify(after, block, 2000);
        io.ok(Request::write_zeroes(offset, len as u64, 1));
        assert!(io.read(offset, len).iter().all(|byte| *byte == 0), "{len} bytes of zeroes");
        io.verify(before, block, 1000);
        io.verify(after, block, 2000);
        io.ok(Request::unmap(offset, len as u64, 1));
        io.verify(after, block, 2000);
    }
    // The last block of the device, and a transfer that ends with it.
    let end = io.capacity();
    io.write(end - block as u64, block, 5);
    io.verify(end - block as u64, block, 5);
    io.write(end - 2 * mib as u64, 2 * mib, 6);
    io.verify(end - 2 * mib as u64, 2 * mib, 6);
}

pub(crate) fn scatter_lists(target: &Target) {
    let mut rng = SmallRng::seed_from_u64(seed());
    let mut io = Io::new(&target.device());
    let (block, align) = (io.block(), io.device.geometry().buffer_align as usize);
    let cut = block.max(align);
    for round in 0..60u64 {
        let count = [1, 2, 3, 17, 64, 65, 300][rng.random_range(0..7)];
        let mut list = Vec::new();
        while list.len() < count {
            let blocks = if rng.random_bool(0.1) { rng.random_range(1..64) } else { rng.random_range(1..4) };
            let mut buf = io.buffer(blocks * cut);
            if blocks > 1 && rng.random_bool(0.5) {
                // Pieces of one allocation, in or out of order.
                let tail = buf.split_off(rng.random_range(1..blocks) * cut);
                let both = if rng.random_bool(0.5) { [buf, tail] } else { [tail, buf] };
                list.extend(both);
            } else {
                list.push(buf);
            }
        }
        let len: usize = list.iter().map(|buf| buf.len()).sum();
        let mut content = vec![0; len];
        fill(&mut content, round);
        scatter(&mut list, &content);
        let room = (io.capacity() - len as u64) / block as u64;
        let offset = rng.random_range(0..=room) * block as u64;
        let shape: Vec<_> = list.iter().map(|buf| (buf.as_ptr(), buf.len())).collect();

        let completion = io.ok(Request::write(offset, list, round));
        let mut back: Vec<_> =
            completion.bufs.as_slice().iter().map(|buf| (buf.as_ptr(), buf.len())).collect();
        assert_eq!(back, shape, "the list comes back in its order");
        assert!(io.read(offset, len)[..] == content[..], "a scattered write");

        let mut bufs = completion.bufs;
        for buf in bufs.as_mut_slice() {
            buf.fill(0);
        }
        let completion = io.ok(Request::read(offset, bufs, round));
        back = completion.bufs.as_slice().iter().map(|buf| (buf.as_ptr(), buf.len())).collect();
        assert_eq!(back, shape);
        let gathered: Vec<u8> =
            completion.bufs.as_slice().iter().flat_map(|buf| buf.iter().copied()).collect();
        assert!(gathered == content, "a scattered read");
    }
}

fn scatter(list: &mut [DmaBuf], content: &[u8]) {
    let mut at = 0;
    for buf in list {
        let len = buf.len();
        buf.copy_from_slice(&content[at..at + len]);
        at += len;
    }
}

pub(crate) fn flush_epochs(target: &Target) {
    let mut io = Io::new(&target.device());
    let epoch = io.device.epoch();
    io.write(0, io.block(), 1);
    io.ok(Request::flush(epoch, 1));
    for wrong in [epoch + 1, epoch.wrapping_sub(1), u64::MAX] {
        match io.fails(Request::flush(wrong, 2)) {
            IoErrorKind::EpochLost { expected, now } => assert_eq!((expected, now), (wrong, epoch)),
            other => panic!("a flush of epoch {wrong} in {epoch}: {other}"),
        }
    }
    assert_eq!(io.device.epoch(), epoch, "a wrong flush changes nothing");
    io.ok(Request::flush(epoch, 3));
}

pub(crate) fn deadlines(target: &Target) {
    let mut io = Io::new(&target.device());
    let block = io.block();
    let mut past = Hints::default();
    past.deadline = Some(Instant::now() - Duration::from_secs(1));
    let mut future = Hints::default();
    future.deadline = Some(Instant::now() + Duration::from_secs(3600));

    io.write(0, block, 1);
    let buf = io.filled(block, 2);
    assert_eq!(io.fails(Request::write(0, buf, 1).with_hints(past)), IoErrorKind::TimedOut);
    io.verify(0, block, 1);
    let buf = io.buffer(block);
    assert_eq!(io.fails(Request::read(0, buf, 1).with_hints(past)), IoErrorKind::TimedOut);
    assert_eq!(io.fails(Request::flush(io.device.epoch(), 1).with_hints(past)), IoErrorKind::TimedOut);
    let buf = io.buffer(block);
    io.ok(Request::read(0, buf, 1).with_hints(future));

    // A deep queue in which every second request is late already, and some become late while they wait.
    let count = 3 * io.device.geometry().queue_depth as u64;
    for tag in 0..count {
        let mut hints = if tag % 2 == 0 { past } else { future };
        if tag % 10 == 1 {
            hints.deadline = Some(Instant::now() + Duration::from_micros(200));
        }
        let buf = io.buffer(block);
        io.queue_pair.submit(Request::read(0, buf, tag).with_hints(hints));
    }
    io.drain();
    assert_eq!(io.completions.len() as u64, count);
    for completion in io.completions.drain(..) {
        assert_eq!(completion.bufs.len(), block as u64);
        let kind = completion.result.map_err(|error| error.kind);
        match completion.tag {
            tag if tag % 2 == 0 => assert_eq!(kind, Err(IoErrorKind::TimedOut)),
            tag if tag % 10 == 1 => assert!(matches!(kind, Ok(()) | Err(IoErrorKind::TimedOut)), "{kind:?}"),
            _ => assert_eq!(kind, Ok(())),
        }
    }
}

pub(crate) fn waiting(target: &Target) {
    let mut io = Io::new(&target.device());
    let block = io.block();
    // With nothing to wait for it may return at once, and must return in time.
    let started = Instant::now();
    io.queue_pair.wait(Duration::from_millis(20));
    assert!(started.elapsed() < Duration::from_secs(5));
    // Waiting alone, without a kick or a poll before, must bring the request to the device.
    let buf = io.filled(block, 1);
    io.queue_pair.submit(Request::write(0, buf, 1));
    let started = Instant::now();
    loop {
        io.queue_pair.wait(Duration::from_secs(1));
        if io.queue_pair.poll(&mut io.completions) > 0 {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(60));
    }
    // A kick alone starts it: the answer arrives without further polls in between.
    let buf = io.filled(block, 2);
    io.queue_pair.submit(Request::write(0, buf, 1));
    io.queue_pair.kick();
    io.drain();
    assert_eq!(io.completions.len(), 2);
    io.completions.drain(..).for_each(|completion| completion.result.unwrap());
    io.verify(0, block, 2);
}

pub(crate) fn buffers_of_another_device(target: &Target) {
    if !target.foreign_buffers {
        return;
    }
    let mut io = Io::new(&target.device());
    // The same arena numbers as in the device's own pool, at other addresses.
    let other: Arc<dyn Device> = MemDevice::new(1 << 20, 4096).unwrap();
    for round in 0..20u64 {
        let own = io.filled(4096, round);
        let mut foreign = DmaBuf::new(&other.dma(), 4096).unwrap();
        fill(&mut foreign, round + 100);
        io.ok(Request::write(0, own, 1));
        io.ok(Request::write(4096, foreign, 1));
        io.verify(0, 4096, round);
        let foreign = DmaBuf::new(&other.dma(), 4096).unwrap();
        let foreign = io.ok(Request::read(4096, foreign, 1)).bufs.into_one().unwrap();
        assert!(is_filled(&foreign, round + 100));
    }
}
