//! The content of a device at one moment, as a value: cheap to copy and to change, sparse.
//!
//! Used by tests and tools: snapshots of memory devices, crash states built by the recorder. It is no device; make one
//! with [`MemDevice::from_image`](crate::mem::MemDevice::from_image).

use std::fmt;
use std::sync::Arc;

use hashbrown::HashMap;

use crate::IoErrorKind;

/// Bytes that are shared or copied together.
pub(crate) const CHUNK: usize = 4096;

type Chunk = [u8; CHUNK];

/// The content of a device. Clones share what neither has changed since.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    capacity: u64,
    block_size: u32,
    /// By number; what is missing is zero.
    chunks: HashMap<u64, Arc<Chunk>>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Image { capacity, block_size, chunks } = self;
        write!(f, "Image({capacity} bytes in blocks of {block_size}, {} chunks of {CHUNK})", chunks.len())
    }
}

impl Image {
    /// A device of `capacity` zero bytes in blocks of `block_size`.
    pub fn new(capacity: u64, block_size: u32) -> Image {
        Image { capacity, block_size, chunks: HashMap::new() }
    }

    /// Capacity in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Fills `into` with the bytes at `offset`.
    ///
    /// # Errors
    /// [`IoErrorKind::OutOfRange`].
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), IoErrorKind> {
        self.check(offset, into.len() as u64)?;
        for (piece, at) in pieces(offset, into.len()) {
            let into = &mut into[at..at + piece.len];
            match self.chunks.get(&piece.chunk) {
                Some(chunk) => into.copy_from_slice(&chunk[piece.start..piece.start + piece.len]),
                None => into.fill(0),
            }
        }
        Ok(())
    }

    /// Replaces the bytes at `offset`.
    ///
    /// # Errors
    /// [`IoErrorKind::OutOfRange`].
    pub fn write(&mut self, offset: u64, from: &[u8]) -> Result<(), IoErrorKind> {
        self.check(offset, from.len() as u64)?;
        for (piece, at) in pieces(offset, from.len()) {
            self.piece_mut(&piece).copy_from_slice(&from[at..at + piece.len]);
        }
        Ok(())
    }

    /// Zeroes `len` bytes at `offset`.
    ///
    /// # Errors
    /// [`IoErrorKind::OutOfRange`].
    pub fn zero(&mut self, offset: u64, len: u64) -> Result<(), IoErrorKind> {
        self.check(offset, len)?;
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(CHUNK as u64), end - end % CHUNK as u64);
        if first >= last {
            return self.write(offset, &vec![0; len as usize]);
        }
        let inside = first / CHUNK as u64..last / CHUNK as u64;
        if inside.end - inside.start > self.chunks.len() as u64 {
            self.chunks.retain(|chunk, _| !inside.contains(chunk));
        } else {
            for chunk in inside {
                self.chunks.remove(&chunk);
            }
        }
        self.write(offset, &vec![0; (first - offset) as usize])?;
        self.write(last, &vec![0; (end - last) as usize])
    }

    /// The pieces that are not known to be zero: byte address and bytes. In no order.
    pub fn chunks(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.chunks.iter().map(|(number, chunk)| {
            let offset = number * CHUNK as u64;
            let len = (self.capacity - offset).min(CHUNK as u64) as usize;
            (offset, &chunk[..len])
        })
    }

    fn piece_mut(&mut self, piece: &Piece) -> &mut [u8] {
        let chunk = self.chunks.entry(piece.chunk).or_insert_with(|| Arc::new([0; CHUNK]));
        &mut Arc::make_mut(chunk)[piece.start..piece.start + piece.len]
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), IoErrorKind> {
        match offset.checked_add(len) {
            Some(end) if end <= self.capacity => Ok(()),
            _ => Err(IoErrorKind::OutOfRange),
        }
    }
}

/// The part of a range that lies in one chunk.
struct Piece {
    chunk: u64,
    start: usize,
    len: usize,
}

/// The pieces of a range, each with its place in the range.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (Piece, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        let here = offset + at as u64;
        let start = (here % CHUNK as u64) as usize;
        let piece = Piece { chunk: here / CHUNK as u64, start, len: (CHUNK - start).min(len - at) };
        at += piece.len;
        let start = at - piece.len;
        Some((piece, start))
    })
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn behaves_like_bytes_and_clones_are_independent() {
        const SIZE: usize = 64 << 10;
        let mut rng = SmallRng::seed_from_u64(crate::test_util::seed());
        let mut image = Image::new(SIZE as u64, 512);
        let mut model = vec![0u8; SIZE];
        let mut old = None;
        for round in 0..500 {
            let offset = rng.random_range(0..SIZE);
            let len = rng.random_range(0..=(SIZE - offset).min(20_000));
            if rng.random_bool(0.3) {
                image.zero(offset as u64, len as u64).unwrap();
                model[offset..offset + len].fill(0);
            } else {
                let bytes = vec![rng.random::<u8>(); len];
                image.write(offset as u64, &bytes).unwrap();
                model[offset..offset + len].copy_from_slice(&bytes);
            }
            if round == 250 {
                old = Some((image.clone(), model.clone()));
            }
        }
        let content = |image: &Image| {
            let mut bytes = vec![1; SIZE];
            image.read(0, &mut bytes).unwrap();
            bytes
        };
        assert_eq!(content(&image), model);
        let (old_image, old_model) = old.unwrap();
        assert_eq!(content(&old_image), old_model);
    }

    #[test]
    fn ends_are_checked() {
        let mut image = Image::new(8192, 4096);
        assert_eq!(image.write(8192, &[1]), Err(IoErrorKind::OutOfRange));
        assert_eq!(image.read(u64::MAX, &mut [0; 2]), Err(IoErrorKind::OutOfRange));
        assert_eq!(image.zero(1, 8192), Err(IoErrorKind::OutOfRange));
        assert_eq!(image.zero(0, 8192), Ok(()));
    }
}
