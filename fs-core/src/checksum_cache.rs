//! Checksums of data blocks, by device address: those that an extent of several blocks cannot carry in the extent map.
//!
//! One cache a mount, bounded. It is asked on the completion path of each verified read, so a lookup takes no lock and writes
//! nothing shared (but a clock bit, the first time since the hand came by).
//!
//! # How it works
//!
//! 1. Checksums are kept in *chunks* of 64 blocks (256 KiB of data): 64 words, and a bit for each that is present.
//! 2. The cache is set-associative. Chunks of 32 consecutive numbers (8 MiB of data, a *region*) belong to one *segment* of
//!    32 buckets, one bucket each; regions are dealt to the segments round robin. A bucket holds [`WAYS`] chunks, their
//!    tags and presence bits side by side in two cache lines. So memory follows the part of the device that is in use, and a
//!    lookup reads three lines, two of which [`ChecksumCache::prefetch`] can ask for in advance.
//! 3. A segment is allocated when the first checksum comes to it, and stays. The number of segments is the bound.
//! 4. In a full bucket a clock hand picks the chunk to give up. A new chunk starts without its clock bit: what is read once
//!    and never again goes first.
//! 5. Each bucket is a sequence lock: a writer makes its version odd, changes it, and makes it even again. A reader that
//!    saw an odd version or a changed one tries again a few times, then calls it a miss: it never waits.
//!
//! # Invariants
//!
//! - What a lookup returns was stored for that very address by [`ChecksumCache::insert`] or [`ChecksumCache::fill`], and not
//!   removed or replaced before the lookup began.
//! - A miss says nothing: any checksum may be missing at any time, and the metadata tree knows. The cache is never
//!   the only holder of a checksum that is not on its way into the tree.
//! - A block's checksum changes only with the block's reuse, so: who allocates blocks again inserts their new checksums (or
//!   removes the old ones) before their mapping is published, and who [fills](ChecksumCache::fill) from the tree holds the
//!   blocks against reuse meanwhile. `fill` never replaces what is there.
//!
//! # What it does not do
//!
//! It does not compute or compare checksums, read the tree, or know files. All is safe code on atomics; the sequence lock
//! follows Boehm, "Can seqlocks get along with programming language memory models?" (MSPC 2012).

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

use crossbeam_utils::Backoff;

use crate::extent_map::prefetch_read;
use crate::mutation::{Mutation, broken};
use crate::types::BlockAddr;

/// Blocks of a chunk.
const CHUNK: usize = 64;
/// Buckets of a segment.
const BUCKETS: usize = 32;
/// Chunks of a bucket.
const WAYS: usize = 7;
/// How often a reader looks again at a bucket that is being written.
const RETRIES: usize = 8;

/// One chunk of each of several regions. Fields in the order of use; the first two lines are all that a search needs.
#[repr(C, align(128))]
#[derive(Default)]
struct Bucket {
    /// Odd while a writer is at work.
    version: AtomicU64,
    /// Chunk number + 1, or 0 for none.
    tags: [AtomicU64; WAYS],
    /// Which blocks of each chunk are present.
    present: [AtomicU64; WAYS],
    /// Bit `w`: way `w` was used since the hand came by. Bits 32 and up: the hand.
    clock: AtomicU64,
    sums: [Sums; WAYS],
}

/// The checksums of a chunk.
#[repr(C, align(64))]
struct Sums([AtomicU32; CHUNK]);

impl Default for Sums {
    fn default() -> Sums {
        Sums(std::array::from_fn(|_| AtomicU32::new(0)))
    }
}

const _: () = assert!(size_of::<Bucket>() == 128 + WAYS * 4 * CHUNK);

/// Bytes of a segment.
const SEGMENT_BYTES: usize = BUCKETS * size_of::<Bucket>();

type Segment = Box<[Bucket]>;

/// The checksum cache of a mount. See the [module](self).
pub struct ChecksumCache {
    segments: Box<[OnceLock<Segment>]>,
    allocated: AtomicUsize,
}

/// Part of a run of blocks that lies in one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    chunk: u64,
    /// First block inside the chunk.
    first: usize,
    /// Blocks.
    len: usize,
    /// Blocks of the run before this part.
    done: usize,
}

impl Part {
    /// The presence bits of the part.
    fn mask(self) -> u64 {
        (u64::MAX >> (CHUNK - self.len)) << self.first
    }
}

/// `len` blocks from `addr`, chunk by chunk.
fn parts(addr: BlockAddr, len: usize) -> impl Iterator<Item = Part> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = addr.0.checked_add(done as u64)?;
        let first = (at % CHUNK as u64) as usize;
        let part = Part { chunk: at / CHUNK as u64, first, len: (len - done).min(CHUNK - first), done };
        done += part.len;
        (part.len > 0).then_some(part)
    })
}

impl ChecksumCache {
    /// A cache of at most some `bytes`, at least 60 KiB. A checksum takes 4.3 bytes where all blocks of a chunk are cached;
    /// memory is taken as it is used.
    pub fn new(bytes: usize) -> ChecksumCache {
        // An odd number: strides of powers of two spread over all segments.
        let count = (bytes / SEGMENT_BYTES).saturating_sub(1) | 1;
        ChecksumCache {
            segments: (0..count).map(|_| OnceLock::new()).collect(),
            allocated: AtomicUsize::new(0),
        }
    }

    /// The checksum of block `addr`, if it is cached.
    #[inline]
    pub fn lookup(&self, addr: BlockAddr) -> Option<u32> {
        let mut sum = [0];
        self.lookup_into(addr, &mut sum).then_some(sum[0])
    }

    /// The checksums of `sums.len()` blocks from `addr`. Returns whether all of them are cached; if not, `sums` is left in an
    /// arbitrary state. Takes no lock; some 10 ns when hot.
    #[inline]
    pub fn lookup_into(&self, addr: BlockAddr, sums: &mut [u32]) -> bool {
        parts(addr, sums.len()).all(|part| {
            self.bucket(part.chunk).is_some_and(|bucket| {
                let mask = part.mask();
                bucket.read(part.chunk, part.first, &mut sums[part.done..part.done + part.len]) & mask == mask
            })
        })
    }

    /// Which of the blocks from `addr` to the end of its chunk (the next multiple of 64) are cached: bit `i` for `addr + i`.
    pub fn present(&self, addr: BlockAddr) -> u64 {
        let (chunk, first) = (addr.0 / CHUNK as u64, (addr.0 % CHUNK as u64) as usize);
        self.bucket(chunk).map_or(0, |bucket| bucket.read(chunk, first, &mut []) >> first)
    }

    /// Asks the processor for what a lookup of `addr` will read first.
    #[inline]
    pub fn prefetch(&self, addr: BlockAddr) {
        if let Some(bucket) = self.bucket(addr.0 / CHUNK as u64) {
            prefetch_read(&bucket.version);
            prefetch_read(&bucket.present[WAYS - 1]);
        }
    }

    /// The second step after [`ChecksumCache::prefetch`], once that has arrived: asks for the checksum itself.
    #[inline]
    pub fn prefetch_sum(&self, addr: BlockAddr) {
        let (chunk, block) = (addr.0 / CHUNK as u64, (addr.0 % CHUNK as u64) as usize);
        if let Some((bucket, way)) =
            self.bucket(chunk).and_then(|bucket| Some((bucket, bucket.way_of(chunk)?)))
        {
            prefetch_read(&bucket.sums[way].0[block]);
        }
    }

    /// Stores the checksums of freshly written blocks from `addr` on, in place of what was there.
    pub fn insert(&self, addr: BlockAddr, sums: &[u32]) {
        self.store(addr, sums, true);
    }

    /// Stores checksums of blocks from `addr` on that were read in the metadata tree, where none is present. The caller holds
    /// the blocks against reuse.
    pub fn fill(&self, addr: BlockAddr, sums: &[u32]) {
        self.store(addr, sums, broken(Mutation::FillOverwrites));
    }

    /// Forgets the checksums of `len` blocks from `addr` on.
    pub fn remove(&self, addr: BlockAddr, len: usize) {
        for part in parts(addr, len) {
            if let Some(bucket) = self.bucket(part.chunk) {
                bucket.write(|bucket| {
                    if let Some(way) = bucket.way_of(part.chunk) {
                        let left = bucket.present[way].load(Ordering::Relaxed) & !part.mask();
                        bucket.present[way].store(left, Ordering::Relaxed);
                        if left == 0 {
                            bucket.tags[way].store(0, Ordering::Relaxed);
                        }
                    }
                });
            }
        }
    }

    /// Resident bytes.
    pub fn memory_bytes(&self) -> u64 {
        let directory = size_of_val(&*self.segments) + size_of::<ChecksumCache>();
        (directory + self.allocated.load(Ordering::Relaxed) * SEGMENT_BYTES) as u64
    }

    /// Checksums that it can hold.
    pub fn capacity(&self) -> u64 {
        (self.segments.len() * BUCKETS * WAYS * CHUNK) as u64
    }

    fn store(&self, addr: BlockAddr, sums: &[u32], replace: bool) {
        for part in parts(addr, sums.len()) {
            let segment = self.segment_of(part.chunk).get_or_init(|| {
                self.allocated.fetch_add(1, Ordering::Relaxed);
                (0..BUCKETS).map(|_| Bucket::default()).collect()
            });
            let bucket = &segment[part.chunk as usize % BUCKETS];
            bucket.write(|bucket| {
                bucket.put(part, &sums[part.done..part.done + part.len], replace);
            });
        }
    }

    #[inline(always)]
    fn segment_of(&self, chunk: u64) -> &OnceLock<Segment> {
        let region = chunk / BUCKETS as u64;
        &self.segments[(region % self.segments.len() as u64) as usize]
    }

    #[inline(always)]
    fn bucket(&self, chunk: u64) -> Option<&Bucket> {
        self.segment_of(chunk).get().map(|segment| &segment[chunk as usize % BUCKETS])
    }
}

impl fmt::Debug for ChecksumCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChecksumCache")
            .field("capacity", &self.capacity())
            .field("memory_bytes", &self.memory_bytes())
            .finish()
    }
}

impl Bucket {
    #[inline(always)]
    fn way_of(&self, chunk: u64) -> Option<usize> {
        // Without a branch for each way: at most one matches, unless a writer is at work, and then the result is thrown away.
        let ways = self.tags.iter().enumerate().fold(0_u32, |ways, (way, tag)| {
            ways | u32::from(tag.load(Ordering::Relaxed) == chunk + 1) << way
        });
        (ways != 0).then(|| ways.trailing_zeros() as usize)
    }

    /// Reads the checksums of `chunk` from block `first` of it on into `sums`. Returns the presence bits of the whole chunk: 0 if
    /// it is not here or its bucket is being written all the time.
    #[inline(always)]
    fn read(&self, chunk: u64, first: usize, sums: &mut [u32]) -> u64 {
        for _ in 0..RETRIES {
            // Acquire: pairs with the release store that ends `write`; what follows sees at least what that writer wrote.
            let version = self.version.load(Ordering::Acquire);
            if !version.is_multiple_of(2) {
                std::hint::spin_loop();
                continue;
            }
            let way = self.way_of(chunk);
            let mut present = 0;
            #[cfg(test)]
            tests::between_search_and_copy();
            if let Some(way) = way {
                present = self.present[way].load(Ordering::Relaxed);
                for (to, from) in sums.iter_mut().zip(&self.sums[way].0[first..]) {
                    *to = from.load(Ordering::Relaxed);
                }
            }
            // Pairs with the release fence in `write`: whoever read one of a writer's stores above also sees its odd version, or
            // a later one, here.
            fence(Ordering::Acquire);
            if self.version.load(Ordering::Relaxed) == version || broken(Mutation::SumsUnversioned) {
                if let Some(way) = way {
                    self.mark_used(way);
                }
                return present;
            }
        }
        0
    }

    /// Notes a use for the clock. Writes only if it is the first since the hand came by.
    #[inline(always)]
    fn mark_used(&self, way: usize) {
        if self.clock.load(Ordering::Relaxed) & (1 << way) == 0 {
            self.clock.fetch_or(1 << way, Ordering::Relaxed);
        }
    }

    /// Runs `change` as the bucket's only writer.
    fn write(&self, change: impl FnOnce(&Bucket)) {
        let backoff = Backoff::new();
        let version = loop {
            let version = self.version.load(Ordering::Relaxed);
            // Acquire: pairs with the release store of the writer before.
            let claim = |even| {
                let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
                self.version.compare_exchange_weak(even, even + 1, success, failure)
            };
            if version.is_multiple_of(2) && claim(version).is_ok() {
                break version;
            }
            backoff.snooze();
        };
        // Pairs with the acquire fence in `read`: the odd version comes before the changes.
        fence(Ordering::Release);
        change(self);
        // Release: pairs with the acquire loads of readers and of the next writer.
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// Stores `sums` for `part`, in the place of a victim if its chunk is not here. Only for the bucket's writer.
    fn put(&self, part: Part, sums: &[u32], replace: bool) {
        let way = self.way_of(part.chunk).unwrap_or_else(|| {
            let way = self.victim();
            self.present[way].store(0, Ordering::Relaxed);
            self.tags[way].store(part.chunk + 1, Ordering::Relaxed);
            way
        });
        let present = self.present[way].load(Ordering::Relaxed);
        for (index, sum) in sums.iter().enumerate() {
            let block = part.first + index;
            if replace || present & (1 << block) == 0 {
                self.sums[way].0[block].store(*sum, Ordering::Relaxed);
            }
        }
        self.present[way].store(present | part.mask(), Ordering::Relaxed);
    }

    /// A way that is free, or was not used for the longest time, as far as the clock can tell.
    fn victim(&self) -> usize {
        if let Some(free) = self.tags.iter().position(|tag| tag.load(Ordering::Relaxed) == 0) {
            return free;
        }
        let clock = self.clock.load(Ordering::Relaxed);
        let mut hand = (clock >> 32) as usize % WAYS;
        let mut used = clock & ((1 << WAYS) - 1);
        while used & (1 << hand) != 0 {
            used &= !(1 << hand);
            hand = (hand + 1) % WAYS;
        }
        // A reader that marks a use in between is forgotten: no more than a worse choice later.
        self.clock.store((((hand + 1) % WAYS) as u64) << 32 | used, Ordering::Relaxed);
        hand
    }
}

#[cfg(test)]
mod tests;
