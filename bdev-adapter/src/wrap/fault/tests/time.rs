//! Requests that take long, that are never answered, and devices that come back.

use super::*;

const SHORT: Duration = Duration::from_millis(30);

#[test]
fn a_slow_request_is_late_and_holds_up_nothing_else() {
    let (_, device, io) = wrapped(&[("slow_nth", "1:60ms")]);
    let mut queue_pair = queue_pair(&device);
    let started = Instant::now();
    for tag in 0..3 {
        queue_pair.submit(Request::read(0, io.buffer(512).unwrap(), tag));
    }
    let first = poll_for(&mut *queue_pair, 2, Duration::from_secs(10));
    assert_eq!(first.iter().map(|completion| completion.tag).collect::<Vec<_>>(), [1, 2]);
    assert!(queue_pair.outstanding() == 1 && started.elapsed() < Duration::from_millis(60));
    let last = poll_for(&mut *queue_pair, 1, Duration::from_secs(10));
    assert!(last[0].tag == 0 && last[0].result.is_ok());
    assert!(started.elapsed() >= Duration::from_millis(60), "{:?}", started.elapsed());
    assert_eq!(queue_pair.outstanding(), 0);
}

#[test]
fn a_slow_request_of_a_device_that_goes_away_is_answered() {
    let (_, device, io) = wrapped(&[("slow", "1:1000s")]);
    let mut queue_pair = queue_pair(&device);
    queue_pair.submit(Request::read(0, io.buffer(512).unwrap(), 1));
    assert!(poll_for(&mut *queue_pair, 1, SHORT).is_empty());
    device.remove();
    let completions = poll_for(&mut *queue_pair, 1, Duration::from_secs(10));
    assert_eq!(completions[0].result.as_ref().unwrap_err().kind, IoErrorKind::Gone);
}

#[test]
fn a_request_that_is_never_answered_hangs_until_it_is_released() {
    let (memory, device, io) = wrapped(&[("never_nth", "1")]);
    let mut queue_pair = queue_pair(&device);
    let mut buf = io.buffer(512).unwrap();
    buf.fill(7);
    queue_pair.submit(Request::write(0, buf, 5));
    queue_pair.submit(Request::read(0, io.buffer(512).unwrap(), 6));
    let others = poll_for(&mut *queue_pair, 2, SHORT);
    assert_eq!((others.len(), others[0].tag, queue_pair.outstanding()), (1, 6, 1));
    let mut bytes = [0; 512];
    memory.read_raw(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 512], "it did not reach the device");
    let device_again = device.clone();
    let releaser = std::thread::spawn(move || {
        std::thread::sleep(SHORT);
        device_again.release_hung();
    });
    let completions = poll_for(&mut *queue_pair, 1, Duration::from_secs(10));
    releaser.join().unwrap();
    assert_eq!((completions[0].tag, &completions[0].result, queue_pair.outstanding()), (5, &Ok(()), 0));
    memory.read_raw(0, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 512], "released, it is done");
}

#[test]
fn a_queue_pair_with_a_hung_request_can_be_dropped() {
    let (_, device, io) = wrapped(&[("never", "1")]);
    let mut queue_pair = queue_pair(&device);
    queue_pair.submit(Request::read(0, io.buffer(512).unwrap(), 1));
    assert!(poll_for(&mut *queue_pair, 1, SHORT).is_empty());
    drop(queue_pair);
}

#[test]
fn a_hung_request_with_a_deadline_times_out_and_one_without_a_device_is_gone() {
    let (_, device, io) = wrapped(&[("never", "1")]);
    let mut queue_pair = queue_pair(&device);
    let deadline = Instant::now() + SHORT;
    let hints = Hints { deadline: Some(deadline), ..Hints::default() };
    queue_pair.submit(Request::read(0, io.buffer(512).unwrap(), 1).with_hints(hints));
    queue_pair.submit(Request::flush(0, 2));
    let completions = poll_for(&mut *queue_pair, 1, Duration::from_secs(10));
    assert_eq!(completions[0].result.as_ref().unwrap_err().kind, IoErrorKind::TimedOut);
    assert!(completions[0].tag == 1 && Instant::now() >= deadline);
    assert_eq!(completions[0].bufs.len(), 512);
    device.remove();
    let completions = poll_for(&mut *queue_pair, 1, Duration::from_secs(10));
    assert_eq!((completions[0].tag, queue_pair.outstanding()), (2, 0));
    assert_eq!(completions[0].result.as_ref().unwrap_err().kind, IoErrorKind::Gone);
}

#[test]
fn a_device_that_is_gone_for_a_while_comes_back_in_a_new_epoch() {
    let (_, device, mut io) = wrapped(&[("gone_for_nth", "3:40ms"), ("slow_nth", "2:1000s")]);
    io.write(0, &[1; 512]).unwrap();
    let mut queue_pair = queue_pair(&device);
    queue_pair.submit(Request::read(0, io.buffer(512).unwrap(), 1));
    queue_pair.poll(&mut Vec::new());
    let started = Instant::now();
    assert_eq!(kind(io.read(0, &mut [0; 512])), IoErrorKind::Gone);
    assert!(device.is_gone());
    let limit = Duration::from_secs(10);
    while kind_of(io.read(0, &mut [0; 512])) == Some(IoErrorKind::Gone) {
        assert!(started.elapsed() < limit, "it does not come back");
    }
    assert!(started.elapsed() >= Duration::from_millis(40) && !device.is_gone());
    assert_eq!(device.epoch(), 1);
    assert_eq!(kind(io.flush()), IoErrorKind::EpochLost { expected: 0, now: 1 });
    // What was on its way then is lost, although nobody looked meanwhile.
    queue_pair.submit(Request::read(0, io.buffer(512).unwrap(), 2));
    let mut completions = poll_for(&mut *queue_pair, 2, limit);
    completions.sort_by_key(|completion| completion.tag);
    let results: Vec<_> = completions.into_iter().map(|completion| kind_of(completion.result)).collect();
    assert_eq!(results, [Some(IoErrorKind::Gone), None]);
}

fn kind_of(result: Result<(), Box<crate::IoError>>) -> Option<IoErrorKind> {
    result.err().map(|error| error.kind)
}
