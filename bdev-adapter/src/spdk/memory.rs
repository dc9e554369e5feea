//! Huge pages: where SPDK memory comes from, and what to say when there is none.

use std::fs;
use std::ptr::{self, NonNull};

use spdk_sys::memory::{spdk_dma_free, spdk_dma_zmalloc};

use crate::Error;
use crate::pool::{ARENA_LEN, Arena, ArenaSource};

/// The command that mends a lack of huge pages.
pub(super) const MEND: &str = "run `scripts/spdk.sh hugepages 1536` as root (3 GiB; more for larger malloc bdevs)";

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
            why: format!("{} huge pages are free; {MEND}", free_pages()),
        })
    }

    unsafe fn give_back(&self, arena: Arena) {
        // SAFETY: the caller gives up memory that `obtain` got from this allocator.
        unsafe { spdk_dma_free(arena.ptr.as_ptr().cast()) }
    }
}

/// Checks, before DPDK is asked (it can be asked only once), that it will find huge pages and may use them.
///
/// # Errors
/// [`Error::Unavailable`] that names what is missing and the command that mends it.
pub(super) fn check(device: &str) -> Result<(), Error> {
    let unavailable = |why: String| Err(Error::Unavailable { device: device.to_owned(), why });
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mut mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let mut mounted = mounts.by_ref().filter(|(_, kind)| *kind == "hugetlbfs").map(|(path, _)| path).peekable();
    if mounted.peek().is_none() {
        return unavailable(format!("SPDK needs huge pages, and hugetlbfs is not mounted; {MEND}"));
    }
    let paths: Vec<&str> = mounted.collect();
    if !paths.iter().any(|path| is_writable(path)) {
        return unavailable(format!(
            "SPDK needs huge pages, and this user may not write to hugetlbfs at {}; run as root, or give the directory \
             to this user (chown)",
            paths.join(", ")
        ));
    }
    if free_pages() == 0 {
        return unavailable(format!("SPDK needs huge pages, and none is free; {MEND}"));
    }
    Ok(())
}

fn is_writable(path: &str) -> bool {
    let Ok(path) = std::ffi::CString::new(path) else { return false };
    // SAFETY: `path` is a terminated string that lives over the call.
    unsafe { libc::access(path.as_ptr(), libc::W_OK | libc::X_OK) == 0 }
}

/// Free huge pages of all sizes, for messages and as a first check.
pub(super) fn free_pages() -> u64 {
    let Ok(sizes) = fs::read_dir("/sys/kernel/mm/hugepages") else { return 0 };
    sizes
        .filter_map(|size| fs::read_to_string(size.ok()?.path().join("free_hugepages")).ok())
        .filter_map(|count| count.trim().parse::<u64>().ok())
        .sum()
}
