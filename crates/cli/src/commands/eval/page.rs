//! An evaluation as one page of HTML: tables and charts, without script and without anything from elsewhere. Made by
//! `eval` for `--report`.

use minijinja::{Environment, context};
use serde_json::Value;

use crate::commands::eval::{evaluation::Evaluation, plots, report};

/// The page.
pub(crate) fn html(evaluation: &Evaluation, parameters: &Value) -> anyhow::Result<String> {
    let tables = report::tables(evaluation).into_iter().map(|table| {
        let report::ReportTable { title, header, rows } = table;
        context! { title, header, rows }
    });
    let charts = plots::of(evaluation).iter().map(|chart| chart.svg()).collect::<Result<Vec<_>, _>>()?;
    let mut environment = Environment::new();
    // Called `.html`, so that what is put into it is escaped.
    environment.add_template("page.html", include_str!("page.html"))?;
    Ok(environment.get_template("page.html")?.render(context! {
        summary => report::summary(evaluation, parameters),
        tables => tables.collect::<Vec<_>>(),
        charts,
        parameters => serde_json::to_string_pretty(parameters)?,
        version => env!("CARGO_PKG_VERSION"),
    })?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::commands::eval::evaluation::tests::evaluation;

    #[test]
    fn a_page_holds_all_that_it_shows() {
        // Would break: the page is empty where there is no network, or what data says becomes part of the page.
        let html = html(&evaluation(), &json!({"model": "<script>m</script>"})).unwrap();
        assert_eq!((html.matches("<svg").count(), html.matches("</svg>").count()), (8, 8));
        for told in ["Resident experts", "not served by this version", "50.0%", "&lt;script&gt;"] {
            assert!(html.contains(told), "{told}");
        }
        let links = html.replace("http://www.w3.org/2000/svg", "");
        assert!(!links.contains("<script") && !links.contains("http") && !links.contains("src="), "{links}");
    }
}
