//! Futures: handles on operations that a channel drives.
//!
//! A future borrows its channel and polls it when it is polled, so it works under any executor and without one. Dropping it
//! detaches the operation, which still completes. A pending future asks to be polled again at once: a polled device
//! has nobody else who could notice the completion.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bdev_adapter::Segments;

use super::Channel;
use super::operation::Output;
use crate::error::Result;
use crate::sync::Mutex;

/// What every operation ends with.
pub(crate) type Answer = (Result<Output>, Segments);

/// The answer of an operation to come. Not `Send`: it belongs to the channel's thread.
#[must_use = "an operation goes on without its future, but its answer is lost"]
pub struct OpFuture<'c, T> {
    pub(super) channel: &'c Channel,
    pub(super) answer: Arc<Mutex<Option<Answer>>>,
    pub(super) convert: fn(Answer) -> T,
}

impl<T> std::fmt::Debug for OpFuture<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpFuture").field("ready", &self.answer.lock().is_some()).finish_non_exhaustive()
    }
}

impl<T> Future for OpFuture<'_, T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        if self.answer.lock().is_none() {
            self.channel.drive();
        }
        let answer = self.answer.lock().take();
        match answer {
            Some(answer) => Poll::Ready((self.convert)(answer)),
            None => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }
}
