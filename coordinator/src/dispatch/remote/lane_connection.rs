//! Keeps a lane connected: a task connects, opens the stream, hands every answer to the lane, and begins again after a
//! pause when the connection is lost.
//!
//! A node that is hung or cut off may keep a connection open for ever, or let one be opened and say nothing on it:
//! so connecting and opening have limits, idle connections are pinged, and one that stays silent is given up.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use sida_model::{Precision, ResultsWindow, RowsWindow, WindowHandle};
use sida_proto::{
    v1::{self, LaneRequest, experts_client::ExpertsClient, lane_request, lane_response::Kind},
    wire,
};
use sida_routing::{Digest, failover::lane_health::SUSPECT_LIMIT};
use sida_rpc::{ClientConfig, MESSAGE_BYTES_MAX};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, metadata::MetadataValue};

use crate::dispatch::remote::lane::Lane;

/// Pauses between attempts to connect double from the first to the last of these.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// How long connecting may take, and the node's consent to the lane after it.
const OPEN_LIMIT: Duration = Duration::from_secs(1);
/// How often a connection on which nothing comes is pinged, and how long the answer may take.
const PING_PERIOD: Duration = Duration::from_secs(1);
/// How many reasons the log has why a node is not reached: each once, until it is.
const TOLD_MAX: usize = 8;
/// How often a connection is checked for silence.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// The metadata that names the model a lane is for.
const MODEL_DIGEST: &str = "sida-model-digest";
/// And which experts of it.
const EXPERTS_DIGEST: &str = "sida-experts-digest";

/// How lanes connect.
#[derive(Debug)]
pub(crate) struct Connector {
    /// Timeouts, windows, TLS.
    client: ClientConfig,
    /// The model that the node must hold, and its experts; it refuses a lane for others.
    model: Digest,
    experts: Digest,
    /// Where the coordinator's rows are, if nodes of this machine may read them there.
    rows: Option<RowsWindow>,
}

impl Connector {
    /// Lanes of nodes with `experts` of `model`. They connect as `client` says, but find out sooner that a node is gone.
    pub(crate) fn new(client: &ClientConfig, model: Digest, experts: Digest, rows: Option<RowsWindow>) -> Self {
        let client = ClientConfig {
            connect_timeout: client.connect_timeout.min(OPEN_LIMIT),
            keepalive_interval: client.keepalive_interval.min(PING_PERIOD),
            keepalive_timeout: client.keepalive_timeout.min(PING_PERIOD),
            ..client.clone()
        };
        Self { client, model, experts, rows }
    }
}

/// Keeps `lane` connected until it is dropped or `shutdown`.
pub(crate) async fn keep(lane: Weak<Lane>, connector: Arc<Connector>, shutdown: CancellationToken) {
    let (mut pause, mut told, mut was_away) = (PAUSE_MIN, Vec::new(), false);
    loop {
        let connected = shutdown.run_until_cancelled(connect_and_serve(&lane, &connector, was_away)).await;
        let (Some(Connected { lasted, reason }), Some(lane)) = (connected, lane.upgrade()) else { return };
        lane.disconnected(&reason);
        was_away = true;
        let (node, address) = (lane.node(), lane.address());
        if lasted {
            tracing::warn!(%node, reason, "lost the lane to an expert-node");
            pause = PAUSE_MIN;
            told.clear();
        } else if !told.contains(&reason) && told.len() < TOLD_MAX {
            tracing::warn!(%node, address, reason, "an expert-node cannot be reached, and is tried again until it can");
            told.push(reason);
        }
        // `lane` must be dropped here: the task must not keep alive what its callers have dropped.
        let paused = async {
            let back = lane.may_be_back();
            tokio::time::timeout(pause, back).await.is_err()
        };
        let Some(waited) = shutdown.run_until_cancelled(paused).await else { return };
        pause = if waited { (pause * 2).min(PAUSE_MAX) } else { PAUSE_MIN };
    }
}

/// How a connection ended.
struct Connected {
    /// Whether the connection ever stood.
    lasted: bool,
    reason: String,
}

async fn connect_and_serve(lane: &Weak<Lane>, connector: &Connector, was_away: bool) -> Connected {
    let mut lasted = false;
    let reason = match serve(lane, connector, was_away, &mut lasted).await {
        Ok(()) => "the node closed the lane".to_owned(),
        Err(reason) => reason,
    };
    Connected { lasted, reason }
}

async fn serve(lane: &Weak<Lane>, connector: &Connector, was_away: bool, lasted: &mut bool) -> Result<(), String> {
    let Some(address) = lane.upgrade().map(|lane| lane.address().to_owned()) else { return Ok(()) };
    let channel = sida_rpc::connect(&address, &connector.client).await.map_err(|error| error.to_string())?;
    let mut client = ExpertsClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (outgoing, requests) = mpsc::unbounded_channel::<LaneRequest>();
    let mut request = Request::new(UnboundedReceiverStream::new(requests));
    for (name, digest) in [(MODEL_DIGEST, connector.model), (EXPERTS_DIGEST, connector.experts)] {
        let digest = MetadataValue::try_from(digest.to_string()).expect("hexadecimal digits are metadata");
        request.metadata_mut().insert(name, digest);
    }
    let opened = tokio::time::timeout(OPEN_LIMIT, client.lane(request)).await;
    let opened = opened.map_err(|_| format!("no consent to a lane within {OPEN_LIMIT:?}"))?;
    let mut responses = opened.map_err(refused)?.into_inner();
    if let Some(rows) = &connector.rows {
        // An error says that the connection is lost already, which is seen below.
        let _ = outgoing.send(LaneRequest { kind: Some(lane_request::Kind::Window(offer(rows.handle()))) });
    }
    match lane.upgrade() {
        Some(lane) => {
            lane.connected(outgoing);
            if was_away {
                tracing::info!(node = %lane.node(), "an expert-node is reached again");
            }
        }
        None => return Ok(()),
    }
    *lasted = true;
    loop {
        let response = tokio::time::timeout(LOOK_PERIOD, responses.message()).await;
        let Some(lane) = lane.upgrade() else { return Ok(()) };
        match response {
            Ok(response) => match response.map_err(refused)? {
                Some(v1::LaneResponse { kind: Some(Kind::Results(results)) }) => lane.answered(results),
                // A message of a kind that a later version brings is a sign of life, too.
                Some(v1::LaneResponse { kind: Some(Kind::Alive(_)) | None }) => lane.alive(),
                Some(v1::LaneResponse { kind: Some(Kind::Window(window)) }) => {
                    lane.alive();
                    match open_results(connector, window).await {
                        Ok(results) => {
                            tracing::info!(node = %lane.node(), "rows for an expert-node stay on the device");
                            lane.window_opened(results);
                        }
                        // Without a window rows travel, as they do between machines.
                        Err(reason) => tracing::debug!(node = %lane.node(), reason, "no window to an expert-node"),
                    }
                }
                None => return Ok(()),
            },
            Err(_) if lane.is_lost() => {
                return Err(format!("no sign of life for more than {SUSPECT_LIMIT:?}"));
            }
            Err(_) => {}
        }
    }
}

/// Where this coordinator's rows are, as the wire says it.
fn offer(rows: &WindowHandle) -> v1::Window {
    let dtype = match rows.precision {
        Precision::F32 => v1::DType::DtypeF32,
        Precision::Bf16 => v1::DType::DtypeBf16,
    };
    (&wire::Window { machine: rows.machine.clone(), handle: rows.memory, rows: rows.rows, dtype }).into()
}

/// Opens what a node answered an offer with.
async fn open_results(connector: &Connector, window: v1::Window) -> Result<ResultsWindow, String> {
    let rows = connector.rows.clone();
    let open = move || {
        let Some(rows) = rows else { return Err("it was not offered one".to_owned()) };
        let wire::Window { machine, handle, rows: places, dtype: _ } =
            window.check(rows.handle().rows).map_err(|error| error.to_string())??;
        // Results are float32, as on the wire.
        let results = WindowHandle { machine, memory: handle, rows: places, precision: Precision::F32 };
        rows.open_results(&results).map_err(|error| error.to_string())
    };
    // Mapping waits for the driver.
    tokio::task::spawn_blocking(open).await.map_err(|error| error.to_string())?
}

fn refused(status: Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}
