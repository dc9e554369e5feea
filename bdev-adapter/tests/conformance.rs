//! The conformance suite over every backend of this build. See [`suite`].

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

mod suite;

use bdev_adapter::{OpenOptions, open};
use suite::Target;

/// Memory, one device per open.
fn memory(uri: &'static str) -> Target {
    let open = move |options: &OpenOptions| open(uri, options);
    Target { open: Box::new(open), persistent: false, foreign_buffers: true, keep: Box::new(()) }
}

/// A file in a temporary directory under `TMPDIR`, removed at the end.
fn file(options: &'static str) -> Target {
    wrapped_uri("", file_uri(options))
}

fn file_uri(options: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file:{}?size=64MiB&{options}", dir.path().join("disk.img").to_str().unwrap());
    (dir, uri)
}

/// A file behind `wrappers`, by URI.
fn wrapped_uri(wrappers: &str, (dir, uri): (tempfile::TempDir, String)) -> Target {
    let uri = if wrappers.is_empty() { uri } else { format!("{wrappers}/{uri}") };
    let open = move |options: &OpenOptions| open(&uri, options);
    Target { open: Box::new(open), persistent: true, foreign_buffers: true, keep: Box::new(dir) }
}

conformance!(mem, || crate::memory("mem:64MiB"));
conformance!(mem_512, || crate::memory("mem:64MiB?block=512"));
conformance!(file_direct, || crate::file("direct=auto"));
conformance!(file_buffered, || crate::file("direct=off&block=512"));
conformance!(file_shallow, || crate::file("block=4096&depth=3"));
conformance!(fault_without_faults, || crate::memory("fault:seed=7/mem:64MiB"));
conformance!(fault_around_file, || crate::wrapped_uri("fault:", crate::file_uri("block=512")));
// Every wrapper, alone and in stacks, in whatever order: nothing goes wrong that was not asked for. Wrappers that follow
// old content or take their time have paths of their own for that.
conformance!(count, || crate::memory("count:/mem:64MiB"));
conformance!(record, || crate::memory("record:/mem:64MiB"));
conformance!(latency_without_times, || crate::memory("latency:/mem:64MiB?block=512"));
conformance!(latency, || crate::memory(
    "latency:read=lognormal(5us,0.5),write=3us,flush=20us,unmap=1us,fua=5us,jitter=2us,channels=16/mem:64MiB"
));
conformance!(fault_with_a_volatile_cache, || crate::memory("fault:volatile=on/mem:64MiB?block=512"));
conformance!(fault_with_a_volatile_cache_around_file, || {
    crate::wrapped_uri("fault:volatile=on", crate::file_uri("block=4096&depth=3"))
});
conformance!(slow_fault, || crate::memory("fault:slow=0.01:50us/mem:64MiB"));
conformance!(record_around_file, || crate::wrapped_uri("record:", crate::file_uri("direct=auto")));
conformance!(count_latency_fault, || crate::memory("count:/latency:read=2us/fault:seed=7/mem:64MiB"));
conformance!(fault_latency_record, || crate::memory(
    "fault:volatile=on/latency:write=2us,jitter=1us/record:/mem:64MiB"
));
conformance!(record_fault_count_file, || {
    crate::wrapped_uri("record:/fault:seed=1/count:", crate::file_uri("block=512"))
});
conformance!(latency_twice_around_file, || {
    crate::wrapped_uri("latency:read=2us/latency:write=2us,channels=8", crate::file_uri("direct=off"))
});

/// Every case on one block device, one after another, as for any backend that has only one medium.
#[test]
fn block_device() {
    let dir = tempfile::tempdir().unwrap();
    let backing = dir.path().join("backing");
    std::fs::File::create(&backing).unwrap().set_len(64 << 20).unwrap();
    let Some(disk) = LoopDevice::over(&backing) else { return };
    for (name, case) in suite::CASES {
        let uri = format!("file:{}", disk.0);
        println!("{name}");
        suite::run(name, *case, move || Target {
            open: Box::new(move |options: &OpenOptions| open(&uri, options)),
            persistent: true,
            foreign_buffers: true,
            keep: Box::new(()),
        });
    }
}

struct LoopDevice(String);

impl LoopDevice {
    /// None, with a message, where loop devices cannot be had.
    fn over(backing: &std::path::Path) -> Option<LoopDevice> {
        let output = std::process::Command::new("losetup").args(["--find", "--show"]).arg(backing).output();
        match output {
            Ok(output) if output.status.success() => {
                Some(LoopDevice(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
            }
            other => {
                println!("SKIPPED: no loop device (needs root and losetup): {other:?}");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        std::process::Command::new("losetup").arg("--detach").arg(&self.0).status().unwrap();
    }
}
