//! Commands that run and end, and what they say when they cannot.

use std::process::Output;

use sida_tests::binary::{command, repository};

/// Exit code of a bad configuration: EX_USAGE.
const USAGE: i32 = 64;

fn run(arguments: &[&str]) -> Output {
    command().args(arguments).current_dir(repository()).output().expect("sida runs")
}

/// The first command of the README would not answer.
#[test]
fn ask_answers() {
    let output = run(&["ask", "sst2 sentence: a gorgeous , witty , seductive movie ."]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.lines().next(), Some("positive"), "{text}");
}

/// Scripts could not read an answer.
#[test]
fn ask_answers_in_json() {
    let output = run(&["ask", "--json", "sst2 sentence: flat and dull ."]);
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(output.status.success() && answer.is_object(), "{answer}");
}

/// A wrong configuration would start half a node, or end without saying what is wrong.
#[test]
fn bad_configurations_are_named() {
    for (arguments, named) in [
        (&["ask", "--model", "no/such/model", "x"][..], "no/such/model"),
        (&["ask", "--expert-memory", "7", "x"], "expert-memory"),
        (&["ask", "--expert-memory", "many", "x"], "many"),
        (&["expert-node", "--static", "no/such/file", "--name", "e0"], "no/such/file"),
        (&["up", "--listen", "nowhere"], "nowhere"),
        (&["inspect", "tests/data/parity/refused-gated"], "gated-gelu"),
    ] {
        let output = run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{arguments:?}");
        assert!(said.contains(named), "{arguments:?}: {said}");
        assert!(!said.contains("panicked"), "{arguments:?}: {said}");
    }
    assert_eq!(run(&["ask", "--expert-memory", "7", "x"]).status.code(), Some(USAGE));
}
