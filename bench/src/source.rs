//! Real files of the host: a tree to import, and the one that the demo takes when it is told none.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use crate::failure::{Doing, Failure, Result};
use crate::transfer::Item;

/// Longest name that a Gaur filesystem takes.
pub(crate) const NAME_MAX: usize = 255;

/// Files found, and why others were left out.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    /// The directories that were searched.
    pub(crate) roots: Vec<PathBuf>,
    /// The files, in name order.
    pub(crate) items: Vec<Item>,
    /// Their sizes at the time of the search, in the same order.
    pub(crate) sizes: Vec<u64>,
    /// Files left out because their path is no possible name, or they cannot be read.
    pub(crate) skipped: u64,
}

/// How much to take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Files at most.
    pub(crate) files: usize,
    /// Bytes at most, in all.
    pub(crate) bytes: u64,
}

/// A disk answers several at once faster than one after the other.
const WARMING_THREADS: usize = 8;

/// What makes a tree large enough for the demo.
const ENOUGH: Limits = Limits { files: 5000, bytes: 200 << 20 };

impl Tree {
    /// Bytes in all files.
    pub(crate) fn bytes(&self) -> u64 {
        self.sizes.iter().sum()
    }

    /// True when it is large enough for the demo.
    pub(crate) fn is_enough(&self) -> bool {
        self.items.len() >= ENOUGH.files && self.bytes() >= ENOUGH.bytes
    }

    /// Searches `root` for regular files (symbolic links are not followed) and names each `prefix` + its path under it.
    pub(crate) fn scan(root: &Path, prefix: &[u8]) -> Result<Tree> {
        let mut tree = Tree { roots: vec![root.to_owned()], ..Tree::default() };
        let listing = std::fs::read_dir(root).doing(format!("read the directory '{}'", root.display()))?;
        tree.walk(listing, prefix);
        tree.sort();
        Ok(tree)
    }

    fn walk(&mut self, listing: std::fs::ReadDir, prefix: &[u8]) {
        // Depth of the host's directories is bounded by its path length, but not by our stack: keep our own.
        let mut open = vec![(listing, prefix.to_vec())];
        while let Some((listing, prefix)) = open.last_mut() {
            let Some(entry) = listing.next() else {
                open.pop();
                continue;
            };
            let Ok(entry) = entry else {
                self.skipped += 1;
                continue;
            };
            let name = [prefix, entry.file_name().as_bytes()].concat();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => match std::fs::read_dir(entry.path()) {
                    Ok(listing) => open.push((listing, [name.as_slice(), b"/"].concat())),
                    Err(_) => self.skipped += 1,
                },
                Ok(kind) if kind.is_file() => self.add(entry.path(), name),
                _ => {}
            }
        }
    }

    fn add(&mut self, host: PathBuf, name: Vec<u8>) {
        match std::fs::metadata(&host) {
            Ok(metadata) if name.len() <= NAME_MAX => {
                self.sizes.push(metadata.len());
                self.items.push(Item { host, name });
            }
            _ => self.skipped += 1,
        }
    }

    fn sort(&mut self) {
        self.permute(|a, b| a.0.name.cmp(&b.0.name));
    }

    fn permute(&mut self, order: impl Fn(&(Item, u64), &(Item, u64)) -> std::cmp::Ordering) {
        let mut pairs: Vec<(Item, u64)> = self.items.drain(..).zip(self.sizes.drain(..)).collect();
        pairs.sort_by(order);
        (self.items, self.sizes) = pairs.into_iter().unzip();
    }

    /// Reads every file once, so that the import measures the filesystem and not the host's disk. `progress` is told the
    /// bytes so far. Files that cannot be read are left out from then on.
    pub(crate) fn warm(&mut self, progress: &(dyn Fn(u64) + Sync)) {
        let readable: Vec<bool> = std::thread::scope(|scope| {
            let share = self.items.len().div_ceil(WARMING_THREADS).max(1);
            let read =
                |items: &[Item]| items.iter().map(|item| read_once(&item.host, progress)).collect::<Vec<_>>();
            let threads: Vec<_> =
                self.items.chunks(share).map(|items| scope.spawn(move || read(items))).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
        });
        let mut keep = readable.into_iter();
        let mut pairs: Vec<(Item, u64)> = self.items.drain(..).zip(self.sizes.drain(..)).collect();
        let found = pairs.len();
        pairs.retain(|_| keep.next().unwrap_or(false));
        self.skipped += (found - pairs.len()) as u64;
        (self.items, self.sizes) = pairs.into_iter().unzip();
    }

    /// Keeps a sample within `limits`, the same for the same seed. Files beyond an eighth of the bytes are left out when
    /// something has to be: a few giants would push out thousands of ordinary files.
    pub(crate) fn sample(&mut self, limits: Limits, seed: u64) {
        if self.items.len() <= limits.files && self.bytes() <= limits.bytes {
            return;
        }
        let mut pairs: Vec<(Item, u64)> = self.items.drain(..).zip(self.sizes.drain(..)).collect();
        pairs.shuffle(&mut SmallRng::seed_from_u64(seed));
        let mut bytes = 0;
        for (item, size) in pairs {
            if self.items.len() == limits.files {
                break;
            }
            if size <= limits.bytes / 8 && bytes + size <= limits.bytes {
                bytes += size;
                self.items.push(item);
                self.sizes.push(size);
            }
        }
        self.sort();
    }

    fn join(&mut self, other: Tree) {
        self.roots.extend(other.roots);
        self.items.extend(other.items);
        self.sizes.extend(other.sizes);
        self.skipped += other.skipped;
        self.sort();
    }
}

/// A real tree that is on any machine with Rust: the first of some usual places that is large enough, else several of
/// them together, else whatever there is.
pub(crate) fn default_tree() -> Result<Tree> {
    let mut all = Tree::default();
    for root in usual_places() {
        // Each place has its own prefix, so that the same path in two of them stays two files.
        let prefix = [root.file_name().unwrap_or(OsStr::new("root")).as_bytes(), b"/"].concat();
        let Ok(tree) = Tree::scan(&root, &prefix) else { continue };
        if tree.is_enough() {
            return Ok(tree);
        }
        all.join(tree);
        if all.is_enough() {
            return Ok(all);
        }
    }
    if all.items.is_empty() {
        return Err(Failure::new("found no directory tree to import; name one with --import DIR"));
    }
    Ok(all)
}

/// Reads a file to its end. False when that does not work.
fn read_once(path: &Path, progress: &(dyn Fn(u64) + Sync)) -> bool {
    let mut piece = vec![0; 64 << 10];
    let Ok(mut file) = std::fs::File::open(path) else { return false };
    loop {
        match file.read(&mut piece) {
            Ok(0) => return true,
            Ok(len) => progress(len as u64),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}

fn usual_places() -> Vec<PathBuf> {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output().ok();
    let sysroot = sysroot.filter(|output| output.status.success()).map(|output| {
        let path = output.stdout.trim_ascii_end();
        PathBuf::from(OsStr::from_bytes(path))
    });
    let system = ["/usr/share", "/usr/lib", "/usr/include", "/usr/local", "/usr/bin", "/etc", "/opt"];
    sysroot.into_iter().chain(system.map(PathBuf::from)).filter(|path| path.is_dir()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_keeps_the_limits_and_is_the_same_for_the_same_seed() {
        let tree = || {
            let mut tree = Tree::default();
            for i in 0..1000u64 {
                let name = format!("{i:04}").into_bytes();
                tree.items.push(Item { host: PathBuf::new(), name });
                tree.sizes.push(if i == 500 { 1 << 20 } else { 100 });
            }
            tree
        };
        let limits = Limits { files: 300, bytes: 20_000 };
        let (mut a, mut b, mut c) = (tree(), tree(), tree());
        a.sample(limits, 1);
        b.sample(limits, 1);
        c.sample(limits, 2);
        assert_eq!(a.items.len(), 200);
        assert!(a.bytes() <= limits.bytes && a.sizes.iter().all(|&size| size == 100));
        let names = |tree: &Tree| tree.items.iter().map(|item| item.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&a), names(&b));
        assert_ne!(names(&a), names(&c));
        assert!(names(&a).is_sorted());
    }
}
