//! Generated operations against an in-memory reference that steps in lockstep: every answer, every error and in the end
//! every byte must be equal, through all three forms of the API, over clean remounts, with little memory and with
//! little space.
//!
//! `GAUR_OPS=1000000 cargo test --release -p fs-core --test model -- --nocapture` is the long form.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::sync::Arc;

use bdev_adapter::Device;
use bdev_adapter::wrap::counters::CountingDevice;
use fs_core::{Error, Filesystem, MountOptions};
use rand::Rng;

use common::driver::{Driver, Form};
use common::footprint::Footprint;
use common::generate::{Generator, Shape};
use common::op::{Handle, Op};
use common::reference::Reference;
use common::{BLOCK, MIB, TestDevice, Watchdog, check, check_statfs, fresh, quiet};

/// A run of the model: a device, how it is mounted, and what is done.
struct Scenario {
    name: &'static str,
    device_bytes: u64,
    options: MountOptions,
    shape: Shape,
    /// Operations between remounts, about.
    remount_every: usize,
    /// Operations between deletions of everything, about; 0: never.
    clear_every: usize,
    /// Files that are made at first.
    prefill: usize,
    /// So many operations of a hundred are done.
    share: usize,
}

/// What a run has done.
#[derive(Default, Debug)]
struct Tally {
    operations: usize,
    remounts: usize,
    verified_bytes: u64,
    no_space: u64,
    peak_files: usize,
    peak_blocks: u64,
}

/// A scenario that runs.
struct Run {
    /// Kept for its file.
    _device: TestDevice,
    counting: Arc<CountingDevice>,
    scenario: Scenario,
    reference: Reference,
    generator: Generator,
    tally: Tally,
    /// Blocks used by a filesystem that was just made.
    baseline: u64,
    trace: bool,
}

fn run(scenario: Scenario) {
    let seed = common::seed(scenario.name);
    let total = common::ops(20_000) * scenario.share / 100;
    let _watchdog = Watchdog::start(scenario.name, seed, 120 + total as u64 / 500);
    let device = TestDevice::slow(scenario.device_bytes, seed);
    let counting = CountingDevice::wrap(Arc::clone(&device.device));
    let generator = Generator::new(seed, scenario.shape.clone());
    let reference = Reference::default();
    let mut run = Run {
        _device: device,
        counting,
        scenario,
        reference,
        generator,
        tally: Tally::default(),
        baseline: 0,
        trace: common::trace(),
    };
    run.all(total);
    println!("{}: {:?}", run.scenario.name, run.tally);
}

impl Run {
    fn counting(&self) -> Arc<dyn Device> {
        self.counting.clone()
    }

    fn all(&mut self, total: usize) {
        let fs = fresh(&self.counting(), &self.scenario.options);
        let mut driver = Driver::new(fs);
        self.baseline = driver.channel.statfs().unwrap().used_bytes / BLOCK;
        self.prefill(&mut driver);
        while self.tally.operations < total {
            self.round(&mut driver);
            driver = match self.generator.rng.random_range(0..6) {
                0 => {
                    self.read_only_mount(driver);
                    self.mount(false)
                }
                _ => {
                    self.unmount(driver);
                    self.mount(false)
                }
            };
            self.verify_all(&driver);
            if self.generator.one_in(3) {
                check(&driver.fs, &driver.channel);
            }
        }
        self.delete_everything(&mut driver);
        self.unmount(driver);
        let driver = self.mount(false);
        self.verify_all(&driver);
        self.tally.no_space = self.reference.no_space;
    }

    /// Makes files, all in flight together.
    fn prefill(&mut self, driver: &mut Driver) {
        let names = self.scenario.shape.names.iter().take(self.scenario.prefill);
        let ops: Vec<Op> = names.map(|name| Op::Create { name: name.clone() }).collect();
        let (reference, rng) = (&mut self.reference, &mut self.generator.rng);
        driver.run(Form::Submitted, &ops, rng, |index, outcome| reference.settle(&ops[index], outcome));
        self.tally.operations += ops.len();
    }

    /// Operations until the next remount.
    fn round(&mut self, driver: &mut Driver) {
        self.generator.growing = self.generator.rng.random_ratio(3, 4);
        let length = self.generator.rng.random_range(1..=2 * self.scenario.remount_every);
        let end = self.tally.operations + length;
        while self.tally.operations < end {
            if self.scenario.clear_every > 0 && self.generator.one_in(self.scenario.clear_every as u32) {
                self.delete_everything(driver);
            }
            self.step(driver);
        }
    }

    /// One operation, or some that are in flight together.
    fn step(&mut self, driver: &mut Driver) {
        let form = match self.generator.rng.random_range(0..20) {
            0 => Form::Futures,
            1 => Form::Submitted,
            _ => Form::Blocking,
        };
        let ops = match form {
            Form::Blocking => vec![self.generator.op(&self.reference)],
            _ => self.together(),
        };
        self.tally.operations += ops.len();
        if self.trace {
            println!("{form:?} {ops:?}");
        }
        let (reference, rng) = (&mut self.reference, &mut self.generator.rng);
        let no_space = reference.no_space;
        driver.run(form, &ops, rng, |index, outcome| reference.settle(&ops[index], outcome));
        // What was in flight together may have freed space a moment later.
        if reference.no_space > no_space && ops.len() == 1 {
            self.check_full(driver, &ops[0]);
        }
        self.tally.peak_files = self.tally.peak_files.max(self.reference.files.len());
        self.tally.peak_blocks = self.tally.peak_blocks.max(self.reference.blocks());
    }

    /// Operations that do not depend on each other.
    fn together(&mut self) -> Vec<Op> {
        let count = self.generator.rng.random_range(1..=self.scenario.shape.together);
        let mut footprint = Footprint::default();
        let mut ops = Vec::new();
        for _ in 0..count {
            let op = self.generator.op(&self.reference);
            if op.is_asynchronous() && footprint.admit(&self.reference, &op) {
                ops.push(op);
            }
        }
        ops
    }

    /// `op` found no space: then there was not much.
    fn check_full(&mut self, driver: &mut Driver, op: &Op) {
        driver.channel.sync().unwrap();
        let statfs = driver.channel.statfs().unwrap();
        self.reference.check_statfs(&statfs);
        let wanted = match op {
            Op::Write { len, .. } | Op::Append { len, .. } => (*len as u64).div_ceil(BLOCK) + 1,
            Op::Preallocate { len, .. } | Op::Zero { len, .. } => 2 * len.div_ceil(BLOCK) + 1,
            Op::Batch { writes } => {
                writes.iter().map(|(_, _, len, _)| (*len as u64).div_ceil(BLOCK) + 1).sum()
            }
            _ => 1,
        };
        let most = (wanted + wanted / 32) * BLOCK + MIB / 2;
        assert!(statfs.free_bytes < most, "no space for {wanted} blocks in {op:?}, but {statfs:?}");
    }

    // ---- unmount and mount

    fn mount(&mut self, read_only: bool) -> Driver {
        let options = MountOptions { read_only, ..self.scenario.options.clone() };
        self.reference.close_all();
        self.reference.read_only = read_only;
        self.tally.remounts += 1;
        if self.trace {
            println!("remount, read_only={read_only}");
        }
        Driver::new(Filesystem::mount(self.counting(), &options).unwrap())
    }

    /// Unmounts in one of the ways in which that can happen; files may be open.
    fn unmount(&mut self, driver: Driver) {
        let Driver { fs, channel, handles } = driver;
        match self.generator.rng.random_range(0..4) {
            0 => {
                drop(handles);
                drop(channel);
                fs.unmount().unwrap();
            }
            1 => {
                let clone = fs.clone();
                fs.unmount().unwrap();
                self.check_unmounted(&clone, &channel, handles.values().next());
            }
            2 => {
                drop(fs);
                drop(handles);
                drop(channel);
            }
            _ => {
                drop(channel);
                drop(fs);
                drop(handles);
            }
        }
    }

    fn check_unmounted(&self, fs: &Filesystem, channel: &fs_core::Channel, file: Option<&fs_core::File>) {
        assert!(matches!(fs.channel(), Err(Error::Unmounted)));
        assert!(matches!(channel.stat("a"), Err(Error::Unmounted)));
        assert!(matches!(channel.statfs(), Err(Error::Unmounted)));
        let Some(file) = file else { return };
        assert!(matches!(channel.read(file, 0, &mut [0; 10]), Err(Error::Unmounted)));
        assert!(matches!(channel.write(file, 0, &[0; 10]), Err(Error::Unmounted)));
        let (result, buf) = channel.write_buf(file, 0, channel.buffer(4096).unwrap());
        assert!(matches!(result, Err(Error::Unmounted)) && buf.len() == 4096);
    }

    /// A read-only mount refuses what changes something, shows the same content, and writes nothing.
    fn read_only_mount(&mut self, driver: Driver) {
        self.unmount(driver);
        let before = self.counting.counts();
        let mut driver = self.mount(true);
        self.verify_all(&driver);
        for _ in 0..30 {
            self.step(&mut driver);
        }
        self.unmount(driver);
        let after = self.counting.counts() - before;
        let changes = (after.writes.ops, after.zeroes.ops, after.unmaps.ops);
        assert_eq!(changes, (0, 0, 0), "a read-only mount wrote");
    }

    // ---- everything at once

    /// Compares all names, and the files they lead to, with the reference.
    fn verify_all(&mut self, driver: &Driver) {
        self.tally.verified_bytes += self.reference.verify_all(&driver.channel, b"");
    }

    /// Deletes all files; what they took must come back, but for the checksums of freed blocks and the like.
    fn delete_everything(&mut self, driver: &mut Driver) {
        let handles: Vec<Handle> = self.reference.handles.keys().copied().collect();
        let names: Vec<Vec<u8>> = self.reference.names.keys().cloned().collect();
        let close = handles.into_iter().map(|handle| Op::Close { handle });
        let delete = names.into_iter().map(|name| Op::Delete { name });
        for op in close.chain(delete).collect::<Vec<_>>() {
            let outcome = driver.blocking(&op);
            self.reference.settle(&op, &outcome);
        }
        for _ in 0..2 {
            driver.channel.sync().unwrap();
        }
        let statfs = driver.channel.statfs().unwrap();
        check_statfs(&statfs);
        let used = statfs.used_bytes / BLOCK;
        // Nodes of the checksum and space trees may stay, half empty at worst.
        let band = self.baseline + 16 + statfs.total_bytes / BLOCK / 256;
        check(&driver.fs, &driver.channel);
        assert!(
            used <= band,
            "{used} blocks are used after everything was deleted; at first {}",
            self.baseline
        );
    }
}

#[test]
fn few_names() {
    run(Scenario {
        name: "few_names",
        device_bytes: 256 * MIB,
        options: quiet(),
        shape: Shape::few_names(),
        remount_every: 400,
        clear_every: 5000,
        prefill: 0,
        share: 30,
    });
}

/// The helper thread commits on its own; files of some MiB.
#[test]
fn with_helper() {
    run(Scenario {
        name: "with_helper",
        device_bytes: 512 * MIB,
        options: MountOptions {
            commit_interval: Some(std::time::Duration::from_millis(30)),
            writeback_age: Some(std::time::Duration::from_millis(5)),
            page_cache_bytes: 4 << 20,
            ..MountOptions::default()
        },
        shape: Shape { file_bytes: 4 << 20, io_bytes: 3 << 20, ..Shape::few_names() },
        remount_every: 300,
        clear_every: 3000,
        prefill: 0,
        share: 10,
    });
}

/// Names, inodes and extents do not fit into memory.
#[test]
fn metadata_exceeds_the_cache() {
    run(Scenario {
        name: "metadata_exceeds_the_cache",
        device_bytes: 512 * MIB,
        options: MountOptions { node_cache_bytes: 64 << 10, checksum_cache_bytes: 16 << 10, ..quiet() },
        shape: Shape::many_names(6000),
        remount_every: 1500,
        clear_every: 50_000,
        prefill: 2000,
        share: 25,
    });
}

/// Files of thousands of extents, which are cut and deleted in steps.
#[test]
fn fragmented_files() {
    run(Scenario {
        name: "fragmented_files",
        device_bytes: 256 * MIB,
        options: MountOptions {
            node_cache_bytes: 256 << 10,
            checksum_cache_bytes: 16 << 10,
            page_cache_bytes: 1 << 20,
            ..quiet()
        },
        shape: Shape {
            names: ["x", "y", "z"].map(|name| name.into()).into(),
            file_bytes: 32 << 20,
            io_bytes: 8 << 10,
            together: 500,
            keep: 100,
            handles: 4,
            names_permille: 20,
            ..Shape::few_names()
        },
        remount_every: 1000,
        clear_every: 20_000,
        prefill: 0,
        share: 15,
    });
}

/// The device is full most of the time.
#[test]
fn full_device() {
    run(Scenario {
        name: "full_device",
        device_bytes: 16 * MIB,
        options: quiet(),
        shape: Shape {
            file_bytes: 6 << 20,
            io_bytes: 1 << 20,
            long_percent: 30,
            sparse_one_in: 100,
            ..Shape::few_names()
        },
        remount_every: 300,
        clear_every: 4000,
        prefill: 0,
        share: 10,
    });
}

/// The same with little memory, many files and large writes.
#[test]
fn full_device_many_files() {
    run(Scenario {
        name: "full_device_many_files",
        device_bytes: 24 * MIB,
        options: MountOptions { node_cache_bytes: 128 << 10, ..quiet() },
        shape: Shape {
            file_bytes: 2 << 20,
            io_bytes: 3 << 20,
            long_percent: 10,
            sync_permille: 2,
            names_permille: 300,
            ..Shape::many_names(400)
        },
        remount_every: 500,
        clear_every: 3000,
        prefill: 100,
        share: 10,
    });
}
