//! Stored values: what is encoded comes back, and garbage is an error.

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::super::bits::spans;
use super::super::format::*;
use super::super::region::{BITS, WORDS};

fn ones(persist: &[u64; WORDS]) -> u32 {
    persist.iter().map(|word| word.count_ones()).sum()
}

fn bitmap(seed: u64, blocks: u32, fragments: u32) -> [u64; WORDS] {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut persist = [0; WORDS];
    for _ in 0..fragments {
        let start = rng.random_range(0..blocks);
        let len = rng.random_range(1..=(blocks / fragments).max(1)).min(blocks - start);
        spans(start, len).for_each(|(w, mask)| persist[w] |= mask);
    }
    persist
}

proptest! {
    #[test]
    fn regions_come_back(seed: u64, blocks in 1u32..=BITS, fragments in 0u32..600) {
        let persist = bitmap(seed, blocks, fragments);
        let mut value = Vec::new();
        encode_region(&persist, ones(&persist), &mut value);
        prop_assert!(value.len() <= REGION_VALUE_MAX);
        let (decoded, used) = decode_region(&value, blocks).unwrap();
        prop_assert_eq!(decoded, persist);
        prop_assert_eq!(used, ones(&persist));
    }

    #[test]
    fn groups_come_back(free in prop::collection::vec(0u16..=8192, 1..=512)) {
        let mut value = Vec::new();
        encode_group(&free, &mut value);
        prop_assert!(value.len() <= GROUP_VALUE_MAX);
        let decoded = decode_group(&value, free.len(), |_| BITS).unwrap();
        prop_assert_eq!(&decoded[..free.len()], &free[..]);
    }

    /// Garbage and damaged values are errors or describe a bitmap that fits; never a panic.
    #[test]
    fn garbage_is_an_error(
        mut value in prop::collection::vec(any::<u8>(), 0..1100),
        kind in prop::option::of(0x10u8..0x14),
        blocks in 1u32..=BITS,
    ) {
        if let (Some(kind), Some(first)) = (kind, value.first_mut()) {
            *first = kind;
        }
        if let Ok((persist, used)) = decode_region(&value, blocks) {
            prop_assert!(spans(blocks, BITS - blocks).all(|(w, mask)| persist[w] & mask == 0));
            prop_assert!(used <= blocks);
        }
        let _ = decode_group(&value, 512, |_| blocks);
    }

    /// One flipped bit never goes unnoticed, except in the bits that name blocks of equal number.
    #[test]
    fn a_flipped_bit_changes_the_count(seed: u64, blocks in 64u32..=BITS, fragments in 1u32..600, at: u32) {
        let persist = bitmap(seed, blocks, fragments);
        let mut value = Vec::new();
        encode_region(&persist, ones(&persist), &mut value);
        let bit = at as usize % (value.len() * 8);
        value[bit / 8] ^= 1 << (bit % 8);
        if let Ok((decoded, used)) = decode_region(&value, blocks) {
            prop_assert_eq!(used, ones(&persist));
            prop_assert_ne!(decoded, persist);
        }
    }
}

#[test]
fn the_smaller_form_is_chosen() {
    let length = |persist: &[u64; WORDS]| {
        let mut value = Vec::new();
        encode_region(persist, ones(persist), &mut value);
        (value[0], value.len())
    };
    assert_eq!(length(&[0; WORDS]), (0x11, 4));
    assert_eq!(length(&[u64::MAX; WORDS]), (0x11, 8));
    assert_eq!(length(&[0x0f0f; WORDS]), (0x12, 1028), "256 runs");
    let mut persist = [0x0f0f; WORDS];
    persist[0] = 0x0f;
    assert_eq!(length(&persist), (0x11, 4 + 255 * 4), "255 runs");
    assert_eq!(length(&[0x5555_5555_5555_5555; WORDS]), (0x12, 1028));
}

#[test]
fn the_bytes_are_these() {
    let mut persist = [0; WORDS];
    spans(3, 2).chain(spans(0x1000, 0x100)).for_each(|(w, mask)| persist[w] |= mask);
    let mut value = Vec::new();
    encode_region(&persist, ones(&persist), &mut value);
    assert_eq!(value, [0x11, 0, 0x02, 0x01, 3, 0, 2, 0, 0x00, 0x10, 0x00, 0x01]);
    value.clear();
    encode_group(&[8192, 1, 0], &mut value);
    assert_eq!(value, [0x13, 0, 3, 0, 0x00, 0x20, 1, 0, 0, 0]);
}

#[test]
fn what_is_wrong_is_said() {
    let region = |bytes: &[u8]| decode_region(bytes, 100).unwrap_err();
    assert_eq!(region(&[]), "shorter than its header");
    assert_eq!(region(&[0x11, 1, 0, 0]), "reserved byte is not zero");
    assert_eq!(region(&[0x21, 0, 0, 0]), "unknown kind");
    assert_eq!(region(&[0x11, 0, 1, 0]), "count of used blocks is wrong");
    assert_eq!(region(&[0x11, 0, 1, 0, 0, 0]), "length is not whole runs");
    assert_eq!(region(&[0x11, 0, 0, 0, 0, 0, 0, 0]), "runs are empty, touching or out of order");
    assert_eq!(region(&[0x11, 0, 2, 0, 0, 0, 1, 0, 1, 0, 1, 0]), "runs are empty, touching or out of order");
    assert_eq!(region(&[0x11, 0, 2, 0, 99, 0, 2, 0]), "run past the end of the region");
    assert_eq!(region(&[0x11, 0, 2, 0, 0xff, 0xff, 0xff, 0xff]), "run past the end of the region");
    assert_eq!(region(&[0x12, 0, 0, 0, 1, 2, 3]), "bitmap of a wrong length");
    let mut bitmap = vec![0; REGION_VALUE_MAX];
    bitmap[0] = 0x12;
    bitmap[2] = 1;
    bitmap[4 + 13] = 1;
    assert_eq!(region(&bitmap), "block in use past the end of the region");

    let group = |bytes: &[u8]| decode_group(bytes, 2, |i| [8192, 10][i]).unwrap_err();
    assert_eq!(group(&[0x13]), "shorter than its header");
    assert_eq!(group(&[0x11, 0, 2, 0, 0, 0, 0, 0]), "unknown kind");
    assert_eq!(group(&[0x13, 9, 2, 0, 0, 0, 0, 0]), "reserved byte is not zero");
    assert_eq!(group(&[0x13, 0, 1, 0, 0, 0]), "wrong number of regions");
    assert_eq!(group(&[0x13, 0, 2, 0, 0, 0]), "wrong number of regions");
    assert_eq!(group(&[0x13, 0, 2, 0, 0, 0, 0]), "length is not whole counts");
    assert_eq!(group(&[0x13, 0, 2, 0, 0, 0, 11, 0]), "more free blocks than the region has");
}
