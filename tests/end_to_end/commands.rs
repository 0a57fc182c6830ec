//! Commands that run and end, and what they say when they cannot.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use sida_tests::binary::{command, repository};

/// Exit code of a bad configuration: EX_USAGE.
const USAGE: i32 = 64;
/// Texts, one per line.
const TEXTS: &str = "tests/data/sentences.txt";

fn run(arguments: &[&str]) -> Output {
    command().args(arguments).current_dir(repository()).output().expect("sida runs")
}

/// The first command of the README would not answer.
#[test]
fn ask_answers() {
    let output = run(&["ask", "sst2 sentence: a gorgeous , witty , seductive movie ."]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.lines().next(), Some("positive"), "{text}");
}

/// Answers would have another length than the model's files say.
#[test]
fn what_is_not_asked_for_is_as_the_model_says() {
    let model = tempfile::tempdir().expect("a directory");
    for file in fs::read_dir(repository().join("models/switch-tiny-64")).expect("the model") {
        let file = file.expect("a file");
        std::os::unix::fs::symlink(file.path(), model.path().join(file.file_name())).expect("a link");
    }
    fs::remove_file(model.path().join("generation_config.json")).expect("a link");
    let lengths = r#"{"max_new_tokens": 9, "min_new_tokens": 7}"#;
    fs::write(model.path().join("generation_config.json"), lengths).expect("written");
    let generated = |more: &[&str]| {
        let mut line = vec!["ask", "--json", "--model", model.path().to_str().expect("a path")];
        line.extend(more.iter().chain(&["sst2 sentence: flat and dull ."]));
        let output = run(&line);
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        answer["generated_tokens"].as_u64().expect("a number")
    };
    assert!((8..=9).contains(&generated(&[])), "the end of sequence comes after the least length");
    assert_eq!(generated(&["--ignore-eos"]), 9);
    assert!(generated(&["--min-tokens", "0"]) < 7);
    assert_eq!(generated(&["--ignore-eos", "--max-tokens", "12"]), 12);
}

/// Who asked for predicted experts would take the trained router's answer for theirs.
#[test]
fn an_answer_without_a_hash_table_is_told_apart() {
    let asked = |more: &[&str]| run(&[&["ask", "--predictor", "off"], more, &["x"]].concat());
    for mode in ["guided", "hash"] {
        let output = asked(&["--mode", mode]);
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("the trained router chose experts"), "{mode}");
    }
    assert!(asked(&[]).stderr.is_empty());
}

/// A watch would end with the first restart of what it watches, or send its reader to look for certificates.
#[test]
fn a_watch_goes_on_after_a_failure() {
    let nobody = "127.0.0.1:1";
    for (more, begin) in [(&[][..], "127.0.0.1:1 does not answer"), (&["--json"], "{\"error\":\"127.0.0.1:1 does not")]
    {
        let mut command = command();
        command.args(["status", "--watch", "--interval", "50ms", "--endpoint", nobody]).args(more);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("sida runs");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let lines: Vec<String> = output.lines().take(3).map(|line| line.expect("text")).collect();
        child.kill().expect("it runs still");
        child.wait().expect("it ends");
        assert!(lines.len() == 3 && lines.iter().all(|line| line.starts_with(begin)), "{lines:?}");
    }
    let output = run(&["ask", "--endpoint", nobody, "x"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(said, "sida: cannot connect to 127.0.0.1:1: Connection refused (os error 111)\n");
    let output = run(&["bench", "--url", "http://127.0.0.1:1/v1"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(1)
            && said.starts_with("sida: cannot connect to http://127.0.0.1:1/v1: ")
            && said.contains("refused"),
        "{said}"
    );
}

/// A model would be called by where somebody stands.
#[test]
fn inspect_names_the_whole_directory() {
    let model = repository().join("models/switch-tiny-64");
    let mut command = command();
    let output = command.args(["inspect", "."]).current_dir(&model).output().expect("sida runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("/models/switch-tiny-64"), "{said}");
}

/// Scripts could not read an answer.
#[test]
fn ask_answers_in_json() {
    let text = "sst2 sentence: flat and dull .";
    let output = run(&["ask", "--json", "--min-tokens", "12", "--ignore-eos", "--max-tokens", "12", text]);
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(output.status.success(), "{answer}");
    let ids = answer["token_ids"].as_array().expect("token ids");
    assert!(ids.len() == 12 && ids.iter().all(Value::is_u64), "{answer}");
    assert_eq!(answer["generated_tokens"], 12);
    // Made by the answer as a server gives it: the same tokens.
    let golden: Value = serde_json::from_slice(&run(&["ask", "--json", text]).stdout).expect("JSON");
    let short = golden["token_ids"].as_array().expect("token ids");
    assert_eq!(&ids[..short.len() - 1], &short[..short.len() - 1], "but for the end, which is put off");
}

/// A script would have to cut the answer out of a report, or could not ask what it reads.
#[test]
fn a_pipe_carries_the_text_and_the_answer_alone() {
    let mut command = command();
    command.args(["ask", "-"]).current_dir(repository()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("sida runs");
    let mut input = child.stdin.take().expect("piped");
    input.write_all(b"sst2 sentence: a gorgeous , witty , seductive movie .\n").expect("it reads");
    drop(input);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "positive\n");
}

/// A completion would be offered for commands that do not exist, or none.
#[test]
fn completions_know_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(run(&["completions", shell]).stdout).expect("text");
        for name in ["ask", "train-predictor", "expert-memory", "model-name"] {
            assert!(script.contains(name), "{shell}: {name}");
        }
    }
}

/// A script could not tell what is missing.
#[test]
fn doctor_tells_in_json() {
    let output = run(&["doctor", "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(found["works"], output.status.success(), "{found}");
    assert!(found["findings"].as_array().is_some_and(|findings| findings.len() > 4), "{found}");
}

/// An empty variable would be an error that does not name it, and a misspelt one be taken for the default.
#[test]
fn the_environment_is_read_as_it_is_meant() {
    let asked = |name: &str, value: &str| {
        let mut command = command();
        command.args(["ask", "a text"]).env(name, value).current_dir(repository()).output().expect("sida runs")
    };
    for (name, value) in [("SIDA_SEED", ""), ("SIDA_EXPERT_MEMORY", ""), ("SIDA_CONFIG", ""), ("SIDA_JSON", "0")] {
        let output = asked(name, value);
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(!output.stdout.starts_with(b"{") && output.stderr.is_empty(), "{name}");
    }
    assert!(asked("SIDA_JSON", "yes").stdout.starts_with(b"{"));
    let misspelt = asked("SIDA_EXPERT_MEMROY", "25%");
    let said = String::from_utf8_lossy(&misspelt.stderr).into_owned();
    assert!(misspelt.status.success() && said.contains("SIDA_EXPERT_MEMORY meant"), "{said}");
    assert!(asked("SIDA_SERVICE_HOST", "10.0.0.1").stderr.is_empty());
    assert!(asked("SIDA_PORT", "tcp://10.0.0.1:50051").stderr.is_empty());
    let port = asked("SIDA_PORT", "50052");
    assert!(String::from_utf8_lossy(&port.stderr).contains("SIDA_PORT"), "a person's port is not Kubernetes'");
}

/// Who gave the memory that a refusal asked for would be refused again.
#[test]
fn the_memory_that_a_refusal_names_is_enough() {
    for nodes in ["1", "2", "3"] {
        let asked = |memory: &str| run(&["ask", "--expert-nodes", nodes, "--expert-memory", memory, "a text"]);
        let refused = asked("1");
        assert_eq!(refused.status.code(), Some(USAGE));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        let (before, after) = said.split_once(" bytes (").expect("bytes and per cent");
        let bytes: u64 = before.rsplit(' ').next().and_then(|bytes| bytes.parse().ok()).expect("bytes");
        let (percent, _) = after.split_once(')').expect("per cent");
        for enough in [bytes.to_string(), percent.to_owned()] {
            let output = asked(&enough);
            assert!(output.status.success(), "{enough}: {}", String::from_utf8_lossy(&output.stderr));
        }
        let hundredths = (percent.trim_end_matches('%').parse::<f64>().expect("a number") * 100.0).round() as u64 - 1;
        for less in [(bytes - 1).to_string(), format!("{}.{:02}%", hundredths / 100, hundredths % 100)] {
            assert_eq!(asked(&less).status.code(), Some(USAGE), "{nodes} nodes take {less}");
        }
    }
}

/// A cluster would serve a model called "." or by a commit, and nobody could call it anything else.
#[test]
fn a_model_is_called_as_people_call_it() {
    let named = |dir: &Path, model: &str, more: &[&str]| {
        let mut command = command();
        let output =
            command.args(["ask", "--json", "--model", model]).args(more).arg("a text").current_dir(dir).output();
        let answer: Value = serde_json::from_slice(&output.expect("sida runs").stdout).expect("JSON");
        answer["model"].as_str().expect("a name").to_owned()
    };
    let model = repository().join("models/switch-tiny-64");
    assert_eq!(named(&model, ".", &[]), "switch-tiny-64");
    assert_eq!(named(&model, ".", &["--model-name", "sentiment"]), "sentiment");
    let hub = tempfile::tempdir().expect("a directory");
    let snapshots = hub.path().join("models--google--switch-tiny/snapshots");
    let snapshot = snapshots.join("92fe2d22b024d9937146fe097ba3d3a7ba146e1b");
    fs::create_dir_all(&snapshot).expect("directories");
    for file in fs::read_dir(&model).expect("the model") {
        let file = file.expect("a file");
        std::os::unix::fs::symlink(file.path(), snapshot.join(file.file_name())).expect("a link");
    }
    assert_eq!(named(&snapshot, snapshot.to_str().expect("a path"), &[]), "google/switch-tiny");
}

/// A wrong configuration would start half a node, or end without saying what is wrong.
#[test]
fn bad_configurations_are_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let lonely = dir.path().join("lonely.toml");
    fs::write(&lonely, "[[coordinator]]\nname = \"c0\"\naddress = \"127.0.0.1:50999\"\n").expect("written");
    let lonely = lonely.to_str().expect("a path");
    let nowhere = dir.path().join("no/such/predictor.safetensors");
    let nowhere = nowhere.to_str().expect("a path");
    for (arguments, named) in [
        (&["ask", "--model", "no/such/model", "x"][..], "no/such/model"),
        (&["ask", "--expert-memory", "7", "x"], "expert-memory"),
        (&["ask", "--expert-memory", "many", "x"], "many"),
        (&["expert-node", "--static", "no/such/file", "--name", "e0"], "no/such/file"),
        (&["up", "--listen", "nowhere"], "nowhere"),
        (&["coordinator", "--static", lonely, "--name", "c0", "--metrics-listen", "off"], "expert-node"),
        (&["inspect", "tests/data/parity/refused-gated"], "gated-gelu"),
        (&["up", "--tls-cert", "no/such.pem", "--tls-key", "no/such.key", "--listen", "127.0.0.1:0"], "no/such.pem"),
        (&["ask", "--endpoint", "https://127.0.0.1:1", "--tls-ca", "no/such.pem", "x"], "no/such.pem"),
        (&["ask", "--endpoint", "https://127.0.0.1:1", "--tls-ca", TEXTS, "x"], "holds no certificate"),
        (&["ask", "--endpoint", ":1", "x"], "host:port"),
        (&["bench", "--file", "no/such.txt"], "no/such.txt"),
        (&["bench", "--duration", "0s"], "--duration"),
        (&["bench", "--requests", "0"], "--requests"),
        (&["bench", "--rate", "nan"], "\"nan\" is no rate"),
        (&["bench", "--url", "localhost:8000"], "expected http://HOST:PORT/v1"),
        (&["bench", "--url", "http://localhost:1", "--api-key", "two words"], "API key"),
        (&["bench", "--method", "chat"], "--method chat needs --url"),
        (&["bench", "--report", "no/such/report.html"], "no/such/report.html"),
        (&["train-predictor", "--file", TEXTS, "--predicted", "0", "--out", nowhere], "--predicted"),
        (&["train-predictor", "--file", TEXTS, "--out", nowhere], nowhere),
        (&["ask", "--threads", "100000", "x"], "--threads"),
        (&["ask", "--top-p", "1.5", "x"], "top_p"),
        (&["ask", "--max-tokens", "-1", "x"], "'-1' for '--max-tokens <N>': expected a whole number"),
        (&["ask", "--temperature", "-1", "x"], "temperature is -1"),
        (&["ask", "--expert-memory", "-1GiB", "x"], "\"-1GiB\" is not an amount of memory"),
        (
            &["ask", "--min-tokens", "7", "--max-tokens", "5", "x"],
            "min_tokens is 7, expected at most max_tokens, which is 5",
        ),
        (&["up", "--prompt-tokens-max", "0"], "1 or more"),
        (&["up", "--request-timeout", "0s"], "--request-timeout"),
        (&["up", "--cache-memory", "1KiB"], "--cache-memory"),
        (&["ask", "--endpoint", "http://127.0.0.1:1", "--model", "m", "x"], "--model"),
        (&["up", "--config", "no/such.toml"], "no/such.toml"),
    ] {
        let output = run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(USAGE), "{arguments:?}: {said}");
        assert!(said.contains(named), "{arguments:?}: {said}");
        assert!(!said.contains("panicked"), "{arguments:?}: {said}");
    }
}

/// A node would say that it serves metrics, or take its ports, before it says that it does not start; or load a model for minutes
/// before it looks at a file that was named to it.
#[test]
fn what_is_said_to_a_node_is_checked_before_anything_starts() {
    let roles = [
        (&["up", "--expert-nodes", "0"][..], "--expert-nodes is 0"),
        (&["up", "--predictor", "no/such.safetensors"], "no/such.safetensors"),
        (&["up", "--tls-cert", "no/such.pem", "--tls-key", "no/such.key"], "no/such.pem"),
        (
            &["coordinator", "--static", "docs/cluster.toml", "--name", "coordinator-0", "--predictor", "no/such"],
            "no/such",
        ),
        (&["coordinator", "--etcd", "127.0.0.1:1", "--name", "c", "--listen", "0.0.0.0:0"], "--advertise"),
        (&["expert-node", "--etcd", "127.0.0.1:1", "--name", "e", "--listen", "0.0.0.0:0"], "--advertise"),
        (&["predictor-node", "--etcd", "127.0.0.1:1", "--name", "p", "--listen", "0.0.0.0:0"], "--advertise"),
        (
            &["predictor-node", "--static", "docs/cluster.toml", "--name", "predictor-0", "--learn-dir", "x"],
            "--learn-dir",
        ),
    ];
    for (arguments, named) in roles {
        let mut sida = command();
        sida.args(arguments).args(["--metrics-listen", "127.0.0.1:0", "--log", "info"]).current_dir(repository());
        if !arguments.contains(&"--listen") {
            sida.args(["--listen", "127.0.0.1:0"]);
        }
        let output = sida.output().expect("sida runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(USAGE), "{arguments:?}: {said}");
        assert!(said.contains(named) && !said.contains("metrics on"), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

/// A model that is not finished would stay under a hidden name, gigabytes of it, whenever somebody ends the command.
#[test]
fn a_model_that_is_not_finished_leaves_nothing() {
    for (signal, place) in [("INT", "a"), ("TERM", "b")] {
        let dir = tempfile::tempdir().expect("a directory");
        let out = dir.path().join(place);
        let mut synth = command();
        // Many gigabytes, of which hardly any are written.
        synth.args(["synth", "--like", "qwen3-30b-a3b", "--out", out.to_str().expect("a path")]);
        let mut child = synth.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("sida runs");
        let entries = || fs::read_dir(dir.path()).expect("a directory").count();
        while entries() == 0 {
            assert!(child.try_wait().expect("a child").is_none(), "it ends by itself");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let sent = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
        assert_eq!(child.wait().expect("it ends").code(), Some(130), "{signal}");
        assert_eq!(entries(), 0, "{signal}");
    }
}

/// A benchmark that is killed would leave expert-nodes behind, which hold memory for ever.
#[test]
fn expert_nodes_of_a_benchmark_end_with_it() {
    const PATIENCE: Duration = Duration::from_secs(60);
    let mut bench = command();
    bench.arg("bench").arg("--model").arg(repository().join("models/switch-tiny-64"));
    bench.args(["--processes", "2", "--duration", "120s"]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut bench = bench.spawn().expect("sida runs");
    let started = format!("/proc/{0}/task/{0}/children", bench.id());
    let (mut nodes, begun) = (Vec::new(), Instant::now());
    while nodes.len() < 2 && begun.elapsed() < PATIENCE {
        let listed = fs::read_to_string(&started).expect("its children");
        nodes = listed.split_whitespace().map(str::to_owned).collect();
    }
    bench.kill().expect("killed");
    bench.wait().expect("its end");
    assert_eq!(nodes.len(), 2, "it starts two");
    // Who has ended may be there until somebody has looked.
    let runs = |node: &String| {
        fs::read_to_string(format!("/proc/{node}/status")).is_ok_and(|status| !status.contains("State:\tZ"))
    };
    while nodes.iter().any(runs) {
        assert!(begun.elapsed() < 2 * PATIENCE, "expert-nodes run on");
    }
}
