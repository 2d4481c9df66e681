//! The parsers against inputs that nobody thought of. Built with `--cfg fuzzing` this is libFuzzer
//! with the target that `VFIOD_FUZZ` names, as `cargo xtask fuzz` runs it; else it runs a target
//! once over each file given: `vfiod-fuzz TARGET FILE...`.

#![cfg_attr(fuzzing, no_main)]

mod targets;

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    static CHOSEN: std::sync::OnceLock<&targets::Target> = std::sync::OnceLock::new();
    let chosen =
        || targets::named(&std::env::var("VFIOD_FUZZ").expect("VFIOD_FUZZ names a target"));
    (CHOSEN.get_or_init(chosen).run)(input);
});

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let target = arguments.next().expect("usage: vfiod-fuzz TARGET FILE...");
    let target = targets::named(&target.to_string_lossy());
    for file in arguments {
        (target.run)(&std::fs::read(&file)?);
        println!("{}: no fault", file.display());
    }
    Ok(())
}
