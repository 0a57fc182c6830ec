//! The tensors of a GGUF file under the names that a family reads, and how their bytes get there. Values stay what they are:
//! whole rows, or whole matrices of experts, change places at most, which blocks allow.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    slice,
};

use sida_routing::{ExpertId, ExpertKey, LayerId};

use super::files::{Files, Tensor};
use crate::{
    ModelConfig, Stack,
    convert::ConvertError,
    names::{self, Attention::SelfAttention, ExpertPart},
    shards::TensorSpec,
};

/// A tensor that is to be written, and of what it is made.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) spec: TensorSpec,
    from: From,
}

#[derive(Debug)]
enum From {
    /// The same bytes.
    One(Tensor),
    /// For each expert its part of the first, then its part of the second.
    ByExpert([Tensor; 2]),
    /// The rows of each head of so many in another order: llama.cpp turns neighbours among the values of a head together, and
    /// transformers the first half with the second. Files of this family have the rows of queries and keys interleaved for it.
    Interleaved(Tensor, usize),
}

impl From {
    fn tensors(&self) -> &[Tensor] {
        match self {
            Self::One(tensor) | Self::Interleaved(tensor, _) => slice::from_ref(tensor),
            Self::ByExpert(halves) => halves,
        }
    }
}

/// What a tensor becomes.
enum Place {
    /// A tensor of this name and, if it has another, this shape.
    Named(String, Option<Vec<usize>>),
    /// The same, of queries or keys of so many heads.
    Heads(String, usize),
    /// The first or the second half of all experts' gates and up-projections.
    GateOrUp(usize, usize),
}

/// All tensors of a file by the names that they are loaded by. `turns_rows`: queries and keys are interleaved.
pub(super) fn planned(
    files: &Files,
    config: &ModelConfig,
    turns_rows: bool,
) -> Result<BTreeMap<String, Planned>, ConvertError> {
    let refuse = |reason: String| ConvertError::Gguf { file: files.path().to_owned(), reason };
    let mut planned = BTreeMap::new();
    let mut halves: BTreeMap<usize, [Option<Tensor>; 2]> = BTreeMap::new();
    let mut add = |name: String, tensor: &Tensor, shape: Option<Vec<usize>>, from: From| {
        let spec = TensorSpec { name, dtype: tensor.dtype, shape: shape.unwrap_or_else(|| tensor.shape.clone()) };
        planned.insert(spec.name.clone(), Planned { spec, from });
    };
    for (name, tensor) in files.tensors() {
        let place = place(name, config, turns_rows);
        let place =
            place.ok_or_else(|| refuse(format!("tensor {name} is of no model of this family that is known")))?;
        match place {
            Place::Named(name, shape) => add(name, tensor, shape, From::One(tensor.clone())),
            Place::Heads(to, heads) => {
                let rows = tensor.shape[0];
                if heads == 0 || !rows.is_multiple_of(2 * heads) {
                    return Err(refuse(format!(
                        "tensor {name} has {rows} rows, expected an even number for each of {heads} heads"
                    )));
                }
                add(to, tensor, None, From::Interleaved(tensor.clone(), heads));
            }
            Place::GateOrUp(block, half) => halves.entry(block).or_default()[half] = Some(tensor.clone()),
        }
    }
    for (block, halves) in halves {
        let part = stacked(config, block, 0);
        let [Some(gate), Some(up)] = halves else {
            return Err(refuse(format!(
                "block {block} has one of blk.{block}.ffn_gate_exps.weight and ffn_up_exps.weight, expected both"
            )));
        };
        if (gate.dtype, &gate.shape) != (up.dtype, &up.shape) || gate.shape[0] != config.num_experts {
            return Err(refuse(format!(
                "blk.{block}.ffn_gate_exps.weight is {} {:?} and blk.{block}.ffn_up_exps.weight {} {:?}, expected one format and shape, \
                 of {} experts",
                gate.dtype, gate.shape, up.dtype, up.shape, config.num_experts
            )));
        }
        add(part.tensor, &gate.clone(), Some(part.shape), From::ByExpert([gate, up]));
    }
    Ok(planned)
}

impl Planned {
    /// Writes its data. Refuses blocks whose scale is no number.
    pub(super) fn write(&self, files: &Files, out: &mut dyn Write) -> io::Result<()> {
        for tensor in self.from.tensors() {
            if let Some(block) = tensor.dtype.broken_block(files.bytes(tensor, 0..tensor.bytes())) {
                let reason = format!("tensor {} holds a scale that is no number, in block {block}", files.name(tensor));
                return Err(io::Error::other(ConvertError::Gguf { file: files.path().to_owned(), reason }));
            }
        }
        match &self.from {
            From::One(tensor) => {
                out.write_all(files.bytes(tensor, 0..tensor.bytes()))?;
                files.release(tensor);
            }
            From::ByExpert(halves) => {
                let experts = halves[0].shape[0];
                let bytes = halves[0].bytes() / experts;
                for expert in 0..experts {
                    for half in halves {
                        out.write_all(files.bytes(half, expert * bytes..(expert + 1) * bytes))?;
                    }
                }
                halves.iter().for_each(|half| files.release(half));
            }
            From::Interleaved(tensor, heads) => {
                let rows = tensor.shape[0];
                let (bytes, head) = (tensor.bytes() / rows, rows / heads);
                for row in 0..rows {
                    // Row r of a head's first half is every other one of the stored, those of the second are between.
                    let (first, of_head) = (row / head * head, row % head);
                    let stored = first + of_head % (head / 2) * 2 + of_head / (head / 2);
                    out.write_all(files.bytes(tensor, stored * bytes..(stored + 1) * bytes))?;
                }
                files.release(tensor);
            }
        }
        Ok(())
    }
}

fn stacked(config: &ModelConfig, block: usize, part: usize) -> ExpertPart {
    let key = ExpertKey { layer: LayerId(block as u16), expert: ExpertId(0) };
    config.names.stacked(config, key).swap_remove(part)
}

/// What a tensor of a file becomes; `None` if that is not known.
fn place(name: &str, config: &ModelConfig, turns_rows: bool) -> Option<Place> {
    let names = config.names;
    let named = |name: String| Some(Place::Named(name, None));
    match name {
        "token_embd.weight" => return named(names.tied()[0].clone()),
        "output.weight" => return named(names::LM_HEAD.to_owned()),
        "output_norm.weight" => return named(names.final_norm(Stack::Decoder)),
        _ => {}
    }
    let (block, of) = name.strip_prefix("blk.")?.split_once('.')?;
    let block = block.parse().ok().filter(|&block: &usize| block < config.decoder_layers)?;
    let attention = |of| (names.projection(Stack::Decoder, block, SelfAttention, of), of);
    let heads = |(to, of): (String, char)| {
        let heads = if of == 'q' { config.num_heads } else { config.spec().decoder.blocks[block].attention.kv_heads };
        if turns_rows && of != 'v' { Some(Place::Heads(to, heads)) } else { named(to) }
    };
    let bias = |of| (names.projection_bias(Stack::Decoder, block, SelfAttention, of), of);
    match of {
        "attn_norm.weight" => named(names.attention_norm(Stack::Decoder, block, SelfAttention)),
        "ffn_norm.weight" => named(names.feed_forward_norm(Stack::Decoder, block)),
        "attn_q.weight" => heads(attention('q')),
        "attn_k.weight" => heads(attention('k')),
        "attn_v.weight" => heads(attention('v')),
        "attn_output.weight" => named(attention('o').0),
        "attn_q.bias" => heads(bias('q')),
        "attn_k.bias" => heads(bias('k')),
        "attn_v.bias" => heads(bias('v')),
        "attn_output.bias" => named(bias('o').0),
        "attn_q_norm.weight" => named(names.qk_norm(block, 'q')),
        "attn_k_norm.weight" => named(names.qk_norm(block, 'k')),
        "ffn_gate_inp.weight" => named(names.router(Stack::Decoder, block)),
        // A vector there, and a matrix of one row here.
        "ffn_gate_inp_shexp.weight" => Some(Place::Named(names.shared_gate(block), Some(vec![1, config.d_model]))),
        "ffn_gate_shexp.weight" => named(names.shared(block).swap_remove(0)),
        "ffn_up_shexp.weight" => named(names.shared(block).swap_remove(1)),
        "ffn_down_shexp.weight" => named(names.shared(block).swap_remove(2)),
        "ffn_gate_exps.weight" => Some(Place::GateOrUp(block, 0)),
        "ffn_up_exps.weight" => Some(Place::GateOrUp(block, 1)),
        "ffn_gate_up_exps.weight" => named(stacked(config, block, 0).tensor),
        "ffn_down_exps.weight" => named(stacked(config, block, 1).tensor),
        // Files of the first releases with experts have a tensor for each matrix of each.
        _ => {
            let (matrix, expert) = of.strip_suffix(".weight")?.split_once('.')?;
            let part = ["ffn_gate", "ffn_up", "ffn_down"].iter().position(|of| *of == matrix)?;
            let expert = expert.parse().ok().filter(|&expert: &u16| usize::from(expert) < config.num_experts)?;
            let key = ExpertKey { layer: LayerId(block as u16), expert: ExpertId(expert) };
            named(names.expert(config, key).swap_remove(part).tensor)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn names_are_those_that_the_family_reads() {
        // Would break: gates would be taken for up-projections, or files of the first releases, whose experts have a tensor for each
        // matrix, be refused.
        let json = r#"{"architectures": ["MixtralForCausalLM"], "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": 3}"#;
        let config = ModelConfig::parse(json.as_bytes(), Path::new("config.json")).unwrap();
        let expert = |of: &str| format!("model.layers.1.block_sparse_moe.experts.2.{of}.weight");
        for (name, expected) in [
            ("blk.1.ffn_gate.2.weight", expert("w1")),
            ("blk.1.ffn_up.2.weight", expert("w3")),
            ("blk.1.ffn_down.2.weight", expert("w2")),
            ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight".to_owned()),
            ("blk.0.ffn_gate_inp.weight", "model.layers.0.block_sparse_moe.gate.weight".to_owned()),
            ("blk.0.ffn_gate_up_exps.weight", "model.layers.0.block_sparse_moe.experts.gate_up_proj".to_owned()),
            ("output.weight", "lm_head.weight".to_owned()),
        ] {
            match place(name, &config, true) {
                Some(Place::Named(found, None)) => assert_eq!(found, expected, "{name}"),
                _ => panic!("{name} becomes something else"),
            }
        }
        for (name, expected) in [("blk.1.attn_q.weight", 4), ("blk.1.attn_k.weight", 2)] {
            assert!(matches!(place(name, &config, true), Some(Place::Heads(_, heads)) if heads == expected), "{name}");
            assert!(matches!(place(name, &config, false), Some(Place::Named(..))), "{name}");
        }
        for unknown in [
            "blk.2.attn_q.weight",
            "blk.0.ffn_up.3.weight",
            "blk.x.attn_q.weight",
            "rope_freqs.weight",
            "blk.0.ffn_up.weight",
        ] {
            assert!(place(unknown, &config, true).is_none(), "{unknown}");
        }
    }
}
