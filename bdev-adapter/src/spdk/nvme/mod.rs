//! SPDK's NVMe driver used directly, without the block device layer: `spdk-nvme:`, over PCIe, TCP (and RDMA where SPDK has it).
//!
//! 1. **Controller** (`controller`): attached once in a process, shared by the devices that are its namespaces. It has a
//!    thread, `gaur-nvme` (`worker`), which makes all calls that SPDK wants from one thread or that may wait for the device:
//!    attaching, the admin queue (keep-alive, events) every 10 ms, opening and freeing queue pairs, timeouts, resets. It
//!    does no I/O.
//! 2. **Device** (`device`): a namespace, opened by one user on this machine (`exclusive`).
//! 3. **Queue pair** (`driver`, over the common `engine`): an NVMe queue pair of its own, submitted to and polled by
//!    whoever calls, on the caller's thread. What the two threads share of it is its **seat** (`seat`): one of them at a time
//!    sits on it. The owner takes it for every kick and poll, without waiting; the worker takes it for a moment each
//!    second (timeouts), and during a reset.
//!
//! **When a controller is lost** (a connection breaks, a queue pair or the admin queue fails, a command is not answered
//! in its time and its abort does not help):
//! - the epoch rises, if there is a volatile cache: flushes that name the old one fail with
//!   [`EpochLost`](crate::IoErrorKind::EpochLost);
//! - over fabrics all queue pairs are freed, which ends what they had in flight; on PCIe the reset does that;
//! - the controller is reset, again and again, until it answers or `reconnect` has passed; then it is gone for good, and
//!   everything is answered with [`Gone`](crate::IoErrorKind::Gone);
//! - when it is back, its namespaces are compared with what they were, queue pairs are opened again, and what was in flight
//!   or queued is started again by its owner: reads, writes, zeroes and unmaps may be repeated, as nothing that depends on
//!   them was answered. A command that was lost five times fails with its last status; one that timed out fails
//!   with [`TimedOut`](crate::IoErrorKind::TimedOut) at once.
//!
//! **When a PCIe controller is pulled out**, the worker sees within a quarter of a second that nobody answers on the bus. Nothing
//! is tried then: everything is answered with [`Gone`](crate::IoErrorKind::Gone), and SPDK finds memory full of ones
//! where the registers were, so that it does not wait for them, nor write to whatever is plugged in at their addresses.
//!
//! **Splitting**: by the controller's maximum transfer size, the namespace's boundary (NOIOB) and the 16 segments of a slot;
//! pieces are single commands, so the driver's own splitting (whose children may fail apart) is not used, except where
//! segments do not fit in PRPs.
//!
//! **Zero copy**: SPDK gets the addresses of the caller's buffers. On PCIe the controller transfers to and from them, and so
//! only memory of the device's pool is taken ([`ForeignBuffer`](crate::IoErrorKind::ForeignBuffer)).

mod controller;
mod device;
mod diagnose;
mod driver;
mod exclusive;
mod preflight;
mod seat;
mod watchdog;
mod worker;

pub(super) use device::open;
