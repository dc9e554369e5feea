//! SPDK's RAM disk: the adapter on the device under test, and `bdevperf` on a bdev of the same size in a process of its
//! own, in turn on the same core. With `-x`: else `bdevperf` uses the zero-copy interface, which moves no bytes here.

use std::fs;
use std::path::PathBuf;

use super::{BLOCK, Reader, peers, sample_time};
use crate::compare::SPDK_DEVICE;
use crate::compare::lab::Lab;
use crate::compare::row::Contest;
use crate::failure::{Doing, Failure, Result};
use crate::sys::{Pinned, cores};

const DEPTH: usize = 128;
const MIB: u64 = 1 << 20;

pub(super) struct Reads {
    bdevperf: String,
    core: usize,
    blocks: u64,
    reader: Reader,
    files: Files,
}

impl Reads {
    pub(super) fn prepare(lab: &Lab) -> Result<Reads> {
        super::needs_spdk()?;
        if lab.uri != SPDK_DEVICE {
            return Err(Failure::Skipped(format!("it is measured on {SPDK_DEVICE} only")));
        }
        let bdevperf = peers::program(&["bdevperf"])?;
        let core = *cores().last().ok_or_else(|| Failure::new("cannot find out about cores"))?;
        let capacity = lab.device().geometry().capacity;
        peers::need_huge_pages(capacity / MIB + 384)?;
        let blocks = capacity / BLOCK as u64;
        let reader = Reader::open(lab.device(), DEPTH)?;
        Ok(Reads { bdevperf, core, blocks, reader, files: Files::write(blocks)? })
    }
}

impl Contest for Reads {
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let _pinned = Pinned::to_core(self.core);
        self.reader.per_second(lab, self.blocks)
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        let mut command = std::process::Command::new(&self.bdevperf);
        command.arg("--json").arg(self.files.path("config.json")).arg("-r").arg(self.files.path("rpc.sock"));
        command.args(["-m", &format!("[{}]", self.core), "-u", "-R", "--silence-noticelog", "-x"]);
        command.args(["-q", &DEPTH.to_string(), "-o", &BLOCK.to_string(), "-w", "randread"]);
        command.args(["-t", &sample_time(lab).as_secs().to_string(), "-T", "Malloc0"]);
        let output = peers::output_of(&mut command)?;
        Ok(Some(peers::total_iops(&output)?))
    }
}

/// A directory for the peer's configuration and socket; removed on drop.
struct Files(PathBuf);

impl Files {
    fn write(blocks: u64) -> Result<Files> {
        let directory = std::env::temp_dir().join(format!("gaur-bench-{}", std::process::id()));
        fs::create_dir(&directory).doing(format!("make {}", directory.display()))?;
        let files = Files(directory);
        let config = serde_json::json!({ "subsystems": [{ "subsystem": "bdev", "config": [{
            "method": "bdev_malloc_create",
            "params": { "name": "Malloc0", "num_blocks": blocks, "block_size": BLOCK },
        }] }] });
        fs::write(files.path("config.json"), config.to_string()).doing("write bdevperf's configuration")?;
        Ok(files)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // What is left behind in the directory for temporary files does no harm.
        let _ = fs::remove_dir_all(&self.0);
    }
}
