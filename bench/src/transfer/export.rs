//! Files out of the filesystem, in pieces, many reads in flight on one channel.
//!
//! Pieces of one file may arrive in any order; its end is announced after all of them.

use std::collections::VecDeque;

use bdev_adapter::DmaBuf;
use fs_core::{Channel, Completion, File, OpenFlags, Operation, Output};

use super::import::odd_answer;
use super::{CHUNK, DEPTH, Pool};
use crate::failure::{Doing, Failure, Result, show_name};
use crate::flight::Flight;

/// Files that are open, or being opened, at once at most.
const FILES: usize = 128;

/// What comes out.
pub(crate) enum Event {
    /// `len` bytes of file number `index` from byte `offset`, at the start of `buf`. The buffer goes back to the pool.
    Data { index: usize, offset: u64, len: usize, buf: DmaBuf },
    /// All of file number `index` has come; it has `size` bytes.
    End { index: usize, size: u64 },
}

/// Reads all of `names` and hands the pieces to `sink`, which sees to it that buffers return to `pool`.
pub(crate) fn export(
    channel: &Channel,
    names: &[Vec<u8>],
    pool: &Pool,
    sink: &mut dyn FnMut(Event) -> Result<()>,
) -> Result<()> {
    let flight = Flight::new(channel, DEPTH + FILES);
    let mut reader =
        Reader { names, pool, flight, next: 0, open: 0, opened: VecDeque::new(), outgoing: Vec::new() };
    reader.run(sink)
}

/// A file between its open and its close.
struct Outgoing {
    index: usize,
    file: File,
    size: u64,
    /// Where the next read starts.
    at: u64,
    reads: usize,
}

enum Step {
    Open { index: usize },
    Read { slot: usize, offset: u64 },
    Close,
}

struct Reader<'a> {
    names: &'a [Vec<u8>],
    pool: &'a Pool,
    flight: Flight<'a, Step>,
    /// The next file to open.
    next: usize,
    open: usize,
    /// Slots of files that still have bytes to ask for.
    opened: VecDeque<usize>,
    outgoing: Vec<Option<Outgoing>>,
}

impl Reader<'_> {
    fn run(&mut self, sink: &mut dyn FnMut(Event) -> Result<()>) -> Result<()> {
        loop {
            let submitted = self.submit_reads() + self.submit_opens();
            let mut answered = 0;
            while let Some((step, completion)) = self.flight.try_next() {
                self.advance(step, completion, sink)?;
                answered += 1;
            }
            if self.next == self.names.len() && self.open == 0 && self.flight.is_empty() {
                return Ok(());
            }
            if submitted + answered == 0 {
                self.flight.relax();
            }
        }
    }

    fn submit_reads(&mut self) -> usize {
        let mut submitted = 0;
        while let Some(&slot) = self.opened.front() {
            let Some(out) = &mut self.outgoing[slot] else {
                self.opened.pop_front();
                continue;
            };
            let Some(buf) = self.pool.try_take() else { break };
            let (file, offset) = (out.file.clone(), out.at);
            out.at += CHUNK as u64;
            out.reads += 1;
            if out.at >= out.size {
                self.opened.pop_front();
            }
            self.flight.submit(Operation::Read { file, offset, buf }, Step::Read { slot, offset });
            submitted += 1;
        }
        submitted
    }

    fn submit_opens(&mut self) -> usize {
        let mut submitted = 0;
        while self.next < self.names.len() && self.open < FILES {
            let (index, name) = (self.next, self.names[self.next].clone());
            self.flight.submit(Operation::Open { name, flags: OpenFlags::READ_ONLY }, Step::Open { index });
            self.next += 1;
            self.open += 1;
            submitted += 1;
        }
        submitted
    }

    fn advance(
        &mut self,
        step: Step,
        completion: Completion,
        sink: &mut dyn FnMut(Event) -> Result<()>,
    ) -> Result<()> {
        match step {
            Step::Open { index } => {
                let output = completion.result.doing(format!("open {}", self.name(index)))?;
                let Output::Opened(file) = output else { return Err(odd_answer("open")) };
                let size = file.size();
                let slot = self.keep(Outgoing { index, file, size, at: 0, reads: 0 });
                if size > 0 {
                    self.opened.push_back(slot);
                } else {
                    self.finish(slot, sink)?;
                }
            }
            Step::Read { slot, offset } => {
                let Some(out) = &mut self.outgoing[slot] else { return Err(odd_answer("read")) };
                out.reads -= 1;
                let (index, size) = (out.index, out.size);
                let complete = out.reads == 0 && out.at >= size;
                let output = completion.result.doing(format!("read {}", self.name(index)))?;
                let (Output::Bytes(len), Some(buf)) = (output, completion.bufs.into_one()) else {
                    return Err(odd_answer("read"));
                };
                let expected = (CHUNK as u64).min(size - offset);
                if len as u64 != expected {
                    let name = self.name(index);
                    return Err(Failure::new(format!(
                        "read {name} at byte {offset}: got {len} bytes, expected {expected} of its {size}"
                    )));
                }
                sink(Event::Data { index, offset, len, buf })?;
                if complete {
                    self.finish(slot, sink)?;
                }
            }
            Step::Close => {
                completion.result.doing("close a file")?;
                self.open -= 1;
            }
        }
        Ok(())
    }

    fn keep(&mut self, out: Outgoing) -> usize {
        // There are at most FILES of them: a linear search is nothing beside an open.
        match self.outgoing.iter().position(Option::is_none) {
            Some(slot) => {
                self.outgoing[slot] = Some(out);
                slot
            }
            None => {
                self.outgoing.push(Some(out));
                self.outgoing.len() - 1
            }
        }
    }

    fn finish(&mut self, slot: usize, sink: &mut dyn FnMut(Event) -> Result<()>) -> Result<()> {
        let Some(out) = self.outgoing[slot].take() else { return Err(odd_answer("read")) };
        self.flight.submit(Operation::Close { file: out.file }, Step::Close);
        sink(Event::End { index: out.index, size: out.size })
    }

    fn name(&self, index: usize) -> String {
        format!("'{}'", show_name(&self.names[index]))
    }
}
