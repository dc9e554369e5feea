//! The conformance suite over one device that the caller names: an NVMe namespace of a real drive, of an emulated one in a
//! guest (`scripts/guest.sh`), of a target over TCP.
//!
//! `GAUR_NVME_URI` is any device URI of this crate (`spdk-nvme:pcie:0000:00:04.0?ns=1`). **What is on the device is lost.**
//! Without the variable the tests are skipped, and say so; with `GAUR_REQUIRE_NVME=1` that is a failure.
//!
//! There is one medium, so the cases take turns, however many threads the test program has. Waiting for the turn does not
//! count against the time limit of a case.

#![cfg(feature = "spdk")]
// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

mod suite;

use std::time::{Duration, Instant};

use bdev_adapter::{OpenOptions, open};
use parking_lot::{Condvar, Mutex};
use suite::Target;

/// Longer than the suite lets a case run: whoever has the device for so long hangs, and will not give it back.
const TURN_MAX: Duration = Duration::from_secs(300);

/// Since when somebody has the device.
static TAKEN: Mutex<Option<Instant>> = Mutex::new(None);
static GIVEN_BACK: Condvar = Condvar::new();

/// The device is ours until this is dropped.
struct Turn {
    uri: String,
}

impl Turn {
    /// Waits for the device; none, with a message, when the caller names none.
    fn take() -> Option<Turn> {
        let Ok(uri) = std::env::var("GAUR_NVME_URI") else {
            let required = std::env::var_os("GAUR_REQUIRE_NVME").is_some_and(|value| value != "0");
            assert!(!required, "GAUR_REQUIRE_NVME is set, but GAUR_NVME_URI names no device");
            println!("SKIPPED: GAUR_NVME_URI names no device");
            return None;
        };
        let mut taken = TAKEN.lock();
        while let Some(since) = *taken {
            assert!(since.elapsed() < TURN_MAX, "a case before this one hangs and still has {uri}");
            GIVEN_BACK.wait_for(&mut taken, Duration::from_secs(1));
        }
        *taken = Some(Instant::now());
        Some(Turn { uri })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *TAKEN.lock() = None;
        GIVEN_BACK.notify_one();
    }
}

fn target(turn: Turn) -> Target {
    let uri = turn.uri.clone();
    Target {
        open: Box::new(move |options: &OpenOptions| open(&uri, options)),
        persistent: true,
        // These controllers reach only memory of the device's own pool.
        foreign_buffers: !["spdk-nvme:pcie:", "spdk-nvme:rdma:", "spdk-bdev:"]
            .iter()
            .any(|backend| turn.uri.contains(backend)),
        keep: Box::new(turn),
    }
}

// The argument is evaluated on the test's own thread, before the time limit begins.
conformance!(nvme, {
    let Some(turn) = crate::Turn::take() else { return };
    move || crate::target(turn)
});
