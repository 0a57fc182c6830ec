//! `sida convert` beside another one that writes the same place.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use sida_tests::binary::{command, repository};

/// Two conversions into one place would both take their time, and one of them in vain; who ends one would not be told whether
/// gigabytes are left behind, or they would be.
#[test]
fn a_conversion_has_its_place_to_itself_and_leaves_nothing_when_it_is_ended() {
    let place = Place::new();
    let first = place.begun();
    let second = place.convert().output().expect("sida runs");
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("out is being written already") && second.status.code() == Some(1), "{said}");

    terminate(&first);
    let first = first.wait_with_output().expect("its end");
    let said = String::from_utf8_lossy(&first.stderr);
    assert!(said.contains("told to end; nothing is left") && first.status.code() == Some(130), "{said}");
    assert!(place.hidden().is_empty() && !place.out().exists(), "{:?}", place.hidden());
}

/// An init container would fail and be started again for as long as that of another replica converts the model that both want; or
/// would wait for ever, or go on without a model, where that one is ended.
#[test]
fn a_conversion_if_missing_waits_for_another() {
    for first_ends in [false, true] {
        let place = Place::new();
        // An empty directory is no model.
        fs::create_dir(place.out()).expect("a directory");
        let first = place.begun();
        let mut waiting = place.convert().arg("--if-missing").spawn().expect("sida runs");
        let (mut stderr, mut said) = (BufReader::new(waiting.stderr.take().expect("piped")), String::new());
        stderr.read_line(&mut said).expect("a line");
        assert!(said.starts_with("sida: waiting for another process, which writes "), "{said}");
        if first_ends {
            terminate(&first);
            assert_eq!(first.wait_with_output().expect("its end").status.code(), Some(130));
        } else {
            signal(&first, "CONT");
            assert!(first.wait_with_output().expect("its end").status.success());
        }
        let waited = waiting.wait_with_output().expect("its end");
        let said = String::from_utf8_lossy(&waited.stdout);
        assert!(waited.status.success() && said.contains("is there already") != first_ends, "{said}");
        assert!(place.hidden().is_empty() && place.out().join("sida.manifest.json").exists(), "{:?}", place.hidden());
    }
}

/// An init container would go on without a model where something else is in its place.
#[test]
fn what_is_no_model_is_not_taken_for_one() {
    let place = Place::new();
    fs::write(place.out(), "").expect("a file");
    for there in ["a file", "a directory with something else"] {
        let said = place.convert().arg("--if-missing").output().expect("sida runs");
        assert_eq!(said.status.code(), Some(64), "{there}: {}", String::from_utf8_lossy(&said.stderr));
        let _ = fs::remove_file(place.out());
        fs::create_dir_all(place.out()).expect("a directory");
        fs::write(place.out().join("notes"), "").expect("a file");
    }
}

/// Where a conversion is held up while it writes.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a directory"));
        fs::create_dir(place.source()).expect("a directory");
        for file in fs::read_dir(repository().join("models/switch-mini-8")).expect("the model") {
            let file = file.expect("a file");
            std::os::unix::fs::symlink(file.path(), place.source().join(file.file_name())).expect("a link");
        }
        place
    }

    fn source(&self) -> PathBuf {
        self.0.path().join("source")
    }

    fn out(&self) -> PathBuf {
        self.0.path().join("out")
    }

    fn convert(&self) -> Command {
        let mut convert = command();
        convert.args(["convert", "--experts", "int8", "--out"]).arg(self.out()).arg(self.source());
        convert.stdout(Stdio::piped()).stderr(Stdio::piped());
        convert
    }

    /// A conversion that has its place, stopped while it writes. One that was quicker than we are is made once more.
    fn begun(&self) -> Child {
        let has_directory = self.out().exists();
        loop {
            let mut first = self.convert().spawn().expect("sida runs");
            while first.try_wait().expect("its state").is_none() {
                if self.is_written() {
                    signal(&first, "STOP");
                    while !is_stopped(&first) && first.try_wait().expect("its state").is_none() {}
                    if self.is_written() {
                        return first;
                    }
                    if first.try_wait().expect("its state").is_none() {
                        signal(&first, "CONT");
                    }
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            fs::remove_dir_all(self.out()).expect("a model");
            if has_directory {
                fs::create_dir(self.out()).expect("a directory");
            }
        }
    }

    fn is_written(&self) -> bool {
        self.hidden().iter().any(|name| name.ends_with(".partial"))
    }

    /// What is being written.
    fn hidden(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).expect("the directory");
        let names = entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(".out.")).collect()
    }
}

/// Has a process that is stopped end.
fn terminate(process: &Child) {
    signal(process, "TERM");
    signal(process, "CONT");
}

fn signal(process: &Child, name: &str) {
    let told = Command::new("kill").args(["-s", name, &process.id().to_string()]).status();
    assert!(told.expect("kill can be run").success());
}

fn is_stopped(process: &Child) -> bool {
    // Its state stands behind its name, which is in parentheses.
    let state = fs::read_to_string(format!("/proc/{}/stat", process.id())).expect("its state");
    state.rsplit(") ").next().is_some_and(|state| state.starts_with('T'))
}
