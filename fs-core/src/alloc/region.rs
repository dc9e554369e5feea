//! One region in memory: the two bitmaps and the summary words that make searching them cheap.
//!
//! The two bitmaps are interleaved word by word, since an allocation and a free touch both: one cache line, not two.
//! `any` and `full` have one bit a word: the word has an available block, all its blocks are available. Every search looks
//! at words named by a summary only. A free of a cold region must cost one cache miss: that of its word; so the summaries
//! are touched only if they change, and the counts are elsewhere (`group`). Positions are blocks from the region's start. Callers have checked their ranges and
//! that the bits are in the state that the method expects; a wrong state is a bug and asserts in debug builds.

use super::bits::{WORD, longest_in_word, run_in_word, spans};
use crate::extent_map::prefetch_read;

/// Words in a region's bitmap.
pub(super) const WORDS: usize = (super::REGION_BLOCKS / WORD as u64) as usize;
/// Positions in a full region.
pub(super) const BITS: u32 = super::REGION_BLOCKS as u32;

/// From this length on a run contains at least one whole word, and is found through `full` alone.
const LONG_RUN: u32 = 2 * WORD - 1;

const _: () = assert!(WORDS == u128::BITS as usize);

/// A run inside a region: first position and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: u32,
    pub(super) len: u32,
}

#[derive(Clone, Copy, Default)]
struct Word {
    persist: u64,
    avail: u64,
}

#[repr(align(64))]
pub(super) struct Region {
    words: [Word; WORDS],
    /// Words with an available block.
    any: u128,
    /// Words whose blocks are all available.
    full: u128,
    /// Blocks of the region; positions from here on are neither persist nor avail.
    len: u32,
}

impl Region {
    /// A region of `len` blocks as its stored bitmap says; everything that is free is available.
    pub(super) fn from_persist(persist: &[u64; WORDS], len: u32) -> Region {
        let words = persist.map(|persist| Word { persist, avail: 0 });
        let mut region = Region { words, any: 0, full: 0, len };
        for (w, mask) in spans(0, len) {
            region.set_avail(w, !region.words[w].persist & mask);
        }
        region
    }

    pub(super) fn blocks(&self) -> u32 {
        self.len
    }

    // ---- state changes

    /// Hands out available blocks: available -> in use.
    pub(super) fn take(&mut self, span: Span) {
        for (w, mask) in spans(span.start, span.len) {
            let word = &mut self.words[w];
            debug_assert_eq!(word.avail & mask, mask, "handed out twice");
            word.persist |= mask;
            let avail = word.avail & !mask;
            self.set_avail(w, avail);
        }
    }

    /// In use -> frozen.
    pub(super) fn clear_persist(&mut self, span: Span) {
        for (w, mask) in spans(span.start, span.len) {
            debug_assert_eq!(self.words[w].persist & mask, mask, "freed twice");
            self.words[w].persist &= !mask;
        }
    }

    /// Frozen -> in use.
    pub(super) fn set_persist(&mut self, span: Span) {
        for (w, mask) in spans(span.start, span.len) {
            debug_assert_eq!((self.words[w].persist | self.words[w].avail) & mask, 0, "not frozen");
            self.words[w].persist |= mask;
        }
    }

    /// Frozen -> available. Returns the length of the available run that the blocks are now part of.
    pub(super) fn make_available(&mut self, span: Span) -> u32 {
        for (w, mask) in spans(span.start, span.len) {
            let word = self.words[w];
            debug_assert_eq!((word.persist | word.avail) & mask, 0, "not frozen");
            self.set_avail(w, word.avail | mask);
        }
        let after = span.start + span.len;
        self.available_before(span.start) + span.len + self.available_from(after, BITS)
    }

    fn set_avail(&mut self, w: usize, avail: u64) {
        let old = std::mem::replace(&mut self.words[w].avail, avail);
        if (old == 0) != (avail == 0) {
            self.any ^= 1 << w;
        }
        if (old == u64::MAX) != (avail == u64::MAX) {
            self.full ^= 1 << w;
        }
    }

    // ---- questions

    /// Asks for the cache lines that the first changes will touch: the summaries, and the words of the first two lines.
    pub(super) fn prefetch(&self) {
        prefetch_read(&self.any);
        prefetch_read(&self.words[0]);
        prefetch_read(&self.words[64 / size_of::<Word>()]);
    }

    /// Reads all that a change at this position touches. The value means nothing.
    pub(super) fn peek(&self, at: u32) -> u64 {
        self.words[(at / WORD) as usize].avail ^ self.any as u64
    }

    /// All blocks are in use.
    pub(super) fn is_used(&self, span: Span) -> bool {
        spans(span.start, span.len).all(|(w, mask)| self.words[w].persist & mask == mask)
    }

    /// All blocks are available.
    pub(super) fn is_available(&self, span: Span) -> bool {
        spans(span.start, span.len).all(|(w, mask)| self.words[w].avail & mask == mask)
    }

    /// All blocks are frozen.
    pub(super) fn is_frozen(&self, span: Span) -> bool {
        spans(span.start, span.len).all(|(w, mask)| (self.words[w].persist | self.words[w].avail) & mask == 0)
    }

    /// The `persist` bitmap.
    pub(super) fn persist(&self) -> [u64; WORDS] {
        self.words.map(|word| word.persist)
    }

    /// Available blocks from `start` on without a gap, at most `max`.
    pub(super) fn available_from(&self, start: u32, max: u32) -> u32 {
        let mut at = start;
        while at < BITS && at - start < max {
            let low = at % WORD;
            let ones = (self.words[(at / WORD) as usize].avail >> low).trailing_ones();
            at += ones;
            if ones < WORD - low {
                break;
            }
        }
        (at - start).min(max)
    }

    /// Available blocks right before `end` without a gap.
    fn available_before(&self, end: u32) -> u32 {
        let mut at = end;
        while at > 0 {
            let (w, high) = ((at - 1) / WORD, (at - 1) % WORD);
            let ones = (self.words[w as usize].avail << (WORD - 1 - high)).leading_ones();
            at -= ones;
            if ones < high + 1 {
                break;
            }
        }
        end - at
    }

    // ---- searches

    /// First position of `want` available blocks, at or after `from` if there is one, else anywhere.
    pub(super) fn find(&self, from: u32, want: u32) -> Option<u32> {
        let from = if from < BITS { from } else { 0 };
        if want == 1 {
            return self.find_block(from);
        }
        let scan = if want >= LONG_RUN { Region::scan_long } else { Region::scan_short };
        scan(self, from, want).or_else(|| if from > 0 { scan(self, 0, want) } else { None })
    }

    /// The next available block at or after `from` (< BITS), wrapping around.
    fn find_block(&self, from: u32) -> Option<u32> {
        let w = from / WORD;
        let here = self.words[w as usize].avail & (u64::MAX << (from % WORD));
        if here != 0 {
            return Some(w * WORD + here.trailing_zeros());
        }
        let later = self.any & !(u128::MAX >> (WORDS as u32 - 1 - w));
        let words = if later != 0 { later } else { self.any };
        if words == 0 {
            return None;
        }
        let w = words.trailing_zeros();
        Some(w * WORD + self.words[w as usize].avail.trailing_zeros())
    }

    /// A run of 2..LONG_RUN blocks at or after `from`: every word with an available block is looked at, carrying over
    /// what is available at the end of the word before.
    fn scan_short(&self, from: u32, want: u32) -> Option<u32> {
        let first = from / WORD;
        let mut words = self.any & (u128::MAX << first);
        let (mut carry, mut expected) = (0, first);
        while words != 0 {
            let w = words.trailing_zeros();
            words &= words - 1;
            if w != expected {
                carry = 0;
            }
            expected = w + 1;
            let mut word = self.words[w as usize].avail;
            if w == first {
                word &= u64::MAX << (from % WORD);
            }
            let low = word.trailing_ones();
            if carry + low >= want {
                return Some(w * WORD - carry);
            }
            if low == WORD {
                carry += WORD;
                continue;
            }
            if want < WORD
                && let Some(bit) = run_in_word(word, want)
            {
                return Some(w * WORD + bit);
            }
            carry = word.leading_ones();
        }
        None
    }

    /// A run of LONG_RUN or more blocks at or after `from`: maximal runs of full words, extended on both sides.
    fn scan_long(&self, from: u32, want: u32) -> Option<u32> {
        let mut full = self.full & (u128::MAX << (from / WORD));
        while full != 0 {
            let first = full.trailing_zeros();
            let count = (full >> first).trailing_ones();
            let start = first * WORD;
            let begin = (start - self.available_before(start)).max(from);
            if self.available_from(begin, want) == want {
                return Some(begin);
            }
            let end = first + count;
            full = if end < u128::BITS { full & (u128::MAX << end) } else { 0 };
        }
        None
    }

    /// The longest available run; of length 0 if nothing is available.
    pub(super) fn longest(&self) -> Span {
        let mut best = Span { start: 0, len: 0 };
        let (mut carry, mut expected) = (0, 0);
        let mut words = self.any;
        while words != 0 {
            let w = words.trailing_zeros();
            words &= words - 1;
            if w != expected {
                carry = 0;
            }
            expected = w + 1;
            let word = self.words[w as usize].avail;
            let low = word.trailing_ones();
            if carry + low > best.len {
                best = Span { start: w * WORD - carry, len: carry + low };
            }
            if low == WORD {
                carry += WORD;
                continue;
            }
            if word.count_ones() > best.len {
                let (at, len) = longest_in_word(word);
                if len > best.len {
                    best = Span { start: w * WORD + at, len };
                }
            }
            carry = word.leading_ones();
        }
        best
    }

    // ---- for the checker

    /// Available blocks, counted; and whether the summaries and the end of the region are right.
    pub(super) fn audit(&self) -> Result<(u32, u32), &'static str> {
        let (mut used, mut avail) = (0, 0);
        for (w, word) in self.words.iter().enumerate() {
            if word.persist & word.avail != 0 {
                return Err("a block is in use and available");
            }
            if (self.any >> w & 1 == 1) != (word.avail != 0)
                || (self.full >> w & 1 == 1) != (word.avail == u64::MAX)
            {
                return Err("a summary word is wrong");
            }
            used += word.persist.count_ones();
            avail += word.avail.count_ones();
        }
        if spans(self.len, BITS - self.len)
            .any(|(w, mask)| (self.words[w].persist | self.words[w].avail) & mask != 0)
        {
            return Err("a block past the end is in use or available");
        }
        Ok((used, avail))
    }
}
