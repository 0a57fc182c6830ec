//! Reads a file of text, under a limit. Used by `bench`, `eval` and `train-predictor`.

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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_cannot_be_read_is_named() {
        // Broken: a typo in a path would be told without the path, or a file that is no text be sent as one.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("texts.txt");
        fs::write(&file, "one\n").unwrap();
        assert_eq!(read(&file).unwrap(), "one\n");
        fs::write(&file, b"\xff\xfe").unwrap();
        assert!(read(&file).unwrap_err().to_string().contains("texts.txt"));
        assert!(read(&dir.path().join("absent")).unwrap_err().to_string().contains("absent"));
    }
}
