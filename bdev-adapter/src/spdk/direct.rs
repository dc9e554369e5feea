//! Reads of a bdev by SPDK's own functions, in the tightest loop there is: what the backend is measured against. For the
//! bench, which must not know SPDK's bindings; no part of the interface of this crate.
//!
//! The loop is the one that a user of a queue pair writes: poll, then submit again for everything that was answered.
//!
//! And [`blobfs`]: SPDK's own filesystem.

pub mod blobfs;

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use spdk_sys::bdev::{spdk_bdev_free_io, spdk_bdev_get_io_channel, spdk_bdev_io, spdk_bdev_read_blocks};
use spdk_sys::thread::{
    gaur_thread_destroy, gaur_thread_poll, spdk_get_thread, spdk_io_channel, spdk_put_io_channel,
    spdk_set_thread, spdk_thread, spdk_thread_create,
};

use super::bdev::SpdkBdev;
use crate::{Device, DmaBuf, Error};

/// Most reads in flight.
const MAX_DEPTH: usize = 256;
/// How long closing waits for the SPDK thread.
const REST_MS: u32 = 10_000;

/// A bdev with a channel of its own, used on the OS thread that made it.
pub struct DirectReads {
    thread: NonNull<spdk_thread>,
    channel: NonNull<spdk_io_channel>,
    /// One for each read in flight, of one block each.
    bufs: Vec<DmaBuf>,
    device: Arc<SpdkBdev>,
}

/// The reads that are done since the last poll.
struct Done {
    len: Cell<usize>,
    failed: Cell<usize>,
    list: [Cell<u32>; MAX_DEPTH],
}

/// What SPDK gets as the argument of the callback.
struct Slot {
    done: *const Done,
    index: u32,
}

impl DirectReads {
    /// Opens the bdev `name` for `depth` reads of one block at once, at most 256.
    ///
    /// # Errors
    /// Those of [`open_bdev`](super::open_bdev).
    pub fn open(name: &str, depth: usize) -> Result<DirectReads, Error> {
        assert!(depth <= MAX_DEPTH, "{depth} reads at once");
        let device = SpdkBdev::open(name, None, false, &format!("spdk-bdev:{name}"))?;
        let block = device.geometry().block_size as usize;
        let bufs = (0..depth).map(|_| DmaBuf::new(&device.dma(), block)).collect::<Result<Vec<_>, _>>()?;
        let refused =
            |what: &str| Error::Spdk { what: format!("cannot use '{name}'"), why: format!("no {what}") };
        // SAFETY: the environment is up (a device is open); the name is copied.
        let thread = unsafe { spdk_thread_create(c"gaur-direct".as_ptr(), ptr::null_mut()) };
        let thread = NonNull::new(thread).ok_or_else(|| refused("SPDK thread"))?;
        // SAFETY: the thread is ours, and left again; the descriptor is open as long as `device` lives.
        let channel = inside(thread, || unsafe { spdk_bdev_get_io_channel(device.opened().desc.as_ptr()) });
        let Some(channel) = NonNull::new(channel) else {
            // SAFETY: nobody else knows the thread, and it has no channels.
            unsafe { gaur_thread_destroy(thread.as_ptr(), REST_MS) };
            return Err(refused("I/O channel"));
        };
        Ok(DirectReads { thread, channel, bufs, device })
    }

    /// The bdev as a device of this crate, for the other side of the comparison.
    pub fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.device) as Arc<dyn Device>
    }

    /// Reads `reads` blocks or a few more, whose numbers `next_block` tells; then waits for what is in flight.
    ///
    /// # Panics
    /// When a read fails, or a block lies outside of the bdev.
    pub fn run(&mut self, reads: u64, mut next_block: impl FnMut() -> u64) {
        let (desc, channel) = (self.device.opened().desc.as_ptr(), self.channel.as_ptr());
        let (bufs, thread) = (&self.bufs, self.thread);
        let done =
            Done { len: Cell::new(0), failed: Cell::new(0), list: [const { Cell::new(0) }; MAX_DEPTH] };
        let slots: Vec<Slot> =
            (0..bufs.len() as u32).map(|index| Slot { done: &raw const done, index }).collect();
        let mut submit = |index: u32| {
            let argument: *const Slot = &raw const slots[index as usize];
            let buf = bufs[index as usize].as_ptr().cast();
            // SAFETY: we are inside the SPDK thread that owns the channel, and the descriptor is open. SPDK refuses blocks
            // outside of the bdev. Buffer (a block long) and slot live until the read is done, which is waited for.
            let rc = unsafe {
                spdk_bdev_read_blocks(
                    desc,
                    channel,
                    buf,
                    next_block(),
                    1,
                    Some(on_done),
                    argument.cast_mut().cast(),
                )
            };
            assert_eq!(rc, 0, "SPDK refuses a read");
        };
        inside(thread, || {
            // SAFETY: the thread is ours alone.
            let poll = || unsafe { gaur_thread_poll(thread.as_ptr()) };
            (0..bufs.len() as u32).for_each(&mut submit);
            let mut left = reads;
            while left > 0 {
                poll();
                let answered = done.len.take();
                left = left.saturating_sub(answered as u64);
                // Overwritten while it is read, but never beyond what was read: SPDK may call back from within `submit`.
                done.list[..answered].iter().for_each(|index| submit(index.get()));
            }
            while done.len.get() < bufs.len() {
                poll();
            }
        });
        assert_eq!(done.failed.get(), 0, "reads fail");
    }
}

impl Drop for DirectReads {
    fn drop(&mut self) {
        // SAFETY: the channel is ours, in its own thread, and has nothing in flight: `run` waits.
        inside(self.thread, || unsafe { spdk_put_io_channel(self.channel.as_ptr()) });
        // SAFETY: nobody else uses the thread, and its channel was put.
        if !unsafe { gaur_thread_destroy(self.thread.as_ptr(), REST_MS) } {
            log::error!("{}: an SPDK thread did not come to rest and is leaked", self.device.name());
        }
    }
}

/// Runs `work` inside an SPDK thread that nobody else uses.
fn inside<T>(thread: NonNull<spdk_thread>, work: impl FnOnce() -> T) -> T {
    // SAFETY: reads and writes a variable of this OS thread; the SPDK thread is alive.
    let before = unsafe {
        let before = spdk_get_thread();
        spdk_set_thread(thread.as_ptr());
        before
    };
    let result = work();
    // SAFETY: as above.
    unsafe { spdk_set_thread(before) };
    result
}

/// SPDK calls this when a read is done.
///
/// # Safety
/// `io` is a completed I/O of SPDK's; `argument` points to a slot of a living [`Done`], used on this thread only.
unsafe extern "C" fn on_done(io: *mut spdk_bdev_io, success: bool, argument: *mut c_void) {
    // SAFETY: as the caller promises; the I/O is freed once, here.
    let (slot, done) = unsafe {
        spdk_bdev_free_io(io);
        let slot = &*argument.cast::<Slot>();
        (slot, &*slot.done)
    };
    let len = done.len.get();
    done.list[len].set(slot.index);
    done.len.set(len + 1);
    if !success {
        done.failed.set(done.failed.get() + 1);
    }
}
