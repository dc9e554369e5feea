//! Words and bits: masks of a run, runs inside a word, and a bitmap with summary levels.

/// Bits in a word.
pub(super) const WORD: u32 = u64::BITS;

/// The (word, mask) pairs that the bits `[start, start + len)` cover.
pub(super) fn spans(start: u32, len: u32) -> impl Iterator<Item = (usize, u64)> {
    let end = start + len;
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (word, low) = (at / WORD, at % WORD);
        let count = (WORD - low).min(end - at);
        at += count;
        Some((word as usize, low_mask(count) << low))
    })
}

/// A word with its lowest `count` (1..=64) bits set.
pub(super) fn low_mask(count: u32) -> u64 {
    u64::MAX >> (WORD - count)
}

/// First bit of the first run of at least `want` (1..=64) set bits inside `word`.
pub(super) fn run_in_word(word: u64, want: u32) -> Option<u32> {
    // After folding, bit i is set iff bits [i, i + have) of `word` are.
    let (mut x, mut have) = (word, 1);
    while have < want && x != 0 {
        let step = have.min(want - have);
        x &= x >> step;
        have += step;
    }
    (x != 0).then(|| x.trailing_zeros())
}

/// First bit and length of the longest run of set bits inside `word`; (0, 0) if there is none.
pub(super) fn longest_in_word(word: u64) -> (u32, u32) {
    let (mut x, mut len, mut at) = (word, 0, 0);
    while x != 0 {
        (len, at) = (len + 1, x.trailing_zeros());
        x &= x >> 1;
    }
    (at, len)
}

/// A bitmap with summary levels: bit `i` of a level says whether word `i` of the level below is nonzero, so that finding
/// the next set bit costs one word a level. Three levels cover 262144 bits.
#[derive(Debug)]
pub(super) struct BitTree {
    /// The bits first, then summaries up to a single word.
    levels: Vec<Vec<u64>>,
}

impl BitTree {
    /// A bitmap of `bits` (> 0) bits, all clear.
    pub(super) fn new(bits: usize) -> BitTree {
        let mut levels = Vec::new();
        let mut words = bits.div_ceil(WORD as usize);
        loop {
            levels.push(vec![0; words]);
            if words <= 1 {
                return BitTree { levels };
            }
            words = words.div_ceil(WORD as usize);
        }
    }

    pub(super) fn set(&mut self, bit: usize) {
        let mut at = bit;
        for level in &mut self.levels {
            let word = &mut level[at / 64];
            let was = *word;
            *word |= 1 << (at % 64);
            if was != 0 {
                return;
            }
            at /= 64;
        }
    }

    pub(super) fn clear(&mut self, bit: usize) {
        let mut at = bit;
        for level in &mut self.levels {
            let word = &mut level[at / 64];
            *word &= !(1 << (at % 64));
            if *word != 0 {
                return;
            }
            at /= 64;
        }
    }

    pub(super) fn get(&self, bit: usize) -> bool {
        self.levels[0][bit / 64] >> (bit % 64) & 1 == 1
    }

    pub(super) fn is_empty(&self) -> bool {
        self.levels[self.levels.len() - 1][0] == 0
    }

    /// The first set bit at or after `from`.
    pub(super) fn next(&self, from: usize) -> Option<usize> {
        let mut at = from;
        for (height, level) in self.levels.iter().enumerate() {
            let rest = level.get(at / 64)? & (u64::MAX << (at % 64));
            if rest != 0 {
                return Some(self.descend(height, at / 64 * 64 + rest.trailing_zeros() as usize));
            }
            at = at / 64 + 1;
        }
        None
    }

    /// The first set bit at or after `from`, else the first of all.
    pub(super) fn next_wrapping(&self, from: usize) -> Option<usize> {
        self.next(from).or_else(|| self.next(0))
    }

    /// The first set bit below bit `at` of the summary at `height`.
    fn descend(&self, height: usize, mut at: usize) -> usize {
        for level in self.levels[..height].iter().rev() {
            at = at * 64 + level[at].trailing_zeros() as usize;
        }
        at
    }
}
