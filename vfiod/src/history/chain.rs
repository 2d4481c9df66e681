//! Lines that hold together: each has a number and the hash of itself and of all lines before, so that
//! none can be changed, taken out or moved without its being seen. Pure.
//!
//! A line is a JSON object whose last key is `chain`: the SHA-256, in hexadecimal digits, of the
//! `chain` of the line before, a line feed, and the line up to that key.

use std::fmt::Write;

use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Where the chain of a line begins.
const CHAIN: &str = ",\"chain\":\"";
/// What ends the line.
const END: &str = "\"}";

/// The newest line: what the next one is chained to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Head {
    /// The number of the oldest line that is kept.
    pub first: u64,
    /// The number of the next line.
    pub next: u64,
    /// The chain of the newest line; empty before there is one.
    pub chain: String,
}

/// What of a line's is part of the chain.
#[derive(Debug, Deserialize)]
struct Place {
    number: u64,
    chain: String,
}

/// What was found to be wrong, in words, and where the lines end.
#[derive(Debug, Default)]
pub struct Checked {
    /// How many lines hold together.
    pub entries: u64,
    /// Where they end.
    pub head: Head,
    /// What is wrong; nothing if all is well.
    pub faults: Vec<String>,
}

impl Head {
    /// Adds a line for a JSON object, without its end of line.
    pub fn add(&mut self, object: &str) -> String {
        let body = object.strip_suffix('}').unwrap_or(object);
        self.chain = hash(&self.chain, body);
        self.next += 1;
        format!("{body}{CHAIN}{}{END}", self.chain)
    }

    /// The head that a line makes, if it is one.
    pub fn of(line: &[u8]) -> Option<Self> {
        let Place { number, chain } = serde_json::from_slice(line).ok()?;
        Some(Self { first: number, next: number + 1, chain })
    }

    /// As it is kept beside the lines.
    pub fn text(&self) -> String {
        format!("{:020} {:020} {:64}\n", self.first, self.next, self.chain)
    }

    /// As it was kept.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let first = words.next()?.parse().ok()?;
        let next = words.next()?.parse().ok()?;
        Some(Self { first, next, chain: words.next().unwrap_or_default().to_owned() })
    }
}

/// Checks lines, oldest first, against each other and against the head that was kept.
pub(super) fn check<'a>(lines: impl Iterator<Item = &'a [u8]>, kept: Option<&Head>) -> Checked {
    let mut found = Checked::default();
    let mut before: Option<Head> = None;
    for line in lines {
        let Some(head) = Head::of(line) else {
            let after = before.as_ref().map_or(0, |head| head.next);
            found.faults.push(format!("a line before entry {after} is no entry"));
            continue;
        };
        let number = head.first;
        let expected = before.as_ref().map_or(number, |head| head.next);
        let text = String::from_utf8_lossy(line);
        let body = text.strip_suffix(END).and_then(|line| line.rsplit_once(CHAIN));
        let chained = |chain: &str| body.is_some_and(|(body, _)| hash(chain, body) == head.chain);
        let whole = match &before {
            Some(before) => chained(&before.chain),
            // What came before the oldest that is kept is not known.
            None => number != 0 || chained(""),
        };
        if number > expected {
            found.faults.push(match number - expected {
                1 => format!("entry {expected} is missing"),
                _ => format!("entries {expected} to {} are missing", number - 1),
            });
        } else if number < expected {
            found.faults.push(format!("entry {number} comes after entry {}", expected - 1));
        } else if !whole {
            found.faults.push(format!("entry {number}, or one before it, was changed"));
        } else {
            found.entries += 1;
        }
        let first = before.map_or(number, |before| before.first);
        before = Some(Head { first, ..head });
    }
    found.head = before.unwrap_or_default();
    match kept {
        None if found.head != Head::default() => {
            found.faults.push("which entry is the newest is not on record".to_owned());
        }
        Some(kept) => found.faults.extend(found.head.differs(kept)),
        None => {}
    }
    found
}

impl Head {
    /// What is wrong with lines that end so where another end was kept. A crash may leave one line
    /// that is not in it yet.
    fn differs(&self, kept: &Self) -> Option<String> {
        if self.first > kept.first {
            return Some(format!("entries {} to {} are missing", kept.first, self.first - 1));
        }
        if self.next < kept.next {
            return Some(format!("entries {} to {} are missing", self.next, kept.next - 1));
        }
        let changed = self.next == kept.next && self.chain != kept.chain;
        if changed || self.next > kept.next + 1 {
            return Some("the newest entries are not those that were written".to_owned());
        }
        None
    }
}

fn hash(before: &str, body: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(before);
    hash.update("\n");
    hash.update(body);
    hash.finalize().iter().fold(String::new(), |mut text, byte| {
        // Writing to a string never fails.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(count: u64) -> (Vec<String>, Head) {
        let mut head = Head::default();
        let line = |n| head.add(&format!("{{\"text\":\"}}{n}\",\"number\":{n}}}"));
        ((0..count).map(line).collect(), head)
    }

    fn faults(lines: &[String], kept: &Head) -> Vec<String> {
        check(lines.iter().map(String::as_bytes), Some(kept)).faults
    }

    #[test]
    fn what_was_written_holds_together() {
        let (lines, head) = lines(9);
        assert_eq!(faults(&lines, &head), [""; 0]);
        assert_eq!(Head::parse(&head.text()), Some(head.clone()));
        assert_eq!(Head::parse(&Head::default().text()), Some(Head::default()));
        // The oldest were dropped, and it is on record that they were.
        let later = Head { first: 4, ..head.clone() };
        assert_eq!(faults(&lines[4..], &later), [""; 0]);
        // The daemon was killed before the newest was on record.
        let (_, earlier) = self::lines(8);
        assert_eq!(faults(&lines, &earlier), [""; 0]);
    }

    #[test]
    fn whatever_is_done_to_the_lines_is_seen() {
        let (lines, head) = lines(9);
        for at in 0..lines.len() {
            let mut cut = lines.clone();
            cut.remove(at);
            assert!(!faults(&cut, &head).is_empty(), "{at} was taken out");
            assert!(!faults(&lines[..at], &head).is_empty(), "all from {at} on were taken out");
            if at > 0 {
                assert!(!faults(&lines[at..], &head).is_empty(), "all before {at} were taken out");
                let mut moved = lines.clone();
                moved.swap(at - 1, at);
                assert!(!faults(&moved, &head).is_empty(), "{at} was moved");
            }
            for place in 0..lines[at].len() {
                let mut edited = lines.clone();
                let mut bytes = edited[at].clone().into_bytes();
                bytes[place] ^= 1;
                edited[at] = String::from_utf8(bytes).unwrap();
                assert!(!faults(&edited, &head).is_empty(), "{at} was edited at {place}");
            }
        }
    }
}
