//! The superblock: where the trees of a generation begin, and what the filesystem is.
//!
//! Each generation is written twice, near the two ends of the device, and generations alternate between two pairs of
//! slots, so that a torn or rotten slot never costs a generation:
//!
//! | slot | generation | byte address |
//! |---|---|---|
//! | 0 | even | 0 |
//! | 1 | odd | 4096 |
//! | 2 | odd | end - 8192 |
//! | 3 | even | end - 4096 |
//!
//! `end` is the size of the address space rounded down to whole blocks. A slot is valid when magic, self index,
//! checksum and parity of the generation agree; the newest valid generation is the filesystem.

use bdev_adapter::Geometry;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::alloc::{Allocator, SpaceError, group_of, region_of};
use crate::error::{Error, Result};
use crate::types::{BLOCK_SIZE, BlockAddr, Generation, Run};

/// First bytes of a superblock.
pub(crate) const MAGIC: [u8; 8] = *b"GAUR\x00FS\x01";
/// The version of the format that this code writes.
pub(crate) const FORMAT_VERSION: u32 = 1;
/// Features that are safe to ignore.
pub(crate) const KNOWN_COMPATIBLE: u64 = 0;
/// Features that must be known to write.
pub(crate) const KNOWN_READ_ONLY_COMPATIBLE: u64 = 0;
/// Features that must be known to read.
pub(crate) const KNOWN_INCOMPATIBLE: u64 = FEATURE_PREALLOCATED | FEATURE_INLINE;
/// Incompatible: there are, or were, extent records of preallocated blocks.
pub(crate) const FEATURE_PREALLOCATED: u64 = 1;
/// Incompatible: there are, or were, extent records with inline content.
pub(crate) const FEATURE_INLINE: u64 = 2;
/// The smallest device in bytes.
pub(crate) const MIN_DEVICE_BYTES: u64 = 16 << 20;
/// Checksum of data blocks: CRC-32C, 4 bytes.
const CHECKSUM_CRC32C: u8 = 1;
/// Number of slots.
pub(crate) const SLOTS: usize = 4;
/// Longest label in bytes.
pub(crate) const LABEL_MAX: usize = 64;

/// Number of tree roots that a superblock has room for.
pub(crate) const ROOTS: usize = 16;
/// Number of regions that the region table has room for.
const REGIONS: usize = 16;

/// A root pointer on disk. All zero: an empty tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RootOnDisk {
    pub(crate) addr: U64,
    pub(crate) generation: U64,
    pub(crate) checksum: U64,
    /// Levels of the tree; 0 when it is empty.
    pub(crate) height: U32,
    pub(crate) reserved: U32,
}

/// One line of the region table: a stretch of logical addresses and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct RegionOnDisk {
    /// First logical block.
    pub(crate) start: U64,
    /// Length in blocks; 0: unused line.
    pub(crate) len: U64,
    /// 0: one copy on one device.
    pub(crate) profile: U32,
    /// Index of the device.
    pub(crate) device: U32,
    /// First block on the device.
    pub(crate) device_start: U64,
}

/// A superblock as it lies on the device. 4096 bytes.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct OnDisk {
    pub(crate) magic: [u8; 8],
    /// CRC-64/NVMe of the block with this field zero.
    pub(crate) checksum: U64,
    pub(crate) format_version: U32,
    /// Which of the four slots this is.
    pub(crate) slot: U32,
    pub(crate) compatible: U64,
    pub(crate) read_only_compatible: U64,
    pub(crate) incompatible: U64,
    pub(crate) uuid: [u8; 16],
    pub(crate) generation: U64,
    /// Size of the address space in blocks.
    pub(crate) total_blocks: U64,
    /// Blocks that nothing refers to.
    pub(crate) free_blocks: U64,
    pub(crate) next_inode: U64,
    pub(crate) files: U64,
    /// When the filesystem was made, nanoseconds since 1970.
    pub(crate) created_ns: U64,
    pub(crate) block_size: U32,
    /// Kind of data checksum; 1: CRC-32C.
    pub(crate) checksum_kind: u8,
    /// Bytes of a data checksum.
    pub(crate) checksum_bytes: u8,
    pub(crate) label_len: U16,
    pub(crate) label: [u8; LABEL_MAX],
    /// Intent log: first block and length; 0: none. (Reserved for the log.)
    pub(crate) log_start: U64,
    pub(crate) log_blocks: U64,
    pub(crate) roots: [RootOnDisk; ROOTS],
    pub(crate) regions: [RegionOnDisk; REGIONS],
    /// Blocks of files that were never written.
    pub(crate) preallocated_blocks: U64,
    pub(crate) reserved: [u8; RESERVED],
}

// The byte map of docs/on-disk-format.md, checked.
const OFFSET_UUID: usize = 8 + 8 + 4 + 4 + 8 + 8 + 8;
const OFFSET_BLOCK_SIZE: usize = OFFSET_UUID + 16 + 6 * 8;
const OFFSET_LABEL: usize = OFFSET_BLOCK_SIZE + 4 + 1 + 1 + 2;
const OFFSET_LOG: usize = OFFSET_LABEL + LABEL_MAX;
const OFFSET_ROOTS: usize = OFFSET_LOG + 16;
const OFFSET_REGIONS: usize = OFFSET_ROOTS + ROOTS * 32;
const OFFSET_PREALLOCATED: usize = OFFSET_REGIONS + REGIONS * 32;
const OFFSET_RESERVED: usize = OFFSET_PREALLOCATED + 8;
const RESERVED: usize = BLOCK_SIZE - OFFSET_RESERVED;
const _: () = {
    assert!(size_of::<OnDisk>() == BLOCK_SIZE);
    assert!(size_of::<RootOnDisk>() == 32 && size_of::<RegionOnDisk>() == 32);
    assert!(std::mem::offset_of!(OnDisk, uuid) == OFFSET_UUID);
    assert!(std::mem::offset_of!(OnDisk, block_size) == OFFSET_BLOCK_SIZE);
    assert!(std::mem::offset_of!(OnDisk, label) == OFFSET_LABEL);
    assert!(std::mem::offset_of!(OnDisk, roots) == OFFSET_ROOTS);
    assert!(std::mem::offset_of!(OnDisk, regions) == OFFSET_REGIONS);
    assert!(std::mem::offset_of!(OnDisk, preallocated_blocks) == OFFSET_PREALLOCATED);
    assert!(std::mem::offset_of!(OnDisk, reserved) == OFFSET_RESERVED);
};

/// The slots that generation `generation` is written to, in the order of writing.
pub(crate) fn slots_of(generation: Generation) -> [usize; 2] {
    if generation.0.is_multiple_of(2) { [0, 3] } else { [1, 2] }
}

/// Byte address of slot `slot` in an address space of `total_blocks`.
pub(crate) fn slot_byte(slot: usize, total_blocks: u64) -> u64 {
    let block = match slot {
        0 => 0,
        1 => 1,
        2 => total_blocks - 2,
        _ => total_blocks - 1,
    };
    BlockAddr(block).byte()
}

/// The runs that superblocks take.
pub(crate) fn reserved_runs(total_blocks: u64) -> [Run; 2] {
    [Run::new(BlockAddr(0), 2), Run::new(BlockAddr(total_blocks - 2), 2)]
}

/// Tells the allocator of a filesystem without region records which blocks superblocks take.
pub(crate) fn mark_reserved(alloc: &mut Allocator, total_blocks: u64) -> Result<(), SpaceError> {
    for run in reserved_runs(total_blocks) {
        let region = region_of(run.start);
        alloc.load_group(group_of(region), None)?;
        alloc.load_region(region, None)?;
        alloc.mark_used(run)?;
    }
    Ok(())
}

/// The size in blocks of the address space on a device.
///
/// # Errors
/// When the device is too small or its sectors are larger than a block.
pub(crate) fn total_blocks(device: &str, geometry: &Geometry) -> Result<u64> {
    if geometry.block_size as usize > BLOCK_SIZE {
        return Err(Error::BadOption {
            what: format!(
                "'{device}' has sectors of {} bytes; at most {BLOCK_SIZE} work",
                geometry.block_size
            ),
        });
    }
    if geometry.capacity < MIN_DEVICE_BYTES {
        return Err(Error::DeviceTooSmall {
            device: device.to_owned(),
            bytes: geometry.capacity,
            need: MIN_DEVICE_BYTES,
        });
    }
    Ok(geometry.capacity / BLOCK_SIZE as u64)
}

impl OnDisk {
    /// A superblock with nothing in it but identity and geometry.
    pub(crate) fn new(uuid: [u8; 16], label: &str, total_blocks: u64, created_ns: u64) -> OnDisk {
        let mut sb = OnDisk::new_zeroed();
        sb.magic = MAGIC;
        sb.format_version = FORMAT_VERSION.into();
        sb.uuid = uuid;
        sb.total_blocks = total_blocks.into();
        sb.created_ns = created_ns.into();
        sb.block_size = (BLOCK_SIZE as u32).into();
        sb.checksum_kind = CHECKSUM_CRC32C;
        sb.checksum_bytes = 4;
        sb.label_len = (label.len() as u16).into();
        sb.label[..label.len()].copy_from_slice(label.as_bytes());
        sb.next_inode = 1.into();
        sb.regions[0].len = total_blocks.into();
        sb
    }

    /// Fills in slot and checksum; the bytes are then what goes to the device.
    pub(crate) fn sealed(&self, slot: usize) -> OnDisk {
        let mut sb = self.clone();
        sb.slot = (slot as u32).into();
        sb.checksum = 0.into();
        sb.checksum = checksum64(sb.as_bytes()).into();
        sb
    }

    /// Reads the superblock of `slot` from `bytes`; says what is wrong when it is none.
    pub(crate) fn parse(bytes: &[u8], slot: usize) -> Result<OnDisk, SlotError> {
        let Ok(sb) = OnDisk::read_from_bytes(bytes) else {
            return Err(SlotError::Damaged("short read".into()));
        };
        if sb.magic != MAGIC {
            return Err(SlotError::Foreign);
        }
        let mut unsummed = sb.clone();
        unsummed.checksum = 0.into();
        if checksum64(unsummed.as_bytes()) != sb.checksum.get() {
            return Err(SlotError::Damaged("checksum mismatch".into()));
        }
        if sb.slot.get() as usize != slot {
            return Err(SlotError::Damaged(format!("it is the superblock of slot {}", sb.slot)));
        }
        if !slots_of(Generation(sb.generation.get())).contains(&slot) {
            return Err(SlotError::Damaged(format!("generation {} does not belong here", sb.generation)));
        }
        Ok(sb)
    }

    /// Checks that this code can use the filesystem, for reading or for writing.
    pub(crate) fn check_usable(&self, device: &str, blocks: u64, write: bool) -> Result<()> {
        let unsupported = |why: String| Error::UnsupportedFormat { device: device.to_owned(), why };
        if self.format_version.get() != FORMAT_VERSION {
            let found = self.format_version.get();
            return Err(unsupported(format!(
                "format version {found}; this code reads version {FORMAT_VERSION}"
            )));
        }
        let unknown = self.incompatible.get() & !KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            return Err(unsupported(format!("unknown incompatible features {unknown:#x}")));
        }
        let unknown = self.read_only_compatible.get() & !KNOWN_READ_ONLY_COMPATIBLE;
        if write && unknown != 0 {
            return Err(unsupported(format!(
                "unknown features {unknown:#x}: it can only be mounted read-only"
            )));
        }
        if self.compatible.get() & !KNOWN_COMPATIBLE != 0 {
            log::info!("{device}: unknown compatible features {:#x}", self.compatible);
        }
        if self.block_size.get() as usize != BLOCK_SIZE || self.checksum_kind != CHECKSUM_CRC32C {
            return Err(unsupported(format!(
                "block size {} and checksum kind {}; this code knows {BLOCK_SIZE} and {CHECKSUM_CRC32C}",
                self.block_size, self.checksum_kind
            )));
        }
        if self.total_blocks.get() > blocks {
            return Err(unsupported(format!(
                "it is {} blocks long and the device only {blocks}: the device was cut, or is not the whole one",
                self.total_blocks
            )));
        }
        let one_region = self.regions[0];
        let identity = one_region.start.get() == 0
            && one_region.len == self.total_blocks
            && one_region.profile.get() == 0
            && one_region.device.get() == 0
            && one_region.device_start.get() == 0
            && self.regions[1..].iter().all(|r| r.len.get() == 0);
        if !identity || self.total_blocks.get() < MIN_DEVICE_BYTES / BLOCK_SIZE as u64 {
            return Err(unsupported("a region table other than one region on one device".into()));
        }
        let counted = [self.free_blocks, self.preallocated_blocks];
        if counted.iter().any(|blocks| blocks.get() > self.total_blocks.get())
            || self.label_len.get() as usize > LABEL_MAX
        {
            return Err(Error::corrupt("superblock counts are out of range"));
        }
        Ok(())
    }

    /// The label as text.
    pub(crate) fn label(&self) -> String {
        let len = (self.label_len.get() as usize).min(LABEL_MAX);
        String::from_utf8_lossy(&self.label[..len]).into_owned()
    }
}

/// Why a slot holds no superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SlotError {
    /// Something else is there (or nothing).
    Foreign,
    /// A superblock that is not whole.
    Damaged(String),
}

/// CRC-64/NVMe, the checksum of metadata.
pub(crate) fn checksum64(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

/// CRC-32C (iSCSI), the checksum of a data block.
#[inline]
pub(crate) fn checksum32(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// `xxxxxxxx-xxxx-...` of a UUID.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(generation: u64) -> OnDisk {
        let mut sb = OnDisk::new([7; 16], "label", 1 << 20, 1);
        sb.generation = generation.into();
        sb
    }

    #[test]
    fn a_sealed_slot_is_valid_only_in_its_place() {
        for generation in [1, 2] {
            for slot in slots_of(Generation(generation)) {
                let sb = sample(generation).sealed(slot);
                assert_eq!(OnDisk::parse(sb.as_bytes(), slot).as_ref(), Ok(&sb));
                for other in (0..SLOTS).filter(|s| *s != slot) {
                    assert!(OnDisk::parse(sb.as_bytes(), other).is_err(), "slot {slot} accepted at {other}");
                }
            }
        }
        let wrong = sample(2).sealed(1);
        assert!(matches!(OnDisk::parse(wrong.as_bytes(), 1), Err(SlotError::Damaged(_))));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let sb = sample(2).sealed(0);
        for byte in 0..BLOCK_SIZE {
            let mut bytes = sb.as_bytes().to_vec();
            bytes[byte] ^= 1 << (byte % 8);
            assert!(OnDisk::parse(&bytes, 0).is_err(), "byte {byte}");
        }
        assert_eq!(OnDisk::parse(&[0; BLOCK_SIZE], 0), Err(SlotError::Foreign));
    }

    #[test]
    fn other_versions_and_features_are_refused_by_name() {
        let usable = |sb: &OnDisk, write| sb.check_usable("dev", 1 << 20, write);
        assert!(usable(&sample(2), true).is_ok());
        let mut sb = sample(2);
        sb.format_version = 9.into();
        assert!(usable(&sb, false).unwrap_err().to_string().contains("version 9"));
        let mut sb = sample(2);
        sb.incompatible = 8.into();
        assert!(usable(&sb, false).is_err());
        let mut sb = sample(2);
        sb.read_only_compatible = 8.into();
        assert!(usable(&sb, false).is_ok() && usable(&sb, true).is_err());
        assert!(sample(2).check_usable("dev", 1 << 19, false).is_err(), "a device that was cut");
    }
}
