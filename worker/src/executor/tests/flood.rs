use alloy_shared::mem_disk::MemDisk;

use super::*;
use crate::spool::mem;

/// A clock that goes on whenever somebody looks.
struct Looked(AtomicU64);

#[async_trait]
impl Env for Looked {
    fn now(&self) -> Now {
        Now { wall: Ms(0), mono: Mono(self.0.fetch_add(1, Ordering::Relaxed)) }
    }
    async fn sleep_until(&self, at: Mono) {
        if self.0.load(Ordering::Relaxed) < at.0 {
            std::future::pending::<()>().await;
        }
    }
    fn spawn(&self, _: &'static str, _: BoxFuture<'static, ()>) {}
    fn dice(&self) -> u64 {
        0
    }
}

/// A guest whose only command has its whole output ready.
struct Chatty;

#[async_trait]
impl Guest for Chatty {
    fn workspace(&self) -> &str {
        "/work"
    }
    async fn unpack(&self, _: &str, _: &str) -> Result<(), VmError> {
        Ok(())
    }
    async fn exec(&self, _: &Command) -> Result<Exec, VmError> {
        let (input, mut orders) = mpsc::channel(4);
        let (bytes, output) = mpsc::channel(65);
        for _ in 0..64 {
            bytes.try_send(ExecOutput::Bytes(Bytes::from_static(b"more"))).unwrap();
        }
        bytes.try_send(ExecOutput::Exit(Exit::Code(0))).unwrap();
        tokio::task::spawn_blocking(move || while orders.blocking_recv().is_some() {});
        Ok(Exec { input, output })
    }
    async fn read(&self, _: &str, _: u64) -> Result<mpsc::Receiver<Bytes>, VmError> {
        Ok(mpsc::channel(1).1)
    }
    async fn list(&self, _: &[ArtifactRule]) -> Result<Listing, VmError> {
        Ok(Listing::default())
    }
}

/// Runs a command in this guest, on a VM of the rig, and returns how it ended.
pub(super) async fn exec_in(
    rig: &Rig,
    guest: Arc<dyn Guest>,
    env: Arc<dyn Env>,
    assignment: Assignment,
) -> Result<End, Ended> {
    let mut claimed = rig.ctx.pool.claim(AT, None, NetworkPolicy::Default).await.unwrap();
    claimed.guest = guest;
    let ctx = Ctx {
        env,
        limits: rig.ctx.limits.clone(),
        pool: Arc::clone(&rig.ctx.pool),
        spool: Arc::clone(&rig.ctx.spool),
        sources: Arc::clone(&rig.ctx.sources),
        upstream: Arc::clone(&rig.ctx.upstream),
        inputs: rig.ctx.inputs.clone(),
        hooks: Arc::clone(&rig.ctx.hooks),
        worker_name: "mini".into(),
    };
    let mut attempt = Attempt {
        ctx: Arc::new(ctx),
        at: AT,
        grant: Grant { attempt: AT, token: assignment.grant.clone() },
        assignment,
        stop: mpsc::channel(1).1,
        timings: Timings::default(),
        claimed: Some(claimed),
        left: None,
        end: None,
        told: None,
        artifacts: AtomicU32::new(0),
    };
    let done = attempt.exec().await;
    let end = attempt.end.take();
    attempt.teardown().await;
    done.map(|()| end.expect("a command that was run has an end"))
}

#[tokio::test]
async fn a_command_that_never_pauses_meets_its_time_out() {
    let rig = Rig::new(Farm::default()).await;
    let short = Assignment { timeout_ms: 1, ..assignment("") };
    rig.ctx.spool.begin(&short).await.unwrap();
    let end = exec_in(&rig, Arc::new(Chatty), Arc::new(Looked(AtomicU64::new(0))), short).await.unwrap();
    assert_eq!(end.reason, Some(Reason::RunTimeout), "its output did not outrun the clock");
    assert!(end.message.starts_with("the command ran longer than ") && end.message.ends_with('s'), "{}", end.message);
}

/// A guest whose command prints without end and hears what it is told only between two chunks that were taken.
#[derive(Default)]
struct Flood {
    told: Arc<Mutex<Vec<ExecInput>>>,
}

#[async_trait]
impl Guest for Flood {
    fn workspace(&self) -> &str {
        "/work"
    }
    async fn unpack(&self, _: &str, _: &str) -> Result<(), VmError> {
        Ok(())
    }
    async fn exec(&self, _: &Command) -> Result<Exec, VmError> {
        let (input, mut orders) = mpsc::channel(4);
        let (bytes, output) = mpsc::channel(1);
        let told = Arc::clone(&self.told);
        tokio::task::spawn_blocking(move || {
            while bytes.blocking_send(ExecOutput::Bytes(Bytes::from_static(b"more"))).is_ok() {
                if let Ok(order) = orders.try_recv() {
                    told.lock().unwrap().push(order);
                    // Whoever was told to go and does not wait for the end has dropped the other side.
                    return drop(bytes.blocking_send(ExecOutput::Exit(Exit::Signal(15))));
                }
            }
        });
        Ok(Exec { input, output })
    }
    async fn read(&self, _: &str, _: u64) -> Result<mpsc::Receiver<Bytes>, VmError> {
        Ok(mpsc::channel(1).1)
    }
    async fn list(&self, _: &[ArtifactRule]) -> Result<Listing, VmError> {
        Ok(Listing::default())
    }
}

#[tokio::test]
async fn a_command_that_is_held_back_for_a_full_disk_can_be_told_to_go() {
    let patient = Limits { log_pressure_ms: 600_000, kill_budget_ms: 100, ..Limits::default() };
    let mut rig = Rig::within(Farm::default(), patient).await;
    let disk = Arc::new(MemDisk::default());
    let spool = Spool::Mem(mem::Mem::on(Arc::clone(&disk)));
    Arc::get_mut(&mut rig.ctx).expect("nothing runs yet").spool = Arc::new(spool);
    let short = Assignment { timeout_ms: 100, cancel_grace_ms: 1_000, ..assignment("") };
    rig.ctx.spool.begin(&short).await.unwrap();
    disk.set_full(true);
    assert!(rig.ctx.spool.is_tight());
    let guest = Flood::default();
    let told = Arc::clone(&guest.told);
    let env = Arc::clone(&rig.ctx.env);
    let end = exec_in(&rig, Arc::new(guest), env, short).await.unwrap();
    assert_eq!((end.reason, end.signal), (Some(Reason::RunTimeout), Some(15)));
    assert_eq!(*told.lock().unwrap(), [ExecInput::Signal(Signal::Term)]);
}

#[test]
fn a_command_without_room_for_its_log_waits_once_and_not_for_ever() {
    let mut pressure = Pressure::default();
    assert!(!pressure.holds(Mono(0), 100, || false));
    assert!(pressure.holds(Mono(10), 100, || true) && pressure.holds(Mono(109), 100, || true));
    assert!(!pressure.holds(Mono(109), 100, || false), "there is room again");
    assert!(pressure.holds(Mono(120), 100, || true), "and a new wait begins");
    assert!(!pressure.holds(Mono(220), 100, || true) && !pressure.holds(Mono(221), 100, || true));
}
