//! What is asked of nodes: the rows of a layer are cut into pieces of one expert each, and the pieces for one node make a
//! call.

use std::ops::Range;

use crate::{ExpertId, ExpertKey, Group, Grouping, NodeId, PlacedGroup, failover::CallFailure};

/// A run of grouped rows for one expert. A piece is sent, and sent again, as a whole.
#[derive(Debug)]
pub struct Piece {
    /// Who computes it.
    pub expert: ExpertId,
    /// The place of its first row among the grouped rows of the layer.
    pub first_row: usize,
    /// How many rows. Never 0.
    pub rows: usize,
    /// The nodes that failed the piece, each with its last reason. They are kept by name, since the nodes may change
    /// meanwhile.
    /// Invariant: each node is in it once, and the node that failed last comes last.
    pub(super) tried: Vec<(NodeId, CallFailure)>,
    /// The budget had no retry for the piece, and that was noted.
    pub(super) is_refused: bool,
    /// How often a node refused the piece because it knew a newer placement.
    pub(super) reshares: u32,
    /// A call with this piece and others was refused. The piece goes by itself from now on, so that an expert that
    /// cannot be loaded does not take the others with it.
    pub(super) alone: bool,
}

/// An expert call: pieces for one node, in one message.
#[derive(Debug)]
pub struct Call {
    /// As an index into the nodes of the placement it was assigned under.
    pub node: usize,
    /// What it asks for.
    pub pieces: Vec<Piece>,
}

/// Rows that nobody computes.
#[derive(Debug)]
pub struct GivenUp {
    /// Their expert.
    pub key: ExpertKey,
    /// Where they are among the grouped rows of the layer.
    pub rows: Range<usize>,
    /// The nodes that were asked, each with its last reason.
    pub tried: Vec<(NodeId, CallFailure)>,
    /// Why nobody is asked any more.
    pub why: Why,
}

/// Why nobody is asked for rows any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No caller waits for them.
    Unwanted,
    /// All nodes failed, and none came back in time.
    Unavailable,
    /// There was no retry for them in all the time that they could wait.
    RetriesExhausted,
}

impl Piece {
    /// The groups of a layer as pieces of at most `rows_max` rows.
    pub(super) fn of(grouping: &Grouping, rows_max: usize) -> Vec<Self> {
        let mut pieces = Vec::with_capacity(grouping.groups.len());
        let mut first_row = 0;
        for group in &grouping.groups {
            let end = first_row + group.rows as usize;
            while first_row < end {
                let rows = rows_max.min(end - first_row);
                let (expert, tried) = (group.expert, Vec::new());
                let (is_refused, reshares, alone) = Default::default();
                pieces.push(Self { expert, first_row, rows, tried, is_refused, reshares, alone });
                first_row += rows;
            }
        }
        pieces
    }

    /// Notes that a node failed the piece.
    pub(super) fn failed(&mut self, node: &NodeId, failure: CallFailure) {
        self.tried.retain(|(tried, _)| tried != node);
        self.tried.push((node.clone(), failure));
    }

    /// Where the piece's rows are among the grouped rows of the layer.
    pub fn range(&self) -> Range<usize> {
        self.first_row..self.first_row + self.rows
    }
}

impl Call {
    /// The rows of all pieces.
    pub fn rows(&self) -> usize {
        self.pieces.iter().map(|piece| piece.rows).sum()
    }

    /// Where each row is among the grouped rows of the layer.
    pub fn places(&self) -> Vec<u32> {
        self.pieces.iter().flat_map(Piece::range).map(|place| place as u32).collect()
    }

    /// The groups as a call through a window names them.
    pub fn placed_groups(&self) -> Vec<PlacedGroup> {
        let placed = |piece: &Piece| PlacedGroup {
            expert: piece.expert,
            first: piece.first_row as u32,
            rows: piece.rows as u32,
        };
        self.pieces.iter().map(placed).collect()
    }

    /// The groups as a message with rows names them.
    pub fn groups(&self) -> Vec<Group> {
        self.pieces.iter().map(|piece| Group { expert: piece.expert, rows: piece.rows as u32 }).collect()
    }
}
