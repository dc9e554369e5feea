//! The everyday tools: small commands on the filesystem of a device.
//!
//! Names are bytes, taken from the command line as they are. Only `cp`, which has to tell two worlds apart, marks names
//! inside the filesystem with a colon in front.

pub(crate) mod cat;
pub(crate) mod check;
pub(crate) mod cp;
pub(crate) mod df;
pub(crate) mod ls;
pub(crate) mod mkfs;
pub(crate) mod rm;

use fs_core::Channel;

use crate::failure::{Doing, Result};

/// The names that start with `prefix`, in order.
pub(crate) fn names(channel: &Channel, prefix: &[u8]) -> Result<Vec<Vec<u8>>> {
    channel.list(prefix).map(|entry| entry.map(|entry| entry.name).doing("list the files")).collect()
}
