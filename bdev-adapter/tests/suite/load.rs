//! Many requests at once, from one thread and from several, with every byte verified.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::{Device, DmaBuf, Hints, Kind, Request};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::{Io, Target, fill, is_filled, seed};

pub(crate) fn depth_beyond_the_limit(target: &Target) {
    let mut io = Io::new(&target.device());
    let block = io.block();
    let count = (4 * u64::from(io.device.geometry().queue_depth)).min(io.capacity() / block as u64);
    let mut tags: Vec<u64> = (0..count).collect();
    tags.shuffle(&mut SmallRng::seed_from_u64(seed()));
    for write in [true, false] {
        for tag in &tags {
            let offset = tag * block as u64;
            let request = if write {
                Request::write(offset, io.filled(block, *tag), *tag)
            } else {
                Request::read(offset, io.buffer(block), *tag)
            };
            io.queue_pair.submit(request);
        }
        assert_eq!(io.queue_pair.outstanding() as u64, count);
        io.drain();
        let mut seen = HashSet::new();
        for completion in io.completions.drain(..) {
            completion.result.unwrap();
            assert!(seen.insert(completion.tag), "answered twice");
            assert!(is_filled(&completion.bufs.into_one().unwrap(), completion.tag));
        }
        assert_eq!(seen.len() as u64, count);
    }
    // Large requests that are split, more of them than fit: the parts of one must not be taken for those of another.
    let len = (io.device.geometry().max_transfer as usize).min(1 << 20) + block;
    let count = (io.capacity() / len as u64).min(24);
    for tag in 0..count {
        let buf = io.filled(len, 7000 + tag);
        io.queue_pair.submit(Request::write(tag * len as u64, buf, tag));
    }
    io.drain();
    io.completions.drain(..).for_each(|completion| completion.result.unwrap());
    for tag in 0..count {
        io.verify(tag * len as u64, len, 7000 + tag);
    }
}

/// The seed of a block's content: its place and how often it was written.
fn version_seed(block: u64, version: u64) -> u64 {
    block << 20 | version
}

pub(crate) fn two_queue_pairs_from_two_threads(target: &Target) {
    let device = target.device();
    let seed = seed();
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let device = &device;
            // Even blocks belong to one thread, odd ones to the other: neighbours everywhere.
            scope.spawn(move || hammer(device, thread, 2, seed.wrapping_add(thread)));
        }
    });
    assert_eq!(device.epoch(), device.epoch());
}

/// Writes and reads blocks `first`, `first + stride`, ... in random order, deep, and verifies every read.
fn hammer(device: &Arc<dyn Device>, first: u64, stride: u64, seed: u64) {
    const BLOCKS: u64 = 512;
    const OPERATIONS: usize = 6000;
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut io = Io::new(device);
    let len = 4096.max(io.block());
    let mut versions = [0u64; BLOCKS as usize];
    let mut busy = [false; BLOCKS as usize];
    let mut submitted = 0;
    let mut answered = 0;
    let epoch = io.device.epoch();
    while answered < OPERATIONS {
        while submitted < OPERATIONS && io.queue_pair.outstanding() < 48 {
            let number = rng.random_range(0..BLOCKS);
            let slot = number as usize;
            if busy[slot] {
                break;
            }
            let offset = (first + number * stride) * len as u64;
            let request = if versions[slot] == 0 || rng.random_bool(0.5) {
                versions[slot] += 1;
                Request::write(offset, io.filled(len, version_seed(number, versions[slot]) ^ first), number)
            } else if rng.random_bool(0.02) {
                Request::flush(epoch, BLOCKS)
            } else {
                Request::read(offset, io.buffer(len), number)
            };
            busy[slot] = request.tag < BLOCKS;
            io.queue_pair.submit(request);
            submitted += 1;
        }
        if io.queue_pair.poll(&mut io.completions) == 0 {
            io.queue_pair.wait(Duration::from_millis(10));
        }
        for completion in io.completions.drain(..) {
            answered += 1;
            completion.result.unwrap();
            if completion.tag < BLOCKS {
                let slot = completion.tag as usize;
                busy[slot] = false;
                let expected = version_seed(completion.tag, versions[slot]) ^ first;
                assert!(is_filled(&completion.bufs.into_one().unwrap(), expected), "block {slot}");
            }
        }
    }
}

/// What a block must read as.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Content {
    Anything,
    Zero,
    Seed(u64),
}

pub(crate) fn random_operations(target: &Target) {
    const BLOCKS: usize = 2048;
    let mut rng = SmallRng::seed_from_u64(seed());
    let mut io = Io::new(&target.device());
    let block = io.block();
    let mut model = vec![Content::Anything; BLOCKS];
    let mut busy = vec![false; BLOCKS];
    let mut in_flight: Vec<Option<(Kind, usize, usize)>> = vec![None; 32];
    let epoch = io.device.epoch();
    let mut next_seed = 1u64;
    for step in 0..4000 {
        let free = in_flight.iter().position(Option::is_none);
        let count = [1, 1, 1, 2, 7, 33, 300][rng.random_range(0..7)];
        let start = rng.random_range(0..=BLOCKS - count);
        if let Some(tag) = free
            && step < 3900
            && busy[start..start + count].iter().all(|busy| !busy)
        {
            let (offset, len) = ((start * block) as u64, count * block);
            let range = start..start + count;
            let request = match rng.random_range(0..100) {
                0..40 => Request::read(offset, pieces(&mut rng, io.buffer(len), block), tag as u64),
                40..80 => {
                    let mut buf = io.buffer(len);
                    for (number, bytes) in range.clone().zip(buf.chunks_mut(block)) {
                        next_seed += 1;
                        fill(bytes, next_seed);
                        model[number] = Content::Seed(next_seed);
                    }
                    Request::write(offset, pieces(&mut rng, buf, block), tag as u64)
                }
                80..90 => {
                    model[range.clone()].fill(Content::Zero);
                    Request::write_zeroes(offset, len as u64, tag as u64)
                }
                90..95 => {
                    model[range.clone()].fill(Content::Anything);
                    Request::unmap(offset, len as u64, tag as u64)
                }
                _ => Request::flush(epoch, tag as u64),
            };
            let fua = if rng.random_bool(0.1) { Hints::fua() } else { Hints::default() };
            let touched = if matches!(request.kind, Kind::Flush { .. }) { 0 } else { count };
            in_flight[tag] = Some((request.kind, start, touched));
            busy[start..start + touched].fill(true);
            io.queue_pair.submit(request.with_hints(fua));
            if rng.random_bool(0.3) {
                io.queue_pair.kick();
            }
        } else {
            io.queue_pair.wait(Duration::from_millis(1));
        }
        if rng.random_bool(0.3) || step >= 3900 {
            io.queue_pair.poll(&mut io.completions);
            answers(&mut io, &model, &mut busy, &mut in_flight);
        }
    }
    io.drain();
    answers(&mut io, &model, &mut busy, &mut in_flight);
    assert!(in_flight.iter().all(Option::is_none), "unanswered: {in_flight:?}");
    let all = io.read(0, BLOCKS * block);
    check(&all, 0, &model, block);
}

fn pieces(rng: &mut SmallRng, mut buf: DmaBuf, block: usize) -> Vec<DmaBuf> {
    let mut list = Vec::new();
    while buf.len() > 4096.max(block) && rng.random_bool(0.7) {
        let unit = 4096.max(block);
        let at = rng.random_range(1..=(buf.len() - 1) / unit) * unit;
        let tail = buf.split_off(at);
        list.push(buf);
        buf = tail;
    }
    list.push(buf);
    list
}

fn answers(
    io: &mut Io,
    model: &[Content],
    busy: &mut [bool],
    in_flight: &mut [Option<(Kind, usize, usize)>],
) {
    let block = io.block();
    for completion in io.completions.drain(..) {
        let (kind, start, count) = in_flight[completion.tag as usize].take().expect("answered twice");
        completion.result.unwrap();
        busy[start..start + count].fill(false);
        if kind == Kind::Read {
            let bytes: Vec<u8> =
                completion.bufs.as_slice().iter().flat_map(|buf| buf.iter().copied()).collect();
            check(&bytes, start, model, block);
        }
    }
}

fn check(bytes: &[u8], start: usize, model: &[Content], block: usize) {
    for (number, bytes) in bytes.chunks(block).enumerate() {
        let right = match model[start + number] {
            Content::Anything => true,
            Content::Zero => bytes.iter().all(|byte| *byte == 0),
            Content::Seed(seed) => is_filled(bytes, seed),
        };
        assert!(right, "block {} is not {:?}", start + number, model[start + number]);
    }
}
