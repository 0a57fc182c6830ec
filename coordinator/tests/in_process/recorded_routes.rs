//! Recorded routes in the place of those that the routers choose: each token of each sequence goes where it was recorded to go,
//! through the same passes as ever.

use std::{collections::BTreeSet, sync::Arc};

use futures::{StreamExt, future::join_all};
use sida_cluster::Cluster;
use sida_coordinator::{
    Coordinator, CoordinatorConfig, EncodeParams, ExpertSets, GenerateParams, MicroBatching, PredictorSource,
    ScoreParams,
};
use sida_model::{Checkpoint, Tokenizer};
use sida_routing::{ExpertId, LayerId, RecordedRoutes, TokenRoutes};

use crate::plain_experts::{decoder_only_dir, start_model};

const LAYERS: u16 = 3;
const EXPERTS: u16 = 8;
/// Of an answer.
const TOKENS: usize = 4;

/// An expert of each token at each layer: of the two tokens of prompts expert 0 and 1, of the five that were generated 2 to 6, one
/// farther at each layer.
fn recorded() -> RecordedRoutes {
    let token =
        |first: u16| -> TokenRoutes { (0..LAYERS).map(|layer| vec![ExpertId((first + layer) % EXPERTS)]).collect() };
    RecordedRoutes::new((0..2).map(token).collect(), (2..7).map(token).collect()).expect("whole tokens")
}

/// Where the rows in the first `places` of a sequence go.
fn expected(number: u64, places: usize, prompt_tokens: usize) -> Vec<BTreeSet<ExpertId>> {
    let routes = recorded();
    let of_layer =
        |layer| (0..places).map(|place| routes.of_sequence(number, place, prompt_tokens, layer)[0]).collect();
    (0..LAYERS).map(LayerId).map(of_layer).collect()
}

fn found(experts: &ExpertSets) -> Vec<BTreeSet<ExpertId>> {
    experts.layers().map(|(_, experts)| experts.into_iter().collect()).collect()
}

async fn generate(coordinator: &Coordinator, text: &str, choices: usize) -> Vec<BTreeSet<ExpertId>> {
    let (max_tokens, prompt) = (TOKENS, text.into());
    let params = GenerateParams { prompt, max_tokens, choices, ignore_eos: true, ..Default::default() };
    let tokens: Vec<_> = coordinator.generate(params).await.expect("a stream").collect().await;
    let last = tokens.into_iter().filter_map(|token| token.expect("a token").finish).last();
    found(&last.expect("an end").trace.experts)
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_go_where_they_were_recorded_to_go() {
    // Would break: residency is measured under other routes than those of the file: of the wrong place, of the sequence beside
    // it, or, for some rows, of the model's own router.
    let dir = decoder_only_dir();
    let checkpoint = Checkpoint::open(&dir).expect("model");
    let tokenizer = Tokenizer::open(&dir, checkpoint.config()).expect("tokenizer");
    let (short, long) = ("a", "the expert of the token is the one that the router of the layer chose");
    let prompt = |text: &str| tokenizer.encode(text).expect("ids").len();
    for nodes in 1..=2 {
        let cluster = start_model(&dir, nodes, PredictorSource::Off, |config| {
            config.recorded_routes = Some(Arc::new(recorded()));
            // A long prompt is read in pieces.
            config.limits.prefill_tokens_max = 3;
            config.micro_batching = if nodes == 2 { MicroBatching::Always } else { MicroBatching::Never };
        })
        .await;
        let coordinator = &cluster.coordinator;
        for (number, text) in [short, long].into_iter().enumerate() {
            // The last token is not fed.
            let rows = prompt(text) + TOKENS - 1;
            assert_eq!(generate(coordinator, text, 1).await, expected(number as u64, rows, prompt(text)), "{text}");
        }
        let encoded = coordinator.encode(EncodeParams { prompt: long.into(), ..Default::default() }).await;
        let encoded = encoded.expect("states").trace.experts;
        assert_eq!(found(&encoded), expected(2, prompt(long), prompt(long)));
        let params = ScoreParams { prompt: long.into(), targets: vec![" of".to_owned()], ..Default::default() };
        let target = tokenizer.encode_answer(" of").expect("ids").len();
        let scored = coordinator.score(params).await.expect("scores").trace.experts;
        assert_eq!(found(&scored), expected(3, prompt(long) + target - 1, prompt(long)));
        // The prompt goes with the first choice; each choice then has a number of its own.
        let both = generate(coordinator, short, 2).await;
        let of_choice = |number| expected(number, prompt(short) + TOKENS - 1, prompt(short));
        let prompt_of = expected(4, prompt(short), prompt(short));
        for (layer, found) in both.iter().enumerate() {
            let of_second =
                of_choice(5)[layer].difference(&expected(5, prompt(short), prompt(short))[layer]).copied().collect();
            let all: BTreeSet<_> = &(&of_choice(4)[layer] | &of_second) | &prompt_of[layer];
            assert_eq!(found, &all, "layer {layer} of two choices");
        }
        // In company: whoever comes first, each has a number of its own.
        let together = join_all([short; 3].map(|text| generate(coordinator, text, 1))).await;
        let mut numbers: Vec<_> = (6..9).map(of_choice).collect();
        for found in together {
            let place = numbers.iter().position(|expected| *expected == found);
            numbers.remove(place.unwrap_or_else(|| panic!("{found:?} is none of {numbers:?}")));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_of_another_model_are_refused() {
    // Would break: a coordinator takes routes to experts that its model does not have, and its first batch ends in a panic.
    let of_layers = |layers: usize, expert| RecordedRoutes::new(vec![vec![vec![ExpertId(expert)]; layers]], Vec::new());
    for (routes, reason) in
        [(of_layers(2, 0), "2 layers were recorded"), (of_layers(3, EXPERTS), "expert 8 was recorded")]
    {
        let checkpoint = Checkpoint::open(&decoder_only_dir()).expect("model");
        let cluster = Cluster::fixed(Vec::new(), LAYERS.into(), EXPERTS.into(), 1).expect("cluster");
        let mut config = CoordinatorConfig::new("coordinator".into(), checkpoint, PredictorSource::Off);
        config.recorded_routes = routes.map(Arc::new);
        let Err(error) = Coordinator::start(config, cluster).await else { panic!("it starts") };
        assert!(error.to_string().contains(reason), "{error}");
    }
}
