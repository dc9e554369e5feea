//! `bench run`: the beginning of an fio-like tool, with fio's option names and JSON keys.
//!
//! [`options`] are the arguments, [`job`] is the loop of one job, [`stats`] what it counts, [`report`] the output.
//! Each job is a thread with its own channel (or queue pair) and its own file, as fio's jobs are.

mod job;
mod options;
mod report;
mod stats;

use std::fs::File as HostFile;
use std::sync::{Arc, Barrier};
use std::thread;

use bdev_adapter::blocking::BlockingIo;
use bdev_adapter::{Claim, Device};
use fs_core::{Channel, File, Filesystem, OpenFlags};

pub(crate) use self::options::RunArgs;
use self::options::{Format, Target};
use self::stats::JobStats;
use crate::failure::{Doing, Failure, Result};
use crate::lane::{FileLane, RawLane};
use crate::out::{Bars, Out};
use crate::session::{Access, dma_buffers, format_device, mount_device, open_device};

/// Bytes of a write when a file is laid out.
const LAYOUT_PIECE: usize = 1 << 20;

/// Runs the jobs and prints the report.
pub(crate) fn run(args: &RunArgs) -> Result<()> {
    args.check()?;
    let access = match args.target {
        Target::Raw if !args.rw.writes() && !args.is_volatile() => Access::Read,
        _ => Access::Create,
    };
    let device = open_device(&args.device.device, access)?;
    let stats = match args.target {
        Target::Fs => run_on_files(args, &device)?,
        Target::Raw => run_on_device(args, &device)?,
    };
    let json = args.output_format == Format::Json;
    let mut out = match &args.output {
        None => Out::new(json),
        Some(path) => {
            let file = HostFile::create(path).doing(format!("create '{}'", path.display()))?;
            Out::to(Box::new(file), json)
        }
    };
    report::print(args, &stats, &mut out)?;
    out.flush()
}

fn run_on_files(args: &RunArgs, device: &Arc<dyn Device>) -> Result<Vec<JobStats>> {
    // A memory device is always empty: there is nothing that could be lost.
    if args.format || args.is_volatile() {
        format_device(device, "bench", args.force)?;
    }
    let fs = mount_device(device, false)?;
    let channel = fs.channel().doing("open a channel")?;
    for number in 0..args.numjobs {
        lay_out(args, device, &channel, &args.file_of(number))?;
    }
    channel.sync().doing("sync the filesystem")?;
    drop(channel);
    let start = Barrier::new(args.numjobs);
    let stats = in_threads(args, |number| {
        // The barrier must be passed whatever happens, or the other jobs would wait for ever.
        let prepared = open_file(&fs, &args.file_of(number));
        let buffers = dma_buffers(device, args.iodepth, args.bs());
        start.wait();
        let (channel, file) = prepared?;
        job::run(args, number, &mut FileLane::new(&channel, file), buffers?)
    });
    let unmounted = fs.unmount().doing("unmount the filesystem");
    let stats = stats?;
    unmounted.map(|()| stats)
}

fn open_file(fs: &Filesystem, name: &str) -> Result<(Channel, File)> {
    let channel = fs.channel().doing("open a channel")?;
    let file = channel.open(name, OpenFlags::default()).doing(format!("open '{name}'"))?;
    Ok((channel, file))
}

/// Makes the file of a job, and fills it when the job will read.
fn lay_out(args: &RunArgs, device: &Arc<dyn Device>, channel: &Channel, name: &str) -> Result<()> {
    let file = channel.open(name, OpenFlags::CREATE).doing(format!("create '{name}'"))?;
    let size = args.size;
    if file.size() > size {
        channel.truncate(&file, size).doing(format!("shorten '{name}'"))?;
    }
    if args.rw.reads() && file.size() < size {
        let bar = Bars::new(args.output_format == Format::Json).bytes(&format!("lay out {name}"), size);
        let mut buf = dma_buffers(device, 1, LAYOUT_PIECE)?.pop();
        let mut at = 0;
        while at < size
            && let Some(mut piece) = buf.take()
        {
            crate::transfer::edit::pattern(args.randseed, at, &mut piece);
            let rest = piece.split_off(piece.len().min((size - at) as usize));
            let len = piece.len() as u64;
            let (written, mut piece) = channel.write_buf(&file, at, piece);
            written.doing(format!("lay out '{name}'"))?;
            if piece.unsplit(rest).is_ok() {
                buf = Some(piece);
            }
            at += len;
            bar.set_position(at);
        }
        bar.finish_and_clear();
    }
    channel.close(file).doing(format!("close '{name}'"))
}

fn run_on_device(args: &RunArgs, device: &Arc<dyn Device>) -> Result<Vec<JobStats>> {
    let geometry = device.geometry();
    if !args.bs().is_multiple_of(geometry.block_size as usize) {
        return Err(Failure::Usage(format!(
            "--bs must be a multiple of {} on this device",
            geometry.block_size
        )));
    }
    if args.size.saturating_mul(args.numjobs as u64) > geometry.capacity {
        let (jobs, capacity) = (args.numjobs, crate::units::bytes(geometry.capacity));
        return Err(Failure::Usage(format!(
            "{jobs} jobs of this --size do not fit on the device ({capacity})"
        )));
    }
    let _claim = Claim::take(device).doing("take the device")?;
    if args.rw.reads() && args.is_volatile() {
        fill_device(args, device)?;
    }
    let start = Barrier::new(args.numjobs);
    in_threads(args, |number| {
        let lane = RawLane::new(device, number as u64 * args.size);
        let buffers = dma_buffers(device, args.iodepth, args.bs());
        start.wait();
        job::run(args, number, &mut lane?, buffers?)
    })
}

/// Writes all that the jobs will read. Memory that was never written is one shared page of zeroes, and reading that would
/// flatter the device.
fn fill_device(args: &RunArgs, device: &Arc<dyn Device>) -> Result<()> {
    let mut io = BlockingIo::new(device).doing("open a queue pair of the device")?;
    let mut piece = vec![0; LAYOUT_PIECE];
    crate::transfer::edit::pattern(args.randseed, 0, &mut piece);
    let end = args.size * args.numjobs as u64;
    for at in (0..end).step_by(LAYOUT_PIECE) {
        // Sizes of devices and I/Os are multiples of the block, and so is what is left at the end.
        let block = u64::from(device.geometry().block_size);
        let len = (end - at).next_multiple_of(block).min(LAYOUT_PIECE as u64) as usize;
        io.write(at, &piece[..len]).doing("lay out the device")?;
    }
    Ok(())
}

/// Runs every job in a thread of its own.
fn in_threads(args: &RunArgs, work: impl Fn(usize) -> Result<JobStats> + Sync) -> Result<Vec<JobStats>> {
    let work = &work;
    thread::scope(|scope| {
        let jobs: Vec<_> = (0..args.numjobs).map(|number| scope.spawn(move || work(number))).collect();
        let results: Vec<_> = jobs.into_iter().map(|job| job.join()).collect();
        results
            .into_iter()
            .map(|result| result.unwrap_or_else(|_| Err(Failure::new("a job panicked"))))
            .collect()
    })
}
