//! A model whose decoder reads the prompt: answers, scores and states are the reference's, whatever the cluster looks like,
//! whoever shares a batch, and whatever was predicted.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{StreamExt, future::join_all};
use sida_coordinator::{
    Alpha, Coordinator, CoordinatorConfig, EncodeParams, GenerateParams, MicroBatching, Pooling, PredictorSource,
    RequestError, RoutingMode, Sampling, ScoreParams, Token,
};
use sida_model::{Reference, Tokenizer};
use sida_predictor::{HashPredictor, HitRate, PredictorError, PredictorState};
use sida_routing::{Digest, HashTable, LayerId, hash_table::Shape};

use crate::{
    noise_predictor::NoisePredictor,
    plain_experts::{Behaviour, decoder_only_dir, start_model},
};

/// A predictor that runs the model over what a sequence has been fed so far: its tables are right.
struct RightPredictor(Reference);

impl HashPredictor for RightPredictor {
    fn net(&self) -> &str {
        "right"
    }

    fn top_k(&self) -> usize {
        self.0.config().top_k
    }

    fn digest(&self) -> Digest {
        Digest([9; 32])
    }

    fn model_digest(&self) -> Digest {
        self.0.digest()
    }

    fn hit_rates(&self) -> &[HitRate] {
        &[]
    }

    fn encode(&self, _: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        Ok(Vec::new())
    }

    fn decode(&self, states: &mut [&mut PredictorState], tokens: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        let table = |(state, tokens): (&mut &mut PredictorState, &&[u32])| {
            let as_state = |token: &u32| (*token as f32).to_le_bytes();
            let bytes = [state.to_bytes(), tokens.iter().flat_map(as_state).collect()].concat();
            let fed = bytes.as_chunks().0.iter().map(|&token| f32::from_le_bytes(token) as u32).collect::<Vec<_>>();
            **state = PredictorState::from_bytes(&bytes)?;
            let (_, routing) = self.0.decode_forced(&[], &fed).expect("routing");
            let new = |all: usize| all - tokens.len() * self.top_k()..;
            let experts = routing.iter().flat_map(|layer| &layer.routes.experts[new(layer.routes.experts.len())]);
            let alphas = routing.iter().flat_map(|layer| &layer.routes.weights[new(layer.routes.weights.len())]);
            let (layers, tokens, top_k) = (routing.len(), tokens.len(), self.top_k());
            let shape = Shape { first_layer: LayerId(0), layers, tokens, top_k };
            let (experts, alphas) = (experts.flatten().copied().collect(), alphas.copied().collect());
            let num_experts = self.0.config().num_experts;
            Ok(HashTable::new(self.model_digest(), self.digest(), shape, num_experts, experts, alphas)
                .expect("a table"))
        };
        states.iter_mut().zip(tokens).map(table).collect()
    }
}

/// Of one token and of many, and with characters of several bytes.
const TEXTS: [&str; 5] = [
    "the router chose",
    "a",
    "é of 日本",
    "the expert of the token is the one that the router of the layer chose",
    " \n\n",
];
const TOKENS: usize = 20;

struct Oracle {
    reference: Reference,
    tokenizer: Tokenizer,
}

impl Oracle {
    fn open() -> Self {
        let reference = Reference::open(&decoder_only_dir()).expect("reference");
        let tokenizer = Tokenizer::open(&decoder_only_dir(), reference.config()).expect("tokenizer");
        Self { reference, tokenizer }
    }

    fn ids(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text).expect("ids")
    }
}

async fn generate(coordinator: &Coordinator, text: &str) -> Result<(Vec<u32>, String), RequestError> {
    let params = GenerateParams { prompt: text.into(), max_tokens: TOKENS, ..Default::default() };
    let mut stream = coordinator.generate(params).await?;
    let (mut ids, mut text) = (Vec::new(), String::new());
    while let Some(token) = stream.next().await {
        let token = token?;
        ids.push(token.id);
        text += &token.text;
    }
    Ok((ids, text))
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_the_references() {
    // Would break: a prompt is computed otherwise in company, or pieces of text are not the whole, byte for byte.
    let (oracle, dir) = (Oracle::open(), decoder_only_dir());
    let texts = TEXTS.iter().filter(|text| !text.trim().is_empty());
    for nodes in 1..=3 {
        let noise = PredictorSource::Local(Arc::new(NoisePredictor::of(&dir, 7)));
        for predictor in [PredictorSource::Off, noise] {
            let micro_batching = if nodes == 2 { MicroBatching::Always } else { MicroBatching::Never };
            let cluster = start_model(&dir, nodes, predictor, |config| {
                config.micro_batching = micro_batching;
                if nodes == 3 {
                    // Prompts are read in chunks, by themselves and beside others.
                    (config.limits.tokens_max, config.limits.prefill_tokens_max) = (5, 2);
                }
            })
            .await;
            let answers = join_all(texts.clone().map(|text| generate(&cluster.coordinator, text))).await;
            for (text, answer) in texts.clone().zip(answers) {
                let (ids, answer) = answer.expect("an answer");
                let expected = oracle.reference.generate_greedy(&oracle.ids(text), TOKENS).expect("answer");
                assert_eq!(ids, expected, "{text:?} on {nodes} nodes");
                assert_eq!(answer, oracle.tokenizer.decode(&ids).expect("text"), "{text:?}: pieces are the whole");
            }
            assert!(cluster.nodes.iter().all(|node| node.rows.load(Ordering::Relaxed) > 0), "every node has work");
            cluster.coordinator.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_fails_changes_no_token() {
    // Would break: the rows of several experts of one token come from two nodes, and one of them is lost.
    let (oracle, dir) = (Oracle::open(), decoder_only_dir());
    let cluster = start_model(&dir, 3, PredictorSource::Off, |_| ()).await;
    for behaviour in [Behaviour::Panics, Behaviour::ShutsDown, Behaviour::DeviceFails] {
        cluster.nodes[0].behave(behaviour);
        let (ids, _) = generate(&cluster.coordinator, TEXTS[3]).await.expect("an answer");
        assert_eq!(ids, oracle.reference.generate_greedy(&oracle.ids(TEXTS[3]), TOKENS).expect("answer"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scores_go_on_from_the_prompt() {
    // Would break: a target is scored by what follows another token than the one before it.
    let oracle = Oracle::open();
    let cluster = start_model(&decoder_only_dir(), 2, PredictorSource::Off, |_| ()).await;
    let targets = ["s", " of the layer", "é"];
    for text in &TEXTS[..2] {
        let params =
            ScoreParams { prompt: (*text).into(), targets: targets.map(String::from).to_vec(), ..Default::default() };
        let scores = cluster.coordinator.score(params).await.expect("scored");
        let (prompt, vocab) = (oracle.ids(text), oracle.reference.config().vocab_size);
        for (target, found) in targets.iter().zip(&scores.targets) {
            let target = oracle.tokenizer.encode_answer(target).expect("ids");
            let (logits, _) = oracle.reference.decode_forced(&[], &[&prompt[..], &target].concat()).expect("logits");
            let rows = logits.chunks_exact(vocab).skip(prompt.len() - 1);
            let log_p = |(row, &token): (&[f32], &u32)| {
                let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
                f64::from(row[token as usize]) - sum.ln()
            };
            let expected: f64 = rows.zip(&target).map(log_p).sum();
            assert!((f64::from(found.log_likelihood) - expected).abs() < 1e-4, "{target:?}");
            assert_eq!(found.tokens, target.len());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_is_read_beside_those_that_decode() {
    // Would break: all who decode wait until a long prompt is read; or what is read in chunks is answered otherwise.
    let oracle = Oracle::open();
    let one_row = |config: &mut CoordinatorConfig| config.limits.prefill_tokens_max = 1;
    let cluster = start_model(&decoder_only_dir(), 1, PredictorSource::Off, one_row).await;
    cluster.nodes[0].behave(Behaviour::Slow(Duration::from_millis(5)));
    let params = GenerateParams { prompt: TEXTS[0].into(), max_tokens: 1000, ignore_eos: true, ..Default::default() };
    let mut decoding = cluster.coordinator.generate(params).await.expect("accepted");
    decoding.next().await.expect("a token").expect("no error");
    let mut meanwhile = 0;
    let count = async {
        while decoding.next().await.expect("it goes on").is_ok() {
            meanwhile += 1;
        }
    };
    let answered = tokio::select! {
        answered = generate(&cluster.coordinator, TEXTS[3]) => answered,
        () = count => panic!("it failed"),
    };
    let prompt = oracle.ids(TEXTS[3]);
    let expected = oracle.reference.generate_greedy(&prompt, TOKENS).expect("answer");
    assert_eq!(answered.expect("answered").0, expected);
    let steps = prompt.len() + expected.len() - 1;
    assert!(meanwhile >= steps - 2, "{meanwhile} tokens in the {steps} steps that it took");
}

#[tokio::test(flavor = "multi_thread")]
async fn states_are_the_last_hidden_ones() {
    // Would break: an embedding is made of states before the last norm, or of another prompt's.
    let oracle = Oracle::open();
    let cluster = start_model(&decoder_only_dir(), 2, PredictorSource::Off, |_| ()).await;
    let encode = |text: &&str| {
        let params = EncodeParams { prompt: (*text).into(), pooling: Pooling::None, ..Default::default() };
        async { cluster.coordinator.encode(params).await.expect("encoded") }
    };
    let texts = &TEXTS[..4];
    for (text, encoding) in texts.iter().zip(join_all(texts.iter().map(encode)).await) {
        assert_eq!(encoding.states, oracle.reference.last_hidden(&oracle.ids(text)).expect("states"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_whose_states_are_asked_for_are_predicted() {
    // Would break: an embedding in `hash` is that of `exact`, or nothing is loaded ahead of its pass.
    let (oracle, dir) = (Oracle::open(), decoder_only_dir());
    let right = Arc::new(RightPredictor(Reference::open(&dir).expect("reference")));
    let noise = Arc::new(NoisePredictor::of(&dir, 5));
    let by_table = [Alpha::Router, Alpha::Predicted].map(|alpha| RoutingMode::Hash { alpha });
    let routings = by_table.into_iter().chain([RoutingMode::Guided, RoutingMode::Exact]);
    let expected = |text: &str| oracle.reference.last_hidden(&oracle.ids(text)).expect("states");
    for (predictor, is_right) in [(right as Arc<dyn HashPredictor>, true), (noise, false)] {
        let cluster = start_model(&dir, 2, PredictorSource::Local(predictor), |_| ()).await;
        for routing in routings.clone() {
            let encode = |text: &&str| {
                let pooling = Pooling::None;
                let params = EncodeParams { prompt: (*text).into(), routing, pooling, ..Default::default() };
                async { cluster.coordinator.encode(params).await.expect("encoded") }
            };
            let generated = generate(&cluster.coordinator, TEXTS[3]);
            let (encodings, generated) = tokio::join!(join_all(TEXTS[..4].iter().map(encode)), generated);
            assert_eq!(generated.expect("an answer").0.len(), TOKENS);
            for (text, encoding) in TEXTS.iter().zip(encodings) {
                assert!(!encoding.trace.unpredicted, "{text:?} in {routing:?}");
                let is_exact = is_right || routing == RoutingMode::Exact;
                // The factors of a table are the router's but for the last bits.
                if !is_right || routing != by_table[1] {
                    assert_eq!(encoding.states == expected(text), is_exact, "{text:?} in {routing:?}");
                }
                // Nobody asks the router where the factors are the table's.
                let is_compared = routing != by_table[1];
                assert_eq!(encoding.trace.hash.misses > 0, is_compared && !is_right, "{text:?} in {routing:?}");
            }
        }
        assert!(cluster.nodes.iter().any(|node| node.plans_total.load(Ordering::Relaxed) > 0));
        cluster.coordinator.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_right_gives_the_models_own_tokens() {
    // Would break: the weights of a token's experts are not what the router makes of them, such as a sum of 1.
    let oracle = Oracle::open();
    let right = RightPredictor(Reference::open(&decoder_only_dir()).expect("reference"));
    let cluster = start_model(&decoder_only_dir(), 2, PredictorSource::Local(Arc::new(right)), |_| ()).await;
    let expected = oracle.reference.generate_greedy(&oracle.ids(TEXTS[3]), TOKENS).expect("answer");
    let by_table = [Alpha::Router, Alpha::Predicted].map(|alpha| RoutingMode::Hash { alpha });
    for routing in by_table.into_iter().chain([RoutingMode::Guided]) {
        let params = GenerateParams { prompt: TEXTS[3].into(), max_tokens: TOKENS, routing, ..Default::default() };
        let tokens: Vec<_> = cluster.coordinator.generate(params).await.expect("accepted").collect().await;
        let ids: Vec<u32> = tokens.into_iter().map(|token| token.expect("token").id).collect();
        assert_eq!(ids, expected, "{routing:?}");
        // Choices go on from what the predictor knows of the prompt, each from its own tokens.
        let sampling = Sampling { temperature: Some(1.0), seed: Some(4), ..Default::default() };
        let drawn = |routing| {
            let sampling = sampling.clone();
            let params =
                GenerateParams { prompt: TEXTS[3].into(), choices: 3, routing, sampling, ..Default::default() };
            let params = GenerateParams { max_tokens: TOKENS, ..params };
            async { cluster.coordinator.generate(params).await.expect("accepted").collect::<Vec<_>>().await }
        };
        let ids = |tokens: Vec<Result<Token, RequestError>>| -> Vec<(usize, u32)> {
            tokens.into_iter().map(|token| token.expect("token")).map(|token| (token.choice, token.id)).collect()
        };
        assert_eq!(ids(drawn(routing).await), ids(drawn(RoutingMode::Exact).await), "{routing:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_may_choose_several_experts() {
    // Would break: `hash` asks the router after all, or takes fewer experts than the model.
    let oracle = Oracle::open();
    let noise = NoisePredictor::of(&decoder_only_dir(), 5);
    let cluster = start_model(&decoder_only_dir(), 2, PredictorSource::Local(Arc::new(noise)), |_| ()).await;
    let expected = oracle.reference.generate_greedy(&oracle.ids(TEXTS[3]), TOKENS).expect("answer");
    let mut differ = 0;
    let by_table = [Alpha::Router, Alpha::Predicted].map(|alpha| RoutingMode::Hash { alpha });
    for routing in by_table.into_iter().chain([RoutingMode::Guided]) {
        let params = GenerateParams { prompt: TEXTS[3].into(), max_tokens: TOKENS, routing, ..Default::default() };
        let tokens: Vec<_> = cluster.coordinator.generate(params).await.expect("accepted").collect().await;
        let ids: Vec<u32> = tokens.into_iter().map(|token| token.expect("token").id).collect();
        differ += usize::from(ids != expected);
    }
    assert_eq!(differ, 3, "a table of noise gives other answers");
}
