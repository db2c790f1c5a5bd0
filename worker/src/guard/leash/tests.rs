use std::sync::Arc;

use alloy_shared::runtime::SystemEnv;

use nix::sys::signal::kill;

use super::super::tests::{eventually, guard_program};
use super::*;
use crate::provider::Exit;

/// Orders go out without a pause while the command ends: one of them meets a guard that is gone already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_ends_while_orders_are_sent_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let program = guard_program(dir.path());
    for round in 0..20 {
        let leash = Leash::start(&program, dir.path().join(format!("guard-{round}"))).unwrap();
        let (fence_tx, fence) = watch::channel(Mono(u64::MAX));
        let (_input_tx, input) = mpsc::channel(1);
        let (output, mut heard) = mpsc::channel(16);
        let wires =
            Wires { env: Arc::new(SystemEnv::detached()), fence, doom: CancellationToken::new(), input, output };
        let launch = Launch {
            argv: vec!["sh".into(), "-c".into(), "exit 5".into()],
            env: vec![("PATH".into(), "/bin:/usr/bin".into()), ("HOME".into(), dir.path().display().to_string())],
            dir: dir.path().display().to_string(),
            vm_dir: dir.path().display().to_string(),
            control: None,
        };
        let orders = async {
            while fence_tx.send(Mono(u64::MAX - 1)).is_ok() {
                tokio::task::yield_now().await;
            }
        };
        let listen = async {
            loop {
                match heard.recv().await {
                    Some(ExecOutput::Bytes(..)) => {}
                    last => return last,
                }
            }
        };
        let run = leash.run(launch, wires);
        let (last, ()) = tokio::join!(listen, async {
            tokio::join!(run, orders);
        });
        assert!(matches!(last, Some(ExecOutput::Exit(Exit::Code(5)))), "round {round}: {last:?}");
    }
}

#[tokio::test]
async fn a_guard_that_was_told_to_stop_still_runs_and_stops_its_command() {
    let dir = tempfile::tempdir().unwrap();
    let record = dir.path().join("guard-0");
    let leash = Leash::start(&guard_program(dir.path()), record.clone()).unwrap();
    let own = eventually("the guard's record", || {
        let text = std::fs::read_to_string(&record).ok().filter(|text| text.ends_with('\n'))?;
        text.split(' ').nth(1)?.parse().ok().map(Pid::from_raw)
    });
    for number in [Number::SIGTERM, Number::SIGINT, Number::SIGHUP, Number::SIGQUIT] {
        kill(own, number).unwrap();
    }
    let (_fence_tx, fence) = watch::channel(Mono(u64::MAX));
    let (input_tx, input) = mpsc::channel(1);
    let (output, mut heard) = mpsc::channel(16);
    let wires = Wires { env: Arc::new(SystemEnv::detached()), fence, doom: CancellationToken::new(), input, output };
    let place = dir.path().display().to_string();
    let launch = Launch {
        argv: ["sh", "-c", "echo up; exec sleep 600"].map(str::to_owned).into(),
        env: vec![("PATH".into(), "/bin:/usr/bin".into())],
        dir: place.clone(),
        vm_dir: place,
        control: None,
    };
    let listen = async {
        assert_eq!(heard.recv().await, Some(ExecOutput::Bytes("up\n".into())));
        input_tx.send(ExecInput::Signal(Signal::Term)).await.unwrap();
        heard.recv().await
    };
    let (last, ()) = tokio::join!(listen, leash.run(launch, wires));
    assert_eq!(last, Some(ExecOutput::Exit(Exit::Signal(15))), "the command hears what its guard does not");
}
