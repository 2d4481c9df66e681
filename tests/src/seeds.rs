//! Seeds of the fuzz targets: readable files that stand for bytes. Reads `tests/fuzz/corpus` only.
//!
//! A file ending in `.hex` has lines `OFFSET: BYTES`, as lspci prints them, with zeros between and
//! `#` before comments; in one ending in `.fields` a line's end is a zero byte; any other is itself.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the seeds are, a directory for each target.
pub fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

/// The seeds of a target by name.
pub fn of(target: &str) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut seeds = Vec::new();
    for entry in fs::read_dir(directory().join(target))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = fs::read(&path)?;
        seeds.push((name, decoded(path.extension().and_then(|e| e.to_str()), bytes)));
    }
    seeds.sort();
    Ok(seeds)
}

fn decoded(form: Option<&str>, mut bytes: Vec<u8>) -> Vec<u8> {
    match form {
        Some("hex") => hex(&String::from_utf8_lossy(&bytes)),
        Some("fields") => {
            bytes.iter_mut().filter(|byte| **byte == b'\n').for_each(|byte| *byte = 0);
            bytes
        }
        _ => bytes,
    }
}

fn hex(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((offset, values)) = line.split_once(':') else { continue };
        bytes.resize(usize::from_str_radix(offset, 16).unwrap_or(0).min(1 << 16), 0);
        bytes.extend(values.split_whitespace().filter_map(|v| u8::from_str_radix(v, 16).ok()));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readable_files_stand_for_bytes() {
        assert_eq!(hex("# three\n00: de 10\n04: ff\n"), [0xde, 0x10, 0, 0, 0xff]);
        assert_eq!(decoded(Some("fields"), b"a\nb\n".to_vec()), b"a\0b\0");
        assert_eq!(decoded(Some("json"), b"a\n".to_vec()), b"a\n");
        assert_eq!(of("config").unwrap().len(), 6);
    }
}
