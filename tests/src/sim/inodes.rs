//! Numbers for the paths the real kernel has looked up, until it forgets them. Touches nothing.

use std::collections::HashMap;
use std::sync::Arc;

/// The number of the root (`FUSE_ROOT_ID`).
const ROOT: u64 = 1;

/// Paths by number and numbers by path.
#[derive(Debug)]
pub(super) struct Inodes {
    paths: HashMap<u64, (Arc<str>, u64)>,
    numbers: HashMap<Arc<str>, u64>,
    last: u64,
}

impl Default for Inodes {
    fn default() -> Self {
        let root: Arc<str> = "".into();
        Self {
            paths: HashMap::from([(ROOT, (root.clone(), 1))]),
            numbers: HashMap::from([(root, ROOT)]),
            last: ROOT,
        }
    }
}

impl Inodes {
    pub(super) fn path(&self, number: u64) -> Option<Arc<str>> {
        self.paths.get(&number).map(|(path, _)| path.clone())
    }

    /// The path of a name in a directory.
    pub(super) fn child(&self, parent: u64, name: &str) -> Option<Arc<str>> {
        let parent = self.path(parent)?;
        Some(if parent.is_empty() { name.into() } else { format!("{parent}/{name}").into() })
    }

    /// Counts a lookup; the number of the path, or one of its own for this lookup if it is to be
    /// `fresh`.
    pub(super) fn remember(&mut self, path: Arc<str>, fresh: bool) -> u64 {
        let known = if fresh { None } else { self.numbers.get(&path).copied() };
        let number = known.unwrap_or_else(|| {
            self.last += 1;
            self.numbers.insert(path.clone(), self.last);
            self.last
        });
        self.paths.entry(number).or_insert((path, 0)).1 += 1;
        number
    }

    /// The number of a path that the real kernel may know, which no later lookup gets.
    pub(super) fn retire(&mut self, path: &str) -> Option<u64> {
        self.numbers.remove(path)
    }

    /// The number of a path that the real kernel may know.
    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.numbers.get(path).copied()
    }

    /// Takes lookups back; with the last one the path goes.
    pub(super) fn forget(&mut self, number: u64, lookups: u64) {
        let Some((path, count)) = self.paths.get_mut(&number) else { return };
        *count = count.saturating_sub(lookups);
        if *count == 0 && number != ROOT {
            if self.numbers.get(path) == Some(&number) {
                self.numbers.remove(path);
            }
            self.paths.remove(&number);
        }
    }
}
