//! Steady I/O allocates nothing: a global allocator counts, per thread, while thousands of requests go through.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::{Completion, Device, DmaBuf, Hints, OpenOptions, QueuePair, Request, Segments, open};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // Not counted while the thread ends.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: passes everything on to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Sends every buffer list once, as a write or a read of a kind that depends on `round`, and takes them back.
fn round(queue_pair: &mut dyn QueuePair, round: u64, idle: &mut Vec<Segments>, done: &mut Vec<Completion>) {
    for tag in 0..idle.len() as u64 {
        let bufs = idle.pop().unwrap();
        let offset = (tag * 7 + round) % 32 * 65536;
        let request = if (tag + round).is_multiple_of(2) {
            Request::read(offset, bufs, tag)
        } else {
            Request::write(offset, bufs, tag)
        };
        let hints = if tag == 5 { Hints::fua() } else { Hints::default() };
        queue_pair.submit(request.with_hints(hints));
    }
    queue_pair.submit(Request::flush(0, 999));
    queue_pair.submit(Request::write_zeroes(4 << 20, 65536, 999));
    while queue_pair.outstanding() > 0 {
        queue_pair.wait(Duration::from_millis(10));
        queue_pair.poll(done);
    }
    for completion in done.drain(..) {
        completion.result.unwrap();
        if completion.tag != 999 {
            idle.push(completion.bufs);
        }
    }
}

fn check(device: Arc<dyn Device>) {
    std::thread::spawn(|| {
        // The process ends long before, unless a request is never answered.
        std::thread::sleep(Duration::from_secs(120));
        eprintln!("a request hangs");
        std::process::abort();
    });
    let source = device.dma();
    let mut queue_pair = Arc::clone(&device).queue_pair().unwrap();
    let buf = |len| DmaBuf::new(&source, len).unwrap();
    let mut idle: Vec<Segments> = (0..40).map(|_| buf(4096).into()).collect();
    idle.extend((0..8).map(|_| vec![buf(4096), buf(8192), buf(4096)].into()));
    let mut done = Vec::new();
    for number in 0..20 {
        round(&mut *queue_pair, number, &mut idle, &mut done);
    }
    let before = ALLOCATIONS.get();
    for number in 0..50 {
        round(&mut *queue_pair, number, &mut idle, &mut done);
    }
    let requests = 50 * (48 + 2);
    assert_eq!(ALLOCATIONS.get() - before, 0, "allocations in {requests} requests on {}", device.name());
}

#[test]
fn memory() {
    check(open("mem:16MiB", &OpenOptions::default()).unwrap());
}

#[test]
fn counters() {
    check(open("count:/mem:16MiB", &OpenOptions::default()).unwrap());
}

#[test]
fn fault_without_faults() {
    check(open("fault:/mem:16MiB", &OpenOptions::default()).unwrap());
}

#[test]
fn latency() {
    let uri = "latency:read=5us,write=1us,jitter=1us,channels=4/mem:16MiB";
    check(open(uri, &OpenOptions::default()).unwrap());
}

#[test]
fn file() {
    let dir = tempfile::tempdir().unwrap();
    for options in ["direct=auto", "direct=off&depth=8"] {
        let path = dir.path().join("disk.img");
        let uri = format!("file:{}?size=16MiB&{options}", path.display());
        check(open(&uri, &OpenOptions::new().create(true)).unwrap());
    }
}

#[test]
fn buffers_cost_one_small_allocation() {
    let device = open("mem:16MiB", &OpenOptions::default()).unwrap();
    let source = device.dma();
    drop(DmaBuf::new(&source, 4096).unwrap());
    let before = ALLOCATIONS.get();
    for _ in 0..100 {
        drop(DmaBuf::new(&source, 4096).unwrap());
    }
    assert!(
        ALLOCATIONS.get() - before <= 100,
        "a buffer is one reference count, its memory comes from the pool"
    );
}
