//! Finds the model: the one that was named, or the small trained one that comes with the source. Called by
//! every command that needs a model.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use crate::bad_configuration::BadConfiguration;

/// The model that comes with the source, so that everything runs without a download.
const DEFAULT_MODEL: &str = "models/switch-tiny-64";

/// `named` if given, else the model that comes with the source: below the working directory, beside the
/// executable or one of the directories above it, or in the source tree this was built from.
pub(crate) fn find(named: Option<&Path>) -> Result<PathBuf, BadConfiguration> {
    match named {
        Some(dir) => check(dir),
        None => first_of(default_places()),
    }
}

/// The whole path of a model's directory, for a person who may have written `.`.
pub(crate) fn full_path(dir: &Path) -> PathBuf {
    fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned())
}

/// A directory with a config.json is taken for a model; what is wrong inside is found by who opens it.
fn check(dir: &Path) -> Result<PathBuf, BadConfiguration> {
    let shown = dir.display();
    if dir.is_file() {
        let found = if is_gguf(dir) { "a GGUF file" } else { "a file" };
        let hint =
            if is_gguf(dir) { format!("; `sida convert {shown} --out DIR` makes one of it") } else { String::new() };
        return Err(BadConfiguration::new(format!("model {shown}: {found}, expected a model's directory{hint}")));
    }
    if !dir.is_dir() {
        return Err(BadConfiguration::new(format!("model {shown}: no such directory")));
    }
    if !holds_model(dir) {
        let gguf = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| is_gguf(path))
            .min();
        let hint = gguf.map_or_else(String::new, |file| {
            format!("; `sida convert {} --out DIR` makes one of the GGUF file", file.display())
        });
        return Err(BadConfiguration::new(format!("model {shown}: holds no config.json, expected a checkpoint{hint}")));
    }
    Ok(dir.to_owned())
}

fn first_of(places: Vec<PathBuf>) -> Result<PathBuf, BadConfiguration> {
    if let Some(found) = places.iter().find(|place| holds_model(place)) {
        return Ok(found.clone());
    }
    let tried: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
    Err(BadConfiguration::new(format!(
        "no model: name one by --model DIR or SIDA_MODEL; {DEFAULT_MODEL} was looked for at {}",
        tried.join(", ")
    )))
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

fn holds_model(dir: &Path) -> bool {
    dir.join("config.json").is_file()
}

fn default_places() -> Vec<PathBuf> {
    let mut places = vec![PathBuf::from(DEFAULT_MODEL)];
    if let Ok(executable) = env::current_exe() {
        places.extend(executable.ancestors().skip(1).take(4).map(|above| above.join(DEFAULT_MODEL)));
    }
    // crates/cli -> the source tree
    places.extend(Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map(|tree| tree.join(DEFAULT_MODEL)));
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_model_must_be_one() {
        // Broken: a mistyped --model would silently serve the default model, or fail without naming the directory.
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("absent");
        assert!(find(Some(&missing)).unwrap_err().to_string().contains("absent: no such directory"));
        assert!(find(Some(dir.path())).unwrap_err().to_string().contains("holds no config.json"));
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(find(Some(dir.path())).unwrap(), dir.path());
    }

    #[test]
    fn who_names_a_gguf_file_is_told_what_to_run() {
        // Broken: a person who has a GGUF file, as most who run such models at home, would read that there is no directory.
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model-Q4_K_M.gguf");
        fs::write(&file, "GGUF").unwrap();
        for named in [dir.path(), &file] {
            let error = find(Some(named)).unwrap_err().to_string();
            assert!(error.contains(&format!("`sida convert {} --out DIR`", file.display())), "{error}");
        }
        let other = dir.path().join("notes");
        fs::write(&other, "").unwrap();
        assert!(find(Some(&other)).unwrap_err().to_string().ends_with("a file, expected a model's directory"));
    }

    #[test]
    fn the_error_says_where_it_looked() {
        // Broken: a binary that was copied elsewhere would fail without saying how to name a model.
        let dir = tempfile::tempdir().unwrap();
        let error = first_of(vec![dir.path().join("a"), dir.path().join("b")]).unwrap_err().to_string();
        assert!(error.contains("--model DIR or SIDA_MODEL") && error.contains("/b"), "{error}");
    }

    #[test]
    fn the_default_model_is_found() {
        // Broken: the README's first command would ask for a model.
        assert!(find(None).is_ok());
    }
}
