//! What has happened, in order.

use std::fmt;

/// A line for every step and every end of a transaction; kept only where somebody wants to read it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Trace {
    text: Option<String>,
}

impl Trace {
    /// A trace that keeps its text, or one that keeps nothing.
    #[must_use]
    pub fn new(keep: bool) -> Self {
        Self { text: keep.then(String::new) }
    }

    /// Adds a line.
    pub(crate) fn line(&mut self, now: u64, what: fmt::Arguments<'_>) {
        if let Some(text) = &mut self.text {
            use fmt::Write as _;
            let _never_fails = writeln!(text, "{now:>6} {what}");
        }
    }

    /// All lines.
    #[must_use]
    pub fn text(&self) -> &str {
        self.text.as_deref().unwrap_or_default()
    }
}
