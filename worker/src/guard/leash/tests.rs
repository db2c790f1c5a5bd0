use std::sync::Arc;

use alloy_shared::runtime::SystemEnv;

use super::super::tests::guard_program;
use super::*;

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
