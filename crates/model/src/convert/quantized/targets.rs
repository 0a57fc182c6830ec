//! Which matrices a group of compressed-tensors is for: all linear layers, one by its name, or those whose names a pattern fits.
//! What is to be left as it is is named the same way.

use std::path::Path;

use fancy_regex::Regex;
use serde_json::Value;

use crate::ModelError;

const FIELD: &str = "config_groups.targets";
/// What all matrices here are to PyTorch.
const LINEAR: &str = "Linear";
/// What a pattern begins with.
const PATTERN: &str = "re:";

/// The targets of one group.
#[derive(Clone, Debug)]
pub(super) struct Targets(Vec<Target>);

#[derive(Clone, Debug)]
enum Target {
    Linear,
    Named(String),
    /// With its text as the config has it.
    Pattern(String, Regex),
}

impl Targets {
    /// Those of formats without groups.
    pub(super) fn all() -> Self {
        Self(vec![Target::Linear])
    }

    /// Those of a group, at least one; `path` is for messages.
    pub(super) fn of_group(found: &Value, path: &Path) -> Result<Self, ModelError> {
        match found.as_array().is_some_and(Vec::is_empty) {
            true => Err(refused(FIELD, found.to_string(), "one at least: no matrix is of this group", path)),
            false => Self::read(FIELD, found, path),
        }
    }

    /// Reads a field; `path` is for messages.
    pub(super) fn read(field: &'static str, found: &Value, path: &Path) -> Result<Self, ModelError> {
        let refused = |expected: &str| refused(field, found.to_string(), expected, path);
        let texts = found.as_array().ok_or_else(|| refused("a list of names and patterns"))?;
        let target = |text: &Value| match text.as_str() {
            None => Err(refused("a list of names and patterns")),
            Some(LINEAR) => Ok(Target::Linear),
            Some(text) => match text.strip_prefix(PATTERN) {
                None => Ok(Target::Named(text.to_owned())),
                // Software looks for it where a name begins, and not where it ends.
                Some(pattern) => match Regex::new(&format!("^(?:{pattern})")) {
                    Ok(regex) => Ok(Target::Pattern(text.to_owned(), regex)),
                    Err(error) => Err(refused(&format!("regular expressions behind {PATTERN} ({error})"))),
                },
            },
        };
        Ok(Self(texts.iter().map(target).collect::<Result<_, _>>()?))
    }

    /// Whether the group is for this matrix. A pattern that takes too long to be sure of fits nothing.
    pub(super) fn fit(&self, matrix: &str) -> bool {
        self.0.iter().any(|target| match target {
            Target::Linear => true,
            Target::Named(name) => name == matrix,
            Target::Pattern(_, regex) => regex.is_match(matrix).unwrap_or(false),
        })
    }

    /// The error that the group is for none of the matrices.
    pub(super) fn fit_none(&self, path: &Path) -> ModelError {
        let found = format!("{:?}", self.texts().collect::<Vec<_>>());
        let expected = format!("{LINEAR}, or one that fits a matrix that has fewer bits: these fit none");
        refused(FIELD, found, &expected, path)
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|target| match target {
            Target::Linear => LINEAR,
            Target::Named(text) | Target::Pattern(text, _) => text,
        })
    }
}

/// The error that a matrix is stored in fewer bits and no group is for it.
pub(super) fn fit_nothing<'a>(all: impl Iterator<Item = &'a Targets>, matrix: &str, path: &Path) -> ModelError {
    let found = format!("{:?}", all.flat_map(Targets::texts).collect::<Vec<_>>());
    refused(FIELD, found, &format!("one that fits {matrix}, which has fewer bits"), path)
}

fn refused(field: &'static str, found: String, expected: &str, path: &Path) -> ModelError {
    ModelError::Config { path: path.to_owned(), field, found, expected: expected.to_owned() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A matrix would be taken for one of another group, or a model be refused that other software reads.
    #[test]
    fn names_and_patterns_fit_as_other_software_has_it() {
        let matrix = "model.layers.1.mlp.experts.12.up_proj";
        for (target, fits) in [
            ("Linear", true),
            (matrix, true),
            ("up_proj", false),
            ("Embedding", false),
            ("re:.*up_proj", true),
            ("re:.*up_proj$", true),
            ("re:up_proj", false),
            (r"re:model\.layers\.\d+\.mlp\.experts\.1", true),
            (r"re:.*experts\.1\.up_proj", false),
            (r"re:^(?!.*self_attn).*_proj$", true),
            (r"re:^(?!.*mlp).*_proj$", false),
        ] {
            let targets = Targets::of_group(&json!(["none", target]), Path::new("config.json")).unwrap();
            assert_eq!(targets.fit(matrix), fits, "{target}");
        }
        for (found, expected) in [
            (json!(null), "config_groups.targets is null, expected a list"),
            (json!([1]), "config_groups.targets is [1], expected a list"),
            (json!([]), "config_groups.targets is [], expected one at least"),
            (json!(["re:("]), "expected regular expressions behind re:"),
        ] {
            let error = Targets::of_group(&found, Path::new("config.json")).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
