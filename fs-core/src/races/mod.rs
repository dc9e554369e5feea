//! The five rules of the design as races: for each a fixed interleaving, and proof that it fails when the rule is broken.
//!
//! Operations are futures that run only when their channel is polled, the device keeps answers back until it is told to let them go
//! (`common::gate`), and at certain points an operation calls the test ([`crate::mutation::reached`]). So each interleaving is the same
//! every time. Each test tells how the failure would come about; [`mutants`] breaks the rules ([`crate::mutation`]) and runs the tests
//! again.

//!
//! What cannot be interleaved this way - moments between two locks - is left to random schedules (`shuttle_tests`, in a build with
//! `--cfg shuttle`).

#[path = "../../tests/common/mod.rs"]
mod common;

#[cfg(not(shuttle))]
mod coherence;
#[cfg(not(shuttle))]
mod files;
#[cfg(not(shuttle))]
mod loaders;
#[cfg(not(shuttle))]
mod mutants;
#[cfg(not(shuttle))]
mod ranges;
#[cfg(not(shuttle))]
mod retries;
#[cfg(not(shuttle))]
mod scene;
#[cfg(not(shuttle))]
mod sizes;

#[cfg(shuttle)]
mod shuttle_tests;
