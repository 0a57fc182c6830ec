//! `sida inspect`: what a checkpoint holds, from its config and headers; no weights are read. Fails where a part of it could
//! not be loaded, after it has told what there is.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use clap::Args;
use serde_json::json;
use sida_model::{
    Checkpoint, ModelConfig, Stack,
    manifest::{self, Manifest},
    names,
    spec::Activation,
};
use sida_telemetry::counted;

use crate::{
    EXIT_BAD_CONFIGURATION, byte_size,
    model_check::{self, CHAT_MISSING, Part},
    model_dir,
    plain_table::PlainTable,
};

/// Show what a checkpoint holds: family, shapes, layers, experts, bytes by part, digest, predictor
#[derive(Args)]
pub(crate) struct InspectArguments {
    /// The model's directory [default: the switch-tiny-64 that comes with the source]
    #[arg(value_name = "MODEL", env = "SIDA_MODEL")]
    model: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Bytes and tensors of one part of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct PartSize {
    tensors: u64,
    bytes: u64,
}

/// What a checkpoint's headers say.
#[derive(Debug, Default)]
struct Contents {
    parts: BTreeMap<&'static str, PartSize>,
    /// How many tensors are stored in which dtype.
    dtypes: BTreeMap<String, u64>,
}

/// Opens the checkpoint and prints.
pub(crate) fn run(arguments: InspectArguments) -> anyhow::Result<ExitCode> {
    let dir = model_dir::find(arguments.model.as_deref())?;
    let checkpoint = Checkpoint::open(&dir)?;
    let Contents { parts, dtypes } = contents(&checkpoint)?;
    let Checked { parts: checked, is_usable } = checked(&checkpoint);
    let facts = facts(&checkpoint, &dtypes, checked)?;
    let code = if is_usable { ExitCode::SUCCESS } else { EXIT_BAD_CONFIGURATION.into() };
    if arguments.json {
        let parts: BTreeMap<_, _> =
            parts.iter().map(|(name, part)| (*name, json!({"tensors": part.tensors, "bytes": part.bytes}))).collect();
        let facts: BTreeMap<_, _> = facts.into_iter().collect();
        let told = json!({"model": checkpoint.name(), "usable": is_usable, "facts": facts, "parts": parts});
        writeln!(io::stdout(), "{told}")?;
        return Ok(code);
    }
    let mut table = PlainTable::new([]);
    facts.into_iter().for_each(|(name, value)| {
        table.row([name.to_owned(), value]);
    });
    writeln!(io::stdout(), "{}", table.draw())?;
    let total: u64 = parts.values().map(|part| part.bytes).sum();
    let mut table = PlainTable::new(["part", "tensors", "bytes", "share"]);
    for (name, part) in &parts {
        let share = format!("{:.1}%", 100.0 * part.bytes as f64 / total.max(1) as f64);
        table.row([(*name).to_owned(), part.tensors.to_string(), byte_size::shown(part.bytes), share]);
    }
    write!(io::stdout(), "{}", table.draw())?;
    Ok(code)
}

/// The parts that could not be loaded or could, as lines of name and value.
struct Checked {
    parts: Vec<(&'static str, String)>,
    is_usable: bool,
}

fn checked(checkpoint: &Arc<Checkpoint>) -> Checked {
    let tensors = model_check::tensors(checkpoint);
    let predictor = match &tensors {
        Part::Unusable(_) => Part::Unusable("not looked at, the tensors come first".to_owned()),
        Part::Sound(_) | Part::Missing => model_check::predictor(checkpoint),
    };
    let tokenizer = model_check::tokenizer(checkpoint.dir(), checkpoint.config());
    let chat_missing = if matches!(tokenizer, Part::Missing) { "no chat template" } else { CHAT_MISSING };
    let parts = [
        ("tensors", tensors, "none"),
        ("tokenizer", tokenizer, "none: texts cannot be read"),
        ("chat", model_check::chat(checkpoint.dir()), chat_missing),
        ("predictor", predictor, "none; `sida train-predictor` makes one"),
    ];
    let is_usable = !parts.iter().any(|(name, part, _)| match part {
        Part::Unusable(_) => true,
        // A model can be asked without the others.
        Part::Missing => *name == "tokenizer",
        Part::Sound(_) => false,
    });
    let line = |(name, part, missing): (&'static str, Part, &str)| match part {
        Part::Sound(text) => (name, text),
        Part::Missing => (name, missing.to_owned()),
        Part::Unusable(error) => (name, format!("unusable: {error}")),
    };
    Checked { parts: parts.map(line).into(), is_usable }
}

/// Reads the headers.
fn contents(checkpoint: &Checkpoint) -> anyhow::Result<Contents> {
    let mut contents = Contents::default();
    for name in checkpoint.names() {
        let (dtype, _, bytes) = checkpoint.describe(name)?;
        let part = contents.parts.entry(part_of(name)).or_default();
        part.tensors += 1;
        part.bytes += bytes as u64;
        *contents.dtypes.entry(dtype).or_default() += 1;
    }
    Ok(contents)
}

/// The part of a model that a tensor belongs to.
fn part_of(name: &str) -> &'static str {
    if names::is_expert(name) {
        "experts"
    } else if names::is_router(name) {
        "routers"
    } else if name.ends_with(names::SHARED) || name.contains("embed_tokens") {
        "embeddings"
    } else if name == names::LM_HEAD {
        "head"
    } else {
        "dense layers"
    }
}

/// Lines of name and value, in reading order.
fn facts(
    checkpoint: &Checkpoint,
    dtypes: &BTreeMap<String, u64>,
    checked: Vec<(&'static str, String)>,
) -> anyhow::Result<Vec<(&'static str, String)>> {
    let config = checkpoint.config();
    let decoder =
        format!("decoder of {} blocks ({} MoE)", config.decoder_layers, config.moe_layers(Stack::Decoder).len());
    let stacks = match config.has_encoder() {
        true => {
            let moe = config.moe_layers(Stack::Encoder).len();
            format!("encoder of {} blocks ({moe} MoE), {decoder}", config.encoder_layers)
        }
        false => decoder,
    };
    let widths = format!(
        "d_model {}, d_ff {}, {} heads of {}, vocabulary {}",
        config.d_model, config.d_ff, config.num_heads, config.d_kv, config.vocab_size
    );
    let dtypes: Vec<_> =
        dtypes.iter().map(|(dtype, tensors)| format!("{dtype} ({})", counted(*tensors, "tensor"))).collect();
    let mut facts = vec![
        ("model", model_dir::full_path(checkpoint.dir()).display().to_string()),
        ("family", config.family.to_owned()),
        ("stacks", stacks),
        ("widths", widths),
        ("experts", experts_fact(config)),
        ("router", router_fact(config)),
        ("head", if config.tie_word_embeddings { "tied to the embedding" } else { "its own" }.to_owned()),
        ("stored as", dtypes.join(", ")),
        ("digest", checkpoint.digest().to_string()),
        ("manifest", manifest_fact(checkpoint)?),
    ];
    facts.extend(checked);
    Ok(facts)
}

fn experts_fact(config: &ModelConfig) -> String {
    let matrices = match config.activation {
        Activation::Relu => "two matrices, ReLU",
        Activation::GatedSilu => "three matrices, gated SiLU",
    };
    format!("{} per MoE layer ({matrices})", config.num_experts)
}

fn router_fact(config: &ModelConfig) -> String {
    match config.has_encoder() {
        true => format!("top {}, expert capacity {} where it is enforced", config.top_k, config.expert_capacity),
        false => format!("top {}", config.top_k),
    }
}

fn manifest_fact(checkpoint: &Checkpoint) -> anyhow::Result<String> {
    Ok(match Manifest::read(checkpoint.dir())? {
        Some(manifest) => format!("{} tensors are checked when they are loaded", manifest.tensors()),
        None => format!("no {}", manifest::FILE_NAME),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts() {
        // Broken: the share of the experts, which is what can be saved, would be wrong.
        assert_eq!(part_of("encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight"), "experts");
        assert_eq!(part_of("encoder.block.1.layer.1.mlp.router.classifier.weight"), "routers");
        assert_eq!(part_of("shared.weight"), "embeddings");
        assert_eq!(part_of("decoder.embed_tokens.weight"), "embeddings");
        assert_eq!(part_of("lm_head.weight"), "head");
        assert_eq!(part_of("encoder.block.0.layer.0.SelfAttention.q.weight"), "dense layers");
    }
}
