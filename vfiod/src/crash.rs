//! Places at which a test can have the daemon end as `kill -9` would: before and after whatever a
//! restart has to cope with. Without the feature `crash-points` there are none.

/// A place to end, if `VFIOD_CRASH_AT` says that this is the one, counted from 1.
#[cfg(feature = "crash-points")]
pub(crate) fn point(place: &str) {
    use std::sync::atomic::{AtomicU32, Ordering};

    use nix::sys::signal::{Signal, raise};

    static PASSED: AtomicU32 = AtomicU32::new(0);
    let Some(at) = std::env::var("VFIOD_CRASH_AT").ok().and_then(|at| at.parse::<u32>().ok())
    else {
        return;
    };
    let passed = PASSED.fetch_add(1, Ordering::SeqCst) + 1;
    if passed == at {
        eprintln!("crash point {at}: {place}");
        let _ = raise(Signal::SIGKILL);
    }
}

/// No place to end.
#[cfg(not(feature = "crash-points"))]
pub(crate) fn point(_: &str) {}
