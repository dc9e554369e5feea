//! A regular file or a block device, driven through io_uring.
//!
//! - Any number of queue pairs, each with its own ring and its own open file description; a queue pair may move between
//!   threads (see `ring` for what that costs).
//! - The page cache of the kernel is bypassed (`O_DIRECT`) where the file allows it.
//! - Flush is `fdatasync`, FUA is `RWF_DSYNC`, write-zeroes and unmap are `fallocate`, with fallbacks; failed
//!   write-back begins a new epoch (see `queue`).
//! - Buffers of [`Device::dma`] are registered with the rings; others work too.
//! - Without io_uring opening fails with [`Error::Unavailable`]: there is no slower way that would be taken silently.
//!
//! What is assumed of the medium: a block is written whole or not at all under power failure only if the device behind
//! does so; a file with 4096 byte blocks on a disk with 512 byte sectors may tear within a block
//! ([`Geometry::atomic_write`] says one block). Layers above checksum what they write.
//!
//! Deliberately absent: growing and shrinking, write-lifetime hints (files have them per inode only), polled
//! completions (`IOPOLL` needs a queue of the driver that few systems have configured).
//!
//! Reading order: `open` (finding out what the file is), `lock`, `queue` (the way of a request), `ops`, `ring`.

mod lock;
mod open;
mod ops;
mod queue;
mod ring;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::pool::{MapArenas, Pool};
use crate::uri::FileOptions;
use crate::{
    ClaimFlag, Device, DmaSource, Error, Geometry, IoErrorKind, Kind, OpenOptions, QueuePair, Request,
};
use lock::Exclusive;
use ops::{Op, Step};
use queue::FileQueuePair;

/// `fallocate` mode of unmap, and second choice of write-zeroes.
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// `fallocate` mode of write-zeroes.
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// A file or block device. All functions may be called from any thread. See the [module documentation](self).
pub struct FileDevice {
    name: String,
    geometry: Geometry,
    read_only: bool,
    direct: bool,
    block_device: bool,
    file: File,
    pool: Arc<Pool<MapArenas>>,
    epoch: AtomicU64,
    /// Index into [`ZERO_STEPS`]: what the filesystem has not refused yet.
    zero_step: AtomicU8,
    claim: ClaimFlag,
    /// Dropped after `file`.
    _exclusive: Exclusive,
}

/// The ways of writing zeroes, the best first.
const ZERO_STEPS: [Step; 3] = [Step::Allocate(ZERO), Step::Allocate(PUNCH), Step::WriteZeroes];

impl fmt::Debug for FileDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileDevice")
            .field("name", &self.name)
            .field("geometry", &self.geometry)
            .field("direct", &self.direct)
            .finish_non_exhaustive()
    }
}

impl FileDevice {
    /// Opens what `file` names; `name` stands in messages.
    ///
    /// # Errors
    /// - [`Error::NotFound`], [`Error::NotPermitted`], [`Error::NotADevice`] (a directory, an empty file, another size
    ///   than the URI says, `direct=on` where that does not work), each with what would help;
    /// - [`Error::Busy`] when it is open elsewhere;
    /// - [`Error::Unavailable`] when the system has no io_uring for us.
    pub fn open(name: &str, file: &FileOptions, options: &OpenOptions) -> Result<Arc<FileDevice>, Error> {
        open::open(name, file, options).map(Arc::new)
    }

    /// True when the page cache of the kernel is bypassed.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Another open file description of the same file, so that a queue pair shares no reference count with others and
    /// learns of failed write-back by itself.
    fn reopen(&self) -> Result<File, Error> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = if self.direct { libc::O_DIRECT } else { 0 };
        let reopened = std::fs::OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .custom_flags(flags)
            .open(path)
            .or_else(|error| {
                log::info!(
                    "{}: cannot open it again ({error}); queue pairs share one description",
                    self.name
                );
                self.file.try_clone()
            });
        reopened.map_err(|source| Error::Os { what: "cannot open again", device: self.name.clone(), source })
    }

    fn epoch_now(&self) -> u64 {
        // Acquire pairs with the release in `note_failure`.
        self.epoch.load(Ordering::Acquire)
    }

    fn zero_step(&self) -> Step {
        ZERO_STEPS[usize::from(self.zero_step.load(Ordering::Relaxed)).min(ZERO_STEPS.len() - 1)]
    }

    /// Whether a request may go to the kernel now: a flush must name the present epoch.
    fn may_start(&self, request: &Request) -> Result<(), IoErrorKind> {
        match (request.kind, self.epoch_now()) {
            (Kind::Flush { epoch }, now) if epoch != now => {
                Err(IoErrorKind::EpochLost { expected: epoch, now })
            }
            _ => Ok(()),
        }
    }

    /// After a step of `op` failed with `error`: another step to try, or `Err` when nothing more is needed; none when
    /// there is no other way.
    fn other_way(&self, op: &Op, error: i32) -> Option<Result<Step, ()>> {
        let Step::Allocate(_) = op.step else { return None };
        if !matches!(error, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV | libc::EPERM) {
            return None;
        }
        if op.request.kind == Kind::Unmap {
            if self.block_device {
                self.discard(&op.request);
            }
            return Some(Err(()));
        }
        let next = ZERO_STEPS.iter().position(|step| *step == op.step)? + 1;
        self.zero_step.fetch_max(next as u8, Ordering::Relaxed);
        log::debug!("{}: writing zeroes: {} unsupported", self.name, io::Error::from_raw_os_error(error));
        Some(Ok(ZERO_STEPS[next.min(ZERO_STEPS.len() - 1)]))
    }

    /// Discards by `ioctl`, in the calling thread: only for devices whose `fallocate` cannot. A failure means nothing:
    /// unmapping is advice.
    fn discard(&self, request: &Request) {
        // `_IO(0x12, 119)`, while BLKSSZGET is `_IO(0x12, 104)`: the upper bits depend on the architecture.
        const BLKDISCARD: libc::Ioctl = libc::BLKSSZGET + (119 - 104);
        let range = [request.offset, request.len];
        // SAFETY: the descriptor is open, and the call reads two `u64`, which live through it.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
        if result != 0 {
            log::debug!("{}: discard: {}", self.name, io::Error::last_os_error());
        }
    }

    /// Begins a new epoch when the failure may have cost writes that had completed before (see [`queue`]).
    fn note_failure(&self, op: &Op, error: i32) {
        let lost = match op.step {
            Step::Sync => true,
            _ => op.request.hints.fua && error == libc::EIO && op.request.kind != Kind::Read,
        };
        if lost {
            let epoch = self.epoch.fetch_add(1, Ordering::Release) + 1;
            log::warn!(
                "{}: {} failed: {}; epoch {epoch} begins",
                self.name,
                op.request.kind.name(),
                io::Error::from_raw_os_error(error)
            );
        }
    }
}

impl Drop for FileDevice {
    fn drop(&mut self) {
        lock::unlock(&self.file);
    }
}

impl Device for FileDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn queue_pair(self: Arc<Self>) -> Result<Box<dyn QueuePair>, Error> {
        Ok(Box::new(FileQueuePair::new(self)?))
    }

    fn dma(&self) -> Arc<dyn DmaSource> {
        Arc::clone(&self.pool) as Arc<dyn DmaSource>
    }

    fn epoch(&self) -> u64 {
        self.epoch_now()
    }

    fn claim_flag(&self) -> &ClaimFlag {
        &self.claim
    }
}

#[cfg(test)]
mod tests;
