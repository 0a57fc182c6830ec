//! A checksum over calls and their answers. Made and read by [`super::call`] and [`super::predict`], on both sides.
//!
//! A wrong bit in a row is a wrong token that nobody would ever notice: it decodes. (So is one in a prediction, where that
//! decides: mode `hash`.) TCP's own sum misses about
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
    }
    response.states.iter().for_each(|state| sum.bytes(state));
    sum.0.finalize()
}

/// Refuses a message whose checksum is not what its fields make.
pub(super) fn undamaged(message: &'static str, found: u32, expected: u32) -> Result<(), WireError> {
    if found == expected { Ok(()) } else { Err(WireError::Damaged { message, found, expected }) }
}
