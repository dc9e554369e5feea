//! Rules that tests break on purpose, to see that tests notice; and points amid an operation at which a test may act.
//!
//! Outside of tests [`broken`] is constantly false and [`reached`] does nothing: neither costs anything.
//!
//! Both belong to the thread that asked for them. Operations run on the thread that polls, so a test that polls all channels itself, on
//! a mount without a helper, breaks the rule for all of them. (Under shuttle all threads of a schedule are one.)

/// A rule to break. Those of the design have their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests break rules"))]
pub(crate) enum Mutation {
    // ---- the extent map (rules 1 and 5)
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

    // ---- the checksum cache
    /// The checksum cache believes what it read without looking at the version again.
    SumsUnversioned,
    /// A loader's checksums replace newer ones.
    FillOverwrites,
    /// Checksums of an earlier use of a block stay when its new one stands in the record.
    SumsOutliveTheirBlocks,

    // ---- rule 1, loaders of a file
    /// No rule of its own, but a wall that stands in front of one: a loader hands in what it found in the metadata lock under which it
    /// read the tree. Without that, its ticket alone must keep the past out.
    LoadInTwoSteps,
    /// The same, and the ticket is of the moment after the tree was read.
    TicketAfterTheTree,
    /// Nothing is forgotten after a later step of a long truncate has changed the tree.
    TruncateWithoutInvalidate,

    // ---- rule 2
    /// A buffered write unlocks its range between its look at what is there and the dirty marks.
    UnlockBeforeDirty,
    /// A buffered write unlocks its range before the file has grown.
    UnlockBeforeGrowth,
    /// A direct write that goes the buffered way clears what is dirty in the range that it has let go.
    FallbackClearsDirty,

    // ---- rule 3
    /// A direct writer looks for pages before it has the range, and not again.
    PagesBeforeLock,
    /// Direct writers and truncates do not look for ordered extents.
    NoLookForOrdered,
    /// A buffered reader fills pages without the lock.
    FillUnlocked,
    /// A direct reader does not look for pages that are newer.
    ReadPastPages,
    /// A direct reader that found no newer pages believes a view from before it looked.
    ViewBeforePages,
    /// The size on disk covers ordered extents that are not finished.
    SizeCoversUnfinished,
    /// Readers see the new size before the data is there.
    SizeBeforeData,

    // ---- rule 4
    /// A read that ends with the file keeps its block hold.
    ShortReadKeepsHold,
    /// A buffered read that ends with the file keeps its lock.
    ShortReadKeepsLock,
    /// A direct write that goes the buffered way keeps the lock that it had.
    FallbackKeepsLock,
    /// A read does not hold its blocks against reuse.
    ReadWithoutHold,
    /// What a failed buffered write has reserved and not used is not given back.
    ErrorKeepsReservation,
    /// What a failed direct write has allocated is not given back.
    ErrorKeepsBlocks,

    // ---- rule 5
    /// A read that failed takes a lock on its range before it tries again.
    RetryLocks,
    /// A truncate drops the block that it cuts.
    TruncateDropsCutBlock,

    // ---- files in memory
    /// Who wants a file forgotten names its number: it may be another object by now.
    ForgetByNumber,
}

/// A moment in an operation, with no lock held but what the operation itself holds of ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests act"))]
pub(crate) enum Point {
    /// A loader has read the tree ([`Mutation::LoadInTwoSteps`]).
    TreeRead,
    /// A step of a long truncate is done, and another one follows.
    TruncateStep,
    /// A buffered write has reserved its space.
    Reserved,
    /// A buffered write has unlocked its range, and the file has not grown yet ([`Mutation::UnlockBeforeGrowth`]).
    Unlocked,
    /// A direct write has given up its range to go the buffered way.
    FellBack,
    /// A direct read has its view, and looks for newer pages next.
    ViewTaken,
    /// A pass of write-back is over, and may want its file forgotten.
    PassOver,
}

/// What a test does when a point is reached.
#[cfg(test)]
type Act = (Point, Box<dyn FnOnce()>);

#[cfg(test)]
thread_local! {
    /// A bit for each rule.
    static BROKEN: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
    static ACT: std::cell::RefCell<Option<Act>> = const { std::cell::RefCell::new(None) };
}

/// Whether the calling thread has broken `rule`.
#[inline(always)]
pub(crate) fn broken(rule: Mutation) -> bool {
    #[cfg(test)]
    return BROKEN.with(|broken| broken.get() >> rule as u32 & 1 == 1);
    #[cfg(not(test))]
    {
        let _ = rule;
        false
    }
}

/// A test that waits for this point on the calling thread acts now. Under shuttle others may go on here for a while.
#[inline(always)]
pub(crate) fn reached(point: Point) {
    #[cfg(all(test, shuttle))]
    {
        // Mostly at once, at times after the others have got somewhere.
        use shuttle::rand::Rng;
        let times = [0, 1, 10, 50][shuttle::rand::thread_rng().gen_range(0..4)];
        (0..times).for_each(|_| shuttle::thread::yield_now());
    }
    #[cfg(test)]
    {
        let act = ACT.with(|act| act.borrow_mut().take_if(|(wanted, _)| *wanted == point));
        if let Some((_, act)) = act {
            act();
        }
    }
    #[cfg(not(test))]
    let _ = point;
}

/// Breaks `rule` on the calling thread for the time of `run`.
#[cfg(test)]
pub(crate) fn with_broken<T>(rule: Mutation, run: impl FnOnce() -> T) -> T {
    struct Mend(u64);
    impl Drop for Mend {
        fn drop(&mut self) {
            BROKEN.with(|broken| broken.set(self.0));
        }
    }
    let before = BROKEN.with(|broken| broken.replace(broken.get() | 1 << rule as u32));
    let _mend = Mend(before);
    run()
}

/// Has `act` called when the calling thread reaches `point` next. Only one waits at a time.
#[cfg(all(test, not(any(loom, shuttle))))]
pub(crate) fn act_at(point: Point, act: impl FnOnce() + 'static) {
    ACT.with(|slot| *slot.borrow_mut() = Some((point, Box::new(act))));
}

/// Whether an action is still waiting for its point; it is taken away.
#[cfg(all(test, not(any(loom, shuttle))))]
pub(crate) fn forget_act() -> bool {
    ACT.with(|slot| slot.borrow_mut().take().is_some())
}
