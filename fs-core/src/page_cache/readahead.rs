//! What a sequential reader will want next.
//!
//! One state for each handle. A read that begins where the last one ended is sequential; from the second one on, what follows is
//! read ahead, as a task of the channel, before it is asked for. The window doubles with each round from [`WINDOW_MIN`] to
//! [`WINDOW_MAX`], and the next round starts when the reader has come to the middle of what was read ahead. Any other read
//! starts over.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Poll, Waker};

use crate::sync::Mutex;

/// First window, in blocks.
const WINDOW_MIN: u64 = 32;
/// Largest window, in blocks.
const WINDOW_MAX: u64 = 256;

/// A round of read-ahead that is under way; those that need its pages wait for it.
#[derive(Default)]
pub(crate) struct Ahead(Mutex<(bool, Vec<Waker>)>);

impl Ahead {
    /// It is over, however it went.
    pub(crate) fn done(&self) {
        let waiting = {
            let mut state = self.0.lock();
            state.0 = true;
            std::mem::take(&mut state.1)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Waits until it is over.
    pub(crate) async fn wait(&self) {
        poll_fn(|cx| {
            let mut state = self.0.lock();
            if state.0 {
                return Poll::Ready(());
            }
            if !state.1.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.1.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

/// See the module documentation.
#[derive(Default)]
pub(crate) struct ReadAhead {
    /// The byte behind the last read.
    next: u64,
    /// Blocks of the next round; 0: nothing is read ahead.
    window: u64,
    /// What the last round covers.
    covered: Range<u64>,
    under_way: Option<Arc<Ahead>>,
}

impl ReadAhead {
    /// Notes a read of `[offset, end)` in a file that ends at block `last`. Returns the blocks to be read ahead, if any, and the round
    /// that stands for it.
    pub(crate) fn advance(&mut self, offset: u64, end: u64, last: u64) -> Option<(Range<u64>, Arc<Ahead>)> {
        let sequential = offset == self.next && offset > 0;
        self.next = end;
        if !sequential {
            (self.window, self.covered) = (0, 0..0);
            return None;
        }
        let at = end.div_ceil(crate::types::BLOCK_SIZE as u64);
        let ahead = self.covered.end.saturating_sub(at);
        if ahead > self.window / 2 {
            return None;
        }
        self.window = (self.window * 2).clamp(WINDOW_MIN, WINDOW_MAX);
        let start = at.max(self.covered.end);
        let range = start..(start + self.window).min(last);
        if range.is_empty() {
            return None;
        }
        let round = Arc::new(Ahead::default());
        self.covered = range.clone();
        self.under_way = Some(Arc::clone(&round));
        Some((range, round))
    }

    /// The round that will bring `block`, if one is under way.
    pub(crate) fn bringing(&self, block: u64) -> Option<Arc<Ahead>> {
        self.under_way.clone().filter(|_| self.covered.contains(&block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_reader_is_read_ahead_for_and_no_other() {
        let mut state = ReadAhead::default();
        assert!(state.advance(0, 4096, 1000).is_none(), "one read is no sequence");
        let (first, _) = state.advance(4096, 8192, 1000).expect("the second is");
        assert_eq!(first, 2..34);
        assert!(state.advance(8192, 12288, 1000).is_none(), "there is enough ahead");
        assert!(state.bringing(33).is_some() && state.bringing(34).is_none());
        let mut widest = 0;
        for block in 3..900u64 {
            if let Some((range, _)) = state.advance(block * 4096, (block + 1) * 4096, 1000) {
                assert!(range.start > block && range.end <= 1000);
                widest = widest.max(range.end - range.start);
            }
        }
        assert_eq!(widest, WINDOW_MAX);
        assert!(state.advance(77, 100, 1000).is_none(), "a jump ends it");
    }
}
