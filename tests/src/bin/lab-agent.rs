//! The lab's agent: runs inside the lab; `--list` names its scenarios anywhere, and `--hold` has a
//! virtual function of a card open until it is killed.

use anyhow::Result;

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    match (words.next().as_deref(), words.next()) {
        (Some("--list"), _) => {
            println!("{}", serde_json::to_string(&vfiod_tests::lab::list())?);
            Ok(())
        }
        (Some("--hold"), Some(physical)) => vfiod_tests::lab::hold(&physical),
        _ => vfiod_tests::lab::serve(),
    }
}
