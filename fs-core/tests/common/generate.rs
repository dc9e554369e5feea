//! Generated operations: few names, so that they collide; offsets and lengths around block borders; now and then
//! something that must be refused.

use std::ops::Range;

use fs_core::{FILE_SIZE_MAX, Growth, OpenFlags};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::BLOCK;
use super::op::{Handle, Op};
use super::reference::Reference;

/// What kind of operations are generated.
#[derive(Clone)]
pub(crate) struct Shape {
    /// Names that are used.
    pub(crate) names: Vec<Vec<u8>>,
    /// All names begin with so many bytes, and nothing is listed under a shorter prefix.
    pub(crate) prefix_len: usize,
    /// Files stay below about this size, but for a few sparse ones.
    pub(crate) file_bytes: u64,
    /// Longest read or write.
    pub(crate) io_bytes: usize,
    /// Of a hundred reads and writes, so many are of any length up to that; the others are short.
    pub(crate) long_percent: u32,
    /// Most operations that are put in flight together.
    pub(crate) together: usize,
    /// While things grow, one delete, truncate or replacing rename of so many is done.
    pub(crate) keep: u32,
    /// Handles that are open at once.
    pub(crate) handles: usize,
    /// In a thousand operations, so many make or take a name.
    pub(crate) names_permille: u32,
    /// In a thousand operations, so many syncs.
    pub(crate) sync_permille: u32,
    /// Once in so many truncates or writes, something far out in a sparse file; 0: never.
    pub(crate) sparse_one_in: u32,
    /// Once in so many operations, one that must be refused; 0: never.
    pub(crate) bad_one_in: u32,
    /// Of a hundred handles, so many are buffered; several on one file may be of both kinds.
    pub(crate) buffered_percent: u32,
}

impl Shape {
    /// A few names with much in common.
    pub(crate) fn few_names() -> Shape {
        let mut names: Vec<Vec<u8>> =
            ["a", "b", "c", "ab", "abc", "abd", "b/1", "b/2", "b/10", "ü"].map(|name| name.into()).into();
        names.push(vec![0xFF; 3]);
        names.push(vec![b'a'; 255]);
        names.push([vec![b'a'; 254], vec![b'b']].concat());
        Shape {
            names,
            prefix_len: 0,
            file_bytes: 1 << 20,
            io_bytes: 256 << 10,
            long_percent: 4,
            together: 32,
            keep: 8,
            handles: 10,
            names_permille: 180,
            sync_permille: 12,
            sparse_one_in: 300,
            bad_one_in: 100,
            buffered_percent: 50,
        }
    }

    /// The same with names that all begin with `prefix`.
    pub(crate) fn under(self, prefix: &[u8]) -> Shape {
        let room = 255 - prefix.len();
        let names = self.names.iter().map(|name| [prefix, &name[..name.len().min(room)]].concat());
        let mut names: Vec<Vec<u8>> = names.collect();
        names.sort_unstable();
        names.dedup();
        Shape { names, prefix_len: self.prefix_len + prefix.len(), ..self }
    }

    /// So many names of some length, under a few prefixes.
    pub(crate) fn many_names(count: usize) -> Shape {
        let name = |i: usize| format!("{}/{:0>60}/{i}", ["db", "log", "tmp"][i % 3], i * 7919 % 1000).into();
        Shape {
            names: (0..count).map(name).collect(),
            file_bytes: 64 << 10,
            io_bytes: 16 << 10,
            handles: 40,
            names_permille: 500,
            ..Shape::few_names()
        }
    }
}

/// Generates operations. The same seed and the same course of the model give the same operations.
pub(crate) struct Generator {
    pub(crate) rng: SmallRng,
    pub(crate) shape: Shape,
    /// Things are mostly made now, and seldom deleted or cut.
    pub(crate) growing: bool,
    next: u64,
}

impl Generator {
    pub(crate) fn new(seed: u64, shape: Shape) -> Generator {
        Generator { rng: SmallRng::seed_from_u64(seed), shape, growing: true, next: 1 }
    }

    /// A number that was never given out: tag of data, or handle.
    pub(crate) fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// True once in `n` times; never for 0.
    pub(crate) fn one_in(&mut self, n: u32) -> bool {
        n > 0 && self.rng.random_ratio(1, n)
    }

    /// The next operation.
    pub(crate) fn op(&mut self, reference: &Reference) -> Op {
        if self.one_in(self.shape.bad_one_in) {
            return self.refused(reference);
        }
        loop {
            let op = self.any(reference);
            let shrinks = match &op {
                Op::Delete { .. } | Op::Truncate { .. } => true,
                Op::Rename { to, .. } => reference.names.contains_key(to),
                Op::Open { flags, .. } => flags.contains(OpenFlags::TRUNCATE),
                _ => false,
            };
            if !shrinks || !self.growing || self.one_in(self.shape.keep) {
                return op;
            }
        }
    }

    fn any(&mut self, reference: &Reference) -> Op {
        let dice = self.rng.random_range(0..1000);
        let names = self.shape.names_permille;
        if dice < names {
            return self.name_op(reference);
        }
        if dice < names + self.shape.sync_permille {
            return match self.handle(reference) {
                Some(handle) if self.rng.random() => Op::SyncFile { handle },
                _ => Op::Sync,
            };
        }
        match self.handle(reference) {
            Some(handle) => self.file_op(reference, handle),
            None => self.open(),
        }
    }

    /// A file that is open.
    fn handle(&mut self, reference: &Reference) -> Option<Handle> {
        let count = reference.handles.len();
        if count == 0 {
            return None;
        }
        let index = self.rng.random_range(0..count);
        reference.handles.keys().nth(index).copied()
    }

    /// A name: mostly one that exists, if `existing`.
    fn name(&mut self, reference: &Reference, existing: bool) -> Vec<u8> {
        let index = self.rng.random_range(0..self.shape.names.len());
        let name = self.shape.names[index].clone();
        if existing && self.rng.random_ratio(9, 10) {
            let mut around = reference.names.range(name.clone()..).chain(reference.names.iter());
            return around.next().map_or(name, |(name, _)| name.clone());
        }
        name
    }

    fn name_op(&mut self, reference: &Reference) -> Op {
        let full = reference.handles.len() >= self.shape.handles;
        match self.rng.random_range(0..100) {
            0..10 => Op::Create { name: self.name(reference, false) },
            10..35 if !full => self.open(),
            10..35 => match self.handle(reference) {
                Some(handle) => Op::Close { handle },
                None => Op::Sync,
            },
            35..45 => match self.handle(reference) {
                Some(handle) => Op::Close { handle },
                None => self.open(),
            },
            45..58 => Op::Delete { name: self.name(reference, true) },
            58..68 => {
                let from = self.name(reference, true);
                let same = self.one_in(20);
                let onto = self.rng.random();
                let to = if same { from.clone() } else { self.name(reference, onto) };
                Op::Rename { from, to }
            }
            68..80 => Op::Stat { name: self.name(reference, true) },
            80..86 => match self.handle(reference) {
                Some(handle) => Op::StatFile { handle },
                None => Op::StatFs,
            },
            86..90 => Op::StatFs,
            90..96 => Op::List {
                prefix: self.prefix(),
                after: self.rng.random::<bool>().then(|| self.name(reference, true)),
                max: self.rng.random_range(0..8),
            },
            _ => Op::ListAll { prefix: self.prefix() },
        }
    }

    fn prefix(&mut self) -> Vec<u8> {
        let index = self.rng.random_range(0..self.shape.names.len());
        let least = self.shape.prefix_len;
        let len = self.rng.random_range(least..=self.shape.names[index].len().min(least + 4));
        self.shape.names[index][..len].to_vec()
    }

    fn open(&mut self) -> Op {
        let flags = match self.rng.random_range(0..20) {
            0..3 => OpenFlags::READ_WRITE,
            3..13 => OpenFlags::CREATE,
            13 => OpenFlags::CREATE | OpenFlags::EXCLUSIVE,
            14 => OpenFlags::EXCLUSIVE,
            15 => OpenFlags::CREATE | OpenFlags::TRUNCATE,
            16 => OpenFlags::TRUNCATE,
            17 => OpenFlags::READ_ONLY | OpenFlags::CREATE,
            _ => OpenFlags::READ_ONLY,
        };
        let buffered = self.rng.random_range(0..100) < self.shape.buffered_percent;
        let flags = if buffered { flags | OpenFlags::BUFFERED } else { flags };
        let index = self.rng.random_range(0..self.shape.names.len());
        let name = self.shape.names[index].clone();
        Op::Open { name, flags, handle: Handle(self.fresh()) }
    }

    fn file_op(&mut self, reference: &Reference, handle: Handle) -> Op {
        let size = reference.file(handle).content.size;
        let slice = self.rng.random();
        match self.rng.random_range(0..105) {
            0..45 => {
                let beyond = if self.one_in(8) { 2 * BLOCK } else { 1 };
                let offset = self.position(0..size + beyond);
                let len = self.length();
                Op::Read { handle, offset, len, slice }
            }
            45..80 => {
                let far = size.max(self.shape.file_bytes / 2);
                let mut offset = self.position(0..far.min(self.shape.file_bytes));
                if self.one_in(self.shape.sparse_one_in) {
                    let far = 1 << self.rng.random_range(20..46);
                    offset = self.position(0..far);
                } else if size > 0 && self.one_in(4) {
                    // Overwrites and short growth at the end.
                    offset = size.saturating_sub(self.rng.random_range(0..3 * BLOCK));
                }
                Op::Write { handle, offset, len: self.length(), tag: self.fresh(), slice }
            }
            80..90 if size < self.shape.file_bytes => {
                Op::Append { handle, len: self.length(), tag: self.fresh() }
            }
            90..95 => self.space_op(reference, handle, size),
            _ => {
                let far = if self.one_in(self.shape.sparse_one_in) {
                    1 << self.rng.random_range(20..50)
                } else {
                    (size + 2 * BLOCK).min(self.shape.file_bytes)
                };
                Op::Truncate { handle, size: self.position(0..far) }
            }
        }
    }

    /// Something about the space behind a file, or several writes at once.
    fn space_op(&mut self, reference: &Reference, handle: Handle, size: u64) -> Op {
        let far = (size + 4 * BLOCK).min(self.shape.file_bytes);
        let (mut offset, len) = (self.position(0..far), self.length() as u64);
        if self.one_in(self.shape.sparse_one_in) {
            let far = 1 << self.rng.random_range(20..46);
            offset = self.position(0..far);
        }
        let growth = if self.rng.random() { Growth::Grow } else { Growth::Keep };
        match self.rng.random_range(0..8) {
            0 | 1 => Op::Preallocate { handle, offset, len, growth },
            2 | 3 => Op::Zero { handle, offset, len, growth },
            4 | 5 => Op::Punch { handle, offset, len },
            _ => {
                let writes = (0..self.rng.random_range(0..6)).filter_map(|_| {
                    let handle = self.handle(reference)?;
                    let offset = self.position(0..far);
                    Some((handle, offset, self.length().min(300_000), self.fresh()))
                });
                Op::Batch { writes: writes.collect() }
            }
        }
    }

    /// A byte, likely at or beside a block border.
    fn position(&mut self, range: Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let any = self.rng.random_range(range);
        match self.rng.random_range(0..10) {
            0..5 => any - any % BLOCK,
            5 => (any - any % BLOCK).saturating_sub(1),
            6 => any - any % BLOCK + 1,
            7 => any - any % 512,
            _ => any,
        }
    }

    /// A length, mostly short, often whole blocks.
    fn length(&mut self) -> usize {
        let block = BLOCK as usize;
        let most = self.shape.io_bytes;
        let len = match self.rng.random_range(0..20) {
            _ if self.rng.random_range(0..100) < self.shape.long_percent => {
                let any = self.rng.random_range(0..=most);
                if self.rng.random() { any - any % block } else { any }
            }
            0 => [0, 1, 511, 512, 1023, 1024, 1025, block - 1, block + 1][self.rng.random_range(0..9)],
            1..4 => self.rng.random_range(1..3 * block),
            4..10 => block,
            10..17 => block * self.rng.random_range(1..=8),
            17 => self.rng.random_range(0..16 * block),
            _ => block * self.rng.random_range(1..=32),
        };
        len.min(most)
    }

    /// Something that must be refused, and change nothing.
    fn refused(&mut self, reference: &Reference) -> Op {
        let name = match self.rng.random_range(0..5) {
            0 => vec![],
            1 => vec![b'x'; 256],
            2 => vec![b'x'; self.rng.random_range(257..70_000)],
            3 => b"a\0".to_vec(),
            _ => b"never made".to_vec(),
        };
        let handle = self.handle(reference);
        match (self.rng.random_range(0..8), handle) {
            (0, _) => Op::Rename { from: name, to: self.name(reference, true) },
            (1, _) => Op::Rename { from: self.name(reference, true), to: vec![b'y'; 300] },
            (2, _) => Op::Delete { name },
            (3, _) => Op::Stat { name },
            (4, _) => Op::Open { name, flags: OpenFlags::READ_WRITE, handle: Handle(self.fresh()) },
            (5, Some(handle)) => {
                let offset = [FILE_SIZE_MAX, FILE_SIZE_MAX - 100, u64::MAX - 4095, u64::MAX]
                    [self.rng.random_range(0..4)];
                Op::Write { handle, offset, len: 4096, tag: self.fresh(), slice: self.rng.random() }
            }
            (6, Some(handle)) => {
                Op::Truncate { handle, size: FILE_SIZE_MAX + 1 + (self.rng.random::<u64>() >> 14) }
            }
            (7, Some(handle)) => {
                // No error: there is nothing to read.
                let offset = [FILE_SIZE_MAX, u64::MAX - 4095, u64::MAX][self.rng.random_range(0..3)];
                Op::Read { handle, offset, len: 4096, slice: self.rng.random() }
            }
            _ => Op::Open { name, flags: OpenFlags::READ_ONLY, handle: Handle(self.fresh()) },
        }
    }
}
