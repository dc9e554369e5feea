//! Blocking calls of one thread beside SPDK's own filesystem, BlobFS, whose successor this is.
//!
//! BlobFS runs in this process as its users ran it: a reactor polls on the first core, the caller blocks on the last one. It has
//! a malloc bdev of its own; ours is the device under test, by default a malloc bdev as well. While ours is measured the reactor
//! rests. Both files are written sequentially, and read back in aligned 4 KiB at random places.
//!
//! BlobFS's cache holds what was written or read ahead, in pieces of 256 KiB; random reads put nothing into it. Before the reads
//! its filesystem is loaded anew, with a small cache in which nothing is, so that every read goes to the device, as ours do.
//! (To be written a file must fit into the cache: BlobFS of 20.07 crashes when a write finds no room there.)
//!
//! Our side verifies checksums; BlobFS has none. Our sync is a whole commit as yet (nodes, flush, two superblocks).

use crate::compare::lab::Lab;
use crate::compare::row::{Contest, Figure, Goal, Row};
use crate::failure::Result;

/// The rows of this family.
pub(crate) const ROWS: &[Row] = &[
    Row {
        metric: "blocking_read4k_vs_blobfs",
        unit: "reads/s",
        peer_name: Some("BlobFS"),
        figure: Figure::Ratio,
        goal: Some(Goal::AtLeast(10.0)),
        on_device: true,
        about: "blocking random aligned 4 KiB reads of a file of 256 MiB, one thread, one at a time (BlobFS: spdk_file_read)",
        prepare: |lab| prepare(lab, Work::Read),
    },
    Row {
        metric: "append_sync4k_vs_blobfs",
        unit: "appends/s",
        peer_name: Some("BlobFS"),
        figure: Figure::Ratio,
        goal: None,
        on_device: true,
        about: "append 4 KiB to a file and make it durable, blocking, one thread (BlobFS: spdk_file_write, spdk_file_sync)",
        prepare: |lab| prepare(lab, Work::AppendSync),
    },
];

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(feature = "spdk"), allow(dead_code, reason = "measured beside SPDK only"))]
enum Work {
    Read,
    AppendSync,
}

#[cfg(not(feature = "spdk"))]
fn prepare(_: &Lab, _: Work) -> Result<Box<dyn Contest>> {
    use crate::failure::Failure;

    Err(Failure::Skipped("this build has no SPDK; build with --features spdk".to_owned()))
}

#[cfg(feature = "spdk")]
fn prepare(lab: &Lab, work: Work) -> Result<Box<dyn Contest>> {
    Ok(Box::new(with_spdk::Calls::prepare(lab, work)?))
}

#[cfg(feature = "spdk")]
mod with_spdk {
    use std::time::Duration;

    use bdev_adapter::spdk::direct::blobfs::{Awake, Blobfs};
    use bdev_adapter::{DmaBuf, Error, spdk};
    use fs_core::File;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::Work;
    use crate::compare::lab::{Lab, Mounted};
    use crate::compare::row::Contest;
    use crate::failure::{Doing, Failure, Result};
    use crate::session::dma_buffers;
    use crate::sys::{Pinned, cores};
    use crate::units;

    const BLOCK: u64 = 4096;
    const FILE_BYTES: u64 = 256 << 20;
    const PIECE: usize = 1 << 18;
    /// BlobFS's cache for writing, and that for reading.
    const WRITE_CACHE_MIB: u64 = 384;
    const READ_CACHE_MIB: u64 = 16;
    /// The file, BlobFS's metadata, and what it keeps of a file that is being deleted.
    const BDEV_BYTES: u64 = 512 << 20;
    const NAME: &str = "BenchBlobfs";
    /// Calls between two looks at the clock.
    const ROUND: u64 = 256;
    /// The most appends of a sample: they fit into BlobFS's cache, and twice on its device.
    const APPENDS: u64 = (BDEV_BYTES / 4) / BLOCK;
    const FILE: &str = "file";

    pub(super) struct Calls {
        work: Work,
        mounted: Mounted,
        file: File,
        blobfs: Blobfs,
        seed: u64,
        samples: u64,
    }

    impl Calls {
        pub(super) fn prepare(lab: &Lab, work: Work) -> Result<Calls> {
            let blobfs = open_blobfs(work)?;
            lab.touch(2 * FILE_BYTES)?;
            let mounted = lab.fresh()?;
            let file = match work {
                Work::Read => mounted.create_filled(lab, "blobfs-peer", lab.span(FILE_BYTES)?)?,
                Work::AppendSync => mounted.create("blobfs-peer")?,
            };
            Ok(Calls { work, mounted, file, blobfs, seed: lab.seed, samples: 0 })
        }

        /// Our blocking reads, as the peer does them: one buffer, one call at a time.
        fn our_reads(&mut self, lab: &Lab) -> Result<f64> {
            let size = self.mounted.channel.stat_file(&self.file).doing("look at the file")?.size;
            let mut buf = dma_buffers(lab.device(), 1, BLOCK as usize)?.pop();
            let mut random = SmallRng::seed_from_u64(self.seed);
            calls_per_second(lab, u64::MAX, || {
                let (result, back) = self.mounted.channel.read_buf(
                    &self.file,
                    random.random_range(0..size / BLOCK) * BLOCK,
                    buf.take().ok_or_else(lost)?,
                );
                buf = Some(back);
                whole(result.doing("read")?)
            })
        }

        fn our_appends(&mut self, lab: &Lab) -> Result<f64> {
            let data = block();
            let channel = &self.mounted.channel;
            channel.truncate(&self.file, 0).doing("empty the file")?;
            channel.sync().doing("sync the filesystem")?;
            calls_per_second(lab, APPENDS, || {
                channel.append(&self.file, &data).doing("append")?;
                channel.sync_file(&self.file).doing("sync the file")
            })
        }

        fn their_reads(&self, lab: &Lab, blobfs: &Awake<'_>) -> Result<f64> {
            let mut file = blobfs.open(FILE).doing("open a file of BlobFS")?;
            let mut buf: DmaBuf = dma_buffers(lab.device(), 1, BLOCK as usize)?.pop().ok_or_else(lost)?;
            let mut random = SmallRng::seed_from_u64(self.seed);
            calls_per_second(lab, u64::MAX, || {
                let at = random.random_range(0..FILE_BYTES / BLOCK) * BLOCK;
                whole(file.read(at, &mut buf).doing("read")?)
            })
        }

        fn their_appends(&self, lab: &Lab, blobfs: &Awake<'_>) -> Result<f64> {
            let mut file =
                blobfs.open(&format!("appended-{}", self.samples)).doing("create a file of BlobFS")?;
            let mut data = block();
            let rate = calls_per_second(lab, APPENDS, || {
                file.append(&mut data).doing("append")?;
                file.sync().doing("sync the file")
            });
            file.delete();
            rate
        }
    }

    impl Contest for Calls {
        fn ours(&mut self, lab: &Lab) -> Result<f64> {
            let _pinned = Pinned::to_last_core();
            match self.work {
                Work::Read => self.our_reads(lab),
                Work::AppendSync => self.our_appends(lab),
            }
        }

        fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
            let _pinned = Pinned::to_last_core();
            self.samples += 1;
            self.seed += 1;
            let calls = &*self;
            let rate = self.blobfs.awake(|blobfs| match calls.work {
                Work::Read => calls.their_reads(lab, blobfs),
                Work::AppendSync => calls.their_appends(lab, blobfs),
            });
            rate.map(Some)
        }

        fn remarks(&self) -> Vec<String> {
            let what = match self.work {
                Work::Read => format!(
                    "both files have {}; BlobFS's cache is empty and random reads do not fill it; ours verifies checksums",
                    units::bytes(FILE_BYTES)
                ),
                Work::AppendSync => "our sync is a whole commit as yet".to_owned(),
            };
            vec![format!("{what}; BlobFS's reactor has a core of its own, and rests while ours is measured")]
        }

        fn finish(self: Box<Self>) -> Result<()> {
            let Calls { mounted, file, blobfs, .. } = *self;
            drop((file, blobfs));
            // Rows to come need the memory.
            spdk::rpc("bdev_malloc_delete", &format!(r#"{{"name":"{NAME}"}}"#), Duration::from_secs(60))
                .doing("remove the malloc bdev of BlobFS")?;
            mounted.unmount()
        }
    }

    /// A BlobFS on a malloc bdev of its own, its reactor on the first core.
    fn open_blobfs(work: Work) -> Result<Blobfs> {
        let cores = cores();
        let [first, .., _] = cores[..] else {
            return Err(Failure::Skipped("it needs two cores, one for BlobFS's reactor".to_owned()));
        };
        let known = match spdk::bdev_names() {
            Err(Error::Unavailable { why, .. }) => return Err(Failure::Skipped(why)),
            names => names.doing("ask SPDK for its bdevs")?,
        };
        if !known.iter().any(|name| name == NAME) {
            let blocks = BDEV_BYTES / BLOCK;
            let bdev = format!(r#"{{"name":"{NAME}","num_blocks":{blocks},"block_size":{BLOCK}}}"#);
            if let Err(error) = spdk::rpc("bdev_malloc_create", &bdev, Duration::from_secs(60)) {
                let pages = (BDEV_BYTES + (WRITE_CACHE_MIB << 20)).div_ceil(2 << 20) + 64;
                return Err(Failure::Skipped(format!(
                    "there is no malloc bdev of {} for BlobFS ({error}); as root: scripts/spdk.sh hugepages {pages}",
                    units::bytes(BDEV_BYTES)
                )));
            }
        }
        let _pinned = Pinned::to_core(first);
        let blobfs = match Blobfs::open(NAME, false, WRITE_CACHE_MIB) {
            Err(Error::Unavailable { why, .. }) => return Err(Failure::Skipped(why)),
            result => result.doing("make a BlobFS")?,
        };
        if work == Work::AppendSync {
            return Ok(blobfs);
        }
        blobfs.awake(|blobfs| {
            let mut file = blobfs.open(FILE).doing("create a file of BlobFS")?;
            let mut piece = vec![0x5A; PIECE];
            for _ in 0..FILE_BYTES / PIECE as u64 {
                file.append(&mut piece).doing("write a file of BlobFS")?;
            }
            file.sync().doing("sync a file of BlobFS")
        })?;
        drop(blobfs);
        Blobfs::open(NAME, true, READ_CACHE_MIB).doing("load the BlobFS")
    }

    /// Calls in a second of time that passes: what sleeps takes no CPU time, and counts all the same.
    fn calls_per_second(lab: &Lab, most: u64, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
        use crate::sys::Clock;

        let (watch, mut calls) = (Clock::Wall.start(), 0);
        while calls < most && watch.elapsed() < lab.seconds {
            for _ in 0..ROUND.min(most - calls) {
                call()?;
                calls += 1;
            }
        }
        Ok(calls as f64 / watch.elapsed().as_secs_f64())
    }

    fn block() -> Vec<u8> {
        vec![0xA5; BLOCK as usize]
    }

    fn whole(read: usize) -> Result<()> {
        match read as u64 == BLOCK {
            true => Ok(()),
            false => Err(Failure::new(format!("a read returned {read} bytes"))),
        }
    }

    #[cold]
    fn lost() -> Failure {
        Failure::new("there is no buffer (a bug)")
    }
}
