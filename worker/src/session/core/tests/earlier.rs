//! What a daemon that is gone left on the disk.

use super::*;

#[test]
fn what_an_earlier_daemon_left_is_finished() {
    let go_on = |log_durable, seq| order(Order::Continue { attempt: AT, handle: 3, log_durable, seq });
    // Lost: its tail is sent, and it is forgotten once that is durable.
    let mut bench = Bench::new(vec![(held(HeldState::Lost, 500, 2), vec![(1, Report::Accepted), (2, phase())])]);
    bench.give(Input::Tick);
    bench.give(Input::Linked);
    let effects = bench.give(Input::Heard(ToWorker::Challenge { nonce: "n".into() }));
    let [Effect::Hello { held: said, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(said, &[held(HeldState::Lost, 500, 2)]);
    bench.give(welcome());
    assert_eq!(bench.give(go_on(200, 1)), []);
    assert_eq!(logs(&bench.give(Input::Room)), Some((3, 200, 300)));
    let effects = bench.give(Input::Heard(ToWorker::LogAck { attempt: AT, durable: 500 }));
    assert!(closes(&effects) && forgets(&effects), "{effects:?}");

    // Its result is on disk: it is sent again with whatever was not acknowledged.
    let reports = vec![(1, Report::Accepted), (2, phase()), (3, result(500))];
    let mut bench = Bench::new(vec![(held(HeldState::ResultPending, 500, 3), reports)]);
    bench.give(Input::Tick);
    bench.link();
    assert_eq!(sent(&bench.give(go_on(200, 1))), [2]);
    assert_eq!(sent(&bench.give(Input::Room)), [3]);
    let effects = bench.give(order(Order::ResultAck { attempt: AT }));
    assert!(closes(&effects) && forgets(&effects), "{effects:?}");

    // Its disk has more than the result speaks of: all of it goes.
    let mut bench =
        Bench::new(vec![(held(HeldState::ResultPending, 500, 2), vec![(1, Report::Accepted), (2, result(200))])]);
    bench.give(Input::Tick);
    bench.link();
    assert_eq!(sent(&bench.give(go_on(200, 1))), [0; 0]);
    let effects = bench.give(Input::Room);
    assert_eq!((logs(&effects), sent(&effects)), (Some((3, 200, 300)), vec![2]));
    let effects = bench.give(order(Order::ResultAck { attempt: AT }));
    assert!(!closes(&effects) && !forgets(&effects), "{effects:?}");
    let effects = bench.give(Input::Heard(ToWorker::LogAck { attempt: AT, durable: 500 }));
    assert!(closes(&effects) && forgets(&effects), "{effects:?}");

    let mut bench = Bench::new(vec![(held(HeldState::Lost, 500, 2), vec![])]);
    bench.give(Input::Tick);
    bench.link();
    assert_eq!(bench.give(order(Order::Fence { attempt: AT })), [Effect::Forget { attempt: AT }]);
}
