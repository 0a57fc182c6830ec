//! Reads labelled data: a table of columns between tabs under a header, as GLUE's files are, or a JSON object a line, as
//! SuperGLUE's are. Which of them a file is, shows its first character.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde_json::{Map, Value};
use sida_telemetry::counted;

use crate::{
    bad_configuration::BadConfiguration,
    commands::eval::record::{EXAMPLES_MAX, Place, Record},
    text_file,
};

/// Some files of tables begin with it.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// The examples of a file, `most` at most, of which `paths` will be asked for.
pub(crate) fn read(file: &Path, paths: &[&str], most: usize) -> Result<Vec<Record>, BadConfiguration> {
    records(&file.display().to_string(), &text_file::read(file)?, paths, most)
}

/// The examples of a file's content. Blank lines are left out.
fn records(file: &str, content: &str, paths: &[&str], most: usize) -> Result<Vec<Record>, BadConfiguration> {
    let content = content.strip_prefix(BYTE_ORDER_MARK).unwrap_or(content);
    let file: Arc<str> = file.into();
    let place = |line: usize| Place { file: file.clone(), line };
    let lines = content.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).zip(1..);
    let mut lines = lines.filter(|(line, _)| !line.trim().is_empty()).peekable();
    let expected = "a table under a header, with tabs between columns, or a JSON object a line";
    let Some(&(first, number)) = lines.peek() else {
        return Err(BadConfiguration::new(format!("{file} is empty, expected {expected}")));
    };
    let columns = match first.trim_start().starts_with('{') {
        true => None,
        false => Some(header(&place(number), first)?),
    };
    let mut records = Vec::new();
    for (line, number) in lines.skip(usize::from(columns.is_some())) {
        if records.len() >= most {
            break;
        }
        let place = place(number);
        let object = match &columns {
            Some(names) => row(&place, names, line)?,
            None => object(&place, line)?,
        };
        records.extend(Record::expand(place, object, paths)?);
        if records.len().min(most) > EXAMPLES_MAX {
            let message = format!("{file} has more than {EXAMPLES_MAX} examples: ask for fewer by --examples");
            return Err(BadConfiguration::new(message));
        }
    }
    records.truncate(most);
    if records.is_empty() {
        return Err(BadConfiguration::new(format!("{file} has no example, expected {expected}")));
    }
    Ok(records)
}

fn object(place: &Place, line: &str) -> Result<Map<String, Value>, BadConfiguration> {
    serde_json::from_str(line).map_err(|error| BadConfiguration::because(format!("{place} is no JSON object"), error))
}

/// The names of the columns.
fn header(place: &Place, line: &str) -> Result<Vec<String>, BadConfiguration> {
    let names: Vec<String> = line.split('\t').map(|name| name.trim().to_owned()).collect();
    let mut seen = BTreeMap::new();
    for (number, name) in (1..).zip(&names) {
        if let Some(earlier) = seen.insert(name, number) {
            let message = format!("{place}: columns {earlier} and {number} are both called {name:?}");
            return Err(BadConfiguration::new(message));
        }
    }
    Ok(names)
}

/// A line of a table. Quotes are text like any other: sentences of these files begin or end with one.
fn row(place: &Place, names: &[String], line: &str) -> Result<Map<String, Value>, BadConfiguration> {
    let cells: Vec<&str> = line.split('\t').collect();
    if cells.len() != names.len() {
        let (found, expected) = (counted(cells.len(), "column"), names.len());
        return Err(BadConfiguration::new(format!(
            "{place} has {found}, expected the {expected} of the header: {}",
            names.join(", ")
        )));
    }
    Ok(names.iter().cloned().zip(cells.into_iter().map(|cell| Value::String(cell.to_owned()))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(content: &str, field: &str, most: usize) -> Vec<(usize, String)> {
        let records = records("data", content, &[field], most).unwrap();
        records.iter().map(|record| (record.place.line, record.text(field).unwrap())).collect()
    }

    #[test]
    fn tables_are_read_by_their_header() {
        // Would break: MRPC's file, which begins with a mark and has quotes and ends of line of another system, is refused,
        // or a sentence swallows the next one.
        let table = "\u{feff}Quality\t#1 String\r\n1\ta \"quoted\r\n\r\n0\t  b  \r\n";
        assert_eq!(texts(table, "#1 String", 9), [(2, "a \"quoted".into()), (4, "b".into())]);
        assert_eq!(texts(table, "Quality", 1), [(2, "1".into())]);
    }

    #[test]
    fn objects_are_read_a_line_each() {
        // Would break: the first examples of a file are other ones than were asked for.
        let lines = "{\"a\": [{\"t\": \"1\"}, {\"t\": \"2\"}]}\n\n{\"a\": [{\"t\": \"3\"}]}\n";
        let all = [(1, "1".to_owned()), (1, "2".to_owned()), (3, "3".to_owned())];
        assert_eq!(texts(lines, "a.t", 9), all);
        assert_eq!(texts(lines, "a.t", 1), all[..1]);
        // What comes after the last example that is asked for is not looked at.
        assert_eq!(texts("{\"t\": \"1\"}\nno JSON", "t", 1), [(1, "1".into())]);
    }

    #[test]
    fn files_that_are_neither_are_refused() {
        // Would break: an empty file gives figures of nothing, or a broken line is left out without a word.
        for (content, told) in [
            ("", "data is empty, expected a table under a header"),
            ("\n \n", "data is empty"),
            ("sentence\tlabel\n", "data has no example"),
            ("{\"a\": []}\n", "data has no example"),
            ("a\ta\nx\ty\n", "data line 1: columns 1 and 2 are both called \"a\""),
            ("a\tb\n1\t2\n1\n", "data line 3 has 1 column, expected the 2 of the header: a, b"),
            ("a\tb\n1\t2\t3\n", "data line 2 has 3 columns"),
            ("{\"a\": 1}\n[1]\n", "data line 2 is no JSON object"),
            ("{\"a\": 1\n", "data line 1 is no JSON object"),
        ] {
            let refused = records("data", content, &["a.b"], 9).unwrap_err().to_string();
            assert!(refused.contains(told), "{content:?}: {refused}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        // Would break: a typing error in a path is told without the path.
        let refused = read(Path::new("/no/such/file.tsv"), &["a"], 1).unwrap_err().to_string();
        assert!(refused.contains("/no/such/file.tsv"), "{refused}");
    }
}
