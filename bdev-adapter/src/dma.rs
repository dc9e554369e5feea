//! Buffers that a device may read and write directly.
//!
//! A [`DmaBuf`] is the only handle to its bytes: it is moved into a request, so nothing can touch the memory while
//! the device does, and it comes back with the completion, also on failure. It may be split into disjoint buffers
//! over the same allocation (one user buffer, several device requests) and joined again without a copy.
//!
//! Memory comes from the device ([`Device::dma`](crate::Device::dma)): huge pages under SPDK, registered or merely
//! aligned memory elsewhere. A source keeps the memory of freed buffers for reuse; the bytes of a new buffer are
//! initialised but of unspecified content.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::Error;

/// An allocation handed out by a [`DmaSource`].
#[derive(Debug, Clone, Copy)]
pub struct RawDma {
    /// First byte.
    pub ptr: NonNull<u8>,
    /// Length in bytes.
    pub len: usize,
    /// What the source wants to know again at release and at submission (for example a registered-buffer index); 0 if
    /// nothing. Who reads it at submission must not rely on it alone: the buffer may come from another source.
    pub token: u64,
}

/// Where DMA memory comes from.
///
/// # Safety
/// `allocate` returns memory that is valid for reads and writes of `len` initialised bytes, aligned as the
/// device's geometry asks, not aliased by anything else, until it is given to `release`.
pub unsafe trait DmaSource: Send + Sync {
    /// Allocates at least `len` bytes (`len` > 0). May be called from any thread.
    ///
    /// # Errors
    /// [`Error::NoMemory`] when the device memory is used up.
    fn allocate(&self, len: usize) -> Result<RawDma, Error>;

    /// Takes an allocation back. May be called from any thread.
    ///
    /// # Safety
    /// `raw` came from `allocate` of this source and nothing refers to it any more.
    unsafe fn release(&self, raw: RawDma);
}

struct Chunk {
    raw: RawDma,
    source: Arc<dyn DmaSource>,
}

// SAFETY: a chunk is a plain allocation; the bytes are reached only through `DmaBuf`s, whose ranges are disjoint.
unsafe impl Send for Chunk {}
// SAFETY: as above; a shared `&Chunk` gives no access to the bytes.
unsafe impl Sync for Chunk {}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: `raw` came from this source (see `DmaBuf::new`), and the last buffer over it is gone.
        unsafe { self.source.release(self.raw) }
    }
}

/// An owned, aligned buffer for direct I/O. See the module documentation.
pub struct DmaBuf {
    ptr: NonNull<u8>,
    len: usize,
    chunk: Arc<Chunk>,
}

// SAFETY: a `DmaBuf` is the only handle to its byte range, like a `Box<[u8]>`.
unsafe impl Send for DmaBuf {}
// SAFETY: a shared reference gives only shared access to the bytes.
unsafe impl Sync for DmaBuf {}

impl DmaBuf {
    /// Allocates a buffer of exactly `len` bytes; its content is unspecified.
    ///
    /// # Errors
    /// [`Error::NoMemory`] when the device memory is used up.
    pub fn new(source: &Arc<dyn DmaSource>, len: usize) -> Result<DmaBuf, Error> {
        let raw = source.allocate(len.max(1))?;
        assert!(raw.len >= len, "DMA source gave less than asked");
        Ok(DmaBuf { ptr: raw.ptr, len, chunk: Arc::new(Chunk { raw, source: Arc::clone(source) }) })
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when the buffer has no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte, for the device.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Moves the buffer out of `from` word by word. What was written word by word a moment ago and is read in wide registers
    /// has to wait until those writes have left the store buffer, which takes longer than all of this.
    ///
    /// # Safety
    /// As for `ptr::read`: `from` must be forgotten.
    #[inline(always)]
    pub(crate) unsafe fn read_by_words(from: &DmaBuf) -> DmaBuf {
        let DmaBuf { ptr, len, chunk } = from;
        // SAFETY: as the caller promises. Volatile only keeps the compiler from joining the reads.
        unsafe {
            DmaBuf {
                ptr: std::ptr::read_volatile(ptr),
                len: std::ptr::read_volatile(len),
                chunk: std::ptr::read_volatile(chunk),
            }
        }
    }

    /// The token that the source gave to the allocation this buffer lies in.
    #[inline]
    pub fn token(&self) -> u64 {
        self.chunk.raw.token
    }

    /// Whether its memory came from `source`.
    #[inline]
    pub fn is_from<S: DmaSource>(&self, source: &S) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.chunk.source), std::ptr::from_ref(source))
    }

    /// Splits the buffer: `self` keeps `[0, at)`, the returned buffer is `[at, len)`. No copy.
    ///
    /// # Panics
    /// When `at > len`.
    pub fn split_off(&mut self, at: usize) -> DmaBuf {
        assert!(at <= self.len, "split at {at} of a buffer of {} bytes", self.len);
        // SAFETY: `at <= len`, so the result is inside (or one past) the same allocation.
        let ptr = unsafe { self.ptr.add(at) };
        let tail = DmaBuf { ptr, len: self.len - at, chunk: Arc::clone(&self.chunk) };
        self.len = at;
        tail
    }

    /// Joins `tail` to the end of this buffer when it directly follows it in the same allocation; else gives it back.
    ///
    /// # Errors
    /// The tail itself, when it is not the continuation of this buffer.
    pub fn unsplit(&mut self, tail: DmaBuf) -> Result<(), DmaBuf> {
        let follows = Arc::ptr_eq(&self.chunk, &tail.chunk)
            && self.ptr.as_ptr() as usize + self.len == tail.ptr.as_ptr() as usize;
        if !follows {
            return Err(tail);
        }
        self.len += tail.len;
        Ok(())
    }
}

impl Deref for DmaBuf {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies in a live allocation of initialised bytes, and no other `DmaBuf` covers it.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for DmaBuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaBuf").field("ptr", &self.ptr).field("len", &self.len).finish()
    }
}

/// The buffers of a request, in order. One buffer needs no allocation.
#[derive(Debug, Default)]
pub enum Segments {
    /// No data (flush, write zeroes, unmap).
    #[default]
    None,
    /// One contiguous buffer.
    One(DmaBuf),
    /// A scatter list.
    Many(Vec<DmaBuf>),
}

impl Segments {
    /// The buffers as a slice.
    #[inline]
    pub fn as_slice(&self) -> &[DmaBuf] {
        match self {
            Segments::None => &[],
            Segments::One(buf) => std::slice::from_ref(buf),
            Segments::Many(bufs) => bufs,
        }
    }

    /// The buffers as a mutable slice.
    pub fn as_mut_slice(&mut self) -> &mut [DmaBuf] {
        match self {
            Segments::None => &mut [],
            Segments::One(buf) => std::slice::from_mut(buf),
            Segments::Many(bufs) => bufs,
        }
    }

    /// Total length in bytes.
    #[inline]
    pub fn len(&self) -> u64 {
        match self {
            Segments::None => 0,
            Segments::One(buf) => buf.len() as u64,
            Segments::Many(bufs) => bufs.iter().map(|b| b.len() as u64).sum(),
        }
    }

    /// True when there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Splits the buffers: `self` keeps the first `at` bytes, the rest is returned. No copy; a buffer that is cut becomes two.
    ///
    /// # Panics
    /// When there are fewer than `at` bytes.
    pub fn split_off(&mut self, at: usize) -> Segments {
        match self {
            Segments::None => {
                assert_eq!(at, 0, "split at {at} of no bytes");
                Segments::None
            }
            Segments::One(buf) => Segments::One(buf.split_off(at)),
            Segments::Many(bufs) => {
                let mut left = at;
                let whole = bufs.iter().take_while(|buf| {
                    let fits = buf.len() <= left;
                    left -= if fits { buf.len() } else { 0 };
                    fits
                });
                let whole = whole.count();
                let mut tail = bufs.split_off(whole);
                if left > 0 {
                    let cut = tail.first_mut().unwrap_or_else(|| panic!("split at {at} of too few bytes"));
                    let rest = cut.split_off(left);
                    bufs.push(std::mem::replace(cut, rest));
                }
                Segments::Many(tail)
            }
        }
    }

    /// Puts `tail` behind these buffers. What directly follows in the same allocation becomes one buffer again.
    pub fn append(&mut self, tail: Segments) {
        match (&mut *self, tail) {
            (_, Segments::None) => {}
            (Segments::None, tail) => *self = tail,
            (Segments::One(front), Segments::One(back)) => {
                if let Err(back) = front.unsplit(back)
                    && let Segments::One(front) = std::mem::take(self)
                {
                    *self = Segments::Many(vec![front, back]);
                }
            }
            (_, tail) => {
                let mut bufs = std::mem::take(self).into_vec();
                for buf in tail.into_vec() {
                    let apart = match bufs.last_mut() {
                        Some(last) => last.unsplit(buf).err(),
                        None => Some(buf),
                    };
                    bufs.extend(apart);
                }
                *self = Segments::Many(bufs);
            }
        }
    }

    /// The buffers as they were before they were cut and put together again: of these lengths, none of which is 0 if they were.
    ///
    /// # Panics
    /// When these are no buffers that were cut and put together.
    #[must_use]
    pub fn cut_to(mut self, lens: &[usize]) -> Vec<DmaBuf> {
        if self.as_slice().iter().map(|buf| buf.len()).eq(lens.iter().copied()) {
            return self.into_vec();
        }
        let cut = |len: &usize| {
            let rest = self.split_off(*len);
            let front = std::mem::replace(&mut self, rest).into_vec();
            let mut bufs = front.into_iter();
            match (bufs.next(), bufs.next()) {
                (Some(buf), None) => buf,
                _ => panic!("there is no buffer of {len} bytes"),
            }
        };
        lens.iter().map(cut).collect()
    }

    /// The buffers as a list.
    pub fn into_vec(self) -> Vec<DmaBuf> {
        match self {
            Segments::None => Vec::new(),
            Segments::One(buf) => vec![buf],
            Segments::Many(bufs) => bufs,
        }
    }

    /// The bytes in pieces of `size`, which no buffer cuts.
    pub fn chunks(&self, size: usize) -> impl Iterator<Item = &[u8]> {
        self.as_slice().iter().flat_map(move |buf| buf.chunks_exact(size))
    }

    /// Copies the bytes to `to`, as many as there are and fit.
    pub fn copy_to(&self, to: &mut [u8]) {
        let mut done = 0;
        for buf in self.as_slice() {
            let part = buf.len().min(to.len() - done);
            to[done..done + part].copy_from_slice(&buf[..part]);
            done += part;
        }
    }

    /// Copies `from` to the first of these bytes.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn copy_from(&mut self, from: &[u8]) {
        let mut done = 0;
        for buf in self.as_mut_slice() {
            let part = buf.len().min(from.len() - done);
            buf[..part].copy_from_slice(&from[done..done + part]);
            done += part;
        }
        assert_eq!(done, from.len(), "too many bytes for these buffers");
    }

    /// The single buffer of a request that was made with one.
    #[inline(always)]
    pub fn into_one(mut self) -> Option<DmaBuf> {
        self.take_one()
    }

    /// Takes out the single buffer of a request that was made with one.
    #[inline(always)]
    pub fn take_one(&mut self) -> Option<DmaBuf> {
        let Segments::One(buf) = self else { return None };
        // SAFETY: the buffer is forgotten: it is overwritten in the next step, without being dropped.
        let taken = unsafe { DmaBuf::read_by_words(buf) };
        std::mem::forget(std::mem::take(self));
        Some(taken)
    }
}

impl From<DmaBuf> for Segments {
    fn from(buf: DmaBuf) -> Segments {
        Segments::One(buf)
    }
}

impl From<Vec<DmaBuf>> for Segments {
    fn from(bufs: Vec<DmaBuf>) -> Segments {
        Segments::Many(bufs)
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::pool::{MapArenas, Pool};

    fn buffers(lens: &[usize]) -> Vec<DmaBuf> {
        let source: Arc<dyn DmaSource> = Arc::new(Pool::new(MapArenas, Default::default()));
        // Some share an allocation, so that they follow each other in memory.
        let mut whole = DmaBuf::new(&source, lens.iter().sum()).expect("memory");
        (0..).zip(whole.iter_mut()).for_each(|(n, byte): (usize, _)| *byte = n as u8);
        let mut bufs = Vec::new();
        for (index, len) in lens.iter().enumerate() {
            let rest = whole.split_off(*len);
            let buf = std::mem::replace(&mut whole, rest);
            if index % 3 == 2 {
                let mut apart = DmaBuf::new(&source, *len).expect("memory");
                apart.copy_from_slice(&buf);
                bufs.push(apart);
            } else {
                bufs.push(buf);
            }
        }
        bufs
    }

    #[test]
    fn buffers_that_were_cut_join_again() {
        let seed = std::env::var("GAUR_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(42);
        println!("GAUR_SEED={seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        for _ in 0..500 {
            let lens: Vec<usize> =
                (0..random.random_range(1..6)).map(|_| random.random_range(1..50)).collect();
            let total: usize = lens.iter().sum();
            let bufs = buffers(&lens);
            let memory: Vec<_> = bufs.iter().map(|buf| buf.as_ptr()).collect();
            let mut rest = match bufs.len() {
                1 => Segments::from(bufs.into_iter().next().expect("one")),
                _ => Segments::from(bufs),
            };
            let mut whole = Segments::None;
            let mut left = total;
            while left > 0 {
                let len = random.random_range(0..=left);
                let tail = rest.split_off(len);
                assert_eq!((rest.len(), tail.len()), (len as u64, (left - len) as u64));
                whole.append(std::mem::replace(&mut rest, tail));
                left -= len;
            }
            whole.append(rest);
            let mut bytes = vec![0; total + 1];
            whole.copy_to(&mut bytes);
            assert!((0..total).all(|n| bytes[n] == n as u8), "the bytes, in order");
            let bufs = whole.cut_to(&lens);
            assert_eq!(bufs.iter().map(|buf| buf.as_ptr()).collect::<Vec<_>>(), memory);
            assert_eq!(bufs.iter().map(|buf| buf.len()).collect::<Vec<_>>(), lens);
        }
    }

    #[test]
    fn bytes_are_copied_across_buffers() {
        let mut bufs = Segments::from(buffers(&[3, 4, 5]));
        bufs.copy_from(&[9; 8]);
        let mut bytes = [0; 12];
        bufs.copy_to(&mut bytes);
        assert_eq!(bytes, [9, 9, 9, 9, 9, 9, 9, 9, 8, 9, 10, 11]);
        let bufs = Segments::from(buffers(&[4, 8]));
        assert_eq!(bufs.chunks(4).map(|chunk| chunk[0]).collect::<Vec<_>>(), [0, 4, 8]);
    }
}
