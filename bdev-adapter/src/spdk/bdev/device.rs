//! An open bdev as a [`Device`].

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::driver;
use crate::spdk::env::{self, Env};
use crate::spdk::helper::Opened;
use crate::spdk::rpc;
use crate::{ClaimFlag, Device, DmaBuf, DmaSource, Error, Geometry, QueuePair};

/// The epoch of every bdev: nothing tells of resets below.
pub(super) const EPOCH: u64 = 0;
/// Bytes that go to the bdev in one piece; longer requests become several, which the device may work on at once.
pub(super) const MAX_PIECE: u64 = 1 << 20;
/// Requests that a queue pair has at the bdev; what SPDK or the device cannot take of them waits there.
pub(super) const DEPTH: u32 = 256;
/// A configuration is a few kilobytes.
const MAX_CONFIG: u64 = 16 << 20;

/// An open bdev. All functions may be called from any thread.
pub(in crate::spdk) struct SpdkBdev {
    uri: String,
    geometry: Geometry,
    read_only: bool,
    opened: Opened,
    env: &'static Env,
    claim: ClaimFlag,
}

// SAFETY: what `opened` points to is used here only through the flag (atomically) and the descriptor, on which SPDK
// allows I/O channels and I/O from any SPDK thread.
unsafe impl Sync for SpdkBdev {}

impl std::fmt::Debug for SpdkBdev {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpdkBdev")
            .field("uri", &self.uri)
            .field("bdev", &self.opened.name)
            .finish_non_exhaustive()
    }
}

impl SpdkBdev {
    /// See [`open_bdev`](crate::spdk::open_bdev).
    pub(in crate::spdk) fn open(
        name: &str,
        config: Option<&Path>,
        read_only: bool,
        uri: &str,
    ) -> Result<Arc<SpdkBdev>, Error> {
        // What is wrong with the configuration is said before SPDK is set up.
        let config = config.map(|path| Ok((path, read_config(path, uri)?))).transpose()?;
        let env = env::get(uri)?;
        if let Some((path, (text, calls))) = config {
            env.load(path, text, calls)?;
        }
        let opened = env.open(name, !read_only, uri)?;
        let device = SpdkBdev {
            uri: uri.to_owned(),
            geometry: geometry(&opened),
            read_only,
            opened,
            env,
            claim: ClaimFlag::default(),
        };
        // From here on dropping the device closes the bdev.
        device.check()?;
        if device.opened.info.write_cache && !device.opened.info.can_flush {
            log::warn!("{uri} has a write cache and cannot flush it: flush and FUA will fail");
        }
        Ok(Arc::new(device))
    }

    /// Refuses bdevs that the contract has no words for.
    fn check(&self) -> Result<(), Error> {
        let info = &self.opened.info;
        let why = if info.zoned {
            "it is zoned; conventional block devices are supported".to_owned()
        } else if info.md_size != 0 {
            format!("its blocks carry {} bytes of metadata; format it without", info.md_size)
        } else if !info.block_size.is_power_of_two() || !(512..=4096).contains(&info.block_size) {
            format!("its blocks have {} bytes; 512, 1024, 2048 or 4096 are supported", info.block_size)
        } else if info.write_unit > 1 && !self.read_only {
            format!("it takes writes in units of {} blocks only; open it read-only", info.write_unit)
        } else if !info.can_write && !self.read_only {
            "it cannot be written; open it read-only".to_owned()
        } else if info.num_blocks == 0 {
            "it has no blocks".to_owned()
        } else if info.num_blocks.checked_mul(u64::from(info.block_size)).is_none() {
            "its size in bytes does not fit in 64 bits".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::NotADevice { device: self.uri.clone(), why })
    }

    /// Whether the bdev can use the memory of these buffers.
    #[inline]
    pub(super) fn takes(&self, bufs: &[DmaBuf]) -> bool {
        !self.opened.info.own_memory || bufs.iter().all(|buf| buf.is_from(&**self.env.pool()))
    }

    pub(in crate::spdk) fn opened(&self) -> &Opened {
        &self.opened
    }

    /// SPDK wants the bdev back: it was removed, or is being deleted.
    #[inline]
    pub(super) fn is_gone(&self) -> bool {
        // SAFETY: the flag is valid while the bdev is open, aligned, and accessed atomically by the shim as well.
        let removed = unsafe { AtomicU32::from_ptr(self.opened.removed.as_ptr()) };
        // Relaxed: nothing else is read on the strength of it.
        removed.load(Ordering::Relaxed) != 0
    }
}

impl Drop for SpdkBdev {
    fn drop(&mut self) {
        // Queue pairs hold the device, so they and their channels are gone.
        self.env.close(&self.opened);
    }
}

fn geometry(opened: &Opened) -> Geometry {
    let info = &opened.info;
    let mut geometry = Geometry::new(info.block_size, info.num_blocks.saturating_mul(info.block_size.into()));
    // NVMe wants whole words also where the bdev asks for nothing.
    geometry.buffer_align = info.buf_align.max(4);
    geometry.max_transfer = MAX_PIECE as u32;
    geometry.queue_depth = DEPTH;
    geometry.volatile_cache = info.write_cache;
    geometry.native_fua = false;
    geometry.unmap = info.can_unmap;
    geometry
}

fn read_config(path: &Path, uri: &str) -> Result<(Vec<u8>, Vec<rpc::Call>), Error> {
    let cannot_read =
        |source| Error::Os { what: "cannot read the SPDK configuration of", device: uri.to_owned(), source };
    let length = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let why = format!("there is no SPDK configuration {}", path.display());
            return Err(Error::NotFound { device: uri.to_owned(), why });
        }
        Err(error) => return Err(cannot_read(error)),
    };
    let not_one = |why: String| Error::Spdk { what: format!("configuration {}", path.display()), why };
    if length > MAX_CONFIG {
        return Err(not_one(format!("it has {length} bytes, which no configuration has")));
    }
    let text = fs::read(path).map_err(cannot_read)?;
    let calls = rpc::parse(&text).map_err(|why| {
        not_one(format!("{why}; it must be SPDK's JSON configuration, as scripts/spdk-malloc.json is"))
    })?;
    Ok((text, calls))
}

impl Device for SpdkBdev {
    fn name(&self) -> &str {
        &self.uri
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error> {
        Ok(Box::new(driver::open(self)?))
    }

    fn dma(&self) -> Arc<dyn DmaSource> {
        Arc::clone(self.env.pool()) as Arc<dyn DmaSource>
    }

    fn epoch(&self) -> u64 {
        EPOCH
    }

    fn claim_flag(&self) -> &ClaimFlag {
        &self.claim
    }
}
