//! P: the operator's hooks around one attempt. What a hook takes before the job belongs to the stage `vm`.

use std::collections::BTreeMap;
use std::sync::Arc;

use alloy_shared::wire::job::{End, Reason};

use super::{Attempt, Ended, next_stop, or_stop};
use crate::hooks::Hook;
use crate::job_env::{Place, farm_env};
use crate::session::{KillReason, Stop};
use crate::vm_pool::Claimed;

impl Attempt {
    /// Nothing of the job is in the VM yet: a hook that fails sends it to another worker.
    pub(super) async fn pre_job(&mut self) -> Result<(), Ended> {
        let Some(claimed) = &self.claimed else { return Ok(()) };
        let (ctx, about) = (Arc::clone(&self.ctx), self.about(claimed));
        let hook = ctx.hooks.run(Hook::PreJob, self.at, about, ctx.limits.hook_ms);
        or_stop(&mut self.stop, hook).await?.map_err(|why| {
            tracing::warn!(attempt = %self.at, "pre-job {why}");
            let message = format!("the pre-job hook of this worker {why}");
            Ended::End(End::because(Reason::VmStartFailure, message))
        })
    }

    /// Gives the VM back. The hook of its attempt may be still to come.
    pub(super) async fn release(&mut self) {
        if let Some(claimed) = self.claimed.take() {
            self.left = Some(self.about(&claimed));
            self.ctx.pool.release(claimed).await;
        }
    }

    /// Runs the hook of an attempt that has a VM or had one, and gives the VM back. An attempt that is not ours any more loses
    /// its VM first.
    pub(super) async fn give_back(&mut self) {
        let hurried = self.told.as_ref().is_none_or(|end| end.reason == Some(Reason::WorkerDrained));
        if hurried {
            self.release().await;
        }
        let mut about = match (&self.claimed, self.left.take()) {
            (Some(claimed), _) => self.about(claimed),
            (None, Some(left)) => left,
            (None, None) => return,
        };
        if let Some(end) = &self.told {
            about.insert("ALLOY_OUTCOME".to_owned(), end.outcome().to_string());
            if let Some(reason) = end.reason {
                about.insert("ALLOY_REASON".to_owned(), reason.to_string());
            }
            if let Some(code) = end.exit_code {
                about.insert("ALLOY_EXIT_CODE".to_owned(), code.to_string());
            }
        }
        let limits = &self.ctx.limits;
        let within_ms = if hurried { limits.hook_hurried_ms } else { limits.hook_ms };
        self.post_job(about, within_ms).await;
        self.release().await;
    }

    /// It changes nothing: the job has ended, and its end is told.
    async fn post_job(&mut self, about: BTreeMap<String, String>, within_ms: u64) {
        let ctx = Arc::clone(&self.ctx);
        let hook = ctx.hooks.run(Hook::PostJob, self.at, about, within_ms);
        let stopped = async {
            loop {
                match next_stop(&mut self.stop).await {
                    Stop::Kill(KillReason::Shutdown) => return,
                    Stop::Kill(KillReason::Fenced | KillReason::LeaseLost) | Stop::Cancel { .. } => {}
                }
            }
        };
        let done = tokio::select! {
            biased;
            done = hook => done,
            () = stopped => Err("was given up: the worker is stopping".to_owned()),
        };
        if let Err(why) = done {
            tracing::warn!(attempt = %self.at, "post-job {why}");
        }
    }

    fn about(&self, claimed: &Claimed) -> BTreeMap<String, String> {
        let digest = claimed.digest.to_string();
        let place = Place {
            worker: &self.ctx.worker_name,
            image: &claimed.image.0,
            image_digest: &digest,
            vm_source: claimed.vm_source(),
        };
        let mut about = farm_env(&self.assignment, &place);
        about.insert("ALLOY_VM".to_owned(), claimed.vm.to_string());
        about
    }
}
