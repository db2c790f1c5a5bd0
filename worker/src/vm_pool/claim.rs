//! P: what an attempt sees of the pool: it asks for a VM, has it to itself, gives it back.

use std::path::PathBuf;
use std::sync::Arc;

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::wire::image::canonical;
use alloy_shared::wire::vm::{Miss, VmStages};
use tokio::sync::{mpsc, oneshot};

use super::{Ask, CLAIM_TRIES, Freed, VmPool, gone, within};
use crate::image_shelf::Use;
use crate::provider::{Guest, ImageRef, NetworkPolicy, VmError, VmFault, VmName};
use crate::vm_plan::Waiting;

/// Before a claim that met a fault of the host tries again.
const JUDGED_PAUSE_MS: u64 = 1_000;

/// A VM that one attempt has to itself. Dropping it destroys the VM and frees the slot.
pub struct Claimed {
    pub vm: VmName,
    pub guest: Arc<dyn Guest>,
    pub image: ImageRef,
    pub digest: Digest,
    /// What the guest sees read-only.
    pub inbox: PathBuf,
    /// What it cost, and whether it was waiting for the claim or the other way round. None if it is no VM but the host.
    pub stages: Option<VmStages>,
    pub(super) slot: usize,
    pub(super) freed: mpsc::Sender<Freed>,
    pub(super) gone: Option<oneshot::Sender<()>>,
}

impl Claimed {
    /// `warm` or `cold`, if it is a VM.
    pub fn vm_source(&self) -> Option<&'static str> {
        self.stages.map(|stages| if stages.warm { "warm" } else { "cold" })
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        // There is room for every slot and every claim, and each is sent once. A closed channel: the pool is gone.
        let _pool_is_gone = self.freed.try_send(Freed::Slot { slot: self.slot, gone: self.gone.take() });
    }
}

pub(super) struct Claim {
    pub(super) waiting: Waiting,
    pub(super) image: Use,
    /// The job said which image it wants.
    pub(super) named: bool,
    pub(super) reply: oneshot::Sender<Result<Claimed, VmError>>,
    /// Why no VM was waiting for it, once that is known.
    pub(super) missed: Option<Miss>,
    /// VMs for it that did not come.
    pub(super) failures: u32,
}

/// Tells the pool that a claim's future was dropped, so that its slot is offered again.
struct Interest(mpsc::Sender<Freed>);

impl Drop for Interest {
    fn drop(&mut self) {
        let _full_means_looking_anyway = self.0.try_send(Freed::Claims);
    }
}

impl VmPool {
    /// Takes a VM of this image (the worker's own if none is named), with the network policy in force.
    pub async fn claim(
        &self,
        attempt: AttemptRef,
        image: Option<&str>,
        network: NetworkPolicy,
    ) -> Result<Claimed, VmError> {
        let named = image.is_some();
        let image = image.map_or_else(|| self.image.borrow().clone(), |name| ImageRef(canonical(name)));
        let asked = self.env.now().mono;
        let (here, was_away) = self.bring(&image).await?;
        let pull_ms = was_away.then(|| self.env.now().mono.since(asked));
        let (mut tries, mut missed) = (1, None);
        loop {
            let waiting = Waiting { attempt, image: image.clone() };
            let mut claimed = self.wait(waiting, here.clone(), named, missed).await?;
            let start = self.env.now().mono;
            match within(&self.env, self.limits.boot_ms, self.provider.restrict(&claimed.vm, &network)).await {
                Ok(()) => {
                    if let Some(stages) = &mut claimed.stages {
                        stages.clock_ms = Some(self.env.now().mono.since(start));
                        stages.pull_ms = pull_ms;
                    }
                    return Ok(claimed);
                }
                // A VM that is not as it must be is thrown away; nothing of the job was in it.
                Err(error) if error.retry && tries < CLAIM_TRIES => {
                    tracing::warn!(vm.id = %claimed.vm, %error, "a VM is not fit for its job; taking another one");
                    missed = Some(if error.what == VmFault::Network { Miss::Network } else { Miss::Unfit });
                    tries += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// An image that nobody has is the asker's fault and not the slot's. A fault of the host is the pool's to judge.
    /// A download goes on for as long as it goes on. True if it was not here.
    async fn bring(&self, image: &ImageRef) -> Result<(Use, bool), VmError> {
        loop {
            match within(&self.env, self.limits.image_ms, self.images.fetch(image)).await {
                Err(error) if error.what == VmFault::Host => {
                    let (reply, judged) = oneshot::channel();
                    self.asks.send(Ask::Judge { error, reply }).await.map_err(|_| gone())?;
                    judged.await.map_err(|_| gone())??;
                    self.env.sleep_until(self.env.now().mono + JUDGED_PAUSE_MS).await;
                }
                done => return done,
            }
        }
    }

    async fn wait(&self, waiting: Waiting, image: Use, named: bool, missed: Option<Miss>) -> Result<Claimed, VmError> {
        let (reply, answer) = oneshot::channel();
        let claim = Claim { waiting, image, named, reply, missed, failures: 0 };
        let _tells_the_pool = Interest(self.freed.clone());
        self.asks.send(Ask::Claim(claim)).await.map_err(|_| gone())?;
        within(&self.env, self.limits.claim_ms, async { answer.await.map_err(|_| gone())? }).await
    }

    /// Gives a VM back and returns when it is gone. If it will not go, the slot stays closed and this returns anyway.
    pub async fn release(&self, mut claimed: Claimed) {
        let (gone, when_gone) = oneshot::channel();
        claimed.gone = Some(gone);
        drop(claimed);
        tokio::select! {
            biased;
            _ = when_gone => {}
            () = self.env.sleep_until(self.env.now().mono + self.limits.boot_ms) => {}
        }
    }
}
