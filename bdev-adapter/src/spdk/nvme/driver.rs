//! An NVMe queue pair as a [`Driver`].

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use spdk_sys::nvme::{
    gaur_nvme_unmap, spdk_nvme_cpl, spdk_nvme_ns_cmd_flush, spdk_nvme_ns_cmd_read, spdk_nvme_ns_cmd_readv,
    spdk_nvme_ns_cmd_write, spdk_nvme_ns_cmd_write_zeroes, spdk_nvme_ns_cmd_writev,
    spdk_nvme_qpair_process_completions,
};

use super::controller::Shared;
use super::device::NvmeDevice;
use super::seat::{Inner, Seat};
use crate::spdk::engine::{Driver, Durability, Engine, Io, Started, Verdict};
use crate::spdk::slots::{Cursor, Op, Slot, Slots, Work};
use crate::spdk::split::{Data, Limits};
use crate::{Device, DmaBuf, Error, Geometry, IoErrorKind, Kind, Request};

/// `SPDK_NVME_IO_FLAGS_FORCE_UNIT_ACCESS`: bit 30 of command dword 12 (NVMe NVM Command Set, write command).
const FUA: u32 = 1 << 30;
/// Byte offset of the status in a completion queue entry; the layout test of spdk-sys compares it with SPDK's.
const STATUS_AT: usize = 14;
/// How often a command is started again that was lost with its connection.
const MAX_RETRIES: u8 = 5;
/// Bytes of a command that writes zeroes from memory, where the controller has no command for it.
pub(super) const ZERO_BUFFER: u64 = 64 << 10;

/// Status codes that this driver itself gives to commands of a queue pair that is lost (NVMe Base Specification, generic
/// command status): they did not run to their end.
mod status {
    pub(super) const GENERIC: u8 = 0;
    pub(super) const PATH: u8 = 3;
    pub(super) const ABORTED_BY_REQUEST: u8 = 0x07;
    pub(super) const ABORTED_SQ_DELETION: u8 = 0x08;
    /// Of the controller's own: the namespace is not there, or not active, any more.
    pub(super) const INVALID_NAMESPACE: u8 = 0x0b;
}

pub(super) struct NvmeDriver {
    seat: Arc<Seat>,
    shared: Arc<Shared>,
    /// The connection whose commands are on the ring or in flight, and its epoch.
    connection: u32,
    done_epoch: u64,
    /// The connection failed; the worker knows.
    lost: bool,
    /// For zeroes, where the controller has no command for them.
    zeroes: Option<DmaBuf>,
    device: Arc<NvmeDevice>,
}

/// Opens a queue pair.
pub(super) fn open(device: Arc<NvmeDevice>) -> Result<Engine<NvmeDriver>, Error> {
    let zeroes = if device.can_write_zeroes() {
        None
    } else {
        let mut zeroes = DmaBuf::new(&device.dma(), ZERO_BUFFER as usize)?;
        zeroes.fill(0);
        Some(zeroes)
    };
    let shared = Arc::clone(device.controller().shared());
    let slots = Slots::new(device.geometry().queue_depth);
    let seat = Arc::new(Seat::new(device.namespace().nsid, slots.view()));
    device.controller().open_queue_pair(&seat, device.name())?;
    let (connection, done_epoch) = {
        let inner = seat.take();
        (inner.connection, inner.epoch)
    };
    let driver = NvmeDriver { seat, shared, connection, done_epoch, lost: false, zeroes, device };
    Ok(Engine::new(driver, slots))
}

impl NvmeDriver {
    #[inline]
    fn inner(&self) -> &Inner {
        // SAFETY: the engine calls what uses this between `enter` and `leave` only, on the thread that has `&mut` of the
        // engine.
        unsafe { self.seat.inner() }
    }

    #[cold]
    fn report_loss(&mut self) {
        if !self.lost {
            self.lost = true;
            self.shared.report_loss();
        }
    }
}

impl Driver for NvmeDriver {
    type Starting = ();

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
        self.device.limits()
    }

    fn durability(&self) -> Durability {
        if self.device.geometry().volatile_cache { Durability::ByFlush } else { Durability::Always }
    }

    #[inline]
    fn epoch(&self) -> u64 {
        self.shared.epoch()
    }

    #[inline]
    fn done_epoch(&self) -> u64 {
        self.done_epoch
    }

    #[inline]
    fn is_gone(&self) -> bool {
        self.shared.is_gone() || self.device.namespace().is_gone()
    }

    #[inline]
    fn takes(&self, request: &Request) -> bool {
        !self.device.needs_own_memory()
            || !matches!(request.kind, Kind::Read | Kind::Write)
            || request.bufs.as_slice().iter().all(|buf| self.device.owns(buf))
    }

    #[inline]
    fn enter(&mut self) -> bool {
        self.seat.try_take()
    }

    #[inline]
    fn leave(&mut self) {
        self.seat.leave();
    }

    #[inline]
    fn may_start(&self) -> bool {
        let inner = self.inner();
        if inner.qpair.is_some() && inner.connection == self.connection && !self.lost {
            return true;
        }
        self.shared.check_recovery();
        false
    }

    #[inline]
    fn starting(&self) {}

    #[inline]
    fn start(&self, slot: &Slot, io: Io) -> Started {
        let inner = self.inner();
        let Some(qpair) = inner.qpair else { return Started::Later };
        let (ns, qpair) = (inner.ns, qpair.as_ptr());
        let (done, argument) = (Some(on_done as _), slot.argument());
        let Io { block, blocks, .. } = io;
        let flags = if io.fua { FUA } else { 0 };
        slot.started.set(self.shared.clock());
        slot.aborting.set(false);
        let some = |count: i32| slot.cursor.set(Cursor { count: count as u32, next: 0, skip: 0 });
        // SAFETY: the seat is ours, so queue pair and namespace are those of the controller's present connection, and
        // nobody else uses the queue pair. Range, buffers and segments are as the trait promises; lengths are within the
        // limits of the device, which fit in 32 bits. `next_segment` and `seek` are called for this slot until `on_done`
        // is.
        let rc = unsafe {
            match (io.op, io.data) {
                (Op::Read, Data::One(buf)) => {
                    spdk_nvme_ns_cmd_read(ns, qpair, buf, block, blocks as u32, done, argument, 0)
                }
                (Op::Read, Data::Many(_, count)) => {
                    some(count);
                    let (seek, next) = (Some(seek as _), Some(next_segment as _));
                    spdk_nvme_ns_cmd_readv(ns, qpair, block, blocks as u32, done, argument, 0, seek, next)
                }
                (Op::Write, Data::One(buf)) => {
                    spdk_nvme_ns_cmd_write(ns, qpair, buf, block, blocks as u32, done, argument, flags)
                }
                (Op::Write, Data::Many(_, count)) => {
                    some(count);
                    let (seek, next) = (Some(seek as _), Some(next_segment as _));
                    spdk_nvme_ns_cmd_writev(
                        ns,
                        qpair,
                        block,
                        blocks as u32,
                        done,
                        argument,
                        flags,
                        seek,
                        next,
                    )
                }
                (Op::Flush, _) => spdk_nvme_ns_cmd_flush(ns, qpair, done, argument),
                (Op::WriteZeroes, _) => match &self.zeroes {
                    None => {
                        spdk_nvme_ns_cmd_write_zeroes(ns, qpair, block, blocks as u32, done, argument, flags)
                    }
                    // Limited to its length.
                    Some(zeroes) => {
                        let buf = zeroes.as_ptr().cast();
                        spdk_nvme_ns_cmd_write(ns, qpair, buf, block, blocks as u32, done, argument, flags)
                    }
                },
                (Op::Unmap, _) => gaur_nvme_unmap(ns, qpair, block, blocks, done, argument),
            }
        };
        if rc == 0 { Started::Yes } else { self.not_started(rc, slot) }
    }

    /// Rings the doorbell (which SPDK puts off until then).
    #[inline]
    fn started(&mut self) {
        let inner = self.inner();
        if let Some(qpair) = inner.qpair
            && inner.connection == self.connection
            && !self.lost
        {
            // SAFETY: the seat is ours.
            if unsafe { spdk_nvme_qpair_process_completions(qpair.as_ptr(), 0) } < 0 {
                self.report_loss();
            }
        }
    }

    #[inline]
    fn process(&mut self, _: &Slots, _: usize) {
        self.started();
    }

    #[inline]
    fn drained(&mut self) {
        let inner = self.inner();
        if inner.connection != self.connection {
            (self.connection, self.done_epoch, self.lost) = (inner.connection, inner.epoch, false);
        }
    }

    fn verdict(&self, why: IoErrorKind, slot: &Slot, work: &mut Work) -> Verdict {
        let timed_out = slot.aborting.take();
        let interrupted = match why {
            IoErrorKind::Nvme { sct: status::GENERIC, sc } => {
                matches!(sc, status::ABORTED_BY_REQUEST | status::ABORTED_SQ_DELETION)
            }
            IoErrorKind::Nvme { sct: status::PATH, .. } => true,
            _ => false,
        };
        if interrupted && timed_out {
            return Verdict::Answer(IoErrorKind::TimedOut);
        }
        if why == (IoErrorKind::Nvme { sct: status::GENERIC, sc: status::INVALID_NAMESPACE }) {
            self.device.namespace().set_gone();
        }
        if self.is_gone() {
            return Verdict::Answer(IoErrorKind::Gone);
        }
        if interrupted && work.retries < MAX_RETRIES {
            work.retries += 1;
            return Verdict::Again;
        }
        Verdict::Answer(why)
    }
}

impl NvmeDriver {
    #[cold]
    fn not_started(&self, rc: c_int, slot: &Slot) -> Started {
        // Not enough memory for the request, or the connection has failed, as the next poll will see.
        if rc == -libc::ENOMEM || rc == -libc::ENXIO {
            slot.started.set(0);
            return Started::Later;
        }
        // SPDK has called back for this one, with an error status.
        if rc == -libc::EFAULT {
            return Started::Yes;
        }
        slot.started.set(0);
        Started::Refused(IoErrorKind::Os(-rc))
    }
}

impl Drop for NvmeDriver {
    /// Nothing is in flight: the engine has waited. The worker frees the queue pair.
    fn drop(&mut self) {
        self.seat.take().closed = true;
        self.device.controller().reap();
    }
}

/// SPDK calls this when a command is done.
///
/// # Safety
/// `argument` came from [`Slot::argument`] of a table that is alive, `cpl` is a completion queue entry.
unsafe extern "C" fn on_done(argument: *mut c_void, cpl: *const spdk_nvme_cpl) {
    // SAFETY: see above; the status is 16 bits at an even offset of the aligned entry: the phase tag, 8 bits of status code,
    // 3 bits of its type.
    let (slot, status) = unsafe {
        (Slot::of(argument), cpl.cast::<u8>().add(STATUS_AT).cast::<u16>().read_unaligned() >> 1 & 0x7ff)
    };
    slot.started.set(0);
    if status != 0 {
        slot.fail(IoErrorKind::Nvme { sct: (status >> 8) as u8, sc: status as u8 });
    }
    slot.done();
}

/// SPDK asks for the next segment of a command's data.
///
/// # Safety
/// `argument` came from [`Slot::argument`] of a table that is alive, for a command with segments.
unsafe extern "C" fn next_segment(argument: *mut c_void, address: *mut *mut c_void, len: *mut u32) -> c_int {
    // SAFETY: see above; SPDK's pointers are good for writing.
    unsafe {
        let Some((at, bytes)) = Slot::of(argument).next_segment() else { return -libc::EFAULT };
        *address = at.cast();
        // A segment is at most a transfer long, which fits.
        *len = bytes as u32;
    }
    0
}

/// SPDK goes back to byte `offset` of a command's data.
///
/// # Safety
/// As for [`next_segment`].
unsafe extern "C" fn seek(argument: *mut c_void, offset: u32) {
    // SAFETY: see above.
    unsafe { Slot::of(argument).seek(offset) }
}
