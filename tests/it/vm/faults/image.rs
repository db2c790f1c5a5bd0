//! Images that cannot be pulled or cloned, and VMs that cannot be deleted.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f9_a_clone_without_room_or_time_or_source_leaves_no_name() -> Result<()> {
    let farm = one(&[
        rule("clone", "no_space", 0, 1),
        with(rule("clone", "slow", 1, 1), json!({ "seconds": 100 })),
        rule("clone", "source_gone", 2, 1),
    ])
    .await?;
    for _ in 0..3 {
        fine(&farm, "true").await?;
    }
    all_warm(&farm).await;
    assert_eq!(farm.mac(0).vms().len(), 1, "{:?}", farm.mac(0).vms());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f10_a_vm_that_seems_to_run_is_asked_to_go_until_it_goes() -> Result<()> {
    let farm = one(&[rule("delete", "running", 0, 3)]).await?;
    fine(&farm, "true").await?;
    fine(&farm, "true").await?;
    all_warm(&farm).await;
    let deletes = calls(farm.mac(0), "delete");
    assert!(deletes[..4].iter().all(|delete| delete.argv == deletes[0].argv), "{deletes:?}");
    assert_eq!(farm.mac(0).vms().len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f13_a_pull_that_fails_is_tried_again_and_no_job_is_lost_by_it() -> Result<()> {
    for fault in [
        with(rule("pull", "status", 0, 1), json!({ "code": 503 })),
        rule("pull", "offline", 0, 1),
        with(rule("pull", "reset", 0, 1), json!({ "times_reset": 5 })),
        rule("pull", "killed", 0, 1),
        rule("pull", "no_space", 0, 1),
        with(rule("pull", "lock_held", 0, 1), json!({ "seconds": 50 })),
        with(rule("pull", "delay", 0, 1), json!({ "seconds": 50 })),
    ] {
        let farm = one(std::slice::from_ref(&fault)).await?;
        let ended = job(&farm, json!({ "shell": "true" })).await?;
        assert_eq!(ended["state"], "succeeded", "{fault}: {ended}");
        for (reason, _) in losses(&farm, &ended).await? {
            assert!(reason == "image_pull_failure" || reason == "out_of_disk", "{fault}: {reason}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f13_an_image_that_was_pulled_is_here_although_the_question_fails() -> Result<()> {
    // The first one is whether it has to be pulled.
    let farm = one(&[with(rule("fqn", "fail", 0, 3), json!({ "exit": 1, "stderr": "Error: ?" }))]).await?;
    let ended = job(&farm, json!({ "shell": "true" })).await?;
    assert_eq!((&ended["state"], losses(&farm, &ended).await?), (&json!("succeeded"), vec![]), "{ended}");
    assert_eq!(calls(farm.mac(0), "pull").len(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f13_a_pull_that_stalls_is_ended() -> Result<()> {
    for fault in ["stall", "hang"] {
        let faults = vec![vec![rule("pull", fault, 0, 1)]];
        let farm = Farm::start(Setup { time_scale: 20, slots: 1, faults, ..macs() }).await?;
        let ended = job(&farm, json!({ "shell": "true" })).await?;
        assert_eq!(ended["state"], "succeeded", "{fault}: {ended}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f13_an_image_that_is_here_is_used_without_the_registry_and_one_that_is_nowhere_ends_its_job() -> Result<()> {
    let farm = one(&[]).await?;
    all_warm(&farm).await;
    let pulls = calls(farm.mac(0), "pull").len();
    farm.mac(0).faults(&[rule("pull", "offline", 0, 0)]);
    for _ in 0..2 {
        fine(&farm, "true").await?;
    }
    assert_eq!(calls(farm.mac(0), "pull").len(), pulls, "nobody asked the registry");
    for (code, name) in [(404, "absent"), (401, "secret")] {
        farm.mac(0).faults(&[with(rule("pull", "status", 0, 0), json!({ "code": code }))]);
        let ended =
            job(&farm, json!({ "shell": "true", "image": format!("registry.test/alloy/{name}:latest") })).await?;
        let told = (&ended["state"], &ended["reason"], &ended["blame"], &ended["attempt"]);
        assert_eq!(told, (&json!("errored"), &json!("image_pull_failure"), &json!("farm"), &json!(1)), "{ended}");
        assert!(ended["message"].as_str().is_some_and(|why| why.contains(&code.to_string())), "{ended}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f14_an_image_that_is_pruned_before_its_clone_comes_back() -> Result<()> {
    let farm = one(&[rule("clone", "source_gone", 0, 1), rule("pull", "offline", 1, 1)]).await?;
    fine(&farm, "true").await?;
    fine(&farm, "true").await?;
    for entry in farm.mac(0).journal() {
        assert!(entry.no_auto_prune && entry.ci, "{:?}", entry.argv);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f23_a_clone_whose_work_was_collected_under_it_is_made_once_more() -> Result<()> {
    let farm = one(&[rule("clone", "tmp_gone", 0, 1)]).await?;
    fine(&farm, "true").await?;
    let clones = calls(farm.mac(0), "clone");
    assert_eq!(clones[0].argv, clones[1].argv, "the same VM, not another one");
    Ok(())
}
