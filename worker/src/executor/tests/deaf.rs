use super::flood::exec_in;
use super::*;

/// A guest whose command never ends, whatever it is told. Its VM may be lost when it is told to go.
struct Deaf(Option<VmError>);

#[async_trait]
impl Guest for Deaf {
    fn workspace(&self) -> &str {
        "/work"
    }
    async fn unpack(&self, _: &str, _: &str) -> Result<(), VmError> {
        Ok(())
    }
    async fn exec(&self, _: &Command) -> Result<Exec, VmError> {
        let (input, mut orders) = mpsc::channel(4);
        let (bytes, output) = mpsc::channel(4);
        let lost = self.0.clone();
        tokio::task::spawn_blocking(move || {
            while orders.blocking_recv().is_some() {
                if let Some(error) = lost.clone() {
                    let _nobody_asks = bytes.blocking_send(ExecOutput::Lost(error));
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
async fn a_command_that_cannot_be_killed_has_timed_out_and_does_not_begin_anew() {
    let rig = Rig::within(Farm::default(), Limits { kill_budget_ms: 20, ..Limits::default() }).await;
    let dies = || Some(VmError::farm(VmFault::Lost, "the guest is silent"));
    for (lost, reason, why) in [
        (None, Reason::RunTimeout, "could not be killed"),
        (dies(), Reason::RunTimeout, "the guest is silent"),
        (Some(VmError::fenced()), Reason::WorkerLost, "did not reach the farm"),
    ] {
        let assignment = Assignment { timeout_ms: 20, cancel_grace_ms: 20, ..assignment("any") };
        let ended = exec_in(&rig, Arc::new(Deaf(lost)), Arc::clone(&rig.fixture.env), assignment).await;
        let Err(Ended::End(end)) = ended else { panic!("{ended:?}") };
        assert_eq!(end.reason, Some(reason), "{end:?}");
        assert!(end.message.contains(why), "{end:?}");
        assert_eq!(may_begin_anew(&end, 0), reason == Reason::WorkerLost);
    }
}
