//! A text with gaps for the fields of a line: `sst2 sentence: {sentence}`. Given by `--template` or by a task, filled in by
//! [`crate::commands::eval::task`].

use std::{fmt, str::FromStr};

/// What a prompt is made by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// A field's name, without blanks around it.
    Field(String),
}

impl Template {
    /// The fields that it names, in order.
    pub(crate) fn fields(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Field(name) => Some(name.as_str()),
            Part::Text(_) => None,
        })
    }

    /// The text with the value of each field in its gap, or the first refusal of a value.
    pub(crate) fn fill<E>(&self, value: impl Fn(&str) -> Result<String, E>) -> Result<String, E> {
        let part = |part: &Part| match part {
            Part::Text(text) => Ok(text.clone()),
            Part::Field(name) => value(name),
        };
        self.0.iter().map(part).collect()
    }
}

impl FromStr for Template {
    type Err = String;

    /// `{name}` is a field, whose name may have blanks within; `{{` and `}}` are braces.
    fn from_str(text: &str) -> Result<Self, String> {
        let (mut parts, mut plain, mut rest) = (Vec::new(), String::new(), text);
        while let Some(at) = rest.find(['{', '}']) {
            plain.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some((brace, after)) = [("{", "{{"), ("}", "}}")].iter().find(|(_, twice)| rest.starts_with(twice)) {
                plain.push_str(brace);
                rest = &rest[after.len()..];
                continue;
            }
            let gap = rest.strip_prefix('{').ok_or("a } without its {; }} is a brace of the text")?;
            let end = gap.find('}').ok_or("a { without its }; {{ is a brace of the text")?;
            let name = gap[..end].trim();
            if name.is_empty() || name.contains('{') {
                return Err(format!("{{{}}} is no field, expected its name", &gap[..end]));
            }
            parts.extend((!plain.is_empty()).then(|| Part::Text(std::mem::take(&mut plain))));
            parts.push(Part::Field(name.to_owned()));
            rest = &gap[end + 1..];
        }
        plain.push_str(rest);
        parts.extend((!plain.is_empty()).then_some(Part::Text(plain)));
        let template = Self(parts);
        if template.fields().next().is_none() {
            return Err("no field, expected one as {text}: every prompt would be the same".to_owned());
        }
        Ok(template)
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|part| match part {
            Part::Text(text) => f.write_str(&text.replace('{', "{{").replace('}', "}}")),
            Part::Field(name) => write!(f, "{{{name}}}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_filled_with_fields() {
        // Would break: a model is asked with the names of the fields, or a brace cannot be said.
        let text = "mrpc {{x}} sentence1: {#1 String} sentence2: { #2 String }.";
        let template: Template = text.parse().unwrap();
        assert_eq!(template.fields().collect::<Vec<_>>(), ["#1 String", "#2 String"]);
        let filled = template.fill(|name| Ok::<_, ()>(name.to_uppercase()));
        assert_eq!(filled.unwrap(), "mrpc {x} sentence1: #1 STRING sentence2: #2 STRING.");
        assert_eq!(template.fill(|name| Err::<String, _>(name.to_owned())), Err("#1 String".to_owned()));
        assert_eq!(template.to_string().parse(), Ok(template));
    }

    #[test]
    fn what_is_no_template_is_refused() {
        // Would break: a typing error makes every prompt the same, and the figures are of that.
        for (text, told) in [
            ("no gap", "no field"),
            ("{{text}}", "no field"),
            ("{text", "without its }"),
            ("text}", "without its {"),
            ("{}", "is no field"),
            ("{ }", "is no field"),
            ("{a {b}}", "is no field"),
            ("", "no field"),
        ] {
            let refused = text.parse::<Template>().unwrap_err();
            assert!(refused.contains(told), "{text}: {refused}");
        }
    }
}
