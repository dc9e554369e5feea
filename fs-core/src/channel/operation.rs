//! Operations and their answers, as values: the base interface that blocking calls and futures are built on.

use std::sync::Arc;
use std::time::SystemTime;

use bdev_adapter::{DmaBuf, Segments};

use crate::batch::WriteBatch;
use crate::error::Result;
use crate::file::File;
use crate::types::InodeId;

/// How a file is opened. Combine with `|`; the default opens an existing file for reading and writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenFlags(u8);

impl OpenFlags {
    /// Open an existing file for reading and writing.
    pub const READ_WRITE: OpenFlags = OpenFlags(0);
    /// Create the file when it is missing.
    pub const CREATE: OpenFlags = OpenFlags(1);
    /// With [`CREATE`](Self::CREATE): fail when the file exists.
    pub const EXCLUSIVE: OpenFlags = OpenFlags(2);
    /// Cut the file to no bytes.
    pub const TRUNCATE: OpenFlags = OpenFlags(4);
    /// The handle refuses to write.
    pub const READ_ONLY: OpenFlags = OpenFlags(8);

    /// Reads and writes go through the page cache, which all files of the mount share. What is written is accepted when it is there and
    /// has its space reserved; it goes to the device later. Direct and buffered handles on one file see the same bytes at
    /// every moment.
    pub const BUFFERED: OpenFlags = OpenFlags(16);

    /// True when all of `flags` are set.
    pub fn contains(self, flags: OpenFlags) -> bool {
        self.0 & flags.0 == flags.0
    }
}

impl std::ops::BitOr for OpenFlags {
    type Output = OpenFlags;

    fn bitor(self, other: OpenFlags) -> OpenFlags {
        OpenFlags(self.0 | other.0)
    }
}

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stat {
    /// Identity; never reused.
    pub id: InodeId,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of device space that its data takes (metadata apart).
    pub allocated_bytes: u64,
    /// Bytes of pages that were written through the page cache and have not got their place on the device yet.
    pub delayed_bytes: u64,
    /// Extents: records that map a range of the file to the device.
    pub extents: u64,
    /// Last change of content or size.
    pub modified: SystemTime,
    /// Creation.
    pub created: SystemTime,
    /// Grows with each change of content or size.
    pub version: u64,
}

/// A name in the filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name; any bytes but NUL.
    pub name: Vec<u8>,
    /// The file it names.
    pub id: InodeId,
}

/// Space of the filesystem; `total = used + free + reserved`, exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct StatFs {
    /// Bytes of the device that the filesystem manages.
    pub total_bytes: u64,
    /// Bytes that data and metadata take, superblocks included.
    pub used_bytes: u64,
    /// Bytes that writes may take.
    pub free_bytes: u64,
    /// Bytes kept back so that commits and deletes work on a full device, and for writes in progress.
    pub reserved_bytes: u64,
    /// Files that have a name.
    pub files: u64,
}

/// Whether a file grows to the end of a range beyond its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Growth {
    /// It does.
    Grow,
    /// Its size stays; blocks beyond the end are kept for later.
    Keep,
}

/// What stands behind a range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExtentState {
    /// Written blocks.
    Data,
    /// Blocks that are the file's and were never written: they read as zeroes.
    Preallocated,
    /// The content lies in the metadata.
    Inline,
}

/// A range of a file that something stands behind. What no extent covers is a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileExtent {
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes, whole blocks: the last may reach beyond the end of the file.
    pub len: u64,
    /// First byte on the device; `None` for inline content.
    pub device: Option<u64>,
    /// What it is.
    pub state: ExtentState,
}

/// One operation, with everything that it needs.
#[derive(Debug)]
#[non_exhaustive]
pub enum Operation {
    /// Read into `buf`; the answer is [`Output::Bytes`], short at end of file.
    Read {
        /// The file.
        file: File,
        /// Byte offset, any.
        offset: u64,
        /// Where to; no copy is made when offset and length are multiples of 4096.
        buf: DmaBuf,
    },
    /// Read into `bufs`, one behind the other, in one state of the file; the answer is [`Output::Bytes`], short at end of file.
    Readv {
        /// The file.
        file: File,
        /// Byte offset, any.
        offset: u64,
        /// Where to; no copy is made when the offset and every length are multiples of 4096.
        bufs: Vec<DmaBuf>,
    },
    /// Write `buf`.
    Write {
        /// The file.
        file: File,
        /// Byte offset, any.
        offset: u64,
        /// What; no copy is made when offset and length are multiples of 4096.
        buf: DmaBuf,
    },
    /// Write `bufs`, one behind the other.
    Writev {
        /// The file.
        file: File,
        /// Byte offset, any.
        offset: u64,
        /// What; no copy is made when the offset and every length are multiples of 4096.
        bufs: Vec<DmaBuf>,
    },
    /// Write `buf` at the end; the answer is [`Output::Offset`].
    Append {
        /// The file.
        file: File,
        /// What.
        buf: DmaBuf,
    },
    /// Change the size; what is added reads as zeroes.
    Truncate {
        /// The file.
        file: File,
        /// The new size in bytes.
        size: u64,
    },
    /// Give the holes of a range blocks; see [`Channel::preallocate`](crate::Channel::preallocate).
    Preallocate {
        /// The file.
        file: File,
        /// First byte, any.
        offset: u64,
        /// Length in bytes, any.
        len: u64,
        /// What becomes of the size.
        growth: Growth,
    },
    /// Let a range read as zeroes and keep blocks for it; see [`Channel::zero`](crate::Channel::zero).
    Zero {
        /// The file.
        file: File,
        /// First byte, any.
        offset: u64,
        /// Length in bytes, any.
        len: u64,
        /// What becomes of the size.
        growth: Growth,
    },
    /// Let a range read as zeroes and give its blocks back; see [`Channel::punch`](crate::Channel::punch).
    Punch {
        /// The file.
        file: File,
        /// First byte, any.
        offset: u64,
        /// Length in bytes, any.
        len: u64,
    },
    /// Write several ranges of several files, all or nothing. The batch is shared, so that it can be tried again.
    WriteBatch {
        /// What.
        batch: Arc<WriteBatch>,
    },
    /// List where a range lies; the answer is [`Output::Extents`].
    Extents {
        /// The file.
        file: File,
        /// First byte, any.
        offset: u64,
        /// Length in bytes, any.
        len: u64,
        /// At most so many.
        max: usize,
    },
    /// Make the file's bytes, size and name durable.
    SyncFile {
        /// The file.
        file: File,
    },
    /// Make a range of the file durable, with its size and name.
    SyncRange {
        /// The file.
        file: File,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Make everything durable.
    Sync,
    /// Create an empty file; the answer is [`Output::Created`].
    Create {
        /// Its name.
        name: Vec<u8>,
    },
    /// Open a file; the answer is [`Output::Opened`].
    Open {
        /// Its name.
        name: Vec<u8>,
        /// How.
        flags: OpenFlags,
    },
    /// Close a handle, and wait until a deleted file's space is given back if it was the last.
    Close {
        /// The handle.
        file: File,
    },
    /// Remove a name; the content goes when the last handle is closed.
    Delete {
        /// The name.
        name: Vec<u8>,
    },
    /// Rename, replacing the target.
    Rename {
        /// Present name.
        from: Vec<u8>,
        /// New name.
        to: Vec<u8>,
    },
    /// Look a file up; the answer is [`Output::Stat`].
    Stat {
        /// Its name.
        name: Vec<u8>,
    },
    /// What is known of an open file; the answer is [`Output::Stat`].
    StatFile {
        /// The file.
        file: File,
    },
    /// List names in order; the answer is [`Output::Entries`], empty at the end.
    List {
        /// Names must start with this.
        prefix: Vec<u8>,
        /// Names must be greater than this.
        after: Option<Vec<u8>>,
        /// At most so many.
        max: usize,
    },
    /// Space; the answer is [`Output::StatFs`].
    StatFs,
}

/// What a successful operation answers.
#[derive(Debug)]
#[non_exhaustive]
pub enum Output {
    /// It is done.
    Done,
    /// Bytes read.
    Bytes(usize),
    /// Byte offset that an append went to.
    Offset(u64),
    /// The new file.
    Created(InodeId),
    /// The opened file.
    Opened(File),
    /// What is known of a file. (Boxed: answers of reads are small.)
    Stat(Box<Stat>),
    /// Names.
    Entries(Vec<DirEntry>),
    /// Space.
    StatFs(Box<StatFs>),
    /// Where a range lies.
    Extents(Vec<FileExtent>),
}

/// The answer to a submitted operation.
#[derive(Debug)]
pub struct Completion {
    /// The tag that was given with the operation.
    pub tag: u64,
    /// How it went.
    pub result: Result<Output>,
    /// The buffers of the operation, if it had any, as they were given; also on failure.
    pub bufs: Segments,
}

// A batch of answers passes through the cache with each poll.
const _: () = assert!(size_of::<Completion>() <= 96);
