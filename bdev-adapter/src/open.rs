//! Opens a device by its URI: the one place that knows all backends and wrappers.

use std::sync::Arc;

use crate::file::FileDevice;
use crate::mem::MemDevice;
use crate::uri::{Backend, DeviceUri, Wrapper};
use crate::wrap::counters::CountingDevice;
use crate::wrap::fault::FaultDevice;
use crate::wrap::latency::LatencyDevice;
use crate::wrap::recorder::Recorder;
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

/// A device with handles to its wrappers, for who wants to talk to them: set faults, read counters, get a recording.
#[derive(Debug)]
pub struct Stack {
    /// The whole of it: requests enter here.
    pub device: Arc<dyn Device>,
    /// Its wrappers, from the outside in: in the order of the URI.
    pub wrappers: Vec<Handle>,
}

/// A wrapper of a [`Stack`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Handle {
    /// `fault:`
    Fault(Arc<FaultDevice>),
    /// `latency:`
    Latency(Arc<LatencyDevice>),
    /// `count:`
    Count(Arc<CountingDevice>),
    /// `record:`
    Record(Arc<Recorder>),
}

impl Stack {
    /// The outermost `fault:`.
    pub fn fault(&self) -> Option<&Arc<FaultDevice>> {
        self.wrappers.iter().find_map(|wrapper| if let Handle::Fault(it) = wrapper { Some(it) } else { None })
    }

    /// The outermost `count:`.
    pub fn counter(&self) -> Option<&Arc<CountingDevice>> {
        self.wrappers.iter().find_map(|wrapper| if let Handle::Count(it) = wrapper { Some(it) } else { None })
    }

    /// The outermost `record:`.
    pub fn recorder(&self) -> Option<&Arc<Recorder>> {
        self.wrappers
            .iter()
            .find_map(|wrapper| if let Handle::Record(it) = wrapper { Some(it) } else { None })
    }
}

/// Opens the device that `uri` names (see [`uri`](crate::uri) for the grammar). The device closes when the last
/// reference and queue pair are dropped. `mem:` gives a new, empty device at every call.
///
/// # Errors
/// [`Error::BadUri`], [`Error::NotBuilt`] for an SPDK device in a build without it, [`Error::Busy`] when somebody
/// has it open, [`Error::NotFound`], [`Error::NotPermitted`], [`Error::NotADevice`], [`Error::Unavailable`] and what
/// else the backend says; [`Error::TooLarge`] and [`Error::Io`] when `record:` cannot take its copy.
pub fn open(uri: &str, options: &OpenOptions) -> Result<Arc<dyn Device>, Error> {
    Ok(open_stack(uri, options)?.device)
}

/// Opens the device that `uri` names, as [`open`] does, and gives the handles of its wrappers too.
///
/// # Errors
/// As for [`open`].
pub fn open_stack(uri: &str, options: &OpenOptions) -> Result<Stack, Error> {
    let uri = DeviceUri::parse(uri)?;
    let mut device = open_backend(&uri, options)?;
    let mut wrappers = Vec::new();
    for (wrapper, name) in uri.wrappers() {
        let handle = match wrapper {
            Wrapper::Fault(plan) => Handle::Fault(FaultDevice::wrap_named(name, device, plan.clone())),
            Wrapper::Latency(plan) => Handle::Latency(LatencyDevice::wrap_named(name, device, plan.clone())),
            Wrapper::Count => Handle::Count(CountingDevice::wrap_named(name.to_owned(), device)),
            Wrapper::Record(options) => {
                Handle::Record(Recorder::around_named(name.to_owned(), device, *options)?)
            }
        };
        device = match &handle {
            Handle::Fault(it) => it.clone(),
            Handle::Latency(it) => it.clone(),
            Handle::Count(it) => it.clone(),
            Handle::Record(it) => it.clone(),
        };
        wrappers.push(handle);
    }
    wrappers.reverse();
    Ok(Stack { device, wrappers })
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
