//! How far something long has come, on standard error: shown when it takes a while and somebody
//! watches.

use std::cell::Cell;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is over sooner than this is not worth a bar.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long something takes, in what measure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Length {
    /// So many bytes.
    Bytes(u64),
    /// Bytes, until they end.
    UnknownBytes,
    /// So many seconds.
    Seconds(u64),
    /// Nobody knows, and there is nothing to count.
    Unknown,
}

impl Length {
    /// What the bar shows: at most 80 columns, if the terminal has no more.
    const fn template(self) -> &'static str {
        match self {
            Self::Bytes(_) => "{msg:<42} {wide_bar} {percent:>3} % {binary_bytes_per_sec:>14}",
            Self::UnknownBytes => "{msg:<42} {spinner} {binary_bytes} {binary_bytes_per_sec}",
            Self::Seconds(_) => "{msg:<42} {wide_bar} {pos}/{len} s",
            Self::Unknown => "{msg:<42} {spinner} {elapsed}",
        }
    }

    const fn end(self) -> Option<u64> {
        match self {
            Self::Bytes(end) | Self::Seconds(end) => Some(end),
            Self::UnknownBytes | Self::Unknown => None,
        }
    }
}

/// A bar. Cleared from the terminal when dropped.
pub(crate) struct Progress {
    bar: ProgressBar,
    started: Instant,
    /// The bar waits to be worth showing.
    is_waiting: Cell<bool>,
}

impl Progress {
    /// Progress that nobody sees.
    pub(crate) fn hidden() -> Self {
        Self { bar: ProgressBar::hidden(), started: Instant::now(), is_waiting: Cell::new(false) }
    }

    /// A bar for `what`, which takes `length`.
    pub(crate) fn start(what: &'static str, length: Length) -> Self {
        let bar = ProgressBar::with_draw_target(length.end(), ProgressDrawTarget::hidden());
        let style = ProgressStyle::with_template(length.template());
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(what);
        let is_waiting = length != Length::Unknown;
        if !is_waiting {
            // Nobody is going to call while it lasts: the bar moves by itself.
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.enable_steady_tick(PATIENCE);
        }
        Self { bar, started: Instant::now(), is_waiting: Cell::new(is_waiting) }
    }

    /// `bytes` more are done.
    pub(crate) fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        self.show();
    }

    /// As far as the clock says, of a length in seconds.
    pub(crate) fn follow_clock(&self) {
        self.bar.set_position(self.started.elapsed().as_secs());
        self.show();
    }

    fn show(&self) {
        if self.is_waiting.get() && self.started.elapsed() >= PATIENCE {
            self.is_waiting.set(false);
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_is_one() {
        for length in [Length::Bytes(9), Length::UnknownBytes, Length::Seconds(9), Length::Unknown]
        {
            assert!(ProgressStyle::with_template(length.template()).is_ok(), "{length:?}");
        }
    }
}
