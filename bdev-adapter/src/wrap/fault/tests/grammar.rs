//! The keys of `fault:`.

use super::*;

#[test]
fn every_effect_has_a_key_with_every_condition() {
    let plain = [
        "read_error",
        "write_error",
        "flush_error",
        "io_error",
        "bit_rot",
        "stale_read",
        "lost_write",
        "torn_write",
        "torn_write_silent",
        "misdirected_write",
        "lying_flush",
        "never",
        "gone",
        "power_cut",
    ];
    let timed = ["slow", "gone_for"];
    for (effect, time) in plain.map(|effect| (effect, "")).into_iter().chain(timed.map(|e| (e, ":5ms"))) {
        let conditions =
            [("", "0.5"), ("_nth", "3"), ("_nth", "4"), ("_after", "9"), ("_range", "4KiB-1MiB")];
        let mut plan = FaultPlan::default();
        for (condition, value) in conditions {
            plan.set(&format!("{effect}{condition}"), &format!("{value}{time}")).unwrap();
        }
        let when: Vec<_> = plan.faults.iter().map(|fault| fault.when.clone()).collect();
        let expected =
            [When::Probability(0.5), When::Nth(3), When::Nth(4), When::After(9), When::Range(4096..MIB)];
        assert_eq!(when, expected, "{effect}");
        for fault in &plan.faults {
            if let Effect::Slow(time) | Effect::GoneFor(time) = fault.effect {
                assert_eq!(time, Duration::from_millis(5));
            }
        }
    }
}

#[test]
fn every_mistake_says_what_is_right() {
    // Arguments, what the message must contain.
    let table = [
        ("seed=-1", "seed=7"),
        ("volatile=yes", "volatile=on or off"),
        ("volatile=on,volatile=on", "twice"),
        ("bit_rot=1,bit_rot=0.5", "twice"),
        ("slow_nth=3:5ms,slow_nth=3:5ms", "twice"),
        ("gone_after=1,gone_after=2", "twice"),
        ("bit_rot=2", "0 to 1"),
        ("stale_read_nth=0", "counted from 1"),
        ("slow=0.5", "slow=0.5:50ms"),
        ("slow=0.5:50", "ns, us, ms or s"),
        ("slow=0.5:1.5s", "ns, us, ms or s"),
        ("slow=0.5:-1s", "ns, us, ms or s"),
        ("slow_nth=1:90000s", "up to a day"),
        ("slow_nth=1:99999999999999999999s", "up to a day"),
        ("slow_nth=x:1s", "counted from 1"),
        ("gone_for_after=1", "gone_for_after=1:50ms"),
        ("never_nth=5:1s", "counted from 1"),
        ("rot=1", "bit_rot"),
        ("torn_write_silently=1", "torn_write_silent"),
        ("lying_flush_range=2-1", "end excluded"),
        ("seed", "key=value"),
        ("slow=(1,2:1s", "0 to 1"),
    ];
    for (arguments, expected) in table {
        let uri = format!("fault:{arguments}/mem:1MiB");
        match open(&uri, &OpenOptions::default()) {
            Err(Error::BadUri { why, .. }) => {
                assert!(why.contains(expected), "{arguments}: '{why}' does not say '{expected}'");
            }
            other => panic!("{arguments}: {other:?}"),
        }
    }
}
