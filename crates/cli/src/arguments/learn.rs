//! How a predictor-node learns from traffic.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;
use sida_model::Checkpoint;
use sida_predictor::{FILE_NAME, HashPredictor};
use sida_predictor_node::LearnConfig;

use super::predictor;
use crate::{bad_configuration::BadConfiguration, share, whole_number};

/// Labels that are kept take about 50 bytes for each token and MoE layer.
#[derive(Args)]
pub(crate) struct LearnArguments {
    /// Learn from traffic: coordinators tell what their routers chose for prompts in `exact`, and once a predictor that has learnt
    /// on from that is better, it serves. Needs --learn-dir
    #[arg(long)]
    learn: bool,
    /// With --learn: where what was learnt is kept. At its start the node serves by what it finds there, if it is this model's
    #[arg(long, value_name = "DIR")]
    learn_dir: Option<PathBuf>,
    /// With --learn: tokens of traffic that are kept to learn from; a training begins when a quarter of that is new
    #[arg(long, value_name = "N", default_value_t = 1 << 18, value_parser = whole_number::within::<u64>(4096..=1 << 24))]
    learn_tokens_max: u64,
    /// With --learn: the share of one processor that training takes
    #[arg(long, value_name = "SHARE", default_value = "25%", value_parser = share::parse)]
    learn_cpu_share: f64,
}

impl LearnArguments {
    /// The predictor to serve, and how it learns: that of `file`, or what was learnt before.
    pub(crate) fn open(
        &self,
        file: PathBuf,
        checkpoint: &Arc<Checkpoint>,
    ) -> anyhow::Result<(Arc<dyn HashPredictor>, Option<LearnConfig>)> {
        let dir = match (&self.learn_dir, self.learn) {
            (Some(dir), true) => dir.clone(),
            (None, true) => {
                return Err(
                    BadConfiguration::new("--learn needs --learn-dir, a directory to keep what is learnt").into()
                );
            }
            (Some(_), false) => {
                return Err(BadConfiguration::new("--learn-dir is for --learn: without it nothing is learnt").into());
            }
            (None, false) => return Ok((predictor::open(&file, checkpoint)?, None)),
        };
        let (file, predictor) = match learnt(&dir, checkpoint) {
            Some(learnt) => learnt,
            None => (file.clone(), predictor::open(&file, checkpoint)?),
        };
        let (tokens_max, cpu_share) = (self.learn_tokens_max as usize, self.learn_cpu_share);
        let learn = LearnConfig { file, dir, tokens_max, cpu_share };
        learn.check(checkpoint.config(), checkpoint.digest())?;
        Ok((predictor, Some(learn)))
    }
}

/// What was learnt before, if it can be used.
fn learnt(dir: &Path, checkpoint: &Arc<Checkpoint>) -> Option<(PathBuf, Arc<dyn HashPredictor>)> {
    let file = dir.join(FILE_NAME);
    if !file.exists() {
        return None;
    }
    match predictor::open(&file, checkpoint) {
        Ok(predictor) => {
            tracing::info!(file = %file.display(), digest = %predictor.digest(), "serving what was learnt from traffic");
            Some((file, predictor))
        }
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "what was learnt from traffic cannot be used, and begins anew"
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        learn: LearnArguments,
    }

    /// A node that starts again would forget all that it has learnt, serve what was learnt for another model, or learn nothing
    /// for want of a flag or a directory without a word, or say that it listens before it ends.
    #[test]
    fn it_goes_on_from_what_was_learnt() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/switch-tiny-64");
        let checkpoint = Checkpoint::open(&model).expect("a model");
        let beside = predictor::default_file(&checkpoint);
        let dir = tempfile::tempdir().expect("a directory");
        let shown = dir.path().display().to_string();
        let open = |flags: &[&str]| {
            let flags = std::iter::once("sida").chain(flags.iter().copied());
            Command::try_parse_from(flags).expect("flags").learn.open(beside.clone(), &checkpoint)
        };
        let refused = |flags: &[&str]| open(flags).err().expect("an error").to_string();
        assert!(open(&[]).expect("a predictor").1.is_none());
        assert!(refused(&["--learn-dir", &shown]).contains("--learn-dir is for --learn"));
        assert!(refused(&["--learn"]).contains("--learn needs --learn-dir"));
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("a file");
        assert!(refused(&["--learn", "--learn-dir", &file.display().to_string()]).contains("cannot learn in"));
        let flags = ["--learn", "--learn-dir", &shown, "--learn-cpu-share", "50%"];
        let config = |file: &Path| LearnConfig {
            file: file.to_owned(),
            dir: dir.path().to_owned(),
            tokens_max: 1 << 18,
            cpu_share: 0.5,
        };
        assert_eq!(open(&flags).expect("a predictor").1, Some(config(&beside)));
        let learnt = dir.path().join(FILE_NAME);
        std::fs::copy(&beside, &learnt).expect("a file");
        assert_eq!(open(&flags).expect("a predictor").1, Some(config(&learnt)));
        std::fs::write(&learnt, "cut").expect("a file");
        assert_eq!(open(&flags).expect("a predictor").1, Some(config(&beside)));
    }
}
