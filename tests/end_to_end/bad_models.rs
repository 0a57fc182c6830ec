//! Files of a model that are not what they should be: each command that reads one says which file it is and what was
//! found, and ends with the exit code that tells whoever starts processes not to try again.

use std::{fs, os::unix::fs::symlink, path::Path};

use serde_json::{Value, json};

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
fn refused(arguments: &[&str], model: &Path, named: &[&str]) -> String {
    let output =
        command().args(arguments).env("SIDA_MODEL", model).current_dir(repository()).output().expect("it runs");
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert_eq!(output.status.code(), Some(USAGE), "{arguments:?}: {said}");
    for named in named {
        assert!(said.contains(named), "{arguments:?} does not say {named:?}: {said}");
    }
    said
}

/// An operator would be told of a header of two exabytes, or that no value is at line 1; and a node that can never start
/// would be started for ever.
#[test]
fn what_took_a_files_place_is_named() {
    for (file, commands) in [
        ("config.json", &[&["inspect"][..], &["doctor"], &["ask", "x"]][..]),
        ("model.safetensors.index.json", &[&["inspect"][..], &["doctor"], &["ask", "x"]]),
        (
            "model-00002-of-00002.safetensors",
            &[&["inspect"][..], &["doctor"], &["ask", "x"], &["verify", "--write-manifest"]],
        ),
        (
            "tokenizer.json",
            &[
                &["inspect"][..],
                &["doctor"],
                &["ask", "x"],
                &["up", "--listen", "127.0.0.1:0", "--metrics-listen", "off"],
            ],
        ),
        ("sida.manifest.json", &[&["inspect"][..], &["doctor"], &["verify"], &["ask", "x"]]),
        ("predictor.safetensors", &[&["inspect"][..], &["doctor"], &["ask", "x"]]),
        ("generation_config.json", &[&["inspect"][..], &["doctor"], &["ask", "x"]]),
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
    let flipped = flipped(weights);
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

/// A node could not load what it needs, and whoever started the command would start it again and again.
#[test]
fn damaged_experts_that_are_used_end_with_the_code_of_a_bad_file() {
    let model = model_with("README.md", b"");
    let written = command().args(["verify", "--write-manifest"]).env("SIDA_MODEL", model.path()).output();
    assert!(written.expect("it runs").status.success());
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        let file = model.path().join(shard);
        let mut weights = fs::read(&file).expect("weights");
        let header = u64::from_le_bytes(*weights.first_chunk().expect("a length")) as usize;
        let tensors: Value = serde_json::from_slice(&weights[8..8 + header]).expect("a header");
        for (name, tensor) in tensors.as_object().expect("tensors") {
            if name.contains(".mlp.experts.") {
                let begin = tensor["data_offsets"][0].as_u64().expect("an offset") as usize;
                weights[8 + header + begin] ^= 1;
            }
        }
        fs::remove_file(&file).expect("a link");
        fs::write(&file, weights).expect("written");
    }
    for command in [&["ask", "x"][..], &["ask", "--json", "x"], &["bench", "--requests", "1", "--warmup", "1"]] {
        let said = refused(command, model.path(), &[".mlp.experts.", "damaged"]);
        // What is loaded in the background is told of in the log, by one line for each node.
        let (warned, errors): (Vec<&str>, Vec<&str>) = said.lines().partition(|line| line.contains(" WARN "));
        assert!(errors.len() == 1 && warned.len() <= 2, "{said}");
    }
}

/// A model would be called whole that refuses every conversation.
#[test]
fn a_chat_template_that_cannot_be_parsed_is_told() {
    let model = model_with("chat_template.jinja", b"{% if %}");
    refused(&["doctor"], model.path(), &["!! chat ", "chat_template.jinja"]);
    refused(&["inspect"], model.path(), &["unusable", "chat_template.jinja"]);
}

/// A script would go on with a model that can be asked nothing.
#[test]
fn a_model_without_a_tokenizer_is_not_usable() {
    let model = model_with("tokenizer.json", b"");
    fs::remove_file(model.path().join("tokenizer.json")).expect("removed");
    refused(&["doctor"], model.path(), &["no tokenizer.json"]);
    refused(&["inspect"], model.path(), &["texts cannot be read"]);
}

/// Somebody would train a predictor anew because of a typo in config.json.
#[test]
fn a_wrong_config_is_not_blamed_on_the_predictor() {
    let with = |field: &str, value: Value| {
        let config = fs::read(repository().join("models/switch-tiny-64/config.json")).expect("config.json");
        let mut config: Value = serde_json::from_slice(&config).expect("JSON");
        config[field] = value;
        model_with("config.json", config.to_string().as_bytes())
    };
    for (field, value) in [("num_heads", json!(8)), ("vocab_size", json!(9000)), ("num_experts", json!(65))] {
        let model = with(field, value);
        for command in [&["ask", "x"][..], &["doctor"], &["inspect"]] {
            refused(command, model.path(), &["tensor "]);
        }
        let said = refused(&["ask", "x"], model.path(), &[]);
        assert!(!said.contains("predict"), "{field}: {said}");
    }
    let model = with("layer_norm_epsilon", json!(0.5));
    for command in [&["ask", "x"][..], &["doctor"], &["inspect"]] {
        let said = refused(command, model.path(), &["predictor.safetensors", "config.json"]);
        assert_eq!(said.matches("predictor.safetensors").count(), 1, "{said}");
    }
}

/// The model that ships with its manifest, and these weights in the place of its first shard with the last bit of them changed.
fn flipped(mut weights: Vec<u8>) -> TempDir {
    let whole = model_with("README.md", b"");
    let output = command().args(["verify", "--write-manifest"]).env("SIDA_MODEL", whole.path()).output();
    assert!(output.expect("it runs").status.success());
    let manifest = fs::read(whole.path().join("sida.manifest.json")).expect("a manifest");
    *weights.last_mut().expect("bytes") ^= 1;
    let model = model_with("model-00001-of-00002.safetensors", &weights);
    fs::write(model.path().join("sida.manifest.json"), manifest).expect("written");
    model
}
