//! A mount on a device with a gate, and two channels that a test polls by hand.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bdev_adapter::mem::MemDevice;
use bdev_adapter::wrap::fault::{Effect, Fault, FaultDevice, FaultPlan, Target, When};
use bdev_adapter::{Device, DmaBuf, IoErrorKind};
use fs_core::{Accounting, Channel, Error, File, Filesystem, OpenFlags};

use super::common::gate::{GateDevice, Keep};
use super::common::{BLOCK, MIB, Watchdog, check, fresh, pattern, quiet};
use crate::mutation;

pub(super) const ONE: usize = BLOCK as usize;

/// A mount on a gate, with two channels and a file of 16 blocks that is open in both ways. Nothing of it is cached.
pub(super) struct Scene {
    pub(super) memory: Arc<MemDevice>,
    pub(super) fault: Arc<FaultDevice>,
    pub(super) gate: Arc<GateDevice>,
    /// Taken at the end.
    fs: Option<Filesystem>,
    pub(super) a: Channel,
    pub(super) b: Channel,
    pub(super) buffered: File,
    pub(super) direct: File,
    _watchdog: Watchdog,
}

/// What a channel is to do, as far as it gets.
pub(super) type Run<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

impl Scene {
    pub(super) fn new(test: &str) -> Scene {
        let _watchdog = Watchdog::start(test, 0, 60);
        let memory = MemDevice::new(32 * MIB, 4096).expect("a device");
        let fault = FaultDevice::wrap(memory.clone(), FaultPlan::default());
        let gate = GateDevice::wrap(fault.clone());
        let fs = fresh(&(gate.clone() as Arc<dyn Device>), &quiet());
        let (a, b) = (fs.channel().expect("channel"), fs.channel().expect("channel"));
        let direct = a.open("f", OpenFlags::CREATE).expect("open");
        a.write(&direct, 0, &pattern(0, 16 * ONE)).expect("write");
        a.sync().expect("sync");
        let buffered = a.open("f", OpenFlags::BUFFERED).expect("open");
        Scene { memory, fault, gate, fs: Some(fs), a, b, buffered, direct, _watchdog }
    }

    /// The same for a test that acts amid an operation ([`Scene::at`]).
    pub(super) fn shared(test: &str) -> Rc<Scene> {
        Rc::new(Scene::new(test))
    }

    /// Has `act` done when an operation reaches `point` next.
    pub(super) fn at(self: &Rc<Scene>, point: mutation::Point, act: impl FnOnce(&Scene) + 'static) {
        let scene = Rc::clone(self);
        mutation::act_at(point, move || act(&scene));
    }

    pub(super) fn fs(&self) -> &Filesystem {
        self.fs.as_ref().expect("mounted")
    }

    /// Forgets all mappings of the file that are not pinned.
    pub(super) fn evict(&self) {
        self.direct.inner().map.evict(u64::MAX);
    }

    /// Requests fail from now on.
    pub(super) fn fail(&self, target: Target, when: When) {
        let eio = Effect::Error(IoErrorKind::Os(5));
        self.fault.set_plan(FaultPlan::new(1, vec![Fault::new(target, when, eio)]));
    }

    pub(super) fn buffer(&self, channel: &Channel, data: &[u8]) -> DmaBuf {
        let mut buf = channel.buffer(data.len()).expect("buffer");
        buf.copy_from_slice(data);
        buf
    }

    pub(super) fn write<'a>(
        &self,
        channel: &'a Channel,
        file: &File,
        offset: u64,
        data: &[u8],
    ) -> Run<'a, Result<(), Error>> {
        let write = channel.write_async(file, offset, self.buffer(channel, data));
        Box::pin(async move { write.await.0 })
    }

    pub(super) fn read<'a>(
        &self,
        channel: &'a Channel,
        file: &File,
        offset: u64,
        len: usize,
    ) -> Run<'a, Vec<u8>> {
        let read = channel.read_async(file, offset, channel.buffer(len).expect("buffer"));
        Box::pin(async move {
            let (result, buf) = read.await;
            buf[..result.expect("read")].to_vec()
        })
    }

    /// What a new buffered read, and a direct one, find.
    #[track_caller]
    pub(super) fn finds(&self, offset: u64, expected: &[u8], what: &str) {
        for file in [&self.buffered, &self.direct] {
            let mut found = vec![0; expected.len()];
            assert_eq!(self.a.read(file, offset, &mut found).expect("read"), expected.len(), "{what}");
            assert!(found == expected, "{what} (buffered: {})", file.is_buffered());
        }
    }

    /// Ends well: nothing is on its way, and all is in order.
    pub(super) fn end(&self) {
        self.gate.keep(Keep::Nothing);
        self.a.sync().expect("sync");
        assert_eq!(self.direct.accounting(), Accounting::default());
        check(self.fs(), &self.a);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.gate.keep(Keep::Nothing);
        // A test that noticed something may have operations that never end: an unmount would wait for them.
        if std::thread::panicking() {
            std::mem::forget(self.fs.take());
        }
    }
}

/// Polls `run` often enough for everything that can go on without others.
pub(super) fn step<T>(run: &mut Run<'_, T>) -> Option<T> {
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..200 {
        if let Poll::Ready(value) = run.as_mut().poll(&mut cx) {
            return Some(value);
        }
    }
    None
}
