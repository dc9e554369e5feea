//! The stored values of regions and groups.
//!
//! Fixed-width, little-endian; byte maps in `docs/on-disk-format.md`. A region is stored in the smaller of two forms, both
//! of which name the blocks in use. What is decoded comes from a device: everything is checked, nothing panics.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, LE, U16, U64, Unaligned};

use super::bits::spans;
use super::group::REGIONS;
use super::region::{BITS, Span, WORDS};

/// Version 1 of the values; the high half of the kind byte.
const VERSION: u8 = 0x10;
const KIND_RUNS: u8 = VERSION | 1;
const KIND_BITMAP: u8 = VERSION | 2;
const KIND_GROUP: u8 = VERSION | 3;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RegionHeader {
    kind: u8,
    reserved: u8,
    /// Blocks in use.
    used: U16<LE>,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RunEntry {
    /// First block of the run, from the region's start.
    start: U16<LE>,
    /// Blocks in use.
    len: U16<LE>,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct GroupHeader {
    kind: u8,
    reserved: u8,
    /// Regions in the group.
    regions: U16<LE>,
}

const BITMAP_LEN: usize = WORDS * 8;
/// More runs than this are larger than the bitmap.
const RUNS_MAX: usize = BITMAP_LEN / size_of::<RunEntry>() - 1;

/// The longest value of a region, in bytes.
pub const REGION_VALUE_MAX: usize = size_of::<RegionHeader>() + BITMAP_LEN;
/// The longest value of a group, in bytes.
pub const GROUP_VALUE_MAX: usize = size_of::<GroupHeader>() + 2 * REGIONS;

const _: () =
    assert!(size_of::<RegionHeader>() == 4 && size_of::<RunEntry>() == 4 && size_of::<GroupHeader>() == 4);
const _: () = assert!(REGION_VALUE_MAX == 1028 && GROUP_VALUE_MAX == 1028);

/// Appends the value of a region whose `persist` bitmap this is, with `used` blocks in use.
pub(super) fn encode_region(persist: &[u64; WORDS], used: u32, out: &mut Vec<u8>) {
    if count_runs(persist) > RUNS_MAX {
        return encode_region_largest(persist, used, out);
    }
    let header = RegionHeader { kind: KIND_RUNS, reserved: 0, used: U16::new(used as u16) };
    out.extend_from_slice(header.as_bytes());
    let mut at = 0;
    while let Some(run) = next_used(persist, at) {
        let entry = RunEntry { start: U16::new(run.start as u16), len: U16::new(run.len as u16) };
        out.extend_from_slice(entry.as_bytes());
        at = run.start + run.len;
    }
}

/// Appends the value of a region as a bitmap, its largest form, whatever is in it.
pub(super) fn encode_region_largest(persist: &[u64; WORDS], used: u32, out: &mut Vec<u8>) {
    let header = RegionHeader { kind: KIND_BITMAP, reserved: 0, used: U16::new(used as u16) };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(persist.map(U64::<LE>::new).as_bytes());
}

/// The `persist` bitmap that a stored value of a region of `blocks` blocks describes, and its blocks in use; or what is
/// wrong with the value.
pub(super) fn decode_region(value: &[u8], blocks: u32) -> Result<([u64; WORDS], u32), &'static str> {
    let (header, body) = RegionHeader::ref_from_prefix(value).map_err(|_| "shorter than its header")?;
    if header.reserved != 0 {
        return Err("reserved byte is not zero");
    }
    let persist = match header.kind {
        KIND_RUNS => decode_runs(body, blocks)?,
        KIND_BITMAP => decode_bitmap(body, blocks)?,
        _ => return Err("unknown kind"),
    };
    let used = persist.iter().map(|word| word.count_ones()).sum();
    if u32::from(header.used.get()) != used {
        return Err("count of used blocks is wrong");
    }
    Ok((persist, used))
}

fn decode_runs(body: &[u8], blocks: u32) -> Result<[u64; WORDS], &'static str> {
    let entries = <[RunEntry]>::ref_from_bytes(body).map_err(|_| "length is not whole runs")?;
    if entries.len() > RUNS_MAX {
        return Err("more runs than the kind allows");
    }
    let mut persist = [0; WORDS];
    let mut end = 0;
    for (n, entry) in entries.iter().enumerate() {
        let (start, len) = (u32::from(entry.start.get()), u32::from(entry.len.get()));
        // A gap before each run but the first: so each set of blocks has one encoding.
        if len == 0 || (n > 0 && start <= end) {
            return Err("runs are empty, touching or out of order");
        }
        if start + len > blocks {
            return Err("run past the end of the region");
        }
        end = start + len;
        for (w, mask) in spans(start, len) {
            persist[w] |= mask;
        }
    }
    Ok(persist)
}

fn decode_bitmap(body: &[u8], blocks: u32) -> Result<[u64; WORDS], &'static str> {
    let words = <[U64<LE>; WORDS]>::ref_from_bytes(body).map_err(|_| "bitmap of a wrong length")?;
    let persist: [u64; WORDS] = std::array::from_fn(|w| words[w].get());
    if spans(blocks, BITS - blocks).any(|(w, mask)| persist[w] & mask != 0) {
        return Err("block in use past the end of the region");
    }
    Ok(persist)
}

/// Appends the value of a group with these free counts.
pub(super) fn encode_group(free: &[u16], out: &mut Vec<u8>) {
    let header = GroupHeader { kind: KIND_GROUP, reserved: 0, regions: U16::new(free.len() as u16) };
    out.extend_from_slice(header.as_bytes());
    for &count in free {
        out.extend_from_slice(&count.to_le_bytes());
    }
}

/// The free counts that a stored value of a group describes, which has `regions` regions of the sizes that `blocks_of`
/// gives; or what is wrong with the value.
pub(super) fn decode_group(
    value: &[u8],
    regions: usize,
    blocks_of: impl Fn(usize) -> u32,
) -> Result<[u16; REGIONS], &'static str> {
    let (header, body) = GroupHeader::ref_from_prefix(value).map_err(|_| "shorter than its header")?;
    if header.kind != KIND_GROUP {
        return Err("unknown kind");
    }
    if header.reserved != 0 {
        return Err("reserved byte is not zero");
    }
    let counts = <[U16<LE>]>::ref_from_bytes(body).map_err(|_| "length is not whole counts")?;
    if usize::from(header.regions.get()) != regions || counts.len() != regions {
        return Err("wrong number of regions");
    }
    let mut free = [0; REGIONS];
    for (i, count) in counts.iter().enumerate() {
        free[i] = count.get();
        if u32::from(free[i]) > blocks_of(i) {
            return Err("more free blocks than the region has");
        }
    }
    Ok(free)
}

/// The first run of set bits at or after `from`.
pub(super) fn next_used(persist: &[u64; WORDS], from: u32) -> Option<Span> {
    let start = next_bit(persist, from, 0)?;
    let end = next_bit(persist, start, u64::MAX).unwrap_or(BITS);
    Some(Span { start, len: end - start })
}

/// The first bit at or after `from` that is set in `words[..] ^ flip`.
fn next_bit(words: &[u64; WORDS], from: u32, flip: u64) -> Option<u32> {
    let mut mask = u64::MAX << (from % 64);
    for (w, word) in words.iter().enumerate().skip((from / 64) as usize) {
        let hit = (word ^ flip) & mask;
        if hit != 0 {
            return Some(w as u32 * 64 + hit.trailing_zeros());
        }
        mask = u64::MAX;
    }
    None
}

fn count_runs(persist: &[u64; WORDS]) -> usize {
    let mut before = 0;
    let mut runs = 0;
    for &word in persist {
        runs += (word & !(word << 1 | before)).count_ones() as usize;
        before = word >> 63;
    }
    runs
}
