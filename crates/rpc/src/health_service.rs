//! `grpc.health.v1.Health` as a node answers it. The library's service, but for the watch of a service that the node
//! does not have: the protocol wants SERVICE_UNKNOWN as its first message and a stream that stays, and the library ends
//! it with NOT_FOUND. Put in place by [`crate::server`].

use futures::{StreamExt, stream, stream::BoxStream};
use tonic::{Code, Request, Response, Status};
use tonic_health::{
    pb::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_server::Health},
    server::HealthService,
};

/// Answers for a node.
pub(crate) struct NodeHealth {
    /// Knows every service that the node will ever have: they are registered before it listens.
    pub(crate) known: HealthService,
}

#[tonic::async_trait]
impl Health for NodeHealth {
    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        self.known.check(request).await
    }

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        match self.known.watch(request).await {
            Ok(watched) => Ok(watched.map(StreamExt::boxed)),
            Err(status) if status.code() == Code::NotFound => {
                let unknown = HealthCheckResponse { status: ServingStatus::ServiceUnknown as i32 };
                Ok(Response::new(stream::iter([Ok(unknown)]).chain(stream::pending()).boxed()))
            }
            Err(status) => Err(status),
        }
    }
}
