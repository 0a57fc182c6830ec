//! Prompts of all kinds: texts and tokens are the same, several texts of a call are encoded each by itself, and what is too
//! long is cut where that is asked for.

use std::path::Path;

use futures::StreamExt;
use sida_coordinator::{Coordinator, EncodeParams, GenerateParams, PredictorSource, Prompt, RequestError, ScoreParams};
use sida_model::{Reference, Tokenizer};
use sida_proto::v1::{
    self, DetokenizeRequest, EncodeRequest, GenerateRequest, ScoreRequest, TokenizeRequest,
    inference_client::InferenceClient,
};
use tonic::Code;

use crate::{
    front_door::served,
    plain_experts::{decoder_only_dir, model_dir, start, start_model},
};

const TEXT: &str = "sst2 sentence: a gorgeous , witty , seductive movie .";

fn tokenizer(dir: &Path) -> Tokenizer {
    let reference = Reference::open(dir).expect("reference");
    Tokenizer::open(dir, reference.config()).expect("tokenizer")
}

async fn ids(coordinator: &Coordinator, prompt: Prompt) -> Result<Vec<u32>, RequestError> {
    let tokens = coordinator.generate(GenerateParams { prompt, max_tokens: 8, ..Default::default() }).await?;
    tokens.map(|token| token.map(|token| token.id)).collect::<Vec<_>>().await.into_iter().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_a_prompt_as_their_text_is() {
    // Would break: who tokenizes by himself gets the answer to another prompt.
    for dir in [model_dir(), decoder_only_dir()] {
        let prompt: Prompt = tokenizer(&dir).encode(TEXT).expect("ids").into();
        let coordinator = start_model(&dir, 1, PredictorSource::Off, |_| ()).await.coordinator;
        let expected = ids(&coordinator, TEXT.into()).await.expect("an answer");
        assert_eq!(ids(&coordinator, prompt.clone()).await.expect("an answer"), expected);
        let encode = |prompt| coordinator.encode(EncodeParams { prompt, ..Default::default() });
        let (by_text, by_tokens) = (encode(TEXT.into()).await, encode(prompt.clone()).await);
        assert_eq!(by_text.expect("encoded").states, by_tokens.expect("encoded").states);
        let targets = || vec!["positive".to_owned(), "negative".to_owned()];
        let score = |prompt| coordinator.score(ScoreParams { prompt, targets: targets(), ..Default::default() });
        let (by_text, by_tokens) = (score(TEXT.into()).await, score(prompt).await);
        assert_eq!(by_text.expect("scored").targets, by_tokens.expect("scored").targets);
        let vocab_size = coordinator.checkpoint().config().vocab_size as u32;
        for (tokens, expected) in
            [(vec![], "an empty list"), (vec![5, vocab_size], "in place 2"), (vec![5; 513], "513")]
        {
            let error = ids(&coordinator, tokens.into()).await.expect_err("refused").to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(ids(&coordinator, vec![vocab_size - 1; 512].into()).await.is_ok(), "the limits themselves are allowed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_and_tokens_are_turned_into_each_other() {
    // Would break: a client counts other tokens than the server, or one call takes all processors.
    let served = served().await;
    let mut client = InferenceClient::new(served.channel.clone());
    let tokenizer = tokenizer(&model_dir());
    let mut tokenize = async |text: &str, without_special_tokens| {
        let request = TokenizeRequest { text: text.to_owned(), without_special_tokens };
        client.tokenize(request).await.map(|response| response.into_inner().tokens)
    };
    let long = "good ".repeat(3000);
    for text in ["", TEXT, "naïve café — déjà vu", &long] {
        assert_eq!(tokenize(text, false).await.expect("tokens"), tokenizer.encode(text).expect("ids"));
        let plain = tokenize(text, true).await.expect("tokens");
        assert_eq!(plain, tokenizer.encode_as_written(text).expect("ids"));
    }
    let with_end = tokenize(TEXT, false).await.expect("tokens");
    assert_eq!(with_end.strip_suffix(&[1]), Some(&tokenize(TEXT, true).await.expect("tokens")[..]));
    let status = tokenize(&"x".repeat(70_000), false).await.expect_err("too long");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");

    let mut client = InferenceClient::new(served.channel.clone());
    let mut detokenize = async |tokens: Vec<u32>| {
        client.detokenize(DetokenizeRequest { tokens }).await.map(|response| response.into_inner().text)
    };
    assert_eq!(detokenize(with_end.clone()).await.expect("text"), TEXT);
    assert_eq!(detokenize(Vec::new()).await.expect("text"), "");
    for (tokens, field) in [(vec![1_000_000_000], "tokens is"), (vec![5; 70_000], "tokens (their number)")] {
        let status = detokenize(tokens).await.expect_err("refused");
        assert!(status.code() == Code::InvalidArgument && status.message().starts_with(field), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_shown_one_by_one() {
    // Would break: of the tokens that were likely in a place a client sees two alike, or words run into each other.
    for dir in [model_dir(), decoder_only_dir()] {
        let coordinator = start_model(&dir, 1, PredictorSource::Off, |_| ()).await.coordinator;
        let ids = coordinator.tokenize(TEXT, false).await.expect("tokens");
        let shown: String = ids.iter().map(|&id| coordinator.token_text(id).expect("a text")).collect();
        assert_eq!(shown.trim_start(), TEXT);
        let end = coordinator.checkpoint().config().generation.eos_token_ids[0];
        assert!(!coordinator.token_text(end).expect("a name").is_empty());
        assert!(coordinator.token_text(u32::MAX).is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_texts_are_encoded_each_by_itself() {
    // Would break: embeddings of a list are in another order, or depend on what else is in it.
    let served = served().await;
    let mut client = InferenceClient::new(served.channel.clone());
    let texts: Vec<String> = (1..40).map(|count| "good movie ".repeat(count)).collect();
    let mut encode = async |request: EncodeRequest| client.encode(request).await.map(|response| response.into_inner());
    let answer = encode(EncodeRequest { texts: texts.clone(), ..Default::default() }).await.expect("encoded");
    assert_eq!((answer.encodings.len(), answer.rows), (texts.len(), 0));
    for (text, encoding) in texts.iter().zip(&answer.encodings) {
        let alone = encode(EncodeRequest { text: text.clone(), ..Default::default() }).await.expect("encoded");
        assert_eq!((&alone.states, alone.prompt_tokens), (&encoding.states, encoding.prompt_tokens));
        assert!(encoding.trace.is_some() && alone.encodings.is_empty());
    }
    let with = |texts: Vec<String>| EncodeRequest { texts, ..Default::default() };
    for (request, message) in [
        (with(vec!["a".to_owned(), "good ".repeat(600)]), "text 2 has 601 tokens"),
        (with(vec!["a".to_owned(), " ".to_owned()]), "texts is an empty text in place 2"),
        (with(vec!["a".to_owned(); 257]), "texts (their number) is 257"),
        (EncodeRequest { text: "a".to_owned(), ..with(vec!["b".to_owned()]) }, "texts is given beside"),
        (EncodeRequest { tokens: vec![5], ..with(vec!["b".to_owned()]) }, "texts is given beside"),
        (EncodeRequest { text: "a".to_owned(), tokens: vec![5], ..Default::default() }, "tokens is given beside text"),
        (EncodeRequest { normalize: true, pooling: v1::Pooling::None.into(), ..with(texts) }, "normalize is"),
    ] {
        let status = encode(request).await.expect_err(message);
        assert!(status.code() == Code::InvalidArgument && status.message().starts_with(message), "{status}");
    }
    let request = ScoreRequest { tokens: vec![5, 6, 1], targets: vec!["positive".to_owned()], ..Default::default() };
    let mut client = InferenceClient::new(served.channel.clone());
    assert_eq!(client.score(request).await.expect("scored").into_inner().scores.len(), 1);
    let request = GenerateRequest { tokens: vec![5, 6, 1], max_tokens: 1, ..Default::default() };
    let response = client.generate(request).await.expect("accepted").into_inner().message().await.expect("a token");
    assert!(response.is_some_and(|response| response.finish.is_some_and(|finish| finish.prompt_tokens == 3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_long_is_cut_where_asked_for() {
    // Would break: an embedding is made of another part of the text than said, or without the end that an encoder expects.
    for dir in [model_dir(), decoder_only_dir()] {
        let tokenizer = tokenizer(&dir);
        let limit = 24;
        let cluster =
            start_model(&dir, 1, PredictorSource::Off, |config| config.request_limits.prompt_tokens_max = limit);
        let coordinator = cluster.await.coordinator;
        let text = "good movie , a gorgeous one ".repeat(8);
        let all = tokenizer.encode(&text).expect("ids");
        let mut kept = all[..limit].to_vec();
        if coordinator.checkpoint().config().has_encoder() {
            kept[limit - 1] = 1;
        }
        let encode =
            |prompt: Prompt, truncate| coordinator.encode(EncodeParams { prompt, truncate, ..Default::default() });
        assert!(matches!(encode(text.as_str().into(), false).await, Err(RequestError::TooManyTokens { .. })));
        let expected = encode(kept.into(), false).await.expect("encoded");
        for prompt in [text.as_str().into(), all.clone().into()] {
            let cut = encode(prompt, true).await.expect("encoded");
            assert_eq!((cut.prompt_tokens, cut.truncated_tokens), (limit, all.len() - limit));
            assert_eq!(cut.states, expected.states);
        }
        let whole = encode("a".into(), true).await.expect("encoded");
        assert_eq!(whole.truncated_tokens, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_normalized_row_has_length_one() {
    // Would break: embeddings that are to be compared by their angle are compared by their length, too.
    let coordinator = start(1, PredictorSource::Off, |_| ()).await.coordinator;
    let encode = async |normalize| {
        let params = EncodeParams { prompt: TEXT.into(), normalize, ..Default::default() };
        coordinator.encode(params).await.expect("encoded").states
    };
    let (plain, normalized) = (encode(false).await, encode(true).await);
    let length = |row: &[f32]| row.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    assert!((length(&normalized) - 1.0).abs() < 1e-6 && (length(&plain) - 1.0).abs() > 1e-2);
    let by = length(&plain);
    assert!(plain.iter().zip(&normalized).all(|(a, b)| (f64::from(*a) / by - f64::from(*b)).abs() < 1e-6));
}
