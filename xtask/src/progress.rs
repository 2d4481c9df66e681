//! Says what takes long and how long it took: a spinner on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar};

/// Those of what goes on beside each other, a line each.
static SPINNERS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Does `work`, telling on standard error that it is under way and, at its end, its time.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let spinner = std::io::stderr().is_terminal().then(|| {
        let spinner = SPINNERS.add(ProgressBar::new_spinner().with_message(what.to_owned()));
        spinner.enable_steady_tick(Duration::from_millis(120));
        spinner
    });
    if spinner.is_none() {
        eprintln!("  {what} ...");
    }
    let start = Instant::now();
    let outcome = work();
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    let mark = if outcome.is_ok() { "✓" } else { "✗" };
    SPINNERS.suspend(|| eprintln!("{mark} {what} ({:.1} s)", start.elapsed().as_secs_f64()));
    outcome
}
