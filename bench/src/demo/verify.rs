//! Compares a filesystem with the model: the exact listing, then every byte of every file against its source.

use std::fs::File as HostFile;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, sync_channel};
use std::thread;
use std::time::SystemTime;

use bdev_adapter::{Device, DmaBuf};
use fs_core::Channel;
use indicatif::ProgressBar;

use super::model::{Expected, Model};
use crate::failure::{Doing, Failure, Result, show_name};
use crate::transfer::export::{Event, export};
use crate::transfer::{CHUNK, DEPTH, Pool};

/// Differences that are reported; after these the rest only counts.
const REPORTED: usize = 10;

/// What is wrong, for people.
#[derive(Debug, Default)]
pub(crate) struct Differences {
    /// The first of them, in words.
    pub(crate) reported: Vec<String>,
    /// All of them.
    pub(crate) total: u64,
}

impl Differences {
    fn add(&mut self, what: String) {
        self.total += 1;
        if self.reported.len() < REPORTED {
            self.reported.push(what);
        }
    }
}

/// The names that the filesystem lists must be those of the model, in the same order.
pub(crate) fn listing(channel: &Channel, model: &Model) -> Result<Differences> {
    let mut differences = Differences::default();
    let mut expected = model.keys().peekable();
    let mut last: Option<Vec<u8>> = None;
    for entry in channel.list(b"") {
        let name = entry.doing("list the files")?.name;
        if last.as_ref().is_some_and(|last| *last >= name) {
            differences.add(format!("'{}' is listed out of order", show_name(&name)));
            continue;
        }
        while let Some(missing) = expected.next_if(|&next| *next < name) {
            differences.add(format!("'{}' is missing from the listing", show_name(missing)));
        }
        if expected.next_if(|&next| *next == name).is_none() {
            differences.add(format!("'{}' is listed but must not exist", show_name(&name)));
        }
        last = Some(name);
    }
    for missing in expected {
        differences.add(format!("'{}' is missing from the listing", show_name(missing)));
    }
    Ok(differences)
}

/// Reads every file of the model and compares nothing: how fast bytes come out. Returns how many came.
pub(crate) fn read_all(
    channel: &Channel,
    device: &Arc<dyn Device>,
    model: &Model,
    bar: &ProgressBar,
) -> Result<u64> {
    let names: Vec<Vec<u8>> = model.keys().cloned().collect();
    let pool = Pool::new(device, DEPTH, CHUNK)?;
    let back = pool.way_back();
    let mut bytes = 0;
    export(channel, &names, &pool, &mut |event| {
        if let Event::Data { len, buf, .. } = event {
            bytes += len as u64;
            bar.inc(len as u64);
            // `pool` outlives this closure, so its receiver is there.
            let _ = back.send(buf);
        }
        Ok(())
    })?;
    Ok(bytes)
}

/// Reads every file of the model and compares every byte; a thread of its own reads the sources and compares.
pub(crate) fn contents(
    channel: &Channel,
    device: &Arc<dyn Device>,
    model: &Model,
    imported_at: SystemTime,
    bar: &ProgressBar,
) -> Result<Differences> {
    let files: Vec<(&Vec<u8>, &Expected)> = model.iter().collect();
    let names: Vec<Vec<u8>> = model.keys().cloned().collect();
    let pool = Pool::new(device, DEPTH, CHUNK)?;
    let back = pool.way_back();
    thread::scope(|scope| {
        let (to_comparer, events) = sync_channel(DEPTH * 2);
        let comparer =
            Comparer { files: &files, imported_at, differences: Differences::default(), last: None };
        let comparer = scope.spawn(move || comparer.run(&events, &back, bar));
        let read = export(channel, &names, &pool, &mut |event| {
            to_comparer.send(event).map_err(|_| Failure::new("the comparing thread stopped"))
        });
        drop(to_comparer);
        let compared = comparer.join().unwrap_or_else(|_| Err(Failure::new("the comparing thread panicked")));
        let differences = compared?;
        read?;
        Ok(differences)
    })
}

struct Comparer<'a> {
    files: &'a [(&'a Vec<u8>, &'a Expected)],
    imported_at: SystemTime,
    differences: Differences,
    /// The source that was read last: the next piece is mostly of the same file.
    last: Option<(usize, HostFile)>,
}

impl Comparer<'_> {
    fn run(
        mut self,
        events: &Receiver<Event>,
        back: &Sender<DmaBuf>,
        bar: &ProgressBar,
    ) -> Result<Differences> {
        let mut expected = vec![0; CHUNK];
        for event in events {
            match event {
                Event::Data { index, offset, len, buf } => {
                    self.expected(index, offset, &mut expected[..len])?;
                    self.compare(index, offset, &expected[..len], &buf[..len]);
                    bar.inc(len as u64);
                    // When the reading side is gone, so is the need for the buffer.
                    let _ = back.send(buf);
                }
                Event::End { index, size } => {
                    let (name, file) = self.files[index];
                    if size != file.size {
                        let (name, wanted) = (show_name(name), file.size);
                        self.differences.add(format!("'{name}' has {size} bytes and must have {wanted}"));
                    }
                }
            }
        }
        Ok(self.differences)
    }

    /// What file number `index` must have at `offset`.
    fn expected(&mut self, index: usize, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let (_, file) = self.files[index];
        let from_source = file.source_size.saturating_sub(offset).min(bytes.len() as u64) as usize;
        bytes[from_source..].fill(0);
        if let Some(path) = &file.source
            && from_source > 0
        {
            let reading = || format!("read '{}' again to compare", path.display());
            if self.last.as_ref().is_none_or(|(last, _)| *last != index) {
                self.last = Some((index, HostFile::open(path).doing(reading())?));
            }
            if let Some((_, host)) = &self.last {
                match host.read_exact_at(&mut bytes[..from_source], offset) {
                    // It became shorter: the comparison will say so.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                    read => read.doing(reading())?,
                }
            }
        }
        file.replay(offset, bytes);
        Ok(())
    }

    fn compare(&mut self, index: usize, offset: u64, expected: &[u8], found: &[u8]) {
        if expected == found {
            return;
        }
        let (name, file) = self.files[index];
        let at = expected.iter().zip(found).position(|(a, b)| a != b).unwrap_or(0);
        let changed = file
            .source
            .as_ref()
            .and_then(|path| path.metadata().ok()?.modified().ok())
            .is_some_and(|modified| modified >= self.imported_at);
        let note = if changed { " (the host's file has changed since it was imported)" } else { "" };
        let differing = expected.iter().zip(found).filter(|(a, b)| a != b).count();
        self.differences.add(format!(
            "'{}' differs at byte {}: found {:#04x}, must be {:#04x}; {differing} of these {} bytes differ{note}",
            show_name(name),
            offset + at as u64,
            found[at],
            expected[at],
            expected.len(),
        ));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use fs_core::{Filesystem, OpenFlags};

    use super::*;
    use crate::out::Bars;
    use crate::session::{Access, format_device, mount_device, open_device};
    use crate::source::Tree;
    use crate::transfer::import::import;

    /// A mounted filesystem with the files of `source`, and the model of it.
    fn imported(source: &Path) -> (Arc<dyn Device>, Filesystem, Model) {
        let device = open_device("mem:64MiB", Access::Create).unwrap();
        format_device(&device, "test", false).unwrap();
        let fs = mount_device(&device, false).unwrap();
        let tree = Tree::scan(source, b"").unwrap();
        let channel = fs.channel().unwrap();
        let sizes = import(&channel, &device, &tree.items, OpenFlags::CREATE, &mut |_| {}).unwrap();
        let files = tree.items.into_iter().zip(sizes);
        (device, fs, files.map(|(item, size)| (item.name, Expected::imported(item.host, size))).collect())
    }

    #[test]
    fn one_differing_byte_is_found_and_named() {
        let source = tempfile::tempdir().unwrap();
        let path = source.path().join("large");
        let mut bytes = vec![1; 700_000];
        std::fs::write(&path, &bytes).unwrap();
        std::fs::write(source.path().join("small"), b"x").unwrap();
        let (device, fs, mut model) = imported(source.path());
        let channel = fs.channel().unwrap();
        let bar = Bars::new(true).steps("", 0);
        let compare = |model: &Model| contents(&channel, &device, model, SystemTime::now(), &bar).unwrap();
        assert_eq!(compare(&model).total, 0);

        bytes[300_000] = 2;
        std::fs::write(&path, &bytes).unwrap();
        let found = compare(&model);
        assert_eq!(found.total, 1);
        assert!(
            found.reported[0].contains("'large' differs at byte 300000: found 0x01, must be 0x02"),
            "{found:?}"
        );

        model.get_mut(b"small".as_slice()).unwrap().size = 5;
        let found = compare(&model);
        assert_eq!(found.total, 2);
        assert!(found.reported.iter().any(|what| what == "'small' has 1 bytes and must have 5"), "{found:?}");
    }

    #[test]
    fn missing_and_surplus_names_are_found() {
        let source = tempfile::tempdir().unwrap();
        for name in ["a", "b", "d"] {
            std::fs::write(source.path().join(name), name).unwrap();
        }
        let (_, fs, mut model) = imported(source.path());
        let channel = fs.channel().unwrap();
        assert_eq!(listing(&channel, &model).unwrap().total, 0);
        model.remove(b"b".as_slice());
        for name in ["c", "e"] {
            model.insert(name.into(), Expected::default());
        }
        let found = listing(&channel, &model).unwrap();
        let expected = [
            "'b' is listed but must not exist",
            "'c' is missing from the listing",
            "'e' is missing from the listing",
        ];
        assert_eq!((found.total, found.reported.as_slice()), (3, expected.map(str::to_owned).as_slice()));
    }
}
