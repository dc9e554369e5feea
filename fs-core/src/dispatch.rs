//! From an operation as a value to the function that does it.

use std::sync::Arc;

use bdev_adapter::{DmaBuf, Segments};
use smallvec::SmallVec;

use crate::channel::io::Io;
use crate::channel::operation::{Operation, Output};
use crate::core::Core;
use crate::error::Result;
use crate::preallocate::Content;
use crate::{batch, buffered, commit, layout, namespace, preallocate, punch, truncate, write};

/// Does `operation`; its buffers come back whatever happens.
pub(crate) async fn run(core: &Arc<Core>, io: &Io, operation: Operation) -> (Result<Output>, Segments) {
    match operation {
        Operation::Read { file, offset, buf } => {
            let (result, bufs) = buffered::read_bufs(core, io, &file, offset, buf.into()).await;
            (result.map(Output::Bytes), bufs)
        }
        Operation::Readv { file, offset, bufs } => {
            let lens = lens(&bufs);
            let (result, bufs) = buffered::read_bufs(core, io, &file, offset, bufs.into()).await;
            (result.map(Output::Bytes), bufs.cut_to(&lens).into())
        }
        Operation::Write { file, offset, buf } => {
            let at = write::At::Offset(offset);
            let (result, bufs) = buffered::write_bufs(core, io, &file, at, buf.into()).await;
            (result.map(|_| Output::Done), bufs)
        }
        Operation::Writev { file, offset, bufs } => {
            let (at, lens) = (write::At::Offset(offset), lens(&bufs));
            let (result, bufs) = buffered::write_bufs(core, io, &file, at, bufs.into()).await;
            (result.map(|_| Output::Done), bufs.cut_to(&lens).into())
        }
        Operation::Append { file, buf } => {
            let (result, bufs) = buffered::write_bufs(core, io, &file, write::At::End, buf.into()).await;
            (result.map(Output::Offset), bufs)
        }
        other => (run_without_buffer(core, io, other).await, Segments::None),
    }
}

fn lens(bufs: &[DmaBuf]) -> SmallVec<[usize; 8]> {
    bufs.iter().map(|buf| buf.len()).collect()
}

async fn run_without_buffer(core: &Arc<Core>, io: &Io, operation: Operation) -> Result<Output> {
    Ok(match operation {
        Operation::Truncate { file, size } => truncate::truncate(core, io, &file, size).await.map(done)?,
        Operation::Preallocate { file, offset, len, growth } => {
            preallocate::preallocate(core, io, &file, (offset, len), Content::Stays, growth)
                .await
                .map(done)?
        }
        Operation::Zero { file, offset, len, growth } => {
            preallocate::preallocate(core, io, &file, (offset, len), Content::Zeroed, growth)
                .await
                .map(done)?
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
        Operation::Stat { name } => Output::Stat(Box::new(namespace::stat(core, io, &name).await?)),
        Operation::StatFile { file } => Output::Stat(Box::new(file.inner().stat())),
        Operation::List { prefix, after, max } => {
            Output::Entries(namespace::list(core, io, &prefix, after.as_deref(), max).await?)
        }
        Operation::StatFs => Output::StatFs(Box::new(core.statfs()?)),
        Operation::Read { .. }
        | Operation::Readv { .. }
        | Operation::Write { .. }
        | Operation::Writev { .. }
        | Operation::Append { .. } => {
            unreachable!("operations with a buffer are handled by the caller")
        }
    })
}

fn done((): ()) -> Output {
    Output::Done
}

/// The buffers of an operation that is not going to be done.
pub(crate) fn into_bufs(operation: Operation) -> Segments {
    match operation {
        Operation::Read { buf, .. } | Operation::Write { buf, .. } | Operation::Append { buf, .. } => {
            Segments::One(buf)
        }
        Operation::Readv { bufs, .. } | Operation::Writev { bufs, .. } => Segments::Many(bufs),
        _ => Segments::None,
    }
}
