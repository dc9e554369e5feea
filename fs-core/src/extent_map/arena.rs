//! Where the memory of nodes comes from: chunks of huge pages.
//!
//! A lookup in a large map touches a node that it has not touched for long, in every level. On ordinary pages each of these is
//! also a miss of the TLB, which a prefetch does not hide: it waits for the walk. (Measured: 1e6 extents, 25 of 80 ns.) So nodes
//! are cut from chunks that the system is asked to back with huge pages; what is freed is kept, by size, for the next node.
//!
//! Invariants:
//! - A place is cut once, for a number of groups, and from then on is either given out or on the list of that number.
//! - A free place holds the address of the next one on its list in its first word, and nobody else refers to it.
//!
//! What it does not do: give memory back to the system, or make one size out of another. It keeps, of each size, the most that
//! all maps of the process ever used at once; the budget of the extent maps bounds that.

use std::alloc::{self, Layout};
use std::ptr::NonNull;

use parking_lot::Mutex;

use super::node::{LINE, MAX_GROUPS};

/// A huge page, and the unit in which memory is taken from the system.
const CHUNK: usize = 2 << 20;
/// The first chunk: who has a few small files needs no more.
const FIRST_CHUNK: usize = 64 << 10;

/// Lines of a node with `groups` groups: its directory comes first.
pub(super) const fn lines(groups: usize) -> usize {
    groups + 1
}

struct Arena {
    /// What is left of the chunk that is being cut up: its next byte, and how many there are.
    next: *mut u8,
    left: usize,
    chunks: usize,
    /// First free place of each number of groups.
    free: [Option<NonNull<u8>>; MAX_GROUPS],
}

// SAFETY: addresses of memory that belongs to the arena alone; which thread uses it makes no difference.
unsafe impl Send for Arena {}

static ARENA: Mutex<Arena> =
    Mutex::new(Arena { next: std::ptr::null_mut(), left: 0, chunks: 0, free: [None; MAX_GROUPS] });

/// Memory for a directory and `groups` groups (1 to [`MAX_GROUPS`]), uninitialised, aligned to a line.
pub(super) fn take(groups: usize) -> NonNull<u8> {
    ARENA.lock().take(groups)
}

/// Takes back what [`take`] gave.
///
/// # Safety
/// `base` came from `take(groups)`, is given back once, and nobody uses it any more.
pub(super) unsafe fn give(base: NonNull<u8>, groups: usize) {
    let mut arena = ARENA.lock();
    // SAFETY: the place is free now (the caller's promise), at least two lines long, and aligned to a line.
    unsafe { base.cast::<Option<NonNull<u8>>>().write(arena.free[groups - 1]) }
    arena.free[groups - 1] = Some(base);
}

impl Arena {
    fn take(&mut self, groups: usize) -> NonNull<u8> {
        if let Some(base) = self.free[groups - 1] {
            // SAFETY: a place on a list has the next one in its first word, which `give` wrote; nobody else refers to it.
            self.free[groups - 1] = unsafe { base.cast::<Option<NonNull<u8>>>().read() };
            return base;
        }
        let bytes = lines(groups) * LINE;
        if self.left < bytes {
            self.add_chunk();
        }
        let base = self.next;
        // What is left is a multiple of a line, and the rest of a chunk that is too short for a node is lost.
        self.next = base.wrapping_add(bytes);
        self.left -= bytes;
        // It lies in a chunk, which does not start at 0.
        NonNull::new(base).unwrap_or_else(|| unreachable!("a chunk at address 0"))
    }

    #[cold]
    fn add_chunk(&mut self) {
        let bytes = if self.chunks == 0 { FIRST_CHUNK } else { CHUNK };
        // SAFETY: the alignment is a power of two, and the size, a multiple of it, far from overflowing an isize.
        let layout = unsafe { Layout::from_size_align_unchecked(bytes, bytes) };
        // SAFETY: the layout is not empty.
        let chunk = unsafe { alloc::alloc(layout) };
        if chunk.is_null() {
            alloc::handle_alloc_error(layout);
        }
        #[cfg(all(target_os = "linux", not(miri)))]
        if bytes == CHUNK {
            // SAFETY: the range was just allocated, is aligned to pages, and the advice does not change what it holds. If the
            // system does not take it, the pages stay small.
            unsafe { libc::madvise(chunk.cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        (self.next, self.left) = (chunk, bytes);
        self.chunks += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Writes all over each place, so that two that overlap, or a list that leads astray, show.
    #[test]
    fn places_that_are_out_do_not_overlap() {
        std::thread::scope(|scope| {
            for thread in 0..4_usize {
                scope.spawn(move || take_and_give(thread));
            }
        });
    }

    fn take_and_give(thread: usize) {
        let mut out: BTreeMap<usize, (usize, u8)> = BTreeMap::new();
        let mut random = thread as u64 + 1;
        for turn in 0..4000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (groups, mark) = ((random >> 33) as usize % MAX_GROUPS + 1, (turn % 251) as u8);
            let base = take(groups);
            let (from, len) = (base.as_ptr().expose_provenance(), lines(groups) * LINE);
            assert_eq!(from % LINE, 0, "not aligned");
            let before = out.range(..from + len).next_back();
            assert!(
                before.is_none_or(|(at, (groups, _))| at + lines(*groups) * LINE <= from),
                "given out twice"
            );
            // SAFETY: so many bytes at `base` are ours.
            unsafe { base.as_ptr().write_bytes(mark, len) };
            out.insert(from, (groups, mark));
            if out.len() > 300 {
                let oldest = out.keys().copied().nth((random >> 40) as usize % 300);
                oldest.into_iter().for_each(|at| give_back(&mut out, at));
            }
        }
        while let Some(at) = out.keys().next().copied() {
            give_back(&mut out, at);
        }
    }

    fn give_back(out: &mut BTreeMap<usize, (usize, u8)>, at: usize) {
        let Some((groups, mark)) = out.remove(&at) else { return };
        let base = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(at)).expect("was given out");
        // SAFETY: ours until `give`, and written with marks.
        let bytes = unsafe { std::slice::from_raw_parts(base.as_ptr(), lines(groups) * LINE) };
        assert!(bytes.iter().all(|byte| *byte == mark), "somebody else wrote there");
        // SAFETY: taken with as many groups, and forgotten here.
        unsafe { give(base, groups) };
    }
}
