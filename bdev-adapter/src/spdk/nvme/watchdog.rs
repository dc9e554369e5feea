//! Keeps calls of SPDK's NVMe driver from waiting for a silent target for ever.
//!
//! Over fabrics the driver polls for the answers to its own commands (connect, properties, identify) without a time limit in
//! many versions (20.07 among them). A watchdog shuts the sockets of such a call down when it takes too long; then the call
//! fails. (The sockets stay open: shutting down does not free their numbers.)

use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

/// On guard until it is dropped.
pub(super) struct Watchdog {
    _stop: Sender<()>,
}

impl Watchdog {
    /// Shuts the sockets of this process to `peer` that are not among `before` down, after `patience`.
    pub(super) fn new_sockets(patience: Duration, peer: SocketAddr, before: Vec<i32>) -> Watchdog {
        Watchdog::start(patience, move || {
            let now = sockets(peer);
            now.into_iter().filter(|socket| !before.contains(socket)).collect()
        })
    }

    /// Shuts these sockets to `peer` down, after `patience`.
    pub(super) fn sockets(patience: Duration, peer: SocketAddr, these: Vec<i32>) -> Watchdog {
        // Their numbers may have been given to others by then.
        Watchdog::start(patience, move || {
            let now = sockets(peer);
            now.into_iter().filter(|socket| these.contains(socket)).collect()
        })
    }

    fn start(patience: Duration, which: impl Fn() -> Vec<i32> + Send + 'static) -> Watchdog {
        let (stop, stopped) = mpsc::channel::<()>();
        let watch = move || {
            // Again and again: the call may open another.
            while stopped.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                for socket in which() {
                    log::warn!("the target does not answer; shutting a connection to it down");
                    // SAFETY: acts on a socket of this process; no memory is involved.
                    unsafe { libc::shutdown(socket, libc::SHUT_RDWR) };
                }
            }
        };
        // Without a thread there is no guard, which is no worse than before.
        if let Err(error) = thread::Builder::new().name("gaur-nvme-watch".to_owned()).spawn(watch) {
            log::warn!("cannot start a thread: {error}");
        }
        Watchdog { _stop: stop }
    }
}

/// The TCP sockets of this process that are connected to `peer`.
pub(super) fn sockets(peer: SocketAddr) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers.filter(|&socket| peer_of(socket) == Some(peer)).collect()
}

fn peer_of(socket: i32) -> Option<SocketAddr> {
    // SAFETY: all zeroes is a socket address.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: `storage` has `len` bytes.
    if unsafe { libc::getpeername(socket, (&raw mut storage).cast(), &mut len) } != 0 {
        return None;
    }
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says what the storage holds, which is large enough and aligned for it.
            let address = unsafe { *(&raw const storage).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
            Some(SocketAddr::new(IpAddr::V4(ip), u16::from_be(address.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let address = unsafe { *(&raw const storage).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
            Some(SocketAddr::new(IpAddr::V6(ip), u16::from_be(address.sin6_port)))
        }
        _ => None,
    }
}
