//! Files of a model that are not what they should be: each command that reads one says which file it is and what was
//! found, and ends with the exit code that tells whoever starts processes not to try again.

use std::{fs, os::unix::fs::symlink, path::Path};

use sida_tests::binary::{command, repository};
use tempfile::TempDir;

/// Exit code of a bad configuration: EX_USAGE.
const USAGE: i32 = 64;

const LFS_POINTER: &[u8] =
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0\nsize 13\n";
const HTML_PAGE: &[u8] = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n";

/// The model that comes with the source, with `content` for `file`.
fn model_with(file: &str, content: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for entry in fs::read_dir(repository().join("models/switch-tiny-64")).expect("the model") {
        let entry = entry.expect("a file");
        if entry.file_name() != file {
            symlink(entry.path(), dir.path().join(entry.file_name())).expect("a link");
        }
    }
    fs::write(dir.path().join(file), content).expect("written");
    dir
}

#[track_caller]
fn refused(arguments: &[&str], model: &Path, named: &[&str]) {
    let output =
        command().args(arguments).env("SIDA_MODEL", model).current_dir(repository()).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(USAGE), "{arguments:?}: {said}");
    for named in named {
        assert!(said.contains(named), "{arguments:?} does not say {named:?}: {said}");
    }
}

/// An operator would be told of a header of two exabytes, or that no value is at line 1; and a node that can never start
/// would be started for ever.
#[test]
fn what_took_a_files_place_is_named() {
    for (file, commands) in [
        ("config.json", &[&["inspect"][..], &["ask", "x"]][..]),
        ("model.safetensors.index.json", &[&["inspect"][..], &["ask", "x"]]),
        ("model-00002-of-00002.safetensors", &[&["inspect"][..], &["ask", "x"], &["verify", "--write-manifest"]]),
        ("tokenizer.json", &[&["ask", "x"][..], &["up", "--listen", "127.0.0.1:0", "--metrics-listen", "off"]]),
        ("sida.manifest.json", &[&["inspect"][..], &["verify"], &["ask", "x"]]),
        ("predictor.safetensors", &[&["ask", "x"][..]]),
    ] {
        for (content, named) in [(LFS_POINTER, "Git LFS pointer"), (HTML_PAGE, "HTML page"), (b"", "empty")] {
            let model = model_with(file, content);
            for command in commands {
                refused(command, model.path(), &[file, named]);
            }
        }
    }
}

/// A node whose files are damaged would be started again and again.
#[test]
fn damaged_models_end_with_the_code_of_a_bad_file() {
    let weights =
        fs::read(repository().join("models/switch-tiny-64/model-00001-of-00002.safetensors")).expect("weights");
    let truncated = model_with("model-00001-of-00002.safetensors", &weights[..weights.len() / 2]);
    refused(&["ask", "x"], truncated.path(), &["model-00001-of-00002.safetensors"]);
    let cluster = repository().join("docs/cluster.toml");
    let cluster = cluster.to_str().expect("a path");
    for (role, name) in
        [("expert-node", "experts-0"), ("predictor-node", "predictor-0"), ("coordinator", "coordinator-0")]
    {
        let role = [role, "--static", cluster, "--name", name, "--metrics-listen", "off"];
        refused(&role, truncated.path(), &["model-00001-of-00002.safetensors"]);
    }
    let flipped = {
        let mut weights = weights;
        let last = weights.len() - 1;
        weights[last] ^= 1;
        let whole = model_with("README.md", b"");
        let output = command().args(["verify", "--write-manifest"]).env("SIDA_MODEL", whole.path()).output();
        assert!(output.expect("it runs").status.success());
        let manifest = fs::read(whole.path().join("sida.manifest.json")).expect("a manifest");
        let model = model_with("model-00001-of-00002.safetensors", &weights);
        fs::write(model.path().join("sida.manifest.json"), manifest).expect("written");
        model
    };
    refused(&["verify"], flipped.path(), &["shared.weight", "damaged"]);
    let config = model_with("config.json", b"{\"architectures\": [\"T5\"]}");
    refused(&["inspect"], config.path(), &["config.json", "T5"]);
    let unconverted = tempfile::tempdir().expect("a directory");
    let out = unconverted.path().join("out");
    let source = unconverted.path().join("source");
    fs::create_dir(&source).expect("a directory");
    fs::copy(repository().join("models/switch-tiny-64/config.json"), source.join("config.json")).expect("copied");
    fs::write(source.join("pytorch_model.bin"), LFS_POINTER).expect("written");
    let paths = [source.to_str().expect("a path"), out.to_str().expect("a path")];
    refused(&["convert", paths[0], "--out", paths[1]], &source, &["pytorch_model.bin", "Git LFS pointer"]);
}
