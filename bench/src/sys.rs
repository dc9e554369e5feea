//! What only the operating system can tell or do: CPU time of a thread, pinning, peak memory, children that end with us.
//!
//! All `unsafe` of the bench is here: libc calls that fill plain structs, and what a child does before it runs its program.

use std::mem;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// CPU time that the calling thread has used, in nanoseconds.
pub(crate) fn thread_cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec, which the call fills. The clock exists on every Linux.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    if result != 0 {
        return 0;
    }
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A counter that grows steadily, for spans of a few nanoseconds: the CPU's own. What came before is done when it is read.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn ticks() -> u64 {
    use std::arch::x86_64::{_mm_lfence, _rdtsc};
    // SAFETY: every CPU of this architecture has both instructions; they touch no memory.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

/// A counter that grows steadily, in nanoseconds: what there is on other architectures.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn ticks() -> u64 {
    use std::sync::OnceLock;
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// Which time counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Clock {
    /// The time that passes
    Wall,
    /// The CPU time of the measuring thread. A thread that polls uses its core all the time, so on a quiet machine both
    /// are the same; on a busy one this leaves out the time in which others had the core
    Cpu,
}

impl Clock {
    /// Starts to measure.
    pub(crate) fn start(self) -> Stopwatch {
        Stopwatch { clock: self, wall: Instant::now(), cpu_ns: thread_cpu_ns() }
    }
}

/// A running measurement of the calling thread.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stopwatch {
    clock: Clock,
    wall: Instant,
    cpu_ns: u64,
}

impl Stopwatch {
    /// The time since the start, by its clock. Wall: some 25 ns; CPU: a system call.
    pub(crate) fn elapsed(&self) -> Duration {
        match self.clock {
            Clock::Wall => self.wall.elapsed(),
            Clock::Cpu => Duration::from_nanos(thread_cpu_ns() - self.cpu_ns),
        }
    }
}

/// What the calling thread has used of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ThreadUsage {
    /// CPU time in user mode, microseconds.
    pub(crate) user_us: u64,
    /// CPU time in the kernel, microseconds.
    pub(crate) system_us: u64,
    /// Context switches, voluntary and not.
    pub(crate) switches: u64,
    /// Page faults that needed I/O.
    pub(crate) major_faults: u64,
    /// Other page faults.
    pub(crate) minor_faults: u64,
}

impl ThreadUsage {
    /// As of now.
    pub(crate) fn now() -> ThreadUsage {
        // SAFETY: rusage is plain numbers, for which zeroes are valid.
        let mut usage: libc::rusage = unsafe { mem::zeroed() };
        // SAFETY: the pointer is to a live rusage, which the call fills.
        if unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) } != 0 {
            return ThreadUsage::default();
        }
        let us = |t: libc::timeval| t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64;
        ThreadUsage {
            user_us: us(usage.ru_utime),
            system_us: us(usage.ru_stime),
            switches: (usage.ru_nvcsw + usage.ru_nivcsw) as u64,
            major_faults: usage.ru_majflt as u64,
            minor_faults: usage.ru_minflt as u64,
        }
    }

    /// What was used since `earlier`.
    pub(crate) fn since(self, earlier: ThreadUsage) -> ThreadUsage {
        ThreadUsage {
            user_us: self.user_us - earlier.user_us,
            system_us: self.system_us - earlier.system_us,
            switches: self.switches - earlier.switches,
            major_faults: self.major_faults - earlier.major_faults,
            minor_faults: self.minor_faults - earlier.minor_faults,
        }
    }
}

/// Keeps the calling thread on one core; dropping it restores what was. Threads started meanwhile inherit the pin, so
/// pin after the mount, whose helper thread wants another core.
pub(crate) struct Pinned {
    before: libc::cpu_set_t,
}

impl Pinned {
    /// Pins the calling thread to the last core it may run on (interrupts tend to be on the first). `None` when the
    /// system does not allow it: the figures are a little less steady then.
    pub(crate) fn to_last_core() -> Option<Pinned> {
        Pinned::to_core(*cores().last()?)
    }

    /// Pins the calling thread to a core.
    pub(crate) fn to_core(core: usize) -> Option<Pinned> {
        let before = affinity()?;
        // SAFETY: cpu_set_t is a plain bit mask, for which zeroes are valid.
        let mut mask: libc::cpu_set_t = unsafe { mem::zeroed() };
        if core >= libc::CPU_SETSIZE as usize {
            return None;
        }
        // SAFETY: the index is below CPU_SETSIZE, the number of bits in the mask.
        unsafe { libc::CPU_SET(core, &mut mask) };
        set_affinity(&mask).then_some(Pinned { before })
    }
}

/// The cores that the calling thread may run on.
pub(crate) fn cores() -> Vec<usize> {
    let Some(mask) = affinity() else { return Vec::new() };
    // SAFETY: every index is below CPU_SETSIZE, the number of bits in the mask.
    (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &mask) }).collect()
}

fn affinity() -> Option<libc::cpu_set_t> {
    // SAFETY: cpu_set_t is a plain bit mask, for which zeroes are valid.
    let mut mask: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the pointer is to a live mask of the length given; 0 is the calling thread.
    let result = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut mask) };
    (result == 0).then_some(mask)
}

/// Has the child killed when the calling thread ends, however that happens: it would keep a core busy for ever.
pub(crate) fn end_with_us(command: &mut Command) -> &mut Command {
    // SAFETY: prctl is a system call, which is allowed between fork and exec, and takes plain numbers.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        set_affinity(&self.before);
    }
}

fn set_affinity(mask: &libc::cpu_set_t) -> bool {
    // SAFETY: the pointer is to a live mask of the length given; 0 is the calling thread.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), mask) == 0 }
}

/// Bytes of memory that this process has resident now, mappings of at least `mapping` bytes left out; `None` where the system
/// does not tell.
pub(crate) fn resident_bytes_below(mapping: u64) -> Option<u64> {
    resident_in(&std::fs::read_to_string("/proc/self/smaps").ok()?, mapping)
}

/// The same of the text of `smaps`.
fn resident_in(smaps: &str, mapping: u64) -> Option<u64> {
    let kib = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?.trim().trim_end_matches("kB").trim().parse().ok()
    };
    let (mut counts, mut sum, mut any) = (false, 0, false);
    for line in smaps.lines() {
        if let Some(size) = kib(line, "Size:") {
            counts = size * 1024 < mapping;
        } else if let Some(rss) = kib(line, "Rss:") {
            any = true;
            sum += if counts { rss * 1024 } else { 0 };
        }
    }
    any.then_some(sum)
}

/// The most memory that this process has had resident so far, in bytes; `None` where the system does not tell.
pub(crate) fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_mappings_are_left_out_of_what_is_resident() {
        let smaps = "\
7f00-7f01 rw-p 00000000 00:00 0
Size:               1024 kB
KernelPageSize:        4 kB
Rss:                 100 kB
7f02-7f03 rw-p 00000000 00:00 0                          [heap]
Size:                 16 kB
Rss:                  12 kB
";
        assert_eq!(resident_in(smaps, 1 << 20), Some(12 << 10));
        assert_eq!(resident_in(smaps, 2 << 20), Some(112 << 10));
        assert_eq!(resident_in("", 1), None);
        assert!(resident_bytes_below(u64::MAX).unwrap() > 1 << 20);
    }

    #[test]
    fn ticks_go_on() {
        let before = ticks();
        std::thread::sleep(Duration::from_millis(1));
        assert!(ticks() > before);
    }
}
