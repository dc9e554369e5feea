//! One block-device contract and its backends.
//!
//! Read in this order: [`contract`] (what every device promises), [`dma`] (buffers) and [`pool`] (where they come from),
//! [`uri`] (how devices are named) and [`open`](mod@open), then the backends: [`mem`], [`file`](mod@file), and `spdk`
//! behind the feature of that name; then what stands around a device: [`wrap`], and beside one: [`blocking`], [`image`].
//!
//! ```
//! use bdev_adapter::{OpenOptions, blocking::BlockingIo};
//!
//! let device = bdev_adapter::open("mem:16MiB", &OpenOptions::default())?;
//! let mut io = BlockingIo::new(&device)?;
//! io.write(4096, &[7; 4096])?;
//! io.flush()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! This crate knows nothing of extents or files.

pub mod contract;
pub mod dma;
pub mod pool;

pub mod open;
pub mod uri;

pub mod file;
pub mod mem;
#[cfg(feature = "spdk")]
pub mod spdk;

pub mod blocking;
pub mod image;
pub mod wrap;

#[cfg(test)]
mod test_util;

pub use contract::{
    Claim, ClaimFlag, Completion, Device, Error, Geometry, Hints, IoError, IoErrorKind, Kind, Lifetime,
    MAX_REQUEST, Priority, QueuePair, Request,
};
pub use dma::{DmaBuf, DmaSource, RawDma, Segments};
pub use open::{Handle, OpenOptions, Stack, open, open_stack};
