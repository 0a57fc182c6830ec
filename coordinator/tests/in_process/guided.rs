//! `guided`: the router chooses among the experts that were planned for its own sequence, whoever shares the batch, and
//! asks expert-nodes for no other. Without a prediction it is `exact`, and says so.

use std::sync::{Arc, atomic::Ordering};

use futures::{StreamExt, future::join_all};
use sida_cluster::Address;
use sida_coordinator::{
    Coordinator, CoordinatorConfig, EncodeParams, Encoding, Finish, GenerateParams, MicroBatching, Pooling,
    PredictorSource, Prompt, RoutingMode, ScoreParams, Scores, Trace,
};
use sida_model::{Checkpoint, Stack, Tokenizer};
use sida_predictor::{HashPredictor, HitRate, PredictorError, PredictorState};
use sida_routing::{Digest, ExpertId, HashTable};

use crate::{
    noise_predictor::NoisePredictor,
    plain_experts::{PlainCluster, decoder_only_dir, model_dir, start, start_model, start_over},
    small_experts::SmallExperts,
};

const TEXTS: [&str; 5] = [
    "sst2 sentence: a gorgeous , witty , seductive movie .",
    "sst2 sentence: a slow , patient film that earns its quiet ending .",
    "The <extra_id_0> walks in <extra_id_1> park with a small dog.",
    "mrpc sentence1: He said the food was good . sentence2: The food was good , he said .",
    "a",
];
const TOKENS: usize = 12;

fn noise() -> PredictorSource {
    PredictorSource::Local(Arc::new(NoisePredictor::of(&model_dir(), 9)))
}

async fn encode(coordinator: &Coordinator, text: &str, routing: RoutingMode) -> Encoding {
    let params = EncodeParams { prompt: text.into(), routing, pooling: Pooling::None, ..Default::default() };
    coordinator.encode(params).await.expect("encoded")
}

async fn score(coordinator: &Coordinator, text: &str, routing: RoutingMode) -> Scores {
    let targets = ["positive", "negative", "not_equivalent"].map(String::from).to_vec();
    coordinator
        .score(ScoreParams { prompt: text.into(), targets, routing, ..Default::default() })
        .await
        .expect("scored")
}

async fn generate(coordinator: &Coordinator, prompt: Prompt, routing: RoutingMode) -> (Vec<u32>, Finish) {
    let params = GenerateParams { prompt, routing, max_tokens: TOKENS, ignore_eos: true, ..Default::default() };
    let tokens: Vec<_> = coordinator.generate(params).await.expect("accepted").collect().await;
    let tokens: Vec<_> = tokens.into_iter().map(|token| token.expect("token")).collect();
    let ids = tokens.iter().map(|token| token.id).collect();
    (ids, tokens.into_iter().next_back().and_then(|token| token.finish).expect("the last says how it ended"))
}

/// What a text is answered with: states, likelihoods, tokens. And the traces of the three answers.
async fn answers(
    coordinator: &Coordinator,
    text: &str,
    routing: RoutingMode,
) -> ((Vec<f32>, Vec<f32>, Vec<u32>), [Trace; 3]) {
    let (encoding, scores, (ids, finish)) = futures::join!(
        encode(coordinator, text, routing),
        score(coordinator, text, routing),
        generate(coordinator, text.into(), routing)
    );
    let likelihoods = scores.targets.iter().map(|target| target.log_likelihood).collect();
    ((encoding.states, likelihoods, ids), [encoding.trace, scores.trace, finish.trace])
}

fn unplanned(cluster: &PlainCluster) -> u64 {
    cluster.nodes.iter().map(|node| node.unplanned.load(Ordering::Relaxed)).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_the_same_alone_and_in_a_batch() {
    // Would break: whom a token goes to depends on what was planned for others, on the nodes, or on how a batch is cut.
    let alone = start(1, noise(), |config| config.micro_batching = MicroBatching::Never).await;
    let mut expected = Vec::new();
    for text in TEXTS {
        let (answer, traces) = answers(&alone.coordinator, text, RoutingMode::Guided).await;
        for trace in traces {
            assert_eq!((trace.mode, trace.unpredicted), (RoutingMode::Guided, false), "{text}");
            assert!(trace.rerouted > 0 && trace.hash.misses > 0, "noise leaves the router little: {trace:?}");
        }
        assert_ne!(answer.0, encode(&alone.coordinator, text, RoutingMode::Exact).await.states, "{text}");
        expected.push(answer);
    }
    let together = start(3, noise(), |config| config.micro_batching = MicroBatching::Always).await;
    let guided = join_all(TEXTS.map(|text| answers(&together.coordinator, text, RoutingMode::Guided)));
    let others = join_all(TEXTS.map(|text| answers(&together.coordinator, text, RoutingMode::Exact)));
    let (guided, others) = futures::join!(guided, others);
    for ((text, expected), (answer, _)) in TEXTS.iter().zip(expected).zip(guided) {
        assert_eq!(answer, expected, "{text}");
    }
    let rerouted = |traces: &[Trace; 3]| traces.iter().map(|trace| trace.rerouted).sum::<u64>();
    assert!(others.iter().all(|(_, traces)| rerouted(traces) == 0), "no other mode is rerouted");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_expert_is_asked_for_that_was_not_planned() {
    // Would break: a guided request waits for the load of an expert that nobody could have loaded ahead. Also where
    // expert-nodes are told nothing of other requests.
    for plan_chance in [f64::INFINITY, 0.5] {
        let cluster = start(2, noise(), |config| config.plan_chance = plan_chance).await;
        join_all(TEXTS.map(|text| answers(&cluster.coordinator, text, RoutingMode::Guided))).await;
        assert!(cluster.nodes.iter().all(|node| node.rows.load(Ordering::Relaxed) > 0), "every node has work");
        assert_eq!(unplanned(&cluster), 0);
        join_all(TEXTS.map(|text| answers(&cluster.coordinator, text, RoutingMode::Exact))).await;
        assert!(unplanned(&cluster) > 0, "the router alone goes beyond a plan of noise");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn half_of_the_memory_is_enough_to_wait_for_no_load() {
    // Would break: with less memory than the model has experts, a guided request waits for one that was not loaded
    // ahead, or its answer does not say that it did.
    for (routing, waits) in [(RoutingMode::Guided, false), (RoutingMode::Exact, true)] {
        let node = SmallExperts::new(192);
        let address = vec![Address::Local(node.clone())];
        let never = |config: &mut CoordinatorConfig| config.micro_batching = MicroBatching::Never;
        let coordinator = start_over(address, Vec::new(), noise(), never).await;
        let mut told = 0;
        for text in TEXTS {
            told += encode(&coordinator, text, routing).await.trace.demand_loads;
            told += score(&coordinator, text, routing).await.trace.demand_loads;
            told += generate(&coordinator, text.into(), routing).await.1.trace.demand_loads;
        }
        let loads = node.counters();
        assert_eq!((loads.demand_loads, told > 0), (told, waits), "{routing:?}: {loads:?}");
        assert!(loads.prefetch_loads > 0 && loads.evictions > 0, "{routing:?}: {loads:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoder_uses_what_its_own_table_names() {
    // Would break: tokens go to experts that were planned for another sequence or another layer, or only to their first
    // choices.
    let predictor = NoisePredictor::of(&model_dir(), 9);
    let cluster = start(2, noise(), |_| ()).await;
    let checkpoint = Checkpoint::open(&model_dir()).expect("model");
    let tokenizer = Tokenizer::open(&model_dir(), checkpoint.config()).expect("tokenizer");
    let layers = checkpoint.config().moe_layers(Stack::Encoder);
    let mut beyond_first = 0;
    for text in TEXTS {
        let ids = tokenizer.encode(text).expect("ids");
        let table = predictor.tables(&[&ids]).remove(0);
        let encoding = encode(&cluster.coordinator, text, RoutingMode::Guided).await;
        for (layer, used) in encoding.trace.experts.layers().filter(|(layer, _)| layers.contains(&layer.0)) {
            let named: Vec<&[ExpertId]> = (0..ids.len()).map(|token| table.experts(layer, token)).collect();
            assert!(!used.is_empty());
            assert!(used.iter().all(|expert| named.iter().any(|named| named.contains(expert))), "{text}, {layer}");
            beyond_first += used.iter().filter(|expert| named.iter().all(|named| named[0] != **expert)).count();
        }
    }
    assert!(beyond_first > 0, "all that is named may be chosen");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_all_experts_are_planned_it_is_exact() {
    // Would break: an answer differs from the model's own in its last bits although the router chose freely.
    let all = PredictorSource::Local(Arc::new(NoisePredictor::of(&model_dir(), 9).naming(64)));
    let cluster = start(2, all, |_| ()).await;
    for text in TEXTS.iter().filter(|text| text.len() > 40) {
        let guided = encode(&cluster.coordinator, text, RoutingMode::Guided).await;
        assert_eq!((guided.trace.rerouted, guided.trace.unpredicted), (0, false), "{text}");
        assert_eq!(guided.states, encode(&cluster.coordinator, text, RoutingMode::Exact).await.states, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_read_as_its_tokens_would_be_generated() {
    // Would break: what a decoder has read depends on what came behind it, so that an answer goes on otherwise when it is
    // given as part of the next prompt.
    let dir = decoder_only_dir();
    let predictor = PredictorSource::Local(Arc::new(NoisePredictor::of(&dir, 5).wherever()));
    let cluster = start_model(&dir, 2, predictor, |_| ()).await;
    let checkpoint = Checkpoint::open(&dir).expect("model");
    let tokenizer = Tokenizer::open(&dir, checkpoint.config()).expect("tokenizer");
    let prompt = tokenizer.encode("the expert of the token").expect("ids");
    let go_on = async |tokens: Vec<u32>| {
        let (ids, finish) = generate(&cluster.coordinator, Prompt::Tokens(tokens), RoutingMode::Guided).await;
        assert!(finish.trace.rerouted > 0 && !finish.trace.unpredicted);
        ids
    };
    let whole = go_on(prompt.clone()).await;
    for read in [1, 5] {
        let rest = go_on([&prompt[..], &whole[..read]].concat()).await;
        assert_eq!(rest[..TOKENS - read], whole[read..], "after {read} tokens");
    }
}

/// A predictor that fails, or whose tables say that they are of another model; of a decoder's steps always the former.
struct Useless {
    noise: NoisePredictor,
    fails: bool,
}

impl HashPredictor for Useless {
    fn net(&self) -> &str {
        "useless"
    }

    fn digest(&self) -> Digest {
        self.noise.digest()
    }

    fn top_k(&self) -> usize {
        self.noise.top_k()
    }

    fn model_digest(&self) -> Digest {
        self.noise.model_digest()
    }

    fn hit_rates(&self) -> &[HitRate] {
        &[]
    }

    fn encode(&self, sequences: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        if self.fails {
            return Err(PredictorError::Token { id: 0, vocab_size: 0 });
        }
        let mut tables = self.noise.tables(sequences);
        tables.iter_mut().for_each(|table| table.model = Digest([4; 32]));
        Ok(tables)
    }

    fn decode(&self, _: &mut [&mut PredictorState], _: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        Err(PredictorError::Token { id: 0, vocab_size: 0 })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_prediction_it_is_exact_and_says_so() {
    // Would break: a guided request fails, or is routed by a plan that nobody made, where the predictor does not answer.
    let useless = |fails| {
        let noise = NoisePredictor::of(&model_dir(), 9);
        PredictorSource::Local(Arc::new(Useless { noise, fails }))
    };
    let exact = start(1, PredictorSource::Off, |_| ()).await;
    for predictor in [PredictorSource::Off, useless(true), useless(false)] {
        let cluster = start(2, predictor, |_| ()).await;
        for text in &TEXTS[..3] {
            let (answer, traces) = answers(&cluster.coordinator, text, RoutingMode::Guided).await;
            assert_eq!(answer, answers(&exact.coordinator, text, RoutingMode::Exact).await.0, "{text}");
            for trace in traces {
                assert_eq!((trace.mode, trace.unpredicted, trace.rerouted), (RoutingMode::Guided, true, 0), "{text}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_too_few_experts_chooses_none() {
    // Would break: a token of a model that gives each several experts goes to fewer, or to what was not planned.
    let dir = decoder_only_dir();
    let narrow = NoisePredictor::of(&dir, 5).naming(1);
    assert!(narrow.top_k() < Checkpoint::open(&dir).expect("model").config().top_k);
    let cluster = start_model(&dir, 1, PredictorSource::Local(Arc::new(narrow)), |_| ()).await;
    let prompt = || "the router chose".into();
    let (guided, finish) = generate(&cluster.coordinator, prompt(), RoutingMode::Guided).await;
    assert_eq!(guided, generate(&cluster.coordinator, prompt(), RoutingMode::Exact).await.0);
    assert!(finish.trace.unpredicted && finish.trace.rerouted == 0);
}
