//! How sequences share the memory for keys and values: those that find none wait, and what can never fit is refused.

use futures::{StreamExt, future::join_all};
use sida_coordinator::{
    EncodeParams, GenerateParams, MicroBatching, PredictorSource, RequestError, ScoreParams, Token,
};
use sida_model::{CacheSize, Checkpoint, Stack};
use sida_routing::LayerId;
use sida_rpc::{Fault, Reason};
use tonic::Status;

use crate::plain_experts::{PlainCluster, model_dir, start};

/// Tokens of an answer: one block of memory.
const TOKENS: usize = 24;

fn params(number: usize) -> GenerateParams {
    let text = format!("sst2 sentence: movie number {number} is {}", "fine ".repeat(number));
    GenerateParams { prompt: text.into(), max_tokens: TOKENS, ignore_eos: true, ..Default::default() }
}

async fn answer(cluster: &PlainCluster, params: GenerateParams) -> Result<Vec<Token>, RequestError> {
    let tokens: Vec<_> = cluster.coordinator.generate(params).await?.collect().await;
    tokens.into_iter().collect()
}

fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

fn prompt_tokens(tokens: &[Token]) -> usize {
    tokens.last().and_then(|token| token.finish.as_ref()).expect("the last token has it").prompt_tokens
}

/// The most sequences that were decoded in one step, by what the node was given in the decoder's layers.
fn sequences_most(cluster: &PlainCluster, decoder: std::ops::Range<u16>) -> u64 {
    let most = cluster.nodes[0].rows_most.lock();
    decoder.filter_map(|layer| most.get(&LayerId(layer))).copied().max().expect("something was decoded")
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_without_room_wait() {
    // Would break: more sequences run than there is memory for, or one that waits is lost or answered otherwise.
    let checkpoint = Checkpoint::open(&model_dir()).expect("model");
    let size = CacheSize::new(&checkpoint.config().spec(), size_of::<f32>());
    let decoder = checkpoint.config().moe_layers(Stack::Decoder);
    let roomy = start(1, PredictorSource::Off, |config| config.micro_batching = MicroBatching::Never).await;
    let mut expected = Vec::new();
    for number in 0..10 {
        expected.push(answer(&roomy, params(number)).await.expect("answered"));
    }
    let largest = expected.iter().map(|tokens| size.of_request(prompt_tokens(tokens), 1, TOKENS)).max().expect("ten");
    let all = join_all((0..10).map(|number| answer(&roomy, params(number)))).await;
    assert!(all.iter().all(Result::is_ok) && sequences_most(&roomy, decoder.clone()) > 2, "too little at once");

    let narrow = start(1, PredictorSource::Off, |config| {
        config.micro_batching = MicroBatching::Never;
        config.limits.cache_bytes_max = 2 * largest;
    })
    .await;
    let impossible = answer(&narrow, GenerateParams { max_tokens: 1024, ..params(0) });
    let (answers, impossible) =
        tokio::join!(join_all((0..10).map(|number| answer(&narrow, params(number)))), impossible);
    for (found, expected) in answers.iter().zip(&expected) {
        assert_eq!(ids(found.as_ref().expect("answered")), ids(expected));
    }
    assert_eq!(sequences_most(&narrow, decoder), 2);
    let error = impossible.expect_err("refused");
    let RequestError::CacheTooSmall { needed, limit } = error else { panic!("{error}") };
    assert_eq!((needed, limit), (size.of_request(prompt_tokens(&expected[0]), 1, 1024), 2 * largest));
    let status = Status::from(Fault::from(error));
    assert_eq!(Reason::of(&status), Some(Reason::InvalidRequest));
    assert!(status.message().contains(&needed.to_string()) && status.message().contains(&limit.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_for_sequences_only() {
    // Would break: a text that is only encoded is refused for memory that it never takes, or a target goes uncounted.
    let checkpoint = Checkpoint::open(&model_dir()).expect("model");
    let size = CacheSize::new(&checkpoint.config().spec(), size_of::<f32>());
    let cluster =
        start(1, PredictorSource::Off, |config| config.limits.cache_bytes_max = size.of_request(8, 2, 1)).await;
    let long = EncodeParams { prompt: "good ".repeat(400).into(), ..Default::default() };
    let encoded = cluster.coordinator.encode(long).await;
    assert!(encoded.is_ok(), "{encoded:?}");
    let score = |targets: usize| {
        let targets = vec!["x".to_owned(); targets];
        cluster.coordinator.score(ScoreParams { prompt: "good".into(), targets, ..Default::default() })
    };
    assert_eq!(score(2).await.expect("two fit").targets.len(), 2);
    assert!(matches!(score(3).await, Err(RequestError::CacheTooSmall { .. })));
}
