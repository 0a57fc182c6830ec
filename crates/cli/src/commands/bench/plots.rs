//! What the page shows of a measurement: charts, made of what was collected. Drawn by `crate::chart`, put together by
//! [`super::page`].

use super::{
    samples::{Samples, Seen},
    timings::Timings,
};
use crate::chart::{Axis, Chart, Color, Mark, Scale, Series};

/// Parts that the run is cut into, and bars of a histogram.
const PARTS: usize = 60;

/// Dots of a chart at most; of more requests every second, third and so on is shown.
const DOTS_MAX: usize = 2_000;

/// Nines up to which percentiles are drawn: 99.99%.
const NINES_MAX: f64 = 4.0;

/// All of them, those of tokens where there are any.
pub(crate) fn of(samples: &Samples) -> Vec<Chart> {
    let mut charts = vec![over_time("End to end, by when requests were due", samples, |seen| Some(seen.e2e_ms))];
    if !samples.ttft.is_empty() {
        charts.push(over_time("Time to first token, by when requests were due", samples, |seen| seen.ttft_ms));
    }
    charts.extend([percentiles(samples), histogram(&samples.e2e), requests(samples)]);
    if samples.tokens > 0 {
        charts.push(tokens(samples));
    }
    charts
}

const MS: Axis = Axis { name: "ms", scale: Scale::Linear };
const TIME: Axis = Axis { name: "s", scale: Scale::Linear };

/// How long requests took that were due at a time: some of them, and percentiles of each part of the run.
fn over_time(title: &str, samples: &Samples, time: impl Fn(&Seen) -> Option<f32>) -> Chart {
    let answered = || samples.seen.iter().filter(|seen| seen.failure.is_none());
    let points: Vec<(f64, f64)> = answered().filter_map(|seen| Some((seen.due_s, f64::from(time(seen)?)))).collect();
    let width = part_s(samples);
    let mut parts = vec![Vec::new(); PARTS];
    for (x, y) in &points {
        parts[part(*x, width)].push(*y);
    }
    let quantile = |share: f64, name: &str, color| {
        let mut line = Vec::new();
        for (number, part) in parts.iter_mut().map(|part| &mut *part).enumerate().filter(|(_, part)| !part.is_empty()) {
            part.sort_by(f64::total_cmp);
            let rank = (share * part.len() as f64).ceil() as usize;
            line.push(((number as f64 + 0.5) * width, part[rank.clamp(1, part.len()) - 1]));
        }
        Series { name: name.to_owned(), mark: Mark::Line, color, points: line }
    };
    let mut quantile = quantile;
    let lines = [quantile(0.5, "p50", Color::Green), quantile(0.99, "p99", Color::Orange)];
    let every = points.len().div_ceil(DOTS_MAX).max(1);
    let dots = Series {
        name: "a request".to_owned(),
        mark: Mark::Dots,
        color: Color::Blue,
        points: points.into_iter().step_by(every).collect(),
    };
    let title = if every > 1 { format!("{title} (one request of {every} as a dot)") } else { title.to_owned() };
    Chart { title, x: TIME, y: MS, series: [dots].into_iter().chain(lines).collect() }
}

/// What a share of the requests did not exceed.
fn percentiles(samples: &Samples) -> Chart {
    let series = [
        ("end to end", Color::Blue, &samples.e2e),
        ("time to first token", Color::Orange, &samples.ttft),
        ("time per token after it", Color::Green, &samples.tpot),
    ];
    let series = series.into_iter().filter(|(_, _, timings)| !timings.is_empty());
    let series = series.map(|(name, color, timings)| {
        let at = |step: usize| {
            let nines = step as f64 * NINES_MAX / 200.0;
            (nines, timings.quantile_ms(1.0 - 10f64.powf(-nines)))
        };
        Series { name: name.to_owned(), mark: Mark::Line, color, points: (0..=200).map(at).collect() }
    });
    let x = Axis { name: "share of requests", scale: Scale::Nines };
    Chart { title: "Percentiles".into(), x, y: MS, series: series.collect() }
}

/// How many requests took how long.
fn histogram(timings: &Timings) -> Chart {
    let x = Axis { name: "ms", scale: Scale::Log };
    let y = Axis { name: "requests", scale: Scale::Linear };
    // What takes less than the histogram's microsecond is drawn with what takes one.
    let log = |ms: f64| ms.max(1e-3).log10();
    let (low, high) = timings.percentiles().map(|of| (log(of.min), log(of.max))).unwrap_or_default();
    let width = ((high - low) / PARTS as f64).max(0.01);
    let mut counts = [0; PARTS];
    for (ms, count) in timings.recorded_ms() {
        counts[part(log(ms) - low, width)] += count;
    }
    let bars = counts.iter().enumerate().map(|(number, count)| (low + number as f64 * width, *count as f64));
    let series = vec![Series {
        name: "requests".to_owned(),
        mark: Mark::Bars(width),
        color: Color::Blue,
        points: bars.collect(),
    }];
    Chart { title: "Histogram, end to end".into(), x, y, series }
}

/// Requests that ended, a second.
fn requests(samples: &Samples) -> Chart {
    let of = |name, color, is_failed: bool| {
        let counted = samples.seen.iter().filter(|seen| seen.failure.is_some() == is_failed);
        per_second(name, color, samples, counted.map(|seen| (seen.ended_s(), 1.0)))
    };
    let mut series = vec![of("answered", Color::Green, false)];
    if samples.failed_requests() > 0 {
        series.push(of("failed", Color::Red, true));
    }
    Chart {
        title: "Requests by when they ended".into(),
        x: TIME,
        y: Axis { name: "a second", scale: Scale::Linear },
        series,
    }
}

/// Tokens of requests that ended, a second.
fn tokens(samples: &Samples) -> Chart {
    let counted = samples.seen.iter().map(|seen| (seen.ended_s(), seen.tokens as f64));
    let series = vec![per_second("tokens", Color::Blue, samples, counted)];
    let title = "Tokens by when their requests ended".into();
    Chart { title, x: TIME, y: Axis { name: "a second", scale: Scale::Linear }, series }
}

fn per_second(name: &str, color: Color, samples: &Samples, counted: impl Iterator<Item = (f64, f64)>) -> Series {
    let width = part_s(samples);
    let mut sums = vec![0.0; PARTS];
    for (time, count) in counted {
        sums[part(time, width)] += count;
    }
    let points = sums.into_iter().enumerate().map(|(number, sum)| (number as f64 * width, sum / width));
    Series { name: name.to_owned(), mark: Mark::Bars(width), color, points: points.collect() }
}

/// How long a part of the run is.
fn part_s(samples: &Samples) -> f64 {
    (samples.wall.as_secs_f64() / PARTS as f64).max(1e-3)
}

/// Which of the parts, so wide, a value is in: the first or the last where it is in none.
fn part(value: f64, width: f64) -> usize {
    ((value / width) as usize).min(PARTS - 1)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{
        super::samples::tests::{call, failure},
        *,
    };

    /// Requests that are due every 10 ms and take the longer the later they are; one in ten fails.
    fn samples(count: u64) -> Samples {
        let start = Instant::now();
        let mut samples = Samples::default();
        for number in 0..count {
            let due = 10 * number;
            samples.add(&if number % 10 == 9 { failure(start, due, "429") } else { call(start, due, number) }, start);
        }
        samples.wall = Duration::from_millis(10 * count);
        samples
    }

    #[test]
    fn every_request_is_in_the_charts() {
        // Broken: a page would show another run than the one that was measured.
        let samples = samples(600);
        let charts = of(&samples);
        assert_eq!(charts.len(), 6);
        let sum = |series: &Series, width: f64| series.points.iter().map(|(_, y)| y * width).sum::<f64>().round();
        let [answered, failed] = &charts[4].series[..] else { panic!("{:?}", charts[4]) };
        assert_eq!((sum(answered, part_s(&samples)), sum(failed, part_s(&samples))), (540.0, 60.0));
        assert_eq!(sum(&charts[3].series[0], 1.0), 540.0);
        assert_eq!(sum(&charts[5].series[0], part_s(&samples)), 1620.0);
        let [dots, p50, p99] = &charts[0].series[..] else { panic!("{:?}", charts[0]) };
        assert_eq!((dots.points.len(), p50.points.len()), (540, PARTS));
        assert!(p50.points[0].1 < p50.points[59].1 && p50.points[59].1 <= p99.points[59].1);
        let end_to_end = &charts[2].series[0].points;
        assert!(end_to_end.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{end_to_end:?}");
    }

    #[test]
    fn long_runs_have_few_dots_and_say_so() {
        // Broken: the page of a long run would be too large for a browser.
        let chart = &of(&samples(10_000))[0];
        assert!(
            chart.series[0].points.len() <= DOTS_MAX && chart.title.contains("one request of 5"),
            "{}",
            chart.title
        );
    }

    #[test]
    fn a_run_of_failures_has_charts() {
        // Broken: a server that refuses everything would have no page, which is when one is looked at.
        let start = Instant::now();
        let mut samples = Samples::default();
        assert!(of(&samples).iter().all(|chart| chart.svg().is_ok()));
        samples.add(&failure(start, 0, "500"), start);
        assert!(of(&samples).iter().all(|chart| chart.svg().is_ok()));
    }
}
