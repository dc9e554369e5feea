//! Words, hierarchical bitmaps, the two bitmaps of a region, and the class index.

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::super::bits::{BitTree, longest_in_word, run_in_word, spans};
use super::super::index::{Index, class_above, class_of};
use super::super::region::{BITS, Region, Span, WORDS};

#[test]
fn spans_cover_exactly_their_bits() {
    for (start, len) in [(0, 0), (0, 1), (63, 1), (63, 2), (0, 64), (1, 64), (5, 200), (0, 8192), (8191, 1)] {
        let mut bits = vec![false; 8192];
        for (w, mask) in spans(start, len) {
            (0..64).filter(|b| mask >> b & 1 == 1).for_each(|b| bits[w * 64 + b] = true);
        }
        let expected = |i: usize| (start as usize..(start + len) as usize).contains(&i);
        assert!((0..8192).all(|i| bits[i] == expected(i)), "{start} {len}");
    }
}

#[test]
fn classes() {
    assert_eq!([0, 1, 2, 3, 4, 255, 256, 8192].map(class_of), [0, 1, 2, 2, 3, 8, 9, 14]);
    assert_eq!([1, 2, 3, 4, 5, 256, 257, 8192].map(class_above), [1, 2, 3, 3, 4, 9, 10, 14]);
}

/// The longest run and the first run of `want` in a slice of bits.
fn runs(bits: &[bool], want: usize) -> (usize, Option<usize>) {
    let (mut longest, mut first, mut len) = (0, None, 0);
    for (i, &bit) in bits.iter().enumerate() {
        len = if bit { len + 1 } else { 0 };
        longest = longest.max(len);
        if len == want && first.is_none() {
            first = Some(i + 1 - want);
        }
    }
    (longest, first)
}

proptest! {
    #[test]
    fn words(word: u64, other: u64, want in 1u32..=64) {
        for word in [word, word & other, word | other, word & (word >> 1), 0, u64::MAX] {
            let bits: Vec<bool> = (0..64).map(|b| word >> b & 1 == 1).collect();
            let (longest, first) = runs(&bits, want as usize);
            prop_assert_eq!(run_in_word(word, want), first.map(|f| f as u32));
            let (at, len) = longest_in_word(word);
            prop_assert_eq!(len as usize, longest);
            prop_assert!(len == 0 || bits[at as usize..(at + len) as usize].iter().all(|&b| b));
        }
    }

    #[test]
    fn bit_tree_is_a_set(size in 1usize..300_000, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut tree = BitTree::new(size);
        let mut set = std::collections::BTreeSet::new();
        for _ in 0..300 {
            let bit = rng.random_range(0..size);
            if rng.random_bool(0.6) { tree.set(bit); set.insert(bit); } else { tree.clear(bit); set.remove(&bit); }
            let from = rng.random_range(0..size + 2);
            prop_assert_eq!(tree.next(from), set.range(from..).next().copied());
            prop_assert_eq!(tree.is_empty(), set.is_empty());
            prop_assert_eq!(tree.get(bit), set.contains(&bit));
        }
    }

    #[test]
    fn region_searches_agree_with_a_plain_scan(seed: u64, len in 1u32..=BITS, fill in 0usize..5) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut persist = [0u64; WORDS];
        // From nearly empty to nearly full, in runs of very different length.
        let mut at = 0;
        while at < len {
            let gap = 1 + rng.random_range(0..[2000, 300, 100, 20, 3][fill]);
            let used = 1 + rng.random_range(0..[3, 20, 100, 300, 2000][fill]);
            let (start, end) = ((at + gap).min(len), (at + gap + used).min(len));
            spans(start, end - start).for_each(|(w, mask)| persist[w] |= mask);
            at += gap + used;
        }
        let mut region = Region::from_persist(&persist, len);
        let mut avail: Vec<bool> =
            (0..BITS).map(|i| i < len && persist[(i / 64) as usize] >> (i % 64) & 1 == 0).collect();
        for _ in 0..30 {
            let most = [1u32, 4, 64, 130, 1000][rng.random_range(0..5)];
            let want = rng.random_range(1..=most);
            let from = rng.random_range(0..=BITS);
            let (longest, first) = runs(&avail, want as usize);
            let found = region.find(from, want);
            prop_assert_eq!(found.is_some(), first.is_some(), "want {} from {}", want, from);
            if let Some(found) = found {
                prop_assert!(avail[found as usize..(found + want) as usize].iter().all(|&a| a));
                // At or after `from` if there is one.
                let later = runs(&avail[(from as usize).min(8191)..], want as usize).1.is_some() && from < BITS;
                prop_assert!(!later || found >= from, "want {} from {}: {}", want, from, found);
            }
            let span = region.longest();
            prop_assert_eq!(span.len as usize, longest);
            prop_assert!(avail[span.start as usize..(span.start + span.len) as usize].iter().all(|&a| a));
            let ahead = avail[(from as usize).min(8192)..].iter().take_while(|&&a| a).count() as u32;
            prop_assert_eq!(region.available_from(from, 500), ahead.min(500));
            // Take something, give something back.
            if let Some(start) = found {
                let span = Span { start, len: want };
                region.take(span);
                avail[start as usize..(start + want) as usize].fill(false);
                if rng.random_bool(0.5) {
                    let part = Span { start: start + want / 3, len: want - want / 3 };
                    region.clear_persist(part);
                    let whole = region.make_available(part);
                    let at = part.start as usize;
                    avail[at..at + part.len as usize].fill(true);
                    let before = avail[..at].iter().rev().take_while(|&&a| a).count();
                    let after = avail[at..].iter().take_while(|&&a| a).count();
                    prop_assert_eq!(whole as usize, before + after);
                }
            }
            region.audit().unwrap();
        }
    }

    #[test]
    fn index_is_a_set_per_class(seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let regions = 70 * 512u32;
        let mut index = Index::new(70);
        let mut sets = vec![std::collections::BTreeSet::new(); 15];
        for _ in 0..500 {
            let region = if rng.random_bool(0.5) { rng.random_range(0..regions) } else { rng.random_range(0..40) };
            let class = rng.random_range(0..15usize);
            if let Some(old) = (1..15).find(|&c| sets[c].contains(&region)) {
                index.shift(region, old, class);
                sets[old].remove(&region);
            } else {
                index.insert(region, class);
            }
            if class > 0 { sets[class].insert(region); }
            prop_assert_eq!(index.highest(), (1..15).rev().find(|&c| !sets[c].is_empty()));
            let (class, from) = (rng.random_range(1..15usize), rng.random_range(0..=regions));
            let next = sets[class].range(from..).next().or(sets[class].first()).copied();
            prop_assert_eq!(index.next(class, from), next);
        }
    }
}
