//! P: makes and destroys the VM of a slot, each stage by its own clock.

use std::sync::Arc;

use alloy_shared::id::AttemptRef;
use alloy_shared::wire::vm::{Miss, VmStages};

use super::{Done, Made, Runner, unless_halted, within};
use crate::image_shelf::Use;
use crate::provider::{ImageRef, Shape, VmError, VmFault, VmName, inbox_of};
use crate::vm_plan::Slot;

/// An image that nobody removes while a VM of it is being made.
#[derive(Clone)]
pub(super) struct Held {
    pub image: Use,
    /// Somebody waits for the VM.
    pub by_claim: bool,
}

impl Runner {
    /// Makes a VM of an image that is held, and stays so until the VM is there.
    pub(super) fn make(&mut self, slot: usize, image: ImageRef, held: Held) {
        let faults = match &self.slots[slot] {
            Slot::Cold { faults, .. } => *faults,
            Slot::Cloning { .. }
            | Slot::Booting { .. }
            | Slot::Warm { .. }
            | Slot::Claimed { .. }
            | Slot::Recycling { .. }
            | Slot::Quarantined { .. } => return,
        };
        self.made += 1;
        let vm = VmName::mint(self.nonce, self.made);
        let is_kept = self.is_kept(&image);
        let (env, provider, ms) =
            (Arc::clone(&self.setup.env), Arc::clone(&self.setup.provider), self.setup.limits.boot_ms);
        let (name, images, halt) = (vm.clone(), Arc::clone(&self.setup.images), self.halt.clone());
        self.slots[slot] = Slot::Cloning { vm, image: image.clone(), faults };
        self.work.push(Box::pin(async move {
            let made = unless_halted(
                &halt,
                within(&env, ms, async {
                    // The claim has just asked. For a spare the host says what the name stands for by now, and what was
                    // asked for lately is no reason to bring it again.
                    let image = if held.by_claim {
                        held.image.clone()
                    } else if is_kept || provider.find(&image).await?.is_some() {
                        images.get(&image).await?
                    } else {
                        return Err(VmError::farm(VmFault::NoImage, format!("{image} is gone from this host")));
                    };
                    let start = env.now().mono;
                    provider.create(&name, &image.digest(), &Shape::default()).await?;
                    let clone_ms = Some(env.now().mono.since(start));
                    drop(held);
                    Ok(Made { image, stages: VmStages { clone_ms, ..VmStages::default() } })
                }),
            );
            Done::Cloned { slot, made: made.await }
        }));
    }

    pub(super) fn boot(&mut self, slot: usize, mut made: Made) {
        let Slot::Cloning { vm, image, faults } = &self.slots[slot] else { return };
        let (vm, image, faults) = (vm.clone(), image.clone(), *faults);
        let inbox = inbox_of(&self.setup.state_dir, &vm);
        let (env, provider, ms) =
            (Arc::clone(&self.setup.env), Arc::clone(&self.setup.provider), self.setup.limits.boot_ms);
        self.slots[slot] = Slot::Booting { vm: vm.clone(), image, faults };
        let halt = self.halt.clone();
        self.work.push(Box::pin(async move {
            let start = env.now().mono;
            let guest = unless_halted(&halt, within(&env, ms, provider.boot(&vm, &inbox))).await;
            let whole = env.now().mono.since(start);
            if let Ok(guest) = &guest {
                let told = guest.boot_times();
                made.stages.boot_ms = told.boot_ms.or(Some(whole));
                made.stages.agent_ms = told.agent_ms;
            }
            Done::Booted { slot, made, guest }
        }));
    }

    /// Destroys what is in the slot. It keeps its attempt until the VM is gone.
    pub(super) fn destroy(&mut self, slot: usize, attempt: Option<AttemptRef>, faults: u32) {
        let vm = match &self.slots[slot] {
            Slot::Cloning { vm, .. }
            | Slot::Booting { vm, .. }
            | Slot::Warm { vm, .. }
            | Slot::Claimed { vm, .. }
            | Slot::Quarantined { vm: Some(vm), .. } => vm.clone(),
            Slot::Cold { .. } | Slot::Recycling { .. } | Slot::Quarantined { vm: None, .. } => return,
        };
        self.running[slot] = None;
        self.watches[slot] = None;
        let (env, provider, ms) =
            (Arc::clone(&self.setup.env), Arc::clone(&self.setup.provider), self.setup.limits.boot_ms);
        let name = vm.clone();
        self.slots[slot] = Slot::Recycling { vm, attempt, faults };
        self.work.push(Box::pin(async move {
            Done::Destroyed { slot, result: within(&env, ms, provider.destroy(&name)).await }
        }));
    }

    /// Remembers why this slot has no warm VM from here on, for whoever asks for one.
    pub(super) fn gap(&mut self, slot: usize, why: Miss) {
        self.gaps[slot] = match &self.slots[slot] {
            Slot::Cloning { image, .. }
            | Slot::Booting { image, .. }
            | Slot::Warm { image, .. }
            | Slot::Claimed { image, .. } => Some((image.clone(), why)),
            Slot::Cold { .. } | Slot::Recycling { .. } | Slot::Quarantined { .. } => None,
        };
    }
}
