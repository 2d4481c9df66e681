//! Which processor a thread is on.

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Keeps this thread, and all it starts from now on, to one of the processors it may be on, the
/// `number`th and around again.
///
/// A broker, its workers and the simulated kernel go by turns: one asks and waits for another's answer.
/// To be woken on another processor takes longer than most answers do, and on a busy one very long.
pub fn keep_to(number: usize) -> Result<(), Errno> {
    let this = Pid::from_raw(0);
    let may = sched_getaffinity(this)?;
    let all: Vec<usize> =
        (0..CpuSet::count()).filter(|processor| may.is_set(*processor) == Ok(true)).collect();
    let mut one = CpuSet::new();
    one.set(all[number % all.len()])?;
    sched_setaffinity(this, &one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_and_those_it_starts_are_kept_to_one_processor() {
        let processors = || {
            let on = sched_getaffinity(Pid::from_raw(0)).unwrap();
            (0..CpuSet::count()).filter(|n| on.is_set(*n) == Ok(true)).count()
        };
        let kept = std::thread::spawn(move || {
            keep_to(usize::MAX).unwrap();
            (processors(), std::thread::spawn(processors).join().unwrap())
        });
        assert_eq!(kept.join().unwrap(), (1, 1));
    }
}
