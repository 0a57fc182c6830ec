//! Serves `sida.v1.Experts`: opens lanes for coordinators of the same model, and tells what the node holds.

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use sida_cluster::experts::LocalExperts;
use sida_proto::{
    v1::{LaneRequest, LaneResponse, ResidencyRequest, ResidencyResponse, experts_server::Experts},
    wire,
};
use sida_rpc::{Fault, Reason};
use tonic::{Request, Response, Status, Streaming};

use crate::lane::{self, Lanes};

/// Names the model that a lane is for, in hex.
pub const MODEL_DIGEST_METADATA: &str = "sida-model-digest";
/// Metadata of a lane: the digest of the experts that its rows are for. A coordinator of an older version sends none.
pub const EXPERTS_DIGEST_METADATA: &str = "sida-experts-digest";

/// The service.
pub(crate) struct ExpertsService {
    pub(crate) lanes: Arc<Lanes>,
}

#[tonic::async_trait]
impl Experts for ExpertsService {
    type LaneStream = Pin<Box<dyn Stream<Item = Result<LaneResponse, Status>> + Send>>;

    async fn lane(&self, request: Request<Streaming<LaneRequest>>) -> Result<Response<Self::LaneStream>, Status> {
        let expected = self.lanes.engine.model().to_string();
        let found = request.metadata().get(MODEL_DIGEST_METADATA).and_then(|value| value.to_str().ok());
        if found != Some(expected.as_str()) {
            let found = found.unwrap_or("none");
            let message = format!("this node serves model {expected}, the lane is for {found}");
            let fault = Fault::new(Reason::ModelMismatch, message);
            return Err(fault.with("node", self.lanes.engine.node()).with("expected", expected).into());
        }
        let wanted = request.metadata().get(EXPERTS_DIGEST_METADATA).and_then(|value| value.to_str().ok());
        if let Some((wanted, own)) = wanted.zip(self.lanes.engine.experts())
            && wanted != own.to_string()
        {
            let message = format!(
                "this node has other experts of model {expected} than the coordinator: theirs are {wanted}, these {own}"
            );
            let fault = Fault::new(Reason::ModelMismatch, message);
            return Err(fault.with("node", self.lanes.engine.node()).with("expected_experts", own).into());
        }
        if self.lanes.shutdown.is_cancelled() {
            return Err(Fault::new(Reason::ShuttingDown, "this node is shutting down").into());
        }
        Ok(Response::new(Box::pin(lane::open(self.lanes.clone(), request.into_inner()))))
    }

    async fn residency(&self, _: Request<ResidencyRequest>) -> Result<Response<ResidencyResponse>, Status> {
        let engine = &self.lanes.engine;
        let report = engine.residency();
        let residency = wire::Residency {
            node: engine.node().clone(),
            model: engine.model(),
            experts: engine.experts(),
            resident_bytes: report.resident_bytes,
            budget_bytes: report.budget_bytes,
            slots: report.slots,
            demand_loads: report.demand_loads,
            prefetch_loads: report.prefetch_loads,
            evictions: report.evictions,
            rows: report.rows,
            resident: report.resident,
        };
        Ok(Response::new(ResidencyResponse::from(&residency)))
    }
}
