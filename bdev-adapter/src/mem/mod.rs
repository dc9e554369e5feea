//! Memory as a device: for tests, for the bench, and as the fastest thing to measure the layers above with.
//!
//! - Sparse: `mem:8TiB` takes the memory of what was written.
//! - The content lives as long as the device (any `Arc` of it): it can be mounted, unmounted and mounted again.
//! - A request is carried out, with a real copy, by the thread that rings the doorbell, and is answered at the next
//!   poll, never inside `submit`.
//! - Completed writes are as durable as they will ever be: no volatile cache, FUA costs nothing, flush only checks its
//!   epoch.
//!
//! Deliberately absent: latency, faults, crashes; those are wrappers ([`wrap`](crate::wrap)). The buffer alignment it
//! asks for is stricter than memory needs, so that tests on memory catch what a disk would refuse.

mod region;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::image::{CHUNK, Image};
use crate::pool::{MapArenas, Pool, PoolOptions};
use crate::{
    ClaimFlag, Completion, Device, DmaSource, Error, Geometry, IoErrorKind, Kind, MAX_REQUEST, QueuePair,
    Request,
};
use region::Region;

/// A device in memory. All functions may be called from any thread.
pub struct MemDevice {
    name: String,
    geometry: Geometry,
    read_only: bool,
    region: Region,
    dma: Arc<Pool<MapArenas>>,
    claim: ClaimFlag,
}

impl fmt::Debug for MemDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemDevice").field("name", &self.name).finish_non_exhaustive()
    }
}

impl MemDevice {
    /// A device of `bytes` zero bytes in blocks of `block_size` (512, 1024, 2048 or 4096).
    ///
    /// # Errors
    /// [`Error::NotADevice`] when the size is no positive multiple of a good block size, [`Error::NoMemory`] when the
    /// address space does not hold it.
    pub fn new(bytes: u64, block_size: u32) -> Result<Arc<MemDevice>, Error> {
        MemDevice::named(&format!("mem:{bytes}?block={block_size}"), bytes, block_size, false)
    }

    /// A device with the content of `image`.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn from_image(image: &Image) -> Result<Arc<MemDevice>, Error> {
        let device = MemDevice::new(image.capacity(), image.block_size())?;
        for (offset, bytes) in image.chunks() {
            device.region.write(offset, bytes);
        }
        Ok(device)
    }

    pub(crate) fn named(
        name: &str,
        bytes: u64,
        block_size: u32,
        read_only: bool,
    ) -> Result<Arc<MemDevice>, Error> {
        let good_block = block_size.is_power_of_two() && (512..=4096).contains(&block_size);
        if !good_block || bytes == 0 || !bytes.is_multiple_of(u64::from(block_size)) {
            let why = "the size must be a positive multiple of a block size of 512, 1024, 2048 or 4096";
            return Err(Error::NotADevice { device: name.to_owned(), why: why.to_owned() });
        }
        let region = Region::new(bytes).map_err(|error| Error::NoMemory {
            len: usize::try_from(bytes).unwrap_or(usize::MAX),
            why: format!("cannot map '{name}': {error}; choose a smaller device"),
        })?;
        let geometry = Geometry {
            buffer_align: 512,
            max_transfer: MAX_REQUEST as u32,
            queue_depth: 256,
            volatile_cache: false,
            native_fua: true,
            unmap: true,
            ..Geometry::new(block_size, bytes)
        };
        let dma = Arc::new(Pool::new(MapArenas, PoolOptions::default()));
        let claim = ClaimFlag::default();
        Ok(Arc::new(MemDevice { name: name.to_owned(), geometry, read_only, region, dma, claim }))
    }

    /// The content as a value. Must not race with writes whose place in it matters. Costs time in what was ever
    /// written, not in the capacity.
    pub fn snapshot(&self) -> Image {
        let mut image = Image::new(self.geometry.capacity, self.geometry.block_size);
        let mut chunk = [0; CHUNK];
        for (start, len) in self.region.written() {
            for offset in (start..start + len).step_by(CHUNK) {
                let chunk = &mut chunk[..CHUNK.min((start + len - offset) as usize)];
                self.region.read(offset, chunk);
                if chunk.iter().any(|byte| *byte != 0) {
                    let written = image.write(offset, chunk);
                    debug_assert_eq!(written, Ok(()), "a grain lies inside the device");
                }
            }
        }
        image
    }

    /// Bytes that were ever written, in units of 64 KiB: what the device takes of the system's memory, about.
    pub fn written_bytes(&self) -> u64 {
        self.region.written().map(|(_, len)| len).sum()
    }

    /// Reads past all contracts, at any byte; for tests.
    ///
    /// # Errors
    /// [`IoErrorKind::OutOfRange`].
    pub fn read_raw(&self, offset: u64, into: &mut [u8]) -> Result<(), IoErrorKind> {
        self.check_raw(offset, into.len())?;
        self.region.read(offset, into);
        Ok(())
    }

    /// Writes past all contracts, at any byte, read-only or not; for tests that corrupt something.
    ///
    /// # Errors
    /// [`IoErrorKind::OutOfRange`].
    pub fn write_raw(&self, offset: u64, from: &[u8]) -> Result<(), IoErrorKind> {
        self.check_raw(offset, from.len())?;
        self.region.write(offset, from);
        Ok(())
    }

    fn check_raw(&self, offset: u64, len: usize) -> Result<(), IoErrorKind> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.geometry.capacity => Ok(()),
            _ => Err(IoErrorKind::OutOfRange),
        }
    }

    fn execute(&self, mut request: Request) -> Completion {
        let result = self.carry_out(&mut request);
        request.complete(result, EPOCH)
    }

    fn carry_out(&self, request: &mut Request) -> Result<(), IoErrorKind> {
        request.check(&self.geometry, self.read_only)?;
        if request.hints.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(IoErrorKind::TimedOut);
        }
        let mut offset = request.offset;
        match request.kind {
            Kind::Read => {
                for buf in request.bufs.as_mut_slice() {
                    self.region.read(offset, buf);
                    offset += buf.len() as u64;
                }
            }
            Kind::Write => {
                for buf in request.bufs.as_slice() {
                    self.region.write(offset, buf);
                    offset += buf.len() as u64;
                }
            }
            Kind::Flush { epoch: EPOCH } => {}
            Kind::Flush { epoch } => return Err(IoErrorKind::EpochLost { expected: epoch, now: EPOCH }),
            Kind::WriteZeroes | Kind::Unmap => self.region.zero(offset, request.len),
        }
        Ok(())
    }
}

/// Memory is never reset.
const EPOCH: u64 = 0;

impl Device for MemDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error> {
        Ok(Box::new(MemQueuePair { device: self, queued: Vec::new(), done: Vec::new() }))
    }

    fn dma(&self) -> Arc<dyn DmaSource> {
        Arc::clone(&self.dma) as Arc<dyn DmaSource>
    }

    fn epoch(&self) -> u64 {
        EPOCH
    }

    fn claim_flag(&self) -> &ClaimFlag {
        &self.claim
    }
}

struct MemQueuePair {
    device: Arc<MemDevice>,
    queued: Vec<Request>,
    done: Vec<Completion>,
}

impl QueuePair for MemQueuePair {
    fn submit(&mut self, request: Request) {
        self.queued.push(request);
    }

    fn kick(&mut self) {
        self.done.extend(self.queued.drain(..).map(|request| self.device.execute(request)));
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        completions.append(&mut self.done);
        completions.extend(self.queued.drain(..).map(|request| self.device.execute(request)));
        completions.len() - before
    }

    fn outstanding(&self) -> usize {
        self.queued.len() + self.done.len()
    }

    fn wait(&mut self, _timeout: Duration) {
        // Everything is answered at the next poll: there is nothing to wait for.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocking::BlockingIo;

    #[test]
    fn snapshots_and_raw_access() {
        let device = MemDevice::new(1 << 20, 512).unwrap();
        device.write_raw(100, b"corrupt").unwrap();
        assert_eq!(device.write_raw((1 << 20) - 1, b"ab"), Err(IoErrorKind::OutOfRange));
        let image = device.snapshot();
        device.write_raw(100, b"changed").unwrap();
        let copy = MemDevice::from_image(&image).unwrap();
        let mut bytes = [0; 7];
        copy.read_raw(100, &mut bytes).unwrap();
        assert_eq!(&bytes, b"corrupt");
        assert_eq!(copy.snapshot(), image);
        assert_eq!(device.written_bytes(), 64 << 10);
    }

    #[test]
    fn content_outlives_its_users() {
        let device: Arc<dyn Device> = MemDevice::new(1 << 20, 4096).unwrap();
        BlockingIo::new(&device).unwrap().write(8192, &[7; 4096]).unwrap();
        let mut bytes = [0; 4096];
        BlockingIo::new(&device).unwrap().read(8192, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 4096]);
    }

    #[test]
    fn bad_sizes_are_refused() {
        for (bytes, block) in [(0, 4096), (4095, 4096), (4096, 8192), (4096, 0), (4096, 513), (1 << 63, 4096)]
        {
            assert!(MemDevice::new(bytes, block).is_err(), "{bytes} {block}");
        }
    }
}
