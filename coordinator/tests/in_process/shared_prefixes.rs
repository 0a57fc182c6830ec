//! Prompts that begin as others did: what is computed of them, and that their answers are the same, to the bit.

use std::sync::{Arc, atomic::Ordering};

use futures::{StreamExt, future::join_all};
use parking_lot::Mutex;
use serde_json::json;
use sida_coordinator::{
    CoordinatorConfig, GenerateParams, PredictorSource, RequestError, RoutingMode, Sampling, ScoreParams, Token,
};
use sida_model::{CacheSize, Checkpoint};
use sida_predictor::{HashPredictor, HitRate, PredictorError, PredictorState};
use sida_routing::{Digest, HashTable};
use sida_rpc::Client;

use crate::{
    noise_predictor::NoisePredictor,
    openai_door::served,
    plain_experts::{Behaviour, PlainCluster, decoder_only_dir, start_model},
    plain_http::post,
};

/// Tokens of an answer.
const TOKENS: usize = 6;
/// MoE layers of the model, and experts of each token.
const LAYERS: u64 = 3;
const TOP_K: u64 = 2;

/// So many tokens of a prompt, others for each `number`.
fn prompt(number: u32, count: usize) -> Vec<u32> {
    let token = |at: u32| 2 + (number * 7919 + at * (13 + number)) % 317;
    (0..count as u32).map(token).collect()
}

/// A prompt of which an answer tells all that can be told, and penalties depend on every token.
fn params(prompt: &[u32]) -> GenerateParams {
    let sampling = Sampling { repetition_penalty: Some(1.5), presence_penalty: 0.5, ..Default::default() };
    let prompt = prompt.to_vec().into();
    GenerateParams { prompt, max_tokens: TOKENS, ignore_eos: true, logprobs: Some(3), sampling, ..Default::default() }
}

async fn cluster(configure: impl FnOnce(&mut CoordinatorConfig)) -> PlainCluster {
    start_model(&decoder_only_dir(), 1, PredictorSource::Off, configure).await
}

async fn answer(cluster: &PlainCluster, params: GenerateParams) -> Result<Vec<Token>, RequestError> {
    let tokens: Vec<_> = cluster.coordinator.generate(params).await?.collect().await;
    tokens.into_iter().collect()
}

/// The choice of a token, its id, and how likely it and others were, to the bit.
type Told = (usize, u32, Vec<(u32, u32)>);

fn bits(tokens: &[Token]) -> Vec<Told> {
    let likely = |token: &Token| {
        let told = token.logprobs.iter();
        let all = told
            .flat_map(|told| [(token.id, told.logprob)].into_iter().chain(told.top.iter().map(|t| (t.id, t.logprob))));
        all.map(|(id, logprob)| (id, logprob.to_bits())).collect()
    };
    let mut all: Vec<_> = tokens.iter().map(|token| (token.choice, token.id, likely(token))).collect();
    all.sort_by_key(|(choice, ..)| *choice);
    all
}

fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

fn cached(tokens: &[Token]) -> usize {
    tokens.iter().rev().find_map(|token| token.finish.as_ref()).expect("the last token has it").trace.cached_tokens
}

/// Rows that the experts have computed, as tokens.
fn computed(cluster: &PlainCluster) -> u64 {
    cluster.nodes[0].rows.load(Ordering::Relaxed) / (LAYERS * TOP_K)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_computed_is_not_computed_again() {
    // Would break: each turn of a chat takes as long as all turns before it; or answers differ by what was asked before.
    // Also where a step reads no more than a few rows of a prompt.
    for chunk in [512, 7] {
        let limit = |config: &mut CoordinatorConfig| config.limits.tokens_max = chunk;
        let with = cluster(limit).await;
        let without = cluster(|config| {
            limit(config);
            config.prefix_cache = false;
        })
        .await;
        let first = prompt(1, 60);
        let answered = ids(&answer(&without, params(&first)).await.expect("answered"));
        let turn = [&first[..], &answered, &prompt(2, 20)].concat();
        let asked: [(&str, Vec<u32>, usize); 6] = [
            ("the first", first.clone(), 0),
            ("the same", first.clone(), 59),
            ("with another end", [&first[..50], &prompt(3, 20)].concat(), 50),
            ("the next turn, whose last token was never fed", turn.clone(), 60 + TOKENS - 1),
            ("a part of what is kept", turn[..70].to_vec(), 69),
            ("too little in common", [&first[..15], &prompt(4, 40)].concat(), 0),
        ];
        for (what, prompt, expected) in asked {
            let before = (computed(&with), computed(&without));
            let found = answer(&with, params(&prompt)).await.expect("answered");
            let plain = answer(&without, params(&prompt)).await.expect("answered");
            assert_eq!((cached(&found), cached(&plain)), (expected, 0), "{what}");
            assert_eq!(bits(&found), bits(&plain), "{what}");
            let rows = (prompt.len() + TOKENS - 1) as u64;
            let after = (computed(&with) - before.0, computed(&without) - before.1);
            assert_eq!(after, (rows - expected as u64, rows), "{what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_and_scores_begin_with_it_too() {
    // Would break: a score misses rows of its targets, or a choice goes on from another's tokens.
    let with = cluster(|_| ()).await;
    let without = cluster(|config| config.prefix_cache = false).await;
    let first = prompt(1, 60);
    let sampling = Sampling { temperature: Some(1.5), seed: Some(4), ..Default::default() };
    let drawn = || GenerateParams { choices: 3, sampling: sampling.clone(), ..params(&first) };
    let plain = bits(&answer(&without, drawn()).await.expect("answered"));
    for expected in [0, 59] {
        let found = answer(&with, drawn()).await.expect("answered");
        assert_eq!((cached(&found), bits(&found)), (expected, plain.clone()));
    }
    let targets = ["a", "the router", "é"];
    let score = |prompt: &[u32]| ScoreParams {
        prompt: prompt.to_vec().into(),
        targets: targets.map(String::from).to_vec(),
        ..Default::default()
    };
    for (prompt, expected) in [(first.clone(), 59), (prompt(5, 40), 0), (prompt(5, 40), 39), (vec![5], 0)] {
        let before = computed(&with);
        let found = with.coordinator.score(score(&prompt)).await.expect("scored");
        let plain = without.coordinator.score(score(&prompt)).await.expect("scored");
        assert_eq!((found.trace.cached_tokens, &found.targets), (expected, &plain.targets));
        let fed: usize = found.targets.iter().map(|target| target.tokens).sum();
        assert_eq!(computed(&with) - before, (prompt.len() - 1 - expected + fed) as u64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_with_names_share_nothing() {
    // Would break: by how fast an answer begins, a client learns what another one has asked.
    let cluster = cluster(|_| ()).await;
    let of = |client: Option<&str>| GenerateParams { client: client.map(Client::of_key), ..params(&prompt(1, 40)) };
    for client in [Some("alice"), Some("bob"), None] {
        for expected in [0, 39] {
            let found = answer(&cluster, of(client)).await.expect("answered");
            assert_eq!(cached(&found), expected, "{client:?}");
        }
    }
}

/// A predictor that says how many tokens it saw at a time.
struct Seen(NoisePredictor, Mutex<Vec<usize>>);

impl HashPredictor for Seen {
    fn net(&self) -> &str {
        self.0.net()
    }

    fn digest(&self) -> Digest {
        self.0.digest()
    }

    fn top_k(&self) -> usize {
        self.0.top_k()
    }

    fn model_digest(&self) -> Digest {
        self.0.model_digest()
    }

    fn hit_rates(&self) -> &[HitRate] {
        self.0.hit_rates()
    }

    fn encode(&self, sequences: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        self.0.encode(sequences)
    }

    fn decode(&self, states: &mut [&mut PredictorState], tokens: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        self.1.lock().extend(tokens.iter().map(|tokens| tokens.len()));
        self.0.decode(states, tokens)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_rows_that_are_computed_are_predicted_for() {
    // Would break: experts are loaded for tokens that nobody computes, or hit rates count tokens that met no router.
    let predictor = Arc::new(Seen(NoisePredictor::of(&decoder_only_dir(), 3), Mutex::default()));
    let cluster = start_model(&decoder_only_dir(), 1, PredictorSource::Local(predictor.clone()), |_| ()).await;
    let counted = |tokens: &[Token]| {
        let trace = &tokens[TOKENS - 1].finish.as_ref().expect("the last").trace;
        (trace.cached_tokens, (trace.hash.hits + trace.hash.misses) / (LAYERS * TOP_K))
    };
    let long = prompt(1, 300);
    let first = answer(&cluster, params(&long)).await.expect("answered");
    assert_eq!(counted(&first), (0, 300 + TOKENS as u64 - 1));
    let next = [&long[..280], &prompt(2, 10)].concat();
    predictor.1.lock().clear();
    let second = answer(&cluster, params(&next)).await.expect("answered");
    assert_eq!(counted(&second), (280, 10 + TOKENS as u64 - 1));
    // It sees what stands before the first row, of which not too much.
    assert_eq!(predictor.1.lock()[..2], [128 + 10, 1]);

    // Where tables choose, keys and values are theirs: nothing begins with such, nor do they with the router's.
    let modes = [RoutingMode::Guided, RoutingMode::default(), RoutingMode::Guided];
    for (routing, expected) in modes.into_iter().zip([0, 0, 0]) {
        let found = answer(&cluster, GenerateParams { routing, ..params(&prompt(9, 40)) }).await.expect("answered");
        assert_eq!(counted(&found).0, expected, "{routing:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_makes_room_for_who_runs() {
    // Would break: sequences that are over keep requests waiting, have them refused, or take memory that is not there.
    let checkpoint = Checkpoint::open(&decoder_only_dir()).expect("model");
    let size = CacheSize::new(&checkpoint.config().spec(), size_of::<f32>());
    let without = cluster(|config| config.prefix_cache = false).await;
    let prompts: Vec<_> = (0..6).flat_map(|number| [prompt(number, 60), prompt(number, 90)]).collect();
    let mut expected = Vec::new();
    for prompt in &prompts {
        expected.push(bits(&answer(&without, params(prompt)).await.expect("answered")));
    }
    let largest = size.of_request(90, 1, TOKENS);
    for budget in [largest, 2 * largest, 3 * largest] {
        let with = cluster(|config| config.limits.cache_bytes_max = budget).await;
        for _ in 0..3 {
            let all = join_all(prompts.iter().map(|prompt| answer(&with, params(prompt)))).await;
            for (found, expected) in all.into_iter().zip(&expected) {
                assert_eq!(&bits(&found.expect("answered")), expected);
            }
        }
        // Alone, a prompt finds what it asked before, if both find room.
        let mut hit = 0;
        for _ in 0..2 {
            hit = cached(&answer(&with, params(&prompts[1])).await.expect("answered"));
        }
        assert_eq!(hit, if budget > largest { 89 } else { 0 }, "{budget}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_runs_and_who_has_left_are_begun_with() {
    // Would break: those who ask at the same time compute the same instructions each, or a stopped answer's turn begins anew.
    let with = cluster(|_| ()).await;
    let without = cluster(|config| config.prefix_cache = false).await;
    with.nodes[0].behave(Behaviour::Slow(std::time::Duration::from_millis(5)));
    let long = GenerateParams { max_tokens: 1000, ..params(&prompt(1, 60)) };
    let mut running = with.coordinator.generate(long).await.expect("accepted");
    let mut first = Vec::new();
    while first.len() < 3 {
        first.push(running.next().await.expect("a token").expect("no error").id);
    }
    let other = [prompt(1, 50), prompt(2, 10)].concat();
    let found = answer(&with, params(&other)).await.expect("answered");
    assert_eq!(cached(&found), 50);
    assert_eq!(bits(&found), bits(&answer(&without, params(&other)).await.expect("answered")));

    drop(running);
    with.nodes[0].behave(Behaviour::Works);
    // Whether it has been noticed or not that the caller has left: the two tokens that were fed are there.
    let next = [prompt(1, 60), first, prompt(3, 10)].concat();
    let found = answer(&with, params(&next)).await.expect("answered");
    assert!(cached(&found) >= 62, "{}", cached(&found));
    assert_eq!(bits(&found), bits(&answer(&without, params(&next)).await.expect("answered")));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_kept_of_what_failed() {
    // Would break: one fault of a node spoils the answers to all prompts that begin as one did that met it.
    let with = start_model(&decoder_only_dir(), 3, PredictorSource::Off, |_| ()).await;
    let without = cluster(|config| config.prefix_cache = false).await;
    let (good, bad) = (prompt(1, 60), [prompt(1, 40), prompt(2, 40)].concat());
    let plain = bits(&answer(&without, params(&bad)).await.expect("answered"));
    answer(&with, params(&good)).await.expect("answered");
    with.nodes.iter().for_each(|node| node.behave(Behaviour::Nan));
    let failed = answer(&with, params(&bad)).await.expect_err("not a number");
    assert!(matches!(failed, RequestError::NotANumber), "{failed}");
    with.nodes.iter().for_each(|node| node.behave(Behaviour::Works));
    let found = answer(&with, params(&bad)).await.expect("answered");
    assert_eq!((cached(&found), bits(&found)), (40, plain.clone()));
    // What another node computes is the same, also behind what this one has.
    with.nodes[0].behave(Behaviour::Panics);
    let found = answer(&with, params(&bad)).await.expect("answered");
    assert_eq!((cached(&found), bits(&found)), (79, plain));
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_are_told() {
    // Would break: an application cannot see that its prompts are reused, or is told of more tokens than it sent.
    let served = served(&decoder_only_dir(), |_| ()).await;
    let request = json!({"prompt": [prompt(1, 40), prompt(2, 50)], "n": 2, "max_tokens": 3, "ignore_eos": true});
    for expected in [0, 39 + 49] {
        let usage = post(served.http, "/v1/completions", &request).await.json()["usage"].take();
        let told = (&usage["prompt_tokens"], &usage["prompt_tokens_details"]);
        assert_eq!(told, (&json!(90), &json!({"cached_tokens": expected})), "{usage}");
    }
    let embedding = post(served.http, "/v1/embeddings", &json!({"input": "a chat"})).await.json();
    assert_eq!(embedding["usage"].get("prompt_tokens_details"), None, "of states nothing is reused");
}
