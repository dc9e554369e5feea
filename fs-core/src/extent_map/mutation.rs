//! Rules that a test can break on purpose, to see that another test notices.
//!
//! Outside of tests [`broken`] is constantly false and the mutations cost nothing.

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests break rules"))]
pub(crate) enum Mutation {
    /// A published mapping is not pinned.
    PublishWithoutPin,
    /// A loader overwrites what is there.
    LoadOverwrites,
    /// A loader's result is taken although the range changed since its ticket.
    LoadIgnoresChanges,
    /// Unpinning is not a change for loaders: one that read the tree before the insertion is believed after it.
    UnpinUnrecorded,
    /// Unpin takes the pin of whatever is in the range, also of a newer mapping.
    UnpinIgnoresIdentity,
    /// Eviction takes pinned entries.
    EvictTakesPinned,
    /// Invalidation drops pinned entries.
    InvalidateDropsPinned,
    /// Pinned entries merge.
    MergePinned,
    /// Neighbours merge that do not continue each other on the device.
    MergeIgnoresAddress,
    /// Merging forgets the checksums that stood in the entries.
    MergeLosesChecksums,
    /// The rear part of a split entry keeps the address of the front.
    SplitKeepsAddress,
    /// A publication of several extents swaps the view after each.
    PublishPiecemeal,
    /// The size changes after the mappings, in a swap of its own.
    SizeAfterMappings,
    /// Replaced nodes are freed at once, without waiting for readers to leave.
    #[allow(dead_code, reason = "undefined behaviour: for a run under a sanitizer only")]
    FreeAtOnce,
    /// Replaced nodes are never freed.
    NeverFree,
    /// The checksum cache believes what it read without looking at the version again.
    SumsUnversioned,
    /// A loader's checksums replace newer ones.
    FillOverwrites,
}

#[cfg(test)]
thread_local! {
    static BROKEN: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}

/// Whether the calling thread has broken `rule`.
#[inline(always)]
pub(crate) fn broken(rule: Mutation) -> bool {
    #[cfg(test)]
    return BROKEN.with(|broken| broken.get() == Some(rule));
    #[cfg(not(test))]
    {
        let _ = rule;
        false
    }
}

/// Breaks `rule` on the calling thread for the time of `run`.
#[cfg(test)]
pub(crate) fn with_broken<T>(rule: Mutation, run: impl FnOnce() -> T) -> T {
    struct Mend;
    impl Drop for Mend {
        fn drop(&mut self) {
            BROKEN.with(|broken| broken.set(None));
        }
    }
    BROKEN.with(|broken| broken.set(Some(rule)));
    let _mend = Mend;
    run()
}
