//! `bench cp`: files in and out.
//!
//! A name inside the filesystem is marked with a colon: `:notes/today`. Everything else is a path of the host; one that
//! begins with a colon is written `./:odd`.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File as HostFile};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::time::Instant;

use fs_core::{Channel, OpenFlags};

use super::names;
use crate::failure::{Doing, Failure, Result, show_name};
use crate::out::{Bars, remark};
use crate::session::{Access, DeviceArg, mount_device, open_device};
use crate::source::{NAME_MAX, Tree};
use crate::transfer::export::{Event, export};
use crate::transfer::import::import;
use crate::transfer::{CHUNK, DEPTH, Item, Pool};
use crate::units;

/// Arguments of `bench cp`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench cp --device file:gaur.img notes.txt :notes.txt      in
  bench cp --device file:gaur.img a.txt b.txt :docs/        in, as docs/a.txt and docs/b.txt
  bench cp --device file:gaur.img -r ~/src/gaur :src/       in, all files below, as src/...
  bench cp --device file:gaur.img :notes.txt /tmp           out, as /tmp/notes.txt
  bench cp --device file:gaur.img -r :src/ ./restored       out, every name that starts with src/

A colon marks a name inside the filesystem. Files that exist are overwritten.
What came in is synced before the command ends.")]
pub(crate) struct CpArgs {
    #[command(flatten)]
    device: DeviceArg,
    /// Copy a directory tree in, or everything that starts with a prefix out
    #[arg(long, short = 'r')]
    recursive: bool,
    /// What to copy: paths of the host, or names inside the filesystem (with a colon in front)
    #[arg(required = true)]
    sources: Vec<OsString>,
    /// Where to: the other side
    target: OsString,
}

/// The name inside the filesystem that an argument means, if it means one.
fn inside(argument: &OsStr) -> Option<&[u8]> {
    argument.as_bytes().strip_prefix(b":")
}

/// Runs the command.
pub(crate) fn run(args: &CpArgs) -> Result<()> {
    let from: Vec<&[u8]> = args.sources.iter().filter_map(|source| inside(source)).collect();
    let started = Instant::now();
    let (files, bytes) = match (inside(&args.target), from.len()) {
        (Some(target), 0) => copy_in(args, target)?,
        (None, n) if n == args.sources.len() => copy_out(args, &from)?,
        (Some(_), _) => {
            let what = "copying inside the filesystem is not supported: either the sources or the target has a colon";
            return Err(Failure::Usage(what.to_owned()));
        }
        (None, _) => {
            let what =
                "nothing here is inside the filesystem: put a colon before its names, as in :notes.txt";
            return Err(Failure::Usage(what.to_owned()));
        }
    };
    if files != 1 {
        let (time, files) = (started.elapsed(), units::count(files));
        remark(format!("copied {files} files, {}, in {}", units::bytes(bytes), units::time(time)));
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------------------------- in

fn copy_in(args: &CpArgs, target: &[u8]) -> Result<(u64, u64)> {
    let mut items = Vec::new();
    let mut bytes = 0;
    for source in &args.sources {
        let found = find_sources(Path::new(source), target, args)?;
        if found.skipped > 0 {
            remark(format!(
                "left out {} of {}: unreadable, or too long a name",
                found.skipped,
                source.display()
            ));
        }
        bytes += found.bytes();
        items.extend(found.items);
    }
    refuse_twins(&items)?;
    let device = open_device(&args.device.device, Access::Write)?;
    let mounted = mount_device(&device, false)?;
    let channel = mounted.channel().doing("open a channel")?;
    let bar = Bars::new(false).bytes("copy in", bytes);
    let flags = OpenFlags::CREATE | OpenFlags::TRUNCATE;
    let sizes = import(&channel, &device, &items, flags, &mut |done| bar.set_position(done.bytes))?;
    channel.sync().doing("sync the filesystem")?;
    bar.finish_and_clear();
    drop(channel);
    mounted.unmount().doing("unmount the filesystem")?;
    Ok((sizes.len() as u64, sizes.iter().sum()))
}

/// The files that `source` stands for, with their names inside.
fn find_sources(source: &Path, target: &[u8], args: &CpArgs) -> Result<Tree> {
    let metadata = fs::metadata(source).doing(format!("read '{}'", source.display()))?;
    if metadata.is_dir() {
        if !args.recursive {
            let what = format!("'{}' is a directory; add -r to copy all files below it", source.display());
            return Err(Failure::Usage(what));
        }
        let slash: &[u8] = if target.is_empty() || target.ends_with(b"/") { b"" } else { b"/" };
        return Tree::scan(source, &[target, slash].concat());
    }
    let name = if target.is_empty() || target.ends_with(b"/") {
        let file = source
            .file_name()
            .ok_or_else(|| Failure::Usage(format!("'{}' has no name", source.display())))?;
        [target, file.as_bytes()].concat()
    } else if args.sources.len() > 1 {
        return Err(Failure::Usage(
            "several files need a target that ends with a slash, as in :docs/".to_owned(),
        ));
    } else {
        target.to_vec()
    };
    if name.len() > NAME_MAX {
        let len = name.len();
        return Err(Failure::new(format!(
            "the name '{}' has {len} bytes; the limit is {NAME_MAX}",
            show_name(&name)
        )));
    }
    let item = Item { host: source.to_owned(), name };
    Ok(Tree { roots: Vec::new(), items: vec![item], sizes: vec![metadata.len()], skipped: 0 })
}

/// Two sources with one name would overwrite each other in no particular order.
fn refuse_twins(items: &[Item]) -> Result<()> {
    let mut seen: HashMap<&[u8], &Path> = HashMap::with_capacity(items.len());
    for item in items {
        if let Some(other) = seen.insert(&item.name, &item.host) {
            let (name, a, b) = (show_name(&item.name), other.display(), item.host.display());
            return Err(Failure::Usage(format!("'{a}' and '{b}' would both become '{name}'")));
        }
    }
    Ok(())
}

// --------------------------------------------------------------------------------------------------------------- out

fn copy_out(args: &CpArgs, sources: &[&[u8]]) -> Result<(u64, u64)> {
    let target = Path::new(&args.target);
    let device = open_device(&args.device.device, Access::Read)?;
    let mounted = mount_device(&device, true)?;
    let channel = mounted.channel().doing("open a channel")?;
    let mut plan = Plan::default();
    for source in sources {
        if args.recursive {
            plan.add_prefix(&channel, source, target)?;
        } else {
            plan.add_file(source, target, sources.len() > 1)?;
        }
    }
    let mut bytes = 0;
    let bar = Bars::new(false).steps("copy out", plan.names.len() as u64);
    let pool = Pool::new(&device, DEPTH, CHUNK)?;
    let back = pool.way_back();
    let mut host = Host { paths: &plan.paths, open: HashMap::new() };
    export(&channel, &plan.names, &pool, &mut |event| match event {
        Event::Data { index, offset, len, buf } => {
            bytes += len as u64;
            host.write(index, offset, &buf[..len])?;
            // The pool lives as long as this closure.
            let _ = back.send(buf);
            Ok(())
        }
        Event::End { index, size } => {
            bar.inc(1);
            host.end(index, size)
        }
    })?;
    bar.finish_and_clear();
    drop(channel);
    mounted.unmount().doing("unmount the filesystem")?;
    for name in &plan.refused {
        remark(format!("not copied: '{}' is no path below the target on this host", show_name(name)));
    }
    if plan.refused.is_empty() { Ok((plan.names.len() as u64, bytes)) } else { Err(Failure::Reported) }
}

/// What is copied where.
#[derive(Default)]
struct Plan {
    names: Vec<Vec<u8>>,
    paths: Vec<PathBuf>,
    refused: Vec<Vec<u8>>,
}

impl Plan {
    fn add_file(&mut self, name: &[u8], target: &Path, several: bool) -> Result<()> {
        let path = if target.is_dir() {
            let Some(last) = Path::new(OsStr::from_bytes(name)).file_name() else {
                return Err(Failure::Usage(format!(
                    "'{}' ends in no file name; name the target",
                    show_name(name)
                )));
            };
            target.join(last)
        } else if several {
            let what =
                format!("several files need an existing directory as target; '{}' is none", target.display());
            return Err(Failure::Usage(what));
        } else {
            target.to_owned()
        };
        self.names.push(name.to_vec());
        self.paths.push(path);
        Ok(())
    }

    fn add_prefix(&mut self, channel: &Channel, prefix: &[u8], target: &Path) -> Result<()> {
        let found = names(channel, prefix)?;
        if found.is_empty() {
            return Err(Failure::new(format!("no name starts with '{}'", show_name(prefix))));
        }
        // `:src/` means what is below src, `:src` means src (and src2...) itself: directories of the prefix are left out.
        let below = prefix.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
        for name in found {
            match safe_path(&name[below..]) {
                Some(path) => {
                    self.paths.push(target.join(path));
                    self.names.push(name);
                }
                None => self.refused.push(name),
            }
        }
        Ok(())
    }
}

/// The relative path that `name` means on the host. `None` when it would leave the target directory, or would not come
/// back as the same name.
fn safe_path(name: &[u8]) -> Option<&Path> {
    let path = Path::new(OsStr::from_bytes(name));
    let normal = path.components().all(|part| matches!(part, Component::Normal(_)));
    let parts = name.split(|&byte| byte == b'/').count();
    (normal && parts == path.components().count()).then_some(path)
}

/// Host files that are being written.
struct Host<'a> {
    paths: &'a [PathBuf],
    open: HashMap<usize, HostFile>,
}

impl Host<'_> {
    fn file(&mut self, index: usize) -> Result<&HostFile> {
        let path = &self.paths[index];
        let entry = self.open.entry(index);
        Ok(match entry {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                    fs::create_dir_all(parent).doing(format!("make the directory '{}'", parent.display()))?;
                }
                entry.insert(HostFile::create(path).doing(format!("create '{}'", path.display()))?)
            }
        })
    }

    fn write(&mut self, index: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.file(index)?.write_all_at(bytes, offset);
        written.doing(format!("write '{}'", self.paths[index].display()))
    }

    fn end(&mut self, index: usize, size: u64) -> Result<()> {
        let file = self.file(index)?;
        // A device or a pipe as target has no length to set.
        if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            let set = file.set_len(size);
            set.doing(format!("set the length of '{}'", self.paths[index].display()))?;
        }
        self.open.remove(&index);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_the_target_are_refused() {
        for name in ["a", "a/b", "a b/c.d", "...", "a/..b"] {
            assert!(safe_path(name.as_bytes()).is_some(), "{name}");
        }
        for name in ["", "/a", "../a", "a/../b", "a/..", "./a", "a//b", "a/", "a/./b", "."] {
            assert!(safe_path(name.as_bytes()).is_none(), "{name}");
        }
    }
}
