//! What the adapter adds to SPDK's block device layer: the same reads through a queue pair, and by SPDK's own functions
//! ([`DirectReads`](bdev_adapter::spdk::direct::DirectReads)), in the same loop on the same bdev.
//!
//! The bdev is a null bdev, which answers at once and moves no bytes: above memory or a drive, the few nanoseconds would be
//! lost in the noise. CPU time counts, whatever `--clock` says: nothing here waits.

use crate::compare::lab::Lab;
use crate::compare::row::Contest;
use crate::failure::Result;

#[cfg(not(feature = "spdk"))]
pub(super) fn prepare(_: &Lab) -> Result<Box<dyn Contest>> {
    super::needs_spdk().map(|()| unreachable!("this build has no SPDK"))
}

#[cfg(feature = "spdk")]
pub(super) fn prepare(_: &Lab) -> Result<Box<dyn Contest>> {
    Ok(Box::new(with_spdk::Reads::prepare()?))
}

#[cfg(feature = "spdk")]
mod with_spdk {
    use std::time::Duration;

    use bdev_adapter::spdk::direct::DirectReads;
    use bdev_adapter::{Error, spdk};
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::super::{BATCH, BLOCK, Reader};
    use crate::compare::lab::Lab;
    use crate::compare::row::Contest;
    use crate::failure::{Doing, Failure, Result};
    use crate::sys::{Clock, Pinned};

    const DEPTH: usize = 32;
    const BLOCKS: u64 = (2 << 30) / BLOCK as u64;
    const NAME: &str = "BenchNull";

    pub(super) struct Reads {
        reader: Reader,
        direct: DirectReads,
    }

    impl Reads {
        pub(super) fn prepare() -> Result<Reads> {
            let null = format!(r#"{{"name":"{NAME}","num_blocks":{BLOCKS},"block_size":{BLOCK}}}"#);
            match spdk::rpc("bdev_null_create", &null, Duration::from_secs(30)) {
                Err(Error::Unavailable { why, .. }) => return Err(Failure::Skipped(why)),
                result => result.doing("make a null bdev")?,
            }
            let direct = DirectReads::open(NAME, DEPTH).doing("open the null bdev")?;
            Ok(Reads { reader: Reader::open(&direct.device(), DEPTH)?, direct })
        }
    }

    impl Contest for Reads {
        fn ours(&mut self, lab: &Lab) -> Result<f64> {
            ns_per_read(lab, |random| self.reader.read(BATCH, || random.random_range(0..BLOCKS)))
        }

        fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
            ns_per_read(lab, |random| {
                self.direct.run(BATCH, || random.random_range(0..BLOCKS));
                Ok(())
            })
            .map(Some)
        }
    }

    fn ns_per_read(lab: &Lab, mut batch: impl FnMut(&mut SmallRng) -> Result<()>) -> Result<f64> {
        let _pinned = Pinned::to_last_core();
        let mut random = SmallRng::seed_from_u64(lab.seed);
        let watch = Clock::Cpu.start();
        let mut reads = 0;
        while watch.elapsed() < lab.seconds {
            batch(&mut random)?;
            reads += BATCH;
        }
        Ok(watch.elapsed().as_nanos() as f64 / reads as f64)
    }
}
