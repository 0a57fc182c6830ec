//! `exact` is the reference's own output, whatever the cluster looks like and whatever was predicted.

use std::sync::{Arc, atomic::Ordering};

use futures::{StreamExt, future::join_all};
use sida_coordinator::{
    Alpha, Coordinator, CoordinatorConfig, EncodeParams, FinishReason, GenerateParams, MicroBatching, Pooling,
    PredictorSource, RoutingMode, Sampling, ScoreParams,
};
use sida_model::{ModelConfig, Reference, Tokenizer};

use crate::{
    noise_predictor::NoisePredictor,
    plain_experts::{model_dir, start},
};

const TEXTS: [&str; 6] = [
    "sst2 sentence: a gorgeous , witty , seductive movie .",
    "sst2 sentence: a slow , patient film that earns its quiet ending .",
    "The <extra_id_0> walks in <extra_id_1> park with a small dog.",
    "sst2 sentence: unflinchingly bleak and desperate",
    "mrpc sentence1: He said the food was good . sentence2: The food was good , he said .",
    "a",
];

struct Oracle {
    reference: Reference,
    tokenizer: Tokenizer,
}

impl Oracle {
    fn open() -> Self {
        let reference = Reference::open(&model_dir()).expect("reference");
        let tokenizer = Tokenizer::open(&model_dir(), reference.config()).expect("tokenizer");
        Self { reference, tokenizer }
    }

    fn greedy(&self, text: &str, tokens_max: usize) -> Vec<u32> {
        self.reference.generate_greedy(&self.tokenizer.encode(text).expect("ids"), tokens_max).expect("answer")
    }
}

async fn generate(coordinator: &Coordinator, params: GenerateParams) -> (Vec<u32>, String, FinishReason) {
    let mut stream = coordinator.generate(params).await.expect("accepted");
    let (mut ids, mut text) = (Vec::new(), String::new());
    while let Some(token) = stream.next().await {
        let token = token.expect("token");
        ids.push(token.id);
        text += &token.text;
        if let Some(finish) = token.finish {
            assert_eq!(finish.generated_tokens, ids.len());
            return (ids, text, finish.reason);
        }
    }
    panic!("the stream ended without saying how");
}

fn local(net: impl sida_predictor::HashPredictor + 'static) -> PredictorSource {
    PredictorSource::Local(Arc::new(net))
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_tokens_are_the_references() {
    // Would break: the number of nodes, the company in a batch or a wrong prediction changes an answer.
    let oracle = Oracle::open();
    for nodes in 1..=4 {
        for predictor in [PredictorSource::Off, local(NoisePredictor::of(&model_dir(), 7))] {
            let micro_batching = if nodes % 2 == 1 { MicroBatching::Always } else { MicroBatching::Never };
            let cluster = start(nodes, predictor, |config| config.micro_batching = micro_batching).await;
            let answers = TEXTS.map(|text| {
                let params = GenerateParams { prompt: text.into(), max_tokens: 24, ..Default::default() };
                generate(&cluster.coordinator, params)
            });
            for (text, (ids, answer, _)) in TEXTS.iter().zip(join_all(answers).await) {
                assert_eq!(ids, oracle.greedy(text, 24), "{text} on {nodes} nodes");
                assert_eq!(answer, oracle.tokenizer.decode(&ids).expect("text"), "streamed pieces are the whole");
            }
            assert!(cluster.nodes.iter().all(|node| node.rows.load(Ordering::Relaxed) > 0), "every node has work");
            cluster.coordinator.stop().await;
            assert!(cluster.nodes.iter().all(|node| node.plans.lock().is_empty()), "every hint is taken back");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn encoder_states_are_the_references_to_the_bit() {
    // Would break: a row's result depends on its batch, or a pooled state is another sequence's.
    let oracle = Oracle::open();
    for micro_batching in [MicroBatching::Never, MicroBatching::Always, MicroBatching::AsMeasured] {
        let configure = |config: &mut CoordinatorConfig| config.micro_batching = micro_batching;
        let cluster = start(2, local(NoisePredictor::of(&model_dir(), 3)), configure).await;
        encodings_are_the_references(&oracle, &cluster.coordinator).await;
    }
}

async fn encodings_are_the_references(oracle: &Oracle, coordinator: &Coordinator) {
    let encode = |text: &&str| {
        let params = EncodeParams { prompt: (*text).into(), pooling: Pooling::None, ..Default::default() };
        async { coordinator.encode(params).await.expect("encoded") }
    };
    for (text, encoding) in TEXTS.iter().zip(join_all(TEXTS.iter().map(encode)).await) {
        let ids = oracle.tokenizer.encode(text).expect("ids");
        let (states, routing) = oracle.reference.encode(&ids).expect("states");
        assert_eq!(encoding.states, states, "{text}");
        assert_eq!((encoding.rows, encoding.prompt_tokens), (ids.len(), ids.len()));
        for (layer, (_, used)) in routing.iter().zip(encoding.trace.experts.layers()) {
            let mut expected: Vec<_> = layer.routes.experts.iter().flatten().copied().collect();
            expected.sort();
            expected.dedup();
            assert_eq!(used, expected);
        }
        let looked_up = encoding.trace.hash.hits + encoding.trace.hash.misses;
        assert_eq!(looked_up, (ids.len() * routing.len()) as u64);
    }
    let mean = EncodeParams { prompt: TEXTS[0].into(), ..Default::default() };
    let mean = coordinator.encode(mean).await.expect("encoded");
    assert_eq!((mean.rows, mean.states.len()), (1, mean.d_model));
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_are_the_references() {
    // Would break: a candidate is scored by another one's logits, or without its end of sequence.
    let oracle = Oracle::open();
    let cluster = start(2, PredictorSource::Off, |_| ()).await;
    let targets = ["positive", "negative", "True", "not_equivalent"];
    let score = |text: &&str| {
        let targets = targets.map(String::from).to_vec();
        let params = ScoreParams { prompt: (*text).into(), targets, ..Default::default() };
        async { cluster.coordinator.score(params).await.expect("scored") }
    };
    for (text, scores) in TEXTS.iter().zip(join_all(TEXTS.iter().map(score)).await) {
        let (states, _) = oracle.reference.encode(&oracle.tokenizer.encode(text).expect("ids")).expect("states");
        for (target, found) in targets.iter().zip(&scores.targets) {
            let expected = expected_score(&oracle, &states, &oracle.tokenizer.encode(target).expect("ids"));
            assert!((f64::from(found.log_likelihood) - expected).abs() < 1e-4, "{target} of {text}");
            assert!(found.tokens >= 2);
        }
    }
}

fn expected_score(oracle: &Oracle, states: &[f32], target: &[u32]) -> f64 {
    let config: &ModelConfig = oracle.reference.config();
    let fed = [&[config.generation.decoder_start_token_id], &target[..target.len() - 1]].concat();
    let (logits, _) = oracle.reference.decode_forced(states, &fed).expect("logits");
    let rows = logits.chunks_exact(config.vocab_size);
    let log_p = |(row, &token): (&[f32], &u32)| {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        f64::from(row[token as usize]) - sum.ln()
    };
    rows.zip(target).map(log_p).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn capacity_is_the_references() {
    // Would break: enforcing capacity drops tokens by what else is in the batch.
    let oracle = Oracle::open();
    let cluster = start(2, PredictorSource::Off, |config| config.enforce_capacity = true).await;
    let oracle = Oracle { reference: oracle.reference.with_enforced_capacity(true), ..oracle };
    for text in TEXTS {
        let params = GenerateParams { prompt: text.into(), max_tokens: 8, ..Default::default() };
        assert_eq!(generate(&cluster.coordinator, params).await.0, oracle.greedy(text, 8));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hash_mode_follows_the_table() {
    // Would break: `hash` asks the router after all, or mixes up the rows of requests in other modes.
    let oracle = Oracle::open();
    let noise = NoisePredictor::of(&model_dir(), 5);
    let predicted = noise.clone();
    let cluster = start(2, local(noise), |_| ()).await;
    let encode = |(at, text): (usize, &&str)| {
        let alpha = if at % 3 == 1 { Alpha::Router } else { Alpha::Predicted };
        let routing = if at % 3 == 0 { RoutingMode::Exact } else { RoutingMode::Hash { alpha } };
        let params = EncodeParams { prompt: (*text).into(), routing, pooling: Pooling::None, ..Default::default() };
        async { cluster.coordinator.encode(params).await.expect("encoded") }
    };
    let encodings = join_all(TEXTS.iter().enumerate().map(encode)).await;
    for (at, (text, encoding)) in TEXTS.iter().zip(encodings).enumerate() {
        let ids = oracle.tokenizer.encode(text).expect("ids");
        let (states, _) = oracle.reference.encode(&ids).expect("states");
        if at % 3 == 0 {
            assert_eq!(encoding.states, states, "{text} ran exact");
            continue;
        }
        assert_ne!(encoding.states, states, "{text} ran by a table of noise");
        let table = &predicted.tables(&[&ids])[0];
        for (layer, used) in encoding.trace.experts.layers().take(table.shape().layers) {
            let mut expected: Vec<_> = (0..ids.len()).map(|token| table.experts(layer, token)[0]).collect();
            expected.sort();
            expected.dedup();
            assert_eq!(used, expected);
        }
        assert_eq!(encoding.trace.hash.hits + encoding.trace.hash.misses == 0, at % 3 == 2, "no router, no counts");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unpredicted_hash_is_exact_and_says_so() {
    // Would break: without a predictor, `hash` guesses, or fails.
    let oracle = Oracle::open();
    let cluster = start(1, PredictorSource::Off, |_| ()).await;
    let routing = RoutingMode::Hash { alpha: Alpha::Predicted };
    let params = EncodeParams { prompt: TEXTS[0].into(), routing, pooling: Pooling::None, ..Default::default() };
    let encoding = cluster.coordinator.encode(params).await.expect("encoded");
    let ids = oracle.tokenizer.encode(TEXTS[0]).expect("ids");
    assert_eq!(encoding.states, oracle.reference.encode(&ids).expect("states").0);
    assert!(encoding.trace.unpredicted);
}

#[tokio::test(flavor = "multi_thread")]
async fn options_of_generation() {
    // Would break: an answer does not end where it was asked to, or goes on where it was not.
    let cluster = start(2, PredictorSource::Off, |_| ()).await;
    let free = GenerateParams { prompt: TEXTS[0].into(), max_tokens: 32, ..Default::default() };
    let (ids, answer, reason) = generate(&cluster.coordinator, free.clone()).await;
    assert_eq!(reason, FinishReason::End);
    let forced = GenerateParams { min_tokens: Some(20), max_tokens: 20, ..free.clone() };
    let (forced, _, reason) = generate(&cluster.coordinator, forced).await;
    assert_eq!((forced.len(), reason), (20, FinishReason::Length));
    assert!(!forced.contains(ids.last().expect("end of sequence")));
    let ignoring = GenerateParams { ignore_eos: true, max_tokens: 20, ..free.clone() };
    let (ignoring, _, _) = generate(&cluster.coordinator, ignoring).await;
    assert_eq!((ignoring.len(), &ignoring[..ids.len()]), (20, &ids[..]));
    let stopped = GenerateParams { stop: vec![answer[1..3].to_owned()], ..free.clone() };
    let (_, cut, reason) = generate(&cluster.coordinator, stopped).await;
    assert_eq!((cut.as_str(), reason), (&answer[..1], FinishReason::Stop));
    // A stop text that all of the answer is full of ends it with the first token that may be its last.
    let letters = "etaoinsrhdlcumpg".chars().map(String::from).collect();
    let short = GenerateParams { stop: letters, max_tokens: 20, ignore_eos: true, ..free.clone() };
    assert!(generate(&cluster.coordinator, short.clone()).await.0.len() < 5);
    let long = GenerateParams { min_tokens: Some(12), ..short };
    let (ids, _, reason) = generate(&cluster.coordinator, long).await;
    assert!(ids.len() >= 12 && reason == FinishReason::Stop, "{} tokens, {reason:?}", ids.len());
    let (temperature, top_k, top_p, seed) = (Some(1.5), Some(50), Some(0.95), Some(11));
    let sampling = Sampling { temperature, top_k, top_p, seed, ..Default::default() };
    let sampled = GenerateParams { sampling, min_tokens: Some(12), max_tokens: 12, ..free };
    let alone = generate(&cluster.coordinator, sampled.clone()).await.0;
    let together = join_all([sampled.clone(), sampled.clone()].map(|p| generate(&cluster.coordinator, p))).await;
    assert!(together.iter().all(|(ids, _, _)| *ids == alone), "a seed's draws depend on the batch");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_text_ends_an_answer_that_is_long_enough() {
    // Would break: an answer runs on past a stop text that its last required token completes, or that began before that.
    let (cluster, oracle) = (start(2, PredictorSource::Off, |_| ()).await, Oracle::open());
    let free = GenerateParams { prompt: TEXTS[2].into(), max_tokens: 12, ..Default::default() };
    let (ids, _, _) = generate(&cluster.coordinator, free.clone()).await;
    let text_of = |tokens: usize| oracle.tokenizer.decode(&ids[..tokens]).expect("text");
    let mut looked_at = 0;
    for tokens in 4..ids.len() - 1 {
        let (before, until, after) = (text_of(tokens - 1), text_of(tokens), text_of(tokens + 1));
        let last = until.char_indices().next_back().map_or(0, |(at, _)| at);
        if before.len() > last || until.len() == after.len() || !after.starts_with(&until) {
            continue; // This token or the next has no text of its own.
        }
        looked_at += 1;
        let stopped = |stop: &str| {
            let params = GenerateParams { min_tokens: Some(tokens), stop: vec![stop.to_owned()], ..free.clone() };
            generate(&cluster.coordinator, params)
        };
        let (answer, _, reason) = stopped(&until[last..]).await;
        assert_eq!((answer.len(), reason), (tokens, FinishReason::Stop), "complete at token {tokens}");
        let across = &after[last..];
        let (answer, cut, reason) = stopped(across).await;
        assert_eq!((answer.len(), reason), (tokens + 1, FinishReason::Stop), "{across:?} begins at token {tokens}");
        assert_eq!(cut, &after[..last]);
    }
    assert!(looked_at > 2, "{looked_at} places in {:?}", text_of(ids.len()));
}
