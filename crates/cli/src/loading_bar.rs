//! Progress of whatever takes longer than a second: a bar on a terminal, nothing elsewhere. Used by loading,
//! training, conversion and verification.

use std::{io::IsTerminal, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar on standard error, gone when dropped.
pub(crate) struct LoadingBar(ProgressBar);

/// What the bar counts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    /// Shown as MiB, with the rate.
    Bytes,
    /// Shown as they are, with the time that is left.
    Steps,
}

impl LoadingBar {
    /// A bar called `label`. Nothing is drawn before the first [`LoadingBar::advance`].
    pub(crate) fn new(label: &str, unit: Unit) -> Self {
        let target =
            if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target).with_message(label.to_owned());
        let template = match unit {
            Unit::Bytes => "{msg} {wide_bar:.cyan/blue} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}",
            Unit::Steps => "{msg} {wide_bar:.cyan/blue} {human_pos}/{human_len} {eta} left",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        Self(bar)
    }

    /// `done` of `total`.
    pub(crate) fn advance(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// What is being done now.
    pub(crate) fn describe(&self, message: String) {
        self.0.set_message(message);
        self.0.enable_steady_tick(Duration::from_millis(200));
    }
}

impl Drop for LoadingBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
