//! Decoder-only models on a GPU against the reference on the CPU: small ones of every family with random weights, which
//! together have all that a block of theirs may have.

use std::path::Path;

use serde_json::json;
use sida_model::{
    BlockFormats, StoredDType,
    synth::{self, CausalShape, SynthShape},
};
use sida_routing::Grouping;

use super::*;

/// Their directories.
pub(super) fn written(into: &Path) -> Vec<PathBuf> {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 64});
    let shapes = [
        (
            "qwen3",
            json!({"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "moe_intermediate_size": 128,
                         "num_key_value_heads": 1, "num_experts": 16, "num_experts_per_tok": 8, "norm_topk_prob": true}),
        ),
        (
            "qwen3-yarn",
            json!({"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 64, "moe_intermediate_size": 256,
                              "num_experts": 8, "num_experts_per_tok": 3, "mlp_only_layers": [1], "rope_scaling": yarn,
                              "use_sliding_window": true, "sliding_window": 40}),
        ),
        (
            "qwen2",
            json!({"architectures": ["Qwen2MoeForCausalLM"], "moe_intermediate_size": 128, "num_experts": 12,
                         "shared_expert_intermediate_size": 384, "num_experts_per_tok": 4, "rope_scaling": llama3}),
        ),
        (
            "olmoe",
            json!({"architectures": ["OlmoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
                         "clip_qkv": 1.5, "tie_word_embeddings": true}),
        ),
        (
            "mixtral",
            json!({"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 1,
                           "sliding_window": 7, "head_dim": 96}),
        ),
    ];
    let write = |(name, own, formats): (&str, serde_json::Value, BlockFormats)| {
        let mut json = json!({"vocab_size": 448, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4,
                              "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0});
        json.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
        let shape = SynthShape::Causal(Box::new(CausalShape::of_config(json).unwrap()));
        let dir = into.join(name);
        synth::synth(&shape, &dir, 5, None, formats, &mut |_, _| ()).unwrap();
        dir
    };
    let [_, _, qwen2, olmoe, _] = &shapes;
    // So wide that a product of theirs goes through its loops more than once.
    let wide = json!({"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 64, "hidden_size": 1280, "moe_intermediate_size": 768,
                      "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": true});
    let (int4, int8) = (Some(StoredDType::Q4_0), Some(StoredDType::Q8_0));
    let in_blocks = [
        ("qwen3-int4", wide.clone(), BlockFormats { experts: int4, dense: int8 }),
        ("qwen3-int8", wide, BlockFormats { experts: int8, dense: int4 }),
        ("qwen2-int4", qwen2.1.clone(), BlockFormats { experts: int4, dense: int4 }),
        ("olmoe-int8", olmoe.1.clone(), BlockFormats { experts: None, dense: int8 }),
    ];
    let plain = shapes.into_iter().map(|(name, own)| (name, own, BlockFormats::NONE));
    plain.chain(in_blocks).map(write).chain([every_format::written(into)]).collect()
}

/// One sequence at once on the processor: logits (tokens, vocab_size), and each MoE layer's experts and probabilities.
fn reference(dir: &Path, ids: &[u32]) -> (Vec<f32>, Vec<sida_model::RoutedLayer>) {
    let model = Reference::open(dir).unwrap();
    let mut sequence = model.start(&[]).unwrap();
    model.decode(&mut sequence, ids).unwrap()
}

/// A model that people deploy would answer otherwise on a GPU than on a processor.
#[test]
fn float32_agrees_with_the_processor() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let into = tempfile::tempdir().unwrap();
    let mut random = rand::rngs::StdRng::seed_from_u64(3);
    for dir in written(into.path()) {
        for share in [1.0, 0.4] {
            let mut model = open(&dir, ordinal, Precision::F32, share, u64::MAX);
            let (ids, spans) = random_batch(&mut random, model.config().vocab_size, &[150]);
            let mut sequences = model.start_empty(1);
            let wanted: Vec<u32> = (0..150).collect();
            let passed = model.decode(&ids, &spans, &mut sequences, &wanted);
            let found = model.logits(150);
            let hidden = model.last_hidden();
            let (expected, routing) = reference(&dir, &ids);
            let (experts, top_k) = (model.config().num_experts, model.config().top_k);
            let mut first_tie = 150;
            for (layer, chosen) in routing.iter().zip(&passed.experts) {
                for token in 0..150 {
                    let chosen = &chosen[token * top_k..][..top_k];
                    let own: Vec<u16> =
                        layer.routes.experts[token * top_k..][..top_k].iter().map(|e| e.unwrap().0).collect();
                    if chosen != own {
                        let of = |expert: &u16| layer.probabilities[token * experts + usize::from(*expert)];
                        let gap = own.iter().zip(chosen).map(|(a, b)| (of(a) - of(b)).abs()).fold(0.0, f32::max);
                        assert!(gap < NEAR_TIE, "{}: token {token} goes to {chosen:?}, not {own:?}", dir.display());
                        first_tie = first_tie.min(token);
                    }
                }
            }
            let (vocab, d_model) = (model.config().vocab_size, model.config().d_model);
            let off = relative(&found[..first_tie * vocab], &expected[..first_tie * vocab]);
            println!("{} at {share}: off by {off:.1e} to token {first_tie}; {:?}", dir.display(), model.counters());
            assert!(first_tie > 20 && off < TOLERANCE_F32, "{}: off by {off:e}", dir.display());
            let states = Reference::open(&dir).unwrap().last_hidden(&ids).unwrap();
            let off = relative(&hidden[..first_tie * d_model], &states[..first_tie * d_model]);
            assert!(off < TOLERANCE_F32, "{}: states are off by {off:e}", dir.display());
        }
    }
}

/// A sequence's bits would depend on who shares its batch, on how its prompt was cut, or on whether its experts were there.
#[test]
fn sequences_do_not_depend_on_company_or_pieces() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let into = tempfile::tempdir().unwrap();
    let mut random = rand::rngs::StdRng::seed_from_u64(4);
    for dir in written(into.path()) {
        for precision in [Precision::Bf16, Precision::F32] {
            let mut all = open(&dir, ordinal, precision, 1.0, 0);
            let mut part = open(&dir, ordinal, precision, 0.4, u64::MAX);
            let vocab = all.config().vocab_size;
            let (ids, spans) = random_batch(&mut random, vocab, &[100, 1, 230, 65]);
            let wanted: Vec<u32> = (0..396).collect();
            let mut sequences = all.start_empty(4);
            all.decode(&ids, &spans, &mut sequences, &wanted[..200]);
            let together = all.logits(396);
            assert!(together.iter().all(|logit| logit.is_finite()));
            // From the beginning of another one, into other room than that has.
            let third = spans.range(2);
            let mut begun = [all.fork_prefix(&sequences[2], 100, third.len())];
            all.decode(&ids[third.start + 100..third.end], &Spans::new([third.len() - 100]), &mut begun, &[0]);
            let (found, expected) = (all.logits(third.len() - 100), &together[(third.start + 100) * vocab..]);
            let same = found.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} {precision}: from the beginning of another", dir.display());
            for (range, pieces) in spans.ranges().zip([vec![40, 1, 1, 58], vec![1], vec![64, 128, 1, 37], vec![1; 65]])
            {
                for (model, times) in [(&mut all, 2), (&mut part, 1)] {
                    for _ in 0..times {
                        let mut sequences = model.start_empty(1);
                        let mut at = range.start;
                        for &piece in &pieces {
                            model.decode(&ids[at..at + piece], &Spans::new([piece]), &mut sequences, &[0]);
                            let found = model.logits(piece);
                            let expected = &together[at * vocab..][..piece * vocab];
                            assert!(
                                found.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                                "{} {precision}: {piece} tokens from {} on are off by {:e}",
                                dir.display(),
                                at - range.start,
                                relative(&found, expected)
                            );
                            at += piece;
                        }
                    }
                }
            }
            assert!(part.counters().demand_loads > 0);
        }
    }
}

/// A step to a long cache would have other bits than a prompt that is read at once, or depend on how many others there are.
#[test]
fn steps_to_long_caches_have_the_bits_of_prompts() {
    const TOKENS: usize = 1100;
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let into = tempfile::tempdir().unwrap();
    let mut random = rand::rngs::StdRng::seed_from_u64(8);
    for dir in written(into.path()) {
        for precision in [Precision::Bf16, Precision::F32] {
            let mut model = open(&dir, ordinal, precision, 1.0, 0);
            let vocab = model.config().vocab_size;
            let (ids, spans) = random_batch(&mut random, vocab, &[TOKENS]);
            let mut whole = model.start_empty(1);
            model.decode(&ids, &spans, &mut whole, &[0]);
            let together = model.logits(TOKENS);
            assert!(together.iter().all(|logit| logit.is_finite()));
            let expect = |found: &[f32], token: usize, how: &str| {
                let expected = &together[token * vocab..][..found.len()];
                let same = found.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits());
                let off = relative(found, expected);
                assert!(same, "{} {precision}: token {token}, {how}, is off by {off:e}", dir.display());
            };
            // Around the borders of runs and tiles, alone, beside others with shorter and longer caches, and beside very many.
            for token in [255, 256, 257, 300, 511, 512, 799, 1023, 1024, 1099] {
                let mut alone = [model.fork_prefix(&whole[0], token, TOKENS)];
                for _ in 0..3 {
                    let mut again = [model.fork_prefix(&alone[0], token, TOKENS)];
                    model.decode(&ids[token..=token], &Spans::new([1]), &mut again, &[0]);
                    expect(&model.logits(1), token, "alone");
                }
                for others in [3, 250] {
                    let places: Vec<usize> =
                        (0..others).map(|other| (other * 277 + 13) % TOKENS).chain([token]).collect();
                    let mut all: Vec<_> =
                        places.iter().map(|&place| model.fork_prefix(&whole[0], place, TOKENS)).collect();
                    let next: Vec<u32> = places.iter().map(|&place| ids[place]).collect();
                    model.decode(&next, &Spans::new(vec![1; next.len()]), &mut all, &[0]);
                    let found = model.logits(next.len());
                    for (&place, found) in places.iter().zip(found.chunks_exact(vocab)) {
                        expect(found, place, "beside others");
                    }
                }
                // In pieces, which prompts are read in.
                let rest = (TOKENS - token).min(70);
                model.decode(&ids[token..token + rest], &Spans::new([rest]), &mut alone, &[0]);
                expect(&model.logits(rest), token, "in a piece");
            }
        }
    }
}

/// bf16 on tensor cores would compute another function than float32.
#[test]
fn bf16_is_near_float32_without_an_encoder() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let into = tempfile::tempdir().unwrap();
    let mut random = rand::rngs::StdRng::seed_from_u64(5);
    for dir in written(into.path()) {
        let of = |precision, ids: &[u32]| {
            let mut model = open(&dir, ordinal, precision, 1.0, 0);
            let mut sequences = model.start_empty(1);
            let passed = model.decode(ids, &Spans::new([ids.len()]), &mut sequences, &[0]);
            (passed.experts, model.logits(ids.len()))
        };
        let vocab = ModelConfig::open(&dir).unwrap().vocab_size;
        let (ids, _) = random_batch(&mut random, vocab, &[64]);
        let ((narrow, found), (wide, expected)) = (of(Precision::Bf16, &ids), of(Precision::F32, &ids));
        let choices = narrow[0].len() / ids.len();
        // A token whose experts are others is another function's, and so are those that see it.
        let alike = |token: &usize| {
            narrow.iter().zip(&wide).all(|(a, b)| {
                let of = |chosen: &[u16]| {
                    let mut chosen = chosen[token * choices..][..choices].to_vec();
                    chosen.sort_unstable();
                    chosen
                };
                of(a) == of(b)
            })
        };
        let alike = (0..ids.len()).take_while(alike).count();
        let off = relative(&found[..alike * vocab], &expected[..alike * vocab]);
        println!("{}: the first {alike} tokens are routed alike, off by {off:.2e}", dir.display());
        assert!(alike == 0 || off < 3e-2, "{}: off by {off:e}", dir.display());
    }
}

/// Where rows leave for their experts, some to the device's and some to others, the answer would be another one.
#[test]
fn experts_of_several_places_give_the_same_bits() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let into = tempfile::tempdir().unwrap();
    let mut random = rand::rngs::StdRng::seed_from_u64(6);
    for dir in written(into.path()) {
        for precision in [Precision::Bf16, Precision::F32] {
            let mut whole = open(&dir, ordinal, precision, 1.0, 0);
            let config = whole.config().clone();
            let (ids, spans) = random_batch(&mut random, config.vocab_size, &[7, 60, 12]);
            let mut sequences = whole.start_empty(3);
            whole.decode(&ids, &spans, &mut sequences, &[0]);
            let expected = whole.logits(79);
            let (slab, mut dense) = apart(&dir, ordinal, precision);
            for here in [0, config.num_experts / 2, config.num_experts] {
                let mut own = on_device::start_empty(&mut dense, 3);
                let mut pass =
                    dense.begin(Stack::Decoder, &ids, &spans, own.iter_mut().collect(), Beside::default()).unwrap();
                while let Some(layer) = dense.advance(&mut pass).unwrap() {
                    let grouping = Grouping::new(&dense.routes(&mut pass).unwrap());
                    let MoeRows::Device(mut rows) = dense.rows(&mut pass) else { panic!("rows of a device") };
                    rows.group(&grouping).unwrap();
                    let x = rows.fetch().unwrap();
                    let (mut runs, mut results, mut first) =
                        (Vec::new(), vec![0.0; grouping.tokens.len() * config.d_model], 0);
                    for group in &grouping.groups {
                        let slot = usize::from(layer.0) * config.num_experts + usize::from(group.expert.0);
                        let count = group.rows as usize;
                        if usize::from(group.expert.0) < here {
                            runs.push(SlotRun { slot, first, rows: count });
                        } else {
                            let tokens = &grouping.tokens[first..][..count];
                            let row = |&token: &u32| &x[token as usize * config.d_model..][..config.d_model];
                            let own: Vec<f32> = tokens.iter().flat_map(row).copied().collect();
                            let out = experts_elsewhere::on_slab(&slab, layer, &[(slot, own)]).remove(0);
                            results[first * config.d_model..][..out.len()].copy_from_slice(&out);
                        }
                        first += count;
                    }
                    slab.start_beside(&rows, layer, &runs, Box::new(|| ())).unwrap();
                    if here < config.num_experts {
                        rows.put(&results).unwrap();
                    }
                    rows.add_computed().unwrap();
                }
                let states = dense.finish(pass).unwrap().states;
                let found = dense.logits(&states, &(0..79).collect::<Vec<_>>()).unwrap();
                assert!(
                    found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{} {precision}, {here} experts on the device: off by {:e}",
                    dir.display(),
                    relative(&found, &expected)
                );
            }
        }
    }
}

/// A slab with all experts, slot = layer * experts + expert, and the dense part.
fn apart(dir: &Path, ordinal: usize, precision: Precision) -> (DeviceSlab, DeviceDense) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let store = ExpertStore::open(checkpoint.clone()).unwrap();
    let slab = experts_elsewhere::full_slab(ordinal, store, precision);
    (slab, DeviceDense::open(Gpu::open(ordinal).unwrap(), &checkpoint, precision, ROWS_MAX).unwrap())
}
