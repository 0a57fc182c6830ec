//! What keeps a lane connected: a task that connects, opens the stream, hands every answer to the lane, and
//! begins again after a pause when the connection is lost. Started by [`crate::lane`].

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use sida_proto::v1::{LaneRequest, experts_client::ExpertsClient};
use sida_routing::Digest;
use sida_rpc::{ClientConfig, MESSAGE_BYTES_MAX};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, metadata::MetadataValue};

use crate::lane::Lane;

/// Pauses between attempts to connect double from the first to the last of these.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// The metadata that names the model a lane is for.
const MODEL_DIGEST: &str = "sida-model-digest";

/// How lanes connect.
#[derive(Debug)]
pub(crate) struct Connector {
    /// Timeouts, windows, TLS.
    pub(crate) client: ClientConfig,
    /// The model that the node must hold; it refuses a lane for another.
    pub(crate) model: Digest,
}

/// Keeps `lane` connected until it is dropped or `shutdown`.
pub(crate) async fn keep(lane: Weak<Lane>, connector: Arc<Connector>, shutdown: CancellationToken) {
    let mut pause = PAUSE_MIN;
    loop {
        let connected = shutdown.run_until_cancelled(connect_and_serve(&lane, &connector)).await;
        let (Some(Connected { lasted, reason }), Some(lane)) = (connected, lane.upgrade()) else { return };
        lane.disconnected(&reason);
        if lasted {
            tracing::warn!(node = %lane.node(), reason, "lost the lane to an expert-node");
            pause = PAUSE_MIN;
        } else {
            tracing::debug!(node = %lane.node(), reason, "cannot open a lane to an expert-node");
        }
        drop(lane);
        if shutdown.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return;
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// How a connection ended.
struct Connected {
    /// Whether it ever stood.
    lasted: bool,
    reason: String,
}

async fn connect_and_serve(lane: &Weak<Lane>, connector: &Connector) -> Connected {
    let mut lasted = false;
    let reason = match serve(lane, connector, &mut lasted).await {
        Ok(()) => "the node closed the lane".to_owned(),
        Err(reason) => reason,
    };
    Connected { lasted, reason }
}

async fn serve(lane: &Weak<Lane>, connector: &Connector, lasted: &mut bool) -> Result<(), String> {
    let Some(address) = lane.upgrade().map(|lane| lane.address().to_owned()) else { return Ok(()) };
    let channel = sida_rpc::connect(&address, &connector.client).await.map_err(|error| error.to_string())?;
    let mut client = ExpertsClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let (outgoing, requests) = mpsc::unbounded_channel::<LaneRequest>();
    let mut request = Request::new(UnboundedReceiverStream::new(requests));
    let digest = MetadataValue::try_from(connector.model.to_string()).expect("hexadecimal digits are metadata");
    request.metadata_mut().insert(MODEL_DIGEST, digest);
    let mut responses = client.lane(request).await.map_err(refused)?.into_inner();
    match lane.upgrade() {
        Some(lane) => lane.connected(outgoing),
        None => return Ok(()),
    }
    *lasted = true;
    while let Some(response) = responses.message().await.map_err(refused)? {
        let (Some(lane), Some(results)) = (lane.upgrade(), response.results) else { continue };
        lane.answered(results);
    }
    Ok(())
}

fn refused(status: Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}
