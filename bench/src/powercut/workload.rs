//! What `bench powercut write` does: rounds of changes that follow from the seed alone, and what every file is after each.
//!
//! A round is one to eight changes (write, append, truncate, rename, delete) to a dozen names, and the number of the round
//! in the file [`SEQUENCE`]. Each round has a random generator of its own, so round N is the same however it is reached.

use std::collections::BTreeMap;
use std::fmt;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::failure::show_name;

/// Contents by name.
pub(super) type Files = BTreeMap<Vec<u8>, Vec<u8>>;

/// The file that holds the number of the round.
pub(super) const SEQUENCE: &[u8] = b"sequence";

/// Names in use.
const NAMES: u32 = 12;
/// No file grows beyond.
const FILE_MAX: usize = 256 << 10;
/// No write is longer.
const WRITE_MAX: usize = 48 << 10;

/// One change of the filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// Writes `data` at `offset`; makes the file if it is missing.
    Write { name: Vec<u8>, offset: u64, data: Vec<u8> },
    /// Writes `data` at the end; makes the file if it is missing.
    Append { name: Vec<u8>, data: Vec<u8> },
    /// Cuts the file, or makes it longer.
    Truncate { name: Vec<u8>, size: u64 },
    /// Renames a file, over another one if there is one.
    Rename { from: Vec<u8>, to: Vec<u8> },
    /// Deletes a file.
    Delete { name: Vec<u8> },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Write { name, offset, data } => {
                write!(f, "write {} bytes at {offset} of '{}'", data.len(), show_name(name))
            }
            Change::Append { name, data } => {
                write!(f, "append {} bytes to '{}'", data.len(), show_name(name))
            }
            Change::Truncate { name, size } => write!(f, "truncate '{}' to {size} bytes", show_name(name)),
            Change::Rename { from, to } => write!(f, "rename '{}' to '{}'", show_name(from), show_name(to)),
            Change::Delete { name } => write!(f, "delete '{}'", show_name(name)),
        }
    }
}

/// The changes, and what they lead to.
#[derive(Debug)]
pub(super) struct Workload {
    seed: u64,
    round: u64,
    files: Files,
}

impl Workload {
    /// Before the first round: no files.
    pub(super) fn new(seed: u64) -> Workload {
        Workload { seed, round: 0, files: Files::new() }
    }

    /// After `round` rounds.
    pub(super) fn at(seed: u64, round: u64) -> Workload {
        let mut workload = Workload::new(seed);
        while workload.round < round {
            workload.next_round();
        }
        workload
    }

    /// Rounds done.
    pub(super) fn round(&self) -> u64 {
        self.round
    }

    /// What must be there after that round.
    pub(super) fn files(&self) -> &Files {
        &self.files
    }

    /// The changes of the next round, which the model counts as done.
    pub(super) fn next_round(&mut self) -> Vec<Change> {
        self.round += 1;
        let mut rng = SmallRng::seed_from_u64(self.seed ^ self.round.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut changes = Vec::new();
        for _ in 0..rng.random_range(1..=8) {
            let change = self.change(&mut rng);
            self.model(&change);
            changes.push(change);
        }
        let sequence = Change::Write { name: SEQUENCE.to_vec(), offset: 0, data: round_text(self.round) };
        self.model(&sequence);
        // Not always last: a commit that lost what came after it would go unnoticed.
        changes.insert(rng.random_range(0..=changes.len()), sequence);
        changes
    }

    fn change(&self, rng: &mut SmallRng) -> Change {
        let (name, other) = (some_name(rng), some_name(rng));
        let size = self.files.get(&name).map(Vec::len);
        match (rng.random_range(0..12), size) {
            (0, Some(_)) => Change::Delete { name },
            (1 | 2, Some(_)) => Change::Rename { from: name, to: other },
            (3, Some(_)) => Change::Truncate { name, size: rng.random_range(0..FILE_MAX as u64) },
            (4..=6, size) if size.unwrap_or(0) + WRITE_MAX <= FILE_MAX => {
                Change::Append { name, data: some_data(rng) }
            }
            _ => {
                let data = some_data(rng);
                let mut offset = rng.random_range(0..=(FILE_MAX - data.len()) as u64);
                if rng.random_bool(0.5) {
                    offset &= !4095;
                }
                Change::Write { name, offset, data }
            }
        }
    }

    fn model(&mut self, change: &Change) {
        match change {
            Change::Write { name, offset, data } => {
                let content = self.files.entry(name.clone()).or_default();
                let range = *offset as usize..*offset as usize + data.len();
                content.resize(content.len().max(range.end), 0);
                content[range].copy_from_slice(data);
            }
            Change::Append { name, data } => {
                self.files.entry(name.clone()).or_default().extend_from_slice(data);
            }
            Change::Truncate { name, size } => {
                self.files.entry(name.clone()).or_default().resize(*size as usize, 0);
            }
            Change::Rename { from, to } => {
                if let Some(content) = self.files.remove(from) {
                    self.files.insert(to.clone(), content);
                }
            }
            Change::Delete { name } => {
                self.files.remove(name);
            }
        }
    }
}

fn some_name(rng: &mut SmallRng) -> Vec<u8> {
    format!("file-{:02}", rng.random_range(0..NAMES)).into_bytes()
}

/// Short, a block, a few blocks, or long.
fn some_data(rng: &mut SmallRng) -> Vec<u8> {
    let len = match rng.random_range(0..4) {
        0 => rng.random_range(1..300),
        1 => 4096,
        2 => 4096 * rng.random_range(1..=4),
        _ => rng.random_range(1..=WRITE_MAX),
    };
    let mut data = vec![0; len];
    rng.fill(&mut data[..]);
    data
}

/// Always of the same length, so that each overwrites all of the one before.
fn round_text(round: u64) -> Vec<u8> {
    format!("{round:020}\n").into_bytes()
}

/// The number in the file [`SEQUENCE`].
pub(super) fn parse_round(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.strip_suffix('\n')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_the_same_however_it_is_reached() {
        let mut one = Workload::new(7);
        for _ in 0..300 {
            one.next_round();
        }
        let mut other = Workload::at(7, 300);
        assert_eq!(one.files(), other.files());
        assert_eq!(one.next_round(), other.next_round());
        assert_eq!(parse_round(&one.files()[SEQUENCE]), Some(301));
        assert_ne!(Workload::at(8, 301).files(), one.files());
    }

    #[test]
    fn every_kind_of_change_comes() {
        let mut workload = Workload::new(1);
        let mut seen = [0; 5];
        for _ in 0..300 {
            for change in workload.next_round() {
                seen[match change {
                    Change::Write { .. } => 0,
                    Change::Append { .. } => 1,
                    Change::Truncate { .. } => 2,
                    Change::Rename { .. } => 3,
                    Change::Delete { .. } => 4,
                }] += 1;
            }
        }
        assert!(seen.iter().all(|count| *count > 20), "{seen:?}");
        assert!(workload.files().values().all(|content| content.len() <= FILE_MAX));
    }
}
