//! The conformance suite: what every device must do, whatever is behind it.
//!
//! A [`Target`] says how one medium is opened; every case gets one of its own from a factory, so cases may run in one
//! process, one after another or in parallel (a backend that has only one medium lets its factory wait until the last
//! target is dropped: see `Target::keep`). [`CASES`] lists them all; [`run`] runs one under a time limit, and the
//! `conformance!` macro makes a test of each.
//!
//! Nothing is assumed of the initial content. Randomised parts print their seed and take `GAUR_SEED`.

// Each test binary uses what it needs; a panic is how a test fails.
#![allow(dead_code, clippy::unwrap_used)]

pub(crate) mod bad_input;
pub(crate) mod basic;
pub(crate) mod lifecycle;
pub(crate) mod load;

use std::any::Any;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bdev_adapter::{
    Completion, Device, DmaBuf, DmaSource, Error, IoErrorKind, OpenOptions, QueuePair, RawDma, Request,
};

/// Time that a case may take; a hang is a failure.
const LIMIT: Duration = Duration::from_secs(240);

type Opener = Box<dyn Fn(&OpenOptions) -> Result<Arc<dyn Device>, Error> + Send + Sync>;

/// One medium under test, of 32 MiB or more.
pub(crate) struct Target {
    /// Opens the medium.
    pub(crate) open: Opener,
    /// Opening again (after closing) finds the same content, and a second open meanwhile is refused.
    pub(crate) persistent: bool,
    /// Buffers of other devices work too.
    pub(crate) foreign_buffers: bool,
    /// What must live as long as the target (temporary directory, lock).
    pub(crate) keep: Box<dyn Any + Send + Sync>,
}

impl Target {
    /// Opens the medium for reading and writing.
    pub(crate) fn device(&self) -> Arc<dyn Device> {
        (self.open)(&OpenOptions::new().create(true)).expect("the target opens")
    }
}

/// A case of the suite.
pub(crate) type Case = fn(&Target);

/// Makes a list of cases, and a macro that turns each into a test.
macro_rules! cases {
    ($($module:ident::$name:ident),* $(,)?) => {
        /// All cases by name.
        pub(crate) const CASES: &[(&str, Case)] = &[$((stringify!($name), $module::$name)),*];

        /// `conformance!(module, factory)`: a module with a test for each case, on targets of `factory`.
        #[macro_export]
        macro_rules! conformance {
            ($target:ident, $factory:expr) => {
                mod $target {
                    $(#[test]
                    fn $name() {
                        $crate::suite::run(stringify!($name), $crate::suite::$module::$name, $factory);
                    })*
                }
            };
        }
    };
}

cases! {
    basic::geometry_is_sane,
    basic::every_kind,
    basic::sizes_from_a_block_to_8_mib,
    basic::scatter_lists,
    basic::flush_epochs,
    basic::deadlines,
    basic::waiting,
    basic::buffers_of_another_device,
    bad_input::misaligned,
    bad_input::out_of_range,
    bad_input::bad_lengths,
    bad_input::read_only,
    load::depth_beyond_the_limit,
    load::two_queue_pairs_from_two_threads,
    load::random_operations,
    lifecycle::many_queue_pairs,
    lifecycle::moved_between_threads,
    lifecycle::teardown_with_io_in_flight,
    lifecycle::exclusive_open,
    lifecycle::content_survives_reopening,
    lifecycle::claim,
}

/// Runs a case on a target of its own, under the time limit.
pub(crate) fn run(name: &'static str, case: Case, factory: impl FnOnce() -> Target + Send + 'static) {
    let (done, finished) = mpsc::channel();
    let started = Instant::now();
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let target = factory();
            case(&target);
            drop(target);
            // The receiver is gone when the time limit has passed already.
            let _ = done.send(());
        })
        .unwrap();
    match finished.recv_timeout(LIMIT) {
        Ok(()) => thread.join().unwrap(),
        Err(mpsc::RecvTimeoutError::Timeout) => {
            panic!("{name} hangs: not done after {:?}", started.elapsed())
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().expect_err("it did not finish"))
        }
    }
}

/// The seed of a randomised case.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("GAUR_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
    });
    println!("GAUR_SEED={seed}");
    seed
}

/// A queue pair with what a case needs around it.
pub(crate) struct Io {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) queue_pair: Box<dyn QueuePair>,
    pub(crate) dma: Arc<dyn DmaSource>,
    pub(crate) completions: Vec<Completion>,
}

impl Io {
    pub(crate) fn new(device: &Arc<dyn Device>) -> Io {
        let queue_pair = Arc::clone(device).queue_pair().expect("a queue pair");
        Io { device: Arc::clone(device), queue_pair, dma: device.dma(), completions: Vec::new() }
    }

    pub(crate) fn block(&self) -> usize {
        self.device.geometry().block_size as usize
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.device.geometry().capacity
    }

    pub(crate) fn buffer(&self, len: usize) -> DmaBuf {
        DmaBuf::new(&self.dma, len).expect("a buffer")
    }

    pub(crate) fn filled(&self, len: usize, seed: u64) -> DmaBuf {
        let mut buf = self.buffer(len);
        fill(&mut buf, seed);
        buf
    }

    /// Submits one request and waits for its answer.
    pub(crate) fn run(&mut self, request: Request) -> Completion {
        let tag = request.tag;
        assert_eq!(self.queue_pair.outstanding(), 0);
        self.queue_pair.submit(request);
        assert_eq!(self.queue_pair.outstanding(), 1);
        self.drain();
        assert_eq!(self.completions.len(), 1, "one answer");
        let completion = self.completions.pop().unwrap();
        assert_eq!(completion.tag, tag);
        completion
    }

    /// Submits a request that must succeed.
    pub(crate) fn ok(&mut self, request: Request) -> Completion {
        let completion = self.run(request);
        if let Err(error) = &completion.result {
            panic!("{error}");
        }
        completion
    }

    /// Submits a request that must fail, and checks that its buffers come back.
    pub(crate) fn fails(&mut self, request: Request) -> IoErrorKind {
        let before: Vec<_> = request.bufs.as_slice().iter().map(|buf| (buf.as_ptr(), buf.len())).collect();
        let (offset, len, op) = (request.offset, request.len, request.kind.name());
        let completion = self.run(request);
        let after: Vec<_> = completion.bufs.as_slice().iter().map(|buf| (buf.as_ptr(), buf.len())).collect();
        assert_eq!(before, after, "the buffers come back as they were");
        let error = completion.result.expect_err("the request must fail");
        assert_eq!((error.offset, error.len, error.op), (offset, len, op));
        error.kind
    }

    /// Polls until everything is answered.
    pub(crate) fn drain(&mut self) {
        while self.queue_pair.outstanding() > 0 {
            let before = self.queue_pair.outstanding();
            let count = self.queue_pair.poll(&mut self.completions);
            assert_eq!(self.queue_pair.outstanding(), before - count, "outstanding and answers disagree");
            if count == 0 {
                self.queue_pair.wait(Duration::from_millis(50));
            }
        }
    }

    pub(crate) fn write(&mut self, offset: u64, len: usize, seed: u64) {
        let buf = self.filled(len, seed);
        self.ok(Request::write(offset, buf, seed));
    }

    pub(crate) fn read(&mut self, offset: u64, len: usize) -> DmaBuf {
        let mut buf = self.buffer(len);
        buf.fill(0xA5);
        self.ok(Request::read(offset, buf, 0)).bufs.into_one().expect("the buffer comes back")
    }

    pub(crate) fn verify(&mut self, offset: u64, len: usize, seed: u64) {
        let buf = self.read(offset, len);
        assert!(is_filled(&buf, seed), "wrong content at {offset}, {len} bytes");
    }
}

/// Fills a buffer with bytes that depend on the seed and the place; any wrong byte is noticed.
pub(crate) fn fill(buf: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for word in buf.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&(state ^ state >> 29).to_le_bytes()[..word.len()]);
    }
}

pub(crate) fn is_filled(buf: &[u8], seed: u64) -> bool {
    let mut expected = vec![0; buf.len()];
    fill(&mut expected, seed);
    expected == buf
}

/// A source that counts what is out, so that a case sees leaked buffers.
pub(crate) struct Tracked {
    inner: Arc<dyn DmaSource>,
    live: AtomicIsize,
}

impl Tracked {
    pub(crate) fn new(inner: Arc<dyn DmaSource>) -> Arc<Tracked> {
        Arc::new(Tracked { inner, live: AtomicIsize::new(0) })
    }

    pub(crate) fn live(&self) -> isize {
        self.live.load(Ordering::SeqCst)
    }
}

// SAFETY: passes the promises of the inner source on; allocations go back to where they came from.
unsafe impl DmaSource for Tracked {
    fn allocate(&self, len: usize) -> Result<RawDma, Error> {
        let raw = self.inner.allocate(len)?;
        self.live.fetch_add(1, Ordering::SeqCst);
        Ok(raw)
    }

    unsafe fn release(&self, raw: RawDma) {
        self.live.fetch_sub(1, Ordering::SeqCst);
        // SAFETY: `raw` came from `allocate`, which took it from the inner source.
        unsafe { self.inner.release(raw) }
    }
}
