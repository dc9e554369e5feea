//! One page: layout, search, edits.

use std::collections::BTreeMap;

use rand::Rng;
use zerocopy::IntoBytes;

use super::{ALL_KEYS, FSID, rng, seed, value};
use crate::tree::edit::{Entry, Fit};
use crate::tree::node::{
    CAPACITY, CHILD_LEN, Child, HEADER_LEN, MAX_ITEM, MAX_KEY, MAX_VALUE, Node, NodePtr, TreeId, head_of,
    node_checksum,
};
use crate::types::{BlockAddr, Generation};

type Items = BTreeMap<Vec<u8>, Vec<u8>>;

fn ptr(level: u8) -> NodePtr {
    NodePtr { addr: BlockAddr(77), generation: Generation(9), checksum: 0, tree: TreeId(3), level }
}

fn leaf() -> Node {
    Node::new(&FSID, &ptr(0))
}

/// Inserts or replaces; false if the page would have to be split.
fn put(node: &mut Node, key: &[u8], value: &[u8]) -> bool {
    let (pos, replaces) = match node.find(key) {
        Ok(pos) => (pos, true),
        Err(pos) => (pos, false),
    };
    let entry = Entry { pos, replaces, key, value };
    let fit = node.fit(&entry);
    if fit != Fit::Split {
        node.place(&entry, fit);
    }
    fit != Fit::Split
}

fn assert_valid(node: &Node) {
    let ptr = NodePtr { checksum: node_checksum(node.bytes()), ..node.ptr() };
    Node::validate(&ptr, &FSID, node.bytes()).expect("a page that we made is valid");
}

fn assert_holds(node: &Node, items: &Items) {
    let found: Vec<_> =
        (0..node.len()).map(|i| (node.key(i).to_buf().to_vec(), node.value(i).to_vec())).collect();
    let expected: Vec<_> = items.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    assert_eq!(found, expected);
    if !items.is_empty() {
        assert_valid(node);
    }
}

#[test]
fn byte_map() {
    let mut node = leaf();
    assert!(put(&mut node, b"gaur-b", b"two"));
    assert!(put(&mut node, b"gaur-a", b"one"));
    let bytes = node.bytes();
    assert_eq!(&bytes[0..4], b"GNOD");
    assert_eq!(bytes[4..6], [1, 0], "format");
    assert_eq!(bytes[6], 3, "tree");
    assert_eq!(bytes[7], 0, "level");
    assert_eq!(bytes[8..24], FSID);
    assert_eq!(bytes[24..32], 77u64.to_le_bytes(), "address");
    assert_eq!(bytes[32..40], 9u64.to_le_bytes(), "generation");
    assert_eq!(bytes[40..42], 2u16.to_le_bytes(), "count");
    assert_eq!(bytes[42..44], 4083u16.to_le_bytes(), "heap");
    assert_eq!(bytes[44..46], 0u16.to_le_bytes(), "dead");
    assert_eq!(bytes[46..48], 5u16.to_le_bytes(), "length of the prefix");
    assert_eq!(bytes[48..50], 1u16.to_le_bytes(), "next");
    assert_eq!(bytes[50..64], [0; 14], "reserved");
    // Slot 0: head "a", at 4087, one byte of key, three of value.
    assert_eq!(bytes[64..68], u32::from_be_bytes(*b"a\0\0\0").to_le_bytes());
    assert_eq!(bytes[68..72], (4087u32 | 1 << 12 | 3 << 21).to_le_bytes());
    assert_eq!(&bytes[4083..4096], b"btwoaonegaur-");
    assert_eq!(node_checksum(bytes), 0xb620892a5c1e8c9b, "this page, on every machine");
    assert_eq!(node_checksum(b"123456789"), 0xae8b_1486_0a79_9888, "CRC-64/NVMe");
}

#[test]
fn heads_order_like_their_keys() {
    let mut suffixes: Vec<&[u8]> =
        vec![b"", b"\0", b"\0\0\0\0\0", b"a", b"a\0", b"a\0b", b"ab", b"abcd", b"abcde", b"\xff"];
    suffixes.sort_unstable();
    assert!(suffixes.is_sorted_by_key(|suffix| head_of(suffix)));
}

#[test]
fn three_of_the_largest_items_fit() {
    for (key_len, value_len) in [(MAX_KEY, MAX_ITEM - MAX_KEY), (MAX_ITEM - MAX_VALUE, MAX_VALUE)] {
        let mut node = leaf();
        for first in 1..=3 {
            let mut key = vec![0x55; key_len];
            key[0] = first;
            assert!(put(&mut node, &key, &vec![first; value_len]), "item {first}");
        }
        assert_eq!(node.len(), 3);
        assert_valid(&node);
    }
}

#[test]
fn a_key_that_is_the_prefix_of_all_others() {
    let mut node = leaf();
    let mut items = Items::new();
    for key in [&b"name/long"[..], b"name/longer", b"name", b"name/", b"name/long\0", b"n", b"name/\xff"] {
        assert!(put(&mut node, key, b"v"));
        items.insert(key.to_vec(), b"v".to_vec());
        assert_holds(&node, &items);
    }
    for key in [&b""[..], b"m", b"na", b"name/lon", b"name/long\0\0", b"o", b"name/longes"] {
        let below = items.keys().filter(|k| &k[..] < key).count();
        assert_eq!(node.find(key), Err(below), "{key:?}");
    }
}

#[test]
fn pages_beside_a_map() {
    let mut rng = rng(seed());
    for round in 0..300 {
        let keys = ALL_KEYS[round % ALL_KEYS.len()];
        let (mut node, mut items) = (leaf(), Items::new());
        for _ in 0..rng.random_range(0..300) {
            let key = keys.make(&mut rng);
            if rng.random_ratio(1, 3) {
                let found = node.find(&key);
                assert_eq!(found.is_ok(), items.remove(&key).is_some());
                if let Ok(i) = found {
                    node.remove_at(i);
                }
            } else {
                let value = value(&mut rng, key.len());
                match node.find(&key) {
                    Ok(i) if node.value(i).len() >= value.len() => {
                        node.shrink_value(i, &value);
                        items.insert(key, value);
                    }
                    _ if put(&mut node, &key, &value) => drop(items.insert(key, value)),
                    found => {
                        let (pos, replaces) = found.map_or_else(|pos| (pos, false), |pos| (pos, true));
                        split(&mut node, &mut items, &Entry { pos, replaces, key: &key, value: &value });
                    }
                }
            }
        }
        assert_holds(&node, &items);
    }
}

/// Splits, checks both halves and the separator, and goes on with the upper one.
fn split(node: &mut Node, items: &mut Items, entry: &Entry<'_>) {
    let mut right = leaf();
    let separator = node.split(&mut right, entry);
    items.insert(entry.key.to_vec(), entry.value.to_vec());
    let upper = items.split_off(&separator[..]);
    assert_holds(node, items);
    assert_holds(&right, &upper);
    assert!(!items.is_empty() && !upper.is_empty());
    let merged = node.merged_size(&right, &separator);
    if merged <= CAPACITY {
        let mut both = leaf();
        both.fill_merged(node, &right, &separator);
        assert_eq!(both.used(), merged);
        items.extend(upper.clone());
        assert_holds(&both, items);
    }
    *items = upper;
    *node = right;
}

fn child(n: u64) -> [u8; CHILD_LEN] {
    let ptr = NodePtr {
        addr: BlockAddr(1000 + n),
        generation: Generation(4),
        checksum: n,
        tree: TreeId(3),
        level: 0,
    };
    Child::from(&ptr).as_bytes().try_into().unwrap()
}

/// Inner nodes beside a map from lower bound to child; the first child's bound is the empty key.
#[test]
fn inner_pages_beside_a_map() {
    let mut rng = rng(seed());
    for round in 0..200 {
        let keys = ALL_KEYS[round % ALL_KEYS.len()];
        let mut node = Node::new(&FSID, &ptr(1));
        let mut items = Items::from([(vec![], child(0).to_vec())]);
        node.push_first_child(&NodePtr { level: 0, ..Node::new(&FSID, &ptr(0)).ptr() });
        node.value_mut(0).copy_from_slice(&child(0));
        for n in 1..200 {
            let key = keys.make(&mut rng);
            let expected = items.range(..=key.clone()).next_back().unwrap();
            let found = node.child_for(&key);
            assert_eq!(node.value(found), expected.1);
            let below = items.range(..key.clone()).next_back().unwrap();
            assert_eq!(node.value(node.child_below(&key)), below.1);
            if items.contains_key(&key) || (rng.random_ratio(1, 4) && node.len() > 1) {
                let i = rng.random_range(0..node.len());
                let bound = items.keys().nth(i).unwrap().clone();
                items.remove(&bound);
                if i == 0 {
                    let (_, first) = items.pop_first().unwrap();
                    items.insert(vec![], first);
                }
                node.remove_at(i);
            } else {
                let value = child(n);
                let entry = Entry { pos: found + 1, replaces: false, key: &key, value: &value };
                match node.fit(&entry) {
                    Fit::Split => split_inner(&mut node, &mut items, &entry),
                    fit => {
                        node.place(&entry, fit);
                        items.insert(key, value.to_vec());
                    }
                }
            }
            assert_inner(&node, &items);
        }
    }
}

fn assert_inner(node: &Node, items: &Items) {
    assert_valid(node);
    assert_eq!(node.len(), items.len());
    for (i, (bound, child)) in items.iter().enumerate() {
        assert_eq!(node.value(i), child);
        assert!(i == 0 || node.key(i).to_buf()[..] == bound[..]);
    }
}

fn split_inner(node: &mut Node, items: &mut Items, entry: &Entry<'_>) {
    let mut right = Node::new(&FSID, &ptr(1));
    let separator = node.split(&mut right, entry);
    items.insert(entry.key.to_vec(), entry.value.to_vec());
    let mut upper = items.split_off(&separator[..]);
    let first = upper.remove(&separator[..]).expect("the separator moves up");
    upper.insert(vec![], first);
    assert_inner(node, items);
    assert_inner(&right, &upper);
    if node.merged_size(&right, &separator) <= CAPACITY {
        let mut both = Node::new(&FSID, &ptr(1));
        both.fill_merged(node, &right, &separator);
        let mut all = items.clone();
        all.extend(upper.iter().filter(|(bound, _)| !bound.is_empty()).map(|(k, v)| (k.clone(), v.clone())));
        all.insert(separator.to_vec(), upper[&vec![]].clone());
        assert_inner(&both, &all);
    }
    (*items, *node) = (upper, right);
}

#[test]
fn an_ascending_run_leaves_full_pages() {
    let mut node = leaf();
    let key = |i: u32| [&b"some prefix"[..], &i.to_be_bytes()].concat();
    // A run in the middle: there is an item behind it.
    assert!(put(&mut node, &key(1_000_000), b"behind"));
    let mut i = 0;
    while put(&mut node, &key(i), &[7; 16]) {
        i += 1;
    }
    let (mut right, pos) = (leaf(), node.len() - 1);
    node.split(&mut right, &Entry { pos, replaces: false, key: &key(i), value: &[7; 16] });
    assert!(right.len() <= 2, "the new item at most, and what was behind it");
    assert!(node.used() > CAPACITY * 90 / 100, "{} of {CAPACITY}", node.used());
    assert_eq!(HEADER_LEN, 64);
}
