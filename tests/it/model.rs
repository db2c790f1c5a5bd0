//! The protocol and the rule for outages, explored to the end within a bound, and mutants of both.

use alloy_tests::model::mutant::Mutant;
use alloy_tests::model::outage::Outage;
use alloy_tests::model::protocol::Bound;
use alloy_tests::model::run;

/// Each mutant is noticed by the check that is named for it.
macro_rules! mutants {
    ($($name:ident => $mutant:ident),+ $(,)?) => {
        $(
            #[test]
            fn $name() {
                is_caught(Mutant::$mutant);
            }
        )+

        #[test]
        fn every_mutant_has_a_test() {
            let tried = [$(Mutant::$mutant),+];
            assert!(Mutant::all().all(|mutant| tried.contains(&mutant)));
            assert!(tried.len() >= 12);
        }
    };
}

mutants! {
    no_fence_on_complete_is_noticed => NoFenceOnComplete,
    no_offset_check_is_noticed => NoOffsetCheck,
    complete_before_log_is_noticed => CompleteBeforeLog,
    attempt_number_reused_is_noticed => AttemptNumberReused,
    no_fence_on_log_is_noticed => NoFenceOnLog,
    complete_twice_is_noticed => CompleteTwice,
    ack_before_commit_is_noticed => AckBeforeCommit,
    ack_before_sync_is_noticed => AckBeforeSync,
    stale_epoch_accepted_is_noticed => StaleEpochAccepted,
    cancel_lost_is_noticed => CancelLost,
    resent_result_counts_is_noticed => ResentResultCounts,
    expire_in_grace_is_noticed => ExpireInGrace,
    no_self_fence_is_noticed => NoSelfFence,
    silence_believed_is_noticed => SilenceBelieved,
    vm_outlives_daemon_is_noticed => VmOutlivesDaemon,
    expiry_not_extended_is_noticed => ExpiryNotExtended,
    ack_from_non_owner_is_noticed => AckFromNonOwner,
    no_flush_is_noticed => NoFlush,
    unbounded_provisional_acks_is_noticed => UnboundedProvisionalAcks,
    late_fence_is_noticed => LateFence,
    no_provisional_acks_is_noticed => NoProvisionalAcks,
    hello_forgotten_is_noticed => HelloForgotten,
}

fn is_caught(mutant: Mutant) {
    let report = run::mutant(mutant);
    let trace = report.trace(mutant);
    let check = mutant.caught_by();
    let steps = trace.unwrap_or_else(|| panic!("{mutant:?} is not noticed by \"{check}\": {report}")).len();
    println!("{}: \"{check}\" after {steps} steps, {} states, {:?}", mutant.name(), report.states, report.took);
}

#[test]
fn a_lease_outlives_outages_of_the_database_and_no_two_vms_do() {
    let report = run::outage(Outage::SMALL);
    println!("{report}");
    assert!(report.is_good(), "{report}");
}

#[test]
fn no_order_of_events_breaks_the_protocol() {
    // The small bound itself is the gate's own step: `cargo model`, optimised.
    let report = run::protocol(Bound::TINY, None);
    println!("{report}");
    assert!(report.broken.is_empty(), "{report}");
    assert!(report.unseen.iter().all(|sight| sight.contains("cancel")), "{report}");
}
