//! Serves `sida.v1.Predictor`: a call is checked, waits for one of the computing threads, is predicted there, and
//! answered. A call is predicted by one predictor, also where another takes its place meanwhile. A prediction computes for milliseconds, so it never runs on a thread of the runtime.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use sida_predictor::{HashPredictor, PredictorError, PredictorShape, PredictorState};
use sida_proto::{
    v1::{self, predictor_server::Predictor},
    wire::{Bounds, Prediction, PredictionRequest, Stack},
};
use sida_routing::Digest;
use sida_rpc::{Fault, Reason, trace};
use sida_telemetry::{
    Span, TraceContext, counter, histogram,
    names::{self, On},
};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    task,
};
use tonic::{Request, Response, Status};

use crate::{config::PredictorLimits, learn::Learner, serving::Serving};

/// Serves one predictor. Clones share it.
#[derive(Clone)]
pub(crate) struct PredictorService {
    inner: Arc<Inner>,
}

struct Inner {
    serving: Arc<Serving>,
    learner: Option<Arc<Learner>>,
    shape: PredictorShape,
    limits: PredictorLimits,
    bounds: Bounds,
    /// A permit for each call that computes or waits.
    calls: Arc<Semaphore>,
    /// A permit for each call that computes.
    threads: Arc<Semaphore>,
}

impl PredictorService {
    pub(crate) fn new(
        serving: Arc<Serving>,
        learner: Option<Arc<Learner>>,
        shape: PredictorShape,
        limits: PredictorLimits,
    ) -> Self {
        names::declare(On::PredictorNode);
        let bounds = Bounds {
            moe_layers: usize::from(shape.encoder_layers.end.max(shape.decoder_layers.end)),
            num_experts: shape.num_experts,
            vocab_size: shape.vocab_size,
            tokens_max: limits.sequence_tokens_max,
            sequences_max: limits.sequences_max,
            // No activations come here.
            d_model: 0,
            rows_max: 0,
        };
        let calls = Arc::new(Semaphore::new(limits.calls_max));
        let threads = Arc::new(Semaphore::new(limits.threads.max(1)));
        Self { inner: Arc::new(Inner { serving, learner, shape, limits, bounds, calls, threads }) }
    }

    /// Predicts one token: passes only if a caller's prediction would.
    pub(crate) async fn check(self) -> Result<(), String> {
        let shape = &self.inner.shape;
        let stack = if shape.encoder_layers.is_empty() { Stack::Decoder } else { Stack::Encoder };
        if stack == Stack::Decoder && self.inner.serving.now().reads_input() {
            return Ok(()); // There is nothing that this node may be asked for.
        }
        let states = if stack == Stack::Decoder { vec![Bytes::new()] } else { Vec::new() };
        let model = self.inner.serving.now().model_digest();
        let request = PredictionRequest { model, stack, sequences: vec![vec![0]], states };
        self.compute(request, None).await.map(|_| ()).map_err(|fault| fault.to_string())
    }

    /// Refuses what this predictor cannot answer, and more work than a call may ask for.
    fn admit(&self, request: &PredictionRequest) -> Result<(), Fault> {
        let Inner { serving, shape, .. } = &*self.inner;
        self.admit_model(request.model)?;
        if shape.layers(model_stack(request.stack)).is_empty() {
            let message = format!("the model has no MoE layer in its {:?}", request.stack);
            return Err(Fault::new(Reason::InvalidRequest, message));
        }
        if request.stack == Stack::Decoder && serving.now().reads_input() {
            let message = "this node's predictor reads the encoder's output, which calls do not carry: steps of the decoder \
                           are for the coordinator to predict, by a predictor's file of its own";
            return Err(Fault::new(Reason::Unsupported, message));
        }
        self.admit_tokens(request.sequences.iter().map(Vec::len).sum())
    }

    fn admit_model(&self, found: Digest) -> Result<(), Fault> {
        let expected = self.inner.serving.now().model_digest();
        if found == expected {
            return Ok(());
        }
        let message = format!("this node predicts for model {expected}, the call is for {found}");
        Err(Fault::new(Reason::ModelMismatch, message).with("expected", expected).with("found", found))
    }

    fn admit_tokens(&self, tokens: usize) -> Result<(), Fault> {
        let tokens_max = self.inner.limits.call_tokens_max;
        if tokens <= tokens_max {
            return Ok(());
        }
        let message = format!("{tokens} tokens in one call, at most {tokens_max} are taken");
        Err(Fault::new(Reason::InvalidRequest, message).with("call_tokens_max", tokens_max))
    }

    /// A permit for one more call.
    fn admit_call(&self) -> Result<SemaphorePermit<'_>, Fault> {
        let calls_max = self.inner.limits.calls_max;
        let full =
            |_| Fault::new(Reason::QueueFull, format!("{calls_max} calls are waiting")).with("calls_max", calls_max);
        self.inner.calls.try_acquire().map_err(full)
    }

    /// Predicts on a thread of its own, when one is free.
    async fn compute(&self, request: PredictionRequest, trace: Option<TraceContext>) -> Result<Prediction, Fault> {
        let shutting_down = |_| Fault::new(Reason::ShuttingDown, "this node is shutting down");
        let thread = self.inner.threads.clone().acquire_owned().await.map_err(shutting_down)?;
        let inner = self.inner.clone();
        let computed = task::spawn_blocking(move || {
            // The permit is held to the end of the work even when the caller has gone, since the thread is busy that
            // long.
            let _thread = thread;
            let tokens: usize = request.sequences.iter().map(Vec::len).sum();
            let start = Instant::now();
            let _span = trace.map(|trace| Span::below(trace, "compute").with("sida.tokens", tokens as i64));
            let prediction = predict(&*inner.serving.now(), &request);
            histogram!(names::PREDICT_DURATION_SECONDS).record(start.elapsed());
            counter!(names::PREDICT_TOKENS_TOTAL).increment(tokens as u64);
            prediction
        });
        match computed.await {
            Ok(prediction) => prediction,
            Err(error) => {
                tracing::error!(%error, "the predictor panicked");
                Err(Fault::new(Reason::Internal, "the predictor failed"))
            }
        }
    }
}

#[tonic::async_trait]
impl Predictor for PredictorService {
    async fn predict(&self, request: Request<v1::PredictRequest>) -> Result<Response<v1::PredictResponse>, Status> {
        let _call = self.admit_call()?;
        let trace = trace::context_of(&request);
        let malformed = |error| Fault::from_error(Reason::MalformedMessage, &error);
        let request = request.into_inner().check(&self.inner.bounds).map_err(malformed)?;
        self.admit(&request)?;
        let prediction = self.compute(request, trace).await?;
        Ok(Response::new(v1::PredictResponse::new(&prediction.tables, prediction.states)))
    }

    async fn describe(
        &self,
        _: Request<v1::DescribePredictorRequest>,
    ) -> Result<Response<v1::DescribePredictorResponse>, Status> {
        let predictor = self.inner.serving.now();
        Ok(Response::new(v1::DescribePredictorResponse {
            model_digest: predictor.model_digest().0.to_vec().into(),
            predictor_digest: predictor.digest().0.to_vec().into(),
            net: predictor.net().to_owned(),
            learns: self.inner.learner.is_some(),
        }))
    }

    async fn learn(&self, request: Request<v1::LearnRequest>) -> Result<Response<v1::LearnResponse>, Status> {
        let Some(learner) = &self.inner.learner else {
            return Err(Fault::new(Reason::Unsupported, "this node does not learn").into());
        };
        let _call = self.admit_call()?;
        let stack = self.inner.shape.prompt_stack();
        let layers = self.inner.shape.layers(stack).len();
        let malformed = |error| Fault::from_error(Reason::MalformedMessage, &error);
        let labels = request.into_inner().check(&self.inner.bounds, layers).map_err(malformed)?;
        self.admit_model(labels.model)?;
        if model_stack(labels.stack) != stack {
            let message =
                format!("only what routers of the {stack:?} chose is learnt, which reads this model's prompts");
            return Err(Fault::new(Reason::Unsupported, message).into());
        }
        self.admit_tokens(labels.sequences.iter().map(|labels| labels.tokens().len()).sum())?;
        learner.take(labels.sequences);
        Ok(Response::new(v1::LearnResponse {}))
    }
}

/// The tables of a checked request, and the states after it.
fn predict(predictor: &dyn HashPredictor, request: &PredictionRequest) -> Result<Prediction, Fault> {
    let tokens: Vec<&[u32]> = request.sequences.iter().map(Vec::as_slice).collect();
    match request.stack {
        Stack::Encoder => {
            let tables = predictor.encode(&tokens).map_err(fault)?;
            Ok(Prediction { tables, states: Vec::new() })
        }
        Stack::Decoder => {
            let states = request.states.iter().map(|state| PredictorState::from_bytes(state));
            let mut states: Vec<PredictorState> = states.collect::<Result<_, _>>().map_err(fault)?;
            let mut advanced: Vec<&mut PredictorState> = states.iter_mut().collect();
            let tables = predictor.decode(&mut advanced, &tokens).map_err(fault)?;
            Ok(Prediction { tables, states: states.iter().map(|state| state.to_bytes().into()).collect() })
        }
    }
}

/// What the caller did wrong is told to the caller; what is wrong with us is also logged.
fn fault(error: PredictorError) -> Fault {
    match error {
        PredictorError::Token { .. } | PredictorError::States { .. } | PredictorError::State { .. } => {
            Fault::from_error(Reason::MalformedMessage, &error)
        }
        error => {
            tracing::error!(%error, "the predictor failed");
            Fault::from_error(Reason::Internal, &error)
        }
    }
}

fn model_stack(stack: Stack) -> sida_model::Stack {
    match stack {
        Stack::Encoder => sida_model::Stack::Encoder,
        Stack::Decoder => sida_model::Stack::Decoder,
    }
}
