//! Tests of what is particular to files; what every device does is in the conformance suite.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::*;
use crate::blocking::BlockingIo;
use crate::{DmaBuf, open};

fn dir() -> TempDir {
    crate::test_util::limit_time();
    tempfile::tempdir().unwrap()
}

fn create() -> OpenOptions {
    OpenOptions::new().create(true)
}

fn uri(path: &Path, options: &str) -> String {
    format!("file:{}{options}", path.display())
}

fn device(path: &Path, options: &str) -> Arc<FileDevice> {
    let uri = uri(path, options);
    let parsed = crate::uri::DeviceUri::parse(&uri).unwrap();
    let crate::uri::Backend::File(file) = parsed.backend() else { panic!("no file: {uri}") };
    FileDevice::open(&uri, file, &create()).unwrap()
}

fn refused(uri: &str, options: &OpenOptions) -> Error {
    open(uri, options).expect_err("it must not open")
}

fn blocking(device: &Arc<FileDevice>) -> BlockingIo {
    BlockingIo::new(&(Arc::clone(device) as Arc<dyn Device>)).unwrap()
}

#[test]
fn every_wrong_path_says_what_to_do() {
    let dir = dir();
    let at = |name: &str| dir.path().join(name);
    let existing = OpenOptions::default();

    std::fs::write(at("empty"), b"").unwrap();
    std::fs::write(at("odd"), [1; 700]).unwrap();
    std::fs::write(at("small"), [1; 8192]).unwrap();
    std::os::unix::net::UnixListener::bind(at("socket")).unwrap();

    // Path, options of the URI, how it is opened, what the message must say.
    let table = [
        ("missing", "", &existing, "give its size"),
        ("missing", "?size=1MiB", &existing, "open it with create"),
        ("missing", "", &create(), "give its size"),
        ("missing", "?size=1MiB", &create().read_only(true), "not read-only"),
        ("no/such/dir", "?size=1MiB", &create(), "create that first"),
        ("small/file", "?size=1MiB", &create(), "not a directory"),
        ("", "", &existing, "is a directory"),
        ("socket", "", &existing, "neither a regular file nor a block device"),
        ("empty", "", &existing, "it is empty"),
        ("empty", "", &create(), "it is empty"),
        ("empty", "?size=1MiB", &existing, "has 0 bytes"),
        ("odd", "", &existing, "not a multiple of 512"),
        ("small", "?size=16384", &create(), "it has 8192 bytes"),
        ("small", "?size=4096", &existing, "it has 8192 bytes"),
    ];
    for (name, uri_options, options, expected) in table {
        let error = refused(&uri(&at(name), uri_options), options);
        let message = error.to_string();
        assert!(message.contains(expected), "{name}{uri_options}: '{message}' does not say '{expected}'");
        assert!(matches!(error, Error::NotFound { .. } | Error::NotADevice { .. }), "{error:?}");
    }
    assert!(!at("missing").exists());
    assert_eq!(std::fs::metadata(at("small")).unwrap().len(), 8192, "nothing grows");
    let error = refused("file:/dev/null", &existing);
    assert!(matches!(error, Error::NotADevice { .. }), "{error}");
}

#[test]
fn no_permission() {
    // Root may open anything: try as nobody, in a thread of its own (file system ids are per thread).
    let dir = dir();
    let path = dir.path().join("secret");
    std::fs::write(&path, [0; 8192]).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    std::thread::spawn(move || {
        // SAFETY: changes the identity of this thread for file access only.
        unsafe { libc::setfsuid(65534) };
        let error = refused(&uri(&path, ""), &OpenOptions::default());
        assert!(matches!(error, Error::NotPermitted { .. }), "{error:?}");
        assert!(error.to_string().contains("read-only"), "{error}");
        open(&uri(&path, ""), &OpenOptions::new().read_only(true)).expect("reading is allowed");
    })
    .join()
    .unwrap();
}

#[test]
fn create_makes_a_sparse_file_once() {
    use std::os::unix::fs::MetadataExt;
    let dir = dir();
    let path = dir.path().join("disk.img");
    let first = device(&path, "?size=1TiB");
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), 1 << 40);
    assert!(metadata.blocks() < 1000, "sparse");
    blocking(&first).write((1 << 40) - 4096, &[5; 4096]).unwrap();
    drop(first);
    let again = device(&path, "?size=1TiB");
    let mut bytes = [0; 4096];
    blocking(&again).read((1 << 40) - 4096, &mut bytes).unwrap();
    assert_eq!(bytes, [5; 4096]);
    assert_eq!(again.geometry().capacity, 1 << 40);
}

#[test]
fn a_failed_creation_leaves_nothing() {
    let dir = dir();
    let path = dir.path().join("disk.img");
    let error = refused(&uri(&path, "?size=16777215TiB"), &create());
    assert!(matches!(error, Error::Os { .. }), "{error:?}");
    assert!(!path.exists());
}

#[test]
fn exclusive_by_any_path_and_shared_for_readers() {
    let dir = dir();
    let path = dir.path().join("disk.img");
    drop(device(&path, "?size=1MiB"));
    let link = dir.path().join("link");
    std::fs::hard_link(&path, &link).unwrap();
    let reader = OpenOptions::new().read_only(true);
    let first = open(&uri(&path, ""), &reader).unwrap();
    let second = open(&uri(&link, ""), &reader).unwrap();
    assert!(matches!(refused(&uri(&link, ""), &OpenOptions::default()), Error::Busy { .. }));
    drop((first, second));
    let writer = open(&uri(&path, ""), &OpenOptions::default()).unwrap();
    assert!(matches!(refused(&uri(&link, ""), &reader), Error::Busy { .. }));
    drop(writer);
    // Another process that holds the lock.
    let other = std::fs::File::open(&path).unwrap();
    // SAFETY: the descriptor is open. A lock of another open file description is like one of another process.
    assert_eq!(unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_EX) }, 0);
    assert!(matches!(refused(&uri(&path, ""), &OpenOptions::default()), Error::Busy { .. }));
}

#[test]
fn block_sizes_and_direct() {
    let dir = dir();
    let path = dir.path().join("disk.img");
    assert_eq!(device(&path, "?size=1MiB").geometry().block_size, 4096);
    assert_eq!(device(&path, "?block=512").geometry().block_size, 512);
    let odd = dir.path().join("odd.img");
    assert_eq!(device(&odd, "?size=1050112").geometry().block_size, 512);
    let message = refused(&uri(&odd, "?block=4096"), &OpenOptions::default()).to_string();
    assert!(message.contains("multiple of the block size") || message.contains("does not fit"), "{message}");
    assert!(!device(&path, "?direct=off").is_direct());
    let buffered = device(&path, "?direct=auto");
    let direct = buffered.is_direct();
    drop(buffered);
    match open(&uri(&path, "?direct=on"), &OpenOptions::default()) {
        Ok(_) => assert!(direct),
        Err(error) => assert!(!direct && error.to_string().contains("direct=auto"), "{error}"),
    }
}

/// A lock used to outlive its device for a moment when another thread was forking a child just then: the child had the
/// descriptor until it executed its program, and opening again at once said Busy.
#[test]
fn children_of_the_process_do_not_keep_the_lock() {
    let dir = dir();
    let path = dir.path().join("disk.img");
    drop(device(&path, "?size=1MiB"));
    let stop = std::sync::atomic::AtomicBool::new(false);
    let refused = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                Command::new("true").status().unwrap();
            }
        });
        let refused = (0..300).find_map(|_| open(&uri(&path, ""), &OpenOptions::default()).err());
        stop.store(true, Ordering::Relaxed);
        refused
    });
    assert!(refused.is_none(), "{refused:?}");
}

/// Zeroes must be zeroes whatever way of writing them the filesystem has.
#[test]
fn every_way_of_writing_zeroes() {
    let dir = dir();
    for (step, options) in [(0, ""), (1, ""), (2, ""), (2, "&direct=off&block=512&depth=2")] {
        let device = device(&dir.path().join("disk.img"), &format!("?size=16MiB{options}"));
        device.zero_step.store(step, Ordering::Relaxed);
        let mut io = blocking(&device);
        io.write(0, &vec![0xEE; 16 << 20]).unwrap();
        let (start, len) = (4096u64, (9 << 20) + 8192u64);
        io.write_zeroes(start, len).unwrap();
        let fua = io.run(Request::write_zeroes(12 << 20, 4096, 1).with_hints(crate::Hints::fua()));
        fua.result.unwrap();
        let mut bytes = vec![1; 16 << 20];
        io.read(0, &mut bytes).unwrap();
        for (at, byte) in bytes.iter().enumerate() {
            let at = at as u64;
            let zero = (start..start + len).contains(&at) || (12 << 20..(12 << 20) + 4096).contains(&at);
            assert_eq!(*byte, if zero { 0 } else { 0xEE }, "byte {at}, way {step}");
        }
    }
}

#[test]
fn an_unsupported_fallocate_is_replaced() {
    let dir = dir();
    let device = device(&dir.path().join("disk.img"), "?size=1MiB");
    let mut op = Op::new(Request::write_zeroes(0, 4096, 1), device.zero_step());
    assert_eq!(device.other_way(&op, libc::EIO), None);
    assert_eq!(device.other_way(&op, libc::EOPNOTSUPP), Some(Ok(Step::Allocate(PUNCH))));
    assert_eq!(device.zero_step(), Step::Allocate(PUNCH));
    op.start_step(Step::Allocate(PUNCH));
    assert_eq!(device.other_way(&op, libc::EOPNOTSUPP), Some(Ok(Step::WriteZeroes)));
    assert_eq!(device.zero_step(), Step::WriteZeroes);
    op.start_step(Step::WriteZeroes);
    assert_eq!(device.other_way(&op, libc::EOPNOTSUPP), None);
    let unmap = Op::new(Request::unmap(0, 4096, 1), Step::Allocate(PUNCH));
    assert_eq!(device.other_way(&unmap, libc::EOPNOTSUPP), Some(Err(())));
}

/// A failed `fdatasync` may have thrown dirty pages away, and the next one would say Ok: flushes of that epoch must go
/// on failing.
#[test]
fn a_failed_flush_begins_an_epoch() {
    let dir = dir();
    let device = device(&dir.path().join("disk.img"), "?size=1MiB");
    let mut io = blocking(&device);
    io.write(0, &[1; 4096]).unwrap();
    device.note_failure(&Op::new(Request::write(0, crate::Segments::None, 0), Step::Transfer), libc::EIO);
    assert_eq!(device.epoch(), 0, "a failed plain write loses nothing else");
    device.note_failure(&Op::new(Request::flush(0, 1), Step::Sync), libc::EIO);
    assert_eq!(device.epoch(), 1);
    let error = io.flush().unwrap_err();
    assert_eq!(error.kind, IoErrorKind::EpochLost { expected: 0, now: 1 });
    io.write(0, &[1; 4096]).unwrap();
    io.flush().unwrap();
}

#[test]
fn truncation_under_the_device_is_an_error() {
    let dir = dir();
    let path = dir.path().join("disk.img");
    let device = device(&path, "?size=1MiB");
    let mut io = blocking(&device);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(512 << 10).unwrap();
    let mut bytes = vec![0; 64 << 10];
    let error = io.read(480 << 10, &mut bytes).unwrap_err();
    assert_eq!(error.kind, IoErrorKind::Os(libc::EIO));
    io.read(0, &mut bytes).unwrap();
}

#[test]
fn without_io_uring_there_is_a_clear_error() {
    for (errno, expected) in [(libc::EPERM, "kernel.io_uring_disabled"), (libc::ENOSYS, "Linux 5.11")] {
        let dir = dir();
        let path = dir.path().join("disk.img");
        std::thread::spawn(move || {
            forbid_io_uring(errno);
            let error = refused(&uri(&path, "?size=1MiB"), &create());
            assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
            assert!(error.to_string().contains(expected), "{error}");
            assert!(!path.exists(), "a file that was created for nothing is removed");
        })
        .join()
        .unwrap();
    }
}

/// A seccomp filter for this thread: `io_uring_setup` fails with `errno`, everything else is allowed.
fn forbid_io_uring(errno: i32) {
    let filter = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        // Load the system call number; if it is the one, return the error, else allow.
        filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program is valid and lives through the call, which binds this thread only.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

/// With little lockable memory the first arenas are registered and the rest is used as it is.
#[test]
fn the_locked_memory_limit_is_survived() {
    let dir = dir();
    let path = dir.path().join("disk.img");
    let device = device(&path, "?size=64MiB");
    std::thread::spawn(move || {
        drop_capabilities();
        let limit = libc::rlimit { rlim_cur: 3 << 20, rlim_max: 3 << 20 };
        let mut old = limit;
        // SAFETY: both structures live through the calls. Other tests are served by either way.
        unsafe {
            libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut old);
            let soft = libc::rlimit { rlim_cur: limit.rlim_cur.min(old.rlim_max), rlim_max: old.rlim_max };
            libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const soft);
        }
        let mut queue_pair = FileQueuePair::new(Arc::clone(&device)).unwrap();
        let source: Arc<dyn DmaSource> = device.dma();
        let mut bufs: Vec<_> = (0..24).map(|_| DmaBuf::new(&source, 1 << 20).unwrap()).collect();
        for (number, buf) in bufs.iter_mut().enumerate() {
            buf.fill(number as u8);
        }
        for (tag, buf) in bufs.into_iter().enumerate() {
            queue_pair.submit(Request::write((tag as u64) << 20, buf, tag as u64));
        }
        let mut completions = Vec::new();
        while queue_pair.outstanding() > 0 {
            queue_pair.poll(&mut completions);
            queue_pair.wait(std::time::Duration::from_millis(10));
        }
        assert!(completions.iter().all(|completion| completion.result.is_ok()));
        assert!(queue_pair.registered_arenas() < 12, "{}", queue_pair.registered_arenas());
        for number in 0..24u8 {
            let mut bytes = vec![0; 1 << 20];
            blocking(&device).read(u64::from(number) << 20, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == number));
        }
        // SAFETY: as above.
        unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const old) };
    })
    .join()
    .unwrap();
}

/// Takes all capabilities from this thread, CAP_IPC_LOCK among them.
fn drop_capabilities() {
    // `struct __user_cap_header_struct` of version 3 for this thread, and two empty `__user_cap_data_struct`.
    let header = [0x2008_0522u32, 0];
    let nothing = [0u32; 6];
    // SAFETY: the kernel reads the two structures, which live through the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), nothing.as_ptr()) };
    assert_eq!(result, 0);
}

#[test]
fn arenas_are_registered_and_unregistered() {
    let dir = dir();
    let device = device(&dir.path().join("disk.img"), "?size=16MiB");
    let mut queue_pair = FileQueuePair::new(Arc::clone(&device)).unwrap();
    let source: Arc<dyn DmaSource> = device.dma();
    let mut write = |bufs: Vec<DmaBuf>| {
        for buf in bufs {
            queue_pair.submit(Request::write(0, buf, 0));
        }
        let mut completions = Vec::new();
        while queue_pair.outstanding() > 0 {
            queue_pair.poll(&mut completions);
        }
        assert!(completions.iter().all(|completion| completion.result.is_ok()));
        queue_pair.registered_arenas()
    };
    let bufs = |count| (0..count).map(|_| DmaBuf::new(&source, 1 << 20).unwrap()).collect::<Vec<_>>();
    let registered = write(bufs(8));
    if registered < 2 {
        println!("SKIPPED: hardly any memory may be locked (ulimit -l): {registered} arenas registered");
        return;
    }
    device.pool.trim();
    assert_eq!(write(bufs(1)), 1, "arenas that went back to the system are unregistered");
}

/// Memory of its own under the token of somebody else's arena.
struct Impostor {
    inner: Pool<MapArenas>,
    token: u64,
    tokens: parking_lot::Mutex<Vec<(usize, u64)>>,
}

// SAFETY: memory and release are those of the inner pool; only the token is another while the buffer is out.
unsafe impl DmaSource for Impostor {
    fn allocate(&self, len: usize) -> Result<crate::RawDma, Error> {
        let raw = self.inner.allocate(len)?;
        self.tokens.lock().push((raw.ptr.as_ptr() as usize, raw.token));
        Ok(crate::RawDma { token: self.token, ..raw })
    }

    unsafe fn release(&self, raw: crate::RawDma) {
        let address = raw.ptr.as_ptr() as usize;
        let token = self.tokens.lock().iter().rfind(|(at, _)| *at == address).unwrap().1;
        // SAFETY: the allocation goes back with the token it came with.
        unsafe { self.inner.release(crate::RawDma { token, ..raw }) }
    }
}

#[test]
fn a_buffer_with_a_foreign_token_is_not_taken_for_a_registered_one() {
    let dir = dir();
    let device = device(&dir.path().join("disk.img"), "?size=1MiB");
    let mut io = blocking(&device);
    let mut own = io.buffer(4096).unwrap();
    own.fill(1);
    let own = io.run(Request::write(0, own, 0)).bufs.into_one().unwrap();
    let inner = Pool::new(MapArenas, Default::default());
    let impostor: Arc<dyn DmaSource> =
        Arc::new(Impostor { inner, token: own.token(), tokens: Default::default() });
    let mut foreign = DmaBuf::new(&impostor, 4096).unwrap();
    foreign.fill(2);
    io.run(Request::write(0, foreign, 0)).result.unwrap();
    let mut bytes = [0; 4096];
    io.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [2; 4096]);
}

/// A loop device over a file, for as long as it lives.
struct Loop(PathBuf);

impl Loop {
    /// None, with a message, where loop devices cannot be had.
    fn over(backing: &Path) -> Option<Loop> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(backing).output();
        match output {
            Ok(output) if output.status.success() => {
                Some(Loop(String::from_utf8(output.stdout).unwrap().trim().into()))
            }
            other => {
                println!("SKIPPED: no loop device (needs root and losetup): {other:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup").arg("--detach").arg(&self.0).status().unwrap();
    }
}

#[test]
fn a_block_device_is_exclusive_and_can_discard() {
    let dir = dir();
    let backing = dir.path().join("backing");
    std::fs::File::create(&backing).unwrap().set_len(16 << 20).unwrap();
    let Some(disk) = Loop::over(&backing) else { return };
    let first = device(&disk.0, "");
    assert!(first.is_direct());
    assert_eq!(first.geometry().block_size, 512);
    assert!(matches!(refused(&uri(&disk.0, ""), &OpenOptions::default()), Error::Busy { .. }));
    // What another process sees: the kernel refuses an exclusive open.
    let exclusive = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&disk.0);
    assert_eq!(exclusive.unwrap_err().raw_os_error(), Some(libc::EBUSY));
    let mut io = blocking(&first);
    io.write(0, &vec![0xEE; 4 << 20]).unwrap();
    io.unmap(0, 1 << 20).unwrap();
    io.write_zeroes(1 << 20, 1 << 20).unwrap();
    first.discard(&Request::unmap(3 << 20, 1 << 20, 0));
    io.flush().unwrap();
    let mut bytes = vec![1; 4 << 20];
    io.read(0, &mut bytes).unwrap();
    assert!(bytes[1 << 20..2 << 20].iter().all(|byte| *byte == 0));
    assert!(bytes[2 << 20..3 << 20].iter().all(|byte| *byte == 0xEE));
    assert!(bytes[3 << 20..].iter().all(|byte| *byte == 0), "a loop device discards to zeroes");
    let message = refused(&uri(&disk.0, "?size=1MiB"), &create()).to_string();
    assert!(message.contains("in use") || message.contains("16777216 bytes"), "{message}");
}

/// The story behind epochs: pages are dirty in the page cache, writing them back fails, the first `fdatasync` says so,
/// a second one says Ok although the data is gone. Played with a disk whose backing store is full.
#[test]
fn lost_write_back_is_never_acknowledged() {
    let dir = dir();
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(&small).status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("SKIPPED: cannot mount a tmpfs (needs root)");
        return;
    }
    let _unmount = Unmount(small.clone());
    let backing = small.join("backing");
    std::fs::File::create(&backing).unwrap().set_len(32 << 20).unwrap();
    let Some(disk) = Loop::over(&backing) else { return };
    let device = device(&disk.0, "?direct=off");
    let mut first = blocking(&device);
    let mut second = blocking(&device);
    second.write(30 << 20, &[2; 4096]).unwrap();
    first.write(0, &vec![1; 16 << 20]).unwrap();
    let error = first.flush().expect_err("there is room for 4 MiB only");
    assert!(matches!(error.kind, IoErrorKind::Os(_)), "{error}");
    assert_eq!(device.epoch(), 1);
    // The other queue pair wrote in the old epoch as well: it must learn of the loss.
    let error = second.flush().expect_err("its write may be lost");
    assert!(matches!(error.kind, IoErrorKind::EpochLost { .. } | IoErrorKind::Os(_)), "{error}");
    let again = first.run(Request::flush(0, 1)).result.expect_err("the old epoch is over");
    assert!(matches!(again.kind, IoErrorKind::EpochLost { expected: 0, .. }), "{again}");
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(&self.0).status().unwrap();
    }
}
