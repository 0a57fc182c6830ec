//! A hash predictor of one's own, in a cluster that runs in this process with room for a quarter of the experts.
//!
//! ```sh
//! cargo run --release -p sida-examples --bin own_predictor -- models/switch-tiny-64
//! ```
//!
//! The predictor remembers where the routers sent each token of some texts, and says that they will do so again. Where it
//! is wrong an expert is loaded late; the answer is the model's own all the same.

use std::{
    collections::HashMap,
    env,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use futures::StreamExt;
use sida_cluster::{Address, Cluster, Member, Role};
use sida_coordinator::{Coordinator, CoordinatorConfig, GenerateParams, PredictorSource};
use sida_expert_node::{Engine, ExpertMemory, ExpertNodeConfig};
use sida_model::{Checkpoint, Reference, RoutedLayer, Tokenizer};
use sida_predictor::{HashPredictor, HitRate, PredictorError, PredictorShape, PredictorState};
use sida_routing::{Digest, ExpertId, HashTable, LayerId, hash_table::Shape};

const SEEN: [&str; 3] = [
    "sst2 sentence: sharp , brisk and very funny .",
    "sst2 sentence: a tender story of a lighthouse keeper who teaches his niece to read the weather .",
    "sst2 sentence: loud , long and hollow .",
];
const ASKED: &str = "sst2 sentence: a brisk and tender story , and very funny .";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let model = PathBuf::from(env::args().nth(1).context("usage: own_predictor MODEL")?);
    let predictor = SeenBefore::learn(&model, &SEEN)?;
    let coordinator = start_cluster(&model, Arc::new(predictor)).await?;

    let request = GenerateParams { prompt: ASKED.into(), max_tokens: 8, ..Default::default() };
    let mut answer = coordinator.generate(request).await?;
    while let Some(token) = answer.next().await {
        let token = token?;
        print!("{}", token.text);
        if let Some(finish) = token.finish {
            let hash = finish.trace.hash;
            println!("\n{} of {} expert calls were predicted", hash.hits, hash.hits + hash.misses);
        }
    }
    coordinator.stop().await;
    Ok(())
}

/// A coordinator with this predictor, and one expert-node that it calls directly.
async fn start_cluster(model: &Path, predictor: Arc<dyn HashPredictor>) -> anyhow::Result<Coordinator> {
    let checkpoint = Checkpoint::open(model)?;
    let (moe_layers, num_experts) = (checkpoint.config().moe_layer_count(), checkpoint.config().num_experts);
    let node = ExpertNodeConfig {
        expert_memory: ExpertMemory::Share(0.25),
        ..ExpertNodeConfig::new("expert-node-0".into(), model.to_owned())
    };
    let experts = Arc::new(Engine::of_checkpoint(&node, checkpoint.clone())?);
    let member = Member { node: node.node, role: Role::ExpertNode, address: Address::Local(experts), weight: 1.0 };
    let cluster = Cluster::fixed(vec![member], moe_layers, num_experts, 1)?;
    let config = CoordinatorConfig::new("coordinator-0".into(), checkpoint, PredictorSource::Local(predictor));
    Ok(Coordinator::start(config, cluster).await?)
}

/// Predicts that a token goes where it went the last time.
struct SeenBefore {
    model: Digest,
    shape: PredictorShape,
    experts: HashMap<(LayerId, u32), ExpertId>,
}

impl SeenBefore {
    /// Has the model read and answer `texts`, and keeps what its routers decided.
    fn learn(model: &Path, texts: &[&str]) -> anyhow::Result<Self> {
        let reference = Reference::open(model)?;
        let config = reference.config();
        let tokenizer = Tokenizer::open(model, config)?;
        let shape = PredictorShape::of(config);
        let mut seen = Self { model: reference.digest(), shape, experts: HashMap::new() };
        for text in texts {
            let read = tokenizer.encode(text)?;
            let (states, routing) = reference.encode(&read)?;
            seen.remember(&read, &routing);
            let mut written = vec![config.generation.decoder_start_token_id];
            written.extend(reference.generate_greedy(&read, 8)?);
            let (_, routing) = reference.decode_forced(&states, &written)?;
            seen.remember(&written, &routing);
        }
        Ok(seen)
    }

    /// `routing` holds one entry per MoE layer, and in it one expert per token.
    fn remember(&mut self, tokens: &[u32], routing: &[RoutedLayer]) {
        for routed in routing {
            for (&token, expert) in tokens.iter().zip(&routed.routes.experts) {
                self.experts.extend(expert.map(|expert| ((routed.layer, token), expert)));
            }
        }
    }

    /// One expert per layer and token. One that was never seen is said to go to expert 0, with probability 0.
    fn table(&self, layers: &Range<u16>, tokens: &[u32]) -> Result<HashTable, PredictorError> {
        let entries = layers.clone().flat_map(|layer| tokens.iter().map(move |&token| (LayerId(layer), token)));
        let (experts, alphas) =
            entries.map(|entry| self.experts.get(&entry).map_or((ExpertId(0), 0.0), |&expert| (expert, 1.0))).unzip();
        let first_layer = LayerId(layers.start);
        let shape = Shape { first_layer, layers: layers.len(), tokens: tokens.len(), top_k: self.top_k() };
        Ok(HashTable::new(self.model, self.digest(), shape, self.shape.num_experts, experts, alphas)?)
    }
}

impl HashPredictor for SeenBefore {
    fn net(&self) -> &str {
        "seen-before"
    }

    /// Tells predictors apart. That of a file is its SHA-256; this one is the only one of its kind.
    fn digest(&self) -> Digest {
        Digest([1; 32])
    }

    fn top_k(&self) -> usize {
        1
    }

    fn model_digest(&self) -> Digest {
        self.model
    }

    /// Nothing was measured.
    fn hit_rates(&self) -> &[HitRate] {
        &[]
    }

    fn encode(&self, sequences: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        sequences.iter().map(|tokens| self.table(&self.shape.encoder_layers, tokens)).collect()
    }

    /// Needs no memory of a sequence, so the states stay as they are.
    fn decode(&self, _: &mut [&mut PredictorState], tokens: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError> {
        tokens.iter().map(|tokens| self.table(&self.shape.decoder_layers, tokens)).collect()
    }
}
