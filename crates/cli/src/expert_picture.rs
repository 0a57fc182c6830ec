//! Which experts woke up, as a small picture: one line per MoE layer, one cell per expert (or per few, where
//! a layer has more than fit). Printed by `ask` after its answer and by `status` for what is resident.
//!
//! ```text
//!   encoder 1  ··█·······█··░···········█····   3
//! ```

use std::fmt::Write;

/// Cells of a line; with the label and the count a line has 80 columns.
const CELLS: usize = 64;

/// What the output can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// Unicode in colour, for a terminal.
    Colour,
    /// Unicode without colour: `NO_COLOR` is set.
    Plain,
    /// Nothing but ASCII: a file or a pipe.
    Ascii,
}

/// One MoE layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LayerView {
    /// Whether the layer is one of the encoder's.
    pub(crate) encoder: bool,
    /// The layer's number within its stack, from 1.
    pub(crate) number: usize,
    /// The experts that rows went to.
    pub(crate) woken: Vec<u32>,
    /// The experts in memory afterwards.
    pub(crate) resident: Vec<u32>,
}

impl Style {
    /// What `is_terminal` and the environment's `NO_COLOR` (no-color.org: any value that is not empty) allow.
    pub(crate) fn of(is_terminal: bool, no_color: Option<&str>) -> Self {
        match (is_terminal, no_color) {
            (false, _) => Self::Ascii,
            (true, Some(value)) if !value.is_empty() => Self::Plain,
            (true, _) => Self::Colour,
        }
    }

    /// The style of standard output.
    pub(crate) fn of_stdout() -> Self {
        use std::io::IsTerminal;
        Self::of(std::io::stdout().is_terminal(), std::env::var("NO_COLOR").ok().as_deref())
    }

    /// `text` in one of the terminal's colours (an SGR code), where there are colours.
    pub(crate) fn paint(self, sgr: &str, text: &str) -> String {
        if self == Self::Colour { format!("\x1b[{sgr}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The picture of `layers` with `num_experts` each: lines of at most 80 columns, each ending in a newline.
pub(crate) fn draw(layers: &[LayerView], num_experts: usize, style: Style) -> String {
    let mut picture = String::new();
    for layer in layers {
        let stack = if layer.encoder { "encoder" } else { "decoder" };
        let cells = cells(layer, num_experts, style);
        let cells = style.paint(if layer.encoder { "36" } else { "35" }, &cells);
        // Writing to a String cannot fail.
        let _ = writeln!(picture, "{stack} {:<2} {cells} {:>3}", layer.number, layer.woken.len());
    }
    picture
}

/// The cells of one layer: as many experts share a cell as are needed to fit 64.
fn cells(layer: &LayerView, num_experts: usize, style: Style) -> String {
    let mut woken = vec![false; num_experts];
    let mut resident = vec![false; num_experts];
    mark(&mut woken, &layer.woken);
    mark(&mut resident, &layer.resident);
    let per_cell = num_experts.div_ceil(CELLS).max(1);
    let groups = woken.chunks(per_cell).zip(resident.chunks(per_cell));
    groups.map(|(woken, resident)| cell(woken, resident.contains(&true), style)).collect()
}

/// Sets the marks of the experts that exist; a coordinator of another version may name others.
fn mark(marks: &mut [bool], experts: &[u32]) {
    for &expert in experts {
        if let Some(mark) = marks.get_mut(expert as usize) {
            *mark = true;
        }
    }
}

/// One cell: alone an expert is awake, resident or neither; two to eight share it as halves, quarters or
/// braille dots, where only waking shows.
fn cell(woken: &[bool], resident: bool, style: Style) -> char {
    let any = woken.contains(&true);
    match (style, any) {
        (Style::Ascii, true) => return '#',
        (Style::Ascii, false) => return if resident { '-' } else { '.' },
        (_, false) => return if resident { '░' } else { '·' },
        _ => {}
    }
    let is_woken = |index: usize| woken.get(index).copied().unwrap_or(false);
    match woken.len() {
        1 => '█',
        2 => [' ', '▌', '▐', '█'][usize::from(is_woken(0)) + 2 * usize::from(is_woken(1))],
        3..=4 => {
            const QUARTERS: [char; 16] =
                [' ', '▘', '▝', '▀', '▖', '▌', '▞', '▛', '▗', '▚', '▐', '▜', '▄', '▙', '▟', '█'];
            QUARTERS[(0..4).map(|index| usize::from(is_woken(index)) << index).sum::<usize>()]
        }
        // Braille dots are numbered down the left column, then down the right, then the bottom row.
        _ => {
            const DOTS: [u32; 8] = [0x01, 0x08, 0x02, 0x10, 0x04, 0x20, 0x40, 0x80];
            let dots: u32 = (0..woken.len())
                .filter(|&index| is_woken(index))
                .map(|index| DOTS[index * DOTS.len() / woken.len()])
                .fold(0, |dots, dot| dots | dot);
            char::from_u32(0x2800 + dots).unwrap_or('⣿')
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(woken: &[u32], resident: &[u32]) -> LayerView {
        LayerView { encoder: true, number: 1, woken: woken.to_vec(), resident: resident.to_vec() }
    }

    #[test]
    fn one_cell_per_expert() {
        // Broken: the picture would show other experts than those that answered.
        let drawn = draw(&[layer(&[0, 2], &[0, 1, 2])], 4, Style::Plain);
        assert_eq!(drawn, "encoder 1  █░█·   2\n");
        assert_eq!(draw(&[layer(&[0, 2], &[1])], 4, Style::Ascii), "encoder 1  #-#.   2\n");
        assert_eq!(draw(&[layer(&[3], &[])], 4, Style::Colour), "encoder 1  \x1b[36m···█\x1b[0m   1\n");
    }

    #[test]
    fn every_size_fits_a_terminal() {
        // Broken: lines of a large model would wrap and the picture would be noise.
        for num_experts in [1, 8, 64, 65, 128, 256, 500, 2000] {
            let all: Vec<u32> = (0..num_experts as u32).collect();
            let drawn = draw(&[layer(&all, &[])], num_experts, Style::Plain);
            assert!(drawn.trim_end().chars().count() <= 80, "{num_experts}: {drawn}");
            assert!(!drawn.contains('·'), "{num_experts}: {drawn}");
        }
    }

    #[test]
    fn shared_cells() {
        // Broken: with 128 or 256 experts per layer a woken expert would vanish or show up as a neighbour.
        let plain = |woken: &[u32], experts| cells(&layer(woken, &[]), experts, Style::Plain);
        assert!(plain(&[0, 3], 128).starts_with("▌▐·"));
        assert!(plain(&[0, 5, 8, 9, 10, 11], 256).starts_with("▘▝█·"));
        assert!(plain(&[0, 15], 512).starts_with("⠁⢀·"));
        assert_eq!(plain(&[u32::MAX], 4), "····");
    }

    #[test]
    fn styles() {
        // Broken: escape codes would end up in files, or NO_COLOR would be ignored.
        assert_eq!(Style::of(true, None), Style::Colour);
        assert_eq!(Style::of(true, Some("")), Style::Colour);
        assert_eq!(Style::of(true, Some("1")), Style::Plain);
        assert_eq!(Style::of(false, None), Style::Ascii);
    }
}
