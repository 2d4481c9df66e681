//! Memory that is free goes back to the kernel. Knows nothing of what it was for.

/// Gives back the pages of the heap on which nothing is. A burst of calls leaves them between those
/// that stay, where the allocator by itself never gives them back.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointer, and frees nothing that is in use; any thread may call it at any time.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
