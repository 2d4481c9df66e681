//! Turns at what only so many may do at a time. Touches nothing.

use std::sync::{Condvar, Mutex, PoisonError};

/// Lets so many at it, and the others wait.
#[derive(Debug)]
pub(super) struct Turns {
    most: usize,
    taken: Mutex<usize>,
    given: Condvar,
}

/// One's turn, until it is dropped.
#[derive(Debug)]
pub struct Turn<'a>(&'a Turns);

impl Turns {
    /// Turns for `most` at a time.
    pub(super) fn new(most: usize) -> Self {
        Self { most, taken: Mutex::default(), given: Condvar::new() }
    }

    /// Waits for a turn.
    pub(super) fn take(&self) -> Turn<'_> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |taken: &mut usize| *taken >= self.most;
        *self.given.wait_while(taken, full).unwrap_or_else(PoisonError::into_inner) += 1;
        Turn(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.given.notify_one();
    }
}
