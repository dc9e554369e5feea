//! SPDK's environment, one in a process: how it comes into being, and what can be asked of it.
//!
//! Everything that SPDK wants done on one thread is a [`Job`] for the [`helper`](super::helper) thread; the functions of
//! [`Env`] may be called from any thread, and wait for its answer.
//!
//! Invariants:
//! - The environment is initialised at most once, and never taken down. When that fails, it has failed for good.
//! - A bdev is open once, under its proper name.

use std::collections::HashSet;
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender, SyncSender};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use spdk_sys::env::{
    GAUR_LOG_DPDK, GAUR_LOG_ERROR, GAUR_LOG_INFO, GAUR_LOG_NOTICE, GAUR_LOG_WARN, gaur_env_init,
    gaur_env_opts, gaur_log_open,
};
use spdk_sys::thread::{spdk_set_thread, spdk_thread, spdk_thread_create};
use spdk_sys::version;

use super::helper::{Helper, Job, OpenError, Opened};
use super::memory::{self, HugePages};
use super::rpc::{self, Call};
use crate::Error;
use crate::pool::{Pool, PoolOptions};

/// Memory for I/O, out of SPDK's huge pages.
pub(super) type DmaPool = Pool<HugePages>;

/// The environment.
pub(super) struct Env {
    jobs: Sender<Job>,
    pool: Arc<DmaPool>,
    /// The proper names of the bdevs that are open here.
    open: Mutex<HashSet<String>>,
}

enum State {
    Untried,
    Ready(&'static Env),
    Failed(String),
}

static STATE: Mutex<State> = Mutex::new(State::Untried);

/// The environment, initialised if it was not yet. `device` is for messages.
///
/// # Errors
/// [`Error::Unavailable`] when the system lacks huge pages (may be mended and tried again), [`Error::Spdk`] when DPDK or
/// SPDK refused (for good).
pub(super) fn get(device: &str) -> Result<&'static Env, Error> {
    let mut state = STATE.lock();
    match &*state {
        State::Ready(env) => return Ok(env),
        State::Failed(why) => return Err(environment_error(why)),
        State::Untried => {}
    }
    let ordinary = memory::ordinary(device)?;
    if ordinary.is_none() {
        memory::check(device)?;
    }
    match start(ordinary) {
        Ok(env) => {
            let env: &'static Env = Box::leak(Box::new(env));
            *state = State::Ready(env);
            Ok(env)
        }
        Err(why) => {
            let error = environment_error(&why);
            *state = State::Failed(why);
            Err(error)
        }
    }
}

fn environment_error(why: &str) -> Error {
    Error::Spdk {
        what: "cannot initialise the environment".to_owned(),
        why: format!("{why}; DPDK can be initialised once in a process: mend it and start the program again"),
    }
}

/// Starts the helper thread and waits until it has initialised everything.
fn start(ordinary: Option<i32>) -> Result<Env, String> {
    let (jobs, receiver) = mpsc::channel();
    let (ready, started) = mpsc::sync_channel(1);
    let helper = move || match initialise(ordinary) {
        Ok(thread) => {
            let _ = ready.send(Ok(()));
            Helper::new(thread, receiver).run();
        }
        Err(why) => {
            let _ = ready.send(Err(why));
        }
    };
    // DPDK pins the thread that initialises it (the shim undoes that) and its own threads; the caller's are never
    // touched.
    thread::Builder::new().name("gaur-spdk".to_owned()).spawn(helper).map_err(|e| e.to_string())?;
    started.recv().map_err(|_| "the helper thread died".to_owned())??;
    // SAFETY: the helper has initialised the environment.
    let huge_pages = unsafe { HugePages::new() };
    let pool = Arc::new(Pool::new(huge_pages, PoolOptions::default()));
    Ok(Env { jobs, pool, open: Mutex::new(HashSet::new()) })
}

/// Initialises DPDK and SPDK on the calling thread, which becomes the helper; its SPDK thread.
///
/// `ordinary` is the size of ordinary memory to use instead of huge pages, in MiB.
fn initialise(ordinary: Option<i32>) -> Result<NonNull<spdk_thread>, String> {
    // SAFETY: takes nothing and returns a constant.
    let api = unsafe { version::gaur_spdk_api() };
    if api != version::GAUR_SPDK_API {
        return Err(format!("the C shim speaks version {api}, Rust {}: build again", version::GAUR_SPDK_API));
    }
    // SAFETY: `log_line` has the type that the shim asks for, and exists for ever.
    unsafe { gaur_log_open(Some(log_line)) };
    let opts = gaur_env_opts {
        name: c"gaur".as_ptr(),
        core: first_cpu(),
        mem_mib: ordinary.unwrap_or(-1),
        no_pci: false,
        // Physical addresses can be had by root alone.
        // SAFETY: only reads the process's user id.
        iova_va: unsafe { libc::geteuid() } != 0,
        no_huge: ordinary.is_some(),
    };
    // SAFETY: called once in the process (`STATE` is locked); `opts` and its name live over the call.
    let rc = unsafe { gaur_env_init(&opts) };
    if rc != 0 {
        let said = take_last_error().map(|said| format!(" ({said})")).unwrap_or_default();
        return Err(format!("{}{said}; {}", std::io::Error::from_raw_os_error(-rc), memory::state()));
    }
    // SAFETY: the thread library is initialised; the name is copied.
    let thread = unsafe { spdk_thread_create(c"gaur-app".as_ptr(), ptr::null_mut()) };
    let thread =
        NonNull::new(thread).ok_or_else(|| format!("no memory for a thread; {}", memory::state()))?;
    // SAFETY: `thread` was just created, and only this OS thread ever enters it.
    unsafe { spdk_set_thread(thread.as_ptr()) };
    rpc::set_runtime(false);
    Ok(thread)
}

/// The first CPU that this thread may run on, for DPDK's main core (it knows CPUs below 128).
fn first_cpu() -> u32 {
    // SAFETY: all zeroes is an empty CPU set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is as large as said; on failure (more than 1024 CPUs) it stays empty.
    unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) };
    // SAFETY: reads a bit inside the set.
    (0..128).find(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).unwrap_or(0) as u32
}

/// The last error that SPDK logged: RPC answers often say less.
static LAST_ERROR: Mutex<Option<String>> = Mutex::new(None);

pub(super) fn take_last_error() -> Option<String> {
    LAST_ERROR.lock().take()
}

/// The last message, and how often it came again.
static REPEATED: Mutex<(String, u64)> = Mutex::new((String::new(), 0));

/// SPDK's log goes to the program's logger, target `spdk`.
unsafe extern "C" fn log_line(level: c_int, file: *const c_char, line: c_int, text: *const c_char) {
    // SAFETY: the shim passes terminated strings that live over the call.
    let (file, text) =
        unsafe { (CStr::from_ptr(file).to_string_lossy(), CStr::from_ptr(text).to_string_lossy()) };
    // DPDK does not say how bad it is.
    let bad =
        |text: &str| ["annot", "rror", "ail", "nsufficient", "nough"].iter().any(|word| text.contains(word));
    if level == GAUR_LOG_ERROR as c_int || level == GAUR_LOG_DPDK as c_int && bad(&text) {
        *LAST_ERROR.lock() = Some(text.clone().into_owned());
    }
    let level = match level as u32 {
        GAUR_LOG_ERROR => log::Level::Error,
        GAUR_LOG_WARN => log::Level::Warn,
        GAUR_LOG_NOTICE | GAUR_LOG_DPDK => log::Level::Info,
        GAUR_LOG_INFO => log::Level::Debug,
        _ => log::Level::Trace,
    };
    // Some of its loops say the same for seconds.
    let mut repeated = REPEATED.lock();
    if repeated.0 == text {
        repeated.1 += 1;
        return;
    }
    if repeated.1 > 0 {
        log::log!(target: "spdk", level, "(the last message was repeated {} times)", repeated.1);
    }
    *repeated = (text.clone().into_owned(), 0);
    drop(repeated);
    log::log!(target: "spdk", level, "{text} ({file}:{line})");
}

impl Env {
    /// Memory for I/O.
    pub(super) fn pool(&self) -> &Arc<DmaPool> {
        &self.pool
    }

    /// Carries out a configuration, as far as it was not yet.
    pub(super) fn load(&self, path: &Path, text: Vec<u8>, calls: Vec<Call>) -> Result<(), Error> {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let result = self.ask(|reply| Job::Load { path: path.clone(), text, calls, reply })?;
        result.map_err(|(what, why)| Error::Spdk {
            what: format!("configuration {}: {what}", path.display()),
            why,
        })
    }

    /// See [`rpc`](super::rpc()).
    pub(super) fn rpc(&self, method: &str, params: &str, timeout: Duration) -> Result<(), Error> {
        let failed = |why: String| Error::Spdk { what: method.to_owned(), why };
        let name = CString::new(method).map_err(|_| failed("the name contains NUL".to_owned()))?;
        let call = Call { subsystem: String::new(), method: name, params: params.to_owned() };
        self.ask(|reply| Job::Call { call, timeout, reply })?.map_err(failed)
    }

    /// The names of all bdevs.
    pub(super) fn bdev_names(&self) -> Result<Vec<String>, Error> {
        self.ask(|reply| Job::Names { reply })
    }

    /// Opens a bdev, for this process alone.
    pub(super) fn open(&self, name: &str, write: bool, uri: &str) -> Result<Opened, Error> {
        let device = || uri.to_owned();
        if self.open.lock().contains(name) {
            return Err(Error::Busy { device: device() });
        }
        let c_name = CString::new(name)
            .map_err(|_| Error::NotADevice { device: device(), why: "its name contains NUL".to_owned() })?;
        let opened = match self.ask(|reply| Job::Open { name: c_name, write, reply })? {
            Ok(opened) => opened,
            Err(OpenError::Runtime(why)) => {
                return Err(Error::Spdk { what: "cannot initialise the subsystems".to_owned(), why });
            }
            Err(OpenError::Errno(libc::ENODEV)) => {
                let names = self.bdev_names()?;
                let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
                let why = format!(
                    "there is no bdev '{name}' (there are: {known}); name one of them, or add it to the \
                                   configuration and give that as ?config=PATH"
                );
                return Err(Error::NotFound { device: device(), why });
            }
            Err(OpenError::Errno(libc::EBUSY)) => return Err(Error::Busy { device: device() }),
            Err(OpenError::Errno(errno)) => {
                let source = std::io::Error::from_raw_os_error(errno);
                return Err(Error::Os { what: "cannot open", device: device(), source });
            }
        };
        if !self.open.lock().insert(opened.name.clone()) {
            // Under another of its names; SPDK allows that to readers.
            self.close_on_helper(&opened);
            return Err(Error::Busy { device: device() });
        }
        Ok(opened)
    }

    /// Closes a bdev. No channel of it exists any more, and nobody uses the pointers afterwards.
    pub(super) fn close(&self, opened: &Opened) {
        self.close_on_helper(opened);
        self.open.lock().remove(&opened.name);
    }

    fn close_on_helper(&self, opened: &Opened) {
        // The helper lives as long as the process; if it died of a bug, the bdev stays open.
        let _ = self.ask(|reply| Job::Close { bdev: opened.to_close(), reply });
    }

    /// Gives the helper a job and waits for its answer.
    fn ask<T>(&self, job: impl FnOnce(SyncSender<T>) -> Job) -> Result<T, Error> {
        let (reply, answer) = mpsc::sync_channel(1);
        let sent = self.jobs.send(job(reply)).ok();
        sent.and_then(|()| answer.recv().ok()).ok_or_else(|| Error::Spdk {
            what: "the helper thread".to_owned(),
            why: "it has ended; this is a bug, start the program again".to_owned(),
        })
    }
}
