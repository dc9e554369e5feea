//! Tests of wrappers by URI, alone and in stacks.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};

use crate::blocking::BlockingIo;
use crate::test_util::{limit_time, seed};
use crate::uri::{DeviceUri, Wrapper};
use crate::wrap::recorder::Survive;
use crate::{Completion, Error, Handle, Hints, OpenOptions, Request, open, open_stack};

#[test]
fn a_stack_gives_handles_to_its_wrappers() {
    let uri = "count:/latency:read=20us/fault:seed=7,write_error_nth=2/record:/count:/mem:1MiB";
    let stack = open_stack(uri, &OpenOptions::default()).unwrap();
    assert_eq!(stack.device.name(), uri);
    let kinds: Vec<_> = stack
        .wrappers
        .iter()
        .map(|wrapper| match wrapper {
            Handle::Fault(_) => "fault",
            Handle::Latency(_) => "latency",
            Handle::Count(_) => "count",
            Handle::Record(_) => "record",
        })
        .collect();
    assert_eq!(kinds, ["count", "latency", "fault", "record", "count"]);
    let mut io = BlockingIo::new(&stack.device).unwrap();
    io.write(0, &[1; 4096]).unwrap();
    io.write(0, &[2; 4096]).unwrap_err();
    io.flush().unwrap();
    let outer = stack.counter().unwrap().counts();
    assert_eq!((outer.writes.ops, outer.errors, outer.flushes), (2, 1, 1));
    let Some(Handle::Count(inner)) = stack.wrappers.last() else { panic!("{:?}", stack.wrappers) };
    assert_eq!(inner.counts().writes.ops, 1);
    assert_eq!(stack.fault().unwrap().hits(), 1);
    let log = stack.recorder().unwrap().log();
    assert_eq!(log.records().len(), 2);
    let mut bytes = [0; 4096];
    log.state(usize::MAX, Survive::Nothing).image.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 4096]);
}

#[test]
fn a_recorder_by_uri_begins_with_what_is_on_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let file = format!("file:{}?size=3MiB&direct=off", dir.path().join("disk").display());
    let create = OpenOptions::new().create(true);
    BlockingIo::new(&open(&file, &create).unwrap()).unwrap().write((3 << 20) - 4096, &[5; 4096]).unwrap();
    let stack = open_stack(&format!("record:limit=3MiB/{file}"), &OpenOptions::default()).unwrap();
    let mut io = BlockingIo::new(&stack.device).unwrap();
    io.write(0, &[6; 4096]).unwrap();
    let state = stack.recorder().unwrap().log().state(usize::MAX, Survive::Nothing);
    let mut bytes = [0; 4096];
    state.image.read((3 << 20) - 4096, &mut bytes).unwrap();
    assert_eq!(bytes, [5; 4096]);
    state.image.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4096]);
    drop((io, stack));
    match open(&format!("record:limit=2MiB/{file}"), &OpenOptions::default()) {
        Err(Error::TooLarge { bytes: 3145728, limit: 2097152, why, .. }) => assert!(why.contains("limit=")),
        other => panic!("{other:?}"),
    }
    assert!(matches!(open("record:/mem:8TiB", &OpenOptions::default()), Err(Error::TooLarge { .. })));
    let unreadable = open("record:/fault:read_error=1/mem:1MiB", &OpenOptions::default());
    assert!(matches!(unreadable, Err(Error::Io { .. })), "{unreadable:?}");
}

#[test]
fn good_arguments() {
    for uri in [
        "count:/mem:1MiB",
        "record:/mem:1MiB",
        "record:limit=8TiB/mem:1MiB",
        "latency:/mem:1MiB",
        "latency:read=80us,write=15us,flush=1ms,unmap=0ns,fua=1s,jitter=10us,channels=8,seed=1/mem:1MiB",
        "latency:read=normal(80us,10us),write=uniform(1us,2us)/mem:1MiB",
        "latency:read=lognormal(80us,0.5),write=pareto(50us,1.5)/mem:1MiB",
        "latency:read=percentiles(50:80us,99:300us,100:5ms)/mem:1MiB",
        "fault:slow_range=0-1MiB:3ns,gone_for=0.5:1s/mem:1MiB",
    ] {
        DeviceUri::parse(uri).unwrap_or_else(|error| panic!("{error}"));
    }
    let uri = DeviceUri::parse("record:limit=2MiB/count:/mem:1MiB").unwrap();
    let wrappers: Vec<_> = uri.wrappers().map(|(wrapper, _)| wrapper.clone()).collect();
    assert!(matches!(wrappers[..], [Wrapper::Count, Wrapper::Record(options)] if options.limit == 2 << 20));
}

#[test]
fn every_mistake_says_what_is_right() {
    // Wrapper, what the message must contain.
    let table = [
        ("count:x", "key=value"),
        ("count:x=1", "no arguments"),
        ("record:limit=0", "record:limit=64MiB"),
        ("record:limit=big", "'big' is not a size"),
        ("record:size=1", "no 'size'"),
        ("record:limit=1,limit=1", "twice"),
        ("record:limit=1,size=1", "no 'size'"),
        ("latency:read", "key=value"),
        ("latency:read=", "read=80us"),
        ("latency:read=80", "read=80us"),
        ("latency:read=1.5us", "read=80us"),
        ("latency:read=90000s", "read=80us"),
        ("latency:read=1us,read=1us", "twice"),
        ("latency:erase=1us", "no 'erase' (it has: read"),
        ("latency:read=gauss(1us,1us)", "normal(80us,10us)"),
        ("latency:read=normal(1us", "normal(80us,10us)"),
        ("latency:read=normal(1us,1us", "normal(80us,10us)"),
        ("latency:read=normal(1us)", "normal(80us,10us)"),
        ("latency:read=normal(1us,2us,3us)", "normal(80us,10us)"),
        ("latency:read=uniform(2us,1us)", "uniform(50us,100us)"),
        ("latency:read=lognormal(1us,-1)", "lognormal(80us,0.5)"),
        ("latency:read=lognormal(1us,nan)", "lognormal(80us,0.5)"),
        ("latency:read=pareto(1us,0)", "pareto(50us,1.5)"),
        ("latency:read=percentiles()", "percentiles("),
        ("latency:read=percentiles(50:2us,99:1us)", "percentiles("),
        ("latency:read=percentiles(50:1us,50:2us)", "percentiles("),
        ("latency:read=percentiles(101:1us)", "percentiles("),
        ("latency:jitter=x", "jitter=10us"),
        ("latency:channels=0", "channels=8"),
        ("latency:channels=70000", "channels=8"),
        ("latency:seed=x", "seed=7"),
        ("latency:read=)(,write=1us", "read=80us"),
    ];
    for (wrapper, expected) in table {
        let uri = format!("{wrapper}/mem:1MiB");
        match DeviceUri::parse(&uri) {
            Err(Error::BadUri { uri: shown, why }) => {
                assert_eq!(shown, uri);
                assert!(why.contains(expected), "{uri}: '{why}' does not say '{expected}'");
            }
            other => panic!("{uri}: {other:?}"),
        }
    }
    assert!(matches!(DeviceUri::parse("count:"), Err(Error::BadUri { .. })));
}

/// Any wrappers in any order, with faults of every kind: each request is answered once, with its own buffers.
#[test]
fn whatever_goes_wrong_every_request_is_answered_once() {
    limit_time();
    let seed = seed();
    let mut rng = SmallRng::seed_from_u64(seed);
    let wrappers = [
        "count:",
        "record:",
        "latency:read=lognormal(20us,1),write=5us,jitter=5us,channels=4,seed=SEED",
        "latency:flush=uniform(10us,200us)",
        "fault:seed=SEED,io_error=0.02,bit_rot=0.05,lost_write=0.05,lying_flush=0.5,gone_for_nth=300:2ms",
        "fault:seed=SEED,torn_write_silent=0.05,misdirected_write=0.05,stale_read=0.1,slow=0.05:300us",
        "fault:seed=SEED,volatile=on,power_cut_nth=500",
        "fault:seed=SEED,torn_write_nth=700",
        "fault:seed=SEED,never=0.01",
    ];
    for _ in 0..60 {
        let count = rng.random_range(1..6);
        let mut chosen: Vec<_> = (0..count).filter_map(|_| wrappers.choose(&mut rng)).copied().collect();
        chosen.shuffle(&mut rng);
        let uri = chosen.join("/").replace("SEED", &rng.random::<u32>().to_string()) + "/mem:4MiB?block=512";
        println!("{uri}");
        // A recorder outside of faults may find that the device cannot be read.
        let Ok(stack) = open_stack(&uri, &OpenOptions::default()) else { continue };
        run(&stack, &mut rng);
    }
}

fn run(stack: &crate::Stack, rng: &mut SmallRng) {
    let device = &stack.device;
    let mut queue_pair = Arc::clone(device).queue_pair().unwrap();
    let source = device.dma();
    let buf = |blocks: usize| crate::DmaBuf::new(&source, blocks * 512).unwrap();
    let mut expected = hashbrown::HashMap::new();
    let mut completions: Vec<Completion> = Vec::new();
    let mut settle = |queue_pair: &mut dyn crate::QueuePair, expected: &mut hashbrown::HashMap<u64, _>| {
        queue_pair.poll(&mut completions);
        for completion in completions.drain(..) {
            let shape: Vec<_> =
                completion.bufs.as_slice().iter().map(|buf| (buf.as_ptr() as usize, buf.len())).collect();
            assert_eq!(
                expected.remove(&completion.tag),
                Some(shape),
                "answered twice, or with other buffers"
            );
        }
        assert_eq!(queue_pair.outstanding(), expected.len());
    };
    for tag in 0..800u64 {
        let offset = rng.random_range(0..8000) * 512;
        let blocks = rng.random_range(1..16);
        let bufs = || -> Vec<_> { (0..1 + blocks % 3).map(|_| buf(1 + blocks / 4)).collect() };
        let request = match rng.random_range(0..10) {
            0..4 => Request::read(offset, bufs(), tag),
            4..8 => Request::write(offset, bufs(), tag),
            8 => Request::flush(device.epoch(), tag),
            _ if blocks % 2 == 0 => Request::write_zeroes(offset, blocks as u64 * 512, tag),
            _ => Request::unmap(offset, blocks as u64 * 512, tag),
        };
        let request = if rng.random_bool(0.2) { request.with_hints(Hints::fua()) } else { request };
        let shape: Vec<_> =
            request.bufs.as_slice().iter().map(|buf| (buf.as_ptr() as usize, buf.len())).collect();
        expected.insert(tag, shape);
        queue_pair.submit(request);
        if rng.random_bool(0.3) {
            settle(&mut *queue_pair, &mut expected);
        }
    }
    while !expected.is_empty() {
        // The last chance of what hangs; a release does not help what hangs again further inside.
        for wrapper in &stack.wrappers {
            if let Handle::Fault(fault) = wrapper {
                fault.release_hung();
            }
        }
        queue_pair.wait(Duration::from_millis(1));
        settle(&mut *queue_pair, &mut expected);
    }
}
