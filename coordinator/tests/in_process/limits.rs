//! What a coordinator refuses: each kind of bad request, with an error that names the field and the limit.

use std::{fs, os::unix::fs::symlink};

use futures::StreamExt;
use serde_json::{Value, json};
use sida_coordinator::{
    EncodeParams, GenerateParams, PredictorSource, Prompt, RequestError, Sampling, ScoreParams, TextOf,
};

use crate::plain_experts::{PlainCluster, decoder_only_dir, start, start_model};

async fn refused(cluster: &PlainCluster, params: GenerateParams) -> RequestError {
    match cluster.coordinator.generate(params).await {
        Ok(_) => panic!("it was accepted"),
        Err(error) => error,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn texts() {
    // Would break: a text that cannot be answered is queued, or is tokenized however long it is.
    let cluster = start(1, PredictorSource::Off, |_| ()).await;
    let encode = |text: String| cluster.coordinator.encode(EncodeParams { prompt: text.into(), ..Default::default() });
    for empty in ["", " \n\t "] {
        assert!(matches!(encode(empty.into()).await, Err(RequestError::EmptyText)));
    }
    let long = encode("good ".repeat(600)).await;
    assert!(
        matches!(long, Err(RequestError::TooManyTokens { of: TextOf::Prompt, tokens: 601, limit: 512 })),
        "{long:?}"
    );
    let huge = encode("x".repeat(10 << 20)).await;
    assert!(matches!(huge, Err(RequestError::TextTooLong { limit: 65536, .. })));
    assert!(encode("good ".repeat(511)).await.is_ok(), "the limit itself is allowed");
}

#[tokio::test(flavor = "multi_thread")]
async fn options() {
    // Would break: an option out of its range is taken, and does something else than it says.
    let cluster = start(1, PredictorSource::Off, |_| ()).await;
    let base = GenerateParams { prompt: "good".into(), ..Default::default() };
    let sampling =
        |temperature, top_p| Sampling { temperature: Some(temperature), top_p: Some(top_p), ..Default::default() };
    let cases = [
        ("max_tokens", GenerateParams { max_tokens: 1025, ..base.clone() }),
        ("min_tokens", GenerateParams { max_tokens: 4, min_tokens: Some(5), ..base.clone() }),
        ("min_tokens", GenerateParams { min_tokens: Some(65), ..base.clone() }),
        ("temperature", GenerateParams { sampling: sampling(-1.0, 0.0), ..base.clone() }),
        ("temperature", GenerateParams { sampling: sampling(f32::NAN, 0.0), ..base.clone() }),
        ("temperature", GenerateParams { sampling: sampling(f32::INFINITY, 0.0), ..base.clone() }),
        ("top_p", GenerateParams { sampling: sampling(1.0, 1.5), ..base.clone() }),
        ("top_p", GenerateParams { sampling: sampling(1.0, f32::NAN), ..base.clone() }),
        ("stop (their number)", GenerateParams { stop: vec!["x".into(); 17], ..base.clone() }),
        ("stop", GenerateParams { stop: vec!["x".into(), String::new()], ..base.clone() }),
        ("stop (bytes)", GenerateParams { stop: vec!["x".repeat(257)], ..base.clone() }),
    ];
    for (expected, params) in cases {
        match refused(&cluster, params).await {
            RequestError::Argument { field, .. } => assert_eq!(field, expected),
            error => panic!("{expected}: {error}"),
        }
    }
    let error = refused(&cluster, GenerateParams { max_tokens: 5, min_tokens: Some(7), ..base.clone() }).await;
    assert_eq!(error.to_string(), "min_tokens is 7, expected at most max_tokens, which is 5");
    let error = refused(&cluster, GenerateParams { min_tokens: Some(65), ..base }).await.to_string();
    assert!(error.contains("at most max_tokens, which is 64, as the request does not give it"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn targets() {
    // Would break: a scored request without candidates, or with more than a batch holds, reaches the engine.
    let cluster = start(1, PredictorSource::Off, |config| config.limits.tokens_max = 100).await;
    let score = |targets: Vec<String>| {
        cluster.coordinator.score(ScoreParams { prompt: "good".into(), targets, ..Default::default() })
    };
    for targets in [vec![], vec!["x".to_owned(); 65], vec![" ".to_owned()], vec!["good ".repeat(60); 2]] {
        let answer = score(targets).await;
        assert!(matches!(answer, Err(RequestError::Argument { .. })), "{answer:?}");
    }
    // The target that is too long is named, and not the prompt.
    let long = |target: String| score(vec!["x".into(), "y".into(), target]);
    let error = long("good ".repeat(600)).await.expect_err("too many tokens");
    assert!(matches!(error, RequestError::TooManyTokens { of: TextOf::Target(3), tokens: 601, limit: 512 }), "{error}");
    assert_eq!(error.to_string(), "target 3 has 601 tokens, more than the 512 allowed");
    let error = long("x".repeat(70_000)).await.expect_err("too many bytes");
    assert!(matches!(error, RequestError::TextTooLong { of: TextOf::Target(3), bytes: 70_000, .. }), "{error}");
    assert_eq!(score(vec!["x".into(); 8]).await.expect("scored").targets.len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_sequence_is_longer_than_the_model_has_positions() {
    // Would break: a model goes on where it knows no position any more, and nobody is told why its answers are noise.
    const POSITIONS: usize = 16;
    let dir = tempfile::tempdir().expect("a folder");
    for file in ["model.safetensors", "tokenizer.json"] {
        symlink(decoder_only_dir().join(file), dir.path().join(file)).expect("a link");
    }
    let config = fs::read(decoder_only_dir().join("config.json")).expect("a config");
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    config["max_position_embeddings"] = json!(POSITIONS);
    fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    let cluster = start_model(dir.path(), 1, PredictorSource::Off, |_| ()).await;
    let of = |tokens: usize, max_tokens: usize| GenerateParams {
        prompt: Prompt::Tokens(vec![5; tokens]),
        max_tokens,
        ignore_eos: true,
        ..Default::default()
    };
    for (asked, told) in [(0, 6), (6, 6), (2, 2)] {
        let answer = cluster.coordinator.generate(of(10, asked)).await.expect("it fits");
        assert_eq!(answer.count().await, told, "of {asked}");
    }
    let error = refused(&cluster, of(10, 7)).await.to_string();
    assert_eq!(error, "max_tokens is 7, expected 1 to 6: the model has 16 positions, and the prompt 10 tokens");
    // By one rule, however much too long the prompt is.
    let no_room = |error: RequestError, tokens: usize| {
        let told = format!("the prompt has {tokens} tokens, more than the 15 allowed");
        assert_eq!(error.to_string(), told);
        assert!(matches!(error, RequestError::TooManyTokens { .. }), "{error:?}");
    };
    for tokens in [POSITIONS, POSITIONS + 1] {
        no_room(refused(&cluster, of(tokens, 1)).await, tokens);
    }
    // What is only read may take all of them.
    let encode = |tokens| {
        let prompt = Prompt::Tokens(vec![5; tokens]);
        cluster.coordinator.encode(EncodeParams { prompt, ..Default::default() })
    };
    assert!(encode(POSITIONS).await.is_ok() && encode(POSITIONS + 1).await.is_err());
    let score = |tokens, target: &str| {
        let (prompt, targets) = (Prompt::Tokens(vec![5; tokens]), vec!["a".to_owned(), target.to_owned()]);
        cluster.coordinator.score(ScoreParams { prompt, targets, ..Default::default() })
    };
    assert!(score(POSITIONS - 1, "a").await.is_ok());
    for tokens in [POSITIONS, POSITIONS + 1] {
        no_room(score(tokens, "a").await.expect_err("no room"), tokens);
    }
    let error = score(POSITIONS - 1, "a a a").await.expect_err("no room").to_string();
    let (had, why) =
        ("target 2 has ", " tokens, more than the 1 allowed: the model has 16 positions, and the prompt 15 tokens");
    assert!(error.starts_with(had) && error.ends_with(why), "{error}");
}
