//! Experts on a GPU for rows from elsewhere: those of the host, and those that a pass on the same device leaves.

use super::*;

/// Rows for experts of a layer in a slab: (slot, rows), computed together.
pub(super) fn on_slab(slab: &DeviceSlab, layer: LayerId, groups: &[(usize, Vec<f32>)]) -> Vec<Vec<f32>> {
    let mut outs: Vec<Vec<f32>> = groups.iter().map(|(_, x)| vec![f32::NAN; x.len()]).collect();
    let rows = groups.iter().zip(&mut outs).map(|((slot, x), out)| SlotRows { slot: *slot, x, out });
    slab.compute(layer, &mut rows.collect::<Vec<_>>()).unwrap();
    outs
}

/// A node on a GPU would compute other rows than one on the processor, or other bits in other company.
#[test]
fn a_slab_computes_what_the_processor_does() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let into = tempfile::tempdir().unwrap();
    for dir in models().into_iter().chain(causal_on_device::written(into.path())) {
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let store = ExpertStore::open(checkpoint.clone()).unwrap();
        let (layers, experts) = (store.config().moe_layer_count() as u16, store.config().num_experts as u16);
        for (precision, host_bytes) in [(Precision::F32, u64::MAX), (Precision::Bf16, 0), (Precision::Bf16, 1 << 20)] {
            let rows = [1, 3, 33, 100, 2, 5000];
            let gpu = Gpu::open(ordinal).unwrap();
            let slot = ExpertSlot::choose(&store, precision, true).unwrap();
            let slab = DeviceSlab::open(gpu, store.clone(), slot, rows.len(), host_bytes).unwrap();
            for round in 0..3 {
                let (layer, mut groups) = (LayerId(random.random_range(0..layers)), Vec::new());
                let mut keys = Vec::new();
                for (slot, rows) in rows.into_iter().enumerate() {
                    let key = ExpertKey { layer, expert: ExpertId(random.random_range(0..experts)) };
                    let urgency = if random.random() { Urgency::Ahead } else { Urgency::Demand };
                    slab.begin_load(key, slot, urgency).unwrap();
                    keys.push(key);
                    let x = (0..rows * store.shape().d_model).map(|_| random.random_range(-1.0..1.0_f32));
                    // What bf16 holds, so that both sides see the same rows.
                    let x = x.map(|v| f32::from_bits(v.to_bits() & 0xffff_0000)).collect();
                    groups.push((slot, x));
                }
                (0..rows.len()).for_each(|slot| slab.finish_load(slot).unwrap());
                let found = on_slab(&slab, layer, &groups);
                for ((slot, x), found) in groups.iter().zip(&found) {
                    let mut weights = vec![0; store.shape().bytes()];
                    store.load(keys[*slot], &mut weights).unwrap();
                    let mut expected = vec![0.0; x.len()];
                    store.shape_of(layer).forward(&weights, x, &mut expected, &mut ExpertScratch::default());
                    let off = relative(found, &expected);
                    let limit = if precision == Precision::F32 { 1e-5 } else { 1e-2 };
                    assert!(off < limit, "{} {precision} round {round} slot {slot}: off by {off:e}", dir.display());
                    let d_model = store.shape().d_model;
                    let row = random.random_range(0..x.len() / d_model) * d_model;
                    let alone = on_slab(&slab, layer, &[(*slot, x[row..row + d_model].to_vec())]);
                    assert!(alone[0].iter().zip(&found[row..row + d_model]).all(|(a, b)| a.to_bits() == b.to_bits()));
                }
            }
        }
    }
}

/// A slab with all experts: slot = layer * experts + expert.
pub(super) fn full_slab(ordinal: usize, store: ExpertStore, precision: Precision) -> DeviceSlab {
    let experts = store.config().num_experts;
    let slots = store.config().moe_layer_count() * experts;
    let slot = ExpertSlot::choose(&store, precision, true).unwrap();
    let slab = DeviceSlab::open(Gpu::open(ordinal).unwrap(), store, slot, slots, u64::MAX).unwrap();
    for slot in 0..slots {
        let (layer, expert) = (LayerId((slot / experts) as u16), ExpertId((slot % experts) as u16));
        slab.begin_load(ExpertKey { layer, expert }, slot, Urgency::Ahead).unwrap();
        slab.finish_load(slot).unwrap();
    }
    slab
}

/// One pass through a stack whose experts are in a slab: slot = layer * experts + expert.
fn pass(
    dense: &mut DeviceDense,
    slab: &DeviceSlab,
    stack: Stack,
    (ids, spans): (&[u32], &Spans),
    sequences: Vec<&mut DeviceSequence>,
) -> (Vec<Vec<u16>>, DeviceStates) {
    let (d_model, experts) = (dense.config().d_model, dense.config().num_experts);
    let mut chosen = Vec::new();
    let mut pass = dense.begin(stack, ids, spans, sequences, Beside::default()).unwrap();
    while let Some(layer) = dense.advance(&mut pass).unwrap() {
        let routes = dense.routes(&mut pass).unwrap();
        let choice: Vec<u16> = routes.experts.iter().map(|expert| expert.unwrap().0).collect();
        let MoeRows::Device(mut rows) = dense.rows(&mut pass) else { panic!("rows of a device") };
        let x = rows.fetch().unwrap();
        let groups: Vec<(usize, Vec<usize>)> = (0..experts)
            .map(|expert| (expert, (0..ids.len()).filter(|&r| usize::from(choice[r]) == expert).collect()))
            .filter(|(_, of): &(usize, Vec<usize>)| !of.is_empty())
            .collect();
        let gathered: Vec<(usize, Vec<f32>)> = groups
            .iter()
            .map(|(expert, of)| {
                let x = of.iter().flat_map(|&row| &x[row * d_model..][..d_model]).copied().collect();
                (usize::from(layer.0) * experts + expert, x)
            })
            .collect();
        let mut out = vec![0.0; x.len()];
        for ((_, of), results) in groups.iter().zip(on_slab(slab, layer, &gathered)) {
            for (&row, y) in of.iter().zip(results.chunks(d_model)) {
                let to = &mut out[row * d_model..][..d_model];
                to.iter_mut().zip(y).for_each(|(to, y)| *to += routes.weights[row] * y);
            }
        }
        dense.add(&mut pass, &out).unwrap();
        chosen.push(choice);
    }
    (chosen, dense.finish(pass).unwrap().states)
}

/// A coordinator whose experts are on other nodes would answer otherwise than a model that has its own.
#[test]
fn experts_elsewhere_give_the_same_bits() {
    let Some(ordinal) = device() else { return println!("SIDA_CUDA_DEVICE is not set: nothing is compared") };
    let mut random = rand::rngs::StdRng::seed_from_u64(21);
    for dir in models() {
        for precision in [Precision::Bf16, Precision::F32] {
            let checkpoint = Checkpoint::open(&dir).unwrap();
            let store = ExpertStore::open(checkpoint.clone()).unwrap();
            let slab = full_slab(ordinal, store, precision);
            let gpu = Gpu::open(ordinal).unwrap();
            let mut dense = DeviceDense::open(gpu, &checkpoint, precision, ROWS_MAX).unwrap();
            let mut whole = open(&dir, ordinal, precision, 1.0, 0);
            let vocab = whole.config().vocab_size;
            let (ids, spans) = random_batch(&mut random, vocab, &[7, 60, 12, 300]);
            let passed = whole.encode(&ids, &spans);
            let (chosen, states) = pass(&mut dense, &slab, Stack::Encoder, (&ids, &spans), Vec::new());
            assert_eq!(chosen, passed.experts);
            let bits = |values: Vec<f32>| -> Vec<u32> { values.into_iter().map(f32::to_bits).collect() };
            let values = dense.values(&states, &mut Vec::new()).unwrap().to_vec();
            assert_eq!(bits(values), bits(whole.states()));
            let (mut theirs, mut ours) = (whole.start(&spans), on_device::start(&mut dense, &states, &spans));
            ours[0] = dense.fork(&ours[0]).unwrap();
            let mut fed: Vec<u32> = vec![whole.config().generation.decoder_start_token_id; 4];
            for _ in 0..6 {
                let spans = Spans::single_tokens(4);
                let passed = whole.decode(&fed, &spans, &mut theirs, &[0, 1, 2, 3]);
                let all: Vec<&mut DeviceSequence> = ours.iter_mut().collect();
                let (chosen, states) = pass(&mut dense, &slab, Stack::Decoder, (&fed, &spans), all);
                assert_eq!(chosen, passed.experts);
                let logits = dense.logits(&states, &[0, 1, 2, 3]).unwrap();
                assert_eq!(bits(logits), bits(whole.logits(4)), "{} {precision}", dir.display());
                // Chosen on the device as on the processor; what is banned gives way to the next best.
                let any: Vec<Option<u32>> = passed.tokens.iter().copied().map(Some).collect();
                let wanted = |banned: &[Option<u32>]| -> Vec<Wanted> {
                    banned.iter().zip(0..).map(|(&banned, row)| Wanted { row, banned }).collect()
                };
                assert_eq!(dense.best_tokens(&states, &wanted(&[None; 4])).unwrap().unwrap(), any);
                let others = dense.best_tokens(&states, &wanted(&any)).unwrap().unwrap();
                assert!(others.iter().zip(&any).all(|(other, best)| other.is_some() && other != best));
                fed = passed.tokens;
            }
        }
    }
}
