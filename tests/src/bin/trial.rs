//! `trial worker --root ROOT`: the worker of the brokers that tests start.
//!
//! `trial ROOT RECORDS attach DEVICE|release TARGET|recover`: a broker that does one thing and ends,
//! if it is not killed before. Exits with 1 and the reason if that is refused.

use std::path::Path;
use std::process::ExitCode;

use vfiod::request::ReleaseOptions;
use vfiod_tests::trial::{Setting, attach};

fn main() -> anyhow::Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let ["worker", "--root", root] = words[..] {
        vfiod::worker::serve(Path::new(root))?;
        return Ok(ExitCode::SUCCESS);
    }
    let [root, records, what, ref of @ ..] = words[..] else {
        anyhow::bail!("trial ROOT RECORDS attach DEVICE|release TARGET|recover");
    };
    let setting = Setting::new("/proc/self/exe", Path::new(root), Path::new(records));
    let broker = setting.start()?;
    let done = match (what, of) {
        ("attach", [device]) => attach(&broker, device, "alice").map(drop),
        ("release", [target]) => broker.release(target, &ReleaseOptions::default()).map(drop),
        ("recover", []) => Ok(()),
        _ => anyhow::bail!("{what} is nothing to try"),
    };
    Ok(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    })
}
