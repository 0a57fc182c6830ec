//! The configuration of an expert-node: set by the command line, by the embedded cluster and by tests.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::Deserialize;
use sida_model::{DeviceName, Precision};
use sida_routing::NodeId;
use sida_rpc::ServerConfig;
use thiserror::Error;

/// Everything an expert-node needs to know at its start.
#[derive(Clone, Debug)]
pub struct ExpertNodeConfig {
    /// The node's name in the cluster.
    pub node: NodeId,
    /// The model's directory.
    pub model_dir: PathBuf,
    /// How much memory experts may take, of the device.
    pub expert_memory: ExpertMemory,
    /// What computes.
    pub device: DeviceName,
    /// What a GPU computes in; `None`: as the experts are stored.
    pub precision: Option<Precision>,
    /// Page-locked memory in which experts that were read from disk wait for a GPU.
    pub host_memory: ExpertMemory,
    /// Whether experts in bf16 lie packed on a GPU that does not hold all of them, if they can be.
    pub packs: bool,
    /// How many threads of the process's pool a call may compute on. At least 1.
    pub threads: usize,
    /// Bounds on what others can ask of it.
    pub limits: ExpertNodeLimits,
    /// The network side: drain, TLS, how often health proves by an expert call that the node works.
    pub server: ServerConfig,
}

/// Bounds on what others can ask of an expert-node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertNodeLimits {
    /// Plans queued; beyond it the oldest is dropped.
    pub plans_max: usize,
    /// Rows of one call.
    pub call_rows_max: usize,
    /// Bytes of activations that one lane may have in flight. A lane that sends more is not read until some
    /// are answered, so its sender is slowed and nobody else.
    pub lane_bytes_max: usize,
    /// Calls that one lane may have in flight. A lane that sends more is not read until some are answered.
    pub lane_calls_max: usize,
    /// Calls that all lanes together may have in flight. While there are so many, no lane's next call is taken.
    pub calls_max: usize,
}

impl Default for ExpertNodeLimits {
    fn default() -> Self {
        Self { plans_max: 64, call_rows_max: 16_384, lane_bytes_max: 64 << 20, lane_calls_max: 256, calls_max: 1024 }
    }
}

impl ExpertNodeConfig {
    /// A node of this name with the default limits: all experts in memory, as many threads as the machine has.
    pub fn new(node: NodeId, model_dir: PathBuf) -> Self {
        Self {
            node,
            model_dir,
            expert_memory: ExpertMemory::Share(1.0),
            device: DeviceName::Cpu,
            precision: None,
            host_memory: ExpertMemory::Share(1.0),
            packs: true,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            limits: ExpertNodeLimits::default(),
            server: ServerConfig::default(),
        }
    }
}

/// How much memory the experts of a node may take: `2GiB`, `300MB`, `65536`, or `25%` of all the model's experts. Units are
/// read in any case.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub enum ExpertMemory {
    /// So many bytes.
    Bytes(u64),
    /// A share of the bytes of all experts of the model. Above 0, at most 1.
    Share(f64),
}

/// Not an amount of expert memory.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{found:?} is not an amount of memory, expected such as 2GiB, 300MB, 65536 or 25%, at most 100%")]
pub struct ExpertMemoryError {
    /// The text that was given.
    pub found: String,
}

/// Suffix in lower case and bytes, longest suffixes first: `KiB` and its like count by 1024, `KB` and its like by 1000.
const UNITS: [(&str, f64); 10] = [
    ("kib", 1024.0),
    ("mib", 1048576.0),
    ("gib", 1073741824.0),
    ("tib", 1099511627776.0),
    ("kb", 1e3),
    ("mb", 1e6),
    ("gb", 1e9),
    ("tb", 1e12),
    ("b", 1.0),
    ("", 1.0),
];

impl ExpertMemory {
    /// The budget for a model whose experts take `experts_bytes` together.
    pub fn bytes(self, experts_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Share(share) => (experts_bytes as f64 * share) as u64,
        }
    }
}

impl ExpertMemory {
    /// A node's part of the memory of several; `share` is of the whole.
    pub fn part(self, share: f64) -> Self {
        match self {
            Self::Bytes(bytes) => Self::Bytes((bytes as f64 * share) as u64),
            Self::Share(all) => Self::Share(all * share),
        }
    }
}

impl FromStr for ExpertMemory {
    type Err = ExpertMemoryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || ExpertMemoryError { found: text.to_owned() };
        let positive = |number: &str| {
            let value: f64 = number.trim().parse().map_err(|_| refused())?;
            if value.is_finite() && value > 0.0 { Ok(value) } else { Err(refused()) }
        };
        let trimmed = text.trim().to_ascii_lowercase();
        if let Some(percent) = trimmed.strip_suffix('%') {
            let share = positive(percent)? / 100.0;
            return if share <= 1.0 { Ok(Self::Share(share)) } else { Err(refused()) };
        }
        let (number, unit) = UNITS
            .iter()
            .find_map(|(suffix, bytes)| Some((trimmed.strip_suffix(suffix)?, bytes)))
            .expect("the empty suffix fits everything");
        let bytes = positive(number)? * unit;
        if (1.0..2f64.powi(63)).contains(&bytes) { Ok(Self::Bytes(bytes as u64)) } else { Err(refused()) }
    }
}

impl TryFrom<String> for ExpertMemory {
    type Error = ExpertMemoryError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl fmt::Display for ExpertMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{bytes}B"),
            // All of it: processes of their own are given a third so.
            Self::Share(share) => write!(f, "{}%", share * 100.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_written() {
        // Broken: a node takes a thousand times the memory it was given, or a thousandth.
        let bytes = |text: &str| text.parse::<ExpertMemory>();
        assert_eq!(bytes("2GiB"), Ok(ExpertMemory::Bytes(2 << 30)));
        assert_eq!(bytes("1.5 MiB"), Ok(ExpertMemory::Bytes(3 << 19)));
        assert_eq!(bytes("300MB"), Ok(ExpertMemory::Bytes(300_000_000)));
        assert_eq!(
            [bytes("1gb"), bytes("1 gib")],
            [Ok(ExpertMemory::Bytes(1_000_000_000)), Ok(ExpertMemory::Bytes(1 << 30))]
        );
        assert_eq!([bytes("3kB"), bytes("3KIB")], [Ok(ExpertMemory::Bytes(3000)), Ok(ExpertMemory::Bytes(3 << 10))]);
        assert_eq!(bytes("4096"), Ok(ExpertMemory::Bytes(4096)));
        assert_eq!(bytes("4096B"), Ok(ExpertMemory::Bytes(4096)));
        assert_eq!(bytes("25%"), Ok(ExpertMemory::Share(0.25)));
        assert_eq!(bytes("100 %"), Ok(ExpertMemory::Share(1.0)));
        for wrong in ["", "%", "0", "0%", "-1GiB", "101%", "nan", "inf", "1e300GiB", "2 gb ib", "2gibb", "GiB", "0.1B"]
        {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_amount_is_shown_as_it_can_be_read() {
        // Broken: a budget printed by one command is refused, or another, when given to the next.
        for memory in [ExpertMemory::Bytes(65536), ExpertMemory::Share(0.25)] {
            assert_eq!(memory.to_string().parse(), Ok(memory));
        }
    }

    #[test]
    fn a_share_is_of_all_experts() {
        // Broken: "25%" gives another budget than a quarter of the experts.
        assert_eq!(ExpertMemory::Share(0.25).bytes(384 * 65536), 96 * 65536);
        assert_eq!(ExpertMemory::Bytes(7).bytes(1000), 7);
    }
}
