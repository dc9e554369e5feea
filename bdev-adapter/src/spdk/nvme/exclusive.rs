//! A namespace has one opener on this machine: within the process by a table, between processes by a lock on a file.
//!
//! On PCIe SPDK itself lets one process have a controller. Over a network other hosts can still attach the namespace: that is
//! for the target to forbid (its list of hosts) or for NVMe reservations, which are not used.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::LazyLock;

use parking_lot::Mutex;

use crate::Error;

static OPEN: LazyLock<Mutex<HashSet<String>>> = LazyLock::new(Mutex::default);

/// The right to a namespace; given back on drop.
pub(super) struct Exclusive {
    key: String,
    /// Holds the lock. None where no such file can be made.
    _lock: Option<File>,
}

impl Exclusive {
    /// # Errors
    /// [`Error::Busy`] when somebody on this machine has it.
    pub(super) fn take(key: &str, uri: &str) -> Result<Exclusive, Error> {
        let mut open = OPEN.lock();
        if open.contains(key) {
            return Err(Error::Busy { device: uri.to_owned() });
        }
        let lock = match lock_file(key) {
            Ok(Some(lock)) => Some(lock),
            Ok(None) => return Err(Error::Busy { device: uri.to_owned() }),
            Err(error) => {
                log::warn!("{uri}: nothing keeps other processes away: {error}");
                None
            }
        };
        open.insert(key.to_owned());
        Ok(Exclusive { key: key.to_owned(), _lock: lock })
    }
}

/// The locked file; none when somebody else has it. The file stays: deleting it would let two hold locks of two files of one
/// name.
fn lock_file(key: &str) -> std::io::Result<Option<File>> {
    // FNV-1a (Fowler, Noll, Vo): the same name in every program, of every version.
    let hash = key.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let path = std::env::temp_dir().join(format!("gaur-nvme-{hash:016x}.lock"));
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o666).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    let file = match options.open(&path) {
        // Where /tmp is sticky and the file another user's, it can be locked all the same.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => File::open(&path)?,
        result => result?,
    };
    // SAFETY: locks an open file; no memory is involved.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(Some(file));
    }
    match std::io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EWOULDBLOCK) => Ok(None),
        error => Err(error),
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        OPEN.lock().remove(&self.key);
    }
}
