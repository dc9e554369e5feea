//! The SPDK backend allocates nothing on the heap per request, once its queues have grown.
//!
//! Needs huge pages; without them it is skipped, and says so; with `GAUR_REQUIRE_SPDK=1` that is a failure.

#![cfg(feature = "spdk")]
// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use bdev_adapter::{DmaBuf, Error, Hints, OpenOptions, Request, Segments, open, spdk};

/// The system's allocator, counting the calls of each thread.
struct Counting;

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // Gone while the thread ends; nobody looks then.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as promised by the caller.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn requests_allocate_nothing() {
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
    let device = open("spdk-bdev:Allocations", &OpenOptions::new()).unwrap();
    let mut queue = device.clone().queue_pair().unwrap();
    let buffer = |len| DmaBuf::new(&device.dma(), len).unwrap();
    // More than the device takes at once; single buffers, scatter lists, and requests that are split.
    let count = 2 * u64::from(device.geometry().queue_depth);
    let mut free: Vec<Segments> = (0..count)
        .map(|i| match i % 8 {
            0 => (0..20).map(|_| buffer(4096)).collect::<Vec<_>>().into(),
            1 => (0..4).map(|_| buffer(4096)).collect::<Vec<_>>().into(),
            2 => buffer((1 << 20) + 4096).into(),
            _ => buffer(4096).into(),
        })
        .collect();
    let mut completions = Vec::new();
    let mut round = |rounds: u64| {
        for round in 0..rounds {
            for (tag, bufs) in (0..).zip(free.drain(..)) {
                let offset = (tag + round) % 1024 * 4096;
                queue.submit(match tag % 3 {
                    0 => Request::read(offset, bufs, tag),
                    1 => Request::write(offset, bufs, tag),
                    _ => Request::write(offset, bufs, tag).with_hints(Hints::fua()),
                });
            }
            queue.submit(Request::flush(0, 0));
            queue.submit(Request::write_zeroes(0, 8192, 0));
            while queue.outstanding() > 0 {
                queue.poll(&mut completions);
            }
            for completion in completions.drain(..) {
                assert!(completion.result.is_ok());
                if !matches!(completion.bufs, Segments::None) {
                    free.push(completion.bufs);
                }
            }
        }
    };
    round(3);
    let before = CALLS.get();
    round(20);
    assert_eq!(CALLS.get() - before, 0, "allocations in {} requests", 20 * count);
}
