//! The weights of everything of a model but its experts, block by block as its [`ModelSpec`] lists them, in whatever
//! memory a backend keeps them. Loaded once per process; [`crate::forward`] computes with them.

use std::{fmt::Debug, sync::Arc};

use sida_kernels::position_bias::PositionBias;
use sida_routing::LayerId;

use crate::{
    Checkpoint, ModelError, Stack, names, position_bias,
    spec::{Activation, AttentionSpec, BlockSpec, FeedForwardSpec, ModelSpec, QkNorm, SharedSpec},
};

/// A kind of memory, by what weights are in it.
pub trait Memory: Debug {
    /// W, row-major (outputs, inputs).
    type Matrix: Debug;
    /// A weight or a bias per column.
    type Vector: Debug;
    /// A stack's [`PositionBias`].
    type Bias: Debug;
}

/// Brings tensors of a checkpoint into memory.
pub trait Load {
    /// Which.
    type Memory: Memory;
    /// Why that fails.
    type Error: From<ModelError>;

    /// Where they come from.
    fn checkpoint(&self) -> &Checkpoint;
    /// Matrices \[outputs, inputs\] of one input, one below the other: their products are one product. Each with its outputs.
    fn matrix(
        &mut self,
        parts: &[(String, usize)],
        inputs: usize,
    ) -> Result<<Self::Memory as Memory>::Matrix, Self::Error>;
    /// The matrix of a router \[experts, d_model\], whose products are summed in float32.
    fn router(
        &mut self,
        name: String,
        experts: usize,
        d_model: usize,
    ) -> Result<<Self::Memory as Memory>::Matrix, Self::Error>;
    /// A vector, widened to float32.
    fn vector(&mut self, name: &str, width: usize) -> Result<<Self::Memory as Memory>::Vector, Self::Error>;
    /// Vectors one after another, each with its width.
    fn vectors(&mut self, parts: &[(String, usize)]) -> Result<<Self::Memory as Memory>::Vector, Self::Error>;
    /// A position bias.
    fn bias(&mut self, bias: PositionBias) -> Result<<Self::Memory as Memory>::Bias, Self::Error>;
}

/// The dense part of a model.
#[derive(Debug)]
pub struct Backbone<M: Memory> {
    /// What it computes.
    pub spec: ModelSpec,
    /// The encoder, if there is one.
    pub encoder: Option<StackWeights<M>>,
    /// The decoder.
    pub decoder: StackWeights<M>,
    /// What makes scores of the decoder's output.
    pub head: Head<M>,
}

/// All blocks of a stack, and what is around them.
#[derive(Debug)]
pub struct StackWeights<M: Memory> {
    /// (vocab_size, d_model); both stacks' and the head are one matrix in most models.
    pub embedding: Arc<M::Matrix>,
    /// Of the attention of each block to its own stack, where there is one.
    pub bias: Option<M::Bias>,
    /// In order.
    pub blocks: Vec<Block<M>>,
    /// (d_model)
    pub final_norm: M::Vector,
}

/// One block.
#[derive(Debug)]
pub struct Block<M: Memory> {
    /// To its own stack.
    pub attention: Attention<M>,
    /// Of a decoder, to the encoder's output.
    pub cross: Option<CrossAttention<M>>,
    /// What follows.
    pub feed_forward: FeedForward<M>,
}

/// Attention, its norm and its projections.
#[derive(Debug)]
pub struct Attention<M: Memory> {
    /// What it computes.
    pub spec: AttentionSpec,
    /// (d_model)
    pub norm: M::Vector,
    /// (inner + 2 * kv_inner, d_model): q, k and v as one product; of an attention to the input q alone, (inner, d_model).
    pub projection: M::Matrix,
    /// What is added to that.
    pub bias: Option<M::Vector>,
    /// The weights of the norms of q and of k.
    pub qk_norm: Option<[M::Vector; 2]>,
    /// (d_model, inner)
    pub output: M::Matrix,
    /// (d_model)
    pub output_bias: Option<M::Vector>,
}

/// Attention of a decoder to the encoder's output.
#[derive(Debug)]
pub struct CrossAttention<M: Memory> {
    /// The decoder's side of it.
    pub attention: Attention<M>,
    /// (2 * inner, d_model): k and v of the encoder's output, made once per sequence.
    pub keys_values: M::Matrix,
}

/// What a block does after attention.
#[derive(Debug)]
pub enum FeedForward<M: Memory> {
    /// The same matrices for every row.
    Dense {
        /// (d_model)
        norm: M::Vector,
        /// They.
        matrices: Matrices<M>,
    },
    /// Experts, which are elsewhere.
    Moe {
        /// Which MoE layer.
        layer: LayerId,
        /// (d_model)
        norm: M::Vector,
        /// Chooses them.
        router: Router<M>,
        /// One that all rows go to.
        shared: Option<Shared<M>>,
    },
}

/// The matrices of a feed-forward.
#[derive(Debug)]
pub struct Matrices<M: Memory> {
    /// What is between them.
    pub activation: Activation,
    /// (d_ff, d_model); of a gated one (2 * d_ff, d_model), the gate first.
    pub wi: M::Matrix,
    /// (d_model, d_ff)
    pub wo: M::Matrix,
}

/// An expert that all rows go to.
#[derive(Debug)]
pub struct Shared<M: Memory> {
    /// It.
    pub matrices: Matrices<M>,
    /// (1, d_model): how much of it there is for a row.
    pub gate: Option<M::Matrix>,
}

/// What chooses the expert of a row.
#[derive(Debug)]
pub struct Router<M: Memory> {
    /// (experts, d_model)
    pub classifier: M::Matrix,
    /// (experts)
    pub bias: Option<M::Vector>,
}

/// Hidden states to logits.
#[derive(Debug)]
pub struct Head<M: Memory> {
    /// (vocab_size, d_model)
    pub weight: Arc<M::Matrix>,
    /// What the last norm's output is multiplied by: `d_model^-0.5` where the head is the embedding, which was not made
    /// for this.
    pub scale: f32,
}

impl<M: Memory> Backbone<M> {
    /// Loads the weights of a model.
    pub fn load_with<L: Load<Memory = M>>(loader: &mut L) -> Result<Self, L::Error> {
        let spec = loader.checkpoint().config().spec();
        let names = names::embeddings(loader.checkpoint())?;
        // What has one name is one matrix in memory.
        let mut loaded: Vec<(String, Arc<M::Matrix>)> = Vec::with_capacity(3);
        let mut matrix = |name: String| -> Result<_, L::Error> {
            if let Some((_, matrix)) = loaded.iter().find(|(loaded, _)| *loaded == name) {
                return Ok(matrix.clone());
            }
            let matrix = Arc::new(loader.matrix(&[(name.clone(), spec.vocab_size)], spec.d_model)?);
            loaded.push((name, matrix.clone()));
            Ok(matrix)
        };
        let (encoder, decoder) = (matrix(names.encoder)?, matrix(names.decoder)?);
        let weight = matrix(names.head)?;
        let encoder = match spec.has_encoder() {
            true => Some(StackWeights::load(loader, &spec, Stack::Encoder, encoder)?),
            false => None,
        };
        Ok(Self {
            encoder,
            decoder: StackWeights::load(loader, &spec, Stack::Decoder, decoder)?,
            head: Head { weight, scale: spec.head_scale },
            spec,
        })
    }

    /// Refuses ids outside the vocabulary.
    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), ModelError> {
        let vocab_size = self.spec.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(ModelError::TokenId { id, vocab_size }),
            None => Ok(()),
        }
    }

    /// One of its stacks. Panics if it has none: nobody asks for an encoder that [`ModelSpec::has_encoder`] denies.
    pub fn stack(&self, stack: Stack) -> &StackWeights<M> {
        match stack {
            Stack::Encoder => self.encoder.as_ref().expect("a pass of the encoder is of a model that has one"),
            Stack::Decoder => &self.decoder,
        }
    }
}

impl<M: Memory> StackWeights<M> {
    fn load<L: Load<Memory = M>>(
        loader: &mut L,
        spec: &ModelSpec,
        stack: Stack,
        embedding: Arc<M::Matrix>,
    ) -> Result<Self, L::Error> {
        let own = spec.stack(stack);
        let bias = match own.positions {
            Some(positions) => {
                let bias = position_bias::load(loader.checkpoint(), stack, positions)?;
                Some(loader.bias(bias)?)
            }
            None => None,
        };
        let names = loader.checkpoint().config().names;
        let blocks = own.blocks.iter().enumerate();
        let blocks = blocks.map(|(index, block)| Block::load(loader, spec.d_model, block, stack, index));
        let blocks = blocks.collect::<Result<_, _>>()?;
        Ok(Self { embedding, bias, blocks, final_norm: loader.vector(&names.final_norm(stack), spec.d_model)? })
    }
}

impl<M: Memory> Block<M> {
    fn load<L: Load<Memory = M>>(
        loader: &mut L,
        d_model: usize,
        spec: &BlockSpec,
        stack: Stack,
        index: usize,
    ) -> Result<Self, L::Error> {
        use names::Attention::{CrossAttention as Cross, SelfAttention};
        let names = loader.checkpoint().config().names;
        let mut attention = |spec: AttentionSpec, which, projections: &[char]| {
            let width = |of: char| if of == 'q' { spec.inner() } else { spec.kv_inner() };
            let weights = projections.iter().map(|&of| (names.projection(stack, index, which, of), width(of)));
            let biases = projections.iter().map(|&of| (names.projection_bias(stack, index, which, of), width(of)));
            let norm_width = |of: char| if spec.qk_norm == QkNorm::Heads { spec.head_dim } else { width(of) };
            let mut qk_norm = |of| loader.vector(&names.qk_norm(index, of), norm_width(of));
            let qk_norm = match spec.qk_norm {
                QkNorm::None => None,
                QkNorm::Heads | QkNorm::Rows => Some([qk_norm('q')?, qk_norm('k')?]),
            };
            let output = (names.projection(stack, index, which, 'o'), d_model);
            let output_bias = match spec.has_output_bias {
                true => Some(loader.vector(&names.projection_bias(stack, index, which, 'o'), d_model)?),
                false => None,
            };
            Ok::<_, L::Error>(Attention {
                spec,
                norm: loader.vector(&names.attention_norm(stack, index, which), d_model)?,
                projection: loader.matrix(&weights.collect::<Vec<_>>(), d_model)?,
                bias: if spec.has_bias { Some(loader.vectors(&biases.collect::<Vec<_>>())?) } else { None },
                qk_norm,
                output: loader.matrix(&[output], spec.inner())?,
                output_bias,
            })
        };
        let own = attention(spec.attention, SelfAttention, &['q', 'k', 'v'])?;
        let cross = match spec.cross {
            None => None,
            Some(spec) => {
                let attention = attention(spec, Cross, &['q'])?;
                let keys_values = ['k', 'v'].map(|of| (names.projection(stack, index, Cross, of), spec.kv_inner()));
                Some(CrossAttention { attention, keys_values: loader.matrix(&keys_values, d_model)? })
            }
        };
        let feed_forward = FeedForward::load(loader, d_model, spec.feed_forward, stack, index)?;
        Ok(Self { attention: own, cross, feed_forward })
    }
}

impl<M: Memory> FeedForward<M> {
    fn load<L: Load<Memory = M>>(
        loader: &mut L,
        d_model: usize,
        spec: FeedForwardSpec,
        stack: Stack,
        index: usize,
    ) -> Result<Self, L::Error> {
        let names = loader.checkpoint().config().names;
        let norm = loader.vector(&names.feed_forward_norm(stack, index), d_model)?;
        Ok(match spec {
            FeedForwardSpec::Dense { d_ff, activation } => {
                let matrices = Matrices::load(loader, names.dense(stack, index), activation, d_ff, d_model)?;
                Self::Dense { norm, matrices }
            }
            FeedForwardSpec::Moe { layer, experts, router, shared } => {
                let classifier = loader.router(names.router(stack, index), experts, d_model)?;
                let bias = match router.has_bias {
                    true => Some(loader.vector(&names.router_bias(stack, index), experts)?),
                    false => None,
                };
                let shared = match shared {
                    None => None,
                    Some(SharedSpec { d_ff, is_gated }) => Some(Shared {
                        matrices: Matrices::load(loader, names.shared(index), Activation::GatedSilu, d_ff, d_model)?,
                        gate: match is_gated {
                            true => Some(loader.matrix(&[(names.shared_gate(index), 1)], d_model)?),
                            false => None,
                        },
                    }),
                };
                Self::Moe { layer, norm, router: Router { classifier, bias }, shared }
            }
        })
    }
}

impl<M: Memory> Matrices<M> {
    /// Of these names, the last of which leads back to `d_model`.
    fn load<L: Load<Memory = M>>(
        loader: &mut L,
        mut names: Vec<String>,
        activation: Activation,
        d_ff: usize,
        d_model: usize,
    ) -> Result<Self, L::Error> {
        let output = names.pop().into_iter().map(|name| (name, d_model)).collect::<Vec<_>>();
        let inputs: Vec<_> = names.into_iter().map(|name| (name, d_ff)).collect();
        Ok(Self { activation, wi: loader.matrix(&inputs, d_model)?, wo: loader.matrix(&output, d_ff)? })
    }
}
