//! Turns at what only so many may do at a time. Touches nothing.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Lets so many at it, and the others wait.
#[derive(Debug)]
pub(super) struct Turns {
    most: usize,
    counts: Mutex<Counts>,
    given: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    taken: usize,
    /// To wake nobody takes as long as to wake somebody.
    waiting: usize,
}

/// One's turn, until it is dropped.
#[derive(Debug)]
pub struct Turn<'a>(&'a Turns);

impl Turns {
    /// Turns for `most` at a time.
    pub(super) fn new(most: usize) -> Self {
        Self { most, counts: Mutex::default(), given: Condvar::new() }
    }

    /// Waits for a turn.
    pub(super) fn take(&self) -> Turn<'_> {
        let mut counts = self.counts();
        counts.waiting += 1;
        let full = |counts: &mut Counts| counts.taken >= self.most;
        counts = self.given.wait_while(counts, full).unwrap_or_else(PoisonError::into_inner);
        counts.waiting -= 1;
        counts.taken += 1;
        Turn(self)
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut counts = self.0.counts();
        counts.taken -= 1;
        let waiting = counts.waiting > 0;
        drop(counts);
        if waiting {
            self.0.given.notify_one();
        }
    }
}
