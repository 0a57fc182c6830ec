//! What leaves on a lane: answers in the order in which they are found, and signs of life while there are none.
//!
//! A sign of life is made when the connection asks for the next message, never queued: a reader that takes
//! nothing makes nothing grow.

use std::{sync::Arc, time::Duration};

use sida_proto::v1::{self, LaneResponse, lane_response::Kind};
use tokio::sync::{OwnedSemaphorePermit, mpsc::UnboundedReceiver, watch};
use tonic::Status;

/// How long a lane with calls under way says nothing at most. Coordinators give a node up after at least four
/// times as long.
const HEARTBEAT: Duration = Duration::from_millis(25);

/// An answer, with the permits that its call takes of the limits of its lane and its node.
pub(crate) struct Answer {
    response: Result<LaneResponse, Status>,
    _permits: Option<Permits>,
}

/// The permits of a call in flight.
pub(crate) struct Permits {
    /// One of the lane's calls, its bytes, one of the node's calls.
    _held: [OwnedSemaphorePermit; 3],
    _in_flight: CallInFlight,
}

/// Counts a call from when it is read until it is answered.
pub(crate) struct CallInFlight(Arc<watch::Sender<usize>>);

/// The sending side of a lane.
pub(crate) struct Responses {
    answers: UnboundedReceiver<Answer>,
    in_flight: watch::Receiver<usize>,
}

impl Answer {
    /// The answer to a call that held `permits`.
    pub(crate) fn of(results: v1::Results, permits: Permits) -> Self {
        Self { response: Ok(LaneResponse { kind: Some(Kind::Results(results)) }), _permits: Some(permits) }
    }

    /// The answer to the offer of a window.
    pub(crate) fn window(window: v1::Window) -> Self {
        Self { response: Ok(LaneResponse { kind: Some(Kind::Window(window)) }), _permits: None }
    }

    /// The end of the lane.
    pub(crate) fn end(status: Status) -> Self {
        Self { response: Err(status), _permits: None }
    }
}

impl Permits {
    pub(crate) fn new(held: [OwnedSemaphorePermit; 3], in_flight: CallInFlight) -> Self {
        Self { _held: held, _in_flight: in_flight }
    }
}

impl CallInFlight {
    /// Counts one more call.
    pub(crate) fn begin(count: &Arc<watch::Sender<usize>>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for CallInFlight {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Responses {
    pub(crate) fn new(answers: UnboundedReceiver<Answer>, in_flight: watch::Receiver<usize>) -> Self {
        Self { answers, in_flight }
    }

    /// The next message. `None` once nobody can send one.
    pub(crate) async fn next(mut self) -> Option<(Result<LaneResponse, Status>, Self)> {
        let Self { answers, in_flight } = &mut self;
        let response = tokio::select! {
            biased;
            answer = answers.recv() => answer?.response,
            () = quiet(in_flight) => Ok(LaneResponse { kind: Some(Kind::Alive(v1::Alive {})) }),
        };
        Some((response, self))
    }
}

/// Ends when nothing was sent for a while although calls are under way.
async fn quiet(in_flight: &mut watch::Receiver<usize>) {
    loop {
        if in_flight.wait_for(|count| *count > 0).await.is_err() {
            // The lane has ended; the channel of answers says so.
            return std::future::pending().await;
        }
        tokio::time::sleep(HEARTBEAT).await;
        if *in_flight.borrow() > 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        sync::mpsc::unbounded_channel,
        time::{Instant, timeout},
    };

    use super::*;

    #[tokio::test]
    async fn signs_of_life_while_calls_are_under_way_only() {
        // Broken: a busy node is taken for a hung one, or idle lanes keep both sides awake.
        let (answers, outgoing) = unbounded_channel::<Answer>();
        let (count, watched) = watch::channel(0);
        let count = Arc::new(count);
        let responses = Responses::new(outgoing, watched);
        let idle = timeout(HEARTBEAT * 4, responses.next()).await;
        assert!(idle.is_err(), "an idle lane spoke");

        let (answers_again, outgoing) = unbounded_channel::<Answer>();
        let mut responses = Responses::new(outgoing, count.subscribe());
        let call = CallInFlight::begin(&count);
        let start = Instant::now();
        for _ in 0..3 {
            let (response, rest) = timeout(Duration::from_secs(5), responses.next()).await.unwrap().unwrap();
            assert!(matches!(response.unwrap().kind, Some(Kind::Alive(_))));
            responses = rest;
        }
        assert!(start.elapsed() >= HEARTBEAT * 3);
        drop(call);
        drop((answers, answers_again));
        assert!(timeout(Duration::from_secs(5), responses.next()).await.unwrap().is_none());
    }
}
