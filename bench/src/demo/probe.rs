//! Two quick figures on the files of the demo: durable overwrites and random reads, 4 KiB each.

use std::time::{Duration, Instant};

use fs_core::{Channel, File, OpenFlags, Operation};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::model::{Expected, Model};
use crate::failure::{Doing, Failure, Result, show_name};
use crate::flight::Flight;
use crate::transfer::edit::{Change, pattern};

/// Bytes of one access.
const BLOCK: usize = 4096;
/// The file that the durable overwrites go to.
pub(crate) const DURABLE_NAME: &[u8] = b"gaur-demo/durable-overwrites";
/// Its size in bytes at most.
const DURABLE_SIZE_MAX: u64 = 16 << 20;
/// Overwrites at most: each is replayed when the file is verified.
const DURABLE_MAX: u64 = 100_000;
/// Reads in flight.
pub(crate) const READ_DEPTH: usize = 32;
/// Files that the random reads go to.
const READ_FILES: usize = 1024;

/// What a probe measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Probe {
    /// Operations done.
    pub(crate) operations: u64,
    /// In this time.
    pub(crate) time: Duration,
}

/// Overwrites random blocks of a file for `duration`, each followed by a sync, one at a time. The file becomes part of
/// the model, so every one of these writes is verified after the remount. The second figure is how much `device_bytes` grew
/// meanwhile.
pub(crate) fn durable_overwrites(
    channel: &Channel,
    model: &mut Model,
    duration: Duration,
    seed: u64,
    device_bytes: impl Fn() -> u64,
) -> Result<(Probe, u64)> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let flags = OpenFlags::CREATE | OpenFlags::TRUNCATE;
    let file = channel.open(DURABLE_NAME, flags).doing("create the file for durable overwrites")?;
    let mut expected = Expected::default();
    let free = channel.statfs().doing("ask for the free space")?.free_bytes;
    let blocks = (DURABLE_SIZE_MAX.min(free / 8) / BLOCK as u64).max(1);
    let mut block = vec![0; blocks as usize * BLOCK];
    pattern(seed, 0, &mut block);
    let first = Change::Write { offset: 0, len: block.len(), seed };
    channel.write(&file, 0, &block).doing("write the file for durable overwrites")?;
    channel.sync_file(&file).doing("sync the file for durable overwrites")?;
    expected.change(first);

    let before = device_bytes();
    let started = Instant::now();
    let mut operations = 0;
    let block = &mut block[..BLOCK];
    while operations < DURABLE_MAX && started.elapsed() < duration {
        let (offset, seed) = (rng.random_range(0..blocks) * BLOCK as u64, rng.random());
        pattern(seed, offset, block);
        channel.write(&file, offset, block).doing("overwrite a block")?;
        channel.sync_file(&file).doing("sync an overwritten block")?;
        expected.change(Change::Write { offset, len: BLOCK, seed });
        operations += 1;
    }
    let (time, written) = (started.elapsed(), device_bytes() - before);
    channel.close(file).doing("close the file for durable overwrites")?;
    model.insert(DURABLE_NAME.to_vec(), expected);
    Ok((Probe { operations, time }, written))
}

/// Reads random blocks of many files for `duration`, [`READ_DEPTH`] in flight.
pub(crate) fn random_reads(channel: &Channel, model: &Model, duration: Duration, seed: u64) -> Result<Probe> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut names: Vec<(&Vec<u8>, u64)> = model
        .iter()
        .map(|(name, file)| (name, file.size / BLOCK as u64))
        .filter(|(_, blocks)| *blocks > 0)
        .collect();
    if names.is_empty() {
        return Err(Failure::new("no file of at least 4 KiB to read from"));
    }
    names.shuffle(&mut rng);
    names.truncate(READ_FILES);
    let mut files: Vec<(File, u64)> = Vec::with_capacity(names.len());
    for (name, blocks) in names {
        let file = channel.open(name, OpenFlags::READ_ONLY).doing(format!("open '{}'", show_name(name)))?;
        files.push((file, blocks));
    }

    let mut flight = Flight::new(channel, READ_DEPTH);
    let mut spare = (0..READ_DEPTH)
        .map(|_| channel.buffer(BLOCK).doing("allocate an I/O buffer"))
        .collect::<Result<Vec<_>>>()?;
    let started = Instant::now();
    let mut operations = 0;
    let mut stopping = false;
    loop {
        while !stopping && let Some(buf) = spare.pop() {
            let (file, blocks) = &files[rng.random_range(0..files.len())];
            let offset = rng.random_range(0..*blocks) * BLOCK as u64;
            flight.submit(Operation::Read { file: file.clone(), offset, buf }, ());
        }
        let Some(((), completion)) = flight.next() else { break };
        completion.result.doing("read a random block")?;
        spare.extend(completion.bufs.into_one());
        operations += 1;
        // The clock costs as much as a good part of a read from memory.
        if operations % 64 == 0 {
            stopping = started.elapsed() >= duration;
        }
    }
    let time = started.elapsed();
    for (file, _) in files {
        channel.close(file).doing("close a file")?;
    }
    Ok(Probe { operations, time })
}
