//! Turns for what anyone may ask. Whoever asks much waits for himself: without a thread, in nobody's
//! way who changes something, and hardly in the way of others who ask.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use zbus::message::Header;

/// Most questions that are looked into at a time.
const MOST: usize = 16;
/// Most of them for one connection.
const MOST_OF_ONE: usize = 4;

/// Who is asking.
#[derive(Debug)]
pub(super) struct Questions {
    all: Arc<Semaphore>,
    /// By unique name, for as long as they ask.
    callers: Mutex<HashMap<String, Weak<Semaphore>>>,
}

/// A turn to ask, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _of_all: Option<OwnedSemaphorePermit>,
    _of_one: Option<OwnedSemaphorePermit>,
    // Kept by all who have a turn or wait for one.
    _caller: Arc<Semaphore>,
}

impl Default for Questions {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(MOST)), callers: Mutex::default() }
    }
}

impl Questions {
    /// Waits for the caller's turn.
    pub(super) async fn turn(&self, header: &Header<'_>) -> Turn {
        let caller = self.caller(header.sender().map_or("", |name| name.as_str()));
        // Semaphores that are never closed.
        let of_one = caller.clone().acquire_owned().await.ok();
        let of_all = self.all.clone().acquire_owned().await.ok();
        Turn { _of_all: of_all, _of_one: of_one, _caller: caller }
    }

    fn caller(&self, name: &str) -> Arc<Semaphore> {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(caller) = callers.get(name).and_then(Weak::upgrade) {
            return caller;
        }
        callers.retain(|_, caller| caller.strong_count() > 0);
        let caller = Arc::new(Semaphore::new(MOST_OF_ONE));
        callers.insert(name.to_owned(), Arc::downgrade(&caller));
        caller
    }
}
