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
fn round(
    queue_pair: &mut dyn QueuePair,
    epoch: u64,
    round: u64,
    idle: &mut Vec<Segments>,
    done: &mut Vec<Completion>,
) {
    for tag in 0..idle.len() as u64 {
        let bufs = idle.pop().unwrap();
        let offset = (tag * 7 + round) % 32 * 65536;
        let request = if (tag + round).is_multiple_of(2) {
            Request::read(offset, bufs, tag)
        } else {
            Request::write(offset, bufs, tag)
        };
        let hints = if tag % 16 == 5 { Hints::fua() } else { Hints::default() };
        queue_pair.submit(request.with_hints(hints));
    }
    queue_pair.submit(Request::flush(epoch, u64::MAX));
    queue_pair.submit(Request::write_zeroes(4 << 20, 65536, u64::MAX));
    while queue_pair.outstanding() > 0 {
        queue_pair.wait(Duration::from_millis(10));
        queue_pair.poll(done);
    }
    for completion in done.drain(..) {
        completion.result.unwrap();
        if completion.tag != u64::MAX {
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
    // More than the device takes at once; single buffers, scatter lists, and what backends split.
    let singles = 2 * u64::from(device.geometry().queue_depth).min(256);
    let mut idle: Vec<Segments> = (0..singles).map(|_| buf(4096).into()).collect();
    idle.extend((0..8).map(|_| vec![buf(4096), buf(8192), buf(4096)].into()));
    idle.extend((0..2).map(|_| (0..20).map(|_| buf(4096)).collect::<Vec<_>>().into()));
    idle.extend((0..2).map(|_| buf((1 << 20) + 4096).into()));
    let (requests, mut done) = (50 * (idle.len() + 2), Vec::new());
    for number in 0..20 {
        round(&mut *queue_pair, device.epoch(), number, &mut idle, &mut done);
    }
    let before = ALLOCATIONS.get();
    for number in 0..50 {
        round(&mut *queue_pair, device.epoch(), number, &mut idle, &mut done);
    }
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

/// Needs huge pages; without them it is skipped, and says so; with `GAUR_REQUIRE_SPDK=1` that is a failure.
#[cfg(feature = "spdk")]
#[test]
fn bdev() {
    use bdev_adapter::{Error, spdk};

    match spdk::bdev_names() {
        Ok(_) => {}
        Err(Error::Unavailable { why, .. }) if std::env::var_os("GAUR_REQUIRE_SPDK").is_none() => {
            println!("SKIPPED: {why}");
            return;
        }
        Err(error) => panic!("{error}"),
    }
    let params = r#"{"name":"Allocations","num_blocks":4096,"block_size":4096}"#;
    spdk::rpc("bdev_malloc_create", params, Duration::from_secs(30)).unwrap();
    check(open("spdk-bdev:Allocations", &OpenOptions::new()).unwrap());
}

/// On the device that `GAUR_NVME_URI` names, whose content is lost; without it the test is skipped, and says so; with
/// `GAUR_REQUIRE_NVME=1` that is a failure.
#[cfg(feature = "spdk")]
#[test]
fn nvme() {
    let Ok(uri) = std::env::var("GAUR_NVME_URI") else {
        let required = std::env::var_os("GAUR_REQUIRE_NVME").is_some_and(|value| value != "0");
        assert!(!required, "GAUR_REQUIRE_NVME is set, but GAUR_NVME_URI names no device");
        println!("SKIPPED: GAUR_NVME_URI names no device");
        return;
    };
    check(open(&uri, &OpenOptions::new()).unwrap());
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
