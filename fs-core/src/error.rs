//! The errors of the filesystem. Every variant names the thing that it is about.

use std::sync::Arc;

use crate::types::{BLOCK_SIZE, BlockAddr, InodeId};

/// The result of every call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed. Cheap to clone: one failed commit may be the answer to many syncs.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device could not be opened, claimed or used as a whole.
    #[error(transparent)]
    Device(#[from] Arc<bdev_adapter::Error>),
    /// One request to the device failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being read or written.
        what: String,
        /// The device's answer.
        source: Box<bdev_adapter::IoError>,
    },
    /// The device holds no Gaur filesystem.
    #[error(
        "'{device}' holds no Gaur filesystem: {why}; `bench mkfs --device {device}` would make one (and erase the device)"
    )]
    NotAFilesystem {
        /// The device.
        device: String,
        /// What was found instead.
        why: String,
    },
    /// The filesystem was made by another version, or uses features that this one does not know.
    #[error("'{device}' holds a Gaur filesystem that this version cannot use: {why}")]
    UnsupportedFormat {
        /// The device.
        device: String,
        /// Which version or feature.
        why: String,
    },
    /// Every superblock slot is damaged.
    #[error("no usable superblock on '{device}': {why}")]
    NoSuperblock {
        /// The device.
        device: String,
        /// What was found in the four slots.
        why: String,
    },
    /// `format` found a filesystem and was not told to overwrite it.
    #[error("'{device}' already holds a Gaur filesystem ({uuid}); format with `force` to erase it")]
    AlreadyFormatted {
        /// The device.
        device: String,
        /// Its UUID.
        uuid: String,
    },
    /// The device is too small to hold a filesystem.
    #[error("'{device}' has {bytes} bytes; a Gaur filesystem needs at least {need}")]
    DeviceTooSmall {
        /// The device.
        device: String,
        /// Its size.
        bytes: u64,
        /// The smallest size.
        need: u64,
    },
    /// An option is out of its range.
    #[error("{what}")]
    BadOption {
        /// Which one, and what would be right.
        what: String,
    },
    /// Metadata that was read back is not what was written.
    #[error("corrupt metadata: {what}")]
    Corrupt {
        /// Where, and what is wrong.
        what: String,
    },
    /// File data that was read back does not have its checksum.
    #[error(
        "checksum mismatch in {inode:?} at byte {offset} (block {addr} of the device): stored {stored:#010x}, found {found:#010x}"
    )]
    DataChecksum {
        /// The file.
        inode: InodeId,
        /// Byte offset of the damaged block in the file.
        offset: u64,
        /// Where the block is.
        addr: BlockAddr,
        /// The checksum that was stored with the extent.
        stored: u32,
        /// The checksum of what the device returned.
        found: u32,
    },
    /// The device was reset, and data that it had taken before is gone.
    #[error("the device was reset, and lost what was written to {inode:?} at byte {offset} and not synced")]
    DataLost {
        /// The file.
        inode: InodeId,
        /// Byte offset in the file of a block that is lost.
        offset: u64,
    },
    /// A file name has no bytes.
    #[error("a file name must have at least one byte")]
    NameEmpty,
    /// A file name is too long.
    #[error("a file name of {len} bytes is too long; the limit is {max}", max = crate::records::NAME_MAX)]
    NameTooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// A file name contains a NUL byte.
    #[error("a file name must not contain a NUL byte (found at byte {at})")]
    NameHasNul {
        /// Where.
        at: usize,
    },
    /// There is no such file.
    #[error("no file named '{}'", String::from_utf8_lossy(.name))]
    NotFound {
        /// The name.
        name: Vec<u8>,
    },
    /// There is such a file already.
    #[error("a file named '{}' exists", String::from_utf8_lossy(.name))]
    Exists {
        /// The name.
        name: Vec<u8>,
    },
    /// A write or truncate beyond the largest file.
    #[error("range of {len} bytes at byte {offset} ends beyond the largest file ({max} bytes)", max = crate::file::FILE_SIZE_MAX)]
    FileTooLarge {
        /// Where the range starts.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// A [`WriteBatch`](crate::WriteBatch) is too large to be written at once. Nothing was done.
    #[error(
        "a batch of {bytes} bytes in {blocks} blocks is too large; the limits are {} and {}",
        crate::WRITE_BATCH_BYTES_MAX,
        crate::WRITE_BATCH_BLOCKS_MAX
    )]
    BatchTooLarge {
        /// Bytes in the batch.
        bytes: u64,
        /// Blocks that they touch.
        blocks: u64,
    },
    /// There is no room. Nothing of the call was done.
    #[error("no space: {needed} blocks of {size} bytes needed, {available} available", size = BLOCK_SIZE)]
    NoSpace {
        /// Blocks that the call needs, metadata included.
        needed: u64,
        /// Blocks that it could have.
        available: u64,
    },
    /// The filesystem is mounted read-only, or the file was opened so.
    #[error("read-only: {why}")]
    ReadOnly {
        /// Why.
        why: String,
    },
    /// The filesystem was unmounted under the handle.
    #[error("the filesystem is unmounted")]
    Unmounted,
}

impl Error {
    pub(crate) fn io(what: impl Into<String>, source: Box<bdev_adapter::IoError>) -> Error {
        Error::Io { what: what.into(), source }
    }

    pub(crate) fn corrupt(what: impl Into<String>) -> Error {
        Error::Corrupt { what: what.into() }
    }
}

impl From<bdev_adapter::Error> for Error {
    fn from(error: bdev_adapter::Error) -> Error {
        Error::Device(Arc::new(error))
    }
}
