//! A namespace of a controller as a [`Device`].

use std::sync::Arc;

use spdk_sys::nvme::{gaur_nvme_ctrlr_info, gaur_nvme_ns_info};

use super::controller::{Controller, Namespace, key};
use super::driver::{self, ZERO_BUFFER};
use super::exclusive::Exclusive;
use crate::spdk::env;
use crate::spdk::split::Limits;
use crate::uri::NvmeOptions;
use crate::{ClaimFlag, Device, DmaBuf, DmaSource, Error, Geometry, OpenOptions, QueuePair};

/// Bytes that go to the controller in one piece, if it takes as many.
const MAX_PIECE: u64 = 1 << 20;
/// Blocks of one write-zeroes command: 16 bits, counted from 0 (NVM Command Set Specification).
const MAX_ZERO_BLOCKS: u64 = 1 << 16;
/// A range of one dataset management command: 32 bits.
const MAX_UNMAP_BLOCKS: u64 = u32::MAX as u64;

/// An open namespace. All functions may be called from any thread.
pub(super) struct NvmeDevice {
    uri: String,
    geometry: Geometry,
    limits: Limits,
    read_only: bool,
    namespace: Arc<Namespace>,
    claim: ClaimFlag,
    pool: Arc<env::DmaPool>,
    /// Given back after the controller was detached, if this was its last user.
    controller: Arc<Controller>,
    _exclusive: Exclusive,
}

impl std::fmt::Debug for NvmeDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NvmeDevice")
            .field("uri", &self.uri)
            .field("nsid", &self.namespace.nsid)
            .finish_non_exhaustive()
    }
}

/// See [`open_nvme`](crate::spdk::open_nvme).
pub(in crate::spdk) fn open(
    options: &NvmeOptions,
    open: &OpenOptions,
    uri: &str,
) -> Result<Arc<dyn Device>, Error> {
    let controller = Controller::get(options, uri)?;
    let nsid = match options.namespace {
        Some(nsid) => nsid,
        None => only_namespace(&controller, uri)?,
    };
    let exclusive = Exclusive::take(&format!("{}?ns={nsid}", key(options)), uri)?;
    let Some(info) = controller.describe(nsid, uri)? else {
        let active = list(&controller.namespaces(uri)?);
        let why =
            format!("there is no active namespace {nsid} (there are: {active}); name one of them as ?ns=N");
        return Err(Error::NotFound { device: uri.to_owned(), why });
    };
    let why = if info.metadata != 0 {
        format!("its blocks carry {} bytes of metadata; format it without (nvme format)", info.metadata)
    } else if info.protection != 0 {
        format!(
            "it has end-to-end protection information of type {}; format it without (nvme format --pi=0)",
            info.protection
        )
    } else if !info.block_size.is_power_of_two() || !(512..=4096).contains(&info.block_size) {
        format!("its blocks have {} bytes; 512, 1024, 2048 or 4096 are supported", info.block_size)
    } else if info.blocks == 0 {
        "it has no blocks".to_owned()
    } else if info.blocks.checked_mul(u64::from(info.block_size)).is_none() {
        "its size in bytes does not fit in 64 bits".to_owned()
    } else {
        String::new()
    };
    if !why.is_empty() {
        return Err(Error::NotADevice { device: uri.to_owned(), why });
    }
    let namespace = Arc::new(Namespace::new(nsid, info));
    controller.watch(&namespace);
    let (geometry, limits) = geometry(&controller.info, &namespace.info, options);
    Ok(Arc::new(NvmeDevice {
        uri: uri.to_owned(),
        geometry,
        limits,
        read_only: open.read_only,
        namespace,
        claim: ClaimFlag::default(),
        pool: Arc::clone(env::get(uri)?.pool()),
        controller,
        _exclusive: exclusive,
    }))
}

fn only_namespace(controller: &Controller, uri: &str) -> Result<u32, Error> {
    match controller.namespaces(uri)?[..] {
        [nsid] => Ok(nsid),
        [] => {
            let why =
                "the controller has no active namespace; create and attach one (nvme create-ns)".to_owned();
            Err(Error::NotFound { device: uri.to_owned(), why })
        }
        ref several => {
            let why = format!("the controller has several namespaces ({}); name one as ?ns=N", list(several));
            Err(Error::NotADevice { device: uri.to_owned(), why })
        }
    }
}

fn list(namespaces: &[u32]) -> String {
    if namespaces.is_empty() {
        return "none".to_owned();
    }
    let shown: Vec<String> = namespaces.iter().take(16).map(u32::to_string).collect();
    let more = if namespaces.len() > 16 { ", ..." } else { "" };
    shown.join(", ") + more
}

fn geometry(
    ctrlr: &gaur_nvme_ctrlr_info,
    info: &gaur_nvme_ns_info,
    options: &NvmeOptions,
) -> (Geometry, Limits) {
    let block = u64::from(info.block_size);
    let blocks_within = |bytes: u64| bytes.min(u64::from(ctrlr.max_transfer)) / block * block;
    let transfer = blocks_within(MAX_PIECE).max(block);
    let limits = Limits {
        transfer,
        boundary: u64::from(info.boundary_blocks) * block,
        zeroes: if info.can_write_zeroes { MAX_ZERO_BLOCKS * block } else { transfer.min(ZERO_BUFFER) },
        unmap: MAX_UNMAP_BLOCKS * block,
    };
    // A write that crosses the atomic boundary is not atomic; one that is aligned to its size, a power of two, and not
    // longer than the boundary crosses none.
    let atomic = match info.atomic_boundary {
        0 => u64::from(info.atomic_blocks),
        boundary => u64::from(info.atomic_blocks.min(boundary)),
    };
    let mut geometry = Geometry::new(info.block_size, info.blocks * block);
    // Physical region pages begin at whole words.
    geometry.buffer_align = 4;
    geometry.max_transfer = u32::try_from(transfer).unwrap_or(info.block_size);
    geometry.queue_depth = options.depth.min(ctrlr.max_queue_entries.saturating_sub(1)).max(1);
    geometry.volatile_cache = ctrlr.volatile_cache;
    geometry.native_fua = options.native_fua;
    geometry.unmap = info.can_unmap;
    geometry.atomic_write = u32::try_from((atomic * block).min(transfer)).unwrap_or(info.block_size);
    (geometry, limits)
}

impl NvmeDevice {
    pub(super) fn controller(&self) -> &Controller {
        &self.controller
    }

    #[inline]
    pub(super) fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    pub(super) fn can_write_zeroes(&self) -> bool {
        self.namespace.info.can_write_zeroes
    }

    /// Whether it can only use memory of its own pool.
    #[inline]
    pub(super) fn needs_own_memory(&self) -> bool {
        self.controller.is_pcie()
    }

    /// Whether the buffer is memory of its pool.
    #[inline]
    pub(super) fn owns(&self, buf: &DmaBuf) -> bool {
        buf.is_from(&*self.pool)
    }
}

impl Device for NvmeDevice {
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
        Arc::clone(&self.pool) as Arc<dyn DmaSource>
    }

    fn epoch(&self) -> u64 {
        self.controller.shared().epoch()
    }

    fn claim_flag(&self) -> &ClaimFlag {
        &self.claim
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spdk::slots::Op;
    use crate::uri::{Backend, DeviceUri};

    const KIB: u64 = 1024;

    fn options() -> NvmeOptions {
        match DeviceUri::parse("spdk-nvme:pcie:0000:00:04.0?depth=63").unwrap().backend() {
            Backend::SpdkNvme(options) => options.clone(),
            other => panic!("{other:?}"),
        }
    }

    /// 1 GiB in blocks of 512 bytes, transfers of 128 KiB.
    fn drive() -> (gaur_nvme_ctrlr_info, gaur_nvme_ns_info) {
        // SAFETY: all zeroes is a value of both.
        let (mut ctrlr, mut info): (gaur_nvme_ctrlr_info, gaur_nvme_ns_info) = unsafe { std::mem::zeroed() };
        (ctrlr.max_transfer, ctrlr.max_queue_entries, ctrlr.volatile_cache) = (128 << 10, 2048, true);
        (info.blocks, info.block_size, info.atomic_blocks) = (2 << 20, 512, 8);
        (info.can_unmap, info.can_write_zeroes) = (true, true);
        (ctrlr, info)
    }

    #[test]
    fn what_a_drive_says_becomes_its_geometry() {
        let (mut ctrlr, mut info) = drive();
        let (geometry, limits) = super::geometry(&ctrlr, &info, &options());
        assert_eq!((geometry.block_size, geometry.capacity), (512, 1 << 30));
        assert_eq!((geometry.max_transfer, geometry.queue_depth), (128 << 10, 63));
        assert_eq!(geometry.atomic_write, 4096);
        assert!(geometry.volatile_cache && geometry.native_fua && geometry.unmap);
        assert_eq!((limits.transfer, limits.boundary), (128 * KIB, 0));
        assert_eq!(limits.zeroes, 65536 * 512);

        // As many transfers as a controller on a network allows, and small queues.
        (ctrlr.max_transfer, ctrlr.max_queue_entries) = (u32::MAX, 32);
        // Atomic over 64 KiB, but not across 16 KiB; no zeroes by command.
        (info.atomic_blocks, info.atomic_boundary, info.can_write_zeroes) = (128, 32, false);
        let (geometry, limits) = super::geometry(&ctrlr, &info, &options());
        assert_eq!((geometry.max_transfer, geometry.queue_depth), (1 << 20, 31));
        assert_eq!(geometry.atomic_write, 16 << 10);
        assert_eq!(limits.zeroes, ZERO_BUFFER);
        // More than a command carries is not atomic.
        (ctrlr.max_transfer, info.atomic_blocks, info.atomic_boundary) = (4096, 65536, 0);
        assert_eq!(super::geometry(&ctrlr, &info, &options()).0.atomic_write, 4096);
    }

    #[test]
    fn commands_end_at_the_largest_transfer_and_at_boundaries() {
        let (ctrlr, mut info) = drive();
        info.boundary_blocks = 64;
        let (_, limits) = super::geometry(&ctrlr, &info, &options());
        let piece = |offset, len| limits.piece(Op::Write, offset, len);
        assert_eq!(piece(0, 32 * KIB), 32 * KIB);
        assert_eq!(piece(0, 33 * KIB), 32 * KIB, "to the boundary");
        assert_eq!(piece(31 * KIB, 4 * KIB), KIB);
        assert_eq!(piece(32 * KIB, 4 * KIB), 4 * KIB);
        assert_eq!(limits.piece(Op::Read, 31 * KIB, 4 * KIB), KIB);
        assert_eq!(limits.piece(Op::WriteZeroes, 31 * KIB, 4 * KIB), 4 * KIB, "no data, no boundary");
        info.boundary_blocks = 0;
        let (_, limits) = super::geometry(&ctrlr, &info, &options());
        assert_eq!(limits.piece(Op::Write, 0, 1 << 20), 128 * KIB);
        assert_eq!(limits.piece(Op::Unmap, 0, 1 << 30), 1 << 30);
    }
}
