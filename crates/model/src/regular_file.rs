//! Opens the files of a model. Only regular ones: a pipe would be waited for until somebody writes to it, a device may never end,
//! and what a directory or a socket answers does not say what it is.

use std::{
    fs::{self, File, FileType},
    os::unix::fs::FileTypeExt,
    path::Path,
};

use crate::ModelError;

/// Opens a file for reading.
pub(crate) fn open(path: &Path) -> Result<File, ModelError> {
    let failed = |source| ModelError::Read { path: path.to_owned(), source };
    // Looked at before it is opened, since opening a pipe waits already.
    let file_type = fs::metadata(path).map_err(failed)?.file_type();
    if !file_type.is_file() {
        return Err(ModelError::MistakenFile { path: path.to_owned(), expected: "a file", found: kind(file_type) });
    }
    File::open(path).map_err(failed)
}

/// What is in the place of a file.
fn kind(file_type: FileType) -> &'static str {
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a pipe"
    } else if file_type.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn what_is_no_file_is_refused_at_once() {
        // Would break: a command waits for ever for who writes to a pipe, or reads a device that has no end.
        let dir = tempfile::tempdir().unwrap();
        let [pipe, socket] = ["pipe", "socket"].map(|name| dir.path().join(name));
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let _listener = UnixListener::bind(&socket).unwrap();
        for (path, expected) in [
            (dir.path(), "a directory"),
            (&pipe, "a pipe"),
            (&socket, "a socket"),
            (Path::new("/dev/zero"), "a device"),
        ] {
            let error = open(path).unwrap_err();
            assert!(error.is_lasting());
            assert_eq!(error.to_string(), format!("{} is {expected}, expected a file", path.display()));
        }
    }
}
