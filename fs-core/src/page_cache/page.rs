//! A page: one block of a file in memory, shared, and never changed while it is shared.
//!
//! Whoever copies from a page, or writes it back, holds a clone of it. A writer that finds others holding the page gets a copy
//! of its own ([`Page::make_mut`]), so nobody ever sees a page change under a copy.

use std::sync::Arc;

use crate::types::BLOCK_SIZE;

/// See the module documentation.
#[derive(Clone)]
pub(crate) struct Page(Arc<[u8; BLOCK_SIZE]>);

impl Page {
    /// A page with these bytes, which are one block.
    pub(crate) fn copied(bytes: &[u8]) -> Page {
        let shared: Arc<[u8]> = Arc::from(bytes);
        match shared.try_into() {
            Ok(page) => Page(page),
            Err(_) => unreachable!("a page is made from one block"),
        }
    }

    pub(crate) fn zeroed() -> Page {
        Page::copied(&[0; BLOCK_SIZE])
    }

    /// Its bytes, to be changed: those of a copy if anybody else holds the page.
    pub(crate) fn make_mut(&mut self) -> &mut [u8; BLOCK_SIZE] {
        Arc::make_mut(&mut self.0)
    }
}

impl std::ops::Deref for Page {
    type Target = [u8; BLOCK_SIZE];

    fn deref(&self) -> &[u8; BLOCK_SIZE] {
        &self.0
    }
}
