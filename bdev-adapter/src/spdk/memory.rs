//! Huge pages: where SPDK memory comes from, and what to say when there is none.

use std::fs;
use std::ptr::{self, NonNull};

use spdk_sys::memory::{spdk_dma_free, spdk_dma_zmalloc};

use crate::Error;
use crate::pool::{ARENA_LEN, Arena, ArenaSource};

/// The command that mends a lack of huge pages.
pub(super) const MEND: &str =
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
        NonNull::new(memory.cast()).map(|ptr| Arena { ptr, len }).ok_or_else(|| Error::NoMemory {
            len,
            why: format!("{} MiB of huge pages are free; {MEND}", free_mib()),
        })
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
    let why = format!("SPDK needs {SPDK_MIB} MiB of huge pages for itself, and {free} MiB are free; {MEND}");
    Err(Error::Unavailable { device: device.to_owned(), why })
}

/// How much is free in huge pages of all sizes.
pub(super) fn free_mib() -> u64 {
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
