//! What the compiler does not find by itself: comparing a line of keys at once, and prefetching.
//!
//! The `unsafe` here has nothing to do with memory: calling a processor's instruction needs it. SSE2 and prefetch are part of
//! every x86_64; other processors get plain code and no prefetch.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m128i, _MM_HINT_T0, _mm_castsi128_ps, _mm_cmpgt_epi32, _mm_loadu_si128, _mm_movemask_epi8,
    _mm_movemask_ps, _mm_packs_epi16, _mm_packs_epi32, _mm_prefetch, _mm_set1_epi32,
};

/// Index of the last key that is not above the one sought, given a bit for each key that is (keys ascend, so the bits form a run
/// at the top) and one more behind them. Key 0 is known not to be above.
#[inline(always)]
pub(super) fn last_not_above(above: u32) -> usize {
    (above.trailing_zeros() as usize).saturating_sub(1)
}

/// A bit for each of 16 keys that is above `key`.
#[inline(always)]
pub(super) fn above(keys: &[i32; 16], key: i32) -> u32 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE2, which all of these need and no more, is part of x86_64.
    unsafe {
        let [a, b, c, d] = keys.as_chunks().0 else { unreachable!("16 keys are four times four") };
        let low = _mm_packs_epi32(compare(a, key), compare(b, key));
        let high = _mm_packs_epi32(compare(c, key), compare(d, key));
        _mm_movemask_epi8(_mm_packs_epi16(low, high)) as u32
    }
    #[cfg(not(target_arch = "x86_64"))]
    keys.iter().enumerate().fold(0, |above, (i, k)| above | u32::from(*k > key) << i)
}

/// A bit for each of 4 keys that is above `key`. By reference, so that the keys need not be in two places: a register to compare,
/// memory to index.
#[inline(always)]
pub(super) fn above_four(keys: &[i32; 4], key: i32) -> u32 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE2 is part of x86_64.
    unsafe {
        _mm_movemask_ps(_mm_castsi128_ps(compare(keys, key))) as u32
    }
    #[cfg(not(target_arch = "x86_64"))]
    keys.iter().enumerate().fold(0, |above, (i, k)| above | u32::from(*k > key) << i)
}

/// All ones for each key that is above `key`, in order from the lowest lane.
#[inline(always)]
#[cfg(target_arch = "x86_64")]
fn compare(keys: &[i32; 4], key: i32) -> __m128i {
    // SAFETY: SSE2 is part of x86_64; 16 bytes are read where 16 bytes are borrowed, of any alignment.
    unsafe { _mm_cmpgt_epi32(_mm_loadu_si128(keys.as_ptr().cast()), _mm_set1_epi32(key)) }
}

/// Asks for the cache line at `at`. Any address will do: a prefetch never faults.
#[inline(always)]
pub(super) fn prefetch(at: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: SSE is part of x86_64, and the instruction is a hint that ignores addresses it cannot read.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}

/// Asks for the cache line that `place` starts in.
#[inline(always)]
pub(crate) fn prefetch_read<T>(place: &T) {
    prefetch(std::ptr::from_ref(place).cast());
}
