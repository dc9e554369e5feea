//! What a row is.

use std::fmt;

use super::lab::Lab;
use crate::failure::Result;

/// A row of the comparison.
pub(crate) struct Row {
    /// Its name in `--only` and in the issues.
    pub(crate) metric: &'static str,
    /// Unit of both sides.
    pub(crate) unit: &'static str,
    /// What we are compared with, if anything.
    pub(crate) peer_name: Option<&'static str>,
    /// Which figure the goal, the median and the spread are about.
    pub(crate) figure: Figure,
    /// What is to be reached.
    pub(crate) goal: Option<Goal>,
    /// It uses the device under test (else it has one of its own).
    pub(crate) on_device: bool,
    /// What exactly is measured.
    pub(crate) about: &'static str,
    /// Builds what both sides need. Not timed. [`Failure::Skipped`](crate::failure::Failure) when this machine or build
    /// lacks something.
    pub(crate) prepare: fn(&Lab) -> Result<Box<dyn Contest>>,
}

/// Which figure of a row counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Figure {
    /// Ours divided by the peer's, sample by sample.
    Ratio,
    /// Ours minus the peer's, sample by sample.
    Difference,
    /// Ours alone.
    Ours,
}

/// What a figure has to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

impl Goal {
    /// True when `figure` reaches it.
    pub(crate) fn reached(self, figure: f64) -> bool {
        match self {
            Goal::AtLeast(goal) => figure >= goal,
            Goal::AtMost(goal) => figure <= goal,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Goal::AtLeast(goal) => write!(f, ">= {goal}"),
            Goal::AtMost(goal) => write!(f, "<= {goal}"),
        }
    }
}

/// One measurement of both sides.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) ours: f64,
    pub(crate) peer: Option<f64>,
}

/// Both sides of a row, ready to be measured again and again.
pub(crate) trait Contest {
    /// A sample of ours, in the unit of the row.
    fn ours(&mut self, lab: &Lab) -> Result<f64>;

    /// A sample of the peer. `None` in rows without one.
    fn peer(&mut self, lab: &Lab) -> Result<Option<f64>>;

    /// How many samples of each side are taken where `asked` are wanted: a row whose samples take long takes fewer, and says
    /// so in its description.
    fn repeats(&self, asked: u32) -> u32 {
        asked
    }

    /// Whether a round that is not counted comes first.
    fn warms_up(&self) -> bool {
        true
    }

    /// What a reader should know beside the figures.
    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }

    /// Takes everything down, with the errors that dropping would hide.
    fn finish(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}
