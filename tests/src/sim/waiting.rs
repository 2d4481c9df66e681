//! A simulated kernel shared by many callers, each of whom waits as long as the kernel makes it:
//! for ever, until somebody closes a node, or not at all. Decides nothing itself.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use super::event::Uevent;
use super::kernel::{Kernel, Stop};

/// A kernel and those who wait for it.
#[derive(Debug)]
pub(super) struct Shared {
    kernel: Mutex<State>,
    /// Something was closed, or the simulation ends.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    kernel: Kernel,
    ended: bool,
    /// Who gets events as they happen.
    subscriber: Option<Sender<Uevent>>,
}

impl State {
    /// Hands on what has just happened. Never waits for the subscriber, who may be waiting for us.
    fn tell(&mut self) {
        if let Some(subscriber) = &self.subscriber {
            let mut events = self.kernel.take_events().into_iter();
            if events.any(|event| subscriber.send(event).is_err()) {
                self.subscriber = None;
            }
        }
    }
}

impl Shared {
    pub(super) fn new(kernel: Kernel) -> Self {
        let state = State { kernel, ended: false, subscriber: None };
        Self { kernel: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Kernel) -> T) -> T {
        let mut state = self.lock();
        let done = act(&mut state.kernel);
        state.tell();
        done
    }

    /// The events from now on, each as it happens, until the simulation ends.
    pub(super) fn subscribe(&self) -> Receiver<Uevent> {
        let (sender, events) = channel();
        self.lock().subscriber = Some(sender);
        events
    }

    /// Lets go all who wait, with an error, and everyone who would from now on.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        state.subscriber = None;
        drop(state);
        self.changed.notify_all();
    }

    /// A test that panics while it looks at the kernel leaves it as it was.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something for as long as it sleeps.
    pub(super) fn call<T>(
        &self,
        mut act: impl FnMut(&mut Kernel) -> Result<T, Stop>,
    ) -> Result<T, Errno> {
        let mut state = self.lock();
        loop {
            let done = act(&mut state.kernel);
            state.tell();
            match done {
                Ok(done) => return Ok(done),
                Err(Stop::Errno(errno)) => return Err(errno),
                Err(Stop::Held(_)) if !state.ended => state = self.wait(state),
                Err(Stop::Held(_)) => return Err(Errno::EIO),
                Err(Stop::Forever) => {
                    drop(state);
                    self.until_the_end();
                    return Err(Errno::EIO);
                }
            }
        }
    }

    /// For ever, as far as the caller can see.
    pub(super) fn until_the_end(&self) {
        let mut state = self.lock();
        while !state.ended {
            state = self.wait(state);
        }
    }

    /// Tells those who wait for a node that one was closed.
    pub(super) fn closed(&self, handle: u64) {
        self.lock().kernel.close(handle);
        self.changed.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
