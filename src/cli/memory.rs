//! How the C library hands memory back: what a long-lived process used for a moment is not kept for ever.

/// Allocations from this size on are pages of their own, which go back to the system when they are freed. Left to itself,
/// the C library raises the limit to the largest block it has seen, and keeps blocks of megabytes in its heaps.
const OWN_PAGES: libc::c_int = 512 << 10;

/// Heaps that threads share. Left to itself, the C library makes eight for each processor, and each keeps its largest.
const HEAPS: libc::c_int = 2;

/// For processes that live as long as a server does. Where there is no such setting nothing happens.
pub fn hand_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` (malloc/malloc.c) only sets parameters, and locks while it does.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}
