//! Devices around devices: each adds one behaviour and passes the rest on.
//!
//! - [`counters`]: how many operations and bytes went through;
//! - [`fault`]: errors, torn and lost writes, a device that disappears;
//! - [`recorder`]: a log of all changes, from which every state after a crash can be built.
//!
//! A wrapper shares the claim flag and the DMA memory of the device inside, so it does not matter through which of
//! them a device is claimed or a buffer was allocated. Fault controls sit here and never on the device contract.

pub mod counters;
pub mod fault;
pub mod recorder;
