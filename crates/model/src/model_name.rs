//! What a model is called when nobody says: by its directory, wherever a path or a link to it leads; in the cache of the
//! Hugging Face hub, whose directories are called by commits, by the repository.

use std::{fs, path::Path};

/// The name of the model in `dir`.
pub(crate) fn of_directory(dir: &Path) -> String {
    // One that cannot be resolved cannot be opened either, and is called as it was given.
    named(&fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned()))
}

fn named(dir: &Path) -> String {
    let name = |dir: Option<&Path>| dir.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let snapshots = dir.parent();
    let repository = name(snapshots.and_then(Path::parent));
    let of_hub = repository.as_deref().and_then(|repository| repository.strip_prefix("models--"));
    match of_hub.filter(|_| name(snapshots).is_some_and(|name| name == "snapshots")) {
        // `models--org--name`, or `models--name` for the few without an organisation.
        Some(repository) => repository.replacen("--", "/", 1),
        None => name(Some(dir)).unwrap_or_else(|| dir.to_string_lossy().into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_called_as_people_call_it() {
        // Broken: dashboards and clients would see a dot or a commit where the model's name should be.
        for (dir, expected) in [
            ("/models/switch-base-8", "switch-base-8"),
            (
                "/hub/models--google--switch-base-8/snapshots/92fe2d22b024d9937146fe097ba3d3a7ba146e1b",
                "google/switch-base-8",
            ),
            ("/hub/models--org--a--b/snapshots/0", "org/a--b"),
            ("/hub/models--gpt2/snapshots/0", "gpt2"),
            ("/hub/models--org--name/other/0", "0"),
            ("/hub/snapshots/0", "0"),
            ("/", "/"),
        ] {
            assert_eq!(named(Path::new(dir)), expected, "{dir}");
        }
    }

    #[test]
    fn a_path_is_followed_first() {
        // Broken: `--model .` would serve a model called ".".
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("tiny");
        fs::create_dir(&dir).unwrap();
        assert_eq!(of_directory(&dir.join(".")), "tiny");
        assert_eq!(of_directory(&dir.join("../tiny")), "tiny");
        std::os::unix::fs::symlink(&dir, root.path().join("link")).unwrap();
        assert_eq!(of_directory(&root.path().join("link")), "tiny");
    }
}
