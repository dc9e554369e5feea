//! BlobFS as its users used it: a reactor that does all of it, and callers that sleep until it has answered.
//!
//! The reactor is an OS thread of ours that polls BlobFS's SPDK threads without a pause, as an SPDK reactor does; while nobody
//! measures it can be put to rest, so that it does not disturb the other side. Calls may only be made while it is awake: they
//! would wait for ever. So they are reached through [`Blobfs::awake`] alone.
//!
//! Invariant: the reactor's OS thread alone is ever inside of BlobFS's SPDK threads, from their making to their end.

use std::ffi::CString;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use spdk_sys::blobfs::{
    gaur_blobfs, gaur_blobfs_append, gaur_blobfs_cache_thread, gaur_blobfs_close, gaur_blobfs_exists,
    gaur_blobfs_file, gaur_blobfs_init, gaur_blobfs_open, gaur_blobfs_read, gaur_blobfs_sync,
    gaur_blobfs_unload,
};
use spdk_sys::config::gaur_wait;
use spdk_sys::thread::{gaur_thread_destroy, gaur_thread_poll, spdk_thread, spdk_thread_create};

use super::{REST_MS, inside};
use crate::Error;

/// How long making a filesystem, or taking it down, may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a resting reactor polls.
const NAP: Duration = Duration::from_millis(1);

/// What the reactor is to do.
const REST: u8 = 0;
const RUN: u8 = 1;
const STOP: u8 = 2;

/// A BlobFS on a bdev of its own. One at a time in a process.
pub struct Blobfs {
    fs: NonNull<gaur_blobfs>,
    order: Arc<AtomicU8>,
    reactor: Option<JoinHandle<()>>,
}

/// A filesystem on its way from the reactor to its owner.
struct SendFs(NonNull<gaur_blobfs>);

// SAFETY: the filesystem takes calls from any OS thread, as long as the reactor is polled.
unsafe impl Send for SendFs {}

/// A file of a [`Blobfs`] whose reactor is awake.
pub struct BlobfsFile<'a> {
    file: NonNull<gaur_blobfs_file>,
    delete: bool,
    _awake: &'a Awake<'a>,
}

/// A [`Blobfs`] whose reactor polls.
pub struct Awake<'a>(&'a Blobfs);

impl Blobfs {
    /// Makes an empty BlobFS with a cache of `cache_mib` MiB on the bdev `name`, whose content is lost; or with `load` takes the
    /// one that is there, with nothing in its cache. The reactor's OS thread
    /// inherits where the calling one may run.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the installed SPDK has no BlobFS, [`Error::Spdk`] when it does not come up.
    pub fn open(name: &str, load: bool, cache_mib: u64) -> Result<Blobfs, Error> {
        // SAFETY: takes nothing and returns a constant.
        if !unsafe { gaur_blobfs_exists() } {
            let why = format!("{} has no BlobFS", super::super::version());
            return Err(Error::Unavailable { device: name.to_owned(), why });
        }
        super::super::env::get(name)?;
        let refused = |why: String| Error::Spdk { what: format!("cannot make a BlobFS on '{name}'"), why };
        let bdev = CString::new(name).map_err(|error| refused(error.to_string()))?;
        let order = Arc::new(AtomicU8::new(REST));
        let (ready, made) = mpsc::sync_channel(1);
        let theirs = Arc::clone(&order);
        let reactor = thread::Builder::new()
            .name("gaur-blobfs".to_owned())
            .spawn(move || react(&bdev, load, cache_mib, &theirs, &ready))
            .map_err(|error| refused(error.to_string()))?;
        let made = made.recv().map_err(|_| refused("the reactor died".to_owned()))?;
        let SendFs(fs) = made.map_err(refused)?;
        Ok(Blobfs { fs, order, reactor: Some(reactor) })
    }

    /// Lets the reactor poll without a pause while `work` is done.
    pub fn awake<T>(&self, work: impl FnOnce(&Awake<'_>) -> T) -> T {
        // The reactor never waits for its orders to be seen, so no order of memory matters: calls go through SPDK's own queues.
        self.order.store(RUN, Ordering::Relaxed);
        let result = work(&Awake(self));
        self.order.store(REST, Ordering::Relaxed);
        result
    }
}

impl Drop for Blobfs {
    fn drop(&mut self) {
        self.order.store(STOP, Ordering::Relaxed);
        if let Some(reactor) = self.reactor.take() {
            // It has said in the log what went wrong.
            let _ = reactor.join();
        }
    }
}

impl Awake<'_> {
    /// Opens a file, which is created if there is none.
    ///
    /// # Errors
    /// BlobFS's error number, in words.
    pub fn open(&self, name: &str) -> Result<BlobfsFile<'_>, String> {
        let name = CString::new(name).map_err(|error| error.to_string())?;
        let mut rc = 0;
        // SAFETY: the filesystem is alive as long as `self`, its reactor is awake, and this OS thread is in no SPDK thread.
        let file = unsafe { gaur_blobfs_open(self.0.fs.as_ptr(), name.as_ptr(), &mut rc) };
        match NonNull::new(file) {
            Some(file) => Ok(BlobfsFile { file, delete: false, _awake: self }),
            None => Err(in_words(rc)),
        }
    }
}

impl BlobfsFile<'_> {
    /// Reads `buf.len()` bytes at byte `offset`; how many there were.
    ///
    /// # Errors
    /// BlobFS's error number, in words.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<usize, String> {
        // SAFETY: the file is open and used by this thread alone; the buffer is ours until the call returns.
        let read = unsafe {
            gaur_blobfs_read(self.file.as_ptr(), buf.as_mut_ptr().cast(), offset, buf.len() as u64)
        };
        usize::try_from(read).map_err(|_| in_words(read as i32))
    }

    /// Writes at the end of the file. What is not synced must fit into the cache: BlobFS of 20.07 crashes when it has no room.
    ///
    /// # Errors
    /// BlobFS's error number, in words.
    pub fn append(&mut self, data: &mut [u8]) -> Result<(), String> {
        // SAFETY: as above; BlobFS only reads from the buffer, and is done with it when the call returns.
        let rc =
            unsafe { gaur_blobfs_append(self.file.as_ptr(), data.as_mut_ptr().cast(), data.len() as u64) };
        if rc == 0 { Ok(()) } else { Err(in_words(rc)) }
    }

    /// Has the file deleted when it is closed.
    pub fn delete(mut self) {
        self.delete = true;
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// BlobFS's error number, in words.
    pub fn sync(&mut self) -> Result<(), String> {
        // SAFETY: as above.
        let rc = unsafe { gaur_blobfs_sync(self.file.as_ptr()) };
        if rc == 0 { Ok(()) } else { Err(in_words(rc)) }
    }
}

impl Drop for BlobfsFile<'_> {
    /// Closes the file.
    fn drop(&mut self) {
        // SAFETY: as above; nobody uses the file after this.
        let rc = unsafe { gaur_blobfs_close(self.file.as_ptr(), self.delete) };
        if rc != 0 {
            log::warn!("BlobFS cannot close a file: {}", in_words(rc));
        }
    }
}

fn in_words(rc: i32) -> String {
    format!("BlobFS says: {}", std::io::Error::from_raw_os_error(rc.saturating_neg()))
}

/// The reactor: makes the filesystem, polls until it is told to stop, takes the filesystem down.
fn react(
    bdev: &std::ffi::CStr,
    load: bool,
    cache_mib: u64,
    order: &AtomicU8,
    ready: &SyncSender<Result<SendFs, String>>,
) {
    // SAFETY: the environment is up; the name is copied.
    let thread = unsafe { spdk_thread_create(c"gaur-blobfs".as_ptr(), std::ptr::null_mut()) };
    let Some(thread) = NonNull::new(thread) else {
        let _ = ready.send(Err("no SPDK thread".to_owned()));
        return;
    };
    let mut polled = Polled { thread, cache: None };
    let wait = Wait::new();
    // SAFETY: inside the reactor; the name is terminated, and `wait` lives until it is done, or for ever.
    let fs = inside(thread, || unsafe { gaur_blobfs_init(bdev.as_ptr(), load, cache_mib, wait.0) });
    let Some(fs) = NonNull::new(fs) else {
        let _ = ready.send(Err(in_words(wait.rc())));
        return polled.end();
    };
    let up = wait.poll(&polled);
    if up != Some(0) {
        let why = up.map_or("it does not come up".to_owned(), in_words);
        // What is left of it is leaked: it cannot be known what may still be touched.
        let _ = ready.send(Err(why));
        return;
    }
    // SAFETY: looks through SPDK's list of threads, under its lock; the one that is found lives as long as the filesystem.
    polled.cache = NonNull::new(unsafe { gaur_blobfs_cache_thread() });
    // Its first message to itself makes the cache, which the first call needs.
    polled.once();
    if ready.send(Ok(SendFs(fs))).is_ok() {
        polled.until_stopped(order);
    }
    let wait = Wait::new();
    // SAFETY: inside the reactor; the owner is gone, and files are closed before it goes (they borrow it).
    inside(thread, || unsafe { gaur_blobfs_unload(fs.as_ptr(), wait.0) });
    match wait.poll(&polled) {
        Some(0) => polled.end(),
        Some(rc) => log::error!("BlobFS cannot be taken down: {}", in_words(rc)),
        None => log::error!("BlobFS cannot be taken down"),
    }
}

/// The SPDK threads that the reactor polls.
struct Polled {
    thread: NonNull<spdk_thread>,
    cache: Option<NonNull<spdk_thread>>,
}

impl Polled {
    fn once(&self) {
        for thread in [Some(self.thread), self.cache].into_iter().flatten() {
            // SAFETY: both are BlobFS's, which this OS thread alone is ever inside of.
            unsafe { gaur_thread_poll(thread.as_ptr()) };
        }
    }

    fn until_stopped(&self, order: &AtomicU8) {
        loop {
            match order.load(Ordering::Relaxed) {
                RUN => self.once(),
                STOP => return,
                _ => {
                    self.once();
                    thread::sleep(NAP);
                }
            }
        }
    }

    fn end(self) {
        for thread in [self.cache, Some(self.thread)].into_iter().flatten() {
            // SAFETY: nobody else uses the thread, and the filesystem that did is gone.
            if !unsafe { gaur_thread_destroy(thread.as_ptr(), REST_MS) } {
                log::error!("a thread of BlobFS did not come to rest and is leaked");
            }
        }
    }
}

/// A result that SPDK writes during a poll. Leaked when it never comes.
struct Wait(*mut gaur_wait);

impl Wait {
    fn new() -> Wait {
        Wait(Box::into_raw(Box::new(gaur_wait { done: false, rc: 0 })))
    }

    fn rc(&self) -> i32 {
        // SAFETY: never freed while this lives; SPDK writes it inside polls of this OS thread only.
        unsafe { (*self.0).rc }
    }

    /// Polls until it is done; `None` when that takes too long.
    fn poll(self, polled: &Polled) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        // SAFETY: as above. Volatile: it changes in the poll, out of sight.
        while !unsafe { (&raw const (*self.0).done).read_volatile() } {
            polled.once();
            if Instant::now() >= deadline {
                return None;
            }
        }
        // SAFETY: it came from `into_raw`, and SPDK is done with it.
        Some(unsafe { Box::from_raw(self.0) }.rc)
    }
}
