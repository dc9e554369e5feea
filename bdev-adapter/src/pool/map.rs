//! Arenas of anonymous memory.

use std::io;
use std::ptr::{self, NonNull};

use super::{ARENA_LEN, Arena, ArenaSource};
use crate::Error;

/// Arenas of anonymous memory, aligned to 2 MiB, in huge pages where the system has them to give.
#[derive(Debug, Default)]
pub struct MapArenas;

// SAFETY: a private anonymous mapping is zeroed memory that nothing else refers to until it is unmapped.
unsafe impl ArenaSource for MapArenas {
    fn obtain(&self, len: usize) -> Result<Arena, Error> {
        let ptr = map_aligned(len).map_err(|error| Error::NoMemory {
            len,
            why: format!("mmap: {error}; free memory or lower what the process keeps in buffers"),
        })?;
        // SAFETY: the range was just mapped. The call is advice: its failure (no such feature) is of no consequence.
        unsafe { libc::madvise(ptr.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        Ok(Arena { ptr, len })
    }

    unsafe fn give_back(&self, arena: Arena) {
        // SAFETY: the caller gives up a mapping that `obtain` made.
        unsafe { libc::munmap(arena.ptr.as_ptr().cast(), arena.len) };
    }
}

/// Maps `len` bytes at a multiple of [`ARENA_LEN`]: maps more, and returns what sticks out.
fn map_aligned(len: usize) -> io::Result<NonNull<u8>> {
    let total = len.checked_add(ARENA_LEN).ok_or(io::ErrorKind::OutOfMemory)?;
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe { libc::mmap(ptr::null_mut(), total, prot, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let base: *mut u8 = base.cast();
    let head = base.align_offset(ARENA_LEN);
    debug_assert!(head < ARENA_LEN);
    // SAFETY: `head` and `len` are within the `total` bytes that were just mapped; what is unmapped is not used.
    let start = unsafe {
        let start = base.add(head);
        if head > 0 {
            libc::munmap(base.cast(), head);
        }
        libc::munmap(start.add(len).cast(), ARENA_LEN - head);
        start
    };
    NonNull::new(start).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}
