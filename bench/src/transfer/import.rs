//! Host files into the filesystem.
//!
//! A reader thread fills buffers from the host; the calling thread opens, writes and closes many files at once through
//! `submit` and `poll`. The number of buffers bounds everything: the reader waits when all are in flight.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File as HostFile;
use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, sync_channel};
use std::thread;

use bdev_adapter::{Device, DmaBuf};
use fs_core::{Channel, Completion, File, OpenFlags, Operation, Output};

use super::{CHUNK, DEPTH, Item, Part, Pool};
use crate::failure::{Doing, Failure, Result, show_name};
use crate::flight::Flight;

/// Files that are open at once at most.
const FILES: usize = 256;

/// How far an import is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Imported {
    /// Files that are complete.
    pub(crate) files: u64,
    /// Bytes written.
    pub(crate) bytes: u64,
}

/// Imports `items`, each opened with `flags`; the answer is their sizes as read. Nothing is synced.
pub(crate) fn import(
    channel: &Channel,
    device: &Arc<dyn Device>,
    items: &[Item],
    flags: OpenFlags,
    progress: &mut dyn FnMut(Imported),
) -> Result<Vec<u64>> {
    let (back, buffers) = Pool::new(device, DEPTH, CHUNK)?.split();
    let (to_writer, from_reader) = sync_channel(FILES);
    thread::scope(|scope| {
        let reader = scope.spawn(move || read_files(items, &buffers, &to_writer));
        let writer = Writer {
            items,
            flags,
            flight: Flight::new(channel, DEPTH + FILES),
            open: HashMap::new(),
            back,
            sizes: vec![0; items.len()],
            done: Imported::default(),
        };
        // `run` owns both ends towards the reader: whatever happens, the reader ends when it returns.
        let written = writer.run(from_reader, progress);
        let read = reader
            .join()
            .unwrap_or_else(|_| Err(Failure::new("the thread that reads the host's files panicked")));
        read.and(written)
    })
}

/// What the reader tells the writer.
enum News {
    /// The next bytes of a file. The first of these (or its end) is also the news that the file begins.
    Data { index: usize, offset: u64, part: Part },
    /// The file has this many bytes.
    End { index: usize, size: u64 },
}

fn read_files(items: &[Item], buffers: &Receiver<DmaBuf>, to: &SyncSender<News>) -> Result<()> {
    for (index, item) in items.iter().enumerate() {
        let reading = || format!("read '{}'", item.host.display());
        let mut host = HostFile::open(&item.host).doing(reading())?;
        let mut size = 0;
        loop {
            // A closed channel means that the writer gave up; its error is the one that counts.
            let Ok(mut buf) = buffers.recv() else { return Ok(()) };
            let len = read_full(&mut host, &mut buf).doing(reading())?;
            let full = len == buf.len();
            if len > 0 && to.send(News::Data { index, offset: size, part: Part::of(buf, len) }).is_err() {
                return Ok(());
            }
            size += len as u64;
            if !full {
                break;
            }
        }
        if to.send(News::End { index, size }).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Reads until `buf` is full or the file ends.
fn read_full(host: &mut HostFile, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut len = 0;
    while len < buf.len() {
        match host.read(&mut buf[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// A file between its open and its close.
#[derive(Default)]
struct Incoming {
    file: Option<File>,
    /// Pieces that came before the open was done.
    early: Vec<(u64, Part)>,
    writes: usize,
    ended: bool,
}

/// Which operation was answered.
enum Step {
    Open { index: usize },
    Write { index: usize, rest: Option<DmaBuf> },
    Close,
}

struct Writer<'a> {
    items: &'a [Item],
    flags: OpenFlags,
    flight: Flight<'a, Step>,
    open: HashMap<usize, Incoming>,
    back: Sender<DmaBuf>,
    sizes: Vec<u64>,
    done: Imported,
}

impl Writer<'_> {
    fn run(mut self, news: Receiver<News>, progress: &mut dyn FnMut(Imported)) -> Result<Vec<u64>> {
        let mut reading = true;
        while reading || !self.flight.is_empty() {
            let mut idle = true;
            while reading && self.flight.has_room() {
                match news.try_recv() {
                    Ok(news) => self.take(news),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => reading = false,
                }
                idle = false;
            }
            while let Some((step, completion)) = self.flight.try_next() {
                self.advance(step, completion)?;
                idle = false;
            }
            if idle {
                self.flight.relax();
            } else {
                progress(self.done);
            }
        }
        Ok(self.sizes)
    }

    fn take(&mut self, news: News) {
        match news {
            News::Data { index, offset, part } => {
                self.begin(index);
                self.write(index, offset, part);
            }
            News::End { index, size } => {
                self.begin(index);
                self.sizes[index] = size;
                self.open.entry(index).or_default().ended = true;
                self.close_if_complete(index);
            }
        }
    }

    /// Submits the open of a file at the first news of it.
    fn begin(&mut self, index: usize) {
        if let Entry::Vacant(entry) = self.open.entry(index) {
            entry.insert(Incoming::default());
            let name = self.items[index].name.clone();
            self.flight.submit(Operation::Open { name, flags: self.flags }, Step::Open { index });
        }
    }

    fn write(&mut self, index: usize, offset: u64, part: Part) {
        let incoming = self.open.entry(index).or_default();
        match &incoming.file {
            None => incoming.early.push((offset, part)),
            Some(file) => {
                incoming.writes += 1;
                let operation = Operation::Write { file: file.clone(), offset, buf: part.buf };
                self.flight.submit(operation, Step::Write { index, rest: part.rest });
            }
        }
    }

    fn advance(&mut self, step: Step, completion: Completion) -> Result<()> {
        match step {
            Step::Open { index } => {
                let output = completion.result.doing(format!("create {}", self.name(index)))?;
                let Output::Opened(file) = output else { return Err(odd_answer("open")) };
                let incoming = self.open.entry(index).or_default();
                incoming.file = Some(file);
                for (offset, part) in std::mem::take(&mut incoming.early) {
                    self.write(index, offset, part);
                }
                self.close_if_complete(index);
            }
            Step::Write { index, rest } => {
                completion.result.doing(format!("write {}", self.name(index)))?;
                let buf = completion.bufs.into_one().ok_or_else(|| odd_answer("write"))?;
                self.done.bytes += buf.len() as u64;
                // The reader may have finished and taken its end of the pool with it.
                let _ = self.back.send(Part::whole(buf, rest));
                self.open.entry(index).or_default().writes -= 1;
                self.close_if_complete(index);
            }
            Step::Close => {
                completion.result.doing("close a file")?;
                self.done.files += 1;
            }
        }
        Ok(())
    }

    fn close_if_complete(&mut self, index: usize) {
        let complete =
            |file: &Incoming| file.ended && file.writes == 0 && file.early.is_empty() && file.file.is_some();
        if self.open.get(&index).is_some_and(complete)
            && let Some(file) = self.open.remove(&index).and_then(|incoming| incoming.file)
        {
            self.flight.submit(Operation::Close { file }, Step::Close);
        }
    }

    fn name(&self, index: usize) -> String {
        format!("'{}'", show_name(&self.items[index].name))
    }
}

/// An answer that does not belong to the operation: a bug of the filesystem, reported like any other failure.
pub(crate) fn odd_answer(operation: &str) -> Failure {
    Failure::new(format!("the filesystem gave an answer to '{operation}' that does not belong to it (a bug)"))
}
