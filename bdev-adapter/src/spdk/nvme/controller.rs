//! A controller that is attached, once in a process, and what its users and its [`worker`](super::worker) share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, LazyLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use spdk_sys::nvme::{gaur_nvme_ctrlr_info, gaur_nvme_ns_info};

use super::seat::Seat;
use super::worker;
use crate::Error;
use crate::spdk::{env, memory};
use crate::uri::{Fabric, NvmeAddress, NvmeOptions};

/// Attaching takes seconds at most; resets of slow controllers longer.
const ATTACH_PATIENCE: Duration = Duration::from_secs(60);
/// A queue pair is opened in milliseconds, unless the controller is being reset.
const OPEN_PATIENCE: Duration = Duration::from_secs(20);
/// Shutting a controller down takes a moment; one that is broken is left to its thread.
const DETACH_PATIENCE: Duration = Duration::from_secs(15);

/// What is asked of the worker.
pub(super) enum Job {
    /// Connect the queue pair of this seat.
    Open { seat: Arc<Seat>, reply: SyncSender<Result<(), String>> },
    /// Free the queue pairs of closed seats.
    Reap,
    /// Something was lost.
    Lost,
    /// What the namespace is like.
    Describe { nsid: u32, reply: SyncSender<Option<gaur_nvme_ns_info>> },
    /// The ids of the active namespaces.
    Namespaces { reply: SyncSender<Vec<u32>> },
    /// Watch this namespace.
    Watch(Arc<Namespace>),
    /// Detach, and end.
    Stop { reply: SyncSender<()> },
}

/// A namespace that is open.
pub(super) struct Namespace {
    pub(super) nsid: u32,
    /// As it was when it was opened.
    pub(super) info: gaur_nvme_ns_info,
    gone: AtomicBool,
}

impl Namespace {
    pub(super) fn new(nsid: u32, info: gaur_nvme_ns_info) -> Namespace {
        Namespace { nsid, info, gone: AtomicBool::new(false) }
    }

    #[inline]
    pub(super) fn is_gone(&self) -> bool {
        // Relaxed: nothing else is read on the strength of it.
        self.gone.load(Ordering::Relaxed)
    }

    pub(super) fn set_gone(&self) {
        if !self.gone.swap(true, Ordering::Relaxed) {
            log::error!("namespace {} is gone", self.nsid);
        }
    }

    /// Whether `now` is still the same namespace.
    pub(super) fn is_same(&self, now: &gaur_nvme_ns_info) -> bool {
        let then = &self.info;
        (then.blocks, then.block_size, then.metadata, then.id)
            == (now.blocks, now.block_size, now.metadata, now.id)
    }
}

const LIVE: u8 = 0;
const RECOVERING: u8 = 1;
const GONE: u8 = 2;

/// What users read at every I/O: written at resets only (and the clock every 10 ms).
#[repr(align(128))]
struct Signals {
    state: AtomicU8,
    epoch: AtomicU64,
    clock: AtomicU32,
}

/// See the module documentation.
pub(super) struct Shared {
    signals: Signals,
    /// For messages: how the controller was named first.
    pub(super) name: String,
    pub(super) options: NvmeOptions,
    /// A queue pair has failed.
    lost: AtomicBool,
    /// When a controller that is being waited for counts as gone.
    recovery_ends: Mutex<Option<Instant>>,
    pub(super) seats: Mutex<Vec<Arc<Seat>>>,
    jobs: Sender<Job>,
    /// For users: without a volatile cache a reset loses nothing.
    volatile_cache: AtomicBool,
}

impl Shared {
    #[inline]
    pub(super) fn epoch(&self) -> u64 {
        // Acquire: who sees a new epoch sees that the old connections are closed.
        self.signals.epoch.load(Ordering::Acquire)
    }

    #[inline]
    pub(super) fn is_gone(&self) -> bool {
        self.signals.state.load(Ordering::Relaxed) == GONE
    }

    /// The worker's clock: turns of 10 ms or longer, never 0.
    #[inline]
    pub(super) fn clock(&self) -> u32 {
        self.signals.clock.load(Ordering::Relaxed)
    }

    pub(super) fn set_clock(&self, now: u32) {
        self.signals.clock.store(now, Ordering::Relaxed);
    }

    /// The worker's note of what the controller is like.
    pub(super) fn set_volatile_cache(&self, present: bool) {
        self.volatile_cache.store(present, Ordering::Relaxed);
    }

    /// Tells the worker that a queue pair has failed.
    pub(super) fn report_loss(&self) {
        self.lost.store(true, Ordering::Release);
        // The worker may have ended, when the controller is gone.
        let _ = self.jobs.send(Job::Lost);
    }

    pub(super) fn take_loss(&self) -> bool {
        self.lost.swap(false, Ordering::AcqRel)
    }

    /// The controller is lost: a new epoch begins.
    pub(super) fn begin_recovery(&self) {
        *self.recovery_ends.lock() = Some(Instant::now() + self.options.reconnect);
        let changed =
            self.signals.state.compare_exchange(LIVE, RECOVERING, Ordering::AcqRel, Ordering::Relaxed);
        if changed.is_ok() && self.volatile_cache.load(Ordering::Relaxed) {
            self.signals.epoch.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// False when the time is over, or the users have given up.
    pub(super) fn still_recovering(&self) -> bool {
        self.check_recovery();
        self.signals.state.load(Ordering::Acquire) == RECOVERING
    }

    /// The controller is back. False when its users have given up meanwhile.
    pub(super) fn end_recovery(&self) -> bool {
        self.signals.state.compare_exchange(RECOVERING, LIVE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    pub(super) fn set_gone(&self) {
        self.signals.state.store(GONE, Ordering::Release);
    }

    /// Gives the controller up when its time to come back is over. For users as well: the worker may be stuck in a call.
    #[cold]
    pub(super) fn check_recovery(&self) {
        if self.signals.state.load(Ordering::Acquire) != RECOVERING {
            return;
        }
        if self.recovery_ends.lock().is_some_and(|end| Instant::now() >= end) {
            let given_up =
                self.signals.state.compare_exchange(RECOVERING, GONE, Ordering::AcqRel, Ordering::Relaxed);
            if given_up.is_ok() {
                log::error!(
                    "{}: the controller did not come back within {:?} and counts as gone",
                    self.name,
                    self.options.reconnect
                );
            }
        }
    }
}

/// An attached controller. The worker detaches it when the last user drops it.
pub(super) struct Controller {
    shared: Arc<Shared>,
    pub(super) info: gaur_nvme_ctrlr_info,
    key: String,
}

/// The controllers of this process by address. The lock is held while one is attached (SPDK does one at a time) or detached;
/// an entry stays until its controller is.
static ATTACHED: LazyLock<Mutex<HashMap<String, Weak<Controller>>>> = LazyLock::new(Mutex::default);

/// What makes two URIs name the same controller.
pub(super) fn key(options: &NvmeOptions) -> String {
    match &options.address {
        NvmeAddress::Pcie(address) => format!("pcie:{address}"),
        NvmeAddress::Fabric { kind, host, port, nqn } => {
            let kind = match kind {
                Fabric::Tcp => "tcp",
                Fabric::Rdma => "rdma",
            };
            format!("{kind}:{host}:{port}/{nqn}")
        }
    }
}

impl Controller {
    /// The controller at this address, attached if it was not.
    ///
    /// # Errors
    /// What keeps it from being attached, and what may help.
    pub(super) fn get(options: &NvmeOptions, uri: &str) -> Result<Arc<Controller>, Error> {
        env::get(uri)?;
        let key = key(options);
        let began = Instant::now();
        loop {
            let mut attached = ATTACHED.lock();
            let Some(entry) = attached.get(&key) else {
                let controller = Arc::new(Controller::attach(options, uri, &key)?);
                attached.insert(key, Arc::downgrade(&controller));
                return Ok(controller);
            };
            let controller = entry.upgrade();
            // The last user of a controller takes the lock when it goes.
            drop(attached);
            match controller {
                Some(controller) if controller.shared.is_gone() => {
                    let why = "the controller is gone; close all its users, then open it again".to_owned();
                    return Err(Error::NotFound { device: uri.to_owned(), why });
                }
                Some(controller) => return Ok(controller),
                // Its last user is about to detach it.
                None if began.elapsed() < DETACH_PATIENCE * 2 => thread::sleep(Duration::from_millis(1)),
                None => return Err(Error::Busy { device: uri.to_owned() }),
            }
        }
    }

    fn attach(options: &NvmeOptions, uri: &str, key: &str) -> Result<Controller, Error> {
        let (jobs, receiver) = mpsc::channel();
        let shared = Arc::new(Shared {
            signals: Signals {
                state: AtomicU8::new(LIVE),
                epoch: AtomicU64::new(0),
                clock: AtomicU32::new(1),
            },
            name: uri.to_owned(),
            options: options.clone(),
            lost: AtomicBool::new(false),
            recovery_ends: Mutex::new(None),
            seats: Mutex::default(),
            jobs,
            volatile_cache: AtomicBool::new(true),
        });
        let (reply, attached) = mpsc::sync_channel(1);
        let for_worker = Arc::clone(&shared);
        thread::Builder::new()
            .name("gaur-nvme".to_owned())
            .spawn(move || worker::run(for_worker, receiver, reply))
            .map_err(|source| Error::Os {
                what: "cannot start a thread for",
                device: uri.to_owned(),
                source,
            })?;
        let info = match attached.recv_timeout(ATTACH_PATIENCE) {
            Ok(result) => result?,
            Err(_) => {
                // Should it still come, the worker finds nobody who hears of it, and detaches.
                let why = format!("the controller did not answer within {} s", ATTACH_PATIENCE.as_secs());
                return Err(Error::Unavailable { device: uri.to_owned(), why });
            }
        };
        Ok(Controller { shared, info, key: key.to_owned() })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Whether what it transfers goes past SPDK, by DMA.
    pub(super) fn is_pcie(&self) -> bool {
        self.info.pcie
    }

    /// The active namespaces.
    pub(super) fn namespaces(&self, uri: &str) -> Result<Vec<u32>, Error> {
        self.ask(uri, |reply| Job::Namespaces { reply })
    }

    /// What a namespace is like; none if it is not active.
    pub(super) fn describe(&self, nsid: u32, uri: &str) -> Result<Option<gaur_nvme_ns_info>, Error> {
        self.ask(uri, |reply| Job::Describe { nsid, reply })
    }

    /// Has the worker tell the namespace when it goes.
    pub(super) fn watch(&self, namespace: &Arc<Namespace>) {
        // A worker that has ended has nothing to watch.
        let _ = self.shared.jobs.send(Job::Watch(Arc::clone(namespace)));
    }

    /// Connects a queue pair for `seat`.
    pub(super) fn open_queue_pair(&self, seat: &Arc<Seat>, device: &str) -> Result<(), Error> {
        if self.shared.is_gone() {
            let why = "the controller is gone".to_owned();
            return Err(Error::NotFound { device: device.to_owned(), why });
        }
        let opened = self.ask(device, |reply| Job::Open { seat: Arc::clone(seat), reply });
        let failed = |why: String| Error::Spdk {
            what: format!("cannot open a queue pair of '{device}'"),
            why: format!(
                "{why}; the controller has no more of them, or SPDK has no memory for it ({})",
                memory::state()
            ),
        };
        match opened {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(failed(why)),
            Err(error) => {
                // The worker may still come to it: it frees what nobody uses.
                seat.take().closed = true;
                self.reap();
                Err(error)
            }
        }
    }

    /// Has the worker free what is closed.
    pub(super) fn reap(&self) {
        let _ = self.shared.jobs.send(Job::Reap);
    }

    /// Gives the worker a job and waits for its answer, over a reset if one is going on.
    fn ask<T>(&self, uri: &str, job: impl FnOnce(SyncSender<T>) -> Job) -> Result<T, Error> {
        let (reply, answer) = mpsc::sync_channel(1);
        let ended = || Error::NotFound { device: uri.to_owned(), why: "the controller is gone".to_owned() };
        self.shared.jobs.send(job(reply)).map_err(|_| ended())?;
        match answer.recv_timeout(OPEN_PATIENCE + self.shared.options.reconnect) {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Disconnected) => Err(ended()),
            Err(RecvTimeoutError::Timeout) => {
                let why = "the controller does not answer".to_owned();
                Err(Error::Unavailable { device: uri.to_owned(), why })
            }
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        // Opening it again waits until this one is gone.
        let mut attached = ATTACHED.lock();
        let (reply, stopped) = mpsc::sync_channel(1);
        if self.shared.jobs.send(Job::Stop { reply }).is_ok()
            && stopped.recv_timeout(DETACH_PATIENCE) == Err(RecvTimeoutError::Timeout)
        {
            log::error!("{}: the controller does not shut down; it is left to its thread", self.shared.name);
        }
        attached.remove(&self.key);
    }
}

/// The worker's end of the jobs.
pub(super) type Jobs = Receiver<Job>;
