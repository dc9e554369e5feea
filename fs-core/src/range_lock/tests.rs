//! The lock against a model of it, with real threads, and given up at every point. (All schedules of small cases: `loom_tests`;
//! random ones of larger cases: `shuttle_tests`.)

mod model;
mod threads;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;

use super::*;

/// Offsets in segments that are in stripes 0, 1, 2, ... in this order.
fn in_each_stripe() -> [u64; STRIPES] {
    std::array::from_fn(|stripe| {
        let segment = (0..).find(|&segment| stripe_of(segment) as usize == stripe);
        segment.expect("the hash reaches every stripe") << SEGMENT_SHIFT
    })
}

/// A waker that notes that it was called.
#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

type Request<'l> = Pin<Box<Acquire<'l>>>;

fn poll(request: &mut Request<'_>, waker: &Waker) -> Option<RangeGuard> {
    match request.as_mut().poll(&mut Context::from_waker(waker)) {
        Poll::Ready(guard) => Some(guard),
        Poll::Pending => None,
    }
}

fn try_now(request: &mut Request<'_>) -> Option<RangeGuard> {
    poll(request, Waker::noop())
}

/// A request that was polled once.
fn ask(lock: &RangeLock, range: Range<u64>, mode: Mode) -> (Request<'_>, Option<RangeGuard>) {
    let mut request = Box::pin(lock.lock(range, mode));
    let guard = try_now(&mut request);
    (request, guard)
}

#[track_caller]
fn take(lock: &RangeLock, range: Range<u64>, mode: Mode) -> RangeGuard {
    ask(lock, range, mode).1.expect("nothing is in the way")
}

/// No request and no waker is left.
#[track_caller]
fn assert_idle(lock: &RangeLock) {
    for (index, stripe) in lock.stripes.get().iter().flat_map(|stripes| &stripes.0).enumerate() {
        assert!(stripe.is_empty(), "a request is left in stripe {index}");
        assert_eq!(stripe.waiting(), 0, "a waker is left in stripe {index}");
    }
}

#[test]
fn overlapping_writers_wait_disjoint_do_not() {
    let lock = RangeLock::default();
    let a = take(&lock, 0..10, Mode::Exclusive);
    let _b = take(&lock, 10..20, Mode::Exclusive);
    let (mut c, none) = ask(&lock, 5..15, Mode::Shared);
    assert!(none.is_none());
    drop(a);
    assert!(try_now(&mut c).is_none(), "still conflicts with 10..20");
}

#[test]
fn readers_share() {
    let lock = RangeLock::default();
    let _a = take(&lock, 0..10, Mode::Shared);
    let _b = take(&lock, 5..u64::MAX, Mode::Shared);
    assert!(lock.try_lock(0..10, Mode::Shared).is_some());
    assert!(lock.try_lock(0..10, Mode::Exclusive).is_none());
}

#[test]
fn a_writer_is_not_starved_by_readers() {
    let lock = RangeLock::default();
    let reader = take(&lock, 0..10, Mode::Shared);
    let (mut writer, none) = ask(&lock, 0..10, Mode::Exclusive);
    assert!(none.is_none());
    let (mut late, none) = ask(&lock, 0..10, Mode::Shared);
    assert!(none.is_none(), "a reader that came after the writer overtook it");
    assert!(lock.try_lock(0..10, Mode::Shared).is_none(), "so did one that only tried");
    drop(reader);
    let guard = try_now(&mut writer).expect("first in the queue");
    assert!(try_now(&mut late).is_none());
    drop(guard);
    assert!(try_now(&mut late).is_some());
}

/// In each stripe a stream of narrow requests, each taken before the one before it is released: the wide one gets through after one
/// exchange in each stripe.
#[test]
fn a_wide_request_is_not_starved_by_narrow_ones() {
    let lock = RangeLock::default();
    let starts = in_each_stripe();
    let narrow = |stripe: usize| ask(&lock, starts[stripe]..starts[stripe] + 10, Mode::Exclusive);
    let mut held: Vec<_> = (0..STRIPES).map(|stripe| narrow(stripe).1).collect();
    let (mut wide, mut granted) = ask(&lock, 0..u64::MAX, Mode::Exclusive);
    let mut behind = Vec::new();
    let mut overtaken = 0;
    for round in 0.. {
        assert!(round <= STRIPES, "still not granted after {overtaken} others");
        if granted.is_some() {
            break;
        }
        for (stripe, held) in held.iter_mut().enumerate() {
            let (request, guard) = narrow(stripe);
            *held = None;
            match guard {
                Some(guard) => {
                    overtaken += 1;
                    *held = Some(guard);
                }
                None => {
                    // Behind the wide one, or behind the one that was just released.
                    let mut request = request;
                    match try_now(&mut request) {
                        Some(guard) => {
                            overtaken += 1;
                            *held = Some(guard);
                        }
                        None => behind.push(request),
                    }
                }
            }
        }
        granted = try_now(&mut wide);
    }
    assert!(overtaken <= STRIPES * STRIPES, "{overtaken}");
    drop((granted, behind));
    drop(held);
    assert_idle(&lock);
}

#[test]
fn a_cancelled_waiter_leaves_nothing_behind() {
    let lock = RangeLock::default();
    let held = take(&lock, 0..10, Mode::Exclusive);
    let (waiting, _) = ask(&lock, 0..10, Mode::Exclusive);
    let wakers = || lock.stripe(stripe_of(0)).waiting();
    assert_eq!(wakers(), 1);
    drop(waiting);
    assert_eq!(wakers(), 0, "its waker stays until what it waited for is released");
    // Granted but never polled again, then dropped.
    let (granted, _) = ask(&lock, 0..10, Mode::Exclusive);
    drop(held);
    drop(granted);
    drop(take(&lock, 0..10, Mode::Exclusive));
    assert_idle(&lock);
}

/// A request for everything meets a holder in stripe `stop`, and another behind it waits for the request. The request is given up
/// there: waiting, woken but not polled, or granted; with its waker exchanged before or not.
#[test]
fn a_request_can_be_given_up_at_every_point() {
    for stop in 0..STRIPES {
        for point in 0..6 {
            let lock = RangeLock::default();
            let at = in_each_stripe()[stop];
            let holder = take(&lock, at..at + 10, Mode::Exclusive);
            let mut request = Box::pin(lock.lock(0..u64::MAX, Mode::Exclusive));
            let flag = Arc::new(Flag::default());
            if point > 0 {
                assert!(poll(&mut request, &Waker::from(Arc::clone(&flag))).is_none());
            }
            if point > 1 {
                assert!(try_now(&mut request).is_none());
                assert!(poll(&mut request, &Waker::from(Arc::clone(&flag))).is_none());
            }
            let mut behind = Box::pin(lock.lock(at..at + 1, Mode::Shared));
            let woken = Arc::new(Flag::default());
            assert!(poll(&mut behind, &Waker::from(Arc::clone(&woken))).is_none());
            let mut holder = Some(holder);
            if point > 2 {
                drop(holder.take());
                assert!(flag.0.load(Ordering::SeqCst), "not woken in stripe {stop}");
            }
            let guard = if point > 3 { try_now(&mut request) } else { None };
            assert_eq!(guard.is_some(), point > 3);
            if point > 4 {
                drop(guard);
                drop(request);
            } else {
                drop(request);
                drop(guard);
            }
            drop(holder.take());
            assert!(woken.0.load(Ordering::SeqCst), "who waited behind was not woken ({stop}, {point})");
            assert!(try_now(&mut behind).is_some(), "({stop}, {point})");
            drop(behind);
            assert_idle(&lock);
            drop(take(&lock, 0..u64::MAX, Mode::Exclusive));
            assert_idle(&lock);
        }
    }
}

#[test]
fn a_failed_try_leaves_nothing_behind() {
    let lock = RangeLock::default();
    let last = in_each_stripe()[STRIPES - 1];
    let held = take(&lock, last..last + 1, Mode::Shared);
    assert!(lock.try_lock(0..u64::MAX, Mode::Exclusive).is_none());
    let whole = lock.try_lock(0..u64::MAX, Mode::Shared);
    assert!(whole.is_some());
    drop((held, whole));
    assert_idle(&lock);
}

#[test]
fn guards_are_released_in_any_order() {
    let lock = RangeLock::default();
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 0, 3, 1], [1, 2, 0, 3]] {
        let mut held: Vec<_> = (0..4).map(|i| lock.try_lock(i * 10..i * 10 + 10, Mode::Exclusive)).collect();
        assert!(held.iter().all(Option::is_some));
        for i in order {
            held[i] = None;
            assert!(lock.try_lock(i as u64 * 10..i as u64 * 10 + 1, Mode::Exclusive).is_some());
        }
        assert_idle(&lock);
    }
}

/// Who holds overlapping ranges meets the other in a stripe.
#[test]
fn ranges_that_overlap_share_a_stripe() {
    const MIB: u64 = 1 << SEGMENT_SHIFT;
    assert_eq!(stripes_of(&(0..MIB)).count_ones(), 1);
    assert_eq!(stripes_of(&(MIB - 1..MIB + 1)), stripes_of(&(0..1)) | stripes_of(&(MIB..MIB + 1)));
    assert_eq!(stripes_of(&(5..u64::MAX)), ALL_STRIPES);
    assert_eq!(stripes_of(&(u64::MAX..u64::MAX)).count_ones(), 1);
    for first in (0..100).map(|i| i * MIB) {
        for segments in 1..20 {
            let wide = stripes_of(&(first..first + segments * MIB));
            for at in (first..first + segments * MIB).step_by(MIB as usize) {
                assert_ne!(wide & stripes_of(&(at..at + 1)), 0, "{first} {segments} {at}");
            }
        }
    }
}

#[test]
fn a_file_that_nobody_locks_stays_small() {
    assert!(size_of::<RangeLock>() <= 16, "{}", size_of::<RangeLock>());
    assert!(size_of::<Stripes>() <= 512, "{}", size_of::<Stripes>());
    assert!(size_of::<RangeGuard>() <= 8);
}

#[test]
fn requests_without_company_allocate_nothing() {
    let lock = RangeLock::default();
    drop(take(&lock, 0..u64::MAX, Mode::Exclusive));
    let before = node::allocated();
    for i in 0..1000 {
        drop(take(&lock, i..i + 1, Mode::Exclusive));
        drop(take(&lock, i..u64::MAX, Mode::Exclusive));
    }
    assert_eq!(node::allocated(), before);
}

/// Not how it should be, but no harm beyond the memory.
#[test]
#[cfg_attr(miri, ignore = "the leak is intended")]
fn a_guard_may_outlive_its_lock() {
    let lock = RangeLock::default();
    let _other = take(&lock, 0..10, Mode::Exclusive);
    let guard = take(&lock, 10..u64::MAX, Mode::Exclusive);
    drop(lock);
    drop(guard);
}
