//! The file of `--report`, to which `bench` and `eval` write a page once they have measured.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::bad_configuration::{BadConfiguration, unwritable};

/// A file that a page will be written to.
pub(crate) struct ReportFile(PathBuf);

impl ReportFile {
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

    /// Writes the page. Where that fails, as on a full disk, half of it does not stay.
    pub(crate) fn write(&self, html: &str) -> anyhow::Result<()> {
        let written = fs::write(&self.0, html);
        if written.is_err() && self.0.is_file() {
            // What is wrong is told; that the rest stays, too, would be no news.
            let _ = fs::remove_file(&self.0);
        }
        written.with_context(|| format!("cannot write --report {}", self.0.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_cannot_be_written_is_refused_at_once() {
        // Would break: an hour's measurement ends without its page, or an earlier page is lost when one is interrupted.
        for path in ["/no/such/directory/report.html", "/"] {
            let Err(error) = ReportFile::at(Path::new(path)) else { panic!("{path} is taken") };
            assert!(error.to_string().contains(&format!("--report {path}")), "{error}");
        }
        let earlier = tempfile::NamedTempFile::new().unwrap();
        fs::write(earlier.path(), "earlier").unwrap();
        let report = ReportFile::at(earlier.path()).unwrap();
        assert_eq!(fs::read_to_string(earlier.path()).unwrap(), "earlier");
        report.write("later").unwrap();
        assert_eq!(fs::read_to_string(earlier.path()).unwrap(), "later");
    }
}
