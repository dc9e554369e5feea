//! NVMe/TCP against SPDK's own target: what the conformance suite cannot know. Targets that are killed, frozen, slow, cut off
//! in the middle of a transfer, or no targets at all.

#![cfg(feature = "spdk")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod nvme_support;
mod nvmf_support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bdev_adapter::{Error, IoErrorKind, OpenOptions, Request, open};
use nvme_support::{BLOCK, LIMIT, buffer, collect, device, kind, queue, run, under_load};
use nvmf_support::impostor::Impostor;
use nvmf_support::proxy::Proxy;
use nvmf_support::{Target, available, directory, free_port, uri};
use parking_lot::{Mutex, MutexGuard};

/// One target at a time: each keeps a CPU busy.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock()
}

fn refused(uri: &str) -> Error {
    let began = Instant::now();
    let error = match open(uri, &OpenOptions::new()) {
        Ok(_) => panic!("{uri} opens"),
        Err(error) => error,
    };
    println!("{:.1?}: {error}", began.elapsed());
    assert!(began.elapsed() < LIMIT);
    assert!(error.to_string().contains(uri), "the error names the device: {error}");
    error
}

#[test]
fn a_target_that_is_killed_and_restarted_under_load() {
    if !available() {
        return;
    }
    let _turn = turn();
    let directory = directory();
    let mut target = Target::over_file(&directory.path().join("disk"), 64);
    let device = device(&target.uri("reconnect=60s"));
    let before = device.epoch();
    under_load(&device, false, |some_more_writes| {
        for _ in 0..3 {
            some_more_writes();
            target.kill();
            thread::sleep(Duration::from_millis(100));
            target.restart();
        }
        some_more_writes();
    });
    let now = device.epoch();
    assert!(device.geometry().volatile_cache && now > before, "epoch {now}");
    let mut queue = queue(&device);
    let old = run(queue.as_mut(), Request::flush(before, 1));
    assert_eq!(kind(&old), Err(IoErrorKind::EpochLost { expected: before, now }));
    assert_eq!(kind(&run(queue.as_mut(), Request::flush(now, 1))), Ok(()));
}

#[test]
fn connections_that_are_cut_under_load() {
    if !available() {
        return;
    }
    let _turn = turn();
    let target = Target::start(&["--size", "64"]);
    let proxy = Proxy::new(target.port);
    let device = device(&uri(proxy.port, "reconnect=60s"));
    under_load(&device, false, |some_more_writes| {
        for _ in 0..5 {
            some_more_writes();
            proxy.cut();
        }
        some_more_writes();
    });
    assert!(proxy.cuts() >= 5);
}

#[test]
fn a_transfer_that_is_cut_is_repeated_and_given_up_when_it_is_always_cut() {
    if !available() {
        return;
    }
    let _turn = turn();
    let target = Target::start(&["--size", "64"]);
    let proxy = Proxy::new(target.port);
    let device = device(&uri(proxy.port, "reconnect=60s"));
    let mut queue = queue(&device);
    let len = 4 << 20;
    run(queue.as_mut(), Request::write(0, buffer(&device, len, 7), 1)).result.unwrap();
    // Each connection lasts for a part of the read, and the pieces that came are not asked for again.
    proxy.cut_after(1 << 20);
    let read = run(queue.as_mut(), Request::read(0, buffer(&device, len, 0), 2));
    read.result.unwrap();
    assert!(read.bufs.into_one().unwrap().iter().all(|&byte| byte == 7));
    assert!(proxy.cuts() >= 2, "{} cuts", proxy.cuts());
    // Not even one piece comes through: each is tried a few times.
    proxy.cut_after(32 << 10);
    proxy.cut();
    let failed = run(queue.as_mut(), Request::read(0, buffer(&device, 128 << 10, 0), 3));
    assert!(matches!(kind(&failed), Err(IoErrorKind::Nvme { .. })), "{:?}", failed.result);
    assert_eq!(failed.bufs.len(), 128 << 10, "the buffer comes back");
    // And all is well when the line is.
    proxy.cut_after(u64::MAX);
    run(queue.as_mut(), Request::read(0, buffer(&device, len, 0), 4)).result.unwrap();
}

#[test]
fn a_target_that_never_comes_back() {
    if !available() {
        return;
    }
    let _turn = turn();
    let directory = directory();
    let mut target = Target::over_file(&directory.path().join("disk"), 64);
    let uri = target.uri("reconnect=1s");
    let lost = device(&uri);
    let (mut one, mut other) = (queue(&lost), queue(&lost));
    run(one.as_mut(), Request::write(0, buffer(&lost, BLOCK, 3), 0)).result.unwrap();
    for tag in 0..200 {
        one.submit(Request::read(0, buffer(&lost, BLOCK, 0), tag));
    }
    one.kick();
    target.kill();
    for tag in 200..300 {
        one.submit(Request::read(0, buffer(&lost, BLOCK, 0), tag));
    }
    // Some may have been answered before the target died.
    let answers = collect(one.as_mut(), 300);
    let mut tags: Vec<u64> = answers.iter().map(|completion| completion.tag).collect();
    tags.sort_unstable();
    assert!(tags.iter().copied().eq(0..300), "each is answered once");
    assert!(answers.iter().all(|completion| matches!(kind(completion), Ok(()) | Err(IoErrorKind::Gone))));
    assert!(answers.iter().filter(|completion| completion.result.is_err()).count() >= 100);
    assert!(answers.iter().all(|completion| completion.bufs.len() == BLOCK as u64));
    // From now on everything is answered at once.
    for queue in [&mut one, &mut other] {
        let answer = run(queue.as_mut(), Request::write(0, buffer(&lost, BLOCK, 9), 1));
        assert_eq!(kind(&answer), Err(IoErrorKind::Gone));
    }
    assert!(matches!(Arc::clone(&lost).queue_pair().err(), Some(Error::NotFound { .. })));
    assert!(matches!(refused(&uri), Error::NotFound { .. }));
    drop((one, other, lost));
    // When it is there again it can be opened again.
    target.restart();
    let again = device(&uri);
    let read = run(queue(&again).as_mut(), Request::read(0, buffer(&again, BLOCK, 0), 1));
    read.result.unwrap();
    assert!(read.bufs.into_one().unwrap().iter().all(|&byte| byte == 3));
}

#[test]
fn a_queue_pair_is_dropped_while_its_target_is_away() {
    if !available() {
        return;
    }
    let _turn = turn();
    let directory = directory();
    let mut target = Target::over_file(&directory.path().join("disk"), 64);
    let device = device(&target.uri("reconnect=2s"));
    let mut queue = queue(&device);
    for tag in 0..64 {
        queue.submit(Request::read(0, buffer(&device, BLOCK, 0), tag));
    }
    queue.kick();
    target.kill();
    let began = Instant::now();
    drop(queue);
    drop(device);
    assert!(began.elapsed() < LIMIT);
}

#[test]
fn commands_that_take_too_long() {
    if !available() {
        return;
    }
    let _turn = turn();
    let target = Target::start(&["--size", "64", "--delay", "15000000"]);
    let device = device(&target.uri("timeout=400ms&reconnect=30s"));
    let mut queue = queue(&device);
    let began = Instant::now();
    let answer = run(queue.as_mut(), Request::read(0, buffer(&device, BLOCK, 0), 1));
    assert_eq!(kind(&answer), Err(IoErrorKind::TimedOut), "after {:.1?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(14), "{:.1?}", began.elapsed());
    assert_eq!(answer.bufs.len(), BLOCK as u64, "the buffer comes back");
    // The queue pair lives on.
    let answer = run(queue.as_mut(), Request::read(0, buffer(&device, BLOCK, 0), 2));
    assert_eq!(kind(&answer), Err(IoErrorKind::TimedOut));
}

#[test]
fn a_target_that_freezes_and_comes_back_or_not() {
    if !available() {
        return;
    }
    let _turn = turn();
    let directory = directory();
    let target = Target::over_file(&directory.path().join("disk"), 64);
    let device = device(&target.uri("timeout=500ms&reconnect=15s"));
    let mut queue = queue(&device);
    run(queue.as_mut(), Request::write(0, buffer(&device, BLOCK, 5), 0)).result.unwrap();
    target.freeze();
    queue.submit(Request::read(0, buffer(&device, BLOCK, 0), 1));
    let answer = collect(queue.as_mut(), 1).remove(0);
    assert_eq!(kind(&answer), Err(IoErrorKind::TimedOut));
    queue.submit(Request::read(0, buffer(&device, BLOCK, 0), 2));
    queue.kick();
    target.thaw();
    let answer = collect(queue.as_mut(), 1).remove(0);
    answer.result.unwrap();
    assert!(answer.bufs.into_one().unwrap().iter().all(|&byte| byte == 5));
    target.freeze();
    queue.submit(Request::read(0, buffer(&device, BLOCK, 0), 3));
    queue.submit(Request::flush(device.epoch(), 4));
    let answers = collect(queue.as_mut(), 2);
    assert!(answers.iter().all(|answer| answer.result.is_err()), "{answers:?}");
    let answer = run(queue.as_mut(), Request::read(0, buffer(&device, BLOCK, 0), 5));
    assert_eq!(kind(&answer), Err(IoErrorKind::Gone));
    target.thaw();
}

#[test]
fn what_is_no_target_is_a_typed_error() {
    if !available() {
        return;
    }
    let _turn = turn();
    let nobody = uri(free_port(), "");
    assert!(matches!(refused(&nobody), Error::NotFound { .. }));
    assert!(matches!(refused("spdk-nvme:tcp:no-such-host.invalid:4420/nqn.a"), Error::NotFound { .. }));
    let impostor = |what: Impostor| refused(&uri(what.start(), ""));
    assert!(matches!(impostor(Impostor::Closes), Error::NotADevice { .. }));
    assert!(matches!(impostor(Impostor::Http), Error::NotADevice { .. }));
    assert!(matches!(impostor(Impostor::Silent), Error::Unavailable { .. }));
    assert!(matches!(impostor(Impostor::ClosesAfterInit), Error::NotADevice { .. }));
    assert!(matches!(impostor(Impostor::NoiseAfterInit), Error::NotADevice { .. }));
    assert!(matches!(impostor(Impostor::Refuses(1, 0x81)), Error::Busy { .. }));
    assert!(matches!(impostor(Impostor::Refuses(1, 0x82)), Error::NotFound { .. }));
    assert!(matches!(impostor(Impostor::Refuses(1, 0x84)), Error::NotPermitted { .. }));
    assert!(matches!(impostor(Impostor::Refuses(0, 0x06)), Error::NotADevice { .. }));
    // Those that SPDK itself gets to see.
    assert!(matches!(impostor(Impostor::SilentAfterConnect), Error::NotADevice { .. }));
    assert!(matches!(impostor(Impostor::NoiseAfterConnect), Error::NotADevice { .. }));
    assert!(matches!(impostor(Impostor::YesMan), Error::NotADevice { .. }));
}

/// One call of the target's JSON-RPC.
fn rpc(socket: &Path, method: &str, params: &str) {
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(stream, r#"{{"jsonrpc":"2.0","id":1,"method":"{method}","params":{params}}}"#).unwrap();
    let mut answer = [0; 4096];
    let len = stream.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..len]);
    assert!(answer.contains(r#""result""#), "{method}: {answer}");
}

#[test]
fn a_namespace_that_is_removed_under_load() {
    if !available() {
        return;
    }
    let _turn = turn();
    let directory = directory();
    let socket = directory.path().join("rpc");
    let target = Target::start(&["--size", "64", "--rpc", socket.to_str().unwrap()]);
    let device = device(&target.uri(""));
    let mut queue = queue(&device);
    let (mut completions, mut answers, mut submitted) = (Vec::new(), 0, 0u64);
    let mut gone_since: Option<Instant> = None;
    let began = Instant::now();
    while gone_since.is_none_or(|since| since.elapsed() < Duration::from_millis(200)) {
        while queue.outstanding() < 32 {
            queue.submit(Request::read(0, buffer(&device, BLOCK, 0), submitted));
            submitted += 1;
        }
        queue.poll(&mut completions);
        if answers < 1000 && answers + completions.len() >= 1000 {
            let params = format!(r#"{{"nqn":"{}","nsid":1}}"#, nvmf_support::NQN);
            rpc(&socket, "nvmf_subsystem_remove_ns", &params);
        }
        for completion in completions.drain(..) {
            answers += 1;
            match kind(&completion) {
                Ok(()) => assert!(gone_since.is_none(), "gone is gone"),
                Err(IoErrorKind::Gone) => drop(gone_since.get_or_insert_with(Instant::now)),
                other => panic!("{other:?}"),
            }
        }
        assert!(began.elapsed() < LIMIT, "{answers} answers");
    }
    let left = queue.outstanding();
    let rest = collect(queue.as_mut(), left);
    assert_eq!((answers + rest.len()) as u64, submitted);
    drop((queue, device));
    assert!(matches!(refused(&target.uri("")), Error::NotFound { .. }));
}

/// What the device says is wrong comes through as it says it.
#[test]
fn errors_of_the_device_keep_their_status() {
    if !available() {
        return;
    }
    let _turn = turn();
    let directory = directory();
    let (config, socket, port) =
        (directory.path().join("config.json"), directory.path().join("rpc"), free_port());
    let nqn = nvmf_support::NQN;
    std::fs::write(
        &config,
        format!(
            r#"{{"subsystems":[{{"subsystem":"bdev","config":[
            {{"method":"bdev_malloc_create","params":{{"name":"A","num_blocks":8192,"block_size":4096}}}},
            {{"method":"bdev_error_create","params":{{"base_name":"A"}}}}]}},
            {{"subsystem":"nvmf","config":[
            {{"method":"nvmf_create_transport","params":{{"trtype":"TCP"}}}},
            {{"method":"nvmf_create_subsystem","params":{{"nqn":"{nqn}","allow_any_host":true}}}},
            {{"method":"nvmf_subsystem_add_ns","params":
                {{"nqn":"{nqn}","namespace":{{"nsid":1,"bdev_name":"EE_A"}}}}}},
            {{"method":"nvmf_subsystem_add_listener","params":{{"nqn":"{nqn}","listen_address":
                {{"trtype":"TCP","adrfam":"IPv4","traddr":"127.0.0.1","trsvcid":"{port}"}}}}}}]}}]}}"#
        ),
    )
    .unwrap();
    let arguments = ["--config", config.to_str().unwrap(), "--rpc", socket.to_str().unwrap()];
    let target = Target::start_at(port, &arguments);
    let device = device(&target.uri(""));
    let mut queue = queue(&device);
    rpc(
        &socket,
        "bdev_error_inject_error",
        r#"{"name":"EE_A","io_type":"write","error_type":"failure","num":1}"#,
    );
    let answer = run(queue.as_mut(), Request::write(0, buffer(&device, BLOCK, 1), 1));
    // Generic command status, internal device error: what the target makes of a failed bdev.
    assert_eq!(kind(&answer), Err(IoErrorKind::Nvme { sct: 0, sc: 6 }));
    assert_eq!(answer.bufs.len(), BLOCK as u64, "the buffer comes back");
    run(queue.as_mut(), Request::write(0, buffer(&device, BLOCK, 1), 2)).result.unwrap();
}

/// The connection ends somewhere in the middle of attaching.
#[test]
fn a_controller_that_vanishes_while_it_is_attached() {
    if !available() {
        return;
    }
    let _turn = turn();
    let target = Target::start(&["--size", "64"]);
    let proxy = Proxy::new(target.port);
    let uri = uri(proxy.port, "");
    let (mut refusals, mut limit) = (0, 100);
    loop {
        proxy.cut_after(limit);
        match open(&uri, &OpenOptions::new()) {
            Ok(_) => break,
            Err(error) => println!("after {limit} bytes: {error}"),
        }
        (refusals, limit) = (refusals + 1, limit * 3);
        assert!(limit < 1 << 20, "a few kilobytes are enough");
    }
    assert!(refusals >= 3, "{refusals} refusals");
    proxy.cut_after(u64::MAX);
    let device = device(&uri);
    run(queue(&device).as_mut(), Request::read(0, buffer(&device, BLOCK, 0), 0)).result.unwrap();
}

#[test]
fn namespaces_that_are_not_there_or_of_no_use() {
    if !available() {
        return;
    }
    let _turn = turn();
    let directory = directory();
    let (config, port) = (directory.path().join("config.json"), free_port());
    let nqn = nvmf_support::NQN;
    std::fs::write(
        &config,
        format!(
            r#"{{"subsystems":[{{"subsystem":"bdev","config":[
            {{"method":"bdev_malloc_create","params":{{"name":"A","num_blocks":8192,"block_size":512}}}},
            {{"method":"bdev_null_create","params":
                {{"name":"B","num_blocks":8192,"block_size":4104,"md_size":8,"dif_type":1}}}},
            {{"method":"bdev_null_create","params":{{"name":"C","num_blocks":8192,"block_size":8192}}}}]}},
            {{"subsystem":"nvmf","config":[
            {{"method":"nvmf_create_transport","params":{{"trtype":"TCP"}}}},
            {{"method":"nvmf_create_subsystem","params":{{"nqn":"{nqn}","allow_any_host":true}}}},
            {{"method":"nvmf_subsystem_add_ns","params":{{"nqn":"{nqn}","namespace":{{"nsid":1,"bdev_name":"A"}}}}}},
            {{"method":"nvmf_subsystem_add_ns","params":{{"nqn":"{nqn}","namespace":{{"nsid":3,"bdev_name":"B"}}}}}},
            {{"method":"nvmf_subsystem_add_ns","params":{{"nqn":"{nqn}","namespace":{{"nsid":5,"bdev_name":"C"}}}}}},
            {{"method":"nvmf_subsystem_add_listener","params":{{"nqn":"{nqn}","listen_address":
                {{"trtype":"TCP","adrfam":"IPv4","traddr":"127.0.0.1","trsvcid":"{port}"}}}}}},
            {{"method":"nvmf_create_subsystem","params":{{"nqn":"{nqn}-private","allow_any_host":false}}}},
            {{"method":"nvmf_subsystem_add_listener","params":{{"nqn":"{nqn}-private","listen_address":
                {{"trtype":"TCP","adrfam":"IPv4","traddr":"127.0.0.1","trsvcid":"{port}"}}}}}}]}}]}}"#
        ),
    )
    .unwrap();
    let target = Target::start_at(port, &["--config", config.to_str().unwrap()]);

    // Which of them?
    let several = refused(&target.uri(""));
    assert!(matches!(&several, Error::NotADevice { why, .. } if why.contains("1, 3, 5")), "{several}");
    let missing = refused(&target.uri("ns=2"));
    assert!(matches!(&missing, Error::NotFound { why, .. } if why.contains("1, 3, 5")), "{missing}");
    let metadata = refused(&target.uri("ns=3"));
    assert!(matches!(&metadata, Error::NotADevice { why, .. } if why.contains("metadata")), "{metadata}");
    let blocks = refused(&target.uri("ns=5"));
    assert!(matches!(&blocks, Error::NotADevice { why, .. } if why.contains("8192 bytes")), "{blocks}");
    // One opener of one namespace, in whatever words.
    let first = device(&target.uri("ns=1"));
    assert_eq!(first.geometry().block_size, 512);
    assert!(matches!(refused(&target.uri("ns=1&depth=7")), Error::Busy { .. }));
    drop(first);
    drop(device(&target.uri("ns=1")));
    // Of a subsystem that is not there, or does not want us.
    let elsewhere = format!("spdk-nvme:tcp:127.0.0.1:{port}/nqn.2016-06.io.spdk:other");
    assert!(matches!(refused(&elsewhere), Error::NotFound { .. }));
    let private = format!("spdk-nvme:tcp:127.0.0.1:{port}/{nqn}-private?hostnqn=nqn.2014-08.org:me");
    assert!(matches!(refused(&private), Error::NotPermitted { .. }));
}

#[test]
fn digests_on_the_wire() {
    if !available() {
        return;
    }
    let _turn = turn();
    let target = Target::start(&["--size", "64"]);
    let device = device(&target.uri("digest=on"));
    let mut queue = queue(&device);
    run(queue.as_mut(), Request::write(0, buffer(&device, 1 << 20, 6), 0)).result.unwrap();
    let read = run(queue.as_mut(), Request::read(0, buffer(&device, 1 << 20, 0), 0));
    read.result.unwrap();
    assert!(read.bufs.into_one().unwrap().iter().all(|&byte| byte == 6));
}
