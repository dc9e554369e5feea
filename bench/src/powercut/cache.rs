//! A medium behind a volatile write cache, and what a power cut makes of it.
//!
//! A completed write is in the cache. A flush puts all of it on the medium, a write with FUA puts itself there. When the
//! power fails, the cache is lost, but a drive may have written any part of it by itself before, in any order: what of it
//! is on the medium is drawn from a seed ([`Survive`]).
//!
//! Sectors are whole or not written at all; a write of several sectors may be torn between any two.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Which part of the cache a power cut leaves on the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Survive {
    /// Nothing.
    None,
    /// The oldest writes, up to some point: a drive that writes in order.
    Oldest,
    /// The newest writes, from some point on.
    Newest,
    /// Whole writes, each or not.
    Writes,
    /// Sectors, each or not: writes are torn.
    Sectors,
}

/// One version of a sector in the cache.
#[derive(Debug)]
struct Version {
    /// The number of the write that it belongs to.
    write: u64,
    data: Box<[u8]>,
}

/// What went through a drive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) fua_writes: u64,
    pub(super) flushes: u64,
}

/// What a power cut did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) survive: Survive,
    /// Writes of which at least a sector was in the cache.
    pub(super) writes: u64,
    /// Sectors in the cache.
    pub(super) sectors: u64,
    /// Of these, how many reached the medium.
    pub(super) kept: u64,
}

/// A medium of whole sectors, with its cache.
#[derive(Debug)]
pub(super) struct Cache {
    medium: File,
    sector: usize,
    /// Every version of every sector that is not on the medium, oldest first.
    cached: BTreeMap<u64, Vec<Version>>,
    next_write: u64,
    /// Flushes and FUA are acknowledged and not done: a drive that lies.
    lies: bool,
    pub(super) counts: Counts,
}

impl Cache {
    /// An empty cache before `medium`.
    pub(super) fn new(medium: File, sector: usize, lies: bool) -> Cache {
        Cache { medium, sector, cached: BTreeMap::new(), next_write: 0, lies, counts: Counts::default() }
    }

    /// Reads what was written last.
    pub(super) fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.counts.reads += 1;
        self.medium.read_exact_at(buf, offset)?;
        let first = offset / self.sector as u64;
        let sectors = first..first + (buf.len() / self.sector) as u64;
        for (number, versions) in self.cached.range(sectors) {
            if let Some(last) = versions.last() {
                let at = (number - first) as usize * self.sector;
                buf[at..at + self.sector].copy_from_slice(&last.data);
            }
        }
        Ok(())
    }

    /// Writes into the cache or, with `fua`, to the medium.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        self.counts.writes += 1;
        self.counts.fua_writes += u64::from(fua);
        let first = offset / self.sector as u64;
        if fua && !self.lies {
            self.medium.write_all_at(data, offset)?;
            // What the cache held of these sectors is older.
            let sectors = first..first + (data.len() / self.sector) as u64;
            self.cached.retain(|number, _| !sectors.contains(number));
            return Ok(());
        }
        self.next_write += 1;
        for (number, data) in (first..).zip(data.chunks_exact(self.sector)) {
            let version = Version { write: self.next_write, data: data.into() };
            self.cached.entry(number).or_default().push(version);
        }
        Ok(())
    }

    /// Puts everything on the medium.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.counts.flushes += 1;
        if self.lies { Ok(()) } else { self.write_back() }
    }

    /// What a drive does when it is told to shut down.
    pub(super) fn write_back(&mut self) -> io::Result<()> {
        for (number, versions) in std::mem::take(&mut self.cached) {
            if let Some(last) = versions.last() {
                self.medium.write_all_at(&last.data, number * self.sector as u64)?;
            }
        }
        Ok(())
    }

    /// The power fails. What survives follows from the seed.
    pub(super) fn cut(&mut self, seed: u64) -> io::Result<Cut> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let survive = [Survive::None, Survive::Oldest, Survive::Newest, Survive::Writes, Survive::Sectors]
            [rng.random_range(0..5)];
        let writes: BTreeSet<u64> = self.cached.values().flatten().map(|version| version.write).collect();
        let share = rng.random_range(0.05..0.95);
        let some = (writes.len() as f64 * share).ceil() as usize;
        let kept_writes: BTreeSet<u64> = match survive {
            Survive::Oldest => writes.iter().copied().take(some).collect(),
            Survive::Newest => writes.iter().copied().rev().take(some).collect(),
            Survive::Writes => writes.iter().copied().filter(|_| rng.random_bool(share)).collect(),
            Survive::None | Survive::Sectors => BTreeSet::new(),
        };
        let mut cut =
            Cut { survive, writes: writes.len() as u64, sectors: self.cached.len() as u64, kept: 0 };
        for (number, versions) in std::mem::take(&mut self.cached) {
            let kept = versions.iter().rev().find(|version| match survive {
                Survive::Sectors => rng.random_bool(share),
                _ => kept_writes.contains(&version.write),
            });
            if let Some(version) = kept {
                self.medium.write_all_at(&version.data, number * self.sector as u64)?;
                cut.kept += 1;
            }
        }
        Ok(cut)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test ends there")]
mod tests {
    use super::*;

    const SECTOR: usize = 512;

    fn cache(lies: bool) -> Cache {
        let medium = tempfile::tempfile().unwrap();
        medium.set_len(64 * SECTOR as u64).unwrap();
        Cache::new(medium, SECTOR, lies)
    }

    fn on_medium(cache: &Cache, number: u64) -> u8 {
        let mut byte = [0];
        cache.medium.read_exact_at(&mut byte, number * SECTOR as u64).unwrap();
        byte[0]
    }

    fn read(cache: &mut Cache, number: u64) -> u8 {
        let mut buf = [0; 2 * SECTOR];
        cache.read(number * SECTOR as u64, &mut buf).unwrap();
        buf[0]
    }

    #[test]
    fn only_flush_and_fua_reach_the_medium() {
        let mut cache = cache(false);
        cache.write(0, &[1; 2 * SECTOR], false).unwrap();
        assert_eq!((read(&mut cache, 0), on_medium(&cache, 0)), (1, 0));
        cache.write(SECTOR as u64, &[2; SECTOR], true).unwrap();
        assert_eq!((on_medium(&cache, 0), on_medium(&cache, 1), read(&mut cache, 1)), (0, 2, 2));
        cache.flush().unwrap();
        // The older version of sector 1 does not come back.
        assert_eq!((on_medium(&cache, 0), on_medium(&cache, 1)), (1, 2));
        let counts = Counts { reads: 2, writes: 2, fua_writes: 1, flushes: 1 };
        assert_eq!(cache.counts, counts);
    }

    #[test]
    fn a_cut_keeps_what_was_flushed_and_any_part_of_the_rest() {
        let mut seen = BTreeMap::new();
        for seed in 0..200 {
            let mut cache = cache(false);
            cache.write(0, &[1; 8 * SECTOR], false).unwrap();
            cache.flush().unwrap();
            for value in 2..6 {
                cache.write(4 * SECTOR as u64, &[value; 8 * SECTOR], false).unwrap();
            }
            let cut = cache.cut(seed).unwrap();
            assert_eq!((cut.writes, cut.sectors), (4, 8));
            assert!((0..4).all(|number| on_medium(&cache, number) == 1));
            assert!((4..12).all(|number| on_medium(&cache, number) < 6));
            let torn = (4..8).any(|number| on_medium(&cache, number) != on_medium(&cache, 4));
            assert!(!torn || cut.survive == Survive::Sectors);
            *seen.entry((format!("{:?}", cut.survive), cut.kept > 0)).or_insert(0) += 1;
            assert_eq!(read(&mut cache, 4), on_medium(&cache, 4), "nothing is left in the cache");
        }
        assert!(seen.len() >= 6, "{seen:?}");
    }

    #[test]
    fn a_lying_drive_loses_what_was_flushed() {
        let mut cache = cache(true);
        cache.write(0, &[1; SECTOR], true).unwrap();
        cache.flush().unwrap();
        assert_eq!((read(&mut cache, 0), on_medium(&cache, 0)), (1, 0));
        cache.write_back().unwrap();
        assert_eq!(on_medium(&cache, 0), 1);
    }
}
