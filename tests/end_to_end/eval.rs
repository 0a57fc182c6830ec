//! `sida eval`: its figures are those of the answers that a cluster gives to whoever asks it, counted here by hand.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::Output,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sida_proto::v1::{self, inference_client::InferenceClient};
use sida_tests::{
    Sandbox, SandboxConfig,
    binary::{command, repository},
};
use tokio::time::sleep;

/// Exit code of a bad configuration: EX_USAGE.
const USAGE: i32 = 64;
/// Two matrices of 128 x 128 in bf16.
const EXPERT_BYTES: u64 = 2 * 128 * 128 * 2;
/// MoE layers of each stack, and experts of each, of the model that ships.
const STACK_LAYERS: usize = 3;
const EXPERTS: u64 = 64;

const CHOICES: [&str; 2] = ["negative", "positive"];
/// Sentences, and which of the choices is said to be right.
const SENTENCES: [(&str, usize); 4] = [
    ("a gorgeous , witty , seductive movie .", 1),
    ("flat , dull and much too long", 0),
    ("a bad movie", 1),
    ("the kind of film that one sees twice .", 1),
];
const SPANS: [(&str, &str); 2] = [
    ("The river runs <extra_id_0> the town .", "<extra_id_0> through"),
    ("<extra_id_0> are made of wood and <extra_id_1>", "<extra_id_0> Houses <extra_id_1> of stone"),
];

fn eval(arguments: &[&str]) -> Output {
    command().arg("eval").args(arguments).current_dir(repository()).output().expect("sida runs")
}

/// What is said to be wrong, by a command that ends as one does that will not work next time either.
#[track_caller]
fn refused(arguments: &[&str]) -> String {
    let output = eval(arguments);
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert_eq!(output.status.code(), Some(USAGE), "{arguments:?}: {said}");
    said
}

/// The answers to all examples in one mode, by gRPC. In `exact` not every request is predicted where nodes gain nothing by it, but
/// whoever asks seldom is: asked for again, an answer is the same.
async fn scores(sandbox: &Sandbox, mode: v1::RoutingMode, alpha: v1::AlphaSource) -> Vec<v1::ScoreResponse> {
    let sentences = SENTENCES.map(|(text, _)| (format!("sst2 sentence: {text}"), CHOICES.map(str::to_owned).to_vec()));
    let spans = SPANS.map(|(text, target)| (text.to_owned(), vec![target.to_owned()]));
    let mut answers = Vec::new();
    for (text, targets) in sentences.into_iter().chain(spans) {
        let routing = Some(v1::RoutingOptions { mode: mode.into(), alpha: alpha.into() });
        let request = v1::ScoreRequest { text, targets, routing, ..Default::default() };
        let asked = Instant::now();
        let answer = loop {
            let answer = InferenceClient::new(sandbox.channel()).score(request.clone()).await.expect("scored");
            if !answer.get_ref().trace.as_ref().expect("a trace").unpredicted {
                break answer.into_inner();
            }
            assert!(asked.elapsed() < Duration::from_secs(60), "it is never predicted");
            sleep(Duration::from_millis(100)).await;
        };
        answers.push(answer);
    }
    answers
}

/// Which of the two choices is the likelier.
fn choice(answer: &v1::ScoreResponse) -> usize {
    usize::from(answer.scores[1].log_likelihood > answer.scores[0].log_likelihood)
}

fn trace(answer: &v1::ScoreResponse) -> &v1::Trace {
    answer.trace.as_ref().expect("a trace")
}

/// Bytes of the experts that each two examples need together, of both stacks, on average and at most.
fn needed_by_two(answers: &[v1::ScoreResponse]) -> (f64, u64) {
    let batches = answers.chunks_exact(2).map(|batch| {
        let layers = batch.iter().flat_map(|answer| &trace(answer).layers);
        let experts = layers.flat_map(|layer| layer.experts.iter().map(|&expert| (layer.layer, expert)));
        experts.collect::<BTreeSet<_>>().len() as u64 * EXPERT_BYTES
    });
    let batches: Vec<u64> = batches.collect();
    (batches.iter().sum::<u64>() as f64 / batches.len() as f64, *batches.iter().max().expect("a batch"))
}

/// The one of some rows in which these fields are so.
#[track_caller]
fn row<'r>(rows: &'r Value, fields: &Value) -> &'r Value {
    let is_so = |row: &&Value| fields.as_object().expect("fields").iter().all(|(name, value)| row[name] == *value);
    rows.as_array().expect("rows").iter().find(is_so).unwrap_or_else(|| panic!("no {fields} in {rows}"))
}

/// A researcher would publish figures that are not those of the answers which the model gives.
#[tokio::test(flavor = "multi_thread")]
async fn figures_are_those_of_the_answers() {
    let directory = tempfile::tempdir().expect("a directory");
    let (data, page) = (directory.path().join("data.jsonl"), directory.path().join("page.html"));
    let sentences = SENTENCES.map(|(text, label)| json!({"sentence": text, "label": label}));
    let lines = sentences.map(|line| {
        let text = format!("sst2 sentence: {}", line["sentence"].as_str().expect("a text"));
        json!({"text": text, "choices": CHOICES, "label": line["label"]}).to_string()
    });
    let spans = SPANS.map(|(text, target)| json!({"text": text, "target": target}).to_string());
    fs::write(&data, lines.into_iter().chain(spans).collect::<Vec<_>>().join("\n")).expect("written");
    let flags = ["--batches", "2", "--budgets", "100%,10%", "--json"];
    let files = ["--data", data.to_str().expect("a path"), "--report", page.to_str().expect("a path")];
    let output = eval(&[&files[..], &flags].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");

    let sandbox = Sandbox::start(SandboxConfig::default()).await;
    let exact = scores(&sandbox, v1::RoutingMode::Exact, v1::AlphaSource::Unspecified).await;
    for (name, mode, alpha) in [
        ("exact", v1::RoutingMode::Exact, v1::AlphaSource::Unspecified),
        ("hash, router's alpha", v1::RoutingMode::Hash, v1::AlphaSource::Router),
        ("hash, predicted alpha", v1::RoutingMode::Hash, v1::AlphaSource::Predicted),
    ] {
        let answers = scores(&sandbox, mode, alpha).await;
        let figures = row(&found["modes"], &json!({"mode": name}));
        let asked = SENTENCES.len();
        let right = answers.iter().zip(SENTENCES).filter(|(answer, (_, label))| choice(answer) == *label).count();
        let unchanged = answers[..asked].iter().zip(&exact).filter(|(own, exact)| choice(own) == choice(exact)).count();
        let share = |count: usize| count as f64 / asked as f64;
        let expected = json!({"examples": asked, "accuracy": share(right), "unchanged": share(unchanged)});
        assert_eq!(figures["choices"], expected, "{name}");
        let targets: Vec<_> = answers[asked..].iter().map(|answer| &answer.scores[0]).collect();
        let tokens = targets.iter().map(|score| score.tokens).sum::<u32>();
        let log_likelihood = targets.iter().map(|score| f64::from(score.log_likelihood)).sum::<f64>();
        let perplexity = (-log_likelihood / f64::from(tokens)).exp();
        assert_eq!(figures["target"]["tokens"], tokens, "{name}");
        let told = figures["target"]["perplexity"].as_f64().expect("a number");
        assert!((told - perplexity).abs() < 1e-9 * perplexity, "{name}: {told}, expected {perplexity}");
        let (mean, peak) = needed_by_two(&answers);
        let needed = row(&figures["memory"], &json!({"layers": "all", "batch": 2, "depth": 0}));
        assert_eq!((&needed["resident_bytes"], &needed["resident_bytes_peak"]), (&json!(mean), &json!(peak)), "{name}");
        assert_eq!(needed["all_bytes"], 2 * STACK_LAYERS as u64 * EXPERTS * EXPERT_BYTES);
    }
    let sum = |of: fn(&v1::Trace) -> u64| exact.iter().map(|answer| of(trace(answer))).sum::<u64>();
    let (hits, top1_hits, misses) = (sum(|t| t.hash_hits), sum(|t| t.hash_top1_hits), sum(|t| t.hash_misses));
    let figures = row(&found["modes"], &json!({"mode": "exact"}));
    let rate = row(&figures["hit_rates"], &json!({"stack": "all"}));
    let share = |count: u64| count as f64 / (hits + misses) as f64;
    // Its predictor names three, so that what it named at all is what was among its first three.
    let expected = [json!(hits + misses), json!(share(top1_hits)), json!(share(hits)), json!(share(hits))];
    assert_eq!(["choices", "top1", "top3", "named"].map(|name| rate[name].clone()), expected);
    assert_eq!(figures["hit_rates"].as_array().expect("rows").len(), 2 * (STACK_LAYERS + 1) + 1);

    // All experts are resident once they were asked for. Room for a tenth is less than the examples need, and no answer
    // changes.
    for (budget, is_short) in [("100%", false), ("10%", true)] {
        let budget = row(&found["budgets"], &json!({"budget": budget}));
        for mode in ["exact", "hash, router's alpha"] {
            let figures = row(&budget["modes"], &json!({"mode": mode}));
            let loads = |kind: &str| figures["loads"][kind].as_u64().expect("a number");
            assert_eq!(figures["changed"], 0, "{mode}: {budget}");
            assert!(if is_short { loads("evicted") > 0 } else { loads("demanded") == 0 }, "{mode}: {budget}");
        }
    }
    let page = fs::read_to_string(page).expect("a page");
    assert!(page.contains("Throughput against memory for experts") && page.contains("</html>"));
}

/// Whoever has the wrong file, model or predictor would get figures of something else, or be left to guess.
#[test]
fn what_cannot_be_evaluated_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = |name: &str, content: &str| {
        let path = directory.path().join(name);
        fs::write(&path, content).expect("written");
        path.to_str().expect("a path").to_owned()
    };
    let table = file("table.tsv", "sentence\tlabel\na fine film\t1\n");
    let sst2 = ["--data", &table, "--task", "sst2"];
    let other = "models/switch-tiny-64/predictor.safetensors";
    let said = refused(&[&sst2[..], &["--model", "models/switch-mini-8", "--predictor", other]].concat());
    assert!(said.contains("the predictor cannot be used"), "{said}");
    let said = refused(&[&sst2[..], &["--model", dense(directory.path()).as_str()]].concat());
    assert!(said.contains("has no MoE layers"), "{said}");
    let said = refused(&["--data", &file("empty.tsv", ""), "--task", "sst2"]);
    assert!(said.contains("empty.tsv is empty"), "{said}");
    let said = refused(&["--data", &file("wrong.tsv", "sentence\tlabel\nx\t0\ny\t7\n"), "--task", "sst2"]);
    assert!(said.contains("wrong.tsv line 3, field label: found 7"), "{said}");
    let long =
        format!("{{\"text\": \"x\", \"target\": \"y\"}}\n{{\"text\": \"{}\", \"target\": \"y\"}}", "x ".repeat(600));
    let said = refused(&["--data", &file("long.jsonl", &long)]);
    assert!(said.contains("long.jsonl line 2") && said.contains("more than the 512 allowed"), "{said}");
    let said = refused(&[&sst2[..], &["--batches", "0"]].concat());
    assert!(said.contains("--batches names 0"), "{said}");
}

/// A model as its config says, all of whose layers are dense.
fn dense(directory: &Path) -> String {
    let (shipped, model) = (repository().join("models/switch-tiny-64"), directory.join("dense"));
    fs::create_dir(&model).expect("a directory");
    for entry in fs::read_dir(&shipped).expect("the model").map(|entry| entry.expect("a file")) {
        std::os::unix::fs::symlink(entry.path(), model.join(entry.file_name())).expect("a link");
    }
    let config = fs::read_to_string(shipped.join("config.json")).expect("a config");
    let config = config.replace("_sparse_step\": 2", "_sparse_step\": 0");
    fs::remove_file(model.join("config.json")).expect("a link");
    fs::write(model.join("config.json"), config).expect("written");
    model.to_str().expect("a path").to_owned()
}

/// Without a predictor the model's own answers would be told as those of its hash table.
#[test]
fn modes_that_need_a_predictor_are_told_apart() {
    let directory = tempfile::tempdir().expect("a directory");
    let table = directory.path().join("table.tsv");
    fs::write(&table, "sentence\tlabel\na fine film\t1\n").expect("written");
    let data = ["--data", table.to_str().expect("a path"), "--task", "sst2", "--predictor", "off"];
    let output = eval(&data);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.matches("not served: there is no hash table").count(), 3, "{text}");
    assert!(text.contains("predictor none") && text.contains("100.0%"), "{text}");
}
