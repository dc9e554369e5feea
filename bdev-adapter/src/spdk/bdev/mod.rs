//! Bdevs: an open descriptor, claimed for this process alone (`device`), and its queue pairs, each an SPDK thread and an
//! I/O channel of its own (`driver`). Requests are submitted and polled by whoever calls, on the caller's OS thread; an
//! SPDK thread is a context that any OS thread may enter, one at a time, and `&mut` sees to that.

mod device;
mod driver;

pub(super) use device::SpdkBdev;
