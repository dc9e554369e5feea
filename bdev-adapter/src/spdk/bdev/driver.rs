//! A bdev's I/O channel in an SPDK thread of its own, as a [`Driver`].
//!
//! Only the queue pair enters its SPDK thread, on the OS thread that holds `&mut`, and leaves it before returning.

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use spdk_sys::bdev::{
    gaur_bdev_flush, gaur_bdev_io_error, gaur_bdev_room_for_thread, gaur_io_error, io_error_kind,
    spdk_bdev_desc, spdk_bdev_free_io, spdk_bdev_get_io_channel, spdk_bdev_io, spdk_bdev_read_blocks,
    spdk_bdev_readv_blocks, spdk_bdev_unmap_blocks, spdk_bdev_write_blocks, spdk_bdev_write_zeroes_blocks,
    spdk_bdev_writev_blocks,
};
use spdk_sys::thread::{
    gaur_thread_destroy, gaur_thread_poll, spdk_get_thread, spdk_io_channel, spdk_put_io_channel,
    spdk_set_thread, spdk_thread, spdk_thread_create,
};

use super::device::{DEPTH, EPOCH, MAX_PIECE, SpdkBdev};
use crate::spdk::engine::{Driver, Durability, Engine, Io, Started, Verdict};
use crate::spdk::memory;
use crate::spdk::slots::{Op, Slot, Slots, Work};
use crate::spdk::split::{Data, Limits};
use crate::{Device, Error, Geometry, IoErrorKind, Kind, Request};

/// SPDK handles so many messages (completions among them) in one poll.
const MESSAGE_BATCH: usize = 8;
/// How long a queue pair that is dropped waits for its SPDK thread to come to rest after its I/O is done.
const REST_MS: u32 = 10_000;

pub(super) struct BdevDriver {
    thread: NonNull<spdk_thread>,
    channel: NonNull<spdk_io_channel>,
    desc: NonNull<spdk_bdev_desc>,
    /// Last, so that the bdev is closed after the channel was put.
    device: Arc<SpdkBdev>,
}

// SAFETY: an SPDK thread and its channels may be used from any OS thread, by one at a time; `&mut self` (or ownership)
// makes it one.
unsafe impl Send for BdevDriver {}

/// Opens a queue pair.
pub(super) fn open(device: Arc<SpdkBdev>) -> Result<Engine<BdevDriver>, Error> {
    let no_memory = |what: &str| Error::Spdk {
        what: format!("cannot open a queue pair of '{}'", device.name()),
        why: format!("no {what}; {}", memory::state()),
    };
    if device.is_gone() {
        let why = "the bdev was removed".to_owned();
        return Err(Error::NotFound { device: device.name().to_owned(), why });
    }
    // SAFETY: the environment is initialised (a device is open), and SPDK's pools with it.
    if !unsafe { gaur_bdev_room_for_thread() } {
        return Err(Error::Spdk {
            what: format!("cannot open another queue pair of '{}'", device.name()),
            why: "SPDK's pool of I/Os is used up by those that exist; open fewer, or set a larger bdev_io_pool_size \
                  with bdev_set_options in the configuration"
                .to_owned(),
        });
    }
    // SAFETY: as above; the name is copied.
    let thread = unsafe { spdk_thread_create(c"gaur-queue".as_ptr(), ptr::null_mut()) };
    let thread = NonNull::new(thread).ok_or_else(|| no_memory("SPDK thread"))?;
    let channel = {
        let _inside = Inside::enter(thread);
        // SAFETY: the descriptor is open as long as `device` lives; we are inside the thread that is to own the
        // channel.
        unsafe { spdk_bdev_get_io_channel(device.opened().desc.as_ptr()) }
    };
    let Some(channel) = NonNull::new(channel) else {
        // SAFETY: nobody else knows the thread, and it has no channels.
        unsafe { gaur_thread_destroy(thread.as_ptr(), REST_MS) };
        return Err(no_memory("I/O channel"));
    };
    let driver = BdevDriver { thread, channel, desc: device.opened().desc, device };
    Ok(Engine::new(driver, Slots::new(DEPTH)))
}

impl Driver for BdevDriver {
    type Starting = Inside;

    fn name(&self) -> &str {
        self.device.name()
    }

    #[inline]
    fn geometry(&self) -> &Geometry {
        self.device.geometry()
    }

    #[inline]
    fn read_only(&self) -> bool {
        self.device.read_only()
    }

    fn limits(&self) -> Limits {
        Limits { transfer: MAX_PIECE, boundary: 0, zeroes: u64::MAX, unmap: u64::MAX }
    }

    fn durability(&self) -> Durability {
        match &self.device.opened().info {
            info if !info.write_cache => Durability::Always,
            info if info.can_flush => Durability::ByFlush,
            _ => Durability::Never,
        }
    }

    #[inline]
    fn epoch(&self) -> u64 {
        EPOCH
    }

    #[inline]
    fn done_epoch(&self) -> u64 {
        EPOCH
    }

    #[inline]
    fn is_gone(&self) -> bool {
        self.device.is_gone()
    }

    #[inline]
    fn takes(&self, request: &Request) -> bool {
        !matches!(request.kind, Kind::Read | Kind::Write) || self.device.takes(request.bufs.as_slice())
    }

    #[inline]
    fn enter(&mut self) -> bool {
        true
    }

    #[inline]
    fn leave(&mut self) {}

    #[inline]
    fn may_start(&self) -> bool {
        true
    }

    #[inline]
    fn starting(&self) -> Inside {
        Inside::enter(self.thread)
    }

    #[inline]
    fn start(&self, slot: &Slot, io: Io) -> Started {
        let (desc, channel) = (self.desc.as_ptr(), self.channel.as_ptr());
        let (done, argument) = (Some(on_done as _), slot.argument());
        let Io { block, blocks, .. } = io;
        // SAFETY: the descriptor is open and the channel belongs to the SPDK thread we are in (`starting`). Range,
        // buffers and segments are as the trait promises.
        let rc = unsafe {
            match (io.op, io.data) {
                (Op::Read, Data::One(buf)) => {
                    spdk_bdev_read_blocks(desc, channel, buf, block, blocks, done, argument)
                }
                (Op::Read, Data::Many(segments, count)) => {
                    spdk_bdev_readv_blocks(desc, channel, segments, count, block, blocks, done, argument)
                }
                (Op::Write, Data::One(buf)) => {
                    spdk_bdev_write_blocks(desc, channel, buf, block, blocks, done, argument)
                }
                (Op::Write, Data::Many(segments, count)) => {
                    spdk_bdev_writev_blocks(desc, channel, segments, count, block, blocks, done, argument)
                }
                (Op::Flush, _) => gaur_bdev_flush(self.device.opened().bdev(), channel, done, argument),
                (Op::WriteZeroes, _) => {
                    spdk_bdev_write_zeroes_blocks(desc, channel, block, blocks, done, argument)
                }
                (Op::Unmap, _) => spdk_bdev_unmap_blocks(desc, channel, block, blocks, done, argument),
            }
        };
        match rc {
            0 => Started::Yes,
            rc if rc == -libc::ENOMEM => Started::Later,
            _ if self.is_gone() => Started::Refused(IoErrorKind::Gone),
            rc => Started::Refused(IoErrorKind::Os(-rc)),
        }
    }

    #[inline]
    fn started(&mut self) {}

    /// Polls the SPDK thread until it has handled the messages it has.
    #[inline]
    fn process(&mut self, slots: &Slots, in_flight: usize) {
        loop {
            let before = slots.done();
            // SAFETY: the thread is ours, and nobody else is inside it.
            unsafe { gaur_thread_poll(self.thread.as_ptr()) };
            if slots.done() - before < MESSAGE_BATCH || slots.done() >= in_flight {
                return;
            }
        }
    }

    #[inline]
    fn drained(&mut self) {}

    fn verdict(&self, why: IoErrorKind, _: &Slot, _: &mut Work) -> Verdict {
        Verdict::Answer(if self.is_gone() { IoErrorKind::Gone } else { why })
    }
}

impl Drop for BdevDriver {
    /// Nothing is in flight: the engine has waited.
    fn drop(&mut self) {
        {
            let _inside = Inside::enter(self.thread);
            // SAFETY: the channel is ours, in its own thread, and has nothing in flight.
            unsafe { spdk_put_io_channel(self.channel.as_ptr()) };
        }
        // SAFETY: nobody else uses the thread, and its channel was put.
        if !unsafe { gaur_thread_destroy(self.thread.as_ptr(), REST_MS) } {
            log::error!("{}: an SPDK thread did not come to rest and is leaked", self.device.name());
        }
    }
}

/// SPDK calls this when an I/O is done.
///
/// # Safety
/// `io` is a completed I/O of SPDK's, `argument` came from [`Slot::argument`] of a table that is alive.
unsafe extern "C" fn on_done(io: *mut spdk_bdev_io, success: bool, argument: *mut c_void) {
    // SAFETY: see above.
    let slot = unsafe { Slot::of(argument) };
    if !success {
        // SAFETY: `io` has completed and is not freed yet.
        slot.fail(unsafe { failure(io) });
    }
    // SAFETY: the I/O is ours and done; it is freed once, here.
    unsafe { spdk_bdev_free_io(io) };
    slot.done();
}

/// # Safety
/// `io` has completed and is not freed yet.
#[cold]
unsafe fn failure(io: *mut spdk_bdev_io) -> IoErrorKind {
    let mut error = gaur_io_error { kind: 0, error: 0, sct: 0, sc: 0 };
    // SAFETY: as the caller promises; `error` is a structure of the shim's layout.
    unsafe { gaur_bdev_io_error(io, &mut error) };
    match error.kind {
        io_error_kind::GAUR_IO_NVME => IoErrorKind::Nvme { sct: error.sct, sc: error.sc },
        io_error_kind::GAUR_IO_ERRNO => IoErrorKind::Os(error.error),
        io_error_kind::GAUR_IO_NOMEM => IoErrorKind::NoMemory,
        io_error_kind::GAUR_IO_ABORTED => IoErrorKind::Os(libc::ECANCELED),
        _ => IoErrorKind::Os(libc::EIO),
    }
}

/// Being inside an SPDK thread; restores what was before (an embedder may use SPDK itself).
pub(super) struct Inside {
    before: *mut spdk_thread,
}

impl Inside {
    #[inline]
    fn enter(thread: NonNull<spdk_thread>) -> Inside {
        // SAFETY: these read and write a variable of this OS thread.
        let before = unsafe { spdk_get_thread() };
        // SAFETY: as above; `thread` is alive, and the caller is the only one to use it.
        unsafe { spdk_set_thread(thread.as_ptr()) };
        Inside { before }
    }
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: restores what this OS thread had before.
        unsafe { spdk_set_thread(self.before) };
    }
}
