//! The rows, one file a family.

mod adapter;
mod alloc;
mod blobfs;
mod lookup;
mod memory;
mod mount;
mod names;
mod overwrite;
mod randread;
mod range_lock;
mod read_added;
mod scaling;
mod scattered;
mod stream;

use super::row::Row;

/// All rows, in the order in which they are measured.
pub(crate) fn all() -> impl Iterator<Item = &'static Row> {
    // The last ones keep a large device open.
    [
        randread::ROWS,
        stream::ROWS,
        mount::ROWS,
        names::ROWS,
        overwrite::ROWS,
        blobfs::ROWS,
        lookup::ROWS,
        alloc::ROWS,
        memory::ROWS,
        range_lock::ROWS,
        adapter::ROWS,
        read_added::ROWS,
        randread::LARGE_ROWS,
        scaling::ROWS,
    ]
    .into_iter()
    .flatten()
}
