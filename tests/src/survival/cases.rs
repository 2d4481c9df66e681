//! Many cases on a few hosts at once, and how many there were. Fails with what failed.

use std::fmt::Display;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use super::Ground;
use crate::processor;

/// Hosts at once. Most of a case's time goes into processes that start.
const THREADS: usize = 4;
/// Where counts are appended to, if anywhere.
const COUNTS: &str = "VFIOD_COUNTS";

/// Runs every case on a host that is as it was booted: the one that the case before left so, else a
/// new one from `ground`.
///
/// # Panics
///
/// With all that failed, if anything did.
pub fn each<T: Sync + Display>(
    cases: &[T],
    ground: impl Fn() -> Result<Ground> + Sync,
    run: impl Fn(&Ground, &T) -> Result<()> + Sync,
) {
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = |thread| {
        processor::keep_to(thread).expect("no processor is left");
        let mut kept: Option<Ground> = None;
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
            let used = match kept.take() {
                Some(ground) => Ok(ground),
                None => ground().context("cannot make a host"),
            };
            let done = used.and_then(|ground| run(&ground, case).map(|()| ground));
            match done {
                Ok(ground) => kept = Some(ground).filter(Ground::is_as_booted),
                Err(error) => {
                    let mut failures = failures.lock().unwrap_or_else(PoisonError::into_inner);
                    failures.push(format!("{case}: {error:#}"));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..THREADS.min(cases.len()) {
            let work = &work;
            scope.spawn(move || work(thread));
        }
    });
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (failed, all) = (failures.len(), cases.len());
    assert!(failed == 0, "{failed} of {all} cases failed:\n{}", failures.join("\n"));
}

/// Of cases that many others are like, one in so many.
const FEW: usize = 6;
/// Has all of them played.
const ALL: &str = "VFIOD_ALL_CASES";

/// One in six of the cases, `from` there on, unless all are asked for: so many that processors would
/// be at them for long, and much alike.
pub fn few<T>(cases: Vec<T>, from: usize) -> Vec<T> {
    if std::env::var_os(ALL).is_some() {
        return cases;
    }
    cases.into_iter().skip(from % FEW).step_by(FEW).collect()
}

/// Tells how many there were: `crash matrix: 812 cases passed`.
pub fn count(what: &str, number: usize, of: &str) {
    told(&format!("{what}: {number} {of} passed"));
}

/// Tells a line to whoever runs the test.
pub fn told(line: &str) {
    println!("{line}");
    if let Some(path) = std::env::var_os(COUNTS) {
        let file = std::fs::File::options().create(true).append(true).open(path);
        if let Err(error) = file.and_then(|mut file| writeln!(file, "{line}")) {
            eprintln!("cannot append to the file of counts: {error}");
        }
    }
}
