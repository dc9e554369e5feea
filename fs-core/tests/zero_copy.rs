//! A DMA buffer that is given to `write` or `read` is the memory that the device uses: no byte is copied on the way. A spy
//! between filesystem and device notes which memory each request names. (That backends pass on what a request names, without
//! buffers of their own, shows in bdev-adapter's allocation test.)

mod common;

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bdev_adapter::mem::MemDevice;
use bdev_adapter::{
    ClaimFlag, Completion, Device, DmaBuf, DmaSource, Error, Geometry, Kind, QueuePair, Request,
};
use common::{BLOCK, MIB, Watchdog, fresh, pattern, quiet};
use fs_core::OpenFlags;

/// The memory of requests, by kind.
type Seen = Arc<Mutex<Vec<(Kind, Range<usize>)>>>;

#[derive(Debug)]
struct Spy {
    inner: Arc<dyn Device>,
    seen: Seen,
}

impl Device for Spy {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn geometry(&self) -> &Geometry {
        self.inner.geometry()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error> {
        let inner = Arc::clone(&self.inner).queue_pair()?;
        Ok(Box::new(SpyQueue { inner, seen: Arc::clone(&self.seen) }))
    }

    fn dma(&self) -> Arc<dyn DmaSource> {
        self.inner.dma()
    }

    fn epoch(&self) -> u64 {
        self.inner.epoch()
    }

    fn claim_flag(&self) -> &ClaimFlag {
        self.inner.claim_flag()
    }
}

struct SpyQueue {
    inner: Box<dyn QueuePair>,
    seen: Seen,
}

impl QueuePair for SpyQueue {
    fn submit(&mut self, request: Request) {
        let mut seen = self.seen.lock().expect("no panic");
        seen.extend(request.bufs.as_slice().iter().map(|buf| (request.kind, memory_of(buf))));
        drop(seen);
        self.inner.submit(request);
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        self.inner.poll(completions)
    }

    fn outstanding(&self) -> usize {
        self.inner.outstanding()
    }

    fn wait(&mut self, timeout: Duration) {
        self.inner.wait(timeout);
    }
}

fn memory_of(buf: &DmaBuf) -> Range<usize> {
    let start = buf.as_ptr() as usize;
    start..start + buf.len()
}

/// The bytes of `whole` that requests of this kind named; none lie elsewhere.
fn named(seen: &Seen, kind: Kind, whole: &Range<usize>) -> usize {
    let seen = seen.lock().expect("no panic");
    let ranges = seen.iter().filter(|(of, _)| *of == kind).map(|(_, range)| range);
    ranges
        .map(|range| {
            assert!(
                whole.start <= range.start && range.end <= whole.end,
                "{kind:?} of other memory: {range:x?}"
            );
            range.len()
        })
        .sum()
}

#[test]
fn the_callers_buffer_is_the_devices() {
    let _watchdog = Watchdog::start("the_callers_buffer_is_the_devices", 0, 60);
    let memory = MemDevice::new(64 * MIB, BLOCK as u32).expect("a device");
    let seen = Seen::default();
    let device: Arc<dyn Device> = Arc::new(Spy { inner: memory, seen: Arc::clone(&seen) });
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("file", OpenFlags::CREATE).expect("open");
    for (len, at) in [(1, 0), (16, 3), (512, 40)] {
        let len = len * BLOCK as usize;
        let content = pattern(len as u64, len);
        let mut buf = DmaBuf::new(&device.dma(), len).expect("a buffer");
        buf.copy_from_slice(&content);
        let whole = memory_of(&buf);
        seen.lock().expect("no panic").clear();
        let (result, buf) = channel.write_buf(&file, at * BLOCK, buf);
        result.expect("write");
        assert_eq!(named(&seen, Kind::Write, &whole), len, "all of it, once");
        assert_eq!(memory_of(&buf), whole, "and it comes back");

        let mut buf = DmaBuf::new(&device.dma(), len).expect("a buffer");
        buf.fill(0);
        let whole = memory_of(&buf);
        seen.lock().expect("no panic").clear();
        let (result, buf) = channel.read_buf(&file, at * BLOCK, buf);
        assert_eq!(result.expect("read"), len);
        assert_eq!(named(&seen, Kind::Read, &whole), len, "all of it, once");
        assert_eq!(memory_of(&buf), whole, "and it comes back");
        assert!(buf[..] == content[..]);
    }
}

/// The same for several buffers: each is the device's, whatever order the extents of the file are in.
#[test]
fn the_callers_buffers_are_the_devices() {
    let _watchdog = Watchdog::start("the_callers_buffers_are_the_devices", 0, 60);
    let memory = MemDevice::new(64 * MIB, BLOCK as u32).expect("a device");
    let seen = Seen::default();
    let device: Arc<dyn Device> = Arc::new(Spy { inner: memory, seen: Arc::clone(&seen) });
    let fs = fresh(&device, &quiet());
    let channel = fs.channel().expect("channel");
    let file = channel.open("file", OpenFlags::CREATE).expect("open");
    let lens = [1, 7, 300, 2, 1].map(|blocks| blocks * BLOCK as usize);
    let total = lens.iter().sum();
    let content = pattern(1, total);
    let buffers = |content: &[u8]| {
        let mut at = 0;
        let buffer = |len: usize| {
            let mut buf = DmaBuf::new(&device.dma(), len).expect("a buffer");
            buf.copy_from_slice(&content[at..at + len]);
            at += len;
            buf
        };
        lens.map(buffer).into_iter().collect::<Vec<_>>()
    };
    let all_named = |kind: Kind, bufs: &[Range<usize>]| {
        let seen = seen.lock().expect("no panic");
        let mut ranges: Vec<_> =
            seen.iter().filter(|(of, _)| *of == kind).map(|(_, range)| range.clone()).collect();
        drop(seen);
        ranges.sort_by_key(|range| range.start);
        let mut bufs = bufs.to_vec();
        bufs.sort_by_key(|range| range.start);
        let sum = |ranges: &[Range<usize>]| ranges.iter().map(|range| range.len()).sum::<usize>();
        assert_eq!(sum(&ranges), sum(&bufs), "{kind:?} of all of it, once");
        for range in ranges {
            assert!(
                bufs.iter().any(|buf| buf.start <= range.start && range.end <= buf.end),
                "{kind:?} elsewhere"
            );
        }
    };
    let bufs = buffers(&content);
    let memory: Vec<_> = bufs.iter().map(memory_of).collect();
    seen.lock().expect("no panic").clear();
    let (result, bufs) = channel.writev_bufs(&file, 3 * BLOCK, bufs);
    result.expect("write");
    all_named(Kind::Write, &memory);
    assert_eq!(bufs.iter().map(memory_of).collect::<Vec<_>>(), memory, "and they come back");
    // Some blocks elsewhere, so that extents and buffers end at different places.
    for block in [5, 100, 200] {
        channel
            .write(&file, block * BLOCK, &content[(block as usize - 3) * BLOCK as usize..][..BLOCK as usize])
            .expect("write");
    }
    let bufs = buffers(&vec![0; total]);
    let memory: Vec<_> = bufs.iter().map(memory_of).collect();
    seen.lock().expect("no panic").clear();
    let (result, bufs) = channel.readv_bufs(&file, 3 * BLOCK, bufs);
    assert_eq!(result.expect("read"), total);
    all_named(Kind::Read, &memory);
    assert_eq!(bufs.iter().map(memory_of).collect::<Vec<_>>(), memory, "and they come back");
    assert!(bufs.iter().flat_map(|buf| buf.iter()).eq(content.iter()), "the bytes");
}
