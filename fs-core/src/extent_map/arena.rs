//! Where the memory of nodes comes from: chunks of huge pages.
//!
//! A lookup in a large map touches a node that it has not touched for long, in every level. On ordinary pages each of these is
//! also a miss of the TLB, which a prefetch does not hide: it waits for the walk. (Measured: 1e6 extents, 25 of 80 ns.) So nodes
//! are cut from chunks that the system is asked to back with huge pages.
//!
//! Nodes have 2 to 17 lines, and what is in demand shifts: blocks that are written over at random fill all leaves at about the same time,
//! so they grow together and split together. Lists of free places by size alone would keep the most of each size that there ever
//! was at once. So free lines that follow each other are one *run*, which
//! is cut as needed: segregated fits with boundary tags (Knuth, TAOCP 1, 2.5), the tags apart, since nodes have no room for them.
//!
//! Invariants:
//! - The lines of a chunk behind its header are places that are given out and free runs, and no two free runs meet.
//! - Of each free run, the bits of its first and its last line are set in the header; no others are.
//! - A free run has its links and its length in its first line and its length in its last; it is on the list of its length, and
//!   nobody else refers to it.
//!
//! A chunk that is free as a whole goes back to the system, but for one.

use std::alloc::{self, Layout};
use std::ptr::{self, NonNull};

use parking_lot::Mutex;

use super::node::{LINE, MAX_GROUPS};

/// A huge page, and the unit in which memory is taken from the system; aligned to its size.
const CHUNK: usize = 2 << 20;
const CHUNK_LINES: usize = CHUNK / LINE;
/// Lines of a chunk's header: a bit for each line.
const HEADER_LINES: usize = CHUNK_LINES / 8 / LINE;
/// Lines of a chunk for nodes.
const USABLE_LINES: usize = CHUNK_LINES - HEADER_LINES;

/// Lists of free runs: of 1 line, of 2, and so on; the last has all that are longer than any node.
const LISTS: usize = lines(MAX_GROUPS) + 1;

/// Where a free run's last line has its length.
const FOOTER: usize = LINE - size_of::<usize>();

const _: () = assert!(size_of::<Free>() <= FOOTER);

/// Lines of a node with `groups` groups: its directory comes first.
pub(super) const fn lines(groups: usize) -> usize {
    groups + 1
}

/// The first line of a free run.
#[repr(C)]
struct Free {
    next: *mut Free,
    prev: *mut Free,
    lines: usize,
}

struct Arena {
    /// First run of each list.
    lists: [*mut Free; LISTS],
    /// Which lists are not empty.
    filled: u32,
    /// Chunks that are free as a whole.
    whole: usize,
    chunks: usize,
}

const _: () = assert!(LISTS <= u32::BITS as usize);

// SAFETY: addresses of memory that belongs to the arena alone; which thread uses it makes no difference.
unsafe impl Send for Arena {}

static ARENA: Mutex<Arena> = Mutex::new(Arena::new());

/// Memory for a directory and `groups` groups (1 to [`MAX_GROUPS`]), uninitialised, aligned to a line.
pub(super) fn take(groups: usize) -> NonNull<u8> {
    ARENA.lock().take(lines(groups))
}

/// Takes back what [`take`] gave.
///
/// # Safety
/// `base` came from `take(groups)`, is given back once, and nobody uses it any more.
pub(super) unsafe fn give(base: NonNull<u8>, groups: usize) {
    // SAFETY: as the caller promises.
    unsafe { ARENA.lock().give(base.as_ptr(), lines(groups)) }
}

/// The word of the header that has the bit of the line at `line`, and the bit.
fn tag(line: *mut u8) -> (*mut u64, u64) {
    let chunk = line.map_addr(|addr| addr & !(CHUNK - 1));
    let number = (line.addr() & (CHUNK - 1)) / LINE;
    (chunk.cast::<u64>().wrapping_add(number / 64), 1 << (number % 64))
}

/// Whether the line at `line`, behind the header of a chunk, is the first or the last of a free run.
///
/// # Safety
/// The chunk is one of the arena's.
unsafe fn is_tagged(line: *mut u8) -> bool {
    let (word, bit) = tag(line);
    // SAFETY: the header of the chunk is initialised, and only the holder of the arena touches it.
    unsafe { *word & bit != 0 }
}

impl Arena {
    const fn new() -> Arena {
        Arena { lists: [ptr::null_mut(); LISTS], filled: 0, whole: 0, chunks: 0 }
    }

    fn take(&mut self, lines: usize) -> NonNull<u8> {
        let fitting = self.filled >> (lines - 1);
        if fitting == 0 {
            self.add_chunk();
            return self.take(lines);
        }
        let run = self.lists[lines - 1 + fitting.trailing_zeros() as usize];
        // SAFETY: what is on a list is a free run of the arena, of at least as many lines as its list says. What is left of it is one
        // again: it is nobody else's, and is preceded by the place that is given out.
        unsafe {
            let all = (*run).lines;
            self.remove(run);
            if all > lines {
                self.insert(run.cast::<u8>().add(lines * LINE), all - lines);
            }
        }
        // A list holds no null pointer if its bit is set.
        NonNull::new(run.cast()).unwrap_or_else(|| unreachable!("an empty list counts as filled"))
    }

    /// # Safety
    /// `base` came from `take(lines)`, is given back once, and nobody uses it any more.
    unsafe fn give(&mut self, base: *mut u8, lines: usize) {
        let (mut start, mut all) = (base, lines);
        let number = (base.addr() & (CHUNK - 1)) / LINE;
        // SAFETY: the lines before and behind the place are looked at only if they are lines of nodes in the same chunk; a tag says that
        // a free run ends or begins there, which has its length in that line. Joined with the place it is one run.
        unsafe {
            let (before, behind) = (base.wrapping_sub(LINE), base.wrapping_add(lines * LINE));
            if number > HEADER_LINES && is_tagged(before) {
                let length = before.add(FOOTER).cast::<usize>().read();
                start = base.sub(length * LINE);
                all += length;
                self.remove(start.cast());
            }
            if number + lines < CHUNK_LINES && is_tagged(behind) {
                all += (*behind.cast::<Free>()).lines;
                self.remove(behind.cast());
            }
            self.insert(start, all);
        }
        if all == USABLE_LINES && self.whole > 1 {
            // SAFETY: the run is all of a chunk, so nobody uses anything of it.
            unsafe {
                self.remove(start.cast());
                unmap_chunk(start.sub(HEADER_LINES * LINE));
            }
            self.chunks -= 1;
        }
    }

    /// Makes a free run of `lines` lines at `start`.
    ///
    /// # Safety
    /// They are lines of a chunk of the arena, of which nobody else knows, and no free run meets them.
    unsafe fn insert(&mut self, start: *mut u8, lines: usize) {
        let list = lines.min(LISTS) - 1;
        let next = self.lists[list];
        let run = start.cast::<Free>();
        // SAFETY: the lines are ours (the caller's promise); `next` is a free run, or null.
        unsafe {
            let last = start.add((lines - 1) * LINE);
            run.write(Free { next, prev: ptr::null_mut(), lines });
            last.add(FOOTER).cast::<usize>().write(lines);
            if let Some(next) = next.as_mut() {
                next.prev = run;
            }
            for line in [start, last] {
                let (word, bit) = tag(line);
                *word |= bit;
            }
        }
        self.lists[list] = run;
        self.filled |= 1 << list;
        self.whole += usize::from(lines == USABLE_LINES);
    }

    /// Lets a free run be free no longer.
    ///
    /// # Safety
    /// It is one of the arena's.
    unsafe fn remove(&mut self, run: *mut Free) {
        // SAFETY: a free run has links and length; the links are null or other free runs.
        unsafe {
            let Free { next, prev, lines } = run.read();
            let list = lines.min(LISTS) - 1;
            match prev.as_mut() {
                Some(prev) => prev.next = next,
                None => self.lists[list] = next,
            }
            if let Some(next) = next.as_mut() {
                next.prev = prev;
            }
            for line in [run.cast::<u8>(), run.cast::<u8>().add((lines - 1) * LINE)] {
                let (word, bit) = tag(line);
                *word &= !bit;
            }
            if self.lists[list].is_null() {
                self.filled &= !(1 << list);
            }
            self.whole -= usize::from(lines == USABLE_LINES);
        }
    }

    #[cold]
    fn add_chunk(&mut self) {
        let chunk = map_chunk(self.chunks > 0);
        self.chunks += 1;
        // SAFETY: all of a new chunk but its header, in which no bit is set.
        unsafe { self.insert(chunk.add(HEADER_LINES * LINE), USABLE_LINES) }
    }
}

const LAYOUT: Layout = match Layout::from_size_align(CHUNK, CHUNK) {
    Ok(layout) => layout,
    Err(_) => panic!("a chunk's size is no power of two"),
};

/// A chunk of zeroes from the system itself: the heap would take twice as much for the alignment, and use the rest for what is small, so
/// that few chunks get huge pages (measured: 22 of 175 MiB, and 12 bytes an extent more).
///
/// With `huge`, on a huge page. Who has a few small files needs none: of the first chunk only the pages that are used are taken.
#[cfg(all(target_os = "linux", not(miri)))]
fn map_chunk(huge: bool) -> *mut u8 {
    let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping anywhere; twice the size, so that an aligned chunk lies in it. The rest is given back: nobody knows it. The
    // advice does not change what memory holds; if the system does not take it, the pages stay small.
    unsafe {
        let mapped = libc::mmap(ptr::null_mut(), 2 * CHUNK, read_write, private, -1, 0);
        if mapped == libc::MAP_FAILED {
            alloc::handle_alloc_error(LAYOUT);
        }
        let mapped = mapped.cast::<u8>();
        let before = mapped.align_offset(CHUNK);
        let chunk = mapped.add(before);
        if before > 0 {
            libc::munmap(mapped.cast(), before);
        }
        libc::munmap(chunk.add(CHUNK).cast(), CHUNK - before);
        if huge {
            libc::madvise(chunk.cast(), CHUNK, libc::MADV_HUGEPAGE);
        }
        chunk
    }
}

/// Gives a chunk back.
///
/// # Safety
/// It came from [`map_chunk`], and nobody uses it any more.
#[cfg(all(target_os = "linux", not(miri)))]
unsafe fn unmap_chunk(chunk: *mut u8) {
    // SAFETY: as the caller promises.
    unsafe { libc::munmap(chunk.cast(), CHUNK) };
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn map_chunk(_huge: bool) -> *mut u8 {
    // SAFETY: the layout is not empty.
    let chunk = unsafe { alloc::alloc_zeroed(LAYOUT) };
    if chunk.is_null() {
        alloc::handle_alloc_error(LAYOUT);
    }
    chunk
}

#[cfg(not(all(target_os = "linux", not(miri))))]
unsafe fn unmap_chunk(chunk: *mut u8) {
    // SAFETY: as for the other form.
    unsafe { alloc::dealloc(chunk, LAYOUT) };
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

    /// What `arena` has: lines in free runs, and runs; each is on the list of its length, with its tags and its footer.
    fn free_runs(arena: &Arena) -> (usize, usize) {
        let (mut lines, mut runs) = (0, 0);
        for (list, first) in arena.lists.iter().enumerate() {
            assert_eq!(arena.filled >> list & 1 == 1, !first.is_null());
            let mut run = *first;
            while !run.is_null() {
                // SAFETY: what is on a list is a free run.
                unsafe {
                    let last = run.cast::<u8>().add(((*run).lines - 1) * LINE);
                    assert_eq!((*run).lines.min(LISTS) - 1, list);
                    assert_eq!(last.add(FOOTER).cast::<usize>().read(), (*run).lines);
                    assert!(is_tagged(run.cast()) && is_tagged(last));
                    lines += (*run).lines;
                    run = (*run).next;
                }
                runs += 1;
            }
        }
        (lines, runs)
    }

    /// Nodes grow together and split together, several times over: what one size leaves serves the next.
    #[test]
    fn sizes_in_demand_may_shift() {
        let mut arena = Arena::new();
        let count = if cfg!(miri) { 40 } else { 20_000 };
        let mut random = 7_u64;
        let mut nodes: Vec<(NonNull<u8>, usize)> = (0..count).map(|_| (arena.take(9), 9)).collect();
        let mut most = nodes.len() * 9;
        for _ in 0..nodes.len() * 30 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let index = (random >> 33) as usize % nodes.len();
            let (base, lines) = nodes[index];
            // As the map does it: the new node is there before the old one goes.
            let new = if lines < 17 { vec![lines + 1] } else { vec![9, 9] };
            let mut new: Vec<_> = new.into_iter().map(|lines| (arena.take(lines), lines)).collect();
            // SAFETY: taken with as many lines, and forgotten here.
            unsafe { arena.give(base.as_ptr(), lines) };
            nodes[index] = new.remove(0);
            nodes.extend(new);
            most = most.max(
                nodes.iter().map(|(_, lines)| lines).sum::<usize>() * usize::from(index.is_multiple_of(97)),
            );
        }
        let used: usize = nodes.iter().map(|(_, lines)| lines).sum();
        let taken = arena.chunks * USABLE_LINES;
        assert_eq!(free_runs(&arena).0 + used, taken, "lines got lost");
        assert!(cfg!(miri) || taken < most.max(used) * 6 / 5, "{taken} lines for {used}, at most {most}");
        for (base, lines) in nodes {
            // SAFETY: taken with as many lines, and forgotten here.
            unsafe { arena.give(base.as_ptr(), lines) };
        }
        // One chunk is kept, in one run; it goes now.
        assert_eq!((arena.chunks, free_runs(&arena)), (1, (USABLE_LINES, 1)));
        // SAFETY: all of the chunk is free.
        unsafe { unmap_chunk(arena.lists[LISTS - 1].cast::<u8>().sub(HEADER_LINES * LINE)) };
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
