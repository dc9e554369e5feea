//! The arenas of a pool and which of their blocks are free: plain bookkeeping, under the lock of the pool.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{ARENA_LEN, Arena, ArenaToken, MAX_BLOCK, MIN_BLOCK};

const MIN_SHIFT: u32 = MIN_BLOCK.trailing_zeros();
/// Size classes: 4 KiB, 8 KiB, ... 1 MiB.
pub(super) const CLASSES: usize = (MAX_BLOCK.trailing_zeros() - MIN_SHIFT + 1) as usize;
const BITMAP_WORDS: usize = ARENA_LEN / MIN_BLOCK / 64;

/// Arenas ever made in this process: tokens of two pools never coincide, so a buffer of another device is recognised.
static NEXT_ARENA_ID: AtomicU64 = AtomicU64::new(1);

/// A block that waits for reuse.
pub(super) struct Block {
    pub(super) ptr: NonNull<u8>,
    pub(super) token: ArenaToken,
}

// SAFETY: a waiting block is plain memory that nothing else refers to.
unsafe impl Send for Block {}

/// All arenas, under one lock.
#[derive(Default)]
pub(super) struct Central {
    pub(super) slots: Vec<Option<Slot>>,
    free_slots: Vec<usize>,
    /// Per class the slots of arenas that have a free block.
    partial: [Vec<usize>; CLASSES],
    /// Arenas of [`ARENA_LEN`] that serve no class.
    pub(super) idle: Vec<usize>,
    idle_large: Vec<usize>,
    pub(super) idle_bytes: usize,
    pub(super) bytes: usize,
    /// Blocks and large arenas handed out, those in magazines included.
    pub(super) blocks_out: usize,
}

pub(super) struct Slot {
    pub(super) arena: Arena,
    pub(super) token: ArenaToken,
    /// Meaningless while the arena is idle or large.
    class: usize,
    /// A set bit is a free block.
    free: [u64; BITMAP_WORDS],
    free_count: usize,
    /// Position in `Central::partial[class]`, when it is there.
    partial_at: usize,
}

// SAFETY: the table only names memory; the memory itself belongs to the owners of the blocks.
unsafe impl Send for Central {}

impl Central {
    pub(super) fn slot(&self, token: ArenaToken) -> Option<&Slot> {
        self.slots.get(token.slot())?.as_ref().filter(|slot| slot.token == token)
    }

    pub(super) fn is_full(&self) -> bool {
        self.free_slots.is_empty() && self.slots.len() >= 1 << ArenaToken::SLOT_BITS
    }

    pub(super) fn insert(&mut self, arena: Arena, large: bool) -> usize {
        let index = self.free_slots.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        // Relaxed: only uniqueness matters.
        let id = NEXT_ARENA_ID.fetch_add(1, Ordering::Relaxed);
        let token = ArenaToken::new(index, id, large);
        self.bytes += arena.len;
        self.slots[index] =
            Some(Slot { arena, token, class: 0, free: [0; BITMAP_WORDS], free_count: 0, partial_at: 0 });
        index
    }

    /// Makes an idle arena serve `class`.
    pub(super) fn dedicate(&mut self, index: usize, class: usize) {
        let Some(slot) = self.slots[index].as_mut() else { return };
        let blocks = blocks_per_arena(class);
        slot.class = class;
        slot.free_count = blocks;
        slot.free = [0; BITMAP_WORDS];
        for block in 0..blocks {
            slot.free[block / 64] |= 1 << (block % 64);
        }
        slot.partial_at = self.partial[class].len();
        self.partial[class].push(index);
    }

    pub(super) fn take(&mut self, class: usize) -> Option<Block> {
        let index = *self.partial[class].last()?;
        let slot = self.slots[index].as_mut()?;
        let word = slot.free.iter().position(|word| *word != 0)?;
        let block = word * 64 + slot.free[word].trailing_zeros() as usize;
        slot.free[word] &= slot.free[word] - 1;
        slot.free_count -= 1;
        if slot.free_count == 0 {
            self.partial[class].pop();
        }
        self.blocks_out += 1;
        // SAFETY: `block < blocks_per_arena(class)`, so the offset lies inside the arena.
        let ptr = unsafe { slot.arena.ptr.add(block * class_len(class)) };
        Some(Block { ptr, token: slot.token })
    }

    /// Takes a block or a large arena back; the arena becomes idle when it was the last.
    pub(super) fn put(&mut self, block: Block) {
        let index = block.token.slot();
        let Some(slot) = self.slots[index].as_mut() else {
            debug_assert!(false, "released a block of no arena");
            return;
        };
        debug_assert_eq!(slot.token, block.token);
        self.blocks_out -= 1;
        if block.token.is_large() {
            self.idle_bytes += slot.arena.len;
            self.idle_large.push(index);
            return;
        }
        let class = slot.class;
        let number = (block.ptr.as_ptr() as usize - slot.arena.ptr.as_ptr() as usize) / class_len(class);
        debug_assert_eq!(slot.free[number / 64] & 1 << (number % 64), 0, "block released twice");
        slot.free[number / 64] |= 1 << (number % 64);
        slot.free_count += 1;
        if slot.free_count == 1 {
            slot.partial_at = self.partial[class].len();
            self.partial[class].push(index);
        }
        if slot.free_count == blocks_per_arena(class) {
            let at = slot.partial_at;
            self.leave_partial(class, at);
            self.idle_bytes += ARENA_LEN;
            self.idle.push(index);
        }
    }

    fn leave_partial(&mut self, class: usize, at: usize) {
        self.partial[class].swap_remove(at);
        if let Some(moved) = self.partial[class].get(at).copied()
            && let Some(slot) = self.slots[moved].as_mut()
        {
            slot.partial_at = at;
        }
    }

    pub(super) fn take_idle_large(&mut self, len: usize) -> Option<usize> {
        let fits = |index: &usize| self.slots[*index].as_ref().is_some_and(|slot| slot.arena.len == len);
        let at = self.idle_large.iter().rposition(fits)?;
        self.idle_bytes -= len;
        Some(self.idle_large.swap_remove(at))
    }

    /// Removes an idle arena from the table, the large ones first.
    pub(super) fn remove_idle(&mut self) -> Option<Arena> {
        let index =
            if self.idle_large.is_empty() { self.idle.pop()? } else { self.idle_large.swap_remove(0) };
        let slot = self.slots[index].take()?;
        self.free_slots.push(index);
        self.bytes -= slot.arena.len;
        self.idle_bytes -= slot.arena.len;
        Some(slot.arena)
    }
}

pub(super) const fn class_len(class: usize) -> usize {
    MIN_BLOCK << class
}

const fn blocks_per_arena(class: usize) -> usize {
    ARENA_LEN / class_len(class)
}

/// The size class that holds `len` bytes; none when it needs an arena of its own.
pub(super) fn class_of(len: usize) -> Option<usize> {
    if len > MAX_BLOCK {
        return None;
    }
    let len = len.max(MIN_BLOCK).next_power_of_two();
    Some((len.trailing_zeros() - MIN_SHIFT) as usize)
}
