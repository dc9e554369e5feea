//! `bench demo`: the main job. A real tree goes in, is changed in every way, and is verified after a remount.
//!
//! The order of things is the order of the functions of [`Demo`]: [`Demo::import`], [`Demo::change`],
//! [`Demo::durable`], [`Demo::remount`], [`Demo::verify`], [`Demo::finish`]. What every file must be is kept in a
//! [`model`], which grows from the seed alone, so the same seed does the same to the same tree.

mod model;
mod plan;
mod probe;
mod report;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bdev_adapter::Device;
use bdev_adapter::wrap::counters::CountingDevice;
use fs_core::{Channel, Filesystem, OpenFlags, Operation};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use self::model::{Expected, Model};
use self::report::Report;
use self::verify::Differences;
use crate::failure::{Doing, Failure, Result, show_name};
use crate::flight::Flight;
use crate::out::{Bars, Out};
use crate::session::{Access, file_uri, format_device, mount_device, open_device};
use crate::source::{Limits, Tree, default_tree};
use crate::transfer::edit::{Change, Task, apply};
use crate::transfer::import::import;
use crate::{sys, tools, units};

/// What `--device` is when it is not given: a sparse file that is removed at the end.
const DEFAULT_SIZE: &str = "4GiB";

/// Arguments of `bench demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bench demo                                            a temporary file as device, removed at the end
  bench demo --device 'file:gaur.img?size=4GiB' --force a file that stays; look around with `bench ls --device ...`
  bench demo --device mem:4GiB --import ~/src           another tree, in memory
  bench demo --device 'spdk-bdev:Malloc0?config=scripts/spdk-malloc.json'
  bench demo --device spdk-nvme:pcie:0000:01:00.0 --force

Exit code: 0 when everything read back is what it must be, 1 otherwise.")]
pub(crate) struct DemoArgs {
    /// Device, which is erased; default: a temporary file of 4 GiB (sparse), removed at the end
    #[arg(long, short = 'd', value_name = "URI")]
    device: Option<String>,
    /// Erase the device even when it holds a Gaur filesystem
    #[arg(long)]
    force: bool,
    /// Keep the temporary file
    #[arg(long)]
    keep: bool,
    /// Directory to import; default: a real one that any machine with Rust has
    #[arg(long, value_name = "DIR")]
    import: Option<PathBuf>,
    /// Import at most this many files
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    max_files: usize,
    /// Import at most this many bytes (and never more than fits well)
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = units::parse_bytes_not_zero)]
    max_bytes: u64,
    /// What is done to the files follows from this number
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// How long each of the two random 4 KiB figures is measured
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = units::parse_time)]
    probe_time: Duration,
    /// Print one JSON object instead of lines and a table
    #[arg(long)]
    json: bool,
}

/// Runs the demo.
pub(crate) fn run(args: &DemoArgs) -> Result<()> {
    let mut out = Out::new(args.json);
    let Some(uri) = &args.device else {
        let path = std::env::temp_dir().join(format!("gaur-demo-{}.img", std::process::id()));
        let demo = Demo::new(args, &format!("{}?size={DEFAULT_SIZE}", file_uri(&path)), true)?;
        if !args.keep {
            // The open device needs no name, and without one nothing is left behind, however the demo ends.
            let _ = std::fs::remove_file(&path);
        }
        demo.run(&mut out)?;
        if args.keep {
            out.line(format!("look around: bench ls --device {}", file_uri(&path)))?;
        }
        return out.flush();
    };
    Demo::new(args, uri, args.force)?.run(&mut out)
}

/// A run of the demo.
struct Demo<'a> {
    args: &'a DemoArgs,
    bars: Bars,
    device: Arc<dyn Device>,
    /// The same device, as the one who counts what goes through it.
    counter: Arc<CountingDevice>,
    started: Instant,
    model: Model,
    imported_at: SystemTime,
    /// User bytes written by changes, beside the import.
    changed_bytes: u64,
    report: Report,
}

impl<'a> Demo<'a> {
    fn new(args: &'a DemoArgs, uri: &str, force: bool) -> Result<Demo<'a>> {
        let counter = CountingDevice::wrap(open_device(uri, Access::Create)?);
        let device: Arc<dyn Device> = counter.clone();
        format_device(&device, "demo", force)?;
        let report = Report { device: uri.to_owned(), seed: args.seed, ..Report::default() };
        Ok(Demo {
            args,
            bars: Bars::new(args.json),
            device,
            counter,
            started: Instant::now(),
            model: Model::new(),
            imported_at: SystemTime::now(),
            changed_bytes: 0,
            report,
        })
    }

    fn run(mut self, out: &mut Out) -> Result<()> {
        let fs = mount_device(&self.device, false)?;
        let channel = fs.channel().doing("open a channel")?;
        let tree = self.find_tree(&channel, out)?;
        self.import(&channel, tree, out)?;
        self.change(&channel, out)?;
        self.durable(&channel, out)?;
        drop(channel);
        fs.unmount().doing("unmount")?;
        let fs = self.remount(out)?;
        let channel = fs.channel().doing("open a channel")?;
        let differences = self.verify(&channel, out)?;
        if differences.total == 0 {
            self.random_reads(&channel, out)?;
        }
        self.check(&fs, &channel, out)?;
        self.space(&channel)?;
        drop(channel);
        fs.unmount().doing("unmount")?;
        self.finish(&differences, out)
    }

    /// The tree to import, cut to what is asked for and fits.
    fn find_tree(&mut self, channel: &Channel, out: &mut Out) -> Result<Tree> {
        let bar = self.bars.spinner("looking for files");
        let mut tree = match &self.args.import {
            Some(root) => Tree::scan(root, b"")?,
            None => default_tree()?,
        };
        bar.finish_and_clear();
        let found = tree.items.len();
        // Copy-on-write needs room beside what it holds: old blocks stay until the next commit is durable.
        let room = channel.statfs().doing("ask for the free space")?.free_bytes / 5 * 2;
        let limits = Limits { files: self.args.max_files, bytes: self.args.max_bytes.min(room) };
        tree.sample(limits, self.args.seed);
        if tree.items.is_empty() {
            return Err(Failure::new("there is no file to import; name another directory with --import DIR"));
        }
        let roots: Vec<String> = tree.roots.iter().map(|root| root.display().to_string()).collect();
        out.line(format!("device      {}", self.report.device))?;
        out.line(format!("source      {}", roots.join(", ")))?;
        let mut what =
            format!("{} files, {}", units::count(tree.items.len() as u64), units::bytes(tree.bytes()));
        if tree.items.len() < found {
            what += &format!(" (a sample of {}; seed {})", units::count(found as u64), self.args.seed);
        }
        if tree.skipped > 0 {
            what +=
                &format!("; {} left out (unreadable, or the path is too long)", units::count(tree.skipped));
        }
        if self.args.import.is_none() && !tree.is_enough() {
            what += "; fewer than the demo would like, but all that this machine and device allow";
        }
        out.line_now(format!("            {what}"))?;
        self.report.source = roots;
        Ok(tree)
    }

    fn import(&mut self, channel: &Channel, mut tree: Tree, out: &mut Out) -> Result<()> {
        self.imported_at = SystemTime::now();
        let started = Instant::now();
        let bar = self.bars.bytes("read the source", tree.bytes());
        tree.warm(&|bytes| bar.inc(bytes));
        bar.finish_and_clear();
        if tree.items.is_empty() {
            return Err(Failure::new(
                "none of the files can be read; name another directory with --import DIR",
            ));
        }
        let note = "once, so that the import measures the filesystem and not the host's disk";
        out.line_now(step("read the source", started.elapsed(), note.to_owned()))?;

        let before = self.device_bytes_written();
        let started = Instant::now();
        let bar = self.bars.bytes("import", tree.bytes());
        let flags = OpenFlags::CREATE | OpenFlags::EXCLUSIVE;
        let sizes =
            import(channel, &self.device, &tree.items, flags, &mut |done| bar.set_position(done.bytes))?;
        channel.sync().doing("sync")?;
        let time = started.elapsed();
        bar.finish_and_clear();
        let written = self.device_bytes_written() - before;
        let report = &mut self.report;
        (report.files, report.bytes) = (sizes.len() as u64, sizes.iter().sum());
        report.import_seconds = time.as_secs_f64();
        report.files_per_s_in = units::per_second(report.files as f64, time);
        report.mib_per_s_in = units::per_second(report.bytes as f64 / units::MIB, time);
        report.device_bytes_per_user_byte_import = ratio(written, report.bytes);
        report.first_figures_seconds = self.started.elapsed().as_secs_f64();
        for (item, size) in tree.items.into_iter().zip(sizes) {
            self.model.insert(item.name, Expected::imported(item.host, size));
        }
        let (files, mib) = (units::figure(report.files_per_s_in), units::figure(report.mib_per_s_in));
        out.line_now(step("import", time, format!("{files} files/s, {mib} MiB/s, synced")))
    }

    /// Overwrites, truncates, renames, deletes, sync.
    fn change(&mut self, channel: &Channel, out: &mut Out) -> Result<()> {
        let mut rng = SmallRng::seed_from_u64(self.args.seed);
        let before = self.device_bytes_written();
        let started = Instant::now();

        let tasks = plan::overwrites(&mut self.model, &mut rng);
        self.report.overwrites = self.edit(channel, "overwrite", &tasks, out)?;
        let tasks = plan::truncates(&mut self.model, &mut rng);
        self.report.truncates = self.edit(channel, "truncate", &tasks, out)?;

        let renames = plan::renames(&mut self.model, &mut rng);
        self.report.renames = renames.len() as u64;
        let operations = renames.into_iter().map(|(from, to)| (from.clone(), Operation::Rename { from, to }));
        self.namespace(channel, "rename", operations, out)?;
        let deletes = plan::deletes(&mut self.model, &mut rng);
        self.report.deletes = deletes.len() as u64;
        let operations = deletes.into_iter().map(|name| (name.clone(), Operation::Delete { name }));
        self.namespace(channel, "delete", operations, out)?;

        let syncing = Instant::now();
        channel.sync().doing("sync")?;
        out.line_now(step("sync", syncing.elapsed(), String::new()))?;
        self.report.edits_seconds = started.elapsed().as_secs_f64();
        self.report.device_bytes_per_user_byte_edits =
            ratio(self.device_bytes_written() - before, self.changed_bytes);
        Ok(())
    }

    /// Runs the changes of `tasks`; returns how many there were.
    fn edit(&mut self, channel: &Channel, what: &str, tasks: &[Task], out: &mut Out) -> Result<u64> {
        let started = Instant::now();
        let bar = self.bars.steps(what, tasks.len() as u64);
        apply(channel, tasks, &mut |done| bar.set_position(done))?;
        bar.finish_and_clear();
        let changes = tasks.iter().flat_map(|task| &task.changes);
        self.changed_bytes += changes
            .clone()
            .map(|change| if let Change::Write { len, .. } = change { *len as u64 } else { 0 })
            .sum::<u64>();
        let number = changes.count() as u64;
        let note = format!("{} in {} files", units::count(number), units::count(tasks.len() as u64));
        out.line_now(step(what, started.elapsed(), note))?;
        Ok(number)
    }

    /// Runs independent operations on names, many in flight.
    fn namespace(
        &self,
        channel: &Channel,
        what: &str,
        operations: impl ExactSizeIterator<Item = (Vec<u8>, Operation)>,
        out: &mut Out,
    ) -> Result<()> {
        let (started, number) = (Instant::now(), operations.len() as u64);
        let bar = self.bars.steps(what, number);
        let mut flight = Flight::new(channel, 128);
        let mut operations = operations.fuse();
        loop {
            while flight.has_room()
                && let Some((name, operation)) = operations.next()
            {
                flight.submit(operation, name);
            }
            let Some((name, completion)) = flight.next() else { break };
            completion.result.doing(format!("{what} '{}'", show_name(&name)))?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        out.line_now(step(what, started.elapsed(), format!("{} files", units::count(number))))
    }

    fn durable(&mut self, channel: &Channel, out: &mut Out) -> Result<()> {
        let bar = self.bars.spinner("durable overwrites");
        let (seed, counter) = (self.args.seed ^ 0xd07ab1e, Arc::clone(&self.counter));
        let written = move || device_bytes_written(&counter);
        let (probe, written) =
            probe::durable_overwrites(channel, &mut self.model, self.args.probe_time, seed, written)?;
        bar.finish_and_clear();
        let rate = units::per_second(probe.operations as f64, probe.time);
        self.report.durable_overwrite_4k_per_s = rate;
        self.report.device_bytes_per_durable_byte = ratio(written, probe.operations * 4096);
        out.line_now(step("durable overwrites", probe.time, format!("{} per s", units::figure(rate))))
    }

    fn remount(&mut self, out: &mut Out) -> Result<Filesystem> {
        let Some(name) = self.model.keys().next() else {
            return Err(Failure::new("no file is left (a bug)"));
        };
        let started = Instant::now();
        let fs = mount_device(&self.device, false)?;
        let channel = fs.channel().doing("open a channel")?;
        channel.stat(name).doing(format!("find '{}' after the remount", show_name(name)))?;
        let time = started.elapsed();
        drop(channel);
        self.report.mount_ms = time.as_secs_f64() * 1e3;
        out.line_now(step("remount", time, "to the first answer".to_owned()))?;
        Ok(fs)
    }

    fn verify(&mut self, channel: &Channel, out: &mut Out) -> Result<Differences> {
        let differences = verify::listing(channel, &self.model)?;
        self.report.differences = differences.total;
        if differences.total > 0 {
            // Reading by name would only fail at the first missing file.
            out.line_now(format!("listing: {} DIFFERENCES", units::count(differences.total)))?;
            return Ok(differences);
        }

        let bytes = self.model.values().map(|file| file.size).sum();
        let started = Instant::now();
        let bar = self.bars.bytes("read back", bytes);
        self.report.read_bytes = verify::read_all(channel, &self.device, &self.model, &bar)?;
        bar.finish_and_clear();
        let time = started.elapsed();
        self.report.read_seconds = time.as_secs_f64();
        self.report.mib_per_s_out = units::per_second(self.report.read_bytes as f64 / units::MIB, time);
        let note = format!("{}, {} MiB/s", units::bytes(bytes), units::figure(self.report.mib_per_s_out));
        out.line_now(step("read back", time, note))?;

        let started = Instant::now();
        let bar = self.bars.bytes("verify", bytes);
        let differences = verify::contents(channel, &self.device, &self.model, self.imported_at, &bar)?;
        bar.finish_and_clear();
        (self.report.verified_files, self.report.verified_bytes) = (self.model.len() as u64, bytes);
        self.report.differences = differences.total;
        let files = units::count(self.model.len() as u64);
        let note = match differences.total {
            0 => format!("{files} files, {}: listing and every byte as they must be", units::bytes(bytes)),
            total => format!("{} DIFFERENCES", units::count(total)),
        };
        out.line_now(step("verify", started.elapsed(), note))?;
        Ok(differences)
    }

    fn random_reads(&mut self, channel: &Channel, out: &mut Out) -> Result<()> {
        let bar = self.bars.spinner("random reads");
        let probe = probe::random_reads(channel, &self.model, self.args.probe_time, self.args.seed)?;
        bar.finish_and_clear();
        let rate = units::per_second(probe.operations as f64, probe.time);
        self.report.random_read_4k_per_s = rate;
        let note = format!("{} per s, {} in flight", units::figure(rate), probe::READ_DEPTH);
        out.line_now(step("random 4 KiB reads", probe.time, note))
    }

    fn check(&mut self, fs: &Filesystem, channel: &Channel, out: &mut Out) -> Result<()> {
        let started = Instant::now();
        let checked = tools::check::walk(fs, channel, self.bars)?;
        self.report.check_problems = checked.problem_count;
        let note = match checked.problems.first() {
            None => {
                format!("{} blocks, no problem", units::count(checked.data_blocks + checked.metadata_blocks))
            }
            Some(first) => format!("{} PROBLEMS, the first: {first}", checked.problems.len()),
        };
        out.line_now(step("check", started.elapsed(), note))
    }

    fn device_bytes_written(&self) -> u64 {
        device_bytes_written(&self.counter)
    }

    fn space(&mut self, channel: &Channel) -> Result<()> {
        let space = channel.statfs().doing("ask for the free space")?;
        self.report.space_total_bytes = space.total_bytes;
        self.report.space_used_bytes = space.used_bytes;
        self.report.space_free_bytes = space.free_bytes;
        Ok(())
    }

    fn finish(mut self, differences: &Differences, out: &mut Out) -> Result<()> {
        self.report.peak_memory_bytes = sys::peak_memory_bytes();
        self.report.total_seconds = self.started.elapsed().as_secs_f64();
        self.report.ok = differences.total == 0 && self.report.check_problems == 0;
        if out.is_json() {
            out.json(&self.report)?;
        } else {
            self.report.print(out)?;
        }
        for difference in &differences.reported {
            crate::out::remark(format!("difference: {difference}"));
        }
        if differences.total > differences.reported.len() as u64 {
            crate::out::remark(format!("... {} differences in all", differences.total));
        }
        if self.report.ok {
            let total = units::time(self.started.elapsed());
            out.line_now(format!("\nverified: the filesystem holds exactly what it must ({total} in all)"))
        } else {
            out.flush()?;
            Err(Failure::Reported)
        }
    }
}

fn step(what: &str, time: Duration, note: String) -> String {
    format!("{what:<20} {:>9}   {note}", units::time(time)).trim_end().to_owned()
}

/// Bytes that went to the device so far, of every kind.
fn device_bytes_written(counter: &CountingDevice) -> u64 {
    let counts = counter.counts();
    counts.writes.bytes + counts.zeroes.bytes
}

fn ratio(device_bytes: u64, user_bytes: u64) -> f64 {
    device_bytes as f64 / user_bytes.max(1) as f64
}
