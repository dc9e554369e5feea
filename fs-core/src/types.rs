//! Addresses, counts and identities, each a type of its own, so that blocks, bytes, ends and lengths cannot be mixed.

use std::fmt;

/// Bytes in a filesystem block, the unit of allocation, of checksums and of metadata nodes.
pub const BLOCK_SIZE: usize = 4096;
/// `log2(BLOCK_SIZE)`.
pub const BLOCK_SHIFT: u32 = 12;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number! {
    /// Logical address of a block in the filesystem's address space, in blocks. The region table maps it to devices.
    BlockAddr
}
number! {
    /// A position inside a file, in blocks.
    FileBlock
}
number! {
    /// A number of blocks.
    BlockCount
}
number! {
    /// The number of a commit. Grows by one with each; never reused.
    Generation
}
number! {
    /// Identity of a file. Never reused.
    InodeId
}

impl BlockAddr {
    /// First byte of the block.
    pub fn byte(self) -> u64 {
        self.0 << BLOCK_SHIFT
    }

    /// The address `n` blocks further.
    pub fn plus(self, n: u64) -> BlockAddr {
        BlockAddr(self.0 + n)
    }
}

impl FileBlock {
    /// The block that contains byte `offset` of a file.
    pub fn containing(offset: u64) -> FileBlock {
        FileBlock(offset >> BLOCK_SHIFT)
    }

    /// The first block at or after byte `offset`.
    pub fn at_or_after(offset: u64) -> FileBlock {
        FileBlock(offset.div_ceil(BLOCK_SIZE as u64))
    }

    /// First byte of the block.
    pub fn byte(self) -> u64 {
        self.0 << BLOCK_SHIFT
    }

    /// The position `n` blocks further.
    pub fn plus(self, n: u64) -> FileBlock {
        FileBlock(self.0 + n)
    }
}

/// A run of blocks on the device: first block and length (> 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// First block.
    pub start: BlockAddr,
    /// Length in blocks.
    pub len: u64,
}

impl Run {
    /// A run of `len` blocks from `start`.
    pub fn new(start: BlockAddr, len: u64) -> Run {
        Run { start, len }
    }

    /// The first block after the run.
    pub fn end(self) -> BlockAddr {
        BlockAddr(self.start.0 + self.len)
    }
}
