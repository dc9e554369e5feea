//! Blocking reads that qualify for the short way ([`super::fast_read`]): one request, one loop that polls for its answer.
//!
//! What does not qualify, and what fails, is left to the general way by the caller. No task is made, and nothing is allocated
//! once the channel has a buffer of the right length for reads through a copy.

use bdev_adapter::DmaBuf;

use super::fast_read::{BLOCKS_MAX, Waited};
use super::{Channel, NAP};
use crate::file::File;
use crate::sync::{self, SPINS_BEFORE_SLEEP};
use crate::types::BLOCK_SIZE;

/// Polls between two times that others may enter the channel.
const POLLS_AT_ONCE: u32 = 64;

impl Channel {
    /// Reads `buf.len()` bytes from byte `offset` into `buf` and verifies them; or gives the buffer back if that must be done the
    /// general way.
    pub(super) fn read_short(&self, file: &File, offset: u64, buf: DmaBuf) -> Result<DmaBuf, DmaBuf> {
        self.stamp();
        let mut engine = self.shared.engine.lock();
        self.hand_over(&mut engine);
        if let Err(buf) = engine.start_waited(file, offset, buf) {
            // What was handed over is started.
            engine.poll();
            return Err(buf);
        }
        let mut idle = 0;
        loop {
            for _ in 0..POLLS_AT_ONCE {
                engine.poll();
                match engine.reads.waited.take() {
                    Some(Waited::Done(buf)) => return Ok(buf),
                    Some(Waited::General(buf)) => return Err(buf),
                    None => sync::spin(),
                }
            }
            drop(engine);
            idle += POLLS_AT_ONCE;
            if idle >= SPINS_BEFORE_SLEEP {
                self.nap(NAP);
                self.core.drive_abandoned();
            }
            self.stamp();
            engine = self.shared.engine.lock();
        }
    }

    /// As [`read_short`](Self::read_short) through a copy; whether it has filled `out`.
    pub(super) fn read_short_copy(&self, file: &File, offset: u64, out: &mut [u8]) -> bool {
        let len = out.len();
        if (offset | len as u64) & (BLOCK_SIZE as u64 - 1) != 0 || len == 0 || len > BLOCKS_MAX * BLOCK_SIZE {
            return false;
        }
        let buf = self.bounce.take().filter(|buf| buf.len() == len);
        let Some(buf) = buf.or_else(|| self.buffer(len).ok()) else { return false };
        let (done, buf) = match self.read_short(file, offset, buf) {
            Ok(buf) => (true, buf),
            Err(buf) => (false, buf),
        };
        if done {
            out.copy_from_slice(&buf);
        }
        self.bounce.set(Some(buf));
        done
    }
}
