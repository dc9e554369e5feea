//! What the metadata trees hold: one module a tree, each with the layout of its keys and values and the typed
//! operations on it. All integers in keys are big-endian (so that they sort), in values little-endian.
//!
//! | tree | key | value |
//! |---|---|---|
//! | [`names`] | name | inode id |
//! | [`inodes`] | inode id | inode record |
//! | [`extents`] | inode id, file block | extent record |
//! | [`checksums`] | device block / 64 | presence bits, 64 checksums |
//! | [`space`] | kind, region or group id | allocation state |
//! | [`orphans`] | inode id | what is left to do |

pub(crate) mod checksums;
pub(crate) mod extents;
pub(crate) mod inodes;
pub(crate) mod names;
pub(crate) mod orphans;
pub(crate) mod space;

pub use names::NAME_MAX;

use crate::txn::Stop;

/// The trees of a filesystem, by their index in the superblock's root table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum TreeKind {
    Names = 0,
    Inodes = 1,
    Extents = 2,
    Checksums = 3,
    Space = 4,
    Orphans = 5,
}

impl TreeKind {
    pub(crate) const ALL: [TreeKind; 6] = [
        TreeKind::Names,
        TreeKind::Inodes,
        TreeKind::Extents,
        TreeKind::Checksums,
        TreeKind::Space,
        TreeKind::Orphans,
    ];

    pub(crate) fn index(self) -> usize {
        self as usize
    }

    /// The name of the tree in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            TreeKind::Names => "names",
            TreeKind::Inodes => "inodes",
            TreeKind::Extents => "extents",
            TreeKind::Checksums => "checksums",
            TreeKind::Space => "space",
            TreeKind::Orphans => "orphans",
        }
    }
}

/// Reads a fixed-size value; a value of another size is corruption.
fn value_of<T: zerocopy::FromBytes>(tree: TreeKind, bytes: &[u8]) -> Result<T, Stop> {
    T::read_from_bytes(bytes)
        .map_err(|_| Stop::corrupt(format!("a value of {} bytes in the {} tree", bytes.len(), tree.name())))
}

/// Reads a big-endian number at `at` of a key.
fn key_u64(tree: TreeKind, key: &[u8], at: usize) -> Result<u64, Stop> {
    match key.get(at..at + 8).and_then(|b| b.try_into().ok()) {
        Some(bytes) => Ok(u64::from_be_bytes(bytes)),
        None => Err(Stop::corrupt(format!("a key of {} bytes in the {} tree", key.len(), tree.name()))),
    }
}
