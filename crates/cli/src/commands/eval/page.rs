//! An evaluation as one page of HTML: tables and charts, without script and without anything from elsewhere. Written by
//! `eval` with `--report`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use minijinja::{Environment, context};
use serde_json::Value;

use crate::{
    bad_configuration::{BadConfiguration, unwritable},
    commands::eval::{evaluation::Evaluation, plots, report},
};

/// A file that a page will be written to.
pub(crate) struct Page(PathBuf);

impl Page {
    /// Refuses a place where no file can be written, before anything is measured. A page that is there already stays until
    /// there is another.
    pub(crate) fn at(path: &Path) -> anyhow::Result<Self> {
        if path.is_dir() {
            let shown = path.display();
            return Err(BadConfiguration::new(format!("--report {shown} is a directory, expected a file")).into());
        }
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let made = tempfile::tempfile_in(directory).map_err(|error| unwritable("--report", path, error));
        made.map(|_| Self(path.to_owned()))
    }

    /// Writes it. Where that fails, as on a full disk, half a page does not stay.
    pub(crate) fn write(&self, evaluation: &Evaluation, parameters: &Value) -> anyhow::Result<()> {
        let written = fs::write(&self.0, html(evaluation, parameters)?);
        if written.is_err() && self.0.is_file() {
            // What is wrong is told; that the rest stays, too, would be no news.
            let _ = fs::remove_file(&self.0);
        }
        written.with_context(|| format!("cannot write --report {}", self.0.display()))
    }
}

fn html(evaluation: &Evaluation, parameters: &Value) -> anyhow::Result<String> {
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
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("eval.html");
        Page::at(&path).unwrap().write(&evaluation(), &json!({"model": "<script>m</script>"})).unwrap();
        let html = fs::read_to_string(&path).unwrap();
        assert_eq!((html.matches("<svg").count(), html.matches("</svg>").count()), (8, 8));
        for told in ["Resident experts", "not served by this version", "50.0%", "&lt;script&gt;"] {
            assert!(html.contains(told), "{told}");
        }
        let links = html.replace("http://www.w3.org/2000/svg", "");
        assert!(!links.contains("<script") && !links.contains("http") && !links.contains("src="), "{links}");
    }

    #[test]
    fn a_place_that_cannot_be_written_is_refused_at_once() {
        // Would break: an hour's evaluation ends without its page, or an earlier page is lost when one is interrupted.
        for path in ["/no/such/directory/eval.html", "/"] {
            let Err(error) = Page::at(Path::new(path)) else { panic!("{path} is taken") };
            assert!(error.to_string().contains(&format!("--report {path}")), "{error}");
        }
        let earlier = tempfile::NamedTempFile::new().unwrap();
        fs::write(earlier.path(), "earlier").unwrap();
        Page::at(earlier.path()).unwrap();
        assert_eq!(fs::read_to_string(earlier.path()).unwrap(), "earlier");
    }
}
