//! The bench on which rows are measured: the device, how long, and what rows build on it.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use bdev_adapter::Device;
use fs_core::{Channel, File, Filesystem, MountOptions, OpenFlags};

use super::pump::{Until, pump};
use crate::failure::{Doing, Failure, Result};
use crate::lane::{FileLane, Lane, RawLane};
use crate::out::Bars;
use crate::session::{Access, dma_buffers, format_device, open_device};
use crate::sys::Clock;
use crate::units::{self, MIB};

/// Bytes of one access when data is laid out.
const PIECE: usize = 1 << 20;
/// Accesses in flight then.
const DEPTH: usize = 8;
/// Where and how rows are measured.
pub(crate) struct Lab {
    /// The URI of the device under test.
    pub(crate) uri: String,
    device: Option<Arc<dyn Device>>,
    /// The device under test was named by the user.
    named: bool,
    /// See [`Lab::large`].
    large: RefCell<Option<Arc<dyn Device>>>,
    /// How long a sample takes, about.
    pub(crate) seconds: Duration,
    /// Which time counts.
    pub(crate) clock: Clock,
    /// Seed of everything random.
    pub(crate) seed: u64,
    /// Progress for people.
    pub(crate) bars: Bars,
    /// Erase what is on the device. False only until the first format went through.
    force: Cell<bool>,
    /// Bytes at the start of the device that were written at least once.
    touched: Cell<u64>,
}

impl Lab {
    /// Opens the device at `uri`, which the user `named` or not, if there is a row that needs it.
    #[expect(clippy::too_many_arguments, reason = "called once, with the options of the command")]
    pub(crate) fn open(
        uri: String,
        named: bool,
        needed: bool,
        force: bool,
        seconds: Duration,
        clock: Clock,
        seed: u64,
        bars: Bars,
    ) -> Result<Lab> {
        if seconds.is_zero() {
            return Err(Failure::Usage("--seconds must be more than zero".to_owned()));
        }
        let device = if needed { Some(open_device(&uri, Access::Create)?) } else { None };
        Ok(Lab {
            uri,
            device,
            named,
            large: RefCell::new(None),
            seconds,
            clock,
            seed,
            bars,
            force: Cell::new(force),
            touched: Cell::new(0),
        })
    }

    /// The device under test, in rows that are [on it](super::row::Row::on_device); those that write begin by formatting it.
    pub(crate) fn device(&self) -> &Arc<dyn Device> {
        self.device.as_ref().expect("only rows that are on the device ask for it")
    }

    /// A device of at least `bytes` for rows that need more than the device under test has: the one that the user named if it
    /// has as much, else memory of the kind that is the default, made here and kept until the end.
    pub(crate) fn large(&self, bytes: u64) -> Result<Arc<dyn Device>> {
        if let Some(device) = &*self.large.borrow() {
            return enough(device, bytes).map(|()| Arc::clone(device));
        }
        let device = match (&self.device, self.named) {
            (Some(device), true) => Arc::clone(device),
            (None, true) => open_device(&self.uri, Access::Create)?,
            (_, false) => open_memory(bytes)?,
        };
        enough(&device, bytes)?;
        *self.large.borrow_mut() = Some(Arc::clone(&device));
        Ok(device)
    }

    /// A fresh filesystem on the device, mounted with everything on the calling thread: rows count one core, and a helper
    /// thread would do part of the work on another.
    pub(crate) fn fresh(&self) -> Result<Mounted> {
        self.fresh_on(self.device(), MountOptions::default())
    }

    /// As [`fresh`](Self::fresh) on another device, with other options (but for the helper).
    pub(crate) fn fresh_on(&self, device: &Arc<dyn Device>, options: MountOptions) -> Result<Mounted> {
        format_device(device, "compare", self.force.get() || !self.named)?;
        self.force.set(true);
        let options = MountOptions { helper_thread: false, ..options };
        let fs = Filesystem::mount(Arc::clone(device), &options).doing("mount the filesystem")?;
        let channel = fs.channel().doing("open a channel")?;
        Ok(Mounted { channel, fs })
    }

    /// Makes sure that the first `bytes` of the device have been written once, before a raw lane uses them: memory that
    /// never was is a shared page of zeroes, a hole in a file is no I/O at all, and reading those would flatter the raw
    /// device.
    pub(crate) fn touch(&self, bytes: u64) -> Result<()> {
        let bytes = bytes.min(self.device().geometry().capacity);
        if self.touched.get() >= bytes {
            return Ok(());
        }
        // Formatting refuses to erase a filesystem unless told to; raw writes must not get around that.
        self.fresh()?.unmount()?;
        let bar = self.bars.bytes("touch the device", bytes);
        let mut lane = RawLane::new(self.device(), 0)?;
        write_all(&mut lane, self.device(), bytes, PIECE, &mut |done| bar.set_position(done))?;
        bar.finish_and_clear();
        self.touched.set(bytes);
        Ok(())
    }

    /// A file size for streams: `wanted`, or what fits well on the device.
    pub(crate) fn span(&self, wanted: u64) -> Result<u64> {
        let piece = PIECE as u64;
        let span = wanted.min(self.device().geometry().capacity / 5 * 2) / piece * piece;
        if span == 0 {
            return Err(Failure::new(
                "the device is too small to measure anything on it; 64 MiB is the least",
            ));
        }
        Ok(span)
    }
}

/// A mounted filesystem with a channel of the measuring thread.
pub(crate) struct Mounted {
    // The channel is dropped before the filesystem.
    pub(crate) channel: Channel,
    pub(crate) fs: Filesystem,
}

impl Mounted {
    /// Unmounts cleanly.
    pub(crate) fn unmount(self) -> Result<()> {
        drop(self.channel);
        self.fs.unmount().doing("unmount the filesystem")
    }

    /// Creates a file.
    pub(crate) fn create(&self, name: &str) -> Result<File> {
        self.channel.open(name, OpenFlags::CREATE | OpenFlags::EXCLUSIVE).doing(format!("create '{name}'"))
    }

    /// Creates a file of `bytes` sequentially written bytes.
    pub(crate) fn create_filled(&self, lab: &Lab, name: &str, bytes: u64) -> Result<File> {
        let file = self.create(name)?;
        let bar = lab.bars.bytes("write the file", bytes);
        let mut lane = FileLane::new(&self.channel, file.clone());
        write_all(&mut lane, lab.device(), bytes, PIECE, &mut |done| bar.set_position(done))?;
        self.channel.sync().doing("sync the filesystem")?;
        bar.finish_and_clear();
        Ok(file)
    }
}

/// Skips the row when `device` has less than `bytes`.
fn enough(device: &Arc<dyn Device>, bytes: u64) -> Result<()> {
    let capacity = device.geometry().capacity;
    if capacity >= bytes {
        return Ok(());
    }
    let (capacity, bytes) = (units::bytes(capacity), units::bytes(bytes));
    Err(Failure::Skipped(format!("the device has {capacity}; this row needs {bytes}")))
}

/// A malloc bdev of SPDK's.
#[cfg(feature = "spdk")]
fn open_memory(bytes: u64) -> Result<Arc<dyn Device>> {
    const NAME: &str = "BenchLarge";
    let blocks = bytes.div_ceil(4096);
    let bdev = format!(r#"{{"name":"{NAME}","num_blocks":{blocks},"block_size":4096}}"#);
    if let Err(error) = bdev_adapter::spdk::rpc("bdev_malloc_create", &bdev, Duration::from_secs(60)) {
        let (pages, why) = (bytes.div_ceil(2 << 20) + 64, error);
        return Err(Failure::Skipped(format!(
            "there is no malloc bdev of {} ({why}); `scripts/spdk.sh hugepages {pages}` gives it room",
            units::bytes(bytes)
        )));
    }
    open_device(&format!("spdk-bdev:{NAME}"), Access::Write)
}

/// Plain memory.
#[cfg(not(feature = "spdk"))]
fn open_memory(bytes: u64) -> Result<Arc<dyn Device>> {
    open_device(&format!("mem:{}MiB", bytes.div_ceil(1 << 20)), Access::Write)
}

/// Writes `bytes` from offset 0 on in pieces of `piece` bytes (the rest, if any, stays unwritten).
fn write_all(
    lane: &mut impl Lane,
    device: &Arc<dyn Device>,
    bytes: u64,
    piece: usize,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut buffers = dma_buffers(device, DEPTH, piece)?;
    for (number, buf) in buffers.iter_mut().enumerate() {
        crate::transfer::edit::pattern(number as u64, 0, buf);
    }
    let mut at = 0;
    pump(Clock::Wall, lane, &mut buffers, Until::Operations(bytes / piece as u64), |lane, buf| {
        lane.write(at, buf, 0);
        at += piece as u64;
        progress(at);
    })?;
    Ok(())
}

/// MiB per second.
pub(crate) fn mib_per_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / MIB / time.as_secs_f64().max(1e-9)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// For tests of rows that have no device: samples are short.
    pub(crate) fn lab() -> Lab {
        let bars = Bars::new(true);
        Lab::open("-".to_owned(), false, false, false, Duration::from_millis(2), Clock::Cpu, 1, bars)
            .expect("no device")
    }
}
