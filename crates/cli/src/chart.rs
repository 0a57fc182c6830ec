//! Draws one chart as SVG, which a page can hold as it is. What is drawn is decided by the `plots` of `bench` and of `eval`.

use plotters::{coord::Shift, prelude::*, style::Color as _};
use thiserror::Error;

/// Pixels; a page may scale it.
const SIZE: (u32, u32) = (900, 300);

/// Two axes and what is between them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    pub(crate) series: Vec<Series>,
}

/// From 0 or from its least to its most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Axis {
    pub(crate) name: &'static str,
    pub(crate) scale: Scale,
}

/// What the numbers of an axis are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    /// As they are, from 0.
    Linear,
    /// Logarithms to base ten.
    Log,
    /// How many nines a quantile has: 1 is 90%, 2 is 99%.
    Nines,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) mark: Mark,
    pub(crate) color: Color,
    /// By x, finite.
    pub(crate) points: Vec<(f64, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mark {
    Line,
    /// A line with a dot at each point.
    Joined,
    Dots,
    /// From 0 to each point, so wide.
    Bars(f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Color {
    Blue,
    Orange,
    Green,
    Red,
}

/// Why a chart could not be drawn.
#[derive(Debug, Error)]
#[error("the chart {title:?} cannot be drawn: {problem}")]
pub(crate) struct DrawError {
    title: String,
    problem: String,
}

impl Chart {
    /// An `<svg>` element.
    pub(crate) fn svg(&self) -> Result<String, DrawError> {
        let mut svg = String::new();
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = self.draw(&area);
        drop(area);
        drawn.map_err(|error| DrawError { title: self.title.clone(), problem: error.to_string() })?;
        Ok(svg)
    }

    fn draw<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
        let points = || self.series.iter().flat_map(|series| series.points.iter());
        let (x_shown, y_shown) = (|x: &f64| self.x.scale.shown(*x), |y: &f64| self.y.scale.shown(*y));
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, ("sans-serif", 18))
            .margin(8)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d(self.x.range(points().map(|(x, _)| *x)), self.y.range(points().map(|(_, y)| *y)))?;
        chart
            .configure_mesh()
            .x_desc(self.x.name)
            .y_desc(self.y.name)
            .x_labels(if self.x.scale == Scale::Nines { 5 } else { 10 })
            .y_labels(6)
            .x_label_formatter(&x_shown)
            .y_label_formatter(&y_shown)
            .bold_line_style(BLACK.mix(0.1))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for series in &self.series {
            let color = series.color.rgb();
            let points = series.points.iter().copied();
            let drawn = match series.mark {
                Mark::Line => chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?,
                Mark::Joined => {
                    chart.draw_series(points.clone().map(|point| Circle::new(point, 4, color.filled())))?;
                    chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?
                }
                Mark::Dots => chart.draw_series(points.map(|point| Circle::new(point, 2, color.mix(0.4).filled())))?,
                Mark::Bars(width) => chart.draw_series(
                    points.map(|(x, y)| Rectangle::new([(x, 0.0), (x + width, y)], color.mix(0.6).filled())),
                )?,
            };
            drawn
                .label(series.name.clone())
                .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], color.filled()));
        }
        let position = SeriesLabelPosition::UpperLeft;
        chart.configure_series_labels().position(position).background_style(WHITE.mix(0.8)).draw()?;
        area.present()
    }
}

impl Axis {
    /// Wide enough for every value, and never of no width, which would have no labels.
    fn range(&self, values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
        let (least, most) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| (least.min(value), most.max(value)));
        let least = if self.scale == Scale::Log && least.is_finite() { least } else { 0.0 };
        let most = if most > least { most } else { least + 1.0 };
        least..least + (most - least) * 1.05
    }
}

impl Scale {
    fn shown(self, value: f64) -> String {
        let number = |value: f64| if value.abs() < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") };
        match self {
            Self::Linear => number(value),
            Self::Log => number(10f64.powf(value)),
            Self::Nines => {
                let share = 100.0 * (1.0 - 10f64.powf(-value));
                let digits = (value - 2.0).ceil().clamp(0.0, 9.0) as usize;
                format!("{share:.digits$}%")
            }
        }
    }
}

impl Color {
    fn rgb(self) -> RGBColor {
        match self {
            Self::Blue => RGBColor(31, 119, 180),
            Self::Orange => RGBColor(230, 120, 10),
            Self::Green => RGBColor(44, 140, 44),
            Self::Red => RGBColor(200, 30, 30),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        let axis = |scale| Axis { name: "seconds", scale };
        let series = |mark| Series { name: "p50 <ms>".into(), mark, color: Color::Blue, points: points.clone() };
        let series = [Mark::Line, Mark::Joined, Mark::Dots, Mark::Bars(0.5)].map(series).to_vec();
        Chart { title: "a & b".into(), x: axis(Scale::Linear), y: axis(Scale::Linear), series }
    }

    #[test]
    fn a_chart_is_one_element_with_every_point() {
        // Broken: a browser would show no chart, or one of something else.
        let svg = chart(vec![(0.0, 1.0), (1.0, 5.0), (2.0, 3.0)]).svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        assert_eq!((svg.matches("<circle").count(), svg.matches("<polyline").count() > 1), (6, true));
        assert!(svg.contains("a &amp; b") && svg.contains("p50 &lt;ms&gt;"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn charts_of_nothing_are_drawn() {
        // Broken: a run whose every request fails would have no report, or drawing it would never end.
        for points in [vec![], vec![(0.0, 0.0)], vec![(1.0, 1.0), (1.0, 1.0)], vec![(1e9, 1e9)]] {
            for scale in [Scale::Linear, Scale::Log, Scale::Nines] {
                let mut chart = chart(points.clone());
                (chart.x.scale, chart.y.scale) = (scale, scale);
                assert!(chart.svg().unwrap().contains("</svg>"));
            }
        }
    }

    #[test]
    fn labels_are_what_a_person_reads() {
        // Broken: a logarithm would be read as milliseconds, or 99.9% as 100%.
        let nines = [0.0, 1.0, 2.0, 3.0, 4.0].map(|value| Scale::Nines.shown(value));
        assert_eq!(nines, ["0%", "90%", "99%", "99.9%", "99.99%"]);
        assert_eq!([2.0, 0.5, -1.0].map(|value| Scale::Log.shown(value)), ["100", "3.16", "0.10"]);
        assert_eq!([0.0, 2.5, 1234.5].map(|value| Scale::Linear.shown(value)), ["0.00", "2.50", "1234"]);
    }
}
