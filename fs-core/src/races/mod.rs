//! The five rules of the design as races: for each a fixed interleaving, and proof that it fails when the rule is broken.
//!
//! Operations are futures that run only when their channel is polled, the device keeps answers back until it is told to let them go
//! (`common::gate`), and at certain points an operation calls the test ([`crate::mutation::reached`]). So each interleaving is the same
//! every time. Each test tells how the failure would come about; [`mutants`] breaks the rules ([`crate::mutation`]) and runs the tests
//! again.

#[path = "../../tests/common/mod.rs"]
mod common;
mod coherence;
mod files;
mod loaders;
mod mutants;
mod ranges;
mod retries;
mod scene;
mod sizes;
