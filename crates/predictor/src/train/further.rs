//! A net that serves learns on from what routers chose for prompts since, from its own weights: the net of the stack that reads
//! prompts, which is the encoder's where there is one. What the file holds of the other stays as it is. Called by predictor-nodes,
//! on a thread that serves nobody.

use std::{ops::ControlFlow, path::Path, sync::Arc};

use rand::{SeedableRng, rngs::StdRng};
use sida_model::Stack;
use sida_routing::{Digest, Labels};

use super::{
    Recording, TrainOptions, TrainProgress,
    descent::{self, Descent, Learnt},
    lstm_net::LstmNet,
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

/// Refuses a predictor that cannot learn on: a table, or one of a model whose prompts go through no experts.
pub fn check_trainable(path: &Path, shape: &PredictorShape, model: Digest) -> Result<(), PredictorError> {
    crate::open_shape(path, shape.clone(), model)?;
    trainable(path, shape, model).map(drop)
}

fn trainable(path: &Path, shape: &PredictorShape, model: Digest) -> Result<Box<dyn Learnt>, PredictorError> {
    let refuse = |reason: &str| Err(PredictorError::NotTrainable { path: path.to_owned(), reason: reason.to_owned() });
    let (mut file, stack) = (PredictorFile::read(path, shape.clone(), model)?, shape.prompt_stack());
    if shape.layers(stack).is_empty() {
        return refuse("it would learn from prompts, and the encoder of this model has no experts");
    }
    Ok(match (file.metadata.net, stack) {
        (Net::Table, _) => {
            return refuse(
                "its net is `table`, which only counts; `sida train-predictor --net transformer` trains one that can",
            );
        }
        (Net::Transformer, Stack::Encoder) => Box::new(TransformerInTraining::from_file(&mut file)?),
        (Net::Transformer | Net::Lstm, stack) => Box::new(LstmNet::from_file(&mut file, stack)?),
    })
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
    let stack = shape.prompt_stack();
    if learnt.of_stack(stack).tokens() == 0 || tested.of_stack(stack).tokens() == 0 {
        return Err(PredictorError::Texts {
            reason: "labels to learn from and others to test with are both needed".to_owned(),
        });
    }
    let net = trainable(from, shape, model)?;
    let (epochs, batch_tokens) = (options.epochs, options.batch_tokens);
    let (learning_rate, seed) = (options.learning_rate, options.seed);
    let settings = TrainOptions { epochs, batch_tokens, learning_rate, seed, ..TrainOptions::default() };
    let descent = Descent { recording: &learnt, stack, options: &settings, workers: descent::workers(1)? };
    descent.run(&*net, &mut StdRng::seed_from_u64(seed), on_step)?;
    let file = PredictorFile::read(from, shape.clone(), model)?;
    let metadata = file.metadata.clone();
    let mut tensors = file.into_tensors();
    net.store(&mut tensors)?;
    tensors.write(&metadata, to)?;
    descent.workers[0].install(|| measured(to, &tested, to))?;
    crate::open_shape(to, shape.clone(), model)
}

/// Labels of prompts, as if the model had been run here.
fn recording(shape: &PredictorShape, model: Digest, labels: &[Arc<Labels>]) -> Recording {
    let [encoder, decoder] = match shape.prompt_stack() {
        Stack::Encoder => [labels, &[]],
        Stack::Decoder => [&[], labels],
    }
    .map(StackRecording::of_labels);
    Recording { model, shape: shape.clone(), encoder, decoder }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use sida_routing::{ExpertId, LabelsExtent, learning::is_better};

    use super::{
        super::{
            compare::compare,
            tests::{MODEL, decoder_only, recording, recording_decoder_only, shape, train_to, trained},
        },
        *,
    };

    /// A predictor that learns on, and what is recorded of prompts of its model.
    struct Learns {
        _dir: tempfile::TempDir,
        from: PathBuf,
        to: PathBuf,
        shape: PredictorShape,
        recording: fn(usize, u64) -> Recording,
    }

    impl Learns {
        /// The nets that can: of an encoder, and of a model that reads its prompts by its decoder.
        fn all() -> impl Iterator<Item = Self> {
            let behind = |net| {
                let (dir, from, _) = trained(net);
                Self { to: dir.path().join("candidate"), _dir: dir, from, shape: shape(), recording }
            };
            let alone = || {
                let dir = tempfile::tempdir().unwrap();
                let [from, to] = ["predictor", "candidate"].map(|name| dir.path().join(name));
                let recording = recording_decoder_only;
                train_to(&from, Net::Transformer, [recording(1500, 1), recording(100, 2)]);
                Self { _dir: dir, from, to, shape: decoder_only(), recording }
            };
            [Net::Transformer, Net::Lstm].into_iter().map(behind).chain(std::iter::once_with(alone))
        }

        /// What a recording says of prompts, with its experts renamed by `turn`.
        fn labels(&self, sequences: usize, seed: u64, turn: u16) -> Vec<Arc<Labels>> {
            let recording = (self.recording)(sequences, seed);
            let StackRecording { kept, sequences, experts, probabilities, .. } =
                recording.of_stack(self.shape.prompt_stack());
            let extent = LabelsExtent { layers: 2, num_experts: 4, kept: *kept };
            let of_sequence = |((tokens, experts), probabilities): ((&Vec<u32>, &Vec<ExpertId>), &Vec<f32>)| {
                let turned = experts.iter().map(|expert| ExpertId((expert.0 + turn) % 4)).collect();
                Arc::new(Labels::new(tokens.clone(), extent, turned, probabilities.clone()).unwrap())
            };
            sequences.iter().zip(experts).zip(probabilities).map(of_sequence).collect()
        }

        fn learn_on(
            &self,
            (learnt, tested): (&[Arc<Labels>], &[Arc<Labels>]),
            options: &FurtherOptions,
        ) -> Arc<dyn HashPredictor> {
            let go_on = &mut |_| ControlFlow::Continue(());
            further(&self.from, (&self.shape, MODEL), (learnt, tested), options, &self.to, go_on).unwrap()
        }
    }

    /// A net that learns on would begin as another one than serves, and have to learn again what it knew.
    #[test]
    fn it_begins_as_what_serves() {
        for learns in Learns::all() {
            let known = learns.labels(40, 3, 0);
            learns.learn_on((&known, &known), &FurtherOptions { epochs: 0, ..FurtherOptions::default() });
            let shape = &learns.shape;
            let tensors = |path: &Path| PredictorFile::read(path, shape.clone(), MODEL).unwrap().into_tensors();
            assert!(tensors(&learns.from) == tensors(&learns.to), "{shape:?}");
        }
    }

    /// A predictor would stay as bad as it is where routers choose otherwise than it has learnt, one that got worse would be
    /// taken for better, or what was measured before be lost.
    #[test]
    fn it_learns_what_changed() {
        for learns in Learns::all() {
            let shape = &learns.shape;
            let before = fs::read(&learns.from).unwrap();
            let (learnt, tested) = (learns.labels(600, 3, 1), learns.labels(60, 4, 1));
            let options = FurtherOptions { learning_rate: 0.01, ..FurtherOptions::default() };
            let candidate = learns.learn_on((&learnt, &tested), &options);
            let serving = crate::open_shape(&learns.from, shape.clone(), MODEL).unwrap();
            let compared = |tested: &[Arc<Labels>]| compare(&*serving, &*candidate, shape, tested).unwrap();
            let changed = compared(&tested);
            let share = |hits: u64| hits as f64 / changed.entries as f64;
            assert!(share(changed.serving) < 0.2 && share(changed.candidate) > 0.7, "{shape:?}: {changed:?}");
            assert!(is_better(&changed.gains));
            assert!(!is_better(&compared(&learns.labels(60, 4, 0)).gains), "where nothing has changed it is worse");
            assert_eq!(fs::read(&learns.from).unwrap(), before);
            assert_ne!(candidate.digest(), serving.digest());
            let rates = &candidate.hit_rates()[..2];
            assert!(rates.iter().all(|rate| rate.top1 > 0.6 && rate.tokens == changed.entries / 2), "{rates:?}");
        }
    }

    /// The net of the steps would be another one, or what was measured of it be lost: nobody told of them.
    #[test]
    fn a_decoder_behind_an_encoder_stays_as_it_was() {
        let learns = Learns::all().next().unwrap();
        let learnt = learns.labels(40, 3, 1);
        let candidate = learns.learn_on((&learnt, &learnt), &FurtherOptions::default());
        let serving = crate::open_shape(&learns.from, learns.shape.clone(), MODEL).unwrap();
        assert_eq!(candidate.hit_rates()[2], serving.hit_rates()[2]);
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
        for learns in Learns::all() {
            let known = learns.labels(40, 3, 1);
            let stop = &mut |_| ControlFlow::Break(());
            let model = (&learns.shape, MODEL);
            let ended = further(&learns.from, model, (&known, &known), &FurtherOptions::default(), &learns.to, stop);
            assert!(matches!(ended, Err(PredictorError::GivenUp)));
            assert!(!learns.to.exists());
        }
    }

    /// A node would start to learn, and fail hours later.
    #[test]
    fn what_cannot_learn_on_says_so() {
        let (_dir, table, _) = trained(Net::Table);
        let refused = check_trainable(&table, &shape(), MODEL).unwrap_err();
        assert!(refused.to_string().contains("`table`"), "{refused}");
        for learns in Learns::all() {
            check_trainable(&learns.from, &learns.shape, MODEL).unwrap();
            let of_another = check_trainable(&learns.from, &learns.shape, Digest([8; 32]));
            assert!(matches!(of_another, Err(PredictorError::Model { .. })));
        }
    }
}
