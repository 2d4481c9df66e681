//! Places at which a test can have the daemon end as `kill -9` would: before and after whatever a
//! restart has to cope with. Without the feature `crash-points` there are none.

/// Which place it is, counted from 1 when the process starts. Workers do not inherit it.
pub(crate) const VARIABLE: &str = "VFIOD_CRASH_AT";

#[cfg(feature = "crash-points")]
pub use points::arm;
#[cfg(feature = "crash-points")]
pub(crate) use points::point;

/// No place to end.
#[cfg(not(feature = "crash-points"))]
pub(crate) fn point(_: &str) {}

#[cfg(feature = "crash-points")]
mod points {
    use std::sync::{Mutex, PoisonError};

    use nix::sys::signal::{Signal, raise};

    use super::VARIABLE;

    /// Places passed since counting began, and the one to end at.
    static COUNT: Mutex<Option<(u32, u32)>> = Mutex::new(None);

    /// Has the process end at the `at`th place from now on; 0 is none.
    pub fn arm(at: u32) {
        *COUNT.lock().unwrap_or_else(PoisonError::into_inner) = Some((0, at));
    }

    /// A place to end. Where any is to be ended at, each that is passed is told.
    pub(crate) fn point(place: &str) {
        let variable = || std::env::var(VARIABLE).ok()?.parse().ok();
        let mut count = COUNT.lock().unwrap_or_else(PoisonError::into_inner);
        let (passed, at) = count.get_or_insert_with(|| (0, variable().unwrap_or(0)));
        if *at == 0 {
            return;
        }
        *passed += 1;
        eprintln!("crash point {passed}: {place}");
        if passed == at {
            let _ = raise(Signal::SIGKILL);
        }
    }
}
