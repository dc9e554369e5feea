//! Requests in progress and the parts that the kernel works on.
//!
//! An [`Op`] is an accepted request. It is cut into [`Part`]s: at most [`MAX_PART`] bytes and [`PART_IOVECS`] pieces of
//! memory each. Parts live in a fixed table with their iovecs beside them, ops in a slab that is reused, so that steady
//! I/O allocates nothing.

use io_uring::{opcode, squeue, types};

use crate::{IoErrorKind, Kind, Priority, Request};

/// Largest part in bytes.
pub(super) const MAX_PART: u64 = 1 << 20;
/// Pieces of memory in a part at most.
pub(super) const PART_IOVECS: usize = 64;

/// The fixed file of the ring.
const FILE: types::Fixed = types::Fixed(0);

/// What writes of zeroes write.
static ZEROES: AlignedZeroes = AlignedZeroes([0; ZEROES_LEN]);
const ZEROES_LEN: usize = 64 << 10;

#[repr(align(4096))]
struct AlignedZeroes([u8; ZEROES_LEN]);

/// An accepted request.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) request: Request,
    pub(super) step: Step,
    /// Bytes of this step that parts were cut for.
    pub(super) issued: u64,
    /// Where in the buffers the next part begins.
    cursor: Cursor,
    /// Parts in use.
    pub(super) parts: u32,
    /// In the queue of ops that parts are to be cut for.
    pub(super) queued: bool,
    /// A part was cut, so the deadline does not matter any more.
    pub(super) started: bool,
    pub(super) error: Option<IoErrorKind>,
}

/// What an op is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Reading into or writing from its buffers.
    Transfer,
    /// `fallocate` with this mode.
    Allocate(i32),
    /// Writing zeroes, where `fallocate` cannot.
    WriteZeroes,
    /// `fdatasync`.
    Sync,
}

#[derive(Debug, Clone, Copy, Default)]
struct Cursor {
    segment: usize,
    byte: usize,
}

/// A piece of an op, as the kernel sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) op: usize,
    pub(super) step: Step,
    offset: u64,
    /// Bytes that are not done yet.
    left: u64,
    /// The iovecs that are not done yet: first and count.
    first: usize,
    count: usize,
    /// Token of the memory that it begins with.
    token: u64,
    /// Registered buffer that holds all of it.
    pub(super) fixed: Option<u16>,
    /// Times that the kernel asked to try again.
    pub(super) attempts: u32,
}

/// What a completed transfer of some bytes means for its part.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    /// The rest is to be submitted again.
    Short,
}

/// The table of parts.
pub(super) struct Parts {
    parts: Box<[Part]>,
    /// [`PART_IOVECS`] for each part.
    iovecs: Box<[libc::iovec]>,
    free: Vec<usize>,
}

// SAFETY: the iovecs name memory of the buffers of ops that the same queue pair owns (buffers are `Send`), or the
// constant zeroes; the addresses mean the same on every thread.
unsafe impl Send for Parts {}

impl Op {
    pub(super) fn new(request: Request, step: Step) -> Op {
        Op {
            request,
            step,
            issued: 0,
            cursor: Cursor::default(),
            parts: 0,
            queued: true,
            started: false,
            error: None,
        }
    }

    /// Starts another step from its beginning.
    pub(super) fn start_step(&mut self, step: Step) {
        self.step = step;
        self.issued = 0;
        self.cursor = Cursor::default();
    }

    /// True when parts were cut for the whole step.
    pub(super) fn is_cut(&self) -> bool {
        match self.step {
            Step::Transfer | Step::WriteZeroes => self.issued == self.request.len,
            Step::Allocate(_) | Step::Sync => self.issued > 0,
        }
    }
}

impl Parts {
    pub(super) fn new(depth: usize) -> Parts {
        let unused = Part {
            op: 0,
            step: Step::Sync,
            offset: 0,
            left: 0,
            first: 0,
            count: 0,
            token: 0,
            fixed: None,
            attempts: 0,
        };
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Parts {
            parts: vec![unused; depth].into_boxed_slice(),
            iovecs: vec![nothing; depth * PART_IOVECS].into_boxed_slice(),
            free: (0..depth).rev().collect(),
        }
    }

    pub(super) fn get_mut(&mut self, part: usize) -> &mut Part {
        &mut self.parts[part]
    }

    pub(super) fn release(&mut self, part: usize) {
        self.free.push(part);
    }

    /// Cuts the next part of `op` (number `number`, not yet cut to the end). The caller made sure that one is free.
    pub(super) fn cut(&mut self, number: usize, op: &mut Op) -> Option<usize> {
        let index = self.free.pop()?;
        let token = op.request.bufs.as_slice().get(op.cursor.segment).map_or(0, |buf| buf.token());
        let iovecs = &mut self.iovecs[index * PART_IOVECS..][..PART_IOVECS];
        let (count, left) = match op.step {
            Step::Transfer => gather(iovecs, op),
            Step::WriteZeroes => gather_zeroes(iovecs, op.request.len - op.issued),
            Step::Allocate(_) => (0, op.request.len),
            // Its length says only that it was cut.
            Step::Sync => (0, 1),
        };
        let offset = op.request.offset + op.issued;
        op.issued += left;
        op.parts += 1;
        op.started = true;
        self.parts[index] = Part {
            op: number,
            step: op.step,
            offset,
            left,
            first: 0,
            count,
            token,
            fixed: None,
            attempts: 0,
        };
        Some(index)
    }

    /// The memory of a part whose buffers are one piece: token, address, length.
    pub(super) fn single(&self, part: usize) -> Option<(u64, usize, usize)> {
        let Part { step: Step::Transfer, first, count: 1, token, .. } = self.parts[part] else { return None };
        let iovec = self.iovecs[part * PART_IOVECS + first];
        Some((token, iovec.iov_base as usize, iovec.iov_len))
    }

    /// Accounts for `done` transferred bytes.
    pub(super) fn advance(&mut self, part: usize, done: u64) -> Progress {
        let Part { left, offset, first, count, attempts, .. } = &mut self.parts[part];
        if done >= *left {
            *left = 0;
            return Progress::Done;
        }
        *left -= done;
        *offset += done;
        *attempts = 0;
        let mut skip = done as usize;
        let iovecs = &mut self.iovecs[part * PART_IOVECS..][..PART_IOVECS];
        while skip > 0 && *count > 0 {
            let iovec = &mut iovecs[*first];
            let step = skip.min(iovec.iov_len);
            // `step` is at most the length, so the address stays inside the piece or one past its end.
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
            iovec.iov_len -= step;
            skip -= step;
            if iovec.iov_len == 0 {
                *first += 1;
                *count -= 1;
            }
        }
        Progress::Short
    }

    /// The part as a submission entry; its user data is its number.
    pub(super) fn entry(&self, part: usize, request: &Request) -> squeue::Entry {
        let Part { step, offset, left, first, count, fixed, .. } = self.parts[part];
        let iovecs = &self.iovecs[part * PART_IOVECS + first..];
        let (base, len) = (iovecs[0].iov_base.cast::<u8>(), left as u32);
        let ioprio = ioprio(request.hints.priority);
        let dsync = if request.hints.fua && step == Step::Transfer { libc::RWF_DSYNC } else { 0 };
        let entry = match step {
            Step::Sync => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
            Step::Allocate(mode) => opcode::Fallocate::new(FILE, left).offset(offset).mode(mode).build(),
            Step::Transfer if request.kind == Kind::Read => match (count, fixed) {
                (1, Some(slot)) => {
                    opcode::ReadFixed::new(FILE, base, len, slot).offset(offset).ioprio(ioprio).build()
                }
                (1, None) => opcode::Read::new(FILE, base, len).offset(offset).ioprio(ioprio).build(),
                _ => opcode::Readv::new(FILE, iovecs.as_ptr(), count as u32)
                    .offset(offset)
                    .ioprio(ioprio)
                    .build(),
            },
            Step::Transfer | Step::WriteZeroes => match (count, fixed) {
                (1, Some(slot)) => opcode::WriteFixed::new(FILE, base, len, slot)
                    .offset(offset)
                    .ioprio(ioprio)
                    .rw_flags(dsync)
                    .build(),
                (1, None) => {
                    opcode::Write::new(FILE, base, len).offset(offset).ioprio(ioprio).rw_flags(dsync).build()
                }
                _ => opcode::Writev::new(FILE, iovecs.as_ptr(), count as u32)
                    .offset(offset)
                    .ioprio(ioprio)
                    .rw_flags(dsync)
                    .build(),
            },
        };
        entry.user_data(part as u64)
    }
}

/// Fills `iovecs` with the next memory of `op` and moves its cursor: count and bytes. Buffers that follow each other in
/// memory become one piece.
fn gather(iovecs: &mut [libc::iovec], op: &mut Op) -> (usize, u64) {
    let bufs = op.request.bufs.as_slice();
    let mut count = 0;
    let mut left = MAX_PART as usize;
    while let Some(buf) = bufs.get(op.cursor.segment) {
        let len = (buf.len() - op.cursor.byte).min(left);
        if len == 0 && left == 0 {
            break;
        }
        let base: *mut libc::c_void = buf.as_ptr().wrapping_add(op.cursor.byte).cast();
        let follows = |last: &libc::iovec| last.iov_base.wrapping_byte_add(last.iov_len) == base;
        if count > 0 && follows(&iovecs[count - 1]) {
            iovecs[count - 1].iov_len += len;
        } else if count == iovecs.len() {
            break;
        } else if len > 0 {
            iovecs[count] = libc::iovec { iov_base: base, iov_len: len };
            count += 1;
        }
        left -= len;
        op.cursor.byte += len;
        if op.cursor.byte == buf.len() {
            op.cursor = Cursor { segment: op.cursor.segment + 1, byte: 0 };
        }
    }
    (count, MAX_PART - left as u64)
}

/// Fills `iovecs` with up to `wanted` bytes of zeroes: count and bytes.
fn gather_zeroes(iovecs: &mut [libc::iovec], wanted: u64) -> (usize, u64) {
    let total = wanted.min(MAX_PART).min((iovecs.len() * ZEROES_LEN) as u64);
    let mut left = total as usize;
    let mut count = 0;
    while left > 0 {
        let len = left.min(ZEROES_LEN);
        // The kernel only reads them.
        iovecs[count] = libc::iovec { iov_base: ZEROES.0.as_ptr().cast_mut().cast(), iov_len: len };
        count += 1;
        left -= len;
    }
    (count, total)
}

/// I/O priority of the best-effort class; 0 means that of the thread.
fn ioprio(priority: Priority) -> u16 {
    const BEST_EFFORT: u16 = 2 << 13;
    match priority {
        Priority::High => BEST_EFFORT,
        Priority::Normal => 0,
        Priority::Low => BEST_EFFORT | 7,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::pool::Pool;
    use crate::{DmaBuf, DmaSource};

    fn bufs(sizes: &[usize]) -> Vec<DmaBuf> {
        let source: Arc<dyn DmaSource> = Arc::new(Pool::new(crate::pool::MapArenas, Default::default()));
        sizes.iter().map(|len| DmaBuf::new(&source, *len).unwrap()).collect()
    }

    fn lens(parts: &Parts, part: usize) -> Vec<usize> {
        let Part { first, count, .. } = parts.parts[part];
        parts.iovecs[part * PART_IOVECS + first..][..count].iter().map(|iovec| iovec.iov_len).collect()
    }

    #[test]
    fn a_large_buffer_is_cut_by_size() {
        let mut op = Op::new(Request::read(4096, bufs(&[(2 << 20) + 4096]), 0), Step::Transfer);
        let mut parts = Parts::new(4);
        let cut: Vec<_> =
            std::iter::from_fn(|| (!op.is_cut()).then(|| parts.cut(7, &mut op).unwrap())).collect();
        let sizes: Vec<_> =
            cut.iter().map(|part| (parts.parts[*part].offset, parts.parts[*part].left)).collect();
        assert_eq!(sizes, [(4096, 1 << 20), ((1 << 20) + 4096, 1 << 20), ((2 << 20) + 4096, 4096)]);
        assert_eq!(op.parts, 3);
    }

    #[test]
    fn a_scatter_list_is_cut_by_pieces_and_neighbours_are_joined() {
        let mut list = Vec::new();
        for mut buf in bufs(&[8192; 100]) {
            let tail = buf.split_off(4096);
            list.extend([buf, tail]);
        }
        // Two halves that follow each other become one piece; other blocks of the pool may do so too.
        let mut op = Op::new(Request::write(0, list, 0), Step::Transfer);
        let mut parts = Parts::new(8);
        let mut total = 0;
        while !op.is_cut() {
            let part = parts.cut(0, &mut op).unwrap();
            let lens = lens(&parts, part);
            assert!(lens.len() <= PART_IOVECS);
            assert!(lens.iter().all(|len| len.is_multiple_of(8192)));
            total += lens.iter().sum::<usize>();
        }
        assert_eq!(total, 100 * 8192);
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let mut list = bufs(&[12288, 4096, 8192]);
        list.swap(0, 1);
        let total: usize = list.iter().map(|buf| buf.len()).sum();
        let mut op = Op::new(Request::read(0, list, 0), Step::Transfer);
        let mut parts = Parts::new(1);
        let part = parts.cut(0, &mut op).unwrap();
        let all = lens(&parts, part);
        assert_eq!(parts.advance(part, 512), Progress::Short);
        assert_eq!(parts.parts[part].offset, 512);
        assert_eq!(lens(&parts, part).iter().sum::<usize>(), total - 512);
        assert_eq!(parts.advance(part, all[0] as u64 - 512), Progress::Short);
        assert_eq!(lens(&parts, part), all[1..]);
        assert_eq!(parts.advance(part, (total - all[0]) as u64), Progress::Done);
    }

    #[test]
    fn zeroes_come_in_parts() {
        let mut op = Op::new(Request::write_zeroes(0, (1 << 20) + 512, 0), Step::WriteZeroes);
        let mut parts = Parts::new(2);
        let first = parts.cut(0, &mut op).unwrap();
        assert_eq!(lens(&parts, first), [ZEROES_LEN; 16]);
        let second = parts.cut(0, &mut op).unwrap();
        assert_eq!(lens(&parts, second), [512]);
        assert!(op.is_cut());
    }
}
