//! A fixed set of DMA buffers that travels between the threads of a transfer.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use bdev_adapter::{Device, DmaBuf};

use crate::failure::Result;
use crate::session::dma_buffers;

/// Buffers that wait to be used, and the way back for those that were. The end of a transfer is the end of its pool.
pub(crate) struct Pool {
    back: Sender<DmaBuf>,
    waiting: Receiver<DmaBuf>,
}

impl Pool {
    /// `number` buffers of `len` bytes.
    pub(crate) fn new(device: &Arc<dyn Device>, number: usize, len: usize) -> Result<Pool> {
        let (back, waiting) = channel();
        for buf in dma_buffers(device, number, len)? {
            // The receiver is here, so this cannot fail.
            let _ = back.send(buf);
        }
        Ok(Pool { back, waiting })
    }

    /// A way for buffers back to the pool, for any thread.
    pub(crate) fn way_back(&self) -> Sender<DmaBuf> {
        self.back.clone()
    }

    /// A buffer, if one is there.
    pub(crate) fn try_take(&self) -> Option<DmaBuf> {
        self.waiting.try_recv().ok()
    }

    /// The receiving side alone, for a thread that waits for buffers; ends when all ways back are gone.
    pub(crate) fn split(self) -> (Sender<DmaBuf>, Receiver<DmaBuf>) {
        (self.back, self.waiting)
    }
}

/// The first bytes of a buffer, with the rest kept aside: a write needs a buffer of its exact length.
pub(crate) struct Part {
    /// The bytes to use.
    pub(crate) buf: DmaBuf,
    /// The rest of the buffer.
    pub(crate) rest: Option<DmaBuf>,
}

impl Part {
    /// The first `len` bytes of `buf`.
    pub(crate) fn of(mut buf: DmaBuf, len: usize) -> Part {
        let rest = (len < buf.len()).then(|| buf.split_off(len));
        Part { buf, rest }
    }

    /// Puts the whole buffer together again.
    pub(crate) fn whole(mut buf: DmaBuf, rest: Option<DmaBuf>) -> DmaBuf {
        if let Some(rest) = rest
            && buf.unsplit(rest).is_err()
        {
            // The filesystem returned another buffer than the one it got.
            unreachable!("a buffer came back from another allocation");
        }
        buf
    }
}
