//! Devices around devices: each adds one behaviour and passes the rest on.
//!
//! | module | in a URI | adds |
//! |---|---|---|
//! | [`fault`] | `fault:` | errors, lost, torn and misdirected writes, bit rot, a flush that lies, a device that disappears, ... |
//! | [`latency`] | `latency:` | a time that every answer takes, fixed or from a distribution |
//! | [`counters`] | `count:` | how many operations, bytes and flushes went through |
//! | [`recorder`] | `record:` | a log of all changes, from which every state after a crash can be built |
//!
//! They work in any order and any number; [`open_stack`](crate::open_stack) opens a device with handles to its wrappers.
//!
//! A wrapper shares the claim flag and the DMA memory of the device inside, so it does not matter through which of
//! them a device is claimed or a buffer was allocated. Fault controls sit here and never on the device contract.

pub mod counters;
pub mod fault;
pub mod latency;
pub mod recorder;

mod held;
mod in_flight;
mod random;

#[cfg(test)]
mod tests;
