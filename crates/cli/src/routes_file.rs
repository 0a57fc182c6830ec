//! Recorded routes from a file: CSV with a header, a row for each expert that a token went to. The columns `turn`, `phase` (0: a
//! prompt, 1: what was generated), `step` (the token), `layer` (the MoE layer, from 0), `slot` (0: the likeliest expert) and
//! `expert` are read; others are left alone, and so are lines that begin with `#`. Read by `bench` and `eval`.

use std::{fs::File, io::Read, path::Path};

use csv::{ReaderBuilder, StringRecord};
use sida_routing::{ExpertId, RecordedRoutes, TokenRoutes};
use sida_telemetry::counted;

use crate::bad_configuration::BadConfiguration;

/// A file beyond this is refused: twenty million rows or so.
const BYTES_MAX: u64 = 512 << 20;
/// No model that is known has more of these.
const LAYERS_MAX: usize = 1024;
const EXPERTS_MAX: usize = 4096;
const TOP_K_MAX: usize = 64;

/// What is read of a row, in the order in which rows are sorted, but for the expert.
const COLUMNS: [&str; 6] = ["turn", "phase", "step", "layer", "slot", "expert"];

/// What the routes are to be used with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Model {
    /// MoE layers.
    pub(crate) layers: usize,
    /// Experts of a layer.
    pub(crate) num_experts: usize,
    /// Experts of a token.
    pub(crate) top_k: usize,
}

/// What a file has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RoutesFile {
    /// The routes, as far as the model has such layers and so many experts of a token.
    pub(crate) routes: RecordedRoutes,
    /// How many layers the file has.
    pub(crate) layers: usize,
    /// How many experts of a token the file has at a layer.
    pub(crate) top_k: usize,
}

/// Reads the routes of a file for a `model`, or, without one, whatever is in it.
pub(crate) fn read(file: &Path, model: Option<Model>) -> Result<RoutesFile, BadConfiguration> {
    let shown = file.display();
    let unreadable = |error| BadConfiguration::because(format!("cannot read routes {shown}"), error);
    let refused = |problem| BadConfiguration::new(format!("routes {shown}: {problem}"));
    let opened = File::open(file).map_err(unreadable)?;
    let bytes = opened.metadata().map_err(unreadable)?.len();
    if bytes > BYTES_MAX {
        return Err(refused(format!("{bytes} bytes, at most {BYTES_MAX}")));
    }
    parse(opened.take(BYTES_MAX), model).map_err(refused)
}

/// A row of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    phase: u8,
    turn: u32,
    step: u32,
    layer: u16,
    slot: u16,
    expert: u16,
    line: u32,
}

fn parse(content: impl Read, model: Option<Model>) -> Result<RoutesFile, String> {
    let mut rows = rows(content, model.map_or(EXPERTS_MAX, |model| model.num_experts))?;
    rows.sort_unstable();
    if rows.is_empty() {
        return Err("has no row below its header".to_owned());
    }
    let most = |of: fn(&Row) -> u16| rows.iter().map(of).max().map_or(0, |most| usize::from(most) + 1);
    let (layers, top_k) = (most(|row| row.layer), most(|row| row.slot));
    if let Some(model) = model.filter(|model| model.layers > layers) {
        let (found, expected) = (counted(layers, "layer"), counted(model.layers, "MoE layer"));
        return Err(format!("has {found}, the model has {expected}"));
    }
    let (kept_layers, kept) = model.map_or((layers, top_k), |model| (model.layers, model.top_k.min(top_k)));
    let of = |phase: u8| -> Result<Vec<TokenRoutes>, String> {
        let tokens = rows.chunk_by(|a, b| (a.phase, a.turn, a.step) == (b.phase, b.turn, b.step));
        let cut = |mut token: TokenRoutes| {
            token.truncate(kept_layers);
            token.iter_mut().for_each(|experts| experts.truncate(kept));
            token
        };
        tokens.filter(|token| token[0].phase == phase).map(|rows| Ok(cut(token(rows, layers)?))).collect()
    };
    let routes = RecordedRoutes::new(of(0)?, of(1)?).expect("there are rows, and all tokens have the same layers");
    Ok(RoutesFile { routes, layers, top_k })
}

/// The routes of a token from its sorted rows. It may have none at a layer.
fn token(rows: &[Row], layers: usize) -> Result<TokenRoutes, String> {
    let mut token: TokenRoutes = vec![Vec::new(); layers];
    for row in rows {
        let (experts, Row { line, slot, layer, expert, .. }) = (&mut token[usize::from(row.layer)], *row);
        let of = || format!("layer {layer} of turn {}, phase {}, step {}", row.turn, row.phase, row.step);
        if usize::from(slot) != experts.len() {
            let expected = experts.len();
            return Err(format!(
                "line {line}: slot {slot} of {}, expected slot {expected}: from 0 up, each once",
                of()
            ));
        }
        if experts.contains(&ExpertId(expert)) {
            return Err(format!("line {line}: expert {expert} of {} a second time, expected each once", of()));
        }
        experts.push(ExpertId(expert));
    }
    Ok(token)
}

/// The rows as they come.
fn rows(content: impl Read, experts: usize) -> Result<Vec<Row>, String> {
    let mut reader = ReaderBuilder::new().comment(Some(b'#')).from_reader(content);
    let header = reader.headers().map_err(|error| error.to_string())?.clone();
    let column = |name: &str| {
        let place = header.iter().position(|column| column.trim() == name);
        let found = || header.iter().collect::<Vec<_>>().join(", ");
        place.ok_or_else(|| format!("has no column `{name}` in its header, which is {:?}", shortened(&found())))
    };
    let mut columns = [0; COLUMNS.len()];
    for (place, name) in columns.iter_mut().zip(COLUMNS) {
        *place = column(name)?;
    }
    let (mut rows, mut record) = (Vec::new(), StringRecord::new());
    while reader.read_record(&mut record).map_err(|error| error.to_string())? {
        let line = record.position().map_or(0, csv::Position::line);
        let mut numbers = [0_u32; COLUMNS.len()];
        let below = [u32::MAX as usize, 2, u32::MAX as usize, LAYERS_MAX, TOP_K_MAX, experts];
        for (at, number) in numbers.iter_mut().enumerate() {
            let found = record.get(columns[at]).unwrap_or_default().trim();
            let parsed = found.parse::<u32>().ok().filter(|&number| (number as usize) < below[at]);
            *number = parsed.ok_or_else(|| {
                let (name, below, found) = (COLUMNS[at], below[at], shortened(found));
                format!("line {line}: column `{name}` is {found:?}, expected a whole number below {below}")
            })?;
        }
        let [turn, phase, step, layer, slot, expert] = numbers;
        rows.push(Row {
            phase: phase as u8,
            turn,
            step,
            layer: layer as u16,
            slot: slot as u16,
            expert: expert as u16,
            line: line as u32,
        });
    }
    Ok(rows)
}

/// As much of what was found as a person wants to see.
fn shortened(found: &str) -> String {
    const CHARACTERS: usize = 80;
    match found.char_indices().nth(CHARACTERS) {
        None => found.to_owned(),
        Some((end, _)) => format!("{}...", &found[..end]),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use sida_routing::{LayerId, recorded_routes::Phase};

    use super::*;

    /// Two tokens of a prompt and one that was generated, each with two experts at each of two layers; by layers, as recorders
    /// write them.
    pub(crate) const FILE: &str = "# recorded\nturn,phase,step,layer,slot,expert,weight\n\
        0,0,0,0,0,3,0.6\n0,0,0,0,1,1,0.4\n0,0,1,0,0,2,0.5\n0,0,1,0,1,0,0.5\n\
        0,0,0,1,0,1,0.6\n0,0,0,1,1,2,0.4\n0,0,1,1,0,0,0.5\n0,0,1,1,1,3,0.5\n\
        0,1,2,0,1,0,0.2\n0,1,2,0,0,1,0.8\n0,1,2,1,0,2,0.9\n0,1,2,1,1,3,0.1\n";

    fn parsed(content: &str, model: Option<Model>) -> Result<RoutesFile, String> {
        parse(content.as_bytes(), model)
    }

    fn experts(routes: &RecordedRoutes, phase: Phase, token: usize, layer: u16) -> Vec<u16> {
        routes.experts(phase, token, LayerId(layer)).iter().map(|expert| expert.0).collect()
    }

    #[test]
    fn rows_are_put_in_order() {
        // Would break: a token is replayed with the experts of another token or layer, or with the second choice as its first.
        let RoutesFile { routes, layers, top_k } = parsed(FILE, None).unwrap();
        assert_eq!((layers, top_k, routes.tokens(Phase::Prompt), routes.tokens(Phase::Decoding)), (2, 2, 2, 1));
        assert_eq!(experts(&routes, Phase::Prompt, 0, 1), [1, 2]);
        assert_eq!(experts(&routes, Phase::Prompt, 1, 0), [2, 0]);
        assert_eq!(experts(&routes, Phase::Decoding, 0, 0), [1, 0]);
    }

    #[test]
    fn a_smaller_model_has_the_first_layers_and_the_likeliest_experts() {
        // Would break: a model that was cut to a few blocks cannot be measured with the routes of the whole one.
        let model = Model { layers: 1, num_experts: 4, top_k: 1 };
        let RoutesFile { routes, layers, top_k } = parsed(FILE, Some(model)).unwrap();
        assert_eq!((layers, top_k, routes.layers(), routes.top_k()), (2, 2, 1, 1));
        assert_eq!(experts(&routes, Phase::Prompt, 1, 0), [2]);
    }

    #[test]
    fn a_token_may_have_no_experts_at_a_layer() {
        // Would break: the files of recorders are refused that leave out the last layer of a prompt, as what runs models does.
        let file = "turn,phase,step,layer,slot,expert\n0,0,0,0,0,3\n0,1,1,0,0,2\n0,1,1,1,0,1\n";
        let routes = parsed(file, None).unwrap().routes;
        assert_eq!((routes.layers(), experts(&routes, Phase::Prompt, 0, 0)), (2, vec![3]));
        assert!(experts(&routes, Phase::Prompt, 0, 1).is_empty());
        assert_eq!(experts(&routes, Phase::Decoding, 0, 1), [1]);
    }

    #[test]
    fn columns_may_come_in_any_order() {
        // Would break: the file of another recorder is read with its layers for experts.
        let file = "expert, slot ,layer,step,phase,turn\n5,0,0,0,1,0\n";
        assert_eq!(experts(&parsed(file, None).unwrap().routes, Phase::Decoding, 0, 0), [5]);
    }

    #[test]
    fn wrong_lines_are_named() {
        // Would break: a person with a file of a million rows does not learn which of them is wrong, or a wrong one is replayed
        // without a word.
        let header = "turn,phase,step,layer,slot,expert\n";
        let model = Model { layers: 2, num_experts: 4, top_k: 8 };
        for (content, named) in [
            (String::new(), "no column `turn`"),
            (header.to_owned(), "no row below its header"),
            ("turn,phase,step,layer,slot\n".to_owned(), "no column `expert` in its header"),
            (format!("{header}0,0,0,0,0,x\n"), "line 2: column `expert` is \"x\", expected a whole number below 4"),
            (
                format!("# comment\n{header}0,0,0,0,0,4\n"),
                "line 3: column `expert` is \"4\", expected a whole number below 4",
            ),
            (format!("{header}0,2,0,0,0,1\n"), "line 2: column `phase` is \"2\", expected a whole number below 2"),
            (format!("{header}0,0,0,0,-1,1\n"), "line 2: column `slot` is \"-1\""),
            (
                format!("{header}0,0,0,9999,0,1\n"),
                "line 2: column `layer` is \"9999\", expected a whole number below 1024",
            ),
            (format!("{header}0,0,0,0,0\n"), "line: 2"),
            (format!("{header}0,0,0,0,0,1\n"), "has 1 layer, the model has 2 MoE layers"),
            // A row twice, an expert twice, a slot that is left out.
            (
                format!("{header}0,0,0,1,0,1\n0,0,0,1,0,2\n"),
                "line 3: slot 0 of layer 1 of turn 0, phase 0, step 0, expected slot 1",
            ),
            (
                format!("{header}0,0,0,0,0,1\n0,1,7,1,0,1\n0,1,7,1,1,1\n"),
                "line 4: expert 1 of layer 1 of turn 0, phase 1, step 7",
            ),
            (format!("{header}0,0,0,1,1,1\n"), "line 2: slot 1 of layer 1 of turn 0, phase 0, step 0, expected slot 0"),
        ] {
            let error = parsed(&content, Some(model)).unwrap_err();
            assert!(error.contains(named), "{content:?}: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let absent = read(&dir.path().join("absent.csv"), None).unwrap_err();
        assert!(absent.to_string().contains("absent.csv"), "{absent}");
        let long = parsed(&format!("{header}0,0,0,0,0,{}\n", "9".repeat(1000)), None).unwrap_err();
        assert!(long.len() < 200, "{long}");
    }
}
