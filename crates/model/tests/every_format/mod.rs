//! A decoder-only model whose matrices lie in every format of blocks that a GGUF file may have, also of one layer in several, as
//! files that people have do: with the words of a parity model's file and random weights.

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Content, Value},
    },
};
use sida_model::{BlockFormats, Checkpoint, ExpertSlot, ExpertStore, Precision, convert};
use sida_routing::{ExpertId, ExpertKey, LayerId};

const D_MODEL: usize = 256;
const D_FF: usize = 512;
const EXPERTS: usize = 8;
const VOCAB: usize = 384;
/// Of queries, and of keys and values.
const WIDTHS: (usize, usize) = (256, 128);

/// Of a block: queries and keys, values, attention's output, experts' matrices that lead in, and the one that leads out.
const BLOCKS: [[GgmlDType; 5]; 5] = [
    [GgmlDType::Q4K, GgmlDType::Q6K, GgmlDType::Q4K, GgmlDType::Q4K, GgmlDType::Q6K],
    [GgmlDType::Q4K, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q4K, GgmlDType::Q4K],
    [GgmlDType::Q6K, GgmlDType::Q6K, GgmlDType::Q5_0, GgmlDType::Q5K, GgmlDType::Q5_1],
    [GgmlDType::Q4_1, GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q8_0, GgmlDType::Q4_1],
    [GgmlDType::Q5_1, GgmlDType::Q5_1, GgmlDType::Q4_0, GgmlDType::Q5_0, GgmlDType::F32],
];

/// Its directory.
pub(super) fn written(into: &Path) -> PathBuf {
    let words = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/parity/gguf-qwen3/model.gguf");
    let words = Content::read(&mut File::open(words).unwrap()).unwrap();
    let number = |number: usize| Value::U32(number as u32);
    let own = HashMap::from([
        ("qwen3moe.block_count", number(BLOCKS.len())),
        ("qwen3moe.context_length", number(4096)),
        ("qwen3moe.embedding_length", number(D_MODEL)),
        ("qwen3moe.attention.key_length", number(64)),
        ("qwen3moe.attention.value_length", number(64)),
        ("qwen3moe.rope.dimension_count", number(64)),
        ("qwen3moe.expert_count", number(EXPERTS)),
        ("qwen3moe.expert_used_count", number(3)),
        ("qwen3moe.expert_feed_forward_length", number(D_FF)),
    ]);
    let kept = words.metadata.iter().filter(|(key, _)| !key.starts_with("qwen3moe.rope.scaling"));
    let metadata: Vec<(&str, &Value)> = kept.map(|(key, value)| (&**key, own.get(&**key).unwrap_or(value))).collect();

    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize], format: GgmlDType| {
        // Of a size that keeps what goes through a matrix at its own.
        let deviation = (shape[shape.len() - 1] as f32).sqrt().recip();
        let values = match shape.len() {
            1 => Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).unwrap(),
            _ => Tensor::randn(0.0, deviation, shape, &Device::Cpu).unwrap(),
        };
        tensors.push((name, QTensor::quantize(&values, format).unwrap()));
    };
    let (queries, keys) = WIDTHS;
    add("token_embd.weight".into(), &[VOCAB, D_MODEL], GgmlDType::Q4K);
    add("output_norm.weight".into(), &[D_MODEL], GgmlDType::F32);
    add("output.weight".into(), &[VOCAB, D_MODEL], GgmlDType::Q6K);
    for (block, [queries_keys, values, output, lead_in, lead_out]) in BLOCKS.into_iter().enumerate() {
        let mut add = |name: &str, shape: &[usize], format| add(format!("blk.{block}.{name}.weight"), shape, format);
        add("attn_q", &[queries, D_MODEL], queries_keys);
        add("attn_k", &[keys, D_MODEL], queries_keys);
        add("attn_v", &[keys, D_MODEL], values);
        add("attn_output", &[D_MODEL, queries], output);
        add("ffn_gate_exps", &[EXPERTS, D_FF, D_MODEL], lead_in);
        add("ffn_up_exps", &[EXPERTS, D_FF, D_MODEL], lead_in);
        add("ffn_down_exps", &[EXPERTS, D_MODEL, D_FF], lead_out);
        add("ffn_gate_inp", &[EXPERTS, D_MODEL], GgmlDType::F32);
        for norm in ["attn_norm", "ffn_norm"] {
            add(norm, &[D_MODEL], GgmlDType::F32);
        }
        for norm in ["attn_q_norm", "attn_k_norm"] {
            add(norm, &[64], GgmlDType::F32);
        }
    }
    let file = into.join("every-format.gguf");
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (&**name, tensor)).collect();
    gguf_file::write(&mut File::create(&file).unwrap(), &metadata, &named).unwrap();
    let dir = into.join("every-format");
    convert::convert(&file, &dir, BlockFormats::NONE, &mut |_, _| ()).unwrap();
    dir
}

/// An expert would lie beyond its slot, or be widened where its format is multiplied as it is.
#[test]
fn experts_take_the_bytes_of_their_formats() {
    let into = tempfile::tempdir().unwrap();
    let store = ExpertStore::open(Checkpoint::open(&written(into.path())).unwrap()).unwrap();
    let slot = ExpertSlot::choose(&store, Precision::Bf16, true).unwrap();
    // 3 matrices: of Q5_0, 22 bytes for 32 values, but of the last one, which is whole.
    let values = D_MODEL * D_FF;
    assert_eq!(slot.bytes(), 2 * values / 32 * 22 + values * 2);
    let mut bytes = vec![0; slot.bytes()];
    for layer in 0..BLOCKS.len() as u16 {
        let key = ExpertKey { layer: LayerId(layer), expert: ExpertId(EXPERTS as u16 - 1) };
        slot.read(&store, key, &mut bytes).unwrap();
    }
}
