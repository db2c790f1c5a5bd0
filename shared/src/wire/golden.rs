//! T: one fixed JSON text for each type of the wire. A text that has to change here breaks older clients or workers: then the
//! protocol needs a new version, or the change a default.

use std::collections::BTreeMap;
use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::farm::*;
use super::image::*;
use super::job::*;
use super::network::Network;
use super::session::*;
use super::source::*;
use super::vm::{Miss, VmStages};
use super::*;
use crate::id::{AttemptRef, BootId, DEFAULT_ORG, Digest, JobId, Labels, TokenId, UserId, WorkerId};
use crate::secret::Secret;

const JOB: JobId = JobId::from_raw(0x0190_0000_0000_7000_8000_0000_0000_0001);
const WORKER: WorkerId = WorkerId::from_raw(0x0190_0000_0000_7000_8000_0000_0000_0002);
const AT: AttemptRef = AttemptRef { job: JOB, attempt: 2 };
const NAMES: [(&str, &str); 5] = [
    ("$JOB", "job_01j0000000e008000000000001"),
    ("$WORKER", "wkr_01j0000000e008000000000002"),
    ("$ORG", "org_0004000000e008000000000001"),
    ("$ABC", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    ("$AT", r#"{"job":"job_01j0000000e008000000000001","attempt":2}"#),
];

/// The value is written exactly as the text, and the text is read as the value. `$JOB` and the like stand for long names.
#[track_caller]
fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: T, text: &str) {
    let text = NAMES.iter().fold(text.to_owned(), |text, (name, long)| text.replace(name, long));
    assert_eq!(serde_json::to_string(&value).unwrap(), text);
    assert_eq!(serde_json::from_str::<T>(&text).unwrap(), value);
}

fn map<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn spec() -> JobSpec {
    JobSpec {
        shell: Some("make".into()),
        argv: vec![],
        env: map([("A", "1")]),
        artifacts: vec!["=out/*.ipa".into()],
        labels: map([("os", "macos")]),
        image: Some("xcode:16".into()),
        network: Network::Allow(vec!["10.0.0.0/8".into()]),
        timeout_ms: Some(60_000),
        queue_timeout_ms: Some(5_000),
        retries: 1,
        git: Some(GitInfo { commit: "abc".into(), branch: Some("main".into()), dirty: true }),
    }
}

fn small() -> JobSpec {
    JobSpec { argv: vec!["true".into()], ..JobSpec::default() }
}

fn view() -> JobView {
    JobView {
        id: JOB,
        org: DEFAULT_ORG,
        state: StateWord::Queued,
        phase: None,
        spec: small(),
        source: None,
        attempt: 0,
        worker: None,
        worker_name: None,
        worker_state: None,
        image: None,
        image_digest: None,
        vm_source: None,
        lost: 0,
        created_at: "2026-01-02T03:04:05.678Z".into(),
        finished_at: None,
        waiting_reason: Some("all 2 slots are busy".into()),
        outcome: None,
        reason: None,
        blame: None,
        message: None,
        exit_code: None,
        warnings: Vec::new(),
        exit_origin: None,
        signal: None,
        timings: Timings::default(),
        url: "http://farm/jobs/1".into(),
    }
}

const SPEC: &str = r#"{"shell":"make","env":{"A":"1"},"artifacts":["=out/*.ipa"],"labels":{"os":"macos"},"image":"xcode:16","network":{"allow":["10.0.0.0/8"]},"timeout_ms":60000,"queue_timeout_ms":5000,"retries":1,"git":{"commit":"abc","branch":"main","dirty":true}}"#;
const VIEW: &str = r#"{"id":"$JOB","org":"$ORG","state":"queued","spec":{"argv":["true"]},"attempt":0,"lost":0,"created_at":"2026-01-02T03:04:05.678Z","waiting_reason":"all 2 slots are busy","timings":{},"url":"http://farm/jobs/1"}"#;

#[test]
fn jobs() {
    check(JobSpec::default(), "{}");
    check(spec(), SPEC);
    check(SubmitJob { spec: small(), source: None }, r#"{"spec":{"argv":["true"]}}"#);
    let source = Some(Digest::of(b"abc"));
    check(SubmitJob { spec: spec(), source }, &format!(r#"{{"spec":{SPEC},"source":"$ABC"}}"#));
    check(view(), VIEW);
    let done = JobView {
        state: StateWord::Failed,
        phase: Some(Phase::Executing),
        source,
        attempt: 2,
        worker: Some(WORKER),
        worker_name: Some("mini-1".into()),
        image: Some("r/i:1".into()),
        image_digest: Some("sha256:ab".into()),
        vm_source: Some("warm".into()),
        lost: 1,
        finished_at: Some("2026-01-02T03:05:00.000Z".into()),
        waiting_reason: None,
        outcome: Some(Outcome::Failed),
        reason: Some(Reason::ScriptFailure),
        blame: Some(Blame::User),
        message: Some("exit code 7".into()),
        exit_code: Some(7),
        warnings: vec!["w".into()],
        exit_origin: Some(ExitOrigin::Command),
        signal: Some(9),
        timings: Timings {
            queue_ms: Some(1),
            assign_ms: Some(2),
            vm_ms: Some(3),
            source_ms: Some(4),
            exec_ms: Some(5),
            collect_ms: Some(6),
            teardown_ms: Some(7),
            vm: Some(Box::new(VmStages {
                warm: true,
                why: None,
                pull_ms: Some(12),
                clone_ms: Some(8),
                boot_ms: Some(9),
                agent_ms: Some(10),
                clock_ms: Some(11),
            })),
        },
        ..view()
    };
    check(
        done,
        r#"{"id":"$JOB","org":"$ORG","state":"failed","phase":"executing","spec":{"argv":["true"]},"source":"$ABC","attempt":2,"worker":"$WORKER","worker_name":"mini-1","image":"r/i:1","image_digest":"sha256:ab","vm_source":"warm","lost":1,"created_at":"2026-01-02T03:04:05.678Z","finished_at":"2026-01-02T03:05:00.000Z","outcome":"failed","reason":"script_failure","blame":"user","message":"exit code 7","warnings":["w"],"exit_code":7,"exit_origin":"command","signal":9,"timings":{"queue_ms":1,"assign_ms":2,"vm_ms":3,"source_ms":4,"exec_ms":5,"collect_ms":6,"teardown_ms":7,"vm":{"warm":true,"pull_ms":12,"clone_ms":8,"boot_ms":9,"agent_ms":10,"clock_ms":11}},"url":"http://farm/jobs/1"}"#,
    );
    let page = JobPage { jobs: vec![view()], next_cursor: Some("c".into()) };
    check(page, &format!(r#"{{"jobs":[{VIEW}],"next_cursor":"c"}}"#));
    check(JobPage { jobs: vec![], next_cursor: None }, r#"{"jobs":[]}"#);
}

fn artifact(link: Option<&str>) -> ArtifactView {
    let link = link.map(str::to_owned);
    ArtifactView { path: "out/a".into(), size_bytes: 3, sha256: Digest::of(b"abc"), mode: 0o644, link }
}

#[test]
fn feed_frames() {
    let event = JobEvent {
        seq: 4,
        at: "2026-01-02T03:04:05.678Z".into(),
        attempt: 1,
        kind: EventKind::Submitted,
        state: StateWord::Queued,
        phase: None,
        reason: None,
        worker: None,
        message: None,
        artifact: None,
    };
    check(
        FeedFrame::Event(event.clone()),
        r#"{"type":"event","seq":4,"at":"2026-01-02T03:04:05.678Z","attempt":1,"kind":"submitted","state":"queued"}"#,
    );
    let full = JobEvent {
        kind: EventKind::Artifact,
        state: StateWord::Running,
        phase: Some(Phase::Collecting),
        reason: Some(Reason::WorkerLost),
        worker: Some(WORKER),
        message: Some("m".into()),
        artifact: Some(Box::new(artifact(None))),
        ..event
    };
    check(
        FeedFrame::Event(full),
        r#"{"type":"event","seq":4,"at":"2026-01-02T03:04:05.678Z","attempt":1,"kind":"artifact","state":"running","phase":"collecting","reason":"worker_lost","worker":"$WORKER","message":"m","artifact":{"path":"out/a","size_bytes":3,"sha256":"$ABC","mode":420}}"#,
    );
    check(FeedFrame::Log(LogFrame::new(1, 9, b"a\n")), r#"{"type":"log","attempt":1,"offset":9,"text":"a\n"}"#);
    check(FeedFrame::Log(LogFrame::new(1, 9, b"\xff")), r#"{"type":"log","attempt":1,"offset":9,"base64":"/w=="}"#);
    let news = WorkerNews {
        at: "2026-01-02T03:04:05.678Z".into(),
        attempt: 2,
        worker: WORKER,
        worker_name: "shed".into(),
        silent: true,
        lost_at: Some("2026-01-02T03:04:05.678Z".into()),
        message: "m".into(),
    };
    check(
        FeedFrame::Worker(news),
        r#"{"type":"worker","at":"2026-01-02T03:04:05.678Z","attempt":2,"worker":"$WORKER","worker_name":"shed","silent":true,"lost_at":"2026-01-02T03:04:05.678Z","message":"m"}"#,
    );
    check(FeedFrame::End { job: Box::new(view()) }, &format!(r#"{{"type":"end","job":{VIEW}}}"#));
    check(
        ArtifactList { artifacts: vec![artifact(Some("b"))] },
        r#"{"artifacts":[{"path":"out/a","size_bytes":3,"sha256":"$ABC","mode":420,"link":"b"}]}"#,
    );
}

#[test]
fn sources() {
    let digest = Digest::of(b"abc");
    check(
        SourceStatus { digest, complete: false, missing: vec![digest] },
        r#"{"digest":"$ABC","complete":false,"missing":["$ABC"]}"#,
    );
    check(PackStored { blobs: 1, bytes: 3 }, r#"{"blobs":1,"bytes":3}"#);
    check(BlobRequest { digests: vec![digest] }, r#"{"digests":["$ABC"]}"#);
    let header = |codec| FrameHeader { codec, stored: 3, blobs: vec![FrameBlob { digest, size: 3 }] };
    check(header(Codec::Raw), r#"{"codec":"raw","stored":3,"blobs":[{"digest":"$ABC","size":3}]}"#);
    check(header(Codec::Zstd), r#"{"codec":"zstd","stored":3,"blobs":[{"digest":"$ABC","size":3}]}"#);
    let entry = |kind, chunks, target| Entry { path: "p".into(), kind, mode: 0o755, size: 0, chunks, target };
    check(
        entry(EntryKind::File, vec![digest], None),
        r#"{"path":"p","kind":"file","mode":493,"size":0,"chunks":["$ABC"]}"#,
    );
    check(entry(EntryKind::Dir, vec![], None), r#"{"path":"p","kind":"dir","mode":493,"size":0}"#);
    check(
        entry(EntryKind::Symlink, vec![], Some("t".into())),
        r#"{"path":"p","kind":"symlink","mode":493,"size":0,"target":"t"}"#,
    );
}

fn slots() -> Vec<SlotView> {
    vec![
        SlotView { state: SlotState::Warm, attempt: None, image: Some("xcode:16".into()) },
        SlotView { state: SlotState::Claimed, attempt: Some(AT), image: None },
    ]
}

fn held() -> Vec<Held> {
    vec![Held { attempt: AT, state: HeldState::ResultPending, log_len: 5, seq: 6 }]
}

const SLOTS: &str = r#"[{"state":"warm","image":"xcode:16"},{"state":"claimed","attempt":$AT}]"#;
const HELD: &str = r#"[{"attempt":$AT,"state":"result_pending","log_len":5,"seq":6}]"#;

#[test]
fn from_workers() {
    let mut labels = Labels::default();
    labels.insert("os", "macos").unwrap();
    let hello = Hello {
        protocol_min: 1,
        protocol_max: 1,
        capabilities: vec!["x".into()],
        worker: WORKER,
        boot: BootId::from_raw(3),
        signature: "c2ln".into(),
        version: "0.1.0".into(),
        labels,
        slots: slots(),
        held: held(),
        draining: true,
        trouble: Some("reboot".into()),
    };
    check(
        ToOrchestrator::Hello(Box::new(hello)),
        &format!(
            r#"{{"type":"hello","protocol_min":1,"protocol_max":1,"capabilities":["x"],"worker":"$WORKER","boot":"boot_00000000000000000000000003","signature":"c2ln","version":"0.1.0","labels":{{"os":"macos"}},"slots":{SLOTS},"held":{HELD},"draining":true,"trouble":"reboot"}}"#
        ),
    );
    check(
        ToOrchestrator::Heartbeat(Heartbeat {
            n: 8,
            heard: 7,
            slots: slots(),
            held: held(),
            draining: false,
            trouble: None,
        }),
        &format!(r#"{{"type":"heartbeat","n":8,"heard":7,"slots":{SLOTS},"held":{HELD},"draining":false}}"#),
    );
    check(
        ToOrchestrator::Closed { attempt: AT, teardown_ms: 12, log_len: 34 },
        r#"{"type":"closed","attempt":$AT,"teardown_ms":12,"log_len":34}"#,
    );
    check(ToOrchestrator::Goodbye { reason: "stop".into() }, r#"{"type":"goodbye","reason":"stop"}"#);
    check(ToOrchestrator::Unsupported { message: "sing".into() }, r#"{"type":"unsupported","message":"sing"}"#);
}

#[test]
fn images() {
    let wish = ImageWish { name: "r/a:1".into(), want: ImageWant::Present, pinned: true, generation: 7 };
    check(
        ToWorker::Images { wishes: vec![wish] },
        r#"{"type":"images","wishes":[{"name":"r/a:1","want":"present","pinned":true,"generation":7}]}"#,
    );
    check([ImageWant::Absent, ImageWant::None], r#"["absent","none"]"#);
    let report = ImageReport {
        name: "r/a:1".into(),
        digest: Some("sha256:ab".into()),
        size_bytes: Some(9),
        used_at_ms: Some(5),
        in_use: true,
        waiting: false,
        pulling: Some(PullProgress { percent: 40, total_bytes: Some(9) }),
        failed: Some(PullFailed { message: "404".into(), refused: true }),
        generation: 7,
    };
    let text = r#""name":"r/a:1","digest":"sha256:ab","size_bytes":9,"used_at_ms":5,"in_use":true,"waiting":false,"pulling":{"percent":40,"total_bytes":9},"failed":{"message":"404","refused":true},"generation":7"#;
    check(
        ToOrchestrator::Images(Inventory { pulls: true, own: "o".into(), images: vec![report.clone()] }),
        &format!(r#"{{"type":"images","pulls":true,"own":"o","images":[{{{text}}}]}}"#),
    );
    check(
        ImageReport { name: "a".into(), ..ImageReport::default() },
        r#"{"name":"a","in_use":false,"waiting":false,"generation":0}"#,
    );
    check(PullRequest { name: "a".into(), ..PullRequest::default() }, r#"{"name":"a"}"#);
    check(
        PullRequest { name: "a".into(), workers: vec![WORKER], labels: map([("chip", "m4")]) },
        r#"{"name":"a","workers":["$WORKER"],"labels":{"chip":"m4"}}"#,
    );
    check(PinRequest { name: "a".into(), pinned: false }, r#"{"name":"a","pinned":false}"#);
    check(RemoveRequest { name: "a".into() }, r#"{"name":"a"}"#);
    let on = WorkerImage { worker: WORKER, worker_name: "mini".into(), connected: true, wanted: true, report };
    let view =
        ImageView { name: "r/a:1".into(), want: ImageWant::None, pinned: false, generation: 7, workers: vec![on] };
    check(
        ImageList { images: vec![view] },
        &format!(
            r#"{{"images":[{{"name":"r/a:1","want":"none","pinned":false,"generation":7,"workers":[{{"worker":"$WORKER","worker_name":"mini","connected":true,"wanted":true,{text}}}]}}]}}"#
        ),
    );
}

#[test]
fn reports_of_workers() {
    let check = |report: Report, text: &str| {
        let text = format!(r#"{{"type":"report","attempt":$AT,"seq":3,"report":{text}}}"#);
        check(ToOrchestrator::Report { attempt: AT, seq: 3, report }, &text);
    };
    check(Report::Accepted, r#"{"report":"accepted"}"#);
    check(Report::Refused { message: "full".into() }, r#"{"report":"refused","message":"full"}"#);
    let vm = VmStages { why: Some(Miss::NoWarmVm), ..VmStages::default() };
    let timings = Timings { vm_ms: Some(40), vm: Some(Box::new(vm)), ..Timings::default() };
    check(
        Report::Phase {
            phase: Phase::Executing,
            timings: timings.clone(),
            message: Some("m".into()),
            facts: map([(fact::IMAGE, "i")]),
        },
        r#"{"report":"phase","phase":"executing","timings":{"vm_ms":40,"vm":{"warm":false,"why":"no_warm_vm"}},"message":"m","facts":{"image":"i"}}"#,
    );
    let sha256 = Digest::of(b"abc");
    check(
        Report::Artifact(ArtifactReport { path: "a".into(), size: 3, sha256, mode: 0o755, link: Some("b".into()) }),
        r#"{"report":"artifact","path":"a","size":3,"sha256":"$ABC","mode":493,"link":"b"}"#,
    );
    let end = End { exit_code: Some(7), ..End::because(Reason::ScriptFailure, "x") };
    check(
        Report::Result(Box::new(ResultReport { end, timings, log_len: 9, artifacts: 1, facts: map([("vm", "warm")]) })),
        r#"{"report":"result","end":{"reason":"script_failure","exit_code":7,"message":"x"},"timings":{"vm_ms":40,"vm":{"warm":false,"why":"no_warm_vm"}},"log_len":9,"artifacts":1,"facts":{"vm":"warm"}}"#,
    );
    let killed = End { signal: Some(9), ..End::because(Reason::RunTimeout, "") };
    check(
        Report::Result(Box::new(ResultReport {
            end: killed,
            timings: Timings::default(),
            log_len: 0,
            artifacts: 0,
            facts: BTreeMap::new(),
        })),
        r#"{"report":"result","end":{"reason":"run_timeout","signal":9},"timings":{},"log_len":0,"artifacts":0}"#,
    );
}

#[test]
fn to_workers() {
    check(ToWorker::Challenge { nonce: "n".into() }, r#"{"type":"challenge","nonce":"n"}"#);
    let welcome = Welcome {
        protocol: 1,
        epoch: 2,
        heartbeat_ms: 5_000,
        self_fence_ms: 40_000,
        kill_budget_ms: 10_000,
        draining: false,
    };
    check(
        ToWorker::Welcome(welcome),
        r#"{"type":"welcome","protocol":1,"epoch":2,"heartbeat_ms":5000,"self_fence_ms":40000,"kill_budget_ms":10000,"draining":false}"#,
    );
    check(
        ToWorker::Reject { code: ErrorCode::Unauthenticated, message: "no".into(), retry_after_ms: Some(9) },
        r#"{"type":"reject","code":"unauthenticated","message":"no","retry_after_ms":9}"#,
    );
    check(
        ToWorker::HeartbeatAck { n: 8, orders: vec![Order::ResultAck { attempt: AT }] },
        r#"{"type":"heartbeat_ack","n":8,"orders":[{"order":"result_ack","attempt":$AT}]}"#,
    );
    check(ToWorker::EventAck { attempt: AT, seq: 3 }, r#"{"type":"event_ack","attempt":$AT,"seq":3}"#);
    check(
        ToWorker::Missing { attempt: AT, seq: 3, log_len: 4, artifacts: vec![Digest::of(b"abc")] },
        r#"{"type":"missing","attempt":$AT,"seq":3,"log_len":4,"artifacts":["$ABC"]}"#,
    );
    check(ToWorker::LogAck { attempt: AT, durable: 5 }, r#"{"type":"log_ack","attempt":$AT,"durable":5}"#);
    check(ToWorker::Drain { on: true }, r#"{"type":"drain","on":true}"#);
    check(ToWorker::Superseded, r#"{"type":"superseded"}"#);
    check(ToWorker::Reconnect { after_ms: 6 }, r#"{"type":"reconnect","after_ms":6}"#);
    check(ToWorker::Unsupported { message: "sing".into() }, r#"{"type":"unsupported","message":"sing"}"#);
}

#[test]
fn orders_to_workers() {
    let check = |order: Order, text: &str| {
        check(ToWorker::Order { order }, &format!(r#"{{"type":"order","order":{text}}}"#));
    };
    let assignment = Assignment {
        attempt: AT,
        handle: 1,
        org: DEFAULT_ORG,
        spec: small(),
        source: Some(Digest::of(b"abc")),
        grant: Secret::new("alloy_job_x".into()),
        timeout_ms: 60_000,
        cancel_grace_ms: 10_000,
        job_url: "u".into(),
    };
    check(
        Order::Assign(Box::new(assignment)),
        r#"{"order":"assign","attempt":$AT,"handle":1,"org":"$ORG","spec":{"argv":["true"]},"source":"$ABC","grant":"alloy_job_x","timeout_ms":60000,"cancel_grace_ms":10000,"job_url":"u"}"#,
    );
    check(
        Order::Continue { attempt: AT, handle: 1, log_durable: 2, seq: 3 },
        r#"{"order":"continue","attempt":$AT,"handle":1,"log_durable":2,"seq":3}"#,
    );
    check(Order::Cancel { attempt: AT, grace_ms: 9 }, r#"{"order":"cancel","attempt":$AT,"grace_ms":9}"#);
    check(Order::Fence { attempt: AT }, r#"{"order":"fence","attempt":$AT}"#);
    check(Order::ResultAck { attempt: AT }, r#"{"order":"result_ack","attempt":$AT}"#);
}

#[test]
fn the_farm() {
    let info = Info {
        version: "0.1.0".into(),
        protocol_min: 1,
        protocol_max: 1,
        capabilities: vec![],
        base_url: "http://farm".into(),
        time: "2026-01-02T03:04:05.678Z".into(),
        timeout_max_ms: Some(9),
        queue_timeout_max_ms: None,
        storage: Some(Storage { free_bytes: 5, floor_bytes: 6 }),
    };
    check(
        info,
        r#"{"version":"0.1.0","protocol_min":1,"protocol_max":1,"capabilities":[],"base_url":"http://farm","time":"2026-01-02T03:04:05.678Z","timeout_max_ms":9,"storage":{"free_bytes":5,"floor_bytes":6}}"#,
    );
    check(
        WhoAmI { name: "ada".into(), role: Role::Developer, org: DEFAULT_ORG },
        r#"{"name":"ada","role":"developer","org":"$ORG"}"#,
    );
    let worker = WorkerView {
        id: WORKER,
        name: "mini-1".into(),
        state: WorkerState::Ready,
        labels: map([("os", "macos")]),
        slots: 2,
        slots_busy: 1,
        slots_warm: 1,
        version: "0.1.0".into(),
        last_seen_at: Some("2026-01-02T03:04:05.678Z".into()),
        drain_note: Some("new disk".into()),
        trouble: Some("reboot".into()),
        jobs: vec![JOB.to_string()],
    };
    check(
        WorkerList { workers: vec![worker] },
        r#"{"workers":[{"id":"$WORKER","name":"mini-1","state":"ready","labels":{"os":"macos"},"slots":2,"slots_busy":1,"slots_warm":1,"version":"0.1.0","last_seen_at":"2026-01-02T03:04:05.678Z","drain_note":"new disk","trouble":"reboot","jobs":["$JOB"]}]}"#,
    );
    check(DrainRequest { note: None }, "{}");
    check(InviteRequest { labels: map([("a", "b")]), ttl_s: Some(60) }, r#"{"labels":{"a":"b"},"ttl_s":60}"#);
    check(
        Invite { token: Secret::new("alloy_join_x".into()), expires_at: "e".into(), command: "c".into() },
        r#"{"token":"alloy_join_x","expires_at":"e","command":"c"}"#,
    );
    check(
        EnrolRequest { token: Secret::new("alloy_join_x".into()), public_key: "k".into(), name: "mini-1".into() },
        r#"{"token":"alloy_join_x","public_key":"k","name":"mini-1"}"#,
    );
    check(Enrolled { worker: WORKER, name: "mini-1".into() }, r#"{"worker":"$WORKER","name":"mini-1"}"#);
}

#[test]
fn tokens_and_problems() {
    check(
        TokenRequest { name: "ci".into(), role: Role::Admin, ci: true, ttl_s: Some(60) },
        r#"{"name":"ci","role":"admin","ci":true,"ttl_s":60}"#,
    );
    let token = TokenView {
        id: TokenId::from_raw(4),
        name: "ci".into(),
        role: Role::Viewer,
        shown: "alloy_ci_…abcd".into(),
        created_at: "c".into(),
        expires_at: None,
        revoked: false,
    };
    check(
        TokenCreated { token: Secret::new("alloy_ci_x".into()), view: token },
        r#"{"token":"alloy_ci_x","view":{"id":"tok_00000000000000000000000004","name":"ci","role":"viewer","shown":"alloy_ci_…abcd","created_at":"c","revoked":false}}"#,
    );
    check(TokenList { tokens: vec![] }, r#"{"tokens":[]}"#);
    check(MemberRequest { role: Role::Admin, email: None }, r#"{"role":"admin"}"#);
    let member = MemberView {
        user_id: UserId::from_raw(9),
        role: Role::Viewer,
        email: Some("a@b.test".into()),
        created_at: "c".into(),
    };
    check(
        MemberList { members: vec![member] },
        r#"{"members":[{"user_id":"00000000-0000-0000-0000-000000000009","role":"viewer","email":"a@b.test","created_at":"c"}]}"#,
    );
    check(
        Problem::new(ErrorCode::NotFound, "no such job"),
        r#"{"status":404,"code":"not_found","message":"no such job"}"#,
    );
    let problem = Problem {
        request_id: Some("r".into()),
        errors: vec![FieldError { field: "env.A".into(), message: "m".into() }],
        retry_after_s: Some(1),
        ..Problem::new(ErrorCode::InvalidSpec, "wrong").hint("h")
    };
    check(
        problem,
        r#"{"status":422,"code":"invalid_spec","message":"wrong","hint":"h","request_id":"r","errors":[{"field":"env.A","message":"m"}],"retry_after_s":1}"#,
    );
}

#[test]
fn what_a_newer_side_adds_is_ignored_and_what_it_may_leave_out_has_a_default() {
    let heartbeat = r#"{"type":"heartbeat","n":1,"slots":[],"held":[],"mood":"good"}"#;
    let expect = Heartbeat { n: 1, heard: 0, slots: vec![], held: vec![], draining: false, trouble: None };
    assert_eq!(ToOrchestrator::decode(heartbeat), Ok(ToOrchestrator::Heartbeat(expect)));
    let text = NAMES.iter().fold(VIEW.to_owned(), |text, (name, long)| text.replace(name, long));
    assert_eq!(serde_json::from_str::<JobView>(&text.replacen('{', r#"{"new":[1],"#, 1)).unwrap(), view());
    // What people write is checked to the letter.
    assert!(serde_json::from_str::<JobSpec>(r#"{"shel":"make"}"#).is_err());
    assert!(serde_json::from_str::<SubmitJob>(r#"{"spec":{},"sorce":null}"#).is_err());
}
