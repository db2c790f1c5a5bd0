//! What the end of the worker's lease does to its VMs, and what the pool makes of that.

use super::*;
use crate::vm_plan::SLOT_FAULTS_MAX;

impl Rig {
    /// Waits until the only slot is warm. It must not rest on the way.
    async fn warms_up(&mut self) {
        let look = async {
            loop {
                if let Some(Input::Slots(slots)) = self.inputs.recv().await {
                    assert_ne!(slots[0].state, SlotState::Quarantined, "the slot is charged");
                    if slots[0].state == SlotState::Warm {
                        return;
                    }
                }
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), look).await.expect("a VM comes up");
    }
}

#[tokio::test]
async fn warm_vms_that_the_fence_kills_are_replaced_when_it_lies_ahead_again_and_not_before() {
    let mut rig = Rig::new(2, Fake::default()).await;
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
    rig.fence.send_replace(Mono(0));
    for other in [SlotState::Warm, SlotState::Cold] {
        rig.fake.dies.notify_one();
        rig.slots(&[(SlotState::Cold, None), (other, None)]).await;
    }
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(rig.fake.made.lock().unwrap().len(), 2, "nothing that would be killed is made");
    rig.fence.send_replace(Mono(u64::MAX));
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
}

#[tokio::test]
async fn a_vm_that_is_fenced_while_it_boots_charges_nothing_to_its_slot() {
    let mut rig = Rig::new(1, Fake { starts: Some(Semaphore::new(0)), ..Fake::default() }).await;
    rig.fake.boots(&[VmFault::Fenced; SLOT_FAULTS_MAX as usize]);
    rig.fake.starts.as_ref().unwrap().add_permits(9);
    rig.warms_up().await;
}

#[tokio::test]
async fn a_vm_that_does_not_come_while_no_lease_runs_charges_nothing_whatever_it_says() {
    let mut rig = Rig::new(1, Fake { starts: Some(Semaphore::new(0)), ..Fake::default() }).await;
    rig.slots(&[(SlotState::Booting, None)]).await;
    rig.fake.boots(&[VmFault::Start; SLOT_FAULTS_MAX as usize]);
    rig.fence.send_replace(Mono(0));
    rig.fake.starts.as_ref().unwrap().add_permits(9);
    rig.slots(&[(SlotState::Cold, None)]).await;
    rig.fence.send_replace(Mono(u64::MAX));
    rig.warms_up().await;
}
