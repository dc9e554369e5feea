//! The thread of a controller: attaching, the admin queue, queue pairs, timeouts, resets. See the
//! [parent module](super) for what it does when the controller is lost.
//!
//! Invariants:
//! - Nobody else calls SPDK with the controller.
//! - A queue pair is used with its seat taken only.
//! - Buffers of commands are given back (by SPDK's callbacks) only when the controller cannot reach them any more: they were
//!   answered, their connection is closed, the controller was reset, or its right to DMA was taken away.

use std::ffi::CString;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use spdk_sys::nvme::{
    gaur_nvme_abort, gaur_nvme_alloc_qpair, gaur_nvme_attach, gaur_nvme_cover_registers,
    gaur_nvme_ctrlr_info, gaur_nvme_detach, gaur_nvme_get_ctrlr_info, gaur_nvme_get_ns_info,
    gaur_nvme_is_removed, gaur_nvme_keep_namespaces, gaur_nvme_ns_info, gaur_nvme_opts, gaur_nvme_reset,
    gaur_nvme_revoke_dma, spdk_nvme_ctrlr, spdk_nvme_ctrlr_fail, spdk_nvme_ctrlr_free_io_qpair,
    spdk_nvme_ctrlr_get_first_active_ns, spdk_nvme_ctrlr_get_next_active_ns, spdk_nvme_ctrlr_get_ns,
    spdk_nvme_ctrlr_process_admin_completions, spdk_nvme_ctrlr_reconnect_io_qpair, spdk_nvme_qpair,
    spdk_nvme_qpair_process_completions,
};

use super::controller::{Job, Jobs, Namespace, Shared};
use super::diagnose;
use super::preflight::{self, Endpoint};
use super::seat::{Inner, Seat};
use super::watchdog::{self, Watchdog};
use crate::Error;
use crate::spdk::env::take_last_error;
use crate::uri::NvmeAddress;

/// How often the admin queue is polled.
const TICK: Duration = Duration::from_millis(10);
/// How often timeouts and the presence of the device are looked at.
const ROUND: Duration = Duration::from_millis(250);
/// What a turn counts at most, for the time that commands take.
const LONGEST_TURN: Duration = Duration::from_millis(100);
/// The controller ends the association of a host from which it hears nothing for so long.
const KEEP_ALIVE_MS: u32 = 10_000;
/// How long a step of a reset may take over a network. In 20.07 a reset whose connection breaks asks for registers in a loop
/// until then.
const INIT_TIMEOUT_MS: u32 = 4_000;
/// How long a call of SPDK's may wait for a target on the network before its sockets are shut down.
const CALL_PATIENCE: Duration = Duration::from_secs(10);
/// How long the controller may take for a setting.
const KEEP_PATIENCE_MS: u32 = 4_000;
/// Between the last doorbell and a reset (PCIe). QEMU's controller (7.2) loses track of a command that it fetches while it is
/// being reset, and dies with the machine when that is done.
const QUIET: Duration = Duration::from_millis(100);
/// After an attempt to reset, the next waits so long; twice as long after each.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// Requests of SPDK's driver per queue pair; it takes one more for each piece that it makes of a command itself.
const SPARE_REQUESTS: u32 = 512;

type Attached = Result<gaur_nvme_ctrlr_info, Error>;

/// The body of the thread.
pub(super) fn run(shared: Arc<Shared>, jobs: Jobs, reply: SyncSender<Attached>) {
    match attach(&shared) {
        Ok((worker, info)) => {
            let mut worker = worker;
            if reply.send(Ok(info)).is_ok() {
                worker.serve(&jobs);
            } else {
                worker.detach();
            }
        }
        Err(error) => {
            // Whoever asked may have gone.
            let _ = reply.send(Err(error));
        }
    }
}

fn attach(shared: &Arc<Shared>) -> Result<(Worker, gaur_nvme_ctrlr_info), Error> {
    let options = &shared.options;
    let device = || shared.name.clone();
    let endpoint = match &options.address {
        NvmeAddress::Pcie(_) => None,
        NvmeAddress::Fabric { host, port, .. } => Some(preflight::resolve(host, *port, &shared.name)?),
    };
    let transport_id = transport_id(&options.address, endpoint.as_ref());
    if let Some(endpoint) = &endpoint {
        preflight::check(endpoint, options, &shared.name)?;
    }
    let c_string = |text: &str| {
        CString::new(text).map_err(|_| Error::BadUri { uri: device(), why: "it contains NUL".to_owned() })
    };
    let transport_id = c_string(&transport_id)?;
    let host_nqn = options.host_nqn.as_deref().map(c_string).transpose()?;
    let opts = gaur_nvme_opts {
        transport_id: transport_id.as_ptr(),
        host_nqn: host_nqn.as_ref().map_or(std::ptr::null(), |nqn| nqn.as_ptr()),
        queue_entries: options.depth.saturating_add(1),
        keep_alive_ms: KEEP_ALIVE_MS,
        init_timeout_ms: if endpoint.is_some() { INIT_TIMEOUT_MS } else { 0 },
        header_digest: options.digest,
        data_digest: options.digest,
    };
    take_last_error();
    let sockets_before = endpoint.as_ref().map(|endpoint| watchdog::sockets(endpoint.address));
    let mut ctrlr = std::ptr::null_mut();
    let rc = {
        let _watchdog = endpoint.as_ref().map(|endpoint| {
            Watchdog::new_sockets(CALL_PATIENCE, endpoint.address, sockets_before.clone().unwrap_or_default())
        });
        // SAFETY: the environment is initialised (`Controller::get`), the strings live over the call.
        unsafe { gaur_nvme_attach(&opts, &mut ctrlr) }
    };
    let said = take_last_error().map(|said| format!(" ({said})")).unwrap_or_default();
    let ctrlr = match (rc, NonNull::new(ctrlr)) {
        (0, Some(ctrlr)) => ctrlr,
        (rc, _) if rc == -libc::EPROTONOSUPPORT => {
            let why = format!("this SPDK was built without that NVMe transport{said}");
            return Err(Error::Unavailable { device: device(), why });
        }
        _ if said.contains("claim") => return Err(Error::Busy { device: device() }),
        _ => return Err(not_attached(&options.address, device(), &said)),
    };
    let mut worker = Worker {
        shared: Arc::clone(shared),
        ctrlr,
        sockets: Vec::new(),
        endpoint,
        pcie: matches!(options.address, NvmeAddress::Pcie(_)),
        namespaces: Vec::new(),
        spare: Mutex::default(),
        clock: Duration::ZERO,
        last_turn: Instant::now(),
        last_round: Instant::now(),
        broken: false,
    };
    worker.note_sockets(&sockets_before.unwrap_or_default());
    worker.keep_namespaces();
    // SAFETY: all zeroes is a value of the structure; the call fills it.
    let info = unsafe {
        let mut info: gaur_nvme_ctrlr_info = std::mem::zeroed();
        gaur_nvme_get_ctrlr_info(ctrlr.as_ptr(), &mut info);
        info
    };
    shared.set_volatile_cache(info.volatile_cache);
    Ok((worker, info))
}

fn transport_id(address: &NvmeAddress, endpoint: Option<&Endpoint>) -> String {
    match (address, endpoint) {
        (NvmeAddress::Pcie(address), _) => format!("trtype:PCIe traddr:{address}"),
        (NvmeAddress::Fabric { kind, nqn, .. }, Some(Endpoint { address })) => format!(
            "trtype:{} adrfam:{} traddr:{} trsvcid:{} subnqn:{nqn}",
            match kind {
                crate::uri::Fabric::Tcp => "TCP",
                crate::uri::Fabric::Rdma => "RDMA",
            },
            if address.is_ipv4() { "IPv4" } else { "IPv6" },
            address.ip(),
            address.port()
        ),
        (NvmeAddress::Fabric { nqn, .. }, None) => format!("subnqn:{nqn}"),
    }
}

fn not_attached(address: &NvmeAddress, device: String, said: &str) -> Error {
    match address {
        NvmeAddress::Pcie(pci) => {
            let why = diagnose::pcie(pci).unwrap_or_else(|| {
                format!(
                    "SPDK cannot attach the controller at {pci}, and nothing seems to be in the way of it"
                )
            });
            Error::NotFound { device, why: format!("{why}{said}") }
        }
        NvmeAddress::Fabric { .. } => {
            let why = format!("the target answers, but SPDK cannot attach its controller{said}");
            Error::NotADevice { device, why }
        }
    }
}

struct Worker {
    shared: Arc<Shared>,
    ctrlr: NonNull<spdk_nvme_ctrlr>,
    /// The sockets of the admin queue (fabrics).
    sockets: Vec<i32>,
    endpoint: Option<Endpoint>,
    pcie: bool,
    namespaces: Vec<Arc<Namespace>>,
    /// Queue pairs of owners that are gone, with their depth (PCIe). 20.07 leaves the shadow doorbells of a queue pair that is
    /// freed as they are, and a new one in its place may then look full for ever; so they are used again.
    spare: Mutex<Vec<(NonNull<spdk_nvme_qpair>, u32)>>,
    /// The time of commands. It stands still while this thread waits for a reset or a connection: it cannot tell then which
    /// of the commands that others start are new.
    clock: Duration,
    last_turn: Instant,
    last_round: Instant,
    /// The controller was given up.
    broken: bool,
}

// SAFETY: made and used on the worker's thread; only moved within it.
unsafe impl Send for Worker {}

impl Worker {
    fn serve(&mut self, jobs: &Jobs) {
        loop {
            match jobs.recv_timeout(TICK) {
                Ok(Job::Stop { reply }) => {
                    self.detach();
                    let _ = reply.send(());
                    return;
                }
                Ok(job) => self.serve_one(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.detach(),
            }
            self.turn();
        }
    }

    fn serve_one(&mut self, job: Job) {
        // Whoever asked may have gone; then nobody hears the answer.
        match job {
            Job::Open { seat, reply } => {
                let opened = self.open(&seat);
                if opened.is_ok() {
                    self.shared.seats.lock().push(seat);
                }
                let _ = reply.send(opened);
            }
            Job::Describe { nsid, reply } => {
                let _ = reply.send(self.describe(nsid));
            }
            Job::Namespaces { reply } => {
                let _ = reply.send(self.active());
            }
            Job::Watch(namespace) => self.namespaces.push(namespace),
            Job::Reap | Job::Lost | Job::Stop { .. } => self.reap(),
        }
    }

    /// Connects a new seat; over a reset, if the controller was just lost.
    fn open(&mut self, seat: &Seat) -> Result<(), String> {
        self.reap();
        let began = Instant::now();
        while !self.broken {
            let result = self.connect(&mut seat.take());
            let enough = began.elapsed() >= self.shared.options.reconnect;
            if result.is_ok() || enough || !self.is_lost() {
                return result;
            }
            self.recover("a queue pair could not be connected");
        }
        Err("the controller is gone".to_owned())
    }

    /// Whether it is the controller's fault that a queue pair could not be connected.
    fn is_lost(&self) -> bool {
        let Some(endpoint) = &self.endpoint else { return false };
        // SAFETY: the controller is attached, and this thread the only one to use it.
        let rc = unsafe { spdk_nvme_ctrlr_process_admin_completions(self.ctrlr.as_ptr()) };
        rc < 0
            || self.shared.take_loss()
            || preflight::check(endpoint, &self.shared.options, &self.shared.name).is_err()
    }

    /// What is to be done every now and then.
    fn turn(&mut self) {
        self.clock += self.last_turn.elapsed().min(LONGEST_TURN);
        self.last_turn = Instant::now();
        let now = ((self.clock.as_millis() / TICK.as_millis()) as u32).wrapping_add(1).max(1);
        self.shared.set_clock(now);
        if self.broken {
            return;
        }
        // SAFETY: the controller is attached, and this thread the only one to use it.
        let rc = unsafe { spdk_nvme_ctrlr_process_admin_completions(self.ctrlr.as_ptr()) };
        if self.shared.take_loss() {
            self.recover("a queue pair has failed");
        } else if rc < 0 {
            self.recover("the admin queue has failed");
        } else if self.last_round.elapsed() >= ROUND {
            self.last_round = Instant::now();
            self.round(now);
        }
    }

    fn round(&mut self, now: u32) {
        self.reap();
        if self.is_removed() {
            return self.lose();
        }
        self.namespaces.retain(|namespace| Arc::strong_count(namespace) > 1);
        if self.check_timeouts(now) {
            self.recover("a command was not answered, and could not be aborted");
        }
    }

    /// Has commands aborted that take too long. True when one did not go in the same time again.
    fn check_timeouts(&self, now: u32) -> bool {
        let limit = (self.shared.options.timeout.as_millis() / TICK.as_millis()).max(1) as u32;
        let seats = self.shared.seats.lock();
        let mut stuck = false;
        for seat in seats.iter() {
            let inner = seat.take();
            let Some(qpair) = inner.qpair.filter(|_| !inner.closed) else { continue };
            // SAFETY: the seat is taken, and its owner there, so the slots are alive and nobody else uses them. What SPDK has
            // answered and nobody has polled is not late.
            let slots = unsafe {
                if inner.oldest_start().is_none_or(|began| now.wrapping_sub(began) < limit) {
                    continue;
                }
                spdk_nvme_qpair_process_completions(qpair.as_ptr(), 0);
                inner.slots.iter()
            };
            for slot in slots.filter(|slot| slot.started.get() != 0) {
                let age = now.wrapping_sub(slot.started.get());
                if age >= limit.saturating_mul(2) && slot.aborting.get() {
                    stuck = true;
                } else if age >= limit && !slot.aborting.replace(true) {
                    log::warn!("{}: a command is not answered for {age}0 ms; aborting it", self.shared.name);
                    // SAFETY: the seat is taken; the argument is that of a command in flight.
                    unsafe { gaur_nvme_abort(self.ctrlr.as_ptr(), qpair.as_ptr(), slot.argument()) };
                }
            }
        }
        stuck
    }

    /// SPDK must not take a namespace apart that others use. That one is gone they see at their next command.
    fn keep_namespaces(&self) {
        // SAFETY: the controller is attached and this thread's, and there are no queue pairs in use.
        let rc = unsafe { gaur_nvme_keep_namespaces(self.ctrlr.as_ptr(), KEEP_PATIENCE_MS) };
        if rc != 0 {
            log::warn!(
                "{}: the controller may change namespaces while they are in use ({rc})",
                self.shared.name
            );
        }
    }

    fn describe(&self, nsid: u32) -> Option<gaur_nvme_ns_info> {
        // SAFETY: the controller is attached and this thread's; all zeroes is a value of the structure.
        unsafe {
            let mut info: gaur_nvme_ns_info = std::mem::zeroed();
            (gaur_nvme_get_ns_info(self.ctrlr.as_ptr(), nsid, &mut info) == 0).then_some(info)
        }
    }

    fn active(&self) -> Vec<u32> {
        let mut active = Vec::new();
        // SAFETY: as above.
        let mut nsid = unsafe { spdk_nvme_ctrlr_get_first_active_ns(self.ctrlr.as_ptr()) };
        while nsid != 0 {
            active.push(nsid);
            // SAFETY: as above.
            nsid = unsafe { spdk_nvme_ctrlr_get_next_active_ns(self.ctrlr.as_ptr(), nsid) };
        }
        active
    }

    fn is_removed(&self) -> bool {
        // SAFETY: as above.
        self.pcie && unsafe { gaur_nvme_is_removed(self.ctrlr.as_ptr()) }
    }

    /// Opens the NVMe queue pair of a seat.
    fn connect(&self, inner: &mut Inner) -> Result<(), String> {
        let depth = inner.slots.len() as u32;
        let mut spare = self.spare.lock();
        if let Some(at) = spare.iter().position(|&(_, of)| of == depth) {
            let (qpair, _) = spare.swap_remove(at);
            drop(spare);
            // A reset may have gone over it.
            return self.unpark(inner, qpair).map_err(|setback| match setback {
                Setback::Again(why) | Setback::Final(why) => why,
            });
        }
        drop(spare);
        take_last_error();
        let qpair = {
            let _watchdog = self.watch_new_sockets();
            // SAFETY: the controller is attached and this thread's.
            unsafe { gaur_nvme_alloc_qpair(self.ctrlr.as_ptr(), depth + 1, SPARE_REQUESTS.max(4 * depth)) }
        };
        let said = || take_last_error().unwrap_or_else(|| "SPDK does not say why".to_owned());
        let qpair = NonNull::new(qpair).ok_or_else(said)?;
        self.seat_on(inner, qpair);
        Ok(())
    }

    fn seat_on(&self, inner: &mut Inner, qpair: NonNull<spdk_nvme_qpair>) {
        // SAFETY: the controller is attached and this thread's; the namespace was active when it was opened, and its structure
        // exists as long as the controller's.
        inner.ns = unsafe { spdk_nvme_ctrlr_get_ns(self.ctrlr.as_ptr(), inner.nsid) };
        inner.qpair = Some(qpair);
        inner.epoch = self.shared.epoch();
        inner.connection = inner.connection.wrapping_add(1);
    }

    /// Frees the queue pairs of seats whose owners are gone.
    fn reap(&self) {
        let mut seats = self.shared.seats.lock();
        seats.retain(|seat| {
            let mut inner = seat.take();
            let gone = inner.closed && inner.parked.is_none();
            if gone && let Some(qpair) = inner.qpair.take() {
                if self.pcie && !self.broken {
                    self.spare.lock().push((qpair, inner.slots.len() as u32));
                } else {
                    let _watchdog = self.watch_own_sockets();
                    free(qpair);
                }
            }
            !gone
        });
    }

    // ------------------------------------------------------------------------------------------------------------------
    // Losing the controller

    /// Brings the controller back, or gives it up.
    fn recover(&mut self, why: &str) {
        let shared = Arc::clone(&self.shared);
        log::warn!("{}: {why}; resetting the controller", shared.name);
        shared.begin_recovery();
        self.keep_off();
        let mut pause = FIRST_PAUSE;
        while shared.still_recovering() {
            if self.is_removed() {
                return self.lose();
            }
            match self.try_to_reset() {
                Ok(()) if shared.end_recovery() => {
                    // What was reported meanwhile is about the connections of before.
                    shared.take_loss();
                    log::warn!("{}: the controller is back", shared.name);
                    return;
                }
                Ok(()) => break,
                Err(Setback::Again(why)) => log::info!("{}: {why}; trying again", shared.name),
                Err(Setback::Final(why)) => return self.give_up(&why),
            }
            self.keep_off();
            thread::sleep(pause);
            pause = (pause * 2).min(LAST_PAUSE);
        }
        self.give_up("it did not come back in time");
    }

    /// Closes all queue pairs to their owners.
    fn keep_off(&self) {
        for seat in self.shared.seats.lock().iter() {
            let mut inner = seat.take();
            let Some(qpair) = inner.qpair.take() else { continue };
            if self.pcie {
                inner.parked = Some(qpair);
            } else {
                // Local: it closes the connection and answers what was in flight.
                free(qpair);
            }
        }
    }

    fn try_to_reset(&mut self) -> Result<(), Setback> {
        if let Some(endpoint) = &self.endpoint {
            preflight::check(endpoint, &self.shared.options, &self.shared.name)
                .map_err(|error| Setback::Again(error.to_string()))?;
        }
        if self.pcie {
            thread::sleep(QUIET);
        }
        take_last_error();
        let before = self.sockets_now();
        let rc = {
            let _watchdog = self.watch_new_sockets();
            // SAFETY: the controller is attached and this thread's, and all owners of queue pairs are kept off.
            unsafe { gaur_nvme_reset(self.ctrlr.as_ptr()) }
        };
        if rc != 0 {
            let said = take_last_error().unwrap_or_default();
            return Err(Setback::Again(format!("the reset failed ({rc}) {said}")));
        }
        self.note_sockets(&before);
        self.keep_namespaces();
        for namespace in &self.namespaces {
            match self.describe(namespace.nsid) {
                Some(now) if namespace.is_same(&now) => {}
                Some(_) => {
                    let nsid = namespace.nsid;
                    return Err(Setback::Final(format!("namespace {nsid} is another one now")));
                }
                None => namespace.set_gone(),
            }
        }
        let seats = self.shared.seats.lock();
        for seat in seats.iter() {
            let mut inner = seat.take();
            if inner.closed && inner.parked.is_none() {
                continue;
            }
            match inner.parked.take() {
                Some(qpair) => self.unpark(&mut inner, qpair)?,
                None => self.connect(&mut inner).map_err(Setback::Again)?,
            }
        }
        Ok(())
    }

    /// Gives a queue pair back that was there during the reset (PCIe).
    fn unpark(&self, inner: &mut Inner, qpair: NonNull<spdk_nvme_qpair>) -> Result<(), Setback> {
        // SAFETY: the seat is taken. The controller was reset, so it has forgotten the commands; this answers them.
        let connected = unsafe {
            spdk_nvme_qpair_process_completions(qpair.as_ptr(), 0);
            spdk_nvme_ctrlr_reconnect_io_qpair(qpair.as_ptr()) == 0
        };
        if connected {
            self.seat_on(inner, qpair);
            return Ok(());
        }
        free(qpair);
        self.connect(inner).map_err(Setback::Again)
    }

    /// Ends everything: the controller is gone for good.
    fn give_up(&mut self, why: &str) {
        log::error!("{}: the controller is gone: {why}", self.shared.name);
        self.broken = true;
        self.shared.set_gone();
        self.keep_off();
        // SAFETY: the controller is attached and this thread's, all owners are kept off. After this it cannot reach memory, and
        // SPDK does not wait for it.
        unsafe {
            gaur_nvme_revoke_dma(self.ctrlr.as_ptr());
            spdk_nvme_ctrlr_fail(self.ctrlr.as_ptr());
        }
        for seat in self.shared.seats.lock().iter() {
            if let Some(qpair) = seat.take().parked.take() {
                free(qpair);
            }
        }
        self.free_spare();
    }

    /// Gives up a controller that was pulled out.
    fn lose(&mut self) {
        // While the registers are covered, nobody may use them.
        self.broken = true;
        self.shared.set_gone();
        self.keep_off();
        // SAFETY: the controller is attached and this thread's, and all owners of queue pairs are kept off.
        unsafe { gaur_nvme_cover_registers(self.ctrlr.as_ptr()) };
        self.give_up("it was removed");
    }

    fn free_spare(&self) {
        for (qpair, _) in self.spare.lock().drain(..) {
            free(qpair);
        }
    }

    fn detach(&mut self) {
        self.shared.set_gone();
        self.reap();
        self.free_spare();
        let _watchdog = self.watch_own_sockets();
        // SAFETY: this thread's controller; its queue pairs were freed.
        unsafe { gaur_nvme_detach(self.ctrlr.as_ptr()) };
    }

    // ------------------------------------------------------------------------------------------------------------------
    // Sockets, so that no call waits for a silent target for ever

    fn sockets_now(&self) -> Vec<i32> {
        self.endpoint.as_ref().map(|endpoint| watchdog::sockets(endpoint.address)).unwrap_or_default()
    }

    /// The sockets that are there now and were not `before` belong to the admin queue.
    fn note_sockets(&mut self, before: &[i32]) {
        self.sockets = self.sockets_now();
        self.sockets.retain(|socket| !before.contains(socket));
    }

    fn watch_new_sockets(&self) -> Option<Watchdog> {
        let endpoint = self.endpoint.as_ref()?;
        Some(Watchdog::new_sockets(CALL_PATIENCE, endpoint.address, self.sockets_now()))
    }

    fn watch_own_sockets(&self) -> Option<Watchdog> {
        let endpoint = self.endpoint.as_ref()?;
        Some(Watchdog::sockets(CALL_PATIENCE, endpoint.address, self.sockets.clone()))
    }
}

/// Why a controller did not come back this time.
enum Setback {
    Again(String),
    Final(String),
}

impl Inner {
    /// When the oldest command was started that was not answered.
    ///
    /// # Safety
    /// The seat is taken and its owner alive.
    unsafe fn oldest_start(&self) -> Option<u32> {
        // SAFETY: as the caller promises.
        let slots = unsafe { self.slots.iter() };
        slots.map(|slot| slot.started.get()).filter(|&started| started != 0).min()
    }
}

fn free(qpair: NonNull<spdk_nvme_qpair>) {
    // SAFETY: the caller has taken the queue pair out of its seat. Commands that it still had are answered by this call.
    if unsafe { spdk_nvme_ctrlr_free_io_qpair(qpair.as_ptr()) } != 0 {
        log::warn!("SPDK did not free a queue pair");
    }
}
