//! Where the lab keeps what is slow to make: a directory per recipe, whole or not there at all.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// `$VFIOD_LAB_CACHE`, or `vfiod-lab` in the user's cache directory.
pub(super) fn directory() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let directory = if let Some(directory) = set("VFIOD_LAB_CACHE") {
        PathBuf::from(directory)
    } else if let Some(cache) = set("XDG_CACHE_HOME") {
        Path::new(&cache).join("vfiod-lab")
    } else {
        Path::new(&set("HOME").context("HOME is not set")?).join(".cache/vfiod-lab")
    };
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    directory.canonicalize().with_context(|| directory.display().to_string())
}

/// The directory made by `make` from `recipe`: the one at hand, or a new one.
///
/// `make` fills an empty directory that gets its name only when all of it is there; while it does,
/// others that want the same wait.
pub(super) fn get(recipe: &impl Hash, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let cache = directory()?;
    let mut hasher = DefaultHasher::new();
    recipe.hash(&mut hasher);
    let ready = cache.join(format!("{:016x}", hasher.finish()));

    // Whoever cleans waits for all that is being made.
    let all = File::create(cache.join("lock"))?;
    all.lock_shared().context("waiting for the lab's cache")?;
    let lock = File::create(ready.with_extension("lock"))?;
    lock.lock().context("waiting for another who makes the same")?;
    if !ready.exists() {
        let growing = ready.with_extension("growing");
        remove(&growing)?;
        fs::create_dir(&growing)?;
        make(&growing)?;
        fs::rename(&growing, &ready)?;
    }
    Ok(ready)
}

/// Removes all that is cached.
pub(super) fn clean() -> Result<()> {
    let cache = directory()?;
    let lock = File::create(cache.join("lock"))?;
    lock.lock().context("waiting for the lab's cache")?;
    for entry in fs::read_dir(&cache)? {
        let path = entry?.path();
        if path.is_dir() {
            remove(&path)?;
        }
    }
    eprintln!("{} is empty", cache.display());
    Ok(())
}

fn remove(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory)
            .with_context(|| format!("removing {}", directory.display()))?;
    }
    Ok(())
}
