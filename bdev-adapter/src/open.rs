//! Opens a device by its URI: the one place that knows all backends and wrappers.

use std::sync::Arc;

use crate::file::FileDevice;
use crate::mem::MemDevice;
use crate::uri::{Backend, DeviceUri, Wrapper};
use crate::wrap::fault::FaultDevice;
use crate::{Device, Error};

/// How a device is opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Reads only: every other request fails, and nothing is written.
    pub read_only: bool,
    /// Creates what the URI names if it does not exist (`file:` with `size=`). Ignored by other backends.
    pub create: bool,
}

impl OpenOptions {
    /// For reading and writing what exists.
    pub fn new() -> OpenOptions {
        OpenOptions::default()
    }

    /// Sets [`read_only`](Self::read_only).
    pub fn read_only(mut self, read_only: bool) -> OpenOptions {
        self.read_only = read_only;
        self
    }

    /// Sets [`create`](Self::create).
    pub fn create(mut self, create: bool) -> OpenOptions {
        self.create = create;
        self
    }
}

/// Opens the device that `uri` names (see [`uri`](crate::uri) for the grammar). The device closes when the last
/// reference and queue pair are dropped. `mem:` gives a new, empty device at every call.
///
/// # Errors
/// [`Error::BadUri`], [`Error::NotBuilt`] for an SPDK device in a build without it, [`Error::Busy`] when somebody
/// has it open, [`Error::NotFound`], [`Error::NotPermitted`], [`Error::NotADevice`], [`Error::Unavailable`] and what
/// else the backend says.
pub fn open(uri: &str, options: &OpenOptions) -> Result<Arc<dyn Device>, Error> {
    let uri = DeviceUri::parse(uri)?;
    let mut device = open_backend(&uri, options)?;
    for (wrapper, name) in uri.wrappers() {
        device = match wrapper {
            Wrapper::Fault(plan) => FaultDevice::wrap_named(name, device, plan.clone()),
        };
    }
    Ok(device)
}

fn open_backend(uri: &DeviceUri, options: &OpenOptions) -> Result<Arc<dyn Device>, Error> {
    let name = uri.backend_str();
    match uri.backend() {
        Backend::Memory { size, block_size } => {
            Ok(MemDevice::named(name, *size, *block_size, options.read_only)?)
        }
        Backend::File(file) => Ok(FileDevice::open(name, file, options)?),
        Backend::SpdkBdev { .. } | Backend::SpdkNvme(_) => open_spdk(uri, options),
    }
}

#[cfg(feature = "spdk")]
fn open_spdk(uri: &DeviceUri, options: &OpenOptions) -> Result<Arc<dyn Device>, Error> {
    let name = uri.backend_str();
    match uri.backend() {
        Backend::SpdkBdev { name: bdev, config } => {
            crate::spdk::open_bdev(bdev, config.as_deref(), options, name)
        }
        Backend::SpdkNvme(nvme) => crate::spdk::open_nvme(nvme, options, name),
        Backend::Memory { .. } | Backend::File(_) => Err(Error::NotBuilt { uri: uri.as_str().to_owned() }),
    }
}

#[cfg(not(feature = "spdk"))]
fn open_spdk(uri: &DeviceUri, _options: &OpenOptions) -> Result<Arc<dyn Device>, Error> {
    Err(Error::NotBuilt { uri: uri.as_str().to_owned() })
}
