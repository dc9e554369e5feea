//! Whole files in and out of a filesystem, with many operations in flight on one channel.
//!
//! - [`import`]: host files in. A thread reads the host, the calling thread drives the channel.
//! - [`export`]: files out, in pieces, to whoever wants them.
//! - [`edit`]: changes to many files at once, in order within each.

mod buffers;
pub(crate) mod edit;
pub(crate) mod export;
pub(crate) mod import;

use std::path::PathBuf;

pub(crate) use buffers::{Part, Pool};

/// Bytes that one operation moves: large enough for the device, small enough that small files waste little.
pub(crate) const CHUNK: usize = 256 << 10;

/// Chunk buffers, and so data operations in flight.
pub(crate) const DEPTH: usize = 64;

/// A host file and its name in the filesystem.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    /// Where it is on the host.
    pub(crate) host: PathBuf,
    /// What it is called in the filesystem.
    pub(crate) name: Vec<u8>,
}
