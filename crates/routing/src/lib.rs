//! The decisions of SiDA, and nothing else: which rows go to which expert, which experts stay resident,
//! who holds what, who joins the batch. Everything here is a pure function or a plain state machine.
//!
//! Invariant: no clock, no network, no threads, no files, no tensor library. What is decided comes from
//! here; what is done comes from the nodes.
//!
//! In reading order: [`ids`], [`hash_table`], [`forecast`], [`plan`], [`permitted`], [`routes`], [`recorded_routes`], [`grouping`],
//! [`placement`], [`membership`], [`failover`], [`dispatch`], [`residency`], [`residency_replay`], [`admission`], [`fairness`],
//! [`client_limits`], [`gathering`], [`prediction`], [`prefill`], [`prefix_cache`], [`micro_batches`], [`labels`], [`learning`].

pub mod admission;
pub mod client_limits;
pub mod dispatch;
pub mod failover;
pub mod fairness;
pub mod forecast;
pub mod gathering;
pub mod grouping;
pub mod hash_table;
pub mod ids;
pub mod labels;
pub mod learning;
pub mod membership;
pub mod micro_batches;
pub mod pace;
pub mod permitted;
pub mod placement;
pub mod plan;
pub mod prediction;
pub mod prefill;
pub mod prefix_cache;
pub mod recorded_routes;
pub mod residency;
pub mod residency_replay;
pub mod routes;

pub use forecast::LayerForecast;
pub use grouping::{Group, Grouping, PlacedGroup};
pub use hash_table::{HashTable, HashTableError};
pub use ids::{Digest, ExpertId, ExpertKey, LayerId, NodeId};
pub use labels::{Labels, LabelsError, LabelsExtent};
pub use permitted::Permitted;
pub use placement::{Candidate, Demand, Extent, Placement, PlacementError, Policy};
pub use plan::{Plan, PlanId, PlanScope};
pub use recorded_routes::{RecordedRoutes, TokenRoutes};
pub use routes::Routes;
