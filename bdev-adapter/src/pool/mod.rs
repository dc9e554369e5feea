//! A pool of DMA memory: power-of-two blocks cut from 2 MiB arenas.
//!
//! [`Pool`] is the [`DmaSource`] of every backend; what differs is only where a big piece of memory comes from, and
//! that is an [`ArenaSource`]: anonymous memory ([`MapArenas`]) or SPDK's huge pages.
//!
//! How an allocation is served:
//! 1. up to 64 KiB: the magazine of the calling thread's shard (`Shard`), a short list under a lock that other
//!    threads rarely want;
//! 2. an empty magazine is refilled, and a full one emptied, by half from the arenas (`Central`);
//! 3. up to 1 MiB: a free block of an arena that serves this size class, or of a fresh arena;
//! 4. larger: an arena of its own, rounded up to 2 MiB.
//!
//! Invariants:
//! - an arena serves one size class at a time; when its last block comes back it is idle and may serve any class;
//! - idle memory beyond [`PoolOptions::keep_idle`] goes back to the arena source at once;
//! - the arenas never sum up to more than [`PoolOptions::limit`]; before an allocation fails for it, the magazines
//!   are emptied and idle arenas given back.
//!
//! Deliberately absent: moving or splitting blocks between classes (an arena that holds one 4 KiB block stays a 4 KiB
//! arena), and any zeroing: a recycled block has the bytes of its last user.

mod central;
mod map;

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

pub use map::MapArenas;

use crate::{DmaSource, Error, RawDma};
use central::{Block, Central, class_len, class_of};

/// Size and alignment in bytes of an arena that is cut into blocks; larger ones are a multiple of it.
pub const ARENA_LEN: usize = 2 << 20;
/// Smallest block in bytes; every block is aligned to it (blocks up to an arena are aligned to their own size when
/// the arena source aligns arenas to [`ARENA_LEN`]).
pub const MIN_BLOCK: usize = 4096;
/// Largest block in bytes that is cut from an arena.
pub const MAX_BLOCK: usize = 1 << 20;

/// Classes 4 KiB to 64 KiB go through the magazines.
const MAGAZINE_CLASSES: usize = 5;
/// Bytes that the magazine of one class holds at most.
const MAGAZINE_BYTES: usize = 256 << 10;

/// A big piece of memory.
#[derive(Debug, Clone, Copy)]
pub struct Arena {
    /// First byte, aligned to [`MIN_BLOCK`] at least, to [`ARENA_LEN`] if possible.
    pub ptr: NonNull<u8>,
    /// Length in bytes.
    pub len: usize,
}

/// Where a [`Pool`] gets its arenas from.
///
/// Both functions are called with a lock of the pool held, from any thread: they must not call the pool.
///
/// # Safety
/// `obtain` returns memory that is valid for reads and writes of `len` **initialised** bytes, aligned to
/// [`MIN_BLOCK`], not aliased by anything else, until it is given to `give_back`.
pub unsafe trait ArenaSource: Send + Sync {
    /// Obtains exactly `len` bytes, a multiple of [`ARENA_LEN`].
    ///
    /// # Errors
    /// [`Error::NoMemory`] with what would help.
    fn obtain(&self, len: usize) -> Result<Arena, Error>;

    /// Takes an arena back.
    ///
    /// # Safety
    /// `arena` came from `obtain` of this source and nothing refers to it any more.
    unsafe fn give_back(&self, arena: Arena);
}

/// How much memory a pool may hold.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Bytes of arenas at most; allocations beyond fail with [`Error::NoMemory`].
    pub limit: usize,
    /// Bytes of unused arenas that are kept for reuse.
    pub keep_idle: usize,
}

impl Default for PoolOptions {
    /// Half of the physical memory as the limit, 64 MiB kept idle.
    fn default() -> PoolOptions {
        PoolOptions { limit: half_of_memory(), keep_idle: 64 << 20 }
    }
}

/// What a pool holds at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolStats {
    /// Bytes obtained from the arena source.
    pub arena_bytes: usize,
    /// Bytes of them in arenas without any allocation.
    pub idle_bytes: usize,
    /// Allocations that were not released yet.
    pub allocations: usize,
}

/// The token of a [`Pool`] allocation: names the arena that it lies in, unique in the process for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ArenaToken(u64);

impl ArenaToken {
    const SLOT_BITS: u32 = 20;
    const LARGE: u64 = 1 << 63;

    fn new(slot: usize, id: u64, large: bool) -> ArenaToken {
        debug_assert!(slot < 1 << Self::SLOT_BITS);
        ArenaToken(slot as u64 | id << Self::SLOT_BITS | if large { Self::LARGE } else { 0 })
    }

    /// The token as found in [`RawDma::token`] or [`DmaBuf::token`](crate::DmaBuf::token). One that no pool made
    /// (from another kind of source) is harmless: [`Pool::arena`] does not know it.
    pub fn from_raw(token: u64) -> ArenaToken {
        ArenaToken(token)
    }

    /// Small index of the arena in its pool; reused by another arena after this one went back to its source.
    pub fn slot(self) -> usize {
        (self.0 & ((1 << Self::SLOT_BITS) - 1)) as usize
    }

    /// True for an arena that was made for a single allocation beyond [`MAX_BLOCK`].
    pub fn is_large(self) -> bool {
        self.0 & Self::LARGE != 0
    }
}

/// A pool of DMA memory. See the module documentation. All functions may be called from any thread.
pub struct Pool<A: ArenaSource> {
    source: A,
    options: PoolOptions,
    shards: Box<[Shard]>,
    central: Mutex<Central>,
    /// Arenas given back to the source so far; whoever registered arenas somewhere watches it.
    retired: AtomicU64,
}

/// The magazines of the threads that hash to one shard; padded so that two shards share no cache line.
#[repr(align(128))]
struct Shard(Mutex<[Vec<Block>; MAGAZINE_CLASSES]>);

impl<A: ArenaSource> fmt::Debug for Pool<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("stats", &self.stats())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl<A: ArenaSource> Pool<A> {
    /// A pool without memory yet; arenas are obtained as they are needed.
    pub fn new(source: A, options: PoolOptions) -> Pool<A> {
        let shards = std::thread::available_parallelism().map_or(4, |n| n.get()).clamp(1, 32);
        Pool {
            source,
            options,
            shards: (0..shards).map(|_| Shard(Mutex::new(Default::default()))).collect(),
            central: Mutex::new(Central::default()),
            retired: AtomicU64::new(0),
        }
    }

    /// The arena that `token` names, unless it was given back or belongs to another source.
    pub fn arena(&self, token: ArenaToken) -> Option<Arena> {
        self.central.lock().slot(token).map(|slot| slot.arena)
    }

    /// How many arenas were given back to the source so far. When it changed, registrations of arenas that
    /// [`arena`](Self::arena) does not know any more can be dropped.
    #[inline]
    pub fn retired(&self) -> u64 {
        // Relaxed: a hint that memory can be unpinned; nothing is decided by it.
        self.retired.load(Ordering::Relaxed)
    }

    /// What the pool holds.
    pub fn stats(&self) -> PoolStats {
        let waiting: usize = self.shards.iter().map(|s| s.0.lock().iter().map(Vec::len).sum::<usize>()).sum();
        let central = self.central.lock();
        PoolStats {
            arena_bytes: central.bytes,
            idle_bytes: central.idle_bytes,
            allocations: central.blocks_out.saturating_sub(waiting),
        }
    }

    /// Gives everything that is not in use back to the arena source.
    pub fn trim(&self) {
        self.empty_magazines();
        self.shrink_idle(&mut self.central.lock(), 0);
    }

    fn allocate_cached(&self, class: usize) -> Result<RawDma, Error> {
        let mut magazines = self.shards[shard_of_thread(self.shards.len())].0.lock();
        if magazines[class].is_empty() {
            self.refill(&mut magazines[class], class)?;
        }
        let block = magazines[class].pop().ok_or_else(|| self.exhausted(class_len(class)))?;
        Ok(RawDma { ptr: block.ptr, len: class_len(class), token: block.token.0 })
    }

    /// Fills half a magazine; fails only when there is not even one block.
    #[cold]
    fn refill(&self, magazine: &mut Vec<Block>, class: usize) -> Result<(), Error> {
        magazine.reserve_exact(magazine_len(class));
        let mut central = self.central.lock();
        for _ in 0..magazine_len(class) / 2 {
            match self.take_block(&mut central, class) {
                Ok(block) => magazine.push(block),
                Err(error) if magazine.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(())
    }

    fn allocate_block(&self, class: usize) -> Result<RawDma, Error> {
        let block = self.take_block(&mut self.central.lock(), class)?;
        Ok(RawDma { ptr: block.ptr, len: class_len(class), token: block.token.0 })
    }

    fn take_block(&self, central: &mut Central, class: usize) -> Result<Block, Error> {
        if let Some(block) = central.take(class) {
            return Ok(block);
        }
        let slot = match central.idle.pop() {
            Some(slot) => {
                central.idle_bytes -= ARENA_LEN;
                slot
            }
            None => self.add_arena(central, ARENA_LEN, false)?,
        };
        central.dedicate(slot, class);
        central.take(class).ok_or_else(|| self.exhausted(class_len(class)))
    }

    fn allocate_large(&self, len: usize) -> Result<RawDma, Error> {
        let len = len.checked_next_multiple_of(ARENA_LEN).ok_or_else(|| self.exhausted(len))?;
        let mut central = self.central.lock();
        let slot = match central.take_idle_large(len) {
            Some(slot) => slot,
            None => self.add_arena(&mut central, len, true)?,
        };
        central.blocks_out += 1;
        // `slot` was returned by the central list under this lock: it is occupied.
        let slot = central.slots[slot].as_ref().ok_or_else(|| self.exhausted(len))?;
        Ok(RawDma { ptr: slot.arena.ptr, len, token: slot.token.0 })
    }

    fn add_arena(&self, central: &mut Central, len: usize, large: bool) -> Result<usize, Error> {
        if central.bytes.saturating_add(len) > self.options.limit {
            let excess = central.bytes.saturating_add(len) - self.options.limit;
            let keep = central.idle_bytes.saturating_sub(excess);
            self.shrink_idle(central, keep);
        }
        if central.bytes.saturating_add(len) > self.options.limit || central.is_full() {
            return Err(self.exhausted(len));
        }
        let arena = self.source.obtain(len)?;
        debug_assert_eq!(arena.len, len);
        debug_assert!((arena.ptr.as_ptr() as usize).is_multiple_of(MIN_BLOCK));
        Ok(central.insert(arena, large))
    }

    /// Gives idle arenas back until at most `keep` bytes are idle.
    fn shrink_idle(&self, central: &mut Central, keep: usize) {
        while central.idle_bytes > keep {
            let Some(arena) = central.remove_idle() else { return };
            self.retired.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the arena was idle: none of its blocks is allocated or in a magazine, and it has left the table.
            unsafe { self.source.give_back(arena) }
        }
    }

    /// Gives the blocks of all magazines back to their arenas. Must be called without a shard lock.
    fn empty_magazines(&self) {
        for shard in &self.shards {
            let mut magazines = shard.0.lock();
            let mut central = self.central.lock();
            for block in magazines.iter_mut().flat_map(|magazine| magazine.drain(..)) {
                central.put(block);
            }
        }
    }

    #[cold]
    fn release_half(&self, magazine: &mut Vec<Block>) {
        let keep = magazine.len() / 2;
        let mut central = self.central.lock();
        for block in magazine.drain(keep..) {
            central.put(block);
        }
        self.shrink_idle(&mut central, self.options.keep_idle);
    }

    #[cold]
    fn exhausted(&self, len: usize) -> Error {
        Error::NoMemory {
            len,
            why: format!(
                "the pool of the device may hold {} MiB; keep fewer buffers, or open it with a higher limit",
                self.options.limit >> 20
            ),
        }
    }
}

// SAFETY: blocks are disjoint pieces of arenas, which are valid initialised memory aligned to 4 KiB by the contract of
// `ArenaSource`; a block is marked as taken from `allocate` to `release` (or waits in one magazine), so it is handed out
// to one owner at a time, and its arena is given back only when no block of it is out.
unsafe impl<A: ArenaSource> DmaSource for Pool<A> {
    fn allocate(&self, len: usize) -> Result<RawDma, Error> {
        let attempt = || match class_of(len) {
            Some(class) if class < MAGAZINE_CLASSES => self.allocate_cached(class),
            Some(class) => self.allocate_block(class),
            None => self.allocate_large(len),
        };
        attempt().or_else(|_| {
            // Magazines of other threads and arenas of other classes may hold what is missing.
            self.trim();
            attempt()
        })
    }

    unsafe fn release(&self, raw: RawDma) {
        let block = Block { ptr: raw.ptr, token: ArenaToken(raw.token) };
        match class_of(raw.len) {
            Some(class) if class < MAGAZINE_CLASSES => {
                let mut magazines = self.shards[shard_of_thread(self.shards.len())].0.lock();
                let magazine = &mut magazines[class];
                if magazine.len() >= magazine_len(class) {
                    self.release_half(magazine);
                }
                magazine.push(block);
            }
            _ => {
                let mut central = self.central.lock();
                central.put(block);
                self.shrink_idle(&mut central, self.options.keep_idle);
            }
        }
    }
}

impl<A: ArenaSource> Drop for Pool<A> {
    fn drop(&mut self) {
        // Every buffer holds the pool through an `Arc`, so none is out.
        self.trim();
        debug_assert_eq!(self.central.get_mut().bytes, 0, "a pool was dropped before its buffers");
    }
}

const fn magazine_len(class: usize) -> usize {
    MAGAZINE_BYTES / class_len(class)
}

/// Threads are spread over the shards in the order in which they first allocate.
fn shard_of_thread(shards: usize) -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static THREAD: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    // A buffer may be dropped by the destructor of another thread-local, when this one is gone already.
    THREAD.try_with(|number| number % shards).unwrap_or(0)
}

fn half_of_memory() -> usize {
    // SAFETY: `sysconf` only reads its argument.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    match (usize::try_from(pages), usize::try_from(page)) {
        (Ok(pages), Ok(page)) => (pages.saturating_mul(page) / 2).max(64 << 20),
        _ => 1 << 30,
    }
}

#[cfg(test)]
mod tests;
