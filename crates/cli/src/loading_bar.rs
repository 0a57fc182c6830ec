//! Progress of whatever takes longer than a second: a bar on a terminal, nothing elsewhere. Used by loading,
//! training, conversion and verification.

use std::{
    io::IsTerminal,
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sida_coordinator::config::OnLoad;
use sida_model::Checkpoint;

/// What is done sooner needs no bar.
const PATIENCE: Duration = Duration::from_millis(300);

/// A bar on standard error, gone when dropped.
pub(crate) struct LoadingBar {
    bar: ProgressBar,
    since: Instant,
}

/// What the bar counts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    /// Shown as MiB, with the rate.
    Bytes,
    /// Shown as they are, with the time that is left.
    Steps,
}

/// What a coordinator tells how far its model is loaded; the bar goes when the model is there.
pub(crate) fn of_model(checkpoint: &Checkpoint) -> OnLoad {
    let bar = LoadingBar::new(&format!("loading {}", checkpoint.name()), Unit::Bytes);
    Arc::new(move |done, total| {
        bar.advance(done, total);
        if done >= total {
            bar.bar.finish_and_clear();
        }
    })
}

impl LoadingBar {
    /// A bar called `label`. Nothing is drawn unless [`LoadingBar::advance`] is still called after a while.
    pub(crate) fn new(label: &str, unit: Unit) -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden()).with_message(label.to_owned());
        let template = match unit {
            Unit::Bytes => "{msg} {wide_bar:.cyan/blue} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}",
            Unit::Steps => "{msg} {wide_bar:.cyan/blue} {human_pos}/{human_len} {eta} left",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        Self { bar, since: Instant::now() }
    }

    /// `done` of `total`.
    pub(crate) fn advance(&self, done: u64, total: u64) {
        if self.bar.is_hidden() && self.since.elapsed() >= PATIENCE && std::io::stderr().is_terminal() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.bar.enable_steady_tick(Duration::from_millis(200));
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    /// What is being done now.
    pub(crate) fn describe(&self, message: String) {
        self.bar.set_message(message);
    }
}

impl Drop for LoadingBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
