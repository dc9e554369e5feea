//! What every file of the demo must contain, without keeping its bytes: the host's file plus the changes since.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::transfer::edit::{Change, pattern};

/// What one file must be.
#[derive(Debug, Clone, Default)]
pub(crate) struct Expected {
    /// The host's file that it was imported from; `None` for a file that began empty.
    pub(crate) source: Option<PathBuf>,
    /// Bytes that were imported.
    pub(crate) source_size: u64,
    /// What happened to it since, in order.
    pub(crate) changes: Vec<Change>,
    /// How long it is now.
    pub(crate) size: u64,
}

impl Expected {
    /// A file of `size` bytes as it came from the host.
    pub(crate) fn imported(source: PathBuf, size: u64) -> Expected {
        Expected { source: Some(source), source_size: size, changes: Vec::new(), size }
    }

    /// Records a change.
    pub(crate) fn change(&mut self, change: Change) {
        self.size = match change {
            Change::Write { offset, len, .. } => self.size.max(offset + len as u64),
            Change::Truncate { size } => size,
        };
        self.changes.push(change);
    }

    /// Turns `bytes`, which hold what the host's file has from byte `offset` on (zeroes beyond its end), into what this
    /// file must have there.
    pub(crate) fn replay(&self, offset: u64, bytes: &mut [u8]) {
        // Invariant: beyond the size of the moment, `bytes` are zero.
        let end = offset + bytes.len() as u64;
        for change in &self.changes {
            match *change {
                Change::Write { offset: from, len, seed } => {
                    let (start, stop) = (from.max(offset), (from + len as u64).min(end));
                    if start < stop {
                        pattern(seed, start, &mut bytes[(start - offset) as usize..(stop - offset) as usize]);
                    }
                }
                Change::Truncate { size } if size < end => {
                    bytes[size.saturating_sub(offset) as usize..].fill(0)
                }
                Change::Truncate { .. } => {}
            }
        }
    }
}

/// All files that must exist, by name.
pub(crate) type Model = BTreeMap<Vec<u8>, Expected>;

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// The same changes on a plain vector.
    fn naive(source: &[u8], changes: &[Change]) -> Vec<u8> {
        let mut bytes = source.to_vec();
        for change in changes {
            match *change {
                Change::Write { offset, len, seed } => {
                    let end = offset as usize + len;
                    bytes.resize(bytes.len().max(end), 0);
                    pattern(seed, offset, &mut bytes[offset as usize..end]);
                }
                Change::Truncate { size } => bytes.resize(size as usize, 0),
            }
        }
        bytes
    }

    #[test]
    fn replay_agrees_with_a_plain_vector() {
        for seed in 0..200 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let source: Vec<u8> = (0..rng.random_range(0..3000)).map(|_| rng.random()).collect();
            let mut file = Expected::imported(PathBuf::new(), source.len() as u64);
            for _ in 0..rng.random_range(0..12) {
                file.change(if rng.random_bool(0.6) {
                    let (offset, len) = (rng.random_range(0..4000), rng.random_range(1..700));
                    Change::Write { offset, len, seed: rng.random() }
                } else {
                    Change::Truncate { size: rng.random_range(0..4000) }
                });
            }
            let expected = naive(&source, &file.changes);
            assert_eq!(file.size, expected.len() as u64, "seed {seed}");
            for chunk in [37usize, 512, 8192] {
                for start in (0..expected.len()).step_by(chunk) {
                    let end = expected.len().min(start + chunk);
                    let mut bytes = vec![0; end - start];
                    let from_source = source.len().clamp(start, end);
                    if source.len() > start {
                        bytes[..from_source - start].copy_from_slice(&source[start..from_source]);
                    }
                    file.replay(start as u64, &mut bytes);
                    assert_eq!(bytes, expected[start..end], "seed {seed}, bytes {start}..{end}");
                }
            }
        }
    }
}
