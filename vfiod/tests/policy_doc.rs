//! `docs/policy.md` against the keys that are read, and the examples beside it.

use std::path::{Path, PathBuf};

use libvfio::policy::{Policy, Source, keys};

const BEGIN: &str = "<!-- keys: REGENERATE=1 cargo test -p vfiod --test policy_doc -->\n";
const END: &str = "<!-- end -->\n";

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

#[test]
fn the_document_has_every_key() {
    let path = docs().join("policy.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let wanted = format!("{before}{BEGIN}\n{}\n{END}{after}", keys::tables());
    if std::env::var_os("REGENERATE").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    let now = std::fs::read_to_string(&path).unwrap();
    assert!(now == wanted, "out of date: REGENERATE=1 cargo test -p vfiod --test policy_doc");
}

#[test]
fn every_example_is_a_policy_and_linked() {
    let document = std::fs::read_to_string(docs().join("policy.md")).unwrap();
    let mut count = 0;
    for entry in std::fs::read_dir(docs().join("policy")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(document.contains(&format!("policy/{name}")), "{name} is not linked");
        let text = std::fs::read_to_string(&path).unwrap();
        let policy = Policy::parse(&[Source { name, text }]).unwrap();
        assert!(policy.pools.len() >= 2);
        count += 1;
    }
    assert_eq!(count, 4);
}
