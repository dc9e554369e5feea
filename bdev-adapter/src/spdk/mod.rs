//! Devices of SPDK: any bdev (malloc, aio, uring, NVMe, logical volumes...) that SPDK's JSON configuration describes.
//!
//! `spdk-bdev:NAME?config=PATH` reads the configuration, lets SPDK carry it out, and opens the bdev NAME. SPDK's
//! application framework is not used: there are no reactors, and nobody takes `main`. Instead:
//!
//! 1. **Environment** (`env`, `helper`), one in a process, made by the first open: DPDK and SPDK are initialised on a helper
//!    thread, `gaur-spdk`, which keeps its CPU affinity and stays for good. It owns SPDK's first ("app") thread and on it
//!    loads configurations (`rpc`), opens and closes bdevs, and every 10 ms polls whatever SPDK has to do
//!    there (keep-alives, hot-plug). It does no I/O.
//! 2. **Bdevs** (`bdev`), through SPDK's block device layer.
//! 3. **Queue pairs** (`engine`, `slots`, `split`) of both: requests are submitted and polled by whoever calls, on the
//!    caller's OS thread.
//!
//! Memory for I/O comes from SPDK's huge pages through the crate's [`Pool`](crate::pool::Pool) (`memory`).
//!
//! What it does not do:
//! - There is no way back: the environment lives until the process ends, also after the last device closed (DPDK cannot
//!   be initialised twice).
//! - No FUA and no atomicity beyond a block: the bdev interface has neither. FUA is a write and a flush.
//! - The epoch of a bdev never changes: the bdev layer does not say when a controller was reset underneath it.
//! - A queue pair that nobody polls holds up a reset or removal of its bdev, as any SPDK thread would.
//! - The uring bdev of SPDK 20.07 has no flush (so flush and FUA fail on it, as they should) and polls the disk, which
//!   reads need poll queues for. Use the aio bdev above files.
//! - Virtual bdevs are taken at their word. Above an NVMe bdev, in SPDK versions whose NVMe bdev module answers flushes
//!   by itself (20.07), their flush reaches no drive; open the NVMe bdev itself where that matters.

mod bdev;
#[doc(hidden)]
pub mod direct;
mod engine;
mod env;
mod helper;
mod memory;
mod nvme;
mod rpc;
mod slots;
mod split;
#[cfg(test)]
mod tests;

use std::ffi::CStr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::uri::NvmeOptions;
use crate::{Device, Error, OpenOptions};

/// Opens the bdev `name`, after loading `config` (once in a process for each file) if it is given. `uri` is the device's
/// name in messages.
///
/// # Errors
/// [`Error::Unavailable`] when the system has no huge pages to give, [`Error::NotFound`] for a configuration or bdev that
/// does not exist, [`Error::Busy`] when it is open or claimed already, [`Error::NotADevice`] when its geometry is of no
/// use here, [`Error::Spdk`] for what SPDK refuses.
pub fn open_bdev(
    name: &str,
    config: Option<&Path>,
    options: &OpenOptions,
    uri: &str,
) -> Result<Arc<dyn Device>, Error> {
    Ok(bdev::SpdkBdev::open(name, config, options.read_only, uri)?)
}

/// Opens a namespace of an NVMe controller, which SPDK's own driver drives, without the block device layer (see
/// [`NvmeOptions`]). The first device of a controller attaches it, which takes from milliseconds to seconds. `uri` is the
/// device's name in messages.
///
/// # Errors
/// [`Error::NotFound`] when there is no such controller, subsystem or namespace; [`Error::Unavailable`] when the target does
/// not answer or SPDK lacks huge pages or the transport; [`Error::NotPermitted`] when the target does not let this
/// host in; [`Error::Busy`] when somebody on this machine has it; [`Error::NotADevice`] for a namespace with metadata or
/// protection information, and for what is no NVMe target.
pub fn open_nvme(nvme: &NvmeOptions, options: &OpenOptions, uri: &str) -> Result<Arc<dyn Device>, Error> {
    nvme::open(nvme, options, uri)
}

/// Calls an RPC method of SPDK's in this process, as a line of a JSON configuration would: for setting up what no file
/// describes (`rpc("bdev_malloc_create", r#"{"name": "M", "num_blocks": 1024, "block_size": 4096}"#, ...)`).
/// Calls run one after the other; opening and closing devices goes on meanwhile.
///
/// # Errors
/// [`Error::Unavailable`] as for [`open_bdev`]; [`Error::Spdk`] with SPDK's answer, or when there was none within
/// `timeout` (the call may still have its effect later).
pub fn rpc(method: &str, params: &str, timeout: Duration) -> Result<(), Error> {
    env::get(method)?.rpc(method, params, timeout)
}

/// The names of all bdevs that exist now.
///
/// # Errors
/// [`Error::Unavailable`] as for [`open_bdev`].
pub fn bdev_names() -> Result<Vec<String>, Error> {
    env::get("bdev_names")?.bdev_names()
}

/// The version of the SPDK that is linked, as `SPDK v20.07`.
pub fn version() -> &'static str {
    // SAFETY: the shim returns a string constant.
    unsafe { CStr::from_ptr(spdk_sys::version::gaur_spdk_version()) }.to_str().unwrap_or("SPDK")
}
