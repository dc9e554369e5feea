//! Many operations in flight on one channel, driven from a plain loop: no runtime, no threads.
//!
//! `cargo run -p fs-core --example futures`

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bdev_adapter::{OpenOptions, open};
use fs_core::{Filesystem, FormatOptions, MountOptions, OpenFlags, format};

/// Polls all of `futures` until each is ready; returns their answers in order.
fn drive<T>(mut futures: Vec<Pin<Box<dyn Future<Output = T> + '_>>>) -> Vec<T> {
    let mut answers: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    let mut cx = Context::from_waker(Waker::noop());
    while answers.iter().any(Option::is_none) {
        for (future, answer) in futures.iter_mut().zip(&mut answers).filter(|(_, answer)| answer.is_none()) {
            if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
                *answer = Some(value);
            }
        }
    }
    answers.into_iter().flatten().collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = open("mem:64MiB", &OpenOptions::default())?;
    format(&device, &FormatOptions::default())?;
    let fs = Filesystem::mount(device, &MountOptions::default())?;
    let channel = fs.channel()?;
    let file = channel.open("blocks", OpenFlags::CREATE)?;

    let mut writes: Vec<Pin<Box<dyn Future<Output = _> + '_>>> = Vec::new();
    for i in 0..32u8 {
        let mut buf = channel.buffer(4096)?;
        buf.fill(i);
        writes.push(Box::pin(channel.write_async(&file, u64::from(i) * 4096, buf)));
    }
    for (result, _buf) in drive(writes) {
        result?;
    }
    channel.sync()?;

    let mut reads: Vec<Pin<Box<dyn Future<Output = _> + '_>>> = Vec::new();
    for i in (0..32u64).rev() {
        reads.push(Box::pin(channel.read_async(&file, i * 4096, channel.buffer(4096)?)));
    }
    for (i, (result, buf)) in (0..32u8).rev().zip(drive(reads)) {
        assert_eq!(result?, 4096);
        assert!(buf.iter().all(|byte| *byte == i));
    }
    println!("32 blocks written and read back, all at once");
    Ok(())
}
