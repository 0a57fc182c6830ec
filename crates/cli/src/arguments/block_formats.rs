//! The flags that say which weights of a checkpoint are written with fewer bits.

use clap::{Args, ValueEnum};
use sida_model::{BlockFormats, StoredDType};

/// Which weights are written in blocks of 32 values that share a scale.
#[derive(Args)]
pub(crate) struct BlockFormatArguments {
    /// Write the matrices of the experts with so many bits, in blocks of 32 values that share a scale
    #[arg(long, value_name = "FORMAT", value_enum)]
    experts: Option<Bits>,
    /// Write the other matrices with so many bits, but for those of routers
    #[arg(long, value_name = "FORMAT", value_enum)]
    dense: Option<Bits>,
}

/// How many bits.
#[derive(Clone, Copy, ValueEnum)]
enum Bits {
    /// 8.5 bits a value: ggml's Q8_0
    Int8,
    /// 4.5 bits a value: ggml's Q4_0
    Int4,
}

impl BlockFormatArguments {
    /// What was asked for.
    pub(crate) fn formats(&self) -> BlockFormats {
        let blocks = |bits| match bits {
            Bits::Int8 => StoredDType::Q8_0,
            Bits::Int4 => StoredDType::Q4_0,
        };
        BlockFormats { experts: self.experts.map(blocks), dense: self.dense.map(blocks) }
    }
}
