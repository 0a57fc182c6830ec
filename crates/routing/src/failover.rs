//! When a call does not come back: how long silence is borne, who is asked next, how often, and who is left
//! alone for a while. Called by [`dispatch`](crate::dispatch) and by a coordinator's lanes. Time is a [`Duration`] since
//! any fixed origin; nothing here looks at a clock.
//!
//! In reading order: [`CallFailure`], [`silence`], [`breaker`], [`lane_health`], [`choose`](choose()), [`retry_budget`],
//! [`patience`].
//!
//! [`Duration`]: std::time::Duration

pub mod breaker;
mod call_deadline;
mod call_failure;
mod choose;
pub mod lane_health;
pub mod patience;
pub mod retry_budget;
pub mod silence;

pub use breaker::{Breaker, BreakerState};
pub use call_failure::{Blame, CallFailure};
pub use choose::choose;
pub use lane_health::LaneHealth;
pub use patience::Patience;
pub use retry_budget::RetryBudget;
pub use silence::Silence;
