//! Opening a file or block device: finding it (or creating it), opening it in the best way, keeping others out, and
//! finding out its geometry.
//!
//! 1. [`find`]: what is at the path; a file to be created is created empty and new.
//! 2. [`open_at`]: with `O_DIRECT` if wanted and possible, `O_EXCL` for a block device.
//! 3. [`Exclusive::take`]: nobody else has it.
//! 4. [`settle_size`]: a new file gets its size; an existing one must have what the URI says.
//! 5. [`geometry`]: block size, alignment, and whether `O_DIRECT` really works at that block size.
//! 6. A ring is set up and thrown away, so that a system without io_uring is noticed here.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64};
use std::time::Duration;

use super::FileDevice;
use super::lock::Exclusive;
use super::ops::MAX_PART;
use super::ring::Ring;
use crate::pool::{MapArenas, Pool, PoolOptions};
use crate::uri::{Direct, FileOptions};
use crate::{ClaimFlag, DmaBuf, DmaSource, Error, Geometry, OpenOptions};

/// A block device that was closed stays busy until a child process that was being forked then has executed its program:
/// how often and how long an open waits for that.
const BUSY_TRIES: usize = 5;
const BUSY_SLEEP: Duration = Duration::from_millis(5);

/// The parameters of an open, for messages and decisions.
struct Opening<'a> {
    name: &'a str,
    file: &'a FileOptions,
    options: &'a OpenOptions,
}

/// A file that was created and is removed again unless opening succeeds.
struct Created {
    path: PathBuf,
    keep: bool,
}

impl Drop for Created {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove {} again: {error}", self.path.display());
        }
    }
}

pub(super) fn open(name: &str, file: &FileOptions, options: &OpenOptions) -> Result<FileDevice, Error> {
    let opening = Opening { name, file, options };
    let mut created = opening.find()?;
    let block_device = opening.metadata()?.file_type().is_block_device();
    let (handle, mut direct) = opening.open_best(block_device)?;
    let metadata = handle.metadata().map_err(|error| opening.os("cannot inspect", error))?;
    opening.check_type(&metadata)?;
    let exclusive = Exclusive::take(name, &handle, &metadata, options.read_only).inspect_err(|_| {
        // Somebody else has our new file already: then it is theirs.
        if let Some(created) = &mut created {
            created.keep = true;
        }
    })?;
    let size = opening.settle_size(&handle, &metadata)?;
    let pool = Arc::new(Pool::new(MapArenas, PoolOptions::default()));
    let geometry = opening.geometry(&handle, &metadata, size, &mut direct, &pool)?;
    drop(Ring::new(name, 1)?);
    if let Some(created) = &mut created {
        opening.make_creation_durable(&handle)?;
        created.keep = true;
    }
    Ok(FileDevice {
        name: name.to_owned(),
        geometry,
        read_only: options.read_only,
        direct,
        block_device: metadata.file_type().is_block_device(),
        file: handle,
        pool,
        epoch: AtomicU64::new(0),
        zero_step: AtomicU8::new(0),
        claim: ClaimFlag::default(),
        _exclusive: exclusive,
    })
}

impl Opening<'_> {
    fn path(&self) -> &Path {
        &self.file.path
    }

    fn metadata(&self) -> Result<Metadata, Error> {
        fs::metadata(self.path()).map_err(|error| self.explain(error))
    }

    /// Looks at the path; creates the file if that is wanted and there is none.
    fn find(&self) -> Result<Option<Created>, Error> {
        match fs::metadata(self.path()) {
            Ok(metadata) => self.check_type(&metadata).map(|()| None),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.creates() => {
                self.create().map(Some)
            }
            Err(error) => Err(self.explain(error)),
        }
    }

    fn creates(&self) -> bool {
        self.options.create && self.file.size.is_some() && !self.options.read_only
    }

    fn create(&self) -> Result<Created, Error> {
        let new = fs::OpenOptions::new().read(true).write(true).create_new(true).open(self.path());
        match new {
            Ok(_) => Ok(Created { path: self.path().to_owned(), keep: false }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(self.not_a_device(
                "something that leads nowhere is in its place (a dangling link?), or somebody creates it just now",
            )),
            Err(error) => Err(self.explain(error)),
        }
    }

    fn check_type(&self, metadata: &Metadata) -> Result<(), Error> {
        let kind = metadata.file_type();
        if kind.is_file() || kind.is_block_device() {
            return Ok(());
        }
        let why = if kind.is_dir() {
            "it is a directory; name a file in it, as in file:DIR/disk.img?size=1GiB, or a block device"
        } else {
            "it is neither a regular file nor a block device"
        };
        Err(self.not_a_device(why))
    }

    /// Opens with `O_DIRECT` unless that is not wanted or, if it is left open, not possible: the file, and whether it is
    /// direct.
    fn open_best(&self, block_device: bool) -> Result<(File, bool), Error> {
        if self.file.direct != Direct::Off {
            match self.open_at(libc::O_DIRECT, block_device) {
                Ok(file) => return Ok((file, true)),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    self.give_up_direct("O_DIRECT")?
                }
                Err(error) => return Err(self.explain(error)),
            }
        }
        let file = self.open_at(0, block_device).map_err(|error| self.explain(error))?;
        Ok((file, false))
    }

    fn open_at(&self, flags: i32, block_device: bool) -> io::Result<File> {
        let exclusive = if block_device { libc::O_EXCL } else { 0 };
        let mut options = fs::OpenOptions::new();
        options.read(true).write(!self.options.read_only).custom_flags(flags | exclusive);
        for _ in 0..BUSY_TRIES {
            match options.open(self.path()) {
                Err(error) if block_device && error.raw_os_error() == Some(libc::EBUSY) => {
                    std::thread::sleep(BUSY_SLEEP);
                }
                result => return result,
            }
        }
        options.open(self.path())
    }

    /// Says that the page cache will be used, or fails if the URI forbids it.
    fn give_up_direct(&self, what: &str) -> Result<(), Error> {
        if self.file.direct == Direct::On {
            return Err(self.not_a_device(&format!(
                "its filesystem does not support {what}; use direct=auto or direct=off, or another block size"
            )));
        }
        log::info!("{}: its filesystem does not support {what}; going through the page cache", self.name);
        Ok(())
    }

    /// Size in bytes; a new or empty file gets the size of the URI.
    fn settle_size(&self, file: &File, metadata: &Metadata) -> Result<u64, Error> {
        let size = if metadata.is_file() {
            metadata.len()
        } else {
            end_of(file).map_err(|error| self.os("cannot find the size of", error))?
        };
        match self.file.size {
            Some(wanted) if size == wanted => Ok(size),
            Some(wanted) if size == 0 && metadata.is_file() && self.creates() => {
                file.set_len(wanted).map_err(|error| self.os("cannot set the size of", error))?;
                Ok(wanted)
            }
            Some(wanted) => Err(self.not_a_device(&format!(
                "it has {size} bytes, but the URI says size={wanted}; leave size= out, or remove the file first"
            ))),
            None if size == 0 => Err(self.not_a_device(
                "it is empty; to make it a device, give its size (file:PATH?size=1GiB) and open it with create",
            )),
            None => Ok(size),
        }
    }

    /// Finds out what the device is like; `direct` becomes false if `O_DIRECT` does not work after all.
    fn geometry(
        &self,
        file: &File,
        metadata: &Metadata,
        size: u64,
        direct: &mut bool,
        pool: &Arc<Pool<MapArenas>>,
    ) -> Result<Geometry, Error> {
        let queue = BlockQueue::of(metadata);
        let smallest = if metadata.is_file() { 512 } else { logical_block_size(file).unwrap_or(512) };
        let block_size = self.block_size(metadata, size, smallest)?;
        if *direct && !self.direct_works(file, block_size, pool)? {
            self.give_up_direct(&format!("O_DIRECT in blocks of {block_size} bytes"))?;
            clear_direct(file).map_err(|error| self.os("cannot leave O_DIRECT of", error))?;
            *direct = false;
        }
        let buffer_align = if *direct { memory_align(file).unwrap_or(block_size) } else { 512 };
        Ok(Geometry {
            buffer_align: buffer_align.clamp(512, 4096).next_power_of_two(),
            max_transfer: MAX_PART as u32,
            queue_depth: self.file.depth,
            volatile_cache: true,
            native_fua: queue.as_ref().is_some_and(|queue| queue.number("fua") == Some(1)),
            unmap: queue.is_none_or(|queue| queue.number("discard_max_bytes").is_some_and(|max| max > 0)),
            ..Geometry::new(block_size, size)
        })
    }

    fn block_size(&self, metadata: &Metadata, size: u64, smallest: u32) -> Result<u32, Error> {
        let fits = |block: &u32| *block >= smallest && size.is_multiple_of(u64::from(*block));
        match self.file.block_size {
            Some(block) if fits(&block) => Ok(block),
            Some(block) => Err(self.not_a_device(&format!(
                "block={block} does not fit: it has {size} bytes in blocks of at least {smallest}"
            ))),
            None if metadata.is_file() => [4096, 512].into_iter().find(fits).ok_or_else(|| {
                self.not_a_device(&format!("its size of {size} bytes is not a multiple of 512 bytes"))
            }),
            None if (512..=4096).contains(&smallest) => Ok(smallest),
            None => Err(self.not_a_device(&format!("its blocks of {smallest} bytes are larger than 4096"))),
        }
    }

    /// Reads one block: filesystems say only now that they need larger blocks.
    fn direct_works(&self, file: &File, block_size: u32, pool: &Arc<Pool<MapArenas>>) -> Result<bool, Error> {
        let source: Arc<dyn DmaSource> = Arc::clone(pool) as Arc<dyn DmaSource>;
        let buf = DmaBuf::new(&source, block_size as usize)?;
        loop {
            // SAFETY: the buffer is exclusively owned and holds `block_size` bytes.
            let read = unsafe { libc::pread(file.as_raw_fd(), buf.as_ptr().cast(), block_size as usize, 0) };
            if read >= 0 {
                return Ok(true);
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EINVAL) => return Ok(false),
                // A bad first block is no reason not to open the device.
                _ => return Ok(true),
            }
        }
    }

    /// A new file survives a crash only when its directory was written too.
    fn make_creation_durable(&self, file: &File) -> Result<(), Error> {
        let parent = match self.path().parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        file.sync_all()
            .and_then(|()| File::open(parent)?.sync_all())
            .map_err(|error| self.os("cannot make durable the creation of", error))
    }

    fn not_a_device(&self, why: &str) -> Error {
        Error::NotADevice { device: self.name.to_owned(), why: why.to_owned() }
    }

    fn os(&self, what: &'static str, source: io::Error) -> Error {
        Error::Os { what, device: self.name.to_owned(), source }
    }

    /// Turns a refusal to open into an error that says what to do.
    fn explain(&self, error: io::Error) -> Error {
        let device = self.name.to_owned();
        match error.raw_os_error() {
            Some(libc::ENOENT) => Error::NotFound { device, why: self.why_not_found().to_owned() },
            Some(libc::ENOTDIR) => {
                Error::NotFound { device, why: "a part of its path is not a directory".to_owned() }
            }
            Some(libc::EACCES | libc::EPERM) => {
                let why = if self.options.read_only {
                    "run as a user who may read it"
                } else {
                    "run as a user who may read and write it, or open it read-only"
                };
                Error::NotPermitted { device, why: why.to_owned() }
            }
            Some(libc::EROFS) => Error::NotPermitted {
                device,
                why: "its filesystem is mounted read-only; open it read-only, or mount it for writing"
                    .to_owned(),
            },
            Some(libc::EBUSY | libc::ETXTBSY) => Error::Busy { device },
            Some(libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM) => {
                self.not_a_device("there is no device or no medium behind it")
            }
            _ => self.os("cannot open", error),
        }
    }

    fn why_not_found(&self) -> &'static str {
        let parent = self.path().parent().filter(|parent| !parent.as_os_str().is_empty());
        if parent.is_some_and(|parent| !parent.is_dir()) {
            "its directory does not exist; create that first"
        } else if self.file.size.is_none() {
            "to create it, give its size (file:PATH?size=1GiB) and open it with create"
        } else {
            "to create it, open it with create (and not read-only)"
        }
    }
}

/// What sysfs says of the queue of a block device.
struct BlockQueue(PathBuf);

impl BlockQueue {
    fn of(metadata: &Metadata) -> Option<BlockQueue> {
        if !metadata.file_type().is_block_device() {
            return None;
        }
        let number = metadata.rdev();
        let device = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number)));
        let whole = device.join("queue");
        // A partition has no queue of its own; its directory lies in that of the whole disk.
        Some(BlockQueue(if whole.is_dir() { whole } else { device.join("../queue") }))
    }

    fn number(&self, attribute: &str) -> Option<u64> {
        fs::read_to_string(self.0.join(attribute)).ok()?.trim().parse().ok()
    }
}

fn end_of(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

fn logical_block_size(file: &File) -> Option<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the call writes one `int`.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut size) };
    (result == 0).then(|| u32::try_from(size).ok()).flatten()
}

/// Alignment in bytes of buffers for `O_DIRECT`, where the kernel tells it (Linux 6.1).
fn memory_align(file: &File) -> Option<u32> {
    // SAFETY: an all-zero `statx` is a valid value of plain integers.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, the path is an empty C string, and the call writes one `statx`.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat)
    };
    (result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_mem_align > 0)
        .then_some(stat.stx_dio_mem_align)
}

fn clear_direct(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open; the call takes and returns integers.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_DIRECT) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
