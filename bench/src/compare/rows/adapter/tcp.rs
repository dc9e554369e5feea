//! NVMe/TCP on loopback: the adapter and SPDK's `perf` in turn, each on the first core, each with a connection of its own
//! to the same target, which has the last core.

use std::net::TcpListener;

use bdev_adapter::OpenOptions;

use super::peers::{self, Running};
use super::{BLOCK, Reader, sample_time};
use crate::compare::lab::Lab;
use crate::compare::row::Contest;
use crate::failure::{Doing, Failure, Result};
use crate::sys::{Pinned, cores};

const DEPTH: usize = 32;
const TARGET_MIB: u64 = 2048;
/// The target's bdev and what it needs beside, `perf`, and this process.
const HUGE_MIB: u64 = TARGET_MIB + 128 + 256 + 512;

pub(super) struct Reads {
    perf: String,
    core: usize,
    port: u16,
    uri: String,
    nqn: String,
    _target: Running,
}

impl Reads {
    pub(super) fn prepare(_: &Lab) -> Result<Reads> {
        super::needs_spdk()?;
        let perf = peers::program(&["spdk_nvme_perf", "perf"])?;
        let cores = cores();
        let [core, .., target_core] = cores[..] else {
            return Err(Failure::Skipped("it needs two cores, one for the target".to_owned()));
        };
        peers::need_huge_pages(HUGE_MIB)?;
        let port = free_port().doing("find a free port")?;
        let arguments = [("--size", TARGET_MIB), ("--port", port.into()), ("--core", target_core as u64)];
        let mut command = peers::script("scripts/nvmf.sh")?;
        command.arg("run");
        for (name, value) in arguments {
            command.arg(name).arg(value.to_string());
        }
        let mut target = Running::start(command)?;
        target.wait_for_port(port)?;
        let uri =
            peers::output_of(peers::script("scripts/nvmf.sh")?.args(["uri", "--port", &port.to_string()]))?;
        let uri = uri.trim().to_owned();
        let nqn = uri.rsplit('/').next().unwrap_or_default().to_owned();
        Ok(Reads { perf, core, port, uri, nqn, _target: target })
    }
}

impl Contest for Reads {
    /// Connects anew each time, as the peer does: an idle connection would cost the target time in the peer's sample.
    fn ours(&mut self, lab: &Lab) -> Result<f64> {
        let device = bdev_adapter::open(&self.uri, &OpenOptions { read_only: true, create: false })
            .doing("open the target")?;
        let mut reader = Reader::open(&device, DEPTH)?;
        let _pinned = Pinned::to_core(self.core);
        reader.per_second(lab, device.geometry().capacity / BLOCK as u64)
    }

    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>> {
        let (port, nqn) = (self.port, &self.nqn);
        let mut command = std::process::Command::new(&self.perf);
        command.args(["-q", &DEPTH.to_string(), "-o", &BLOCK.to_string(), "-w", "randread"]);
        command.args(["-t", &sample_time(lab).as_secs().to_string()]);
        command.args(["-c", &format!("{:#x}", 1u128 << self.core)]);
        command.args(["-r", &format!("trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{port} subnqn:{nqn}")]);
        let output = peers::output_of(&mut command)?;
        Ok(Some(peers::total_iops(&output)?))
    }
}

/// A port that nobody listens on at the moment.
fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
