//! A family of models of one's own: says how its config reads, and the engine serves it as any other.
//!
//! ```sh
//! cargo run --release -p sida-examples --bin own_family -- /tmp/own-family
//! ```
//!
//! The family is made up: the first block has no experts, every other one looks back only so far, and an expert that all
//! tokens go to stands beside those that are chosen. So are its weights, which are random, and what it writes is noise. It is
//! the same noise from a cluster, which holds half of the experts at a time, as from the reference.

use std::{env, path::PathBuf, sync::Arc};

use anyhow::Context;
use futures::TryStreamExt;
use serde_json::{Value, json};
use sida_cluster::{Address, Cluster, Member, Role};
use sida_coordinator::{Coordinator, CoordinatorConfig, GenerateParams, PredictorSource};
use sida_expert_node::{Engine, ExpertMemory, ExpertNodeConfig};
use sida_model::{
    BlockFormats, Checkpoint, ModelConfig, ModelError, Reference, Tokenizer,
    family::{Causal, Described, Family, Json},
    names::TensorNames,
    spec::{QkNorm, RouterSpec, SharedSpec},
    synth::{CausalShape, SynthShape, synth},
};

const FAMILY: Family = Family { architecture: "NearAndFarMoeForCausalLM", config };
const PROMPT: &str = "the lighthouse keeper reads the weather";
const TOKENS: usize = 12;

/// What a config.json of the family means. Every field that changes what is computed is read here, or refused by its name.
fn config(fields: &Json<'_>) -> Result<ModelConfig, ModelError> {
    // Heads and rotary positions, whose fields are called as other families call them.
    let mut attention = fields.attention(10_000.0, None)?;
    attention.qk_norm = QkNorm::Heads;
    let blocks = fields.blocks()?;
    let near = fields.size("near_tokens", None, 1, 1 << 32)?;
    let expert_d_ff = fields.size("expert_width", None, 1, 1 << 20)?;
    Described {
        family: "near_and_far_moe",
        fields,
        names: TensorNames::Causal { moe: "moe", expert: ["w_gate", "w_up", "w_down"] },
        num_experts: fields.experts(8)?,
        expert_d_ff,
        head_dim: attention.head_dim,
        eos_token_id: None,
        rms_norm_eps: fields.number("rms_norm_eps", 1e-6, 0.0, 1.0)?,
        sparse: (0..blocks).map(|block| block > 0).collect(),
        causal: Causal {
            attention,
            windows: (0..blocks).map(|block| (block % 2 == 1).then_some(near)).collect(),
            router: RouterSpec {
                top_k: fields.size("num_experts_per_tok", Some(2), 1, 64)?,
                has_bias: false,
                is_normalised: true,
            },
            shared: Some(SharedSpec { d_ff: expert_d_ff, is_gated: false }),
            dense_d_ff: fields.size("dense_width", None, 1, 1 << 20)?,
        },
    }
    .config()
}

/// The config.json of a small one.
fn small() -> Value {
    json!({
        "architectures": [FAMILY.architecture], "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 16, "num_experts_per_tok": 3, "expert_width": 32,
        "dense_width": 96, "near_tokens": 8,
    })
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let dir = PathBuf::from(env::args().nth(1).context("usage: own_family NEW_DIRECTORY")?);
    let shape = SynthShape::Causal(Box::new(CausalShape::of_config_with_families(small(), &[FAMILY])?));
    synth(&shape, &dir, 1, None, BlockFormats::NONE, &mut |_, _| ())?;

    let checkpoint = Checkpoint::open_with_families(&dir, &[FAMILY])?;
    println!("cluster   {:?}", by_cluster(checkpoint.clone()).await?);
    println!("reference {:?}", by_reference(checkpoint)?);
    Ok(())
}

/// The tokens that a cluster in this process answers with: a coordinator, and one expert-node that it calls directly.
async fn by_cluster(checkpoint: Arc<Checkpoint>) -> anyhow::Result<Vec<u32>> {
    let (moe_layers, num_experts) = (checkpoint.config().moe_layer_count(), checkpoint.config().num_experts);
    let node = ExpertNodeConfig {
        expert_memory: ExpertMemory::Share(0.5),
        ..ExpertNodeConfig::new("expert-node-0".into(), checkpoint.dir().to_owned())
    };
    let experts = Arc::new(Engine::of_checkpoint(&node, checkpoint.clone())?);
    let member = Member { node: node.node, role: Role::ExpertNode, address: Address::Local(experts), weight: 1.0 };
    let cluster = Cluster::fixed(vec![member], moe_layers, num_experts, 1)?;
    // Nothing has learnt yet where its routers send tokens.
    let config = CoordinatorConfig::new("coordinator-0".into(), checkpoint, PredictorSource::Off);
    let coordinator = Coordinator::start(config, cluster).await?;
    let request = GenerateParams { prompt: PROMPT.into(), max_tokens: TOKENS, ..Default::default() };
    let answer = coordinator.generate(request).await?.map_ok(|token| token.id).try_collect().await?;
    coordinator.stop().await;
    Ok(answer)
}

/// The tokens that the model answers with by itself, every expert on the spot.
fn by_reference(checkpoint: Arc<Checkpoint>) -> anyhow::Result<Vec<u32>> {
    let prompt = Tokenizer::open(checkpoint.dir(), checkpoint.config())?.encode(PROMPT)?;
    Ok(Reference::of_checkpoint(checkpoint)?.generate_greedy(&prompt, TOKENS)?)
}
