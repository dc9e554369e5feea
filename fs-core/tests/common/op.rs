//! Operations and their outcomes, as the model and the driver exchange them.

use std::fmt;

use fs_core::{Error, File, Growth, OpenFlags, Stat, StatFs};

/// A handle of the model; the driver has the [`File`] that it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Handle(pub(crate) u64);

/// What is done.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Op {
    Create {
        name: Vec<u8>,
    },
    /// The handle is what the model calls the file that is opened.
    Open {
        name: Vec<u8>,
        flags: OpenFlags,
        handle: Handle,
    },
    Close {
        handle: Handle,
    },
    Delete {
        name: Vec<u8>,
    },
    Rename {
        from: Vec<u8>,
        to: Vec<u8>,
    },
    /// One page.
    List {
        prefix: Vec<u8>,
        after: Option<Vec<u8>>,
        max: usize,
    },
    /// All pages, by the iterator.
    ListAll {
        prefix: Vec<u8>,
    },
    Stat {
        name: Vec<u8>,
    },
    StatFile {
        handle: Handle,
    },
    /// `slice`: into a slice where the form of the call has that, else into a buffer.
    Read {
        handle: Handle,
        offset: u64,
        len: usize,
        slice: bool,
    },
    Write {
        handle: Handle,
        offset: u64,
        len: usize,
        tag: u64,
        slice: bool,
    },
    Append {
        handle: Handle,
        len: usize,
        tag: u64,
    },
    Truncate {
        handle: Handle,
        size: u64,
    },
    Preallocate {
        handle: Handle,
        offset: u64,
        len: u64,
        growth: Growth,
    },
    Zero {
        handle: Handle,
        offset: u64,
        len: u64,
        growth: Growth,
    },
    Punch {
        handle: Handle,
        offset: u64,
        len: u64,
    },
    /// Writes (handle, offset, length, tag) that are done as one.
    Batch {
        writes: Vec<(Handle, u64, usize, u64)>,
    },
    SyncFile {
        handle: Handle,
    },
    Sync,
    StatFs,
}

impl Op {
    /// True when there is a future for it and it can be submitted; and what it answers does not depend on all that is under way.
    pub(crate) fn is_asynchronous(&self) -> bool {
        !matches!(self, Op::ListAll { .. } | Op::StatFs)
    }

    /// The handle that it works with.
    pub(crate) fn handle(&self) -> Option<Handle> {
        match self {
            Op::Close { handle }
            | Op::StatFile { handle }
            | Op::Read { handle, .. }
            | Op::Write { handle, .. }
            | Op::Append { handle, .. }
            | Op::Truncate { handle, .. }
            | Op::Preallocate { handle, .. }
            | Op::Zero { handle, .. }
            | Op::Punch { handle, .. }
            | Op::SyncFile { handle } => Some(*handle),
            _ => None,
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |name: &[u8]| match name.len() {
            0..=100 => format!("'{}'", name.escape_ascii()),
            len => format!("'{}...'({len} bytes)", name[..20].escape_ascii()),
        };
        match self {
            Op::Create { name } => write!(f, "create {}", text(name)),
            Op::Open { name, flags, handle } => write!(f, "open {} {flags:?} as h{}", text(name), handle.0),
            Op::Close { handle } => write!(f, "close h{}", handle.0),
            Op::Delete { name } => write!(f, "delete {}", text(name)),
            Op::Rename { from, to } => write!(f, "rename {} to {}", text(from), text(to)),
            Op::List { prefix, after, max } => {
                write!(f, "list {}* after {:?} max {max}", text(prefix), after.as_deref().map(text))
            }
            Op::ListAll { prefix } => write!(f, "list all {}*", text(prefix)),
            Op::Stat { name } => write!(f, "stat {}", text(name)),
            Op::StatFile { handle } => write!(f, "stat h{}", handle.0),
            Op::Read { handle, offset, len, slice } => {
                write!(f, "read h{} {offset}+{len} slice={slice}", handle.0)
            }
            Op::Write { handle, offset, len, tag, slice } => {
                write!(f, "write h{} {offset}+{len} tag={tag} slice={slice}", handle.0)
            }
            Op::Append { handle, len, tag } => write!(f, "append h{} {len} tag={tag}", handle.0),
            Op::Truncate { handle, size } => write!(f, "truncate h{} to {size}", handle.0),
            Op::Preallocate { handle, offset, len, growth } => {
                write!(f, "preallocate h{} {offset}+{len} {growth:?}", handle.0)
            }
            Op::Zero { handle, offset, len, growth } => {
                write!(f, "zero h{} {offset}+{len} {growth:?}", handle.0)
            }
            Op::Punch { handle, offset, len } => write!(f, "punch h{} {offset}+{len}", handle.0),
            Op::Batch { writes } => write!(f, "batch {writes:?}"),
            Op::SyncFile { handle } => write!(f, "sync h{}", handle.0),
            Op::Sync => write!(f, "sync"),
            Op::StatFs => write!(f, "statfs"),
        }
    }
}

/// What a successful operation answers.
#[derive(Debug)]
pub(crate) enum Answer {
    Done,
    Created(u64),
    Opened(File),
    Bytes(Vec<u8>),
    Offset(u64),
    Stat(Stat),
    /// Names and ids.
    Entries(Vec<(Vec<u8>, u64)>),
    StatFs(StatFs),
}

/// How an operation went.
pub(crate) type Outcome = Result<Answer, Error>;

/// The kinds of errors that the model expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    NameEmpty,
    NameTooLong,
    NameHasNul,
    NotFound,
    Exists,
    FileTooLarge,
    NoSpace,
    ReadOnly,
    Other,
}

/// The kind of an error.
pub(crate) fn kind(error: &Error) -> Kind {
    match error {
        Error::NameEmpty => Kind::NameEmpty,
        Error::NameTooLong { .. } => Kind::NameTooLong,
        Error::NameHasNul { .. } => Kind::NameHasNul,
        Error::NotFound { .. } => Kind::NotFound,
        Error::Exists { .. } => Kind::Exists,
        Error::FileTooLarge { .. } => Kind::FileTooLarge,
        Error::NoSpace { .. } => Kind::NoSpace,
        Error::ReadOnly { .. } => Kind::ReadOnly,
        _ => Kind::Other,
    }
}
