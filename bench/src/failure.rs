//! How a command ends when it does not end well, and the exit code that goes with it.

use std::fmt::{self, Display};

/// The result of everything in this program.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// Why a command stops.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The arguments make no sense; exit code 2, as for the parser's own complaints.
    Usage(String),
    /// It did not work; the message names the thing and, where it can, what would help. Exit code 1.
    Failed(String),
    /// A measurement needs what this machine or build lacks.
    Skipped(String),
    /// What is wrong has been printed already (differences, problems of a check). Exit code 1.
    Reported,
    /// Whoever read our output has gone (`bench ls | head`). Nothing is wrong; exit code 0.
    OutputClosed,
}

impl Failure {
    /// A failure with a finished message.
    pub(crate) fn new(message: impl Into<String>) -> Failure {
        Failure::Failed(message.into())
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Usage(what) | Failure::Failed(what) | Failure::Skipped(what) => f.write_str(what),
            Failure::Reported => f.write_str("see above"),
            Failure::OutputClosed => f.write_str("the output was closed"),
        }
    }
}

/// Says what was being done when an error came, so that a message names the thing.
pub(crate) trait Doing<T> {
    /// Turns the error into "cannot {what}: {error}".
    fn doing(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Failure::Failed(format!("cannot {what}: {error}")))
    }
}

/// A name of a file in the filesystem as text: names are bytes, and a terminal must survive them.
pub(crate) fn show_name(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    if text.chars().any(char::is_control) { text.escape_debug().to_string() } else { text.into_owned() }
}
