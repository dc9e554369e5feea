//! Huge pages: where SPDK memory comes from, and what to say when there is none; and ordinary memory instead of them.
//!
//! `GAUR_SPDK_NO_HUGE=512` in the environment of the process makes SPDK do with so many MiB of ordinary memory, all taken at
//! the start. No root and no huge pages are needed then; there is no NVMe over PCIe (a drive wants physical addresses
//! that stay).

use std::fs;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};

use spdk_sys::memory::{spdk_dma_free, spdk_dma_zmalloc};

use crate::Error;
use crate::pool::{ARENA_LEN, Arena, ArenaSource};

/// Names the size in MiB of ordinary memory that takes the place of huge pages.
const NO_HUGE: &str = "GAUR_SPDK_NO_HUGE";
/// Less than this much ordinary memory is too little for SPDK itself.
const LEAST_ORDINARY_MIB: i32 = 384;

/// The environment was started without huge pages.
static ORDINARY: AtomicBool = AtomicBool::new(false);

/// How much ordinary memory the user wants SPDK to have instead of huge pages, in MiB.
///
/// # Errors
/// [`Error::Unavailable`] when that is no size, or too little.
pub(super) fn ordinary(device: &str) -> Result<Option<i32>, Error> {
    let Some(value) = std::env::var_os(NO_HUGE) else { return Ok(None) };
    match value.to_str().and_then(|text| text.parse().ok()) {
        Some(mib) if mib >= LEAST_ORDINARY_MIB => {
            ORDINARY.store(true, Ordering::Relaxed);
            Ok(Some(mib))
        }
        _ => {
            let why = format!(
                "{NO_HUGE}={value:?} is not a size in MiB from {LEAST_ORDINARY_MIB}; write {NO_HUGE}=512"
            );
            Err(Error::Unavailable { device: device.to_owned(), why })
        }
    }
}

/// What there is of memory for SPDK, and what gives it more.
pub(super) fn state() -> String {
    if ORDINARY.load(Ordering::Relaxed) {
        return format!("SPDK runs in ordinary memory, give it more with a larger {NO_HUGE}");
    }
    format!("{} MiB of huge pages are free, {MEND}", free_mib())
}

/// The command that mends a lack of huge pages.
const MEND: &str =
    "run `scripts/spdk.sh hugepages 1536` as root (that is 3 GiB; more for larger malloc bdevs)";

/// Arenas from SPDK's heap, aligned to 2 MiB.
///
/// It can only be made once the environment is initialised, which [`env`](super::env) sees to.
#[derive(Debug)]
pub(super) struct HugePages {
    _private: (),
}

impl HugePages {
    /// # Safety
    /// SPDK's environment is initialised (it is never taken down again).
    pub(super) unsafe fn new() -> HugePages {
        HugePages { _private: () }
    }
}

// SAFETY: SPDK's heap hands out memory that belongs to nobody else until it is freed; `zmalloc` initialises it.
unsafe impl ArenaSource for HugePages {
    fn obtain(&self, len: usize) -> Result<Arena, Error> {
        // SAFETY: the environment is initialised (`new`); DPDK's allocator takes its own lock, so any thread may call.
        let memory = unsafe { spdk_dma_zmalloc(len, ARENA_LEN, ptr::null_mut()) };
        NonNull::new(memory.cast())
            .map(|ptr| Arena { ptr, len })
            .ok_or_else(|| Error::NoMemory { len, why: state() })
    }

    unsafe fn give_back(&self, arena: Arena) {
        // SAFETY: the caller gives up memory that `obtain` got from this allocator.
        unsafe { spdk_dma_free(arena.ptr.as_ptr().cast()) }
    }
}

/// What SPDK takes for its own pools (messages, I/Os, bounce buffers) before the first byte of a user's.
const SPDK_MIB: u64 = 320;

/// Checks, before SPDK is asked (it can be asked only once), that it will find enough huge pages. They are taken without
/// files, so hugetlbfs need not be mounted, and any user may have them.
///
/// # Errors
/// [`Error::Unavailable`] with the command that mends it.
pub(super) fn check(device: &str) -> Result<(), Error> {
    let free = free_mib();
    if free >= SPDK_MIB {
        return Ok(());
    }
    let why = format!(
        "SPDK needs {SPDK_MIB} MiB of huge pages for itself, and {free} MiB are free; {MEND}; or do without them: \
                       {NO_HUGE}=512 in the environment (no NVMe over PCIe then)"
    );
    Err(Error::Unavailable { device: device.to_owned(), why })
}

/// How much is free in huge pages of all sizes.
fn free_mib() -> u64 {
    let Ok(sizes) = fs::read_dir("/sys/kernel/mm/hugepages") else { return 0 };
    let free_kib = sizes.filter_map(|size| {
        let size = size.ok()?;
        let kib: u64 =
            size.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let count: u64 = fs::read_to_string(size.path().join("free_hugepages")).ok()?.trim().parse().ok()?;
        kib.checked_mul(count)
    });
    free_kib.sum::<u64>() / 1024
}
