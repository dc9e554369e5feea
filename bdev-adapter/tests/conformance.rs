//! The conformance suite over every backend of this build. See [`suite`].

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

mod suite;

use std::sync::Arc;

use bdev_adapter::wrap::counters::CountingDevice;
use bdev_adapter::wrap::fault::{FaultDevice, FaultPlan};
use bdev_adapter::wrap::recorder::Recorder;
use bdev_adapter::{Device, OpenOptions, open};
use suite::Target;

/// Memory, one device per open.
fn memory(uri: &'static str) -> Target {
    let open = move |options: &OpenOptions| open(uri, options);
    Target { open: Box::new(open), persistent: false, foreign_buffers: true, keep: Box::new(()) }
}

/// A file in a temporary directory under `TMPDIR`, removed at the end.
fn file(options: &'static str) -> Target {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let uri = format!("file:{}?size=64MiB&{options}", path.to_str().unwrap());
    let open = move |options: &OpenOptions| open(&uri, options);
    Target { open: Box::new(open), persistent: true, foreign_buffers: true, keep: Box::new(dir) }
}

/// `target` behind a wrapper.
fn wrapped(target: Target, wrap: fn(Arc<dyn Device>) -> Arc<dyn Device>) -> Target {
    let Target { open, persistent, foreign_buffers, keep } = target;
    let open = move |options: &OpenOptions| Ok(wrap(open(options)?));
    Target { open: Box::new(open), persistent, foreign_buffers, keep }
}

conformance!(mem, || crate::memory("mem:64MiB"));
conformance!(mem_512, || crate::memory("mem:64MiB?block=512"));
conformance!(file_direct, || crate::file("direct=auto"));
conformance!(file_buffered, || crate::file("direct=off&block=512"));
conformance!(file_shallow, || crate::file("block=4096&depth=3"));
conformance!(fault_without_faults, || crate::memory("fault:seed=7/mem:64MiB"));
conformance!(fault_around_file, || {
    crate::wrapped(crate::file("block=512"), |device| {
        crate::FaultDevice::wrap(device, crate::FaultPlan::default())
    })
});
conformance!(counters, || crate::wrapped(crate::memory("mem:64MiB"), |device| crate::CountingDevice::wrap(
    device
)));
conformance!(recorder, || {
    crate::wrapped(crate::memory("mem:64MiB"), |device| {
        let geometry = device.geometry();
        let base = bdev_adapter::image::Image::new(geometry.capacity, geometry.block_size);
        crate::Recorder::with_base(device, base)
    })
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
