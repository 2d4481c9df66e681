//! `cargo xtask bench`: the figures of the lab's `bench` scenario and of simulated hosts, as a table
//! and as JSON.

use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use vfiod_tests::protocol::BenchRow;

use crate::{exec, lab, progress};

/// Measures, prints a table, and writes the rows to `json` if it is given.
pub(crate) fn run(many: bool, json: Option<&Path>) -> Result<ExitCode> {
    let mut rows = lab::bench(if many { &["bench-many"] } else { &["bench", "bench-guests"] })?;
    if !many {
        rows.extend(simulated()?);
    }
    println!("{}", table(&rows));
    if let Some(path) = json {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        serde_json::to_writer_pretty(file, &rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The figures of simulated hosts, with the programs that the lab was given.
fn simulated() -> Result<Vec<BenchRow>> {
    let measure = exec::build_measure()?;
    let measured = progress::step("measuring simulated hosts", || {
        let output = Command::new(&measure).stderr(Stdio::null()).output()?;
        ensure!(output.status.success(), "{} ended with {}", measure.display(), output.status);
        Ok(output.stdout)
    })?;
    serde_json::from_slice(&measured).context("the rows of simulated hosts")
}

fn table(rows: &[BenchRow]) -> String {
    let heading = ["benchmark", "median", "min", "max", "unit", "n", "/ floor", "/ peers"];
    let mut cells = vec![heading.map(String::from).to_vec()];
    cells.extend(rows.iter().map(|row| {
        let peers = row.peer_ratios.iter().map(|(peer, ratio)| format!("{peer} {ratio:.2}"));
        vec![
            row.name.clone(),
            format!("{:.2}", row.median),
            format!("{:.2}", row.min),
            format!("{:.2}", row.max),
            row.unit.clone(),
            row.n.to_string(),
            row.floor_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
            peers.collect::<Vec<_>>().join(", "),
        ]
    }));
    let width = |column: usize| {
        cells.iter().map(|line: &Vec<String>| line[column].chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let line = |cells: &Vec<String>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    cells.iter().map(line).collect::<Vec<_>>().join("\n")
}
