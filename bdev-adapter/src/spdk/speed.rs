//! What the bdev backend costs above SPDK itself. A measurement, not a test; needs 2.5 GiB of huge pages.

use std::cell::RefCell;
use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use spdk_sys::bdev::{
    spdk_bdev_free_io, spdk_bdev_get_io_channel, spdk_bdev_io, spdk_bdev_read_blocks, spdk_bdev_write_blocks,
};
use spdk_sys::thread::{
    gaur_thread_destroy, gaur_thread_poll, spdk_put_io_channel, spdk_set_thread, spdk_thread_create,
};

use super::bdev::SpdkBdev;
use super::tests::{BLOCK, available, buffer, call, malloc, queue, unique};
use crate::{Device, DmaBuf, Request, Segments};

/// Random 4 KiB reads and writes at queue depth 32 on a malloc bdev of 2 GiB from one thread: through a queue pair, and
/// by calls of SPDK's own functions in the tightest loop there is, in turn. Their difference is what this backend costs;
/// the first is to be compared with `bdevperf -x` of the same SPDK.
///
/// Run with `--release -- --ignored --nocapture raw_iops`; `SECONDS` is the length of each of the runs. With `NULL=1` on a
/// null bdev, which moves no bytes: there the difference is not hidden by the noise of the memory.
#[test]
#[ignore = "a measurement"]
fn raw_iops() {
    assert!(available());
    let seconds = std::env::var("SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(0.5);
    let device = device(std::env::var_os("NULL").is_some());
    for write in [false, true] {
        let (mut ours, mut direct) = (Vec::new(), Vec::new());
        for _ in 0..9 {
            ours.push(through_queue_pair(&device, write, seconds));
            direct.push(spdk_alone(&device, write, seconds));
        }
        let median = |ns: &mut Vec<f64>| {
            ns.sort_by(f64::total_cmp);
            ns[ns.len() / 2]
        };
        let (ours, direct) = (median(&mut ours), median(&mut direct));
        let what = if write { "randwrite" } else { "randread" };
        println!(
            "{what} 4 KiB qd32: queue pair {:.0} per s ({ours:.1} ns), SPDK alone {:.0} per s ({direct:.1} ns): {:+.1} ns",
            1e9 / ours,
            1e9 / direct,
            ours - direct
        );
    }
}

const BYTES: u64 = 2 << 30;
const DEPTH: usize = 32;
const BATCH: u64 = 16_384;

fn device(null: bool) -> Arc<SpdkBdev> {
    let name = if null { unique("Null") } else { malloc(BYTES, BLOCK) };
    if null {
        let blocks = BYTES / BLOCK;
        call(
            "bdev_null_create",
            &format!(r#"{{"name":"{name}","num_blocks":{blocks},"block_size":{BLOCK}}}"#),
        );
    }
    SpdkBdev::open(&name, None, false, &name).unwrap()
}

fn offsets() -> impl FnMut() -> u64 {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % (BYTES / BLOCK)
    }
}

/// Nanoseconds of CPU an I/O (the thread never sleeps; what others take of its core is left out).
fn measure(seconds: f64, mut batch: impl FnMut()) -> f64 {
    batch();
    let (began, mut done) = (cpu_seconds(), 0);
    while cpu_seconds() - began < seconds {
        batch();
        done += BATCH;
    }
    (cpu_seconds() - began) * 1e9 / done as f64
}

fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn through_queue_pair(device: &Arc<SpdkBdev>, write: bool, seconds: f64) -> f64 {
    let device: Arc<dyn Device> = Arc::clone(device) as _;
    let mut queue = queue(&device);
    let queue = queue.as_mut();
    let mut block = offsets();
    let mut request = |buf: Segments| match write {
        true => Request::write(block() * BLOCK, buf, 0),
        false => Request::read(block() * BLOCK, buf, 0),
    };
    for _ in 0..DEPTH {
        queue.submit(request(buffer(&device, BLOCK, 1).into()));
    }
    let mut completions = Vec::with_capacity(DEPTH);
    measure(seconds, || {
        let mut left = BATCH;
        while left > 0 {
            left = left.saturating_sub(queue.poll(&mut completions) as u64);
            for completion in completions.drain(..) {
                assert!(completion.result.is_ok());
                queue.submit(request(completion.bufs));
            }
        }
    })
}

thread_local! {
    static DONE: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

unsafe extern "C" fn direct_done(io: *mut spdk_bdev_io, success: bool, slot: *mut c_void) {
    assert!(success);
    // SAFETY: the I/O is done, and freed once.
    unsafe { spdk_bdev_free_io(io) };
    DONE.with(|done| done.borrow_mut().push(slot as usize));
}

fn spdk_alone(device: &Arc<SpdkBdev>, write: bool, seconds: f64) -> f64 {
    let as_device: Arc<dyn Device> = Arc::clone(device) as _;
    let bufs: Vec<DmaBuf> = (0..DEPTH).map(|_| buffer(&as_device, BLOCK, 1)).collect();
    let desc = device.opened().desc.as_ptr();
    // SAFETY: the environment is up and the descriptor open; all of this stays on this OS thread; blocks lie inside
    // the bdev; the buffers live until the last I/O is done, which is waited for.
    unsafe {
        let thread = spdk_thread_create(c"direct".as_ptr(), ptr::null_mut());
        spdk_set_thread(thread);
        let channel = spdk_bdev_get_io_channel(desc);
        let mut block = offsets();
        let mut submit = |slot: usize| {
            let (buf, slot_arg) = (bufs[slot].as_ptr().cast(), slot as *mut c_void);
            let rc = match write {
                true => spdk_bdev_write_blocks(desc, channel, buf, block(), 1, Some(direct_done), slot_arg),
                false => spdk_bdev_read_blocks(desc, channel, buf, block(), 1, Some(direct_done), slot_arg),
            };
            assert_eq!(rc, 0);
        };
        (0..DEPTH).for_each(&mut submit);
        let mut done = Vec::with_capacity(DEPTH);
        let ns = measure(seconds, || {
            let mut left = BATCH;
            while left > 0 {
                gaur_thread_poll(thread);
                DONE.with(|ring| std::mem::swap(&mut *ring.borrow_mut(), &mut done));
                left = left.saturating_sub(done.len() as u64);
                done.drain(..).for_each(&mut submit);
            }
        });
        let mut answered = DONE.with(|ring| ring.borrow_mut().drain(..).count());
        while answered < DEPTH {
            gaur_thread_poll(thread);
            answered += DONE.with(|ring| ring.borrow_mut().drain(..).count());
        }
        spdk_put_io_channel(channel);
        spdk_set_thread(ptr::null_mut());
        assert!(gaur_thread_destroy(thread, 1000));
        ns
    }
}
