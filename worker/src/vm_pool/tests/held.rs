//! A spare and the eviction of its image, in both orders.

use alloy_shared::wire::image::{ImageWant, ImageWish};

use super::*;

/// Two images fill the budget; a third one can be brought.
async fn rig(slots: usize, removes: Semaphore) -> Rig {
    let fake = Fake {
        away: Mutex::new(["third", "r/own:latest"].map(str::to_owned).into()),
        finds: Some(Semaphore::new(Semaphore::MAX_PERMITS)),
        removes: Some(removes),
        ..Fake::default()
    };
    Rig::with(slots, fake, Some(2)).await
}

impl Rig {
    /// Brings the third image, beyond what the budget allows.
    async fn third(&mut self, generation: i64) {
        let wish = ImageWish { name: "third".into(), want: ImageWant::Present, pinned: false, generation };
        self.images.wish(vec![wish]);
        let look = async {
            loop {
                if let Some(Input::Images(inventory)) = self.inputs.recv().await
                    && inventory.images.iter().any(|report| report.name == "third" && report.generation == generation)
                {
                    return;
                }
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), look).await.expect("the third image is here");
    }
}

#[tokio::test]
async fn the_image_of_a_spare_that_is_decided_stays_until_it_is_cloned() {
    let mut rig = rig(2, Semaphore::new(Semaphore::MAX_PERMITS)).await;
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
    let claimed = rig.pool.claim(attempt(1), Some("other"), NetworkPolicy::Default).await.unwrap();
    let finds = rig.fake.finds.as_ref().unwrap();
    finds.forget_permits(Semaphore::MAX_PERMITS);
    // The next spare is one of what was just asked for.
    drop(claimed);
    rig.slots(&[(SlotState::Cloning, None), (SlotState::Warm, None)]).await;
    // With the second one, what the first one is too much was decided.
    rig.third(1).await;
    rig.third(2).await;
    assert_eq!(*rig.fake.removing.lock().unwrap(), []);
    rig.fake.finds.as_ref().unwrap().add_permits(9);
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
    assert_eq!(rig.fake.made.lock().unwrap().last(), Some(&Digest::of(b"other")));
}

#[tokio::test]
async fn no_spare_is_made_of_an_image_that_is_being_removed() {
    let mut rig = rig(1, Semaphore::new(0)).await;
    rig.slots(&[(SlotState::Warm, None)]).await;
    rig.third(1).await;
    until(|| !rig.fake.removing.lock().unwrap().is_empty()).await;
    rig.pool.change(wish(1, "own", &[("other", 1)])).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(*rig.fake.made.lock().unwrap(), [Digest::of(b"own")]);
    rig.fake.removes.as_ref().unwrap().add_permits(1);
    until(|| rig.fake.made.lock().unwrap().len() == 2).await;
    assert_eq!(rig.fake.made.lock().unwrap()[1], Digest::of(b"other"), "after it was brought again");
    assert_eq!(rig.fake.alive.lock().unwrap().len(), 1);
}
