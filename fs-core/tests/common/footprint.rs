//! What operations in flight together touch, so that only such are put together whose outcome does not depend on their
//! order. Bytes count, not blocks: two writes into one block may well be in flight together.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use fs_core::OpenFlags;

use super::op::Op;
use super::reference::Reference;

/// See the module documentation.
#[derive(Default)]
pub(crate) struct Footprint {
    /// Names that some operation looks up or changes.
    names: HashSet<Vec<u8>>,
    names_changed: bool,
    names_listed: bool,
    files: HashMap<u64, Use>,
}

#[derive(Default)]
struct Use {
    alone: bool,
    any: bool,
    reads: Vec<Range<u64>>,
    writes: Vec<Range<u64>>,
    grows: bool,
    sees_size: bool,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Use {
    fn claim_alone(&mut self) -> bool {
        let free = !self.any;
        self.alone = true;
        self.any = true;
        free
    }

    fn claim(&mut self, range: Range<u64>, write: bool, size: u64) -> bool {
        let beyond = range.end > size;
        let clash = self.alone
            || self.writes.iter().any(|other| overlap(other, &range))
            || (write && self.reads.iter().any(|other| overlap(other, &range)))
            || (write && beyond && self.sees_size)
            || (!write && beyond && self.grows);
        if clash {
            return false;
        }
        self.any = true;
        self.grows |= write && beyond;
        self.sees_size |= !write && beyond;
        if write {
            self.writes.push(range)
        } else {
            self.reads.push(range)
        }
        true
    }
}

impl Footprint {
    /// Adds `op`, unless its outcome could depend on the operations that were added before, or theirs on it.
    pub(crate) fn admit(&mut self, reference: &Reference, op: &Op) -> bool {
        let names: Vec<&Vec<u8>> = match op {
            Op::Create { name } | Op::Open { name, .. } | Op::Delete { name } | Op::Stat { name } => {
                vec![name]
            }
            Op::Rename { from, to } => vec![from, to],
            Op::List { .. } | Op::ListAll { .. } | Op::StatFs => {
                self.names_listed = true;
                return !self.names_changed;
            }
            _ => vec![],
        };
        if names.iter().any(|name| self.names.contains(*name)) {
            return false;
        }
        let changes_names = match op {
            Op::Create { .. } | Op::Delete { .. } | Op::Rename { .. } => true,
            Op::Open { flags, .. } => flags.contains(OpenFlags::CREATE),
            _ => false,
        };
        if changes_names && self.names_listed {
            return false;
        }
        let fits = match op {
            Op::Stat { name } => self.alone(reference.names.get(name)),
            Op::Open { name, flags, .. } if flags.contains(OpenFlags::TRUNCATE) => {
                self.alone(reference.names.get(name))
            }
            Op::Read { handle, offset, len, .. } => {
                let (id, size) = (reference.handles[handle].file, reference.file(*handle).content.size);
                let range = *offset..offset.saturating_add(*len as u64);
                self.files.entry(id).or_default().claim(range, false, size)
            }
            Op::Write { handle, offset, len, .. } => {
                let (id, size) = (reference.handles[handle].file, reference.file(*handle).content.size);
                let range = *offset..offset.saturating_add(*len as u64);
                self.files.entry(id).or_default().claim(range, true, size)
            }
            Op::Batch { writes } => {
                let files: HashSet<u64> =
                    writes.iter().map(|(handle, ..)| reference.handles[handle].file).collect();
                let free = |id| self.files.get(id).is_none_or(|file| !file.any);
                files.iter().all(free) && files.iter().all(|id| self.alone(Some(id)))
            }
            Op::SyncFile { handle } => {
                let id = reference.handles[handle].file;
                self.files.entry(id).or_default().claim(0..0, false, u64::MAX)
            }
            Op::Close { handle }
            | Op::StatFile { handle }
            | Op::Append { handle, .. }
            | Op::Preallocate { handle, .. }
            | Op::Zero { handle, .. }
            | Op::Punch { handle, .. }
            | Op::Truncate { handle, .. } => self.alone(Some(&reference.handles[handle].file)),
            _ => true,
        };
        if fits {
            self.names_changed |= changes_names;
            self.names.extend(names.into_iter().cloned());
        }
        fits
    }

    fn alone(&mut self, file: Option<&u64>) -> bool {
        file.is_none_or(|file| self.files.entry(*file).or_default().claim_alone())
    }
}
