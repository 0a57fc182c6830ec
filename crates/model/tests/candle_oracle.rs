//! The forward pass against another implementation of its operations: the same equations (`sida_model::forward`), computed by
//! candle's matmul, exponentials and sums on one sequence. What our kernels, caches and pieces make of them must agree.

use std::path::Path;

use candle_core::{D, Device, Error, IndexOp, Tensor};
use sida_kernels::position_bias::PositionBias;
use sida_model::{
    Backbone, Checkpoint, ExpertStore, Reference, Stack,
    backbone::{Matrices, Router, Shared},
    forward::{self, Operations, Rows},
    linear::Linear,
    loader::Host,
    names,
    spec::{AttentionSpec, Keys, RelativeBias, Rotary},
};
use sida_routing::{ExpertId, ExpertKey, LayerId};

/// Float32 on both sides, summed in another order: of the largest number.
const TOLERANCE: f32 = 1e-4;

type Result<T> = candle_core::Result<T>;

/// One sequence's pass through a stack.
struct Candle<'m> {
    backbone: &'m Backbone<Host>,
    experts: &'m ExpertStore,
    /// (buckets, heads), and how distances share them.
    bias: (Tensor, RelativeBias),
    /// The encoder's states (tokens, d_model), which the decoder attends to.
    input: Option<Tensor>,
    /// Keys and values of each block, (tokens, 2 * inner), before this pass.
    caches: Vec<Option<Tensor>>,
    ids: Vec<u32>,
    /// (n, d_model)
    h: Tensor,
    x: Tensor,
    /// What was made of x, or of that.
    y: Tensor,
    /// The expert of each row, and its probability.
    chosen: Vec<(usize, f64)>,
}

impl<'m> Candle<'m> {
    fn new(backbone: &'m Backbone<Host>, experts: &'m ExpertStore, checkpoint: &Checkpoint, stack: Stack) -> Self {
        let table = checkpoint.tensor(&names::position_bias(stack)).unwrap();
        let none = Tensor::zeros((0,), candle_core::DType::F32, &Device::Cpu).unwrap();
        let spec = backbone.spec.stack(stack);
        let table = tensor(table.dtype.widen(table.bytes), (table.shape[0], table.shape[1])).unwrap();
        Self {
            backbone,
            experts,
            bias: (table, spec.positions.unwrap()),
            input: None,
            caches: vec![None; spec.blocks.len()],
            ids: Vec::new(),
            h: none.clone(),
            x: none.clone(),
            y: none,
            chosen: Vec::new(),
        }
    }

    /// Runs through all blocks.
    fn pass(&mut self, stack: Stack, ids: &[u32]) -> Result<()> {
        self.ids = ids.to_vec();
        let weights = self.backbone.stack(stack);
        forward::embed(self, weights)?;
        assert_eq!(forward::advance(self, weights, 0)?, None, "every expert is here");
        match stack {
            Stack::Encoder => forward::finish(self, weights),
            Stack::Decoder => forward::head(self, weights, &self.backbone.head),
        }
    }

    /// What is added to the scores of queries from position `first` on: (heads, queries, keys).
    fn position_bias(&self, first: usize, queries: usize, keys: usize) -> Result<Tensor> {
        let (table, RelativeBias { buckets, max_distance, is_bidirectional }) = &self.bias;
        let bucket = |distance: i64| {
            let (buckets, ahead) = if *is_bidirectional { (buckets / 2, distance > 0) } else { (*buckets, false) };
            let steps = if *is_bidirectional { distance.abs() } else { (-distance).max(0) } as usize;
            let exact = buckets / 2;
            let far = (steps as f64 / exact as f64).ln() / (*max_distance as f64 / exact as f64).ln();
            let within = if steps < exact { steps } else { exact + (far * (buckets - exact) as f64) as usize };
            (within.min(buckets - 1) + if ahead { buckets } else { 0 }) as u32
        };
        let of_query = |query: usize| (0..keys).map(move |key| bucket(key as i64 - (first + query) as i64));
        let ids: Vec<u32> = (0..queries).flat_map(of_query).collect();
        let of_pairs = table.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?; // (queries * keys, heads)
        of_pairs.t()?.contiguous()?.reshape((table.dim(1)?, queries, keys))
    }
}

/// What Switch Transformers do not have; `causal_parity.rs` holds that against transformers.
fn unknown() -> Result<()> {
    Err(Error::Msg("the oracle computes Switch Transformers".to_owned()))
}

impl Operations for Candle<'_> {
    type Memory = Host;
    type Error = Error;

    fn embed(&mut self, embedding: &Linear) -> Result<()> {
        self.h = matrix(embedding)?.index_select(&Tensor::new(&self.ids[..], &Device::Cpu)?, 0)?;
        Ok(())
    }

    fn norm(&mut self, weight: &Vec<f32>) -> Result<()> {
        let mean = self.h.sqr()?.mean_keepdim(D::Minus1)?;
        let rms = (mean + f64::from(self.backbone.spec.norm_epsilon))?.sqrt()?;
        self.x = self.h.broadcast_div(&rms)?.broadcast_mul(&Tensor::new(&weight[..], &Device::Cpu)?)?;
        Ok(())
    }

    fn project(&mut self, weight: &Linear, _: Option<&Vec<f32>>) -> Result<()> {
        self.y = product(&self.x, weight)?;
        Ok(())
    }

    fn norm_heads(&mut self, _: &AttentionSpec, _: &[Vec<f32>; 2]) -> Result<()> {
        unknown()
    }

    fn clip(&mut self, _: f32) -> Result<()> {
        unknown()
    }

    fn rotate(&mut self, _: &AttentionSpec, _: &Rotary) -> Result<()> {
        unknown()
    }

    fn attend(&mut self, spec: &AttentionSpec, block: usize, _: Option<&PositionBias>) -> Result<()> {
        let (n, inner) = (self.y.dim(0)?, spec.inner());
        let own = |part: usize, of: &Tensor| of.narrow(1, part * inner, inner);
        let (keys, values, first) = match spec.keys {
            Keys::Rows => (own(1, &self.y)?, own(2, &self.y)?, 0),
            Keys::Cache => {
                let new = self.y.narrow(1, inner, 2 * inner)?;
                let before = self.caches[block].take();
                let first = before.as_ref().map_or(Ok(0), |cache| cache.dim(0))?;
                let all = before.map_or(Ok(new.clone()), |cache| Tensor::cat(&[&cache, &new], 0))?;
                let kv = (own(0, &all)?, own(1, &all)?, first);
                self.caches[block] = Some(all);
                kv
            }
            Keys::Input => {
                let cross = self.backbone.decoder.blocks[block].cross.as_ref().unwrap();
                let kv = product(self.input.as_ref().unwrap(), &cross.keys_values)?;
                (own(0, &kv)?, own(1, &kv)?, 0)
            }
        };
        let heads = |rows: Tensor| rows.reshape(((), spec.heads, spec.head_dim))?.transpose(0, 1)?.contiguous();
        let (q, k, v) = (heads(own(0, &self.y)?)?, heads(keys)?, heads(values)?);
        let mut scores = q.matmul(&k.t()?)?; // (heads, n, keys)
        if spec.keys != Keys::Input {
            scores = (scores + self.position_bias(first, n, k.dim(1)?)?)?;
        }
        if spec.keys == Keys::Cache {
            let keys = k.dim(1)?;
            let is_ahead = |at: usize| if at % keys > first + at / keys { f32::NEG_INFINITY } else { 0.0 };
            scores = scores.broadcast_add(&tensor((0..n * keys).map(is_ahead).collect(), (n, keys))?)?;
        }
        self.y = softmax(&scores)?.matmul(&v)?.transpose(0, 1)?.contiguous()?.reshape((n, inner))?;
        Ok(())
    }

    fn add_output(&mut self, weight: &Linear, _: Option<&Vec<f32>>) -> Result<()> {
        self.h = (&self.h + product(&self.y, weight)?)?;
        Ok(())
    }

    fn feed_forward(&mut self, Matrices { wi, wo, .. }: &Matrices<Host>) -> Result<()> {
        self.h = (&self.h + product(&product(&self.x, wi)?.relu()?, wo)?)?;
        Ok(())
    }

    fn shared(&mut self, _: &Shared<Host>) -> Result<()> {
        unknown()
    }

    fn route(&mut self, _: LayerId, router: &Router<Host>) -> Result<()> {
        let probabilities = softmax(&product(&self.x, &router.classifier)?)?.to_vec2::<f32>()?;
        let best = |row: Vec<f32>| {
            let most = row.iter().copied().fold(0.0, f32::max);
            (row.iter().position(|&p| p == most).unwrap(), f64::from(most))
        };
        self.chosen = probabilities.into_iter().map(best).collect();
        Ok(())
    }

    fn experts(&mut self, layer: LayerId) -> Result<Rows> {
        let shape = self.experts.shape();
        let mut slot = vec![0; shape.bytes()];
        let mut added = Vec::new();
        for (row, &(expert, probability)) in self.chosen.iter().enumerate() {
            self.experts.load(ExpertKey { layer, expert: ExpertId(expert as u16) }, &mut slot).unwrap();
            let (wi, wo) = slot.split_at(shape.matrix_bytes());
            let wi = tensor(shape.dtype.widen(wi), (shape.d_ff, shape.d_model))?;
            let wo = tensor(shape.dtype.widen(wo), (shape.d_model, shape.d_ff))?;
            let x = self.x.i(row..row + 1)?;
            added.push((x.matmul(&wi.t()?)?.relu()?.matmul(&wo.t()?)? * probability)?);
        }
        self.h = (&self.h + Tensor::cat(&added, 0)?)?;
        Ok(Rows::Stay)
    }

    fn norm_wanted(&mut self, weight: &Vec<f32>, scale: f32) -> Result<()> {
        self.norm(weight)?;
        self.x = (&self.x * f64::from(scale))?;
        Ok(())
    }

    fn logits(&mut self, weight: &Linear) -> Result<()> {
        self.y = product(&self.x, weight)?;
        Ok(())
    }
}

fn tensor(values: Vec<f32>, shape: (usize, usize)) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

fn matrix(linear: &Linear) -> Result<Tensor> {
    let values = linear.parts().flat_map(|part| part.dtype.widen(part.bytes)).collect();
    tensor(values, (linear.outputs(), linear.inputs()))
}

fn product(x: &Tensor, weight: &Linear) -> Result<Tensor> {
    x.contiguous()?.matmul(&matrix(weight)?.t()?)
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let exponentials = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)
}

fn assert_close(found: &[f32], expected: &Tensor, what: &str) {
    let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs() / scale).fold(0.0, f32::max);
    assert!(worst < TOLERANCE, "{what} is off by {worst:e}");
}

/// Our kernels would compute something else than the equations of the forward pass say.
#[test]
fn the_processor_agrees_with_candle() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/switch-tiny-64");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let backbone = Backbone::load(&checkpoint, &mut |_, _| ()).unwrap();
    let (experts, reference) = (ExpertStore::open(checkpoint.clone()).unwrap(), Reference::open(&dir).unwrap());
    for tokens in [1, 9, 200] {
        let prompt: Vec<u32> = (0..tokens).map(|i| 3 + i * 37 % 8000).collect();
        let mut encoder = Candle::new(&backbone, &experts, &checkpoint, Stack::Encoder);
        encoder.pass(Stack::Encoder, &prompt).unwrap();
        let (states, _) = reference.encode(&prompt).unwrap();
        assert_close(&states, &encoder.x, "the encoder");
        let mut decoder = Candle::new(&backbone, &experts, &checkpoint, Stack::Decoder);
        decoder.input = Some(encoder.x);
        let mut sequence = reference.start(&states).unwrap();
        for fed in [&[0, 17, 1207, 44][..], &[5], &[99, 8191]] {
            decoder.pass(Stack::Decoder, fed).unwrap();
            let (logits, _) = reference.decode(&mut sequence, fed).unwrap();
            assert_close(&logits, &decoder.y, "the decoder");
        }
    }
}
