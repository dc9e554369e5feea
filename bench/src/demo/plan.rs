//! What the demo does to the files after the import: chosen from the seed alone, and recorded in the model as it is chosen.

use std::collections::HashSet;

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use super::model::Model;
use crate::transfer::edit::{Change, Task};

/// Files that are overwritten at most; more would only take longer.
const OVERWRITTEN_FILES: usize = 4000;
/// Longest single overwrite, in bytes.
const OVERWRITE_MAX: u64 = 64 << 10;
/// Longest overwrite that may end beyond the end of its file: the demo must fit on small devices too.
const GROWTH_BY_WRITE_MAX: u64 = 16 << 10;
/// Bytes by which a file grows at most when it is truncated upwards.
const GROWTH_MAX: u64 = 1 << 20;
/// Files are deleted in order to leave two thirds.
const DELETED_SHARE: usize = 3;

/// Overwrites of every length and alignment, a few of them past the end, several to a file.
pub(crate) fn overwrites(model: &mut Model, rng: &mut SmallRng) -> Vec<Task> {
    pick(model, rng, OVERWRITTEN_FILES, |rng, file_size| {
        let writes = rng.random_range(1..=4);
        (0..writes)
            .map(|_| {
                // Some are aligned whole blocks, as a database would write; the others are anything.
                let (mut offset, mut len) =
                    (rng.random_range(0..file_size), rng.random_range(1..=OVERWRITE_MAX));
                if rng.random_bool(0.5) {
                    (offset, len) = (offset & !4095, len.next_multiple_of(4096));
                }
                len = if rng.random_bool(0.95) {
                    len.min(file_size - offset)
                } else {
                    len.min(GROWTH_BY_WRITE_MAX)
                };
                Change::Write { offset, len: len as usize, seed: rng.random() }
            })
            .collect()
    })
}

/// Truncations, to shorter and to longer.
pub(crate) fn truncates(model: &mut Model, rng: &mut SmallRng) -> Vec<Task> {
    let files = model.len().div_ceil(20);
    pick(model, rng, files, |rng, file_size| {
        let size = if rng.random_bool(0.5) {
            rng.random_range(0..file_size)
        } else {
            file_size + rng.random_range(1..=GROWTH_MAX)
        };
        vec![Change::Truncate { size }]
    })
}

/// Chooses up to `files` files that are not empty, and records what `changes` wants done to each.
fn pick(
    model: &mut Model,
    rng: &mut SmallRng,
    files: usize,
    mut changes: impl FnMut(&mut SmallRng, u64) -> Vec<Change>,
) -> Vec<Task> {
    let mut names: Vec<Vec<u8>> =
        model.iter().filter(|(_, file)| file.size > 0).map(|(name, _)| name.clone()).collect();
    names.shuffle(rng);
    names.truncate(files);
    let mut tasks = Vec::with_capacity(names.len());
    for name in names {
        let Some(file) = model.get_mut(&name) else { continue };
        let changes = changes(rng, file.size);
        changes.iter().for_each(|&change| file.change(change));
        tasks.push(Task { name, changes });
    }
    tasks
}

/// Renames of a tenth of the files, one in eight over a file that exists. No name takes part twice, so the renames may
/// run beside each other.
pub(crate) fn renames(model: &mut Model, rng: &mut SmallRng) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names: Vec<Vec<u8>> = model.keys().cloned().collect();
    names.shuffle(rng);
    let renamed = names.len().div_ceil(10);
    let (from, others) = names.split_at(renamed);
    let mut targets = others.iter();
    let taken: HashSet<&Vec<u8>> = names.iter().collect();
    let mut fresh =
        (0..).map(|n| format!("renamed/{n:06}").into_bytes()).filter(|name| !taken.contains(name));
    let mut renames = Vec::with_capacity(renamed);
    for (number, from) in from.iter().enumerate() {
        let target = if number % 8 == 0 { targets.next().cloned() } else { None };
        let Some(to) = target.or_else(|| fresh.next()) else { break };
        if let Some(file) = model.remove(from) {
            model.insert(to.clone(), file);
            renames.push((from.clone(), to));
        }
    }
    renames
}

/// A third of the files, to be deleted.
pub(crate) fn deletes(model: &mut Model, rng: &mut SmallRng) -> Vec<Vec<u8>> {
    let mut names: Vec<Vec<u8>> = model.keys().cloned().collect();
    names.shuffle(rng);
    names.truncate(names.len() / DELETED_SHARE);
    for name in &names {
        model.remove(name);
    }
    names
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rand::SeedableRng;

    use super::super::model::Expected;
    use super::*;

    fn model() -> Model {
        (0..1000u64)
            .map(|i| (format!("{i:04}").into_bytes(), Expected::imported(PathBuf::new(), i * 100)))
            .collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_plan() {
        let plan = |seed| {
            let (mut model, mut rng) = (model(), SmallRng::seed_from_u64(seed));
            let tasks: Vec<Vec<Change>> = overwrites(&mut model, &mut rng)
                .into_iter()
                .chain(truncates(&mut model, &mut rng))
                .map(|task| task.changes)
                .collect();
            (tasks, renames(&mut model, &mut rng), deletes(&mut model, &mut rng))
        };
        assert_eq!(plan(5), plan(5));
        assert_ne!(plan(5), plan(6));
    }

    #[test]
    fn renames_touch_every_name_once_and_some_replace() {
        let mut model = model();
        let renames = renames(&mut model, &mut SmallRng::seed_from_u64(1));
        let mut names: Vec<&Vec<u8>> = renames.iter().flat_map(|(from, to)| [from, to]).collect();
        names.sort();
        names.dedup();
        assert_eq!((renames.len(), names.len()), (100, 200));
        assert_eq!(model.len(), 1000 - 100usize.div_ceil(8));
    }

    #[test]
    fn a_third_is_deleted() {
        let mut model = model();
        assert_eq!(deletes(&mut model, &mut SmallRng::seed_from_u64(1)).len(), 333);
        assert_eq!(model.len(), 667);
    }
}
