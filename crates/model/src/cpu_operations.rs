//! The operations of a pass on the processor, over plain rows: what the thread that owns the rows does, as far as products
//! do not split themselves. Made by [`crate::cpu_backend`], for a whole batch or for a thread's piece of it.

use sida_routing::LayerId;

use crate::{
    GivenUp, Spans, StillWanted,
    backbone::Router,
    cpu::{
        attention::{Attention, HeadRows, Sequence},
        norm::rms_norm,
    },
    forward::{Operations, Rows},
    kv_cache::CpuSequence,
    linear::Linear,
    loader::Host,
    pieces,
    position_bias::PositionBias,
    spec::{AttentionSpec, Keys, ModelSpec},
};

/// Rows of some sequences on their way through a stack.
pub(crate) struct CpuOperations<'p, 's> {
    pub(crate) spec: &'p ModelSpec,
    /// A token for each row: to be embedded, at the beginning of a pass.
    pub(crate) ids: &'p [u32],
    pub(crate) spans: &'p Spans,
    /// The decoder's, one for each span; none of prompts.
    pub(crate) sequences: &'p mut [&'s mut CpuSequence],
    /// (n, d_model): the hidden states.
    pub(crate) h: &'p mut [f32],
    /// (n, d_model): what a norm made of them.
    pub(crate) x: &'p mut [f32],
    pub(crate) scratch: &'p mut Scratch,
    /// Whether other threads have the other rows of the batch, so that these need not be shared out.
    pub(crate) is_piece: bool,
    /// Whether anybody still waits for the rows. Attention is what takes long where there are many.
    pub(crate) still_wanted: StillWanted<'s>,
}

/// What lies between the operations of one thread; kept from block to block.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// (n, 3 * inner), or (n, inner) of an attention to the input.
    projected: Vec<f32>,
    /// (n, inner)
    attended: Vec<f32>,
    /// (n, d_ff)
    hidden: Vec<f32>,
    /// (n, d_model): what is about to be added to h.
    added: Vec<f32>,
    /// (wanted, vocab_size)
    pub(crate) logits: Vec<f32>,
}

impl Operations for CpuOperations<'_, '_> {
    type Memory = Host;
    type Error = GivenUp;

    fn embed(&mut self, embedding: &Linear) -> Result<(), GivenUp> {
        embedding.gather(self.ids, self.h);
        Ok(())
    }

    fn norm(&mut self, weight: &Vec<f32>) -> Result<(), GivenUp> {
        rms_norm(self.h, weight, self.spec.norm_epsilon, self.x);
        Ok(())
    }

    fn project(&mut self, weight: &Linear) -> Result<(), GivenUp> {
        weight.product(self.x, &mut self.scratch.projected);
        Ok(())
    }

    fn attend(&mut self, spec: &AttentionSpec, block: usize, bias: &PositionBias) -> Result<(), GivenUp> {
        let Self { spans, sequences, scratch: Scratch { projected, attended, .. }, still_wanted, .. } = self;
        let inner = spec.inner();
        let width = projected.len() / spans.rows().max(1);
        if spec.keys == Keys::Cache {
            for (sequence, span) in sequences.iter_mut().zip(spans.ranges()) {
                let position = sequence.position();
                sequence.caches[block].write(position, &projected[span.start * width..span.end * width]);
            }
        }
        let part = |values, stride, part| HeadRows { values, stride, offset: part * inner };
        let of_sequence = |(index, span): (usize, std::ops::Range<usize>)| {
            let own = &projected[span.start * width..span.end * width];
            // Keys and values side by side, the part of a row that keys are, and how many came before the first query.
            let (kv, stride, keys, first_position) = match spec.keys {
                Keys::Rows => (own, width, 1, 0),
                Keys::Cache => (sequences[index].caches[block].rows(), 2 * inner, 0, sequences[index].position()),
                Keys::Input => (&sequences[index].cross[block][..], 2 * inner, 0, 0),
            };
            Sequence {
                query_rows: span.len(),
                first_position,
                key_rows: kv.len() / stride,
                queries: part(own, width, 0),
                keys: part(kv, stride, keys),
                values: part(kv, stride, keys + 1),
            }
        };
        let all: Vec<Sequence<'_>> = spans.ranges().enumerate().map(of_sequence).collect();
        let bias = (spec.keys != Keys::Input).then_some(bias);
        attended.clear();
        attended.resize(spans.rows() * inner, 0.0);
        Attention { heads: spec.heads, d_kv: spec.head_dim, causal: spec.keys == Keys::Cache, bias }.run(
            &all,
            attended,
            *still_wanted,
        )
    }

    fn add_output(&mut self, weight: &Linear) -> Result<(), GivenUp> {
        let Scratch { attended, added, .. } = &mut *self.scratch;
        weight.product(attended, added);
        add_to(self.h, added);
        Ok(())
    }

    fn feed_forward(&mut self, wi: &Linear, wo: &Linear) -> Result<(), GivenUp> {
        let compute = |h: &mut [f32], x: &[f32], Scratch { hidden, added, .. }: &mut Scratch| {
            wi.product(x, hidden);
            relu(hidden);
            wo.product(hidden, added);
            add_to(h, added);
        };
        match self.is_piece {
            true => compute(self.h, self.x, self.scratch),
            false => pieces::by_row(self.h, self.x, self.spec.d_model, self.scratch, compute),
        }
        Ok(())
    }

    /// Put off until somebody asks for its choice: a hash table may choose instead.
    fn route(&mut self, _: LayerId, _: &Router<Host>) -> Result<(), GivenUp> {
        Ok(())
    }

    fn experts(&mut self, _: LayerId) -> Result<Rows, GivenUp> {
        Ok(Rows::Leave)
    }

    fn norm_wanted(&mut self, weight: &Vec<f32>, scale: f32) -> Result<(), GivenUp> {
        self.norm(weight)?;
        if scale != 1.0 {
            self.x.iter_mut().for_each(|x| *x *= scale);
        }
        Ok(())
    }

    fn logits(&mut self, weight: &Linear) -> Result<(), GivenUp> {
        weight.product(self.x, &mut self.scratch.logits);
        Ok(())
    }
}

/// sum += x, of one length
pub(crate) fn add_to(sum: &mut [f32], x: &[f32]) {
    assert_eq!(sum.len(), x.len());
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

/// max(x, 0) in place, and NaN of NaN: a broken activation must not turn into an answer.
pub(crate) fn relu(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Residuals or activations would be off.
    #[test]
    fn each_does_what_it_says() {
        let mut x = [1.0, -2.0, 3.0, f32::NAN];
        relu(&mut x);
        assert!(x[..3] == [1.0, 0.0, 3.0] && x[3].is_nan());
        add_to(&mut x[..3], &[1.0, 2.0, 3.0]);
        assert_eq!(x[..3], [2.0, 2.0, 6.0]);
    }
}
