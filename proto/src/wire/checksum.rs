//! A checksum over calls and their answers. Made and read by [`super::call`], [`super::predict`] and [`super::learn`], on
//! both sides.
//!
//! A wrong bit in a row is a wrong token that nobody would ever notice: it decodes. (So is one in a prediction, where that
//! decides: modes `guided` and `hash`.) TCP's own sum misses about
//! one damaged segment in 65,536, and what changes a message in a proxy or in memory it does not see at all;
//! TLS would, but clusters run without it. CRC-32 takes about a tenth of a nanosecond per byte.
//!
//! What is summed is the fields' values, in their order, each list behind its length, so that the same values
//! have one sum whoever encoded them.

use crc32fast::Hasher;

use super::WireError;
use crate::v1;

/// Sums values in the order in which they are given.
struct Sum(Hasher);

impl Sum {
    fn number(&mut self, value: u64) {
        self.0.update(&value.to_le_bytes());
    }

    fn numbers(&mut self, values: &[u32]) {
        self.number(values.len() as u64);
        values.iter().for_each(|value| self.0.update(&value.to_le_bytes()));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.update(bytes);
    }
}

/// What a call's `checksum` must be.
pub(super) fn of_call(call: &v1::Activations) -> u32 {
    let mut sum = Sum(Hasher::new());
    sum.number(call.call_id);
    sum.number(call.layer.into());
    sum.numbers(&call.experts);
    sum.numbers(&call.rows);
    sum.number(call.dtype as u64);
    sum.bytes(&call.payload);
    // Nothing where there are none, so that nodes without windows agree.
    if !call.first_places.is_empty() {
        sum.numbers(&call.first_places);
    }
    sum.0.finalize()
}

/// What an answer's `checksum` must be.
pub(super) fn of_results(results: &v1::Results) -> u32 {
    let mut sum = Sum(Hasher::new());
    sum.number(results.call_id);
    sum.bytes(&results.payload);
    if let Some(report) = &results.report {
        // Whether plans gain anything decides no answer, and coordinators that do not know of it have to agree.
        for number in [report.hits.into(), report.demand_loads.into(), report.load_us, report.compute_us] {
            sum.number(number);
        }
    }
    if let Some(error) = &results.error {
        sum.number(error.code as u64);
        for bytes in [error.reason.as_bytes(), error.message.as_bytes(), &error.newer_placement] {
            sum.bytes(bytes);
        }
    }
    sum.0.finalize()
}

/// What the `checksum` of a request for predictions must be.
pub(super) fn of_predict_request(request: &v1::PredictRequest) -> u32 {
    let mut sum = Sum(Hasher::new());
    sum.bytes(&request.model_digest);
    sum.number(request.stack as u64);
    for v1::PredictSequence { token_ids, state } in &request.sequences {
        sum.numbers(token_ids);
        sum.bytes(state);
    }
    sum.0.finalize()
}

/// What the `checksum` of predictions must be.
pub(super) fn of_predict_response(response: &v1::PredictResponse) -> u32 {
    let mut sum = Sum(Hasher::new());
    for table in &response.tables {
        sum.bytes(&table.model_digest);
        sum.bytes(&table.predictor_digest);
        sum.numbers(&[table.first_layer, table.layers, table.tokens, table.top_k]);
        sum.bytes(&table.experts);
        sum.bytes(&table.alphas);
        // Chances decide no answer, and nodes that do not know them have to agree.
    }
    response.states.iter().for_each(|state| sum.bytes(state));
    sum.0.finalize()
}

/// What the `checksum` of labels must be.
pub(super) fn of_learn_request(request: &v1::LearnRequest) -> u32 {
    let mut sum = Sum(Hasher::new());
    sum.bytes(&request.model_digest);
    sum.number(request.stack as u64);
    sum.number(request.kept.into());
    for v1::LabelledSequence { token_ids, experts, probabilities } in &request.sequences {
        sum.numbers(token_ids);
        sum.bytes(experts);
        sum.bytes(probabilities);
    }
    sum.0.finalize()
}

/// Refuses a message whose checksum is not what its fields make.
pub(super) fn undamaged(message: &'static str, found: u32, expected: u32) -> Result<(), WireError> {
    if found == expected { Ok(()) } else { Err(WireError::Damaged { message, found, expected }) }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn call() -> v1::Activations {
        v1::Activations {
            call_id: 1,
            layer: 2,
            experts: vec![3, 4],
            rows: vec![5, 6],
            dtype: 1,
            payload: Bytes::from_static(b"rows"),
            ..Default::default()
        }
    }

    fn answer() -> v1::Results {
        let report = v1::CallReport { hits: 1, demand_loads: 2, load_us: 3, compute_us: 4, ..Default::default() };
        v1::Results { call_id: 1, payload: Bytes::from_static(b"rows"), report: Some(report), ..Default::default() }
    }

    fn refusal() -> v1::Results {
        let newer_placement = Bytes::from_static(b"record");
        let error = v1::CallError { code: 9, reason: "STALE_EPOCH".into(), message: "old".into(), newer_placement };
        v1::Results { call_id: 1, error: Some(error), ..Default::default() }
    }

    fn request() -> v1::PredictRequest {
        let sequence = v1::PredictSequence { token_ids: vec![7, 8], state: Bytes::from_static(b"state") };
        v1::PredictRequest {
            model_digest: Bytes::from_static(&[9; 32]),
            stack: 1,
            sequences: vec![sequence],
            ..Default::default()
        }
    }

    fn response() -> v1::PredictResponse {
        let table = v1::HashTable {
            model_digest: Bytes::from_static(&[9; 32]),
            predictor_digest: Bytes::from_static(&[8; 32]),
            first_layer: 1,
            layers: 2,
            tokens: 3,
            top_k: 4,
            experts: Bytes::from_static(b"experts"),
            alphas: Bytes::from_static(b"alphas"),
            chances: Bytes::new(),
        };
        v1::PredictResponse { tables: vec![table], states: vec![Bytes::from_static(b"state")], checksum: 0 }
    }

    fn labels() -> v1::LearnRequest {
        let (experts, probabilities) = (Bytes::from_static(b"experts"), Bytes::from_static(b"probabilities"));
        let sequence = v1::LabelledSequence { token_ids: vec![7, 8], experts, probabilities };
        let (model_digest, sequences) = (Bytes::from_static(&[9; 32]), vec![sequence]);
        v1::LearnRequest { model_digest, stack: 1, kept: 2, sequences, checksum: 0 }
    }

    #[test]
    fn sums_never_change_between_versions() {
        // Broken: during an upgrade nodes of the two versions would take each other's messages for damaged.
        let in_window = v1::Activations { first_places: vec![0, 5], ..call() };
        let sums = [
            of_call(&call()),
            of_call(&in_window),
            of_results(&answer()),
            of_results(&refusal()),
            of_predict_request(&request()),
            of_predict_response(&response()),
            of_learn_request(&labels()),
        ];
        assert_eq!(sums, PINNED, "rewrite PINNED only with a decision about upgrades");
    }
    const PINNED: [u32; 7] =
        [0x4d3d_c165, 0xc4d7_5b81, 0x3cf9_f2c2, 0xdfec_ae25, 0x496c_f1fe, 0xa5d9_c6f2, 0xe1c7_8514];

    /// Whether every one of these changes makes another sum.
    fn all_noticed<M: Clone>(message: &M, sum: fn(&M) -> u32, changes: &[fn(&mut M)]) {
        for (at, change) in changes.iter().enumerate() {
            let mut changed = message.clone();
            change(&mut changed);
            assert_ne!(sum(&changed), sum(message), "change {at}");
        }
    }

    #[test]
    fn every_value_is_summed() {
        // Broken: a bit that flips on its way would be a wrong row, a wrong token or a wrong refusal.
        all_noticed(
            &call(),
            of_call,
            &[
                |m| m.call_id += 1,
                |m| m.layer += 1,
                |m| m.experts[1] += 1,
                |m| m.rows.swap(0, 1),
                |m| m.dtype += 1,
                |m| m.payload = Bytes::from_static(b"row"),
                |m| m.first_places.push(0),
            ],
        );
        all_noticed(
            &answer(),
            of_results,
            &[
                |m| m.call_id += 1,
                |m| m.payload = Bytes::from_static(b"rowt"),
                |m| m.report.as_mut().unwrap().hits += 1,
                |m| m.report.as_mut().unwrap().demand_loads += 1,
                |m| m.report.as_mut().unwrap().load_us += 1,
                |m| m.report.as_mut().unwrap().compute_us += 1,
            ],
        );
        all_noticed(
            &refusal(),
            of_results,
            &[
                |m| m.error.as_mut().unwrap().code += 1,
                |m| m.error.as_mut().unwrap().reason.push('x'),
                |m| m.error.as_mut().unwrap().message.clear(),
                |m| m.error.as_mut().unwrap().newer_placement.clear(),
            ],
        );
        all_noticed(
            &request(),
            of_predict_request,
            &[
                |m| m.model_digest.clear(),
                |m| m.stack += 1,
                |m| m.sequences[0].token_ids[1] += 1,
                |m| m.sequences[0].state.clear(),
            ],
        );
        all_noticed(
            &response(),
            of_predict_response,
            &[
                |m| m.tables[0].model_digest.clear(),
                |m| m.tables[0].predictor_digest.clear(),
                |m| m.tables[0].first_layer += 1,
                |m| m.tables[0].layers += 1,
                |m| m.tables[0].tokens += 1,
                |m| m.tables[0].top_k += 1,
                |m| m.tables[0].experts.clear(),
                |m| m.tables[0].alphas.clear(),
                |m| m.states[0].clear(),
            ],
        );
        all_noticed(
            &labels(),
            of_learn_request,
            &[
                |m| m.model_digest.clear(),
                |m| m.stack += 1,
                |m| m.kept += 1,
                |m| m.sequences[0].token_ids[1] += 1,
                |m| m.sequences[0].experts.clear(),
                |m| m.sequences[0].probabilities.clear(),
            ],
        );
    }
}
