//! A net that serves learns on from what routers chose since: the encoder's transformer, from its own weights. What the file
//! holds of the decoder stays as it is. Called by predictor-nodes, on a thread that serves nobody.

use std::{ops::ControlFlow, path::Path, sync::Arc};

use rand::{SeedableRng, rngs::StdRng};
use sida_model::Stack;
use sida_routing::{Digest, Labels};

use super::{
    Recording, TrainOptions, TrainProgress,
    descent::{self, Descent, Learnt},
    measured,
    record::StackRecording,
    transformer_net::TransformerInTraining,
};
use crate::{HashPredictor, Net, PredictorError, PredictorShape, file::PredictorFile};

/// How a net learns on.
#[derive(Clone, Debug, PartialEq)]
pub struct FurtherOptions {
    /// Passes over the labels.
    pub epochs: usize,
    /// Tokens of one step, at most: what is computed between two looks at whether to go on.
    pub batch_tokens: usize,
    /// The largest learning rate.
    pub learning_rate: f64,
    /// The same seed, labels and file give the same net.
    pub seed: u64,
}

impl Default for FurtherOptions {
    fn default() -> Self {
        Self { epochs: 2, batch_tokens: 512, learning_rate: 1e-3, seed: 0 }
    }
}

/// Refuses a predictor that cannot learn on: only a transformer of an encoder's can.
pub fn check_trainable(path: &Path, shape: &PredictorShape, model: Digest) -> Result<(), PredictorError> {
    crate::open_shape(path, shape.clone(), model)?;
    trainable(path, shape, model).map(drop)
}

fn trainable(path: &Path, shape: &PredictorShape, model: Digest) -> Result<TransformerInTraining, PredictorError> {
    let refuse = |reason: String| Err(PredictorError::NotTrainable { path: path.to_owned(), reason });
    let mut file = PredictorFile::read(path, shape.clone(), model)?;
    if shape.encoder_layers.is_empty() {
        return refuse(
            "only an encoder's net can learn from traffic, and this model has no encoder with experts".to_owned(),
        );
    }
    match file.metadata.net {
        Net::Transformer => TransformerInTraining::from_file(&mut file),
        Net::Lstm | Net::Table => {
            let net = file.metadata.net.name();
            refuse(format!(
                "its net is `{net}`, and only a `transformer` can; `sida train-predictor --net transformer` trains one"
            ))
        }
    }
}

/// Lets the predictor in the file `from` learn on from `learnt`, measures it with `tested`, which it has not seen, and writes it
/// to `to`; returns it as it would serve. `on_step` is called after each step, and may break it off, which is
/// [`PredictorError::GivenUp`]. Computes on one thread, where candle is kept from starting others (see
/// [`train`](super::train())).
pub fn further(
    from: &Path,
    (shape, model): (&PredictorShape, Digest),
    (learnt, tested): (&[Arc<Labels>], &[Arc<Labels>]),
    options: &FurtherOptions,
    to: &Path,
    on_step: &mut dyn FnMut(TrainProgress) -> ControlFlow<()>,
) -> Result<Arc<dyn HashPredictor>, PredictorError> {
    crate::open_shape(from, shape.clone(), model)?;
    let [learnt, tested] = [learnt, tested].map(|labels| recording(shape, model, labels));
    if learnt.encoder.tokens() == 0 || tested.encoder.tokens() == 0 {
        return Err(PredictorError::Texts {
            reason: "labels to learn from and others to test with are both needed".to_owned(),
        });
    }
    let net = trainable(from, shape, model)?;
    let (epochs, batch_tokens) = (options.epochs, options.batch_tokens);
    let (learning_rate, seed) = (options.learning_rate, options.seed);
    let settings = TrainOptions { epochs, batch_tokens, learning_rate, seed, ..TrainOptions::default() };
    let stack = Stack::Encoder;
    let descent = Descent { recording: &learnt, stack, options: &settings, workers: descent::workers(1)? };
    descent.run(&net, &mut StdRng::seed_from_u64(seed), on_step)?;
    let file = PredictorFile::read(from, shape.clone(), model)?;
    let metadata = file.metadata.clone();
    let mut tensors = file.into_tensors();
    net.store(&mut tensors)?;
    tensors.write(&metadata, to)?;
    descent.workers[0].install(|| measured(to, &tested, to))?;
    crate::open_shape(to, shape.clone(), model)
}

/// Labels of an encoder, as if the model had been run here.
fn recording(shape: &PredictorShape, model: Digest, labels: &[Arc<Labels>]) -> Recording {
    let [encoder, decoder] = [labels, &[]].map(StackRecording::of_labels);
    Recording { model, shape: shape.clone(), encoder, decoder }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use sida_routing::{ExpertId, LabelsExtent, learning::is_better};

    use super::{
        super::{
            compare::compare,
            tests::{MODEL, recording, shape, trained},
        },
        *,
    };

    /// What a recording says of the encoder, with its experts renamed by `turn`.
    fn labels(sequences: usize, seed: u64, turn: u16) -> Vec<Arc<Labels>> {
        let StackRecording { kept, sequences, experts, probabilities, .. } = recording(sequences, seed).encoder;
        let extent = LabelsExtent { layers: 2, num_experts: 4, kept };
        let of_sequence = |((tokens, experts), probabilities): ((_, Vec<ExpertId>), _)| {
            let turned = experts.into_iter().map(|expert| ExpertId((expert.0 + turn) % 4)).collect();
            Arc::new(Labels::new(tokens, extent, turned, probabilities).unwrap())
        };
        sequences.into_iter().zip(experts).zip(probabilities).map(of_sequence).collect()
    }

    fn learn_on(
        from: &Path,
        parts: (&[Arc<Labels>], &[Arc<Labels>]),
        options: &FurtherOptions,
        to: &Path,
    ) -> Result<Arc<dyn HashPredictor>, PredictorError> {
        further(from, (&shape(), MODEL), parts, options, to, &mut |_| ControlFlow::Continue(()))
    }

    /// A net that learns on would begin as another one than serves, and have to learn again what it knew.
    #[test]
    fn it_begins_as_what_serves() {
        let (dir, from, _) = trained(Net::Transformer);
        let (to, known) = (dir.path().join("candidate.safetensors"), labels(40, 3, 0));
        let options = FurtherOptions { epochs: 0, ..FurtherOptions::default() };
        learn_on(&from, (&known, &known), &options, &to).unwrap();
        let tensors = |path: &Path| PredictorFile::read(path, shape(), MODEL).unwrap().into_tensors();
        assert!(tensors(&from) == tensors(&to));
    }

    /// A predictor would stay as bad as it is where routers choose otherwise than it has learnt, one that got worse would be
    /// taken for better, or the decoder's net and what was measured of it would be lost.
    #[test]
    fn it_learns_what_changed_and_nothing_else() {
        let (dir, from, rates) = trained(Net::Transformer);
        let (to, before) = (dir.path().join("candidate.safetensors"), fs::read(&from).unwrap());
        let (learnt, tested) = (labels(600, 3, 1), labels(60, 4, 1));
        let options = FurtherOptions { learning_rate: 0.01, ..FurtherOptions::default() };
        let candidate = learn_on(&from, (&learnt, &tested), &options, &to).unwrap();
        let serving = crate::open_shape(&from, shape(), MODEL).unwrap();
        let compared = |tested: &[Arc<Labels>]| compare(&*serving, &*candidate, &shape(), tested).unwrap();
        let changed = compared(&tested);
        let share = |hits: u64| hits as f64 / changed.entries as f64;
        assert!(share(changed.serving) < 0.2 && share(changed.candidate) > 0.7, "{changed:?}");
        assert!(is_better(&changed.gains));
        assert!(!is_better(&compared(&labels(60, 4, 0)).gains), "where nothing has changed it is worse");
        assert_eq!(fs::read(&from).unwrap(), before);
        assert_ne!(candidate.digest(), serving.digest());
        assert_eq!(candidate.hit_rates()[2], rates[2]);
        let encoders = &candidate.hit_rates()[..2];
        assert!(encoders.iter().all(|rate| rate.top1 > 0.7 && rate.tokens == changed.entries / 2), "{encoders:?}");
        let states = || (0..2).map(|_| serving.start(&[0.5; 16]).unwrap()).collect::<Vec<_>>();
        let steps = |predictor: &dyn HashPredictor| {
            let mut states = states();
            let tables = predictor.decode(&mut states.iter_mut().collect::<Vec<_>>(), &[&[3], &[9, 4]]).unwrap();
            tables.iter().map(|table| (table.all_experts().to_vec(), table.all_alphas().to_vec())).collect::<Vec<_>>()
        };
        assert_eq!(steps(&*candidate), steps(&*serving));
    }

    /// A node could not stop while it learns, or would find half a file where it looks for a whole one.
    #[test]
    fn it_can_be_given_up() {
        let (dir, from, _) = trained(Net::Transformer);
        let (to, known) = (dir.path().join("candidate.safetensors"), labels(40, 3, 1));
        let parts = (&known[..], &known[..]);
        let stop = &mut |_| ControlFlow::Break(());
        let ended = further(&from, (&shape(), MODEL), parts, &FurtherOptions::default(), &to, stop);
        assert!(matches!(ended, Err(PredictorError::GivenUp)));
        assert!(!to.exists());
    }

    /// A node would start to learn, and fail hours later.
    #[test]
    fn what_cannot_learn_on_says_so() {
        for (net, name) in [(Net::Table, "`table`"), (Net::Lstm, "`lstm`")] {
            let (_dir, from, _) = trained(net);
            let refused = check_trainable(&from, &shape(), MODEL).unwrap_err();
            assert!(refused.to_string().contains(name), "{refused}");
        }
        let (_dir, from, _) = trained(Net::Transformer);
        check_trainable(&from, &shape(), MODEL).unwrap();
        assert!(matches!(check_trainable(&from, &shape(), Digest([8; 32])), Err(PredictorError::Model { .. })));
    }
}
