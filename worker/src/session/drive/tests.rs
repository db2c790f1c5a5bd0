use std::collections::BTreeMap;

use alloy_shared::id::{BootId, DEFAULT_ORG, JobId};
use alloy_shared::runtime::{Lifecycle, SystemEnv};
use alloy_shared::secret::Secret;
use alloy_shared::wire::job::{End, JobSpec, Phase, Reason as EndReason, Timings};
use alloy_shared::wire::session::{HeldState, Order, Report, ResultReport, SlotState, SlotView, Welcome};
use async_trait::async_trait;
use bytes::Bytes;

use super::*;
use crate::spool::SpoolFile;
use crate::spool::tests::{Short, alone};
use crate::upstream::{Blobs, TransferError};

const AT: AttemptRef = AttemptRef { job: JobId::from_raw(3), attempt: 1 };
const QUEUE: usize = 4;

/// Hands the far end of every dial to the test, which plays the orchestrator.
struct Wire {
    far: mpsc::Sender<Link>,
    put: mpsc::Sender<Digest>,
}

#[async_trait]
impl Upstream for Wire {
    async fn dial(&self) -> Result<Link, DialError> {
        let ((tx, far_rx), (far_tx, rx)) = (mpsc::channel(QUEUE), mpsc::channel(QUEUE));
        match self.far.send(Link { tx: far_tx, rx: far_rx }).await {
            Ok(()) => Ok(Link { tx, rx }),
            Err(_) => Err(DialError::Unreachable("the test is over".into())),
        }
    }
    async fn manifest(&self, _: &Grant) -> Result<Bytes, TransferError> {
        Err(TransferError::Refused("not in this test".into()))
    }
    async fn fetch(&self, _: &Grant, _: &[Digest]) -> Result<Blobs, TransferError> {
        Err(TransferError::Refused("not in this test".into()))
    }
    async fn put(&self, grant: &Grant, file: &SpoolFile) -> Result<Digest, TransferError> {
        assert_eq!((grant.attempt, grant.token.expose().as_str()), (AT, "the grant"));
        let size = file.size().map_err(|error| TransferError::Spool(error.to_string()))?;
        assert_eq!(size, 8);
        self.put.send(file.digest()).await.unwrap();
        Ok(file.digest())
    }
}

/// What an executor of a test may use.
#[derive(Clone)]
struct Hands {
    spool: Arc<Spool>,
    inputs: Inputs,
}

impl Hands {
    async fn log(&self, bytes: Vec<u8>) {
        let len = self.spool.append(AT, bytes.into()).await.unwrap();
        self.inputs.send(Input::Spooled { attempt: AT, len }).await.unwrap();
    }
    async fn report(&self, report: Report) {
        self.inputs.send(Input::Report { attempt: AT, report }).await.unwrap();
    }
    async fn end(&self, end: End) {
        let log_len = self.spool.seal_log(AT).await.unwrap();
        let (timings, facts) = (Timings::default(), BTreeMap::new());
        self.report(Report::Result(Box::new(ResultReport { end, timings, log_len, artifacts: 0, facts }))).await;
        self.inputs.send(Input::Closed { attempt: AT, teardown_ms: 1 }).await.unwrap();
    }
}

struct Farm {
    life: Lifecycle,
    far: mpsc::Receiver<Link>,
    puts: mpsc::Receiver<Digest>,
    hands: Hands,
    over: mpsc::Receiver<Over>,
}

fn farm<F, R>(spool: Spool, held: Vec<(wire::session::Held, Vec<(u64, Report)>)>, executor: F) -> Farm
where
    F: Fn(Hands, mpsc::Receiver<Stop>) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let life = Lifecycle::new();
    let env = Arc::new(SystemEnv::new(life.clone()));
    let (far_tx, far) = mpsc::channel(1);
    let (put, puts) = mpsc::channel(8);
    let (door, inputs) = mpsc::channel(super::super::INPUT_QUEUE);
    let hands = Hands { spool: Arc::new(spool), inputs: door.clone() };
    let (over_tx, over) = mpsc::channel(1);
    let limits = Limits::scaled(20);
    let start_hands = hands.clone();
    let seams = Seams {
        env: env.clone(),
        limits: limits.clone(),
        upstream: Arc::new(Wire { far: far_tx, put }),
        spool: hands.spool.clone(),
        fence: Arc::new(Fence::new()),
        me: Me {
            worker: WorkerId::from_raw(1),
            version: "0".into(),
            labels: Labels::default(),
            sign: Box::new(|text| format!("signed {}", text.lines().nth(1).unwrap())),
        },
        start: Box::new(move |assignment, stop| {
            assert_eq!(assignment.attempt, AT);
            Box::pin(executor(start_hands.clone(), stop))
        }),
        wish: Box::new(|_| {}),
        soft: life.soft.clone(),
        hard: life.hard.clone(),
    };
    let core = Core::restore(held, BootId::from_raw(1), limits);
    let slot = SlotView { state: SlotState::Cold, attempt: None, image: None };
    door.try_send(Input::Slots(vec![slot])).unwrap();
    env.spawn("drive", Box::pin(async move { over_tx.send(drive(core, seams, door, inputs).await).await.unwrap() }));
    Farm { life, far, puts, hands, over }
}

/// The orchestrator's end of one session.
struct Far {
    link: Link,
    log: Vec<u8>,
}

impl Farm {
    /// Takes the next dial and opens the session.
    async fn open(&mut self) -> (Far, Hello) {
        let mut far = Far { link: self.far.recv().await.unwrap(), log: Vec::new() };
        far.say(ToWorker::Challenge { nonce: "nonce".into() }).await;
        let Some(ToOrchestrator::Hello(hello)) = far.hear().await else { panic!("no hello") };
        far.say(ToWorker::Welcome(Welcome {
            protocol: 1,
            epoch: 1,
            heartbeat_ms: 5_000,
            self_fence_ms: 40_000,
            kill_budget_ms: 10_000,
            draining: false,
        }))
        .await;
        (far, *hello)
    }

    async fn stopped(mut self) -> Over {
        let over = self.over.recv().await.unwrap();
        self.life.soft.cancel();
        drop(self.hands);
        self.life.wait(60_000).await;
        over
    }
}

impl Far {
    /// Says it to a worker that may have gone: what it says before shows whether it should have.
    async fn say(&mut self, message: ToWorker) {
        self.link.tx.send(message.encode()).await.ok();
    }

    async fn assign(&mut self) {
        self.order(Order::Assign(Box::new(assignment(5)))).await;
    }

    async fn order(&mut self, order: Order) {
        self.say(ToWorker::Order { order }).await;
    }

    /// The next control message; log before it is checked, kept and acknowledged, heartbeats are answered.
    async fn hear(&mut self) -> Option<ToOrchestrator> {
        loop {
            match self.link.rx.recv().await? {
                Frame::Binary(bytes) => self.take_log(&bytes).await,
                Frame::Text(text) => match ToOrchestrator::decode(&text).unwrap() {
                    ToOrchestrator::Heartbeat(beat) => {
                        self.say(ToWorker::HeartbeatAck { n: beat.n, orders: vec![] }).await;
                    }
                    other => return Some(other),
                },
            }
        }
    }

    async fn take_log(&mut self, frame: &Bytes) {
        let chunk = LogChunk::decode(frame).unwrap();
        assert_eq!((chunk.handle, chunk.offset), (5, self.log.len() as u64), "no byte is skipped");
        self.log.extend_from_slice(&chunk.bytes);
        self.say(ToWorker::LogAck { attempt: AT, durable: self.log.len() as u64 }).await;
    }

    /// Goes on until so many heartbeats have come.
    async fn hear_beats(&mut self, mut beats: u32) {
        while beats > 0 {
            let Some(Frame::Text(text)) = self.link.rx.recv().await else { panic!("no heartbeat") };
            let ToOrchestrator::Heartbeat(beat) = ToOrchestrator::decode(&text).unwrap() else { panic!("{text}") };
            self.say(ToWorker::HeartbeatAck { n: beat.n, orders: vec![] }).await;
            beats -= 1;
        }
    }

    async fn hear_report(&mut self) -> (u64, Report) {
        match self.hear().await {
            Some(ToOrchestrator::Report { attempt: AT, seq, report }) => {
                self.say(ToWorker::EventAck { attempt: AT, seq }).await;
                (seq, report)
            }
            other => panic!("{other:?}"),
        }
    }
}

fn assignment(handle: u32) -> Assignment {
    Assignment {
        attempt: AT,
        handle,
        org: DEFAULT_ORG,
        spec: JobSpec::default(),
        source: None,
        grant: Secret::new("the grant".into()),
        timeout_ms: 1,
        cancel_grace_ms: 1,
        job_url: String::new(),
    }
}

fn phase() -> Report {
    Report::Phase { phase: Phase::Executing, timings: Timings::default(), message: None, facts: BTreeMap::new() }
}

fn output() -> Vec<u8> {
    (0..3_000_000u32).map(|n| (n % 241) as u8).collect()
}

async fn job(spool: Spool) {
    let mut farm = farm(spool, vec![], |hands, _stop| async move {
        hands.report(phase()).await;
        for piece in output().chunks(100_000) {
            hands.log(piece.to_vec()).await;
        }
        hands.end(End::success()).await;
    });
    let (mut far, hello) = farm.open().await;
    assert_eq!((hello.signature.as_str(), hello.held.len()), ("signed nonce", 0));
    far.assign().await;
    assert_eq!(far.hear_report().await, (1, Report::Accepted));
    assert_eq!(far.hear_report().await, (2, phase()));
    let (seq, report) = far.hear_report().await;
    assert!(matches!(report, Report::Result(_)) && seq == 3);
    assert!(far.log == output(), "the whole log comes before the result: {} bytes", far.log.len());
    far.order(Order::ResultAck { attempt: AT }).await;
    let closed = ToOrchestrator::Closed { attempt: AT, teardown_ms: 1, log_len: 3_000_000 };
    assert_eq!(far.hear().await, Some(closed));
    far.say(ToWorker::Drain { on: true }).await;
    farm.life.soft.cancel();
    assert!(matches!(far.hear().await, Some(ToOrchestrator::Goodbye { .. })));
    let spool = farm.hands.spool.clone();
    assert_eq!(farm.stopped().await, Over::Stopped);
    assert_eq!(spool.reopen().unwrap().1, [], "acknowledged means forgotten");
}

#[tokio::test]
async fn a_job_runs_through_the_session() {
    job(Spool::memory()).await;
    let dir = tempfile::tempdir().unwrap();
    job(Spool::open(dir.path()).unwrap().0).await;
}

#[tokio::test]
async fn a_heartbeat_overtakes_log_that_waits() {
    let mut farm = farm(Spool::memory(), vec![], |hands, mut stop| async move {
        hands.log(vec![b'x'; 8 << 20]).await;
        stop.recv().await;
        hands.end(End::because(EndReason::WorkerDrained, "")).await;
    });
    let (mut far, _) = farm.open().await;
    far.assign().await;
    far.hear_report().await;
    // The window opens so far that more log is ready to go than the link takes.
    while far.log.len() < 2 << 20 {
        match far.link.rx.recv().await.unwrap() {
            Frame::Binary(bytes) => far.take_log(&bytes).await,
            Frame::Text(_) => {}
        }
    }
    while far.link.rx.len() < QUEUE {
        tokio::task::yield_now().await;
    }
    let slots = vec![SlotView { state: SlotState::Claimed, attempt: Some(AT), image: None }];
    farm.hands.inputs.send(Input::Slots(slots.clone())).await.unwrap();
    while farm.hands.inputs.capacity() < farm.hands.inputs.max_capacity() {
        tokio::task::yield_now().await;
    }
    let mut frames = Vec::new();
    for _ in 0..2 * QUEUE {
        frames.push(far.link.rx.recv().await.unwrap());
    }
    let beat = |frame: &Frame| match frame {
        Frame::Text(text) => match ToOrchestrator::decode(text).unwrap() {
            ToOrchestrator::Heartbeat(beat) => beat.slots == slots,
            _ => false,
        },
        Frame::Binary(_) => false,
    };
    let at = frames.iter().position(beat).expect("the heartbeat");
    let overtaken = frames[QUEUE..at].iter().all(|frame| matches!(frame, Frame::Text(_)));
    assert!(at >= QUEUE && overtaken, "it is behind what had left, and before all log that had not");
    assert!(matches!(frames.last(), Some(Frame::Binary(_))), "more log was waiting");
    drop(far);
    farm.far.close();
    farm.life.hard.cancel();
    assert_eq!(farm.stopped().await, Over::Stopped, "without a farm there is nothing to wait for");
}

#[tokio::test]
async fn after_a_cut_the_session_goes_on_where_the_farm_stands() {
    let mut farm = farm(Spool::memory(), vec![], |hands, mut stop| async move {
        hands.log(output()).await;
        let how = stop.recv().await;
        assert_eq!(how, Some(Stop::Cancel { grace_ms: 7 }));
        hands.end(End::because(EndReason::UserCanceled, "")).await;
    });
    let (mut far, _) = farm.open().await;
    far.assign().await;
    far.hear_report().await;
    drop(far);
    let (mut far, hello) = farm.open().await;
    assert_eq!(hello.held.len(), 1);
    assert_eq!((hello.held[0].state, hello.held[0].seq), (HeldState::Running, 1));
    far.log = output()[..1_000].to_vec();
    far.order(Order::Continue { attempt: AT, handle: 5, log_durable: 1_000, seq: 1 }).await;
    far.order(Order::Cancel { attempt: AT, grace_ms: 7 }).await;
    assert!(matches!(far.hear_report().await, (2, Report::Result(_))));
    assert!(far.log == output());
    far.order(Order::ResultAck { attempt: AT }).await;
    assert!(matches!(far.hear().await, Some(ToOrchestrator::Closed { .. })));
    farm.life.soft.cancel();
    assert_eq!(farm.stopped().await, Over::Stopped);
}

#[tokio::test]
async fn a_hard_stop_gives_jobs_back_and_an_identity_used_twice_ends_the_daemon() {
    for (supersede, want) in [(false, KillReason::Shutdown), (true, KillReason::Fenced)] {
        let (told, mut tells) = mpsc::channel(1);
        let mut farm = farm(Spool::memory(), vec![], move |hands, mut stop| {
            let told = told.clone();
            async move {
                told.send(stop.recv().await).await.unwrap();
                hands.end(End::because(EndReason::WorkerDrained, "")).await;
            }
        });
        let (mut far, _) = farm.open().await;
        far.assign().await;
        far.hear_report().await;
        if supersede {
            far.say(ToWorker::Superseded).await;
        } else {
            farm.life.hard.cancel();
            assert!(matches!(far.hear_report().await, (2, Report::Result(_))), "it still says how the job ended");
            far.order(Order::ResultAck { attempt: AT }).await;
        }
        assert_eq!(tells.recv().await, Some(Some(Stop::Kill(want))));
        assert_eq!(farm.stopped().await, if supersede { Over::Superseded } else { Over::Stopped });
    }
}

#[tokio::test]
async fn a_spool_that_fails_ends_the_daemon_and_what_runs() {
    let (told, mut tells) = mpsc::channel(1);
    let mut farm = farm(Spool::memory(), vec![], move |hands, mut stop| {
        let told = told.clone();
        async move {
            hands.spool.remove(AT).await.unwrap();
            hands.report(phase()).await;
            told.send(stop.recv().await).await.unwrap();
        }
    });
    let (mut far, _) = farm.open().await;
    far.assign().await;
    assert_eq!(tells.recv().await, Some(Some(Stop::Kill(KillReason::Shutdown))));
    assert!(matches!(farm.stopped().await, Over::Spool(_)));
}

#[tokio::test]
async fn an_executor_that_vanishes_is_a_fault_of_the_farm() {
    let mut farm = farm(Spool::memory(), vec![], |_, _| async {});
    let (mut far, _) = farm.open().await;
    far.say(ToWorker::Order { order: Order::Fence { attempt: AT } }).await;
    far.link.tx.send(Frame::Text(r#"{"type":"sing"}"#.into())).await.unwrap();
    assert_eq!(far.hear().await, Some(ToOrchestrator::Unsupported { message: "sing".into() }));
    far.assign().await;
    far.hear_report().await;
    let (_, report) = far.hear_report().await;
    let Report::Result(result) = report else { panic!("{report:?}") };
    assert_eq!(result.end.reason, Some(EndReason::InternalError));
    far.link.tx.send(Frame::Binary(Bytes::from_static(b"?"))).await.unwrap();
    let (mut far, hello) = farm.open().await;
    assert_eq!(hello.held[0].state, HeldState::ResultPending);
    far.order(Order::ResultAck { attempt: AT }).await;
    assert!(matches!(far.hear().await, Some(ToOrchestrator::Closed { .. })));
    farm.life.soft.cancel();
    assert_eq!(farm.stopped().await, Over::Stopped);
}

#[tokio::test]
async fn an_earlier_daemons_result_is_finished_with_its_artifacts() {
    let spool = Spool::memory();
    let hands = Hands { spool: Arc::new(spool), inputs: mpsc::channel(9).0 };
    hands.spool.begin(&assignment(1)).await.unwrap();
    hands.spool.append(AT, Bytes::from_static(b"log")).await.unwrap();
    let mut file = hands.spool.stash(AT).await.unwrap();
    file.write(Bytes::from_static(b"artifact")).await.unwrap();
    let (digest, _) = file.finish().await.unwrap();
    let (timings, facts) = (Timings::default(), BTreeMap::new());
    let end = Box::new(ResultReport { end: End::success(), timings, log_len: 3, artifacts: 1, facts });
    hands.spool.record(AT, &[(1, Report::Accepted), (2, Report::Result(end))]).await.unwrap();

    let (spool, held) = hands.spool.reopen().unwrap();
    let reports = spool.reports(AT, 0).await.unwrap();
    let mut farm = farm(spool, vec![(held[0].clone(), reports)], |_, _| async { panic!("nothing is started") });
    let (mut far, hello) = farm.open().await;
    assert_eq!(hello.held, held);
    far.order(Order::Continue { attempt: AT, handle: 5, log_durable: 0, seq: 1 }).await;
    assert!(matches!(far.hear().await, Some(ToOrchestrator::Report { seq: 2, .. })));
    assert_eq!(far.log, b"log");
    far.say(ToWorker::Missing { attempt: AT, seq: 2, log_len: 3, artifacts: vec![digest] }).await;
    assert!(matches!(far.hear().await, Some(ToOrchestrator::Report { seq: 2, .. })));
    assert_eq!(farm.puts.recv().await, Some(digest));
    far.order(Order::ResultAck { attempt: AT }).await;
    assert!(matches!(far.hear().await, Some(ToOrchestrator::Closed { .. })));
    farm.life.soft.cancel();
    assert_eq!(farm.stopped().await, Over::Stopped);
}

#[tokio::test]
async fn a_want_of_descriptors_costs_at_most_the_job_that_would_begin() {
    if !alone("session::drive::tests::a_want_of_descriptors_costs_at_most_the_job_that_would_begin") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (ready, mut is_ready) = mpsc::channel(1);
    let go = Arc::new(tokio::sync::Notify::new());
    let told = go.clone();
    let mut farm = farm(Spool::open(dir.path()).unwrap().0, vec![], move |hands, mut stop| {
        let (ready, go) = (ready.clone(), told.clone());
        async move {
            go.notified().await;
            // Its directory is new: it is to be durable with the next report.
            let stash = hands.spool.stash(AT).await.unwrap();
            ready.send(Short::begin()).await.ok().unwrap();
            hands.report(phase()).await;
            drop(stash);
            assert_eq!(stop.recv().await, Some(Stop::Cancel { grace_ms: 7 }));
            hands.end(End::because(EndReason::UserCanceled, "")).await;
        }
    });
    let (mut far, _) = farm.open().await;
    let short = Short::begin();
    let earlier = AttemptRef { attempt: AT.attempt - 1, ..AT };
    far.order(Order::Assign(Box::new(Assignment { attempt: earlier, ..assignment(4) }))).await;
    assert!(matches!(far.hear().await, Some(ToOrchestrator::Report { seq: 1, report: Report::Refused { .. }, .. })));
    drop(short);
    far.assign().await;
    assert_eq!(far.hear_report().await, (1, Report::Accepted));
    go.notify_one();
    let short = is_ready.recv().await.unwrap();
    far.hear_beats(4).await;
    drop(short);
    assert_eq!(far.hear_report().await, (2, phase()));
    far.order(Order::Cancel { attempt: AT, grace_ms: 7 }).await;
    assert!(matches!(far.hear_report().await, (3, Report::Result(_))));
    farm.life.hard.cancel();
    assert_eq!(farm.stopped().await, Over::Stopped);
}

#[tokio::test]
async fn a_log_that_cannot_be_read_for_want_of_descriptors_is_read_later() {
    if !alone("session::drive::tests::a_log_that_cannot_be_read_for_want_of_descriptors_is_read_later") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (spool, _) = Spool::open(dir.path()).unwrap();
    spool.begin(&assignment(1)).await.unwrap();
    spool.append(AT, output().into()).await.unwrap();
    spool.record(AT, &[(1, Report::Accepted)]).await.unwrap();
    // In a new daemon the log is not open.
    let (spool, held) = spool.reopen().unwrap();
    let mut farm = farm(spool, vec![(held[0].clone(), vec![])], |_, _| async { panic!("nothing is started") });
    let (mut far, _) = farm.open().await;
    let short = Short::begin();
    far.order(Order::Continue { attempt: AT, handle: 5, log_durable: 0, seq: 1 }).await;
    far.hear_beats(4).await;
    drop(short);
    let closed = ToOrchestrator::Closed { attempt: AT, teardown_ms: 0, log_len: output().len() as u64 };
    assert_eq!(far.hear().await, Some(closed));
    assert!(far.log == output(), "no byte is lost: {} bytes", far.log.len());
    farm.life.soft.cancel();
    assert_eq!(farm.stopped().await, Over::Stopped);
}
