//! From an operation as a value to the function that does it.

use std::sync::Arc;

use bdev_adapter::DmaBuf;

use crate::channel::io::Io;
use crate::channel::operation::{Operation, Output};
use crate::core::Core;
use crate::error::Result;
use crate::{batch, buffered, commit, layout, namespace, preallocate, punch, truncate, write};

/// Does `operation`; the buffer comes back whatever happens.
pub(crate) async fn run(core: &Arc<Core>, io: &Io, operation: Operation) -> (Result<Output>, Option<DmaBuf>) {
    match operation {
        Operation::Read { file, offset, buf } => {
            let (result, buf) = buffered::read_buf(core, io, &file, offset, buf).await;
            (result.map(Output::Bytes), Some(buf))
        }
        Operation::Write { file, offset, buf } => {
            let (result, buf) = buffered::write_buf(core, io, &file, write::At::Offset(offset), buf).await;
            (result.map(|_| Output::Done), Some(buf))
        }
        Operation::Append { file, buf } => {
            let (result, buf) = buffered::write_buf(core, io, &file, write::At::End, buf).await;
            (result.map(Output::Offset), Some(buf))
        }
        other => (run_without_buffer(core, io, other).await, None),
    }
}

async fn run_without_buffer(core: &Arc<Core>, io: &Io, operation: Operation) -> Result<Output> {
    Ok(match operation {
        Operation::Truncate { file, size } => truncate::truncate(core, io, &file, size).await.map(done)?,
        Operation::Preallocate { file, offset, len, growth } => {
            preallocate::preallocate(core, io, &file, offset, len, growth).await.map(done)?
        }
        Operation::Zero { file, offset, len, growth } => {
            preallocate::zero(core, io, &file, offset, len, growth).await.map(done)?
        }
        Operation::Punch { file, offset, len } => {
            punch::punch(core, io, &file, offset, len).await.map(done)?
        }
        Operation::WriteBatch { batch } => batch::write(core, io, &batch).await.map(done)?,
        Operation::Extents { file, offset, len, max } => {
            Output::Extents(layout::extents(core, io, file.inner(), offset, len, max).await?)
        }
        Operation::SyncFile { file } => commit::sync_file(core, io, &file).await.map(done)?,
        Operation::SyncRange { file, offset, len } => {
            commit::sync_range(core, io, &file, offset, len).await.map(done)?
        }
        Operation::Sync => commit::sync(core, io).await.map(done)?,
        Operation::Create { name } => Output::Created(namespace::create(core, io, &name).await?),
        Operation::Open { name, flags } => Output::Opened(namespace::open(core, io, &name, flags).await?),
        Operation::Close { file } => namespace::close(core, io, file).await.map(done)?,
        Operation::Delete { name } => namespace::delete(core, io, &name).await.map(done)?,
        Operation::Rename { from, to } => namespace::rename(core, io, &from, &to).await.map(done)?,
        Operation::Stat { name } => Output::Stat(namespace::stat(core, io, &name).await?),
        Operation::List { prefix, after, max } => {
            Output::Entries(namespace::list(core, io, &prefix, after.as_deref(), max).await?)
        }
        Operation::StatFs => Output::StatFs(core.statfs()?),
        Operation::Read { .. } | Operation::Write { .. } | Operation::Append { .. } => {
            unreachable!("operations with a buffer are handled by the caller")
        }
    })
}

fn done((): ()) -> Output {
    Output::Done
}

/// The buffer of an operation that is not going to be done.
pub(crate) fn into_buf(operation: Operation) -> Option<DmaBuf> {
    match operation {
        Operation::Read { buf, .. } | Operation::Write { buf, .. } | Operation::Append { buf, .. } => {
            Some(buf)
        }
        _ => None,
    }
}
