//! Cuts a scatter list for a torn write, and puts it together again for the caller.

use crate::{DmaBuf, Segments};

/// The end of a scatter list that was cut off, possibly inside a buffer.
pub(super) struct TornOff {
    /// The other half of the last buffer that was kept.
    half: Option<DmaBuf>,
    whole: Vec<DmaBuf>,
}

impl TornOff {
    /// Cuts `bufs` to its first `keep` bytes (at least one, fewer than it has).
    pub(super) fn cut(bufs: &mut Segments, keep: u64) -> TornOff {
        let mut left = keep as usize;
        let mut kept = 0;
        let mut half = None;
        for buf in bufs.as_mut_slice() {
            if left == 0 {
                break;
            }
            if left < buf.len() {
                half = Some(buf.split_off(left));
            }
            left -= buf.len();
            kept += 1;
        }
        let whole = match bufs {
            Segments::Many(list) => list.split_off(kept),
            _ => Vec::new(),
        };
        TornOff { half, whole }
    }

    /// Puts the end back.
    pub(super) fn rejoin(self, bufs: &mut Segments) {
        let refused = match (bufs.as_mut_slice().last_mut(), self.half) {
            (Some(last), Some(half)) => last.unsplit(half).err(),
            (_, half) => half,
        };
        debug_assert!(refused.is_none(), "the halves of one buffer fit together");
        if let Segments::Many(list) = bufs {
            list.extend(self.whole);
        }
    }
}
