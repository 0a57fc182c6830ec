//! Experts made up for tests: a source whose weights follow from the key, which can be told to fail or to take
//! its time, and the answer that a call must get whatever the node does.

#![allow(dead_code)] // Each test binary uses its part.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use sida_cluster::experts::ExpertCall;
use sida_expert_node::{Engine, ExpertMemory, ExpertNodeConfig, ExpertNodeError, source::ExpertSource};
use sida_model::{ExpertScratch, ExpertShape, ModelError, StoredDType};
use sida_routing::{Digest, ExpertId, ExpertKey, Group, LayerId};

pub(crate) const LAYERS: usize = 3;
pub(crate) const EXPERTS: usize = 12;
pub(crate) const D_MODEL: usize = 16;
pub(crate) const D_FF: usize = 24;

pub(crate) struct MadeUp {
    shape: ExpertShape,
    /// Of the second layer: its experts may be smaller, since they are stored otherwise.
    of_second: ExpertShape,
    pub(crate) failing: Mutex<BTreeSet<ExpertKey>>,
    pub(crate) slow: AtomicBool,
    pub(crate) loads: AtomicU64,
}

impl MadeUp {
    pub(crate) fn new() -> Arc<Self> {
        Self::wide(D_FF)
    }

    pub(crate) fn wide(d_ff: usize) -> Arc<Self> {
        let activation = sida_model::spec::Activation::Relu;
        let dtype = StoredDType::F32;
        let shape = ExpertShape { d_model: D_MODEL, d_ff, dtype, output_dtype: dtype, activation };
        let (failing, slow, loads) = Default::default();
        Arc::new(Self { shape, of_second: shape, failing, slow, loads })
    }

    /// As [`MadeUp::new`], with the last matrices of the second layer in bf16.
    pub(crate) fn mixed() -> Arc<Self> {
        let mut source = Arc::into_inner(Self::new()).expect("nobody else has it");
        source.of_second.output_dtype = StoredDType::BF16;
        Arc::new(source)
    }

    /// The weights of an expert, as they lie in a slot.
    pub(crate) fn weights(&self, key: ExpertKey) -> Vec<u8> {
        let mut seed = (u64::from(key.layer.0) << 16 | u64::from(key.expert.0)) + 1;
        let shape = self.shape_of(key.layer);
        let mut value = || random(&mut seed) as f32 / 1e9 - 1.0;
        let mut weights: Vec<u8> = (0..shape.input_bytes() / 4).flat_map(|_| value().to_le_bytes()).collect();
        let output = (0..shape.d_model * shape.d_ff).map(|_| value());
        match shape.output_dtype {
            StoredDType::BF16 => {
                weights.extend(output.flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()))
            }
            _ => weights.extend(output.flat_map(f32::to_le_bytes)),
        }
        weights
    }

    /// What a call must give, computed without any node.
    pub(crate) fn expected(&self, call: ExpertCall<'_>) -> Vec<f32> {
        let (mut out, mut x) = (Vec::new(), call.activations);
        for group in call.groups {
            let key = ExpertKey { layer: call.layer, expert: group.expert };
            let (rows, rest) = x.split_at(group.rows as usize * D_MODEL);
            let mut results = vec![0.0; rows.len()];
            self.shape_of(key.layer).forward(&self.weights(key), rows, &mut results, &mut ExpertScratch::default());
            out.extend(results);
            x = rest;
        }
        out
    }
}

impl ExpertSource for MadeUp {
    fn shape(&self) -> &ExpertShape {
        &self.shape
    }

    fn shape_of(&self, layer: LayerId) -> &ExpertShape {
        if layer == LayerId(1) { &self.of_second } else { &self.shape }
    }

    fn layers(&self) -> usize {
        LAYERS
    }

    fn num_experts(&self) -> usize {
        EXPERTS
    }

    fn model(&self) -> Digest {
        Digest([7; 32])
    }

    fn experts(&self) -> Option<Digest> {
        Some(Digest([9; 32]))
    }

    fn load(&self, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError> {
        if self.failing.lock().unwrap().contains(&key) {
            return Err(ModelError::TensorMissing { dir: "made-up".into(), tensor: key.to_string() });
        }
        // Half of it, a pause, the other half: who reads too early gets nonsense.
        let weights = self.weights(key);
        let (first, second) = weights.split_at(weights.len() / 2);
        slot[..first.len()].copy_from_slice(first);
        if self.slow.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_micros(100));
        }
        slot[first.len()..weights.len()].copy_from_slice(second);
        self.loads.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// An engine over `slots` slots.
pub(crate) fn engine(source: &Arc<MadeUp>, slots: usize, threads: usize) -> Result<Engine, ExpertNodeError> {
    let mut config = ExpertNodeConfig::new("e0".into(), "made-up".into());
    config.expert_memory = ExpertMemory::Bytes((slots * source.shape.bytes()) as u64);
    config.threads = threads;
    Engine::new(&config, source.clone())
}

/// A random call of its own seed: groups of distinct experts of one layer, and their rows.
pub(crate) struct MadeUpCall {
    pub(crate) layer: LayerId,
    pub(crate) groups: Vec<Group>,
    pub(crate) activations: Vec<f32>,
}

impl MadeUpCall {
    pub(crate) fn new(seed: &mut u64) -> Self {
        let layer = LayerId((random(seed) % LAYERS as u64) as u16);
        let wanted = 1 + random(seed) % EXPERTS as u64;
        let experts: BTreeSet<u16> = (0..wanted).map(|_| (random(seed) % EXPERTS as u64) as u16).collect();
        let groups: Vec<Group> = experts
            .into_iter()
            .map(|expert| Group { expert: ExpertId(expert), rows: 1 + (random(seed) % 5) as u32 })
            .collect();
        let rows: u32 = groups.iter().map(|group| group.rows).sum();
        let activations = (0..rows as usize * D_MODEL).map(|_| random(seed) as f32 / 1e9 - 1.0).collect();
        Self { layer, groups, activations }
    }

    pub(crate) fn as_call(&self) -> ExpertCall<'_> {
        ExpertCall { layer: self.layer, groups: &self.groups, activations: &self.activations }
    }
}

/// The next number of a sequence, below 2^31 (splitmix64).
pub(crate) fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e3779b97f4a7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
    (z ^ (z >> 31)) >> 33
}
