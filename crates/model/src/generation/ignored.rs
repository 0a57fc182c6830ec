//! What a generation config may ask for that is not served. Such a model is served all the same; who runs it is told by
//! name, since its answers differ from transformers'.

use serde_json::{Map, Value};

use super::fields::shown;

/// Fields that change answers, each with the number that changes nothing. Nothing changes where one is missing, null,
/// false or empty, either.
const UNSERVED: &[(&str, Option<f64>)] = &[
    ("bad_words_ids", None),
    ("constraints", None),
    ("diversity_penalty", Some(0.0)),
    ("dola_layers", None),
    ("encoder_no_repeat_ngram_size", Some(0.0)),
    ("encoder_repetition_penalty", Some(1.0)),
    ("epsilon_cutoff", Some(0.0)),
    ("eta_cutoff", Some(0.0)),
    ("exponential_decay_length_penalty", None),
    ("force_words_ids", None),
    ("forced_decoder_ids", None),
    ("guidance_scale", Some(1.0)),
    ("max_time", None),
    ("no_repeat_ngram_size", Some(0.0)),
    ("num_beam_groups", Some(1.0)),
    ("num_beams", Some(1.0)),
    ("num_return_sequences", Some(1.0)),
    ("penalty_alpha", Some(0.0)),
    ("sequence_bias", None),
    ("stop_strings", None),
    ("token_healing", None),
    ("top_h", Some(1.0)),
    ("typical_p", Some(1.0)),
    ("watermarking_config", None),
];

/// Fields that `GenerationConfig::read` takes.
const SERVED: &[&str] = &[
    "begin_suppress_tokens",
    "bos_token_id",
    "decoder_start_token_id",
    "do_sample",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "min_p",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
];

/// Fields that change no answer: where the file comes from, what else is returned, how beams that are not searched would
/// be weighed, and ways to the same answer in less time.
const WITHOUT_EFFECT: &[&str] = &[
    "_commit_hash",
    "_from_model_config",
    "_original_object_hash",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "disable_compile",
    "early_stopping",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "return_legacy_cache",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
];

/// So many are named.
const NAMED_MAX: usize = 32;

/// What a file asks for in vain, as `num_beams is 4`. Where `is_all_of_generation`, each of its fields is about
/// generation, so that one which nobody here knows is named, too.
pub(super) fn ignored(json: &Map<String, Value>, is_all_of_generation: bool) -> Vec<String> {
    let says_something = |(name, value): &(&String, &Value)| {
        let name = name.as_str();
        match UNSERVED.iter().find(|(unserved, _)| *unserved == name) {
            Some((_, neutral)) => !is_empty(value) && (neutral.is_none() || value.as_f64() != *neutral),
            None => {
                is_all_of_generation && !is_empty(value) && !SERVED.contains(&name) && !WITHOUT_EFFECT.contains(&name)
            }
        }
    };
    let said = json.iter().filter(says_something).map(|(name, value)| format!("{name} is {}", shown(value)));
    let mut said: Vec<String> = said.collect();
    // A file has its fields in any order.
    said.sort();
    said.truncate(NAMED_MAX);
    said
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A model whose answers differ from transformers' would be served without a word, or every model with a warning.
    #[test]
    fn what_changes_answers_is_named() {
        let found = |json: Value, is_all| ignored(json.as_object().expect("an object"), is_all);
        let neutral = json!({
            "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1, "min_p": null,
            "bad_words_ids": [], "token_healing": false, "sequence_bias": {}, "stop_strings": "",
            "length_penalty": 2.0, "early_stopping": true, "use_cache": true, "transformers_version": "5.0.0",
            "eos_token_id": [1, 2], "suppress_tokens": [7], "do_sample": true, "unheard_of": null,
        });
        assert!(found(neutral, true).is_empty());
        let unserved = json!({
            "num_beams": 4, "encoder_repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[7]],
            "stop_strings": ["\n"], "unheard_of": 1, "repetition_penalty": 1.2, "min_p": 0.1,
        });
        let named = [
            "bad_words_ids is [[7]]",
            "encoder_repetition_penalty is 1.2",
            "no_repeat_ngram_size is 3",
            "num_beams is 4",
        ];
        let named = [&named[..], &["stop_strings is [\"\\n\"]"]].concat();
        assert_eq!(found(unserved.clone(), false), named, "config.json has other fields");
        assert_eq!(found(unserved, true), [&named[..], &["unheard_of is 1"]].concat());
    }
}
