//! Drives a mounted filesystem with operations of the model, in the three forms of its API; of the reads and writes a third as several
//! buffers ([`cut`]).

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{IoSlice, IoSliceMut};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bdev_adapter::{DmaBuf, Segments};
use fs_core::{Channel, Completion, Error, File, Filesystem, Operation, Output, WriteBatch};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::op::{Answer, Handle, Op, Outcome};
use super::{BLOCK, fill, pattern};

/// How operations are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// One by one, blocking.
    Blocking,
    /// All at once, as futures that are polled in random order.
    Futures,
    /// All at once, submitted with tags.
    Submitted,
}

/// A mounted filesystem, a channel and the files that are open.
pub(crate) struct Driver {
    pub(crate) handles: BTreeMap<Handle, File>,
    pub(crate) channel: Channel,
    pub(crate) fs: Filesystem,
}

type Pending<'c> = Pin<Box<dyn Future<Output = Outcome> + 'c>>;

impl Driver {
    pub(crate) fn new(fs: Filesystem) -> Driver {
        Driver { handles: BTreeMap::new(), channel: fs.channel().expect("a channel"), fs }
    }

    /// Does `ops` and calls `done` with the index and outcome of each, as they complete.
    pub(crate) fn run(
        &mut self,
        form: Form,
        ops: &[Op],
        rng: &mut SmallRng,
        mut done: impl FnMut(usize, &Outcome),
    ) {
        let mut opened = Vec::new();
        let mut note = |index: usize, outcome: Outcome| {
            done(index, &outcome);
            if let (Op::Open { handle, .. }, Ok(Answer::Opened(file))) = (&ops[index], outcome) {
                opened.push((*handle, file));
            }
        };
        match form {
            Form::Blocking => (0..ops.len()).for_each(|index| note(index, self.blocking(&ops[index]))),
            Form::Futures => self.futures(ops, rng, note),
            Form::Submitted => self.submitted(ops, note),
        }
        self.handles.extend(opened);
    }

    fn buffer(&self, len: usize, tag: Option<u64>) -> DmaBuf {
        let mut buf = self.channel.buffer(len).expect("a buffer");
        assert_eq!(buf.len(), len);
        match tag {
            Some(tag) => fill(tag, &mut buf),
            None => buf.fill(0xEE),
        }
        buf
    }

    /// Buffers of these lengths.
    fn buffers(&self, lens: &[usize], tag: Option<u64>) -> Vec<DmaBuf> {
        let whole = self.buffer(lens.iter().sum(), tag);
        let mut at = 0;
        let mut bufs = Vec::new();
        for len in lens {
            let mut buf = self.channel.buffer(*len).expect("a buffer");
            buf.copy_from_slice(&whole[at..at + len]);
            at += len;
            bufs.push(buf);
        }
        bufs
    }

    fn batch(&self, writes: &[(Handle, u64, usize, u64)]) -> WriteBatch {
        let mut batch = WriteBatch::new();
        for (handle, offset, len, tag) in writes {
            batch.write(&self.handles[handle], *offset, &pattern(*tag, *len));
        }
        batch
    }

    // ---- blocking

    /// Does `op`, waiting for it.
    pub(crate) fn blocking(&mut self, op: &Op) -> Outcome {
        if let Op::Close { handle } = op {
            let file = self.handles.remove(handle).expect("an open handle");
            return self.channel.close(file).map(|()| Answer::Done);
        }
        let channel = &self.channel;
        let file = |handle: &Handle| &self.handles[handle];
        let done = |()| Answer::Done;
        match op {
            Op::Create { name } => channel.create(name).map(|id| Answer::Created(id.0)),
            Op::Open { name, flags, .. } => channel.open(name, *flags).map(Answer::Opened),
            Op::Delete { name } => channel.delete(name).map(done),
            Op::Rename { from, to } => channel.rename(from, to).map(done),
            Op::List { prefix, after, max } => {
                // The blocking listing is the iterator; one page is what the others have.
                let names = channel.list(prefix).filter(|entry| match (entry, after) {
                    (Ok(entry), Some(after)) => entry.name > *after,
                    _ => true,
                });
                entries(names.take(*max).collect::<Result<_, Error>>()?)
            }
            Op::ListAll { prefix } => entries(channel.list(prefix).collect::<Result<_, Error>>()?),
            Op::Stat { name } => channel.stat(name).map(Answer::Stat),
            Op::StatFile { handle } => channel.stat_file(file(handle)).map(Answer::Stat),
            Op::Read { handle, offset, len, slice: true } => {
                let mut bytes = vec![0xEE; *len];
                let there = match cut(op) {
                    Some(lens) => channel.readv(file(handle), *offset, &mut slices_mut(&mut bytes, &lens))?,
                    None => channel.read(file(handle), *offset, &mut bytes)?,
                };
                assert!(
                    bytes[there..].iter().all(|byte| *byte == 0xEE),
                    "{op:?}: wrote behind its {there} bytes"
                );
                bytes.truncate(there);
                Ok(Answer::Bytes(bytes))
            }
            Op::Read { handle, offset, len, slice: false } => {
                if let Some(lens) = cut(op) {
                    let bufs = self.buffers(&lens, None);
                    let (result, bufs) = channel.readv_bufs(file(handle), *offset, bufs);
                    return read(op, result, &joined(op, bufs));
                }
                let (result, buf) = channel.read_buf(file(handle), *offset, self.buffer(*len, None));
                read(op, result, &buf)
            }
            Op::Write { handle, offset, len, tag, slice: true } => {
                let bytes = pattern(*tag, *len);
                match cut(op) {
                    Some(lens) => channel.writev(file(handle), *offset, &slices(&bytes, &lens)).map(done),
                    None => channel.write(file(handle), *offset, &bytes).map(done),
                }
            }
            Op::Write { handle, offset, len, tag, slice: false } => {
                if let Some(lens) = cut(op) {
                    let bufs = self.buffers(&lens, Some(*tag));
                    let (result, bufs) = channel.writev_bufs(file(handle), *offset, bufs);
                    written(op, &joined(op, bufs));
                    return result.map(done);
                }
                let (result, buf) = channel.write_buf(file(handle), *offset, self.buffer(*len, Some(*tag)));
                written(op, &buf);
                result.map(done)
            }
            Op::Append { handle, len, tag } => {
                channel.append(file(handle), &pattern(*tag, *len)).map(Answer::Offset)
            }
            Op::Truncate { handle, size } => channel.truncate(file(handle), *size).map(done),
            Op::Preallocate { handle, offset, len, growth } => {
                channel.preallocate(file(handle), *offset, *len, *growth).map(done)
            }
            Op::Zero { handle, offset, len, growth } => {
                channel.zero(file(handle), *offset, *len, *growth).map(done)
            }
            Op::Punch { handle, offset, len } => channel.punch(file(handle), *offset, *len).map(done),
            Op::Batch { writes } => channel.write_batch(&self.batch(writes)).map(done),
            Op::SyncFile { handle } => channel.sync_file(file(handle)).map(done),
            Op::Sync => channel.sync().map(done),
            Op::StatFs => {
                let statfs = channel.statfs()?;
                // As a future too: nothing else is under way but the helper.
                let mut future = channel.statfs_async();
                let mut cx = Context::from_waker(Waker::noop());
                let again = loop {
                    if let Poll::Ready(again) = Pin::new(&mut future).poll(&mut cx) {
                        break again?;
                    }
                };
                assert_eq!(again.total_bytes, statfs.total_bytes);
                Ok(Answer::StatFs(statfs))
            }
            Op::Close { .. } => unreachable!("done above"),
        }
    }

    // ---- futures

    fn futures(&mut self, ops: &[Op], rng: &mut SmallRng, mut note: impl FnMut(usize, Outcome)) {
        let closing: Vec<Option<File>> = self.take_closing(ops);
        let this = &*self;
        let mut pending: Vec<(usize, Pending<'_>)> =
            ops.iter().zip(closing).map(|(op, file)| this.future(op, file)).enumerate().collect();
        let mut cx = Context::from_waker(Waker::noop());
        while !pending.is_empty() {
            let at = rng.random_range(0..pending.len());
            if let Poll::Ready(outcome) = pending[at].1.as_mut().poll(&mut cx) {
                let (index, _) = pending.swap_remove(at);
                note(index, outcome);
            }
        }
    }

    /// The files of the handles that `ops` close.
    fn take_closing(&mut self, ops: &[Op]) -> Vec<Option<File>> {
        let handle = |op: &Op| match op {
            Op::Close { handle } => self.handles.remove(handle),
            _ => None,
        };
        ops.iter().map(handle).collect()
    }

    /// Starts `op`.
    fn future<'c>(&'c self, op: &'c Op, closing: Option<File>) -> Pending<'c> {
        let channel = &self.channel;
        let file = |handle: &Handle| &self.handles[handle];
        macro_rules! done {
            ($future:expr) => {{
                let future = $future;
                Box::pin(async move { future.await.map(|()| Answer::Done) })
            }};
        }
        macro_rules! map {
            ($future:expr, $map:expr) => {{
                let future = $future;
                Box::pin(async move { future.await.map($map) })
            }};
        }
        match op {
            Op::Create { name } => map!(channel.create_async(name), |id| Answer::Created(id.0)),
            Op::Open { name, flags, .. } => map!(channel.open_async(name, *flags), Answer::Opened),
            Op::Close { .. } => done!(channel.close_async(closing.expect("an open handle"))),
            Op::Delete { name } => done!(channel.delete_async(name)),
            Op::Rename { from, to } => done!(channel.rename_async(from, to)),
            Op::List { prefix, after, max } => {
                let future = channel.list_async(prefix, after.as_deref(), *max);
                Box::pin(async move { entries(future.await?) })
            }
            Op::Stat { name } => map!(channel.stat_async(name), Answer::Stat),
            Op::Read { handle, offset, len, .. } => {
                if let Some(lens) = cut(op) {
                    let bufs = self.buffers(&lens, None);
                    let future = channel.readv_async(file(handle), *offset, bufs);
                    return Box::pin(async move {
                        let (result, bufs) = future.await;
                        read(op, result, &joined(op, bufs))
                    });
                }
                let future = channel.read_async(file(handle), *offset, self.buffer(*len, None));
                Box::pin(async move {
                    let (result, buf) = future.await;
                    read(op, result, &buf)
                })
            }
            Op::Write { handle, offset, len, tag, .. } => {
                if let Some(lens) = cut(op) {
                    let bufs = self.buffers(&lens, Some(*tag));
                    let future = channel.writev_async(file(handle), *offset, bufs);
                    return Box::pin(async move {
                        let (result, bufs) = future.await;
                        written(op, &joined(op, bufs));
                        result.map(|()| Answer::Done)
                    });
                }
                let future = channel.write_async(file(handle), *offset, self.buffer(*len, Some(*tag)));
                Box::pin(async move {
                    let (result, buf) = future.await;
                    written(op, &buf);
                    result.map(|()| Answer::Done)
                })
            }
            Op::Append { handle, len, tag } => {
                let future = channel.append_async(file(handle), self.buffer(*len, Some(*tag)));
                Box::pin(async move {
                    let (result, buf) = future.await;
                    written(op, &buf);
                    result.map(Answer::Offset)
                })
            }
            Op::Truncate { handle, size } => done!(channel.truncate_async(file(handle), *size)),
            Op::Preallocate { handle, offset, len, growth } => {
                done!(channel.preallocate_async(file(handle), *offset, *len, *growth))
            }
            Op::Zero { handle, offset, len, growth } => {
                done!(channel.zero_async(file(handle), *offset, *len, *growth))
            }
            Op::Punch { handle, offset, len } => done!(channel.punch_async(file(handle), *offset, *len)),
            Op::Batch { writes } => done!(channel.write_batch_async(&Arc::new(self.batch(writes)))),
            Op::SyncFile { handle } => done!(channel.sync_file_async(file(handle))),
            Op::Sync => done!(channel.sync_async()),
            Op::StatFile { handle } => map!(channel.stat_file_async(file(handle)), Answer::Stat),
            Op::StatFs | Op::ListAll { .. } => unreachable!("{op:?} has no future"),
        }
    }

    // ---- submitted

    fn submitted(&mut self, ops: &[Op], mut note: impl FnMut(usize, Outcome)) {
        let closing = self.take_closing(ops);
        for (index, (op, file)) in ops.iter().zip(closing).enumerate() {
            self.channel.submit(self.operation(op, file), index as u64);
        }
        let mut answers: Vec<Completion> = Vec::new();
        let mut left = ops.len();
        let mut answered = vec![false; ops.len()];
        while left > 0 {
            if self.channel.poll(&mut answers) == 0 {
                self.channel.wait(Duration::from_millis(1));
            }
            for answer in answers.drain(..) {
                let index = answer.tag as usize;
                assert!(
                    !std::mem::replace(&mut answered[index], true),
                    "{:?} was answered twice",
                    ops[index]
                );
                left -= 1;
                note(index, convert(&ops[index], answer));
            }
            assert_eq!(self.channel.in_flight(), left);
        }
    }

    fn operation(&self, op: &Op, closing: Option<File>) -> Operation {
        let file = |handle: &Handle| self.handles[handle].clone();
        match op.clone() {
            Op::Create { name } => Operation::Create { name },
            Op::Open { name, flags, .. } => Operation::Open { name, flags },
            Op::Close { .. } => Operation::Close { file: closing.expect("an open handle") },
            Op::Delete { name } => Operation::Delete { name },
            Op::Rename { from, to } => Operation::Rename { from, to },
            Op::List { prefix, after, max } => Operation::List { prefix, after, max },
            Op::Stat { name } => Operation::Stat { name },
            Op::Read { handle, offset, len, .. } => {
                if let Some(lens) = cut(op) {
                    return Operation::Readv { file: file(&handle), offset, bufs: self.buffers(&lens, None) };
                }
                Operation::Read { file: file(&handle), offset, buf: self.buffer(len, None) }
            }
            Op::Write { handle, offset, len, tag, .. } => {
                if let Some(lens) = cut(op) {
                    let bufs = self.buffers(&lens, Some(tag));
                    return Operation::Writev { file: file(&handle), offset, bufs };
                }
                Operation::Write { file: file(&handle), offset, buf: self.buffer(len, Some(tag)) }
            }
            Op::Append { handle, len, tag } => {
                Operation::Append { file: file(&handle), buf: self.buffer(len, Some(tag)) }
            }
            Op::Truncate { handle, size } => Operation::Truncate { file: file(&handle), size },
            Op::Preallocate { handle, offset, len, growth } => {
                Operation::Preallocate { file: file(&handle), offset, len, growth }
            }
            Op::Zero { handle, offset, len, growth } => {
                Operation::Zero { file: file(&handle), offset, len, growth }
            }
            Op::Punch { handle, offset, len } => Operation::Punch { file: file(&handle), offset, len },
            Op::Batch { writes } => Operation::WriteBatch { batch: Arc::new(self.batch(&writes)) },
            Op::SyncFile { handle } => Operation::SyncFile { file: file(&handle) },
            Op::Sync => Operation::Sync,
            Op::StatFs => Operation::StatFs,
            Op::StatFile { handle } => Operation::StatFile { file: file(&handle) },
            Op::ListAll { .. } => unreachable!("{op:?} is not submitted"),
        }
    }
}

fn entries(found: Vec<fs_core::DirEntry>) -> Outcome {
    Ok(Answer::Entries(found.into_iter().map(|entry| (entry.name, entry.id.0)).collect()))
}

/// The answer to a read into a buffer, which must come back whole.
fn read(op: &Op, result: Result<usize, Error>, buf: &[u8]) -> Outcome {
    if let Op::Read { len, .. } = op {
        assert_eq!(buf.len(), *len, "{op:?}: the buffer came back with another length");
    }
    result.map(|there| Answer::Bytes(buf[..there].to_vec()))
}

/// The buffer of a write must come back as it was.
fn written(op: &Op, buf: &[u8]) {
    if let Op::Write { len, tag, .. } | Op::Append { len, tag, .. } = op {
        assert!(*buf == pattern(*tag, *len), "{op:?}: the buffer came back changed");
    }
}

/// The lengths of the buffers that a third of the reads and writes are cut into: whole blocks, or anything, down to nothing.
fn cut(op: &Op) -> Option<Vec<usize>> {
    let (Op::Read { offset, len, .. } | Op::Write { offset, len, .. }) = op else { return None };
    let mut dice = SmallRng::seed_from_u64(*offset ^ (*len as u64) << 40);
    if *len == 0 || dice.random_range(0..3) > 0 {
        return None;
    }
    let unit = if dice.random_bool(0.6) { BLOCK as usize } else { 1 };
    let mut lens = Vec::new();
    let mut left = *len;
    while left > 0 && lens.len() < 6 {
        let most = (left / unit).max(1);
        let part = (dice.random_range(usize::from(unit > 1)..=most) * unit).min(left);
        lens.push(part);
        left -= part;
    }
    lens.push(left);
    if unit > 1 && left == 0 {
        lens.pop();
    }
    Some(lens)
}

/// The bytes of the buffers of `op`, which must be the ones that it was given.
fn joined(op: &Op, bufs: Vec<DmaBuf>) -> Vec<u8> {
    let lens: Vec<usize> = bufs.iter().map(|buf| buf.len()).collect();
    assert_eq!(Some(lens), cut(op), "{op:?}: the buffers came back with other lengths");
    bufs.iter().flat_map(|buf| buf.iter().copied()).collect()
}

fn slices<'a>(mut bytes: &'a [u8], lens: &[usize]) -> Vec<IoSlice<'a>> {
    lens.iter().map(|len| IoSlice::new(bytes.split_off(..*len).expect("all the lengths"))).collect()
}

fn slices_mut<'a>(mut bytes: &'a mut [u8], lens: &[usize]) -> Vec<IoSliceMut<'a>> {
    lens.iter().map(|len| IoSliceMut::new(bytes.split_off_mut(..*len).expect("all the lengths"))).collect()
}

fn convert(op: &Op, answer: Completion) -> Outcome {
    let bufs = (!answer.bufs.as_slice().is_empty()).then(|| match answer.bufs {
        Segments::Many(bufs) => joined(op, bufs),
        bufs => bufs.into_one().expect("a buffer").to_vec(),
    });
    match (op, bufs) {
        (Op::Read { .. }, Some(buf)) => {
            let result = answer.result.map(|output| match output {
                Output::Bytes(there) => there,
                other => panic!("{op:?} was answered with {other:?}"),
            });
            return read(op, result, &buf);
        }
        (Op::Write { .. } | Op::Append { .. }, Some(buf)) => written(op, &buf),
        (Op::Read { .. } | Op::Write { .. } | Op::Append { .. }, None) => panic!("{op:?} lost its buffer"),
        (_, buf) => assert!(buf.is_none(), "{op:?} got a buffer"),
    }
    Ok(match answer.result? {
        Output::Done => Answer::Done,
        Output::Created(id) => Answer::Created(id.0),
        Output::Opened(file) => Answer::Opened(file),
        Output::Offset(offset) => Answer::Offset(offset),
        Output::Stat(stat) => Answer::Stat(*stat),
        Output::Entries(found) => return entries(found),
        Output::StatFs(statfs) => Answer::StatFs(*statfs),
        other => panic!("{op:?} was answered with {other:?}"),
    })
}
