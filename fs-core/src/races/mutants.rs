//! Each rule broken on purpose, and the tests that notice.

use std::panic::catch_unwind;

use super::{coherence, files, loaders, ranges, retries, sizes};
use crate::mutation::{Mutation, forget_act, with_broken};

/// Asserts that `test` fails when `rule` is broken.
#[track_caller]
fn noticed(rule: Mutation, test: fn()) {
    assert!(fails(&[rule], test), "{rule:?} was not noticed");
}

/// Whether `test` fails when all of `rules` are broken.
fn fails(rules: &[Mutation], test: fn()) -> bool {
    let result = catch_unwind(|| match rules {
        [] => test(),
        [rule, rest @ ..] => with_broken(*rule, || assert!(!fails(rest, test), "noticed")),
    });
    forget_act();
    result.is_err()
}

#[test]
fn rule_1_broken_is_noticed() {
    use Mutation::{LoadIgnoresChanges, LoadInTwoSteps, LoadOverwrites};
    noticed(Mutation::TicketAfterTheTree, || loaders::a_late_loader(true));
    assert!(fails(&[LoadInTwoSteps, LoadIgnoresChanges], || loaders::a_late_loader(true)));
    // Two walls: a mapping that is there is left alone, and what has changed is refused. One is enough for this.
    let still_there = || loaders::a_late_loader(false);
    assert!(!fails(&[LoadInTwoSteps, LoadOverwrites], still_there));
    assert!(!fails(&[LoadInTwoSteps, LoadIgnoresChanges], still_there));
    assert!(fails(&[LoadInTwoSteps, LoadOverwrites, LoadIgnoresChanges], still_there));
    noticed(
        Mutation::TruncateWithoutInvalidate,
        loaders::what_is_loaded_amid_a_truncate_goes_with_the_next_step,
    );
}

#[test]
fn rule_2_broken_is_noticed() {
    noticed(
        Mutation::UnlockBeforeDirty,
        coherence::a_buffered_write_holds_its_range_until_its_pages_are_dirty,
    );
    noticed(Mutation::UnlockBeforeGrowth, ranges::two_appenders_never_get_the_same_place);
    noticed(Mutation::FallbackClearsDirty, ranges::a_fallback_leaves_the_pages_of_others_alone);
}

#[test]
fn rule_3_broken_is_noticed() {
    noticed(Mutation::PagesBeforeLock, coherence::a_direct_write_looks_for_pages_once_it_holds_the_range);
    noticed(Mutation::NoLookForOrdered, ranges::a_truncate_between_blocks_waits_for_flights);
    noticed(Mutation::FillUnlocked, coherence::a_direct_write_waits_for_a_fill_and_drops_its_page);
    noticed(Mutation::ReadPastPages, coherence::a_direct_read_sees_pages_in_every_state);
    noticed(Mutation::ViewBeforePages, sizes::a_direct_read_looks_at_its_view_again);
    noticed(
        Mutation::SizeCoversUnfinished,
        coherence::a_commit_stores_no_size_that_covers_an_unfinished_write,
    );
    noticed(Mutation::SizeBeforeData, sizes::the_size_grows_with_the_data);
}

#[test]
fn rule_4_broken_is_noticed() {
    noticed(Mutation::ShortReadKeepsHold, ranges::a_short_read_holds_nothing);
    noticed(Mutation::ShortReadKeepsLock, ranges::a_short_buffered_read_leaves_no_lock);
    noticed(Mutation::FallbackKeepsLock, ranges::a_fallback_gives_its_lock_up);
    noticed(Mutation::ErrorKeepsReservation, ranges::a_buffered_write_that_fails_keeps_no_reservation);
    noticed(Mutation::ErrorKeepsBlocks, ranges::a_direct_write_that_fails_gives_all_back);
    noticed(Mutation::ReadWithoutHold, ranges::a_read_keeps_its_blocks_until_its_last_try);
}

#[test]
fn rule_5_broken_is_noticed() {
    noticed(Mutation::RetryLocks, retries::a_retry_takes_no_lock);
    noticed(Mutation::TruncateDropsCutBlock, retries::a_truncate_keeps_the_block_that_it_cuts);
}

#[test]
fn earlier_lives_that_are_believed_are_noticed() {
    noticed(Mutation::ForgetByNumber, files::who_forgets_late_forgets_nobody_else);
    noticed(Mutation::SumsOutliveTheirBlocks, files::checksums_of_an_earlier_use_of_blocks_are_not_believed);
}
