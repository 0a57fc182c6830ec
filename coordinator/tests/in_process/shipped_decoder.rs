//! The decoder-only model that comes with the source, with its own predictor: its answers are what transformers computed, and
//! its predictor foresees most of the experts that they need.

use std::{fs, path::Path, sync::Arc};

use futures::{StreamExt, future::join_all};
use serde::Deserialize;
use sida_coordinator::{Coordinator, GenerateParams, PredictorSource, RoutingMode, Sampling, Token};
use sida_model::Checkpoint;

use crate::plain_experts::start_model;

/// As tests/parity/make_decoder_golden.py writes it.
#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    greedy: Vec<u32>,
    greedy_text: String,
}

/// The model draws its tokens unless a request says otherwise, so this one does.
async fn likeliest(coordinator: &Coordinator, case: &Case, routing: RoutingMode) -> Vec<Token> {
    let sampling = Sampling { temperature: Some(0.0), ..Default::default() };
    let (prompt, max_tokens) = (case.text.as_str().into(), case.greedy.len());
    let params = GenerateParams { prompt, max_tokens, sampling, routing, ..Default::default() };
    let tokens = coordinator.generate(params).await.expect("accepted");
    tokens.map(|token| token.expect("token")).collect().await
}

#[tokio::test(flavor = "multi_thread")]
async fn its_answers_are_those_of_transformers() {
    // Would break: experts in int8 that four of 32 are chosen of answer otherwise when they are spread over nodes; or model or
    // code changed since the predictor was trained, so that it is refused or foresees nothing.
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/qwen3-tiny-32");
    let golden: Golden =
        serde_json::from_slice(&fs::read(dir.join("golden.json")).expect("a golden file")).expect("JSON");
    let checkpoint = Checkpoint::open(&dir).expect("model");
    let file = dir.join(sida_predictor::FILE_NAME);
    let predictor = sida_predictor::open(&file, checkpoint.config(), checkpoint.digest()).expect("its predictor");
    assert!(predictor.hit_rates().iter().all(|rate| rate.top3 > 0.8), "{:?}", predictor.hit_rates());
    let cluster = start_model(&dir, 2, PredictorSource::Local(Arc::clone(&predictor)), |_| ()).await;
    let all =
        async |routing| join_all(golden.cases.iter().map(|case| likeliest(&cluster.coordinator, case, routing))).await;
    for (case, tokens) in golden.cases.iter().zip(all(RoutingMode::Exact).await) {
        assert_eq!(tokens.iter().map(|token| token.id).collect::<Vec<_>>(), case.greedy, "{:?}", case.text);
        assert_eq!(tokens.iter().map(|token| &token.text[..]).collect::<String>(), case.greedy_text);
        let trace = &tokens.last().and_then(|token| token.finish.as_ref()).expect("the last").trace;
        let named = trace.hash.hits as f64 / (trace.hash.hits + trace.hash.misses) as f64;
        assert!(named > 0.6, "of the experts for {:?} the table named {named:.2}", case.text);
    }
    assert!(golden.cases.len() >= 5);
    let whole = |tokens: &Vec<Token>| tokens.last().is_some_and(|token| token.finish.is_some());
    assert!(all(RoutingMode::Guided).await.iter().all(whole), "its predictor leaves the router a choice");
    cluster.coordinator.stop().await;
}
