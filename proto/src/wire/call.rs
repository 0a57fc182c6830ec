//! `Activations` -> [`Call`], read by expert-nodes; `Results` -> [`Answer`], read by coordinators.

use bytes::Bytes;
use sida_routing::{ExpertId, Group, LayerId, PlacedGroup};

use super::{Bounds, WireError, checksum, length, placement::RECORD_BYTES_MAX, rows, within};
use crate::v1;

/// A checked call: rows for experts of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Names the call on its lane.
    pub call_id: u64,
    /// Epoch of the placement that the sender knew; 0: none.
    pub placement_epoch: u64,
    /// Which MoE layer.
    pub layer: LayerId,
    /// Consecutive rows by expert; at least one group.
    pub groups: Vec<Group>,
    /// The rows.
    pub rows: CallRows,
}

/// Where the rows of a call are.
#[derive(Clone, Debug, PartialEq)]
pub enum CallRows {
    /// They came with it: (sum of rows, d_model).
    Sent(Vec<f32>),
    /// In the lane's window: the first place of each group. Whether the window has them is known to whoever opened it.
    InWindow(Vec<u32>),
}

/// A checked answer to one call.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// The rows were computed.
    Done {
        /// (sum of rows, d_model) float32, little-endian, exactly as long as the call needs:
        /// [`rows::copy_from_payload`] reads it.
        payload: Bytes,
        /// What it cost.
        report: v1::CallReport,
    },
    /// The node could not.
    Failed(v1::CallError),
}

impl v1::Activations {
    /// Sends `activations`, (sum of rows of `groups`, d_model), under no placement's epoch.
    pub fn new(call_id: u64, layer: LayerId, groups: &[Group], activations: &[f32]) -> Self {
        let mut message = Self {
            call_id,
            layer: layer.0.into(),
            experts: groups.iter().map(|group| group.expert.0.into()).collect(),
            rows: groups.iter().map(|group| group.rows).collect(),
            dtype: v1::DType::DtypeF32.into(),
            payload: rows::to_payload(activations),
            placement_epoch: 0,
            checksum: 0,
            traceparent: String::new(),
            first_places: Vec::new(),
        };
        message.checksum = checksum::of_call(&message);
        message
    }

    /// Names rows that are in the lane's window, under no placement's epoch.
    pub fn in_window(call_id: u64, layer: LayerId, groups: &[PlacedGroup]) -> Self {
        let mut message = Self {
            experts: groups.iter().map(|group| group.expert.0.into()).collect(),
            rows: groups.iter().map(|group| group.rows).collect(),
            first_places: groups.iter().map(|group| group.first).collect(),
            ..Self::new(call_id, layer, &[], &[])
        };
        message.checksum = checksum::of_call(&message);
        message
    }

    /// The call, if the model has its experts and the payload holds its rows, no more and no less.
    pub fn check(self, bounds: &Bounds) -> Result<Call, WireError> {
        let layer = bounds.layer("Activations.layer", self.layer)?;
        if self.dtype != i32::from(v1::DType::DtypeF32) {
            return Err(WireError::Kind { field: "Activations.dtype", found: self.dtype });
        }
        within("Activations.experts (their number)", self.experts.len(), 1, bounds.num_experts)?;
        length("Activations.rows", "groups", self.rows.len(), self.experts.len())?;
        let mut rows_total = 0usize;
        let mut groups = Vec::with_capacity(self.experts.len());
        for (&expert, &rows) in self.experts.iter().zip(&self.rows) {
            let expert: ExpertId = bounds.expert("Activations.experts", expert)?;
            within("Activations.rows", rows as usize, 1, bounds.rows_max)?;
            rows_total = within("Activations.rows (their sum)", rows_total + rows as usize, 1, bounds.rows_max)?;
            groups.push(Group { expert, rows });
        }
        let is_in_window = !self.first_places.is_empty();
        let expected = if is_in_window { 0 } else { payload_bytes(rows_total, bounds.d_model) };
        length("Activations.payload", "bytes", self.payload.len(), expected)?;
        checksum::undamaged("Activations", self.checksum, checksum::of_call(&self))?;
        let rows = if is_in_window {
            length("Activations.first_places", "groups", self.first_places.len(), groups.len())?;
            CallRows::InWindow(self.first_places)
        } else {
            CallRows::Sent(rows::from_payload(&self.payload))
        };
        Ok(Call { call_id: self.call_id, placement_epoch: self.placement_epoch, layer, groups, rows })
    }
}

impl v1::Results {
    /// Answers a call with its `rows`, (sum of rows, d_model).
    pub fn done(call_id: u64, rows: Vec<f32>, report: v1::CallReport) -> Self {
        Self::summed(Self {
            call_id,
            payload: rows::into_payload(rows),
            report: Some(report),
            error: None,
            checksum: 0,
        })
    }

    /// Answers a call that could not be computed.
    pub fn failed(call_id: u64, error: v1::CallError) -> Self {
        Self::summed(Self { call_id, payload: Bytes::new(), report: None, error: Some(error), checksum: 0 })
    }

    fn summed(mut self) -> Self {
        self.checksum = checksum::of_results(&self);
        self
    }

    /// The answer to a call of `rows_expected` rows of `d_model` values.
    pub fn check(self, rows_expected: usize, d_model: usize) -> Result<Answer, WireError> {
        checksum::undamaged("Results", self.checksum, checksum::of_results(&self))?;
        if let Some(error) = self.error {
            length("Results.payload of a failed call", "bytes", self.payload.len(), 0)?;
            within("CallError.newer_placement (its bytes)", error.newer_placement.len(), 0, RECORD_BYTES_MAX)?;
            return Ok(Answer::Failed(error));
        }
        length("Results.payload", "bytes", self.payload.len(), payload_bytes(rows_expected, d_model))?;
        let report = self.report.ok_or(WireError::Missing { field: "Results.report" })?;
        Ok(Answer::Done { payload: self.payload, report })
    }
}

fn payload_bytes(rows: usize, d_model: usize) -> usize {
    rows.saturating_mul(d_model).saturating_mul(rows::VALUE_BYTES)
}
