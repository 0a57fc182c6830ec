//! A negative value of a flag, as `--top-k -1`: clap takes what begins with `-` for a flag that nobody knows. No flag of ours
//! begins with a digit, so such a word is the value of the flag before it, and is refused by whoever reads that flag: in
//! words of what it takes. Called by `command_line::parse`.

use std::ffi::OsString;

/// `arguments` with each word such as `-1` or `-5s` attached to the flag before it.
pub(crate) fn attached(arguments: Vec<OsString>) -> Vec<OsString> {
    let mut attached: Vec<OsString> = Vec::with_capacity(arguments.len());
    let mut only_words = false;
    for argument in arguments {
        only_words |= argument == "--";
        match attached.last_mut().filter(|before| !only_words && is_negative(&argument) && is_bare_flag(before)) {
            Some(flag) => {
                flag.push("=");
                flag.push(argument);
            }
            None => attached.push(argument),
        }
    }
    attached
}

fn is_negative(argument: &OsString) -> bool {
    let text = argument.to_str().and_then(|text| text.strip_prefix('-'));
    text.is_some_and(|text| text.starts_with(|first: char| first.is_ascii_digit() || first == '.'))
}

fn is_bare_flag(argument: &OsString) -> bool {
    argument.to_str().is_some_and(|text| text.len() > 2 && text.starts_with("--") && !text.contains('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_value_goes_with_its_flag() {
        // Broken: `--max-tokens -1` would be answered by advice on how to write something else.
        for (line, expected) in [
            ("ask --max-tokens -1 x", "ask --max-tokens=-1 x"),
            ("up --drain -5s --threads -.5", "up --drain=-5s --threads=-.5"),
            ("ask --seed=3 -1", "ask --seed=3 -1"),
            ("ask --json -x", "ask --json -x"),
            ("ask -1 -2", "ask -1 -2"),
            ("ask --top-k -- -1 --top-p -2", "ask --top-k -- -1 --top-p -2"),
        ] {
            let words = line.split(' ').map(OsString::from).collect();
            assert_eq!(attached(words), expected.split(' ').collect::<Vec<_>>(), "{line}");
        }
    }
}
