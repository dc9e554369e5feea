//! Changes to many files at once: each file's steps run in order, the files beside each other.

use std::fmt;

use bdev_adapter::DmaBuf;
use fs_core::{Channel, Completion, File, OpenFlags, Operation, Output};

use super::Part;
use super::import::odd_answer;
use crate::failure::{Doing, Result, show_name};
use crate::flight::Flight;

/// Files that are worked on at once.
const FILES: usize = 64;

/// A change to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// `len` bytes of the pattern of `seed` at byte `offset`.
    Write { offset: u64, len: usize, seed: u64 },
    /// Makes the file `size` bytes long.
    Truncate { size: u64 },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Write { offset, len, .. } => write!(f, "write {len} bytes at byte {offset} of"),
            Change::Truncate { size } => write!(f, "truncate to {size} bytes"),
        }
    }
}

/// A file and what is to be done with it.
#[derive(Debug, Clone)]
pub(crate) struct Task {
    /// Its name.
    pub(crate) name: Vec<u8>,
    /// The changes, in order.
    pub(crate) changes: Vec<Change>,
}

/// Fills `buf` with what the pattern of `seed` has at byte `offset` of a file. Position-addressed, so that any part of a
/// write can be checked alone.
pub(crate) fn pattern(seed: u64, offset: u64, buf: &mut [u8]) {
    let mut at = offset;
    let mut rest = buf;
    while !rest.is_empty() {
        let word = mix(seed ^ (at / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes();
        let skip = (at % 8) as usize;
        let len = rest.len().min(8 - skip);
        rest[..len].copy_from_slice(&word[skip..skip + len]);
        rest = &mut rest[len..];
        at += len as u64;
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Runs all `tasks`. Nothing is synced.
pub(crate) fn apply(channel: &Channel, tasks: &[Task], progress: &mut dyn FnMut(u64)) -> Result<()> {
    let mut editor = Editor { channel, flight: Flight::new(channel, FILES), spare: Vec::new() };
    let mut next = 0;
    let mut done = 0;
    loop {
        while next < tasks.len() && editor.flight.has_room() {
            editor.begin(&tasks[next]);
            next += 1;
        }
        let Some((step, completion)) = editor.flight.next() else { return Ok(()) };
        if editor.advance(step, completion)? {
            done += 1;
            progress(done);
        }
    }
}

/// Where a task is.
enum Step<'t> {
    Opening { task: &'t Task },
    Changing { task: &'t Task, file: File, at: usize, rest: Option<DmaBuf> },
    Closing { task: &'t Task },
}

struct Editor<'a, 't> {
    channel: &'a Channel,
    flight: Flight<'a, Step<'t>>,
    spare: Vec<DmaBuf>,
}

impl<'t> Editor<'_, 't> {
    fn begin(&mut self, task: &'t Task) {
        let operation = Operation::Open { name: task.name.clone(), flags: OpenFlags::default() };
        self.flight.submit(operation, Step::Opening { task });
    }

    /// True when the task is complete.
    fn advance(&mut self, step: Step<'t>, completion: Completion) -> Result<bool> {
        match step {
            Step::Opening { task } => {
                let output = completion.result.doing(format!("open '{}'", show_name(&task.name)))?;
                let Output::Opened(file) = output else { return Err(odd_answer("open")) };
                self.change(task, file, 0)?;
            }
            Step::Changing { task, file, at, rest } => {
                completion.result.doing(format!("{} '{}'", task.changes[at], show_name(&task.name)))?;
                if let Some(buf) = completion.bufs.into_one() {
                    self.spare.push(Part::whole(buf, rest));
                }
                self.change(task, file, at + 1)?;
            }
            Step::Closing { task } => {
                completion.result.doing(format!("close '{}'", show_name(&task.name)))?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn change(&mut self, task: &'t Task, file: File, at: usize) -> Result<()> {
        let (operation, rest) = match task.changes.get(at) {
            None => {
                self.flight.submit(Operation::Close { file }, Step::Closing { task });
                return Ok(());
            }
            Some(&Change::Truncate { size }) => (Operation::Truncate { file: file.clone(), size }, None),
            Some(&Change::Write { offset, len, seed }) => {
                let buf = self.buffer(len)?;
                let mut part = Part::of(buf, len);
                pattern(seed, offset, &mut part.buf);
                (Operation::Write { file: file.clone(), offset, buf: part.buf }, part.rest)
            }
        };
        self.flight.submit(operation, Step::Changing { task, file, at, rest });
        Ok(())
    }

    fn buffer(&mut self, len: usize) -> Result<DmaBuf> {
        match self.spare.iter().position(|buf| buf.len() >= len) {
            Some(index) => Ok(self.spare.swap_remove(index)),
            None => self.channel.buffer(len.next_power_of_two().max(4096)).doing("allocate an I/O buffer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_the_same_however_it_is_cut() {
        let mut whole = vec![0; 1000];
        pattern(7, 123, &mut whole);
        for (start, end) in [(0, 1000), (1, 2), (3, 900), (8, 16), (500, 999)] {
            let mut part = vec![0; end - start];
            pattern(7, 123 + start as u64, &mut part);
            assert_eq!(part, whole[start..end]);
        }
        let mut other = vec![0; 1000];
        pattern(8, 123, &mut other);
        assert_ne!(whole, other);
    }
}
