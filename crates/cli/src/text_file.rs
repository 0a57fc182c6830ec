//! Reads a file of texts, one per line. Used by `bench` and `train-predictor`.

use std::{fs::File, io::Read, path::Path};

use crate::bad_configuration::BadConfiguration;

/// A file beyond this is refused: it would not fit beside the model.
const BYTES_MAX: u64 = 1 << 30;

/// The whole file.
pub(crate) fn read(file: &Path) -> Result<String, BadConfiguration> {
    let shown = file.display();
    let unreadable = |error| BadConfiguration::because(format!("cannot read texts {shown}"), error);
    let mut content = String::new();
    let opened = File::open(file).map_err(unreadable)?;
    opened.take(BYTES_MAX + 1).read_to_string(&mut content).map_err(unreadable)?;
    if content.len() as u64 > BYTES_MAX {
        return Err(BadConfiguration::new(format!("texts {shown} have more than {BYTES_MAX} bytes")));
    }
    Ok(content)
}

/// The lines of a file that are not blank. There must be at least one.
pub(crate) fn lines(file: &Path) -> Result<Vec<String>, BadConfiguration> {
    let content = read(file)?;
    let lines = content.lines().map(str::trim_end).filter(|line| !line.is_empty());
    let lines: Vec<String> = lines.map(str::to_owned).collect();
    if lines.is_empty() {
        return Err(BadConfiguration::new(format!("texts {}: every line is blank", file.display())));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn texts_are_lines() {
        // Broken: blank lines would be sent and refused as empty texts, or a file of nothing would divide by zero.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("texts.txt");
        fs::write(&file, "one\r\n\n two\n").unwrap();
        assert_eq!(lines(&file).unwrap(), ["one", " two"]);
        fs::write(&file, "\n\n").unwrap();
        assert!(lines(&file).unwrap_err().to_string().contains("blank"));
        assert!(lines(&dir.path().join("absent")).unwrap_err().to_string().contains("absent"));
    }
}
