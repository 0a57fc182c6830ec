//! Mode `exact`: whatever the cluster looks like, the tokens are those of the whole model in one process.

use std::fs;

use sida_proto::v1::{self, inference_client::InferenceClient};
use sida_tests::{Sandbox, SandboxConfig, binary::repository};

use crate::client::{Oracle, generate, greedy, prompts};

/// Two slots of the model that ships: the least that a node takes. An expert has two 128 x 128 matrices in bf16.
const TWO_SLOTS: &str = "131072";
const TOKENS_MAX: u32 = 40;

/// Asks all prompts at the same time, so that they are batched, and compares every token.
async fn answers_are_the_models_own(sandbox: &Sandbox) {
    let oracle = Oracle::open();
    let channel = sandbox.channel();
    let asked: Vec<_> = (prompts().into_iter())
        .map(|text| {
            let (channel, request) = (channel.clone(), greedy(&text, TOKENS_MAX));
            (text, tokio::spawn(async move { generate(&channel, request).await }))
        })
        .collect();
    let mut tokens = 0;
    for (text, answer) in asked {
        let answer = answer.await.expect("no panic").expect("an answer");
        assert_eq!(answer.ids, oracle.greedy(&text, TOKENS_MAX), "{text}");
        assert_eq!(answer.finish.generated_tokens as usize, answer.ids.len());
        tokens += answer.ids.len();
    }
    assert!(tokens > 60, "the prompts were answered with {tokens} tokens only");
}

/// Splitting the model over processes would change its output.
#[tokio::test(flavor = "multi_thread")]
async fn two_nodes() {
    answers_are_the_models_own(&Sandbox::start(SandboxConfig::default()).await).await;
}

/// Batches that go as micro-batches would mix up their rows, or their sequences' caches.
#[tokio::test(flavor = "multi_thread")]
async fn in_micro_batches() {
    let coordinator_flags = ["--micro-batches", "always"].map(str::to_owned).to_vec();
    let config = SandboxConfig { expert_memory: "10%".into(), coordinator_flags, ..Default::default() };
    answers_are_the_models_own(&Sandbox::start(config).await).await;
}

/// Experts that pass through too little memory in waves would be skipped or mixed up.
#[tokio::test(flavor = "multi_thread")]
async fn one_node_with_two_slots() {
    let config = SandboxConfig { expert_nodes: 1, expert_memory: TWO_SLOTS.into(), ..Default::default() };
    let sandbox = Sandbox::start(config).await;
    answers_are_the_models_own(&sandbox).await;
    let answer = generate(&sandbox.channel(), greedy(&prompts()[0], TOKENS_MAX)).await.expect("an answer");
    assert!(answer.trace().demand_loads > 0, "two slots cannot hold what a sentence needs");
}

/// Prediction on other nodes would change the output, or never be used.
#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_and_a_predictor_node() {
    let config =
        SandboxConfig { expert_nodes: 3, expert_memory: "10%".into(), predictor_nodes: 1, ..Default::default() };
    let sandbox = Sandbox::start(config).await;
    answers_are_the_models_own(&sandbox).await;
    // In this mode every request is predicted; in `exact` only while nodes gain by it.
    let routing = v1::RoutingOptions { mode: v1::RoutingMode::Guided.into(), ..Default::default() };
    let guided = v1::GenerateRequest { routing: Some(routing), ..greedy(&prompts()[0], TOKENS_MAX) };
    let answer = generate(&sandbox.channel(), guided).await.expect("an answer");
    let trace = answer.trace();
    assert!(!trace.unpredicted && trace.hash_hits > 0, "{trace:?}");
}

/// The golden file of the model that ships, written by transformers, would not be reproduced by the cluster.
#[tokio::test(flavor = "multi_thread")]
async fn transformers_tokens() {
    let golden = fs::read_to_string(repository().join("models/switch-tiny-64/golden.json")).expect("a golden file");
    let golden: serde_json::Value = serde_json::from_str(&golden).expect("JSON");
    let sandbox = Sandbox::start(SandboxConfig::default()).await;
    let cases = golden["cases"].as_array().expect("cases").iter().filter(|case| case["text"].is_string());
    let mut compared = 0;
    for case in cases {
        let expected: Vec<u64> =
            case["greedy_ids"].as_array().expect("ids").iter().skip(1).map(|id| id.as_u64().expect("an id")).collect();
        let request = greedy(case["text"].as_str().expect("a text"), expected.len() as u32);
        let answer = generate(&sandbox.channel(), request).await.expect("an answer");
        assert_eq!(answer.ids.iter().map(|&id| u64::from(id)).collect::<Vec<_>>(), expected);
        let label = case["greedy_text"].as_str().expect("a text").replace("<pad>", "").replace("</s>", "");
        assert_eq!(answer.text.trim(), label.trim());
        compared += 1;
    }
    assert!(compared >= 3);
}

/// Classification by likelihood, or encoder states, would differ from what generation sees.
#[tokio::test(flavor = "multi_thread")]
async fn score_and_encode() {
    let sandbox = Sandbox::start(SandboxConfig::default()).await;
    let mut client = InferenceClient::new(sandbox.channel());
    let (text, oracle) = (prompts().remove(0), Oracle::open());
    let targets = vec!["negative".to_owned(), "positive".to_owned()];
    let request = v1::ScoreRequest { text: text.clone(), targets: targets.clone(), ..Default::default() };
    let scores = client.score(request).await.expect("scores").into_inner().scores;
    let best = if scores[0].log_likelihood > scores[1].log_likelihood { &targets[0] } else { &targets[1] };
    let answer = generate(&sandbox.channel(), greedy(&text, TOKENS_MAX)).await.expect("an answer");
    assert_eq!(answer.text.trim(), best);
    assert_eq!(answer.ids, oracle.greedy(&text, TOKENS_MAX));

    let request = v1::EncodeRequest { text, pooling: v1::Pooling::None.into(), ..Default::default() };
    let encoded = client.encode(request).await.expect("states").into_inner();
    assert_eq!(encoded.rows, encoded.prompt_tokens);
    assert_eq!(encoded.states.len(), (encoded.rows * encoded.d_model * 4) as usize);
}
