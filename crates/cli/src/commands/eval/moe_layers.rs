//! The MoE layers of a model by stack, and what their experts take: the frame of the tables by layer.

use serde::Serialize;
use sida_model::{ModelConfig, Stack};
use sida_routing::LayerId;

/// Layers whose figures are told together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) name: GroupName,
    /// Numbers of MoE layers.
    pub(crate) layers: std::ops::Range<usize>,
}

/// What layers are grouped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum GroupName {
    Encoder,
    Decoder,
    /// Those of the encoder and of the decoder.
    All,
}

impl GroupName {
    /// As a person reads it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Encoder => "encoder",
            Self::Decoder => "decoder",
            Self::All => "all",
        }
    }
}

/// The MoE layers of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MoeLayers {
    /// The block of each, within its stack.
    pub(crate) blocks: Vec<usize>,
    /// Those of the encoder come first.
    pub(crate) encoder: usize,
    pub(crate) num_experts: usize,
    /// Bytes of one expert, as stored.
    pub(crate) expert_bytes: u64,
}

impl MoeLayers {
    /// Those of a model whose experts take so many bytes each.
    pub(crate) fn of(config: &ModelConfig, expert_bytes: u64) -> Self {
        let layers = 0..config.moe_layer_count() as u16;
        Self {
            blocks: layers.map(|layer| config.moe_block(LayerId(layer)).1).collect(),
            encoder: config.moe_layers(Stack::Encoder).len(),
            num_experts: config.num_experts,
            expert_bytes,
        }
    }

    /// Each stack that has any, and both together where both have.
    pub(crate) fn groups(&self) -> Vec<Group> {
        let all = self.blocks.len();
        let stacks =
            [(GroupName::Encoder, 0..self.encoder), (GroupName::Decoder, self.encoder..all), (GroupName::All, 0..all)];
        let is_told = |(name, layers): &(GroupName, std::ops::Range<usize>)| {
            !layers.is_empty() && (*name != GroupName::All || (1..all).contains(&self.encoder))
        };
        stacks.into_iter().filter(is_told).map(|(name, layers)| Group { name, layers }).collect()
    }

    /// The stack of a layer.
    pub(crate) fn stack(&self, layer: usize) -> GroupName {
        if layer < self.encoder { GroupName::Encoder } else { GroupName::Decoder }
    }

    /// Bytes of all experts of some layers.
    pub(crate) fn bytes(&self, layers: &std::ops::Range<usize>) -> u64 {
        (layers.len() * self.num_experts) as u64 * self.expert_bytes
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Four experts of ten bytes in each of so many layers.
    pub(crate) fn layers(encoder: usize, decoder: usize) -> MoeLayers {
        let blocks = (0..encoder).chain(0..decoder).map(|layer| 2 * layer + 1).collect();
        MoeLayers { blocks, encoder, num_experts: 4, expert_bytes: 10 }
    }

    #[test]
    fn stacks_that_have_layers_are_told() {
        // Would break: the memory of an encoder is held against experts that it never uses, or a table has rows of nothing.
        let told = |encoder, decoder| {
            let groups = layers(encoder, decoder).groups();
            groups.into_iter().map(|group| (group.name, group.layers)).collect::<Vec<_>>()
        };
        let both = [(GroupName::Encoder, 0..2), (GroupName::Decoder, 2..5), (GroupName::All, 0..5)];
        assert_eq!(told(2, 3), both);
        assert_eq!(told(0, 3), [(GroupName::Decoder, 0..3)]);
        assert_eq!(told(2, 0), [(GroupName::Encoder, 0..2)]);
        assert_eq!(layers(2, 3).bytes(&(2..5)), 120);
        assert_eq!([1, 2].map(|layer| layers(2, 3).stack(layer)), [GroupName::Encoder, GroupName::Decoder]);
    }
}
