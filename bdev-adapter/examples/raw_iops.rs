//! Raw loops over a device: `cargo run --release -p bdev-adapter --example raw_iops -- URI [seconds]`.
//!
//! Random 4 KiB reads and writes at queue depth 32 and 1, one thread, and what the adapter adds to the copy for memory.
//! A quick look for whoever changes a backend; the figures that count come from the bench.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bdev_adapter::blocking::BlockingIo;
use bdev_adapter::{Device, DmaBuf, DmaSource, OpenOptions, Request, open};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let uri = arguments.next().unwrap_or_else(|| "mem:256KiB".to_owned());
    let seconds = arguments.next().map_or(Ok(1.0), |text| text.parse())?;
    let device = open(&uri, &OpenOptions::new().create(true))?;
    println!("{device:?}");
    let blocks = device.geometry().capacity / 4096;
    let source = device.dma();
    let mut queue_pair = Arc::clone(&device).queue_pair()?;
    let mut completions = Vec::with_capacity(256);
    warm_up(&device)?;
    for (name, depth, write) in
        [("write", 32, true), ("read", 32, false), ("write", 1, true), ("read", 1, false)]
    {
        let mut bufs = (0..depth).map(|_| DmaBuf::new(&source, 4096)).collect::<Result<Vec<_>, _>>()?;
        let mut state = 88_172_645_463_325_252u64;
        let mut done = 0u64;
        let (started, cpu_before) = (Instant::now(), cpu_seconds());
        let end = started + Duration::from_secs_f64(seconds);
        while !done.is_multiple_of(4096) || Instant::now() < end {
            while let Some(buf) = bufs.pop() {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let offset = (state >> 11) % blocks * 4096;
                let request =
                    if write { Request::write(offset, buf, 0) } else { Request::read(offset, buf, 0) };
                queue_pair.submit(request);
            }
            while queue_pair.poll(&mut completions) == 0 {}
            for completion in completions.drain(..) {
                completion.result?;
                bufs.extend(completion.bufs.into_one());
                done += 1;
            }
        }
        while queue_pair.outstanding() > 0 {
            queue_pair.poll(&mut completions);
        }
        completions.clear();
        let (elapsed, cpu) = (started.elapsed().as_secs_f64(), cpu_seconds());
        let rate = done as f64 / elapsed;
        let ns = |after: f64, before: f64| (after - before) * 1e9 / done as f64;
        let (all, kernel) = (ns(cpu.0, cpu_before.0), ns(cpu.1, cpu_before.1));
        println!(
            "{name:5} 4 KiB, depth {depth:2}: {rate:9.0} per second, {all:8.1} ns of CPU each, {kernel:8.1} in the kernel"
        );
    }
    copy_alone(device.geometry().capacity.min(1 << 30) as usize, &source)
}

/// What the copies of a memory device cost by themselves, in the same pattern.
fn copy_alone(len: usize, source: &Arc<dyn DmaSource>) -> Result<(), Box<dyn std::error::Error>> {
    const COPIES: u64 = 1_000_000;
    let memory = DmaBuf::new(source, len)?;
    let mut bufs = (0..32).map(|_| DmaBuf::new(source, 4096)).collect::<Result<Vec<_>, _>>()?;
    let mut state = 88_172_645_463_325_252u64;
    let before = cpu_seconds();
    for number in 0..COPIES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let offset = (state >> 11) as usize % (len / 4096) * 4096;
        bufs[number as usize % 32].copy_from_slice(&memory[offset..offset + 4096]);
    }
    let ns = (cpu_seconds().0 - before.0) * 1e9 / COPIES as f64;
    println!("copy  4 KiB, by itself: {ns:38.1} ns of CPU each");
    Ok(())
}

/// Writes everything once: the first touch of memory or of a sparse file costs more than any I/O.
fn warm_up(device: &Arc<dyn Device>) -> Result<(), Box<dyn std::error::Error>> {
    let mut io = BlockingIo::new(device)?;
    let bytes = vec![1; (1 << 20).min(device.geometry().capacity as usize)];
    for offset in (0..device.geometry().capacity / bytes.len() as u64).map(|n| n * bytes.len() as u64) {
        io.write(offset, &bytes)?;
    }
    Ok(io.flush()?)
}

/// Processor time of this thread in seconds: all, and in the kernel.
fn cpu_seconds() -> (f64, f64) {
    // SAFETY: an all-zero `rusage` is a valid value of plain integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives through the call, which cannot fail for this thread.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    (seconds(usage.ru_utime) + seconds(usage.ru_stime), seconds(usage.ru_stime))
}
