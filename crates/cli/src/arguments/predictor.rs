//! Where hash tables come from.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use clap::Args;
use sida_cluster::{Cluster, Role};
use sida_coordinator::PredictorSource;
use sida_model::Checkpoint;
use sida_predictor::HashPredictor;

use crate::bad_configuration::BadConfiguration;

/// Runs without hash tables.
const OFF: &str = "off";
/// Asks the predictor-nodes of the cluster.
const NODES: &str = "nodes";

/// The same, with a file for the steps of a decoder whose net reads the encoder's output.
const NODES_AND: &str = "nodes:";

/// The predictor of a coordinator.
#[derive(Args, Clone, Debug)]
pub(crate) struct PredictorArguments {
    /// A predictor's file, `nodes` for the cluster's predictor-nodes, or `off` [default: the predictor-nodes if
    /// there are any, else predictor.safetensors beside the model if there is one; with --etcd the file goes first].
    /// If the predictor's decoder reads the encoder's output, the coordinator predicts its steps itself, also with
    /// `nodes`: by the file beside the model, or by the one of `nodes:FILE`
    #[arg(long, value_name = "FILE")]
    predictor: Option<String>,
}

impl PredictorArguments {
    /// The source that the flag names, or the best that there is.
    pub(crate) fn source(&self, checkpoint: &Arc<Checkpoint>, cluster: &Cluster) -> anyhow::Result<PredictorSource> {
        let has_nodes = !cluster.members_of(Role::PredictorNode).is_empty();
        let may_have_nodes = has_nodes || !cluster.is_fixed();
        let nodes_and = self.predictor.as_deref().and_then(|source| source.strip_prefix(NODES_AND));
        let named = nodes_and.map_or(self.predictor.as_deref(), |_| Some(NODES));
        match named {
            Some(OFF) => return Ok(PredictorSource::Off),
            Some(NODES) if may_have_nodes => return nodes(nodes_and.map(Path::new), checkpoint),
            Some(NODES) => {
                let message = "--predictor nodes: the cluster has no predictor-node";
                return Err(BadConfiguration::new(message).into());
            }
            Some(file) => return local(Path::new(file), checkpoint),
            None if has_nodes => return nodes(None, checkpoint),
            None => {}
        }
        let file = default_file(checkpoint);
        if file.try_exists().with_context(|| format!("cannot look for {}", file.display()))? {
            return local(&file, checkpoint);
        }
        if may_have_nodes {
            return nodes(None, checkpoint); // Predictor-nodes may join later.
        }
        tracing::info!("{} does not exist: nothing is preloaded; `sida train-predictor` makes one", file.display());
        Ok(PredictorSource::Off)
    }
}

/// The file of a model's own predictor.
pub(crate) fn default_file(checkpoint: &Checkpoint) -> PathBuf {
    checkpoint.dir().join(sida_predictor::FILE_NAME)
}

/// Opens a predictor's file. What does not fit may be the model and not the predictor: where a config.json does not even fit
/// its tensors, that is told.
pub(crate) fn open(file: &Path, checkpoint: &Arc<Checkpoint>) -> anyhow::Result<Arc<dyn HashPredictor>> {
    let refused = |error| match checkpoint.check_tensors() {
        Err(of_model) => anyhow::Error::new(of_model),
        Ok(()) => BadConfiguration::because("the predictor cannot be used", error).into(),
    };
    sida_predictor::open(file, checkpoint.config(), checkpoint.digest()).map_err(refused)
}

/// The predictor-nodes, but for steps that they cannot predict: where the decoder's net reads the encoder's output, this
/// process does, if it has the file.
fn nodes(file: Option<&Path>, checkpoint: &Arc<Checkpoint>) -> anyhow::Result<PredictorSource> {
    let beside = default_file(checkpoint);
    let predictor = match file {
        Some(file) => Some(open(file, checkpoint)?),
        None if beside.exists() => {
            // Nobody named it, and the nodes may have another.
            let opened = open(&beside, checkpoint).map_err(|error| format!("{error:#}"));
            opened.inspect_err(|error| tracing::warn!(error, "the predictor beside the model is not used")).ok()
        }
        None => None,
    };
    let reads_input = predictor.filter(|predictor| predictor.reads_input());
    Ok(reads_input.map_or(PredictorSource::Nodes, PredictorSource::NodesForPrompts))
}

fn local(file: &Path, checkpoint: &Arc<Checkpoint>) -> anyhow::Result<PredictorSource> {
    Ok(PredictorSource::Local(open(file, checkpoint)?))
}

#[cfg(test)]
mod tests {
    use sida_cluster::{Address, Member};

    use super::*;

    #[test]
    fn steps_that_nodes_cannot_predict_are_predicted_here() {
        // Would break: in a cluster with predictor-nodes the decoder's steps have no hints; or a file that was named is left out,
        // and one that nobody named keeps a coordinator from starting.
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/switch-tiny-64");
        let checkpoint = Checkpoint::open(&model).expect("a model");
        let (layers, experts) = (checkpoint.config().moe_layer_count(), checkpoint.config().num_experts);
        let member = |node: &str, role| {
            let address = Address::Grpc("127.0.0.1:1".to_owned());
            Member { node: node.into(), role, address, weight: 1.0 }
        };
        let members = vec![member("e", Role::ExpertNode), member("p", Role::PredictorNode)];
        let cluster = Cluster::fixed(members, layers, experts, 1).expect("a cluster");
        let source = |predictor: Option<&str>| {
            PredictorArguments { predictor: predictor.map(str::to_owned) }.source(&checkpoint, &cluster)
        };
        let file = default_file(&checkpoint);
        let (shown, named) = (file.display().to_string(), format!("nodes:{}", file.display()));
        for predictor in [None, Some("nodes"), Some(&named)] {
            assert!(matches!(source(predictor), Ok(PredictorSource::NodesForPrompts(_))), "{predictor:?}");
        }
        assert!(matches!(source(Some("off")), Ok(PredictorSource::Off)));
        assert!(matches!(source(Some(&shown)), Ok(PredictorSource::Local(_))));
        assert!(source(Some("nodes:no/such/file")).is_err());
    }
}
