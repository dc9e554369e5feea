//! The conformance suite over bdevs of the real SPDK.
//!
//! Needs huge pages; without them it is skipped, and says so; with `GAUR_REQUIRE_SPDK=1` that is a failure.

#![cfg(feature = "spdk")]
// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

mod suite;

use std::any::Any;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bdev_adapter::{Error, OpenOptions, open, spdk};
use suite::Target;

/// Bytes of each bdev.
const BYTES: u64 = 64 << 20;

fn available() -> bool {
    match spdk::bdev_names() {
        Ok(_) => true,
        Err(Error::Unavailable { why, .. }) if std::env::var_os("GAUR_REQUIRE_SPDK").is_none() => {
            println!("SKIPPED: {why}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

fn rpc(method: &str, params: &str) {
    spdk::rpc(method, params, Duration::from_secs(30)).unwrap();
}

/// Deletes a bdev at the end, and whatever else was kept for it.
struct Delete {
    method: &'static str,
    name: String,
    _keep: Box<dyn Any + Send + Sync>,
}

impl Drop for Delete {
    fn drop(&mut self) {
        rpc(self.method, &format!(r#"{{"name":"{}"}}"#, self.name));
    }
}

fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{prefix}{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn target(name: &str, delete: &'static str, keep: Box<dyn Any + Send + Sync>) -> Target {
    let uri = format!("spdk-bdev:{name}");
    Target {
        open: Box::new(move |options: &OpenOptions| open(&uri, options)),
        persistent: true,
        foreign_buffers: true,
        keep: Box::new(Delete { method: delete, name: name.to_owned(), _keep: keep }),
    }
}

fn malloc(block: u64) -> Target {
    let (name, blocks) = (unique("Malloc"), BYTES / block);
    rpc("bdev_malloc_create", &format!(r#"{{"name":"{name}","num_blocks":{blocks},"block_size":{block}}}"#));
    target(&name, "bdev_malloc_delete", Box::new(()))
}

/// A file beside the program, so not on a tmpfs, which has no O_DIRECT.
fn aio() -> Target {
    let directory: PathBuf = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let file = tempfile::NamedTempFile::new_in(directory).unwrap();
    file.as_file().set_len(BYTES).unwrap();
    let (name, path) = (unique("Aio"), file.path().to_str().unwrap());
    rpc("bdev_aio_create", &format!(r#"{{"name":"{name}","filename":"{path}","block_size":512}}"#));
    target(&name, "bdev_aio_delete", Box::new(file))
}

/// Answers late, and keeps its own I/Os at the bdev below.
fn delayed() -> Target {
    let base = malloc(4096);
    let name = unique("Delay");
    let Some(below) = base.keep.downcast_ref::<Delete>().map(|delete| delete.name.clone()) else {
        unreachable!("malloc() keeps a Delete")
    };
    rpc(
        "bdev_delay_create",
        &format!(
            r#"{{"base_bdev_name":"{below}","name":"{name}","avg_read_latency":300,"p99_read_latency":900,
                "avg_write_latency":300,"p99_write_latency":900}}"#
        ),
    );
    target(&name, "bdev_delay_delete", base.keep)
}

fn every_case(factory: fn() -> Target) {
    if !available() {
        return;
    }
    for (name, case) in suite::CASES {
        println!("{name}");
        suite::run(name, *case, factory);
    }
}

#[test]
fn malloc_4096() {
    every_case(|| malloc(4096));
}

#[test]
fn malloc_512() {
    every_case(|| malloc(512));
}

#[test]
fn aio_512() {
    every_case(aio);
}

#[test]
fn delay_4096() {
    every_case(delayed);
}
