//! Requests that one I/O of SPDK's cannot carry out: too long, in too many segments, or durable at once.
//!
//! Such a request stays in a table ([`Splits`]) with its buffers, and hands out [`Piece`]s, which the queue pair gives
//! slots. Pieces of one request are at the device together, as many as there are slots. One request at a time hands out
//! data, at the head of the queue; any number wait for their pieces to come back. When all data of a request with FUA
//! is written, it hands out one more piece, a flush. The first piece that fails decides the result, and nothing more is
//! handed out then.

use std::collections::VecDeque;
use std::ptr;

use spdk_sys::bdev::iovec;

use super::slots::{MAX_SEGMENTS, Op};
use crate::{DmaBuf, IoErrorKind, Kind, Request, Segments};

/// How much one I/O of SPDK's may carry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes of a read or write.
    pub(super) transfer: u64,
    /// Reads and writes do not cross multiples of so many bytes; 0 for no such boundary.
    pub(super) boundary: u64,
    /// Bytes of a write-zeroes.
    pub(super) zeroes: u64,
    /// Bytes of an unmap.
    pub(super) unmap: u64,
}

impl Limits {
    /// How much of `len` bytes at `offset` goes into one I/O.
    #[inline]
    pub(super) fn piece(&self, op: Op, offset: u64, len: u64) -> u64 {
        match op {
            Op::Read | Op::Write if self.boundary == 0 => len.min(self.transfer),
            Op::Read | Op::Write => len.min(self.transfer).min(self.boundary - offset % self.boundary),
            Op::WriteZeroes => len.min(self.zeroes),
            Op::Unmap => len.min(self.unmap),
            Op::Flush => len,
        }
    }
}

/// Where the data of an I/O is.
#[derive(Clone, Copy)]
pub(super) enum Data {
    /// One buffer, or none (null).
    One(*mut std::ffi::c_void),
    Many(*mut iovec, i32),
}

impl Data {
    /// The buffers of a whole request.
    ///
    /// # Safety
    /// `segments` has room for as many as there are buffers (one needs none), and SPDK does not use it.
    #[inline]
    pub(super) unsafe fn of_bufs(bufs: &Segments, segments: *mut iovec) -> Data {
        match bufs {
            Segments::None => Data::One(ptr::null_mut()),
            Segments::One(buf) => Data::One(buf.as_ptr().cast()),
            Segments::Many(bufs) => {
                let mut count = 0;
                // Drivers need not like empty segments.
                for buf in bufs.iter().filter(|buf| !buf.is_empty()) {
                    // SAFETY: `count` is below the number of buffers, for which there is room.
                    unsafe {
                        segments.add(count).write(iovec { iov_base: buf.as_ptr().cast(), iov_len: buf.len() })
                    };
                    count += 1;
                }
                Data::Many(segments, count as i32)
            }
        }
    }
}

/// A request that is carried out in pieces, and maybe a flush at the end.
struct Split {
    /// None once it was answered (its number is free then).
    request: Option<Request>,
    /// Bytes of it that were handed out.
    handed_out: u64,
    pieces_out: u32,
    error: Option<IoErrorKind>,
    flush: bool,
}

/// A part of a split request that one I/O of SPDK's carries out.
pub(super) struct Piece {
    pub(super) split: u32,
    pub(super) op: Op,
    /// Byte address and length at the device.
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) segments: u32,
    pub(super) fua: bool,
}

/// All splits; see the module documentation.
#[derive(Default)]
pub(super) struct Splits {
    table: Vec<Split>,
    free: Vec<u32>,
    /// Those with something left to hand out: data pieces of one (the last), the flushes of others before it.
    handing_out: VecDeque<u32>,
}

impl Splits {
    pub(super) fn begin(&mut self, request: Request, flush: bool) {
        let split = Split { request: Some(request), handed_out: 0, pieces_out: 0, error: None, flush };
        let number = match self.free.pop() {
            Some(number) => {
                self.table[number as usize] = split;
                number
            }
            None => {
                self.table.push(split);
                (self.table.len() - 1) as u32
            }
        };
        self.handing_out.push_back(number);
    }

    #[inline]
    pub(super) fn has_pieces(&self) -> bool {
        !self.handing_out.is_empty()
    }

    /// The next piece to start.
    pub(super) fn next_piece(&mut self, limits: &Limits) -> Option<Piece> {
        let number = *self.handing_out.front()?;
        let split = &mut self.table[number as usize];
        let request = split.request.as_ref()?;
        let rest = request.len - split.handed_out;
        let piece = if rest == 0 {
            split.flush = false;
            Piece { split: number, op: Op::Flush, offset: 0, len: 0, segments: 0, fua: false }
        } else {
            let (op, offset) = (Op::from(request.kind), request.offset + split.handed_out);
            let len = limits.piece(op, offset, rest);
            let (len, segments) = match request.kind {
                Kind::Read | Kind::Write => piece_of(request.bufs.as_slice(), split.handed_out, len),
                _ => (len, 0),
            };
            split.handed_out += len;
            Piece { split: number, op, offset, len, segments, fua: request.hints.fua }
        };
        split.pieces_out += 1;
        if split.handed_out == request.len {
            // A flush is handed out when all of the data is written; see `piece_done`.
            self.handing_out.pop_front();
        }
        Some(piece)
    }

    /// Writes the segments of a piece.
    ///
    /// # Safety
    /// There is room for `count` of them, and SPDK does not use it.
    pub(super) unsafe fn fill(
        &self,
        number: u32,
        offset: u64,
        len: u64,
        count: u32,
        segments: *mut iovec,
    ) -> Data {
        let Some(request) = self.table[number as usize].request.as_ref().filter(|_| count > 0) else {
            return Data::One(ptr::null_mut());
        };
        let mut filled = 0;
        for_each_segment(request.bufs.as_slice(), offset - request.offset, len, |base, len| {
            if filled == count as usize {
                return false;
            }
            // SAFETY: `filled < count`.
            unsafe { segments.add(filled).write(iovec { iov_base: base.cast(), iov_len: len }) };
            filled += 1;
            true
        });
        Data::Many(segments, filled as i32)
    }

    /// Notes that a piece is done; the request with its result when that was the last of it.
    pub(super) fn piece_done(
        &mut self,
        number: u32,
        result: Result<(), IoErrorKind>,
    ) -> Option<(Request, Result<(), IoErrorKind>)> {
        let split = &mut self.table[number as usize];
        split.pieces_out -= 1;
        if let Err(why) = result {
            split.error.get_or_insert(why);
            // The rest is not worth starting.
            if let Some(request) = &split.request
                && split.handed_out < request.len
            {
                split.handed_out = request.len;
                self.handing_out.retain(|other| *other != number);
            }
        }
        self.finish(number)
    }

    /// The request and its result, when nothing of it is out or left to do. Queues its flush if that is what is left.
    fn finish(&mut self, number: u32) -> Option<(Request, Result<(), IoErrorKind>)> {
        let split = &mut self.table[number as usize];
        let unfinished = split.request.as_ref().is_none_or(|request| split.handed_out < request.len);
        if split.pieces_out > 0 || unfinished {
            return None;
        }
        if split.flush && split.error.is_none() {
            self.handing_out.push_front(number);
            return None;
        }
        let request = split.request.take()?;
        self.free.push(number);
        Some((request, split.error.map_or(Ok(()), Err)))
    }

    /// Gives up one split with something left to hand out; its request, unless pieces of it are still out.
    pub(super) fn abandon(&mut self, why: IoErrorKind) -> Option<(Request, Result<(), IoErrorKind>)> {
        while let Some(number) = self.handing_out.pop_front() {
            let split = &mut self.table[number as usize];
            split.error.get_or_insert(why);
            if let Some(request) = &split.request {
                split.handed_out = request.len;
            }
            if let Some(finished) = self.finish(number) {
                return Some(finished);
            }
        }
        None
    }
}

/// Calls `f` with each contiguous part of the bytes `[start, start + len)` of the buffers, until it returns false.
fn for_each_segment(bufs: &[DmaBuf], start: u64, len: u64, mut f: impl FnMut(*mut u8, usize) -> bool) {
    let (mut skip, mut rest) = (start as usize, len as usize);
    for buf in bufs {
        if rest == 0 {
            return;
        }
        if skip >= buf.len() {
            skip -= buf.len();
            continue;
        }
        let part = (buf.len() - skip).min(rest);
        if !f(buf.as_ptr().wrapping_add(skip), part) {
            return;
        }
        (skip, rest) = (0, rest - part);
    }
}

/// How much of `[start, start + len)` goes into one piece, and in how many segments. Buffers are multiples of the block
/// size, so the piece is one, too.
fn piece_of(bufs: &[DmaBuf], start: u64, len: u64) -> (u64, u32) {
    let (mut bytes, mut segments) = (0, 0);
    for_each_segment(bufs, start, len, |_, part| {
        bytes += part as u64;
        segments += 1;
        (segments as usize) < MAX_SEGMENTS
    });
    (bytes, segments)
}
