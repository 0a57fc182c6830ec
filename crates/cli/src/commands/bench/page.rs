//! A measurement as one page of HTML: figures and charts, without script and without anything from elsewhere. Made by `bench`
//! for `--report`.

use minijinja::{Environment, Value, context};

use super::{plots, replay, report::Measured, timings::Percentiles};

/// The page.
pub(crate) fn html(parameters: &serde_json::Value, measured: &[Measured]) -> anyhow::Result<String> {
    let subjects = measured.iter().map(subject).collect::<Result<Vec<_>, _>>()?;
    let mut environment = Environment::new();
    // Called `.html`, so that what is put into it is escaped.
    environment.add_template("page.html", include_str!("page.html"))?;
    let version = env!("CARGO_PKG_VERSION");
    let closed = parameters["arrivals"]["kind"] == "closed";
    let replayed = replay::told(parameters);
    let parameters = serde_json::to_string_pretty(parameters)?;
    let page = environment.get_template("page.html")?;
    Ok(page.render(context! { subjects, parameters, version, closed, replayed })?)
}

fn subject(measured: &Measured) -> anyhow::Result<Value> {
    let figures = &measured.figures;
    let row = |(name, of): (&str, Percentiles)| {
        let cells = [of.p50, of.p90, of.p95, of.p99, of.max, of.mean].map(|ms| format!("{ms:.2}"));
        context! { name, cells }
    };
    let failures = figures.failures.iter().map(|(code, count)| {
        context! { code, count, example => figures.failure_examples.get(code) }
    });
    let charts = plots::of(&measured.samples).iter().map(|chart| chart.svg()).collect::<Result<Vec<_>, _>>()?;
    Ok(context! {
        label => measured.label,
        requests => figures.requests,
        due => figures.due(),
        wall_s => format!("{:.1}", figures.wall_s),
        requests_per_s => format!("{:.1}", figures.requests_per_s),
        tokens_per_s => format!("{:.1}", figures.tokens_per_s),
        goodput_per_s => format!("{:.1}", figures.goodput_per_s),
        good_share => format!("{:.1}%", 100.0 * figures.good_share),
        slo => measured.samples.slo().to_string(),
        times => figures.times().map(row).collect::<Vec<_>>(),
        failures => failures.collect::<Vec<_>>(),
        charts,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::json;

    use super::{
        super::{
            answer::{Call, Failure, Reply},
            figures::Figures,
            report::tests::measured,
        },
        *,
    };

    #[test]
    fn a_page_holds_all_that_it_shows() {
        // Broken: the page would be empty where there is no network, or show what a server said as part of the page.
        let mut subject = measured("http://peer/v1", &[2.0]);
        let now = Instant::now();
        let failure = Failure::new("500", "<script>alert(1)</script>");
        let call = Call { due: now, sent: now, replies: vec![Reply { ended: now, result: Err(failure) }] };
        subject.samples.add(&call, now);
        subject.figures = Figures::of(&subject.samples);
        let parameters = json!({"arrivals": {"kind": "poisson"}, "routes": {"file": "routes.csv"}});
        let html = html(&parameters, &[subject.clone(), subject]).unwrap();
        assert_eq!((html.matches("<svg").count(), html.matches("</svg>").count()), (12, 12));
        for told in [
            "http:&#x2f;&#x2f;peer&#x2f;v1",
            "time to first token",
            "poisson",
            "e2e 50ms",
            "from when it was due",
            "recorded in routes.csv",
        ] {
            assert!(html.contains(told), "{told}");
        }
        assert!(html.contains("&lt;script&gt;"), "the message is left out");
        let links = html.replace("http:&#x2f;&#x2f;peer", "").replace("http://www.w3.org/2000/svg", "");
        assert!(!links.contains("<script") && !links.contains("http") && !links.contains("src="), "{links}");
    }
}
