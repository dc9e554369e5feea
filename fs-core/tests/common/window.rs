//! The first bytes of a device as a device of their own: tests ask for devices of many sizes, and a real one has its own.

use std::sync::Arc;

use bdev_adapter::{ClaimFlag, Device, DmaSource, Error, Geometry, QueuePair};

/// See the module documentation. Nobody asks for what lies beyond its end: a filesystem goes by the geometry.
#[derive(Debug)]
pub(crate) struct Window {
    inner: Arc<dyn Device>,
    geometry: Geometry,
}

impl Window {
    /// The first `bytes` of `inner`.
    pub(crate) fn over(inner: Arc<dyn Device>, bytes: u64) -> Arc<dyn Device> {
        let mut geometry = inner.geometry().clone();
        assert!(
            geometry.capacity >= bytes,
            "{} has {} bytes, the test wants {bytes}",
            inner.name(),
            geometry.capacity
        );
        geometry.capacity = bytes;
        Arc::new(Window { inner, geometry })
    }
}

impl Device for Window {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error> {
        Arc::clone(&self.inner).queue_pair()
    }

    fn dma(&self) -> Arc<dyn DmaSource> {
        self.inner.dma()
    }

    fn epoch(&self) -> u64 {
        self.inner.epoch()
    }

    fn claim_flag(&self) -> &ClaimFlag {
        self.inner.claim_flag()
    }
}
