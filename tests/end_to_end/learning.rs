//! A predictor-node that learns from the traffic of a real coordinator: a predictor that knows other texts only becomes
//! better while requests run, and nothing else happens to them.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use sida_proto::v1::{
    DescribePredictorRequest, DescribePredictorResponse, GenerateRequest, predictor_client::PredictorClient,
};
use sida_tests::{Sandbox, SandboxConfig, binary};
use tokio::time::Instant;

use crate::client::{generate, greedy};

const PREDICTOR_NODE: &str = "predictor-node-0";
/// How long the machine may take to learn; it takes a few seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// A text of `words`, the `number`th.
fn text(words: &str, number: usize) -> String {
    let words: Vec<&str> = words.split(' ').collect();
    (0..20).map(|at| words[(number * 7 + at * at * 3 + at * number) % words.len()]).collect::<Vec<_>>().join(" ")
}

/// Trains a small predictor of a model on texts of a few words.
fn train(model: &Path, words: &str, file: &Path) {
    let texts = file.with_extension("txt");
    let lines: String = (0..120).map(|number| text(words, number) + "\tno\n").collect();
    fs::write(&texts, lines).expect("a file");
    let mut command = binary::command();
    command.arg("train-predictor").arg("--model").arg(model);
    command.arg("--file").arg(&texts).arg("--out").arg(file);
    let output = command.args(["--width", "16", "--token-width", "16", "--epochs", "2"]).output().expect("sida runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

async fn describe(sandbox: &Sandbox) -> DescribePredictorResponse {
    let address = sandbox.process(PREDICTOR_NODE).address();
    let channel = sida_rpc::connect(address, &sida_rpc::ClientConfig::default()).await.expect("a connection");
    PredictorClient::new(channel).describe(DescribePredictorRequest {}).await.expect("it answers").into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_better_predictor_comes_to_serve_while_requests_run() {
    learn("switch-tiny-64").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_better_predictor_comes_to_serve_a_decoder() {
    learn("qwen3-tiny-32").await;
}

/// What routers chose would not reach the node; a better predictor would not come to serve, or requests would fail or change when it
/// does; what served before would be lost, or what was learnt be forgotten when the node starts again.
async fn learn(model: &str) {
    let model = binary::repository().join("models").join(model);
    let dir = tempfile::tempdir().expect("a directory");
    let (trained, learnt) = (dir.path().join("trained.safetensors"), dir.path().join("learnt"));
    train(&model, "a fine film with much to see and more to think about", &trained);
    let before = fs::read(&trained).expect("a predictor");
    let shown = |path: &Path| path.display().to_string();
    let predictor_flags = [
        ["--predictor", &shown(&trained)],
        ["--learn-dir", &shown(&learnt)],
        ["--learn-tokens-max", "4096"],
        ["--learn-cpu-share", "100%"],
    ];
    let predictor_flags = predictor_flags.as_flattened().iter().chain(&["--learn"]).map(|flag| (*flag).to_owned());
    let config = SandboxConfig {
        model,
        predictor_nodes: 1,
        predictor_flags: predictor_flags.collect(),
        // Prompts come again, and of what is kept no router is asked.
        coordinator_flags: vec!["--no-prefix-cache".to_owned()],
        ..SandboxConfig::default()
    };
    let mut sandbox = Sandbox::start(config).await;
    let first = describe(&sandbox).await;
    assert!(first.learns);

    let (mut answers, mut asked, start) = (BTreeMap::new(), 0, Instant::now());
    let mut served = first.clone();
    while served.predictor_digest == first.predictor_digest {
        assert!(
            start.elapsed() < PATIENCE,
            "nothing was learnt from {asked} prompts: {}",
            sandbox.process(PREDICTOR_NODE).log()
        );
        for _ in 0..20 {
            let number = asked % 50;
            let prompt = text("which river runs through the old city where the king was born in winter", number);
            let request = GenerateRequest { temperature: Some(0.0), ..greedy(&prompt, 2) };
            let answer = generate(&sandbox.channel(), request).await.expect("an answer");
            let expected = answers.entry(number).or_insert_with(|| answer.ids.clone());
            assert_eq!(&answer.ids, expected, "{prompt}");
            asked += 1;
        }
        served = describe(&sandbox).await;
    }
    let file = |name: &str| fs::read(learnt.join(name)).expect("a file");
    assert!(file("predictor.previous.safetensors") == before);
    assert!(file("predictor.safetensors") != before);
    assert!(fs::read(&trained).expect("a predictor") == before, "what was trained is not touched");

    sandbox.take(PREDICTOR_NODE).kill();
    sandbox.restart(PREDICTOR_NODE);
    assert_ne!(describe(&sandbox).await.predictor_digest, first.predictor_digest, "it forgot");
}
