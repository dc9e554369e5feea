//! SPDK's environment, one in a process, and the helper thread that owns SPDK's app thread.
//!
//! Everything that SPDK wants done on one thread (initialisation, configuration, opening and closing bdevs, and what its
//! modules poll in the background) is a [`Job`] for the helper. Jobs that take long are carried out one after the other;
//! opening and closing is served in between, because an RPC call may wait for just that (deleting a bdev waits until it
//! is closed).
//!
//! Invariants:
//! - The environment is initialised at most once, and never taken down. When that fails, it has failed for good.
//! - The helper thread is inside SPDK's app thread all its life, and nobody else ever is.
//! - Each call of a configuration file is made at most once, unless it failed; the file is known by its canonical path
//!   and its content.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use spdk_sys::bdev::{
    gaur_bdev, gaur_bdev_close, gaur_bdev_desc, gaur_bdev_get_info, gaur_bdev_info, gaur_bdev_name,
    gaur_bdev_names, gaur_bdev_open, gaur_bdev_removed, spdk_bdev_desc,
};
use spdk_sys::config::{gaur_bdev_wait_for_examine, gaur_subsystems_init, gaur_wait};
use spdk_sys::env::{
    GAUR_LOG_DPDK, GAUR_LOG_ERROR, GAUR_LOG_INFO, GAUR_LOG_NOTICE, GAUR_LOG_WARN, gaur_env_init,
    gaur_env_opts, gaur_log_open,
};
use spdk_sys::thread::{gaur_thread_poll, spdk_set_thread, spdk_thread_create};
use spdk_sys::version;

use super::memory::{self, HugePages};
use super::rpc::{self, Admission, Call, Rpc};
use crate::Error;
use crate::pool::{Pool, PoolOptions};

/// How often the helper polls SPDK when nothing is going on.
const TICK: Duration = Duration::from_millis(10);
/// How long one call of a configuration may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the subsystems may take to initialise.
const INIT_TIMEOUT: Duration = Duration::from_secs(60);
/// A bdev that was just created may be claimed for a moment by a module that looks at its content.
const CLAIM_PATIENCE: Duration = Duration::from_millis(200);

/// The environment.
pub(super) struct Env {
    jobs: Sender<Job>,
    pool: Arc<Pool<HugePages>>,
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
    memory::check(device)?;
    match start() {
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
fn start() -> Result<Env, String> {
    let (jobs, receiver) = mpsc::channel();
    let (ready, started) = mpsc::sync_channel(1);
    let helper = move || match initialise() {
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
fn initialise() -> Result<NonNull<spdk_sys::thread::spdk_thread>, String> {
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
        mem_mib: -1,
        no_pci: false,
        // Physical addresses can be had by root alone.
        // SAFETY: only reads the process's user id.
        iova_va: unsafe { libc::geteuid() } != 0,
    };
    // SAFETY: called once in the process (`STATE` is locked); `opts` and its name live over the call.
    let rc = unsafe { gaur_env_init(&opts) };
    if rc != 0 {
        let said = LAST_ERROR.lock().take().map(|said| format!(" ({said})")).unwrap_or_default();
        return Err(format!(
            "{}{said}; {} MiB of huge pages are free, {}",
            std::io::Error::from_raw_os_error(-rc),
            memory::free_mib(),
            memory::MEND
        ));
    }
    // SAFETY: the thread library is initialised; the name is copied.
    let thread = unsafe { spdk_thread_create(c"gaur-app".as_ptr(), ptr::null_mut()) };
    let thread = NonNull::new(thread).ok_or_else(|| format!("no memory for a thread; {}", memory::MEND))?;
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
    log::log!(target: "spdk", level, "{text} ({file}:{line})");
}

/// A bdev that the helper opened. The pointers are good until [`Env::close`].
#[derive(Debug)]
pub(super) struct Opened {
    bdev: NonNull<gaur_bdev>,
    pub(super) desc: NonNull<spdk_bdev_desc>,
    /// Becomes non-zero when SPDK wants the bdev back.
    pub(super) removed: NonNull<u32>,
    pub(super) info: gaur_bdev_info,
    /// Its proper name.
    pub(super) name: String,
}

// SAFETY: names an open bdev; what may be done with it on which thread is said at each use.
unsafe impl Send for Opened {}

impl Opened {
    /// For [`gaur_bdev_flush`](spdk_sys::bdev::gaur_bdev_flush).
    pub(super) fn bdev(&self) -> *const gaur_bdev {
        self.bdev.as_ptr()
    }
}

impl Env {
    /// Memory for I/O.
    pub(super) fn pool(&self) -> &Arc<Pool<HugePages>> {
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
        let _ = self.ask(|reply| Job::Close { bdev: SendBdev(opened.bdev), reply });
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

/// What is asked of the helper.
enum Job {
    Load { path: PathBuf, text: Vec<u8>, calls: Vec<Call>, reply: SyncSender<Result<(), (String, String)>> },
    Call { call: Call, timeout: Duration, reply: SyncSender<Result<(), String>> },
    Open { name: CString, write: bool, reply: SyncSender<Result<Opened, OpenError>> },
    Close { bdev: SendBdev, reply: SyncSender<()> },
    Names { reply: SyncSender<Vec<String>> },
}

enum OpenError {
    Errno(i32),
    /// The subsystems are not initialised, and could not be.
    Runtime(String),
}

struct SendBdev(NonNull<gaur_bdev>);

// SAFETY: only the helper thread, which opened it, does anything with it.
unsafe impl Send for SendBdev {}

/// A configuration file, and which of its calls were made.
struct Loaded {
    text: Vec<u8>,
    made: Vec<bool>,
}

/// The state of the helper thread.
struct Helper {
    thread: NonNull<spdk_sys::thread::spdk_thread>,
    jobs: Receiver<Job>,
    /// Long jobs that arrived during another.
    later: VecDeque<Job>,
    rpc: Option<Rpc>,
    /// The subsystems are initialised.
    runtime: bool,
    /// Why they never will be.
    broken: Option<String>,
    loaded: HashMap<PathBuf, Loaded>,
}

impl Helper {
    fn new(thread: NonNull<spdk_sys::thread::spdk_thread>, jobs: Receiver<Job>) -> Helper {
        let (later, loaded) = (VecDeque::new(), HashMap::new());
        Helper { thread, jobs, later, rpc: None, runtime: false, broken: None, loaded }
    }

    fn run(mut self) {
        loop {
            let job = match self.later.pop_front() {
                Some(job) => job,
                None => match self.jobs.recv_timeout(TICK) {
                    Ok(job) => job,
                    Err(RecvTimeoutError::Timeout) => {
                        self.poll();
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                },
            };
            self.serve(job);
            self.poll();
        }
    }

    /// Polls SPDK until it is idle, within reason. True when there was something to do.
    fn poll(&mut self) -> bool {
        // SAFETY: `thread` lives as long as the process, and this OS thread alone is inside it.
        let once = || unsafe { gaur_thread_poll(self.thread.as_ptr()) > 0 };
        (0..64).take_while(|_| once()).count() > 0
    }

    /// One step of a long job: polls SPDK and serves short jobs.
    fn turn(&mut self) -> bool {
        let busy = self.poll();
        while let Ok(job) = self.jobs.try_recv() {
            let short = match job {
                Job::Close { .. } | Job::Names { .. } => true,
                Job::Open { .. } => self.runtime,
                Job::Load { .. } | Job::Call { .. } => false,
            };
            if short {
                self.serve(job);
            } else {
                self.later.push_back(job);
            }
        }
        busy
    }

    /// Turns until `done` says so. Spins while SPDK is busy, else sleeps in between. False on timeout.
    fn turn_until(&mut self, timeout: Duration, mut done: impl FnMut(&mut Helper) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let mut idle = 0;
        loop {
            let busy = self.turn();
            if done(self) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            idle = if busy { 0 } else { idle + 1 };
            if idle > 100 {
                thread::sleep(Duration::from_micros(100));
            }
        }
    }

    fn serve(&mut self, job: Job) {
        // Whoever asked may have gone; then nobody hears the answer.
        match job {
            Job::Load { path, text, calls, reply } => {
                let _ = reply.send(self.load(path, text, &calls));
            }
            Job::Call { call, timeout, reply } => {
                let result = self.reach_runtime(&[], &mut []).map_err(|(_, why)| why);
                let _ = reply.send(result.and_then(|()| self.call(&call, timeout)));
            }
            Job::Open { name, write, reply } => {
                let opened = match self.reach_runtime(&[], &mut []) {
                    Ok(()) => self.open(&name, write).map_err(OpenError::Errno),
                    Err((_, why)) => Err(OpenError::Runtime(why)),
                };
                if let Err(mpsc::SendError(Ok(unheard))) = reply.send(opened) {
                    close(unheard.bdev);
                }
            }
            Job::Close { bdev, reply } => {
                close(bdev.0);
                let _ = reply.send(());
            }
            Job::Names { reply } => {
                let _ = reply.send(names());
            }
        }
    }

    /// Makes the calls of a configuration that were not made yet. The error names the call and the reason.
    fn load(&mut self, path: PathBuf, text: Vec<u8>, calls: &[Call]) -> Result<(), (String, String)> {
        if let Some(call) = calls.iter().find(|call| call.admission() == Admission::Unknown) {
            let why = format!(
                "this SPDK knows no such method (subsystem '{}'). Block devices are linked, the targets (NVMe-oF, iSCSI, \
                 vhost...) are not: remove it from the configuration",
                call.subsystem
            );
            return Err((call.method().to_owned(), why));
        }
        let mut loaded = match self.loaded.remove(&path) {
            Some(loaded) if loaded.text == text => loaded,
            _ => Loaded { text, made: vec![false; calls.len()] },
        };
        let result = self.make_calls(calls, &mut loaded.made);
        self.loaded.insert(path, loaded);
        result
    }

    fn make_calls(&mut self, calls: &[Call], made: &mut [bool]) -> Result<(), (String, String)> {
        self.reach_runtime(calls, made)?;
        for (call, made) in calls.iter().zip(&mut *made).filter(|(_, made)| !**made) {
            if call.admission() == Admission::Now {
                self.call(call, CALL_TIMEOUT).map_err(|why| (call.method().to_owned(), why))?;
            } else {
                log::warn!(
                    "{} is ignored: SPDK takes it only before the first device is opened",
                    call.method()
                );
            }
            *made = true;
        }
        // SAFETY: inside the app thread, with the subsystems initialised.
        if unsafe { self.wait_for(gaur_bdev_wait_for_examine, CALL_TIMEOUT) } != Some(0) {
            log::warn!("SPDK has not finished looking at its bdevs");
        }
        Ok(())
    }

    /// Initialises the subsystems if that was not done, after those of the `calls` that SPDK takes only before.
    fn reach_runtime(&mut self, calls: &[Call], made: &mut [bool]) -> Result<(), (String, String)> {
        if self.runtime {
            return Ok(());
        }
        let what = || "initialising the subsystems".to_owned();
        if let Some(why) = &self.broken {
            return Err((what(), why.clone()));
        }
        for (call, made) in calls.iter().zip(made).filter(|(_, made)| !**made) {
            if call.admission() == Admission::Now {
                self.call(call, CALL_TIMEOUT).map_err(|why| (call.method().to_owned(), why))?;
                *made = true;
            }
        }
        LAST_ERROR.lock().take();
        // SAFETY: called once in the process (`broken` and `runtime` see to it), inside the app thread.
        let why = match unsafe { self.wait_for(gaur_subsystems_init, INIT_TIMEOUT) } {
            Some(0) => {
                self.runtime = true;
                rpc::set_runtime(true);
                return Ok(());
            }
            Some(rc) => explain(format!("SPDK says {rc}, which may be a lack of memory")),
            None => explain(format!("SPDK did not finish within {} s", INIT_TIMEOUT.as_secs())),
        };
        self.broken = Some(why.clone());
        Err((what(), why))
    }

    /// Starts something that finishes during polls, and polls until it has; its result, or none after `timeout`.
    ///
    /// # Safety
    /// `start` may be called now, with a place for the result that lives until it is done.
    unsafe fn wait_for(
        &mut self,
        start: unsafe extern "C" fn(*mut gaur_wait),
        timeout: Duration,
    ) -> Option<i32> {
        let wait = Box::into_raw(Box::new(gaur_wait { done: false, rc: 0 }));
        // SAFETY: as the caller promises; `wait` stays allocated until it is done, or for ever.
        unsafe { start(wait) };
        // SAFETY: SPDK writes `*wait` only inside polls of this thread, so never at the same time as this read.
        if !self.turn_until(timeout, |_| unsafe { (*wait).done }) {
            return None;
        }
        // SAFETY: it came from `into_raw`, and SPDK is done with it.
        Some(unsafe { Box::from_raw(wait) }.rc)
    }

    /// Calls an RPC method and waits for the answer.
    fn call(&mut self, call: &Call, timeout: Duration) -> Result<(), String> {
        LAST_ERROR.lock().take();
        let id = match &mut self.rpc {
            Some(rpc) => rpc.start(call)?,
            None => self.rpc.insert(Rpc::open()?).start(call)?,
        };
        let mut answer = None;
        self.turn_until(timeout, |helper| {
            answer = helper.rpc.as_mut().and_then(|rpc| rpc.poll(id));
            answer.is_some()
        });
        match answer {
            Some(Ok(())) => Ok(()),
            Some(Err(message)) => Err(explain(message)),
            None => Err(explain(format!("no answer within {} s", timeout.as_secs_f32()))),
        }
    }

    fn open(&mut self, name: &CStr, write: bool) -> Result<Opened, i32> {
        let mut bdev = ptr::null_mut();
        let deadline = Instant::now() + CLAIM_PATIENCE;
        loop {
            // SAFETY: inside the app thread, as opening and closing must be; `name` is terminated, `bdev` takes a pointer.
            let rc = unsafe { gaur_bdev_open(name.as_ptr(), write, &mut bdev) };
            match (rc, NonNull::new(bdev)) {
                (0, Some(bdev)) => return Ok(describe(bdev)),
                (rc, _) if rc == -libc::EBUSY && Instant::now() < deadline => {
                    self.poll();
                    thread::sleep(Duration::from_millis(2));
                }
                (rc, _) => return Err(-rc),
            }
        }
    }
}

fn describe(bdev: NonNull<gaur_bdev>) -> Opened {
    let raw = bdev.as_ptr();
    // SAFETY: `bdev` was just opened; what the shim returns is valid as long as it is open, and never null.
    unsafe {
        let mut info = std::mem::zeroed();
        gaur_bdev_get_info(raw, &mut info);
        Opened {
            bdev,
            desc: NonNull::new_unchecked(gaur_bdev_desc(raw)),
            removed: NonNull::new_unchecked(gaur_bdev_removed(raw).cast_mut()),
            info,
            name: CStr::from_ptr(gaur_bdev_name(raw)).to_string_lossy().into_owned(),
        }
    }
}

fn close(bdev: NonNull<gaur_bdev>) {
    // SAFETY: inside the app thread that opened it; the owner of the `Opened` has given it up.
    unsafe { gaur_bdev_close(bdev.as_ptr()) }
}

fn names() -> Vec<String> {
    unsafe extern "C" fn push(names: *mut c_void, name: *const c_char) {
        // SAFETY: `names` is the vector below, `name` a terminated string; both live over the call.
        unsafe { (*names.cast::<Vec<String>>()).push(CStr::from_ptr(name).to_string_lossy().into_owned()) }
    }
    let mut names: Vec<String> = Vec::new();
    // SAFETY: inside the app thread, where bdevs come and go; `push` gets the pointer to the vector that it expects.
    unsafe { gaur_bdev_names(Some(push), (&raw mut names).cast()) };
    names
}

/// An answer of SPDK's with what it logged meanwhile and what may help.
fn explain(mut message: String) -> String {
    if let Some(said) = LAST_ERROR.lock().take().filter(|said| !message.contains(said.as_str())) {
        message = format!("{message} ({said})");
    }
    if message.to_ascii_lowercase().contains("memory") {
        message = format!("{message}; {} MiB of huge pages are free, {}", memory::free_mib(), memory::MEND);
    }
    message
}
