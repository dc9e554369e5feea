//! Operations and their outcomes, as the model and the driver exchange them.

use fs_core::{Error, File, OpenFlags, Stat, StatFs};

/// A handle of the model; the driver has the [`File`] that it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Handle(pub(crate) u64);

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    Create { name: Vec<u8> },
    /// The handle is what the model calls the file that is opened.
    Open { name: Vec<u8>, flags: OpenFlags, handle: Handle },
    Close { handle: Handle },
    Delete { name: Vec<u8> },
    Rename { from: Vec<u8>, to: Vec<u8> },
    /// One page.
    List { prefix: Vec<u8>, after: Option<Vec<u8>>, max: usize },
    /// All pages, by the iterator.
    ListAll { prefix: Vec<u8> },
    Stat { name: Vec<u8> },
    StatFile { handle: Handle },
    /// `slice`: into a slice where the form of the call has that, else into a buffer.
    Read { handle: Handle, offset: u64, len: usize, slice: bool },
    Write { handle: Handle, offset: u64, len: usize, tag: u64, slice: bool },
    Append { handle: Handle, len: usize, tag: u64 },
    Truncate { handle: Handle, size: u64 },
    SyncFile { handle: Handle },
    Sync,
    StatFs,
}

impl Op {
    /// True when there is a future for it and it can be submitted.
    pub(crate) fn is_asynchronous(&self) -> bool {
        !matches!(self, Op::StatFile { .. } | Op::StatFs | Op::ListAll { .. })
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
            | Op::SyncFile { handle } => Some(*handle),
            _ => None,
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
