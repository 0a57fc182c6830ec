//! Predictors whose decoder reads the encoder's output: each sequence begins by its own, wherever it is predicted.

use std::{
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use futures::{StreamExt, future::join_all};
use parking_lot::Mutex;
use sida_cluster::{Address, Member, Role};
use sida_coordinator::{
    Alpha, Coordinator, CoordinatorConfig, EncodeParams, Encoding, GenerateParams, MicroBatching, Pooling,
    PredictorSource, RoutingMode, ScoreParams, Trace,
};
use sida_predictor::{HashPredictor, HitRate, PredictorError, PredictorState};
use sida_routing::{Digest, HashTable};

use crate::{
    noise_predictor::NoisePredictor,
    plain_experts::{experts, model_dir, start, start_over},
    plain_nodes::serve_predictor_of_prompts,
};

const TEXTS: [&str; 3] = [
    "sst2 sentence: a gorgeous , witty , seductive movie .",
    "sst2 sentence: dull",
    "sst2 sentence: it is as long as it is loud , and it is very loud and has nothing to say of anybody .",
];
const HASH: RoutingMode = RoutingMode::Hash { alpha: Alpha::Router };

/// What it says of a step depends on the sequence's input, and without that it fails.
struct InputReader {
    noise: NoisePredictor,
    /// What sequences began by.
    started: Mutex<Vec<Vec<f32>>>,
    /// How long it takes over a step.
    delay: Duration,
}

impl InputReader {
    fn new() -> Arc<Self> {
        Self::slow(Duration::ZERO)
    }

    fn slow(delay: Duration) -> Arc<Self> {
        Arc::new(Self { noise: NoisePredictor::of(&model_dir(), 11), started: Mutex::default(), delay })
    }
}

impl HashPredictor for InputReader {
    fn net(&self) -> &str {
        "input-reader"
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
        self.noise.encode(sequences)
    }
    fn reads_input(&self) -> bool {
        true
    }
    fn start(&self, states: &[f32]) -> Result<PredictorState, PredictorError> {
        self.started.lock().push(states.to_vec());
        // Any number that tells inputs apart, as a finite float.
        let sum = states.iter().fold(0u32, |sum, state| sum.rotate_left(5) ^ state.to_bits());
        PredictorState::from_bytes(&((sum >> 8) as f32).to_le_bytes())
    }
    fn decode(&self, states: &mut [&mut PredictorState], tokens: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        thread::sleep(self.delay);
        let table = |(state, tokens): (&&mut PredictorState, &&[u32])| {
            let input = state.to_bytes().try_into().map(f32::from_le_bytes);
            let input = input.map_err(|_| PredictorError::Input { reason: "is unknown".to_owned() })?;
            Ok(self.noise.clone().wherever().behind(input as u64).decoder_table(tokens))
        };
        states.iter().zip(tokens).map(table).collect()
    }
}

async fn encode(coordinator: &Coordinator, text: &str) -> Encoding {
    let params = EncodeParams { prompt: text.into(), pooling: Pooling::None, ..Default::default() };
    coordinator.encode(params).await.expect("encoded")
}

async fn generate(coordinator: &Coordinator, text: &str, routing: RoutingMode) -> (Vec<u32>, Trace) {
    let params = GenerateParams { prompt: text.into(), routing, max_tokens: 6, ignore_eos: true, ..Default::default() };
    let tokens: Vec<_> = coordinator.generate(params).await.expect("accepted").collect().await;
    let mut tokens: Vec<_> = tokens.into_iter().map(|token| token.expect("token")).collect();
    let finish = tokens.last_mut().and_then(|token| token.finish.take()).expect("the last says how it ended");
    (tokens.iter().map(|token| token.id).collect(), finish.trace)
}

async fn score(coordinator: &Coordinator, text: &str, routing: RoutingMode) -> (Vec<f32>, Trace) {
    let targets = ["positive", "negative", "not_equivalent"].map(String::from).to_vec();
    let params = ScoreParams { prompt: text.into(), targets, routing, ..Default::default() };
    let scores = coordinator.score(params).await.expect("scored");
    (scores.targets.iter().map(|target| target.log_likelihood).collect(), scores.trace)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sequence_begins_by_its_own_input() {
    // Would break: steps are predicted from the input of another request of the batch, from none, or once for each target.
    let reader = InputReader::new();
    let alone = start(2, PredictorSource::Local(reader.clone()), |_| ()).await;
    let mut expected = Vec::new();
    for text in TEXTS {
        for routing in [RoutingMode::Exact, HASH] {
            let ((ids, generated), (likelihoods, scored)) =
                (generate(&alone.coordinator, text, routing).await, score(&alone.coordinator, text, routing).await);
            assert!(!generated.unpredicted && !scored.unpredicted, "{text}, {routing:?}");
            let started = std::mem::take(&mut *reader.started.lock());
            assert_eq!(started.len(), 2, "an answer, and all targets of a score");
            if routing == RoutingMode::Exact {
                let states = encode(&alone.coordinator, text).await.states;
                assert!(started.iter().all(|started| *started == states), "{text}");
            } else {
                expected.push((ids, likelihoods));
            }
        }
    }
    let always = |config: &mut CoordinatorConfig| config.micro_batching = MicroBatching::Always;
    let together = start(3, PredictorSource::Local(InputReader::new()), always).await;
    let answers = TEXTS.map(|text| async {
        let (generated, scored) =
            futures::join!(generate(&together.coordinator, text, HASH), score(&together.coordinator, text, HASH));
        (generated.0, scored.0)
    });
    assert_eq!(join_all(answers).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_is_not_predicted_brings_no_input() {
    // Would break: the encoder's states are copied from a GPU for nothing, or a sequence that is predicted has the table of one
    // beside it that is not.
    let reader = InputReader::slow(Duration::from_millis(50));
    let cluster = start(1, PredictorSource::Local(reader.clone()), |_| ()).await;
    cluster.nodes[0].resident.store(usize::MAX, Ordering::Relaxed);
    let (expected, _) = generate(&cluster.coordinator, TEXTS[2], HASH).await;
    let (_, measured) = generate(&cluster.coordinator, TEXTS[1], RoutingMode::Exact).await;
    assert_eq!((measured.unpredicted, reader.started.lock().len()), (false, 2));
    // Six predictions of 50 ms are a hundredth of 30 s, which have not passed.
    let params = GenerateParams { prompt: TEXTS[1].into(), max_tokens: 400, ignore_eos: true, ..Default::default() };
    let mut exact = cluster.coordinator.generate(params).await.expect("accepted");
    exact.next().await.expect("it runs").expect("token");
    // It runs on beside these.
    let ((_, scored), (ids, hash), exact) = futures::join!(
        score(&cluster.coordinator, TEXTS[0], RoutingMode::Exact),
        generate(&cluster.coordinator, TEXTS[2], HASH),
        exact.collect::<Vec<_>>()
    );
    let exact = exact.into_iter().last().expect("tokens").expect("the last").finish.expect("how it ended").trace;
    assert_eq!((exact.unpredicted, scored.unpredicted, hash.unpredicted), (true, true, false));
    assert_eq!((ids, reader.started.lock().len()), (expected, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn predictor_nodes_predict_prompts_and_are_not_asked_for_steps() {
    // Would break: with predictor-nodes steps have no hints, or a node that rightly refuses them is taken for broken, and
    // prompts have none either.
    let (node, steps) = serve_predictor_of_prompts(NoisePredictor::of(&model_dir(), 5)).await;
    let coordinator = |predictor| {
        let address = Address::Grpc(node.address.to_string());
        let member = Member { node: "predictor-node-0".into(), role: Role::PredictorNode, address, weight: 1.0 };
        let patient = |config: &mut CoordinatorConfig| config.predict_timeout = Duration::from_secs(30);
        start_over(vec![Address::Local(experts())], vec![member], predictor, patient)
    };
    let here = coordinator(PredictorSource::NodesForPrompts(InputReader::new())).await;
    for routing in [RoutingMode::Exact, HASH] {
        let (_, trace) = generate(&here, TEXTS[0], routing).await;
        assert!(!trace.unpredicted && trace.hash.misses > 0, "{routing:?}");
    }
    assert_eq!(steps.load(Ordering::Relaxed), 0);
    let nobody = coordinator(PredictorSource::Nodes).await;
    for _ in 0..2 {
        let (_, trace) = generate(&nobody, TEXTS[0], HASH).await;
        assert!(trace.unpredicted);
        assert!(!encode(&nobody, TEXTS[1]).await.trace.unpredicted, "prompts are predicted all the same");
    }
    assert_eq!(steps.load(Ordering::Relaxed), 1, "one refusal is enough");
}
