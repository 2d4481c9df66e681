//! A simulated kernel shared by many callers, each of whom waits as long as the kernel makes it:
//! for ever, until somebody closes a node, or not at all. Kills a caller whom a fault is to kill.
//! Decides nothing itself.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::event::Uevent;
use super::fs::Cache;
use super::kernel::{Kernel, Stop};

/// A kernel and those who wait for it.
#[derive(Debug)]
pub(super) struct Shared {
    kernel: Mutex<State>,
    /// Something was closed, or the simulation ends.
    changed: Condvar,
    /// What the real kernel believes of this one, once it is mounted.
    cache: OnceLock<Cache>,
}

#[derive(Debug)]
struct State {
    kernel: Kernel,
    ended: bool,
    /// How often those were let go who wait for ever.
    let_go: u64,
    /// How many wait for ever.
    blocked: u32,
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
        let state = State { kernel, ended: false, let_go: 0, blocked: 0, subscriber: None };
        Self { kernel: Mutex::new(state), changed: Condvar::new(), cache: OnceLock::new() }
    }

    /// From now on the real kernel believes what it has seen of functions until they go.
    pub(super) fn cached_by(&self, cache: Cache) {
        // There is one mount.
        let _ = self.cache.set(cache);
    }

    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Kernel) -> T) -> T {
        let mut state = self.lock();
        let done = act(&mut state.kernel);
        drop(self.tell(state));
        done
    }

    /// Has the real kernel forget what is no longer so, which it may have to ask us for meanwhile, and
    /// hands on what has happened.
    fn tell<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let changed = state.kernel.take_stale();
        if let Some(cache) = self.cache.get().filter(|_| !changed.is_empty()) {
            drop(state);
            for path in &changed {
                cache.forget(path);
            }
            state = self.lock();
        }
        state.tell();
        state
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

    /// Whether somebody waits for ever.
    pub(super) fn is_blocked(&self) -> bool {
        self.lock().blocked > 0
    }

    /// Has done what would have waited for ever until now.
    pub(super) fn let_go(&self) {
        self.lock().let_go += 1;
        self.changed.notify_all();
    }

    /// A test that panics while it looks at the kernel leaves it as it was.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something for a process, for as long as it sleeps.
    pub(super) fn call<T>(
        &self,
        caller: u32,
        mut act: impl FnMut(&mut Kernel) -> Result<T, Stop>,
    ) -> Result<T, Errno> {
        let mut state = self.lock();
        loop {
            let done = act(&mut state.kernel);
            state = self.tell(state);
            match done {
                Ok(done) => return Ok(done),
                Err(Stop::Errno(errno)) => return Err(errno),
                Err(Stop::Held(_)) if !state.ended => state = self.wait(state),
                Err(Stop::Held(_)) => return Err(Errno::EIO),
                Err(Stop::Forever) => {
                    let before = state.let_go;
                    state.blocked += 1;
                    while !state.ended && state.let_go == before {
                        state = self.wait(state);
                    }
                    state.blocked -= 1;
                    if state.ended {
                        return Err(Errno::EIO);
                    }
                }
                Err(Stop::Killed) => {
                    // 0 would be us and all around us.
                    if let Some(caller) = i32::try_from(caller).ok().filter(|caller| *caller > 0) {
                        let _ = kill(Pid::from_raw(caller), Signal::SIGKILL);
                    }
                    return Err(Errno::EINTR);
                }
            }
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
