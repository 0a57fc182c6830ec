//! A table without lines, as a person reads it and a script can split it. Printed by `status`, `bench`,
//! `eval`, `inspect` and `train-predictor`.

use comfy_table::{Cell, Row, Table, presets};

/// Rows under a header, in columns as wide as their widest cell.
pub(crate) struct PlainTable(Table);

impl PlainTable {
    /// An empty table; no header line where `header` is empty.
    pub(crate) fn new<'a>(header: impl IntoIterator<Item = &'a str>) -> Self {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        let header: Vec<Cell> = header.into_iter().map(Cell::new).collect();
        if !header.is_empty() {
            table.set_header(header);
        }
        Self(table)
    }

    /// Appends a row.
    pub(crate) fn row(&mut self, row: impl Into<Row>) {
        self.0.add_row(row);
    }

    /// The lines, without the padding that cells have at both ends, each ending in a newline.
    pub(crate) fn draw(&self) -> String {
        let lines = self.0.lines();
        lines.map(|line| format!("{}\n", line.strip_prefix(' ').unwrap_or(&line).trim_end())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_no_padding_at_their_ends() {
        // Broken: every line would end in blanks and wrap on a narrow terminal.
        let mut table = PlainTable::new(["a", "b"]);
        table.row(["long one", "1"]);
        assert_eq!(table.draw(), "a         b\nlong one  1\n");
        let mut table = PlainTable::new([]);
        table.row(["x", ""]);
        assert_eq!(table.draw(), "x\n");
    }
}
