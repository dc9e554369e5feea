//! The helper thread, `gaur-spdk`, which owns SPDK's app thread.
//!
//! Everything that SPDK wants done on one thread (configuration, opening and closing bdevs, what its modules poll in the
//! background) is a [`Job`] for it. Jobs that take long are carried out one after the other; opening and closing is
//! served in between, because an RPC call may wait for just that (deleting a bdev waits until it is closed).
//!
//! Invariants:
//! - The helper thread is inside SPDK's app thread all its life, and nobody else ever is.
//! - The subsystems are initialised once; before that, calls that SPDK takes only before are made.
//! - Each call of a configuration file is made at most once, unless it failed; the file is known by its canonical path
//!   and its content.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::PathBuf;
use std::ptr::{self, NonNull};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use spdk_sys::bdev::{
    gaur_bdev, gaur_bdev_close, gaur_bdev_desc, gaur_bdev_get_info, gaur_bdev_info, gaur_bdev_name,
    gaur_bdev_names, gaur_bdev_open, gaur_bdev_removed, spdk_bdev_desc,
};
use spdk_sys::config::{gaur_bdev_wait_for_examine, gaur_subsystems_init, gaur_wait};
use spdk_sys::thread::{gaur_thread_poll, spdk_thread};

use super::env::take_last_error;
use super::memory;
use super::rpc::{self, Admission, Call, Rpc};

/// How often the helper polls SPDK when nothing is going on.
const TICK: Duration = Duration::from_millis(10);
/// How long one call of a configuration may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the subsystems may take to initialise.
const INIT_TIMEOUT: Duration = Duration::from_secs(60);
/// A bdev that was just created may be claimed for a moment by a module that looks at its content.
const CLAIM_PATIENCE: Duration = Duration::from_millis(200);

/// What is asked of the helper.
pub(super) enum Job {
    Load { path: PathBuf, text: Vec<u8>, calls: Vec<Call>, reply: SyncSender<Result<(), (String, String)>> },
    Call { call: Call, timeout: Duration, reply: SyncSender<Result<(), String>> },
    Open { name: CString, write: bool, reply: SyncSender<Result<Opened, OpenError>> },
    Close { bdev: SendBdev, reply: SyncSender<()> },
    Names { reply: SyncSender<Vec<String>> },
}

pub(super) enum OpenError {
    Errno(i32),
    /// The subsystems are not initialised, and could not be.
    Runtime(String),
}

pub(super) struct SendBdev(NonNull<gaur_bdev>);

// SAFETY: only the helper thread, which opened it, does anything with it.
unsafe impl Send for SendBdev {}

/// A configuration file, and which of its calls were made.
struct Loaded {
    text: Vec<u8>,
    made: Vec<bool>,
}

/// A bdev that the helper opened. The pointers are good until [`Env::close`](super::env::Env::close).
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

    /// For [`Job::Close`].
    pub(super) fn to_close(&self) -> SendBdev {
        SendBdev(self.bdev)
    }
}

/// The helper thread, and what it has done so far.
pub(super) struct Helper {
    thread: NonNull<spdk_thread>,
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
    pub(super) fn new(thread: NonNull<spdk_thread>, jobs: Receiver<Job>) -> Helper {
        let (later, loaded) = (VecDeque::new(), HashMap::new());
        Helper { thread, jobs, later, rpc: None, runtime: false, broken: None, loaded }
    }

    /// Serves jobs for ever.
    pub(super) fn run(mut self) {
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
        take_last_error();
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
        take_last_error();
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
    if let Some(said) = take_last_error().filter(|said| !message.contains(said.as_str())) {
        message = format!("{message} ({said})");
    }
    if message.to_ascii_lowercase().contains("memory") {
        message = format!("{message}; {}", memory::state());
    }
    message
}
