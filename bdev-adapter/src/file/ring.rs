//! The io_uring of one queue pair, and the buffers registered with it.
//!
//! **Flags.** A queue pair may move between threads, so `SINGLE_ISSUER` (one thread for ever) and what builds on it,
//! `DEFER_TASKRUN`, are out. `COOP_TASKRUN` with `TASKRUN_FLAG` is in: completions are posted when the submitting thread
//! next enters the kernel instead of by an interrupt of it, and the flag tells a poll that entering is worth while. After
//! a queue pair moved, what the old thread had submitted is posted when *that* thread enters the kernel (at the latest
//! at its next timer tick, or when it exits): later, never lost. `SUBMIT_ALL` makes a kernel that dislikes one request go
//! on with the next. Kernels without these flags get a plain ring.
//!
//! **Registered buffers.** The arenas of the device's pool are registered in the slot of their number as their buffers
//! first appear; the kernel then pins and maps them once and not per request. When the kernel refuses (RLIMIT_MEMLOCK)
//! the ring goes on with plain buffers. Arenas that the pool gave back are unregistered at the next submission.
//!
//! This module is the only one that talks to the `io_uring` crate. It knows nothing of requests.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, squeue};

use crate::Error;
use crate::pool::{ArenaToken, MapArenas, Pool};

/// Arenas with a higher number in their pool stay unregistered.
const BUFFER_SLOTS: usize = 1024;

const ENTER_GETEVENTS: u32 = 1;
const ENTER_EXT_ARG: u32 = 8;

/// A ring with one registered file, number 0.
pub(super) struct Ring {
    uring: IoUring,
    buffers: RegisteredBuffers,
}

struct RegisteredBuffers {
    slots: Vec<Registered>,
    /// The kernel refused one: no further arena is registered until some are unregistered.
    refused: bool,
    /// [`Pool::retired`] when the slots were last cleaned.
    retired: u64,
}

/// A slot of the kernel's buffer table; an unused one covers no address.
#[derive(Clone, Copy, Default)]
struct Registered {
    token: u64,
    start: usize,
    end: usize,
}

impl Ring {
    /// A ring for `depth` requests at once.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the system has no io_uring for us, with what would help.
    pub(super) fn new(name: &str, depth: u32) -> Result<Ring, Error> {
        let uring = build(depth).map_err(|error| explain(name, error))?;
        let params = uring.params();
        if !params.is_feature_ext_arg() || !params.is_feature_nodrop() {
            return Err(Error::Unavailable {
                device: name.to_owned(),
                why: "the io_uring of this kernel is too old; Linux 5.11 or later is needed".to_owned(),
            });
        }
        // An error means an old kernel or no locked memory to spare: plain buffers then.
        let sparse = uring.submitter().register_buffers_sparse(BUFFER_SLOTS as u32);
        let slots = if sparse.is_ok() { BUFFER_SLOTS } else { 0 };
        let buffers =
            RegisteredBuffers { slots: vec![Registered::default(); slots], refused: false, retired: 0 };
        Ok(Ring { uring, buffers })
    }

    /// Registers the one file; requests name it as fixed file 0. The ring keeps it open.
    pub(super) fn register_file(&self, fd: RawFd) -> io::Result<()> {
        self.uring.submitter().register_files(&[fd])
    }

    /// Lets go of the file and the registered buffers now: closing a ring does it some time later, and until then the
    /// filesystem of the file could not be unmounted. The ring is of no use afterwards.
    pub(super) fn let_go(&mut self) {
        // Failures (nothing was registered) change nothing: closing does the rest.
        let _ = self.uring.submitter().unregister_files();
        let _ = self.uring.submitter().unregister_buffers();
    }

    /// Queues a request for the next [`submit`](Self::submit). There is room as long as no more than `depth` requests
    /// are queued or in the kernel; false when there is none.
    ///
    /// # Safety
    /// All memory that the entry names stays valid, and is not touched by others, until its completion was seen.
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the caller vouches for the memory.
        unsafe { self.uring.submission().push(entry) }.is_ok()
    }

    /// True when entering the kernel would post completions.
    pub(super) fn wants_enter(&mut self) -> bool {
        let queue = self.uring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Enters the kernel so that it posts completions; submits nothing.
    pub(super) fn post_completions(&mut self) {
        // SAFETY: without arguments the call touches only the ring.
        let result = unsafe { self.uring.submitter().enter::<libc::sigset_t>(0, 0, ENTER_GETEVENTS, None) };
        if let Err(error) = result {
            log::debug!("cannot enter io_uring: {error}");
        }
    }

    /// Hands what is queued to the kernel. Returns how many it took; may take a part.
    pub(super) fn submit(&mut self) -> io::Result<usize> {
        loop {
            match self.uring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Sleeps until there is a completion, at most `timeout` (or for ever). Submits nothing.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let timespec = timeout.map(Timespec::from);
        let mut args = SubmitArgs::new();
        if let Some(timespec) = &timespec {
            args = args.timespec(timespec);
        }
        // SAFETY: `args` and `timespec` live through the call, and EXT_ARG says that `args` is such a structure.
        let result =
            unsafe { self.uring.submitter().enter(0, 1, ENTER_GETEVENTS | ENTER_EXT_ARG, Some(&args)) };
        match result {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// True when no completion waits.
    pub(super) fn completions_empty(&mut self) -> bool {
        self.uring.completion().is_empty()
    }

    /// Takes the completions that are there: user data and result.
    pub(super) fn reap(&mut self, into: &mut Vec<(u64, i32)>) {
        into.extend(self.uring.completion().map(|entry| (entry.user_data(), entry.result())));
    }

    /// The registered slot whose arena has all of `start..start + len`, registering it if need be.
    pub(super) fn fixed_slot(
        &mut self,
        name: &str,
        pool: &Pool<MapArenas>,
        token: u64,
        start: usize,
        len: usize,
    ) -> Option<u16> {
        let arena = ArenaToken::from_raw(token);
        let slot = arena.slot();
        let registered = self.buffers.slots.get(slot)?;
        if registered.token != token {
            if self.buffers.refused || arena.is_large() {
                return None;
            }
            self.register(name, pool, arena, token)?;
        }
        // Tokens of other kinds of sources may look like one of ours: the address decides.
        let registered = self.buffers.slots[slot];
        (registered.start <= start && start + len <= registered.end).then_some(slot as u16)
    }

    /// Unregisters the arenas that the pool gave back to the system, so that their memory is really freed.
    pub(super) fn forget_retired(&mut self, pool: &Pool<MapArenas>) {
        if pool.retired() == self.buffers.retired {
            return;
        }
        self.buffers.retired = pool.retired();
        for slot in 0..self.buffers.slots.len() {
            let registered = self.buffers.slots[slot];
            if registered.end > 0 && pool.arena(ArenaToken::from_raw(registered.token)).is_none() {
                self.buffers.slots[slot] = Registered::default();
                // There may be room for another now.
                self.buffers.refused = false;
                let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
                // SAFETY: an empty entry names no memory; requests in flight keep their own reference in the kernel.
                let result =
                    unsafe { self.uring.submitter().register_buffers_update(slot as u32, &[nothing], None) };
                if let Err(error) = result {
                    log::debug!("cannot unregister a buffer: {error}");
                }
            }
        }
    }

    /// Arenas that are registered now.
    #[cfg(test)]
    pub(super) fn registered(&self) -> usize {
        self.buffers.slots.iter().filter(|slot| slot.end > 0).count()
    }

    #[cold]
    fn register(&mut self, name: &str, pool: &Pool<MapArenas>, arena: ArenaToken, token: u64) -> Option<()> {
        let memory = pool.arena(arena)?;
        let iovec = libc::iovec { iov_base: memory.ptr.as_ptr().cast(), iov_len: memory.len };
        // SAFETY: the pool keeps the arena mapped at least as long as a buffer of it exists, and the caller holds one. If
        // it is unmapped later the kernel's pin keeps the pages (nobody else gets them), and since tokens are never used
        // twice in a process, the slot is then never used for another mapping at that address.
        let result =
            unsafe { self.uring.submitter().register_buffers_update(arena.slot() as u32, &[iovec], None) };
        if let Err(error) = result {
            self.buffers.refused = true;
            log::info!(
                "{name}: no more registered buffers ({error}), going on with plain ones; \
                 raising the locked-memory limit (ulimit -l) makes I/O a little faster"
            );
            return None;
        }
        let start = memory.ptr.as_ptr() as usize;
        self.buffers.slots[arena.slot()] = Registered { token, start, end: start + memory.len };
        Some(())
    }
}

fn build(depth: u32) -> io::Result<IoUring> {
    let modern = IoUring::builder()
        .dontfork()
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(depth);
    match modern {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().dontfork().build(depth)
        }
        result => result,
    }
}

/// Turns a refusal to make a ring into an error that says what to do.
fn explain(name: &str, error: io::Error) -> Error {
    let why = match error.raw_os_error() {
        Some(libc::ENOSYS) => {
            "io_uring is not part of this kernel (Linux 5.11 or later is needed) or blocked by a seccomp filter"
        }
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden here; allow it with 'sysctl kernel.io_uring_disabled=0', or in the seccomp profile \
             of the container"
        }
        Some(libc::ENOMEM) => "no locked memory for io_uring; raise the limit (ulimit -l)",
        Some(libc::EMFILE | libc::ENFILE) => "too many open files; raise the limit (ulimit -n)",
        _ => return Error::Os { what: "cannot set up io_uring for", device: name.to_owned(), source: error },
    };
    Error::Unavailable { device: name.to_owned(), why: why.to_owned() }
}
