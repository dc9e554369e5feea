//! The bytes of a memory device: a sparse anonymous mapping that several threads copy to and from at once.
//!
//! **Why concurrent copies are sound.** Two queue pairs may write the same range at the same time; that is the
//! caller's race, and on a disk the outcome is a mix of both. It must not be undefined behaviour in this process, so no
//! Rust reference to the mapping exists and no Rust load or store touches it: on x86-64 every access is an inline
//! assembly `rep movsb` or `rep stosb` (a plain memory access of the CPU, for which racing bytes are merely mixed), as
//! if the memory belonged to a device; on other architectures every access is a relaxed atomic of a word or a byte.
//! `madvise` is done by the kernel. The caller's side of a copy is ordinary memory, owned by it alone.
//!
//! **Sparse.** One bit per [`GRAIN`] says that it was ever written. What was not reads as zero without touching the
//! mapping, so a scan of an 8 TiB device costs no memory. Bits are set before the bytes are written and never cleared;
//! a reader that learned of a write in a proper way (completion, then a channel or lock) also sees its bit.

use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes whose first write is remembered together.
pub(super) const GRAIN: u64 = 64 << 10;
/// Zeroing at least so much gives the memory back to the system instead of writing zeroes.
const GIVE_BACK: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// The mapping. All functions may be called from any thread; ranges must lie inside.
pub(super) struct Region {
    base: NonNull<u8>,
    len: u64,
    written: Box<[AtomicU64]>,
}

// SAFETY: the mapping belongs to this value, and every access to it is sound from any thread (module documentation).
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `len` zero bytes; memory is taken as they are written.
    pub(super) fn new(len: u64) -> io::Result<Region> {
        let size = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(ptr::null_mut(), size, prot, flags | libc::MAP_NORESERVE, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if len <= hugepage_limit() {
            // SAFETY: the range was just mapped; the call is advice, and its failure is of no consequence.
            unsafe { libc::madvise(base, size, libc::MADV_HUGEPAGE) };
        }
        let Some(base) = NonNull::new(base.cast()) else { return Err(io::ErrorKind::OutOfMemory.into()) };
        let words = len.div_ceil(GRAIN * 64) as usize;
        // Zeroed memory from the allocator: pages of a large bitmap come into being as they are written.
        let mut written = Vec::new();
        written.try_reserve_exact(words).map_err(|_| io::ErrorKind::OutOfMemory)?;
        written.resize_with(words, AtomicU64::default);
        Ok(Region { base, len, written: written.into_boxed_slice() })
    }

    /// Copies the bytes at `offset` into `into`.
    ///
    /// # Panics
    /// When the range does not lie inside (a bug of the caller: requests are checked before).
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        self.assert_inside(offset, into.len() as u64);
        if self.all_written(offset, into.len() as u64) {
            // SAFETY: the range lies inside the mapping (asserted), `into` is exclusively borrowed.
            return unsafe { copy_out(into.as_mut_ptr(), self.at(offset), into.len()) };
        }
        let mut rest = into;
        for (start, len) in grains(offset, rest.len() as u64) {
            let (piece, tail) = rest.split_at_mut(len as usize);
            rest = tail;
            if self.is_written(start) {
                // SAFETY: as above.
                unsafe { copy_out(piece.as_mut_ptr(), self.at(start), piece.len()) }
            } else {
                piece.fill(0);
            }
        }
    }

    /// Copies `from` to the bytes at `offset`.
    ///
    /// # Panics
    /// When the range does not lie inside.
    pub(super) fn write(&self, offset: u64, from: &[u8]) {
        self.assert_inside(offset, from.len() as u64);
        self.mark_written(offset, from.len() as u64);
        // SAFETY: the range lies inside the mapping (asserted), `from` is borrowed.
        unsafe { copy_in(self.at(offset), from.as_ptr(), from.len()) }
    }

    /// Makes `len` bytes at `offset` read as zero, and gives large ranges back to the system.
    ///
    /// # Panics
    /// When the range does not lie inside.
    pub(super) fn zero(&self, offset: u64, len: u64) {
        self.assert_inside(offset, len);
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(PAGE), end - end % PAGE);
        if last <= first || last - first < GIVE_BACK {
            return self.fill_zero(offset, len);
        }
        self.fill_zero(offset, first - offset);
        // SAFETY: whole pages inside the mapping; the kernel replaces them by zero pages.
        let result =
            unsafe { libc::madvise(self.at(first).cast(), (last - first) as usize, libc::MADV_DONTNEED) };
        if result != 0 {
            self.fill_zero(first, last - first);
        }
        self.fill_zero(last, end - last);
    }

    /// The grains that were ever written: byte address and length.
    pub(super) fn written(&self) -> impl Iterator<Item = (u64, u64)> {
        self.written.iter().enumerate().flat_map(move |(number, word)| {
            let bits = word.load(Ordering::Relaxed);
            (0..64).filter(move |bit| bits & 1 << bit != 0).map(move |bit| {
                let start = (number as u64 * 64 + bit) * GRAIN;
                (start, GRAIN.min(self.len - start))
            })
        })
    }

    fn fill_zero(&self, offset: u64, len: u64) {
        for (start, len) in grains(offset, len) {
            if self.is_written(start) {
                // SAFETY: the callers asserted that the range lies inside the mapping.
                unsafe { fill_zero(self.at(start), len as usize) }
            }
        }
    }

    fn assert_inside(&self, offset: u64, len: u64) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "access beyond the device");
    }

    /// Address of a byte; `offset` was asserted to lie inside (or one past).
    fn at(&self, offset: u64) -> *mut u8 {
        self.base.as_ptr().wrapping_add(offset as usize)
    }

    // Relaxed everywhere: who must see a bit has a proper order with the write already (module documentation).
    fn is_written(&self, offset: u64) -> bool {
        let grain = offset / GRAIN;
        self.written[(grain / 64) as usize].load(Ordering::Relaxed) & 1 << (grain % 64) != 0
    }

    fn all_written(&self, offset: u64, len: u64) -> bool {
        grains(offset, len).all(|(start, _)| self.is_written(start))
    }

    fn mark_written(&self, offset: u64, len: u64) {
        for (start, _) in grains(offset, len) {
            if !self.is_written(start) {
                let grain = start / GRAIN;
                self.written[(grain / 64) as usize].fetch_or(1 << (grain % 64), Ordering::Relaxed);
            }
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len as usize) };
    }
}

/// The pieces of a range, cut at grains: byte address and length.
fn grains(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        let start = at;
        at = end.min(start / GRAIN * GRAIN + GRAIN);
        (start < end).then(|| (start, at - start))
    })
}

/// Huge pages make random access faster, but a huge page is taken whole for its first byte: only for devices that
/// could be filled anyway.
fn hugepage_limit() -> u64 {
    // SAFETY: `sysconf` only reads its argument.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(page).unwrap_or(0)) / 2
}

/// Copies from the mapping into ordinary memory.
///
/// # Safety
/// `from` lies in the mapping with `len` bytes; `into` is valid for writes of `len` bytes and nobody else's.
#[cfg(target_arch = "x86_64")]
unsafe fn copy_out(into: *mut u8, from: *const u8, len: usize) {
    // SAFETY: moves `len` bytes, for which the caller vouches; the direction flag is clear by the ABI.
    unsafe { rep_movsb(into, from, len) }
}

/// Copies from ordinary memory into the mapping.
///
/// # Safety
/// `into` lies in the mapping with `len` bytes; `from` is valid for reads of `len` bytes.
#[cfg(target_arch = "x86_64")]
unsafe fn copy_in(into: *mut u8, from: *const u8, len: usize) {
    // SAFETY: as in `copy_out`.
    unsafe { rep_movsb(into, from, len) }
}

#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn rep_movsb(into: *mut u8, from: *const u8, len: usize) {
    // SAFETY: see the callers; the instruction changes only the three registers named and the target bytes.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _, inout("rdi") into => _, inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Zeroes bytes of the mapping.
///
/// # Safety
/// `at` lies in the mapping with `len` bytes.
#[cfg(target_arch = "x86_64")]
unsafe fn fill_zero(at: *mut u8, len: usize) {
    // SAFETY: as above; `al` is the byte that is stored.
    unsafe {
        std::arch::asm!(
            "rep stosb",
            inout("rcx") len => _, inout("rdi") at => _, in("al") 0u8,
            options(nostack, preserves_flags)
        );
    }
}

#[cfg(not(target_arch = "x86_64"))]
use portable::{copy_in, copy_out, fill_zero};

/// The same by relaxed atomics, a word at a time where the mapping's side is aligned.
#[cfg_attr(target_arch = "x86_64", cfg(test))]
mod portable {
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

    /// Calls `word(i)` for aligned words and `byte(i)` for the rest of `len` bytes at `device`.
    fn each(device: *const u8, len: usize, mut word: impl FnMut(usize), mut byte: impl FnMut(usize)) {
        let mut at = 0;
        while at < len {
            if (device as usize + at).is_multiple_of(8) && len - at >= 8 {
                word(at);
                at += 8;
            } else {
                byte(at);
                at += 1;
            }
        }
    }

    /// # Safety
    /// `from` lies in the mapping with `len` bytes; `into` is valid for writes of `len` bytes and nobody else's.
    pub(super) unsafe fn copy_out(into: *mut u8, from: *const u8, len: usize) {
        // SAFETY: `each` stays below `len` and passes words only where `from + at` is a multiple of 8; the mapping is
        // reached by atomics only.
        let word = |at: usize| unsafe {
            let value = (*from.add(at).cast::<AtomicU64>()).load(Ordering::Relaxed);
            into.add(at).cast::<u64>().write_unaligned(value);
        };
        // SAFETY: as above.
        let byte =
            |at: usize| unsafe { *into.add(at) = (*from.add(at).cast::<AtomicU8>()).load(Ordering::Relaxed) };
        each(from, len, word, byte);
    }

    /// # Safety
    /// `into` lies in the mapping with `len` bytes; `from` is valid for reads of `len` bytes.
    pub(super) unsafe fn copy_in(into: *mut u8, from: *const u8, len: usize) {
        // SAFETY: as in `copy_out`, with the words aligned on the side of the mapping.
        let word = |at: usize| unsafe {
            let value = from.add(at).cast::<u64>().read_unaligned();
            (*into.add(at).cast::<AtomicU64>()).store(value, Ordering::Relaxed);
        };
        // SAFETY: as above.
        let byte =
            |at: usize| unsafe { (*into.add(at).cast::<AtomicU8>()).store(*from.add(at), Ordering::Relaxed) };
        each(into, len, word, byte);
    }

    /// # Safety
    /// `at` lies in the mapping with `len` bytes.
    pub(super) unsafe fn fill_zero(device: *mut u8, len: usize) {
        // SAFETY: as in `copy_out`.
        let word = |at: usize| unsafe { (*device.add(at).cast::<AtomicU64>()).store(0, Ordering::Relaxed) };
        // SAFETY: as in `copy_out`.
        let byte = |at: usize| unsafe { (*device.add(at).cast::<AtomicU8>()).store(0, Ordering::Relaxed) };
        each(device, len, word, byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_terabytes() {
        let region = Region::new(8 << 40).unwrap();
        let mut bytes = vec![1; 3 << 20];
        region.read((5 << 40) - 17, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0));
        region.write((8 << 40) - 5, b"hello");
        region.write(GRAIN - 2, b"over");
        region.read((8 << 40) - 7, &mut bytes[..7]);
        assert_eq!(&bytes[..7], b"\0\0hello");
        let written: Vec<_> = region.written().collect();
        assert_eq!(written, [(0, GRAIN), (GRAIN, GRAIN), ((8 << 40) - GRAIN, GRAIN)]);
    }

    #[test]
    fn zeroing_large_and_small_ranges() {
        let region = Region::new(8 << 20).unwrap();
        for (offset, len) in [(0u64, 8u64 << 20), (4096, 3 << 20), (513, 5 << 20), (100_000, 70_000), (7, 1)]
        {
            region.write(0, &vec![0xAA; 8 << 20]);
            region.zero(offset, len);
            let mut bytes = vec![1; 8 << 20];
            region.read(0, &mut bytes);
            for (at, byte) in bytes.iter().enumerate() {
                let inside = (offset..offset + len).contains(&(at as u64));
                assert_eq!(*byte, if inside { 0 } else { 0xAA }, "byte {at} after zero({offset}, {len})");
            }
        }
    }

    #[test]
    fn the_portable_copies_do_the_same() {
        let device = Region::new(4096).unwrap();
        let bytes: Vec<u8> = (0..100).collect();
        for (start, len) in [(0, 100), (1, 64), (7, 3), (5, 50), (8, 8)] {
            let mut back = vec![0xFF; len];
            // SAFETY: the ranges lie inside the mapping, which only this test uses, and inside the vectors.
            unsafe {
                portable::fill_zero(device.at(0), 4096);
                portable::copy_in(device.at(start), bytes.as_ptr(), len);
                portable::copy_out(back.as_mut_ptr(), device.at(start), len);
            }
            assert_eq!(back, bytes[..len]);
        }
    }

    #[test]
    #[should_panic(expected = "beyond the device")]
    fn access_beyond_the_end_is_stopped() {
        Region::new(4096).unwrap().read(4090, &mut [0; 7]);
    }
}
