//! P: what the pool does when a VM does not come or does not go: another try, a look for VMs that nobody has, rest.

use std::sync::Arc;

use alloy_shared::env::Mono;
use alloy_shared::wire::vm::Miss;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{CLAIM_TRIES, Done, Runner, destroy_all, within};
use crate::provider::{Guest, ImageRef, VmError, VmFault, VmName};
use crate::vm_care::{Host, Verdict};
use crate::vm_plan::{SLOT_FAULTS_MAX, Slot, rested, stuck};

impl Runner {
    pub(super) fn destroyed(&mut self, slot: usize, result: Result<(), VmError>, now: Mono) {
        let Slot::Recycling { vm, attempt, faults } = self.slots[slot].clone() else { return };
        let quarantine_ms = self.setup.limits.quarantine_ms;
        match result {
            Ok(()) => {
                self.care.gone(slot);
                self.slots[slot] = rested(faults, quarantine_ms, now);
                if let Slot::Quarantined { .. } = self.slots[slot] {
                    tracing::warn!(slot, quarantine_ms, "VMs do not start in this slot; it rests");
                }
                if let Some(gone) = self.leaving[slot].take() {
                    let _nobody_waits = gone.send(());
                }
            }
            Err(error) => {
                tracing::error!(vm.id = %vm, %error, "a VM cannot be destroyed; its slot is closed until it is gone");
                match error.what {
                    // Nobody could even ask it to go.
                    VmFault::Host => _ = self.care.host_failed(&error, now),
                    VmFault::NoImage
                    | VmFault::Pull
                    | VmFault::Start
                    | VmFault::Full
                    | VmFault::Taken
                    | VmFault::Lost
                    | VmFault::Fenced
                    | VmFault::Network
                    | VmFault::Disk
                    | VmFault::Destroy
                    | VmFault::File => self.care.stuck(slot, &vm),
                }
                self.slots[slot] = stuck(vm, attempt, faults, quarantine_ms, now);
            }
        }
    }

    /// A VM did not come. One more is made for whoever waits for its image, then he hears why and may go to another worker.
    pub(super) fn failed(&mut self, slot: usize, error: VmError) {
        let (image, faults) = match &self.slots[slot] {
            Slot::Cloning { image, faults, .. } | Slot::Booting { image, faults, .. } => (image.clone(), *faults),
            Slot::Cold { .. }
            | Slot::Warm { .. }
            | Slot::Claimed { .. }
            | Slot::Recycling { .. }
            | Slot::Quarantined { .. } => return,
        };
        if self.closing.is_some() {
            return self.destroy(slot, None, 0);
        }
        let now = self.setup.env.now().mono;
        let has_vm = |other: &Slot| match other {
            Slot::Cold { .. } | Slot::Cloning { .. } | Slot::Quarantined { vm: None, .. } => false,
            Slot::Booting { .. }
            | Slot::Warm { .. }
            | Slot::Claimed { .. }
            | Slot::Recycling { .. }
            | Slot::Quarantined { vm: Some(_), .. } => true,
        };
        let others = self.slots.iter().enumerate().filter(|(index, other)| *index != slot && has_vm(other)).count();
        // A VM that is killed may say anything before its guard does.
        let error = if self.fence() <= now { VmError::fenced() } else { error };
        if !matches!(self.care.host(), Host::Ill { .. }) {
            tracing::warn!(%image, %error, "a VM did not start");
        }
        let verdict = self.care.failed(slot, &error, others, now);
        self.gap(
            slot,
            match verdict {
                Verdict::Vm | Verdict::Slot => Miss::StartFailed,
                Verdict::Again | Verdict::Ill => Miss::Host,
                Verdict::Fenced => Miss::Died,
            },
        );
        match verdict {
            Verdict::Vm => {
                self.charge(&image, error, CLAIM_TRIES);
                self.give_up(&image);
                self.destroy(slot, None, faults + 1);
            }
            Verdict::Again => {
                self.look();
                self.destroy(slot, None, faults + 1);
            }
            Verdict::Slot => {
                self.charge(&image, error, 0);
                self.destroy(slot, None, SLOT_FAULTS_MAX);
            }
            Verdict::Ill | Verdict::Fenced => self.destroy(slot, None, faults),
        }
    }

    /// Watches a warm VM, so that no job meets one that died while it waited.
    pub(super) fn watch(&mut self, slot: usize, guest: Arc<dyn Guest>) {
        let over = CancellationToken::new();
        self.watches[slot] = Some(over.clone().drop_guard());
        self.work.push(Box::pin(async move {
            let error = tokio::select! {
                biased;
                () = over.cancelled() => None,
                error = guest.ended() => Some(error),
            };
            Done::Ended { slot, error }
        }));
    }

    /// Counts the failure for the first claim of this image, and answers it if that is one too many.
    fn charge(&mut self, image: &ImageRef, error: VmError, most: u32) {
        let Some(index) = self.claims.iter().position(|claim| claim.waiting.image == *image) else { return };
        self.claims[index].failures += 1;
        // A spare's image may be gone, the claim's own is held.
        if !error.retry || self.claims[index].failures >= most {
            let _claimer_is_gone = self.claims.remove(index).reply.send(Err(error));
        }
    }

    pub(super) fn judge(&mut self, error: &VmError, reply: oneshot::Sender<Result<(), VmError>>) {
        let verdict = match self.care.host_failed(error, self.setup.env.now().mono) {
            Verdict::Ill => Err(self.ill()),
            Verdict::Vm | Verdict::Fenced | Verdict::Again | Verdict::Slot => Ok(()),
        };
        let _claimer_is_gone = reply.send(verdict);
    }

    fn ill(&self) -> VmError {
        VmError::farm(VmFault::Host, self.care.trouble().map(|trouble| trouble.why).unwrap_or_default())
    }

    /// On an ill host nobody waits: the farm has other workers, and later this one again.
    pub(super) fn hand_back(&mut self) {
        let Host::Ill { .. } = self.care.host() else { return };
        let error = self.ill();
        for claim in self.claims.drain(..) {
            let _claimer_is_gone = claim.reply.send(Err(error.clone()));
        }
    }

    /// Looks for VMs that nobody has.
    pub(super) fn look(&mut self) {
        if self.sweeping {
            return;
        }
        self.sweeping = true;
        let (env, provider, ms) =
            (Arc::clone(&self.setup.env), Arc::clone(&self.setup.provider), self.setup.limits.boot_ms);
        self.work.push(Box::pin(async move { Done::Listed(within(&env, ms, provider.list()).await) }));
    }

    /// Destroys what was found and belongs to no slot. What was made since the look is not in the list.
    pub(super) fn sweep(&mut self, found: Vec<VmName>) {
        let of = |slot: &Slot| match slot {
            Slot::Cloning { vm, .. }
            | Slot::Booting { vm, .. }
            | Slot::Warm { vm, .. }
            | Slot::Claimed { vm, .. }
            | Slot::Recycling { vm, .. } => Some(vm.clone()),
            Slot::Quarantined { vm, .. } => vm.clone(),
            Slot::Cold { .. } => None,
        };
        let ours: Vec<VmName> = self.slots.iter().filter_map(of).collect();
        let strays: Vec<VmName> = found.into_iter().filter(|vm| !ours.contains(vm)).collect();
        let (env, provider, ms) =
            (Arc::clone(&self.setup.env), Arc::clone(&self.setup.provider), self.setup.limits.boot_ms);
        for vm in &strays {
            tracing::warn!(vm.id = %vm, "destroying a VM that nobody has");
        }
        self.work.push(Box::pin(async move { Done::Swept(destroy_all(&env, &provider, ms, &strays).await) }));
    }
}
