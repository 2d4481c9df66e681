//! Where a policy is kept: one file, and a directory of more. Reads these alone.

use std::fs;
use std::io;
use std::path::Path;

use super::Source;

/// The file.
const FILE: &str = "vfiod.toml";
/// The directory beside it.
const MORE: &str = "vfiod.toml.d";

/// The files of the policy in `directory`, in the order in which they are read. None is none.
pub fn sources(directory: &Path) -> io::Result<Vec<Source>> {
    let more = match fs::read_dir(directory.join(MORE)) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(within(&directory.join(MORE), &error)),
    };
    let mut more: Vec<_> =
        more.into_iter().filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
    more.sort_unstable();
    let mut sources = Vec::new();
    for path in std::iter::once(directory.join(FILE)).chain(more) {
        match fs::read_to_string(&path) {
            Ok(text) => sources.push(Source { name: path.display().to_string(), text }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(within(&path, &error)),
        }
    }
    Ok(sources)
}

fn within(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot read {}: {error}", path.display()))
}
