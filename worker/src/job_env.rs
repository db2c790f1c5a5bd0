//! D: the environment that a job finds. Built from nothing: no variable of the daemon is in it, and no credential.

use std::collections::BTreeMap;

use alloy_shared::env::Ms;
use alloy_shared::wire::session::Assignment;

/// What a job may know of where it runs.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    pub worker: &'a str,
    pub image: &'a str,
    pub image_digest: &'a str,
    /// `warm` when the VM was waiting, else `cold`. None where there is no VM.
    pub vm_source: Option<&'a str>,
}

/// Returns the variables of a job. The spec's own come last and win. HOME, USER, PATH and TMPDIR are the guest's.
/// `workspace` is as the command sees it; at `deadline` it will be stopped.
pub fn job_env(assignment: &Assignment, place: &Place<'_>, workspace: &str, deadline: Ms) -> BTreeMap<String, String> {
    let mut env = farm_env(assignment, place);
    for (key, value) in [
        ("CI", "true"),
        ("ALLOY", "true"),
        ("TZ", "UTC"),
        ("LANG", "en_US.UTF-8"),
        ("TERM", "dumb"),
        // Output of Xcode's tools arrives as it is written, not when a pipe's buffer is full.
        ("NSUnbufferedIO", "YES"),
        ("ALLOY_WORKSPACE", workspace),
    ] {
        env.insert(key.to_owned(), value.to_owned());
    }
    env.insert("ALLOY_DEADLINE".to_owned(), deadline.rfc3339());
    env.extend(assignment.spec.env.iter().map(|(key, value)| (key.clone(), value.clone())));
    env
}

/// What the farm says about an attempt, to its command and to the operator's hooks.
pub fn farm_env(assignment: &Assignment, place: &Place<'_>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let mut set = |key: &str, value: String| {
        env.insert(key.to_owned(), value);
    };
    for (key, value) in [
        ("ALLOY_JOB_URL", assignment.job_url.as_str()),
        ("ALLOY_WORKER", place.worker),
        ("ALLOY_IMAGE", place.image),
        ("ALLOY_IMAGE_DIGEST", place.image_digest),
    ] {
        set(key, value.to_owned());
    }
    if let Some(source) = place.vm_source {
        set("ALLOY_VM_SOURCE", source.to_owned());
    }
    set("ALLOY_JOB_ID", assignment.attempt.job.to_string());
    set("ALLOY_JOB_ATTEMPT", assignment.attempt.attempt.to_string());
    set("ALLOY_ORG", assignment.org.to_string());
    set("ALLOY_TIMEOUT_SECONDS", assignment.timeout_ms.div_ceil(1000).to_string());
    if let Some(source) = &assignment.source {
        set("ALLOY_SOURCE_DIGEST", source.to_string());
    }
    if let Some(git) = &assignment.spec.git {
        set("ALLOY_GIT_COMMIT", git.commit.clone());
        set("ALLOY_GIT_DIRTY", git.dirty.to_string());
        if let Some(branch) = &git.branch {
            set("ALLOY_GIT_BRANCH", branch.clone());
        }
    }
    env
}

#[cfg(test)]
mod tests {
    use alloy_shared::id::{AttemptRef, DEFAULT_ORG, Digest, JobId};
    use alloy_shared::secret::Secret;
    use alloy_shared::wire::job::{GitInfo, JobSpec};

    use super::*;

    #[test]
    fn the_environment_is_exactly_what_is_promised() {
        let spec = JobSpec {
            env: BTreeMap::from([("TERM".into(), "xterm".into()), ("MY".into(), "a b".into())]),
            git: Some(GitInfo { commit: "abc".into(), branch: Some("main".into()), dirty: true }),
            ..JobSpec::default()
        };
        let assignment = Assignment {
            attempt: AttemptRef { job: JobId::from_raw(1), attempt: 2 },
            handle: 1,
            org: DEFAULT_ORG,
            spec,
            source: Some(Digest::of(b"s")),
            grant: Secret::new("alloy_job_secret".into()),
            timeout_ms: 1_500,
            cancel_grace_ms: 10,
            job_url: "http://farm/jobs/1".into(),
        };
        let place = Place { worker: "mini-1", image: "host", image_digest: "d", vm_source: Some("warm") };
        let env = job_env(&assignment, &place, "/w", Ms(1_700_000_000_000));
        let shown: Vec<String> = env.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let digest = Digest::of(b"s");
        let expected = format!(
            "ALLOY=true\nALLOY_DEADLINE=2023-11-14T22:13:20.000Z\nALLOY_GIT_BRANCH=main\nALLOY_GIT_COMMIT=abc\n\
             ALLOY_GIT_DIRTY=true\nALLOY_IMAGE=host\nALLOY_IMAGE_DIGEST=d\nALLOY_JOB_ATTEMPT=2\n\
             ALLOY_JOB_ID={}\nALLOY_JOB_URL=http://farm/jobs/1\nALLOY_ORG={DEFAULT_ORG}\nALLOY_SOURCE_DIGEST={digest}\n\
             ALLOY_TIMEOUT_SECONDS=2\nALLOY_VM_SOURCE=warm\nALLOY_WORKER=mini-1\nALLOY_WORKSPACE=/w\nCI=true\n\
             LANG=en_US.UTF-8\nMY=a b\nNSUnbufferedIO=YES\nTERM=xterm\nTZ=UTC",
            JobId::from_raw(1)
        );
        assert_eq!(shown.join("\n"), expected);
        assert!(!format!("{env:?}").contains("alloy_job_secret"));
    }
}
