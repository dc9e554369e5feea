//! Requests that break the contract: each is answered with the right error, gives its buffers back, and leaves the
//! device as it was.

use bdev_adapter::{DmaBuf, IoErrorKind, Kind, MAX_REQUEST, OpenOptions, Request};

use super::{Io, Target};

/// Checks after bad requests that the device still works and that its first blocks are as [`prepare`] left them.
fn check_unharmed(io: &mut Io) {
    io.verify(0, 1 << 20, 42);
    io.write(1 << 20, io.block(), 1);
    io.verify(1 << 20, io.block(), 1);
}

fn prepare(target: &Target) -> Io {
    let mut io = Io::new(&target.device());
    io.write(0, 1 << 20, 42);
    io
}

fn four_kinds(io: &Io, offset: u64, len: usize) -> [Request; 4] {
    [
        Request::read(offset, io.buffer(len), 1),
        Request::write(offset, io.filled(len, 9), 2),
        Request::write_zeroes(offset, len as u64, 3),
        Request::unmap(offset, len as u64, 4),
    ]
}

pub(crate) fn misaligned(target: &Target) {
    let mut io = prepare(target);
    let block = io.block();
    for offset in [1, block as u64 / 2, block as u64 - 1, block as u64 + 1] {
        for request in four_kinds(&io, offset, block) {
            assert_eq!(io.fails(request), IoErrorKind::Misaligned, "offset {offset}");
        }
    }
    for len in [1, block / 2, block + 1, 2 * block - 1] {
        for request in four_kinds(&io, 0, len) {
            assert_eq!(io.fails(request), IoErrorKind::Misaligned, "length {len}");
        }
    }
    // A list whose sum is right, but not its pieces.
    let halves = |buf: DmaBuf| {
        let mut buf = buf;
        let tail = buf.split_off(block / 2);
        vec![buf, tail]
    };
    let list = halves(io.filled(block, 9));
    assert_eq!(io.fails(Request::write(0, list, 1)), IoErrorKind::Misaligned);
    let list = halves(io.buffer(block));
    assert_eq!(io.fails(Request::read(0, list, 1)), IoErrorKind::Misaligned);

    let align = io.device.geometry().buffer_align as usize;
    for shift in [1, align / 2, align - 1].into_iter().filter(|shift| *shift % align != 0) {
        for write in [false, true] {
            let mut head = io.filled(3 * block.max(align), 9);
            let mut buf = head.split_off(shift);
            drop(buf.split_off(block));
            let request = if write { Request::write(0, buf, 1) } else { Request::read(0, buf, 1) };
            assert_eq!(io.fails(request), IoErrorKind::Misaligned, "buffer {shift} past its alignment");
        }
    }
    check_unharmed(&mut io);
}

pub(crate) fn out_of_range(target: &Target) {
    let mut io = prepare(target);
    let (block, end) = (io.block(), io.capacity());
    let last = u64::MAX - (block as u64 - 1);
    for (offset, len) in
        [(end, block), (end - block as u64, 2 * block), (end * 2, block), (last, block), (last, 2 * block)]
    {
        for request in four_kinds(&io, offset, len) {
            assert_eq!(io.fails(request), IoErrorKind::OutOfRange, "{len} bytes at {offset}");
        }
    }
    check_unharmed(&mut io);
}

pub(crate) fn bad_lengths(target: &Target) {
    let mut io = prepare(target);
    let block = io.block();
    for kind in [Kind::WriteZeroes, Kind::Unmap] {
        for len in [0, MAX_REQUEST + block as u64, u64::MAX - (block as u64 - 1)] {
            let mut request = Request::write_zeroes(0, len, 1);
            request.kind = kind;
            assert_eq!(io.fails(request), IoErrorKind::BadLength, "{} of {len}", kind.name());
        }
    }
    for write in [false, true] {
        let make = |io: &Io, offset, len| {
            let buf = io.filled(len, 9);
            if write { Request::write(offset, buf, 1) } else { Request::read(offset, buf, 1) }
        };
        let request = make(&io, 0, 0);
        assert_eq!(io.fails(request), IoErrorKind::BadLength, "no bytes");
        for len in [block as u64, 3 * block as u64] {
            let mut request = make(&io, 0, 2 * block);
            request.len = len;
            assert_eq!(io.fails(request), IoErrorKind::BadLength, "length {len}, buffers of two blocks");
        }
        let mut request = make(&io, 0, block);
        request.bufs = Default::default();
        assert_eq!(io.fails(request), IoErrorKind::BadLength, "no buffers");
    }
    check_unharmed(&mut io);
}

pub(crate) fn read_only(target: &Target) {
    if target.persistent {
        let mut io = Io::new(&target.device());
        io.write(0, 1 << 20, 42);
        io.ok(Request::flush(io.device.epoch(), 1));
    }
    let device = (target.open)(&OpenOptions::new().read_only(true)).expect("opens for reading");
    assert!(device.read_only());
    let mut io = Io::new(&device);
    let block = io.block();
    for request in four_kinds(&io, 0, block).into_iter().skip(1) {
        assert_eq!(io.fails(request), IoErrorKind::ReadOnly);
    }
    io.ok(Request::flush(io.device.epoch(), 1));
    let buf = io.read(0, 1 << 20);
    if target.persistent {
        assert!(super::is_filled(&buf, 42), "nothing was written");
    }
}
