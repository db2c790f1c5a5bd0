//! VMs that fail under a command.

use super::*;
use alloy_tests::farm::full;

/// The scripts of the worker before a job's own: is the guest there, preparation, hand-over.
const BEFORE: u64 = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f4_an_agent_that_crashes_under_a_command_is_the_farms_fault() -> Result<()> {
    let crash = with(rule("guest-exec", "agent_crash", BEFORE, 1), json!({ "seconds": 20 }));
    let farm = one(&[crash]).await?;
    let (_, losses) = dies_once(&farm, "true").await?;
    assert_eq!(losses[0].0, "vm_lost", "{losses:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f5_a_stream_that_ends_without_an_exit_is_no_success() -> Result<()> {
    let farm = one(&[rule("guest-exec", "no_exit", BEFORE, 1)]).await?;
    let ended = job(&farm, json!({ "shell": "echo said; exit 9" })).await?;
    // The output says more than the stream: the mark at its end has the command's own status.
    assert_eq!(
        (&ended["state"], &ended["exit_code"], &ended["lost"]),
        (&json!("failed"), &json!(9), &json!(0)),
        "{ended}"
    );
    assert_eq!(text(&farm.api().log(ended["id"].as_str().context("an id")?).await?), "said\n");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f6_a_stream_that_stays_open_holds_no_job_and_a_late_command_is_killed_with_its_vm() -> Result<()> {
    let farm = one(&[rule("guest-exec", "hang", BEFORE, 1)]).await?;
    let ended = job(&farm, json!({ "shell": "echo done; exit 3" })).await?;
    assert_eq!((&ended["state"], &ended["exit_code"]), (&json!("failed"), &json!(3)), "{ended}");
    let stubborn = "trap '' TERM; (setsid sh -c 'trap \"\" TERM; sleep 987' &); echo up; sleep 986; sleep 986";
    let ended = job(&farm, json!({ "shell": stubborn, "timeout_ms": 1_500 })).await?;
    assert_eq!((&ended["state"], &ended["reason"]), (&json!("timed_out"), &json!("run_timeout")), "{ended}");
    all_warm(&farm).await;
    let left = farm.mac(0).processes().into_iter().filter(|found| found.line.contains("sleep 98"));
    assert_eq!(left.map(|found| found.line).collect::<Vec<_>>(), Vec::<String>::new());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f7_every_way_in_which_a_run_ends_under_a_job_is_a_lost_vm() -> Result<()> {
    let files = tempfile::tempdir()?;
    let file = |how: &str| files.path().join(how);
    let ways = ["crash", "network", "error", "kill"];
    let die = |(skip, how): (u64, &str)| {
        with(rule("run", "die", skip, 1), json!({ "how": how, "at": "agent", "file": file(how) }))
    };
    // Two deaths a job, then a VM that lives.
    let farm = one(&[0, 1, 3, 4].into_iter().zip(ways).map(die).collect::<Vec<_>>()).await?;
    for pair in ways.chunks(2) {
        let shell = "echo \"attempt $ALLOY_JOB_ATTEMPT\"; [ \"$ALLOY_JOB_ATTEMPT\" = 3 ] || sleep 600";
        let id = farm.api().shell(shell).await?;
        for (number, how) in pair.iter().enumerate() {
            farm.api().log_has(&id, &format!("attempt {}\n", number + 1)).await;
            std::fs::write(file(how), "")?;
            until("the next attempt runs", async || {
                Ok((farm.api().job(&id).await?["attempt"] == number + 2).then_some(()))
            })
            .await;
        }
        let ended = farm.api().end(&id).await;
        assert_eq!((&ended["state"], &ended["lost"]), (&json!("succeeded"), &json!(2)), "{ended}");
        for (reason, message) in losses(&farm, &ended).await? {
            assert_eq!(reason, "vm_lost", "{message}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f8_a_guest_that_shuts_itself_down_is_a_lost_vm_and_says_so() -> Result<()> {
    let stop = with(rule("run", "die", 1, 1), json!({ "how": "stop", "at": "lease" }));
    let farm = one(&[stop]).await?;
    let (_, losses) = dies_once(&farm, "sudo shutdown -h now").await?;
    assert!(losses[0].0 == "vm_lost" && losses[0].1.contains("guest has stopped"), "{losses:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f26_output_of_any_size_and_kind_arrives_as_it_was_written() -> Result<()> {
    let farm = one(&[]).await?;
    let size: usize = if full() { 100_000_000 } else { 8_000_000 };
    // No newline, no UTF-8, both streams by turns.
    let shell = format!(
        "export LC_ALL=C; head -c {size} /dev/zero | tr '\\0' '\\377'; \
         for n in 1 2 3; do printf 'o%s' $n; printf 'e%s' $n >&2; done; printf '\\303\\050'"
    );
    let ended = job(&farm, json!({ "shell": shell })).await?;
    assert_eq!((&ended["state"], &ended["lost"]), (&json!("succeeded"), &json!(0)), "{ended}");
    let log = farm.api().log(ended["id"].as_str().context("an id")?).await?;
    assert_eq!(log.len(), size + 14);
    assert!(log[..size].iter().all(|byte| *byte == 0xff));
    assert_eq!(&log[size..], b"o1e1o2e2o3e3\xc3\x28");
    Ok(())
}
