//! A good history, and one bad one for each way to break an invariant: the check names the invariant and no other.

use super::*;
use crate::noise::{range, sha256, stream, sum};

const JOB: &str = "job_a";

fn event(seq: u64, attempt: u32, kind: &str, state: &str, reason: Option<&str>) -> Seen {
    Seen::Event {
        who: "feed".into(),
        job: JOB.into(),
        seq,
        attempt,
        kind: kind.into(),
        state: state.into(),
        reason: reason.map(str::to_owned),
    }
}

fn log(attempt: u32, offset: u64, len: u64) -> Seen {
    let bytes = range(stream(JOB, attempt), offset, len);
    Seen::Log { who: "feed".into(), job: JOB.into(), attempt, offset, len, sum: sum(&bytes) }
}

fn stored(attempt: u32, len: u64) -> Seen {
    Seen::Stored { job: JOB.into(), attempt, len, sum: sum(&range(stream(JOB, attempt), 0, len)) }
}

fn end(who: &str, state: &str, attempt: u32, lost: u64) -> Seen {
    let (who, job, state) = (who.into(), JOB.into(), state.into());
    Seen::End { who, job, attempt, state, exit_code: Some(0), lost, blame: None }
}

/// The follower of the feed is told the end, and whoever asks.
fn ends() -> [Seen; 2] {
    [end("feed", "succeeded", 2, 1), end("api", "succeeded", 2, 1)]
}

fn printed(len: u64) -> Seen {
    Seen::Printed { job: JOB.into(), attempt: 2, len }
}

fn planned(len: u64) -> Seen {
    Seen::Planned { job: JOB.into(), len }
}

fn running(vms: &[(&str, &str, u32)]) -> Seen {
    let vm = |(host, name, attempt): &(&str, &str, u32)| Vm {
        host: (*host).into(),
        room: 1,
        name: (*name).into(),
        job: JOB.into(),
        attempt: *attempt,
    };
    Seen::Running { vms: vms.iter().map(vm).collect() }
}

/// A job whose first attempt was lost and whose second one did it.
fn good() -> Vec<Seen> {
    vec![
        Seen::Submit { key: "k".into(), retries: 0 },
        Seen::Answer { key: "k".into(), job: None },
        Seen::Answer { key: "k".into(), job: Some(JOB.into()) },
        Seen::Job { job: JOB.into(), retries: 0, ends: "succeeded".into() },
        event(1, 0, "submitted", "queued", None),
        event(2, 1, "assigned", "assigned", None),
        event(3, 1, "accepted", "running", None),
        event(4, 1, "phase", "running", None),
        running(&[("mini-0", "vm-1", 1)]),
        log(1, 0, 2_000),
        running(&[]),
        event(5, 1, "requeued", "queued", Some("worker_lost")),
        event(6, 2, "assigned", "assigned", None),
        event(7, 2, "accepted", "running", None),
        running(&[("mini-1", "vm-2", 2)]),
        log(2, 0, 100),
        log(2, 100, 4_900),
        event(8, 2, "finished", "succeeded", None),
        running(&[]),
        end("feed", "succeeded", 2, 1),
        end("api", "succeeded", 2, 1),
        printed(5_000),
        planned(5_000),
        stored(1, 3_000),
        stored(2, 5_000),
        Seen::Artifact {
            job: JOB.into(),
            path: "out".into(),
            size: 10,
            sha256: sha256(stream("out", 0), 10),
            got_size: 10,
            got_sha256: sha256(stream("out", 0), 10),
        },
        Seen::Listed { jobs: vec![JOB.into()] },
    ]
}

fn judged(history: Vec<Seen>) -> Vec<&'static str> {
    let lines: Vec<_> = history.into_iter().zip(0..).map(|(seen, at)| Line { at: at * 100, seen }).collect();
    let mut broken: Vec<_> = check(&lines).into_iter().map(|violation| violation.invariant).collect();
    broken.dedup();
    broken
}

/// The good history without these lines.
fn without(lines: &[Seen]) -> Vec<Seen> {
    assert!(lines.iter().all(|line| good().contains(line)), "{lines:?}");
    good().into_iter().filter(|seen| !lines.contains(seen)).collect()
}

/// The good history with this line replaced.
fn with(old: &Seen, new: &[Seen]) -> Vec<Seen> {
    let history = good();
    assert!(history.contains(old), "no {old:?}");
    history.into_iter().flat_map(|seen| if seen == *old { new.to_vec() } else { vec![seen] }).collect()
}

#[test]
fn a_good_history_breaks_nothing() {
    assert_eq!(judged(good()), [""; 0]);
}

#[test]
fn a_lost_job_and_a_key_with_two_jobs_break_i1() {
    let listed = Seen::Listed { jobs: vec![JOB.into()] };
    assert_eq!(judged(with(&listed, &[Seen::Listed { jobs: vec![] }])), ["I1"]);
    assert_eq!(judged(without(&ends())), ["I1"]);
    let failed = ends().map(|_| end("api", "failed", 2, 1));
    assert_eq!(judged(without(&ends()).into_iter().chain(failed).collect()), ["I1", "I6"]);
    let nobody = Seen::Answer { key: "k".into(), job: None };
    assert!(judged(with(&nobody, &[Seen::Answer { key: "k".into(), job: Some("job_b".into()) }])).contains(&"I1"));
}

#[test]
fn an_attempt_that_ends_twice_breaks_i2() {
    let twice = [event(8, 1, "finished", "succeeded", None)];
    assert!(judged(with(&event(8, 2, "finished", "succeeded", None), &twice)).contains(&"I2"));
}

#[test]
fn a_second_end_one_by_an_old_attempt_and_one_that_changes_break_i3() {
    let finished = event(8, 2, "finished", "succeeded", None);
    assert!(judged(with(&finished, &[finished.clone(), event(9, 2, "finished", "failed", None)])).contains(&"I3"));
    assert!(judged(with(&finished, &[event(8, 1, "finished", "succeeded", None)])).contains(&"I3"));
    let ended = end("feed", "succeeded", 2, 1);
    assert_eq!(judged(with(&ended, &[end("feed", "succeeded", 3, 1), ended.clone()])), ["I3"]);
}

#[test]
fn an_attempt_out_of_turn_breaks_i4() {
    let second = event(6, 2, "assigned", "assigned", None);
    assert!(judged(with(&second, &[event(6, 3, "assigned", "assigned", None)])).contains(&"I4"));
    let requeued = event(5, 1, "requeued", "queued", Some("worker_lost"));
    assert!(judged(with(&requeued, &[])).contains(&"I4"));
}

#[test]
fn a_stored_log_with_other_bytes_or_without_its_end_breaks_i5() {
    let wrong = Seen::Stored { job: JOB.into(), attempt: 1, len: 3_000, sum: 7 };
    assert_eq!(judged(with(&stored(1, 3_000), &[wrong])), ["I5"]);
    for len in [4_999, 5_001] {
        // Each of both is enough to tell.
        assert_eq!(judged(with(&printed(5_000), &[printed(len)])), ["I5"]);
        assert_eq!(judged(with(&planned(5_000), &[planned(len)])), ["I5"]);
    }
    assert_eq!(judged(with(&stored(1, 3_000), &[stored(1, 5_001)])), ["I5"]);
}

#[test]
fn a_log_whose_length_nobody_knows_but_the_farm_and_one_that_nobody_looked_at_break_i5() {
    assert_eq!(judged(without(&[printed(5_000)])), [""; 0]);
    assert_eq!(judged(without(&[planned(5_000)])), [""; 0]);
    assert_eq!(judged(without(&[printed(5_000), planned(5_000)])), ["I5"]);
    assert_eq!(judged(without(&[stored(2, 5_000)])), ["I5"]);
    // Of one that did not tell how it ended nobody knows it.
    assert_eq!(judged(without(&[stored(1, 3_000)])), [""; 0]);
}

#[test]
fn a_gap_a_repetition_wrong_bytes_and_a_missing_end_break_i6() {
    let second = log(2, 100, 4_900);
    for bad in [log(2, 101, 4_899), log(2, 99, 4_901), log(2, 100, 4_899)] {
        assert_eq!(judged(with(&second, &[bad])), ["I6"]);
    }
    let Seen::Log { who, job, attempt, offset, len, sum } = second.clone() else { unreachable!() };
    assert_eq!(judged(with(&second, &[Seen::Log { who, job, attempt, offset, len, sum: sum ^ 1 }])), ["I6"]);
    assert_eq!(judged(with(&second, &[second.clone(), log(2, 5_000, 1)])), ["I6"]);
}

#[test]
fn a_feed_that_withholds_the_beginning_of_a_log_or_all_of_it_breaks_i6() {
    assert_eq!(judged(without(&[log(2, 0, 100)])), ["I6"]);
    assert_eq!(judged(without(&[log(2, 0, 100), log(2, 100, 4_900)])), ["I6"]);
    assert_eq!(judged(with(&log(1, 0, 2_000), &[log(1, 1, 1_999)])), ["I6"]);
    // What a lost attempt had printed may come too late for a follower.
    assert_eq!(judged(without(&[log(1, 0, 2_000)])), [""; 0]);
}

#[test]
fn a_feed_that_withholds_the_log_of_a_lost_attempt_from_whoever_comes_later_breaks_i6() {
    let as_late = |seen: Seen| match seen {
        Seen::Event { job, seq, attempt, kind, state, reason, .. } => {
            Seen::Event { who: "late".into(), job, seq, attempt, kind, state, reason }
        }
        Seen::Log { job, attempt, offset, len, sum, .. } => {
            Seen::Log { who: "late".into(), job, attempt, offset, len, sum }
        }
        other => other,
    };
    let readable = Seen::Readable { job: JOB.into(), attempt: 1, len: 3_000 };
    let again = good().into_iter().filter(|seen| matches!(seen, Seen::Event { .. } | Seen::Log { .. })).map(as_late);
    let reads = |first: &[Seen]| {
        let end = end("late", "succeeded", 2, 1);
        let read = again.clone().filter(|seen| !matches!(seen, Seen::Log { attempt: 1, .. }));
        let first = first.iter().cloned().map(as_late);
        good().into_iter().chain([readable.clone()]).chain(first).chain(read).chain([end]).collect()
    };
    assert_eq!(judged(reads(&[log(1, 0, 3_000)])), [""; 0]);
    assert_eq!(judged(reads(&[log(1, 0, 2_000)])), ["I6"]);
    assert_eq!(judged(reads(&[])), ["I6"]);
}

#[test]
fn a_feed_that_goes_back_and_one_that_never_tells_the_end_break_i6() {
    let second = log(2, 100, 4_900);
    assert_eq!(judged(with(&second, &[log(1, 2_000, 10), second.clone()])), ["I6"]);
    assert_eq!(judged(without(&[end("feed", "succeeded", 2, 1)])), ["I6"]);
}

#[test]
fn a_raw_log_that_ends_too_early_breaks_i6() {
    let through = |attempt| Seen::Through { who: "raw".into(), job: JOB.into(), attempt };
    let as_raw = |seen: Seen| match seen {
        Seen::Log { job, attempt, offset, len, sum, .. } => {
            Seen::Log { who: "raw".into(), job, attempt, offset, len, sum }
        }
        other => other,
    };
    let all = [log(2, 0, 100), log(2, 100, 4_900)].map(as_raw);
    let heard = |parts: &[Seen], attempt| [&good()[..], parts, &[through(attempt)]].concat();
    assert_eq!(judged(heard(&all, 2)), [""; 0]);
    assert_eq!(judged(heard(&all[..1], 2)), ["I6"]);
    assert_eq!(judged(heard(&all[1..], 2)), ["I6"]);
    assert_eq!(judged(heard(&[], 2)), ["I6"]);
    // The tail of a lost attempt may come later.
    assert_eq!(judged(heard(&[], 1)), [""; 0]);
}

#[test]
fn an_artifact_with_other_bytes_breaks_i7() {
    let right = good().into_iter().find(|seen| matches!(seen, Seen::Artifact { .. })).unwrap();
    let Seen::Artifact { job, path, size, sha256, got_size, .. } = right.clone() else { unreachable!() };
    let wrong = Seen::Artifact { job, path, size, sha256, got_size, got_sha256: "x".into() };
    assert_eq!(judged(with(&right, &[wrong])), ["I7"]);
}

#[test]
fn too_many_vms_one_used_twice_and_one_that_stays_break_i8() {
    let first = running(&[("mini-0", "vm-1", 1)]);
    let many = running(&[("mini-0", "vm-1", 1), ("mini-0", "vm-3", 1)]);
    assert_eq!(judged(with(&first, &[many])), ["I8"]);
    let second = running(&[("mini-1", "vm-2", 2)]);
    assert_eq!(judged(with(&second, &[running(&[("mini-0", "vm-1", 2)])])), ["I8"]);
    let stays: Vec<_> = good().into_iter().zip(0..).map(|(seen, at)| Line { at: at * 50_000, seen }).collect();
    let requeued = stays.iter().position(|line| matches!(&line.seen, Seen::Event { kind, .. } if kind == "requeued"));
    let mut late = stays.clone();
    late.remove(requeued.unwrap() - 1);
    assert!(check(&stays).is_empty());
    assert!(check(&late).iter().any(|violation| violation.invariant == "I8"));
}

#[test]
fn a_vm_that_stays_while_others_come_and_go_breaks_i8() {
    let Seen::Running { vms: own } = running(&[("mini-0", "vm-1", 1)]) else { unreachable!() };
    let other = Vm { host: "mini-2".into(), room: 1, name: "vm-9".into(), job: "another".into(), attempt: 1 };
    let both = [&own[..], &[other]].concat();
    let requeued =
        good().iter().position(|seen| matches!(seen, Seen::Event { kind, .. } if kind == "requeued")).unwrap();
    for (gone_at, expected) in [(60_000, &[][..]), (60_001, &["I8"]), (110_000, &["I8"])] {
        let looks = [(40_000, &both), (55_000, &own), (gone_at, &Vec::new())];
        let mut lines: Vec<_> = good().into_iter().zip(0..).map(|(seen, at)| Line { at, seen }).collect();
        let over = lines[requeued].at;
        let later = lines.split_off(requeued + 1);
        lines.remove(requeued - 1);
        lines.extend(looks.map(|(at, vms)| Line { at: over + at, seen: Seen::Running { vms: vms.clone() } }));
        lines.extend(later.into_iter().map(|line| Line { at: over + gone_at + line.at, ..line }));
        let broken: Vec<_> = check(&lines).into_iter().map(|violation| violation.invariant).collect();
        assert_eq!(broken, expected, "gone after {gone_at} ms");
    }
}

#[test]
fn two_attempts_alive_break_i9() {
    let second = running(&[("mini-1", "vm-2", 2)]);
    let both = running(&[("mini-0", "vm-1", 1), ("mini-1", "vm-2", 2)]);
    assert_eq!(judged(with(&second, &[both])), ["I9"]);
}

#[test]
fn a_charge_for_the_farms_fault_breaks_i10() {
    let requeued = event(5, 1, "requeued", "queued", Some("worker_lost"));
    assert!(judged(with(&requeued, &[event(5, 1, "requeued", "queued", Some("script_failure"))])).contains(&"I10"));
    let uncounted = ["feed", "api"].map(|who| end(who, "succeeded", 2, 0));
    assert_eq!(judged(without(&ends()).into_iter().chain(uncounted).collect()), ["I10"]);
}

#[test]
fn a_gap_another_story_and_an_illegal_step_break_i14() {
    assert_eq!(judged(without(&[event(4, 1, "phase", "running", None)])), ["I14"]);
    assert_eq!(judged(without(&[event(1, 0, "submitted", "queued", None)])), ["I14"]);
    assert_eq!(
        judged(with(&event(3, 1, "accepted", "running", None), &[event(3, 1, "phase", "running", None)])),
        ["I14"]
    );
    let Seen::Event { job, seq, attempt, kind, state, .. } = event(1, 0, "submitted", "assigned", None) else {
        unreachable!()
    };
    let other = Seen::Event { who: "other".into(), job, seq, attempt, kind, state, reason: None };
    let first = event(1, 0, "submitted", "queued", None);
    assert_eq!(judged(with(&first, &[first.clone(), other])), ["I6", "I14"], "nobody told it the end either");
}

#[test]
fn a_history_is_read_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let recorder = Recorder::create(&dir.path().join("history")).unwrap();
    good().into_iter().for_each(|seen| recorder.write(seen));
    recorder.log("raw", JOB, 2, 0, &range(stream(JOB, 2), 0, 5_000));
    recorder.write(Seen::Through { who: "raw".into(), job: JOB.into(), attempt: 2 });
    let read = recorder.read().unwrap();
    assert_eq!(read.iter().map(|line| line.seen.clone()).take(good().len()).collect::<Vec<_>>(), good());
    assert!(check(&read).is_empty());
}
