//! The lab's agent: runs inside the lab; `--list` names its scenarios anywhere.

use anyhow::Result;

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some("--list") {
        println!("{}", serde_json::to_string(&vfiod_tests::lab::list())?);
        return Ok(());
    }
    vfiod_tests::lab::serve()
}
