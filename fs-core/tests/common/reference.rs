//! The reference model: what a filesystem is, without a device. Names lead to files, files are pages of bytes and a
//! size, handles keep files that have lost their names.
//!
//! [`Reference::settle`] compares the outcome of an operation with what the model says and then does the operation in
//! the model. It knows nothing of the filesystem's internals but three facts that users may rely on: a block that was
//! written or preallocated takes space until it is cut off or punched; the first block of a file may take none, while it
//! has a KiB at most; and an operation that had no space has changed nothing.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use fs_core::{Channel, FILE_SIZE_MAX, File, Growth, NAME_MAX, OpenFlags, Stat, StatFs};

use super::op::{Answer, Handle, Kind, Op, Outcome, kind};
use super::{BLOCK, check_statfs, difference, pattern};

type Page = Box<[u8; BLOCK as usize]>;

/// Content of a file.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) size: u64,
    /// Blocks that were written, by number. What is missing is a hole.
    pub(crate) pages: BTreeMap<u64, Page>,
    /// Blocks that were preallocated and not written since.
    pub(crate) promised: BTreeSet<u64>,
}

impl Content {
    /// The bytes that a read of `len` bytes at `offset` gives.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let end = offset.saturating_add(len as u64).min(self.size);
        let mut bytes = vec![0; end.saturating_sub(offset) as usize];
        if bytes.is_empty() {
            return bytes;
        }
        for (number, page) in self.pages.range(offset / BLOCK..end.div_ceil(BLOCK)) {
            let start = number * BLOCK;
            let (from, to) = (start.max(offset), (start + BLOCK).min(end));
            bytes[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&page[(from - start) as usize..(to - start) as usize]);
        }
        bytes
    }

    /// Writes `data` at `offset`.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        if data.is_empty() {
            return;
        }
        for number in offset / BLOCK..end.div_ceil(BLOCK) {
            let start = number * BLOCK;
            let (from, to) = (start.max(offset), (start + BLOCK).min(end));
            self.promised.remove(&number);
            let page = self.pages.entry(number).or_insert_with(|| Box::new([0; BLOCK as usize]));
            page[(from - start) as usize..(to - start) as usize]
                .copy_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
        }
        self.size = self.size.max(end);
    }

    /// Sets the size.
    pub(crate) fn truncate(&mut self, size: u64) {
        self.pages.split_off(&size.div_ceil(BLOCK));
        if size < self.size {
            self.promised.split_off(&size.div_ceil(BLOCK));
        }
        if let (Some(page), true) = (self.pages.get_mut(&(size / BLOCK)), size < self.size) {
            page[(size % BLOCK) as usize..].fill(0);
        }
        self.size = size;
    }

    /// Gives what has no block in `len` bytes at `offset` one.
    pub(crate) fn preallocate(&mut self, offset: u64, len: u64, growth: Growth) {
        if len == 0 {
            return;
        }
        let blocks = offset / BLOCK..(offset + len).div_ceil(BLOCK);
        self.promised.extend(blocks.filter(|block| !self.pages.contains_key(block)));
        if growth == Growth::Grow {
            self.size = self.size.max(offset + len);
        }
    }

    /// Lets `len` bytes at `offset` read as zeroes, and drops the blocks that lie in them as a whole; what is behind the end
    /// lies in them.
    pub(crate) fn punch(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(FILE_SIZE_MAX);
        if offset >= end {
            return;
        }
        let to = if end >= self.size { end.div_ceil(BLOCK) } else { end / BLOCK };
        let whole = offset.div_ceil(BLOCK)..to;
        self.pages.retain(|number, _| !whole.contains(number));
        self.promised.retain(|number| !whole.contains(number));
        for (number, page) in self.pages.range_mut(offset / BLOCK..end.div_ceil(BLOCK)) {
            let start = number * BLOCK;
            let (from, to) = (start.max(offset), (start + BLOCK).min(end));
            page[(from - start) as usize..(to - start) as usize].fill(0);
        }
    }

    /// Whether block 0 may lie in the metadata.
    fn first_may_be_inline(&self) -> bool {
        self.pages.get(&0).is_some_and(|page| page[1024..].iter().all(|byte| *byte == 0))
    }

    /// Runs of written blocks: first block and number.
    pub(crate) fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for number in self.pages.keys() {
            match runs.last_mut() {
                Some((first, len)) if *first + *len == *number => *len += 1,
                _ => runs.push((*number, 1)),
            }
        }
        runs
    }
}

/// A file.
#[derive(Clone, Default)]
pub(crate) struct RefFile {
    pub(crate) content: Content,
    /// Version at the last look, and whether the file was changed since.
    version: u64,
    changed: bool,
    named: bool,
    handles: usize,
}

/// An open handle.
#[derive(Clone, Copy)]
pub(crate) struct RefHandle {
    /// The id of its file.
    pub(crate) file: u64,
    pub(crate) read_only: bool,
}

/// The model; see the module documentation.
#[derive(Default)]
pub(crate) struct Reference {
    pub(crate) names: BTreeMap<Vec<u8>, u64>,
    /// By inode id.
    pub(crate) files: BTreeMap<u64, RefFile>,
    pub(crate) handles: BTreeMap<Handle, RefHandle>,
    /// The mount is read-only.
    pub(crate) read_only: bool,
    /// Others have files in the filesystem too.
    pub(crate) shared: bool,
    /// Every id that was ever given out.
    pub(crate) ids: HashSet<u64>,
    /// Operations that found no space.
    pub(crate) no_space: u64,
}

impl Reference {
    /// The file behind a handle.
    pub(crate) fn file(&self, handle: Handle) -> &RefFile {
        &self.files[&self.handles[&handle].file]
    }

    fn file_mut(&mut self, handle: Handle) -> &mut RefFile {
        let id = self.handles[&handle].file;
        self.files.get_mut(&id).expect("a handle keeps its file")
    }

    /// Blocks that all files take.
    pub(crate) fn blocks(&self) -> u64 {
        let blocks = |content: &Content| content.pages.len() - content.first_may_be_inline() as usize;
        self.files.values().map(|file| (blocks(&file.content) + file.content.promised.len()) as u64).sum()
    }

    /// Everything is closed, as by an unmount; what has no name is gone.
    pub(crate) fn close_all(&mut self) {
        self.handles.clear();
        self.files.retain(|_, file| file.named);
        self.files.values_mut().for_each(|file| file.handles = 0);
    }

    // ---- what must be refused

    fn name_error(name: &[u8]) -> Option<Kind> {
        match name {
            [] => Some(Kind::NameEmpty),
            _ if name.len() > NAME_MAX => Some(Kind::NameTooLong),
            _ if name.contains(&0) => Some(Kind::NameHasNul),
            _ => None,
        }
    }

    /// The errors of which the operation must end with one; empty: it must succeed (or find no space).
    pub(crate) fn errors(&self, op: &Op) -> Vec<Kind> {
        let mut errors = Vec::new();
        if self.read_only && Self::changes(op) {
            errors.push(Kind::ReadOnly);
        }
        let names: &[&[u8]] = match op {
            Op::Create { name } | Op::Open { name, .. } | Op::Delete { name } | Op::Stat { name } => &[name],
            Op::Rename { from, to } => &[from, to],
            _ => &[],
        };
        errors.extend(names.iter().filter_map(|name| Self::name_error(name)));
        if !errors.is_empty() {
            return errors;
        }
        let missing = |name| !self.names.contains_key::<Vec<u8>>(name);
        let error = match op {
            Op::Create { name } => (!missing(name)).then_some(Kind::Exists),
            Op::Open { name, flags, .. } if missing(name) => {
                (!flags.contains(OpenFlags::CREATE)).then_some(Kind::NotFound)
            }
            Op::Open { flags, .. } => {
                flags.contains(OpenFlags::CREATE | OpenFlags::EXCLUSIVE).then_some(Kind::Exists)
            }
            Op::Delete { name } | Op::Stat { name } | Op::Rename { from: name, .. } => {
                missing(name).then_some(Kind::NotFound)
            }
            Op::Write { handle, offset, len, .. } => self.write_error(*handle, *offset, *len as u64),
            Op::Append { handle, len, .. } => {
                self.write_error(*handle, self.file(*handle).content.size, *len as u64)
            }
            Op::Truncate { handle, size } => self.write_error(*handle, 0, *size),
            Op::Preallocate { handle, offset, len, .. } | Op::Zero { handle, offset, len, .. } => {
                self.write_error(*handle, *offset, *len).filter(|error| *len > 0 || *error == Kind::ReadOnly)
            }
            Op::Punch { handle, .. } => self.write_error(*handle, 0, 0),
            Op::Batch { writes } => writes
                .iter()
                .filter(|(_, _, len, _)| *len > 0)
                .filter_map(|(handle, offset, len, _)| self.write_error(*handle, *offset, *len as u64))
                .max_by_key(|kind| *kind == Kind::ReadOnly),
            _ => None,
        };
        errors.extend(error);
        errors
    }

    fn write_error(&self, handle: Handle, offset: u64, len: u64) -> Option<Kind> {
        if self.handles[&handle].read_only {
            return Some(Kind::ReadOnly);
        }
        let fits = offset.checked_add(len).is_some_and(|end| end <= FILE_SIZE_MAX);
        (!fits).then_some(Kind::FileTooLarge)
    }

    fn changes(op: &Op) -> bool {
        match op {
            Op::Open { flags, .. } => {
                flags.contains(OpenFlags::CREATE) || flags.contains(OpenFlags::TRUNCATE)
            }
            Op::Create { .. }
            | Op::Delete { .. }
            | Op::Rename { .. }
            | Op::Write { .. }
            | Op::Append { .. }
            | Op::Preallocate { .. }
            | Op::Zero { .. }
            | Op::Punch { .. }
            | Op::Truncate { .. } => true,
            Op::Batch { writes } => writes.iter().any(|(_, _, len, _)| *len > 0),
            _ => false,
        }
    }

    /// True when the operation may find no space.
    fn uses_space(&self, op: &Op) -> bool {
        match op {
            Op::Create { .. } | Op::Rename { .. } | Op::Write { .. } | Op::Append { .. } => true,
            Op::Open { name, .. } => !self.names.contains_key(name),
            Op::Truncate { .. } => true,
            Op::Preallocate { .. } | Op::Zero { .. } | Op::Punch { .. } | Op::Batch { .. } => true,
            _ => false,
        }
    }

    // ---- what must come out

    /// Compares `outcome` with what the model says, and does `op` in the model.
    pub(crate) fn settle(&mut self, op: &Op, outcome: &Outcome) {
        let errors = self.errors(op);
        match outcome {
            Err(error) if errors.contains(&kind(error)) => {}
            Err(error) if errors.is_empty() && kind(error) == Kind::NoSpace && self.uses_space(op) => {
                self.no_space += 1;
            }
            Err(error) => panic!("{op:?}: {error:?}, expected {errors:?} (empty: success)"),
            Ok(answer) if errors.is_empty() => self.apply(op, answer),
            Ok(answer) => panic!("{op:?}: {answer:?}, expected one of {errors:?}"),
        }
    }

    fn apply(&mut self, op: &Op, answer: &Answer) {
        match (op, answer) {
            (Op::Create { name }, Answer::Created(id)) => self.add(name, *id),
            (Op::Open { name, flags, handle }, Answer::Opened(file)) => {
                self.opened(name, *flags, *handle, file);
            }
            (Op::Close { handle }, Answer::Done) => {
                let file = self.handles.remove(handle).expect("only open handles are closed").file;
                self.files.get_mut(&file).expect("a handle keeps its file").handles -= 1;
                self.drop_if_unused(file);
            }
            (Op::Delete { name }, Answer::Done) => self.remove(name),
            (Op::Rename { from, to }, Answer::Done) => {
                if from != to {
                    if self.names.contains_key(to) {
                        self.remove(to);
                    }
                    let id = self.names.remove(from).expect("checked by errors()");
                    self.names.insert(to.clone(), id);
                }
            }
            (Op::List { prefix, after, max }, Answer::Entries(found)) => {
                self.check_list(op, found, prefix, after.as_deref(), *max);
            }
            (Op::ListAll { prefix }, Answer::Entries(found)) => {
                self.check_list(op, found, prefix, None, usize::MAX);
            }
            (Op::Stat { name }, Answer::Stat(stat)) => {
                let id = self.names[name];
                self.check_stat(op, id, stat);
            }
            (Op::StatFile { handle }, Answer::Stat(stat)) => {
                self.check_stat(op, self.handles[handle].file, stat);
            }
            (Op::Read { handle, offset, len, .. }, Answer::Bytes(found)) => {
                let expected = self.file(*handle).content.read(*offset, *len);
                if let Some(why) = difference(found, &expected) {
                    let size = self.file(*handle).content.size;
                    panic!("{op:?} of file {} ({size} bytes): {why}", self.handles[handle].file);
                }
            }
            (Op::Write { handle, offset, len, tag, .. }, Answer::Done) => {
                let file = self.file_mut(*handle);
                file.content.write(*offset, &pattern(*tag, *len));
                file.changed |= *len > 0;
            }
            (Op::Append { handle, len, tag }, Answer::Offset(at)) => {
                let file = self.file_mut(*handle);
                assert_eq!(*at, file.content.size, "{op:?}: where an append went");
                file.content.write(*at, &pattern(*tag, *len));
                file.changed |= *len > 0;
            }
            (Op::Truncate { handle, size }, Answer::Done) => {
                let file = self.file_mut(*handle);
                file.changed |= file.content.size != *size;
                file.content.truncate(*size);
            }
            (Op::Preallocate { handle, offset, len, growth }, Answer::Done) => {
                let file = self.file_mut(*handle);
                let size = file.content.size;
                file.content.preallocate(*offset, *len, *growth);
                file.changed |= file.content.size != size;
            }
            (Op::Zero { handle, offset, len, growth }, Answer::Done) => {
                let file = self.file_mut(*handle);
                let before = (file.content.size, file.content.read(*offset, *len as usize));
                if *len > 0 {
                    file.content.punch(*offset, *len);
                    file.content.preallocate(*offset, *len, *growth);
                }
                file.changed |= before != (file.content.size, file.content.read(*offset, *len as usize));
            }
            (Op::Punch { handle, offset, len }, Answer::Done) => {
                let file = self.file_mut(*handle);
                let before = file.content.read(*offset, *len as usize);
                file.content.punch(*offset, *len);
                file.changed |= before != file.content.read(*offset, *len as usize);
            }
            (Op::Batch { writes }, Answer::Done) => {
                for (handle, offset, len, tag) in writes {
                    let file = self.file_mut(*handle);
                    file.content.write(*offset, &pattern(*tag, *len));
                    file.changed |= *len > 0;
                }
            }
            (Op::SyncFile { .. } | Op::Sync, Answer::Done) => {}
            (Op::StatFs, Answer::StatFs(statfs)) => self.check_statfs(statfs),
            (op, answer) => panic!("{op:?} was answered with {answer:?}"),
        }
    }

    fn add(&mut self, name: &[u8], id: u64) {
        assert!(self.ids.insert(id), "inode id {id} was given out twice");
        self.names.insert(name.to_vec(), id);
        self.files.insert(id, RefFile { named: true, ..RefFile::default() });
    }

    fn opened(&mut self, name: &[u8], flags: OpenFlags, handle: Handle, found: &File) {
        let id = found.id().0;
        match self.names.get(name) {
            Some(expected) => assert_eq!(id, *expected, "the file that {name:?} leads to"),
            None => self.add(name, id),
        }
        let file = self.files.get_mut(&id).expect("names lead to files");
        file.handles += 1;
        if flags.contains(OpenFlags::TRUNCATE) {
            file.changed |= file.content.size > 0;
            file.content.truncate(0);
        }
        self.handles.insert(handle, RefHandle { file: id, read_only: flags.contains(OpenFlags::READ_ONLY) });
    }

    fn remove(&mut self, name: &[u8]) {
        let id = self.names.remove(name).expect("checked by errors()");
        self.files.get_mut(&id).expect("names lead to files").named = false;
        self.drop_if_unused(id);
    }

    fn drop_if_unused(&mut self, id: u64) {
        if self.files.get(&id).is_some_and(|file| !file.named && file.handles == 0) {
            self.files.remove(&id);
        }
    }

    fn check_list(&self, op: &Op, found: &[(Vec<u8>, u64)], prefix: &[u8], after: Option<&[u8]>, max: usize) {
        let all = self.names.iter().filter(|(name, _)| name.starts_with(prefix));
        let wanted = all.filter(|(name, _)| after.is_none_or(|after| name.as_slice() > after)).take(max);
        let expected: Vec<_> = wanted.map(|(name, id)| (name.clone(), *id)).collect();
        assert_eq!(found, expected, "{op:?}");
    }

    /// Compares what the filesystem says of file `id`.
    pub(crate) fn check_stat(&mut self, op: &Op, id: u64, stat: &Stat) {
        let file = self.files.get_mut(&id).expect("names lead to files");
        let most = (file.content.pages.len() + file.content.promised.len()) as u64;
        let blocks = stat.allocated_bytes / BLOCK;
        assert_eq!(stat.id.0, id, "{op:?}");
        assert_eq!(stat.size, file.content.size, "{op:?}: size of file {id}");
        // One that is inline takes none, and pages that were written through the cache may have no place yet, or replace blocks that
        // have one.
        let least =
            (most - u64::from(file.content.first_may_be_inline())).saturating_sub(stat.delayed_bytes / BLOCK);
        assert!((least..=most).contains(&blocks), "{op:?}: space of file {id}: {least}..={most}, {stat:?}");
        let extents = u64::from(least > 0)..=most;
        assert!(extents.contains(&stat.extents), "{op:?}: {blocks} blocks in {} extents", stat.extents);
        assert!(stat.modified >= stat.created, "{op:?}: {stat:?}");
        if file.changed {
            assert!(stat.version > file.version, "{op:?}: file {id} was changed: {stat:?}");
        } else {
            assert!(stat.version >= file.version, "{op:?}: version of file {id} went back: {stat:?}");
        }
        (file.version, file.changed) = (stat.version, false);
    }

    /// Compares all names under `prefix`, and the files they lead to, with the reference. Returns the bytes compared.
    pub(crate) fn verify_all(&mut self, channel: &Channel, prefix: &[u8]) -> u64 {
        self.check_statfs(&channel.statfs().expect("statfs"));
        let entries: Vec<_> = channel.list(prefix).collect::<Result<_, _>>().expect("a listing");
        let found: Vec<_> = entries.into_iter().map(|entry| (entry.name, entry.id.0)).collect();
        let expected: Vec<_> = self.names.iter().map(|(name, id)| (name.clone(), *id)).collect();
        assert_eq!(found, expected);
        let mut verified = 0;
        for (name, id) in expected {
            let stat = channel.stat(&name).expect("stat");
            let file = channel.open(&name, OpenFlags::READ_ONLY).expect("open");
            self.check_stat(&Op::Stat { name }, id, &stat);
            verified += self.verify_file(channel, &file, id);
            channel.close(file).expect("close");
        }
        verified
    }

    /// Compares the bytes of a file: what was written, with some of the holes around it.
    fn verify_file(&self, channel: &Channel, file: &File, id: u64) -> u64 {
        let content = &self.files[&id].content;
        let around = |(first, len): (u64, u64)| (first.saturating_sub(2) * BLOCK, (first + len + 2) * BLOCK);
        let mut ranges: Vec<(u64, u64)> = content.runs().into_iter().map(around).collect();
        ranges.push((content.size.saturating_sub(5000), content.size + 5000));
        let (mut buf, mut verified) = (Vec::new(), 0);
        for (from, to) in ranges {
            buf.resize((to - from) as usize, 0xEE);
            let there = channel.read(file, from, &mut buf).expect("a read");
            if let Some(why) = difference(&buf[..there], &content.read(from, buf.len())) {
                panic!("file {id} ({} bytes), from byte {from}: {why}", content.size);
            }
            verified += there as u64;
        }
        verified
    }

    /// Compares what the filesystem says of itself.
    pub(crate) fn check_statfs(&self, statfs: &StatFs) {
        check_statfs(statfs);
        if !self.shared {
            assert_eq!(statfs.files, self.names.len() as u64, "files");
        }
        let least = self.blocks() * BLOCK;
        let taken = statfs.used_bytes + statfs.reserved_bytes;
        assert!(taken >= least, "{statfs:?}: the files alone take {least} bytes");
    }
}
