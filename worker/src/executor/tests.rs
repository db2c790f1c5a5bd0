use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use alloy_shared::env::Now;
use alloy_shared::id::{DEFAULT_ORG, Digest, JobId};
use alloy_shared::limits::Limits;
use alloy_shared::secret::Secret;
use alloy_shared::wire::job::JobSpec;
use alloy_shared::wire::session::Link;
use alloy_shared::wire::source::{Entry, EntryKind, Manifest};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::*;
use crate::guard::tests::guard_program;
use crate::hooks::Hooks;
use crate::images::{ImageSetup, ImageStore};
use crate::provider::host::HOST_IMAGE;
use crate::provider::host::tests::Fixture;
use crate::provider::{ArtifactRule, Guest, ImageRef, Listing};
use crate::session::Fence;
use crate::sources::Sources;
use crate::sources::tests::{small_disk, small_limits};
use crate::spool::{Spool, SpoolFile};
use crate::upstream::{Blobs, DialError, Upstream};
use crate::vm_demand::Wish;
use crate::vm_pool::{PoolSetup, VmPool};

mod deaf;
mod flood;

const AT: AttemptRef = AttemptRef { job: JobId::from_raw(5), attempt: 2 };

/// A farm that has sources, takes artifacts, or does neither.
#[derive(Default)]
struct Farm {
    blobs: HashMap<Digest, Bytes>,
    taken: Mutex<HashMap<Digest, Vec<u8>>>,
    refuses: bool,
    /// Artifacts whose transfer breaks off.
    breaks: AtomicU32,
    /// Questions for a manifest that break off.
    cuts: AtomicU32,
}

#[async_trait]
impl Upstream for Farm {
    async fn dial(&self) -> Result<Link, DialError> {
        Err(DialError::Unreachable("not here".into()))
    }
    async fn manifest(&self, _: &Grant) -> Result<Bytes, TransferError> {
        let one_less = |cuts: u32| cuts.checked_sub(1);
        if self.cuts.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
            return Err(TransferError::Broken("the farm restarts".into()));
        }
        let manifest = self.blobs.values().find(|bytes| Manifest::decode(bytes).is_ok());
        manifest.cloned().ok_or_else(|| TransferError::Refused("no manifest".into()))
    }
    async fn fetch(&self, _: &Grant, missing: &[Digest]) -> Result<Blobs, TransferError> {
        let (tx, rx) = mpsc::channel(missing.len());
        for digest in missing {
            let bytes = self.blobs.get(digest).ok_or_else(|| TransferError::Refused(format!("no blob {digest}")))?;
            tx.try_send(Ok((*digest, bytes.clone()))).unwrap();
        }
        Ok(rx)
    }
    async fn put(&self, _: &Grant, file: &SpoolFile) -> Result<Digest, TransferError> {
        if self.refuses {
            return Err(TransferError::Refused("not these".into()));
        }
        if self.breaks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return Err(TransferError::Broken("no route".into()));
        }
        let mut pieces = file.open(0).unwrap();
        let mut all = Vec::new();
        while let Some(piece) = pieces.recv().await {
            all.extend_from_slice(&piece);
        }
        assert_eq!(Digest::of(&all), file.digest());
        self.taken.lock().unwrap().insert(file.digest(), all);
        Ok(file.digest())
    }
}

/// Hooks of a directory that is not there until a test makes it.
async fn hooks_in(fixture: &Fixture) -> Hooks {
    let setup = crate::hooks::Setup {
        dir: fixture.dir.path().join("hooks"),
        state_dir: fixture.dir.path().to_owned(),
        guard: guard_program(fixture.dir.path()),
        env: Arc::clone(&fixture.env),
    };
    Hooks::open(setup).await
}

struct Rig {
    fixture: Fixture,
    ctx: Arc<Ctx>,
    farm: Arc<Farm>,
    inputs: mpsc::Receiver<Input>,
}

/// What the session heard of one attempt.
#[derive(Default)]
struct Story {
    phases: Vec<Phase>,
    artifacts: Vec<String>,
    result: Option<ResultReport>,
    log: String,
    /// Of the directories that the command named, one was there when its result was told.
    still_there: bool,
    closed: bool,
}

impl Rig {
    async fn new(farm: Farm) -> Self {
        Self::within(farm, Limits::default()).await
    }

    async fn within(farm: Farm, limits: Limits) -> Self {
        let fixture = Fixture::new();
        std::fs::create_dir(fixture.dir.path().join("hooks")).unwrap();
        let (tx, inputs) = mpsc::channel(10_000);
        let farm = Arc::new(farm);
        let images = ImageStore::start(ImageSetup {
            env: Arc::clone(&fixture.env),
            limits: limits.clone(),
            provider: Arc::clone(&fixture.host) as _,
            inputs: tx.clone(),
            book: crate::image_book::BookFile::new(fixture.dir.path()),
            kept: vec![ImageRef(HOST_IMAGE.into())],
            budget: None,
        });
        let setup = PoolSetup {
            images,
            env: Arc::clone(&fixture.env),
            limits: limits.clone(),
            provider: Arc::clone(&fixture.host) as _,
            inputs: tx.clone(),
            fence: Fence::new().watch(),
            state_dir: fixture.dir.path().to_owned(),
            wish: Wish { slots: 1, image: ImageRef(HOST_IMAGE.into()), floors: Vec::new() },
        };
        let ctx = Arc::new(Ctx {
            env: Arc::clone(&fixture.env),
            limits,
            pool: VmPool::start(setup).await,
            spool: Arc::new(Spool::memory()),
            sources: Arc::new(Sources::open(&fixture.dir.path().join("cache"), 1 << 30).unwrap()),
            upstream: Arc::clone(&farm) as _,
            inputs: tx,
            hooks: Arc::new(hooks_in(&fixture).await),
            worker_name: "mini".into(),
        });
        Self { fixture, ctx, farm, inputs }
    }

    fn hooks(&self) -> PathBuf {
        self.fixture.dir.path().join("hooks")
    }

    fn post_job(&self, line: &str) {
        let hook = self.hooks().join("post-job");
        std::fs::write(&hook, format!("#!/bin/sh\n{line}\n")).unwrap();
        std::fs::set_permissions(hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Runs one attempt; `stop_at` is sent when the log holds the word.
    async fn run(&mut self, assignment: Assignment, stop_at: Option<(&str, Stop)>) -> Story {
        let _ = std::fs::remove_file(self.hooks().join("told"));
        let (stop, stops) = mpsc::channel(4);
        self.ctx.spool.begin(&assignment).await.unwrap();
        let ctx = Arc::clone(&self.ctx);
        let listen = async {
            let mut story = Story::default();
            let mut stop_at = stop_at;
            while !story.closed {
                let input = self.inputs.recv().await.unwrap();
                self.note(&mut story, input).await;
                if stop_at.as_ref().is_some_and(|(word, _)| story.log.contains(word)) {
                    stop.send(stop_at.take().unwrap().1).await.unwrap();
                }
            }
            story
        };
        let both = async { tokio::join!(run_attempt(ctx, assignment, stops), listen).1 };
        tokio::time::timeout(Duration::from_secs(60), both).await.expect("the attempt ends")
    }

    async fn note(&self, story: &mut Story, input: Input) {
        match input {
            Input::Report { report: Report::Phase { phase, .. }, .. } => story.phases.push(phase),
            Input::Report { report: Report::Artifact(artifact), .. } => {
                let link = artifact.link.map(|to| format!(" -> {to}")).unwrap_or_default();
                story.artifacts.push(format!("{}{link}", artifact.path));
            }
            Input::Report { report: Report::Result(result), .. } => {
                let read = self.ctx.spool.read(AT, 0, 4 << 20, 0).await.unwrap();
                assert_eq!(read.len() as u64, result.log_len, "the result comes after the last byte");
                story.log = String::from_utf8(read.to_vec()).unwrap();
                story.still_there = story.log.lines().any(|line| std::path::Path::new(line).is_dir());
                assert!(story.result.replace(*result).is_none());
                std::fs::write(self.hooks().join("told"), "").unwrap();
            }
            Input::Spooled { len, .. } => {
                let read = self.ctx.spool.read(AT, 0, 4 << 20, 0).await.unwrap();
                assert!(read.len() as u64 >= len);
                story.log = String::from_utf8_lossy(&read).into_owned();
            }
            Input::Closed { attempt, .. } => {
                assert_eq!(attempt, AT);
                story.closed = true;
            }
            _ => {}
        }
    }
}

fn assignment(line: &str) -> Assignment {
    let argv = ["/bin/sh", "-c", line].map(str::to_owned).to_vec();
    Assignment {
        attempt: AT,
        handle: 1,
        org: DEFAULT_ORG,
        spec: JobSpec { argv, ..JobSpec::default() },
        source: None,
        grant: Secret::new("alloy_job_x".into()),
        timeout_ms: 60_000,
        cancel_grace_ms: 60_000,
        job_url: "http://farm/jobs/5".into(),
    }
}

fn with_artifacts(line: &str, rules: &[&str]) -> Assignment {
    let mut assignment = assignment(line);
    assignment.spec.artifacts = rules.iter().map(|rule| (*rule).to_owned()).collect();
    assignment
}

fn end(story: &Story) -> (Option<Reason>, Option<i32>) {
    let end = &story.result.as_ref().unwrap().end;
    (end.reason, end.exit_code)
}

#[tokio::test]
async fn a_job_goes_through_all_its_stages() {
    let body: &[u8] = b"echo built > out.txt; ln -s out.txt link; cat run.sh | wc -l";
    let entry = Entry {
        path: "run.sh".into(),
        kind: EntryKind::File,
        mode: 0o755,
        size: body.len() as u64,
        chunks: vec![Digest::of(body)],
        target: None,
    };
    let manifest = Manifest::new(vec![entry]).unwrap();
    let blobs = [(manifest.digest(), manifest.encode().into()), (Digest::of(body), Bytes::from_static(body))].into();
    let mut rig = Rig::new(Farm { blobs, cuts: AtomicU32::new(1), ..Farm::default() }).await;
    let source = Some(manifest.digest());
    let spec = with_artifacts(
        "echo $ALLOY_WORKER $ALLOY_JOB_ATTEMPT $ALLOY_VM_SOURCE; . ./run.sh",
        &["=out.txt", "link", "nothing"],
    );
    let story = rig.run(Assignment { source, ..spec }, None).await;
    assert_eq!(story.phases, [Phase::Preparing, Phase::Executing, Phase::Collecting]);
    assert_eq!(story.log.replace(' ', ""), "mini2\n0\n");
    assert_eq!(story.artifacts, ["link -> out.txt", "out.txt"]);
    let result = story.result.unwrap();
    let warnings = vec!["no file matches the artifact rule `nothing`".to_owned()];
    assert_eq!((result.end, result.artifacts), (End { warnings, ..End::success() }, 2));
    let times = result.timings;
    assert!([times.vm_ms, times.source_ms, times.exec_ms, times.collect_ms].iter().all(Option::is_some), "{times:?}");
    assert_eq!(times.vm, None, "a host has no VM to be warm or cold");
    assert_eq!(rig.farm.taken.lock().unwrap()[&Digest::of(b"built\n")], b"built\n");
}

#[tokio::test]
async fn a_source_larger_than_the_disk_leaves_the_room_that_the_next_job_needs() {
    let pieces: Vec<Bytes> = (0..8u8).map(|n| vec![n; 10_000].into()).collect();
    let file = |(n, piece): (usize, &Bytes)| Entry {
        path: format!("{n}"),
        kind: EntryKind::File,
        mode: 0o644,
        size: piece.len() as u64,
        chunks: vec![Digest::of(piece)],
        target: None,
    };
    let manifest = Manifest::new(pieces.iter().enumerate().map(file).collect()).unwrap();
    let mut blobs: HashMap<Digest, Bytes> = pieces.into_iter().map(|piece| (Digest::of(&piece), piece)).collect();
    blobs.insert(manifest.digest(), manifest.encode().into());
    let mut rig = Rig::new(Farm { blobs, ..Farm::default() }).await;
    let cache = rig.fixture.dir.path().join("small");
    let free = || small_disk(&cache, 60_000, &Arc::default());
    let sources = Sources::open_keeping(&cache, 1 << 30, &small_limits(), free()).unwrap();
    Arc::get_mut(&mut rig.ctx).expect("nothing runs yet").sources = Arc::new(sources);
    let story = rig.run(Assignment { source: Some(manifest.digest()), ..assignment("true") }, None).await;
    assert_eq!(end(&story).0, Some(Reason::OutOfDisk));
    assert!(free()().unwrap() >= small_limits().disk_floor);
}

#[tokio::test]
async fn ends_carry_the_reason_and_the_commands_own_code() {
    let mut rig = Rig::new(Farm::default()).await;
    for (assignment, reason, code) in [
        (assignment("exit 0"), None, Some(0)),
        (assignment("exit 7"), Some(Reason::ScriptFailure), Some(7)),
        (assignment("kill -9 $$"), Some(Reason::ScriptFailure), None),
        (with_artifacts("exit 0", &["=x"]), Some(Reason::ArtifactMissing), Some(0)),
        (with_artifacts("exit 7", &["=x"]), Some(Reason::ScriptFailure), Some(7)),
        (with_artifacts("mkfifo p", &["=p"]), Some(Reason::ArtifactMissing), Some(0)),
        (Assignment { source: Some(Digest::of(b"absent")), ..assignment("true") }, Some(Reason::InternalError), None),
        (Assignment { timeout_ms: 100, ..assignment("exec sleep 600") }, Some(Reason::RunTimeout), None),
        (
            Assignment {
                timeout_ms: 100,
                cancel_grace_ms: 100,
                ..assignment("trap '' TERM; while :; do sleep 1; done")
            },
            Some(Reason::RunTimeout),
            None,
        ),
    ] {
        let story = rig.run(assignment.clone(), None).await;
        assert_eq!(end(&story), (reason, code), "{:?} {:?}", assignment.spec, story.result);
        rig.ctx.spool.remove(AT).await.unwrap();
    }
    let mut image = assignment("true");
    image.spec.image = Some("macos-15".into());
    assert_eq!(end(&rig.run(image, None).await).0, Some(Reason::ImagePullFailure));
}

#[test]
fn what_the_farm_sends_wrong_is_never_the_users_fault() {
    let text = || "why".to_owned();
    for (error, blame) in [
        (SourceError::NoTree(text()), Blame::User),
        (SourceError::Corrupt(text()), Blame::Farm),
        (SourceError::Transfer(TransferError::Refused(text())), Blame::Farm),
        (SourceError::Transfer(TransferError::Broken(text())), Blame::Farm),
        (SourceError::Transfer(TransferError::Fenced(text())), Blame::Farm),
        (SourceError::Disk(std::io::ErrorKind::StorageFull.into()), Blame::Farm),
    ] {
        let Ended::End(end) = source_ended(&error) else { panic!("{error} is told") };
        assert_eq!(end.blame(), Some(blame), "{error:?}");
    }
}

#[tokio::test]
async fn a_failed_command_leaves_its_artifacts_too() {
    let mut rig = Rig::new(Farm::default()).await;
    let story = rig.run(with_artifacts("echo x > report; exit 3", &["report"]), None).await;
    assert_eq!((end(&story), story.artifacts), ((Some(Reason::ScriptFailure), Some(3)), vec!["report".to_owned()]));
}

#[tokio::test]
async fn a_log_that_was_cut_is_a_warning_with_the_count_of_its_marker() {
    let mut rig = Rig::new(Farm::default()).await;
    let assignment = assignment("head -c 3000000 /dev/zero | tr '\\0' x");
    rig.ctx.spool.begin(&assignment).await.unwrap();
    let Spool::Mem(spool) = rig.ctx.spool.as_ref() else { panic!("it is in memory") };
    spool.limit_log(AT, 1_000);
    let story = rig.run(assignment, None).await;
    let dropped = 3_000_000 - 1_000 - limits::LOG_TAIL;
    assert!(story.log.contains(&format!("[alloy: {dropped} bytes of log are left out")));
    let warning = format!("the log is longer than 1 GiB; {dropped} bytes in its middle were dropped");
    assert_eq!(story.result.unwrap().end, End { warnings: vec![warning], ..End::success() });
    let full = cut_warning(Cut { bytes: 7, disk_full: true });
    assert!(full.contains("disk was full") && full.contains("7 bytes"), "{full}");
}

#[tokio::test]
async fn what_is_no_artifact_is_named_and_the_rest_arrives() {
    let mut rig = Rig::new(Farm::default()).await;
    let line = "mkdir o; echo x > o/good; mkfifo o/pipe; touch \"o/$(printf 'b\\377d')\"";
    let story = rig.run(with_artifacts(line, &["=o", "o/p*", "=o/p*"]), None).await;
    assert_eq!(
        (end(&story), &story.artifacts[..]),
        ((Some(Reason::ArtifactMissing), Some(0)), &["o/good".to_owned()][..])
    );
    let end = story.result.unwrap().end;
    assert_eq!(end.message, "no file matches =o/p* (`o/pipe`, because it is a pipe)");
    let warnings =
        [r"not collected: `o/b\xffd`, because its name is not UTF-8", "not collected: `o/pipe`, because it is a pipe"];
    assert_eq!(end.warnings, warnings);
}

#[tokio::test]
async fn an_artifact_that_cannot_be_delivered_is_the_farms_fault_and_is_not_counted() {
    let mut rig = Rig::new(Farm { refuses: true, ..Farm::default() }).await;
    let story = rig.run(with_artifacts("echo x > a", &["a"]), None).await;
    let result = story.result.unwrap();
    assert_eq!(
        (result.end.reason, result.end.blame(), result.artifacts),
        (Some(Reason::InternalError), Some(Blame::Farm), 0)
    );
}

#[tokio::test]
async fn a_farm_that_is_away_when_an_artifact_is_ready_is_waited_for() {
    let soon = Limits { heartbeat_ms: 10, ..Limits::default() };
    let mut rig = Rig::within(Farm { breaks: 3.into(), ..Farm::default() }, soon).await;
    let story = rig.run(with_artifacts("echo x > a", &["a"]), None).await;
    assert_eq!((end(&story), story.artifacts), ((None, Some(0)), vec!["a".to_owned()]));
}

#[tokio::test]
async fn when_the_farm_may_begin_a_job_anew_nothing_of_it_is_left_here() {
    let mut rig = Rig::new(Farm::default()).await;
    let stop = Stop::Kill(KillReason::Shutdown);
    let story = rig.run(assignment("pwd; echo up; sleep 600"), Some(("up", stop))).await;
    assert_eq!((end(&story).0, story.still_there), (Some(Reason::WorkerDrained), false));
    rig.ctx.spool.remove(AT).await.unwrap();
    // The hook before the VM goes waits until the end was told: nobody who waits for the end waits for the rest.
    rig.post_job("while [ ! -e told ]; do sleep 0.01; done");
    let cancel = Stop::Cancel { grace_ms: 50 };
    let story = rig.run(assignment("pwd; echo up; sleep 600"), Some(("up", cancel))).await;
    assert_eq!((end(&story).0, story.still_there), (Some(Reason::UserCanceled), false));
    for (retries, still_there) in [(1, false), (0, true)] {
        rig.ctx.spool.remove(AT).await.unwrap();
        let mut tried = assignment("pwd; exit 3");
        tried.spec.retries = retries;
        let story = rig.run(tried, None).await;
        assert_eq!((end(&story).1, story.still_there), (Some(3), still_there), "{retries} retries");
    }
}

#[tokio::test]
async fn a_rule_that_cannot_be_used_does_not_hide_how_the_command_ended() {
    let mut rig = Rig::new(Farm::default()).await;
    let story = rig.run(with_artifacts("exit 7", &["../a"]), None).await;
    assert_eq!(end(&story), (Some(Reason::ScriptFailure), Some(7)));
    assert!(story.result.unwrap().end.message.contains("../a"));
    rig.ctx.spool.remove(AT).await.unwrap();
    let story = rig.run(with_artifacts("true", &["../a"]), None).await;
    assert_eq!(end(&story), (Some(Reason::ArtifactMissing), Some(0)));
}

#[tokio::test]
async fn a_canceled_command_has_its_grace_and_its_artifacts() {
    let mut rig = Rig::new(Farm::default()).await;
    let line = "trap 'echo bye; echo x > late; exit 0' TERM; echo up; while :; do sleep 0.01; done";
    let cancel = Stop::Cancel { grace_ms: 60_000 };
    let story = rig.run(with_artifacts(line, &["late"]), Some(("up", cancel))).await;
    assert_eq!(end(&story), (Some(Reason::UserCanceled), Some(0)));
    assert!(story.log.contains("bye"));
    assert_eq!(story.artifacts, ["late"]);
}

#[tokio::test]
async fn a_command_that_ignores_the_cancel_is_killed_with_its_descendants() {
    let mut rig = Rig::new(Farm::default()).await;
    let line = "trap '' TERM; (setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' &); echo up; while :; do sleep 1; done";
    let story = rig.run(assignment(line), Some(("up", Stop::Cancel { grace_ms: 50 }))).await;
    assert_eq!(end(&story), (Some(Reason::UserCanceled), None));
    assert_eq!(story.result.unwrap().end.signal, Some(9));
}

#[tokio::test]
async fn a_fenced_attempt_says_nothing_and_a_drained_one_says_so() {
    let mut rig = Rig::new(Farm::default()).await;
    for (reason, said) in [
        (KillReason::Fenced, None),
        (KillReason::LeaseLost, None),
        (KillReason::Shutdown, Some(Some(Reason::WorkerDrained))),
    ] {
        let story = rig.run(assignment("echo up; sleep 600"), Some(("up", Stop::Kill(reason)))).await;
        assert_eq!(story.result.map(|result| result.end.reason), said, "{reason:?}");
        assert!(story.closed);
        rig.ctx.spool.remove(AT).await.unwrap();
    }
}

#[tokio::test]
async fn a_command_that_its_guard_killed_at_the_fence_did_not_fail_by_itself() {
    let mut rig = Rig::new(Farm::default()).await;
    rig.fixture.fence.send_replace(rig.fixture.env.now().mono);
    let story = rig.run(assignment("sleep 600"), None).await;
    assert_eq!((end(&story), story.still_there), ((Some(Reason::WorkerLost), None), false));
}

#[tokio::test]
async fn a_cancel_before_the_command_starts_nothing() {
    let mut rig = Rig::new(Farm::default()).await;
    let (stop, stops) = mpsc::channel(1);
    stop.send(Stop::Cancel { grace_ms: 1 }).await.unwrap();
    rig.ctx.spool.begin(&assignment("echo never")).await.unwrap();
    run_attempt(Arc::clone(&rig.ctx), assignment("echo never"), stops).await;
    let mut story = Story::default();
    while !story.closed {
        let input = rig.inputs.recv().await.unwrap();
        rig.note(&mut story, input).await;
    }
    assert_eq!((end(&story), story.log.as_str()), ((Some(Reason::UserCanceled), None), ""));
    assert_eq!(story.phases, [Phase::Preparing]);
}
