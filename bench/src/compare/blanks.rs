//! A device in memory that keeps no zeroes: for files that are larger than the memory at hand, of which only the metadata
//! matters.
//!
//! Writes of nothing but zeroes become write-zeroes below, which cost a sparse memory device no memory where nothing was before.
//! Everything reads back as it was written. One queue pair is used by one thread, as everywhere; tags of requests in flight must
//! differ (those of a filesystem do).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::{
    ClaimFlag, Completion, Device, DmaSource, Error, Geometry, Kind, QueuePair, Request, Segments,
};

use crate::failure::Result;
use crate::session::{Access, open_device};

/// The device.
#[derive(Debug)]
pub(crate) struct Blanks(Arc<dyn Device>);

impl Blanks {
    /// A memory device of so many bytes, all zero.
    pub(crate) fn open(bytes: u64) -> Result<Arc<dyn Device>> {
        let inner = open_device(&format!("mem:{}MiB", bytes.div_ceil(1 << 20)), Access::Create)?;
        Ok(Arc::new(Blanks(inner)))
    }
}

impl Device for Blanks {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn geometry(&self) -> &Geometry {
        self.0.geometry()
    }

    fn read_only(&self) -> bool {
        self.0.read_only()
    }

    fn queue_pair(self: Arc<Self>) -> std::result::Result<Box<dyn QueuePair>, Error> {
        let inner = Arc::clone(&self.0).queue_pair()?;
        Ok(Box::new(Queue { inner, blank: HashMap::new() }))
    }

    fn dma(&self) -> Arc<dyn DmaSource> {
        self.0.dma()
    }

    fn epoch(&self) -> u64 {
        self.0.epoch()
    }

    fn claim_flag(&self) -> &ClaimFlag {
        self.0.claim_flag()
    }
}

struct Queue {
    inner: Box<dyn QueuePair>,
    /// The buffers of writes that are write-zeroes below, by their tags.
    blank: HashMap<u64, Segments>,
}

impl QueuePair for Queue {
    fn submit(&mut self, request: Request) {
        if request.kind != Kind::Write || !is_blank(&request.bufs) {
            return self.inner.submit(request);
        }
        let Request { offset, len, hints, tag, bufs, .. } = request;
        self.blank.insert(tag, bufs);
        self.inner.submit(Request::write_zeroes(offset, len, tag).with_hints(hints));
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        let before = completions.len();
        let count = self.inner.poll(completions);
        for completion in &mut completions[before..] {
            if let Some(bufs) = self.blank.remove(&completion.tag) {
                completion.bufs = bufs;
            }
        }
        count
    }

    fn outstanding(&self) -> usize {
        self.inner.outstanding()
    }

    fn wait(&mut self, timeout: Duration) {
        self.inner.wait(timeout);
    }
}

fn is_blank(bufs: &Segments) -> bool {
    const ZEROES: [u8; 4096] = [0; 4096];
    let all_zero = |bytes: &[u8]| bytes.chunks(ZEROES.len()).all(|chunk| *chunk == ZEROES[..chunk.len()]);
    bufs.as_slice().iter().all(|buf| all_zero(buf))
}

#[cfg(test)]
mod tests {
    use bdev_adapter::blocking::BlockingIo;

    use super::*;

    #[test]
    fn everything_reads_back_as_it_was_written() {
        let device = Blanks::open(1 << 20).unwrap();
        let mut io = BlockingIo::new(&device).unwrap();
        let mut expected = vec![0u8; 64 << 10];
        // Zeroes over nothing, over data, beside data.
        for (at, len, byte) in
            [(0, 8192, 0), (4096, 8192, 7), (8192, 4096, 0), (16384, 4096, 1), (0, 4096, 0)]
        {
            let range = at..at + len;
            expected[range].fill(byte);
            io.write(at as u64, &expected[at..at + len]).unwrap();
            let mut all = vec![9; expected.len()];
            io.read(0, &mut all).unwrap();
            assert!(all == expected, "after {len} bytes of {byte} at {at}");
        }
    }
}
