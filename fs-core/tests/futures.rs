//! Futures of a channel need no runtime and none is in their way: the same workload driven from a plain loop, from a
//! current-thread executor, and on several threads that each have an executor of their own; futures that are dropped half way.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use fs_core::{Channel, Error, File, Filesystem, MountOptions, OpenFlags};
use futures_executor::LocalPool;
use futures_util::stream::{FuturesUnordered, StreamExt};
use futures_util::task::LocalSpawnExt;

use common::{BLOCK, MIB, TestDevice, Watchdog, check, fresh, mount, pattern};

/// Files of one workload.
const FILES: u64 = 6;
/// Blocks of each of them.
const BLOCKS: u64 = 24;

type Pending<'c> = Pin<Box<dyn Future<Output = Result<(), Error>> + 'c>>;

fn name(who: &str, file: u64) -> String {
    format!("{who}-{file}")
}

/// Writes a file block by block, all at once, and appends a tail; reads it back; renames it. Every await is on this channel.
async fn one_file(channel: &Channel, who: &str, number: u64) -> Result<(), Error> {
    let temporary = format!("{}.tmp", name(who, number));
    let file = channel.open_async(&temporary, OpenFlags::CREATE | OpenFlags::EXCLUSIVE).await?;
    let mut writes = FuturesUnordered::new();
    for block in 0..BLOCKS {
        let mut buf = channel.buffer(BLOCK as usize)?;
        buf.copy_from_slice(&pattern(number << 8 | block, BLOCK as usize));
        writes.push(channel.write_async(&file, block * BLOCK, buf));
    }
    while let Some((result, _buf)) = writes.next().await {
        result?;
    }
    let mut tail = channel.buffer(100)?;
    tail.copy_from_slice(&pattern(number, 100));
    assert_eq!(channel.append_async(&file, tail).await.0?, BLOCKS * BLOCK);
    channel.sync_file_async(&file).await?;
    verify(channel, &file, number).await?;
    channel.truncate_async(&file, BLOCKS * BLOCK + 50).await?;
    channel.rename_async(&temporary, name(who, number)).await?;
    assert_eq!(channel.stat_async(name(who, number)).await?.size, BLOCKS * BLOCK + 50);
    channel.close_async(file).await
}

async fn verify(channel: &Channel, file: &File, number: u64) -> Result<(), Error> {
    for block in (0..BLOCKS).rev() {
        let (result, buf) = channel.read_async(file, block * BLOCK, channel.buffer(BLOCK as usize)?).await;
        assert_eq!(result?, BLOCK as usize);
        assert!(
            buf[..] == pattern(number << 8 | block, BLOCK as usize)[..],
            "block {block} of file {number}"
        );
    }
    Ok(())
}

fn verify_all(fs: &Filesystem, who: &str) {
    let channel = fs.channel().unwrap();
    for number in 0..FILES {
        let file = channel.open(name(who, number), OpenFlags::READ_ONLY).unwrap();
        let mut content = vec![0; (BLOCKS * BLOCK) as usize + 200];
        let len = channel.read(&file, 0, &mut content).unwrap();
        assert_eq!(len as u64, BLOCKS * BLOCK + 50);
        for block in 0..BLOCKS {
            let at = (block * BLOCK) as usize;
            assert!(content[at..at + BLOCK as usize] == pattern(number << 8 | block, BLOCK as usize)[..]);
        }
        assert!(content[len - 50..len] == pattern(number, 100)[..50]);
    }
}

/// Runs `work`, which has the mount, and looks at what is left after a remount.
fn on_a_mount(test: &str, who: &[&str], work: impl FnOnce(&Filesystem)) {
    let seed = common::seed(test);
    let _watchdog = Watchdog::start(test, seed, 120);
    let device = TestDevice::slow(128 * MIB, seed);
    // Without a helper, nothing but the futures themselves drives the channels.
    let options = MountOptions { helper_thread: false, ..MountOptions::default() };
    let fs = fresh(&device.device, &options);
    work(&fs);
    fs.unmount().unwrap();
    let fs = mount(&device.device, &options);
    who.iter().for_each(|who| verify_all(&fs, who));
    check(&fs, &fs.channel().unwrap());
}

#[test]
fn a_plain_loop_is_enough() {
    on_a_mount("a_plain_loop_is_enough", &["loop"], |fs| {
        let channel = fs.channel().unwrap();
        let mut futures: Vec<Pending<'_>> = Vec::new();
        for number in 0..FILES {
            futures.push(Box::pin(one_file(&channel, "loop", number)));
        }
        let mut cx = Context::from_waker(Waker::noop());
        while !futures.is_empty() {
            futures.retain_mut(|future| match future.as_mut().poll(&mut cx) {
                Poll::Ready(result) => {
                    result.unwrap();
                    false
                }
                Poll::Pending => true,
            });
        }
    });
}

/// Runs the files of `who` as tasks of a current-thread executor. Its tasks sleep until they are woken: a pending future that
/// nobody wakes would hang it, which a plain loop cannot notice.
fn in_an_executor(fs: &Filesystem, who: &'static str) {
    let mut pool = LocalPool::new();
    let channel = Rc::new(fs.channel().unwrap());
    let done = Rc::new(RefCell::new(0));
    for number in 0..FILES {
        let (channel, done) = (Rc::clone(&channel), Rc::clone(&done));
        let task = async move {
            one_file(&channel, who, number).await.unwrap();
            *done.borrow_mut() += 1;
        };
        pool.spawner().spawn_local(task).unwrap();
    }
    pool.run();
    assert_eq!(*done.borrow(), FILES);
}

#[test]
fn a_current_thread_executor_drives_them() {
    on_a_mount("a_current_thread_executor_drives_them", &["pool"], |fs| in_an_executor(fs, "pool"));
}

#[test]
fn several_threads_each_with_an_executor() {
    let who = ["a", "b", "c", "d"];
    on_a_mount("several_threads_each_with_an_executor", &who, |fs| {
        std::thread::scope(|scope| {
            for who in who {
                scope.spawn(move || in_an_executor(fs, who));
            }
        });
    });
}

/// Two tasks of one executor want the same range: the one that waits must be woken by the other's end.
#[test]
fn a_task_that_waits_for_a_range_is_woken() {
    on_a_mount("a_task_that_waits_for_a_range_is_woken", &[], |fs| {
        let channel = fs.channel().unwrap();
        let file = channel.open("shared", OpenFlags::CREATE).unwrap();
        let write = async |tag: u64| {
            let mut buf = channel.buffer(8 * BLOCK as usize).unwrap();
            buf.copy_from_slice(&pattern(tag, 8 * BLOCK as usize));
            channel.write_async(&file, 0, buf).await.0.unwrap();
        };
        let all: FuturesUnordered<_> = (0..16).map(write).collect();
        let done: Vec<()> = futures_executor::block_on(all.collect());
        assert_eq!(done.len(), 16);
        let mut content = vec![0; 8 * BLOCK as usize];
        channel.read(&file, 0, &mut content).unwrap();
        assert!((0..16).any(|tag| content == pattern(tag, 8 * BLOCK as usize)), "a mixture of two writes");
    });
}

/// A future that is dropped at any point leaves its operation to the channel, which completes it; a range that it waited for or
/// held is free again.
#[test]
fn dropped_futures_leave_nothing_behind() {
    on_a_mount("dropped_futures_leave_nothing_behind", &[], |fs| {
        let channel = fs.channel().unwrap();
        let file = channel.open("dropped", OpenFlags::CREATE).unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        for polls in 0..40 {
            let mut buf = channel.buffer(4 * BLOCK as usize).unwrap();
            buf.fill(polls as u8);
            let mut first = Box::pin(channel.write_async(&file, 0, buf));
            let mut second =
                Box::pin(channel.write_async(&file, BLOCK, channel.buffer(BLOCK as usize).unwrap()));
            for _ in 0..polls {
                let _ = first.as_mut().poll(&mut cx);
                let _ = second.as_mut().poll(&mut cx);
            }
            // Both must not be polled any more when they were ready; they are dropped here in any case.
            drop((first, second));
        }
        // Waits for all of them: the same range.
        channel.write(&file, 0, &pattern(99, 8 * BLOCK as usize)).unwrap();
        channel.sync().unwrap();
        let mut content = vec![0; 8 * BLOCK as usize];
        channel.read(&file, 0, &mut content).unwrap();
        assert!(content == pattern(99, 8 * BLOCK as usize));
    });
}
