//! The fuzz targets over their seeds and over inputs made from them, the same ones each time. What
//! `cargo xtask fuzz` does with libFuzzer for longer.

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use vfiod_tests::dice::Dice;
use vfiod_tests::seeds;

#[path = "../fuzz/targets.rs"]
mod targets;

/// Inputs made for each target.
const INPUTS: usize = 4000;
/// Bytes that mean something to one parser or another.
const MEANT: &[u8] = b"\0\x01\x7f\xff\n\t :/@=*?[]-\\{}\",09afC";

/// An input with a few changes; `other` is where parts come from.
fn changed(input: &[u8], other: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut input = input.to_vec();
    for _ in 0..=dice.roll(6) {
        let at = dice.roll(input.len() + 1);
        let end = at + dice.roll(input.len() - at + 1);
        match dice.roll(7) {
            0 => input.truncate(at),
            1 => drop(input.drain(at..end)),
            2 => input.insert(at, MEANT[dice.roll(MEANT.len())]),
            3 => {
                let from = dice.roll(other.len());
                let to = from + dice.roll(other.len() - from + 1);
                input.splice(at..at, other[from..to].iter().copied());
            }
            4 => {
                let again = input[at..end].to_vec();
                input.splice(at..at, again);
            }
            kind => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = if kind == 5 {
                        *byte ^ 1 << dice.roll(8)
                    } else {
                        MEANT[dice.roll(MEANT.len())]
                    };
                }
            }
        }
        input.truncate(1 << 14);
    }
    input
}

fn hex(input: &[u8]) -> String {
    input.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string never fails.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[test]
fn no_parser_has_a_fault_that_its_seeds_lead_to() {
    for target in &targets::TARGETS {
        let seeds = seeds::of(target.name).unwrap();
        assert!(seeds.len() >= 2, "{} has too few seeds", target.name);
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
        let mut pool: Vec<Vec<u8>> = seeds.into_iter().map(|(_, bytes)| bytes).collect();
        pool.push(Vec::new());
        for round in 0..pool.len() + INPUTS {
            let input = pool.get(round).cloned().unwrap_or_else(|| {
                let (one, other) = (dice.roll(pool.len()), dice.roll(pool.len()));
                changed(&pool[one], &pool[other], &mut dice)
            });
            let run = catch_unwind(AssertUnwindSafe(|| (target.run)(&input)));
            assert!(run.is_ok(), "{} fails on {}", target.name, hex(&input));
        }
    }
}

#[test]
fn every_directory_of_seeds_is_a_targets() {
    let mut names: Vec<String> = std::fs::read_dir(seeds::directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, targets::TARGETS.each_ref().map(|target| target.name));
}
