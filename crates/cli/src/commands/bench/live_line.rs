//! Where a run stands, in one line that is written anew four times a second: on a terminal, and nowhere else. Shown by `bench`
//! while a load runs.

use std::{io::IsTerminal, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::samples::Samples;

/// The line on standard error, gone when dropped.
pub(crate) struct LiveLine(ProgressBar);

impl LiveLine {
    pub(crate) fn new() -> Self {
        let is_seen = std::io::stderr().is_terminal();
        let target = if is_seen { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg}") {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// What is done, and what was seen of it.
    pub(crate) fn show(&self, doing: &str, samples: &Samples, under_way: u64, elapsed: Duration) {
        if !self.0.is_hidden() {
            self.0.set_message(line(doing, samples, under_way, elapsed));
            self.0.tick();
        }
    }
}

impl Drop for LiveLine {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn line(doing: &str, samples: &Samples, under_way: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    let per_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    let mut line = format!("{doing}  {seconds:.1} s  {} answered  {under_way} under way", samples.requests);
    if samples.failed_requests() > 0 {
        line.push_str(&format!("  {} failed", samples.failed_requests()));
    }
    line.push_str(&format!("  {:.1} requests/s", per_second(samples.requests)));
    for (name, timings) in [("latency", &samples.e2e), ("first token", &samples.ttft)] {
        if !timings.is_empty() {
            line.push_str(&format!(
                "  {name} p50 {:.0} p99 {:.0} ms",
                timings.quantile_ms(0.5),
                timings.quantile_ms(0.99)
            ));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{
        super::samples::tests::{call, failure},
        *,
    };

    #[test]
    fn the_line_tells_what_happened_so_far() {
        // Broken: somebody would wait ten minutes for a run whose every request fails.
        let start = Instant::now();
        let mut samples = Samples::default();
        assert_eq!(
            line("warming up", &samples, 0, Duration::ZERO),
            "warming up  0.0 s  0 answered  0 under way  0.0 requests/s"
        );
        samples.add(&call(start, 0, 20), start);
        samples.add(&failure(start, 0, "429"), start);
        let told = line("measuring", &samples, 5, Duration::from_secs(2));
        let expected = "measuring  2.0 s  1 answered  5 under way  1 failed  0.5 requests/s  latency p50 45 p99 45 ms  first token p50 20 p99 20 ms";
        assert_eq!(told, expected);
    }
}
