//! Random operations on one thread, in lockstep with what the lock promises, written down as simply as possible: a list of requests
//! for each stripe, in the order of arrival.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

/// A request of the reference.
struct Asked {
    id: u64,
    range: Range<u64>,
    mode: Mode,
    /// Its stripes; those before `reached` are granted, that one is entered if `entered`.
    stripes: Vec<usize>,
    reached: usize,
    entered: bool,
}

#[derive(Default)]
struct Reference {
    /// Who is in which stripe, oldest first.
    lists: [Vec<(u64, Range<u64>, Mode)>; STRIPES],
}

impl Reference {
    /// Whether something older is in the way of `asked` where it stands.
    fn blocked(&self, asked: &Asked) -> bool {
        let older = self.lists[asked.stripes[asked.reached]].iter().take_while(|(id, ..)| *id != asked.id);
        older
            .filter(|(_, range, mode)| {
                let overlap = range.start < asked.range.end && asked.range.start < range.end;
                overlap && (*mode == Mode::Exclusive || asked.mode == Mode::Exclusive)
            })
            .count()
            > 0
    }

    /// Polls: true when granted.
    fn poll(&mut self, asked: &mut Asked) -> bool {
        while asked.reached < asked.stripes.len() {
            if !asked.entered {
                asked.entered = true;
                self.lists[asked.stripes[asked.reached]].push((asked.id, asked.range.clone(), asked.mode));
            }
            if self.blocked(asked) {
                return false;
            }
            asked.reached += 1;
            asked.entered = false;
        }
        true
    }

    fn forget(&mut self, asked: &Asked) {
        self.lists.iter_mut().for_each(|list| list.retain(|(id, ..)| *id != asked.id));
    }
}

fn random_range(rng: &mut SmallRng) -> Range<u64> {
    const MIB: u64 = 1 << SEGMENT_SHIFT;
    let base = rng.random_range(0..3) * MIB * rng.random_range(1..5);
    let start = base + rng.random_range(0..16);
    match rng.random_range(0..10) {
        0 => start..u64::MAX,
        1 => start..start + rng.random_range(1..12) * MIB,
        2 => base + MIB - 2..base + MIB + 2,
        _ => start..start + rng.random_range(1..8),
    }
}

#[test]
fn it_grants_what_the_reference_grants() {
    let steps = std::env::var("GAUR_STEPS").ok().and_then(|steps| steps.parse().ok());
    let steps = steps.unwrap_or(if cfg!(miri) { 300 } else { 20_000 });
    let seed = threads::seed();
    let mut rng = SmallRng::seed_from_u64(seed);
    let lock = RangeLock::default();
    let mut reference = Reference::default();
    let mut waiting: Vec<(Asked, Request<'_>, Arc<Flag>)> = Vec::new();
    let mut held: Vec<(Asked, RangeGuard)> = Vec::new();
    for id in 0..steps {
        match rng.random_range(0..10) {
            // A new request, or a try.
            0..4 if held.len() + waiting.len() < 24 => {
                let range = random_range(&mut rng);
                let mode = if rng.random() { Mode::Shared } else { Mode::Exclusive };
                let set = stripes_of(&range);
                let stripes = (0..STRIPES).filter(|stripe| set >> stripe & 1 == 1).collect();
                let mut asked = Asked { id, range: range.clone(), mode, stripes, reached: 0, entered: false };
                let expected = reference.poll(&mut asked);
                if rng.random_ratio(1, 4) {
                    let guard = lock.try_lock(range, mode);
                    assert_eq!(guard.is_some(), expected, "try {id}");
                    match guard {
                        Some(guard) => held.push((asked, guard)),
                        None => reference.forget(&asked),
                    }
                    continue;
                }
                let flag = Arc::new(Flag::default());
                let mut request = Box::pin(lock.lock(range, mode));
                let guard = poll(&mut request, &Waker::from(Arc::clone(&flag)));
                assert_eq!(guard.is_some(), expected, "request {id}");
                match guard {
                    Some(guard) => held.push((asked, guard)),
                    None => waiting.push((asked, request, flag)),
                }
            }
            // Polls one, with another waker.
            4..7 if !waiting.is_empty() => {
                let (mut asked, mut request, _) = waiting.swap_remove(rng.random_range(0..waiting.len()));
                let flag = Arc::new(Flag::default());
                let guard = poll(&mut request, &Waker::from(Arc::clone(&flag)));
                assert_eq!(guard.is_some(), reference.poll(&mut asked), "poll of {}", asked.id);
                match guard {
                    Some(guard) => held.push((asked, guard)),
                    None => waiting.push((asked, request, flag)),
                }
            }
            7 if !waiting.is_empty() => {
                let (asked, request, _) = waiting.swap_remove(rng.random_range(0..waiting.len()));
                drop(request);
                reference.forget(&asked);
            }
            _ if !held.is_empty() => {
                let (asked, guard) = held.swap_remove(rng.random_range(0..held.len()));
                drop(guard);
                reference.forget(&asked);
            }
            _ => {}
        }
        for (asked, _, flag) in &waiting {
            assert!(
                flag.0.load(Ordering::SeqCst) || reference.blocked(asked),
                "{} sleeps for ever",
                asked.id
            );
        }
        for (i, (a, _)) in held.iter().enumerate() {
            for (b, _) in &held[..i] {
                let apart = a.range.end <= b.range.start || b.range.end <= a.range.start;
                assert!(apart || (a.mode, b.mode) == (Mode::Shared, Mode::Shared), "{} and {}", a.id, b.id);
            }
        }
    }
    drop((waiting, held));
    assert_idle(&lock);
}
