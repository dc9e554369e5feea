//! Exclusive use of a file or block device.
//!
//! Between processes: `flock` on a regular file (shared for read-only opens), `O_EXCL` on a block device (given at
//! `open`, also against mounted filesystems). Within this process a table of what is open says the same at once, also on
//! filesystems whose `flock` does nothing.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use parking_lot::Mutex;

use crate::Error;

/// Which medium a file is, whatever path led to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    block_device: bool,
    dev: u64,
    /// Inode number; 0 for a block device, which is known by its device number.
    ino: u64,
}

impl Identity {
    fn of(metadata: &Metadata) -> Identity {
        if metadata.file_type().is_block_device() {
            Identity { block_device: true, dev: metadata.rdev(), ino: 0 }
        } else {
            Identity { block_device: false, dev: metadata.dev(), ino: metadata.ino() }
        }
    }
}

struct Holder {
    identity: Identity,
    shared: bool,
}

static HELD: Mutex<Vec<Holder>> = Mutex::new(Vec::new());

/// The use of a file within this process until it is dropped. [`unlock`] ends that among processes; it comes first.
#[derive(Debug)]
pub(super) struct Exclusive(Identity);

impl Exclusive {
    /// Takes `file` for this process, shared with other readers if `read_only` and not a block device.
    pub(super) fn take(
        name: &str,
        file: &File,
        metadata: &Metadata,
        read_only: bool,
    ) -> Result<Exclusive, Error> {
        let identity = Identity::of(metadata);
        let shared = read_only && !identity.block_device;
        let busy = || Error::Busy { device: name.to_owned() };
        let mut held = HELD.lock();
        if held.iter().any(|holder| holder.identity == identity && !(shared && holder.shared)) {
            return Err(busy());
        }
        if !identity.block_device && !flock(name, file, shared)? {
            return Err(busy());
        }
        held.push(Holder { identity, shared });
        Ok(Exclusive(identity))
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        let mut held = HELD.lock();
        if let Some(at) = held.iter().position(|holder| holder.identity == self.0) {
            held.swap_remove(at);
        }
    }
}

/// Gives the `flock` of a file back. Closing the file is not enough: a child process that another thread is just forking
/// has a copy of the descriptor until it executes its program.
pub(super) fn unlock(file: &File) {
    // SAFETY: the descriptor is open for as long as `file` is borrowed. A failure means that there was no lock.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
}

/// False when somebody else has it.
fn flock(name: &str, file: &File, shared: bool) -> Result<bool, Error> {
    let operation = if shared { libc::LOCK_SH } else { libc::LOCK_EX };
    loop {
        // SAFETY: the descriptor is open for as long as `file` is borrowed.
        if unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EWOULDBLOCK) => return Ok(false),
            Some(libc::EOPNOTSUPP | libc::ENOLCK | libc::ENOSYS | libc::EINVAL) => {
                log::warn!(
                    "{name}: its filesystem has no file locks ({error}); other processes are not kept out"
                );
                return Ok(true);
            }
            _ => return Err(Error::Os { what: "cannot lock", device: name.to_owned(), source: error }),
        }
    }
}
