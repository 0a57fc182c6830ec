//! Every decoder of outside bytes as a plain function, bytes in, checked type out: what the fuzz targets call,
//! and what shows that no decoder needs a connection.

use prost::Message;
use sida_routing::{HashTable, Plan};

use super::{
    Answer, Bounds, Call, PlacementRecord, PredictionRequest, Residency, TakenLabels, WireError,
    placement::RECORD_BYTES_MAX, within,
};
use crate::v1;

/// A hash table.
pub fn hash_table(bytes: &[u8], bounds: &Bounds) -> Result<HashTable, WireError> {
    message::<v1::HashTable>("HashTable", bytes)?.check(bounds)
}

/// A request to a predictor-node.
pub fn predict_request(bytes: &[u8], bounds: &Bounds) -> Result<PredictionRequest, WireError> {
    message::<v1::PredictRequest>("PredictRequest", bytes)?.check(bounds)
}

/// Labels for a predictor-node, of a stack of so many MoE `layers`.
pub fn learn_request(bytes: &[u8], bounds: &Bounds, layers: usize) -> Result<TakenLabels, WireError> {
    message::<v1::LearnRequest>("LearnRequest", bytes)?.check(bounds, layers)
}

/// A hint to an expert-node.
pub fn plan(bytes: &[u8], bounds: &Bounds) -> Result<Plan, WireError> {
    message::<v1::Plan>("Plan", bytes)?.check(bounds)
}

/// A call to an expert-node.
pub fn activations(bytes: &[u8], bounds: &Bounds) -> Result<Call, WireError> {
    message::<v1::Activations>("Activations", bytes)?.check(bounds)
}

/// An expert-node's answer to a call of `rows_expected` rows.
pub fn results(bytes: &[u8], rows_expected: usize, d_model: usize) -> Result<Answer, WireError> {
    message::<v1::Results>("Results", bytes)?.check(rows_expected, d_model)
}

/// What an expert-node says it holds.
pub fn residency(bytes: &[u8], bounds: &Bounds) -> Result<Residency, WireError> {
    message::<v1::ResidencyResponse>("ResidencyResponse", bytes)?.check(bounds)
}

/// Who holds what, from etcd or from an expert-node.
pub fn placement(bytes: &[u8]) -> Result<PlacementRecord, WireError> {
    within("PlacementRecord (bytes)", bytes.len(), 0, RECORD_BYTES_MAX)?;
    message::<v1::PlacementRecord>("PlacementRecord", bytes)?.check()
}

fn message<M: Message + Default>(name: &'static str, bytes: &[u8]) -> Result<M, WireError> {
    M::decode(bytes).map_err(|source| WireError::Decode { message: name, source })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;
    use sida_routing::{
        Digest, ExpertId, ExpertKey, Group, Labels, LabelsExtent, LayerId, PlacedGroup, PlanId, hash_table::Shape,
    };

    use super::*;
    use crate::wire::{CallRows, Stack, checksum, rows};

    const BOUNDS: Bounds = Bounds {
        moe_layers: 6,
        num_experts: 64,
        d_model: 4,
        vocab_size: 1000,
        rows_max: 100,
        tokens_max: 50,
        sequences_max: 8,
    };

    fn key() -> impl Strategy<Value = ExpertKey> {
        (0u16..6, 0u16..64).prop_map(|(layer, expert)| ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) })
    }

    fn table() -> impl Strategy<Value = HashTable> {
        (0u16..6, 1usize..5, 1usize..4).prop_flat_map(|(first, tokens, top_k)| {
            let layers = usize::from(6 - first);
            let entries = layers * tokens * top_k;
            let shape = Shape { first_layer: LayerId(first), layers, tokens, top_k };
            let experts = prop::collection::vec((0u16..64).prop_map(ExpertId), entries);
            let alphas = prop::collection::vec(0f32..=1.0, entries);
            let chances = prop_oneof![Just(Vec::new()), prop::collection::vec(0f32..=1.0, entries)];
            (any::<[u8; 32]>(), experts, alphas, chances).prop_map(move |(model, experts, alphas, chances)| {
                let table = HashTable::new(Digest(model), Digest([7; 32]), shape, 64, experts, alphas).unwrap();
                table.with_chances(chances).unwrap()
            })
        })
    }

    fn call() -> impl Strategy<Value = (Vec<Group>, Vec<f32>)> {
        prop::collection::vec((0u16..64, 1u32..5), 1..20).prop_map(|groups| {
            let groups: Vec<Group> =
                groups.into_iter().map(|(expert, rows)| Group { expert: ExpertId(expert), rows }).collect();
            let rows: u32 = groups.iter().map(|group| group.rows).sum();
            (groups, (0..rows * 4).map(|value| value as f32).collect())
        })
    }

    proptest! {
        #[test]
        fn what_we_send_we_take(table in table(), keys in prop::collection::btree_set(key(), 0..30), call in call()) {
            // Broken: nodes of the same build could not talk to each other.
            let bytes = v1::HashTable::from(&table).encode_to_vec();
            prop_assert_eq!(hash_table(&bytes, &BOUNDS).unwrap(), table);

            let hint = Plan { id: PlanId(3), experts: keys.iter().rev().copied().collect(), begins: true };
            prop_assert_eq!(plan(&v1::Plan::from(&hint).encode_to_vec(), &BOUNDS).unwrap(), hint);

            let (groups, values) = call;
            let sent = v1::Activations::new(9, LayerId(5), &groups, &values);
            let taken = activations(&sent.encode_to_vec(), &BOUNDS).unwrap();
            prop_assert_eq!((&taken.groups, taken.rows, taken.layer), (&groups, CallRows::Sent(values.clone()), LayerId(5)));

            let placed = |group: &Group| PlacedGroup { expert: group.expert, first: 7 * group.rows, rows: group.rows };
            let sent = v1::Activations::in_window(9, LayerId(5), &groups.iter().map(placed).collect::<Vec<_>>());
            let taken = activations(&sent.encode_to_vec(), &BOUNDS).unwrap();
            let firsts = groups.iter().map(|group| 7 * group.rows).collect();
            prop_assert_eq!((&taken.groups, taken.rows), (&groups, CallRows::InWindow(firsts)));

            let sent = v1::Results::done(9, values.clone(), v1::CallReport::default());
            match results(&sent.encode_to_vec(), values.len() / 4, 4).unwrap() {
                Answer::Done { payload, .. } => prop_assert_eq!(rows::from_payload(&payload), values),
                Answer::Failed(error) => prop_assert!(false, "{:?}", error),
            }

            let held = Residency {
                node: "e0".into(), model: Digest([1; 32]), experts: Some(Digest([2; 32])), resident_bytes: 1, budget_bytes: 2, slots: 3,
                demand_loads: 4, prefetch_loads: 5, evictions: 6, rows: 7, resident: keys.into_iter().collect(),
            };
            let bytes = v1::ResidencyResponse::from(&held).encode_to_vec();
            prop_assert_eq!(residency(&bytes, &BOUNDS).unwrap(), held);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            // Broken: one malformed message would end a node.
            every_decoder(&bytes);
        }

        #[test]
        fn no_damage_panics(call in call(), table in table(), at in any::<usize>(), bit in 0u32..8, cut in any::<usize>()) {
            // Broken: a message damaged on its way would end a node, or make it read beyond a payload.
            let (groups, values) = call;
            for mut bytes in [
                v1::Activations::new(1, LayerId(0), &groups, &values).encode_to_vec(),
                v1::HashTable::from(&table).encode_to_vec(),
            ] {
                let at = at % bytes.len();
                bytes[at] ^= 1 << bit;
                every_decoder(&bytes);
                bytes.truncate(cut % bytes.len());
                every_decoder(&bytes);
            }
        }

        #[test]
        fn no_number_is_believed(layer: u32, experts in prop::collection::vec(any::<u32>(), 0..5),
                                 rows in prop::collection::vec(any::<u32>(), 0..5), extent: [u32; 4]) {
            // Broken: a claimed count would overflow, index out of range, or allocate gigabytes.
            let call = v1::Activations { layer, experts: experts.clone(), rows, dtype: 1, ..Default::default() };
            prop_assert!(call.check(&BOUNDS).is_err());
            let [first_layer, layers, tokens, top_k] = extent;
            let table = v1::HashTable { first_layer, layers, tokens, top_k, ..Default::default() };
            prop_assert!(table.check(&BOUNDS).is_err());
            let layers = vec![layer; experts.len()];
            let hint = v1::Plan { plan_id: 1, layers, experts: experts.clone(), placement_epoch: 0, begins: false };
            let wrong = experts.iter().any(|&expert| expert >= 64 || layer >= 6);
            prop_assert_eq!(hint.check(&BOUNDS).is_err(), wrong);
        }
    }

    fn every_decoder(bytes: &[u8]) {
        let _ = hash_table(bytes, &BOUNDS);
        let _ = predict_request(bytes, &BOUNDS);
        let _ = learn_request(bytes, &BOUNDS, 3);
        let _ = plan(bytes, &BOUNDS);
        let _ = activations(bytes, &BOUNDS);
        let _ = results(bytes, 3, 4);
        let _ = residency(bytes, &BOUNDS);
        let _ = placement(bytes);
    }

    #[test]
    fn refusals_name_the_field() {
        // Broken: who sent a bad call could not tell what is bad about it.
        let group = |expert, rows| Group { expert: ExpertId(expert), rows };
        let good = v1::Activations::new(1, LayerId(0), &[group(3, 2)], &[0.0; 8]);
        let refused = |call: v1::Activations| call.check(&BOUNDS).unwrap_err().to_string();
        let layer = v1::Activations { layer: 6, ..good.clone() };
        assert_eq!(refused(layer), "Activations.layer is 6, expected less than 6");
        let expert = v1::Activations { experts: vec![64], ..good.clone() };
        assert_eq!(refused(expert), "Activations.experts is 64, expected less than 64");
        let empty = v1::Activations { rows: vec![0], ..good.clone() };
        assert_eq!(refused(empty), "Activations.rows is 0, expected 1 to 100");
        let short = v1::Activations { payload: good.payload.slice(1..), ..good.clone() };
        assert_eq!(refused(short), "Activations.payload holds 31 bytes, expected 32");
        let half = v1::Activations { dtype: 2, ..good.clone() };
        assert_eq!(refused(half), "Activations.dtype is 2, which this node does not take");
        let many = v1::Activations { experts: vec![1, 2], rows: vec![60, 60], ..good.clone() };
        assert_eq!(refused(many), "Activations.rows (their sum) is 120, expected 1 to 100");
        let placed = PlacedGroup { expert: ExpertId(3), first: 40, rows: 2 };
        let in_window = v1::Activations::in_window(1, LayerId(0), &[placed]);
        let both = v1::Activations { payload: good.payload.clone(), ..in_window.clone() };
        assert_eq!(refused(both), "Activations.payload holds 32 bytes, expected 0");
        let mut more = v1::Activations { first_places: vec![40, 41], ..in_window };
        more.checksum = checksum::of_call(&more);
        assert_eq!(refused(more), "Activations.first_places holds 2 groups, expected 1");
    }

    proptest! {
        #[test]
        fn no_damage_goes_unnoticed(call in call(), at in any::<usize>(), bit in 0u32..8) {
            // Broken: a bit that flips on its way becomes a wrong row, and a wrong token.
            let (groups, values) = call;
            let flipped = |mut bytes: Vec<u8>| {
                let at = at % bytes.len();
                bytes[at] ^= 1 << bit;
                bytes
            };
            let sent = v1::Activations::new(1, LayerId(3), &groups, &values);
            if let Ok(taken) = activations(&flipped(sent.encode_to_vec()), &BOUNDS) {
                let taken = (taken.call_id, taken.layer, taken.groups, taken.rows);
                prop_assert_eq!(taken, (1, LayerId(3), groups, CallRows::Sent(values.clone())));
            }
            let report = v1::CallReport { hits: 1, demand_loads: 2, load_us: 3, compute_us: 4, ..Default::default() };
            let sent = v1::Results::done(1, values.clone(), report);
            if let Ok(Answer::Done { payload, report: taken }) = results(&flipped(sent.encode_to_vec()), values.len() / 4, 4) {
                prop_assert_eq!((rows::from_payload(&payload), taken), (values, report));
            }
        }
    }

    #[test]
    fn a_table_speaks_of_layers_of_the_model_only() {
        // Broken: a table from outside would name layers that the model does not have, and a coordinator end by it.
        let table = |first: u16, layers: usize| {
            let shape = Shape { first_layer: LayerId(first), layers, tokens: 1, top_k: 1 };
            let entries = (vec![ExpertId(1); layers], vec![0.5; layers]);
            let table = HashTable::new(Digest([1; 32]), Digest([2; 32]), shape, 64, entries.0, entries.1).unwrap();
            hash_table(&v1::HashTable::from(&table).encode_to_vec(), &BOUNDS)
        };
        assert!([(0, 6), (2, 4), (5, 1)].into_iter().all(|(first, layers)| table(first, layers).is_ok()));
        for (first, layers) in [(0, 7), (2, 5), (5, 2), (6, 1)] {
            assert!(table(first, layers).is_err(), "{layers} layers from {first} on");
        }
    }

    #[test]
    fn chances_are_probabilities_or_missing() {
        // Broken: a damaged prediction has all experts loaded, or none; or a predictor-node of an earlier build is refused.
        let shape = Shape { first_layer: LayerId(0), layers: 1, tokens: 1, top_k: 2 };
        let table =
            HashTable::new(Digest([1; 32]), Digest([2; 32]), shape, 64, vec![ExpertId(1); 2], vec![0.5; 2]).unwrap();
        let taken = |chances: &[f32]| {
            let sent = v1::HashTable { chances: rows::to_payload(chances), ..v1::HashTable::from(&table) };
            hash_table(&sent.encode_to_vec(), &BOUNDS).map(|table| table.all_chances().to_vec())
        };
        assert_eq!(taken(&[]), Ok(vec![]));
        assert_eq!(taken(&[0.75, 0.25]), Ok(vec![0.75, 0.25]));
        let refused = |chances: &[f32]| taken(chances).unwrap_err().to_string();
        assert_eq!(refused(&[0.75]), "HashTable.chances holds 4 bytes, expected 8");
        assert_eq!(refused(&[0.75, 1.5]), "hash table: hash table holds chance 1.5, expected a probability in [0, 1]");
    }

    #[test]
    fn labels_are_taken_as_they_were_sent_and_of_this_model_only() {
        // Broken: a net would learn what no router chose, or index beyond its vocabulary or its experts.
        let labels = |token: u32, expert: u16| {
            let extent = LabelsExtent { layers: 2, num_experts: usize::MAX, kept: 2 };
            let experts = [expert, 1, 0, 5].map(ExpertId).to_vec();
            Labels::new(vec![token], extent, experts, vec![0.5, 0.25, 0.75, 0.125]).unwrap()
        };
        let sent = |labels: &[Labels]| v1::LearnRequest::new(Digest([9; 32]), Stack::Encoder, labels);
        let taken = |request: v1::LearnRequest, layers| learn_request(&request.encode_to_vec(), &BOUNDS, layers);
        let sound = sent(&[labels(7, 63), labels(999, 2)]);
        let checked = taken(sound.clone(), 2).unwrap();
        assert_eq!(checked.sequences, [labels(7, 63), labels(999, 2)]);
        assert_eq!((checked.model, checked.stack), (Digest([9; 32]), Stack::Encoder));
        let refused = |request, layers| taken(request, layers).unwrap_err().to_string();
        assert_eq!(refused(sent(&[labels(1000, 2)]), 2), "LabelledSequence.token_ids is 1000, expected less than 1000");
        assert_eq!(refused(sent(&[labels(7, 64)]), 2), "labels name expert 64, the model has 64 per layer");
        assert_eq!(refused(sound.clone(), 3), "LabelledSequence.experts holds 8 bytes, expected 12");
        assert_eq!(refused(sent(&[]), 2), "LearnRequest.sequences is 0, expected 1 to 8");
        let damaged = v1::LearnRequest { kept: u32::MAX, ..sound };
        assert!(refused(damaged, 2).contains("damaged"));
    }

    #[test]
    fn a_refusal_carries_a_placement_within_bounds() {
        // Broken: a node that refuses an old epoch could make a coordinator keep any number of bytes.
        let refusal = |bytes: usize| {
            let newer_placement = vec![7; bytes].into();
            let error = v1::CallError { code: 9, reason: "STALE_EPOCH".into(), message: "old".into(), newer_placement };
            results(&v1::Results::failed(1, error).encode_to_vec(), 1, 4)
        };
        assert!(matches!(refusal(9), Ok(Answer::Failed(error)) if error.newer_placement == [7; 9][..]));
        assert!(refusal(RECORD_BYTES_MAX + 1).is_err());
    }

    #[test]
    fn predictions_answer_what_was_asked() {
        // Broken: a predictor-node's table for other tokens or another model would be used.
        let (model, tokens) = (Digest([9; 32]), [1u32, 2]);
        let request = |tokens: &[u32], states: &[Bytes], stack| {
            let request = v1::PredictRequest::new(model, stack, &[tokens], states);
            predict_request(&request.encode_to_vec(), &BOUNDS)
        };
        let state = [Bytes::from_static(b"state")];
        let taken = request(&tokens, &state, Stack::Decoder).unwrap();
        assert_eq!((taken.model, taken.stack, taken.states), (model, Stack::Decoder, state.to_vec()));
        assert!(request(&tokens, &state, Stack::Encoder).is_err());
        assert!(request(&[1000], &[], Stack::Encoder).is_err());
        assert!(request(&[], &[], Stack::Encoder).is_err());

        let shape = Shape { first_layer: LayerId(0), layers: 3, tokens: 2, top_k: 1 };
        let table = HashTable::new(model, model, shape, 64, vec![ExpertId(1); 6], vec![0.5; 6]).unwrap();
        let answer = v1::PredictResponse::new(&[table], vec![]);
        let check = |model, layers, lengths: &[usize]| {
            answer.clone().check(&BOUNDS, model, Stack::Encoder, layers, lengths).map(|p| p.tables.len())
        };
        assert_eq!(check(model, 0..3, &[2]), Ok(1));
        assert!(check(Digest([8; 32]), 0..3, &[2]).is_err());
        assert!(check(model, 1..4, &[2]).is_err());
        assert!(check(model, 0..3, &[3]).is_err());
        assert!(check(model, 0..3, &[2, 2]).is_err());
    }
}
