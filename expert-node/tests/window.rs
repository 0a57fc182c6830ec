//! Lanes whose rows stay in memory that coordinator and node share. The memory here is this process's; a GPU's is held
//! against it by `tests/gpu/serve.py`.

mod support;

use std::sync::{Arc, Mutex};

use sida_cluster::{Cluster, experts::ExpertCall};
use sida_expert_node::{Engine, ExpertNodeConfig, MODEL_DIGEST_METADATA, source::ExpertSource};
use sida_model::{
    DeviceError, ExpertDevice, ExpertScratch, ExpertShape, ExpertWindow, ModelError, Precision, SlotRows, SlotRun,
    Urgency, WindowHandle,
};
use sida_proto::{
    v1::{self, LaneRequest, LaneResponse, experts_client::ExpertsClient, lane_request, lane_response},
    wire,
};
use sida_routing::{Digest, ExpertId, ExpertKey, Group, LayerId, PlacedGroup};
use support::{D_MODEL, EXPERTS, LAYERS, MadeUp};
use tokio::{
    net::TcpListener,
    sync::mpsc::{UnboundedSender, unbounded_channel},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Streaming};

const PLACES: usize = 40;
const MACHINE: &str = "this one";

/// Slots, and the only coordinator's rows.
struct SharedMemory {
    source: Arc<MadeUp>,
    slots: Mutex<Vec<Option<ExpertKey>>>,
    /// (places, d_model)
    x: Vec<f32>,
    results: Mutex<Vec<f32>>,
}

impl SharedMemory {
    fn forward(&self, slot: usize, x: &[f32], out: &mut [f32]) {
        let key = self.slots.lock().unwrap()[slot].expect("a slot is computed with that holds no expert");
        self.shape().forward(&self.source.weights(key), x, out, &mut ExpertScratch::default());
    }
}

impl ExpertDevice for SharedMemory {
    fn shape(&self) -> &ExpertShape {
        self.source.shape()
    }

    fn begin_load(&self, key: ExpertKey, slot: usize, _: Urgency) -> Result<(), ModelError> {
        self.slots.lock().unwrap()[slot] = Some(key);
        Ok(())
    }

    fn finish_load(&self, _: usize) -> Result<(), ModelError> {
        Ok(())
    }

    fn compute(&self, _: LayerId, groups: &mut [SlotRows<'_>]) -> Result<(), ModelError> {
        groups.iter_mut().for_each(|SlotRows { slot, x, out }| self.forward(*slot, x, out));
        Ok(())
    }

    fn open_window(self: Arc<Self>, rows: &WindowHandle) -> Result<Arc<dyn ExpertWindow>, ModelError> {
        if rows.machine != MACHINE {
            return Err(DeviceError::Refused("it is of another machine".to_owned()).into());
        }
        let results = WindowHandle { memory: [2; 64], precision: Precision::F32, ..rows.clone() };
        Ok(Arc::new(Window { results, of: self }))
    }
}

struct Window {
    results: WindowHandle,
    of: Arc<SharedMemory>,
}

impl ExpertWindow for Window {
    fn rows(&self) -> usize {
        self.results.rows
    }

    fn results(&self) -> &WindowHandle {
        &self.results
    }

    fn compute(&self, _: LayerId, runs: &[SlotRun]) -> Result<(), ModelError> {
        let mut results = self.of.results.lock().unwrap();
        for &SlotRun { slot, first, rows } in runs {
            let values = first * D_MODEL..(first + rows) * D_MODEL;
            self.of.forward(slot, &self.of.x[values.clone()], &mut results[values]);
        }
        Ok(())
    }
}

struct Lane {
    memory: Arc<SharedMemory>,
    requests: UnboundedSender<LaneRequest>,
    answers: Streaming<LaneResponse>,
    shutdown: CancellationToken,
}

impl Lane {
    /// To a node with `slots` slots.
    async fn open(slots: usize) -> Self {
        let source = MadeUp::new();
        let x = (0..PLACES * D_MODEL).map(|i| (i % 37) as f32 / 7.0 - 2.0).collect();
        let results = Mutex::new(vec![f32::NAN; PLACES * D_MODEL]);
        let memory =
            Arc::new(SharedMemory { source: source.clone(), slots: Mutex::new(vec![None; slots]), x, results });
        let mut config = ExpertNodeConfig::new("e0".into(), "made-up".into());
        config.expert_memory = sida_expert_node::ExpertMemory::Bytes((slots * source.shape().bytes()) as u64);
        let (device, shape) = (memory.clone(), *source.shape());
        let engine =
            Arc::new(Engine::on_device(&config, source, shape.bytes(), shape.bytes(), |_| Ok(device)).unwrap());
        let cluster = Cluster::fixed(Vec::new(), LAYERS, EXPERTS, 1).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shutdown = CancellationToken::new();
        let serving = shutdown.clone();
        tokio::spawn(async move { sida_expert_node::serve(engine, &config, listener, cluster, serving).await });
        let channel = sida_rpc::connect(&address, &Default::default()).await.unwrap();
        let (requests, outgoing) = unbounded_channel();
        let mut request = Request::new(UnboundedReceiverStream::new(outgoing));
        request.metadata_mut().insert(MODEL_DIGEST_METADATA, Digest([7; 32]).to_string().parse().unwrap());
        let answers = ExpertsClient::new(channel).lane(request).await.unwrap().into_inner();
        Self { memory, requests, answers, shutdown }
    }

    async fn offer(&mut self, machine: &str) -> v1::Window {
        let window =
            wire::Window { machine: machine.into(), handle: [1; 64], rows: PLACES, dtype: v1::DType::DtypeF32 };
        self.send(lane_request::Kind::Window((&window).into()));
        match self.next().await {
            lane_response::Kind::Window(window) => window,
            other => panic!("{other:?}"),
        }
    }

    async fn call(&mut self, groups: &[PlacedGroup]) -> Result<(), String> {
        self.send(lane_request::Kind::Activations(v1::Activations::in_window(5, LayerId(1), groups)));
        let lane_response::Kind::Results(results) = self.next().await else { panic!("no results") };
        match results.check(0, D_MODEL).unwrap() {
            wire::Answer::Done { .. } => Ok(()),
            wire::Answer::Failed(error) => Err(error.message),
        }
    }

    fn send(&self, kind: lane_request::Kind) {
        self.requests.send(LaneRequest { kind: Some(kind) }).unwrap();
    }

    async fn next(&mut self) -> lane_response::Kind {
        loop {
            match self.answers.message().await.unwrap().expect("the lane is open").kind.unwrap() {
                lane_response::Kind::Alive(_) => {}
                kind => return kind,
            }
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn placed(expert: u16, first: u32, rows: u32) -> PlacedGroup {
    PlacedGroup { expert: ExpertId(expert), first, rows }
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_left_at_their_places() {
    // Broken: a coordinator would read another row's result, or one that was not computed yet. Two slots for six experts:
    // they are computed one after another.
    for slots in [2, 12] {
        let mut lane = Lane::open(slots).await;
        assert_eq!(lane.offer(MACHINE).await.check(PLACES).unwrap().unwrap().handle, [2; 64]);
        let groups =
            [placed(0, 30, 4), placed(3, 1, 2), placed(4, 9, 1), placed(7, 20, 5), placed(8, 3, 2), placed(9, 39, 1)];
        lane.call(&groups).await.unwrap();
        let results = lane.memory.results.lock().unwrap().clone();
        let mut untouched = [true; PLACES];
        for &PlacedGroup { expert, first, rows } in &groups {
            let values = first as usize * D_MODEL..(first + rows) as usize * D_MODEL;
            let groups = [Group { expert, rows }];
            let call = ExpertCall { layer: LayerId(1), groups: &groups, activations: &lane.memory.x[values.clone()] };
            assert_eq!(results[values], lane.memory.source.expected(call), "{expert}, {slots} slots");
            untouched[first as usize..(first + rows) as usize].fill(false);
        }
        for (place, _) in untouched.iter().enumerate().filter(|(_, untouched)| **untouched) {
            assert!(results[place * D_MODEL..][..D_MODEL].iter().all(|value| value.is_nan()), "place {place}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_in_the_window_is_refused() {
    // Broken: a call would read or write memory beyond the window, or a lane without one would be believed to have it.
    let mut lane = Lane::open(4).await;
    let error = lane.call(&[placed(0, 0, 1)]).await.unwrap_err();
    assert!(error.contains("the lane has none"), "{error}");
    assert_eq!(lane.offer("another").await.check(PLACES), Ok(Err("it is of another machine".to_owned())));
    lane.call(&[placed(0, 0, 1)]).await.unwrap_err();
    assert!(lane.offer(MACHINE).await.check(PLACES).unwrap().is_ok());
    assert_eq!(lane.offer(MACHINE).await.check(PLACES), Ok(Err("the lane has a window".to_owned())));
    let error = lane.call(&[placed(0, 38, 3)]).await.unwrap_err();
    assert_eq!(error, "malformed call: expert 0's rows end at place 41 of a window of 40");
    let error = lane.call(&[placed(0, u32::MAX, 1)]).await.unwrap_err();
    assert!(error.contains("end at place 4294967296"), "{error}");
    lane.call(&[placed(0, 37, 3)]).await.unwrap();
}
