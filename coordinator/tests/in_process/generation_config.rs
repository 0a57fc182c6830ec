//! A model's generation config, as requests notice it. The reference, which is held against transformers, follows it, too.

use futures::StreamExt;
use sida_coordinator::{Coordinator, FinishReason, GenerateParams, PredictorSource, Sampling};
use sida_model::{Reference, Tokenizer};

use crate::plain_experts::{model_dir, model_with, start};

const TEXT: &str = "The <extra_id_0> walks in <extra_id_1> park with a small dog.";

async fn answer(coordinator: &Coordinator, params: GenerateParams) -> (Vec<u32>, FinishReason) {
    let tokens: Vec<_> = coordinator.generate(params).await.expect("accepted").collect().await;
    let tokens: Vec<_> = tokens.into_iter().map(|token| token.expect("a token")).collect();
    let reason = tokens.last().and_then(|token| token.finish.as_ref()).expect("an end").reason;
    (tokens.iter().map(|token| token.id).collect(), reason)
}

fn params(max_tokens: usize) -> GenerateParams {
    GenerateParams { prompt: TEXT.into(), max_tokens, ..Default::default() }
}

/// A coordinator of the small model with this generation config, and the reference of that.
async fn with(config: &str) -> (Coordinator, Reference) {
    let (dir, checkpoint) = model_with("generation_config.json", |_| config.as_bytes().to_vec());
    let reference = Reference::open(dir.path()).expect("reference");
    let cluster = start(2, PredictorSource::Off, |config| config.checkpoint = checkpoint).await;
    (cluster.coordinator, reference)
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_follow_it() {
    // Would break: an answer goes on after an end token, holds tokens that are never to be written, or lacks those that are
    // to be, although the model's files say so.
    let tokenizer = Tokenizer::open(&model_dir(), Reference::open(&model_dir()).expect("reference").config());
    let prompt = tokenizer.expect("tokenizer").encode(TEXT).expect("ids");
    let (plain, reference) = with("{}").await;
    let (ids, _) = answer(&plain, params(12)).await;
    assert_eq!(ids, reference.generate_greedy(&prompt, 12).expect("answer"));
    let (first, later) = (ids[0], ids[5]);
    for config in [
        format!(r#"{{"eos_token_id": [1, {later}]}}"#),
        format!(r#"{{"eos_token_id": [1, {first}], "min_new_tokens": 4}}"#),
        format!(r#"{{"suppress_tokens": [{first}, {later}]}}"#),
        format!(r#"{{"begin_suppress_tokens": [{first}, 1]}}"#),
        r#"{"forced_bos_token_id": 77, "forced_eos_token_id": [1, 9]}"#.to_owned(),
        r#"{"decoder_start_token_id": 77}"#.to_owned(),
        r#"{"repetition_penalty": 2.5}"#.to_owned(),
    ] {
        let (coordinator, reference) = with(&config).await;
        let expected = reference.generate_greedy(&prompt, 12).expect("answer");
        assert_eq!(answer(&coordinator, params(12)).await.0, expected, "{config}");
        assert_ne!(expected, ids, "{config} changes nothing");
    }
    let (ending, _) = with(&format!(r#"{{"eos_token_id": [1, {first}]}}"#)).await;
    assert_eq!(answer(&ending, params(12)).await, (vec![first], FinishReason::End));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_overrule_its_defaults() {
    // Would break: a request gets another length or another way of drawing than it asks for, or than the model's own.
    let (coordinator, _) =
        with(r#"{"do_sample": true, "temperature": 4.0, "top_k": 0, "max_new_tokens": 7, "min_new_tokens": 7}"#).await;
    let (plain, _) = with("{}").await;
    let drawn = |seed| Sampling { seed: Some(seed), ..Default::default() };
    let (one, _) = answer(&coordinator, GenerateParams { sampling: drawn(1), ..params(0) }).await;
    let (other, reason) = answer(&coordinator, GenerateParams { sampling: drawn(2), ..params(0) }).await;
    assert_eq!((one.len(), other.len(), reason), (7, 7, FinishReason::Length));
    assert_ne!(one, other, "nothing is drawn");
    let greedy = Sampling { temperature: Some(0.0), ..Default::default() };
    let asked = GenerateParams { sampling: greedy, min_tokens: Some(3), ..params(9) };
    let expected = answer(&plain, GenerateParams { min_tokens: Some(3), ..params(9) }).await;
    assert_eq!(answer(&coordinator, asked).await, expected);
    // What is less than the model's least length is asked for by who says how long the answer may be.
    assert_eq!(answer(&coordinator, params(2)).await.0.len(), 2);
    // The least length can be switched off.
    let (long, _) = with(r#"{"min_new_tokens": 9}"#).await;
    let short =
        |min_tokens| GenerateParams { prompt: "sst2 sentence: flat and dull .".into(), min_tokens, ..params(12) };
    let expected = answer(&plain, short(None)).await;
    assert!(expected.0.len() < 9 && answer(&long, short(None)).await.0.len() > 9);
    assert_eq!(answer(&long, short(Some(0))).await, expected);
}
