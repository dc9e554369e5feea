//! Devices and mounts of a command.

use std::path::Path;
use std::sync::Arc;

use bdev_adapter::{Device, DmaBuf, OpenOptions};
use clap::Args;
use fs_core::{Channel, Filesystem, FormatOptions, MountOptions};

use crate::failure::{Doing, Result};

/// The device that a command works on.
#[derive(Debug, Clone, Args)]
pub(crate) struct DeviceArg {
    /// Device: file:PATH[?size=1GiB], mem:SIZE or, when built with SPDK, spdk-nvme:pcie:ADDRESS, spdk-nvme:tcp:HOST:PORT/NQN
    /// and spdk-bdev:NAME?config=FILE
    #[arg(long, short = 'd', value_name = "URI")]
    pub(crate) device: String,
}

/// The URI of the device in the file `path`.
pub(crate) fn file_uri(path: &Path) -> String {
    let mut uri = "file:".to_owned();
    for character in path.to_string_lossy().chars() {
        match character {
            '%' => uri.push_str("%25"),
            '?' => uri.push_str("%3F"),
            '&' => uri.push_str("%26"),
            other => uri.push(other),
        }
    }
    uri
}

/// What a command wants to do with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Only look.
    Read,
    /// Change it.
    Write,
    /// Change it, and make the file behind a `file:` device when there is none.
    Create,
}

/// Opens the device that `uri` names.
pub(crate) fn open_device(uri: &str, access: Access) -> Result<Arc<dyn Device>> {
    let options = OpenOptions { read_only: access == Access::Read, create: access == Access::Create };
    bdev_adapter::open(uri, &options).doing("open the device")
}

/// Makes a filesystem on `device`; with `force` also over another one.
pub(crate) fn format_device(device: &Arc<dyn Device>, label: &str, force: bool) -> Result<()> {
    let options = FormatOptions { label: label.to_owned(), force };
    fs_core::format(device, &options).doing("make a filesystem")
}

/// Mounts `device`.
pub(crate) fn mount_device(device: &Arc<dyn Device>, read_only: bool) -> Result<Filesystem> {
    let options = MountOptions { read_only, ..MountOptions::default() };
    Filesystem::mount(Arc::clone(device), &options).doing("mount the filesystem")
}

/// Opens and mounts the device of an everyday tool, runs `work` on a channel, and unmounts cleanly.
pub(crate) fn with_mounted<T>(
    device: &DeviceArg,
    access: Access,
    work: impl FnOnce(&Filesystem, &Channel) -> Result<T>,
) -> Result<T> {
    let device = open_device(&device.device, access)?;
    let fs = mount_device(&device, access == Access::Read)?;
    let channel = fs.channel().doing("open a channel")?;
    let result = work(&fs, &channel);
    drop(channel);
    // An unmount that fails after the work failed would only hide the first cause.
    let unmounted = fs.unmount().doing("unmount the filesystem");
    let value = result?;
    unmounted?;
    Ok(value)
}

/// `number` DMA buffers of `len` bytes.
pub(crate) fn dma_buffers(device: &Arc<dyn Device>, number: usize, len: usize) -> Result<Vec<DmaBuf>> {
    let source = device.dma();
    let what = || format!("allocate {number} I/O buffers of {len} bytes");
    (0..number).map(|_| DmaBuf::new(&source, len).doing(what())).collect()
}
