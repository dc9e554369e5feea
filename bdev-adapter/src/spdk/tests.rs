//! The bdev backend against the real SPDK: what the conformance suite cannot know (configurations, several openers, hot
//! removal, memory shortage, threads).
//!
//! They need huge pages (320 MiB for SPDK itself, 1 GiB for what is created here). Without them they are
//! skipped, and say so; with `GAUR_REQUIRE_SPDK=1` that is a failure.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::{Completion, DmaBuf, Hints, IoErrorKind, MAX_REQUEST, QueuePair, Request, Segments};

pub(super) const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;
const SECONDS: Duration = Duration::from_secs(30);

/// False, after saying why, when the machine cannot run SPDK.
pub(super) fn available() -> bool {
    match env::get("tests") {
        Ok(_) => true,
        Err(Error::Unavailable { why, .. }) if std::env::var_os("GAUR_REQUIRE_SPDK").is_none() => {
            eprintln!("skipped: {why}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

pub(super) fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(super) fn call(method: &str, params: &str) {
    rpc(method, params, SECONDS).unwrap();
}

/// A new malloc bdev; its name.
pub(super) fn malloc(bytes: u64, block: u64) -> String {
    let name = unique("M");
    let blocks = bytes / block;
    call("bdev_malloc_create", &format!(r#"{{"name":"{name}","num_blocks":{blocks},"block_size":{block}}}"#));
    name
}

/// A bdev above a new malloc bdev that answers after `us` microseconds.
fn slow(us: u64) -> String {
    let (base, name) = (malloc(8 * MIB, BLOCK), unique("Slow"));
    call(
        "bdev_delay_create",
        &format!(
            r#"{{"base_bdev_name":"{base}","name":"{name}","avg_read_latency":{us},"p99_read_latency":{us},
                "avg_write_latency":{us},"p99_write_latency":{us}}}"#
        ),
    );
    name
}

fn open(name: &str) -> Arc<dyn Device> {
    open_bdev(name, None, &OpenOptions::default(), &format!("spdk-bdev:{name}")).unwrap()
}

pub(super) fn queue(device: &Arc<dyn Device>) -> Box<dyn QueuePair> {
    Arc::clone(device).queue_pair().unwrap()
}

pub(super) fn buffer(device: &Arc<dyn Device>, len: u64, byte: u8) -> DmaBuf {
    let mut buf = DmaBuf::new(&device.dma(), len as usize).unwrap();
    buf.fill(byte);
    buf
}

/// Polls until `count` requests were answered.
fn collect(queue: &mut dyn QueuePair, count: usize) -> Vec<Completion> {
    let (mut completions, deadline) = (Vec::new(), Instant::now() + SECONDS);
    while completions.len() < count {
        if queue.poll(&mut completions) == 0 {
            queue.wait(Duration::from_millis(1));
        }
        assert!(Instant::now() < deadline, "{} of {count} answered", completions.len());
    }
    completions
}

fn run(queue: &mut dyn QueuePair, request: Request) -> Completion {
    queue.submit(request);
    collect(queue, 1).remove(0)
}

fn kind(completion: &Completion) -> Result<(), IoErrorKind> {
    completion.result.as_ref().map(|_| ()).map_err(|error| error.kind)
}

fn config_file(content: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    file
}

fn malloc_config(names: &[&str]) -> String {
    let calls = names.iter().map(|name| {
        format!(
            r#"{{"method":"bdev_malloc_create","params":{{"name":"{name}","num_blocks":256,"block_size":4096}}}}"#
        )
    });
    let calls: Vec<String> = calls.collect();
    format!(r#"{{"subsystems":[{{"subsystem":"bdev","config":[{}]}}]}}"#, calls.join(","))
}

#[test]
fn every_request_kind() {
    if !available() {
        return;
    }
    let device = open(&malloc(8 * MIB, BLOCK));
    assert_eq!((device.geometry().capacity, device.geometry().block_size), (8 * MIB, 4096));
    assert!(device.geometry().volatile_cache && device.geometry().unmap && !device.read_only());
    let mut queue = queue(&device);
    let queue = queue.as_mut();

    let written = run(queue, Request::write(BLOCK, buffer(&device, 2 * BLOCK, 7), 11));
    assert_eq!((written.tag, kind(&written), written.bufs.len()), (11, Ok(()), 2 * BLOCK));
    let fua = Request::write(4 * BLOCK, buffer(&device, BLOCK, 8), 12).with_hints(Hints::fua());
    assert_eq!(kind(&run(queue, fua)), Ok(()));
    assert_eq!(kind(&run(queue, Request::flush(0, 13))), Ok(()));
    assert_eq!(kind(&run(queue, Request::flush(1, 14))), Err(IoErrorKind::EpochLost { expected: 1, now: 0 }));

    let read = run(queue, Request::read(0, buffer(&device, 5 * BLOCK, 0xff), 15));
    let bytes = read.bufs.into_one().unwrap();
    for (block, byte) in [(0, 0), (1, 7), (2, 7), (3, 0), (4, 8)] {
        assert!(bytes[block * 4096..(block + 1) * 4096].iter().all(|b| *b == byte), "block {block}");
    }
    assert_eq!(kind(&run(queue, Request::write_zeroes(BLOCK, BLOCK, 16))), Ok(()));
    assert_eq!(kind(&run(queue, Request::unmap(2 * BLOCK, BLOCK, 17))), Ok(()));
    let zeroes = Request::write_zeroes(4 * BLOCK, BLOCK, 18).with_hints(Hints::fua());
    assert_eq!(kind(&run(queue, zeroes)), Ok(()));
    let read = run(queue, Request::read(0, buffer(&device, 5 * BLOCK, 0xff), 19));
    assert!(read.bufs.into_one().unwrap().iter().all(|b| *b == 0));
}

#[test]
fn what_breaks_the_contract_is_answered_with_its_buffers() {
    if !available() {
        return;
    }
    let device = open(&malloc(MIB, BLOCK));
    let mut queue = queue(&device);
    let queue = queue.as_mut();
    let buf = || buffer(&device, BLOCK, 0);
    for (request, why) in [
        (Request::read(512, buf(), 1), IoErrorKind::Misaligned),
        (Request::read(MIB, buf(), 1), IoErrorKind::OutOfRange),
        (Request::read(u64::MAX - BLOCK + 1, buf(), 1), IoErrorKind::OutOfRange),
        (Request { len: 2 * BLOCK, ..Request::write(0, buf(), 1) }, IoErrorKind::BadLength),
        (Request::write_zeroes(0, 0, 1), IoErrorKind::BadLength),
        (Request::unmap(0, MAX_REQUEST + BLOCK, 1), IoErrorKind::BadLength),
    ] {
        let bytes = request.bufs.len();
        let answer = run(queue, request);
        assert_eq!((kind(&answer), answer.bufs.len()), (Err(why), bytes));
    }
    assert_eq!(queue.outstanding(), 0);
}

#[test]
fn scatter_lists_and_long_requests_go_in_pieces() {
    if !available() {
        return;
    }
    let device = open(&malloc(16 * MIB, 512));
    let mut queue = queue(&device);
    let queue = queue.as_mut();
    // 37 segments of different lengths, more than one I/O takes.
    let many = |byte: Option<u8>| {
        let bufs = (0..37u64).map(|i| buffer(&device, 512 * (1 + i % 5), byte.unwrap_or(i as u8 + 1)));
        bufs.collect::<Vec<_>>()
    };
    assert_eq!(kind(&run(queue, Request::write(512, many(None), 1))), Ok(()));
    let read = run(queue, Request::read(512, many(Some(0)), 2));
    for (got, expected) in read.bufs.as_slice().iter().zip(many(None)) {
        assert_eq!(got[..], expected[..]);
    }
    // Longer than a piece, with segments that cross the borders of pieces, with FUA.
    let lens = [3 * MIB + 512, 512, 5 * MIB - 1024];
    let bufs: Vec<_> = lens.iter().zip(1..).map(|(len, i)| buffer(&device, *len, i)).collect();
    let fua = Request::write(MIB, bufs, 3).with_hints(Hints::fua());
    assert_eq!(kind(&run(queue, fua)), Ok(()));
    let read =
        run(queue, Request::read(MIB, buffer(&device, lens.iter().sum(), 0), 4)).bufs.into_one().unwrap();
    let mut at = 0;
    for (len, byte) in lens.iter().zip(1u8..) {
        assert!(read[at..at + *len as usize].iter().all(|b| *b == byte), "segment {byte}");
        at += *len as usize;
    }
}

#[test]
fn odd_buffers_do_no_harm_and_come_back() {
    if !available() {
        return;
    }
    let device = open(&malloc(MIB, BLOCK));
    let mut queue = queue(&device);
    let queue = queue.as_mut();
    // Empty ones in a scatter list.
    for count in [3, 30] {
        let mut bufs: Vec<_> = (0..count).map(|i| buffer(&device, BLOCK, i)).collect();
        let at = bufs[1].len();
        let empty = bufs[1].split_off(at);
        bufs.insert(2, empty);
        let written = run(queue, Request::write(0, bufs, 1));
        assert_eq!((kind(&written), written.bufs.as_slice().len()), (Ok(()), count as usize + 1));
        let read = run(queue, Request::read(0, buffer(&device, u64::from(count) * BLOCK, 0xff), 2));
        let bytes = read.bufs.into_one().unwrap();
        assert!(bytes.chunks(4096).zip(0..).all(|(block, i)| block.iter().all(|b| *b == i)));
    }
    // With requests that have no data, more than one I/O has room for.
    let fua = |request: Request| request.with_hints(Hints::fua());
    for request in [
        Request::flush(0, 3),
        Request::unmap(0, BLOCK, 4),
        Request::write_zeroes(0, BLOCK, 5),
        fua(Request::write_zeroes(0, BLOCK, 6)),
    ] {
        let bufs = Segments::from((0..40).map(|_| buffer(&device, BLOCK, 9)).collect::<Vec<_>>());
        let answer = run(queue, Request { bufs, ..request });
        assert_eq!((kind(&answer), answer.bufs.as_slice().len()), (Ok(()), 40));
    }
}

#[test]
fn more_requests_than_the_device_takes_wait() {
    if !available() {
        return;
    }
    let device = open(&slow(2_000));
    let mut queue = queue(&device);
    let queue = queue.as_mut();
    let count = 3 * u64::from(device.geometry().queue_depth) + 5;
    for tag in 0..count {
        let hints = if tag % 7 == 0 { Hints::fua() } else { Hints::default() };
        let offset = tag % 2000 * BLOCK;
        queue.submit(Request::write(offset, buffer(&device, BLOCK, tag as u8), tag).with_hints(hints));
    }
    assert_eq!(queue.outstanding(), count as usize);
    let mut tags: Vec<u64> = collect(queue, count as usize)
        .iter()
        .map(|completion| {
            assert_eq!(kind(completion), Ok(()));
            completion.tag
        })
        .collect();
    tags.sort_unstable();
    assert!(tags.into_iter().eq(0..count));
    assert_eq!(queue.outstanding(), 0);
}

#[test]
fn a_deadline_passes_in_the_queue_only() {
    if !available() {
        return;
    }
    let device = open(&slow(100_000));
    let mut queue = queue(&device);
    let queue = queue.as_mut();
    let depth = u64::from(device.geometry().queue_depth);
    let soon = || Hints { deadline: Some(Instant::now() + Duration::from_millis(20)), ..Hints::default() };
    for tag in 0..depth + 3 {
        queue.submit(Request::read(0, buffer(&device, BLOCK, 0), tag).with_hints(soon()));
        queue.kick();
    }
    let first = collect(queue, 3);
    assert!(first.iter().all(|c| c.tag >= depth && kind(c) == Err(IoErrorKind::TimedOut)), "{first:?}");
    let rest = collect(queue, depth as usize);
    assert!(rest.iter().all(|c| c.tag < depth && kind(c) == Ok(())));
}

#[test]
fn a_device_is_opened_once() {
    if !available() {
        return;
    }
    let name = malloc(MIB, BLOCK);
    let device = open(&name);
    for read_only in [false, true] {
        let options = OpenOptions { read_only, ..OpenOptions::default() };
        let again = open_bdev(&name, None, &options, "spdk-bdev:again");
        assert!(matches!(&again, Err(Error::Busy { device }) if device == "spdk-bdev:again"), "{again:?}");
    }
    // A queue pair keeps it open.
    let queue = queue(&device);
    drop(device);
    assert!(matches!(open_bdev(&name, None, &OpenOptions::default(), "d"), Err(Error::Busy { .. })));
    drop(queue);
    // Somebody else's claim: a virtual bdev above it.
    let above = unique("Above");
    call("bdev_passthru_create", &format!(r#"{{"base_bdev_name":"{name}","name":"{above}"}}"#));
    assert!(matches!(open_bdev(&name, None, &OpenOptions::default(), "d"), Err(Error::Busy { .. })));
    drop(open(&above));
    call("bdev_passthru_delete", &format!(r#"{{"name":"{above}"}}"#));
    drop(open(&name));
}

#[test]
fn read_only_devices_write_nothing() {
    if !available() {
        return;
    }
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let device = open_bdev(&malloc(MIB, BLOCK), None, &options, "d").unwrap();
    let mut queue = queue(&device);
    let queue = queue.as_mut();
    assert_eq!(kind(&run(queue, Request::read(0, buffer(&device, BLOCK, 1), 1))), Ok(()));
    for request in [
        Request::write(0, buffer(&device, BLOCK, 1), 2),
        Request::write_zeroes(0, BLOCK, 3),
        Request::unmap(0, BLOCK, 4),
    ] {
        assert_eq!(kind(&run(queue, request)), Err(IoErrorKind::ReadOnly));
    }
    assert_eq!(kind(&run(queue, Request::flush(0, 5))), Ok(()));
}

#[test]
fn configurations_are_loaded_once_and_side_by_side() {
    if !available() {
        return;
    }
    let names: Vec<String> = (0..3).map(|_| unique("Conf")).collect();
    let one = config_file(&malloc_config(&[&names[0], &names[1]]));
    let two = config_file(&malloc_config(&[&names[2]]));
    let open = |name: &str, file: &tempfile::NamedTempFile| {
        open_bdev(name, Some(file.path()), &OpenOptions::default(), name)
    };
    let first = open(&names[0], &one).unwrap();
    let second = open(&names[1], &one).unwrap();
    let third = open(&names[2], &two).unwrap();
    drop((first, second, third));
    drop(open(&names[0], &one).unwrap());
    match open("NoSuchBdev", &two) {
        Err(Error::NotFound { why, .. }) => assert!(why.contains(&names[2]), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_failed_configuration_says_why_and_goes_on_where_it_stopped() {
    if !available() {
        return;
    }
    let (good, taken, late) = (unique("Conf"), malloc(MIB, BLOCK), unique("Conf"));
    let file = config_file(&malloc_config(&[&good, &taken, &late]));
    let open = |name: &str| open_bdev(name, Some(file.path()), &OpenOptions::default(), name);
    match open(&late) {
        Err(Error::Spdk { what, why }) => {
            assert!(what.contains("bdev_malloc_create") && !why.is_empty(), "{what}: {why}");
        }
        other => panic!("{other:?}"),
    }
    call("bdev_malloc_delete", &format!(r#"{{"name":"{taken}"}}"#));
    drop(open(&late).unwrap());
    drop(open(&good).unwrap());
}

#[test]
fn bad_configurations_are_refused() {
    // Neither needs SPDK to run.
    let missing = open_bdev("M", Some(Path::new("no/such/file.json")), &OpenOptions::default(), "d");
    assert!(matches!(&missing, Err(Error::NotFound { why, .. }) if why.contains("no/such/file.json")));
    let file = config_file("[Malloc]\n  NumberOfLuns 1\n");
    match open_bdev("M", Some(file.path()), &OpenOptions::default(), "d") {
        Err(Error::Spdk { why, .. }) => assert!(why.contains("JSON"), "{why}"),
        other => panic!("{other:?}"),
    }
    if !available() {
        return;
    }
    let file = config_file(
        r#"{"subsystems":[{"subsystem":"nvmf","config":[{"method":"nvmf_create_transport","params":{}}]}]}"#,
    );
    match open_bdev("M", Some(file.path()), &OpenOptions::default(), "d") {
        Err(Error::Spdk { what, why }) => {
            assert!(
                what.contains("nvmf_create_transport") && why.contains("not linked")
                    || why.contains("are not")
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_bdev_that_needs_more_memory_than_there_is_says_so() {
    if !available() {
        return;
    }
    let params = r#"{"name":"TooLarge","num_blocks":1000000000000,"block_size":4096}"#;
    match rpc("bdev_malloc_create", params, SECONDS) {
        Err(Error::Spdk { why, .. }) => assert!(why.contains("scripts/spdk.sh hugepages"), "{why}"),
        other => panic!("{other:?}"),
    }
}

/// A bdev of 16 MiB above a file beside the program (so not on a tmpfs, which has no O_DIRECT).
fn file_bdev(method: &str) -> (tempfile::NamedTempFile, Arc<dyn Device>) {
    let directory: PathBuf = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let file = tempfile::NamedTempFile::new_in(directory).unwrap();
    file.as_file().set_len(16 * MIB).unwrap();
    let (name, path) = (unique("File"), file.path().to_str().unwrap());
    call(method, &format!(r#"{{"name":"{name}","filename":"{path}","block_size":512}}"#));
    let device = open(&name);
    assert_eq!(device.geometry().capacity, 16 * MIB);
    (file, device)
}

/// Writes more requests of 8 KiB than the queue is deep, each filled with its number; how many.
fn write_many(device: &Arc<dyn Device>, queue: &mut dyn QueuePair) -> u64 {
    let count = 2 * u64::from(device.geometry().queue_depth);
    for tag in 0..count {
        queue.submit(Request::write(tag * 8192, buffer(device, 8192, tag as u8), tag));
    }
    assert!(collect(queue, count as usize).iter().all(|completion| kind(completion) == Ok(())));
    count
}

#[test]
fn a_file_through_aio() {
    if !available() {
        return;
    }
    let (file, device) = file_bdev("bdev_aio_create");
    let mut queue = queue(&device);
    let queue = queue.as_mut();
    let count = write_many(&device, queue);
    let fua = Request::write(15 * MIB, buffer(&device, 512, 0x77), 0).with_hints(Hints::fua());
    assert_eq!(kind(&run(queue, fua)), Ok(()));
    assert_eq!(kind(&run(queue, Request::flush(0, 1))), Ok(()));
    assert!(!device.geometry().unmap);
    assert_eq!(kind(&run(queue, Request::unmap(8192, 8192, 1))), Ok(()));
    assert_eq!(kind(&run(queue, Request::write_zeroes(0, 3 * MIB, 1))), Ok(()));
    let read = run(queue, Request::read(0, buffer(&device, 16 * MIB, 0xff), 2));
    assert_eq!(kind(&read), Ok(()));
    let bytes = read.bufs.into_one().unwrap();
    let expected = |at: usize| match at as u64 {
        at if at < 3 * MIB => 0,
        at if at < count * 8192 => (at / 8192) as u8,
        at if (15 * MIB..15 * MIB + 512).contains(&at) => 0x77,
        _ => 0,
    };
    assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
    assert!(std::fs::read(file.path()).unwrap() == bytes[..]);
}

#[test]
fn a_file_through_uring() {
    if !available() {
        return;
    }
    let (file, device) = file_bdev("bdev_uring_create");
    let mut queue = queue(&device);
    let queue = queue.as_mut();
    let count = write_many(&device, queue);
    let flushed = kind(&run(queue, Request::flush(0, 1)));
    if device.geometry().volatile_cache && flushed != Ok(()) {
        // The uring bdev of some versions has a write cache and no flush: the contract wants errors then.
        assert_eq!(flushed, Err(IoErrorKind::Unsupported));
        let fua = Request::write(0, buffer(&device, 512, 0), 0).with_hints(Hints::fua());
        assert_eq!(kind(&run(queue, fua)), Err(IoErrorKind::Unsupported));
    }
    let expected: Vec<u8> = (0..count as usize * 8192).map(|at| (at / 8192) as u8).collect();
    assert!(std::fs::read(file.path()).unwrap().starts_with(&expected));
    let read = run(queue, Request::read(0, buffer(&device, count * 8192, 0xff), 2));
    if kind(&read) == Err(IoErrorKind::Os(libc::EIO)) {
        eprintln!(
            "partly skipped: this SPDK's uring bdev polls, and the disk under the file has no poll queues"
        );
        return;
    }
    assert_eq!(kind(&read), Ok(()));
    assert!(read.bufs.into_one().unwrap()[..] == expected[..]);
}

#[test]
fn errors_of_the_device_come_through() {
    if !available() {
        return;
    }
    let base = malloc(MIB, BLOCK);
    call("bdev_error_create", &format!(r#"{{"base_name":"{base}"}}"#));
    let name = format!("EE_{base}");
    let device = open(&name);
    let mut queue = queue(&device);
    let queue = queue.as_mut();
    let inject = |io_type: &str, error: &str| {
        let params = format!(r#"{{"name":"{name}","io_type":"{io_type}","error_type":"{error}","num":1}}"#);
        call("bdev_error_inject_error", &params);
    };
    inject("write", "failure");
    let failed = run(queue, Request::write(BLOCK, buffer(&device, BLOCK, 3), 9));
    let error = failed.result.unwrap_err();
    assert_eq!((error.op, error.offset, error.len), ("write", BLOCK, BLOCK));
    assert!(matches!(error.kind, IoErrorKind::Os(_) | IoErrorKind::Nvme { .. }), "{error}");
    assert!(failed.bufs.into_one().is_some_and(|buf| buf.iter().all(|b| *b == 3)));
    assert_eq!(kind(&run(queue, Request::write(BLOCK, buffer(&device, BLOCK, 3), 9))), Ok(()));
    // One failed piece of many fails the request, once.
    inject("read", "failure");
    let bufs: Vec<_> = (0..40).map(|_| buffer(&device, BLOCK, 0)).collect();
    let failed = run(queue, Request::read(0, bufs, 10));
    assert!(failed.result.is_err() && failed.bufs.as_slice().len() == 40);
    assert_eq!(queue.outstanding(), 0);
}

#[test]
fn two_queue_pairs_work_from_two_threads() {
    if !available() {
        return;
    }
    let device = open(&malloc(8 * MIB, BLOCK));
    thread::scope(|scope| {
        for half in 0..2u64 {
            let device = &device;
            scope.spawn(move || {
                let mut queue = queue(device);
                let queue = queue.as_mut();
                for round in 0..50u8 {
                    for block in 0..32 {
                        let offset = (half * 1024 + block) * BLOCK;
                        queue.submit(Request::write(
                            offset,
                            buffer(device, BLOCK, round ^ half as u8),
                            block,
                        ));
                    }
                    assert!(collect(queue, 32).iter().all(|completion| kind(completion) == Ok(())));
                    let read =
                        run(queue, Request::read(half * 1024 * BLOCK, buffer(device, 32 * BLOCK, 0xee), 0));
                    assert!(read.bufs.into_one().unwrap().iter().all(|b| *b == round ^ half as u8));
                }
            });
        }
    });
}

#[test]
fn a_queue_pair_moves_between_threads() {
    if !available() {
        return;
    }
    let device = open(&slow(1_000));
    let mut queue = queue(&device);
    for round in 0..10u64 {
        for tag in 0..8 {
            queue.submit(Request::write((round * 8 + tag) * BLOCK, buffer(&device, BLOCK, 1), tag));
        }
        queue.kick();
        // Submitted here, completed there.
        queue = thread::spawn(move || {
            assert!(collect(queue.as_mut(), 8).iter().all(|completion| kind(completion) == Ok(())));
            queue
        })
        .join()
        .unwrap();
    }
    thread::spawn(move || drop(queue)).join().unwrap();
}

#[test]
fn dropping_a_queue_pair_waits_for_what_is_in_flight() {
    if !available() {
        return;
    }
    let device = open(&slow(50_000));
    let mut queue = queue(&device);
    for tag in 0..1000 {
        let bufs = if tag % 3 == 0 {
            Segments::from((0..20).map(|_| buffer(&device, BLOCK, 1)).collect::<Vec<_>>())
        } else {
            Segments::from(buffer(&device, BLOCK, 1))
        };
        queue.submit(Request::write(tag % 100 * BLOCK, bufs, tag).with_hints(Hints::fua()));
    }
    queue.kick();
    let began = Instant::now();
    drop(queue);
    assert!(began.elapsed() >= Duration::from_millis(30), "did not wait: {:?}", began.elapsed());
    // Once: those that did not start were not carried out.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn a_removed_bdev_answers_gone() {
    if !available() {
        return;
    }
    let name = malloc(MIB, BLOCK);
    let device = open(&name);
    let mut queue = queue(&device);
    assert_eq!(kind(&run(queue.as_mut(), Request::write(0, buffer(&device, BLOCK, 1), 1))), Ok(()));
    // SPDK answers the deletion when the last opener has closed the bdev.
    let params = format!(r#"{{"name":"{name}"}}"#);
    let deleting = thread::spawn(move || rpc("bdev_malloc_delete", &params, SECONDS));
    let deadline = Instant::now() + SECONDS;
    let kinds = [
        Request::read(0, buffer(&device, BLOCK, 1), 2),
        Request::write(0, (0..40).map(|_| buffer(&device, BLOCK, 1)).collect::<Vec<_>>(), 3),
        Request::flush(0, 4),
    ];
    for request in kinds {
        let (tag, mut request) = (request.tag, Some(request));
        loop {
            let again = request.take().unwrap_or_else(|| Request::read(0, buffer(&device, BLOCK, 1), tag));
            let answer = run(queue.as_mut(), again);
            if kind(&answer) == Err(IoErrorKind::Gone) {
                break;
            }
            assert!(Instant::now() < deadline, "{answer:?}");
        }
    }
    assert!(!deleting.is_finished());
    assert!(Arc::clone(&device).queue_pair().is_err());
    drop(queue);
    drop(device);
    deleting.join().unwrap().unwrap();
    assert!(!bdev_names().unwrap().contains(&name));
}

#[test]
fn threads_of_the_program_keep_their_cpus() {
    fn cpus() -> usize {
        thread::available_parallelism().unwrap().get()
    }
    let before = cpus();
    if !available() {
        return;
    }
    assert_eq!(cpus(), before);
    assert_eq!(thread::spawn(cpus).join().unwrap(), before);
}

#[test]
fn buffers_come_from_huge_pages_and_go_back() {
    if !available() {
        return;
    }
    let device = open(&malloc(MIB, BLOCK));
    for len in [1, 512, 4096, 65_536, 1 << 20, 3 << 20] {
        let buf = buffer(&device, len, 0xa5);
        assert_eq!((buf.len() as u64, buf.as_ptr() as usize % 4096), (len, 0));
    }
    match DmaBuf::new(&device.dma(), 1 << 40) {
        Err(Error::NoMemory { .. }) => {}
        other => panic!("{other:?}"),
    }
}

/// Runs another test of this program in a process of its own, where it is the first to set SPDK up.
fn run_alone(test: &str) {
    if !available() {
        return;
    }
    let exe = std::env::current_exe().unwrap();
    let name = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
    let output = std::process::Command::new(exe)
        .args([name.as_str(), "--exact", "--ignored", "--nocapture"])
        .env("GAUR_REQUIRE_SPDK", "1")
        .output()
        .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn shortage_of_bdev_ios() {
    run_alone("with_a_small_pool_of_bdev_ios");
}

/// SPDK's pool of I/Os is smaller than what two queue pairs start: some get -ENOMEM and are tried again.
#[test]
#[ignore = "wants to be the first in its process; run by shortage_of_bdev_ios"]
fn with_a_small_pool_of_bdev_ios() {
    let options =
        r#"{"method":"bdev_set_options","params":{"bdev_io_pool_size":256,"bdev_io_cache_size":16}}"#;
    let malloc =
        r#"{"method":"bdev_malloc_create","params":{"name":"M","num_blocks":2048,"block_size":4096}}"#;
    let delay = r#"{"method":"bdev_delay_create","params":{"base_bdev_name":"M","name":"D","avg_read_latency":3000,
        "p99_read_latency":3000,"avg_write_latency":3000,"p99_write_latency":3000}}"#;
    let text = format!(r#"{{"subsystems":[{{"subsystem":"bdev","config":[{options},{malloc},{delay}]}}]}}"#);
    let file = config_file(&text);
    let device = open_bdev("D", Some(file.path()), &OpenOptions::default(), "d").unwrap();
    let barrier = std::sync::Barrier::new(2);
    thread::scope(|scope| {
        for half in 0..2u64 {
            let (device, barrier) = (&device, &barrier);
            scope.spawn(move || {
                let mut queue = queue(device);
                let queue = queue.as_mut();
                barrier.wait();
                for tag in 0..1000 {
                    let offset = (half * 1024 + tag % 1000) * BLOCK;
                    let hints = if tag % 5 == 0 { Hints::fua() } else { Hints::default() };
                    queue.submit(
                        Request::write(offset, buffer(device, BLOCK, tag as u8), tag).with_hints(hints),
                    );
                }
                let completions = collect(queue, 1000);
                assert!(completions.iter().all(|completion| kind(completion) == Ok(())));
                let read =
                    run(queue, Request::read(half * 1024 * BLOCK, buffer(device, 1000 * BLOCK, 0xee), 0));
                let bytes = read.bufs.into_one().unwrap();
                assert!(bytes.chunks(4096).enumerate().all(|(i, block)| block.iter().all(|b| *b == i as u8)));
            });
        }
    });
    // SPDK fills a cache for every thread that has a channel, and crashes when the pool cannot.
    let mut queues = Vec::new();
    let refused = loop {
        match Arc::clone(&device).queue_pair() {
            Ok(queue) => queues.push(queue),
            Err(error) => break error,
        }
        assert!(queues.len() < 100);
    };
    assert!(refused.to_string().contains("bdev_io_pool_size"), "{refused}");
    queues.pop();
    queue(&device);
}
