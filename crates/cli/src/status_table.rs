//! A cluster's state as a table a person reads. Printed by `status`; the numbers come from `Cluster.Status`.

use comfy_table::{Cell, CellAlignment, Color};
use sida_proto::v1::{NodeStatus, ResidencyResponse, StatusResponse};
use sida_telemetry::counted;

use crate::{byte_size, expert_picture::Style, plain_table::PlainTable};

/// Cells of a residency bar.
const BAR_CELLS: u64 = 10;

/// The whole answer: a line about the coordinator, then one row per node.
pub(crate) fn draw(status: &StatusResponse, style: Style) -> String {
    format!("{}\n\n{}", headline(status, style), nodes(&status.nodes, style).draw())
}

/// The same on a screen of so many columns: where the table is wider, what expert-nodes hold gets a table of its own.
pub(crate) fn draw_within(columns: usize, status: &StatusResponse, style: Style) -> String {
    // Colours have no width.
    let whole = nodes(&status.nodes, Style::Ascii).draw();
    if whole.lines().all(|line| line.chars().count() <= columns) {
        return draw(status, style);
    }
    let (members, held) = (members(&status.nodes, style).draw(), held(&status.nodes).draw());
    format!("{}\n\n{members}\n{held}", headline(status, style))
}

fn headline(status: &StatusResponse, style: Style) -> String {
    let predicted = status.hash_hits + status.hash_misses;
    let hits = match predicted {
        0 => "no hash table used yet".to_owned(),
        _ => format!("{:.1}% hash hits", 100.0 * status.hash_hits as f64 / predicted as f64),
    };
    format!(
        "{} serves {}\n{}, {} running, {} queued · {hits} · {}\n{}",
        style.paint("1", &status.coordinator),
        style.paint("1", &status.model),
        counted(status.requests_total, "request"),
        status.requests_inflight,
        status.requests_queued,
        counted(status.failovers, "failover"),
        membership(status, style),
    )
}

/// `placement epoch 7, written by c0 · etcd is there`.
fn membership(status: &StatusResponse, style: Style) -> String {
    let epoch = format!("placement epoch {}", status.placement_epoch);
    if status.membership != "etcd" {
        return format!("{epoch}, members are fixed");
    }
    let writer = match status.leader.as_str() {
        "" => style.paint("33", "written by nobody now"),
        leader => format!("written by {leader}"),
    };
    let etcd = match status.etcd_connected {
        true => style.paint("32", "etcd is there"),
        false => style.paint("31", "etcd is away, the last view stays"),
    };
    format!("{epoch}, {writer} · {etcd}")
}

fn nodes(nodes: &[NodeStatus], style: Style) -> PlainTable {
    let mut table = PlainTable::new([
        "node", "role", "address", "health", "first", "holds", "ready", "resident", "loads", "waited", "evicted",
    ]);
    for node in nodes {
        let mut row = member(node, style);
        if let Some(residency) = &node.residency {
            row.extend(placed(node));
            row.push(Cell::new(residency_bar(residency, style)));
            row.extend(loads(residency));
        }
        table.row(row);
    }
    table
}

/// Who is there.
fn members(nodes: &[NodeStatus], style: Style) -> PlainTable {
    let mut table = PlainTable::new(["node", "role", "address", "health"]);
    nodes.iter().for_each(|node| table.row(member(node, style)));
    table
}

/// What expert-nodes hold.
fn held(nodes: &[NodeStatus]) -> PlainTable {
    let mut table = PlainTable::new(["node", "first", "holds", "ready", "resident", "loads", "waited", "evicted"]);
    for node in nodes {
        let Some(residency) = &node.residency else { continue };
        let mut row = vec![Cell::new(&node.node)];
        row.extend(placed(node));
        let percent = residency.resident_bytes.saturating_mul(100).checked_div(residency.budget_bytes).unwrap_or(0);
        row.push(Cell::new(format!("{percent}% of {}", byte_size::shown(residency.budget_bytes))));
        row.extend(loads(residency));
        table.row(row);
    }
    table
}

fn member(node: &NodeStatus, style: Style) -> Vec<Cell> {
    let (health, colour) = match node.healthy {
        true => ("serving", Color::Green),
        false if node.problem.is_empty() => ("down", Color::Red),
        false => (&*node.problem, Color::Red),
    };
    let health = if style == Style::Colour { Cell::new(health).fg(colour) } else { Cell::new(health) };
    vec![Cell::new(&node.node), Cell::new(&node.role), Cell::new(&node.address), health]
}

/// What the placement gives to a node, and up to which epoch it has loaded that.
fn placed(node: &NodeStatus) -> [Cell; 3] {
    let ready = match node.ready_epoch {
        0 => Cell::new("-").set_alignment(CellAlignment::Right),
        epoch => number(epoch),
    };
    [number(node.experts_placed), number(node.experts_held), ready]
}

/// Loads, those that somebody waited for, evictions.
fn loads(residency: &ResidencyResponse) -> [Cell; 3] {
    let loads = residency.prefetch_loads + residency.demand_loads;
    [number(loads), number(residency.demand_loads), number(residency.evictions)]
}

fn number(value: u64) -> Cell {
    Cell::new(value).set_alignment(CellAlignment::Right)
}

/// `█████░░░░░ 6.4 MiB of 12.8 MiB`.
fn residency_bar(residency: &ResidencyResponse, style: Style) -> String {
    let (resident, budget) = (residency.resident_bytes, residency.budget_bytes);
    let filled = resident.saturating_mul(BAR_CELLS).checked_div(budget).unwrap_or(0).min(BAR_CELLS) as usize;
    let (full, empty) = if style == Style::Ascii { ("#", ".") } else { ("█", "░") };
    let bar = full.repeat(filled) + &empty.repeat(BAR_CELLS as usize - filled);
    format!("{bar} {} of {}", byte_size::shown(resident), byte_size::shown(budget))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_etcd_is_told() {
        // Broken: an operator would look for the fault everywhere but in etcd.
        let status = |etcd_connected, leader: &str| StatusResponse {
            membership: "etcd".into(),
            placement_epoch: 7,
            etcd_connected,
            leader: leader.into(),
            ..Default::default()
        };
        let there = draw(&status(true, "c0"), Style::Ascii);
        assert!(there.contains("placement epoch 7, written by c0 · etcd is there"), "{there}");
        let away = draw(&status(false, ""), Style::Ascii);
        assert!(away.contains("written by nobody now · etcd is away"), "{away}");
    }

    #[test]
    fn a_node_that_did_not_answer_is_shown_down() {
        // Broken: a dead expert-node would look like an empty one.
        let residency = ResidencyResponse { resident_bytes: 6 << 20, budget_bytes: 12 << 20, ..Default::default() };
        let node = |name: &str, residency: Option<ResidencyResponse>| NodeStatus {
            node: name.into(),
            role: "expert-node".into(),
            healthy: residency.is_some(),
            residency,
            ..Default::default()
        };
        let status = StatusResponse {
            coordinator: "coordinator-0".into(),
            model: "switch-tiny-64".into(),
            nodes: vec![node("e0", Some(residency)), node("e1", None)],
            hash_hits: 3,
            hash_misses: 1,
            ..Default::default()
        };
        let drawn = draw(&status, Style::Ascii);
        assert!(drawn.contains("75.0% hash hits"), "{drawn}");
        assert!(drawn.contains("placement epoch 0, members are fixed"), "{drawn}");
        assert!(drawn.contains("#####..... 6.0 MiB of 12.0 MiB"), "{drawn}");
        let down = drawn.lines().find(|line| line.contains("e1")).unwrap();
        assert!(down.contains("down") && !down.contains("MiB"), "{drawn}");
    }

    #[test]
    fn a_narrow_screen_shows_everything() {
        // Broken: on a terminal of 80 columns nobody would see what is resident, or what was waited for.
        let residency = ResidencyResponse {
            resident_bytes: 6 << 20,
            budget_bytes: 12 << 20,
            prefetch_loads: 160_206,
            demand_loads: 22_488,
            evictions: 182_502,
            ..Default::default()
        };
        let node = NodeStatus {
            node: "expert-node-0".into(),
            role: "expert-node".into(),
            address: "127.0.0.1:43177".into(),
            residency: Some(residency),
            ..Default::default()
        };
        let status = StatusResponse { nodes: vec![node], ..Default::default() };
        assert_eq!(draw_within(160, &status, Style::Ascii), draw(&status, Style::Ascii));
        let narrow = draw_within(80, &status, Style::Ascii);
        assert!(narrow.lines().all(|line| line.chars().count() <= 80), "{narrow}");
        for shown in ["127.0.0.1:43177", "50% of 12.0 MiB", "182694", "22488", "182502"] {
            assert!(narrow.contains(shown), "{narrow}");
        }
    }

    #[test]
    fn a_bar_never_overflows() {
        // Broken: a node without a budget, or one over it, would end the command by a panic.
        let bar = |resident_bytes, budget_bytes| {
            residency_bar(&ResidencyResponse { resident_bytes, budget_bytes, ..Default::default() }, Style::Ascii)
        };
        assert!(bar(5, 0).starts_with(".........."));
        assert!(bar(u64::MAX, 1).starts_with("########## "));
    }
}
